//! Worker threads: one per core, each polling the source queues that it owns.
//!
//! ```text
//!   control thread --commands--> channel + eventfd --+
//!   guest kick, tap readable ----------------------> epoll --> active list --> turns
//! ```
//! A worker moves between three states per source queue: *active* (polled every turn), *silent*
//! (polled, with growing pauses), *armed* (notifications on, off the active list). With nothing on
//! the list it sleeps in `epoll_wait`. Arming re-checks the queue after a full fence, so no frame
//! is left behind; an armed queue costs nothing.

mod allowance;
mod forward;
mod inline;
mod pairs;
mod parcels;
mod sharing;
mod turn;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{self as channel, Receiver, Sender};
use ringway_api::{IdleConfig, SwitchError};
use ringway_bridge::{Bridge, PortId};
use rustix::event::epoll;
use rustix::event::{EventfdFlags, eventfd};
use tracing::warn;

pub use inline::InlineSwitch;
pub(crate) use pairs::PairTable;
pub(crate) use turn::Source;

use crate::info::WorkerInfo;
use crate::port::{Counter, Port};

/// Commands that wait for a worker: topology changes are few, and their sender waits anyway.
const COMMAND_QUEUE: usize = 256;

/// Names a source queue in a worker's epoll instance: port, queue pair, and a generation that
/// tells a port from the one that had its slot before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token(u64);

impl Token {
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

/// The doorbell's name: no port has it, as the pair number is below 65,535.
const DOORBELL: Token = Token(u64::MAX);

/// What a worker is told. Everything that changes its tables comes this way.
#[derive(Debug)]
pub(crate) enum Command {
    /// A port joined the bridge; these of its queues are this worker's.
    AddPort {
        port: Arc<Port>,
        sources: Vec<Token>,
        done: Sender<()>,
    },
    /// A port leaves: no frame of it or for it is touched once `done` is answered.
    RemovePort { id: PortId, done: Sender<()> },
    /// A source queue goes to another worker: it is touched no more once `done` is answered.
    Release {
        token: Token,
        done: Sender<Option<Box<Source>>>,
    },
    /// A source queue comes from another worker.
    Adopt {
        source: Box<Source>,
        done: Sender<()>,
    },
    /// Look at a source queue that may have become active.
    Activate(Token),
    /// Forward a frame as if the port had sent it.
    Inject { from: PortId, frame: Box<[u8]> },
    /// End the thread.
    Stop,
}

/// Counters of a worker's loop. Written by the worker only.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct WorkerStats {
    pub(crate) queues: Counter,
    pub(crate) active_queues: Counter,
    pub(crate) busy_ns: Counter,
    pub(crate) polling_ns: Counter,
    pub(crate) asleep_ns: Counter,
    /// Nanoseconds since start at which the sleep began that lasts now, 0 when awake.
    pub(crate) sleeping_since_ns: Counter,
    pub(crate) turns: Counter,
    pub(crate) bursts: Counter,
    pub(crate) frames: Counter,
    pub(crate) sleeps: Counter,
    pub(crate) contended: Counter,
}

/// The part of a worker that other threads reach.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    pub(crate) index: u16,
    epoll: OwnedFd,
    doorbell: OwnedFd,
    /// Commands are waiting: checked once per turn.
    rung: AtomicBool,
    commands: Sender<Command>,
    pub(crate) stats: WorkerStats,
    pub(crate) pairs: PairTable,
    /// Zero of the times in `stats`.
    pub(crate) epoch: Instant,
}

impl WorkerHandle {
    /// The handle of a worker that is not running yet, and the other end of its commands.
    fn new(index: u16, epoch: Instant) -> Result<(Arc<Self>, Receiver<Command>), SwitchError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|error| failed(index, "epoll_create", error.into()))?;
        let doorbell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| failed(index, "eventfd", error.into()))?;
        let (commands, receiver) = channel::bounded(COMMAND_QUEUE);
        let handle = Arc::new(Self {
            index,
            epoll,
            doorbell,
            rung: AtomicBool::new(false),
            commands,
            stats: WorkerStats::default(),
            pairs: PairTable::new(),
            epoch,
        });
        handle
            .watch(handle.doorbell.as_fd(), DOORBELL)
            .map_err(|error| failed(index, "epoll_ctl", error))?;
        Ok((handle, receiver))
    }

    /// Queues a command and wakes the worker. Waits while [`COMMAND_QUEUE`] others wait.
    pub(crate) fn send(&self, command: Command) {
        // The worker lives until `Stop`, the last command.
        if self.commands.send(command).is_err() {
            return;
        }
        // Release: pairs with the worker's acquire swap; the command is in the channel by then.
        self.rung.store(true, Ordering::Release);
        // An eventfd write fails only if its counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.doorbell, &1_u64.to_ne_bytes());
    }

    /// Looks at a source queue soon.
    pub(crate) fn activate(&self, token: Token) {
        self.send(Command::Activate(token));
    }

    /// Forwards a frame as if `from` had sent it.
    pub(crate) fn inject(&self, from: PortId, frame: Box<[u8]>) {
        self.send(Command::Inject { from, frame });
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
                worker = self.index,
                "can't remove an fd from epoll: {error}"
            );
        }
    }
}

/// A running worker. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct WorkerThread {
    pub(crate) handle: Arc<WorkerHandle>,
    /// The CPU that the thread is pinned to.
    pub(crate) cpu: usize,
    thread: Option<JoinHandle<()>>,
}

impl WorkerThread {
    /// Starts worker `index` on `cpu`.
    ///
    /// # Errors
    /// No epoll instance, eventfd or thread can be made, or the thread can't be pinned.
    pub(crate) fn start(
        index: u16,
        cpu: usize,
        bridge: Arc<Bridge>,
        idle: IdleConfig,
        epoch: Instant,
    ) -> Result<Self, SwitchError> {
        let (handle, receiver) = WorkerHandle::new(index, epoch)?;
        let (pinned, is_pinned) = channel::bounded(1);
        let for_thread = Arc::clone(&handle);
        let run = move || run_pinned(cpu, &pinned, for_thread, &receiver, bridge, idle);
        let thread = std::thread::Builder::new()
            .name(format!("ringway-w{index}"))
            .spawn(run)
            .map_err(|error| failed(index, "thread", error))?;
        let worker = Self {
            handle,
            cpu,
            thread: Some(thread),
        };
        match is_pinned.recv() {
            Ok(true) => Ok(worker),
            _ => Err(failed(
                index,
                "can't be pinned",
                io::Error::other(format!("CPU {cpu}")),
            )),
        }
    }
}

fn failed(index: u16, what: &str, source: io::Error) -> SwitchError {
    SwitchError::System {
        what: format!("worker {index}: {what}"),
        source,
    }
}

fn run_pinned(
    cpu: usize,
    pinned: &Sender<bool>,
    handle: Arc<WorkerHandle>,
    commands: &Receiver<Command>,
    bridge: Arc<Bridge>,
    idle: IdleConfig,
) {
    let is_pinned = core_affinity::set_for_current(core_affinity::CoreId { id: cpu });
    // The starter waits for this answer.
    let _ = pinned.send(is_pinned);
    if is_pinned {
        turn::Worker::new(handle, bridge, idle).run(commands);
    }
}

impl WorkerThread {
    /// Time spent in turns that moved frames.
    pub(crate) fn busy(&self) -> Duration {
        Duration::from_nanos(self.handle.stats.busy_ns.get())
    }

    /// A snapshot; a sleep that lasts now is counted up to now.
    pub(crate) fn info(&self, epoch: Instant) -> WorkerInfo {
        let stats = &self.handle.stats;
        let count = |counter: &Counter| u32::try_from(counter.get()).unwrap_or(u32::MAX);
        let asleep = Duration::from_nanos(stats.asleep_ns.get());
        let since = Duration::from_nanos(stats.sleeping_since_ns.get());
        let current = if since.is_zero() {
            since
        } else {
            epoch.elapsed().saturating_sub(since)
        };
        WorkerInfo {
            index: self.handle.index,
            cpu: Some(self.cpu),
            queues: count(&stats.queues),
            active_queues: count(&stats.active_queues),
            busy: Duration::from_nanos(stats.busy_ns.get()),
            polling: Duration::from_nanos(stats.polling_ns.get()),
            asleep: asleep + current,
            turns: stats.turns.get(),
            bursts: stats.bursts.get(),
            frames: stats.frames.get(),
            sleeps: stats.sleeps.get(),
            contended: stats.contended.get(),
            recent_busy: 0.0,
        }
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.handle.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!(worker = self.handle.index, "the worker panicked");
        }
    }
}
