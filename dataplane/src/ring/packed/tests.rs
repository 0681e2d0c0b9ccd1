//! The ring against a naive model of virtio 1.3, 2.8: both sides count descriptors without end,
//! and slots and wrap counters are what division makes of that.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use ringway_guest::features::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{DriverMemory, PackedArea, PackedDesc};

use super::*;
use crate::burst::BurstStorage;
use crate::memory::{GuestMemory, Pieces, Region, RegionSpec};
use crate::ring::{complete_gathered, gather};
use crate::wire::Offloads;

const FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_F_RING_PACKED
    | VIRTIO_NET_F_MRG_RXBUF
    | VIRTIO_RING_F_INDIRECT_DESC;

/// Bytes of each buffer at most, and of the slots that they lie in.
const STRIDE: u64 = 64;

/// Buffers of one chain at most.
const MAX_BUFFERS: usize = 5;

#[derive(Clone, Debug)]
struct Shape {
    lens: Vec<u32>,
    indirect: bool,
    id: u16,
}

/// When the driver wants calls: flags, and how far behind the used place its event is.
#[derive(Clone, Copy, Debug)]
struct Event {
    flags: u16,
    ahead: u64,
}

#[derive(Clone, Debug)]
enum Step {
    /// The driver makes chains available, as many as there is room for.
    Offer(Vec<Shape>),
    /// The device takes up to so many, gives back some and uses the others.
    Use {
        max: usize,
        given_back: usize,
        written: u32,
        event: Event,
    },
    /// Notifications on and off.
    Arm,
    /// Stop, and go on at the base; with its high half or without.
    Restart { whole: bool },
}

#[derive(Clone, Debug)]
struct Offered {
    id: u16,
    slots: u16,
    /// Guest address and length of each buffer.
    buffers: Vec<(u64, u32)>,
    indirect: bool,
}

struct Bench {
    direction: Direction,
    features: u64,
    driver: Arc<DriverMemory>,
    memory: Arc<GuestMemory>,
    view: Rc<MemoryView>,
    area: PackedArea,
    ring: PackedRing,
    size: u64,
    buffers: u64,
    next_buffer: u64,
    tables: u64,
    /// Descriptors ever made available, taken and used.
    offered: u64,
    used: u64,
    pending: VecDeque<Offered>,
    /// What each slot must hold.
    slots: Vec<PackedDesc>,
    called: bool,
}

impl Bench {
    fn new(size: u16, direction: Direction, features: u64) -> Self {
        let driver = DriverMemory::single(1 << 20, false).unwrap();
        let regions = driver.regions().map(|view| {
            let spec = RegionSpec {
                guest_addr: view.layout.guest_addr,
                size: view.layout.size,
                user_addr: view.user_addr,
                mmap_offset: view.layout.file_offset,
            };
            Region::map(spec, view.file.try_clone_to_owned().unwrap()).unwrap()
        });
        let memory = Arc::new(GuestMemory::new(regions.collect()).unwrap());
        let area = PackedArea::new(&driver, size).unwrap();
        let at = areas(&memory, &area);
        let base = area.place().base;
        // SAFETY: the areas are those of a ring of this size in this memory.
        let ring = unsafe { PackedRing::new(size, at, base, Features::from_bits_retain(features)) };
        Self {
            direction,
            features,
            buffers: driver.alloc(256 * STRIDE, 64).unwrap(),
            tables: driver.alloc(64 * 16 * MAX_BUFFERS as u64, 16).unwrap(),
            slots: vec![PackedDesc::default(); usize::from(size)],
            driver,
            view: Rc::new(MemoryView::new(Arc::clone(&memory))),
            memory,
            area,
            ring: ring.unwrap(),
            size: size.into(),
            next_buffer: 0,
            offered: 0,
            used: 0,
            pending: VecDeque::new(),
            called: false,
        }
    }

    fn slot(&self, count: u64) -> u16 {
        u16::try_from(count % self.size).unwrap()
    }

    /// The wrap counter of a descriptor by its count: it begins as 1.
    fn wrap(&self, count: u64) -> bool {
        (count / self.size).is_multiple_of(2)
    }

    fn off_wrap(&self, count: u64) -> u16 {
        self.slot(count) | u16::from(self.wrap(count)) << 15
    }

    fn put(&mut self, count: u64, mut desc: PackedDesc) {
        desc.flags |= if self.wrap(count) { 1 << 7 } else { 1 << 15 };
        let slot = self.slot(count);
        self.area.write_desc(slot, desc);
        self.slots[usize::from(slot)] = desc;
    }

    fn offer(&mut self, shape: &Shape) {
        let slots = if shape.indirect {
            1
        } else {
            shape.lens.len() as u64
        };
        if self.offered + slots > self.used + self.size {
            return;
        }
        let write = self.direction.flag();
        let mut buffers = Vec::new();
        for len in &shape.lens {
            buffers.push((self.buffers + self.next_buffer % 256 * STRIDE, *len));
            self.next_buffer += 1;
        }
        let last = buffers.len() - 1;
        if shape.indirect {
            let table = self.tables + u64::from(self.slot(self.offered)) * 16 * MAX_BUFFERS as u64;
            let mut bytes = Vec::new();
            for (addr, len) in &buffers {
                bytes.extend(addr.to_le_bytes());
                bytes.extend(len.to_le_bytes());
                // Only WRITE counts in a table.
                bytes.extend([0xff; 2]);
                bytes.extend((write | 1 | 4 | 1 << 15).to_le_bytes());
            }
            self.driver.write(table, &bytes).unwrap();
            let desc = PackedDesc {
                addr: table,
                len: u32::try_from(bytes.len()).unwrap(),
                id: shape.id,
                flags: F_INDIRECT,
            };
            self.put(self.offered, desc);
        } else {
            // The first one's flags are the last to be written.
            for i in (0..=last).rev() {
                let (addr, len) = buffers[i];
                let flags = write | if i < last { F_NEXT } else { 0 };
                // Only the last one's id counts.
                let id = if i == last { shape.id } else { !shape.id };
                let desc = PackedDesc {
                    addr,
                    len,
                    id,
                    flags,
                };
                self.put(self.offered + i as u64, desc);
            }
        }
        self.offered += slots;
        self.pending.push_back(Offered {
            id: shape.id,
            slots: u16::try_from(slots).unwrap(),
            buffers,
            indirect: shape.indirect,
        });
    }

    /// What the device must have found of the first chains.
    fn assert_found(&self, chain: &Offered, entry: Entry, pieces: Pieces<'_>) {
        assert_eq!((entry.id, entry.slots), (chain.id, chain.slots));
        let expected = chain
            .buffers
            .iter()
            .map(|(addr, len)| (host(&self.memory, *addr, *len), *len));
        let mut pieces = pieces;
        let found = std::iter::from_fn(|| Some(pieces.take(u32::MAX)).filter(|p| p.len() > 0));
        let found: Vec<_> = found.map(|p| (p.as_ptr(), p.len())).collect();
        assert_eq!(found, expected.collect::<Vec<_>>());
    }

    fn consume(&mut self, max: usize, given_back: usize, written: u32, event: Event) {
        let count = self.pending.len().min(max);
        let kept = count - given_back.min(count);
        let from = self.used;
        match self.direction {
            Direction::FromGuest => self.transmit(max, count, kept),
            Direction::ToGuest => self.receive(count, kept, written),
        }
        let wanted = (from + event.ahead).saturating_sub(8);
        self.area
            .set_driver_event(self.off_wrap(wanted), event.flags);
        let must_call = match event.flags & 3 {
            1 => false,
            2 if self.features & VIRTIO_RING_F_EVENT_IDX != 0 => {
                let known = self.called;
                self.called |= kept > 0;
                // Among the used, and in their lap, since places of other laps look the same.
                !known || (from..self.used).any(|n| self.off_wrap(n) == self.off_wrap(wanted))
            }
            _ => true,
        };
        assert_eq!(self.ring.publish(), kept > 0 && must_call);
        self.assert_memory();
    }

    fn transmit(&mut self, max: usize, count: usize, kept: usize) {
        let view = Rc::clone(&self.view);
        let mut storage = BurstStorage::new();
        let mut burst = storage.begin();
        gather(&mut self.ring, max, &view, &mut burst).unwrap();
        let frames = burst.frames();
        assert_eq!(frames.len(), count);
        for (index, chain) in (0..frames.len()).zip(&self.pending) {
            self.assert_found(chain, frames[index].entry, burst.pieces(index));
        }
        burst.take_snapshots(12, Offloads::ALL);
        let (done, again) = burst.frames().split_at(kept);
        let bytes = complete_gathered(&mut self.ring, done);
        let l2_bytes: u64 = done.iter().map(|f| u64::from(f.len - 12)).sum();
        assert_eq!(bytes, l2_bytes);
        let slots = again.iter().map(|frame| frame.entry.slots).sum();
        self.ring.give_back(slots);
        if self.features & VIRTIO_F_IN_ORDER != 0 {
            // One used descriptor for all: the last id in the first place.
            let taken: Vec<_> = self.pending.drain(..kept).collect();
            if let Some(last) = taken.last() {
                self.expect_used(last.id, 0);
            }
            self.used += taken
                .iter()
                .map(|chain| u64::from(chain.slots))
                .sum::<u64>();
        } else {
            for _ in 0..kept {
                let chain = self.pending.pop_front().unwrap();
                self.expect_used(chain.id, 0);
                self.used += u64::from(chain.slots);
            }
        }
    }

    fn receive(&mut self, count: usize, kept: usize, written: u32) {
        let mut place = self.ring.place();
        let mut entries = Vec::new();
        let view = Rc::clone(&self.view);
        let next = self.ring.direct(view.hint(), self.direction);
        let direct: Vec<_> = std::iter::from_fn(next).take(count + 1).collect();
        let ready = direct.len();
        for (index, chain) in self.pending.iter().take(count).enumerate() {
            let mut pieces = Vec::new();
            let keep = |piece| {
                pieces.push(piece);
                true
            };
            let found = self
                .ring
                .chain((place, 64), self.direction, &view, &mut 0, keep);
            let (entry, bytes) = found.unwrap().unwrap();
            self.assert_found(chain, entry, Pieces::new(&pieces));
            assert_eq!(bytes, chain.buffers.iter().map(|b| b.1).sum::<u32>());
            if index < ready {
                assert_eq!(direct[index].entry, entry);
                assert!(!chain.indirect && chain.slots == 1);
            }
            place = self.ring.after(place, entry.slots);
            entries.push(entry);
        }
        if count == self.pending.len() && self.offered < self.used + self.size {
            assert!(ready <= count);
            let none = self
                .ring
                .chain((place, 64), self.direction, &view, &mut 0, |_| true);
            assert_eq!(none, Ok(None));
        }
        let first = self.slot(self.used);
        let held = self.area.read_desc(first);
        for entry in entries.into_iter().take(kept) {
            self.ring.take(entry.slots);
            self.ring.complete(entry, written);
            // Nothing is visible before the burst is published.
            assert_eq!(self.area.read_desc(first), held);
            self.expect_used(entry.id, written);
            self.used += u64::from(entry.slots);
            self.pending.pop_front();
        }
    }

    fn expect_used(&mut self, id: u16, written: u32) {
        let both = if self.wrap(self.used) {
            1 << 7 | 1 << 15
        } else {
            0
        };
        let slot = usize::from(self.slot(self.used));
        self.slots[slot] = PackedDesc {
            addr: self.slots[slot].addr,
            len: written,
            id,
            flags: both | if written > 0 { F_WRITE } else { 0 },
        };
    }

    fn assert_memory(&self) {
        for (slot, expected) in (0..).zip(&self.slots) {
            assert_eq!(self.area.read_desc(slot), *expected, "slot {slot}");
        }
        let at = u32::from(self.off_wrap(self.used));
        assert_eq!(self.ring.base(), at | at << 16);
    }

    fn arm(&mut self) {
        assert_eq!(self.ring.arm(), self.pending.is_empty());
        let event = if self.features & VIRTIO_RING_F_EVENT_IDX != 0 {
            (self.off_wrap(self.used), 2)
        } else {
            (0, 0)
        };
        assert_eq!(self.area.device_event(), event);
        self.ring.disarm();
        assert_eq!(self.area.device_event().1, 1);
    }

    fn restart(&mut self, whole: bool) {
        let base = self.ring.base();
        let base = if whole { base } else { base & 0xffff };
        let (size, at) = (self.ring.size(), areas(&self.memory, &self.area));
        // SAFETY: the areas are those of a ring of this size in this memory.
        let ring =
            unsafe { PackedRing::new(size, at, base, Features::from_bits_retain(self.features)) };
        self.ring = ring.unwrap();
        self.called = false;
        self.assert_memory();
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Offer(shapes) => shapes.iter().for_each(|shape| self.offer(shape)),
            Step::Use {
                max,
                given_back,
                written,
                event,
            } => self.consume(*max, *given_back, *written, *event),
            Step::Arm => self.arm(),
            Step::Restart { whole } => self.restart(*whole),
        }
    }
}

/// Where a range begins that lies in one region.
fn host(memory: &Arc<GuestMemory>, addr: u64, len: u32) -> *mut u8 {
    let mut ptr = std::ptr::null_mut();
    let keep = |slice: GuestSlice<'_>| {
        ptr = slice.as_ptr();
        slice.len() == len
    };
    MemoryView::new(Arc::clone(memory))
        .translate(addr, len, keep)
        .unwrap();
    ptr
}

fn areas(memory: &Arc<GuestMemory>, area: &PackedArea) -> Areas {
    let place = area.place();
    let host = |addr, len| host(memory, addr, len);
    Areas {
        desc: host(place.desc, 16 * u32::from(place.size)),
        driver: host(place.driver, 4),
        device: host(place.device, 4),
    }
}

fn any_shape() -> impl Strategy<Value = Shape> {
    let lens = prop::collection::vec(1..=64_u32, 1..=MAX_BUFFERS);
    let common = prop::collection::vec(1..=64_u32, 1);
    (prop_oneof![lens, common], any::<bool>(), any::<u16>()).prop_map(|(lens, indirect, id)| {
        let indirect = indirect && lens.len() != 1;
        Shape { lens, indirect, id }
    })
}

fn any_step() -> impl Strategy<Value = Step> {
    let event = (0..=3_u16, 0..=20_u64).prop_map(|(flags, ahead)| Event { flags, ahead });
    let consume = (0..=8_usize, 0..=3_usize, 0..=2000_u32, event).prop_map(
        |(max, given_back, written, event)| Step::Use {
            max,
            given_back,
            written,
            event,
        },
    );
    prop_oneof![
        4 => prop::collection::vec(any_shape(), 1..6).prop_map(Step::Offer),
        5 => consume,
        1 => Just(Step::Arm),
        1 => any::<bool>().prop_map(|whole| Step::Restart { whole }),
    ]
}

#[test]
fn a_packed_ring_does_what_the_model_does() {
    let features = (any::<bool>(), any::<bool>()).prop_map(|(event_idx, in_order)| {
        FEATURES
            | if event_idx {
                VIRTIO_RING_F_EVENT_IDX
            } else {
                0
            }
            | if in_order { VIRTIO_F_IN_ORDER } else { 0 }
    });
    let direction = prop_oneof![Just(Direction::FromGuest), Just(Direction::ToGuest)];
    let steps = prop::collection::vec(any_step(), 1..60);
    let mut runner = TestRunner::new(Config {
        cases: 300,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&(1..=17_u16, direction, features, steps), |case| {
            let (size, direction, features, steps) = case;
            let mut bench = Bench::new(size, direction, features);
            steps.iter().for_each(|step| bench.step(step));
            Ok(())
        })
        .unwrap();
}

#[test]
fn used_descriptors_are_hidden_until_the_burst_is_published() {
    let mut bench = Bench::new(4, Direction::FromGuest, FEATURES);
    for id in 0..3 {
        bench.offer(&Shape {
            lens: vec![64],
            indirect: false,
            id,
        });
    }
    let view = MemoryView::new(Arc::clone(&bench.memory));
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    gather(&mut bench.ring, 32, &view, &mut burst).unwrap();
    bench
        .ring
        .complete_all(burst.frames(), Direction::FromGuest);
    let flags = |slot| bench.area.read_desc(slot).flags;
    assert_eq!(flags(0), F_AVAIL, "held back");
    assert_eq!(flags(2), F_AVAIL | F_USED);
    bench.ring.publish();
    assert_eq!(bench.area.read_desc(0).flags, F_AVAIL | F_USED);
    assert!(!bench.ring.publish(), "nothing new, so no call");
}

#[test]
fn a_base_without_a_used_half_means_that_all_was_used() {
    let bench = Bench::new(8, Direction::FromGuest, FEATURES);
    let start = |base| {
        let at = areas(&bench.memory, &bench.area);
        // SAFETY: the areas are those of a ring of this size in this memory.
        unsafe { PackedRing::new(8, at, base, Features::from_bits_retain(FEATURES)) }
            .map(|ring| ring.base())
    };
    assert_eq!(start(0x0000_8000), Some(0x8000_8000));
    assert_eq!(start(0x0000_0005), Some(0x0005_0005));
    assert_eq!(start(0x8003_8005), Some(0x8003_8005));
    for beyond in [0x8008_8000, 0x8000_8008, 0x0000_7fff, 0xffff_ffff] {
        assert_eq!(start(beyond), None, "{beyond:#x}");
    }
}

#[test]
fn frames_without_num_buffers_have_headers_of_10_bytes() {
    let header_bytes = |features| {
        Bench::new(2, Direction::ToGuest, features)
            .ring
            .header_bytes()
    };
    assert_eq!(header_bytes(VIRTIO_F_RING_PACKED), 10);
    assert_eq!(header_bytes(VIRTIO_F_RING_PACKED | VIRTIO_F_VERSION_1), 12);
    assert_eq!(
        header_bytes(VIRTIO_F_RING_PACKED | VIRTIO_NET_F_MRG_RXBUF),
        12
    );
}

#[test]
fn a_ring_of_the_largest_size_wraps() {
    let start = Place {
        slot: 32_767,
        wrap: true,
    };
    let next = Place {
        slot: 0,
        wrap: false,
    };
    assert_eq!(start.forward(1, 32_768), next);
    assert_eq!(next.back(1, 32_768), start);
    let lap = Place {
        wrap: false,
        ..start
    };
    assert_eq!(start.forward(32_768, 32_768), lap);
    assert_eq!(lap.back(32_768, 32_768), start);
}
