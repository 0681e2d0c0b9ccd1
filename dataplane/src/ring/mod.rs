//! Device side of virtqueues, split and packed.
//!
//! Workers hold a [`Ring`] and choose its layout once per burst; gathering and delivery are
//! written once, over [`DeviceRing`], and compiled for each layout.
#![allow(unsafe_code, reason = "it owns pointers to the words of rings")]

mod chain;
mod layout;
mod packed;
mod publish;
mod split;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use ringway_bridge::MAX_BURST;

use crate::burst::{Burst, Entry, Frame};
use crate::memory::{GuestMemory, GuestSlice, MemoryView, RegionHint};
use crate::wire::Features;
use crate::wire::net_header::HEADER_BYTES;

use self::chain::F_WRITE;
use crate::isa::for_this_cpu;
use publish::Word;

pub(crate) use layout::{Areas, PlaceError, PlacedAreas, RingAddresses, RingLayout};
pub(crate) use packed::PackedRing;
pub(crate) use split::SplitRing;

impl Word for AtomicU16 {
    type Bits = u16;

    #[inline(always)]
    fn store(&self, bits: u16, order: Ordering) {
        self.store(bits, order);
    }
}

impl Word for AtomicU64 {
    type Bits = u64;

    #[inline(always)]
    fn store(&self, bits: u64, order: Ordering) {
        self.store(bits, order);
    }
}

/// Which way a chain's buffers go.
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

    /// Has the first lines of a buffer on the way into the cache, to be read or to be written.
    #[inline(always)]
    pub(super) fn prefetch(self, buffer: GuestSlice<'_>) {
        match self {
            Self::FromGuest => buffer.prefetch_to_read(),
            Self::ToGuest => buffer.prefetch_to_write(),
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

    /// Gives the next chains, one at each call, for as long as they are the common case: one direct
    /// descriptor of the right direction, whose buffer lies in the region that served last. That it
    /// ends says nothing about the chain there, not even that there is one or that it is good.
    /// Nothing is taken; the buffers are on the way into the cache.
    fn direct<'m>(
        &self,
        hint: RegionHint<'m>,
        direction: Direction,
    ) -> impl FnMut() -> Option<Frame<'m>>;

    /// Gives the slices of the chain at a place to `piece` and returns the chain and its length;
    /// `None` if there is none. At most as many slots as said and [`crate::burst::MAX_CHAIN`] descriptors
    /// are followed, whatever the guest links; `walked` counts those that were read.
    ///
    /// # Errors
    /// The rule that the chain breaks; slices may have been given before.
    fn chain<'m>(
        &self,
        at: (Self::Place, usize),
        direction: Direction,
        memory: &'m MemoryView,
        walked: &mut u32,
        piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Result<Option<(Entry, u32)>, RingFault>;

    /// Completes a chain that was taken; the driver sees it after [`DeviceRing::publish`].
    fn complete(&mut self, entry: Entry, written_bytes: u32);

    /// Completes chains in their order, likewise; of each `len` bytes were written if it is
    /// [`Direction::ToGuest`].
    fn complete_all(&mut self, chains: &[Frame<'_>], direction: Direction);

    /// Whether the driver takes chains back in the order in which it made them available.
    fn in_order(&self) -> bool;

    /// Shows the driver all completed chains, and returns whether it wants a call for them.
    fn publish(&mut self) -> bool;
}

/// Device side of one virtqueue, and the guest's memory that it leads to. Its owner holds the
/// queue's lock.
#[derive(Debug)]
pub(crate) struct Ring {
    memory: MemoryView,
    rings: AnyRing,
}

/// A ring of either layout.
#[derive(Debug)]
pub(crate) enum AnyRing {
    Split(SplitRing),
    Packed(PackedRing),
}

/// One expression for the ring of whatever layout.
macro_rules! each {
    ($ring:expr, $name:ident => $body:expr) => {
        match $ring {
            AnyRing::Split($name) => $body,
            AnyRing::Packed($name) => $body,
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
            ..
        } = placed;
        if layout != RingLayout::of(features) {
            return None;
        }
        let rings = match layout {
            RingLayout::Split => {
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "split rings use the low half"
                )]
                let next_avail = base as u16;
                // SAFETY: `RingLayout::place` found the areas of a ring of this size in this
                // memory, which is kept beside the ring.
                AnyRing::Split(unsafe { SplitRing::new(size, at, next_avail, features) })
            }
            RingLayout::Packed => {
                // SAFETY: likewise.
                AnyRing::Packed(unsafe { PackedRing::new(size, at, base, features) }?)
            }
        };
        let memory = MemoryView::new(memory);
        Some(Self { memory, rings })
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
        // SAFETY: `RingLayout::place` found the areas of a ring of this layout and size in this
        // memory, which is kept beside the ring.
        each!(&mut self.rings, ring => unsafe { ring.relocate(at) });
        self.memory = MemoryView::new(memory);
        Ok(())
    }

    /// The memory, from which slices are borrowed, and the ring that tells where.
    #[inline(always)]
    pub(crate) fn parts(&mut self) -> (&MemoryView, &mut AnyRing) {
        (&self.memory, &mut self.rings)
    }

    pub(crate) fn layout(&self) -> RingLayout {
        match &self.rings {
            AnyRing::Split(_) => RingLayout::Split,
            AnyRing::Packed(_) => RingLayout::Packed,
        }
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        each!(&self.rings, ring => ring.size())
    }

    /// Chains that were taken although a rule was broken which does no harm.
    pub(crate) fn tolerated(&self) -> u64 {
        match &self.rings {
            AnyRing::Split(_) => 0,
            AnyRing::Packed(ring) => ring.tolerated(),
        }
    }

    /// Whether it goes on at its used index, though it was told to begin at 0.
    pub(crate) fn resumed(&self) -> bool {
        match &self.rings {
            AnyRing::Split(ring) => ring.resumed(),
            AnyRing::Packed(_) => false,
        }
    }

    /// Where it stands, for GET_VRING_BASE. Nothing must be taken and not completed.
    pub(crate) fn base(&self) -> u32 {
        match &self.rings {
            AnyRing::Split(ring) => ring.next_avail().into(),
            AnyRing::Packed(ring) => ring.base(),
        }
    }

    /// Whether the memory behind the ring was cut off.
    pub(crate) fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    /// Shows the driver all completed chains, and returns whether it wants a call for them.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        each!(&mut self.rings, ring => ring.publish())
    }

    /// Tells the driver not to kick, while the ring is polled.
    pub(crate) fn disarm(&mut self) {
        each!(&mut self.rings, ring => ring.disarm());
    }

    /// Asks the driver for a kick and returns whether the ring is still empty, so that waiting for
    /// the kick can't miss a frame.
    pub(crate) fn arm(&mut self) -> bool {
        each!(&mut self.rings, ring => ring.arm())
    }
}

impl AnyRing {
    /// Bytes of the header in front of each frame: 10 for legacy drivers, else 12.
    #[inline]
    pub(crate) fn header_bytes(&self) -> u32 {
        each!(self, ring => ring.header_bytes())
    }

    /// Takes up to `max` chains of a transmit ring into `burst`. A chain that breaks the rules
    /// ends the burst before it and is the error; the frames before it are good.
    ///
    /// # Errors
    /// The rule that the guest broke.
    #[inline]
    pub(crate) fn gather<'m>(
        &mut self,
        max: usize,
        memory: &'m MemoryView,
        burst: &mut Burst<'m>,
    ) -> Result<(), RingFault> {
        each!(self, ring => gather(ring, max, memory, burst))
    }

    /// Completes frames that were gathered, in their order, and returns their L2 bytes; the driver
    /// sees it after [`Ring::publish`].
    #[inline]
    pub(crate) fn complete_gathered(&mut self, frames: &[Frame<'_>]) -> u64 {
        each!(self, ring => complete_gathered(ring, frames))
    }

    /// Gives back the last frames that were gathered: they will be taken, read and checked again.
    #[inline]
    pub(crate) fn give_back(&mut self, frames: &[Frame<'_>]) {
        if !frames.is_empty() {
            // A ring holds no more than 32,768.
            let slots = frames
                .iter()
                .fold(0, |sum: u16, frame| sum + frame.entry.slots);
            each!(self, ring => ring.give_back(slots));
        }
    }
}

/// Descriptors of chains that a burst reads one by one until it has enough: 60 frames of as many
/// fragments as Linux has. One longest chain may come on top.
const MAX_WALK: u32 = 1024;

for_this_cpu! {
    /// Takes up to `max` chains into `burst`; see [`AnyRing::gather`].
    fn gather<'m, R: DeviceRing>(
        ring: &mut R,
        max: usize,
        memory: &'m MemoryView,
        burst: &mut Burst<'m>,
    ) -> Result<(), RingFault> = gather_burst;
}

#[inline(always)]
fn gather_burst<'m, R: DeviceRing>(
    ring: &mut R,
    max: usize,
    memory: &'m MemoryView,
    burst: &mut Burst<'m>,
) -> Result<(), RingFault> {
    debug_assert!(max <= MAX_BURST && burst.len() == 0);
    let available = ring.available()?;
    let mut walked = 0;
    // How many chains may be taken: each further descriptor of one is a chain less.
    let mut most = usize::from(available);
    let mut taken = 0;
    while taken < most.min(max) {
        let wanted = most.min(max) - taken;
        let direct = burst.extend(wanted, ring.direct(memory.hint(), Direction::FromGuest));
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_BURST")]
        ring.take(direct as u16);
        taken += direct;
        if direct < wanted {
            let chain = gather_chain(ring, most - taken, memory, &mut walked, burst)?;
            let Some(slots) = chain.filter(|_| walked < MAX_WALK) else {
                break;
            };
            most -= usize::from(slots) - 1;
            taken += 1;
        }
    }
    Ok(())
}

/// Takes the next chain, of at most `limit` descriptors of the ring, and returns of how many it
/// is; `None` if there is no chain or no room for it in the burst.
#[cold]
fn gather_chain<'m, R: DeviceRing>(
    ring: &mut R,
    limit: usize,
    memory: &'m MemoryView,
    walked: &mut u32,
    burst: &mut Burst<'m>,
) -> Result<Option<u16>, RingFault> {
    let Some(mark) = burst.begin_chain() else {
        return Ok(None);
    };
    let direction = Direction::FromGuest;
    let found = ring.chain((ring.place(), limit), direction, memory, walked, |buffer| {
        direction.prefetch(buffer);
        burst.push(mark, buffer)
    });
    burst.note_walked(*walked);
    match found {
        Ok(Some((entry, bytes))) => {
            burst.add(mark, entry, bytes);
            ring.take(entry.slots);
            Ok(Some(entry.slots))
        }
        Ok(None) => Ok(None),
        Err(fault) => {
            burst.abandon(mark);
            Err(fault)
        }
    }
}

#[inline(always)]
fn complete_gathered<R: DeviceRing>(ring: &mut R, frames: &[Frame<'_>]) -> u64 {
    let l2_bytes = |frame: &Frame<'_>| u64::from(frame.len - HEADER_BYTES);
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
pub(crate) mod tests;
