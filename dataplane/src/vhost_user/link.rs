//! A connected front-end: its session, what it may cost, and when it has to speak.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::Span;

use super::device::Device;
use super::message::Reply;
use super::price::{self, Budget};
use super::session::Session;
use super::socket::{Connection, Message, Received};

/// Messages of one session that are handled before the others have their turn; the start of a
/// guest with one queue pair takes about as many.
const MAX_MESSAGES_PER_TURN: usize = 32;

/// Longest time from connecting to the first whole message, and for a message to arrive once it has
/// begun. Between messages a front-end may be silent for ever, as QEMU's is while its guest runs.
pub(super) const SPEAK_WITHIN: Duration = Duration::from_secs(5);

/// A connected front-end.
pub(super) struct Link<D: Device> {
    // Dropped in this order: rings and memory go before the socket closes.
    pub(super) session: Session<D>,
    pub(super) connection: Connection,
    pub(super) token: u64,
    pub(super) span: Span,
    /// Epoll watches for room to write, too.
    pub(super) watches_write: bool,
    /// Until when its socket is not looked at.
    pub(super) paused_until: Option<Instant>,
    /// Until when it has to end the message that it has begun, or its first.
    pub(super) speak_by: Option<Instant>,
}

/// Whether a session goes on.
pub(super) enum SessionState {
    Goes,
    /// It goes on after a while: its front-end asked for more than it may.
    Pauses(Duration),
    /// It ended, with a reason if that was an error.
    Ended(Option<String>),
}

impl<D: Device> Link<D> {
    /// Sends what waits and handles a bounded number of messages. Epoll is level-triggered: what
    /// is left brings the next turn.
    pub(super) fn serve(&mut self, flags: EventFlags, budget: &mut Budget) -> SessionState {
        if flags.contains(EventFlags::OUT)
            && let Err(error) = self.connection.flush()
        {
            return SessionState::Ended(Some(error.to_string()));
        }
        for _ in 0..MAX_MESSAGES_PER_TURN {
            // What it takes to receive files is part of a request's price.
            let start = Instant::now();
            match self.connection.receive() {
                Ok(Received::Message(message)) => {
                    self.speak_by = None;
                    let listed = message
                        .request
                        .as_ref()
                        .map_or(price::CONNECTION, price::of_request);
                    let handled = self.handle(message);
                    let end = Instant::now();
                    budget.charge(end, listed.max(end - start));
                    if let Err(reason) = handled {
                        return SessionState::Ended(Some(reason));
                    }
                    if let Some(owed) = budget.owed(end) {
                        return SessionState::Pauses(owed);
                    }
                }
                Ok(Received::Pending) => {
                    if self.speak_by.is_none() && self.connection.is_within_message() {
                        self.speak_by = Some(Instant::now() + SPEAK_WITHIN);
                    }
                    break;
                }
                Ok(Received::Closed) => return SessionState::Ended(None),
                Err(error) => return SessionState::Ended(Some(error.to_string())),
            }
        }
        SessionState::Goes
    }

    fn handle(&mut self, message: Message) -> Result<(), String> {
        let Message {
            id,
            need_reply,
            request,
        } = message;
        let result = request
            .map_err(|error| error.to_string())
            .and_then(|request| {
                self.session
                    .handle(request, need_reply)
                    .map_err(|error| error.to_string())
            });
        match result {
            Ok(Some(body)) => {
                let sent = self.connection.send(&Reply { request: id, body });
                sent.map_err(|error| error.to_string())
            }
            Ok(None) => Ok(()),
            Err(reason) => {
                if let Some(body) = self.session.failure(id, need_reply) {
                    // The session ends anyway.
                    let _ = self.connection.send(&Reply { request: id, body });
                }
                Err(reason)
            }
        }
    }

    /// Watches for room to write while replies wait.
    pub(super) fn watch(&mut self, epoll: &OwnedFd) -> Result<(), Errno> {
        let wants_write = self.connection.wants_write();
        if wants_write != self.watches_write {
            let mut flags = EventFlags::IN;
            flags.set(EventFlags::OUT, wants_write);
            let data = EventData::new_u64(self.token);
            epoll::modify(epoll, &self.connection, data, flags)?;
            self.watches_write = wants_write;
        }
        Ok(())
    }

    /// Takes its socket out of the epoll instance, which would tell of a peer that hangs up whatever
    /// it is asked for.
    pub(super) fn pause(&mut self, epoll: &OwnedFd, until: Instant) -> Result<(), Errno> {
        epoll::delete(epoll, &self.connection)?;
        self.paused_until = Some(until);
        Ok(())
    }

    pub(super) fn resume(&mut self, epoll: &OwnedFd) -> Result<(), Errno> {
        self.paused_until = None;
        self.watches_write = self.connection.wants_write();
        let data = EventData::new_u64(self.token);
        let mut flags = EventFlags::IN;
        flags.set(EventFlags::OUT, self.watches_write);
        epoll::add(epoll, &self.connection, data, flags)
    }

    pub(super) fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.connection.as_fd(),
            PollFlags::RDHUP,
        )];
        let now = Timespec::default();
        poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
    }
}
