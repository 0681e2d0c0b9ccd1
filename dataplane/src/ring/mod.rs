//! Device side of virtqueues, split and packed.
//!
//! Workers hold a [`Ring`] and choose its layout once per burst; gathering and delivery are
//! written once, over [`DeviceRing`], and compiled for each layout.

mod chain;
mod gather;
mod layout;
mod packed;
mod rx_chain;
mod split;

use std::sync::Arc;

use crate::burst::Burst;
use crate::memory::{GuestMemory, Segment};
use crate::wire::Features;
use crate::wire::net_header::HEADER_BYTES;

pub(crate) use chain::{Direction, prefetch_more};
pub(crate) use layout::{Areas, Layout, PlaceError, PlacedAreas, RingAddresses};
pub(crate) use packed::PackedRing;
pub(crate) use rx_chain::{Deliver, RxScratch};
pub(crate) use split::SplitRing;

/// A chain, as it is completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Head of the chain (split) or buffer id (packed).
    pub(crate) id: u16,
    /// What it takes of the ring: an avail entry (split), or so many descriptors (packed).
    pub(crate) slots: u16,
}

impl Entry {
    /// A chain that takes one.
    #[inline(always)]
    pub(crate) const fn single(id: u16) -> Self {
        Self { id, slots: 1 }
    }
}

/// A chain of one buffer: the common case, whose buffer is checked and translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Single {
    /// The buffer, valid while the ring's lock is held.
    pub(crate) ptr: *mut u8,
    pub(crate) len: u32,
    pub(crate) entry: Entry,
}

impl Single {
    pub(crate) const EMPTY: Self = Self {
        ptr: std::ptr::null_mut(),
        len: 0,
        entry: Entry::single(0),
    };

    #[inline(always)]
    pub(crate) fn buffer(&self) -> Segment {
        Segment {
            ptr: self.ptr,
            len: self.len,
        }
    }
}

/// What gathering and delivery need of a ring.
pub(crate) trait DeviceRing {
    /// A place in the order in which the driver makes chains available.
    type Place: Copy;

    /// Bytes of the header in front of each frame: 10 for legacy drivers, else 12.
    fn header_bytes(&self) -> u32;

    /// Whether frames may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    fn mergeable(&self) -> bool;

    /// Slots of the ring.
    fn entries(&self) -> u16;

    /// Whether the slot at a place, no further than [`DeviceRing::available`] said, holds what the
    /// driver made available.
    fn is_offered(&self, place: Self::Place) -> bool;

    /// How many slots may be taken until the next publish: all that are available, or more.
    ///
    /// # Errors
    /// The guest claims more than the ring has.
    fn available(&self) -> Result<u16, RingFault>;

    /// The place of the next chain to take.
    fn place(&self) -> Self::Place;

    /// The place `slots` on.
    fn after(&self, place: Self::Place, slots: u16) -> Self::Place;

    /// Takes so many slots.
    fn take(&mut self, slots: u16);

    /// Reads the next chains into `to`, for as long as they are the common case: one direct
    /// descriptor of the right direction, whose buffer lies in the region that served last. Returns
    /// how many; that it ends says nothing about the chain there, not even that there is one or
    /// that it is good. Nothing is taken; the buffers are on the way into the cache.
    fn singles(&self, direction: Direction, to: &mut [Single]) -> usize;

    /// Gives the pieces of the chain at a place to `piece` and returns the chain and its length;
    /// `None` if there is none. At most `limit` slots and [`crate::burst::MAX_CHAIN`] descriptors
    /// are followed, whatever the guest links.
    ///
    /// # Errors
    /// The rule that the chain breaks; pieces may have been given before.
    fn chain(
        &mut self,
        place: Self::Place,
        limit: usize,
        direction: Direction,
        piece: impl FnMut(Segment) -> bool,
    ) -> Result<Option<(Entry, u32)>, RingFault>;

    /// Completes a chain that was taken; the driver sees it after [`DeviceRing::publish`].
    fn complete(&mut self, entry: Entry, written_bytes: u32);

    /// Completes chains in their order, likewise; of each `len` bytes were written if it is
    /// [`Direction::ToGuest`].
    fn complete_all(&mut self, chains: &[Single], direction: Direction);

    /// Whether the driver takes chains back in the order in which it made them available.
    fn in_order(&self) -> bool;

    /// Shows the driver all completed chains, and returns whether it wants a call for them.
    fn publish(&mut self) -> bool;
}

/// Device side of one virtqueue. Its owner holds the queue's lock.
#[derive(Debug)]
pub(crate) enum Ring {
    Split(SplitRing),
    Packed(PackedRing),
}

/// One expression for the ring of whatever layout.
macro_rules! each {
    ($ring:expr, $name:ident => $body:expr) => {
        match $ring {
            Ring::Split($name) => $body,
            Ring::Packed($name) => $body,
        }
    };
}

impl Ring {
    /// A ring with these features, whose layout was placed, that goes on at `base`, in the form of
    /// SET_VRING_BASE. `None` if no such ring can be there.
    pub(crate) fn new(placed: PlacedAreas, base: u32, features: Features) -> Option<Self> {
        let PlacedAreas {
            layout,
            size,
            at,
            memory,
        } = placed;
        if layout != Layout::of(features) {
            return None;
        }
        match layout {
            Layout::Split => {
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "split rings use the low half"
                )]
                let next_avail = base as u16;
                // SAFETY: `Layout::place` found the areas of a ring of this size in this memory.
                let ring = unsafe { SplitRing::new(size, at, next_avail, features, memory) };
                Some(Self::Split(ring))
            }
            Layout::Packed => {
                // SAFETY: likewise.
                let ring = unsafe { PackedRing::new(size, at, base, features, memory) };
                ring.map(Self::Packed)
            }
        }
    }

    /// Puts the ring, with the same content, into other memory.
    ///
    /// # Errors
    /// It does not lie there; it stays where it is.
    pub(crate) fn relocate(
        &mut self,
        addresses: RingAddresses,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), PlaceError> {
        let PlacedAreas { at, memory, .. } = self.layout().place(self.size(), addresses, memory)?;
        // SAFETY: `Layout::place` found the areas of a ring of this layout and size in this memory.
        each!(self, ring => unsafe { ring.relocate(at, memory) });
        Ok(())
    }

    pub(crate) fn layout(&self) -> Layout {
        match self {
            Self::Split(_) => Layout::Split,
            Self::Packed(_) => Layout::Packed,
        }
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        each!(self, ring => ring.size())
    }

    /// Where it stands, for GET_VRING_BASE. Nothing must be taken and not completed.
    pub(crate) fn base(&self) -> u32 {
        match self {
            Self::Split(ring) => ring.next_avail().into(),
            Self::Packed(ring) => ring.base(),
        }
    }

    /// Bytes of the header in front of each frame: 10 for legacy drivers, else 12.
    #[inline]
    pub(crate) fn header_bytes(&self) -> u32 {
        each!(self, ring => ring.header_bytes())
    }

    /// Whether the memory behind the ring was cut off.
    pub(crate) fn is_broken(&self) -> bool {
        each!(self, ring => ring.is_broken())
    }

    /// Takes up to `max` chains of a transmit ring into `burst`. A chain that breaks the rules
    /// ends the burst before it and is the error; the frames before it are good.
    ///
    /// # Errors
    /// The rule that the guest broke.
    #[inline]
    pub(crate) fn gather(&mut self, max: usize, burst: &mut Burst) -> Result<(), RingFault> {
        each!(self, ring => gather::gather(ring, max, burst))
    }

    /// Completes frames that were gathered, in their order, and returns their L2 bytes; the driver
    /// sees it after [`Ring::publish`].
    #[inline]
    pub(crate) fn complete_gathered(&mut self, frames: &[Single]) -> u64 {
        each!(self, ring => complete_gathered(ring, frames))
    }

    /// Gives back the last frames that were gathered: they will be taken, read and checked again.
    #[inline]
    pub(crate) fn give_back(&mut self, frames: &[Single]) {
        if !frames.is_empty() {
            // A ring holds no more than 32,768.
            let slots = frames
                .iter()
                .fold(0, |sum: u16, frame| sum + frame.entry.slots);
            each!(self, ring => ring.give_back(slots));
        }
    }

    /// Shows the driver all completed chains, and returns whether it wants a call for them.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        each!(self, ring => ring.publish())
    }

    /// Tells the driver not to kick, while the ring is polled.
    pub(crate) fn disarm(&mut self) {
        each!(self, ring => ring.disarm());
    }

    /// Asks the driver for a kick and returns whether the ring is still empty, so that waiting for
    /// the kick can't miss a frame.
    pub(crate) fn arm(&mut self) -> bool {
        each!(self, ring => ring.arm())
    }
}

#[inline(always)]
fn complete_gathered<R: DeviceRing>(ring: &mut R, frames: &[Single]) -> u64 {
    let l2_bytes = |frame: &Single| u64::from(frame.len - HEADER_BYTES);
    if let (true, Some(last)) = (ring.in_order(), frames.last()) {
        // One used entry is enough for all of them: the last's, in the place of the first's (2.7.9,
        // 2.8.9).
        let slots = frames.iter().map(|frame| frame.entry.slots).sum();
        let id = last.entry.id;
        ring.complete(Entry { id, slots }, 0);
    } else {
        ring.complete_all(frames, Direction::FromGuest);
    }
    frames.iter().map(l2_bytes).sum()
}

/// How a guest broke the rules of its ring; the ring stops for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RingFault {
    /// More entries made available than the ring has (virtio 1.3, 2.7.13.3.1).
    #[error("avail index {index} is {ahead} ahead of {next} in a ring of {size}")]
    AvailIndex {
        index: u16,
        next: u16,
        ahead: u16,
        size: u16,
    },
    /// An entry of the avail ring or a next field is no descriptor (2.7.5).
    #[error("descriptor {index} does not exist in a table of {size}")]
    DescriptorIndex { index: u16, size: u32 },
    /// A chain of a packed ring goes on in a descriptor that was not made available (2.8.6).
    #[error("a chain goes on in descriptor {slot}, whose flags {flags:#x} are not available")]
    NotAvailable { slot: u16, flags: u16 },
    /// A buffer does not lie in guest memory.
    #[error("buffer {addr:#x} of {len} bytes is not in guest memory")]
    Address { addr: u64, len: u32 },
    /// A receive buffer of length 0. QEMU breaks the device for it, so no driver posts one.
    #[error("a receive buffer has no bytes")]
    EmptyBuffer,
    /// Readable where writable is due or the reverse (2.7.4.2).
    #[error("a {ring} buffer has descriptor flags {flags:#x}")]
    Direction { ring: &'static str, flags: u16 },
    /// A chain longer than any the driver may make (2.7.5.1, 2.8.17), or a loop.
    #[error("a chain has more than {max} descriptors")]
    ChainTooLong { max: usize },
    /// An indirect descriptor that was not negotiated, nested or malformed (2.7.5.3, 2.8.19).
    #[error("indirect descriptor: {rule}")]
    Indirect { rule: &'static str },
}

#[cfg(test)]
mod tests;
