//! A file system in user space that answers no question about its one file.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use tempfile::TempDir;

/// Operations of the protocol (linux/fuse.h).
const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// Inode number of the file.
const FILE: u64 = 2;

/// A mounted file system with a file that can be opened. Whoever asks anything more of it (its
/// size, a mapping, even to close it) waits until this is dropped.
pub(crate) struct SilentFuse {
    folder: TempDir,
    server: Option<JoinHandle<()>>,
    /// Every file that was opened: to close one before the end would wait.
    opened: Vec<Arc<OwnedFd>>,
}

impl SilentFuse {
    /// Mounts it; takes root.
    pub(crate) fn mount() -> Self {
        let folder = TempDir::new().unwrap();
        let mut device = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let text = |text: &str| CString::new(text).unwrap();
        let (kind, target, options) = (
            text("fuse"),
            text(folder.path().to_str().unwrap()),
            text(&options),
        );
        // SAFETY: all arguments are strings that live until it returns.
        let mounted = unsafe {
            libc::mount(
                kind.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                libc::MS_NOSUID,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        let server = std::thread::spawn(move || serve(&mut device));
        Self {
            folder,
            server: Some(server),
            opened: Vec::new(),
        }
    }

    /// The file, opened once more.
    pub(crate) fn open(&mut self) -> Arc<OwnedFd> {
        let path = self.folder.path().join("memory");
        let file = File::options().read(true).write(true).open(path);
        let file = Arc::new(OwnedFd::from(file.unwrap()));
        self.opened.push(Arc::clone(&file));
        file
    }
}

impl Drop for SilentFuse {
    fn drop(&mut self) {
        let target = CString::new(self.folder.path().to_str().unwrap()).unwrap();
        // SAFETY: the argument is a string that lives until it returns.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Answers what leads to an open file, and nothing else, until the file system is unmounted.
fn serve(device: &mut File) {
    let mut request = vec![0; 1 << 18];
    while let Ok(count) = device.read(&mut request) {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let unique = request[8..16].to_vec();
        assert!(count >= 40, "a request has a header");
        let body = match word(4) {
            INIT => {
                // Version 7.31, then limits: 16 requests in the background, writes of a page.
                let mut body = [0; 64];
                body[0..4].copy_from_slice(&7_u32.to_ne_bytes());
                body[4..8].copy_from_slice(&31_u32.to_ne_bytes());
                body[16..18].copy_from_slice(&16_u16.to_ne_bytes());
                body[20..24].copy_from_slice(&4096_u32.to_ne_bytes());
                body.to_vec()
            }
            LOOKUP => {
                // The entry is valid for an hour, its attributes are to be asked for each time.
                let mut body = [0; 128];
                body[0..8].copy_from_slice(&FILE.to_ne_bytes());
                body[16..24].copy_from_slice(&3600_u64.to_ne_bytes());
                body[40..48].copy_from_slice(&FILE.to_ne_bytes());
                body[48..56].copy_from_slice(&(1_u64 << 20).to_ne_bytes());
                body[100..104].copy_from_slice(&(libc::S_IFREG | 0o600).to_ne_bytes());
                body[104..108].copy_from_slice(&1_u32.to_ne_bytes());
                body.to_vec()
            }
            OPEN => vec![0; 16],
            _ => continue,
        };
        let mut reply = u32::try_from(16 + body.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        reply.extend([0; 4]);
        reply.extend(unique);
        reply.extend(body);
        if device.write_all(&reply).is_err() {
            return;
        }
    }
}
