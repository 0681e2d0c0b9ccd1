//! Device side of a packed virtqueue (virtio 1.3, 2.8).
//!
//! ```text
//!   descriptor ring     16 B x size      addr u64 | len u32 | id u16 | flags u16
//!   driver event (4 B)  when to call     slot and wrap u16 | flags u16
//!   device event (4 B)  when to kick     likewise, written by the device
//! ```
//! A descriptor is available where its AVAIL flag is the wrap counter of the lap and USED is not;
//! it is used where both are. The flags share a word with length and id, so one acquiring load
//! reads what one releasing store wrote; all descriptors between two places belong to the driver
//! once the first of them does. Used descriptors are therefore written as they come, but for the
//! first of a burst: that one is held back until the burst is published, and hides the others.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::chain::{
    ChainRules, DESC_BYTES, F_INDIRECT, F_NEXT, F_WRITE, add_buffer, event_passed, read_descriptor,
};
use super::publish::publish;
use super::{Areas, DeviceRing, Direction, RingFault};
use crate::burst::{Entry, Frame, MAX_CHAIN};
use crate::memory::{GuestSlice, MemoryView, RegionHint};
use crate::wire::Features;

/// VIRTQ_DESC_F_AVAIL.
const F_AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED.
const F_USED: u16 = 1 << 15;

/// Flags of the event suppression structures (2.8.10): never, and at a descriptor. Else always.
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;
const EVENT_MASK: u32 = 3;

/// A slot of the ring with the wrap counter that holds there (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Less than the ring's size.
    slot: u16,
    wrap: bool,
}

impl Place {
    /// From 16 bits of SET_VRING_BASE, if the slot exists.
    fn from_bits(bits: u16, size: u16) -> Option<Self> {
        let slot = bits & 0x7fff;
        (slot < size).then_some(Self {
            slot,
            wrap: bits >> 15 != 0,
        })
    }

    /// As event suppression structures and SET_VRING_BASE hold it.
    fn bits(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }

    /// The place `slots` on, at most one lap.
    #[inline(always)]
    fn forward(self, slots: u16, size: u16) -> Self {
        // At most 32,767 and 32,768.
        let slot = self.slot + slots;
        if slot < size {
            Self { slot, ..self }
        } else {
            Self {
                slot: slot - size,
                wrap: !self.wrap,
            }
        }
    }

    /// The place `slots` back, at most one lap.
    fn back(self, slots: u16, size: u16) -> Self {
        if slots <= self.slot {
            Self {
                slot: self.slot - slots,
                ..self
            }
        } else {
            Self {
                slot: self.slot + (size - slots),
                wrap: !self.wrap,
            }
        }
    }

    /// AVAIL and USED of a descriptor that is available here.
    #[inline(always)]
    fn available_flags(self) -> u16 {
        if self.wrap { F_AVAIL } else { F_USED }
    }

    /// AVAIL and USED of a descriptor that is used here.
    #[inline(always)]
    fn used_flags(self) -> u16 {
        if self.wrap { F_AVAIL | F_USED } else { 0 }
    }

    #[inline(always)]
    fn is_available(self, flags: u16) -> bool {
        flags & (F_AVAIL | F_USED) == self.available_flags()
    }
}

/// All of a descriptor but its address, read once.
#[derive(Clone, Copy, Debug)]
struct Tail {
    len: u32,
    id: u16,
    flags: u16,
}

impl Tail {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "fields of a packed struct")]
    fn from_bits(bits: u64) -> Self {
        Self {
            len: bits as u32,
            id: (bits >> 32) as u16,
            flags: (bits >> 48) as u16,
        }
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48
    }
}

/// Device side of one packed ring. Its owner holds the queue's lock.
#[derive(Debug)]
pub(crate) struct PackedRing {
    areas: Areas,
    size: u16,
    /// The next descriptor to take.
    next_avail: Place,
    /// Where the next used descriptor goes.
    next_used: Place,
    /// The first descriptor used since the last publish, by slot: not written yet.
    held: Option<(u16, Tail)>,
    /// Slots used since the last publish.
    unpublished: u16,
    /// A call was decided on since the ring started: the driver's event can be compared with.
    call_known: bool,
    event_idx: bool,
    in_order: bool,
    rules: ChainRules,
    /// Transmit tables that were taken although they call a buffer writable.
    tolerated: Cell<u64>,
}

impl PackedRing {
    /// A ring that goes on at `base`: avail slot and wrap counter in the low half, used in the
    /// high. A high half of zero says nothing, as from DPDK's virtio_user: then all that was
    /// taken was used. `None` if there are no such slots.
    ///
    /// # Safety
    /// The areas are those of a ring of `size` entries, 1 to 32,768, as
    /// [`super::RingLayout::place`] finds them; they are valid as long as the ring is used.
    #[expect(clippy::cast_possible_truncation, reason = "the halves of the base")]
    pub(crate) unsafe fn new(size: u16, at: Areas, base: u32, features: Features) -> Option<Self> {
        let (avail, used) = (base as u16, (base >> 16) as u16);
        Some(Self {
            areas: at,
            size,
            next_avail: Place::from_bits(avail, size)?,
            next_used: Place::from_bits(if used == 0 { avail } else { used }, size)?,
            held: None,
            unpublished: 0,
            call_known: false,
            event_idx: features.contains(Features::VIRTIO_F_EVENT_IDX),
            in_order: features.contains(Features::VIRTIO_F_IN_ORDER),
            rules: ChainRules::new(features),
            tolerated: Cell::new(0),
        })
    }

    /// Puts the ring, with the same content, at other host addresses.
    ///
    /// # Safety
    /// As for [`PackedRing::new`].
    pub(super) unsafe fn relocate(&mut self, at: Areas) {
        self.areas = at;
    }

    /// Transmit tables that were taken although they call a buffer writable.
    pub(super) fn tolerated(&self) -> u64 {
        self.tolerated.get()
    }

    /// Entries.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Where it stands, for GET_VRING_BASE.
    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    /// Gives back the last `slots` that were taken and not completed.
    pub(super) fn give_back(&mut self, slots: u16) {
        self.next_avail = self.next_avail.back(slots, self.size);
    }

    /// Tells the driver not to kick, while the ring is polled.
    pub(super) fn disarm(&mut self) {
        self.set_device_event(EVENT_DISABLE << 16);
    }

    /// Asks the driver for a kick and returns whether the ring is still empty, so that waiting for
    /// the kick can't miss a frame.
    pub(super) fn arm(&mut self) -> bool {
        // Flags 0 are for a kick whatever becomes available.
        self.set_device_event(if self.event_idx {
            EVENT_DESC << 16 | u32::from(self.next_avail.bits())
        } else {
            0
        });
        // SeqCst: pairs with the driver's full barrier between its write of the flags of a
        // descriptor and its read of our event (2.8.20.2): either it kicks or we see its frame.
        fence(Ordering::SeqCst);
        let tail = self.read_tail(self.next_avail);
        !self.next_avail.is_available(tail.flags)
    }

    /// Follows the chain that begins with `tail` at `place`, whose last descriptor has the id.
    #[cold]
    fn walk<'m>(
        &self,
        (mut place, limit): (Place, usize),
        direction: Direction,
        memory: &'m MemoryView,
        walked: &mut u32,
        mut piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Result<(Entry, u32), RingFault> {
        let mut tail = self.read_tail(place);
        if tail.flags & F_INDIRECT != 0 {
            let bytes = self.walk_table(
                (self.read_addr(place), tail),
                direction,
                memory,
                walked,
                piece,
            )?;
            return Ok((Entry::single(tail.id), bytes));
        }
        let max = limit.min(MAX_CHAIN);
        let mut bytes = 0;
        for slots in 1.. {
            *walked += 1;
            let buffer = (self.read_addr(place), tail.len, tail.flags);
            bytes = add_buffer(memory, buffer, direction, bytes, &mut piece)?;
            if tail.flags & F_NEXT == 0 {
                return Ok((Entry { id: tail.id, slots }, bytes));
            }
            if usize::from(slots) >= max {
                break;
            }
            place = place.forward(1, self.size);
            // Whatever comes after the first was written before its flags were.
            tail = self.read_tail(place);
            if !place.is_available(tail.flags) {
                return Err(RingFault::NotAvailable {
                    slot: place.slot,
                    flags: tail.flags,
                });
            }
            if tail.flags & F_INDIRECT != 0 {
                return Err(RingFault::Indirect {
                    rule: "it is part of a chain (virtio 1.3, 2.8.19)",
                });
            }
        }
        Err(RingFault::ChainTooLong { max })
    }

    /// All descriptors of an indirect table. Of their flags only WRITE counts, and their ids do
    /// not (2.8.7). DPDK's virtio_user leaves WRITE in those of buffers that it sends; they are read
    /// all the same, since no harm comes of reading what the guest says may be written.
    fn walk_table<'m>(
        &self,
        (addr, tail): (u64, Tail),
        direction: Direction,
        memory: &'m MemoryView,
        walked: &mut u32,
        mut piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Result<u32, RingFault> {
        let table = self.rules.table(memory, addr, tail.len)?;
        if tail.flags & F_NEXT != 0 {
            return Err(RingFault::Indirect {
                rule: "it is part of a chain (virtio 1.3, 2.8.19)",
            });
        }
        let (mut bytes, mut is_tolerated) = (0, false);
        // Tables have at most MAX_CHAIN descriptors.
        for index in (0..).take((table.len() / DESC_BYTES) as usize) {
            *walked += 1;
            let bits = read_descriptor(table, index)?;
            #[expect(clippy::cast_possible_truncation, reason = "fields of a packed struct")]
            let (addr, desc) = (bits as u64, Tail::from_bits((bits >> 64) as u64));
            let mut flags = desc.flags & F_WRITE;
            if direction == Direction::FromGuest {
                is_tolerated |= flags != 0;
                flags = 0;
            }
            let buffer = (addr, desc.len, flags);
            bytes = add_buffer(memory, buffer, direction, bytes, &mut piece)?;
        }
        self.tolerated
            .set(self.tolerated.get() + u64::from(is_tolerated));
        Ok(bytes)
    }

    /// The used descriptor of a chain (2.8.6).
    #[inline(always)]
    fn used_tail(place: Place, entry: Entry, written_bytes: u32) -> Tail {
        let written = if written_bytes > 0 { F_WRITE } else { 0 };
        Tail {
            len: written_bytes,
            id: entry.id,
            flags: place.used_flags() | written,
        }
    }

    /// Reads all of the descriptor at `place` but its address.
    #[inline(always)]
    fn read_tail(&self, place: Place) -> Tail {
        // Acquire: pairs with the driver's barrier before it writes the flags (2.8.20.1), so that
        // the address, the descriptors behind it and the buffers are visible.
        let bits = self.word(place.slot, 1).load(Ordering::Acquire);
        Tail::from_bits(u64::from_le(bits))
    }

    /// Reads the address in the descriptor at `place`, after its flags.
    #[inline(always)]
    fn read_addr(&self, place: Place) -> u64 {
        // Relaxed: ordered by the acquire load of the flags.
        u64::from_le(self.word(place.slot, 0).load(Ordering::Relaxed))
    }

    /// Half a descriptor: its address (0), or length, id and flags (1).
    #[inline(always)]
    fn word(&self, slot: u16, half: usize) -> &AtomicU64 {
        let at = self
            .areas
            .desc
            .wrapping_add(16 * usize::from(slot) + 8 * half);
        // SAFETY: slots of places are less than the size, so this is in the ring, which is valid as
        // long as it is used, aligned to 8 bytes as the ring is to 16; our side accesses it by
        // atomics only.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// Offset, wrap counter and flags at once, so that the driver never sees half of it.
    fn set_device_event(&self, bits: u32) {
        // SAFETY: the area is valid as long as the ring is used, of 4 bytes and aligned to them;
        // our side accesses it by atomics only.
        let event = unsafe { AtomicU32::from_ptr(self.areas.device.cast()) };
        event.store(bits.to_le(), Ordering::Relaxed);
    }

    fn driver_event(&self) -> u32 {
        // SAFETY: as for `set_device_event`.
        let event = unsafe { AtomicU32::from_ptr(self.areas.driver.cast()) };
        u32::from_le(event.load(Ordering::Relaxed))
    }
}

impl DeviceRing for PackedRing {
    type Place = Place;

    #[inline(always)]
    fn header_bytes(&self) -> u32 {
        self.rules.header_bytes
    }

    fn mergeable(&self) -> bool {
        self.rules.mergeable
    }

    #[inline(always)]
    fn entries(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn is_offered(&self, place: Place) -> bool {
        place.is_available(self.read_tail(place).flags)
    }

    /// Which descriptors are available is told by each; what bounds a burst is one lap.
    #[inline(always)]
    fn available(&self) -> Result<u16, RingFault> {
        Ok(self.size)
    }

    #[inline(always)]
    fn place(&self) -> Place {
        self.next_avail
    }

    #[inline(always)]
    fn after(&self, place: Place, slots: u16) -> Place {
        place.forward(slots, self.size)
    }

    #[inline(always)]
    fn take(&mut self, slots: u16) {
        self.next_avail = self.next_avail.forward(slots, self.size);
    }

    #[inline(always)]
    fn direct<'m>(
        &self,
        hint: RegionHint<'m>,
        direction: Direction,
    ) -> impl FnMut() -> Option<Frame<'m>> {
        let mut place = self.next_avail;
        move || {
            let tail = self.read_tail(place);
            if tail.flags != place.available_flags() | direction.flag() || tail.len == 0 {
                return None;
            }
            let buffer = hint.find(self.read_addr(place), tail.len)?;
            direction.prefetch(buffer);
            place = place.forward(1, self.size);
            Some(Frame::direct(buffer, Entry::single(tail.id)))
        }
    }

    #[inline]
    fn chain<'m>(
        &self,
        (place, limit): (Place, usize),
        direction: Direction,
        memory: &'m MemoryView,
        walked: &mut u32,
        piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Result<Option<(Entry, u32)>, RingFault> {
        if limit == 0 || !self.is_offered(place) {
            return Ok(None);
        }
        self.walk((place, limit), direction, memory, walked, piece)
            .map(Some)
    }

    #[inline]
    fn complete(&mut self, entry: Entry, written_bytes: u32) {
        let tail = Self::used_tail(self.next_used, entry, written_bytes);
        let slot = self.next_used.slot;
        if self.held.is_none() {
            self.held = Some((slot, tail));
        } else {
            // Relaxed: the driver does not look here before it saw the one that is held back.
            self.word(slot, 1)
                .store(tail.bits().to_le(), Ordering::Relaxed);
        }
        self.next_used = self.next_used.forward(entry.slots, self.size);
        self.unpublished += entry.slots;
    }

    #[inline(always)]
    fn complete_all(&mut self, chains: &[Frame<'_>], direction: Direction) {
        let mut chains = chains.iter();
        let written = |chain: &Frame<'_>| (chain.entry, direction.written(chain.len));
        if self.held.is_none()
            && let Some((entry, bytes)) = chains.next().map(written)
        {
            self.complete(entry, bytes);
        }
        let mut place = self.next_used;
        let mut slots = 0;
        for (entry, bytes) in chains.map(written) {
            let tail = Self::used_tail(place, entry, bytes);
            // Relaxed: as in `complete`.
            self.word(place.slot, 1)
                .store(tail.bits().to_le(), Ordering::Relaxed);
            place = place.forward(entry.slots, self.size);
            slots += entry.slots;
        }
        self.next_used = place;
        self.unpublished += slots;
    }

    fn in_order(&self) -> bool {
        self.in_order
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let Some((slot, tail)) = self.held.take() else {
            return false;
        };
        publish(self.word(slot, 1), tail.bits().to_le());
        let used = std::mem::take(&mut self.unpublished);
        // SeqCst: pairs with the driver's full barrier between its write of its event and its read
        // of the flags (2.8.21): one of the two sees the other.
        fence(Ordering::SeqCst);
        let event = self.driver_event();
        match event >> 16 & EVENT_MASK {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // Before the first call nothing is known of what the driver saw: call.
                let known = std::mem::replace(&mut self.call_known, true);
                !known || self.was_used(event, used)
            }
            _ => true,
        }
    }
}

impl PackedRing {
    /// Whether the descriptor that an event names is among the last `count` that were used.
    fn was_used(&self, event: u32, count: u16) -> bool {
        let mut slot = (event & 0x7fff) as u16;
        if (event & 0x8000 != 0) != self.next_used.wrap {
            // In the lap before.
            slot = slot.wrapping_sub(self.size);
        }
        let new = self.next_used.slot;
        event_passed(slot, new, new.wrapping_sub(count))
    }
}

#[cfg(test)]
mod tests;
