//! A connection on which the server alone speaks: what it tells comes from elsewhere, at any time.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::server::say_last;
use crate::api::{ApiError, ErrorKind};

/// What follows the answer to a request that asked for it.
pub struct Stream {
    /// Readable when there may be something to tell.
    bell: OwnedFd,
    /// Appends what there is to tell by now, in whole lines, a chunk at a time; false if nothing
    /// will follow.
    take: Box<Take>,
}

type Take = dyn FnMut(&mut Vec<u8>) -> bool + Send;

impl fmt::Debug for Stream {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Stream")
            .field("bell", &self.bell)
            .finish_non_exhaustive()
    }
}

impl Stream {
    /// A stream of the lines that `take` appends, which is asked again whenever `bell` is readable.
    /// It says false once nothing will follow, and makes the bell unreadable.
    pub fn new(bell: OwnedFd, take: impl FnMut(&mut Vec<u8>) -> bool + Send + 'static) -> Self {
        Self {
            bell,
            take: Box::new(take),
        }
    }

    /// Writes it to a client until that hangs up, sends something, or `keep` says no; it is asked
    /// whenever the client has taken something. A client that takes nothing keeps this thread
    /// alone.
    pub(super) fn carry(mut self, client: &UnixStream, mut keep: impl FnMut() -> bool) {
        let mut lines = Vec::new();
        loop {
            let goes_on = (self.take)(&mut lines);
            if lines.is_empty() {
                if !goes_on || !self.wait(client, PollFlags::empty()) {
                    return;
                }
                continue;
            }
            let mut rest = &*lines;
            while !rest.is_empty() {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                match rustix::net::send(client, rest, flags) {
                    Ok(n) if keep() => rest = rest.get(n..).unwrap_or_default(),
                    Err(Errno::AGAIN) if self.wait(client, PollFlags::OUT) => {}
                    Err(Errno::INTR) => {}
                    Ok(_) | Err(_) => return,
                }
            }
            lines.clear();
        }
    }

    /// Waits until there may be something to tell, or for room to write if that is what `room`
    /// says; false if the client is not to be told any more.
    fn wait(&self, client: &UnixStream, room: PollFlags) -> bool {
        let mut fds = vec![PollFd::new(client, PollFlags::IN | room)];
        if room.is_empty() {
            fds.push(PollFd::new(&self.bell, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll of a stream failed");
                return false;
            }
        }
        let ends = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        !fds.first().is_some_and(|fd| fd.revents().intersects(ends)) || !is_over(client)
    }
}

/// Whether the client hung up, or sent something, which it is told not to.
fn is_over(client: &UnixStream) -> bool {
    match rustix::net::recv(client, &mut [0; 1][..], RecvFlags::DONTWAIT) {
        Ok((0, _)) => true,
        Ok(_) => {
            say_last(
                client,
                &ApiError::new(
                    ErrorKind::InvalidRequest,
                    "a request on a connection that is a stream",
                    "send it on another connection; this one is closed",
                ),
            );
            true
        }
        Err(Errno::AGAIN | Errno::INTR) => false,
        Err(_) => true,
    }
}
