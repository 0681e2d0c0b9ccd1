//! Files that have no business here: which they are, and how to be rid of them.
//!
//! All that the requests take which we offer is an eventfd or shared memory, and in the place of an
//! eventfd a pipe or a Unix socket, which a relay serves (`relay.rs`). Any other file may be
//! one whose operations wait for somebody: a FUSE file's for its server, which is asked even by
//! fstat, mmap and *close* (FLUSH); a socket's close may linger, a terminal's waits for its output.
//! So a file is told apart by what asks no file system, and what is foreign is closed by a thread of
//! its own, which may wait for as long as it likes.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::bounded;
use rustix::net::{AddressFamily, sockopt};

use crate::memory::is_shared_memory;

/// Foreign files of one port that may be in closing: with more, its front-ends are turned away. Each
/// costs a thread that waits.
pub(super) const MAX_CLOSING: usize = 8;

/// Whether a file is shared memory or an eventfd. Asks no file system.
pub(super) fn is_expected(fd: &OwnedFd) -> bool {
    is_shared_memory(fd.as_fd()) || is_eventfd(fd)
}

/// Whether a file is an eventfd. To poll or write anything else may block: a FUSE file's poll, for
/// one, waits for whoever serves it.
pub(crate) fn is_eventfd(fd: &OwnedFd) -> bool {
    is_linked_as(fd, b"anon_inode:[eventfd]")
}

/// Whether the kernel's name for a file begins so. Names that begin with no slash are of no file
/// system that somebody could have made.
fn is_linked_as(fd: &OwnedFd, name: &[u8]) -> bool {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlink(link.as_str(), Vec::new())
        .is_ok_and(|target| target.as_bytes().starts_with(name))
}

/// A file that may ring in an eventfd's place.
#[derive(Debug)]
pub(super) enum Stream {
    Pipe(OwnedFd),
    /// Of the Unix domain.
    Socket(OwnedFd),
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let (Self::Pipe(file) | Self::Socket(file)) = self;
        file.as_fd()
    }
}

/// A file that is closed by a thread of its own.
#[derive(Debug)]
pub(super) struct Foreign {
    file: Option<OwnedFd>,
    closing: Closing,
}

impl Foreign {
    pub(super) fn new(file: OwnedFd, closing: &Closing) -> Self {
        Self {
            file: Some(file),
            closing: closing.clone(),
        }
    }

    /// Whether it is a pipe or Unix socket.
    pub(super) fn is_stream(&self) -> bool {
        self.file
            .as_ref()
            .is_some_and(|file| is_pipe(file) || is_unix_socket(file))
    }

    /// The file as a pipe or Unix socket, to be used and closed where that may wait.
    ///
    /// # Errors
    /// It is neither.
    pub(super) fn into_stream(mut self) -> Result<Stream, Self> {
        match self.file.take() {
            Some(file) if is_pipe(&file) => Ok(Stream::Pipe(file)),
            Some(file) if is_unix_socket(&file) => Ok(Stream::Socket(file)),
            file => {
                self.file = file;
                Err(self)
            }
        }
    }
}

fn is_pipe(file: &OwnedFd) -> bool {
    is_linked_as(file, b"pipe:[")
}

fn is_unix_socket(file: &OwnedFd) -> bool {
    is_linked_as(file, b"socket:[") && sockopt::socket_domain(file) == Ok(AddressFamily::UNIX)
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            self.closing.close(file);
        }
    }
}

/// The foreign files of a port that are being closed. Clones share the count.
#[derive(Clone, Debug, Default)]
pub(super) struct Closing(Arc<AtomicUsize>);

impl Closing {
    /// Somebody begins to close files.
    pub(super) fn begin(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Whoever began has closed them.
    pub(super) fn end(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// Closes a file in a thread of its own.
    fn close(&self, file: OwnedFd) {
        self.begin();
        let closing = self.clone();
        let (hand_over, take) = bounded::<OwnedFd>(1);
        let closer = std::thread::Builder::new().name("ringway-close".to_owned());
        let spawned = closer.spawn(move || {
            drop(take.recv());
            closing.end();
        });
        match spawned {
            Ok(_) => drop(hand_over.send(file)),
            // To close it here could block; it stays open and counted, so that the port is closed to
            // its front-ends before many do.
            Err(_) => std::mem::forget(file),
        }
    }

    /// Whether files are being closed.
    #[cfg(test)]
    pub(super) fn is_busy(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Whether this port has so many that nothing more is to be taken from its front-ends.
    pub(super) fn is_full(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MAX_CLOSING
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

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
        let (socket, _peer) = UnixStream::pair().unwrap();
        let inet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let kinds: [(OwnedFd, &str); 6] = [
            (reader, "pipe"),
            (writer, "pipe"),
            (socket.into(), "socket"),
            (inet.into(), "none"),
            (status.into(), "none"),
            (null.into(), "none"),
        ];
        let closing = Closing::default();
        for (foreign, kind) in kinds {
            assert!(!is_expected(&foreign), "{foreign:?}");
            let found = match Foreign::new(foreign, &closing).into_stream() {
                Ok(Stream::Pipe(_)) => "pipe",
                Ok(Stream::Socket(_)) => "socket",
                Err(_) => "none",
            };
            assert_eq!(found, kind);
        }
    }

    #[test]
    fn a_file_that_closes_leaves_the_count() {
        let closing = Closing::default();
        for _ in 0..100 {
            let (reader, _writer) = rustix::pipe::pipe().unwrap();
            closing.close(reader);
        }
        while closing.is_busy() {
            std::thread::yield_now();
        }
        assert!(!closing.is_full());
    }
}
