//! The receiving half of a queue: the receive ring, and the fill ring that feeds it chunks.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::MutexGuard;

use ringway_bridge::{Headers, MAX_BURST};
use xsk_rs::socket;
use xsk_rs::umem::FillQueue;
use xsk_rs::umem::frame::FrameDesc;

use super::umem::Chunks;
use super::{AfXdpPort, AfXdpQueue};
use crate::burst::{Burst, Entry, MAX_SNAPSHOT_BYTES};
use crate::memory::GuestSlice;
use crate::offload::{GroFrame, is_checksum_right};
use crate::port::{Gathered, QueueCounters, RxQueue, Unavailable};
use crate::wire::net_header::{self, HEADER_BYTES, HEADER_LEN};
use crate::wire::{Offloads, find_open_checksum};

/// Descriptors taken from the ring and not given back yet: a burst of frames in four chunks each,
/// twice what [`super::MAX_MTU`] needs.
const MAX_DESCS: usize = 4 * MAX_BURST;

/// Takes frames from the kernel and gives their chunks back. A frame that could not be delivered
/// yet stays in its chunks and is taken again.
#[derive(Debug)]
pub(super) struct Receiver {
    ring: socket::RxQueue,
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
struct Merged {
    frames: u64,
    /// Bytes of their headers.
    bytes: u64,
}

/// A frame in the ring.
struct NicFrame<'a> {
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
        ring: socket::RxQueue,
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
    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        takes: impl Fn(&[u8]) -> Offloads,
    ) {
        if self.end - self.start < limit {
            self.take_more(if self.gro { MAX_DESCS } else { 2 * limit });
        }
        let waiting = Waiting {
            chunks: &self.chunks,
            descs: &self.descs[..self.end],
            open_checksums: self.open_checksums,
        };
        let mut at = self.start;
        for index in 0..limit {
            let Some(frame) = waiting.frame(at) else {
                break;
            };
            let Some(mark) = burst.begin_chain() else {
                break;
            };
            let headers = if self.gro || self.open_checksums {
                Headers::parse(frame.head)
            } else {
                None
            };
            let joined = headers
                .filter(|_| self.gro)
                .and_then(|headers| waiting.join(at, &frame, &headers, &takes));
            let (end, bytes, merged) = match joined {
                Some((gro, end)) => {
                    let bytes = waiting.push_gro(&gro, at..end, burst, mark);
                    (end, bytes, Merged::of(&gro))
                }
                None => {
                    let bytes = waiting.push_frame(&frame, headers.as_ref(), at, burst, mark);
                    (frame.end, bytes, Merged::default())
                }
            };
            burst.add(mark, Entry::single(0), bytes);
            self.ends[index] = end;
            self.merged[index] = merged;
            at = end;
        }
    }

    /// Gives the chunks of the last burst's first `count` frames back to the kernel; the others are
    /// gathered again. Returns what was merged among them.
    fn give_back(&mut self, count: usize) -> Merged {
        let Some(last) = count.checked_sub(1) else {
            return Merged::default();
        };
        let free = &self.descs[self.start..self.ends[last]];
        // SAFETY: the kernel gave these chunks by the receive ring, once. The fill ring has room
        // for all there are.
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
    fn arm(&mut self) -> bool {
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

    pub(super) fn statistics(&self) -> io::Result<socket::XdpStatistics> {
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

/// Descriptors that were taken from the ring, and how what they lead to is handed on.
struct Waiting<'m> {
    chunks: &'m Chunks,
    descs: &'m [FrameDesc],
    open_checksums: bool,
}

impl<'m> Waiting<'m> {
    /// The frame whose descriptors begin at `at`, if all of them are there.
    #[inline]
    fn frame(&self, at: usize) -> Option<NicFrame<'m>> {
        let waiting = self.descs.get(at..)?;
        let last = waiting.iter().position(|desc| !desc.has_more_frames())?;
        let mut pieces = waiting[..=last]
            .iter()
            .map(|desc| self.chunks.received(desc));
        let bytes = pieces.try_fold(0, |sum, piece| Some(sum + piece?.len()));
        Some(NicFrame {
            head: self.chunks.bytes(&waiting[0]).unwrap_or_default(),
            bytes: bytes.unwrap_or(0),
            end: at + last + 1,
        })
    }

    /// Pushes a frame as it is. Returns its length with its header; 0 if it is not one, which the
    /// burst rejects.
    #[inline]
    fn push_frame(
        &self,
        frame: &NicFrame<'_>,
        headers: Option<&Headers>,
        at: usize,
        burst: &mut Burst<'m>,
        mark: usize,
    ) -> u32 {
        let descs = &self.descs[at..frame.end];
        let Some(front) = self.chunks.front(&descs[0], HEADER_LEN) else {
            return 0;
        };
        let open = headers
            .filter(|_| self.open_checksums)
            .and_then(|headers| find_open_checksum(frame.head, headers, frame.bytes));
        let mut header = [0; HEADER_LEN];
        if let Some(open) = open {
            net_header::set_needs_csum(&mut header, open.start, open.offset);
        }
        front.write(&header);
        for (piece, desc) in descs.iter().enumerate() {
            let lead = if piece == 0 { HEADER_LEN } else { 0 };
            let slice = self.chunks.received_from(desc, lead);
            let slice = slice.unwrap_or(GuestSlice::EMPTY);
            if slice.len() == 0 || !burst.push(mark, slice) {
                burst.abandon(mark);
                return 0;
            }
        }
        frame.bytes + HEADER_BYTES
    }

    /// The frame that the one at `at` and those behind it become, and where its descriptors end.
    fn join(
        &self,
        at: usize,
        first: &NicFrame<'m>,
        headers: &Headers,
        takes: impl Fn(&[u8]) -> Offloads,
    ) -> Option<(GroFrame<'m>, usize)> {
        let mut gro = GroFrame::begin(first.head, headers, first.bytes)?;
        let mut end = first.end;
        while let Some(next) = self.frame(end) {
            if !gro.takes(next.head, next.bytes) {
                break;
            }
            if gro.segments() == 1 {
                let is_wanted = gro.needs().within(takes(first.head));
                let bytes = HEADER_LEN + gro.headers_bytes();
                let has_room = self.chunks.front(&self.descs[at], bytes).is_some();
                if !is_wanted || !has_room || !self.is_right(first, at, headers) {
                    return None;
                }
            }
            if !self.is_right(&next, end, headers) {
                break;
            }
            gro.add(next.head, next.bytes);
            end = next.end;
        }
        (gro.segments() > 1).then_some((gro, end))
    }

    /// Whether a frame's TCP checksum is right, or open.
    fn is_right(&self, frame: &NicFrame<'_>, at: usize, headers: &Headers) -> bool {
        if self.open_checksums && find_open_checksum(frame.head, headers, frame.bytes).is_some() {
            return true;
        }
        let pieces = self.descs[at..frame.end]
            .iter()
            .filter_map(|desc| self.chunks.bytes(desc));
        is_checksum_right(frame.head, headers, frame.bytes, pieces)
    }

    /// Pushes the headers of merged frames, which are written in front of the first of them, and
    /// the payload of all. Returns its length with its header.
    fn push_gro(
        &self,
        gro: &GroFrame<'_>,
        descs: std::ops::Range<usize>,
        burst: &mut Burst<'m>,
        mark: usize,
    ) -> u32 {
        let headers_bytes = gro.headers_bytes();
        let descs = &self.descs[descs];
        let front = self.chunks.front(&descs[0], HEADER_LEN + headers_bytes);
        let Some(front) = front.filter(|front| front.len() <= MAX_SNAPSHOT_BYTES) else {
            return 0;
        };
        let mut headers = [0; MAX_SNAPSHOT_BYTES as usize];
        let headers = &mut headers[..front.len() as usize];
        gro.write_headers(headers);
        front.write(headers);
        let mut bytes = front.len();
        let mut is_whole = burst.push(mark, front);
        let mut begins = true;
        for desc in descs {
            let piece = self.chunks.received(desc).unwrap_or(GuestSlice::EMPTY);
            let skipped = if begins { headers_bytes } else { 0 };
            let piece = piece.skip(u32::try_from(skipped).unwrap_or(u32::MAX));
            if piece.len() > 0 {
                is_whole &= burst.push(mark, piece);
                bytes += piece.len();
            }
            begins = !desc.has_more_frames();
        }
        if !is_whole {
            burst.abandon(mark);
            return 0;
        }
        bytes
    }
}

impl Merged {
    fn of(gro: &GroFrame<'_>) -> Self {
        let frames = u64::from(gro.segments()) - 1;
        Self {
            frames,
            bytes: frames * gro.headers_bytes() as u64,
        }
    }
}

/// The receiving half of a queue, in a worker's hands for one burst.
#[derive(Debug)]
pub(crate) struct AfXdpRx<'a> {
    queue: &'a AfXdpQueue,
    receiver: MutexGuard<'a, Receiver>,
}

impl AfXdpPort {
    /// The receiving half of a queue, for one burst.
    ///
    /// # Errors
    /// It is in other hands.
    #[inline]
    pub(crate) fn rx(&self, pair: u16) -> Result<AfXdpRx<'_>, Unavailable> {
        let queue = self.queue(pair);
        let receiver = queue.receiver.try_lock().ok_or(Unavailable::Busy)?;
        Ok(AfXdpRx { queue, receiver })
    }
}

impl RxQueue for AfXdpRx<'_> {
    type Completion<'m>
        = ()
    where
        Self: 'm;

    fn counters(&self) -> &QueueCounters {
        &self.queue.rx
    }

    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        takes: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<()> {
        self.receiver.gather(limit, burst, takes);
        if burst.len() == 0 {
            return Gathered::Nothing;
        }
        Gathered::Frames {
            header_bytes: HEADER_BYTES,
            // The headers are the receiver's own.
            allowed: Offloads::ALL,
            is_enabled: true,
            completion: (),
        }
    }

    fn finish(&mut self, taken: usize, _kept: usize) {
        let merged = self.receiver.give_back(taken);
        if merged != Merged::default() {
            self.queue.rx.frames.add_owned(merged.frames);
            self.queue.rx.bytes.add_owned(merged.bytes);
            self.queue.merged.add_owned(merged.frames);
        }
    }

    fn arm(&mut self) -> bool {
        self.receiver.arm()
    }
}
