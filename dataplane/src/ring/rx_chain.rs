//! Delivery of a burst into a guest's receive ring: reserve the chains that a frame needs, copy
//! header, snapshot and the rest from source to destination buffers, once.

use ringway_bridge::{DropReason, MAX_BURST};

use super::chain::{prefetch, prefetch_more};
use super::{DeviceRing, Direction, Entry, RingFault, Single};
use crate::burst::{Burst, MAX_CHAIN, PLAIN_BYTES};
use crate::copy::copy;
use crate::memory::Segment;
use crate::offload::Parcel;
use crate::wire::net_header::HEADER_BYTES;

/// Most chains that one frame is spread over: 64 KiB in buffers of 64 bytes. A guest with smaller
/// ones can't receive such frames.
const MAX_MERGED: usize = 1024;

/// Pieces and chains of one frame's destination. Allocated once per worker.
#[derive(Debug)]
pub(crate) struct RxScratch {
    segments: Vec<Segment>,
    /// Each chain and its capacity.
    chains: Vec<(Entry, u32)>,
    singles: [Single; MAX_BURST],
}

// SAFETY: the segments are used only within one call of `deliver`.
unsafe impl Send for RxScratch {}

impl RxScratch {
    pub(crate) fn new() -> Self {
        Self {
            segments: Vec::with_capacity(MAX_MERGED + MAX_CHAIN),
            chains: Vec::with_capacity(MAX_MERGED),
            singles: [Single::EMPTY; MAX_BURST],
        }
    }
}

/// How a frame fared.
pub(crate) enum Reserved {
    /// The scratch holds room for it, in so many descriptors of the ring.
    Room(u16),
    /// Not enough buffers are available now.
    Full,
    /// The buffers that there are can't hold it.
    TooSmall,
}

/// Delivery into a ring of any layout.
pub(crate) trait Deliver: DeviceRing {
    /// Delivers the frames of `mask`, in order, for as long as they are of the common kind: a
    /// plain frame of at most `max_bytes` L2 bytes into one direct buffer that holds it. Returns
    /// those that were delivered and their L2 bytes; the others are left to
    /// [`Deliver::deliver`]. Used entries are written, to be published with the burst.
    ///
    /// Two passes: the first lines of all buffers are on the way into the cache before the first is
    /// written; the others come while the frame before is copied.
    #[inline(always)]
    fn deliver_plain(
        &mut self,
        burst: &Burst,
        mask: u64,
        max_bytes: u32,
        available: &mut u16,
        scratch: &mut RxScratch,
    ) -> (u64, u64) {
        // In order: up to the first that is not plain.
        let odd = mask & !burst.plain();
        let plain = mask & (odd & odd.wrapping_neg()).wrapping_sub(1);
        let wanted = plain.count_ones().min(u32::from(*available)) as usize;
        if self.header_bytes() != HEADER_BYTES || wanted == 0 {
            return (0, 0);
        }
        let limit = max_bytes.saturating_add(HEADER_BYTES);
        let ready = self.singles(Direction::ToGuest, &mut scratch.singles[..wanted]);
        let mut left = plain;
        let mut bytes = 0;
        let mut done = 0;
        for at in 0..ready {
            let to = scratch.singles[at];
            let (frame, snapshot) = burst.plain_at(left.trailing_zeros() as usize);
            let total = frame.len;
            if total > to.len.min(limit) {
                break;
            }
            if let Some(next) = scratch.singles[..ready].get(at + 1) {
                // Most likely the next frame is as long as this one.
                prefetch_more(next.ptr, total);
            }
            let (head, rest) = (PLAIN_BYTES as usize, total - PLAIN_BYTES);
            // SAFETY: the snapshot holds as many bytes, the buffer has room for the whole frame,
            // which is no shorter, and private and guest memory are distinct.
            unsafe { to.ptr.copy_from_nonoverlapping(snapshot, head) };
            let (target, source) = (to.ptr.wrapping_add(head), frame.ptr.wrapping_add(head));
            // SAFETY: the frame's buffer holds all of it and the destination has room for it.
            // They are in mappings of their own, even if these show one file.
            unsafe { copy(target, source, rest as usize) };
            scratch.singles[at].len = total;
            bytes += u64::from(total - HEADER_BYTES);
            left &= left - 1;
            done += 1;
        }
        self.complete_all(&scratch.singles[..done], Direction::ToGuest);
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_BURST")]
        let done = done as u16;
        self.take(done);
        *available -= done;
        (plain & !left, bytes)
    }

    /// Delivers a parcel into as many chains of as many pieces as it takes; its used entries are
    /// written, to be published with the burst. `available` is what [`DeviceRing::available`] said,
    /// and is kept up to date.
    ///
    /// # Errors
    /// `Ok(Err(reason))` if the frame does not fit; the ring's rule that the guest broke.
    fn deliver(
        &mut self,
        parcel: &mut Parcel<'_, '_>,
        available: &mut u16,
        scratch: &mut RxScratch,
    ) -> Result<Result<(), DropReason>, RingFault> {
        let gap = HEADER_BYTES - self.header_bytes();
        let needed = parcel.total_bytes() - gap;
        let slots = match self.reserve_singles(needed, *available, scratch) {
            Some(slots) => slots,
            None => match self.reserve(needed, *available, scratch)? {
                Reserved::Room(slots) => slots,
                Reserved::Full => return Ok(Err(DropReason::RingFull)),
                Reserved::TooSmall => return Ok(Err(DropReason::BufferTooSmall)),
            },
        };
        let RxScratch {
            segments, chains, ..
        } = scratch;
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_MERGED")]
        let count = chains.len() as u16;
        parcel.write_to(gap, count, segments);
        let mut left = needed;
        for (entry, capacity) in chains.iter() {
            let written = left.min(*capacity);
            self.complete(*entry, written);
            left -= written;
        }
        self.take(slots);
        *available -= slots;
        Ok(Ok(()))
    }

    /// Whether to wait for more room before the first of `count` frames of `total_bytes` is
    /// delivered: there will be room for all, and there is not yet. Judged by what the first takes.
    ///
    /// # Errors
    /// The ring's rule that the guest broke.
    fn should_wait_for(
        &mut self,
        count: u32,
        total_bytes: u32,
        available: u16,
        scratch: &mut RxScratch,
    ) -> Result<bool, RingFault> {
        let needed = total_bytes - (HEADER_BYTES - self.header_bytes());
        let Reserved::Room(slots) = self.reserve(needed, available, scratch)? else {
            return Ok(false);
        };
        let needed = u32::from(slots) * count;
        // Drivers refill a ring when half of it is empty: what needs more may wait for ever.
        match u16::try_from(needed) {
            Ok(needed) if needed <= self.entries() / 2 => {
                let last = self.after(self.place(), needed - 1);
                Ok(needed > available || !self.is_offered(last))
            }
            _ => Ok(false),
        }
    }

    /// [`Deliver::reserve`] for the common case: chains of one buffer, all as long as the first.
    /// Returns how many there are in the scratch; `None` says nothing.
    #[inline]
    fn reserve_singles(
        &mut self,
        needed: u32,
        available: u16,
        scratch: &mut RxScratch,
    ) -> Option<u16> {
        let RxScratch {
            segments,
            chains,
            singles,
        } = scratch;
        let most = if self.mergeable() { MAX_BURST } else { 1 };
        let most = most.min(usize::from(available));
        if self.singles(Direction::ToGuest, &mut singles[..most.min(1)]) == 0 {
            return None;
        }
        let wanted = needed.div_ceil(singles[0].len) as usize;
        let singles = singles[..most].get_mut(..wanted)?;
        if self.singles(Direction::ToGuest, singles) < wanted {
            return None;
        }
        segments.clear();
        chains.clear();
        let (mut room, mut slots) = (0_u32, 0);
        for single in singles {
            segments.push(single.buffer());
            chains.push((single.entry, single.len));
            room = room.saturating_add(single.len);
            slots += 1;
            if room >= needed {
                return Some(slots);
            }
        }
        None
    }

    /// Finds chains with room for `needed` bytes. Takes nothing yet.
    fn reserve(
        &mut self,
        needed: u32,
        available: u16,
        scratch: &mut RxScratch,
    ) -> Result<Reserved, RingFault> {
        scratch.segments.clear();
        scratch.chains.clear();
        let mut room: u32 = 0;
        let mut at = self.place();
        let mut slots = 0;
        while slots < available {
            let from = scratch.segments.len();
            let segments = &mut scratch.segments;
            let limit = usize::from(available - slots);
            let found = self.chain(at, limit, Direction::ToGuest, |segment| {
                prefetch(segment, Direction::ToGuest);
                let fits = segments.len() - from < MAX_CHAIN;
                if fits {
                    segments.push(segment);
                }
                fits
            })?;
            let Some((entry, capacity)) = found else {
                break;
            };
            at = self.after(at, entry.slots);
            slots += entry.slots;
            scratch.chains.push((entry, capacity));
            room = room.saturating_add(capacity);
            if room >= needed {
                return Ok(Reserved::Room(slots));
            }
            if !self.mergeable()
                || scratch.chains.len() == MAX_MERGED
                || scratch.segments.len() > MAX_MERGED
            {
                return Ok(Reserved::TooSmall);
            }
        }
        Ok(Reserved::Full)
    }
}

impl<R: DeviceRing> Deliver for R {}
