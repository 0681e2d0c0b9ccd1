//! Worker threads: one per core, each polling the source queues that it owns.
//!
//! ```text
//!   control thread --commands--> channel + doorbell -+
//!   guest kick, tap readable ----------------------> epoll --> schedule --> turns
//! ```
//! A worker moves between three states per source queue: *active* (polled every turn), *silent*
//! (polled, with growing pauses), *armed* (notifications on, off the schedule). With nothing on the
//! schedule it sleeps in `epoll_wait`. Arming re-checks the queue after a full fence, so no frame
//! is left behind; an armed queue costs nothing.

mod contention;
mod forward;
mod idle;
mod ledger;
mod pairs;
mod parking;
mod schedule;
mod stalls;
mod thread_times;
mod turn;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{self as channel, Receiver, Sender};
use ringway_api::{IdleConfig, SwitchError, WorkerInfo};
use ringway_bridge::{Bridge, PortId, Vlans};
use tracing::warn;

pub(crate) use pairs::PairTable;
pub(crate) use turn::Worker;

use self::idle::saturating_ns;

use crate::call;
use crate::capture::Tap;
use crate::cpus::pin_to_cpu;
use crate::port::{Counter, Port};
use crate::wake::{Token, WakeRequest, Waker};

/// Commands that wait for a worker: topology changes are few, and their sender waits anyway.
const COMMAND_QUEUE: usize = 256;

/// What the switch tells a worker. Everything that changes its tables comes this way.
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
    /// A port that left does not come back: its counters by pairs of ports go.
    ForgetPairs { id: PortId, done: Sender<()> },
    /// Which ports are in which VLANs from now on; nothing if no port says so.
    SetVlans {
        vlans: Option<Arc<Vlans>>,
        done: Sender<()>,
    },
    /// A source queue goes to another worker: it is touched no more once `done` is answered.
    Release { token: Token, done: Sender<()> },
    /// A source queue comes from another worker.
    Adopt {
        port: Arc<Port>,
        token: Token,
        done: Sender<()>,
    },
    /// Frames are captured from now on.
    AddTap { tap: Box<Tap>, done: Sender<()> },
    /// This capture is over: nothing is copied to it once `done` is answered.
    RemoveTap { id: u64, done: Sender<()> },
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
    pub(crate) waker: Arc<Waker>,
    commands: Sender<Command>,
    pub(crate) stats: WorkerStats,
    pub(crate) pairs: PairTable,
    /// Zero of the times in `stats`.
    pub(crate) epoch: Instant,
}

/// What a worker reads its orders from.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// Of the switch.
    commands: Receiver<Command>,
    /// Of the ports.
    requests: Receiver<WakeRequest>,
}

impl WorkerHandle {
    /// The handle of a worker that is not running yet, and the other end of its channels.
    ///
    /// # Errors
    /// No epoll instance or eventfd can be made.
    pub(crate) fn new(index: u16, epoch: Instant) -> Result<(Arc<Self>, Inbox), SwitchError> {
        let (waker, requests) = Waker::new(index)
            .map_err(|source| failed(index, "epoll instance or eventfd", source))?;
        let (commands, receiver) = channel::bounded(COMMAND_QUEUE);
        let handle = Arc::new(Self {
            index,
            waker,
            commands,
            stats: WorkerStats::default(),
            pairs: PairTable::new(),
            epoch,
        });
        let inbox = Inbox {
            commands: receiver,
            requests,
        };
        Ok((handle, inbox))
    }

    /// Queues a command and wakes the worker. Waits while [`COMMAND_QUEUE`] others wait.
    pub(crate) fn send(&self, command: Command) {
        // The worker lives until `Stop`, the last command.
        if self.commands.send(command).is_ok() {
            self.waker.ring();
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
        let (handle, inbox) = WorkerHandle::new(index, epoch)?;
        let (ready, is_ready) = channel::bounded(1);
        let for_thread = Arc::clone(&handle);
        let run = move || run_pinned(cpu, &ready, for_thread, &inbox, bridge, idle);
        let thread = std::thread::Builder::new()
            .name(format!("ringway-w{index}"))
            .spawn(run)
            .map_err(|error| failed(index, "thread", error))?;
        let worker = Self {
            handle,
            cpu,
            thread: Some(thread),
        };
        match is_ready.recv() {
            Ok(Ok(())) => Ok(worker),
            Ok(Err(source)) => Err(failed(index, "can't start", source)),
            Err(_) => Err(failed(
                index,
                "can't start",
                io::Error::other("it panicked"),
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
    ready: &Sender<io::Result<()>>,
    handle: Arc<WorkerHandle>,
    inbox: &Inbox,
    bridge: Arc<Bridge>,
    idle: IdleConfig,
) {
    let pinned = if pin_to_cpu(cpu) {
        call::prepare()
    } else {
        Err(io::Error::other(format!("can't be pinned to CPU {cpu}")))
    };
    let is_ready = pinned.is_ok();
    // The starter waits for this answer.
    let _ = ready.send(pinned);
    if is_ready {
        Worker::new(handle, bridge, idle).run(inbox);
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
        let sleeping = match stats.sleeping_since_ns.get() {
            0 => 0,
            since => saturating_ns(epoch.elapsed()).saturating_sub(since),
        };
        WorkerInfo {
            index: self.handle.index,
            cpu: self.cpu,
            queues: count(&stats.queues),
            active_queues: count(&stats.active_queues),
            busy_ns: stats.busy_ns.get(),
            polling_ns: stats.polling_ns.get(),
            asleep_ns: stats.asleep_ns.get() + sleeping,
            turns: stats.turns.get(),
            bursts: stats.bursts.get(),
            frames: stats.frames.get(),
            sleeps: stats.sleeps.get(),
            contended: stats.contended.get(),
            recent_busy_share: 0.0,
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
