//! The thread that serves all vhost-user sockets: one epoll for listeners, sessions and commands.
//!
//! ```text
//! add/remove --channel + eventfd--> [ session thread ] <--sockets--> front-ends
//!                                          |
//!                                          +--> Device (rings, memory) of each port
//! ```
//!
//! It does nothing per frame: front-ends talk when a guest starts, stops or migrates.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use ringway_bridge::PortId;
use rustix::event::{EventfdFlags, epoll, eventfd};

use super::device::Device;
use super::endpoint::Endpoint;
use super::reactor::{Reactor, WAKE};

/// Commands that wait for the thread; a caller waits for its own anyway.
const MAX_COMMANDS: usize = 16;

/// What callers want of the thread. Each is answered when it is done.
pub(super) enum SessionCommand<D: Device> {
    Add {
        id: PortId,
        endpoint: Endpoint,
        device: Arc<D>,
        done: Sender<io::Result<()>>,
    },
    Remove {
        id: PortId,
        done: Sender<()>,
    },
    Stop,
}

/// The handle of the session thread; dropping it ends all sessions and the thread.
pub(crate) struct SessionThread<D: Device + 'static> {
    commands: Sender<SessionCommand<D>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl<D: Device + 'static> SessionThread<D> {
    /// Starts the thread, with no port.
    ///
    /// # Errors
    /// No epoll instance, eventfd or thread can be had.
    pub(crate) fn start() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(
            &epoll,
            &*wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        let (commands, inbox): (_, Receiver<SessionCommand<D>>) = bounded(MAX_COMMANDS);
        let reactor = Reactor::new(epoll, Arc::clone(&wake), inbox);
        let thread = std::thread::Builder::new()
            .name("ringway-session".to_owned())
            .spawn(move || reactor.run())?;
        Ok(Self {
            commands,
            wake,
            thread: Some(thread),
        })
    }

    /// Serves `endpoint` for `device` from now on.
    ///
    /// # Errors
    /// The port is there already, or its listener can't be watched.
    pub(crate) fn add(&self, id: PortId, endpoint: Endpoint, device: Arc<D>) -> io::Result<()> {
        let (done, answer) = bounded(1);
        self.command(SessionCommand::Add {
            id,
            endpoint,
            device,
            done,
        });
        answer.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// Stops serving the port. When this returns, its session is closed, its rings are stopped,
    /// its memory is dropped, its fds are closed and its socket file is gone. Does nothing if
    /// there is no such port.
    pub(crate) fn remove(&self, id: PortId) {
        let (done, answer) = bounded(1);
        self.command(SessionCommand::Remove { id, done });
        // An error means that the thread, and with it all sessions, is gone.
        let _ = answer.recv();
    }

    /// Hands over a command; if the thread is gone, the command's answer channel closes.
    fn command(&self, command: SessionCommand<D>) {
        if self.commands.send(command).is_ok() {
            // Can only fail if the counter is full, and then the thread is awake.
            let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        }
    }
}

impl<D: Device + 'static> Drop for SessionThread<D> {
    fn drop(&mut self) {
        self.command(SessionCommand::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the session thread panicked");
        }
    }
}

fn ended() -> io::Error {
    io::Error::other("the session thread has ended")
}

#[cfg(test)]
mod tests;
