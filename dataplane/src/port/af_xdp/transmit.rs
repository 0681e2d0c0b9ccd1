//! The transmitting half of a queue: the transmit ring, and the completion ring that gives its
//! chunks back.

use std::io;
use std::os::fd::AsRawFd;

use ringway_bridge::{DropReason, FrameSet};
use xsk_rs::socket::TxQueue as TxRing;
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::umem::{CompQueue, Umem};

use super::AfXdpPort;
use super::interface::set_option;
use super::umem::Chunks;
use crate::burst::{Buffers, Burst};
use crate::memory::{HEAD_BYTES, Kept};
use crate::offload::OutFrame;
use crate::port::max_l2_bytes;
use crate::port::queue::{Job, Limits, Outcome, Refusal, Tools, TxQueue, deliver};
use crate::wire::Offloads;
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};

/// Completions taken at a time.
const BATCH: usize = 64;

/// `XDP_PKT_CONTD` (linux/if_xdp.h): the frame goes on in the next descriptor.
const CONTINUED: u32 = 1;

/// `XDP_MAX_TX_SKB_BUDGET` (linux/if_xdp.h, since 6.17): how much one call sends in copy mode.
const MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// Descriptors that one call sends in copy mode, unless the kernel can be told otherwise.
const KERNEL_BATCH: u32 = 32;

/// How an attempt to have frames sent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// The kernel has them all, or will look for them itself.
    All,
    /// It has no room for the moment: it has to be told again.
    Later,
    /// The interface is down or gone.
    Failed,
}

/// Gives frames to the kernel.
#[derive(Debug)]
pub(crate) struct Transmitter {
    ring: TxRing,
    completions: CompQueue,
    umem: Umem,
    chunks: Chunks,
    /// Bytes of a frame that one chunk holds.
    room_bytes: u32,
    /// Entries of the ring, and chunks.
    size: u32,
    free: Vec<FrameDesc>,
    /// Filled and not submitted yet.
    batch: Vec<FrameDesc>,
    /// The chunks of one frame.
    room: Kept<Buffers>,
    /// The driver sends from the ring by itself, once woken.
    is_zero_copy: bool,
    /// The last attempt to send failed.
    is_failing: bool,
}

impl Transmitter {
    pub(super) fn new(
        ring: TxRing,
        completions: CompQueue,
        (umem, chunks, room_bytes): (Umem, Chunks, u32),
        free: Vec<FrameDesc>,
        is_zero_copy: bool,
    ) -> Self {
        let size = u32::try_from(free.len()).unwrap_or(u32::MAX);
        // One call is to send a burst, whatever its descriptors. Older kernels don't know it.
        let _ = set_option(ring.fd(), libc::SOL_XDP, MAX_TX_SKB_BUDGET, &size);
        Self {
            ring,
            completions,
            umem,
            chunks,
            room_bytes,
            size,
            batch: Vec::with_capacity(free.len()),
            room: Kept::new(free.len()),
            free,
            is_zero_copy,
            is_failing: false,
        }
    }

    /// Prepares for a burst; false while the interface does not send.
    pub(crate) fn begin(&mut self) -> bool {
        self.reclaim();
        !self.is_failing || self.send() != Sent::Failed
    }

    /// Adds a chunk with so many bytes of a frame to those to be submitted.
    #[inline]
    fn add(umem: &Umem, batch: &mut Vec<FrameDesc>, mut desc: FrameDesc, bytes: u32, more: bool) {
        desc.set_options(if more { CONTINUED } else { 0 });
        // SAFETY: the chunk is ours. The view is used for the length alone.
        let mut view = unsafe { umem.data_mut(&mut desc) };
        view.cursor().set_pos(bytes as usize);
        batch.push(desc);
    }

    /// Chunks that a frame takes.
    fn chunks_of(&self, l2_bytes: u32) -> u32 {
        l2_bytes.div_ceil(self.room_bytes).max(1)
    }

    /// Has the kernel send the frames that were put, by one call if it wants one.
    pub(crate) fn submit(&mut self) -> Sent {
        // SAFETY: these chunks are of the ring's UMEM, were free and are filled. There are as many
        // entries as chunks, so there is room.
        unsafe { self.ring.produce(&self.batch) };
        self.batch.clear();
        self.send()
    }

    /// Has the kernel send what is in the ring.
    pub(crate) fn send(&mut self) -> Sent {
        let sent = self.try_send();
        self.is_failing = sent == Sent::Failed;
        sent
    }

    fn try_send(&mut self) -> Sent {
        let mut waiting = self.waiting();
        // Each further call sends a batch at least, or is the last.
        for _ in 0..=waiting / KERNEL_BATCH {
            if waiting == 0 || self.is_zero_copy && !self.ring.needs_wakeup() {
                return Sent::All;
            }
            let fd = self.ring.fd().as_raw_fd();
            // SAFETY: a buffer of no bytes may be anywhere.
            let result = unsafe { libc::send(fd, std::ptr::null(), 0, libc::MSG_DONTWAIT) };
            if result < 0 {
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EAGAIN) => {}
                    Some(libc::EBUSY | libc::ENOBUFS | libc::EINTR) => return Sent::Later,
                    _ => return Sent::Failed,
                }
            } else if self.is_zero_copy {
                return Sent::All;
            }
            let left = self.waiting();
            if left == waiting {
                return Sent::Later;
            }
            waiting = left;
        }
        if waiting == 0 { Sent::All } else { Sent::Later }
    }

    /// Descriptors in the ring that the kernel has not taken.
    fn waiting(&mut self) -> u32 {
        self.size.saturating_sub(self.ring.nb_free_exact())
    }

    /// Descriptors that the kernel has not taken, and chunks that it has not given back.
    pub(super) fn levels(&mut self) -> (u32, u32) {
        self.reclaim();
        let free = u32::try_from(self.free.len()).unwrap_or(0);
        (self.waiting(), self.size.saturating_sub(free))
    }

    pub(super) fn statistics(&self) -> io::Result<xsk_rs::socket::XdpStatistics> {
        self.ring.fd().xdp_statistics()
    }

    /// Takes the chunks back whose frames are sent.
    fn reclaim(&mut self) {
        let mut done = [FrameDesc::default(); BATCH];
        loop {
            // SAFETY: the ring is that of the UMEM whose chunks these are.
            let count = unsafe { self.completions.consume(&mut done) };
            self.free.extend_from_slice(&done[..count]);
            if count < BATCH {
                return;
            }
        }
    }
}

impl AfXdpPort {
    /// Delivers frames to one of its queues, with one call to the kernel.
    pub(crate) fn deliver(&self, job: &Job<'_, '_>, tools: &mut Tools) -> Outcome {
        let pair = self.transmit_queue(job.source_queue, job.owned);
        let queue = self.queue(pair);
        let Some(mut transmitter) = tools.lock(&queue.tx, || queue.try_transmitter()) else {
            return Outcome::refused(job, DropReason::RingBusy);
        };
        if !transmitter.begin() {
            return tools.drop_all(job, DropReason::HostError);
        }
        let mut tx = NicTx {
            max_bytes: max_l2_bytes(Some(self.mtu())),
            transmitter: &mut transmitter,
        };
        tools.by_calls += job.frames.len();
        let mut outcome = deliver(&mut tx, job, &mut tools.gso, &mut tools.account);
        // Also if nothing was put: what fills the ring may be what the kernel had no room for.
        if transmitter.submit() == Sent::Later {
            outcome.unsent = Some(pair);
        }
        queue.tx.count_owned(&outcome, &tools.account);
        outcome
    }

    /// Has the kernel send what it had no room for before; true if some is left.
    pub(crate) fn send_again(&self, pair: u16) -> bool {
        pair < self.pairs()
            && self
                .queue(pair)
                .try_transmitter()
                .is_none_or(|mut transmitter| transmitter.send() == Sent::Later)
    }
}

/// The transmit ring of a queue. The wire has no virtio-net header to leave anything undone in.
struct NicTx<'a> {
    transmitter: &'a mut Transmitter,
    max_bytes: u32,
}

impl TxQueue for NicTx<'_> {
    fn limits(&self) -> Limits {
        Limits {
            offloads: Offloads::NONE,
            max_bytes: self.max_bytes,
        }
    }

    /// Copies frames into a free chunk each.
    #[inline(always)]
    fn put_plain(&mut self, burst: &Burst<'_>, frames: FrameSet) -> (FrameSet, u64) {
        let plain = frames.leading(burst.plain());
        let Transmitter {
            umem,
            chunks,
            room_bytes,
            free,
            batch,
            ..
        } = self.transmitter;
        let limit = self.max_bytes.min(*room_bytes);
        let (mut left, mut bytes) = (plain, 0);
        while let Some(index) = left.first() {
            let (head, frame) = (burst.head(index), burst.frames()[index].buffer);
            let l2_bytes = frame.len() - HEADER_BYTES;
            if l2_bytes > limit {
                break;
            }
            let Some(desc) = free.pop() else { break };
            let to = chunks.room(&desc, l2_bytes);
            let head = &head[HEADER_LEN..];
            to.write(head);
            to.skip(HEAD_BYTES - HEADER_BYTES)
                .copy_from(frame.skip(HEAD_BYTES));
            Transmitter::add(umem, batch, desc, l2_bytes, false);
            bytes += u64::from(l2_bytes);
            left = left.without_first();
        }
        (plain - left, bytes)
    }

    fn should_wait_for(&mut self, count: u32, total_bytes: u32) -> Result<bool, Refusal> {
        let transmitter = &self.transmitter;
        let chunks = transmitter.chunks_of(total_bytes - HEADER_BYTES);
        let needed = u64::from(count) * u64::from(chunks);
        let free = transmitter.free.len() as u64;
        Ok(needed > free && needed <= u64::from(transmitter.size / 2))
    }

    /// Copies a frame into as many free chunks as it takes.
    fn put(&mut self, frame: &mut OutFrame<'_>) -> Result<(), Refusal> {
        let l2_bytes = frame.l2_bytes();
        let needed = self.transmitter.chunks_of(l2_bytes) as usize;
        let Transmitter {
            umem,
            chunks,
            room_bytes,
            free,
            batch,
            room,
            ..
        } = self.transmitter;
        let Some(kept) = free.len().checked_sub(needed) else {
            return Err(Refusal::Full);
        };
        let mut room = room.list();
        let mut left = l2_bytes;
        for desc in free.drain(kept..).rev() {
            let bytes = left.min(*room_bytes);
            left -= bytes;
            room.push(chunks.room(&desc, bytes));
            Transmitter::add(umem, batch, desc, bytes, left > 0);
        }
        frame.write_to(HEADER_BYTES, 1, &room);
        Ok(())
    }
}
