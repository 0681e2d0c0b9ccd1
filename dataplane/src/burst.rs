//! Frames on their way: what a worker knows of the frames that it took from one queue in one turn.
//!
//! ```text
//!   source buffers            Burst (private to the worker)
//!   +--------+-----------+    snapshots[i]: header 12 B + the frame's first 116 B, copied once
//!   | header | frame ... | -> frames[i]:    ring entry, lengths, offloads
//!   +--------+-----------+    segments[..]: where the rest of the frame lies
//! ```
//! Decisions are taken on the snapshot, and it is the snapshot that is delivered: the source may
//! rewrite its buffer at any time, and no byte of it is read twice for one destination.

use ringway_bridge::{DropReason, FrameHead, MAX_BURST};

use crate::copy::{copy, copy_head};
use crate::memory::Segment;
use crate::net_header::{self, Checked, HEADER_BYTES, HEADER_LEN, MAX_FRAME_BYTES, Offloads};
use crate::ring::Entry;

/// Bytes of the snapshot: the header and the frame's first 116 bytes, enough for Ethernet, IPv6
/// and TCP with all options (114); two cache lines.
pub(crate) const SNAPSHOT_BYTES: u32 = 128;

/// [`SNAPSHOT_BYTES`] as a length of arrays.
const SNAPSHOT_LEN: usize = SNAPSHOT_BYTES as usize;

/// Most descriptors, or pieces of them, of one chain: what QEMU (VIRTQUEUE_MAX_SIZE) and
/// writev (IOV_MAX) take too.
pub(crate) const MAX_CHAIN: usize = 1024;

/// Room for the pieces of a burst: at least one longest chain, and 64 frames of 64 KiB in pages.
const MAX_SEGMENTS: usize = 2 * MAX_CHAIN;

/// A header and the frame's first bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Snapshot([u8; SNAPSHOT_LEN]);

/// One frame of a burst.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    /// Ring entry to complete.
    pub(crate) entry: Entry,
    /// Bytes in the snapshot.
    pub(crate) snapshot_bytes: u32,
    /// Header and frame.
    pub(crate) total_bytes: u32,
    /// What lies behind the snapshot: the first piece, of length 0 if there is nothing,
    rest: Segment,
    /// and further ones, as indices into the burst's segments.
    more: (u32, u32),
    pub(crate) header: Checked,
    /// One piece at most behind the snapshot, and nothing asked of the destination.
    is_plain: bool,
}

impl Frame {
    const EMPTY: Self = Self {
        entry: Entry::single(0),
        snapshot_bytes: 0,
        total_bytes: 0,
        rest: Segment::EMPTY,
        more: (0, 0),
        header: Checked::NONE,
        is_plain: false,
    };

    /// L2 bytes without FCS.
    #[inline]
    pub(crate) fn l2_bytes(&self) -> u32 {
        self.total_bytes - HEADER_BYTES
    }

    /// What lies behind the snapshot, of length 0 if it is nothing, if it is one piece and the
    /// frame asks nothing of its destination.
    #[inline(always)]
    pub(crate) fn plain_rest(&self) -> Option<Segment> {
        self.is_plain.then_some(self.rest)
    }
}

/// The frames of one turn of one source queue. Allocated once per worker.
#[derive(Debug)]
pub(crate) struct Burst {
    snapshots: Box<[Snapshot; MAX_BURST]>,
    frames: Box<[Frame; MAX_BURST]>,
    heads: Box<[FrameHead; MAX_BURST]>,
    len: usize,
    /// Frames that passed their checks.
    valid: u64,
    /// Frames that did not, by reason.
    pub(crate) rejected: Vec<(DropReason, u64)>,
    segments: Vec<Segment>,
}

// SAFETY: the segments are pointers that are used only while the source queue's lock is held, by
// whichever thread runs the worker.
unsafe impl Send for Burst {}

impl Burst {
    pub(crate) fn new() -> Self {
        Self {
            snapshots: Box::new([Snapshot([0; SNAPSHOT_LEN]); MAX_BURST]),
            frames: Box::new([Frame::EMPTY; MAX_BURST]),
            heads: Box::new([FrameHead::default(); MAX_BURST]),
            len: 0,
            valid: 0,
            rejected: Vec::with_capacity(DropReason::ALL.len()),
            segments: Vec::with_capacity(MAX_SEGMENTS),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.valid = 0;
        self.rejected.clear();
        self.segments.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn valid(&self) -> u64 {
        self.valid
    }

    #[inline]
    pub(crate) fn frames(&self) -> &[Frame] {
        &self.frames[..self.len]
    }

    /// Frame `index` of the burst and its snapshot; of indices past the last some older frame.
    #[inline(always)]
    pub(crate) fn at(&self, index: usize) -> (&Frame, *const u8) {
        let index = index % MAX_BURST;
        (&self.frames[index], self.snapshots[index].0.as_ptr())
    }

    #[inline]
    pub(crate) fn heads(&self) -> &[FrameHead] {
        &self.heads[..self.len]
    }

    #[inline]
    pub(crate) fn snapshot(&mut self, index: usize) -> &mut [u8; SNAPSHOT_LEN] {
        &mut self.snapshots[index].0
    }

    /// What lies behind a frame's snapshot.
    #[inline]
    pub(crate) fn rest(&self, frame: &Frame) -> impl ExactSizeIterator<Item = Segment> {
        let (from, to) = frame.more;
        let first = (frame.rest.len > 0).then_some(frame.rest);
        let more = &self.segments[from as usize..to as usize];
        let count = usize::from(first.is_some()) + more.len();
        let mut pieces = first.into_iter().chain(more.iter().copied());
        (0..count).map(move |_| pieces.next().unwrap_or(Segment::EMPTY))
    }

    /// Starts a chain: returns a mark for [`Burst::add`], or `None` if the burst is full or a
    /// longest chain might not fit any more.
    #[inline]
    pub(crate) fn begin(&self) -> Option<usize> {
        let from = self.segments.len();
        (self.len < MAX_BURST && from + MAX_CHAIN <= MAX_SEGMENTS).then_some(from)
    }

    /// Appends a piece to the chain that was begun; false if it has [`MAX_CHAIN`] already.
    #[inline]
    pub(crate) fn push(&mut self, mark: usize, segment: Segment) -> bool {
        let fits = self.segments.len() - mark < MAX_CHAIN;
        if fits {
            self.segments.push(segment);
        }
        fits
    }

    /// Drops the pieces of a chain that turned out to be bad.
    pub(crate) fn abandon(&mut self, mark: usize) {
        self.segments.truncate(mark);
    }

    /// Ends a chain: it becomes the burst's next frame, of `total_bytes` in all pieces.
    pub(crate) fn add(&mut self, mark: usize, entry: Entry, total_bytes: u32) {
        let first = self.segments.get(mark).copied();
        let from = mark + usize::from(first.is_some());
        // Both fit: there are at most MAX_SEGMENTS.
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_SEGMENTS")]
        let more = (from as u32, self.segments.len() as u32);
        self.add_frame(entry, total_bytes, first.unwrap_or(Segment::EMPTY), more);
    }

    /// Adds a frame that is one piece.
    #[inline(always)]
    pub(crate) fn add_single(&mut self, entry: Entry, segment: Segment) {
        self.add_frame(entry, segment.len, segment, (0, 0));
    }

    #[inline(always)]
    fn add_frame(&mut self, entry: Entry, total_bytes: u32, rest: Segment, more: (u32, u32)) {
        let frame = &mut self.frames[self.len];
        frame.entry = entry;
        frame.total_bytes = total_bytes;
        frame.rest = rest;
        frame.more = more;
        self.len += 1;
    }

    /// Takes the snapshots of all frames, whose headers have `header_bytes` (10 or 12), and checks
    /// them: from here on nothing that a decision rests on is read from the source again.
    #[inline]
    pub(crate) fn take_snapshots(&mut self, header_bytes: u32, allowed: Offloads) {
        for index in 0..self.len {
            match self.take_snapshot(index, header_bytes, allowed) {
                Ok(()) => self.valid |= 1 << index,
                Err(reason) => self.reject(reason, 1 << index),
            }
        }
    }

    #[inline(always)]
    fn take_snapshot(
        &mut self,
        index: usize,
        header_bytes: u32,
        allowed: Offloads,
    ) -> Result<(), DropReason> {
        let frame = &mut self.frames[index];
        let snapshot = &mut self.snapshots[index].0;
        let is_common = header_bytes == HEADER_BYTES
            && frame.more.0 == frame.more.1
            && (HEADER_BYTES..=MAX_FRAME_BYTES + HEADER_BYTES).contains(&frame.total_bytes);
        if is_common {
            let taken = frame.total_bytes.min(SNAPSHOT_BYTES);
            // SAFETY: the piece is valid for its length, which is the frame's, and so for `taken`
            // bytes of it; the snapshot has room for them; private and guest memory are distinct.
            unsafe { copy_head(snapshot.as_mut_ptr(), frame.rest.ptr, taken as usize) };
            frame.rest.ptr = frame.rest.ptr.wrapping_add(taken as usize);
            frame.rest.len -= taken;
            frame.snapshot_bytes = taken;
        } else {
            take_pieces(frame, snapshot, &mut self.segments, header_bytes)?;
        }
        let l2_bytes = frame.l2_bytes();
        // The bytes behind a runt are not looked at again: it is dropped.
        self.heads[index] = FrameHead::parse(&snapshot[HEADER_LEN..], l2_bytes)?;
        frame.header = net_header::check(snapshot, frame.snapshot_bytes, l2_bytes, allowed)?;
        frame.is_plain = frame.more.0 == frame.more.1 && frame.header.is_plain();
        Ok(())
    }

    #[cold]
    fn reject(&mut self, reason: DropReason, mask: u64) {
        match self.rejected.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, frames)) => *frames |= mask,
            None => self.rejected.push((reason, mask)),
        }
    }
}

/// Takes the snapshot of a frame in several pieces, or with a legacy header.
#[cold]
fn take_pieces(
    frame: &mut Frame,
    snapshot: &mut [u8; SNAPSHOT_LEN],
    segments: &mut [Segment],
    header_bytes: u32,
) -> Result<(), DropReason> {
    let chain_bytes = frame.total_bytes;
    let gap = HEADER_BYTES - header_bytes;
    // The longest frame fits, so nothing below overflows.
    if chain_bytes > MAX_FRAME_BYTES + header_bytes {
        return Err(DropReason::TooLong);
    }
    frame.total_bytes = (chain_bytes + gap).max(HEADER_BYTES);
    if chain_bytes < header_bytes {
        return Err(DropReason::BadHeader);
    }
    let wanted = chain_bytes.min(SNAPSHOT_BYTES - gap);
    let target = snapshot.as_mut_ptr().wrapping_add(gap as usize);
    let mut taken = 0;
    loop {
        let part = frame.rest.len.min(wanted - taken);
        let from = frame.rest.ptr;
        // SAFETY: the piece is valid for its length and `part` is within it; the snapshot has room
        // for `wanted` bytes behind the gap; private and guest memory are distinct.
        unsafe { copy(target.wrapping_add(taken as usize), from, part as usize) };
        taken += part;
        frame.rest = Segment {
            ptr: from.wrapping_add(part as usize),
            len: frame.rest.len - part,
        };
        if taken == wanted {
            break;
        }
        // The lengths of the pieces sum up to `chain_bytes`, so there is one.
        frame.rest = segments[frame.more.0 as usize];
        frame.more.0 += 1;
    }
    frame.snapshot_bytes = gap + taken;
    if gap > 0 {
        // A legacy header without num_buffers: move it to the front.
        snapshot.copy_within(gap as usize..HEADER_LEN, 0);
    }
    Ok(())
}
