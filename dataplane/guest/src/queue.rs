//! What split and packed rings have in common for their driver.

use std::sync::Arc;

use super::memory::{DriverMemory, DriverMemoryError};
use super::packed::PackedDriverRing;
use super::split::SplitDriverRing;

/// Most entries of a virtqueue (virtio 1.3, 2.7 and 2.8.10.1).
pub const MAX_QUEUE_SIZE: u16 = 32_768;

/// Bytes of a descriptor, split or packed, in a ring or in an indirect table.
pub const DESC_BYTES: usize = 16;

/// How a virtqueue is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Descriptor table, available ring, used ring (virtio 1.3, 2.7).
    #[default]
    Split,
    /// One ring of descriptors (virtio 1.3, 2.8).
    Packed,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

/// A chain that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What the chain was added with.
    pub token: u32,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// How a ring is driven.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingOptions {
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
    /// Chains of 2 to this many buffers go into an indirect table; 0 without
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: u16,
}

impl RingOptions {
    /// How many buffers a chain has in a ring of `size`, and whether they go into an indirect table.
    ///
    /// # Errors
    /// The ring can never hold such a chain.
    pub(super) fn shape(self, buffers: usize, size: u16) -> Result<(u16, bool), AddError> {
        let indirect = buffers > 1 && buffers <= usize::from(self.indirect);
        let wrong = AddError::Shape { buffers, size };
        let count = u16::try_from(buffers).map_err(|_| wrong)?;
        if count == 0 || (!indirect && count > size) {
            return Err(wrong);
        }
        Ok((count, indirect))
    }
}

/// When the driver wants calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// Never: the driver polls.
    Never,
    /// When the next chain is used.
    Next,
}

/// Why a chain was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// Too few descriptors are free now.
    #[error("the ring is full")]
    Full,
    /// The chain has no buffer, or more than the ring has descriptors.
    #[error("a ring of {size} can't hold a chain of {buffers} buffers")]
    Shape {
        /// Buffers of the chain.
        buffers: usize,
        /// Entries of the ring.
        size: u16,
    },
}

/// A rule that the device broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceFault {
    /// The used index passed what was available.
    #[error("the device used {used} chains of {available} that were available")]
    UsedIndex {
        /// Chains newly used by its account.
        used: u16,
        /// Chains that were available.
        available: u16,
    },
    /// A used entry names no chain that is available.
    #[error("the device used chain {id}, which is not available")]
    UsedId {
        /// The id.
        id: u32,
    },
    /// More bytes were written than the chain has room for.
    #[error("the device wrote {len} bytes into a chain with room for {room}")]
    UsedLen {
        /// Bytes written by its account.
        len: u32,
        /// Writable bytes of the chain.
        room: u32,
    },
}

/// Why a ring could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingSetupError {
    /// Zero, more than [`MAX_QUEUE_SIZE`], or for a split ring not a power of two.
    #[error("a {layout:?} ring can't have {size} entries")]
    Size {
        /// The layout.
        layout: Layout,
        /// The size.
        size: u16,
    },
    /// The ring's areas don't fit into driver memory.
    #[error(transparent)]
    Memory(#[from] DriverMemoryError),
}

/// Where a ring lies and how far it got: what SET_VRING_NUM, ADDR and BASE tell the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table or ring.
    pub desc: u64,
    /// Guest address of the available ring or the driver event suppression structure.
    pub driver: u64,
    /// Guest address of the used ring or the device event suppression structure.
    pub device: u64,
    /// The base from which the device starts; see [`super::Frontend::start_ring`].
    pub base: u32,
}

/// What the driver remembers of a chain that is available.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    pub(crate) token: u32,
    /// Descriptors of the ring that it takes: 1 if indirect.
    pub(crate) descs: u16,
    /// Writable bytes.
    pub(crate) room: u32,
}

impl Chain {
    /// The used chain, if the device wrote no more than there was room for.
    pub(crate) fn used(self, len: u32) -> Result<Used, DeviceFault> {
        let room = self.room;
        if len > room {
            return Err(DeviceFault::UsedLen { len, room });
        }
        Ok(Used {
            token: self.token,
            len,
        })
    }
}

/// Sum of lengths, saturating: a chain of more than 4 GiB breaks a rule anyway.
pub(crate) fn total_len(buffers: &[Buffer]) -> u32 {
    buffers
        .iter()
        .fold(0, |sum: u32, buffer| sum.saturating_add(buffer.len))
}

/// True if moving an index from `old` to `new` passes `event` (virtio 1.3, 2.7.10:
/// `vring_need_event`).
pub(crate) fn passes_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The driver's side of a virtqueue of either layout.
#[derive(Debug)]
pub enum DriverRing {
    /// A split ring.
    Split(SplitDriverRing),
    /// A packed ring.
    Packed(PackedDriverRing),
}

impl DriverRing {
    /// An empty ring of `size` entries in `memory`.
    ///
    /// # Errors
    /// A size that the layout can't have, or memory that is full.
    pub fn new(
        memory: &Arc<DriverMemory>,
        layout: Layout,
        size: u16,
        options: RingOptions,
    ) -> Result<Self, RingSetupError> {
        Ok(match layout {
            Layout::Split => Self::Split(SplitDriverRing::new(memory, size, options)?),
            Layout::Packed => Self::Packed(PackedDriverRing::new(memory, size, options)?),
        })
    }

    /// Where it lies and how far it got.
    pub fn place(&self) -> RingPlace {
        match self {
            Self::Split(ring) => ring.place(),
            Self::Packed(ring) => ring.place(),
        }
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.free(),
            Self::Packed(ring) => ring.free(),
        }
    }

    /// Chains that the device may use or has used, and that were not reaped.
    pub fn in_flight(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.in_flight(),
            Self::Packed(ring) => ring.in_flight(),
        }
    }

    /// Adds a chain of buffers that the device reads, then ones that it writes; it sees the chain
    /// at the next [`DriverRing::publish`]. `token` comes back in [`Used`].
    ///
    /// # Errors
    /// The ring is full, or can never hold such a chain.
    pub fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        token: u32,
    ) -> Result<(), AddError> {
        match self {
            Self::Split(ring) => ring.add(readable, writable, token),
            Self::Packed(ring) => ring.add(readable, writable, token),
        }
    }

    /// Shows the device all that was added since the last call, at once. True if it wants a
    /// kick.
    #[must_use = "a device that wants a kick may sleep for ever without it"]
    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.publish(),
            Self::Packed(ring) => ring.publish(),
        }
    }

    /// Takes what the device has used, in the device's order, and returns how many chains.
    ///
    /// # Errors
    /// The device broke a rule; what it used before that is in `into`.
    pub fn reap(&mut self, into: &mut Vec<Used>) -> Result<usize, DeviceFault> {
        match self {
            Self::Split(ring) => ring.reap(into),
            Self::Packed(ring) => ring.reap(into),
        }
    }

    /// Sets when the driver wants calls. True if chains are used already, so that no call may
    /// come for them.
    pub fn set_calls(&mut self, calls: Calls) -> bool {
        match self {
            Self::Split(ring) => ring.set_calls(calls),
            Self::Packed(ring) => ring.set_calls(calls),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_once_also_across_the_wrap() {
        assert!(passes_event(5, 6, 5));
        assert!(!passes_event(5, 5, 4));
        assert!(!passes_event(5, 7, 6));
        assert!(passes_event(0xffff, 0, 0xffff));
        assert!(passes_event(0xffff, 3, 0xfff0));
        assert!(!passes_event(4, 3, 0xfff0));
    }
}
