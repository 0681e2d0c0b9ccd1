//! Delivery into a guest's receive ring: reserve the chains that a frame needs, copy head and body from
//! source to destination buffers, once.

use ringway_bridge::{DropReason, FrameSet, MAX_BURST};

use super::VhostPort;
use crate::burst::{Buffers, Burst, Entry, Frame, Frames, MAX_CHAIN};
use crate::memory::{GuestSlice, Kept, List, MemoryView};
use crate::offload::OutFrame;
use crate::port::deliver::{Job, Limits, Outcome, Refusal, Tools, TxQueue, deliver};
use crate::port::max_l2_bytes;
use crate::ring::{AnyRing, DeviceRing, Direction, RingFault};
use crate::wire::net_header::HEADER_BYTES;

/// Most chains that one frame is spread over: 64 KiB in buffers of 64 bytes. A guest with smaller
/// ones can't receive such frames.
const MAX_MERGED: usize = 1024;

/// Storage for buffers and chains of a burst's destination. Once per worker.
#[derive(Debug)]
pub(crate) struct RxScratch {
    direct: Kept<Frames>,
    buffers: Kept<Buffers>,
    chains: Vec<(Entry, u32)>,
}

impl RxScratch {
    pub(crate) fn new() -> Self {
        Self {
            direct: Kept::new(MAX_BURST),
            buffers: Kept::new(MAX_MERGED + MAX_CHAIN),
            chains: Vec::with_capacity(MAX_MERGED),
        }
    }
}

impl VhostPort {
    /// Delivers frames to the guest: into one of its receive rings, shown to it once and announced by at
    /// most one call.
    #[inline]
    pub(crate) fn deliver(&self, job: &Job<'_, '_>, tools: &mut Tools) -> Outcome {
        let Some(queue) = self.receive_queue(job.source_queue, job.owned) else {
            return tools.drop_all(job, DropReason::PortDown);
        };
        let Some(mut state) = tools.lock(&queue.counters, || queue.try_lock()) else {
            return tools.refuse_all(job);
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

/// Delivers frames into a ring; used entries are written, to be published with the burst. Also returns
/// the rule that the guest broke, if it did.
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
        chains: &mut rx.chains,
        fault: None,
    };
    let outcome = deliver(&mut queue, job, gso, account);
    (outcome, queue.fault)
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
    /// and these chains with their capacities.
    chains: &'m mut Vec<(Entry, u32)>,
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
        let count = self.chains.len() as u16;
        let gap = HEADER_BYTES - self.ring.header_bytes();
        frame.write_to(gap, count, &self.buffers);
        let mut left = needed;
        for (entry, capacity) in self.chains.iter() {
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
            self.chains.push((chain.entry, chain.len));
            room = room.saturating_add(chain.len);
            slots += 1;
            if room >= needed {
                return Some(slots);
            }
        }
        None
    }

    /// Finds chains with room for `needed` bytes, and returns how many slots they take. Takes nothing
    /// yet.
    fn reserve(&mut self, needed: u32) -> Result<u16, Refusal> {
        self.clear();
        let mut room: u32 = 0;
        let mut at = self.ring.place();
        let mut slots = 0;
        while slots < self.available {
            let from = self.buffers.len();
            let buffers = &mut self.buffers;
            let limit = usize::from(self.available - slots);
            let direction = Direction::ToGuest;
            let found = self
                .ring
                .chain(at, limit, direction, self.memory, |buffer| {
                    direction.prefetch(buffer);
                    buffers.len() - from < MAX_CHAIN && buffers.push(buffer)
                });
            let found = found.map_err(|fault| {
                self.fault = Some(fault);
                Refusal::Broken
            })?;
            let Some((entry, capacity)) = found else {
                break;
            };
            at = self.ring.after(at, entry.slots);
            slots += entry.slots;
            self.chains.push((entry, capacity));
            room = room.saturating_add(capacity);
            if room >= needed {
                return Ok(slots);
            }
            if !self.ring.mergeable()
                || self.chains.len() == MAX_MERGED
                || self.buffers.len() > MAX_MERGED
            {
                return Err(Refusal::Drop(DropReason::BufferTooSmall));
            }
        }
        Err(Refusal::Full)
    }

    fn clear(&mut self) {
        self.buffers.clear();
        self.chains.clear();
    }
}

#[cfg(test)]
mod tests;
