//! The loop of a worker.

mod af_xdp;
mod commands;
mod poll;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ringway_api::IdleConfig;
use ringway_bridge::{Bridge, MAX_BURST, Tick};

use super::allowance::Allowance;
use super::forward::{Forwarder, Now};
use super::sharing::Sharing;
use super::{Inbox, WorkerHandle};
use crate::burst::BurstStorage;
use crate::memory::breaks;
use crate::port::{Port, TapReader};
use crate::wake::{Events, Token};

/// How long to sleep while frames wait for a destination without free buffers.
const NAP: Duration = Duration::from_micros(100);

/// While queues are busy, events of the others are looked for this often: one system call of half
/// a microsecond each time.
const EVENT_INTERVAL_NS: u64 = 50_000;

/// Events taken from epoll at a time; the others stay for the next call.
const MAX_EVENTS: usize = 64;

/// Longest run of pause instructions between two polls of a silent queue: some microseconds.
const MAX_PAUSES: u64 = 64;

/// Nanoseconds per [`Tick`].
const TICK_NS: u64 = 1_000_000_000 / Tick::PER_SECOND as u64;

/// A queue that a worker polls, with all that the worker knows of it.
#[derive(Debug)]
pub(crate) struct Source {
    port: Arc<Port>,
    token: Token,
    /// Buffers of a tap's queue.
    reader: Option<Box<TapReader>>,
    is_active: bool,
    allowance: Allowance,
    /// When it last had a frame, or became active.
    last_frame_ns: u64,
    /// Frames that it may still take before others are served first, once they had to wait for a
    /// destination: deficit round robin.
    quantum: usize,
}

impl Source {
    /// A queue that nobody has polled yet.
    pub(crate) fn new(port: Arc<Port>, token: Token) -> Self {
        let reader = matches!(*port, Port::Tap(_)).then(|| Box::new(TapReader::new()));
        Self {
            port,
            token,
            reader,
            is_active: false,
            last_frame_ns: 0,
            allowance: Allowance::new(),
            quantum: MAX_BURST,
        }
    }
}

/// What polling a source found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Polled {
    /// So many frames were taken.
    Frames(usize),
    /// So many were taken; there are more, or may be, but they have to wait: poll again.
    Waiting(usize),
    Empty,
    /// The queue is stopped or gone: no event but a new start brings it back.
    Stopped,
}

impl Polled {
    /// Of `count` frames that were gathered so many were taken.
    fn of(taken: usize, count: usize) -> Self {
        if taken == count && taken > 0 {
            Self::Frames(taken)
        } else {
            Self::Waiting(taken)
        }
    }
}

/// A worker's state; lives on its thread.
pub(crate) struct Worker {
    handle: Arc<WorkerHandle>,
    forwarder: Forwarder,
    sources: Vec<Option<Source>>,
    by_token: HashMap<Token, usize>,
    /// Indices of the sources that are polled each turn.
    active: Vec<usize>,
    burst: BurstStorage,
    events: Events,
    idle: IdleConfig,
    now_ns: u64,
    /// When a frame was last seen in any queue.
    last_frame_ns: u64,
    last_events_ns: u64,
    seen_breaks: u64,
    sharing: Sharing,
    /// Somebody else wants this core: sleep rather than poll.
    is_shared: bool,
    /// Frames wait and nothing else is to be done.
    must_nap: bool,
}

impl Worker {
    pub(crate) fn new(handle: Arc<WorkerHandle>, bridge: Arc<Bridge>, idle: IdleConfig) -> Self {
        Self {
            handle,
            forwarder: Forwarder::new(bridge, saturating_ns(idle.backpressure)),
            sources: Vec::new(),
            by_token: HashMap::new(),
            active: Vec::new(),
            burst: BurstStorage::new(),
            events: Events::with_capacity(MAX_EVENTS),
            idle,
            now_ns: 0,
            last_frame_ns: 0,
            last_events_ns: 0,
            seen_breaks: breaks(),
            sharing: Sharing::default(),
            is_shared: false,
            must_nap: false,
        }
    }

    /// Runs until [`super::Command::Stop`].
    pub(super) fn run(mut self, inbox: &Inbox) {
        self.sharing.watch();
        self.read_clock();
        while self.step(inbox) {
            // The turn may have taken the doorbell's event of commands that came after the last
            // look at them: no other will come.
            if self.handle.waker.is_rung() {
                continue;
            }
            if self.active.is_empty() {
                let unsent = self.forwarder.unsent.is_empty();
                self.sleep(if unsent { None } else { Some(NAP) });
            } else if self.must_nap {
                self.sleep(Some(NAP));
            }
        }
    }

    /// Executes the commands that wait and polls each active source once; false after
    /// [`super::Command::Stop`].
    #[inline]
    pub(crate) fn step(&mut self, inbox: &Inbox) -> bool {
        if self.handle.waker.is_rung() && !self.take_commands(inbox) {
            return false;
        }
        if breaks() != self.seen_breaks {
            self.stop_broken();
        }
        if !self.active.is_empty() {
            self.turn();
        }
        if !self.forwarder.unsent.is_empty() {
            self.forwarder.send_again();
        }
        true
    }

    /// Polls each active source once.
    fn turn(&mut self) {
        self.is_shared = self.idle.spin != Duration::MAX && self.sharing.is_shared(self.now_ns);
        let mut frames = 0;
        let mut bursts = 0;
        let mut waiting = false;
        // Of the active list, so many are to be first in the next turn.
        let mut first = 0;
        let mut at = 0;
        while let Some(&index) = self.active.get(at) {
            let polled = self.poll(index);
            let stays = match polled {
                Polled::Frames(count) => {
                    frames += count as u64;
                    bursts += 1;
                    self.last_frame_ns = self.now_ns;
                    self.note_activity(index)
                }
                Polled::Waiting(count) => {
                    waiting = true;
                    if count > 0 {
                        frames += count as u64;
                        bursts += 1;
                        self.last_frame_ns = self.now_ns;
                    }
                    if self.has_quantum_after(index, count) {
                        // Else the room at a destination would go to the same source each time.
                        self.active[first..=at].rotate_right(1);
                        first += 1;
                    }
                    true
                }
                Polled::Empty => !self.is_silent(index) || !self.arm(index),
                Polled::Stopped => false,
            };
            if stays {
                at += 1;
            } else {
                self.deactivate(at);
            }
        }
        let took_ns = self.read_clock();
        let stats = &self.handle.stats;
        stats.turns.add_owned(1);
        stats.contended.set(*self.forwarder.contended());
        if frames > 0 {
            stats.frames.add_owned(frames);
            stats.bursts.add_owned(bursts);
            stats.busy_ns.add_owned(took_ns);
        } else {
            stats.polling_ns.add_owned(took_ns);
            if !self.active.is_empty() {
                self.pause();
            }
        }
        // Whoever makes room for the frames that wait does not tell.
        let silent_ns = self.now_ns - self.last_frame_ns;
        self.must_nap =
            waiting && frames == 0 && (self.is_shared || silent_ns > saturating_ns(self.idle.spin));
        let has_armed = self.active.len() < self.by_token.len();
        if has_armed && self.now_ns - self.last_events_ns > EVENT_INTERVAL_NS {
            self.take_events(Some(Duration::ZERO));
        }
    }

    /// Advances the worker's clock and returns by how much.
    fn read_clock(&mut self) -> u64 {
        let now_ns = saturating_ns(self.handle.epoch.elapsed());
        let took_ns = now_ns - self.now_ns;
        self.now_ns = now_ns;
        took_ns
    }

    fn now(&self) -> Now {
        #[expect(clippy::cast_possible_truncation, reason = "ticks wrap")]
        let tick = Tick((self.now_ns / TICK_NS) as u32);
        Now {
            tick,
            ns: self.now_ns,
        }
    }

    fn note_activity(&mut self, index: usize) -> bool {
        if let Some(source) = &mut self.sources[index] {
            source.last_frame_ns = self.now_ns;
            source.quantum = MAX_BURST;
        }
        true
    }

    /// Notes that a source took `count` frames and others of it had to wait. True if it comes
    /// first in the next turn, since it had not had its due yet.
    fn has_quantum_after(&mut self, index: usize, count: usize) -> bool {
        let Some(source) = &mut self.sources[index] else {
            return false;
        };
        source.last_frame_ns = self.now_ns;
        let is_left = count < source.quantum;
        source.quantum = if is_left {
            source.quantum - count
        } else {
            MAX_BURST
        };
        is_left
    }

    fn is_silent(&self, index: usize) -> bool {
        if self.is_shared {
            return true;
        }
        let limit_ns = saturating_ns(self.idle.spin.saturating_add(self.idle.pause));
        self.sources[index]
            .as_ref()
            .is_none_or(|source| self.now_ns - source.last_frame_ns >= limit_ns)
    }

    /// Leaves the core to its sibling for a moment, longer the longer nothing came.
    fn pause(&self) {
        let silent_ns = self.now_ns - self.last_frame_ns;
        let beyond_spin_ns = silent_ns.saturating_sub(saturating_ns(self.idle.spin));
        for _ in 0..(beyond_spin_ns / 256).min(MAX_PAUSES) {
            std::hint::spin_loop();
        }
    }

    /// Turns a silent source's notifications on; true if it is still empty, so that it can leave
    /// the active list.
    fn arm(&mut self, index: usize) -> bool {
        let Some(source) = &self.sources[index] else {
            return true;
        };
        let guest = match &*source.port {
            Port::VhostUser(guest) => guest,
            // A tap's fd is always watched, and the last read found nothing: the next frame is an
            // event.
            Port::Tap(_) => return true,
            Port::AfXdp(xdp) => {
                let queue = xdp.queue(source.token.pair());
                return queue
                    .try_receiver()
                    .is_some_and(|mut receiver| receiver.arm());
            }
        };
        let Some(mut state) = guest.transmit_queue(source.token.pair()).try_lock() else {
            return false;
        };
        let Some(started) = &mut state.started else {
            return true;
        };
        if started.is_polled() {
            return false;
        }
        let is_empty = started.ring.arm();
        if !is_empty {
            started.ring.disarm();
        }
        is_empty
    }

    fn deactivate(&mut self, at: usize) {
        let index = self.active.swap_remove(at);
        if let Some(source) = &mut self.sources[index] {
            source.is_active = false;
        }
        self.handle
            .stats
            .active_queues
            .set(self.active.len() as u64);
    }

    fn activate(&mut self, token: Token) {
        let Some(&index) = self.by_token.get(&token) else {
            return;
        };
        let Some(source) = &mut self.sources[index] else {
            return;
        };
        source.last_frame_ns = self.now_ns;
        if source.is_active {
            return;
        }
        source.is_active = true;
        if let Port::VhostUser(guest) = &*source.port
            && let Some(mut state) = guest.transmit_queue(token.pair()).try_lock()
            && let Some(started) = &mut state.started
        {
            started.ring.disarm();
        }
        self.active.push(index);
        self.handle
            .stats
            .active_queues
            .set(self.active.len() as u64);
    }

    /// Waits until an armed queue or a command needs the worker, or for `timeout`.
    fn sleep(&mut self, timeout: Option<Duration>) {
        let stats = &self.handle.stats;
        stats.sleeping_since_ns.set(self.now_ns.max(1));
        self.take_events(timeout);
        let slept_ns = self.read_clock();
        let stats = &self.handle.stats;
        stats.sleeping_since_ns.set(0);
        stats.asleep_ns.add_owned(slept_ns);
        stats.sleeps.add_owned(1);
        if timeout.is_none() {
            // Silence is counted from now: after an event a sleeper polls at full speed again.
            self.last_frame_ns = self.now_ns;
        }
        for at in 0..self.active.len() {
            let index = self.active[at];
            self.note_activity(index);
        }
    }

    /// Activates the sources that epoll names, after at most `timeout`.
    fn take_events(&mut self, timeout: Option<Duration>) {
        self.last_events_ns = self.now_ns;
        // An empty list in its place costs nothing.
        let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        self.handle.waker.wait(&mut events, timeout);
        events.tokens().for_each(|token| self.activate(token));
        self.events = events;
    }
}

fn saturating_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
