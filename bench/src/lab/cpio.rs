//! Writer of the `newc` cpio format, which the kernel unpacks as an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// What a directory entry is, besides its permissions.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive that grows in memory; all files belong to root and carry time 0, so that equal
/// contents give equal bytes.
pub(crate) struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
}

impl Archive {
    pub(crate) fn new() -> Archive {
        Archive {
            bytes: Vec::new(),
            next_inode: 1,
        }
    }

    /// Adds a directory; parents come first.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a file that everybody may read and run.
    pub(crate) fn file(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, REGULAR | 0o755, (0, 0), contents);
    }

    /// Adds a character device node.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    /// # Panics
    /// If `contents` has 4 GiB or more, which the format can't hold.
    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        let size = u32::try_from(contents.len()).expect("a file of an initramfs is below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("paths are short");
        let links = 1;
        let fields = [
            self.next_inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            size,
            0, // device of the archive
            0,
            major,
            minor,
            name_size,
            0, // checksum, unused by newc
        ];
        self.next_inode += 1;
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_holds_mode_sizes_and_name() {
        let mut archive = Archive::new();
        archive.file("init", b"#!/bin/sh\n");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.starts_with("07070100000001000081ed"), "{text}");
        assert_eq!(&bytes[54..62], b"0000000a", "file size");
        assert_eq!(&bytes[94..102], b"00000005", "name size with its NUL");
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(
            &bytes[116..126],
            b"#!/bin/sh\n",
            "contents start on a multiple of four"
        );
    }

    #[test]
    fn every_entry_is_padded_and_the_trailer_is_last() {
        let mut archive = Archive::new();
        archive.directory("dev");
        archive.character_device("dev/console", 5, 1);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 3);
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
