//! Devices that the driver is tested against.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::super::*;

/// Buffers of a chain as a device sees them, in order: address, length, writable.
pub(super) type BufferPool = Vec<(u64, u32, bool)>;

/// The device's side of a ring.
pub(super) trait Device {
    /// Chains that are newly available: id and buffers.
    fn pop(&mut self) -> Option<(u16, BufferPool)>;
    /// Uses chains, in this order; an in-order device may write one entry for all.
    fn put(&mut self, used: &[(u16, u32)], one_entry: bool);
    /// Wants a kick for the next chain; false if one is available already.
    fn sleep(&mut self) -> bool;
    /// True if the driver wants a call for what was used since the last question.
    fn wants_call(&mut self) -> bool;
}

pub(super) struct SplitDevice {
    queue: Queue,
    memory: GuestMemoryMmap<()>,
    area: SplitArea,
    options: RingOptions,
    /// Used indices that one entry stood for, which the crate doesn't know.
    batch: Vec<u16>,
}

impl SplitDevice {
    pub(super) fn new(memory: &Arc<DriverMemory>, area: &SplitArea, options: RingOptions) -> Self {
        let ranges: Vec<_> = memory
            .regions()
            .map(|region| {
                let file = region.file.as_fd().try_clone_to_owned().unwrap();
                (
                    GuestAddress(region.layout.guest_addr),
                    usize::try_from(region.layout.size).unwrap(),
                    Some(FileOffset::new(file.into(), region.layout.file_offset)),
                )
            })
            .collect();
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let place = area.place();
        let mut queue = Queue::new(place.size).unwrap();
        queue.set_size(place.size);
        let word = |word: u64| u32::try_from(word).ok();
        let halves = |addr: u64| (word(addr & 0xffff_ffff), word(addr >> 32));
        let (low, high) = halves(place.desc);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(place.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(place.device);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(options.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&memory));
        let area = area.clone();
        Self {
            queue,
            memory,
            area,
            options,
            batch: Vec::new(),
        }
    }
}

impl SplitDevice {
    /// The driver's used_event.
    fn used_event(&self) -> u16 {
        let place = self.area.place();
        let event = GuestAddress(place.driver + 4 + 2 * u64::from(place.size));
        self.memory.load(event, Ordering::SeqCst).unwrap()
    }
}

impl Device for SplitDevice {
    fn pop(&mut self) -> Option<(u16, BufferPool)> {
        let chain = self.queue.pop_descriptor_chain(&self.memory)?;
        let head = chain.head_index();
        let buffers = chain.map(|desc| (desc.addr().0, desc.len(), desc.is_write_only()));
        Some((head, buffers.collect()))
    }

    fn put(&mut self, used: &[(u16, u32)], one_entry: bool) {
        if !one_entry {
            for (head, len) in used {
                self.queue.add_used(&self.memory, *head, *len).unwrap();
            }
            return;
        }
        // The crate has no such mode: one entry by its own hand, then the index (2.7.9).
        let (next, (head, len)) = (self.queue.next_used(), used[used.len() - 1]);
        self.queue.add_used(&self.memory, head, len).unwrap();
        let count = u16::try_from(used.len()).unwrap();
        self.batch.extend((0..count).map(|i| next.wrapping_add(i)));
        self.queue.set_next_used(next.wrapping_add(count));
        let place = self.area.place();
        let index = GuestAddress(place.device + 2);
        self.memory
            .store(next.wrapping_add(count), index, Ordering::Release)
            .unwrap();
    }

    fn sleep(&mut self) -> bool {
        !self.queue.enable_notification(&self.memory).unwrap()
    }

    fn wants_call(&mut self) -> bool {
        let by_crate = self.queue.needs_notification(&self.memory).unwrap();
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() || !self.options.event_idx {
            return by_crate;
        }
        batch.contains(&self.used_event())
    }
}

pub(super) struct PackedDevice {
    memory: Arc<DriverMemory>,
    area: PackedArea,
    event_idx: bool,
    avail: Position,
    used: Position,
    /// Descriptors of each chain that was popped, by id.
    sizes: Vec<u16>,
    /// Where `used` was at the last question for a call.
    asked: (Position, u16),
}

impl PackedDevice {
    pub(super) fn new(memory: &Arc<DriverMemory>, area: &PackedArea, options: RingOptions) -> Self {
        let area = area.clone();
        Self {
            memory: Arc::clone(memory),
            sizes: vec![0; usize::from(area.size())],
            area,
            event_idx: options.event_idx,
            avail: Position::START,
            used: Position::START,
            asked: (Position::START, 0),
        }
    }

    fn event(&self, flags: u16) {
        let window = self.memory.window(self.area.place().device, 4).unwrap();
        window.store_u16(0, self.avail.off_wrap(), Ordering::Relaxed);
        window.store_u16(2, flags, Ordering::SeqCst);
    }

    fn is_available(&self, flags: u16) -> bool {
        let avail = flags & DESC_F_AVAIL != 0;
        avail == self.avail.wrap && avail != (flags & DESC_F_USED != 0)
    }

    fn table(&self, desc: PackedDesc) -> BufferPool {
        let window = self.memory.window(desc.addr, u64::from(desc.len)).unwrap();
        (0..desc.len as usize / DESC_BYTES)
            .map(|i| {
                let word = |at| window.load_u64(i * DESC_BYTES + at, Ordering::Relaxed);
                let flags = (word(8) >> 48) as u16;
                let len = window.load_u32(i * DESC_BYTES + 8, Ordering::Relaxed);
                (word(0), len, flags & DESC_F_WRITE != 0)
            })
            .collect()
    }
}

impl Device for PackedDevice {
    fn pop(&mut self) -> Option<(u16, BufferPool)> {
        if !self.is_available(self.area.read_desc(self.avail.slot).flags) {
            return None;
        }
        let (mut buffers, mut count) = (Vec::new(), 0);
        loop {
            let desc = self.area.read_desc(self.avail.slot);
            assert!(
                self.is_available(desc.flags),
                "a chain that is half available"
            );
            self.avail = self.avail.advance(1, self.area.size());
            count += 1;
            if desc.flags & DESC_F_INDIRECT != 0 {
                buffers = self.table(desc);
            } else {
                buffers.push((desc.addr, desc.len, desc.flags & DESC_F_WRITE != 0));
            }
            if desc.flags & DESC_F_NEXT == 0 {
                self.sizes[usize::from(desc.id)] = count;
                return Some((desc.id, buffers));
            }
        }
    }

    fn put(&mut self, used: &[(u16, u32)], one_entry: bool) {
        let first = self.used;
        for (id, len) in used {
            let descs = self.sizes[usize::from(*id)];
            let last = (*id, *len) == used[used.len() - 1];
            let at = if one_entry { first } else { self.used };
            if !one_entry || last {
                let both = if at.wrap {
                    DESC_F_AVAIL | DESC_F_USED
                } else {
                    0
                };
                let desc = PackedDesc {
                    addr: 0,
                    len: *len,
                    id: *id,
                    flags: both,
                };
                self.area.write_desc(at.slot, desc);
            }
            self.used = self.used.advance(descs, self.area.size());
            self.asked.1 += descs;
        }
    }

    fn sleep(&mut self) -> bool {
        self.event(if self.event_idx { 2 } else { 0 });
        !self.is_available(self.area.read_desc(self.avail.slot).flags)
    }

    fn wants_call(&mut self) -> bool {
        let (from, moved) = std::mem::replace(&mut self.asked, (self.used, 0));
        let window = self.memory.window(self.area.place().driver, 4).unwrap();
        let off_wrap = window.load_u16(0, Ordering::SeqCst);
        match window.load_u16(2, Ordering::SeqCst) {
            0 => true,
            1 => false,
            _ => {
                // Walks the ring, descriptor by descriptor: is the event among those used?
                (0..moved)
                    .map(|step| from.advance(step, self.area.size()))
                    .any(|position| position.off_wrap() == off_wrap)
            }
        }
    }
}
