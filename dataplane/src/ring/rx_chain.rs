//! Delivery of a burst into a guest's receive ring: reserve the chains that a frame needs, copy
//! header, snapshot and the rest from source to destination buffers, once.

use ringway_bridge::{DropReason, MAX_BURST};

use super::chain::prefetch_for_write;
use super::{DeviceRing, Direction, Entry, RingFault};
use crate::burst::{Burst, Frame, MAX_CHAIN};
use crate::copy::{copy, copy_head};
use crate::memory::Segment;
use crate::net_header::{self, HEADER_BYTES, HEADER_LEN};

/// Most chains that one frame is spread over: 64 KiB in buffers of 64 bytes. A guest with smaller
/// ones can't receive such frames.
const MAX_MERGED: usize = 1024;

/// Pieces and chains of one frame's destination. Allocated once per worker.
#[derive(Debug)]
pub(crate) struct RxScratch {
    segments: Vec<Segment>,
    /// Each chain and its capacity.
    chains: Vec<(Entry, u32)>,
    slots: [RxSlot; MAX_BURST],
}

/// A chain of one buffer.
#[derive(Clone, Copy, Debug)]
struct RxSlot {
    buffer: Segment,
    entry: Entry,
}

// SAFETY: the segments are used only within one call of `deliver`.
unsafe impl Send for RxScratch {}

impl RxScratch {
    pub(crate) fn new() -> Self {
        Self {
            segments: Vec::with_capacity(MAX_MERGED + MAX_CHAIN),
            chains: Vec::with_capacity(MAX_MERGED),
            slots: [RxSlot {
                buffer: Segment::EMPTY,
                entry: Entry::single(0),
            }; MAX_BURST],
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
    /// Two passes: all buffers are on the way into the cache before the first is written.
    #[inline]
    fn deliver_plain(
        &mut self,
        burst: &Burst,
        mask: u64,
        max_bytes: u32,
        available: &mut u16,
        scratch: &mut RxScratch,
    ) -> (u64, u64) {
        if self.header_bytes() != HEADER_BYTES {
            return (0, 0);
        }
        let limit = max_bytes.saturating_add(HEADER_BYTES);
        #[expect(clippy::cast_possible_truncation, reason = "at most 64")]
        let wanted = (mask.count_ones() as u16).min(*available);
        let mut ready = 0_u16;
        let mut at = self.place();
        for slot in &mut scratch.slots[..usize::from(wanted)] {
            let Some((entry, buffer)) = self.single(at, Direction::ToGuest) else {
                break;
            };
            prefetch_for_write(buffer.ptr);
            *slot = RxSlot { buffer, entry };
            at = self.after(at, 1);
            ready += 1;
        }
        let mut left = mask;
        let mut bytes = 0;
        let mut done = 0;
        for slot in &scratch.slots[..usize::from(ready)] {
            let (frame, snapshot) = burst.at(left.trailing_zeros() as usize);
            let total = frame.total_bytes;
            let Some(rest) = frame.plain_rest() else {
                break;
            };
            if total > slot.buffer.len.min(limit) {
                break;
            }
            let (to, head_bytes) = (slot.buffer.ptr, frame.snapshot_bytes as usize);
            // SAFETY: the snapshot holds `head_bytes`, at most 128, the buffer has room for the
            // whole frame, and private and guest memory are distinct.
            unsafe { copy_head(to, snapshot, head_bytes) };
            if rest.len > 0 {
                let (to, len) = (to.wrapping_add(head_bytes), rest.len as usize);
                // SAFETY: the piece is valid for its length, and the buffer has room for it behind
                // the snapshot. Source and destination are mappings of their own, even if they
                // show one file.
                unsafe { copy(to, rest.ptr, len) };
            }
            self.complete(slot.entry, total);
            bytes += u64::from(total - HEADER_BYTES);
            left &= left - 1;
            done += 1;
        }
        self.take(done);
        *available -= done;
        (mask & !left, bytes)
    }

    /// Delivers frame `index` of `burst` into as many chains of as many pieces as it takes; its used
    /// entries are written, to be published with the burst. `available` is what
    /// [`DeviceRing::available`] said, and is kept up to date.
    ///
    /// # Errors
    /// `Ok(Err(reason))` if the frame does not fit; the ring's rule that the guest broke.
    fn deliver(
        &mut self,
        burst: &mut Burst,
        index: usize,
        available: &mut u16,
        scratch: &mut RxScratch,
    ) -> Result<Result<(), DropReason>, RingFault> {
        let frame = burst.frames()[index];
        let gap = HEADER_BYTES - self.header_bytes();
        let needed = frame.total_bytes - gap;
        let slots = match self.reserve(needed, *available, scratch)? {
            Reserved::Room(slots) => slots,
            Reserved::Full => return Ok(Err(DropReason::RingFull)),
            Reserved::TooSmall => return Ok(Err(DropReason::BufferTooSmall)),
        };
        let RxScratch {
            segments, chains, ..
        } = scratch;
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_MERGED")]
        let count = chains.len() as u16;
        copy_scattered(burst, index, &frame, gap, count, segments);
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

    /// Finds chains with room for `needed` bytes. Takes nothing yet.
    #[inline]
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
                prefetch_for_write(segment.ptr);
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

/// The general case: pieces into pieces, which have room for the frame in all.
#[cold]
fn copy_scattered(
    burst: &mut Burst,
    index: usize,
    frame: &Frame,
    gap: u32,
    buffers: u16,
    to: &[Segment],
) {
    let mut bytes = *burst.snapshot(index);
    if gap == 0 {
        net_header::set_num_buffers(&mut bytes, buffers);
    } else {
        // A legacy header ends before num_buffers.
        bytes.copy_within(0..HEADER_LEN - gap as usize, gap as usize);
    }
    let mut targets = to.iter().copied();
    let mut target = Segment {
        ptr: std::ptr::null_mut(),
        len: 0,
    };
    let mut put = |mut from: *const u8, mut left: u32| {
        while left > 0 {
            if target.len == 0 {
                match targets.next() {
                    Some(next) => target = next,
                    None => return,
                }
            }
            let part = left.min(target.len);
            // SAFETY: both pieces are valid for `part` bytes and lie in different mappings.
            unsafe { copy(target.ptr, from, part as usize) };
            from = from.wrapping_add(part as usize);
            left -= part;
            target.ptr = target.ptr.wrapping_add(part as usize);
            target.len -= part;
        }
    };
    put(
        bytes.as_ptr().wrapping_add(gap as usize),
        frame.snapshot_bytes - gap,
    );
    for piece in burst.rest(frame) {
        put(piece.ptr, piece.len);
    }
}
