//! Device side of a split virtqueue (virtio 1.3, 2.7).
//!
//! ```text
//!   descriptor table   16 B x size       addr u64 | len u32 | flags u16 | next u16
//!   avail ring (driver writes)           flags u16 | idx u16 | ring u16 x size | used_event u16
//!   used ring (device writes)            flags u16 | idx u16 | ring (id u32, len u32) x size
//!                                        | avail_event u16
//! ```
//! The indices run freely modulo 65,536; an entry's place is the index modulo the size.
//! Descriptors are read once, into a local copy, which is checked and then used.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::chain::{
    ChainRules, DESC_BYTES, F_INDIRECT, F_NEXT, add_buffer, event_passed, read_descriptor,
};
use super::publish::publish;
use super::{Areas, DeviceRing, Direction, RingFault};
use crate::burst::{Entry, Frame, MAX_CHAIN};
use crate::memory::{GuestSlice, MemoryView, RegionHint};
use crate::wire::Features;

/// avail.flags: the driver wants no calls (2.7.7).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// used.flags: the device wants no kicks (2.7.10).
const USED_NO_NOTIFY: u16 = 1;

/// A descriptor, read once.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "fields of a packed struct")]
    fn from_bits(bits: u128) -> Self {
        Self {
            addr: bits as u64,
            len: (bits >> 64) as u32,
            flags: (bits >> 96) as u16,
            next: (bits >> 112) as u16,
        }
    }
}

/// Device side of one split ring. Its owner holds the queue's lock.
#[derive(Debug)]
pub(crate) struct SplitRing {
    areas: Areas,
    size: u16,
    /// Index of the next avail entry to take.
    next_avail: u16,
    /// Index of the next used entry to write; ahead of `used.idx` until published.
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    /// A call was decided on since the ring started: `published` can be compared with used_event.
    call_known: bool,
    /// It goes on at its used index, though it was told to begin at 0.
    resumed: bool,
    event_idx: bool,
    in_order: bool,
    rules: ChainRules,
}

impl SplitRing {
    /// A ring that goes on at avail index `next_avail`, and at the used index that is in memory.
    ///
    /// A front-end that does not know where its ring stands says 0, as DPDK's virtio_user does to a
    /// back-end that was started again. A fresh ring's used index is 0 as well; what another
    /// one's says was completed in order, so the ring goes on there.
    ///
    /// # Safety
    /// The areas are those of a ring of `size` entries, a power of two, as
    /// [`super::RingLayout::place`] finds them; they are valid as long as the ring is used.
    pub(crate) unsafe fn new(size: u16, at: Areas, next_avail: u16, features: Features) -> Self {
        debug_assert!(size.is_power_of_two());
        let mut ring = Self {
            areas: at,
            size,
            next_avail,
            next_used: 0,
            published: 0,
            call_known: false,
            resumed: false,
            event_idx: features.contains(Features::VIRTIO_F_EVENT_IDX),
            in_order: features.contains(Features::VIRTIO_F_IN_ORDER),
            rules: ChainRules::new(features),
        };
        ring.published = u16::from_le(ring.used_u16(2).load(Ordering::Relaxed));
        ring.next_used = ring.published;
        if next_avail == 0 && ring.published != 0 {
            ring.next_avail = ring.published;
            ring.resumed = true;
        }
        ring
    }

    /// Puts the ring, with the same content, at other host addresses.
    ///
    /// # Safety
    /// As for [`SplitRing::new`].
    pub(crate) unsafe fn relocate(&mut self, at: Areas) {
        self.areas = at;
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next avail entry, for GET_VRING_BASE.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Whether it goes on at its used index, though it was told to begin at 0.
    pub(crate) fn resumed(&self) -> bool {
        self.resumed
    }

    /// Gives back the last `count` chains that were taken and not completed: they will be taken,
    /// read and checked again.
    pub(crate) fn give_back(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_sub(count);
    }

    /// What the driver put at avail index `index`: the head of a chain, unless [`read_descriptor`]
    /// finds none.
    #[inline]
    fn avail_entry(&self, index: u16) -> u16 {
        let slot = usize::from(index & (self.size - 1));
        // Relaxed: ordered by the acquire load of the index.
        u16::from_le(self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed))
    }

    /// The descriptor table.
    #[inline(always)]
    fn table(&self) -> GuestSlice<'_> {
        // SAFETY: the area has as many descriptors, and is valid as long as the ring is used.
        unsafe { GuestSlice::new(self.areas.desc, DESC_BYTES * u32::from(self.size)) }
    }

    /// Gives the slices of the chain at `head` to `piece` and returns their length. At most
    /// [`MAX_CHAIN`] descriptors are followed, whatever the guest links; `walked` counts them.
    ///
    /// # Errors
    /// The rule that the chain breaks; slices may have been given before.
    #[inline]
    fn walk<'m>(
        &self,
        head: u16,
        direction: Direction,
        memory: &'m MemoryView,
        walked: &mut u32,
        mut piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Result<u32, RingFault> {
        let mut table = self.table();
        let mut index = head;
        let mut is_indirect = false;
        let mut bytes: u32 = 0;
        for _ in 0..=MAX_CHAIN {
            *walked += 1;
            let desc = Descriptor::from_bits(read_descriptor(table, index)?);
            if desc.flags & F_INDIRECT != 0 {
                if is_indirect {
                    return Err(RingFault::Indirect {
                        rule: "a table points to another table",
                    });
                }
                if desc.flags & F_NEXT != 0 {
                    return Err(RingFault::Indirect {
                        rule: "it has a next descriptor (virtio 1.3, 2.7.5.3.1)",
                    });
                }
                table = self.rules.table(memory, desc.addr, desc.len)?;
                is_indirect = true;
                index = 0;
                continue;
            }
            let buffer = (desc.addr, desc.len, desc.flags);
            bytes = add_buffer(memory, buffer, direction, bytes, &mut piece)?;
            if desc.flags & F_NEXT == 0 {
                return Ok(bytes);
            }
            index = desc.next;
        }
        Err(RingFault::ChainTooLong { max: MAX_CHAIN })
    }

    /// Tells the driver not to kick, while the ring is polled.
    pub(crate) fn disarm(&mut self) {
        // With EVENT_IDX the old avail_event is left behind as the index goes on: the driver
        // kicks once in 65,536 frames, which is harmless.
        if !self.event_idx {
            self.used_u16(0)
                .store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver for a kick and returns whether the ring is still empty, so that waiting for
    /// the kick can't miss a frame. A bad avail index counts as not empty: the next poll finds it.
    pub(crate) fn arm(&mut self) -> bool {
        if self.event_idx {
            let event_at = 4 + 8 * usize::from(self.size);
            self.used_u16(event_at)
                .store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // SeqCst: pairs with the driver's full barrier between its write of avail.idx and its read
        // of avail_event or flags (2.7.13.4.1): either it kicks or we see its frame.
        fence(Ordering::SeqCst);
        self.available() == Ok(0)
    }

    /// Writes the used entry at a used index.
    #[inline(always)]
    fn write_used(&self, index: u16, id: u16, written_bytes: u32) {
        let slot = usize::from(index & (self.size - 1));
        let bits = u64::from(id) | u64::from(written_bytes) << 32;
        let at = self.areas.device.wrapping_add(4 + 8 * slot).cast::<u64>();
        // SAFETY: the slot is in the used ring, which is valid as long as the ring is used; entries
        // are aligned to 4 bytes only, hence unaligned.
        unsafe { at.write_unaligned(bits.to_le()) };
    }

    /// The u16 at `offset` of the avail area. Offsets are even and within the area.
    #[inline(always)]
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the area is valid as long as the ring is used, aligned to 2 bytes, and
        // `offset` is even and within it; our side accesses it by atomics only.
        unsafe { AtomicU16::from_ptr(self.areas.driver.wrapping_add(offset).cast()) }
    }

    /// The u16 at `offset` of the used area: flags, idx or avail_event.
    #[inline(always)]
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as for `avail_u16`; used entries, which are written without atomics, do not
        // overlap these fields.
        unsafe { AtomicU16::from_ptr(self.areas.device.wrapping_add(offset).cast()) }
    }
}

impl DeviceRing for SplitRing {
    /// An avail index.
    type Place = u16;

    fn header_bytes(&self) -> u32 {
        self.rules.header_bytes
    }

    fn mergeable(&self) -> bool {
        self.rules.mergeable
    }

    #[inline]
    fn entries(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn is_offered(&self, _place: u16) -> bool {
        // `available` told exactly.
        true
    }

    #[inline(always)]
    fn available(&self) -> Result<u16, RingFault> {
        // Acquire: pairs with the driver's barrier before it writes avail.idx (2.7.13.3), so that
        // entries and descriptors up to the index are visible.
        let index = self.avail_u16(2).load(Ordering::Acquire);
        let ahead = u16::from_le(index).wrapping_sub(self.next_avail);
        if ahead > self.size {
            let (next, size) = (self.next_avail, self.size);
            return Err(RingFault::AvailIndex {
                index: u16::from_le(index),
                next,
                ahead,
                size,
            });
        }
        Ok(ahead)
    }

    #[inline(always)]
    fn place(&self) -> u16 {
        self.next_avail
    }

    #[inline(always)]
    fn after(&self, place: u16, slots: u16) -> u16 {
        place.wrapping_add(slots)
    }

    #[inline(always)]
    fn take(&mut self, slots: u16) {
        self.next_avail = self.next_avail.wrapping_add(slots);
    }

    #[inline(always)]
    fn direct<'m>(
        &self,
        hint: RegionHint<'m>,
        direction: Direction,
    ) -> impl FnMut() -> Option<Frame<'m>> {
        let table = self.table();
        let mut index = self.next_avail;
        move || {
            let head = self.avail_entry(index);
            let desc = Descriptor::from_bits(table.read_descriptor(head)?);
            if desc.flags != direction.flag() || desc.len == 0 {
                return None;
            }
            let buffer = hint.find(desc.addr, desc.len)?;
            direction.prefetch(buffer);
            index = index.wrapping_add(1);
            Some(Frame::direct(buffer, Entry::single(head)))
        }
    }

    #[inline]
    fn chain<'m>(
        &self,
        (place, limit): (u16, usize),
        direction: Direction,
        memory: &'m MemoryView,
        walked: &mut u32,
        piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Result<Option<(Entry, u32)>, RingFault> {
        if limit == 0 {
            return Ok(None);
        }
        let head = self.avail_entry(place);
        let bytes = self.walk(head, direction, memory, walked, piece)?;
        Ok(Some((Entry::single(head), bytes)))
    }

    #[inline]
    fn complete(&mut self, entry: Entry, written_bytes: u32) {
        self.write_used(self.next_used, entry.id, written_bytes);
        self.next_used = self.next_used.wrapping_add(entry.slots);
    }

    #[inline(always)]
    fn complete_all(&mut self, chains: &[Frame<'_>], direction: Direction) {
        let mut index = self.next_used;
        for chain in chains {
            let written_bytes = direction.written(chain.len);
            self.write_used(index, chain.entry.id, written_bytes);
            index = index.wrapping_add(1);
        }
        self.next_used = index;
    }

    fn in_order(&self) -> bool {
        self.in_order
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        publish(self.used_u16(2), new.to_le());
        self.published = new;
        // SeqCst: pairs with the driver's full barrier between its write of used_event or flags
        // and its read of used.idx (2.7.7.1, 2.7.10.1): one of the two sees the other.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = u16::from_le(self.avail_u16(0).load(Ordering::Relaxed));
            return flags & AVAIL_NO_INTERRUPT == 0;
        }
        let event_at = 4 + 2 * usize::from(self.size);
        let event = u16::from_le(self.avail_u16(event_at).load(Ordering::Relaxed));
        // Before the first call nothing is known of what the driver saw: call.
        let known = std::mem::replace(&mut self.call_known, true);
        !known || event_passed(event, new, old)
    }
}
