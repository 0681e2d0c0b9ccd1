//! Preposted slots on a packed ring.

use std::ops::Range;

use super::super::packed::{PackedArea, PackedDesc, Position};
use super::super::queue::{Calls, DeviceFault};
use super::slots::Slots;
use super::{Described, UsedSlot};

/// Slots that are taken back at one look: as many as peers complete at once.
const RUN: u16 = 32;

#[derive(Debug)]
pub(super) struct PackedSlots {
    pub(super) area: PackedArea,
    avail: Position,
    used: Position,
    /// The slots' descriptors, available and used bits clear.
    descs: Vec<PackedDesc>,
}

impl PackedSlots {
    pub(super) fn new(area: PackedArea, descs: &[Described], slots: &Slots) -> Self {
        let desc = |(index, (buffer, flags)): (u16, &Described)| PackedDesc {
            addr: buffer.addr,
            len: buffer.len,
            id: index >> slots.shift,
            flags: *flags,
        };
        Self {
            avail: Position::START,
            used: Position::START,
            descs: (0..area.size()).zip(descs).map(desc).collect(),
            area,
        }
    }

    /// Writes descriptors from the last to the first, so that the device sees the burst at once.
    #[inline]
    pub(super) fn push(&mut self, slots: &Slots, count: u16) {
        let (avail, size) = (self.avail, self.area.size());
        let start = u32::from(avail.slot);
        let end = start + (u32::from(count) << slots.shift);
        if let Some(wrapped) = end.checked_sub(u32::from(size)).filter(|more| *more > 0) {
            let lap = avail.advance(size - avail.slot, size);
            self.write(slots, 0..wrapped, lap.available_flags());
        }
        self.write(slots, start..end.min(size.into()), avail.available_flags());
        self.avail = avail.advance(count << slots.shift, size);
    }

    /// Makes places of the ring available, the last one first.
    #[inline]
    fn write(&self, slots: &Slots, places: Range<u32>, flags: u16) {
        // Both ends are at most the ring's size, which has 16 bits.
        let places = places.start as usize..places.end as usize;
        for at in places.rev() {
            // Slots are made available in a ring of the same length.
            let buffer = at & usize::from(slots.per_slot() - 1);
            let slot = usize::from(slots.at_place(at >> slots.shift));
            let mut desc = self.descs[(slot << slots.shift) + buffer];
            desc.flags |= flags;
            self.area.write_desc_at(at, desc);
        }
    }

    #[inline]
    pub(super) fn wants_kick(&self, slots: &Slots, count: u16) -> bool {
        self.area.wants_kick(self.avail, count << slots.shift)
    }

    pub(super) fn request_calls(&self, event_idx: bool, calls: Calls) {
        self.area.request_calls(event_idx, calls, self.used);
    }

    /// Whether the next descriptor is used; if nothing is available, it may seem so.
    pub(super) fn is_used(&self) -> bool {
        self.used.is_used(self.area.read_tail(self.used.slot).flags)
    }

    /// Takes back what an in-order device used, without a look at each slot: used descriptors name
    /// the last slot of a batch, and if the last of a run of single ones is used, all are. `None`
    /// in the middle of a batch.
    #[inline]
    pub(super) fn reclaim_in_order(
        &mut self,
        slots: &mut Slots,
    ) -> Option<Result<u16, DeviceFault>> {
        if slots.batch.is_some() {
            return None;
        }
        let (area, shift, mut used) = (&self.area, slots.shift, self.used);
        let (mut reclaimed, mut total) = (slots.reclaimed, 0);
        let outcome = loop {
            let in_flight = slots.pushed.wrapping_sub(reclaimed);
            if in_flight == 0 {
                break Ok(total);
            }
            let is_run = in_flight >= u32::from(RUN) && {
                let end = used.advance((RUN - 1) << shift, area.size());
                let last = area.read_tail(end.slot);
                end.is_used(last.flags) && last.id == end.slot >> shift
            };
            let count = if is_run {
                RUN
            } else {
                let desc = area.read_tail(used.slot);
                if !used.is_used(desc.flags) {
                    break Ok(total);
                }
                // In order, slots are where they were in the first lap.
                let skipped = desc.id.wrapping_sub(used.slot >> shift) & (slots.count() - 1);
                if desc.id >= slots.count() || u32::from(skipped) >= in_flight {
                    let id = u32::from(desc.id);
                    break Err(DeviceFault::UsedId { id });
                }
                skipped + 1
            };
            used = used.advance(count << shift, area.size());
            reclaimed = reclaimed.wrapping_add(u32::from(count));
            total += count;
        };
        (self.used, slots.reclaimed) = (used, reclaimed);
        Some(outcome)
    }

    #[inline]
    pub(super) fn harvest(
        &mut self,
        slots: &mut Slots,
        into: &mut [UsedSlot],
    ) -> Result<usize, DeviceFault> {
        let mut count = 0;
        while count < into.len() && slots.in_flight() > 0 {
            let into = &mut into[count..];
            let mut taken = match slots.batch {
                None => self.take_expected(slots, into),
                Some(_) => slots.take_batch(into),
            };
            if taken == 0 {
                let desc = self.area.read_tail(self.used.slot);
                if !self.used.is_used(desc.flags) {
                    break;
                }
                slots.begin_batch(desc.id, desc.len)?;
                taken = slots.take_batch(into);
            }
            count += taken;
            // At most the slots that there are.
            let descs = u16::try_from(taken).unwrap_or(0) << slots.shift;
            self.used = self.used.advance(descs, self.area.size());
        }
        Ok(count)
    }

    /// Takes back slots as long as they are used and those that are due.
    #[inline]
    fn take_expected(&self, slots: &mut Slots, into: &mut [UsedSlot]) -> usize {
        let (size, per_slot) = (self.area.size(), slots.per_slot());
        let (mut position, mut reclaimed, mut count) = (self.used, slots.reclaimed, 0);
        for out in into.iter_mut().take(slots.in_flight().into()) {
            let desc = self.area.read_tail(position.slot);
            let slot = slots.at(reclaimed);
            if !position.is_used(desc.flags) || desc.id != slot {
                break;
            }
            let len = slots.written(desc.len);
            *out = UsedSlot { slot, len };
            position = position.advance(per_slot, size);
            reclaimed = reclaimed.wrapping_add(1);
            count += 1;
        }
        slots.reclaimed = reclaimed;
        count
    }
}
