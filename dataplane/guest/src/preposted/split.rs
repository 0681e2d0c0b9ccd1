//! Preposted slots on a split ring.

use super::super::queue::{Calls, DeviceFault};
use super::super::split::{DESC_F_NEXT, SplitArea, SplitDesc};
use super::slots::Slots;
use super::{Described, UsedSlot};

#[derive(Debug)]
pub(super) struct SplitSlots {
    pub(super) area: SplitArea,
    /// The used index up to which slots were taken back.
    used: u16,
}

impl SplitSlots {
    /// Writes all descriptors, and the available ring in advance.
    pub(super) fn new(area: SplitArea, descs: &[Described], slots: &Slots) -> Self {
        for (index, (buffer, flags)) in (0..area.size()).zip(descs) {
            let is_linked = flags & DESC_F_NEXT != 0;
            let desc = SplitDesc {
                addr: buffer.addr,
                len: buffer.len,
                flags: *flags,
                next: if is_linked { index + 1 } else { 0 },
            };
            area.write_desc(index, desc);
            area.set_avail_entry(index, index % slots.count() * slots.per_slot());
        }
        Self { area, used: 0 }
    }

    #[inline]
    pub(super) fn push(&self, slots: &Slots, count: u16) {
        self.area.set_avail_idx(avail(slots).wrapping_add(count));
    }

    #[inline]
    pub(super) fn wants_kick(&self, slots: &Slots, event_idx: bool, count: u16) -> bool {
        let new = avail(slots);
        self.area
            .wants_kick(event_idx, new, new.wrapping_sub(count))
    }

    pub(super) fn request_calls(&self, event_idx: bool, calls: Calls) {
        self.area.request_calls(event_idx, calls, self.used);
    }

    pub(super) fn is_used(&self) -> bool {
        self.area.used_idx() != self.used
    }

    /// How many more were used, and the used index.
    #[inline]
    fn newly_used(&self, slots: &Slots) -> Result<(u16, u16), DeviceFault> {
        let (idx, available) = (self.area.used_idx(), slots.in_flight());
        let used = idx.wrapping_sub(self.used);
        if used > available {
            return Err(DeviceFault::UsedIndex { used, available });
        }
        Ok((used, idx))
    }

    /// Takes back what an in-order device used: one index tells.
    #[inline]
    pub(super) fn reclaim_in_order(&mut self, slots: &mut Slots) -> Result<u16, DeviceFault> {
        let (count, idx) = self.newly_used(slots)?;
        self.used = idx;
        slots.batch = None;
        slots.reclaimed = slots.reclaimed.wrapping_add(u32::from(count));
        Ok(count)
    }

    #[inline]
    pub(super) fn harvest(
        &mut self,
        slots: &mut Slots,
        into: &mut [UsedSlot],
    ) -> Result<usize, DeviceFault> {
        let (_, idx) = self.newly_used(slots)?;
        let mut count = 0;
        while self.used != idx && count < into.len() {
            let pending = usize::from(idx.wrapping_sub(self.used));
            let room = pending.min(into.len() - count);
            let into = &mut into[count..count + room];
            let mut taken = match slots.batch {
                None => self.take_expected(slots, into),
                Some(_) => slots.take_batch(into),
            };
            if taken == 0 {
                taken = self.take_other(slots, into)?;
            }
            count += taken;
            // At most `pending`.
            self.used = self.used.wrapping_add(u16::try_from(taken).unwrap_or(0));
        }
        Ok(count)
    }

    /// Takes back slots as long as they are those that are due.
    #[inline]
    fn take_expected(&self, slots: &mut Slots, into: &mut [UsedSlot]) -> usize {
        let (mask, mut used) = (self.area.size() - 1, self.used);
        let (mut reclaimed, mut count) = (slots.reclaimed, 0);
        for out in into {
            let (id, len) = self.area.used_entry(used & mask);
            let slot = slots.at(reclaimed);
            if id != u32::from(slot << slots.shift) {
                break;
            }
            let len = slots.written(len);
            *out = UsedSlot { slot, len };
            (used, reclaimed) = (used.wrapping_add(1), reclaimed.wrapping_add(1));
            count += 1;
        }
        slots.reclaimed = reclaimed;
        count
    }

    /// Takes back another slot than the one that was due.
    #[cold]
    fn take_other(&self, slots: &mut Slots, into: &mut [UsedSlot]) -> Result<usize, DeviceFault> {
        let (id, len) = self.area.used_entry(self.used & (self.area.size() - 1));
        let place = slots.place_of(slots.reclaimed);
        let head = u16::try_from(id).map_err(|_| DeviceFault::UsedId { id })?;
        if head & (slots.per_slot() - 1) != 0 {
            return Err(DeviceFault::UsedId { id });
        }
        slots.begin_batch(head >> slots.shift, len)?;
        let taken = slots.take_batch(into);
        if !slots.in_order {
            // All entries of the available ring that stand for this place in the order.
            for entry in (place..usize::from(self.area.size())).step_by(usize::from(slots.count()))
            {
                // Below the size of the ring.
                self.area
                    .set_avail_entry(u16::try_from(entry).unwrap_or(0), head);
            }
        }
        Ok(taken)
    }
}

/// The available index: slots made available, modulo 65,536.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "the index wraps")]
fn avail(slots: &Slots) -> u16 {
    slots.pushed as u16
}
