//! The loop of a worker.

mod af_xdp;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam::channel::Receiver;
use ringway_bridge::{Bridge, DropReason, MAX_BURST, PortId, Tick};
use rustix::event::epoll;
use rustix::time::Timespec;
use tracing::{debug, warn};

use super::allowance::Allowance;
use super::forward::{Forwarder, Now};
use super::sharing::Sharing;
use super::{Command, DOORBELL, Token, WorkerHandle};
use crate::burst::Burst;
use crate::memory::{Segment, breaks};
use crate::net_header::{HEADER_BYTES, HEADER_LEN};
use crate::offload::Offloads;
use crate::port::{Port, QueueCounters, TapPort, TapReader, VhostPort};
use crate::ring::Entry;
use crate::switch::IdleConfig;

/// How long to sleep while frames wait for a destination without free buffers.
const DOZE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000,
};

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
pub(super) struct Worker {
    handle: Arc<WorkerHandle>,
    forwarder: Forwarder,
    sources: Vec<Option<Source>>,
    by_token: HashMap<u64, usize>,
    /// Indices of the sources that are polled each turn.
    active: Vec<usize>,
    burst: Burst,
    events: Vec<epoll::Event>,
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
    must_doze: bool,
}

impl Worker {
    pub(super) fn new(handle: Arc<WorkerHandle>, bridge: Arc<Bridge>, idle: IdleConfig) -> Self {
        Self {
            handle,
            forwarder: Forwarder::new(bridge, saturating_ns(idle.patience)),
            sources: Vec::new(),
            by_token: HashMap::new(),
            active: Vec::new(),
            burst: Burst::new(),
            events: Vec::with_capacity(MAX_EVENTS),
            idle,
            now_ns: 0,
            last_frame_ns: 0,
            last_events_ns: 0,
            seen_breaks: breaks(),
            sharing: Sharing::default(),
            is_shared: false,
            must_doze: false,
        }
    }

    /// Runs until [`Command::Stop`].
    pub(super) fn run(mut self, commands: &Receiver<Command>) {
        self.sharing.watch();
        self.read_clock();
        while self.step(commands) {
            // The turn may have taken the doorbell's event of commands that came after the last
            // look at them: no other will come.
            if self.handle.rung.load(Ordering::Acquire) {
                continue;
            }
            if self.active.is_empty() {
                let unsent = self.forwarder.unsent.is_empty();
                self.sleep(if unsent { None } else { Some(&DOZE) });
            } else if self.must_doze {
                self.sleep(Some(&DOZE));
            }
        }
    }

    /// Executes the commands that wait and polls each active source once; false after
    /// [`Command::Stop`].
    #[inline]
    pub(super) fn step(&mut self, commands: &Receiver<Command>) -> bool {
        if self.handle.rung.load(Ordering::Relaxed) && !self.take_commands(commands) {
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
        stats.contended.set(self.forwarder.contended);
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
        self.must_doze =
            waiting && frames == 0 && (self.is_shared || silent_ns > saturating_ns(self.idle.spin));
        let has_armed = self.active.len() < self.by_token.len();
        if has_armed && self.now_ns - self.last_events_ns > EVENT_INTERVAL_NS {
            self.take_events(Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }));
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

    fn poll(&mut self, index: usize) -> Polled {
        // Taken out for the time, which is cheaper than another reference to its port.
        let Some(mut source) = self.sources[index].take() else {
            return Polled::Stopped;
        };
        let (port, pair, limit) = (&*source.port, source.token.pair(), source.quantum);
        let polled = match (port, &mut source.reader) {
            (Port::VhostUser(guest), _) => {
                self.poll_guest(port, guest, pair, limit, &mut source.allowance)
            }
            (Port::Tap(tap), Some(reader)) => self.poll_tap(port, tap, pair, reader),
            (Port::Tap(_), None) => Polled::Stopped,
            (Port::AfXdp(xdp), _) => self.poll_af_xdp(port, xdp, pair, limit),
        };
        self.sources[index] = Some(source);
        polled
    }

    fn poll_guest(
        &mut self,
        port: &Port,
        guest: &VhostPort,
        pair: u16,
        limit: usize,
        allowance: &mut Allowance,
    ) -> Polled {
        let queue = guest.transmit_queue(pair);
        let Some(mut state) = queue.try_lock() else {
            queue.counters.contended.add_owned(1);
            self.forwarder.contended += 1;
            return Polled::Waiting(0);
        };
        let Some(started) = &mut state.started else {
            return Polled::Stopped;
        };
        self.burst.clear();
        let limit = limit.min(allowance.frames());
        let gathered = started.ring.gather(limit, &mut self.burst);
        let count = self.burst.len();
        if count == 0 && gathered.is_ok() {
            return Polled::Empty;
        }
        self.burst
            .take_snapshots(started.ring.header_bytes(), started.offloads);
        let given_back = if started.enabled {
            let now = self.now();
            let pairs = &self.handle.pairs;
            self.forwarder
                .forward(port, pair, &mut self.burst, pairs, now)
        } else {
            guest
                .base
                .rx_drops
                .add(DropReason::QueueDisabled, count as u64);
            0
        };
        let taken = count - given_back;
        let (done, again) = self.burst.frames().split_at(taken);
        let bytes = started.ring.complete_gathered(done);
        started.ring.give_back(again);
        queue.counters.frames.add_owned(taken as u64);
        queue.counters.bytes.add_owned(bytes);
        allowance.note(taken, bytes);
        guest.publish(queue, &mut state);
        if let Err(fault) = gathered {
            // The chain at fault is a frame received and dropped.
            queue.counters.frames.add_owned(1);
            guest.base.rx_drops.add(DropReason::BadDescriptor, 1);
            guest.fail_queue(queue, &mut state, &fault);
        }
        Polled::of(taken, count)
    }

    fn poll_tap(
        &mut self,
        port: &Port,
        tap: &TapPort,
        pair: u16,
        reader: &mut TapReader,
    ) -> Polled {
        self.burst.clear();
        if let Err(error) = reader.gather(tap.fd(pair), &mut self.burst) {
            warn!(port = %tap.base.name, queue = pair, "tap queue failed: {error}");
            return Polled::Stopped;
        }
        let count = self.burst.len();
        if count == 0 {
            return Polled::Empty;
        }
        let counters = tap.queue_counters(pair).0;
        let taken = self.forward_gathered(port, pair, tap.offloads(), counters);
        reader.give_back(count - taken);
        Polled::of(taken, count)
    }

    /// Forwards the burst that was gathered from a queue of the host, whose frames may ask for
    /// `allowed`, and counts it. Returns how many were taken; those behind wait.
    fn forward_gathered(
        &mut self,
        port: &Port,
        pair: u16,
        allowed: Offloads,
        counters: &QueueCounters,
    ) -> usize {
        self.burst.take_snapshots(HEADER_BYTES, allowed);
        let now = self.now();
        let pairs = &self.handle.pairs;
        let given_back = self
            .forwarder
            .forward(port, pair, &mut self.burst, pairs, now);
        let taken = self.burst.len() - given_back;
        let bytes = (0..taken).map(|i| u64::from(self.burst.l2_bytes(i))).sum();
        counters.frames.add_owned(taken as u64);
        counters.bytes.add_owned(bytes);
        taken
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
        let Some(&index) = self.by_token.get(&token.0) else {
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
    fn sleep(&mut self, timeout: Option<&Timespec>) {
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
    fn take_events(&mut self, timeout: Option<&Timespec>) {
        self.last_events_ns = self.now_ns;
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.handle.epoll, spare, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => warn!(worker = self.handle.index, "epoll_wait: {error}"),
        }
        for event in &events {
            let token = Token(event.data.u64());
            // Commands are looked for in each turn.
            if token != DOORBELL {
                self.activate(token);
            }
        }
        self.events = events;
    }

    /// Executes the commands that wait; false after [`Command::Stop`].
    #[cold]
    fn take_commands(&mut self, commands: &Receiver<Command>) -> bool {
        // Acquire: pairs with the release store in `WorkerHandle::send`. Cleared before the channel
        // is read, so a command that comes later rings again.
        self.handle.rung.swap(false, Ordering::Acquire);
        while let Ok(command) = commands.try_recv() {
            match command {
                Command::AddPort {
                    port,
                    sources,
                    done,
                } => {
                    self.add_port(port, sources);
                    // The sender waits unless it gave up.
                    let _ = done.send(());
                }
                Command::RemovePort { id, done } => {
                    self.remove_port(id);
                    let _ = done.send(());
                }
                Command::Release { token, done } => {
                    let source = self.release(token);
                    let _ = done.send(source.map(Box::new));
                }
                Command::Adopt { source, done } => {
                    self.adopt(*source);
                    let _ = done.send(());
                }
                Command::Activate(token) => self.activate(token),
                Command::Inject { from, frame } => self.inject(from, &frame),
                Command::Stop => return false,
            }
        }
        true
    }

    fn add_port(&mut self, port: Arc<Port>, sources: Vec<Token>) {
        let id = port.base().id;
        debug!(worker = self.handle.index, port = %port.base().name, "port added");
        self.forwarder.reset_destination(id);
        self.forwarder.members.add(id);
        self.forwarder.ports[id.index()] = Some(Arc::clone(&port));
        self.forwarder.owned[id.index()] = 0;
        for token in sources {
            self.adopt(Source::new(Arc::clone(&port), token));
        }
    }

    /// Polls a source from now on, beginning with a look at it.
    fn adopt(&mut self, source: Source) {
        let token = source.token;
        self.forwarder.owned[source.port.base().id.index()] |= 1 << token.pair();
        let free = self.sources.iter().position(Option::is_none);
        let index = free.unwrap_or(self.sources.len());
        if free.is_some() {
            self.sources[index] = Some(source);
        } else {
            self.sources.push(Some(source));
        }
        self.by_token.insert(token.0, index);
        self.activate(token);
        self.count_queues();
    }

    /// Polls a source no more. Its last burst is published, and frames that wait are in its ring or
    /// its reader.
    fn release(&mut self, token: Token) -> Option<Source> {
        let index = self.by_token.remove(&token.0)?;
        self.active.retain(|active| *active != index);
        let mut source = self.sources.get_mut(index)?.take()?;
        source.is_active = false;
        self.forwarder.owned[source.port.base().id.index()] &= !(1 << token.pair());
        self.count_queues();
        Some(source)
    }

    fn count_queues(&self) {
        let stats = &self.handle.stats;
        stats.queues.set(self.by_token.len() as u64);
        stats.active_queues.set(self.active.len() as u64);
    }

    fn remove_port(&mut self, id: PortId) {
        self.forwarder.members.remove(id);
        self.forwarder.ports[id.index()] = None;
        self.forwarder.owned[id.index()] = 0;
        self.handle.pairs.forget(id);
        for index in 0..self.sources.len() {
            let slot = &mut self.sources[index];
            if slot
                .as_ref()
                .is_some_and(|source| source.port.base().id == id)
                && let Some(source) = slot.take()
            {
                self.by_token.remove(&source.token.0);
                self.active.retain(|active| *active != index);
            }
        }
        self.count_queues();
    }

    /// Forwards a frame of our own making, in the name of a port.
    fn inject(&mut self, from: PortId, frame: &[u8]) {
        let Some(port) = self.forwarder.ports[from.index()].clone() else {
            return;
        };
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend_from_slice(frame);
        let Ok(len) = u32::try_from(bytes.len()) else {
            return;
        };
        self.burst.clear();
        if let Some(mark) = self.burst.begin() {
            self.burst.push(
                mark,
                Segment {
                    ptr: bytes.as_mut_ptr(),
                    len,
                },
            );
            self.burst.add(mark, Entry::single(0), len);
        }
        self.burst.take_snapshots(HEADER_BYTES, Offloads::NONE);
        let now = self.now();
        // It has no ring to wait in.
        let patience_ns = std::mem::replace(&mut self.forwarder.patience_ns, 0);
        self.forwarder
            .forward(&port, 0, &mut self.burst, &self.handle.pairs, now);
        self.forwarder.patience_ns = patience_ns;
        let counters = &port.base().injected;
        counters.frames.add(1);
        counters.bytes.add(frame.len() as u64);
    }

    /// Stops the queues whose memory was cut off; those in other hands at the moment are tried
    /// again in the next turn.
    #[cold]
    fn stop_broken(&mut self) {
        let breaks = breaks();
        let mut all = true;
        for port in self.forwarder.ports.iter().flatten() {
            if let Port::VhostUser(guest) = &**port {
                all &= guest.stop_broken_queues();
            }
        }
        if all {
            self.seen_breaks = breaks;
        }
    }
}

fn saturating_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
