//! A ring whose buffers stay where they are: slot i always describes the same buffers.
//!
//! The load generator runs on lanes. Descriptors of a split ring are written once and its
//! available ring is filled in advance, so that making a burst available moves one index;
//! reclaiming what an in-order device sent costs one load per burst. A device that completes out
//! of order is followed: its order becomes the next order.

mod packed;
mod split;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::DriverMemory;
use super::packed::{PackedArea, PackedDesc, Position};
use super::queue::{
    Calls, DESC_BYTES, DeviceFault, Layout, RingOptions, RingPlace, RingSetupError, Segment,
};
use super::split::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, SplitArea};

/// A slot that the device has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsedSlot {
    /// The slot.
    pub slot: u16,
    /// Bytes that the device wrote.
    pub len: u32,
}

/// Which side fills the buffers of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The driver; the device reads.
    Transmit,
    /// The device.
    Receive,
}

/// What a lane looks like.
#[derive(Clone, Copy, Debug)]
pub struct LaneShape {
    /// How its ring is laid out.
    pub layout: Layout,
    /// Entries of its ring; a power of two.
    pub size: u16,
    /// Which side fills the buffers.
    pub direction: Direction,
    /// Buffers of a slot, each one descriptor of the ring, or of an indirect table if there are
    /// several and [`RingOptions::indirect`] allows for so many.
    pub per_slot: u16,
}

/// The memory of a lane's ring, for tests that break rules.
#[derive(Clone, Copy, Debug)]
pub enum RingArea<'a> {
    /// A split ring.
    Split(&'a SplitArea),
    /// A packed ring.
    Packed(&'a PackedArea),
}

#[derive(Debug)]
enum Area {
    Split {
        ring: SplitArea,
        used: u16,
    },
    Packed {
        ring: PackedArea,
        avail: Position,
        used: Position,
    },
}

/// One ring of fixed buffers.
#[derive(Debug)]
pub struct Lane {
    area: Area,
    direction: Direction,
    event_idx: bool,
    in_order: bool,
    /// What the ring's descriptors describe: buffers, `per_slot` for each slot, or one indirect
    /// table each.
    segments: Vec<Segment>,
    /// Bytes that the device may write into each slot.
    rooms: Vec<u32>,
    indirect: bool,
    /// The same as packed descriptors, available and used bits clear.
    descs: Vec<PackedDesc>,
    /// Descriptors of the ring that a slot takes.
    per_slot: u16,
    /// `per_slot` is this power of two.
    shift: u32,
    slots: u16,
    /// Slots in the order in which they are made available, from `pushed` on; a ring.
    order: Vec<u16>,
    /// Slots made available, ever.
    pushed: u32,
    /// Slots reclaimed, ever.
    reclaimed: u32,
    /// The last slot of a batch that an in-order device used in one entry, and its length, until
    /// all of the batch is taken.
    batch: Option<UsedSlot>,
}

impl Lane {
    /// A lane with as many slots as fit into its ring; `segments` tells the buffers of a slot.
    ///
    /// # Errors
    /// A size that the layout can't have or `per_slot` doesn't divide, or memory that is full.
    pub fn new(
        memory: &Arc<DriverMemory>,
        shape: LaneShape,
        options: RingOptions,
        mut segments: impl FnMut(u16) -> Vec<Segment>,
    ) -> Result<Self, RingSetupError> {
        let LaneShape {
            layout,
            size,
            direction,
            per_slot,
        } = shape;
        if per_slot == 0 || !size.is_multiple_of(per_slot) || !size.is_power_of_two() {
            return Err(RingSetupError::Size { layout, size });
        }
        let indirect = per_slot > 1 && per_slot <= options.indirect;
        let slots = if indirect { size } else { size / per_slot };
        let mut segments: Vec<Segment> = (0..slots)
            .flat_map(|slot| {
                let mut of_slot = segments(slot);
                of_slot.resize(usize::from(per_slot), Segment { addr: 0, len: 0 });
                of_slot
            })
            .collect();
        let room = |chain: &[Segment]| match direction {
            Direction::Transmit => 0,
            Direction::Receive => chain.iter().map(|segment| segment.len).sum(),
        };
        let rooms = segments.chunks(usize::from(per_slot)).map(room).collect();
        if indirect {
            segments = write_tables(memory, shape, &segments)?;
        }
        let per_slot = if indirect { 1 } else { per_slot };
        let area = match layout {
            Layout::Split => Area::Split {
                ring: SplitArea::new(memory, size)?,
                used: 0,
            },
            Layout::Packed => Area::Packed {
                ring: PackedArea::new(memory, size)?,
                avail: Position::START,
                used: Position::START,
            },
        };
        let mut lane = Self {
            area,
            direction,
            event_idx: options.event_idx,
            in_order: options.in_order,
            segments,
            rooms,
            indirect,
            descs: Vec::new(),
            per_slot,
            shift: per_slot.trailing_zeros(),
            slots,
            order: (0..slots).collect(),
            pushed: 0,
            reclaimed: 0,
            batch: None,
        };
        lane.write_split_tables();
        lane.descs = (0..size).map(|index| lane.packed_desc(index)).collect();
        Ok(lane)
    }

    /// Where the ring lies; the base is that of a fresh ring.
    pub fn place(&self) -> RingPlace {
        match &self.area {
            Area::Split { ring, .. } => ring.place(),
            Area::Packed { ring, .. } => ring.place(),
        }
    }

    /// The ring's memory, for tests that break rules.
    pub fn area(&self) -> RingArea<'_> {
        match &self.area {
            Area::Split { ring, .. } => RingArea::Split(ring),
            Area::Packed { ring, .. } => RingArea::Packed(ring),
        }
    }

    /// Slots of the lane.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Slots that are not with the device.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "at most `slots` are free")]
    pub fn free(&self) -> u16 {
        self.slots - self.pushed.wrapping_sub(self.reclaimed) as u16
    }

    /// The slot that is made available `ahead` slots from now; `ahead` is below
    /// [`Lane::free`].
    #[inline]
    pub fn next_slot(&self, ahead: u16) -> u16 {
        self.order[self.place_of(self.pushed.wrapping_add(u32::from(ahead)))]
    }

    /// Makes the next `count` slots available, at most those that are free, all at once.
    #[inline]
    pub fn push(&mut self, count: u16) {
        let count = count.min(self.free());
        if count == 0 {
            return;
        }
        if let Area::Packed { ring, avail, .. } = &self.area {
            self.push_packed(ring, *avail, count);
        }
        let next = self.pushed.wrapping_add(u32::from(count));
        match &mut self.area {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "the index is modulo 65,536"
            )]
            Area::Split { ring, .. } => ring.set_avail_idx(next as u16),
            Area::Packed { ring, avail, .. } => {
                *avail = avail.advance(count * self.per_slot, ring.size());
            }
        }
        self.pushed = next;
    }

    /// True if the device wants a kick for the last `count` slots that were pushed.
    #[inline]
    pub fn wants_kick(&self, count: u16) -> bool {
        // Pairs with the device's fence between asking for kicks and its last look at the ring:
        // one of the two sees the other's store.
        fence(Ordering::SeqCst);
        match &self.area {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "the index is modulo 65,536"
            )]
            Area::Split { ring, .. } => {
                let new = self.pushed as u16;
                ring.wants_kick(self.event_idx, new, new.wrapping_sub(count))
            }
            Area::Packed { ring, avail, .. } => ring.wants_kick(*avail, count * self.per_slot),
        }
    }

    /// Takes back what the device has used and doesn't tell which; for transmit. Returns how many
    /// slots.
    ///
    /// # Errors
    /// The device broke a rule.
    #[inline]
    pub fn reclaim(&mut self) -> Result<u16, DeviceFault> {
        let available = self.slots - self.free();
        if let (true, Area::Split { ring, used }) = (self.in_order, &mut self.area) {
            let idx = ring.used_idx();
            let count = idx.wrapping_sub(*used);
            if count > available {
                return Err(DeviceFault::UsedIndex {
                    used: count,
                    available,
                });
            }
            *used = idx;
            self.batch = None;
            self.reclaimed = self.reclaimed.wrapping_add(u32::from(count));
            return Ok(count);
        }
        if let Some(outcome) = self.reclaim_in_order() {
            return outcome;
        }
        let mut some = [UsedSlot::default(); 64];
        let mut total = 0;
        loop {
            let count = self.harvest(&mut some)?;
            // At most 64.
            total += u16::try_from(count).unwrap_or(0);
            if count < some.len() {
                return Ok(total);
            }
        }
    }

    /// Takes back what the device has used, as far as `into` has room, and returns how many.
    /// Their buffers may be read until they are pushed again.
    ///
    /// # Errors
    /// The device broke a rule.
    #[inline]
    pub fn harvest(&mut self, into: &mut [UsedSlot]) -> Result<usize, DeviceFault> {
        match self.area {
            Area::Split { .. } => self.harvest_split(into),
            Area::Packed { .. } => self.harvest_packed(into),
        }
    }

    /// Sets when the driver wants calls. True if slots are used already, so that no call may come
    /// for them.
    pub fn set_calls(&mut self, calls: Calls) -> bool {
        match &self.area {
            Area::Split { ring, used } => {
                ring.request_calls(self.event_idx, calls, *used);
                // Pairs with the device's fence before its look at the event.
                fence(Ordering::SeqCst);
                ring.used_idx() != *used
            }
            Area::Packed { ring, used, .. } => {
                ring.request_calls(self.event_idx, calls, *used);
                // Pairs with the device's fence before its look at the event.
                fence(Ordering::SeqCst);
                self.free() < self.slots && used.is_used(ring.read_tail(used.slot).flags)
            }
        }
    }

    #[inline]
    fn place_of(&self, count: u32) -> usize {
        // `slots` is a power of two: `new` saw to it.
        count as usize & (usize::from(self.slots) - 1)
    }

    /// Flags of the ring's descriptor of this number in a slot.
    fn flags(&self, number: u16) -> u16 {
        if self.indirect {
            return DESC_F_INDIRECT;
        }
        chain_flags(self.direction, number, self.per_slot)
    }

    /// Begins a batch that ends with this slot: it, and those that an in-order device left out
    /// before it, are used.
    #[cold]
    fn begin_batch(&mut self, slot: u16, len: u32) -> Result<(), DeviceFault> {
        let fault = DeviceFault::UsedId {
            id: u32::from(slot),
        };
        if slot >= self.slots {
            return Err(fault);
        }
        let expected = self.order[self.place_of(self.reclaimed)];
        let skipped = slot.wrapping_sub(expected) & (self.slots - 1);
        if self.in_order && skipped >= self.slots - self.free() {
            return Err(fault);
        }
        let len = self.written(len);
        self.batch = Some(UsedSlot { slot, len });
        Ok(())
    }

    /// Takes the next slots of a batch, as far as `into` has room.
    #[cold]
    fn take_batch(&mut self, into: &mut [UsedSlot]) -> usize {
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

    /// What a used length says: without writable buffers nothing.
    #[inline]
    fn written(&self, len: u32) -> u32 {
        match self.direction {
            Direction::Transmit => 0,
            Direction::Receive => len,
        }
    }
}

/// Flags of a buffer's descriptor in a chain.
fn chain_flags(direction: Direction, number: u16, buffers: u16) -> u16 {
    let write = match direction {
        Direction::Transmit => 0,
        Direction::Receive => DESC_F_WRITE,
    };
    write | if number + 1 < buffers { DESC_F_NEXT } else { 0 }
}

/// Writes an indirect table for the buffers of each slot (virtio 1.3, 2.7.5.3 and 2.8.7) and
/// returns the tables.
fn write_tables(
    memory: &Arc<DriverMemory>,
    shape: LaneShape,
    buffers: &[Segment],
) -> Result<Vec<Segment>, RingSetupError> {
    let bytes = (buffers.len() * DESC_BYTES) as u64;
    let addr = memory.alloc(bytes, DESC_BYTES as u64)?;
    let window = memory.window(addr, bytes)?;
    for (i, buffer) in buffers.iter().enumerate() {
        let at = i * DESC_BYTES;
        // Below `per_slot`.
        let number = u16::try_from(i % usize::from(shape.per_slot)).unwrap_or(0);
        let flags = chain_flags(shape.direction, number, shape.per_slot);
        let next = if flags & DESC_F_NEXT != 0 {
            number + 1
        } else {
            0
        };
        window.store_u64(at, buffer.addr, Ordering::Relaxed);
        window.store_u32(at + 8, buffer.len, Ordering::Relaxed);
        let (third, fourth) = match shape.layout {
            Layout::Split => (flags, next),
            // Order in the table takes the place of links; the id means nothing there.
            Layout::Packed => (0, flags & !DESC_F_NEXT),
        };
        window.store_u16(at + 12, third, Ordering::Relaxed);
        window.store_u16(at + 14, fourth, Ordering::Relaxed);
    }
    let len = u32::from(shape.per_slot) * 16;
    Ok((0..)
        .map(|slot| Segment {
            addr: addr + slot * u64::from(len),
            len,
        })
        .take(buffers.len() / usize::from(shape.per_slot))
        .collect())
}
