//! No switch: frames are moved from ring to ring by hand, on the load's own thread.
//!
//! What a load measures so is its own: the sending, the receiving and the machine under it. It is
//! the floor of each latency that the same load measures through a switch.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ringway_guest::{
    DESC_BYTES, DESC_F_AVAIL, DESC_F_USED, DriverMemory, DriverMemoryError, Layout, Position,
    RingPlace, Window,
};

use super::guest::BURST;

/// VIRTQ_USED_F_NO_NOTIFY (virtio 1.3, 2.7.8) and RING_EVENT_FLAGS_DISABLE (2.8.14): nobody waits
/// for kicks.
const NO_KICKS: u16 = 1;

/// A buffer that a driver made available.
#[derive(Clone, Copy, Debug)]
struct HandBuffer {
    id: u16,
    /// Where it lies in the memory.
    at: usize,
    len: usize,
}

/// The device's side of a ring of single buffers, which it uses in order and one by one.
#[derive(Debug)]
pub(crate) struct HandRing {
    layout: Layout,
    size: u16,
    /// All of the guest's memory, which is one region.
    memory: Window,
    base: u64,
    /// Where in the memory the descriptors and both sides' areas lie.
    desc: usize,
    driver: usize,
    device: usize,
    /// The next buffer to be used, in a packed ring.
    packed: Position,
    /// The same in a split ring.
    split: u16,
}

impl HandRing {
    /// The device's side of a ring in this memory.
    pub(crate) fn new(
        memory: &Arc<DriverMemory>,
        layout: Layout,
        place: RingPlace,
    ) -> Result<Self, DriverMemoryError> {
        let region = memory.regions().next().map(|region| region.layout);
        let (base, bytes) = region.map_or((0, 0), |region| (region.guest_addr, region.size));
        let within = |addr: u64| usize::try_from(addr - base).unwrap_or(usize::MAX);
        let ring = Self {
            layout,
            size: place.size,
            memory: memory.window(base, bytes)?,
            base,
            desc: within(place.desc),
            driver: within(place.driver),
            device: within(place.device),
            packed: Position::START,
            split: 0,
        };
        let flags = match layout {
            Layout::Split => ring.device,
            Layout::Packed => ring.device + 2,
        };
        ring.memory.store_u16(flags, NO_KICKS, Ordering::Relaxed);
        Ok(ring)
    }

    /// The next buffer, if there are so many, or more.
    fn next(&self, count: u16) -> Option<HandBuffer> {
        let memory = &self.memory;
        let (desc, id) = match self.layout {
            Layout::Split => {
                // Pairs with the driver's release of its index: the entries are there.
                let available = memory.load_u16(self.driver + 2, Ordering::Acquire);
                if available.wrapping_sub(self.split) < count {
                    return None;
                }
                let entry = self.driver + 4 + 2 * usize::from(self.split & (self.size - 1));
                let id = memory.load_u16(entry, Ordering::Relaxed);
                (self.desc + DESC_BYTES * usize::from(id), id)
            }
            Layout::Packed => {
                let last = self.packed.advance(count - 1, self.size);
                // Pairs with the driver's release of a descriptor's flags, which it writes last.
                let flags = memory.load_u16(self.packed_desc(last) + 14, Ordering::Acquire);
                let is_available = flags & (DESC_F_AVAIL | DESC_F_USED);
                if is_available != last.available_flags() {
                    return None;
                }
                let desc = self.packed_desc(self.packed);
                (desc, memory.load_u16(desc + 12, Ordering::Relaxed))
            }
        };
        let addr = memory.load_u64(desc, Ordering::Relaxed);
        Some(HandBuffer {
            id,
            at: usize::try_from(addr - self.base).unwrap_or(usize::MAX),
            len: memory.load_u32(desc + 8, Ordering::Relaxed) as usize,
        })
    }

    /// Uses the next buffer, into which so many bytes were written.
    fn put(&mut self, buffer: HandBuffer, written: usize) {
        // No more than the buffer's length, which has 32 bits.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        match self.layout {
            Layout::Split => {
                let entry = self.device + 4 + 8 * usize::from(self.split & (self.size - 1));
                let id = u32::from(buffer.id);
                self.memory.store_u32(entry, id, Ordering::Relaxed);
                self.memory.store_u32(entry + 4, written, Ordering::Relaxed);
                self.split = self.split.wrapping_add(1);
                // Pairs with the driver's acquire of the used index.
                let used = self.device + 2;
                self.memory.store_u16(used, self.split, Ordering::Release);
            }
            Layout::Packed => {
                let desc = self.packed_desc(self.packed);
                let flags = if self.packed.wrap {
                    DESC_F_AVAIL | DESC_F_USED
                } else {
                    0
                };
                self.memory.store_u32(desc + 8, written, Ordering::Relaxed);
                self.memory
                    .store_u16(desc + 12, buffer.id, Ordering::Relaxed);
                // Pairs with the driver's acquire of the flags.
                self.memory.store_u16(desc + 14, flags, Ordering::Release);
                self.packed = self.packed.advance(1, self.size);
            }
        }
    }

    fn packed_desc(&self, position: Position) -> usize {
        self.desc + DESC_BYTES * usize::from(position.slot)
    }

    /// Moves frames to another guest's receive ring, as far as that has room, at most a burst.
    pub(crate) fn move_to(&mut self, to: &mut Self) {
        for _ in 0..BURST {
            let Some(frame) = self.next(1) else { return };
            let Some(first) = to.next(1) else { return };
            // All of a receive ring's buffers are of one length.
            let buffers = u16::try_from(frame.len.div_ceil(first.len)).unwrap_or(u16::MAX);
            if to.next(buffers).is_none() {
                return;
            }
            let mut moved = 0;
            while moved < frame.len {
                let Some(buffer) = to.next(1) else { return };
                let len = buffer.len.min(frame.len - moved);
                let (memory, at) = (&self.memory, frame.at + moved);
                to.memory.copy_from(buffer.at, memory, at, len);
                to.put(buffer, len);
                moved += len;
            }
            self.put(frame, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::super::frame::Style;
    use super::super::guest::GuestShape;
    use super::super::load::{Load, LoadConfig};
    use super::*;

    fn config(layout: Layout, size: u32) -> LoadConfig {
        LoadConfig {
            sockets: vec![PathBuf::new(); 4],
            listen: false,
            shape: GuestShape {
                layout,
                mergeable: true,
                in_order: true,
                event_idx: false,
                chained: false,
                indirect: false,
                tso: false,
                checksum: false,
                queue_size: 64,
                queues: 2,
                huge: false,
            },
            sizes: vec![size],
            style: Style::default(),
            flows: 1,
            verify: true,
        }
    }

    /// The load sends and receives as it does through a switch: rings go round many times, and each
    /// frame arrives once, in order and unchanged, whatever it is like.
    #[test]
    fn frames_arrive_whole_in_every_shape() {
        for layout in [Layout::Split, Layout::Packed] {
            for (size, mergeable, event_idx) in [
                (64, true, false),
                (1500, false, true),
                (9000, true, true),
                (65_000, true, false),
            ] {
                let mut config = config(layout, size);
                config.shape.mergeable = mergeable;
                config.shape.event_idx = event_idx;
                config.shape.in_order = event_idx;
                let mut load = Load::without_switch(&config).unwrap();
                let result = load
                    .run_rate(40_000.0, Duration::from_millis(50), true)
                    .unwrap();
                let what = format!("{layout:?}, {size} B");
                assert_eq!(result.offered, 2_000, "{what}");
                let arrived = (result.sent, result.received, result.foreign);
                assert_eq!(arrived, (2_000, 2_000, 0), "{what}");
                assert_eq!((result.duplicated, result.reordered), (0, 0), "{what}");
            }
        }
    }

    #[test]
    fn a_receive_ring_without_room_leaves_frames_where_they_are() {
        let config = config(Layout::Split, 9000);
        let mut load = Load::without_switch(&config).unwrap();
        // Sixty-four buffers of 2 KiB: twelve frames of five, and none of a thirteenth.
        load.guests[0].pairs[0].tx.offer(64).unwrap();
        load.move_by_hand(0);
        let pairs = &mut load.guests[0].pairs;
        assert_eq!(pairs[0].tx.ring.reclaim().unwrap(), 12);
        // With nothing of the thirteenth behind them.
        let turn = load.guests[1].pairs[0].take().unwrap();
        assert_eq!((turn.received, turn.bytes), (12, 12 * 9012));
        load.move_by_hand(0);
        assert_eq!(load.guests[0].pairs[0].tx.ring.reclaim().unwrap(), 12);
    }
}
