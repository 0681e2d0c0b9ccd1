//! The end of a vhost-user socket that a port takes: a listening socket at a path, or the path of
//! one to connect to.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use ringway_api::SwitchError;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};

use crate::fd_limit::out_of_fds;
use crate::socket_file::SocketFile;

/// Connections that wait to be accepted: all but one are closed at once, so a few suffice.
const BACKLOG: i32 = 16;

/// Where front-ends come from.
#[derive(Debug)]
pub(crate) enum Endpoint {
    /// They connect to us.
    Listen(Listener),
    /// We connect to them.
    Connect(Connector),
}

impl Endpoint {
    /// Listens at `path`, for those who may open `file`. A socket file that nobody serves any longer
    /// is replaced.
    ///
    /// # Errors
    /// A path that is too long, in no directory, not ours to write, taken by another kind of file
    /// or by a process that listens there; a file that is not ours to give away.
    pub(crate) fn listen(path: &Path, file: &SocketFile) -> Result<Self, SwitchError> {
        Listener::new(path, file).map(Self::Listen)
    }

    /// Will connect to `path`, now or as soon as somebody listens there.
    ///
    /// # Errors
    /// A path that no socket can have.
    pub(crate) fn connect(path: &Path) -> Result<Self, SwitchError> {
        let address = address(path)?;
        let path = path.to_owned();
        Ok(Self::Connect(Connector { path, address }))
    }

    /// The socket's path.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Listen(listener) => &listener.path,
            Self::Connect(connector) => &connector.path,
        }
    }
}

/// A listening socket; its file goes with it, if it is still this socket's.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// The socket's file, held open so that no other file can get its inode number.
    file: OwnedFd,
}

impl Listener {
    fn new(path: &Path, file: &SocketFile) -> Result<Self, SwitchError> {
        let address = address(path)?;
        make_room(path, &address)?;
        let refused = |error: Errno| bind_refused(path, error);
        let socket = stream_socket().map_err(refused)?;
        // In the place of the file that is opened next: what there are no fds for makes no file.
        let spare = fcntl_dupfd_cloexec(&socket, 0).map_err(refused)?;
        bind(&socket, &address).map_err(refused)?;
        drop(spare);
        let file = file.settle(path);
        let file = file.map_err(|bad| refusal(path, &bad.reason, &bad.hint))?;
        let listener = Self {
            socket,
            path: path.to_owned(),
            file,
        };
        listen(&listener.socket, BACKLOG).map_err(refused)?;
        Ok(listener)
    }

    /// Takes the next connection.
    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    fn owns_path(&self) -> bool {
        let (Ok(ours), Ok(there)) = (rustix::fs::fstat(&self.file), rustix::fs::lstat(&self.path))
        else {
            return false;
        };
        (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.owns_path()
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "can't remove the socket file");
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Where to connect.
#[derive(Debug)]
pub(crate) struct Connector {
    path: PathBuf,
    address: SocketAddrUnix,
}

impl Connector {
    /// One try, which succeeds or fails at once: Unix sockets never answer EINPROGRESS, and
    /// EAGAIN means that the listener's backlog is full (unix(7)).
    pub(super) fn connect(&self) -> Result<OwnedFd, Errno> {
        let socket = stream_socket()?;
        connect(&socket, &self.address)?;
        Ok(socket)
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

fn address(path: &Path) -> Result<SocketAddrUnix, SwitchError> {
    if path.as_os_str().is_empty() {
        return Err(refusal(path, "the path is empty", "name a socket file"));
    }
    SocketAddrUnix::new(path).map_err(|error| refusal(path, &error.to_string(), "use another path"))
}

/// Removes a socket file that nobody serves; anything else in the way is an error.
fn make_room(path: &Path, address: &SocketAddrUnix) -> Result<(), SwitchError> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        // Nothing there, or nothing we can see: bind will tell.
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(refusal(
            path,
            "a file that is no socket is there",
            "remove the file or use another path",
        ));
    }
    let probe = stream_socket().map_err(|error| bind_refused(path, error))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(refusal(
                path,
                "another process listens there",
                "stop it or use another path",
            ));
        }
        Err(error) => return Err(bind_refused(path, error)),
    }
    let same = |now: &fs::Metadata| (now.dev(), now.ino()) == (metadata.dev(), metadata.ino());
    if fs::symlink_metadata(path).is_ok_and(|now| same(&now)) {
        fs::remove_file(path).map_err(|error| {
            refusal(
                path,
                &format!("the stale socket can't be removed: {error}"),
                "remove it or use another path",
            )
        })?;
    }
    Ok(())
}

fn bind_refused(path: &Path, error: Errno) -> SwitchError {
    if let Some((reason, hint)) = out_of_fds(&error.into()) {
        return refusal(path, &reason, hint);
    }
    let (reason, hint) = match error {
        Errno::NOENT => ("its directory does not exist", "create the directory"),
        Errno::NOTDIR => ("a part of the path is no directory", "use another path"),
        Errno::ACCESS | Errno::PERM => (
            "this process may not use the path",
            "give it the right to write into the directory",
        ),
        Errno::ROFS => ("the file system is read-only", "use another path"),
        Errno::ADDRINUSE => ("the path is taken", "use another path"),
        error => return refusal(path, &error.to_string(), "use another path"),
    };
    refusal(path, reason, hint)
}

fn refusal(path: &Path, reason: &str, hint: &str) -> SwitchError {
    SwitchError::SocketPath {
        path: path.to_owned(),
        reason: reason.to_owned(),
        hint: hint.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn listen(path: &Path) -> Result<Endpoint, SwitchError> {
        Endpoint::listen(path, &SocketFile::default())
    }

    fn reason(result: Result<Endpoint, SwitchError>) -> String {
        match result {
            Err(SwitchError::SocketPath { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_that_is_no_socket_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"precious").unwrap();
        assert!(reason(listen(&path)).contains("no socket"));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(reason(listen(&link)).contains("no socket"));
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let live = UnixListener::bind(&path).unwrap();
        assert!(reason(listen(&path)).contains("listens there"));
        drop(live);
        assert!(path.exists(), "the stale file is there");
        let endpoint = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert!(reason(listen(&path)).contains("listens there"));
        drop(endpoint);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_datagram_socket_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _live = UnixDatagram::bind(&path).unwrap();
        assert!(reason(listen(&path)).contains("listens there"));
    }

    #[test]
    fn paths_that_no_socket_can_have_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(108));
        assert!(reason(listen(&long)).contains("too long"));
        assert!(reason(Endpoint::connect(&long)).contains("too long"));
        assert!(reason(listen(Path::new(""))).contains("empty"));
        let missing = dir.path().join("missing/socket");
        assert!(reason(listen(&missing)).contains("does not exist"));
    }

    #[test]
    fn a_file_that_took_the_sockets_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let endpoint = listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(endpoint);
        assert!(path.exists());
    }
}
