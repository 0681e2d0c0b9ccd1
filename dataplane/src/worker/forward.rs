//! From a gathered burst to delivered frames: the bridge decides, then each destination's frames
//! are copied under one lock, published once and announced by at most one call.

mod af_xdp;

use std::sync::Arc;

use ringway_bridge::{
    Bridge, Decisions, DropReason, MAX_BURST, MAX_PORTS, MacAddr, Members, PortId, Tick,
};

use self::af_xdp::deliver_to_af_xdp;
use super::pairs::PairTable;
use super::parcels::{deliver_any, write_parcels};
use crate::burst::Burst;
use crate::isa::for_this_cpu;
use crate::offload::Workbench;
use crate::port::{Port, QueueCounters, TapPort, VhostPort, VhostQueue, max_l2_bytes};
use crate::ring::{Deliver, Ring, RingFault, RxScratch};
use crate::wire::Offloads;

/// How often a receive queue that another thread holds is tried: about one of its bursts.
const LOCK_TRIES: u32 = 400;

/// All that forwarding needs of the worker.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) ports: Box<[Option<Arc<Port>>]>,
    pub(super) members: Members,
    bridge: Arc<Bridge>,
    decisions: Decisions,
    tools: Tools,
    /// Per destination: since when its receive ring is full without having taken a frame, in
    /// nanoseconds of the worker's clock; 0 while it takes frames.
    full_since: Box<[u64]>,
    /// How long a source waits for a full destination.
    pub(super) patience_ns: u64,
    /// Queues of AF_XDP ports that hold frames for which the kernel had no room.
    pub(super) unsent: Vec<(PortId, u16)>,
    /// Per destination: the queue pairs that this worker polls, a bit each. Frames go to their
    /// receive rings, so that no other worker wants the same lock.
    pub(super) owned: Box<[u64]>,
    /// Rings found in other hands, ever.
    pub(super) contended: u64,
}

/// What delivery works with.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) scratch: RxScratch,
    pub(super) bench: Workbench,
}

/// A point in time, in the units of its users.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) tick: Tick,
    pub(super) ns: u64,
}

/// What became of the frames for one destination.
#[derive(Default)]
struct Outcome {
    sent: u64,
    sent_bytes: u64,
    /// Frames that found the destination full or busy; they may be tried again.
    full: u64,
    busy: u64,
    /// Other drops.
    drops: [(u64, Option<DropReason>); 4],
}

impl Outcome {
    fn all(mask: u64, reason: DropReason) -> Self {
        let mut outcome = Self::default();
        outcome.drop(mask, reason);
        outcome
    }

    #[inline]
    fn sent(&mut self, index: usize, bytes: u64) {
        self.sent |= 1 << index;
        self.sent_bytes += bytes;
    }

    /// Notes a drop. A destination has at most three reasons of its own in one burst; should there
    /// be a further one, it is counted as the last.
    #[cold]
    fn drop(&mut self, mask: u64, reason: DropReason) {
        for slot in &mut self.drops {
            if slot.1.is_none_or(|known| known == reason) {
                *slot = (slot.0 | mask, Some(reason));
                return;
            }
        }
        self.drops[3].0 |= mask;
    }
}

impl Forwarder {
    pub(super) fn new(bridge: Arc<Bridge>, patience_ns: u64) -> Self {
        Self {
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            members: Members::new(),
            bridge,
            decisions: Decisions::new(),
            tools: Tools {
                scratch: RxScratch::new(),
                bench: Workbench::new(),
            },
            full_since: vec![0; MAX_PORTS].into(),
            patience_ns,
            unsent: Vec::with_capacity(MAX_PORTS),
            owned: vec![0; MAX_PORTS].into(),
            contended: 0,
        }
    }

    /// Forgets what is known of a destination whose slot changes hands.
    pub(super) fn reset_destination(&mut self, id: PortId) {
        self.full_since[id.index()] = 0;
    }

    /// Forwards a burst whose snapshots are taken, and returns how many of its last frames are to
    /// be given back to the source, since their destination is full for the moment. All others
    /// are delivered or dropped, and counted.
    pub(super) fn forward(
        &mut self,
        source: &Port,
        source_queue: u16,
        burst: &mut Burst,
        pairs: &PairTable,
        now: Now,
    ) -> usize {
        let from = source.base().id;
        let heads = ringway_bridge::Burst {
            in_port: from,
            runs: burst.runs(),
        };
        self.bridge
            .forward(&self.members, now.tick, &heads, &mut self.decisions);
        // Frames with several destinations can't wait: those that have them would get them twice.
        let is_wire = self.members.len() <= 2;
        let flooded = if is_wire { 0 } else { self.decisions.flooded() };
        // Pass 1: copy. Frames that may wait are noted with their destination.
        let mut waiting = 0;
        for at in 0..self.decisions.destinations().len() {
            let (to, mask) = self.decisions.destinations()[at];
            let Some(port) = &self.ports[to.index()] else {
                continue;
            };
            let haste = self.haste(to, flooded, now.ns);
            let tools = &mut self.tools;
            let outcome = match &**port {
                Port::VhostUser(port) => {
                    let queue = port.receive_queue(source_queue, self.owned[to.index()]);
                    let contended = &mut self.contended;
                    deliver_to_guest(port, queue, (mask, haste), burst, tools, contended)
                }
                Port::Tap(port) => {
                    deliver_to_tap(port, source_queue, mask, burst, &mut tools.bench)
                }
                Port::AfXdp(port) => {
                    let pair = port.transmit_queue(source_queue, self.owned[to.index()]);
                    let counts = (&mut self.unsent, &mut self.contended);
                    deliver_to_af_xdp(port, pair, (mask, haste), burst, &mut tools.bench, counts)
                }
            };
            if !self.tools.bench.tally.is_empty() {
                self.count_offloads(from, to, pairs);
            }
            let refused = outcome.full | outcome.busy;
            let may_wait = refused != 0 && self.may_wait(to, &outcome, now.ns);
            if refused == 0 && outcome.sent != 0 {
                self.full_since[to.index()] = 0;
            }
            let wait = if may_wait { refused & !flooded } else { 0 };
            waiting |= wait;
            self.count(from, to, &outcome, wait, pairs);
        }
        let (given_back, late) = split_suffix(waiting, burst.len());
        if late != 0 {
            self.drop_late(from, late, pairs);
        }
        self.count_source_drops(source, burst);
        given_back
    }

    /// What the one destination of a frame from `source` takes that begins with `frame`; nothing if it
    /// has none or several.
    pub(super) fn takes(&self, source: &Port, frame: &[u8], now: Tick) -> Offloads {
        let Some(to) = frame.first_chunk().map(|mac| MacAddr(*mac)) else {
            return Offloads::NONE;
        };
        let to = self.bridge.fdb().lookup(to, now);
        let port = to.and_then(|to| self.ports[to.index()].as_ref());
        match port {
            Some(port) if port.base().id != source.base().id => port.offloads().1,
            _ => Offloads::NONE,
        }
    }

    /// Frames that are not to wait until a destination has room for all of their segments: those that
    /// can't wait at all, or all of them if it did not take a frame for long.
    #[inline]
    fn haste(&self, to: PortId, flooded: u64, now_ns: u64) -> u64 {
        let since = self.full_since[to.index()];
        if since == 0 && self.patience_ns != 0 || now_ns.saturating_sub(since) < self.patience_ns {
            flooded
        } else {
            u64::MAX
        }
    }

    /// Whether a source waits for a destination that refused frames: for `patience_ns` since it
    /// last took one.
    #[cold]
    fn may_wait(&mut self, to: PortId, outcome: &Outcome, now_ns: u64) -> bool {
        let since = &mut self.full_since[to.index()];
        if outcome.sent != 0 || *since == 0 {
            *since = now_ns.max(1);
        }
        now_ns.saturating_sub(*since) < self.patience_ns
    }

    /// Counts what happened to a destination's frames, without those in `wait`.
    #[inline]
    fn count(&self, from: PortId, to: PortId, outcome: &Outcome, wait: u64, pairs: &PairTable) {
        let Some(pair) = pairs.get(from, to) else {
            return self.count_drops(from, to, outcome, wait, pairs);
        };
        pair.frames.add_owned(u64::from(outcome.sent.count_ones()));
        pair.bytes.add_owned(outcome.sent_bytes);
        if outcome.full | outcome.busy | outcome.drops[0].0 != 0 {
            self.count_drops(from, to, outcome, wait, pairs);
        }
    }

    #[cold]
    fn count_drops(
        &self,
        from: PortId,
        to: PortId,
        outcome: &Outcome,
        wait: u64,
        pairs: &PairTable,
    ) {
        let refusals = [
            (outcome.full & !wait, Some(DropReason::RingFull)),
            (outcome.busy & !wait, Some(DropReason::RingBusy)),
        ];
        for (mask, reason) in outcome.drops.into_iter().chain(refusals) {
            if let (Some(reason), frames @ 1..) = (reason, mask.count_ones()) {
                self.count_drop(from, to, reason, u64::from(frames), pairs);
            }
        }
    }

    /// Counts what was done to a destination's frames.
    #[cold]
    fn count_offloads(&mut self, from: PortId, to: PortId, pairs: &PairTable) {
        let tally = std::mem::take(&mut self.tools.bench.tally);
        if let Some(port) = &self.ports[to.index()] {
            let counters = &port.base().tx_offloads;
            counters.completed.add(tally.completed);
            counters.cut.add(tally.cut);
            counters.segments.add(tally.segments);
        }
        if let Some(pair) = pairs.get(from, to) {
            pair.frames.add_owned(tally.extra_delivered());
        }
        for (frames, reason) in tally.lost {
            if let (1.., Some(reason)) = (frames, reason) {
                self.count_drop(from, to, reason, frames, pairs);
            }
        }
    }

    fn count_drop(
        &self,
        from: PortId,
        to: PortId,
        reason: DropReason,
        frames: u64,
        pairs: &PairTable,
    ) {
        if let Some(port) = &self.ports[to.index()] {
            port.base().tx_drops.add(reason, frames);
        }
        if let Some(pair) = pairs.get(from, to) {
            pair.drop(reason, frames);
        }
    }

    /// Drops frames that were to wait but are followed by others that were delivered: giving them
    /// back would deliver those twice.
    #[cold]
    fn drop_late(&self, from: PortId, late: u64, pairs: &PairTable) {
        for (to, mask) in self.decisions.destinations() {
            let frames = (mask & late).count_ones();
            if frames > 0 {
                self.count_drop(from, *to, DropReason::RingFull, u64::from(frames), pairs);
            }
        }
    }

    fn count_source_drops(&self, source: &Port, burst: &Burst) {
        for (reason, mask) in burst.rejected.iter().chain(self.decisions.drops()) {
            source
                .base()
                .rx_drops
                .add(*reason, u64::from(mask.count_ones()));
        }
    }
}

/// Splits the frames that may wait into the burst's suffix, which can be given back, and the
/// others. Returns the suffix's length and the others.
fn split_suffix(waiting: u64, len: usize) -> (usize, u64) {
    if waiting == 0 {
        return (0, 0);
    }
    let top = waiting << (MAX_BURST - len);
    let suffix = top.leading_ones() as usize;
    let kept = if suffix == 0 {
        0
    } else {
        u64::MAX << (len - suffix)
    };
    (suffix, waiting & !kept)
}

/// Iterates over the set bits of a mask.
#[inline]
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let index = mask.trailing_zeros() as usize;
        (mask != 0).then(|| {
            mask &= mask - 1;
            index
        })
    })
}

/// What a destination takes.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) offloads: Offloads,
    /// Longest frame, L2 bytes.
    pub(super) max_bytes: u32,
    /// Frames whose segments are delivered as far as there is room.
    pub(super) haste: u64,
}

/// What `try_lock` gives, tried again for as long as somebody else's burst may take; counts that it
/// was not to be had at once.
#[inline]
fn lock_for_burst<G>(
    try_lock: impl Fn() -> Option<G>,
    counters: &QueueCounters,
    contended: &mut u64,
) -> Option<G> {
    if let Some(guard) = try_lock() {
        return Some(guard);
    }
    counters.contended.add(1);
    *contended += 1;
    for _ in 0..LOCK_TRIES {
        std::hint::spin_loop();
        if let Some(guard) = try_lock() {
            return Some(guard);
        }
    }
    None
}

fn deliver_to_guest(
    port: &VhostPort,
    queue: Option<&VhostQueue>,
    (mask, haste): (u64, u64),
    burst: &Burst,
    tools: &mut Tools,
    contended: &mut u64,
) -> Outcome {
    let Some(queue) = queue else {
        return Outcome::all(mask, DropReason::PortDown);
    };
    let try_lock = || queue.try_lock();
    let Some(mut state) = lock_for_burst(try_lock, &queue.counters, contended) else {
        return Outcome {
            busy: mask,
            ..Outcome::default()
        };
    };
    let Some(started) = state.started.as_mut().filter(|started| started.enabled) else {
        return Outcome::all(mask, DropReason::PortDown);
    };
    let limits = Limits {
        offloads: started.offloads,
        max_bytes: max_l2_bytes(port.mtu()),
        haste,
    };
    let (mut outcome, fault) = match &mut started.ring {
        Ring::Split(ring) => deliver_burst(ring, mask, burst, limits, tools),
        Ring::Packed(ring) => deliver_burst(ring, mask, burst, limits, tools),
    };
    queue
        .counters
        .frames
        .add_owned(u64::from(outcome.sent.count_ones()));
    queue.counters.bytes.add_owned(outcome.sent_bytes);
    if !tools.bench.tally.is_empty() {
        let extra = tools.bench.tally.extra_delivered();
        queue.counters.frames.add_owned(extra);
    }
    port.publish(queue, &mut state);
    if let Some(fault) = fault {
        let lost = mask & !outcome.sent & !outcome.drops.iter().fold(0, |all, drop| all | drop.0);
        outcome.drop(lost, DropReason::BadDescriptor);
        port.fail_queue(queue, &mut state, &fault);
    }
    outcome
}

for_this_cpu! {
    /// Delivers the frames of `mask` for as long as there is room, to be published; also returns
    /// the rule that the guest broke, if it did.
    fn deliver_burst<R: Deliver>(
        ring: &mut R,
        mask: u64,
        burst: &Burst,
        limits: Limits,
        tools: &mut Tools,
    ) -> (Outcome, Option<RingFault>) = deliver_frames;
}

#[inline(always)]
fn deliver_frames<R: Deliver>(
    ring: &mut R,
    mask: u64,
    burst: &Burst,
    limits: Limits,
    tools: &mut Tools,
) -> (Outcome, Option<RingFault>) {
    let mut outcome = Outcome::default();
    let mut fault = None;
    let mut available = match ring.available() {
        Ok(available) => available,
        Err(error) => {
            fault = Some(error);
            0
        }
    };
    let mut left = if fault.is_none() { mask } else { 0 };
    while left != 0 {
        // The common frames in one go, then one that is not, and again.
        let (sent, bytes) = ring.deliver_plain(
            burst,
            left,
            limits.max_bytes,
            &mut available,
            &mut tools.scratch,
        );
        outcome.sent |= sent;
        outcome.sent_bytes += bytes;
        left &= !sent;
        if left == 0 {
            break;
        }
        let index = left.trailing_zeros() as usize;
        let delivery = deliver_any(ring, (burst, index), limits, &mut available, tools);
        match delivery.sent {
            Some(Ok(bytes)) => outcome.sent(index, bytes),
            // Frames behind it are refused too, lest they overtake it.
            Some(Err(DropReason::RingFull)) => {
                outcome.full = left;
                break;
            }
            Some(Err(reason)) => outcome.drop(1 << index, reason),
            None => {}
        }
        fault = delivery.fault;
        if fault.is_some() {
            break;
        }
        left &= left - 1;
    }
    (outcome, fault)
}

fn deliver_to_tap(
    port: &TapPort,
    source_queue: u16,
    mask: u64,
    burst: &Burst,
    bench: &mut Workbench,
) -> Outcome {
    let queue = port.transmit_queue(source_queue);
    let max_bytes = max_l2_bytes(port.configured_mtu());
    let mut outcome = Outcome::default();
    for index in bits(mask) {
        let sent = write_parcels(port, queue, (burst, index), max_bytes, bench);
        match sent {
            Ok(bytes) => outcome.sent(index, bytes),
            Err(reason) => outcome.drop(1 << index, reason),
        }
    }
    // Several workers may write to one tap queue.
    let counters = port.queue_counters(queue).1;
    let frames = u64::from(outcome.sent.count_ones()) + bench.tally.extra_delivered();
    counters.frames.add(frames);
    counters.bytes.add(outcome.sent_bytes);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_burst_can_be_given_back() {
        assert_eq!(split_suffix(0, 8), (0, 0));
        assert_eq!(split_suffix(0b1110_0000, 8), (3, 0));
        assert_eq!(split_suffix(0b1110_0101, 8), (3, 0b101));
        assert_eq!(split_suffix(0b0110_0101, 8), (0, 0b0110_0101));
        assert_eq!(split_suffix(u64::MAX, 64), (64, 0));
        assert_eq!(split_suffix(1, 1), (1, 0));
    }

    #[test]
    fn bits_are_visited_in_order() {
        assert_eq!(bits(0).count(), 0);
        assert_eq!(bits(1 << 63 | 0b1001).collect::<Vec<_>>(), [0, 3, 63]);
    }
}
