//! The receiving half of a queue: the receive ring, and the fill ring that feeds it chunks.

use std::io;
use std::os::fd::AsRawFd;

use ringway_bridge::MAX_BURST;
use xsk_rs::socket::RxQueue;
use xsk_rs::umem::FillQueue;
use xsk_rs::umem::frame::FrameDesc;

use super::umem::Chunks;
use crate::burst::Burst;
use crate::memory::Segment;
use crate::net_header::{self, HEADER_BYTES, HEADER_LEN};
use crate::offload::find_open_checksum;
use crate::ring::Entry;

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
}

impl Receiver {
    /// Starts with all of `free` in the fill ring, which has room for them.
    pub(super) fn new(
        ring: RxQueue,
        mut fill: FillQueue,
        chunks: Chunks,
        free: &[FrameDesc],
        (busy_poll, open_checksums): (bool, bool),
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
        };
        receiver.wake_if_asked();
        receiver
    }

    /// Puts up to `limit` frames into the burst, each with a virtio-net header that asks for nothing,
    /// but where the sender left a checksum open.
    pub(crate) fn gather(&mut self, limit: usize, burst: &mut Burst) {
        if self.end - self.start < limit {
            self.take_more(2 * limit);
        }
        let mut at = self.start;
        for end in self.ends.iter_mut().take(limit) {
            let waiting = &self.descs[at..self.end];
            let Some(last) = waiting.iter().position(|desc| !desc.has_more_frames()) else {
                break;
            };
            let Some(mark) = burst.begin() else { break };
            let mut bytes = 0;
            let mut first = None;
            let mut is_whole = true;
            for (piece, desc) in waiting[..=last].iter().enumerate() {
                let segment = if piece == 0 {
                    self.chunks.with_header(desc)
                } else {
                    self.chunks.received(desc)
                };
                match segment {
                    Some(segment) => {
                        first = first.or(Some(segment));
                        is_whole &= burst.push(mark, segment);
                        bytes += segment.len;
                    }
                    None => is_whole = false,
                }
            }
            if !is_whole {
                // Nothing at all is a frame that the burst rejects.
                burst.abandon(mark);
                bytes = 0;
            } else if let (true, Some(first)) = (self.open_checksums, first) {
                tell_open_checksum(first, bytes);
            }
            burst.add(mark, Entry::single(0), bytes);
            at += last + 1;
            *end = at;
        }
    }

    /// Gives the chunks of the last burst's first `count` frames back to the kernel; the others are
    /// gathered again.
    pub(crate) fn give_back(&mut self, count: usize) {
        let Some(last) = count.checked_sub(1) else {
            return;
        };
        let free = &self.descs[self.start..self.ends[last]];
        // SAFETY: the kernel gave these chunks by the receive ring, once. The fill ring has room for
        // all there are.
        unsafe { self.fill.produce(free) };
        self.start = self.ends[last];
        self.wake_if_asked();
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

/// Makes the header of a frame of `bytes` in all ask for its checksum, if that was left open.
/// `first` begins with the header.
fn tell_open_checksum(first: Segment, bytes: u32) {
    // SAFETY: the piece is valid for its length, and its chunk is ours until it is given back.
    let bytes_there = unsafe { std::slice::from_raw_parts_mut(first.ptr, first.len as usize) };
    let (header, frame) = bytes_there.split_at_mut(HEADER_LEN);
    if let Some(open) = find_open_checksum(frame, bytes - HEADER_BYTES) {
        net_header::ask_for_checksum(header, open.start, open.offset);
    }
}
