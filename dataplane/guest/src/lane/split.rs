//! Lanes on split rings.

use super::super::queue::DeviceFault;
use super::super::split::{DESC_F_NEXT, SplitDesc};
use super::{Area, Lane, UsedSlot};

impl Lane {
    #[inline]
    pub(super) fn harvest_split(&mut self, into: &mut [UsedSlot]) -> Result<usize, DeviceFault> {
        let Area::Split { ring, used } = &self.area else {
            return Ok(0);
        };
        let (mut used, idx, mask) = (*used, ring.used_idx(), ring.size() - 1);
        let available = self.slots - self.free();
        if idx.wrapping_sub(used) > available {
            return Err(DeviceFault::UsedIndex {
                used: idx.wrapping_sub(used),
                available,
            });
        }
        let mut count = 0;
        while used != idx && count < into.len() {
            let pending = usize::from(idx.wrapping_sub(used));
            let room = pending.min(into.len() - count);
            let into = &mut into[count..count + room];
            let mut taken = match self.batch {
                None => self.take_expected_split(used, into),
                Some(_) => self.take_batch(into),
            };
            if taken == 0 {
                let Area::Split { ring, .. } = &self.area else {
                    break;
                };
                let (id, len) = ring.used_entry(used & mask);
                taken = self.take_other_split(id, len, into)?;
            }
            count += taken;
            // At most `available`.
            used = used.wrapping_add(u16::try_from(taken).unwrap_or(0));
        }
        if let Area::Split { used: at, .. } = &mut self.area {
            *at = used;
        }
        Ok(count)
    }

    /// Takes back slots as long as they are those that are due.
    #[inline]
    pub(super) fn take_expected_split(&mut self, mut used: u16, into: &mut [UsedSlot]) -> usize {
        let Area::Split { ring, .. } = &self.area else {
            return 0;
        };
        let (mask, last_place) = (ring.size() - 1, usize::from(self.slots) - 1);
        let (mut reclaimed, mut count) = (self.reclaimed, 0);
        for out in into {
            let (id, len) = ring.used_entry(used & mask);
            let slot = self.order[reclaimed as usize & last_place];
            if id != u32::from(slot << self.shift) {
                break;
            }
            let len = self.written(len);
            *out = UsedSlot { slot, len };
            (used, reclaimed) = (used.wrapping_add(1), reclaimed.wrapping_add(1));
            count += 1;
        }
        self.reclaimed = reclaimed;
        count
    }

    /// Takes back another slot than the one that was due.
    #[cold]
    pub(super) fn take_other_split(
        &mut self,
        id: u32,
        len: u32,
        into: &mut [UsedSlot],
    ) -> Result<usize, DeviceFault> {
        let place = self.place_of(self.reclaimed);
        let head = u16::try_from(id).map_err(|_| DeviceFault::UsedId { id })?;
        if head & (self.per_slot - 1) != 0 {
            return Err(DeviceFault::UsedId { id });
        }
        self.begin_batch(head >> self.shift, len)?;
        let taken = self.take_batch(into);
        if !self.in_order {
            self.rewrite_avail(place, head);
        }
        Ok(taken)
    }

    /// Puts `head` at all entries of the available ring that stand for this place in the order.
    pub(super) fn rewrite_avail(&self, place: usize, head: u16) {
        if let Area::Split { ring, .. } = &self.area {
            for entry in (place..usize::from(ring.size())).step_by(usize::from(self.slots)) {
                // Below the size of the ring.
                ring.set_avail_entry(u16::try_from(entry).unwrap_or(0), head);
            }
        }
    }

    pub(super) fn write_split_tables(&self) {
        let Area::Split { ring, .. } = &self.area else {
            return;
        };
        for (index, segment) in (0..ring.size()).zip(&self.segments) {
            let flags = self.flags(index % self.per_slot);
            let next = if flags & DESC_F_NEXT != 0 {
                index + 1
            } else {
                0
            };
            let desc = SplitDesc {
                addr: segment.addr,
                len: segment.len,
                flags,
                next,
            };
            ring.write_desc(index, desc);
            ring.set_avail_entry(index, index % self.slots * self.per_slot);
        }
    }
}
