//! Frames on their way: what a worker knows of the frames that it took from one queue in one turn.
//!
//! ```text
//!   source buffers            Burst (private to the worker)
//!   +--------+-----------+    snapshots[i]: header 12 B + the frame's first bytes, copied once
//!   | header | frame ... | -> frames[i]:    ring entry, first buffer, length
//!   +--------+-----------+    details[i], segments[..]: of frames that are not plain
//! ```
//! Decisions are taken on the snapshot, and it is the snapshot that is delivered: the source may
//! rewrite its buffer at any time, and no byte of it is read twice for one destination.
//!
//! A *plain* frame lies in one buffer and asks nothing of its destination. Its snapshot is
//! [`PLAIN_BYTES`] long, which is all that the bridge looks at; of the others it is up to
//! [`SNAPSHOT_BYTES`], and up to [`MAX_SNAPSHOT_BYTES`] if they are to be segmented.

use ringway_bridge::{DropReason, FrameHead, MAX_BURST, Run};

use crate::copy::copy;
use crate::isa::for_this_cpu;
use crate::memory::Segment;
use crate::offload::Pieces;
use crate::ring::{Entry, Single};
use crate::wire::Offloads;
use crate::wire::net_header::{self, Checked, HEADER_BYTES, HEADER_LEN, MAX_FRAME_BYTES};

/// Bytes of a snapshot: the header and the frame's first 116 bytes; two cache lines.
pub(crate) const SNAPSHOT_BYTES: u32 = 128;

/// Bytes of the snapshot of a frame to be segmented: all of its headers must be there, which are up
/// to 142 with two VLAN tags and all options of IPv4 and TCP; IPv6 has room for 122 bytes of
/// extension headers.
pub(crate) const MAX_SNAPSHOT_BYTES: u32 = 256;

/// [`MAX_SNAPSHOT_BYTES`] as a length of arrays.
const SNAPSHOT_LEN: usize = MAX_SNAPSHOT_BYTES as usize;

/// Bytes of a plain frame's snapshot: header, addresses, EtherType and six more.
pub(crate) const PLAIN_BYTES: u32 = 32;

/// Longest frame with its header.
const MAX_TOTAL_BYTES: u32 = MAX_FRAME_BYTES + HEADER_BYTES;

/// Most descriptors, or pieces of them, of one chain: what QEMU (VIRTQUEUE_MAX_SIZE) and
/// writev (IOV_MAX) take too.
pub(crate) const MAX_CHAIN: usize = 1024;

/// Room for the pieces of a burst: at least one longest chain, and 64 frames of 64 KiB in pages.
const MAX_SEGMENTS: usize = 2 * MAX_CHAIN;

/// A header and the frame's first bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Snapshot([u8; SNAPSHOT_LEN]);

/// What is to be known of a frame that is not plain.
#[derive(Clone, Copy, Debug)]
struct Details {
    /// Bytes in the snapshot.
    snapshot_bytes: u32,
    /// What lies behind the snapshot: the first piece, of length 0 if there is nothing,
    rest: Segment,
    /// and further ones, as indices into the burst's segments.
    more: (u32, u32),
    header: Checked,
}

/// The frames of one turn of one source queue. Allocated once per worker.
#[derive(Debug)]
pub(crate) struct Burst {
    snapshots: Box<[Snapshot; MAX_BURST]>,
    /// Ring entry, first buffer, and the length of header and frame.
    frames: Box<[Single; MAX_BURST]>,
    details: Box<[Details; MAX_BURST]>,
    len: usize,
    /// Frames in several pieces.
    scattered: u64,
    /// Frames in one piece that ask nothing of their destination.
    plain: u64,
    /// Frames that passed their checks, by what they begin with.
    runs: Vec<Run>,
    /// Frames that did not, by reason.
    pub(crate) rejected: Vec<(DropReason, u64)>,
    segments: Vec<Segment>,
}

// SAFETY: the segments are pointers that are used only while the source queue's lock is held, by
// whichever thread runs the worker.
unsafe impl Send for Burst {}

impl Burst {
    pub(crate) fn new() -> Self {
        const NOTHING: Details = Details {
            snapshot_bytes: 0,
            rest: Segment::EMPTY,
            more: (0, 0),
            header: Checked::NONE,
        };
        Self {
            snapshots: Box::new([Snapshot([0; SNAPSHOT_LEN]); MAX_BURST]),
            frames: Box::new([Single::EMPTY; MAX_BURST]),
            details: Box::new([NOTHING; MAX_BURST]),
            len: 0,
            scattered: 0,
            plain: 0,
            runs: Vec::with_capacity(MAX_BURST),
            rejected: Vec::with_capacity(DropReason::ALL.len()),
            segments: Vec::with_capacity(MAX_SEGMENTS),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.scattered = 0;
        self.plain = 0;
        self.runs.clear();
        self.rejected.clear();
        self.segments.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The frames that passed their checks, for the bridge.
    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The frames that are plain.
    pub(crate) fn plain(&self) -> u64 {
        self.plain
    }

    /// The ring entries of all frames, and their lengths.
    #[inline]
    pub(crate) fn frames(&self) -> &[Single] {
        &self.frames[..self.len]
    }

    /// Plain frame `index` with its whole buffer, of at least [`PLAIN_BYTES`], whose first bytes are
    /// to be taken from the snapshot. Of indices past the last some older frame.
    #[inline(always)]
    pub(crate) fn plain_at(&self, index: usize) -> (&Single, *const u8) {
        let index = index % MAX_BURST;
        (&self.frames[index], self.snapshots[index].0.as_ptr())
    }

    /// Header and frame.
    #[inline]
    pub(crate) fn total_bytes(&self, index: usize) -> u32 {
        self.frames[index].len
    }

    /// L2 bytes without FCS.
    #[inline]
    pub(crate) fn l2_bytes(&self, index: usize) -> u32 {
        self.total_bytes(index) - HEADER_BYTES
    }

    /// What frame `index`'s header asks for.
    pub(crate) fn header(&self, index: usize) -> Checked {
        if self.is_plain(index) {
            Checked {
                wire_bytes: self.l2_bytes(index),
                ..Checked::NONE
            }
        } else {
            self.details[index].header
        }
    }

    /// The snapshot, of which the first [`Burst::snapshot_bytes`] belong to the frame.
    #[inline]
    pub(crate) fn snapshot(&self, index: usize) -> &[u8; SNAPSHOT_LEN] {
        &self.snapshots[index].0
    }

    /// Bytes in frame `index`'s snapshot.
    pub(crate) fn snapshot_bytes(&self, index: usize) -> u32 {
        if self.is_plain(index) {
            PLAIN_BYTES
        } else {
            self.details[index].snapshot_bytes
        }
    }

    /// What lies behind frame `index`'s snapshot.
    #[inline]
    pub(crate) fn body(&self, index: usize) -> Pieces<'_> {
        if self.is_plain(index) {
            return Pieces::new(self.frames[index].buffer().skip(PLAIN_BYTES), &[]);
        }
        let details = &self.details[index];
        let (from, to) = details.more;
        let more = &self.segments[from as usize..to as usize];
        Pieces::new(details.rest, more)
    }

    /// What lies behind the first `bytes` of header and frame, which are in the snapshot.
    pub(crate) fn body_from(&self, index: usize, bytes: usize) -> Pieces<'_> {
        let seen = &self.snapshots[index].0[bytes..self.snapshot_bytes(index) as usize];
        self.body(index).behind(Segment {
            ptr: seen.as_ptr().cast_mut(),
            len: u32::try_from(seen.len()).unwrap_or(0),
        })
    }

    /// Frame `index`'s buffers, before the snapshots are taken.
    #[cfg(test)]
    pub(crate) fn pieces(&self, index: usize) -> Vec<Segment> {
        let (from, to) = self.details[index].more;
        let (first, more) = if self.scattered >> index & 1 == 0 {
            (self.frames[index].buffer(), [].as_slice())
        } else {
            let more = &self.segments[from as usize..to as usize];
            (self.details[index].rest, more)
        };
        let first = (first.len > 0).then_some(first);
        first.into_iter().chain(more.iter().copied()).collect()
    }

    fn is_plain(&self, index: usize) -> bool {
        self.plain >> index & 1 != 0
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
        let first = self.segments.get(mark).copied().unwrap_or(Segment::EMPTY);
        let end = self.segments.len();
        let more = (mark + 1).min(end)..end;
        if !more.is_empty() {
            self.scattered |= 1 << self.len;
        }
        self.details[self.len].rest = first;
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_SEGMENTS")]
        let more = (more.start as u32, more.end as u32);
        self.details[self.len].more = more;
        self.frames[self.len] = Single {
            ptr: first.ptr,
            len: total_bytes,
            entry,
        };
        self.len += 1;
    }

    /// Room for further frames of one buffer each: the first `n` that are filled in are to be
    /// announced by [`Burst::added`].
    #[inline]
    pub(crate) fn spare(&mut self) -> &mut [Single] {
        &mut self.frames[self.len..]
    }

    /// Adds the frames that were put into the first `count` places of [`Burst::spare`].
    #[inline]
    pub(crate) fn added(&mut self, count: usize) {
        self.len = (self.len + count).min(MAX_BURST);
    }

    /// Takes the snapshots of all frames, whose headers have `header_bytes` (10 or 12), and checks
    /// them: from here on nothing that a decision rests on is read from the source again.
    #[inline]
    pub(crate) fn take_snapshots(&mut self, header_bytes: u32, allowed: Offloads) {
        take_snapshots(self, header_bytes, allowed);
    }

    #[inline(always)]
    fn take_all(&mut self, header_bytes: u32, allowed: Offloads) {
        let whole = if header_bytes == HEADER_BYTES {
            !self.scattered
        } else {
            0
        };
        let mut plain = 0;
        let (mut head, mut mask) = (Head::NONE, 0);
        for index in 0..self.len.min(MAX_BURST) {
            let bit = 1 << index;
            let frame = self.frames[index];
            let mut seen = Head::NONE;
            if whole & bit != 0 && (PLAIN_BYTES..=MAX_TOTAL_BYTES).contains(&frame.len) {
                // SAFETY: the buffer is valid for its length, which is no less.
                seen = unsafe { Head::read(frame.ptr) };
            }
            if seen.asks_nothing() {
                seen.write_clean(&mut self.snapshots[index].0);
                plain |= bit;
            } else {
                match self.take_any(index, header_bytes, allowed) {
                    Ok(taken) => seen = taken,
                    Err(reason) => {
                        self.reject(reason, bit);
                        continue;
                    }
                }
            }
            if !seen.is_like(&head) {
                self.add_run(head, mask);
                (head, mask) = (seen, 0);
            }
            mask |= bit;
        }
        self.add_run(head, mask);
        self.plain = plain;
    }

    #[inline]
    fn add_run(&mut self, head: Head, frames: u64) {
        if frames != 0 {
            self.runs.push(Run {
                head: head.parse(),
                frames,
            });
        }
    }

    /// Takes the snapshot of a frame of any kind, and checks it.
    #[cold]
    fn take_any(
        &mut self,
        index: usize,
        header_bytes: u32,
        allowed: Offloads,
    ) -> Result<Head, DropReason> {
        let frame = &mut self.frames[index];
        let snapshot = &mut self.snapshots[index].0;
        let details = &mut self.details[index];
        if self.scattered >> index & 1 == 0 {
            details.rest = frame.buffer();
            details.more = (0, 0);
        }
        take_pieces(frame, details, snapshot, &self.segments, header_bytes)?;
        if net_header::wants_segmentation(snapshot) {
            let wanted = frame.len.min(MAX_SNAPSHOT_BYTES);
            take_up_to(wanted, details, snapshot, &self.segments);
        }
        let l2_bytes = frame.len - HEADER_BYTES;
        let seen = &snapshot[HEADER_LEN..details.snapshot_bytes as usize];
        FrameHead::parse(seen)?;
        details.header = net_header::check(snapshot, details.snapshot_bytes, l2_bytes, allowed)?;
        Ok(Head::of(snapshot))
    }

    #[cold]
    fn reject(&mut self, reason: DropReason, mask: u64) {
        match self.rejected.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, frames)) => *frames |= mask,
            None => self.rejected.push((reason, mask)),
        }
    }
}

for_this_cpu! {
    fn take_snapshots(burst: &mut Burst, header_bytes: u32, allowed: Offloads) = Burst::take_all;
}

/// The first [`PLAIN_BYTES`] of header and frame, in registers.
///
/// ```text
///   word 0      flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16
///   word 1      csum_offset u16 | num_buffers u16 | destination, 4 of 6
///   word 2      destination, last 2 | source 6
///   word 3      EtherType u16 | 6 bytes more
/// ```
#[derive(Clone, Copy)]
struct Head([u64; 4]);

impl Head {
    /// Asks for something, and is like no frame's: such a header's flags are never let through.
    const NONE: Self = Self([u64::MAX; 4]);

    /// # Safety
    /// `from` is valid for reading [`PLAIN_BYTES`].
    #[inline(always)]
    unsafe fn read(from: *const u8) -> Self {
        // Packed, since buffers may lie anywhere.
        #[repr(C, packed)]
        struct Word(u64);
        let from = from.cast::<Word>();
        Self([0, 1, 2, 3].map(|word| {
            // SAFETY: the caller's promise. The guest may write meanwhile: any mix of old and new
            // will do, and volatile reads are done once.
            u64::from_le(unsafe { from.wrapping_add(word).read_volatile() }.0)
        }))
    }

    fn of(snapshot: &[u8; SNAPSHOT_LEN]) -> Self {
        // SAFETY: a snapshot is longer.
        unsafe { Self::read(snapshot.as_ptr()) }
    }

    /// Whether neither a flag that means anything nor a segmentation is set.
    #[inline(always)]
    fn asks_nothing(&self) -> bool {
        self.0[0] & u64::from(net_header::ASKING) == 0
    }

    /// Writes it with a header of zeros but for num_buffers, which is 1.
    #[inline(always)]
    fn write_clean(&self, snapshot: &mut [u8; SNAPSHOT_LEN]) {
        let words = [
            0,
            self.0[1] & 0xffff_ffff_0000_0000 | 1 << 16,
            self.0[2],
            self.0[3],
        ];
        // SAFETY: a snapshot is longer.
        unsafe {
            snapshot
                .as_mut_ptr()
                .cast::<[u64; 4]>()
                .write_unaligned(words.map(u64::to_le));
        }
    }

    /// Whether addresses and EtherType are the same.
    #[inline(always)]
    fn is_like(&self, other: &Self) -> bool {
        let differ = |word: usize| self.0[word] ^ other.0[word];
        differ(1) >> 32 | differ(2) | differ(3) << 48 == 0
    }

    fn parse(&self) -> FrameHead {
        let dst = self.0[1] >> 32 | self.0[2] << 32;
        let [high, low, ..] = self.0[3].to_le_bytes();
        FrameHead {
            dst: dst.swap_bytes() >> 16,
            src: (self.0[2] >> 16).swap_bytes() >> 16,
            ether_type: u16::from_be_bytes([high, low]),
        }
    }
}

/// Takes the snapshot of a frame in any number of pieces, with a header of either length.
fn take_pieces(
    frame: &mut Single,
    details: &mut Details,
    snapshot: &mut [u8; SNAPSHOT_LEN],
    segments: &[Segment],
    header_bytes: u32,
) -> Result<(), DropReason> {
    let chain_bytes = frame.len;
    let gap = HEADER_BYTES - header_bytes;
    // The longest frame fits, so nothing below overflows.
    if chain_bytes > MAX_FRAME_BYTES + header_bytes {
        return Err(DropReason::TooLong);
    }
    frame.len = (chain_bytes + gap).max(HEADER_BYTES);
    if chain_bytes < header_bytes {
        return Err(DropReason::BadHeader);
    }
    details.snapshot_bytes = gap;
    take_up_to(frame.len.min(SNAPSHOT_BYTES), details, snapshot, segments);
    if gap > 0 {
        // A legacy header without num_buffers: move it to the front.
        snapshot.copy_within(gap as usize..HEADER_LEN, 0);
    }
    Ok(())
}

/// Goes on with a snapshot until it has `wanted` bytes, no more than the frame has with its header.
fn take_up_to(
    wanted: u32,
    details: &mut Details,
    snapshot: &mut [u8; SNAPSHOT_LEN],
    segments: &[Segment],
) {
    while details.snapshot_bytes < wanted {
        let part = details.rest.len.min(wanted - details.snapshot_bytes);
        let from = details.rest.ptr;
        let target = snapshot[details.snapshot_bytes as usize..].as_mut_ptr();
        // SAFETY: the piece is valid for its length and `part` is within it; the snapshot has room
        // for `wanted` bytes; private and guest memory are distinct.
        unsafe { copy(target, from, part as usize) };
        details.snapshot_bytes += part;
        details.rest = details.rest.skip(part);
        if details.snapshot_bytes < wanted {
            // The lengths of the pieces sum up to the frame's, so there is one.
            details.rest = segments[details.more.0 as usize];
            details.more.0 += 1;
        }
    }
}
