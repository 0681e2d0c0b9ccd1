//! From a gathered burst to delivered frames: the bridge decides, then each destination's frames
//! are copied under one lock, published once and announced by at most one call.

mod af_xdp;

use std::sync::Arc;

use ringway_bridge::{Bridge, Decisions, DropReason, MAX_BURST, MAX_PORTS, Members, PortId, Tick};

use self::af_xdp::deliver_to_af_xdp;
use super::pairs::PairTable;
use crate::burst::Burst;
use crate::isa::for_this_cpu;
use crate::net_header::{self, Offloads};
use crate::port::{Port, QueueGuard, TapPort, VhostPort, VhostQueue, max_l2_bytes};
use crate::ring::{Deliver, Ring, RingFault, RxScratch};

/// How often a receive queue that another thread holds is tried: about one of its bursts.
const LOCK_TRIES: u32 = 400;

/// All that forwarding needs of the worker.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) ports: Box<[Option<Arc<Port>>]>,
    pub(super) members: Members,
    bridge: Arc<Bridge>,
    decisions: Decisions,
    scratch: RxScratch,
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
    fn sent(&mut self, index: usize, bytes: u32) {
        self.sent |= 1 << index;
        self.sent_bytes += u64::from(bytes);
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
            scratch: RxScratch::new(),
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
            let outcome = match &**port {
                Port::VhostUser(port) => {
                    let queue = port.receive_queue(source_queue, self.owned[to.index()]);
                    let scratch = &mut self.scratch;
                    deliver_to_guest(port, queue, mask, burst, scratch, &mut self.contended)
                }
                Port::Tap(port) => deliver_to_tap(port, source_queue, mask, burst),
                Port::AfXdp(port) => {
                    let pair = port.transmit_queue(source_queue, self.owned[to.index()]);
                    let counts = (&mut self.unsent, &mut self.contended);
                    deliver_to_af_xdp(port, pair, mask, burst, counts)
                }
            };
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

/// Why a frame can't go to a destination that takes `offloads` and frames of `max_bytes`.
#[inline]
fn unsuited(
    header: &net_header::Checked,
    offloads: Offloads,
    max_bytes: u32,
) -> Option<DropReason> {
    if !header.needs.within(offloads) {
        Some(DropReason::OffloadUnsupported)
    } else if header.wire_bytes > max_bytes {
        Some(DropReason::TooLong)
    } else {
        None
    }
}

fn lock_queue<'a>(queue: &'a VhostQueue, contended: &mut u64) -> Option<QueueGuard<'a>> {
    if let Some(guard) = queue.try_lock() {
        return Some(guard);
    }
    queue.counters.contended.add(1);
    *contended += 1;
    for _ in 0..LOCK_TRIES {
        std::hint::spin_loop();
        if let Some(guard) = queue.try_lock() {
            return Some(guard);
        }
    }
    None
}

fn deliver_to_guest(
    port: &VhostPort,
    queue: Option<&VhostQueue>,
    mask: u64,
    burst: &mut Burst,
    scratch: &mut RxScratch,
    contended: &mut u64,
) -> Outcome {
    let Some(queue) = queue else {
        return Outcome::all(mask, DropReason::PortDown);
    };
    let Some(mut state) = lock_queue(queue, contended) else {
        return Outcome {
            busy: mask,
            ..Outcome::default()
        };
    };
    let Some(started) = state.started.as_mut().filter(|started| started.enabled) else {
        return Outcome::all(mask, DropReason::PortDown);
    };
    let limits = (started.offloads, max_l2_bytes(port.mtu()));
    let (mut outcome, fault) = match &mut started.ring {
        Ring::Split(ring) => deliver_burst(ring, mask, burst, limits, scratch),
        Ring::Packed(ring) => deliver_burst(ring, mask, burst, limits, scratch),
    };
    queue
        .counters
        .frames
        .add_owned(u64::from(outcome.sent.count_ones()));
    queue.counters.bytes.add_owned(outcome.sent_bytes);
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
        burst: &mut Burst,
        limits: (Offloads, u32),
        scratch: &mut RxScratch,
    ) -> (Outcome, Option<RingFault>) = deliver_frames;
}

#[inline(always)]
fn deliver_frames<R: Deliver>(
    ring: &mut R,
    mask: u64,
    burst: &mut Burst,
    limits: (Offloads, u32),
    scratch: &mut RxScratch,
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
        let (sent, bytes) = ring.deliver_plain(burst, left, limits.1, &mut available, scratch);
        outcome.sent |= sent;
        outcome.sent_bytes += bytes;
        left &= !sent;
        if left == 0 {
            break;
        }
        let index = left.trailing_zeros() as usize;
        match deliver_any(ring, burst, index, limits, &mut available, scratch) {
            Ok(Ok(())) => outcome.sent(index, burst.l2_bytes(index)),
            // Frames behind it are refused too, lest they overtake it.
            Ok(Err(DropReason::RingFull)) => {
                outcome.full = left;
                break;
            }
            Ok(Err(reason)) => outcome.drop(1 << index, reason),
            Err(error) => {
                fault = Some(error);
                break;
            }
        }
        left &= left - 1;
    }
    (outcome, fault)
}

/// Delivers a frame of any kind, if the destination takes it.
#[cold]
fn deliver_any<R: Deliver>(
    ring: &mut R,
    burst: &mut Burst,
    index: usize,
    (offloads, max_bytes): (Offloads, u32),
    available: &mut u16,
    scratch: &mut RxScratch,
) -> Result<Result<(), DropReason>, RingFault> {
    let header = burst.header(index);
    if let Some(reason) = unsuited(&header, offloads, max_bytes) {
        return Ok(Err(reason));
    }
    let hide_hint = header.data_valid && !Offloads::CSUM.within(offloads);
    if hide_hint {
        net_header::set_data_valid(burst.snapshot(index), false);
    }
    let delivered = ring.deliver(burst, index, available, scratch);
    if hide_hint {
        net_header::set_data_valid(burst.snapshot(index), true);
    }
    delivered
}

fn deliver_to_tap(port: &TapPort, source_queue: u16, mask: u64, burst: &mut Burst) -> Outcome {
    let queue = port.transmit_queue(source_queue);
    let max_bytes = max_l2_bytes(port.configured_mtu());
    let mut outcome = Outcome::default();
    for index in bits(mask) {
        if let Some(reason) = unsuited(&burst.header(index), Offloads::ALL, max_bytes) {
            outcome.drop(1 << index, reason);
            continue;
        }
        match port.deliver(queue, burst, index) {
            Ok(()) => outcome.sent(index, burst.l2_bytes(index)),
            Err(reason) => outcome.drop(1 << index, reason),
        }
    }
    // Several workers may write to one tap queue.
    let counters = port.queue_counters(queue).1;
    counters.frames.add(u64::from(outcome.sent.count_ones()));
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
