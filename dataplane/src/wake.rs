//! How a port reaches the worker that polls its queues: by an fd that the worker waits for, or by a
//! request that rings its doorbell. Both name the queue by a [`Token`].
//!
//! ```text
//!   port --- activate, inject ---> requests + doorbell --+
//!   guest's kick, tap or socket readable ----------------+--> epoll --> worker
//! ```

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{self as channel, Receiver, Sender};
use ringway_bridge::PortId;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::Timespec;
use tracing::warn;

use crate::call::Call;

/// Requests that wait for a worker: rings start and guests announce themselves rarely, and a sender
/// that finds the channel full waits.
const MAX_REQUESTS: usize = 256;

/// Names a source queue in a worker's epoll instance: port, queue pair, and a generation that
/// tells a port from the one that had its slot before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Token(u64);

impl Token {
    /// The doorbell's name: no port has it, as the pair number is below 65,535.
    const DOORBELL: Self = Self(u64::MAX);

    pub(crate) fn new(port: PortId, pair: u16, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(pair) << 16 | u64::from(port.get()))
    }

    /// The queue pair that it names.
    pub(crate) fn pair(self) -> u16 {
        #[expect(clippy::cast_possible_truncation, reason = "the pair's bits")]
        let pair = (self.0 >> 16) as u16;
        pair
    }
}

/// What a port asks of a worker.
#[derive(Debug)]
pub(crate) enum WakeRequest {
    /// Look at a source queue that may have become active.
    Activate(Token),
    /// Forward a frame as if the port had sent it.
    Inject { from: PortId, frame: Box<[u8]> },
    /// Make a call.
    Call(Arc<Call>),
}

/// What a worker waits for, and the doorbell by which other threads end its wait.
#[derive(Debug)]
pub(crate) struct Waker {
    /// The worker's index, for the log.
    worker: u16,
    epoll: OwnedFd,
    doorbell: OwnedFd,
    /// Requests or commands are there: the worker looks once per turn.
    is_rung: AtomicBool,
    /// How often the worker answered: whoever rings finds out whether it lives.
    answers: AtomicU64,
    requests: Sender<WakeRequest>,
}

impl Waker {
    /// A worker's waker, and the other end of its requests.
    ///
    /// # Errors
    /// No epoll instance or eventfd can be made.
    pub(crate) fn new(worker: u16) -> io::Result<(Arc<Self>, Receiver<WakeRequest>)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (requests, receiver) = channel::bounded(MAX_REQUESTS);
        let waker = Self {
            worker,
            epoll,
            doorbell,
            is_rung: AtomicBool::new(false),
            answers: AtomicU64::new(0),
            requests,
        };
        waker.watch(waker.doorbell.as_fd(), Token::DOORBELL)?;
        Ok((Arc::new(waker), receiver))
    }

    /// Has the worker look for commands and requests, and wakes it if it sleeps.
    pub(crate) fn ring(&self) {
        // Release: pairs with the acquire swap in `answer`; what is to be found is there by then.
        self.is_rung.store(true, Ordering::Release);
        // An eventfd write fails only if its counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes());
    }

    /// Whether the doorbell rang since [`Waker::answer`].
    #[inline]
    pub(crate) fn is_rung(&self) -> bool {
        self.is_rung.load(Ordering::Relaxed)
    }

    /// Notes that the worker looks now: what comes later rings again.
    pub(crate) fn answer(&self) {
        // Acquire: pairs with the release store in `ring`.
        self.is_rung.swap(false, Ordering::Acquire);
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Has `token` activated whenever `fd` becomes readable.
    ///
    /// # Errors
    /// An fd that can't be polled (`EPERM`).
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        // Edge-triggered: each kick is an event of its own, and the fd is never read.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.0), flags)?;
        Ok(())
    }

    /// Ends the watch over `fd`, before it is closed.
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>) {
        if let Err(error) = epoll::delete(&self.epoll, fd) {
            warn!(
                worker = self.worker,
                "can't remove an fd from epoll: {error}"
            );
        }
    }

    /// Waits for `timeout`, or for ever, until an fd is readable or the doorbell rings. As many
    /// events as there is room for are taken, the others stay for the next call.
    pub(crate) fn wait(&self, events: &mut Events, timeout: Option<Duration>) {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        events.0.clear();
        let spare = rustix::buffer::spare_capacity(&mut events.0);
        match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => warn!(worker = self.worker, "epoll_wait: {error}"),
        }
    }

    fn request(&self, request: WakeRequest) {
        // The worker lives longer than its ports.
        if self.requests.send(request).is_ok() {
            self.ring();
        }
    }
}

/// Finds out whether all workers of a switch go on, those that sleep too: it rings their doorbells,
/// and each has to answer.
#[derive(Debug)]
pub struct Heartbeat(Vec<(Arc<Waker>, Option<u64>)>);

impl Heartbeat {
    pub(crate) fn new(wakers: impl Iterator<Item = Arc<Waker>>) -> Self {
        Self(wakers.map(|waker| (waker, None)).collect())
    }

    /// Whether every worker has answered since the last beat, and rings for the next one. The first
    /// beat finds all alive.
    pub fn beat(&mut self) -> bool {
        let mut all = true;
        for (waker, seen) in &mut self.0 {
            let answers = waker.answers.load(Ordering::Relaxed);
            all &= seen.replace(answers) != Some(answers);
            waker.ring();
        }
        all
    }
}

/// What one call of [`Waker::wait`] found.
pub(crate) struct Events(Vec<epoll::Event>);

impl Events {
    /// Room for `most` events a call.
    pub(crate) fn with_capacity(most: usize) -> Self {
        Self(Vec::with_capacity(most))
    }

    /// The queues whose fds are readable.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = Token> + '_ {
        let tokens = self.0.iter().map(|event| Token(event.data.u64()));
        // Whether the doorbell rang is looked for in each turn.
        tokens.filter(|token| *token != Token::DOORBELL)
    }
}

/// Which worker polls a queue pair, and under what name that worker knows it.
#[derive(Clone, Debug)]
pub(crate) struct Binding {
    pub(crate) waker: Arc<Waker>,
    pub(crate) token: Token,
}

impl Binding {
    /// Has the worker look at the queue whenever `fd` becomes readable.
    ///
    /// # Errors
    /// An fd that can't be polled (`EPERM`).
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.waker.watch(fd, self.token)
    }

    /// Ends the watch over `fd`, before it is closed.
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>) {
        self.waker.unwatch(fd);
    }

    /// Has the worker look at the queue soon.
    pub(crate) fn activate(&self) {
        self.waker.request(WakeRequest::Activate(self.token));
    }

    /// Has the worker forward a frame as if `from` had sent it.
    pub(crate) fn inject(&self, from: PortId, frame: Box<[u8]>) {
        self.waker.request(WakeRequest::Inject { from, frame });
    }

    /// Has the worker make a call.
    pub(crate) fn call(&self, call: Arc<Call>) {
        self.waker.request(WakeRequest::Call(call));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(waker: &Waker) -> Vec<Token> {
        let mut events = Events::with_capacity(4);
        waker.wait(&mut events, Some(Duration::ZERO));
        events.tokens().collect()
    }

    #[test]
    fn a_readable_fd_is_told_once_by_its_token_until_it_is_written_again() {
        let (waker, _requests) = Waker::new(0).unwrap();
        let token = Token::new(PortId::new(4095).unwrap(), 63, u32::MAX);
        assert_eq!(token.pair(), 63);
        let binding = Binding {
            waker: Arc::clone(&waker),
            token,
        };
        let kick = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        binding.watch(kick.as_fd()).unwrap();
        assert_eq!(tokens(&waker), []);
        let write = || rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
        write();
        assert_eq!(tokens(&waker), [token]);
        assert_eq!(tokens(&waker), []);
        write();
        assert_eq!(tokens(&waker), [token]);
        binding.unwatch(kick.as_fd());
        write();
        assert_eq!(tokens(&waker), []);
    }

    #[test]
    fn a_heart_beats_while_every_worker_answers() {
        let wakers = [0, 1].map(|index| Waker::new(index).unwrap().0);
        let mut heart = Heartbeat::new(wakers.iter().cloned());
        assert!(heart.beat());
        wakers.iter().for_each(|waker| waker.answer());
        assert!(heart.beat());
        wakers[0].answer();
        assert!(!heart.beat(), "the second worker hangs");
        wakers[1].answer();
        assert!(!heart.beat(), "now the first one does");
        wakers.iter().for_each(|waker| waker.answer());
        assert!(heart.beat(), "they go on");
    }

    #[test]
    fn a_request_rings_and_ends_the_wait_but_names_no_queue() {
        let (waker, requests) = Waker::new(0).unwrap();
        let token = Token::new(PortId::new(1).unwrap(), 2, 3);
        let binding = Binding {
            waker: Arc::clone(&waker),
            token,
        };
        assert!(!waker.is_rung());
        binding.activate();
        assert!(waker.is_rung());
        // Would hang for ever if the doorbell were no event.
        let mut events = Events::with_capacity(4);
        waker.wait(&mut events, None);
        assert_eq!(events.tokens().count(), 0);
        waker.answer();
        assert!(!waker.is_rung());
        assert!(matches!(requests.try_recv(), Ok(WakeRequest::Activate(found)) if found == token));
    }
}
