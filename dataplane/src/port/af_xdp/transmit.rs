//! The transmitting half of a queue: the transmit ring, and the completion ring that gives its
//! chunks back.

use std::io;
use std::os::fd::AsRawFd;

use xsk_rs::socket::TxQueue;
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::umem::{CompQueue, Umem};

use super::interface::set_option;
use super::umem::Chunks;
use crate::burst::{Burst, PLAIN_BYTES};
use crate::copy::copy;
use crate::isa::for_this_cpu;
use crate::memory::Segment;
use crate::offload::Parcel;
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};

/// Completions taken at a time.
const BATCH: usize = 64;

/// `XDP_PKT_CONTD` (linux/if_xdp.h): the frame goes on in the next descriptor.
const CONTINUED: u32 = 1;

/// `XDP_MAX_TX_SKB_BUDGET` (linux/if_xdp.h, since 6.17): how much one call sends in copy mode.
const MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// Descriptors that one call sends in copy mode, unless the kernel can be told otherwise.
const KERNEL_BATCH: u32 = 32;

/// Where a frame goes.
#[derive(Debug)]
struct Room(Vec<Segment>);

// SAFETY: the segments are used only within one call of `put`.
unsafe impl Send for Room {}

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
    ring: TxQueue,
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
    room: Room,
    /// The driver sends from the ring by itself, once woken.
    is_zero_copy: bool,
    /// The last attempt to send failed.
    is_failing: bool,
}

impl Transmitter {
    pub(super) fn new(
        ring: TxQueue,
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
            room: Room(Vec::with_capacity(free.len())),
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

    /// Whether `count` frames of up to `l2_bytes` had better wait for more free chunks, which there
    /// will be.
    pub(crate) fn should_wait_for(&self, count: u32, l2_bytes: u32) -> bool {
        let needed = u64::from(count) * u64::from(self.chunks_of(l2_bytes));
        needed > self.free.len() as u64 && needed <= u64::from(self.size / 2)
    }

    /// Copies the frames of `mask` into free chunks, in order, for as long as they are of the common
    /// kind: plain ones of at most `max_bytes` L2 bytes that one chunk holds. Returns those that were
    /// and their L2 bytes; the others are left to [`Transmitter::put`].
    pub(crate) fn put_plain(&mut self, burst: &Burst, mask: u64, max_bytes: u32) -> (u64, u64) {
        put_plain(self, burst, mask, max_bytes)
    }

    #[inline(always)]
    fn put_plain_frames(&mut self, burst: &Burst, mask: u64, max_bytes: u32) -> (u64, u64) {
        // In order: up to the first that is not plain.
        let odd = mask & !burst.plain();
        let plain = mask & (odd & odd.wrapping_neg()).wrapping_sub(1);
        let limit = max_bytes.min(self.room_bytes);
        let (mut left, mut bytes) = (plain, 0);
        while left != 0 {
            let (frame, snapshot) = burst.plain_at(left.trailing_zeros() as usize);
            let l2_bytes = frame.len - HEADER_BYTES;
            if l2_bytes > limit {
                break;
            }
            let Some(desc) = self.free.pop() else { break };
            let (to, head) = (self.chunks.room(&desc), PLAIN_BYTES as usize - HEADER_LEN);
            // SAFETY: the snapshot holds these bytes behind the header, the chunk is free, hence
            // ours, and has room for the whole frame, which is no shorter.
            unsafe { to.copy_from_nonoverlapping(snapshot.wrapping_add(HEADER_LEN), head) };
            let from = frame.ptr.wrapping_add(PLAIN_BYTES as usize);
            let rest = (frame.len - PLAIN_BYTES) as usize;
            // SAFETY: the frame's buffer holds all of it, and the chunk has room for it; UMEM is
            // nobody's memory but the kernel's and ours.
            unsafe { copy(to.wrapping_add(head), from, rest) };
            self.add(desc, l2_bytes, false);
            bytes += u64::from(l2_bytes);
            left &= left - 1;
        }
        (plain & !left, bytes)
    }

    /// Copies a frame into free chunks, to be sent by [`Transmitter::submit`]; false if there are not
    /// enough.
    pub(crate) fn put(&mut self, parcel: &mut Parcel<'_, '_>) -> bool {
        let l2_bytes = parcel.l2_bytes();
        let Some(kept) = self
            .free
            .len()
            .checked_sub(self.chunks_of(l2_bytes) as usize)
        else {
            return false;
        };
        self.room.0.clear();
        let mut left = l2_bytes;
        while let Some(desc) = (self.free.len() > kept).then(|| self.free.pop()).flatten() {
            let bytes = left.min(self.room_bytes);
            left -= bytes;
            // Of a chunk that is free, hence ours, and of the UMEM, which is nobody's memory but the
            // kernel's and ours.
            self.room.0.push(Segment {
                ptr: self.chunks.room(&desc),
                len: bytes,
            });
            self.add(desc, bytes, left > 0);
        }
        // The wire has no virtio-net header.
        parcel.write_to(HEADER_BYTES, 1, &self.room.0);
        true
    }

    /// Adds a chunk with so many bytes of a frame to those to be submitted.
    #[inline]
    fn add(&mut self, mut desc: FrameDesc, bytes: u32, is_continued: bool) {
        desc.set_options(if is_continued { CONTINUED } else { 0 });
        // SAFETY: the chunk is ours. The view is used for the length alone.
        let mut view = unsafe { self.umem.data_mut(&mut desc) };
        view.cursor().set_pos(bytes as usize);
        self.batch.push(desc);
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

for_this_cpu! {
    fn put_plain(
        transmitter: &mut Transmitter,
        burst: &Burst,
        mask: u64,
        max_bytes: u32,
    ) -> (u64, u64) = Transmitter::put_plain_frames;
}
