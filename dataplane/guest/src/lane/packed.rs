//! Lanes on packed rings.

use std::ops::Range;

use super::super::packed::{PackedArea, PackedDesc, Position};
use super::super::queue::DeviceFault;
use super::{Area, Lane, UsedSlot};

/// Slots that are taken back at one look: as many as peers complete at once.
const RUN: u16 = 32;

impl Lane {
    /// Writes descriptors from the last to the first, so that the device sees the burst at once.
    #[inline]
    pub(super) fn push_packed(&self, ring: &PackedArea, avail: Position, count: u16) {
        let size = u32::from(ring.size());
        let start = u32::from(avail.slot);
        let end = start + (u32::from(count) << self.shift);
        if end > size {
            let lap = avail.advance(ring.size() - avail.slot, ring.size());
            self.write_packed(ring, 0..end - size, lap.available_flags());
        }
        self.write_packed(ring, start..end.min(size), avail.available_flags());
    }

    /// Makes places of the ring available, the last one first.
    #[inline]
    fn write_packed(&self, ring: &PackedArea, places: Range<u32>, flags: u16) {
        // Both ends are at most the ring's size, which has 16 bits.
        let places = places.start as usize..places.end as usize;
        for at in places.rev() {
            // Slots are made available in a ring of the same length.
            let (place, buffer) = (at >> self.shift, at & usize::from(self.per_slot - 1));
            let slot = usize::from(self.order[place]);
            let mut desc = self.descs[(slot << self.shift) + buffer];
            desc.flags |= flags;
            ring.write_desc_at(at, desc);
        }
    }

    /// Takes back what an in-order device used, without a look at each slot: used descriptors name
    /// the last slot of a batch, and if the last of a run of single ones is used, all are. `None` if
    /// it can't be told so.
    #[inline]
    pub(super) fn reclaim_in_order(&mut self) -> Option<Result<u16, DeviceFault>> {
        let Area::Packed { ring, used, .. } = &mut self.area else {
            return None;
        };
        if !self.in_order || self.batch.is_some() {
            return None;
        }
        let (mut reclaimed, mut total) = (self.reclaimed, 0);
        let outcome = loop {
            let in_flight = self.pushed.wrapping_sub(reclaimed);
            if in_flight == 0 {
                break Ok(total);
            }
            let is_run = in_flight >= u32::from(RUN) && {
                let end = used.advance((RUN - 1) << self.shift, ring.size());
                let last = ring.read_tail(end.slot);
                end.is_used(last.flags) && last.id == end.slot >> self.shift
            };
            let count = if is_run {
                RUN
            } else {
                let desc = ring.read_tail(used.slot);
                if !used.is_used(desc.flags) {
                    break Ok(total);
                }
                // In order, slots are where they were in the first lap.
                let skipped = desc.id.wrapping_sub(used.slot >> self.shift) & (self.slots - 1);
                if desc.id >= self.slots || u32::from(skipped) >= in_flight {
                    let id = u32::from(desc.id);
                    break Err(DeviceFault::UsedId { id });
                }
                skipped + 1
            };
            *used = used.advance(count << self.shift, ring.size());
            reclaimed = reclaimed.wrapping_add(u32::from(count));
            total += count;
        };
        self.reclaimed = reclaimed;
        Some(outcome)
    }

    #[inline]
    pub(super) fn harvest_packed(&mut self, into: &mut [UsedSlot]) -> Result<usize, DeviceFault> {
        let mut count = 0;
        while count < into.len() && self.pushed != self.reclaimed {
            let mut taken = match self.batch {
                None => self.take_expected_packed(&mut into[count..]),
                Some(_) => {
                    let taken = self.take_batch(&mut into[count..]);
                    self.advance_used(taken);
                    taken
                }
            };
            if taken == 0 {
                let Area::Packed { ring, used, .. } = &self.area else {
                    break;
                };
                let desc = ring.read_tail(used.slot);
                if !used.is_used(desc.flags) {
                    break;
                }
                self.begin_batch(desc.id, desc.len)?;
                taken = self.take_batch(&mut into[count..]);
                self.advance_used(taken);
            }
            count += taken;
        }
        Ok(count)
    }

    /// Takes back slots as long as they are used and those that are due.
    #[inline]
    pub(super) fn take_expected_packed(&mut self, into: &mut [UsedSlot]) -> usize {
        let Area::Packed { ring, used, .. } = &self.area else {
            return 0;
        };
        let (size, last_place) = (ring.size(), usize::from(self.slots) - 1);
        let (mut position, mut reclaimed, mut count) = (*used, self.reclaimed, 0);
        for out in into {
            let desc = ring.read_tail(position.slot);
            let slot = self.order[reclaimed as usize & last_place];
            if reclaimed == self.pushed || !position.is_used(desc.flags) || desc.id != slot {
                break;
            }
            let len = self.written(desc.len);
            *out = UsedSlot { slot, len };
            position = position.advance(self.per_slot, size);
            reclaimed = reclaimed.wrapping_add(1);
            count += 1;
        }
        self.reclaimed = reclaimed;
        self.advance_used(count);
        count
    }

    #[inline]
    pub(super) fn advance_used(&mut self, slots: usize) {
        if let Area::Packed { ring, used, .. } = &mut self.area {
            // At most `slots` of the lane.
            let descs = u16::try_from(slots).unwrap_or(0) << self.shift;
            *used = used.advance(descs, ring.size());
        }
    }

    /// The packed descriptor of a buffer.
    pub(super) fn packed_desc(&self, index: u16) -> PackedDesc {
        let segment = self.segments[usize::from(index)];
        PackedDesc {
            addr: segment.addr,
            len: segment.len,
            id: index >> self.shift,
            flags: self.flags(index & (self.per_slot - 1)),
        }
    }
}
