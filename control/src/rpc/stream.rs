//! A connection on which the server alone speaks: what it tells comes from elsewhere, at any time.

use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

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
    /// Appends what comes last, once the client has said that it will send nothing.
    end: Option<Box<End>>,
}

type Take = dyn FnMut(&mut Vec<u8>) -> bool + Send;
type End = dyn FnOnce(&mut Vec<u8>) + Send;

/// How long a client may take for the last bytes.
const END_TIMEOUT: Duration = Duration::from_secs(10);

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
            end: None,
        }
    }

    /// The same, of which `end` appends what comes last when the client shuts its side down.
    #[must_use]
    pub fn with_end(mut self, end: impl FnOnce(&mut Vec<u8>) + Send + 'static) -> Self {
        self.end = Some(Box::new(end));
        self
    }

    /// Writes it to a client until that hangs up, sends something, or `keep` says no; it is asked
    /// whenever the client has taken something. A client that takes nothing keeps this thread
    /// alone.
    pub(super) fn carry(mut self, client: &UnixStream, keep: impl FnMut() -> bool) {
        let unsent = self.carry_all(client, keep);
        let (Some(mut last), Some(end)) = (unsent, self.end.take()) else {
            return;
        };
        end(&mut last);
        let mut client = client;
        // Whoever hung up for good does not get it.
        if client.set_write_timeout(Some(END_TIMEOUT)).is_ok() {
            let _ = client.write_all(&last);
        }
    }

    /// The same without the end. Returns what is not sent if the client sends no more.
    fn carry_all(
        &mut self,
        client: &UnixStream,
        mut keep: impl FnMut() -> bool,
    ) -> Option<Vec<u8>> {
        let mut lines = Vec::new();
        loop {
            let goes_on = (self.take)(&mut lines);
            if lines.is_empty() {
                if !goes_on {
                    return None;
                }
                match self.wait(client, PollFlags::empty()) {
                    Client::IsThere => continue,
                    Client::SendsNoMore => return Some(lines),
                    Client::IsGone => return None,
                }
            }
            let mut rest = &*lines;
            while !rest.is_empty() {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                match rustix::net::send(client, rest, flags) {
                    Ok(n) if keep() => rest = rest.get(n..).unwrap_or_default(),
                    Err(Errno::AGAIN) => match self.wait(client, PollFlags::OUT) {
                        Client::IsThere => {}
                        Client::SendsNoMore => return Some(rest.to_vec()),
                        Client::IsGone => return None,
                    },
                    Err(Errno::INTR) => {}
                    Ok(_) | Err(_) => return None,
                }
            }
            lines.clear();
        }
    }

    /// Waits until there may be something to tell, or for room to write if that is what `room`
    /// says; false if the client is not to be told any more.
    fn wait(&self, client: &UnixStream, room: PollFlags) -> Client {
        let mut fds = vec![PollFd::new(client, PollFlags::IN | room)];
        if room.is_empty() {
            fds.push(PollFd::new(&self.bell, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll of a stream failed");
                return Client::IsGone;
            }
        }
        let ends = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        match fds.first() {
            Some(fd) if fd.revents().intersects(ends) => look_at(client),
            _ => Client::IsThere,
        }
    }
}

/// What a client is about to do.
enum Client {
    IsThere,
    /// It hung up, or waits for the end.
    SendsNoMore,
    IsGone,
}

/// Whether the client hung up, or sent something, which it is told not to.
fn look_at(client: &UnixStream) -> Client {
    match rustix::net::recv(client, &mut [0; 1][..], RecvFlags::DONTWAIT) {
        Ok((0, _)) => Client::SendsNoMore,
        Ok(_) => {
            say_last(
                client,
                &ApiError::new(
                    ErrorKind::InvalidRequest,
                    "a request on a connection that is a stream",
                    "send it on another connection; this one is closed",
                ),
            );
            Client::IsGone
        }
        Err(Errno::AGAIN | Errno::INTR) => Client::IsThere,
        Err(_) => Client::IsGone,
    }
}
