//! A ring whose buffers stay where they are: slot i always describes the same buffers.
//!
//! The load generator runs on preposted rings. Descriptors of a split ring are written once and its
//! available ring is filled in advance, so that making a burst available moves one index;
//! reclaiming what an in-order device sent costs one load per burst. A device that completes out
//! of order is followed: its order becomes the next order.

mod packed;
mod slots;
mod split;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use self::packed::PackedSlots;
use self::slots::Slots;
use self::split::SplitSlots;
use super::memory::DriverMemory;
use super::packed::PackedArea;
use super::queue::{
    Buffer, Calls, DESC_BYTES, DeviceFault, Layout, RingOptions, RingPlace, RingSetupError,
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

/// Which side fills the buffers of a preposted ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BufferSide {
    /// The driver; the device reads.
    Transmit,
    /// The device.
    Receive,
}

/// What a preposted ring looks like.
#[derive(Clone, Copy, Debug)]
pub struct PrepostedShape {
    /// How it is laid out.
    pub layout: Layout,
    /// Entries; a power of two.
    pub size: u16,
    /// Which side fills the buffers.
    pub direction: BufferSide,
    /// Buffers of a slot, each one descriptor of the ring, or of an indirect table if there are
    /// several and [`RingOptions::indirect`] allows for so many.
    pub per_slot: u16,
}

/// A descriptor as either layout has it: a buffer or table, and NEXT, WRITE or INDIRECT.
type Described = (Buffer, u16);

#[derive(Debug)]
enum PrepostedRing {
    Split(SplitSlots),
    Packed(PackedSlots),
}

/// One ring of fixed buffers.
#[derive(Debug)]
pub struct Preposted {
    ring: PrepostedRing,
    slots: Slots,
    event_idx: bool,
}

impl Preposted {
    /// A ring with as many slots as fit into it; `buffers` tells those of a slot.
    ///
    /// # Errors
    /// A size that the layout can't have or `per_slot` doesn't divide, or memory that is full.
    pub fn new(
        memory: &Arc<DriverMemory>,
        shape: PrepostedShape,
        options: RingOptions,
        mut buffers: impl FnMut(u16) -> Vec<Buffer>,
    ) -> Result<Self, RingSetupError> {
        let PrepostedShape {
            layout,
            size,
            direction,
            per_slot,
        } = shape;
        if per_slot == 0 || !size.is_multiple_of(per_slot) || !size.is_power_of_two() {
            return Err(RingSetupError::Size { layout, size });
        }
        let indirect = per_slot > 1 && per_slot <= options.indirect;
        let count = if indirect { size } else { size / per_slot };
        let mut descs: Vec<Described> = Vec::new();
        let mut rooms = Vec::new();
        for slot in 0..count {
            let mut of_slot = buffers(slot);
            of_slot.resize(usize::from(per_slot), Buffer { addr: 0, len: 0 });
            rooms.push(match direction {
                BufferSide::Transmit => 0,
                BufferSide::Receive => of_slot.iter().map(|buffer| buffer.len).sum(),
            });
            let flags = (0..).map(|number| chain_flags(direction, number, per_slot));
            descs.extend(of_slot.into_iter().zip(flags));
        }
        if indirect {
            descs = write_tables(memory, shape, &descs)?;
        }
        let per_slot = if indirect { 1 } else { per_slot };
        let slots = Slots::new(direction, options.in_order, per_slot, rooms);
        let ring = match layout {
            Layout::Split => PrepostedRing::Split(SplitSlots::new(
                SplitArea::new(memory, size)?,
                &descs,
                &slots,
            )),
            Layout::Packed => PrepostedRing::Packed(PackedSlots::new(
                PackedArea::new(memory, size)?,
                &descs,
                &slots,
            )),
        };
        Ok(Self {
            ring,
            slots,
            event_idx: options.event_idx,
        })
    }

    /// Where the ring lies; the base is that of a fresh ring.
    pub fn place(&self) -> RingPlace {
        match &self.ring {
            PrepostedRing::Split(ring) => ring.area.place(),
            PrepostedRing::Packed(ring) => ring.area.place(),
        }
    }

    /// Slots of the ring.
    pub fn slots(&self) -> u16 {
        self.slots.count()
    }

    /// Slots that are not with the device.
    #[inline]
    pub fn free(&self) -> u16 {
        self.slots.free()
    }

    /// The slot that is made available `ahead` slots from now; `ahead` is below
    /// [`Preposted::free`].
    #[inline]
    pub fn next_slot(&self, ahead: u16) -> u16 {
        self.slots
            .at(self.slots.pushed.wrapping_add(u32::from(ahead)))
    }

    /// Makes the next `count` slots available, at most those that are free, all at once.
    #[inline]
    pub fn push(&mut self, count: u16) {
        let count = count.min(self.free());
        if count == 0 {
            return;
        }
        match &mut self.ring {
            PrepostedRing::Split(ring) => ring.push(&self.slots, count),
            PrepostedRing::Packed(ring) => ring.push(&self.slots, count),
        }
        self.slots.pushed = self.slots.pushed.wrapping_add(u32::from(count));
    }

    /// True if the device wants a kick for the last `count` slots that were pushed.
    #[inline]
    pub fn wants_kick(&self, count: u16) -> bool {
        // Pairs with the device's fence between asking for kicks and its last look at the ring:
        // one of the two sees the other's store.
        fence(Ordering::SeqCst);
        match &self.ring {
            PrepostedRing::Split(ring) => ring.wants_kick(&self.slots, self.event_idx, count),
            PrepostedRing::Packed(ring) => ring.wants_kick(&self.slots, count),
        }
    }

    /// Takes back what the device has used and doesn't tell which; for transmit. Returns how many
    /// slots.
    ///
    /// # Errors
    /// The device broke a rule.
    #[inline]
    pub fn reclaim(&mut self) -> Result<u16, DeviceFault> {
        if self.slots.in_order {
            let outcome = match &mut self.ring {
                PrepostedRing::Split(ring) => Some(ring.reclaim_in_order(&mut self.slots)),
                PrepostedRing::Packed(ring) => ring.reclaim_in_order(&mut self.slots),
            };
            if let Some(outcome) = outcome {
                return outcome;
            }
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
        match &mut self.ring {
            PrepostedRing::Split(ring) => ring.harvest(&mut self.slots, into),
            PrepostedRing::Packed(ring) => ring.harvest(&mut self.slots, into),
        }
    }

    /// Sets when the driver wants calls. True if slots are used already, so that no call may come
    /// for them.
    pub fn set_calls(&mut self, calls: Calls) -> bool {
        match &self.ring {
            PrepostedRing::Split(ring) => ring.request_calls(self.event_idx, calls),
            PrepostedRing::Packed(ring) => ring.request_calls(self.event_idx, calls),
        }
        // Pairs with the device's fence before its look at the event.
        fence(Ordering::SeqCst);
        match &self.ring {
            PrepostedRing::Split(ring) => ring.is_used(),
            PrepostedRing::Packed(ring) => self.free() < self.slots() && ring.is_used(),
        }
    }

    /// The ring's memory, for a device of the tests.
    #[cfg(test)]
    pub(crate) fn areas(&self) -> (Option<&SplitArea>, Option<&PackedArea>) {
        match &self.ring {
            PrepostedRing::Split(ring) => (Some(&ring.area), None),
            PrepostedRing::Packed(ring) => (None, Some(&ring.area)),
        }
    }
}

/// Flags of a buffer's descriptor in a chain.
fn chain_flags(direction: BufferSide, number: u16, buffers: u16) -> u16 {
    let write = match direction {
        BufferSide::Transmit => 0,
        BufferSide::Receive => DESC_F_WRITE,
    };
    write | if number + 1 < buffers { DESC_F_NEXT } else { 0 }
}

/// Writes an indirect table for the buffers of each slot (virtio 1.3, 2.7.5.3 and 2.8.7) and
/// returns the descriptors of the tables.
fn write_tables(
    memory: &Arc<DriverMemory>,
    shape: PrepostedShape,
    descs: &[Described],
) -> Result<Vec<Described>, RingSetupError> {
    let bytes = (descs.len() * DESC_BYTES) as u64;
    let addr = memory.alloc(bytes, DESC_BYTES as u64)?;
    let window = memory.window(addr, bytes)?;
    let per_slot = usize::from(shape.per_slot);
    for (i, (buffer, flags)) in descs.iter().enumerate() {
        let at = i * DESC_BYTES;
        // At most `per_slot`.
        let next = u16::try_from(i % per_slot + 1).unwrap_or(0);
        let (third, fourth) = match shape.layout {
            Layout::Split if flags & DESC_F_NEXT != 0 => (*flags, next),
            Layout::Split => (*flags, 0),
            // Order in the table takes the place of links; the id means nothing there.
            Layout::Packed => (0, flags & !DESC_F_NEXT),
        };
        window.store_u64(at, buffer.addr, Ordering::Relaxed);
        window.store_u32(at + 8, buffer.len, Ordering::Relaxed);
        window.store_u16(at + 12, third, Ordering::Relaxed);
        window.store_u16(at + 14, fourth, Ordering::Relaxed);
    }
    let len = u32::from(shape.per_slot) * 16;
    let table = |slot| {
        let addr = addr + slot * u64::from(len);
        (Buffer { addr, len }, DESC_F_INDIRECT)
    };
    Ok((0..).map(table).take(descs.len() / per_slot).collect())
}
