//! The rings of a guest as a worker has them: one for one burst, to receive from or to deliver to.
//!
//! ```text
//!   guest's transmit ring --VhostRx--> burst ... --GuestTx--> guest's receive ring
//! ```
//! Delivery reserves the chains that a frame needs, and copies head and body from source to
//! destination buffers, once.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Instant;

use ringway_bridge::{DropReason, FrameSet, MAX_BURST};
use tracing::warn;

use super::allowance::Allowance;
use super::{CUT_OFF, Scope, VhostPort};
use crate::burst::{Buffers, Burst, Entry, Frame, Frames, MAX_CHAIN};
use crate::burst_lock::BurstLock;
use crate::call::{self, Call};
use crate::memory::{GuestSlice, Kept, List, MemoryView};
use crate::offload::OutFrame;
use crate::port::queue::{Job, Limits, Outcome, Refusal, Tools, TxQueue, deliver};
use crate::port::{Completion, Gathered, QueueCounters, RxQueue, Unavailable, max_l2_bytes};
use crate::ring::{AnyRing, DeviceRing, Direction, Ring, RingAddresses, RingFault};
use crate::wake::Binding;
use crate::wire::Offloads;
use crate::wire::net_header::HEADER_BYTES;

/// A ring that is started.
#[derive(Debug)]
pub(crate) struct StartedRing {
    pub(crate) ring: Ring,
    /// Frames pass; a transmit ring that is disabled is drained and discarded.
    pub(crate) enabled: bool,
    /// What the guest may send through the ring, or takes from it.
    pub(crate) offloads: Offloads,
    pub(super) addresses: RingAddresses,
    pub(super) kick: Option<Arc<OwnedFd>>,
    pub(super) call: Option<Arc<Call>>,
}

impl StartedRing {
    /// The front-end gave no kick fd: the ring must be polled for ever.
    fn is_polled(&self) -> bool {
        self.kick.is_none()
    }

    /// Has the worker send the guest a call once it holds no lock, if the driver does not poll.
    #[inline]
    pub(super) fn owe_call(&self) {
        if let Some(call) = &self.call {
            call::owe(call);
        }
    }
}

/// What a worker needs of a queue. What state its ring is in, the session knows.
#[derive(Debug, Default)]
pub(crate) struct QueueState {
    pub(crate) started: Option<StartedRing>,
    /// Where a ring stood that stopped without the session, which asks for it by `stop_ring`.
    pub(super) stopped_at: Option<u32>,
    /// Who polls it: of a transmit ring.
    pub(super) binding: Option<Binding>,
    /// How much may be taken at a time: of a transmit ring.
    allowance: Allowance,
}

/// One virtqueue.
#[derive(Debug, Default)]
pub(crate) struct VhostQueue {
    state: BurstLock<QueueState>,
    /// For display: entries of the started ring, or 0.
    pub(super) size: AtomicU16,
    /// For display: whether the ring is enabled, or was when it stopped.
    pub(super) is_enabled: AtomicBool,
    pub(crate) counters: QueueCounters,
}

/// A queue in a worker's hands for one burst.
pub(crate) type QueueGuard<'a> = MutexGuard<'a, QueueState>;

impl VhostQueue {
    /// The queue for one burst, or `None` if somebody else has it or waits for it.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<QueueGuard<'_>> {
        self.state.try_lock()
    }

    /// The queue, once the worker that has it is done with its burst.
    pub(super) fn lock(&self) -> QueueGuard<'_> {
        self.state.lock()
    }

    /// Frames of the started ring that broke a rule which does no harm.
    pub(super) fn tolerated(&self) -> u64 {
        let state = self.lock();
        state
            .started
            .as_ref()
            .map_or(0, |started| started.ring.tolerated())
    }

    /// The started ring went on at its used index, though its front-end said 0.
    pub(super) fn resumed(&self) -> bool {
        let state = self.lock();
        let started = state.started.as_ref();
        started.is_some_and(|started| started.ring.resumed())
    }

    pub(super) fn is_started(&self) -> bool {
        self.size.load(Ordering::Relaxed) > 0
    }
}

impl VhostPort {
    /// The ring into which the guest transmits.
    #[inline]
    pub(crate) fn transmit_queue(&self, pair: u16) -> &VhostQueue {
        &self.queues[2 * usize::from(pair) + 1]
    }

    /// The ring from which the guest receives frames of a source's queue `source_queue`, or `None`
    /// if there is none now. `owned` has a bit for each pair that the worker polls which asks.
    #[inline]
    pub(crate) fn receive_queue(&self, source_queue: u16, owned: u64) -> Option<&VhostQueue> {
        // Relaxed: only a hint; the ring itself is read under its lock.
        let receivers = self.receivers.load(Ordering::Relaxed);
        let pair = choose_receiver(receivers, owned, source_queue)?;
        self.queues.get(2 * pair)
    }

    /// Stops a ring whose guest broke the rules, from the worker that found out: counted and
    /// logged here, once, since the ring is gone afterwards.
    #[cold]
    pub(crate) fn fail_queue(&self, queue: &VhostQueue, state: &mut QueueState, why: &RingFault) {
        let started = state.started.as_ref();
        if started.is_some_and(|started| started.ring.is_broken()) {
            // Zero pages broke the rule, not the guest.
            self.stop_in_worker(queue, state, CUT_OFF);
        } else {
            self.stop_in_worker(queue, state, &why.to_string());
        }
    }

    /// Shows the guest what was completed in a ring, and owes it a call if it wants that.
    #[inline]
    pub(crate) fn publish(&self, queue: &VhostQueue, state: &mut QueueState) {
        let Some(started) = &mut state.started else {
            return;
        };
        if started.ring.publish() {
            queue.counters.calls.add_owned(1);
            started.owe_call();
        }
    }

    /// Stops a started ring for a reason of ours. A ring that was stopped in the same burst stays
    /// as it is: where it stood and the first reason are kept.
    #[cold]
    pub(super) fn stop_in_worker(&self, queue: &VhostQueue, state: &mut QueueState, why: &str) {
        if state.started.is_none() {
            return;
        }
        let index = self.index_of(queue);
        if let Some(suppressed) = self.fault_log.pass(Instant::now()) {
            warn!(port = %self.base.name, ring = index, suppressed, "ring stopped: {why}");
        }
        let reason = format!("ring {index} stopped: {why}");
        self.set_last_error(Scope::Ring(index), reason, false);
        state.stopped_at = self.take_started(queue, index, state);
    }
}

/// Which of `receivers` takes the frames of a source's queue: the one of the same number, so that a
/// flow stays in one ring, or the next that is `owned`. If another pair changes hands, the choice
/// stays.
#[inline]
pub(in crate::port) fn choose_receiver(
    receivers: u64,
    owned: u64,
    source_queue: u16,
) -> Option<usize> {
    let own = receivers & owned;
    if own >> source_queue & 1 != 0 {
        return Some(source_queue.into());
    }
    choose_other(receivers, own, source_queue)
}

/// The choice where the ring of the same number is not the worker's, or stopped.
fn choose_other(receivers: u64, own: u64, source_queue: u16) -> Option<usize> {
    if receivers == 0 {
        return None;
    }
    let mask = if own == 0 { receivers } else { own };
    let start = u32::from(source_queue) % receivers.count_ones();
    let pair = start + mask.rotate_right(start).trailing_zeros();
    Some((pair % u64::BITS) as usize)
}

/// A guest's transmit ring that is started.
#[derive(Debug)]
pub(crate) struct VhostRx<'a> {
    port: &'a VhostPort,
    queue: &'a VhostQueue,
    state: QueueGuard<'a>,
    /// The rule that the guest broke behind the frames of the burst.
    fault: Option<RingFault>,
}

impl VhostPort {
    /// The transmit ring of a pair, for one burst.
    ///
    /// # Errors
    /// It is in other hands, or not started.
    #[inline]
    pub(crate) fn rx(&self, pair: u16) -> Result<VhostRx<'_>, Unavailable> {
        let queue = self.transmit_queue(pair);
        let state = queue.try_lock().ok_or(Unavailable::Busy)?;
        if state.started.is_none() {
            return Err(Unavailable::Stopped);
        }
        Ok(VhostRx {
            port: self,
            queue,
            state,
            fault: None,
        })
    }
}

/// What completes frames in a guest's ring.
#[derive(Debug)]
pub(crate) struct VhostCompletion<'m> {
    ring: &'m mut AnyRing,
    allowance: &'m mut Allowance,
}

impl Completion for VhostCompletion<'_> {
    #[inline]
    fn complete(self, burst: &Burst<'_>, taken: usize) -> u64 {
        let (done, again) = burst.frames().split_at(taken);
        let bytes = self.ring.complete_gathered(done);
        self.ring.give_back(again);
        self.allowance.note(taken, bytes);
        bytes
    }
}

impl VhostRx<'_> {
    /// Stops the ring. The chain at fault is a frame received and dropped.
    #[cold]
    fn fail(&mut self, fault: &RingFault) {
        self.queue.counters.frames.add_owned(1);
        self.port.base.rx_drops.add(DropReason::BadDescriptor, 1);
        self.port.fail_queue(self.queue, &mut self.state, fault);
    }
}

impl RxQueue for VhostRx<'_> {
    type Completion<'m>
        = VhostCompletion<'m>
    where
        Self: 'm;

    #[inline]
    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }

    #[inline]
    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        _: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<VhostCompletion<'m>> {
        let QueueState {
            started, allowance, ..
        } = &mut *self.state;
        let Some(started) = started else {
            return Gathered::Stopped;
        };
        let (memory, ring) = started.ring.parts();
        let limit = limit.min(allowance.frames());
        self.fault = ring.gather(limit, memory, burst).err();
        if burst.len() == 0 && self.fault.is_none() {
            return Gathered::Nothing;
        }
        Gathered::Frames {
            header_bytes: ring.header_bytes(),
            allowed: started.offloads,
            is_enabled: started.enabled,
            completion: VhostCompletion { ring, allowance },
        }
    }

    #[inline]
    fn finish(&mut self, _taken: usize, _kept: usize) {
        self.port.publish(self.queue, &mut self.state);
        if let Some(fault) = self.fault.take() {
            self.fail(&fault);
        }
    }

    fn arm(&mut self) -> bool {
        let Some(started) = &mut self.state.started else {
            return true;
        };
        // Without a kick fd the ring must be polled for ever.
        if started.is_polled() {
            return false;
        }
        let is_empty = started.ring.arm();
        if !is_empty {
            started.ring.disarm();
        }
        is_empty
    }

    fn disarm(&mut self) {
        if let Some(started) = &mut self.state.started {
            started.ring.disarm();
        }
    }
}

/// Most chains that one frame is spread over: 64 KiB in buffers of 64 bytes. A guest with smaller
/// ones can't receive such frames.
const MAX_MERGED: usize = 1024;

/// Descriptors that are read one by one for the frames of one burst until the others have to wait:
/// 64 frames into chains of 64 buffers. The longest chain may come on top.
const MAX_SEARCH: u32 = 4096;

/// The search for room for the frames of one burst.
#[derive(Debug)]
struct Search {
    /// The chains that are reserved, with their capacities.
    chains: Vec<(Entry, u32)>,
    /// Descriptors that were read one by one.
    walked: u32,
    /// There was no room for so many bytes when so many slots were available: there is none for as
    /// many or more until a slot is taken.
    in_vain: Option<(u32, u16)>,
}

impl Search {
    fn new() -> Self {
        Self {
            chains: Vec::with_capacity(MAX_MERGED),
            walked: 0,
            in_vain: None,
        }
    }

    /// Begins anew, and returns how many descriptors were read.
    fn take_walked(&mut self) -> u32 {
        self.in_vain = None;
        std::mem::take(&mut self.walked)
    }

    fn was_in_vain(&self, needed: u32, available: u16) -> bool {
        let as_before = |(bytes, slots)| needed >= bytes && available == slots;
        self.in_vain.is_some_and(as_before)
    }
}

/// Storage for buffers and chains of a burst's destination. Once per worker.
#[derive(Debug)]
pub(crate) struct RxScratch {
    direct: Kept<Frames>,
    buffers: Kept<Buffers>,
    search: Search,
}

impl RxScratch {
    pub(crate) fn new() -> Self {
        Self {
            direct: Kept::new(MAX_BURST),
            buffers: Kept::new(MAX_MERGED + MAX_CHAIN),
            search: Search::new(),
        }
    }
}

impl VhostPort {
    /// Delivers frames to the guest: into one of its receive rings, shown to it once and announced
    /// by at most one call.
    #[inline(always)]
    pub(crate) fn deliver(&self, job: &Job<'_, '_>, tools: &mut Tools) -> Outcome {
        let Some(queue) = self.receive_queue(job.source_queue, job.owned) else {
            return tools.drop_all(job, DropReason::PortDown);
        };
        let Some(mut state) = tools.lock(&queue.counters, || queue.try_lock()) else {
            return Outcome::refused(job, DropReason::RingBusy);
        };
        let Some(started) = state.started.as_mut().filter(|started| started.enabled) else {
            return tools.drop_all(job, DropReason::PortDown);
        };
        let limits = Limits {
            offloads: started.offloads,
            max_bytes: max_l2_bytes(self.mtu()),
        };
        let (memory, ring) = started.ring.parts();
        let (outcome, fault) = match ring {
            AnyRing::Split(ring) => deliver_into(ring, memory, limits, job, tools),
            AnyRing::Packed(ring) => deliver_into(ring, memory, limits, job, tools),
        };
        queue.counters.count_owned(&outcome, &tools.account);
        self.publish(queue, &mut state);
        if let Some(fault) = fault {
            self.fail_queue(queue, &mut state, &fault);
        }
        outcome
    }
}

/// Delivers frames into a ring; used entries are written, to be published with the burst. Also
/// returns the rule that the guest broke, if it did.
#[inline(always)]
fn deliver_into<R: DeviceRing>(
    ring: &mut R,
    memory: &MemoryView,
    limits: Limits,
    job: &Job<'_, '_>,
    tools: &mut Tools,
) -> (Outcome, Option<RingFault>) {
    let available = match ring.available() {
        Ok(available) => available,
        Err(fault) => return (tools.drop_all(job, DropReason::BadDescriptor), Some(fault)),
    };
    let Tools {
        gso, rx, account, ..
    } = tools;
    let mut queue = GuestTx {
        ring,
        memory,
        limits,
        available,
        direct: rx.direct.list(),
        buffers: rx.buffers.list(),
        search: &mut rx.search,
        fault: None,
    };
    let mut outcome = deliver(&mut queue, job, gso, account);
    let fault = queue.fault.take();
    if rx.search.walked > 0 {
        outcome.walked = rx.search.take_walked();
    }
    (outcome, fault)
}

/// A guest's receive ring.
struct GuestTx<'m, R> {
    ring: &'m mut R,
    memory: &'m MemoryView,
    limits: Limits,
    /// Slots that may be taken.
    available: u16,
    /// Chains of one buffer that were read last.
    direct: List<'m, Frame<'m>>,
    /// The buffers of the chains that are reserved,
    buffers: List<'m, GuestSlice<'m>>,
    /// and these chains.
    search: &'m mut Search,
    /// The rule that the guest broke.
    fault: Option<RingFault>,
}

impl<R: DeviceRing> TxQueue for GuestTx<'_, R> {
    #[inline(always)]
    fn limits(&self) -> Limits {
        self.limits
    }

    /// Two passes: the first lines of all buffers are on the way into the cache before the first is
    /// written; the others come while the frame before is copied.
    #[inline(always)]
    fn put_plain(&mut self, burst: &Burst<'_>, frames: FrameSet) -> (FrameSet, u64) {
        let plain = frames.leading(burst.plain());
        let wanted = plain.len().min(u32::from(self.available)) as usize;
        if self.ring.header_bytes() != HEADER_BYTES || wanted == 0 {
            return (FrameSet::EMPTY, 0);
        }
        let limit = self.limits.max_bytes.saturating_add(HEADER_BYTES);
        self.read_direct(wanted);
        let (room, frames) = (&mut self.direct[..], burst.frames());
        let (mut left, mut bytes, mut done) = (plain, 0, 0);
        while let (Some(to), Some(frame)) = (room.get(done), frames.get(left.first_index())) {
            let (to, from) = (to.buffer, frame.buffer);
            if let Some(next) = room.get(done + 1) {
                // Most likely the next frame is as long as this one.
                next.buffer.prefetch_rest(from.len());
            }
            let head = burst.head(left.first_index());
            if from.len() > limit || !to.put_plain(head, from) {
                break;
            }
            room[done].len = from.len();
            bytes += u64::from(from.len() - HEADER_BYTES);
            left = left.without_first();
            done += 1;
        }
        self.ring.complete_all(&room[..done], Direction::ToGuest);
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_BURST")]
        self.take(done as u16);
        (plain - left, bytes)
    }

    fn should_wait_for(&mut self, count: u32, total_bytes: u32) -> Result<bool, Refusal> {
        let slots = match self.reserve(self.chain_bytes(total_bytes)) {
            Ok(slots) => slots,
            Err(Refusal::Broken) => return Err(Refusal::Broken),
            Err(_) => return Ok(false),
        };
        let needed = u32::from(slots) * count;
        // Drivers refill a ring when half of it is empty: what needs more may wait for ever.
        match u16::try_from(needed) {
            Ok(needed) if needed <= self.ring.entries() / 2 => {
                let last = self.ring.after(self.ring.place(), needed - 1);
                Ok(needed > self.available || !self.ring.is_offered(last))
            }
            _ => Ok(false),
        }
    }

    /// Into as many chains of as many buffers as it takes.
    fn put(&mut self, frame: &mut OutFrame<'_>) -> Result<(), Refusal> {
        let needed = self.chain_bytes(frame.total_bytes());
        let slots = match self.reserve_direct(needed) {
            Some(slots) => slots,
            None => self.reserve(needed)?,
        };
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_MERGED")]
        let count = self.search.chains.len() as u16;
        let gap = HEADER_BYTES - self.ring.header_bytes();
        frame.write_to(gap, count, &self.buffers);
        let mut left = needed;
        for (entry, capacity) in self.search.chains.iter() {
            let written = left.min(*capacity);
            self.ring.complete(*entry, written);
            left -= written;
        }
        self.take(slots);
        Ok(())
    }
}

impl<'m, R: DeviceRing> GuestTx<'m, R> {
    /// Bytes that a frame takes with the guest's header.
    fn chain_bytes(&self, total_bytes: u32) -> u32 {
        total_bytes - (HEADER_BYTES - self.ring.header_bytes())
    }

    #[inline(always)]
    fn take(&mut self, slots: u16) {
        self.ring.take(slots);
        self.available -= slots;
    }

    /// Reads the next chains, `most` of them or as many as have one buffer each.
    #[inline(always)]
    fn read_direct(&mut self, most: usize) {
        self.direct.clear();
        let next = self.ring.direct(self.memory.hint(), Direction::ToGuest);
        self.direct.extend(most, next);
    }

    /// [`GuestTx::reserve`] for the common case: chains of one buffer. `None` says nothing.
    #[inline]
    fn reserve_direct(&mut self, needed: u32) -> Option<u16> {
        let most = if self.ring.mergeable() { MAX_BURST } else { 1 };
        let most = most.min(usize::from(self.available));
        self.read_direct(most.min(1));
        let wanted = needed.div_ceil(self.direct.first()?.len) as usize;
        if wanted > most {
            return None;
        }
        self.read_direct(wanted);
        self.clear();
        let (mut room, mut slots) = (0_u32, 0);
        for chain in self.direct.iter() {
            self.buffers.push(chain.buffer);
            self.search.chains.push((chain.entry, chain.len));
            room = room.saturating_add(chain.len);
            slots += 1;
            if room >= needed {
                return Some(slots);
            }
        }
        None
    }

    /// Finds chains with room for `needed` bytes, and returns how many slots they take. Takes
    /// nothing yet.
    #[inline(never)]
    fn reserve(&mut self, needed: u32) -> Result<u16, Refusal> {
        if self.search.was_in_vain(needed, self.available) {
            return Err(Refusal::Drop(DropReason::BufferTooSmall));
        }
        if self.search.walked >= MAX_SEARCH {
            return Err(Refusal::Full);
        }
        self.clear();
        let mut room: u32 = 0;
        let mut at = self.ring.place();
        let mut slots = 0;
        while slots < self.available {
            let from = self.buffers.len();
            let buffers = &mut self.buffers;
            let limit = usize::from(self.available - slots);
            let direction = Direction::ToGuest;
            let found = self.ring.chain(
                (at, limit),
                direction,
                self.memory,
                &mut self.search.walked,
                |buffer| {
                    direction.prefetch(buffer);
                    buffers.len() - from < MAX_CHAIN && buffers.push(buffer)
                },
            );
            let found = found.map_err(|fault| {
                self.fault = Some(fault);
                Refusal::Broken
            })?;
            let Some((entry, capacity)) = found else {
                break;
            };
            at = self.ring.after(at, entry.slots);
            slots += entry.slots;
            self.search.chains.push((entry, capacity));
            room = room.saturating_add(capacity);
            if room >= needed {
                return Ok(slots);
            }
            if !self.ring.mergeable()
                || self.search.chains.len() == MAX_MERGED
                || self.buffers.len() > MAX_MERGED
            {
                self.search.in_vain = Some((needed, self.available));
                return Err(Refusal::Drop(DropReason::BufferTooSmall));
            }
        }
        Err(Refusal::Full)
    }

    fn clear(&mut self) {
        self.buffers.clear();
        self.search.chains.clear();
    }
}

#[cfg(test)]
mod tests;
