//! The listening socket's file: made with care, removed at the end.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringway_api::{BadValue, MAX_SOCKET_PATH, SocketAccess};
use ringway_dataplane::SocketFile;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::client;
use crate::config::DEFAULT_CONTROL;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[error("can't listen at {path}: {reason}")]
pub struct BindError {
    /// The path.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
    /// What to do.
    pub hint: String,
}

/// A listening Unix socket with a file, which it removes when it is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    /// The file that this process made, held open so that no other can get its inode number.
    file: OwnedFd,
}

impl ControlSocket {
    /// Listens at `path`, for those whom `access` names. A socket that nobody listens at any more is
    /// replaced. The directory is made for the default path only.
    ///
    /// # Errors
    /// A live process listens there, another kind of file is in the way, there is nobody of such a
    /// name, or the system refuses.
    pub fn bind(path: &Path, access: &SocketAccess) -> Result<Self, BindError> {
        let refuse = |reason: String, hint: &str| BindError {
            path: path.to_owned(),
            reason,
            hint: hint.to_owned(),
        };
        let system = |error: io::Error| refuse(error.to_string(), hint_for(&error));
        let bad = |bad: BadValue| refuse(bad.reason, &bad.hint);
        let file = SocketFile::of(access).map_err(bad)?;
        let address = SocketAddrUnix::new(path).map_err(|_| {
            refuse(
                "the path is too long".into(),
                &format!("a path has at most {MAX_SOCKET_PATH} bytes"),
            )
        })?;
        if path == Path::new(DEFAULT_CONTROL) {
            make_parent(path).map_err(system)?;
        }
        // Two daemons that start together take turns: the second finds the first one's live socket.
        let _turn = lock_parent(path).map_err(system)?;
        clear_the_way(path, &refuse)?;
        let socket = bind(&address).map_err(system)?;
        let socket = Self {
            listener: socket.into(),
            path: path.to_owned(),
            file: file.settle(path).map_err(bad)?,
        };
        let listening = rustix::net::listen(&socket.listener, BACKLOG);
        listening.map_err(|error| system(error.into()))?;
        Ok(socket)
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let ours = rustix::fs::fstat(&self.file).ok();
        let still_ours = fs::symlink_metadata(&self.path).is_ok_and(|there| {
            ours.is_some_and(|ours| (there.dev(), there.ino()) == (ours.st_dev, ours.st_ino))
        });
        if still_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "can't remove the control socket");
        }
    }
}

fn hint_for(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "run ringwayd as root, or choose a path that you may write with --control"
        }
        io::ErrorKind::NotFound => "make the directory first, or choose another with --control",
        _ => "choose another path with --control",
    }
}

fn make_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.exists() => fs::create_dir(parent),
        _ => Ok(()),
    }
}

/// Holds a lock on the directory, for the moment of binding, without leaving a file behind.
fn lock_parent(path: &Path) -> io::Result<OwnedFd> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(parent, flags, Mode::empty())?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&directory, FlockOperation::LockExclusive))?;
    Ok(directory)
}

fn clear_the_way(path: &Path, refuse: &dyn Fn(String, &str) -> BindError) -> Result<(), BindError> {
    let system = |error: io::Error| refuse(error.to_string(), hint_for(&error));
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(refuse(
            "a file that is no socket is there".into(),
            "move the file away, or choose another path with --control",
        ));
    }
    match client::connect(path, Duration::from_secs(1)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a process that is gone");
            fs::remove_file(path).map_err(system)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(system(error)),
        _ => Err(refuse(
            "a live process listens there".into(),
            "is ringwayd running already? Stop it, or choose another path with --control",
        )),
    }
}

fn bind(address: &SocketAddrUnix) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn bind(path: &Path) -> Result<ControlSocket, BindError> {
        ControlSocket::bind(path, &SocketAccess::default())
    }

    #[test]
    fn the_socket_is_for_owner_and_group_and_goes_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let socket = bind(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_of_a_process_that_is_gone_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        bind(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let first = bind(&path).unwrap();
        let error = bind(&path).unwrap_err();
        assert_eq!(error.reason, "a live process listens there");
        UnixStream::connect(&path).unwrap();
        drop(first);
    }

    #[test]
    fn a_plain_file_a_directory_and_a_link_are_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("elsewhere"), &link).unwrap();
        for path in [&file, &directory.path().to_owned(), &link] {
            let error = bind(path).unwrap_err();
            assert!(error.reason.contains("no socket"), "{error}");
            assert!(!error.hint.is_empty());
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }

    #[test]
    fn a_file_that_took_the_place_of_ours_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let socket = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(socket);
        assert_eq!(fs::read_to_string(&path).unwrap(), "another's");
    }

    #[test]
    fn a_missing_directory_or_a_long_path_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let error = bind(&directory.path().join("no/such.sock")).unwrap_err();
        assert!(error.hint.contains("make the directory"), "{}", error.hint);
        assert!(!directory.path().join("no").exists());
        let long = directory.path().join("x".repeat(200));
        assert!(bind(&long).unwrap_err().reason.contains("too long"));
    }
}
