//! The receiving half of a queue: the receive ring, and the fill ring that feeds it chunks.

use std::io;
use std::os::fd::AsRawFd;

use ringway_bridge::{Headers, MAX_BURST};
use xsk_rs::socket::RxQueue;
use xsk_rs::umem::FillQueue;
use xsk_rs::umem::frame::FrameDesc;

use super::umem::Chunks;
use crate::burst::Burst;
use crate::memory::Segment;
use crate::offload::{Train, is_checksum_right};
use crate::ring::Entry;
use crate::wire::net_header::{self, HEADER_BYTES, HEADER_LEN};
use crate::wire::{Offloads, find_open_checksum};

/// Descriptors taken from the ring and not given back yet: a burst of frames in four chunks each,
/// twice what [`super::MAX_MTU`] needs.
const MAX_DESCS: usize = 4 * MAX_BURST;

/// Takes frames from the kernel and gives their chunks back. A frame that could not be delivered
/// yet stays in its chunks and is taken again.
#[derive(Debug)]
pub(crate) struct Receiver {
    ring: RxQueue,
    fill: FillQueue,
    chunks: Chunks,
    /// Taken and not given back: those in `start..end`.
    descs: Box<[FrameDesc; MAX_DESCS]>,
    start: usize,
    end: usize,
    /// For each frame of the last burst, where its descriptors end.
    ends: [usize; MAX_BURST],
    busy_poll: bool,
    /// Senders may leave checksums open: their interface is this kernel's.
    open_checksums: bool,
    /// TCP segments are joined.
    gro: bool,
    /// For each frame of the last burst, what was joined to it.
    merged: [Merged; MAX_BURST],
}

/// What became part of another frame, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Merged {
    pub(crate) frames: u64,
    /// Bytes of their headers.
    pub(crate) bytes: u64,
}

/// A frame in the ring.
struct Frame<'a> {
    /// What is in its first chunk.
    head: &'a [u8],
    /// Its whole length, 0 if the kernel told what can't be.
    bytes: u32,
    /// Where its descriptors end.
    end: usize,
}

/// What of the interface's frames is changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receiving {
    pub(super) busy_poll: bool,
    pub(super) open_checksums: bool,
    pub(super) gro: bool,
}

impl Receiver {
    /// Starts with all of `free` in the fill ring, which has room for them.
    pub(super) fn new(
        ring: RxQueue,
        mut fill: FillQueue,
        chunks: Chunks,
        free: &[FrameDesc],
        Receiving {
            busy_poll,
            open_checksums,
            gro,
        }: Receiving,
    ) -> Self {
        // SAFETY: these chunks are of the socket's UMEM and nobody else's.
        unsafe { fill.produce(free) };
        let receiver = Self {
            ring,
            fill,
            chunks,
            descs: Box::new([FrameDesc::default(); MAX_DESCS]),
            start: 0,
            end: 0,
            ends: [0; MAX_BURST],
            busy_poll,
            open_checksums,
            gro,
            merged: [Merged::default(); MAX_BURST],
        };
        receiver.wake_if_asked();
        receiver
    }

    /// Puts up to `limit` frames into the burst, each with a virtio-net header: one that asks for
    /// nothing, but where the sender left a checksum open, or where TCP segments are joined to a
    /// frame that its destination will take. `takes` tells what that takes.
    pub(crate) fn gather(
        &mut self,
        limit: usize,
        burst: &mut Burst,
        takes: impl Fn(&[u8]) -> Offloads,
    ) {
        if self.end - self.start < limit {
            self.take_more(if self.gro { MAX_DESCS } else { 2 * limit });
        }
        let mut at = self.start;
        for index in 0..limit {
            let Some(frame) = self.frame(at) else { break };
            let Some(mark) = burst.begin() else { break };
            let headers = if self.gro || self.open_checksums {
                Headers::parse(frame.head)
            } else {
                None
            };
            let joined = headers
                .filter(|_| self.gro)
                .and_then(|headers| self.join(at, &frame, &headers, &takes));
            let (end, bytes, merged) = match joined {
                Some((train, end)) => {
                    let bytes = self.push_train(&train, at..end, burst, mark);
                    (end, bytes, Merged::of(&train))
                }
                None => {
                    let bytes = self.push_frame(&frame, headers.as_ref(), at, burst, mark);
                    (frame.end, bytes, Merged::default())
                }
            };
            burst.add(mark, Entry::single(0), bytes);
            self.ends[index] = end;
            self.merged[index] = merged;
            at = end;
        }
    }

    /// The frame whose descriptors begin at `at`, if all of them are there.
    #[inline]
    fn frame(&self, at: usize) -> Option<Frame<'_>> {
        let waiting = &self.descs[at..self.end];
        let last = waiting.iter().position(|desc| !desc.has_more_frames())?;
        let mut pieces = waiting[..=last]
            .iter()
            .map(|desc| self.chunks.received(desc));
        let head = pieces.next().flatten().unwrap_or(Segment::EMPTY);
        let bytes = pieces.try_fold(head.len, |sum, piece| Some(sum + piece?.len));
        Some(Frame {
            // SAFETY: the piece is valid for its length, and the kernel does not write to it before
            // it is given back.
            head: unsafe { bytes_of(head) },
            bytes: bytes.unwrap_or(0),
            end: at + last + 1,
        })
    }

    /// Pushes a frame as it is. Returns its length with its header; 0 if it is not one, which the
    /// burst rejects.
    #[inline]
    fn push_frame(
        &self,
        frame: &Frame<'_>,
        headers: Option<&Headers>,
        at: usize,
        burst: &mut Burst,
        mark: usize,
    ) -> u32 {
        let descs = &self.descs[at..frame.end];
        let Some(front) = self.chunks.front(&descs[0], HEADER_LEN) else {
            return 0;
        };
        let open = headers
            .filter(|_| self.open_checksums)
            .and_then(|headers| find_open_checksum(frame.head, headers, frame.bytes));
        // SAFETY: these bytes are in front of the frame in its chunk, which is ours since the kernel
        // gave it.
        let header = unsafe { bytes_of_mut(front) };
        match open {
            Some(open) => net_header::ask_for_checksum(header, open.start, open.offset),
            None => header.fill(0),
        }
        for (piece, desc) in descs.iter().enumerate() {
            let segment = match self.chunks.received(desc) {
                Some(segment) if piece == 0 => Segment {
                    ptr: front.ptr,
                    len: segment.len + HEADER_BYTES,
                },
                Some(segment) => segment,
                None => Segment::EMPTY,
            };
            if segment.len == 0 || !burst.push(mark, segment) {
                burst.abandon(mark);
                return 0;
            }
        }
        frame.bytes + HEADER_BYTES
    }

    /// The train that the frame at `at` is the first of, and where its descriptors end.
    fn join<'a>(
        &'a self,
        at: usize,
        first: &Frame<'a>,
        headers: &Headers,
        takes: impl Fn(&[u8]) -> Offloads,
    ) -> Option<(Train<'a>, usize)> {
        let mut train = Train::begin(first.head, headers, first.bytes)?;
        let mut end = first.end;
        while let Some(next) = self.frame(end) {
            if !train.takes(next.head, next.bytes) {
                break;
            }
            if train.segments() == 1 {
                let is_wanted = train.needs().within(takes(first.head));
                let bytes = HEADER_LEN + train.headers_bytes();
                let has_room = self.chunks.front(&self.descs[at], bytes).is_some();
                if !is_wanted || !has_room || !self.is_right(first, at, headers) {
                    return None;
                }
            }
            if !self.is_right(&next, end, headers) {
                break;
            }
            train.add(next.head, next.bytes);
            end = next.end;
        }
        (train.segments() > 1).then_some((train, end))
    }

    /// Whether a frame's TCP checksum is right, or open.
    fn is_right(&self, frame: &Frame<'_>, at: usize, headers: &Headers) -> bool {
        if self.open_checksums && find_open_checksum(frame.head, headers, frame.bytes).is_some() {
            return true;
        }
        let pieces = self.descs[at..frame.end]
            .iter()
            .filter_map(|desc| self.chunks.received(desc))
            // SAFETY: as for the frame's head.
            .map(|piece| unsafe { bytes_of(piece) });
        is_checksum_right(frame.head, headers, frame.bytes, pieces)
    }

    /// Pushes a train's headers, which are written in front of its first frame, and its payload.
    /// Returns its length with its header.
    fn push_train(
        &self,
        train: &Train<'_>,
        descs: std::ops::Range<usize>,
        burst: &mut Burst,
        mark: usize,
    ) -> u32 {
        let headers_bytes = train.headers_bytes();
        let descs = &self.descs[descs];
        let Some(front) = self.chunks.front(&descs[0], HEADER_LEN + headers_bytes) else {
            return 0;
        };
        // SAFETY: these bytes are in front of the frame in its chunk, which is ours since the kernel
        // gave it.
        train.write_headers(unsafe { bytes_of_mut(front) });
        let mut bytes = front.len;
        let mut is_whole = burst.push(mark, front);
        let mut begins = true;
        for desc in descs {
            let piece = self.chunks.received(desc).unwrap_or(Segment::EMPTY);
            let skipped = if begins { headers_bytes } else { 0 };
            let piece = piece.skip(u32::try_from(skipped).unwrap_or(u32::MAX));
            if piece.len > 0 {
                is_whole &= burst.push(mark, piece);
                bytes += piece.len;
            }
            begins = !desc.has_more_frames();
        }
        if !is_whole {
            burst.abandon(mark);
            return 0;
        }
        bytes
    }

    /// Gives the chunks of the last burst's first `count` frames back to the kernel; the others are
    /// gathered again. Returns what was merged among them.
    pub(crate) fn give_back(&mut self, count: usize) -> Merged {
        let Some(last) = count.checked_sub(1) else {
            return Merged::default();
        };
        let free = &self.descs[self.start..self.ends[last]];
        // SAFETY: the kernel gave these chunks by the receive ring, once. The fill ring has room for
        // all there are.
        unsafe { self.fill.produce(free) };
        self.start = self.ends[last];
        self.wake_if_asked();
        let merged = self.merged[..count].iter();
        merged.fold(Merged::default(), |sum, merged| Merged {
            frames: sum.frames + merged.frames,
            bytes: sum.bytes + merged.bytes,
        })
    }

    /// Whether the ring has nothing more and the kernel knows that it may fill it: the next frame
    /// then is an event of the socket's fd.
    pub(crate) fn arm(&mut self) -> bool {
        self.wake_if_asked();
        self.end == self.start && self.ring.nb_avail_exact() == 0
    }

    /// Chunks that the kernel can receive into, and frames' chunks that wait for the worker.
    pub(super) fn levels(&mut self, size: u32) -> (u32, u32) {
        let kept = u32::try_from(self.end - self.start).unwrap_or(0);
        let free = self.fill.nb_free_exact();
        (
            size.saturating_sub(free),
            self.ring.nb_avail_exact().saturating_add(kept),
        )
    }

    pub(super) fn statistics(&self) -> io::Result<xsk_rs::socket::XdpStatistics> {
        self.ring.fd().xdp_statistics()
    }

    fn take_more(&mut self, limit: usize) {
        self.descs.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let count = self.consume(limit);
        if count == 0 && self.busy_poll {
            // The kernel polls the NIC in this call.
            self.wake();
            self.consume(limit);
        }
    }

    fn consume(&mut self, limit: usize) -> usize {
        let to = (self.end + limit).min(MAX_DESCS);
        // SAFETY: the ring is that of the UMEM whose chunks these are.
        let count = unsafe { self.ring.consume(&mut self.descs[self.end..to]) };
        self.end += count;
        count
    }

    fn wake_if_asked(&self) {
        if self.fill.needs_wakeup() {
            self.wake();
        }
    }

    fn wake(&self) {
        let fd = self.ring.fd().as_raw_fd();
        // SAFETY: a buffer of no bytes may be anywhere. What goes wrong shows when transmitting.
        let _ = unsafe { libc::recv(fd, std::ptr::null_mut(), 0, libc::MSG_DONTWAIT) };
    }
}

impl Merged {
    fn of(train: &Train<'_>) -> Self {
        let frames = u64::from(train.segments()) - 1;
        Self {
            frames,
            bytes: frames * train.headers_bytes() as u64,
        }
    }
}

/// The bytes of a piece.
///
/// # Safety
/// It is valid for its length, and nobody writes to it during `'a`.
unsafe fn bytes_of<'a>(piece: Segment) -> &'a [u8] {
    if piece.len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(piece.ptr, piece.len as usize) }
}

/// The bytes of a piece, to write to.
///
/// # Safety
/// It is valid for its length, and nobody else uses it during `'a`.
unsafe fn bytes_of_mut<'a>(piece: Segment) -> &'a mut [u8] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(piece.ptr, piece.len as usize) }
}
