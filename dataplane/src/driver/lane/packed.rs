//! Lanes on packed rings.

use super::super::packed::{PackedArea, PackedDesc, Position};
use super::super::queue::DeviceFault;
use super::{Area, Lane, UsedSlot};

/// Slots that are taken back at one look: as many as peers complete at once.
const RUN: u16 = 32;

impl Lane {
    /// Writes descriptors from the last to the first, so that the device sees the burst at once.
    #[inline]
    pub(super) fn push_packed(&self, ring: &PackedArea, avail: Position, count: u16) {
        let size = ring.size();
        let laps = [avail, avail.advance(size, size)];
        let flags = laps.map(Position::available_flags);
        for ahead in (0..count << self.shift).rev() {
            let at = avail.slot + ahead;
            let (at, bits) = if at < size {
                (at, flags[0])
            } else {
                (at - size, flags[1])
            };
            // Slots are made available in a ring of the same length.
            let (place, buffer) = (at >> self.shift, at & (self.per_slot - 1));
            let slot = self.order[usize::from(place)];
            let mut desc = self.descs[usize::from((slot << self.shift) + buffer)];
            desc.flags |= bits;
            ring.write_desc(at, desc);
        }
    }

    /// Takes back runs of slots that an in-order device used one by one: if the last of a run is
    /// used, all are.
    #[inline]
    pub(super) fn reclaim_runs(&mut self) -> u16 {
        let Area::Packed { ring, used, .. } = &mut self.area else {
            return 0;
        };
        if !self.in_order || self.batch.is_some() {
            return 0;
        }
        let mut total = 0;
        while self.pushed.wrapping_sub(self.reclaimed) >= u32::from(RUN) {
            let last = used.advance((RUN - 1) << self.shift, ring.size());
            let desc = ring.read_tail(last.slot);
            if !last.is_used(desc.flags) || desc.id != last.slot >> self.shift {
                break;
            }
            *used = used.advance(RUN << self.shift, ring.size());
            self.reclaimed = self.reclaimed.wrapping_add(u32::from(RUN));
            total += RUN;
        }
        total
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
