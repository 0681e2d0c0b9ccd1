//! The socket of one front-end: bytes and fds in, whole messages out, and back. Never blocks.
//!
//! Reads end where a message ends. A stream socket's read may return bytes from before *and*
//! after the point where fds are attached, so a longer read could not tell to which message they
//! belong; a read that stays within one message can.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, Shutdown,
    recvmsg, send, shutdown,
};

use super::foreign::{Closing, Foreign, is_expected};
use super::message::{
    CodecError, HEADER_LEN, Header, MAX_BODY, MAX_FDS, MAX_REPLY_LEN, Reply, Request,
};
use super::relay::{Relays, Unfit};
use crate::fd_limit;

/// Most replies that wait for a front-end to read: it asks and waits, so even a few are odd. The
/// socket's own buffer comes on top.
pub(crate) const MAX_WAITING_REPLIES: usize = 64;

/// Most fds that Linux passes at once.
const SCM_MAX_FD: usize = 253;

/// Why a connection can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ConnectionError {
    /// The peer closed within a message.
    #[error("the connection ended within a message")]
    Truncated,
    /// More than [`MAX_FDS`] fds came with one message.
    #[error("more fds came with a message than any has")]
    TooManyFds,
    /// This process can't have the fds that came with a message.
    #[error("can't take the fds of a message: {0}")]
    NoFds(String),
    /// The peer does not read its replies.
    #[error("the front-end does not read its replies")]
    RepliesUnread,
    /// Too many foreign files came (see `foreign.rs`).
    #[error("the front-end gives files that don't close")]
    Foreign,
    /// The peer closed while a reply was to be sent.
    #[error("the connection ended")]
    Closed,
    /// A message that can't be understood.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A system call failed.
    #[error("can't {what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
}

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Message {
    /// The request's number.
    pub(crate) id: u32,
    /// The header's NEED_REPLY.
    pub(crate) need_reply: bool,
    /// What it asks for, or why it can't be understood.
    pub(crate) request: Result<Request, CodecError>,
}

/// What a look at the socket brought.
#[derive(Debug)]
pub(crate) enum Received {
    /// A whole message.
    Message(Message),
    /// The rest is still to come.
    Pending,
    /// The peer closed, between two messages.
    Closed,
}

/// A connected socket with the message that is being received and the replies that wait.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    buffer: Box<[u8; HEADER_LEN + MAX_BODY]>,
    filled: usize,
    /// Known once the header is complete.
    header: Option<Header>,
    /// Fds of the message that is being received, at most [`MAX_FDS`].
    fds: Vec<OwnedFd>,
    /// Other files that came with it; of a message with more than one, only one is kept.
    foreign: Option<Foreign>,
    has_many_foreign: bool,
    closing: Closing,
    /// Serves pipes and sockets that came in the place of eventfds.
    relays: Relays,
    /// Replies that the socket has not taken, at most [`MAX_WAITING_REPLIES`].
    outgoing: Vec<u8>,
}

impl Connection {
    /// A connection over `socket`, a stream socket; foreign files go to `closing`.
    pub(crate) fn new(socket: OwnedFd, closing: Closing) -> Self {
        Self {
            socket,
            buffer: Box::new([0; HEADER_LEN + MAX_BODY]),
            filled: 0,
            header: None,
            fds: Vec::new(),
            foreign: None,
            has_many_foreign: false,
            relays: Relays::new(closing.clone()),
            closing,
            outgoing: Vec::new(),
        }
    }

    /// Reads until a message is complete or the socket is empty.
    ///
    /// # Errors
    /// Anything after which the stream can't be followed any longer.
    pub(crate) fn receive(&mut self) -> Result<Received, ConnectionError> {
        loop {
            if let Some(message) = self.complete()? {
                return Ok(Received::Message(message));
            }
            if self.closing.is_full() {
                return Err(ConnectionError::Foreign);
            }
            let end = HEADER_LEN + self.header.map_or(0, |header| header.body_len);
            match self.read(end) {
                Ok(0) if self.filled == 0 => return Ok(Received::Closed),
                Ok(0) => return Err(ConnectionError::Truncated),
                Ok(count) => self.filled += count,
                Err(ReadError::Empty) => return Ok(Received::Pending),
                Err(ReadError::Reset) => return Ok(Received::Closed),
                Err(ReadError::Fatal(error)) => return Err(error),
            }
        }
    }

    /// Sends a reply, or keeps it until [`Connection::flush`] if the socket is full.
    ///
    /// # Errors
    /// Too many replies wait, or the connection has ended.
    pub(crate) fn send(&mut self, reply: &Reply) -> Result<(), ConnectionError> {
        if self.outgoing.len() + MAX_REPLY_LEN > MAX_WAITING_REPLIES * MAX_REPLY_LEN {
            return Err(ConnectionError::RepliesUnread);
        }
        self.outgoing.extend_from_slice(&reply.encode());
        self.flush()
    }

    /// Sends replies that wait, as far as the socket takes them.
    ///
    /// # Errors
    /// The connection has ended.
    pub(crate) fn flush(&mut self) -> Result<(), ConnectionError> {
        use rustix::io::Errno;
        while !self.outgoing.is_empty() {
            match send(
                &self.socket,
                &self.outgoing,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Err(error) => {
                    return Err(ConnectionError::Io {
                        what: "send a reply",
                        source: error.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Whether a message has begun whose rest is still to come.
    pub(crate) fn is_within_message(&self) -> bool {
        self.filled > 0
    }

    /// Whether replies wait for room in the socket.
    pub(crate) fn wants_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Takes the message out of the buffer if it is complete.
    fn complete(&mut self) -> Result<Option<Message>, ConnectionError> {
        let header = match self.header {
            Some(header) => header,
            None if self.filled < HEADER_LEN => return Ok(None),
            None => {
                let mut bytes = [0; HEADER_LEN];
                bytes.copy_from_slice(&self.buffer[..HEADER_LEN]);
                *self.header.insert(Header::parse(&bytes)?)
            }
        };
        if self.filled < HEADER_LEN + header.body_len {
            return Ok(None);
        }
        let body = &self.buffer[HEADER_LEN..self.filled];
        let mut fds = std::mem::take(&mut self.fds);
        let is_alone = fds.is_empty() && !std::mem::take(&mut self.has_many_foreign);
        let stands_in = match self.foreign.take() {
            None => Ok(()),
            Some(file) if is_alone => self
                .relays
                .take(header.request, body, file)
                .map(|event| fds.push(event)),
            Some(_) => Err(Unfit::Request),
        };
        let request = match stands_in {
            Ok(()) => Request::parse(header, body, fds),
            Err(why) => Err(why.of(header.request)),
        };
        self.filled = 0;
        self.header = None;
        Ok(Some(Message {
            id: header.request,
            need_reply: header.need_reply,
            request,
        }))
    }

    /// One read of what is missing of the buffer's first `end` bytes.
    fn read(&mut self, end: usize) -> Result<usize, ReadError> {
        use rustix::io::Errno;
        // Room for all that can come: files that the kernel had to drop it would close here.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let target = &mut self.buffer[self.filled..end];
            match recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(target)],
                &mut control,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            ) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        let received = received.map_err(|error| match error {
            Errno::AGAIN => ReadError::Empty,
            Errno::CONNRESET => ReadError::Reset,
            error => ReadError::Fatal(ConnectionError::Io {
                what: "receive",
                source: error.into(),
            }),
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    self.sort(fd);
                }
            }
        }
        let is_cut = received.flags.contains(ReturnFlags::CTRUNC);
        if is_cut || self.fds.len() > MAX_FDS {
            self.fds.clear();
            self.foreign = None;
            // There was room in the message for all that can come, so the limit was in the way
            // (scm_detach_fds), of which the kernel says no more.
            let reason = || fd_limit::explain(&io::Error::from_raw_os_error(libc::EMFILE));
            return Err(ReadError::Fatal(match is_cut {
                true => ConnectionError::NoFds(reason()),
                false => ConnectionError::TooManyFds,
            }));
        }
        Ok(received.bytes)
    }

    /// Keeps a file that a request may take, and is rid of others.
    fn sort(&mut self, fd: OwnedFd) {
        if is_expected(&fd) {
            self.fds.push(fd);
        } else {
            let file = Foreign::new(fd, &self.closing);
            self.has_many_foreign |= self.foreign.replace(file).is_some();
        }
    }
}

/// Files in messages that nobody reads any more would be closed with the socket.
impl Drop for Connection {
    fn drop(&mut self) {
        // From here on the peer can't send, so the queue ends; there is nobody to tell of errors.
        let _ = shutdown(&self.socket, Shutdown::Both);
        loop {
            self.filled = 0;
            self.fds.clear();
            self.foreign = None;
            if !self.read(self.buffer.len()).is_ok_and(|count| count > 0) {
                return;
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

enum ReadError {
    Empty,
    Reset,
    Fatal(ConnectionError),
}

#[cfg(test)]
mod tests;
