//! Files that have no business here: which they are, and how to be rid of them.
//!
//! All that the requests take which we offer is an eventfd or shared memory. Any other file may be
//! one whose operations wait for somebody: a FUSE file's for its server, which is asked even by
//! fstat, mmap and *close* (FLUSH); a socket's close may linger, a terminal's waits for its output.
//! So a file is told apart by what asks no file system, and what is foreign is closed by a thread of
//! its own, which may wait for as long as it likes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::bounded;

use crate::memory::is_shared_memory;

/// Foreign files of one port that may be in closing: with more, its front-ends are turned away. Each
/// costs a thread that waits.
pub(super) const MAX_CLOSING: usize = 8;

/// Whether a file is of a kind that some request takes. Asks no file system.
pub(super) fn is_expected(fd: &OwnedFd) -> bool {
    is_shared_memory(fd.as_fd()) || is_eventfd(fd)
}

/// Whether a file is an eventfd. To poll or write anything else may block: a FUSE file's poll, for
/// one, waits for whoever serves it.
pub(crate) fn is_eventfd(fd: &OwnedFd) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link.as_str(), Vec::new())
        .is_ok_and(|target| target.as_bytes().starts_with(b"anon_inode:[eventfd]"))
}

/// The foreign files of a port that are being closed. Clones share the count.
#[derive(Clone, Debug, Default)]
pub(super) struct Closing(Arc<AtomicUsize>);

impl Closing {
    /// Closes a file in a thread of its own.
    pub(super) fn close(&self, file: OwnedFd) {
        self.0.fetch_add(1, Ordering::Relaxed);
        let count = Arc::clone(&self.0);
        let (hand_over, take) = bounded::<OwnedFd>(1);
        let closer = std::thread::Builder::new().name("ringway-close".to_owned());
        let spawned = closer.spawn(move || {
            drop(take.recv());
            count.fetch_sub(1, Ordering::Relaxed);
        });
        match spawned {
            Ok(_) => drop(hand_over.send(file)),
            // To close it here could block; it stays open and counted, so that the port is closed to
            // its front-ends before many do.
            Err(_) => std::mem::forget(file),
        }
    }

    /// Whether this port has so many that nothing more is to be taken from its front-ends.
    pub(super) fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MAX_CLOSING
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_user::test_device::{event, memfd};

    #[test]
    fn eventfds_and_shared_memory_are_told_from_all_else() {
        assert!(is_expected(&event()));
        assert!(is_expected(&memfd("expected", 4096)));
        let shared = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(is_expected(&shared.into()));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let status = std::fs::File::open("/proc/self/status").unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for foreign in [reader, writer, status.into(), null.into()] {
            assert!(!is_expected(&foreign), "{foreign:?}");
        }
    }

    #[test]
    fn a_file_that_closes_leaves_the_count() {
        let closing = Closing::default();
        for _ in 0..100 {
            let (reader, _writer) = rustix::pipe::pipe().unwrap();
            closing.close(reader);
        }
        while closing.0.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        assert!(!closing.is_full());
    }
}
