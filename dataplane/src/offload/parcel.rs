//! Parcels: frames as a destination takes them.

use ringway_bridge::{DropReason, Headers};

use super::gso::Cutter;
use super::pieces::{Pieces, Run};
use super::{Action, MAX_PARCELS};
use crate::burst::{Burst, MAX_SNAPSHOT_BYTES};
use crate::copy::copy;
use crate::memory::Segment;
use crate::wire::Offloads;
use crate::wire::checksum::Sum;
use crate::wire::net_header::{self, Fields, HEADER_BYTES, HEADER_LEN};

const HEAD_LEN: usize = MAX_SNAPSHOT_BYTES as usize;

/// Private memory in which heads are made, and the count of what was done. Once per worker.
#[derive(Debug)]
pub(crate) struct Workbench {
    head: [u8; HEAD_LEN],
    pub(crate) tally: Tally,
}

/// What was done to frames for one destination in one burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Frames that were delivered whole, with their checksum completed.
    pub(crate) completed: u64,
    /// Frames that were cut, and delivered at least in part,
    pub(crate) cut: u64,
    /// and what became of them: frames,
    pub(crate) segments: u64,
    /// of which so many were not delivered, since
    pub(crate) lost: [(u64, Option<DropReason>); 2],
}

impl Tally {
    /// Whether anything was done.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.completed | self.cut == 0
    }

    /// Frames delivered beyond one for each that was cut.
    pub(crate) fn extra_delivered(&self) -> u64 {
        let lost: u64 = self.lost.iter().map(|(frames, _)| frames).sum();
        self.segments - lost - self.cut
    }

    /// Notes a frame that became `made` frames, of which the last `lost` were not delivered, as
    /// `reason` tells.
    pub(crate) fn note_cut(&mut self, made: u32, lost: u32, reason: Option<DropReason>) {
        self.cut += 1;
        self.segments += u64::from(made);
        if lost > 0 {
            let known = |slot: &(u64, Option<DropReason>)| slot.1.is_none() || slot.1 == reason;
            // A third reason in one burst is counted as the second.
            let at = usize::from(!known(&self.lost[0]));
            let slot = &mut self.lost[at];
            slot.0 += u64::from(lost);
            slot.1 = slot.1.or(reason);
        }
    }
}

impl Workbench {
    pub(crate) fn new() -> Self {
        Self {
            head: [0; HEAD_LEN],
            tally: Tally::default(),
        }
    }

    /// Frame `index` of a burst for a destination that takes `taken` and frames of at most
    /// `max_bytes` L2 bytes: as it is, or as many.
    ///
    /// # Errors
    /// Why the destination can't have it.
    pub(crate) fn parcels<'a>(
        &'a mut self,
        burst: &'a Burst,
        index: usize,
        taken: Offloads,
        max_bytes: u32,
    ) -> Result<Parcels<'a>, DropReason> {
        let header = burst.header(index);
        if header.wire_bytes > max_bytes {
            return Err(DropReason::TooLong);
        }
        let snapshot = burst.snapshot(index);
        let snapshot_bytes = burst.snapshot_bytes(index);
        let action = Action::between(header.needs, taken);
        let completes = matches!(action, Action::Complete | Action::SegmentAndComplete);
        if matches!(action, Action::Pass | Action::Complete) {
            self.head.copy_from_slice(snapshot);
            let fields = Fields::of(snapshot);
            let open = completes.then_some(Open {
                start: u32::from(fields.csum_start),
                at: u32::from(fields.csum_start) + u32::from(fields.csum_offset),
            });
            let keeps_hint = header.data_valid && Offloads::CSUM.within(taken);
            if completes || header.data_valid && !keeps_hint {
                net_header::clear(&mut self.head);
            }
            return Ok(Parcels {
                head: &mut self.head,
                head_bytes: snapshot_bytes as usize,
                body: burst.body(index),
                body_bytes: burst.total_bytes(index) - snapshot_bytes,
                count: 1,
                made: 0,
                open,
                cutter: None,
            });
        }
        self.cut(burst, index, completes)
    }

    #[cold]
    fn cut<'a>(
        &'a mut self,
        burst: &'a Burst,
        index: usize,
        completes: bool,
    ) -> Result<Parcels<'a>, DropReason> {
        let snapshot = burst.snapshot(index);
        let snapshot_bytes = burst.snapshot_bytes(index);
        let seen = &snapshot[HEADER_LEN..snapshot_bytes as usize];
        let fields = Fields::of(snapshot);
        // As when the frame's header was checked: the same bytes.
        let headers = Headers::parse(seen).ok_or(DropReason::BadHeader)?;
        let cutter = Cutter::new(seen, &headers, burst.l2_bytes(index), fields.gso_size)
            .ok_or(DropReason::OffloadUnsupported)?;
        let count = cutter.count();
        if count > MAX_PARCELS {
            return Err(DropReason::TooManySegments);
        }
        let head_bytes = HEADER_LEN + cutter.headers_bytes();
        self.head[..head_bytes].copy_from_slice(&snapshot[..head_bytes]);
        let (start, at) = cutter.checksum();
        let offset = |at: usize| u16::try_from(at).unwrap_or(u16::MAX);
        let open = if completes {
            net_header::clear(&mut self.head);
            Some(Open {
                start: offset(start).into(),
                at: offset(at).into(),
            })
        } else {
            let (start, at) = (offset(start), offset(at));
            net_header::ask_for_checksum(&mut self.head, start, at - start);
            None
        };
        Ok(Parcels {
            head: &mut self.head,
            head_bytes,
            body: burst.body_from(index, head_bytes),
            body_bytes: 0,
            count,
            made: 0,
            open,
            cutter: Some(cutter),
        })
    }
}

/// A checksum to complete: the sum from `start` to the frame's end goes to `at`; offsets into the
/// frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    start: u32,
    at: u32,
}

/// The frames that one frame becomes, one after the other.
#[derive(Debug)]
pub(crate) struct Parcels<'a> {
    head: &'a mut [u8; HEAD_LEN],
    head_bytes: usize,
    /// From the next parcel's body on.
    body: Pieces<'a>,
    body_bytes: u32,
    count: u32,
    made: u32,
    open: Option<Open>,
    cutter: Option<Cutter>,
}

impl<'a> Parcels<'a> {
    /// How many there are in all.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Whether checksums are completed.
    pub(crate) fn completes(&self) -> bool {
        self.open.is_some()
    }

    /// Bytes of the longest, with the virtio-net header.
    pub(crate) fn longest_bytes(&self) -> u32 {
        let head_bytes = u32::try_from(self.head_bytes).unwrap_or(u32::MAX);
        let body_bytes = match &self.cutter {
            Some(cutter) => cutter.next_bytes(),
            None => self.body_bytes,
        };
        head_bytes + body_bytes
    }

    /// The next.
    pub(crate) fn next(&mut self) -> Option<Parcel<'_, 'a>> {
        if self.made == self.count {
            return None;
        }
        self.made += 1;
        let head = &mut self.head[..self.head_bytes];
        let body = self.body;
        let body_bytes = match &mut self.cutter {
            Some(cutter) => {
                let bytes = cutter.next(&mut head[HEADER_LEN..]);
                self.body.advance(bytes);
                bytes
            }
            None => self.body_bytes,
        };
        Some(Parcel {
            head,
            body: body.run(body_bytes),
            open: self.open,
            field: [0; 2],
        })
    }
}

/// A frame as a destination takes it.
#[derive(Debug)]
pub(crate) struct Parcel<'h, 'a> {
    /// The virtio-net header and the frame's first bytes, private.
    head: &'h mut [u8],
    /// What follows, in pieces of the source.
    body: Run<'a>,
    open: Option<Open>,
    /// A checksum that is completed behind the head.
    field: [u8; 2],
}

impl Parcel<'_, '_> {
    /// Header and frame.
    #[inline]
    pub(crate) fn total_bytes(&self) -> u32 {
        u32::try_from(self.head.len()).unwrap_or(u32::MAX) + self.body.bytes()
    }

    /// L2 bytes without FCS.
    #[inline]
    pub(crate) fn l2_bytes(&self) -> u32 {
        self.total_bytes() - HEADER_BYTES
    }

    /// Writes it into `to`, which has room for it without the last `gap` bytes of the virtio-net
    /// header, spread over `buffers` chains. An open checksum is summed from what is copied.
    pub(crate) fn write_to(&mut self, gap: u32, buffers: u16, to: &[Segment]) {
        net_header::set_num_buffers(self.head, buffers);
        let (header, frame) = self.head.split_at(HEADER_LEN);
        let header = &header[..HEADER_LEN - gap as usize];
        let mut target = Pieces::new(Segment::EMPTY, to);
        for bytes in [header, frame] {
            let mut done = 0;
            while done < bytes.len() {
                let left = u32::try_from(bytes.len() - done).unwrap_or(u32::MAX);
                let part = target.take(left);
                if part.len == 0 {
                    return;
                }
                // SAFETY: the bytes are ours, the target is valid for `part.len`, no more than are
                // left of them, and guest memory is distinct from ours.
                unsafe {
                    copy(
                        part.ptr,
                        bytes.as_ptr().wrapping_add(done),
                        part.len as usize,
                    )
                };
                done += part.len as usize;
            }
        }
        let Some(open) = self.open else {
            return self.body.copy_to(&mut target);
        };
        let before = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let plain = open.start.saturating_sub(before);
        let sum = self
            .body
            .copy_and_sum(&mut target, open.sum_of(frame), plain);
        let header_bytes = HEADER_BYTES - gap;
        let mut field = Pieces::new(Segment::EMPTY, to);
        field.advance(header_bytes + open.at);
        for byte in sum.finish() {
            let target = field.take(1);
            if target.len > 0 {
                // SAFETY: the target is valid for its length.
                unsafe { target.ptr.write(byte) };
            }
        }
    }

    /// Gives its pieces to `piece`, private ones and the source's, in order; they are valid as long as
    /// the parcel. An open checksum is completed in private memory, by summing the source's pieces
    /// before.
    pub(crate) fn seal(&mut self, mut piece: impl FnMut(Segment)) {
        let Some(open) = self.open else {
            return self.each_piece(piece);
        };
        let mut sum = open.sum_of(&self.head[HEADER_LEN..]);
        let frame_bytes = u32::try_from(self.head.len() - HEADER_LEN).unwrap_or(u32::MAX);
        let mut plain = open.start.saturating_sub(frame_bytes);
        for part in self.body {
            let before = plain.min(part.len);
            plain -= before;
            // SAFETY: the piece is valid while the source queue's lock is held, as it is.
            unsafe { sum.add_piece(part.skip(before)) };
        }
        self.field = sum.finish();
        // Offsets of the field in header and frame.
        let at = (HEADER_BYTES + open.at) as usize;
        if let Some(place) = self.head.get_mut(at..at + 2) {
            place.copy_from_slice(&self.field);
            return self.each_piece(piece);
        }
        // Behind the head, or across its end: ours are passed for the source's two bytes.
        let field = Segment {
            ptr: self.field.as_mut_ptr(),
            len: 2,
        };
        let (from, to) = (HEADER_BYTES + open.at, HEADER_BYTES + open.at + 2);
        let mut at = 0;
        self.each_piece(|part| {
            let end = at + part.len;
            let before = from.clamp(at, end) - at;
            let after = to.clamp(at, end) - at;
            piece(Segment {
                len: before,
                ..part
            });
            if after > before {
                let done = at.max(from) - from;
                piece(Segment {
                    len: after - before,
                    ..field.skip(done)
                });
            }
            piece(part.skip(after));
            at = end;
        });
    }

    fn each_piece(&mut self, mut piece: impl FnMut(Segment)) {
        piece(Segment {
            ptr: self.head.as_mut_ptr(),
            len: u32::try_from(self.head.len()).unwrap_or(u32::MAX),
        });
        self.body.for_each(piece);
    }
}

impl Open {
    /// The sum of what lies in `frame`, a frame's first bytes.
    fn sum_of(self, frame: &[u8]) -> Sum {
        let mut sum = Sum::default();
        sum.add(frame.get(self.start as usize..).unwrap_or_default());
        sum
    }
}
