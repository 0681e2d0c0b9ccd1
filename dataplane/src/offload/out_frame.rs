//! Frames as a destination takes them: as they are, with their checksum completed, or segmented.

use ringway_bridge::{DropReason, Headers, Retag, TAG_BYTES};

use super::gso::Segmenter;
use super::retag::{growth, write_retagged};
use super::{Action, MAX_GSO_SEGMENTS};
use crate::burst::{Burst, MAX_SNAPSHOT_BYTES};
use crate::memory::{GuestSlice, IoVecs, PieceRun, Pieces};
use crate::wire::Offloads;
use crate::wire::checksum::Sum;
use crate::wire::net_header::{self, Fields, HEADER_BYTES, HEADER_LEN, MAX_FRAME_BYTES};

/// A snapshot, and a tag more.
const HEAD_LEN: usize = MAX_SNAPSHOT_BYTES as usize + TAG_BYTES;

/// Private memory in which heads are made. Once per worker.
#[derive(Debug)]
pub(crate) struct GsoScratch([u8; HEAD_LEN]);

impl GsoScratch {
    pub(crate) fn new() -> Self {
        Self([0; HEAD_LEN])
    }

    /// Frame `index` of a burst, whose tag is changed, for a destination that takes `taken` and frames
    /// of at most `max_bytes` L2 bytes: as it is, or as many.
    ///
    /// # Errors
    /// Why the destination can't have it.
    pub(crate) fn frames<'a>(
        &'a mut self,
        (burst, index, retag): (&'a Burst<'_>, usize, Retag),
        taken: Offloads,
        max_bytes: u32,
    ) -> Result<OutFrames<'a>, DropReason> {
        let header = burst.header(index);
        let grown = |bytes: u32| bytes.saturating_add_signed(growth(retag).into());
        if grown(header.wire_bytes) > max_bytes || grown(burst.l2_bytes(index)) > MAX_FRAME_BYTES {
            return Err(DropReason::TooLong);
        }
        let action = Action::between(header.needs, taken);
        let completes = matches!(action, Action::Complete | Action::SegmentAndComplete);
        let seen_bytes = burst.snapshot_bytes(index);
        write_retagged(&mut self.0, burst.snapshot(index), retag)?;
        let head_bytes = grown(seen_bytes) as usize;
        if !matches!(action, Action::Pass | Action::Complete) {
            return self.segments(burst, index, retag, completes);
        }
        // Or whoever segments it would not find its headers behind so many tags.
        let is_segmented = header.needs.without(Offloads::CSUM) != Offloads::NONE;
        if matches!(retag, Retag::Push(_)) && is_segmented {
            let seen = &self.0[HEADER_LEN..head_bytes];
            Headers::parse(seen).ok_or(DropReason::OffloadUnsupported)?;
        }
        let fields = Fields::of(&self.0);
        let pending = completes.then_some(PendingChecksum {
            start: u32::from(fields.csum_start),
            at: u32::from(fields.csum_start) + u32::from(fields.csum_offset),
        });
        let keeps_hint = header.data_valid && Offloads::CSUM.within(taken);
        if completes || header.data_valid && !keeps_hint {
            net_header::clear(&mut self.0);
        }
        Ok(OutFrames {
            head: &mut self.0[..head_bytes],
            body: burst.body(index, seen_bytes),
            body_bytes: burst.total_bytes(index) - seen_bytes,
            count: 1,
            made: 0,
            pending,
            segmenter: None,
        })
    }

    /// The segments of frame `index`, whose first bytes are in our memory, with the destination's tag.
    #[cold]
    fn segments<'a>(
        &'a mut self,
        burst: &'a Burst<'_>,
        index: usize,
        retag: Retag,
        completes: bool,
    ) -> Result<OutFrames<'a>, DropReason> {
        let growth = i32::from(growth(retag));
        let grown = |bytes: u32| bytes.saturating_add_signed(growth);
        let seen = &self.0[HEADER_LEN..grown(burst.snapshot_bytes(index)) as usize];
        let fields = Fields::of(&self.0);
        // As when the frame's header was checked: the same bytes, but for the tag.
        let headers = Headers::parse(seen).ok_or(DropReason::OffloadUnsupported)?;
        let frame_bytes = grown(burst.l2_bytes(index));
        let segmenter = Segmenter::new(seen, &headers, frame_bytes, fields.gso_size)
            .ok_or(DropReason::OffloadUnsupported)?;
        let count = segmenter.count();
        if count > MAX_GSO_SEGMENTS {
            return Err(DropReason::TooManySegments);
        }
        let head_bytes = HEADER_LEN + segmenter.headers_bytes();
        let seen_bytes = u32::try_from(head_bytes).unwrap_or(u32::MAX);
        let (start, at) = segmenter.checksum();
        let offset = |at: usize| u16::try_from(at).unwrap_or(u16::MAX);
        let pending = if completes {
            net_header::clear(&mut self.0);
            Some(PendingChecksum {
                start: offset(start).into(),
                at: offset(at).into(),
            })
        } else {
            net_header::set_needs_csum(&mut self.0, offset(start), offset(at - start));
            None
        };
        Ok(OutFrames {
            head: &mut self.0[..head_bytes],
            body: burst.body(index, seen_bytes.saturating_add_signed(-growth)),
            body_bytes: 0,
            count,
            made: 0,
            pending,
            segmenter: Some(segmenter),
        })
    }
}

/// A checksum to complete: the sum from `start` to the frame's end goes to `at`; offsets into the
/// frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PendingChecksum {
    start: u32,
    at: u32,
}

/// The frames that one frame becomes, one after the other.
#[derive(Debug)]
pub(crate) struct OutFrames<'a> {
    head: &'a mut [u8],
    /// From the next frame's body on.
    body: Pieces<'a>,
    body_bytes: u32,
    count: u32,
    made: u32,
    pending: Option<PendingChecksum>,
    segmenter: Option<Segmenter>,
}

impl<'a> OutFrames<'a> {
    /// How many there are in all.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Whether checksums are completed.
    pub(crate) fn completes(&self) -> bool {
        self.pending.is_some()
    }

    /// Bytes of the longest, with the virtio-net header.
    pub(crate) fn longest_bytes(&self) -> u32 {
        let body_bytes = match &self.segmenter {
            Some(segmenter) => segmenter.next_bytes(),
            None => self.body_bytes,
        };
        bytes_of(self.head) + body_bytes
    }

    /// The next.
    pub(crate) fn next(&mut self) -> Option<OutFrame<'_>> {
        if self.made == self.count {
            return None;
        }
        self.made += 1;
        let body = self.body;
        let body_bytes = match &mut self.segmenter {
            Some(segmenter) => {
                let bytes = segmenter.next(&mut self.head[HEADER_LEN..]);
                self.body = body.skip(bytes);
                bytes
            }
            None => self.body_bytes,
        };
        Some(OutFrame {
            head: self.head,
            body: PieceRun::new(body, body_bytes),
            pending: self.pending,
            field: [0; 2],
        })
    }
}

/// A frame as a destination takes it.
#[derive(Debug)]
pub(crate) struct OutFrame<'a> {
    /// The virtio-net header and the frame's first bytes, private.
    head: &'a mut [u8],
    /// What follows, in buffers of the source.
    body: PieceRun<'a>,
    pending: Option<PendingChecksum>,
    /// A checksum that is completed behind the head.
    field: [u8; 2],
}

impl OutFrame<'_> {
    /// Header and frame.
    #[inline]
    pub(crate) fn total_bytes(&self) -> u32 {
        bytes_of(self.head) + self.body.bytes()
    }

    /// L2 bytes without FCS.
    #[inline]
    pub(crate) fn l2_bytes(&self) -> u32 {
        self.total_bytes() - HEADER_BYTES
    }

    /// Writes it into `to`, which has room for it without the last `gap` bytes of the virtio-net
    /// header, spread over `buffers` chains. A pending checksum is summed from what is copied.
    pub(crate) fn write_to(&mut self, gap: u32, buffers: u16, to: &[GuestSlice<'_>]) {
        net_header::set_num_buffers(self.head, buffers);
        let (header, frame) = self.head.split_at(HEADER_LEN);
        let mut target = Pieces::new(to);
        target.write(&header[..HEADER_LEN - gap as usize]);
        target.write(frame);
        let Some(pending) = self.pending else {
            return self.body.copy_to(&mut target, |to, from| {
                to.copy_from(from);
            });
        };
        let mut sum = pending.sum_of(frame);
        let mut before = pending.start.saturating_sub(bytes_of(frame));
        self.body.copy_to(&mut target, |to, from| {
            let plain = before.min(to.len());
            if plain > 0 {
                before -= plain;
                to.first(plain).copy_from(from);
            }
            sum.add_copied(to.skip(plain), from.skip(plain));
        });
        let at = HEADER_BYTES - gap + pending.at;
        Pieces::new(to).skip(at).write(&sum.finish());
    }

    /// Appends its parts to `parts`. A pending checksum is completed in private memory, by summing
    /// the source's bytes before.
    pub(crate) fn gather<'p>(&'p mut self, parts: &mut IoVecs<'p>) {
        let Some(pending) = self.pending else {
            parts.push_private(self.head);
            return self.body.for_each(|part| parts.push(part));
        };
        let mut sum = pending.sum_of(&self.head[HEADER_LEN..]);
        let mut before = pending
            .start
            .saturating_sub(bytes_of(self.head) - HEADER_BYTES);
        for part in self.body {
            let plain = before.min(part.len());
            before -= plain;
            sum.add_piece(part.skip(plain));
        }
        self.field = sum.finish();
        let field_at = (HEADER_BYTES + pending.at) as usize;
        if let Some(field) = self.head.get_mut(field_at..field_at + 2) {
            field.copy_from_slice(&self.field);
            parts.push_private(self.head);
            return self.body.for_each(|part| parts.push(part));
        }
        // Behind the head, or across its end: ours are passed for the source's two bytes.
        let (head, rest) = self.head.split_at(field_at.min(self.head.len()));
        let (front, back) = self
            .body
            .split_at(HEADER_BYTES + pending.at - bytes_of(head));
        parts.push_private(head);
        front.for_each(|part| parts.push(part));
        parts.push_private(&self.field);
        let (_, back) = back.split_at(2 - bytes_of(rest));
        back.for_each(|part| parts.push(part));
    }
}

impl PendingChecksum {
    /// The sum of what lies in `frame`, a frame's first bytes.
    fn sum_of(self, frame: &[u8]) -> Sum {
        let mut sum = Sum::default();
        sum.add(frame.get(self.start as usize..).unwrap_or_default());
        sum
    }
}

fn bytes_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}
