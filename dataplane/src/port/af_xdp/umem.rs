//! Memory that is shared with the kernel: chunks for frames, half of them to receive into and half
//! to transmit from.
//!
//! ```text
//!   chunk     |<-- 256 B, the kernel's headroom -->| frame ...             |
//!   received                            | header 12 | frame ...            |
//! ```
//! The kernel leaves room in front of a received frame for programs that add to it. Ours adds
//! nothing, so there the worker writes the virtio-net header that the frame has not got, and the
//! chunk looks like a guest's buffer.

use std::io;
use std::num::NonZeroU32;

use ringway_bridge::MAX_BURST;
use xsk_rs::config::{FrameSize, QueueSize, UmemConfig};
use xsk_rs::umem::Umem;
use xsk_rs::umem::frame::FrameDesc;

use crate::memory::GuestSlice;
use crate::wire::net_header::HEADER_BYTES;

/// Bytes that the kernel keeps free in front of a frame (XDP_PACKET_HEADROOM).
const HEADROOM_BYTES: u32 = 256;

/// The two sizes that a chunk can have: what UMEM takes at least, and a page, its most.
const CHUNK_BYTES: [u32; 2] = [2048, 4096];

/// Sizes of chunk and frame, by the frames that are to be carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChunkLayout {
    chunk_bytes: u32,
    /// Frames may need several chunks.
    pub(super) several_chunks: bool,
}

impl ChunkLayout {
    /// The layout for frames of up to `l2_bytes`.
    pub(super) fn for_frames(l2_bytes: u32) -> Self {
        let [small, large] = CHUNK_BYTES;
        let fits = |chunk_bytes| l2_bytes <= chunk_bytes - HEADROOM_BYTES;
        Self {
            chunk_bytes: if fits(small) { small } else { large },
            several_chunks: !fits(large),
        }
    }

    /// The same with chunks that a NIC receives into itself. Intel's of one gigabit count the room
    /// in kilobytes, so of a small chunk they would use 1,024 bytes, and begin another with the
    /// rest.
    pub(super) fn for_zero_copy(self) -> Self {
        let [_, large] = CHUNK_BYTES;
        Self {
            chunk_bytes: large,
            ..self
        }
    }

    /// Bytes of a frame that one chunk holds.
    pub(super) fn room_bytes(self) -> u32 {
        self.chunk_bytes - HEADROOM_BYTES
    }
}

/// Where the chunks are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunks {
    base: *mut u8,
    chunk_bytes: usize,
    total_bytes: usize,
}

// SAFETY: the pointer leads to memory of the process; who may use which chunk is the business of
// the halves of a queue, which have locks.
unsafe impl Send for Chunks {}

/// A UMEM whose chunks are shared out.
#[derive(Debug)]
pub(super) struct SharedMemory {
    pub(super) umem: Umem,
    pub(super) chunks: Chunks,
    pub(super) to_receive: Vec<FrameDesc>,
    pub(super) to_transmit: Vec<FrameDesc>,
    pub(super) is_huge: bool,
    pub(super) total_bytes: u64,
}

impl SharedMemory {
    /// Maps `count` chunks, a power of two, in huge pages if there are enough.
    ///
    /// # Errors
    /// Too little memory (`ENOMEM`), or too little that may be locked (`ENOBUFS`); no permission
    /// for AF_XDP sockets (`EPERM`).
    pub(super) fn new(layout: ChunkLayout, count: u32) -> io::Result<Self> {
        let size = QueueSize::new(count / 2).map_err(io::Error::other)?;
        let chunk_bytes = FrameSize::new(layout.chunk_bytes).map_err(io::Error::other)?;
        let config = UmemConfig::builder()
            .frame_size(chunk_bytes)
            .fill_queue_size(size)
            .comp_queue_size(size)
            .build()
            .map_err(io::Error::other)?;
        let count = NonZeroU32::new(count).ok_or(io::ErrorKind::InvalidInput)?;
        let total_bytes = u64::from(count.get()) * u64::from(layout.chunk_bytes);
        let mut is_huge = total_bytes <= free_huge_bytes(total_bytes);
        let mut mapped = Umem::new(config, count, is_huge);
        if is_huge && mapped.is_err() {
            is_huge = false;
            mapped = Umem::new(config, count, false);
        }
        let (umem, mut to_receive) = mapped.map_err(|error| os_error(&error))?;
        let first = to_receive.first().ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the chunk is this UMEM's, and nobody has it yet. Of the slice, which is empty,
        // nothing but its place is used.
        let at = unsafe { umem.data(first) }.as_ptr().expose_provenance();
        let chunks = Chunks {
            base: std::ptr::with_exposed_provenance_mut(at - first.addr()),
            chunk_bytes: layout.chunk_bytes as usize,
            total_bytes: usize::try_from(total_bytes).map_err(io::Error::other)?,
        };
        let to_transmit = to_receive.split_off(to_receive.len() / 2);
        Ok(Self {
            umem,
            chunks,
            to_receive,
            to_transmit,
            is_huge,
            total_bytes,
        })
    }
}

impl Chunks {
    /// The frame, or part of one, in a chunk that the kernel gave, if it lies in one chunk.
    #[inline]
    pub(super) fn received(&self, desc: &FrameDesc) -> Option<GuestSlice<'_>> {
        self.received_from(desc, 0)
    }

    /// The same with `lead` bytes in front of it, if there is room for them.
    #[inline]
    pub(super) fn received_from(&self, desc: &FrameDesc, lead: usize) -> Option<GuestSlice<'_>> {
        let (at, len) = (desc.addr(), desc.lengths().data());
        let fits = at & (self.chunk_bytes - 1) >= lead;
        fits.then(|| self.slice(at - lead, len + lead)).flatten()
    }

    /// So many bytes in front of a frame, if there is room for them.
    #[inline]
    pub(super) fn front(&self, desc: &FrameDesc, bytes: usize) -> Option<GuestSlice<'_>> {
        let frame = self.received_from(desc, bytes)?;
        Some(frame.first(u32::try_from(bytes).unwrap_or(u32::MAX)))
    }

    /// So many of the bytes for a frame in a free chunk, or as many as it has.
    #[inline]
    pub(super) fn room(&self, desc: &FrameDesc, bytes: u32) -> GuestSlice<'_> {
        let at = desc.addr();
        let room = self.chunk_bytes - (at & (self.chunk_bytes - 1));
        let room = self.slice(at, room.min(bytes as usize));
        room.unwrap_or(GuestSlice::EMPTY)
    }

    /// The bytes of what is [received](Self::received), for as long as its chunk is not given back.
    #[inline]
    pub(super) fn bytes(&self, desc: &FrameDesc) -> Option<&[u8]> {
        let piece = self.received(desc).filter(|piece| piece.len() > 0)?;
        // SAFETY: the bytes are in the UMEM, and neither the kernel nor the worker writes to them
        // before the chunk is given back; the worker's headers are in front of them.
        Some(unsafe { std::slice::from_raw_parts(piece.as_ptr(), piece.len() as usize) })
    }

    #[inline]
    fn slice(&self, at: usize, len: usize) -> Option<GuestSlice<'_>> {
        let in_chunk = at & (self.chunk_bytes - 1);
        if at >= self.total_bytes || len > self.chunk_bytes - in_chunk {
            return None;
        }
        #[expect(clippy::cast_possible_truncation, reason = "no more than a chunk")]
        let len = len as u32;
        // SAFETY: the range lies in one chunk of the UMEM, which is mapped as long as the sockets
        // are open that these chunks belong to.
        Some(unsafe { GuestSlice::new(self.base.wrapping_add(at), len) })
    }
}

/// Free huge pages of the default size in bytes, or 0 if `total_bytes` are no multiple of one.
fn free_huge_bytes(total_bytes: u64) -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else {
        return 0;
    };
    let value = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.split_whitespace().next());
        number.and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let page_bytes = value("Hugepagesize:") * 1024;
    if page_bytes == 0 || !total_bytes.is_multiple_of(page_bytes) {
        return 0;
    }
    let free = value("HugePages_Free:").saturating_sub(value("HugePages_Rsvd:"));
    free * page_bytes
}

/// The kernel's answer behind an error of xsk-rs.
pub(super) fn os_error(error: &(dyn std::error::Error + 'static)) -> io::Error {
    let source = error.source().and_then(|source| source.downcast_ref());
    match source.and_then(io::Error::raw_os_error) {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other(error.to_string()),
    }
}

const _: () = assert!(HEADROOM_BYTES >= HEADER_BYTES && MAX_BURST <= 64);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::net_header::HEADER_LEN;

    #[test]
    fn a_frame_gets_the_smallest_chunk_that_holds_it() {
        let layout = |bytes| ChunkLayout::for_frames(bytes);
        assert_eq!(layout(1522).room_bytes(), 1792);
        assert!(!layout(1522).several_chunks);
        assert_eq!(layout(1792), layout(1522));
        assert_eq!(layout(1793).room_bytes(), 3840);
        assert!(!layout(3840).several_chunks);
        assert!(layout(3841).several_chunks);
        assert_eq!(layout(9022).room_bytes(), 3840);
    }

    #[test]
    fn a_nic_that_counts_room_in_kilobytes_gets_whole_frames_into_a_chunk() {
        for l2_bytes in [60, 1522, 1792, 3072] {
            let layout = ChunkLayout::for_frames(l2_bytes).for_zero_copy();
            assert!(layout.room_bytes() / 1024 * 1024 >= l2_bytes, "{l2_bytes}");
            assert!(!layout.several_chunks);
        }
        assert!(ChunkLayout::for_frames(9022).for_zero_copy().several_chunks);
    }

    /// What needs root, which `--profile user` leaves out.
    mod as_root {
        use super::*;

        #[test]
        fn what_is_in_front_of_a_frame_is_its_chunks() {
            // Needs CAP_NET_RAW, as all AF_XDP does.
            let memory = SharedMemory::new(ChunkLayout::for_frames(1522), 128).unwrap();
            let chunks = memory.chunks;
            assert_eq!(
                (memory.to_receive.len(), memory.to_transmit.len()),
                (64, 64)
            );
            let desc = &memory.to_receive[1];
            let in_chunk = desc.addr() % 2048;
            assert!(in_chunk >= HEADER_LEN, "{in_chunk}");
            let frame = chunks.received(desc).unwrap();
            let front = chunks.front(desc, HEADER_LEN).unwrap();
            assert_eq!(front.len(), HEADER_BYTES);
            assert_eq!(front.as_ptr(), frame.as_ptr().wrapping_sub(HEADER_LEN));
            assert!(chunks.front(desc, in_chunk).is_some());
            assert!(
                chunks.front(desc, in_chunk + 1).is_none(),
                "another chunk's"
            );
            assert!(chunks.front(&FrameDesc::default(), 1).is_none(), "no room");
        }
    }
}
