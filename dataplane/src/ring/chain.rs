//! What the rings of both layouts share: descriptors are read, and their buffers checked and
//! translated, here only.

use std::sync::Arc;

use crate::burst::MAX_CHAIN;
use crate::memory::{GuestMemory, RegionHint, Segment};
use crate::ring::RingFault;
use crate::wire::Features;

pub(super) const DESC_BYTES: usize = 16;
pub(super) const F_NEXT: u16 = 1;
pub(super) const F_WRITE: u16 = 2;
pub(super) const F_INDIRECT: u16 = 4;

/// Which way a chain's buffers go; also the word for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The guest transmits: all its buffers are device-readable.
    FromGuest,
    /// The guest receives: all its buffers are device-writable.
    ToGuest,
}

impl Direction {
    /// The flag that a buffer of this direction has.
    #[inline(always)]
    pub(super) fn flag(self) -> u16 {
        match self {
            Self::FromGuest => 0,
            Self::ToGuest => F_WRITE,
        }
    }

    /// How many of a buffer's `bytes` the device has written.
    #[inline(always)]
    pub(super) fn written(self, bytes: u32) -> u32 {
        match self {
            Self::FromGuest => 0,
            Self::ToGuest => bytes,
        }
    }
}

/// A descriptor as one load; packed, since indirect tables may lie anywhere.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct DescriptorBits(u128);

/// A descriptor table: a split ring's own, or an indirect one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) base: *const u8,
    /// Descriptors.
    pub(super) len: u32,
}

impl Table {
    /// The bits of a descriptor, in memory order from the lowest.
    #[inline(always)]
    pub(super) fn read(self, index: u16) -> Result<u128, RingFault> {
        if u32::from(index) >= self.len {
            return Err(RingFault::DescriptorIndex {
                index,
                size: self.len,
            });
        }
        let at = self.base.wrapping_add(DESC_BYTES * usize::from(index));
        // SAFETY: the index is in the table, whose `len` descriptors are guest memory: that was
        // checked when the table was made. The type is packed, so any alignment will do.
        let bits = unsafe { at.cast::<DescriptorBits>().read_volatile() };
        Ok(u128::from_le(bits.0))
    }
}

/// The memory behind a ring, and what was negotiated of the chains in it.
#[derive(Debug)]
pub(super) struct Chains {
    memory: Arc<GuestMemory>,
    hint: RegionHint,
    indirect: bool,
    /// Bytes of the header in front of each frame.
    pub(super) header_bytes: u32,
    /// Whether frames may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) mergeable: bool,
}

impl Chains {
    pub(super) fn new(features: Features, memory: Arc<GuestMemory>) -> Self {
        let mergeable = features.contains(Features::VIRTIO_NET_F_MRG_RXBUF);
        // 5.1.6.1: legacy drivers without mergeable buffers use the header without num_buffers.
        let header_bytes = if mergeable || features.contains(Features::VIRTIO_F_VERSION_1) {
            12
        } else {
            10
        };
        Self {
            memory,
            hint: RegionHint::none(),
            indirect: features.contains(Features::VIRTIO_F_INDIRECT_DESC),
            header_bytes,
            mergeable,
        }
    }

    /// Goes on in other memory.
    pub(super) fn relocate(&mut self, memory: Arc<GuestMemory>) {
        self.memory = memory;
        self.hint = RegionHint::none();
    }

    pub(super) fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    /// The region that served last.
    #[inline(always)]
    pub(super) fn hint(&self) -> RegionHint {
        self.hint
    }

    /// Checks a buffer of a chain that has `bytes` so far, gives its pieces to `piece` and returns
    /// the chain's new length.
    ///
    /// # Errors
    /// The rule that the buffer breaks; pieces may have been given before.
    #[inline]
    pub(super) fn add(
        &mut self,
        (addr, len, flags): (u64, u32, u16),
        direction: Direction,
        bytes: u32,
        piece: &mut impl FnMut(Segment) -> bool,
    ) -> Result<u32, RingFault> {
        if flags & F_WRITE != direction.flag() {
            let ring = match direction {
                Direction::FromGuest => "transmit",
                Direction::ToGuest => "receive",
            };
            return Err(RingFault::Direction { ring, flags });
        }
        if len == 0 {
            // The search for room is bounded by the pieces that it finds.
            return match direction {
                Direction::FromGuest => Ok(bytes),
                Direction::ToGuest => Err(RingFault::EmptyBuffer),
            };
        }
        let address = RingFault::Address { addr, len };
        let mut fits = true;
        let found = self.memory.translate(addr, len, &mut self.hint, |segment| {
            fits = piece(segment);
            fits
        });
        if !fits {
            return Err(RingFault::ChainTooLong { max: MAX_CHAIN });
        }
        found.ok_or(address)?;
        bytes.checked_add(len).ok_or(address)
    }

    /// The table of an indirect descriptor.
    ///
    /// # Errors
    /// Not negotiated, no table at all, or not in guest memory.
    #[cold]
    pub(super) fn table(&mut self, addr: u64, len: u32) -> Result<Table, RingFault> {
        let fault = |rule| Err(RingFault::Indirect { rule });
        if !self.indirect {
            return fault("VIRTIO_F_INDIRECT_DESC was not negotiated");
        }
        let count = len / 16;
        if !len.is_multiple_of(16) || count == 0 || count as usize > MAX_CHAIN {
            return fault("its table's length is no multiple of 16, zero or too large");
        }
        let mut whole = None;
        let found = self.memory.translate(addr, len, &mut self.hint, |segment| {
            whole = Some(segment);
            segment.len == len
        });
        match (found, whole) {
            (Some(()), Some(segment)) => Ok(Table {
                base: segment.ptr,
                len: count,
            }),
            (None, None) => Err(RingFault::Address { addr, len }),
            _ => fault("its table crosses regions"),
        }
    }
}

/// Bytes of a cache line, on all processors that this is tuned for.
const LINE: u32 = 64;

/// Where a buffer's lines end that [`prefetch_more`] brings: beyond, the processor has noticed.
const PREFETCH_END: u32 = 2048;

/// Brings the first two lines of a buffer towards the cache: to be read, or to be written, handed
/// over by whoever wrote them last. A hint: valid for any address.
#[inline(always)]
pub(super) fn prefetch(buffer: Segment, direction: Direction) {
    prefetch_line(buffer.ptr, direction);
    prefetch_line(buffer.ptr.wrapping_add(LINE as usize), direction);
}

/// Brings the lines of a buffer that [`prefetch`] left out, as far as its first `bytes`, to be
/// written. A hint, likewise.
#[inline(always)]
pub(crate) fn prefetch_more(buffer: *mut u8, bytes: u32) {
    let mut at = 2 * LINE;
    while at < bytes.min(PREFETCH_END) {
        prefetch_line(buffer.wrapping_add(at as usize), Direction::ToGuest);
        at += LINE;
    }
}

#[inline(always)]
fn prefetch_line(line: *mut u8, direction: Direction) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        match direction {
            // SAFETY: prefetching has no effect that a program can see.
            Direction::FromGuest => unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) },
            // SAFETY: likewise; processors without the instruction take it for one without effect.
            Direction::ToGuest => unsafe {
                std::arch::asm!(
                    "prefetchw [{line}]",
                    line = in(reg) line,
                    options(nostack, preserves_flags, readonly)
                );
            },
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (line, direction);
}

/// Whether going from index `old` to `new` passed `event`: vring_need_event (2.7.10).
#[inline]
pub(super) fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
