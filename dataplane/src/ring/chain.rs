//! What the rings of both layouts share: the buffers of descriptors are checked and translated here
//! only.

use super::{Direction, RingFault};
use crate::burst::MAX_CHAIN;
use crate::memory::{GuestSlice, MemoryView};
use crate::wire::Features;

pub(super) const DESC_BYTES: u32 = 16;
pub(super) const F_NEXT: u16 = 1;
pub(super) const F_WRITE: u16 = 2;
pub(super) const F_INDIRECT: u16 = 4;

/// What was negotiated of a ring's chains.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChainRules {
    indirect: bool,
    /// Bytes of the header in front of each frame.
    pub(super) header_bytes: u32,
    /// Whether frames may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) mergeable: bool,
}

impl ChainRules {
    pub(super) fn new(features: Features) -> Self {
        let mergeable = features.contains(Features::VIRTIO_NET_F_MRG_RXBUF);
        // 5.1.6.1: legacy drivers without mergeable buffers use the header without num_buffers.
        let header_bytes = if mergeable || features.contains(Features::VIRTIO_F_VERSION_1) {
            12
        } else {
            10
        };
        Self {
            indirect: features.contains(Features::VIRTIO_F_INDIRECT_DESC),
            header_bytes,
            mergeable,
        }
    }

    /// The table of an indirect descriptor.
    ///
    /// # Errors
    /// Not negotiated, no table at all, or not in guest memory.
    #[cold]
    pub(super) fn table<'m>(
        &self,
        memory: &'m MemoryView,
        addr: u64,
        len: u32,
    ) -> Result<GuestSlice<'m>, RingFault> {
        let fault = |rule| Err(RingFault::Indirect { rule });
        if !self.indirect {
            return fault("VIRTIO_F_INDIRECT_DESC was not negotiated");
        }
        let count = len / DESC_BYTES;
        if !len.is_multiple_of(DESC_BYTES) || count == 0 || count as usize > MAX_CHAIN {
            return fault("its table's length is no multiple of 16, zero or too large");
        }
        let mut table = None;
        let found = memory.translate(addr, len, |slice| {
            table = Some(slice);
            slice.len() == len
        });
        match (found, table) {
            (Some(()), Some(table)) => Ok(table),
            (None, None) => Err(RingFault::Address { addr, len }),
            _ => fault("its table crosses regions"),
        }
    }
}

/// Checks a buffer of a chain that has `bytes` so far, gives its slices to `piece` and returns the
/// chain's new length.
///
/// # Errors
/// The rule that the buffer breaks; slices may have been given before.
#[inline]
pub(super) fn add_buffer<'m>(
    memory: &'m MemoryView,
    (addr, len, flags): (u64, u32, u16),
    direction: Direction,
    bytes: u32,
    piece: &mut impl FnMut(GuestSlice<'m>) -> bool,
) -> Result<u32, RingFault> {
    if flags & F_WRITE != direction.flag() {
        let ring = match direction {
            Direction::FromGuest => "transmit",
            Direction::ToGuest => "receive",
        };
        return Err(RingFault::Direction { ring, flags });
    }
    if len == 0 {
        // The search for room is bounded by the slices that it finds.
        return match direction {
            Direction::FromGuest => Ok(bytes),
            Direction::ToGuest => Err(RingFault::EmptyBuffer),
        };
    }
    let address = RingFault::Address { addr, len };
    let mut fits = true;
    let found = memory.translate(addr, len, |slice| {
        fits = piece(slice);
        fits
    });
    if !fits {
        return Err(RingFault::ChainTooLong { max: MAX_CHAIN });
    }
    found.ok_or(address)?;
    bytes.checked_add(len).ok_or(address)
}

/// Descriptor `index` of a table.
///
/// # Errors
/// The table has no such descriptor.
#[inline(always)]
pub(super) fn read_descriptor(table: GuestSlice<'_>, index: u16) -> Result<u128, RingFault> {
    table
        .read_descriptor(index)
        .ok_or(RingFault::DescriptorIndex {
            index,
            size: table.len() / DESC_BYTES,
        })
}

/// Whether going from index `old` to `new` passed `event`: vring_need_event (2.7.10).
#[inline]
pub(super) fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
