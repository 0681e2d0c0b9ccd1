//! Frames on their way: what a worker knows of the frames that it took from one queue in one turn.
//!
//! ```text
//!   source buffers            Burst (private to the worker)
//!   +--------+-----------+    snapshots[i]: header 12 B + the frame's first bytes, copied once
//!   | header | frame ... | -> frames[i]:    ring entry, first buffer, length
//!   +--------+-----------+    details[i], buffers[..]: of frames that are not plain
//! ```
//! Decisions are taken on the snapshot, and it is the snapshot that is delivered, since the source may
//! rewrite its buffer at any time. Of a frame that is segmented the headers are delivered from the
//! snapshot; its payload, which decides nothing, is read again where it lies.
//!
//! A *plain* frame lies in one buffer and asks nothing of its destination. Its snapshot is
//! [`PLAIN_BYTES`] long, which is all that the bridge looks at; of the others it is up to
//! [`SNAPSHOT_BYTES`], and up to [`MAX_SNAPSHOT_BYTES`] if they are to be segmented.

use ringway_bridge::{DropReason, FrameHead, FrameSet, MAX_BURST, Run};

use crate::isa::for_this_cpu;
use crate::memory::{GuestSlice, HEAD_BYTES, HEAD_LEN, Hold, Kept, List, Pieces};
use crate::wire::Offloads;
use crate::wire::net_header::{self, Checked, HEADER_BYTES, HEADER_LEN, MAX_FRAME_BYTES};

/// Bytes of a snapshot: the header and the frame's first 116 bytes; two cache lines.
pub(crate) const SNAPSHOT_BYTES: u32 = 128;

/// Bytes of the snapshot of a frame to be segmented: all of its headers must be there, which are up
/// to 142 with two VLAN tags and all options of IPv4 and TCP; IPv6 has room for 378 bytes of
/// extension headers, more than its longest option.
pub(crate) const MAX_SNAPSHOT_BYTES: u32 = 512;

/// [`MAX_SNAPSHOT_BYTES`] as a length of arrays.
const SNAPSHOT_LEN: usize = MAX_SNAPSHOT_BYTES as usize;

/// Bytes of a plain frame's snapshot: header, addresses, EtherType and six more.
const PLAIN_BYTES: u32 = HEAD_BYTES;

/// Longest frame with its header.
const MAX_TOTAL_BYTES: u32 = MAX_FRAME_BYTES + HEADER_BYTES;

/// Most descriptors, or pieces of them, of one chain: what QEMU (VIRTQUEUE_MAX_SIZE) and
/// writev (IOV_MAX) take too.
pub(crate) const MAX_CHAIN: usize = 1024;

/// Room for the buffers of a burst's chains: at least one longest chain, and 64 frames of 64 KiB in
/// pages.
const MAX_BUFFERS: usize = 2 * MAX_CHAIN;

/// A header and the frame's first bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Snapshot([u8; SNAPSHOT_LEN]);

/// A chain of a virtqueue, as it is completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Head of the chain (split) or buffer id (packed).
    pub(crate) id: u16,
    /// What it takes of the ring: an avail entry (split), or so many descriptors (packed).
    pub(crate) slots: u16,
}

impl Entry {
    /// A chain that takes one.
    #[inline(always)]
    pub(crate) const fn single(id: u16) -> Self {
        Self { id, slots: 1 }
    }
}

/// A frame, or room for one: a chain with its first buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame<'m> {
    /// The first buffer, and the only one of a plain frame.
    pub(crate) buffer: GuestSlice<'m>,
    pub(crate) entry: Entry,
    /// Bytes of header and frame, in all buffers.
    pub(crate) len: u32,
}

impl<'m> Frame<'m> {
    /// A chain of one buffer.
    #[inline(always)]
    pub(crate) fn direct(buffer: GuestSlice<'m>, entry: Entry) -> Self {
        let len = buffer.len();
        Self { buffer, entry, len }
    }
}

/// Lists of [`Frame`]s.
#[derive(Debug)]
pub(crate) enum Frames {}

impl Hold for Frames {
    type For<'m> = Frame<'m>;
}

/// Lists of buffers.
#[derive(Debug)]
pub(crate) enum Buffers {}

impl Hold for Buffers {
    type For<'m> = GuestSlice<'m>;
}

/// What is to be known of a frame that is not plain.
#[derive(Clone, Copy, Debug)]
struct Details {
    /// Bytes in the snapshot.
    snapshot_bytes: u32,
    /// Bytes by which its header is shorter than [`HEADER_BYTES`].
    gap: u32,
    /// Where its buffers are in the burst's list; nowhere if it has one only.
    buffers: (u32, u32),
    header: Checked,
}

/// Storage for bursts, allocated once per worker. Each turn of a queue has a [`Burst`] in it.
#[derive(Debug)]
pub(crate) struct BurstStorage {
    snapshots: Box<[Snapshot; MAX_BURST]>,
    frames: Kept<Frames>,
    details: Box<[Details; MAX_BURST]>,
    buffers: Kept<Buffers>,
    runs: Vec<Run>,
    rejected: Vec<(DropReason, FrameSet)>,
}

impl BurstStorage {
    pub(crate) fn new() -> Self {
        const NOTHING: Details = Details {
            snapshot_bytes: 0,
            gap: 0,
            buffers: (0, 0),
            header: Checked::NONE,
        };
        Self {
            snapshots: Box::new([Snapshot([0; SNAPSHOT_LEN]); MAX_BURST]),
            frames: Kept::new(MAX_BURST),
            details: Box::new([NOTHING; MAX_BURST]),
            buffers: Kept::new(MAX_BUFFERS),
            runs: Vec::with_capacity(MAX_BURST),
            rejected: Vec::with_capacity(DropReason::COUNT),
        }
    }

    /// An empty burst, of frames that lie in memory which is valid during `'m`.
    #[inline]
    pub(crate) fn begin<'m>(&'m mut self) -> Burst<'m> {
        self.runs.clear();
        self.rejected.clear();
        Burst {
            snapshots: &mut self.snapshots,
            frames: self.frames.list(),
            details: &mut self.details,
            buffers: self.buffers.list(),
            scattered: FrameSet::EMPTY,
            plain: FrameSet::EMPTY,
            runs: &mut self.runs,
            rejected: &mut self.rejected,
            walked: 0,
        }
    }
}

/// The frames of one turn of one source queue.
#[derive(Debug)]
pub(crate) struct Burst<'m> {
    snapshots: &'m mut [Snapshot; MAX_BURST],
    frames: List<'m, Frame<'m>>,
    details: &'m mut [Details; MAX_BURST],
    buffers: List<'m, GuestSlice<'m>>,
    /// Frames in several buffers.
    scattered: FrameSet,
    /// Frames in one buffer that ask nothing of their destination.
    plain: FrameSet,
    /// Frames that passed their checks, by what they begin with.
    runs: &'m mut Vec<Run>,
    /// Frames that did not, by reason.
    rejected: &'m mut Vec<(DropReason, FrameSet)>,
    /// Descriptors that were read one by one to find the frames.
    walked: u32,
}

impl<'m> Burst<'m> {
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// The frames that passed their checks, for the bridge.
    pub(crate) fn runs(&self) -> &[Run] {
        self.runs
    }

    /// The frames that did not, by reason.
    pub(crate) fn rejected(&self) -> &[(DropReason, FrameSet)] {
        self.rejected
    }

    /// Descriptors that were read one by one to find the frames: of the common ones, a buffer each,
    /// none.
    #[inline(always)]
    pub(crate) fn walked(&self) -> u32 {
        self.walked
    }

    /// Notes how many descriptors were read so far.
    pub(crate) fn note_walked(&mut self, walked: u32) {
        self.walked = walked;
    }

    /// The frames that are plain.
    #[inline(always)]
    pub(crate) fn plain(&self) -> FrameSet {
        self.plain
    }

    /// Has the frames of `plain`, which were so at first, be plain but for those of `changed`, which get
    /// another tag at the destination that comes next.
    pub(crate) fn set_plain(&mut self, plain: FrameSet, changed: FrameSet) {
        self.plain = plain - changed;
        for index in (plain & changed).iter() {
            let wire_bytes = self.l2_bytes(index);
            let details = &mut self.details[index];
            (details.snapshot_bytes, details.gap) = (PLAIN_BYTES, 0);
            details.header = Checked {
                wire_bytes,
                ..Checked::NONE
            };
        }
    }

    /// All frames, in order.
    #[inline(always)]
    pub(crate) fn frames(&self) -> &[Frame<'m>] {
        &self.frames
    }

    /// What is delivered in place of the first bytes of plain frame `index`.
    #[inline(always)]
    pub(crate) fn head(&self, index: usize) -> &[u8; HEAD_LEN] {
        &self.snapshots[index % MAX_BURST].0.as_chunks().0[0]
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

    /// The control information of the tag that frame `index` begins with behind its addresses, if it
    /// has one; `None` if the frame ends before what follows the tag.
    pub(crate) fn tci(&self, index: usize) -> Option<u16> {
        const TCI: usize = HEADER_LEN + 14;
        // Then they are in the snapshot too, whatever its length.
        let is_whole = self.l2_bytes(index) >= 18;
        let snapshot = &self.snapshots[index].0;
        is_whole.then(|| u16::from_be_bytes([snapshot[TCI], snapshot[TCI + 1]]))
    }

    /// What frame `index`'s header asks for.
    pub(crate) fn header(&self, index: usize) -> Checked {
        if self.plain.contains(index) {
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
        if self.plain.contains(index) {
            PLAIN_BYTES
        } else {
            self.details[index].snapshot_bytes
        }
    }

    /// What lies behind the first `bytes` of frame `index` and its header, which are in the
    /// snapshot.
    #[inline]
    pub(crate) fn body(&self, index: usize, bytes: u32) -> Pieces<'_> {
        if self.plain.contains(index) {
            return Pieces::one(self.frames[index].buffer.skip(bytes));
        }
        self.pieces(index).skip(bytes - self.details[index].gap)
    }

    /// Frame `index`'s buffers.
    pub(crate) fn pieces(&self, index: usize) -> Pieces<'_> {
        if self.scattered.contains(index) {
            let (from, to) = self.details[index].buffers;
            Pieces::new(&self.buffers[from as usize..to as usize])
        } else {
            Pieces::one(self.frames[index].buffer)
        }
    }

    /// Appends frames of one buffer each, `most` of them or as many as `next` gives. Returns how
    /// many.
    #[inline(always)]
    pub(crate) fn extend(&mut self, most: usize, next: impl FnMut() -> Option<Frame<'m>>) -> usize {
        self.frames.extend(most, next)
    }

    /// Appends a frame in one buffer, of a source that has no ring; false if the burst is full.
    #[inline]
    pub(crate) fn push_whole(&mut self, frame: GuestSlice<'m>) -> bool {
        self.frames.push(Frame::direct(frame, Entry::single(0)))
    }

    /// Starts a chain: returns a mark for [`Burst::add`], or `None` if the burst is full or a
    /// longest chain might not fit any more.
    #[inline]
    pub(crate) fn begin_chain(&self) -> Option<usize> {
        let fits = self.frames.room() > 0 && self.buffers.room() >= MAX_CHAIN;
        fits.then_some(self.buffers.len())
    }

    /// Appends a buffer to the chain that was begun; false if it has [`MAX_CHAIN`] already.
    #[inline]
    pub(crate) fn push(&mut self, mark: usize, buffer: GuestSlice<'m>) -> bool {
        self.buffers.len() - mark < MAX_CHAIN && self.buffers.push(buffer)
    }

    /// Drops the buffers of a chain that turned out to be bad.
    pub(crate) fn abandon(&mut self, mark: usize) {
        self.buffers.truncate(mark);
    }

    /// Ends a chain: it becomes the burst's next frame, of `total_bytes` in all buffers.
    pub(crate) fn add(&mut self, mark: usize, entry: Entry, total_bytes: u32) {
        let index = self.frames.len();
        let buffers = &self.buffers[mark..];
        let first = buffers.first().copied().unwrap_or(GuestSlice::EMPTY);
        if buffers.len() > 1 {
            self.scattered |= FrameSet::one(index);
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_BUFFERS")]
        let buffers = (mark as u32, self.buffers.len() as u32);
        self.details[index].buffers = buffers;
        self.frames.push(Frame {
            buffer: first,
            entry,
            len: total_bytes,
        });
    }

    /// Takes the snapshots of all frames, whose headers have `header_bytes` (10 or 12), and checks
    /// them: from here on nothing that a decision rests on is read from the source again.
    #[inline]
    pub(crate) fn take_snapshots(&mut self, header_bytes: u32, allowed: Offloads) {
        take_snapshots(self, header_bytes, allowed);
    }

    #[inline(always)]
    fn take_all(&mut self, header_bytes: u32, allowed: Offloads) {
        let longest = if header_bytes == HEADER_BYTES {
            MAX_TOTAL_BYTES
        } else {
            0
        };
        let len = self.frames.len().min(MAX_BURST);
        let (mut others, mut rejected) = (FrameSet::EMPTY, FrameSet::EMPTY);
        // What the frames from `from` on begin with.
        let (mut head, mut from) = (Head::NONE, 0);
        for index in 0..len {
            let Frame { buffer, len, .. } = self.frames[index];
            let mut seen = Head::NONE;
            // Of a frame in several buffers the first is shorter.
            if len == buffer.len() && len <= longest {
                seen = buffer.read_head().map_or(Head::NONE, Head);
            }
            if seen.asks_nothing() {
                seen.write_clean(&mut self.snapshots[index].0);
            } else {
                others |= FrameSet::one(index);
                match self.take_any(index, header_bytes, allowed) {
                    Ok(taken) => seen = taken,
                    Err(reason) => {
                        rejected |= FrameSet::one(index);
                        self.reject(reason, FrameSet::one(index));
                        continue;
                    }
                }
            }
            if !seen.is_like(&head) {
                self.add_run(head, FrameSet::range(from, index) - rejected);
                (head, from) = (seen, index);
            }
        }
        self.add_run(head, FrameSet::range(from, len) - rejected);
        self.plain = FrameSet::range(0, len) - others;
    }

    #[inline]
    fn add_run(&mut self, head: Head, frames: FrameSet) {
        if !frames.is_empty() {
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
        let gap = HEADER_BYTES - header_bytes;
        let chain_bytes = self.frames[index].len;
        // The longest frame fits, so nothing below overflows.
        if chain_bytes > MAX_FRAME_BYTES + header_bytes {
            return Err(DropReason::TooLong);
        }
        let total_bytes = (chain_bytes + gap).max(HEADER_BYTES);
        self.frames[index].len = total_bytes;
        if chain_bytes < header_bytes {
            return Err(DropReason::BadHeader);
        }
        let mut seen_bytes = total_bytes.min(SNAPSHOT_BYTES);
        self.read_snapshot(index, gap, gap..seen_bytes);
        if gap > 0 {
            // A legacy header without num_buffers: move it to the front.
            let snapshot = &mut self.snapshots[index].0;
            snapshot.copy_within(gap as usize..HEADER_LEN, 0);
        }
        if net_header::wants_segmentation(&self.snapshots[index].0) {
            let more = total_bytes.min(MAX_SNAPSHOT_BYTES);
            self.read_snapshot(index, gap, seen_bytes..more);
            seen_bytes = more;
        }
        let snapshot = &mut self.snapshots[index].0;
        FrameHead::parse(&snapshot[HEADER_LEN..seen_bytes as usize])?;
        let l2_bytes = total_bytes - HEADER_BYTES;
        let details = &mut self.details[index];
        details.snapshot_bytes = seen_bytes;
        details.gap = gap;
        details.header = net_header::check(snapshot, seen_bytes, l2_bytes, allowed)?;
        Ok(Head::of(snapshot))
    }

    /// Reads a range of header and frame into the snapshot of frame `index`, whose chain begins
    /// `gap` bytes behind the snapshot.
    fn read_snapshot(&mut self, index: usize, gap: u32, range: std::ops::Range<u32>) {
        let mut seen = [0; SNAPSHOT_LEN];
        let seen = &mut seen[..range.len()];
        self.pieces(index).skip(range.start - gap).read(seen);
        let to = range.start as usize..range.end as usize;
        self.snapshots[index].0[to].copy_from_slice(seen);
    }

    #[cold]
    fn reject(&mut self, reason: DropReason, frames: FrameSet) {
        match self.rejected.iter_mut().find(|(known, _)| *known == reason) {
            Some((_, rejected)) => *rejected |= frames,
            None => self.rejected.push((reason, frames)),
        }
    }
}

for_this_cpu! {
    fn take_snapshots(burst: &mut Burst<'_>, header_bytes: u32, allowed: Offloads) = Burst::take_all;
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

    fn of(snapshot: &[u8; SNAPSHOT_LEN]) -> Self {
        let words = snapshot.as_chunks().0;
        Self([0, 1, 2, 3].map(|word| u64::from_le_bytes(words[word])))
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
        let to = snapshot.as_chunks_mut().0;
        for (to, word) in to.iter_mut().zip(words) {
            *to = word.to_le_bytes();
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

#[cfg(test)]
mod tests;
