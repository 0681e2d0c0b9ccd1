//! Which slots are with the device, and in what order.

use super::super::queue::DeviceFault;
use super::{BufferSide, UsedSlot};

/// The account of a preposted ring's slots, of which there are a power of two.
#[derive(Debug)]
pub(super) struct Slots {
    direction: BufferSide,
    pub(super) in_order: bool,
    /// Descriptors of the ring that a slot takes: this power of two.
    pub(super) shift: u32,
    /// Bytes that the device may write into each slot.
    rooms: Vec<u32>,
    /// Slots in the order in which they are made available, from `pushed` on; a ring.
    order: Vec<u16>,
    count: u16,
    /// Slots made available, ever.
    pub(super) pushed: u32,
    /// Slots reclaimed, ever.
    pub(super) reclaimed: u32,
    /// The last slot of a batch that an in-order device used in one entry, and its length, until
    /// all of the batch is taken.
    pub(super) batch: Option<UsedSlot>,
}

impl Slots {
    pub(super) fn new(
        direction: BufferSide,
        in_order: bool,
        per_slot: u16,
        rooms: Vec<u32>,
    ) -> Self {
        // No more than a ring's entries.
        let count = u16::try_from(rooms.len()).unwrap_or(u16::MAX);
        Self {
            direction,
            in_order,
            shift: per_slot.trailing_zeros(),
            rooms,
            order: (0..count).collect(),
            count,
            pushed: 0,
            reclaimed: 0,
            batch: None,
        }
    }

    #[inline]
    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// Descriptors that a slot takes.
    #[inline]
    pub(super) fn per_slot(&self) -> u16 {
        1 << self.shift
    }

    /// Slots that are with the device.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "at most `count` are")]
    pub(super) fn in_flight(&self) -> u16 {
        self.pushed.wrapping_sub(self.reclaimed) as u16
    }

    #[inline]
    pub(super) fn free(&self) -> u16 {
        self.count - self.in_flight()
    }

    #[inline]
    pub(super) fn place_of(&self, count: u32) -> usize {
        count as usize & (usize::from(self.count) - 1)
    }

    /// The slot that is made available after `count` others, or was.
    #[inline]
    pub(super) fn at(&self, count: u32) -> u16 {
        self.order[self.place_of(count)]
    }

    /// The slot at this place of the order.
    #[inline]
    pub(super) fn at_place(&self, place: usize) -> u16 {
        self.order[place]
    }

    /// What a used length says: without writable buffers nothing.
    #[inline]
    pub(super) fn written(&self, len: u32) -> u32 {
        match self.direction {
            BufferSide::Transmit => 0,
            BufferSide::Receive => len,
        }
    }

    /// Begins a batch that ends with this slot: it, and those that an in-order device left out
    /// before it, are used.
    #[cold]
    pub(super) fn begin_batch(&mut self, slot: u16, len: u32) -> Result<(), DeviceFault> {
        let fault = DeviceFault::UsedId {
            id: u32::from(slot),
        };
        if slot >= self.count {
            return Err(fault);
        }
        let skipped = slot.wrapping_sub(self.at(self.reclaimed)) & (self.count - 1);
        if self.in_order && skipped >= self.in_flight() {
            return Err(fault);
        }
        let len = self.written(len);
        self.batch = Some(UsedSlot { slot, len });
        Ok(())
    }

    /// Takes the next slots of a batch, as far as `into` has room.
    #[cold]
    pub(super) fn take_batch(&mut self, into: &mut [UsedSlot]) -> usize {
        let mut count = 0;
        while let (Some(end), Some(out)) = (self.batch, into.get_mut(count)) {
            let place = self.place_of(self.reclaimed);
            let slot = self.order[place];
            if slot == end.slot || !self.in_order {
                self.order[place] = end.slot;
                *out = end;
                self.batch = None;
            } else {
                // Left out, so used completely (virtio 1.3, 2.7.9).
                let len = self.rooms[usize::from(slot)];
                *out = UsedSlot { slot, len };
            }
            self.reclaimed = self.reclaimed.wrapping_add(1);
            count += 1;
        }
        count
    }
}
