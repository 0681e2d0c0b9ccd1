//! Delivery of a burst into a guest's receive ring: reserve the chains that a frame needs, copy
//! header, snapshot and the rest from source to destination buffers, once.

use ringway_bridge::DropReason;

use crate::burst::{Burst, Frame, MAX_CHAIN};
use crate::copy::copy;
use crate::memory::Segment;
use crate::net_header::{self, HEADER_BYTES, HEADER_LEN};
use crate::ring::RingFault;
use crate::ring::split::{Direction, SplitRing, prefetch};

/// Most chains that one frame is spread over: 64 KiB in buffers of 64 bytes. A guest with smaller
/// ones can't receive such frames.
const MAX_MERGED: usize = 1024;

/// Pieces and chains of one frame's destination. Allocated once per worker.
#[derive(Debug)]
pub(crate) struct RxScratch {
    segments: Vec<Segment>,
    /// Head and capacity of each chain.
    chains: Vec<(u16, u32)>,
}

// SAFETY: the segments are used only within one call of `deliver`.
unsafe impl Send for RxScratch {}

impl RxScratch {
    pub(crate) fn new() -> Self {
        Self {
            segments: Vec::with_capacity(MAX_MERGED + MAX_CHAIN),
            chains: Vec::with_capacity(MAX_MERGED),
        }
    }
}

/// How a frame fared.
enum Reserved {
    /// The scratch holds room for it.
    Room,
    /// Not enough buffers are available now.
    Full,
    /// The buffers that there are can't hold it.
    TooSmall,
}

impl SplitRing {
    /// Delivers one frame of `burst` and returns `Ok` once its used entries are written, to be
    /// published with the burst. `available` is the number of chains that the guest has made
    /// available, and is kept up to date.
    ///
    /// # Errors
    /// `Ok(Err(reason))` if the frame does not fit; the ring's rule that the guest broke.
    #[inline]
    pub(crate) fn deliver(
        &mut self,
        burst: &mut Burst,
        index: usize,
        available: &mut u16,
        scratch: &mut RxScratch,
    ) -> Result<Result<(), DropReason>, RingFault> {
        let frame = burst.frames()[index];
        let gap = HEADER_BYTES - self.header_bytes();
        let needed = frame.total_bytes - gap;
        match self.reserve(needed, *available, scratch)? {
            Reserved::Room => {}
            Reserved::Full => return Ok(Err(DropReason::RingFull)),
            Reserved::TooSmall => return Ok(Err(DropReason::BufferTooSmall)),
        }
        let RxScratch { segments, chains } = scratch;
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_MERGED")]
        let count = chains.len() as u16;
        if let ([segment], 0) = (segments.as_slice(), gap)
            && let Some(rest) = single(burst.rest(&frame))
        {
            copy_contiguous(burst, index, &frame, rest, segment.ptr);
        } else {
            copy_scattered(burst, index, &frame, gap, count, segments);
        }
        let mut left = needed;
        for (head, capacity) in chains.iter() {
            let written = left.min(*capacity);
            self.complete(*head, written);
            left -= written;
        }
        self.advance(count);
        *available -= count;
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
        for offset in 0..available {
            let head = self.avail_entry(self.next_avail().wrapping_add(offset))?;
            let from = scratch.segments.len();
            let segments = &mut scratch.segments;
            let capacity = self.walk(head, Direction::ToGuest, |segment| {
                prefetch(segment.ptr);
                let fits = segments.len() - from < MAX_CHAIN;
                if fits {
                    segments.push(segment);
                }
                fits
            })?;
            scratch.chains.push((head, capacity));
            room = room.saturating_add(capacity);
            if room >= needed {
                return Ok(Reserved::Room);
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

/// The only piece, an empty one if there is none, or `None` if there are several.
#[inline(always)]
fn single(rest: &[Segment]) -> Option<Segment> {
    match rest {
        [] => Some(Segment {
            ptr: std::ptr::null_mut(),
            len: 0,
        }),
        [segment] => Some(*segment),
        _ => None,
    }
}

/// Header, snapshot and one piece into one buffer, which has room for the frame.
#[inline(always)]
fn copy_contiguous(burst: &mut Burst, index: usize, frame: &Frame, rest: Segment, to: *mut u8) {
    let head_bytes = frame.snapshot_bytes as usize;
    let snapshot = burst.snapshot(index).as_ptr();
    // SAFETY: the snapshot holds `head_bytes`, the buffer has room for the whole frame, and private
    // and guest memory are distinct.
    unsafe { copy(to, snapshot, head_bytes) };
    // SAFETY: the piece is valid for its length, and the buffer has room for it behind the
    // snapshot. Source and destination are mappings of their own even if they show one file.
    unsafe { copy(to.wrapping_add(head_bytes), rest.ptr, rest.len as usize) };
}

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
