//! The loop of a worker: poll each active source once, ask the idle policy, obey.
//!
//! What is decided is decided elsewhere, by pure values: [`Schedule`] knows who is polled and in
//! which order, [`Idle`] whether to go on at once, to pause or to sleep. What is done to a burst is
//! the same for all kinds of port, whose receive sides are [`RxQueue`]s.

mod commands;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ringway_api::IdleConfig;
use ringway_bridge::{Bridge, DropReason, PortId, Tick};

use super::contention::Contention;
use super::forward::{Forwarder, Now, Sender, Service};
use super::idle::{Idle, Next, Turn, saturating_ns};
use super::ledger::{max_charge_ns, with_price_of_floods};
use super::pairs::PairTable;
use super::schedule::{Active, Polled, Schedule};
use super::{Inbox, WorkerHandle};
use crate::burst::BurstStorage;
use crate::call;
use crate::clock::Clock;
use crate::memory::breaks;
use crate::port::{Completion, Gathered, Port, RxQueue, Unavailable, with_rx_queue};
use crate::wake::{Events, Token};

/// Events taken from epoll at a time; the others stay for the next call.
const MAX_EVENTS: usize = 64;

/// Nanoseconds per [`Tick`].
const TICK_NS: u64 = 1_000_000_000 / Tick::PER_SECOND as u64;

/// A queue that a worker receives from.
#[derive(Debug)]
struct Source {
    port: Arc<Port>,
    id: PortId,
    /// Frames come from it by system calls.
    has_calls: bool,
    token: Token,
    /// It is on the schedule.
    is_active: bool,
    service: Service,
}

/// A worker's state; lives on its thread.
pub(crate) struct Worker {
    handle: Arc<WorkerHandle>,
    sources: Vec<Option<Source>>,
    by_token: HashMap<Token, usize>,
    schedule: Schedule,
    idle: Idle,
    contention: Contention,
    path: Path,
    events: Events,
    clock: Clock,
    now_ns: u64,
    seen_breaks: u64,
}

impl Worker {
    pub(crate) fn new(handle: Arc<WorkerHandle>, bridge: Arc<Bridge>, idle: IdleConfig) -> Self {
        let clock = Clock::since(handle.epoch);
        Self {
            clock,
            handle,
            sources: Vec::new(),
            by_token: HashMap::new(),
            schedule: Schedule::default(),
            idle: Idle::new(idle.spin, idle.pause),
            contention: Contention::default(),
            path: Path {
                burst: BurstStorage::new(),
                forwarder: Forwarder::new(bridge, saturating_ns(idle.backpressure), clock),
                last_bytes: 0,
            },
            events: Events::with_capacity(MAX_EVENTS),
            now_ns: 0,
            seen_breaks: breaks(),
        }
    }

    /// Runs until [`super::Command::Stop`].
    pub(super) fn run(mut self, inbox: &Inbox) {
        if self.idle.may_sleep() {
            self.contention.watch();
        }
        self.path.forwarder.stalls.watch();
        self.read_clock();
        while let Some(next) = self.step(inbox) {
            self.obey(next);
        }
    }

    /// Executes the commands that wait, polls each active source once, looks for events of the
    /// others and tells what to do next; `None` after [`super::Command::Stop`].
    #[inline]
    pub(crate) fn step(&mut self, inbox: &Inbox) -> Option<Next> {
        if self.handle.waker.is_rung() {
            if !self.take_commands(inbox) {
                return None;
            }
            // So that it is in nobody's next burst.
            self.read_clock();
        }
        if breaks() != self.seen_breaks {
            self.stop_broken();
        }
        let mut turn = Turn::default();
        if self.schedule.len() > 0 {
            turn = self.poll_all();
        }
        if self.path.forwarder.has_parked() {
            turn.frames += self.deliver_parked();
            turn.has_unsent = self.path.forwarder.has_parked();
        }
        let forwarder = &mut self.path.forwarder;
        if !forwarder.unsent.is_empty() {
            forwarder.send_again();
            turn.has_unsent |= !forwarder.unsent.is_empty();
        }
        // Of frames that no source was polled for.
        call::make_owed();
        let next = self.idle.after(self.now_ns, turn);
        // A sleep begins with a look at events anyway.
        if !matches!(next, Next::Sleep(_)) {
            self.look_for_events();
        }
        Some(next)
    }

    /// Polls each active source once, but for those that had more than others: unless they alone have
    /// frames.
    fn poll_all(&mut self) -> Turn {
        let start_ns = self.now_ns;
        let mut turn = Turn {
            is_contended: self.contention.is_contended(self.now_ns),
            ..Turn::default()
        };
        let mut bursts = 0;
        let has_skipped = self.poll_each(&mut turn, &mut bursts);
        if has_skipped && bursts == 0 {
            self.poll_each(&mut turn, &mut bursts);
        }
        if self.now_ns == start_ns {
            self.read_clock();
        }
        turn.active = self.schedule.len();
        self.count(&turn, bursts, self.now_ns - start_ns);
        turn
    }

    /// Polls each active source whose port may be polled; returns whether others had more than their
    /// share and were passed over.
    fn poll_each(&mut self, turn: &mut Turn, bursts: &mut u64) -> bool {
        let mut has_skipped = false;
        while let Some(active) = self.schedule.pick() {
            let Some(Source { id, has_calls, .. }) = self.sources[active.source] else {
                continue;
            };
            let ledger = &mut self.path.forwarder.ledger;
            if !ledger.may_poll(id, self.now_ns) {
                has_skipped |= !ledger.waits(id, self.now_ns);
                turn.is_waiting = true;
                self.schedule.skip(active);
                continue;
            }
            let polled = self.poll(active);
            if matches!(polled, Polled::Frames(_) | Polled::Waiting(_)) {
                call::make_owed();
                let took_ns = self.read_clock();
                self.path
                    .charge((id, has_calls), polled, took_ns, self.now_ns);
            } else if self.path.forwarder.stalls.is_timing() {
                let took_ns = self.read_clock();
                let forwarder = &mut self.path.forwarder;
                if forwarder.stalls.is_late(took_ns, 0) {
                    forwarder.charge_late(id, took_ns, 0, self.now_ns);
                }
            }
            let frames = polled.frames() as u64;
            turn.frames += frames;
            *bursts += u64::from(frames > 0);
            turn.is_waiting |= matches!(polled, Polled::Waiting(_));
            let leaves = match polled {
                Polled::Frames(_) | Polled::Waiting(_) => false,
                Polled::Empty => {
                    let since_ns = active.last_frame_ns;
                    self.idle
                        .is_silent(self.now_ns, since_ns, turn.is_contended)
                        && self.arm(active.source)
                }
                Polled::Stopped => true,
            };
            if leaves {
                self.deactivate(active.source);
            } else {
                self.schedule.keep(active, polled, self.now_ns);
            }
        }
        self.path.forwarder.ledger.end_turn();
        has_skipped
    }

    /// Tries to deliver what is parked; returns how many frames were delivered.
    #[cold]
    fn deliver_parked(&mut self) -> u64 {
        let (now, clock) = (self.now(), self.clock);
        let Path {
            burst, forwarder, ..
        } = &mut self.path;
        let pairs = &self.handle.pairs;
        let sent = forwarder.deliver_parked(burst, pairs, now, || clock.now_ns());
        let Some(sent) = sent else {
            return 0;
        };
        call::make_owed();
        // So that it is in nobody's next burst.
        let took_ns = self.read_clock();
        let stats = &self.handle.stats;
        if sent > 0 {
            stats.busy_ns.add_owned(took_ns);
        } else {
            stats.polling_ns.add_owned(took_ns);
        }
        sent
    }

    fn poll(&mut self, active: Active) -> Polled {
        let now = self.now();
        let Some(source) = &mut self.sources[active.source] else {
            return Polled::Stopped;
        };
        let Source {
            port,
            token,
            service,
            ..
        } = source;
        let (path, pairs) = (&mut self.path, &self.handle.pairs);
        let pair = token.pair();
        with_rx_queue!(&**port, pair, queue => {
            path.receive(Sender { port, pair, service }, queue, active.quantum, pairs, now)
        })
    }

    /// Turns a silent source's notifications on; true if it is still empty, so that it need not be
    /// polled.
    fn arm(&self, source: usize) -> bool {
        let Some(source) = &self.sources[source] else {
            return true;
        };
        with_rx_queue!(&*source.port, source.token.pair(), queue => match queue {
            Ok(mut queue) => queue.arm(),
            Err(Unavailable::Busy) => false,
            Err(Unavailable::Stopped) => true,
        })
    }

    fn deactivate(&mut self, source: usize) {
        if let Some(source) = &mut self.sources[source] {
            source.is_active = false;
        }
    }

    /// Has a source polled from the next turn on.
    fn activate(&mut self, token: Token) {
        let Some(&index) = self.by_token.get(&token) else {
            return;
        };
        let Some(source) = self.sources[index].as_mut().filter(|s| !s.is_active) else {
            return;
        };
        source.is_active = true;
        with_rx_queue!(&*source.port, token.pair(), queue => {
            if let Ok(mut queue) = queue {
                queue.disarm();
            }
        });
        self.schedule.add(index, self.now_ns);
        self.count_active();
    }

    /// Notes an event of a source.
    fn note_kick(&self, token: Token) {
        let index = self.by_token.get(&token);
        let source = index.and_then(|index| self.sources[*index].as_ref());
        if let Some(source) = source {
            source.port.note_kick(token.pair(), source.is_active);
        }
    }

    fn count(&mut self, turn: &Turn, bursts: u64, took_ns: u64) {
        let stats = &self.handle.stats;
        stats.turns.add_owned(1);
        stats.contended.set(*self.path.forwarder.contended());
        if turn.frames > 0 {
            stats.frames.add_owned(turn.frames);
            stats.bursts.add_owned(bursts);
            stats.busy_ns.add_owned(took_ns);
        } else {
            stats.polling_ns.add_owned(took_ns);
        }
        self.count_active();
    }

    fn count_active(&self) {
        let active = self.schedule.len() as u64;
        self.handle.stats.active_queues.set(active);
    }

    fn obey(&mut self, next: Next) {
        match next {
            Next::Spin => {}
            Next::Pause(count) => (0..count).for_each(|_| std::hint::spin_loop()),
            Next::Sleep(timeout) => self.sleep(timeout),
        }
    }

    /// Now and then takes the events of the sources that are not polled, if there are such.
    #[inline]
    fn look_for_events(&mut self) {
        let has_armed = self.schedule.len() < self.by_token.len();
        if has_armed && self.idle.takes_a_look(self.now_ns) {
            self.take_events(Some(Duration::ZERO));
        }
    }

    /// Waits until an armed queue or a command needs the worker, or for `timeout`.
    fn sleep(&mut self, timeout: Option<Duration>) {
        // A look at events may have taken the doorbell's, of commands that came after the last look
        // at commands: no other event will come.
        if self.handle.waker.is_rung() {
            return;
        }
        self.handle.stats.sleeping_since_ns.set(self.now_ns.max(1));
        self.take_events(timeout);
        let slept_ns = self.read_clock();
        let stats = &self.handle.stats;
        stats.sleeping_since_ns.set(0);
        self.path.forwarder.stalls.note_idle(slept_ns);
        stats.asleep_ns.add_owned(slept_ns);
        stats.sleeps.add_owned(1);
        self.idle.woke(self.now_ns, timeout.is_some());
        self.schedule.woke(self.now_ns);
    }

    /// Activates the sources that have events, after at most `timeout`.
    fn take_events(&mut self, timeout: Option<Duration>) {
        // An empty list in its place costs nothing.
        let mut events = std::mem::replace(&mut self.events, Events::with_capacity(0));
        self.handle.waker.wait(&mut events, timeout);
        for token in events.tokens() {
            self.note_kick(token);
            self.activate(token);
        }
        self.events = events;
    }

    /// Advances the worker's clock and returns by how much.
    fn read_clock(&mut self) -> u64 {
        let now_ns = self.clock.now_ns();
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
}

/// What a burst passes through.
struct Path {
    burst: BurstStorage,
    forwarder: Forwarder,
    /// L2 bytes of the last burst.
    last_bytes: u64,
}

impl Path {
    /// Charges a port for its last burst.
    #[inline]
    fn charge(
        &mut self,
        (port, has_calls): (PortId, bool),
        polled: Polled,
        took_ns: u64,
        now_ns: u64,
    ) {
        let forwarder = &mut self.forwarder;
        let frames = polled.frames() as u64;
        let (by_calls, copies) = forwarder.take_work();
        let mut by_calls = u64::from(by_calls);
        if has_calls {
            by_calls += frames;
        }
        let most_ns = max_charge_ns(frames, self.last_bytes, by_calls);
        let mut charged_ns = took_ns.min(most_ns);
        if copies > 0 {
            charged_ns = with_price_of_floods(charged_ns, frames, copies);
        }
        forwarder.ledger.charge(port, charged_ns);
        if forwarder.stalls.is_late(took_ns, most_ns) {
            forwarder.charge_late(port, took_ns, most_ns, now_ns);
        }
    }

    /// Takes up to `limit` frames from a source's queue and forwards them; those that have to wait
    /// stay in the queue.
    #[inline]
    fn receive<Q: RxQueue>(
        &mut self,
        sender: Sender<'_>,
        queue: Result<Q, Unavailable>,
        limit: usize,
        pairs: &PairTable,
        now: Now,
    ) -> Polled {
        let (port, pair) = (sender.port, sender.pair);
        let mut queue = match queue {
            Ok(queue) => queue,
            Err(Unavailable::Stopped) => return Polled::Stopped,
            Err(Unavailable::Busy) => {
                port.queue_counters(pair).0.contended.add_owned(1);
                *self.forwarder.contended() += 1;
                return Polled::Waiting(0);
            }
        };
        if self.forwarder.stalls.is_timing() {
            self.forwarder.stalls.begin(now.ns);
        }
        let mut burst = self.burst.begin();
        let forwarder = &self.forwarder;
        let takes = |frame: &[u8]| forwarder.takes(port, frame, now.tick);
        let (header_bytes, allowed, is_enabled, completion) =
            match queue.gather(limit, &mut burst, takes) {
                Gathered::Nothing => return Polled::Empty,
                Gathered::Stopped => return Polled::Stopped,
                Gathered::Frames {
                    header_bytes,
                    allowed,
                    is_enabled,
                    completion,
                } => (header_bytes, allowed, is_enabled, completion),
            };
        burst.take_snapshots(header_bytes, allowed);
        let count = burst.len();
        let kept = if is_enabled {
            self.forwarder.forward(sender, &mut burst, pairs, now)
        } else {
            let drops = &port.base().rx_drops;
            drops.add(DropReason::QueueDisabled, count as u64);
            0
        };
        let taken = count - kept;
        let bytes = completion.complete(&burst, taken);
        let walked = burst.walked();
        self.last_bytes = bytes;
        queue.counters().frames.add_owned(taken as u64);
        queue.counters().bytes.add_owned(bytes);
        if walked > 0 {
            let worth = (count as u64, bytes);
            let ledger = &mut self.forwarder.ledger;
            ledger.charge_walk(port.base().id, walked, worth, now.ns);
        }
        queue.finish(taken, kept);
        Polled::of(taken, count)
    }
}

#[cfg(test)]
mod tests;
