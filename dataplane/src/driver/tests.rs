//! The driver's rings against devices: the virtio-queue crate for split rings, and a plain reading
//! of the specification for packed ones.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::packed::{DESC_F_AVAIL, DESC_F_USED, PackedDesc, Position};
use super::split::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use super::*;

/// Buffers of a chain as a device sees them, in order: address, length, writable.
type Buffers = Vec<(u64, u32, bool)>;

/// The device's side of a ring.
trait Device {
    /// Chains that are newly available: id and buffers.
    fn pop(&mut self) -> Option<(u16, Buffers)>;
    /// Uses chains, in this order; an in-order device may write one entry for all.
    fn put(&mut self, used: &[(u16, u32)], one_entry: bool);
    /// Wants a kick for the next chain; false if one is available already.
    fn sleep(&mut self) -> bool;
    /// True if the driver wants a call for what was used since the last question.
    fn wants_call(&mut self) -> bool;
}

struct SplitDevice {
    queue: Queue,
    memory: GuestMemoryMmap<()>,
    area: SplitArea,
    options: RingOptions,
    /// Used indices that one entry stood for, which the crate doesn't know.
    batch: Vec<u16>,
}

impl SplitDevice {
    fn new(memory: &Arc<DriverMemory>, area: &SplitArea, options: RingOptions) -> Self {
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
        let halves = |addr: u64| (Some(addr as u32), Some((addr >> 32) as u32));
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
        vm_memory::Bytes::load(&self.memory, event, Ordering::SeqCst).unwrap()
    }
}

impl Device for SplitDevice {
    fn pop(&mut self) -> Option<(u16, Buffers)> {
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
        vm_memory::Bytes::store(
            &self.memory,
            next.wrapping_add(count),
            index,
            Ordering::Release,
        )
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

struct PackedDevice {
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
    fn new(memory: &Arc<DriverMemory>, area: &PackedArea, options: RingOptions) -> Self {
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

    fn table(&self, desc: PackedDesc) -> Buffers {
        let window = self.memory.window(desc.addr, u64::from(desc.len)).unwrap();
        (0..desc.len as usize / DESC_BYTES)
            .map(|i| {
                let word = |at| window.load_u64(i * DESC_BYTES + at, Ordering::Relaxed);
                let flags = (word(8) >> 48) as u16;
                (word(0), word(8) as u32, flags & DESC_F_WRITE != 0)
            })
            .collect()
    }
}

impl Device for PackedDevice {
    fn pop(&mut self) -> Option<(u16, Buffers)> {
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

fn ring_and_device(layout: Layout, size: u16, options: RingOptions) -> (Ring, Box<dyn Device>) {
    let memory = DriverMemory::single(1 << 20, false).unwrap();
    let ring = Ring::new(&memory, layout, size, options).unwrap();
    let device: Box<dyn Device> = match &ring {
        Ring::Split(ring) => Box::new(SplitDevice::new(&memory, ring.area(), options)),
        Ring::Packed(ring) => Box::new(PackedDevice::new(&memory, ring.area(), options)),
    };
    (ring, device)
}

#[derive(Clone, Debug)]
enum Step {
    /// Adds a chain of so many readable and writable buffers.
    Add(usize, usize),
    Publish,
    /// The device pops all that it sees and asks for a kick for more.
    Drain,
    /// The device uses this share (of 8) of what it holds; out of order or in one entry.
    Use {
        share: usize,
        reverse: bool,
        one_entry: bool,
    },
    Reap,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0usize..6, 0usize..6).prop_map(|(r, w)| Step::Add(r, w)),
        2 => Just(Step::Publish),
        2 => Just(Step::Drain),
        2 => (1usize..9, any::<bool>(), any::<bool>())
            .prop_map(|(share, reverse, one_entry)| Step::Use { share, reverse, one_entry }),
        2 => Just(Step::Reap),
    ];
    prop::collection::vec(step, 1..300)
}

fn options() -> impl Strategy<Value = RingOptions> {
    (
        any::<bool>(),
        any::<bool>(),
        prop_oneof![Just(0u16), Just(4u16)],
    )
        .prop_map(|(event_idx, in_order, indirect)| RingOptions {
            event_idx,
            in_order,
            indirect,
        })
}

/// Runs the steps and holds: the device sees exactly the chains that were added, in order and only
/// once published; the driver gets each back once with its token and length; whoever sleeps is
/// woken; nothing leaks.
fn holds_against_device(layout: Layout, size: u16, options: RingOptions, steps: &[Step]) {
    let (mut ring, mut device) = ring_and_device(layout, size, options);
    let mut added: VecDeque<(u32, Buffers)> = VecDeque::new();
    let mut published = 0;
    let mut held: VecDeque<(u16, u32, u32)> = VecDeque::new();
    let mut expected: VecDeque<Used> = VecDeque::new();
    let (mut token, mut asleep, mut armed) = (0u32, false, false);
    // Whatever happened, the run ends with everything done, so that leaks show.
    let end = [
        Step::Publish,
        Step::Drain,
        Step::Use {
            share: 8,
            reverse: false,
            one_entry: false,
        },
        Step::Reap,
    ];
    for step in steps.iter().chain(&end) {
        match *step {
            Step::Add(readable, writable) => {
                let segment = |i: usize| Segment {
                    addr: u64::from(token) << 16 | i as u64,
                    len: 1 + token % 1000 + u32::try_from(i).unwrap(),
                };
                let readable: Vec<Segment> = (0..readable).map(segment).collect();
                let writable: Vec<Segment> = (10..10 + writable).map(segment).collect();
                let count = readable.len() + writable.len();
                let free = usize::from(ring.free());
                let indirect = count > 1 && count <= usize::from(options.indirect);
                let outcome = ring.add(&readable, &writable, token);
                if count == 0 || !indirect && count > usize::from(size) {
                    assert!(matches!(outcome, Err(AddError::Shape { .. })));
                } else if outcome.is_err() {
                    let needed = if indirect { 1 } else { count };
                    assert!(needed > free, "refused with room");
                } else {
                    let buffers = readable
                        .iter()
                        .map(|s| (s.addr, s.len, false))
                        .chain(writable.iter().map(|s| (s.addr, s.len, true)));
                    added.push_back((token, buffers.collect()));
                    token += 1;
                }
            }
            Step::Publish => {
                let fresh = added.len() > published;
                published = added.len();
                let kick = ring.publish();
                assert!(
                    !(asleep && fresh) || kick,
                    "a sleeping device was not kicked"
                );
                assert!(fresh || !kick, "kicked for nothing");
                asleep &= !kick;
            }
            Step::Drain => {
                while let Some((id, buffers)) = device.pop() {
                    assert!(published > 0, "seen before it was published");
                    let (token, expected) = added.pop_front().unwrap();
                    assert_eq!(buffers, expected);
                    published -= 1;
                    let room = buffers.iter().filter(|b| b.2).map(|b| b.1).sum::<u32>();
                    held.push_back((id, token, room));
                }
                assert_eq!(published, 0, "published and not seen");
                asleep = device.sleep();
                assert!(asleep);
            }
            Step::Use {
                share,
                reverse,
                one_entry,
            } => {
                let count = (held.len() * share).div_ceil(8);
                let mut batch: Vec<_> = held.drain(..count).collect();
                if batch.is_empty() {
                    continue;
                }
                let one_entry = one_entry && options.in_order;
                if reverse && !options.in_order {
                    batch.reverse();
                }
                let last = batch.len() - 1;
                // Chains without an entry of their own are used completely.
                let used: Vec<(u16, u32)> = batch
                    .iter()
                    .enumerate()
                    .map(|(i, (id, token, room))| {
                        let len = if one_entry && i < last {
                            *room
                        } else {
                            token % (room + 1)
                        };
                        expected.push_back(Used { token: *token, len });
                        (*id, len)
                    })
                    .collect();
                device.put(&used, one_entry);
                let call = device.wants_call();
                assert!(!armed || call, "a sleeping driver was not called");
                armed = false;
            }
            Step::Reap => {
                let mut used = Vec::new();
                let count = ring.reap(&mut used).unwrap();
                assert_eq!(count, used.len());
                assert_eq!(used, Vec::from_iter(expected.drain(..)));
                assert!(!ring.set_calls(Calls::Next), "used chains are left");
                armed = true;
            }
        }
    }
    assert_eq!(ring.free(), size);
    assert_eq!(ring.in_flight(), 0);
}

proptest! {
    #[test]
    fn split_rings_agree_with_virtio_queue(
        options in options(),
        log in 0u32..6,
        steps in steps(),
    ) {
        holds_against_device(Layout::Split, 1 << log, options, &steps);
    }

    #[test]
    fn packed_rings_agree_with_a_device_of_any_size(
        options in options(),
        size in 1u16..40,
        steps in steps(),
    ) {
        holds_against_device(Layout::Packed, size, options, &steps);
    }
}

#[test]
fn split_rings_survive_the_wrap_of_their_index() {
    let options = RingOptions {
        event_idx: true,
        in_order: true,
        indirect: 0,
    };
    let round = [
        Step::Add(1, 1),
        Step::Add(0, 2),
        Step::Publish,
        Step::Drain,
        Step::Use {
            share: 8,
            reverse: false,
            one_entry: true,
        },
        Step::Reap,
    ];
    let steps: Vec<Step> = round.iter().cycle().take(6 * 40_000).cloned().collect();
    holds_against_device(Layout::Split, 8, options, &steps);
    holds_against_device(Layout::Packed, 7, options, &steps);
}

#[test]
fn sizes_that_a_ring_cannot_have_are_refused() {
    let memory = DriverMemory::single(1 << 20, false).unwrap();
    let make = |layout, size| Ring::new(&memory, layout, size, RingOptions::default());
    for (layout, size) in [
        (Layout::Split, 0),
        (Layout::Split, 3),
        (Layout::Split, 65_535),
        (Layout::Packed, 0),
        (Layout::Packed, 32_769),
    ] {
        let refused = matches!(make(layout, size), Err(RingSetupError::Size { .. }));
        assert!(refused, "{layout:?} {size}");
    }
    assert!(make(Layout::Packed, 3).is_ok());
}

#[test]
fn a_device_that_breaks_rules_is_caught() {
    for layout in [Layout::Split, Layout::Packed] {
        for in_order in [false, true] {
            let options = RingOptions {
                in_order,
                ..RingOptions::default()
            };
            let segment = Segment { addr: 0, len: 10 };
            let misuse = |id: u16, len: u32| {
                let (mut ring, mut device) = ring_and_device(layout, 4, options);
                ring.add(&[], &[segment], 7).unwrap();
                ring.add(&[], &[segment], 8).unwrap();
                let _ = ring.publish();
                while device.pop().is_some() {}
                device.put(&[(id, len)], false);
                ring.reap(&mut Vec::new())
            };
            assert_eq!(misuse(0, 10), Ok(1));
            assert_eq!(misuse(3, 1), Err(DeviceFault::UsedId { id: 3 }));
            assert_eq!(
                misuse(0, 11),
                Err(DeviceFault::UsedLen { len: 11, room: 10 })
            );
        }
    }
    let memory = DriverMemory::single(1 << 16, false).unwrap();
    let mut ring = SplitRing::new(&memory, 4, RingOptions::default()).unwrap();
    memory
        .write(ring.place().device + 2, &9u16.to_le_bytes())
        .unwrap();
    let fault = DeviceFault::UsedIndex {
        used: 9,
        available: 0,
    };
    assert_eq!(ring.reap(&mut Vec::new()), Err(fault));
}

/// A lane and a device on the same ring.
fn lane_and_device(shape: LaneShape, options: RingOptions) -> (Lane, Box<dyn Device>) {
    let memory = DriverMemory::single(1 << 20, false).unwrap();
    let lane = Lane::new(&memory, shape, options, |slot| {
        let segment = |part| Segment {
            addr: u64::from(slot) << 16 | u64::from(part),
            len: 100,
        };
        (0..shape.per_slot).map(segment).collect()
    })
    .unwrap();
    let device: Box<dyn Device> = match lane.area() {
        RingArea::Split(area) => Box::new(SplitDevice::new(&memory, area, options)),
        RingArea::Packed(area) => Box::new(PackedDevice::new(&memory, area, options)),
    };
    (lane, device)
}

#[derive(Clone, Debug)]
enum LaneStep {
    Push(u16),
    Use {
        share: usize,
        reverse: bool,
        one_entry: bool,
    },
    Harvest(usize),
    Reclaim,
}

fn lane_steps() -> impl Strategy<Value = Vec<LaneStep>> {
    let step = prop_oneof![
        (1u16..20).prop_map(LaneStep::Push),
        (1usize..9, any::<bool>(), any::<bool>()).prop_map(|(share, reverse, one_entry)| {
            LaneStep::Use {
                share,
                reverse,
                one_entry,
            }
        }),
        (1usize..20).prop_map(LaneStep::Harvest),
        Just(LaneStep::Reclaim),
    ];
    prop::collection::vec(step, 1..400)
}

proptest! {
    #[test]
    fn lanes_show_the_device_their_buffers_and_get_each_slot_back_once(
        shape in (any::<bool>(), 1u32..6, any::<bool>(), any::<bool>()),
        event_idx in any::<bool>(),
        in_order in any::<bool>(),
        steps in lane_steps(),
    ) {
        let (packed, log, receive, two) = shape;
        let direction = if receive { Direction::Receive } else { Direction::Transmit };
        let shape = LaneShape {
            layout: if packed { Layout::Packed } else { Layout::Split },
            size: 1 << log,
            direction,
            per_slot: if two { 2 } else { 1 },
        };
        let options = RingOptions { event_idx, in_order, indirect: 0 };
        let (mut lane, mut device) = lane_and_device(shape, options);
        let (mut pushed, mut held) = (VecDeque::new(), VecDeque::new());
        let mut expected: VecDeque<UsedSlot> = VecDeque::new();
        for step in steps {
            match step {
                LaneStep::Push(count) => {
                    let count = count.min(lane.free());
                    pushed.extend((0..count).map(|ahead| lane.next_slot(ahead)));
                    lane.push(count);
                    while let Some((id, buffers)) = device.pop() {
                        let slot: u16 = pushed.pop_front().unwrap();
                        let want = |part| {
                            (u64::from(slot) << 16 | part, 100, receive)
                        };
                        let parts = u64::from(shape.per_slot);
                        prop_assert_eq!(buffers, Vec::from_iter((0..parts).map(want)));
                        held.push_back((id, slot));
                    }
                    prop_assert!(pushed.is_empty(), "pushed and not seen");
                    prop_assert!(device.sleep());
                    // Whoever asks after a push to a sleeping device is told to kick.
                    if lane.free() > 0 {
                        pushed.push_back(lane.next_slot(0));
                        lane.push(1);
                        prop_assert!(lane.wants_kick(1));
                    }
                }
                LaneStep::Use { share, reverse, one_entry } => {
                    let count = (held.len() * share).div_ceil(8);
                    let mut batch: Vec<(u16, u16)> = held.drain(..count).collect();
                    if batch.is_empty() {
                        continue;
                    }
                    let one_entry = one_entry && in_order;
                    if reverse && !in_order {
                        batch.reverse();
                    }
                    let full = 100 * u32::from(shape.per_slot);
                    let last = batch.len() - 1;
                    let mut used = Vec::new();
                    for (i, (id, slot)) in batch.into_iter().enumerate() {
                        let len = match (receive, one_entry && i < last) {
                            (false, _) => 0,
                            (true, true) => full,
                            (true, false) => u32::from(slot) % full,
                        };
                        expected.push_back(UsedSlot { slot, len });
                        used.push((id, len));
                    }
                    device.put(&used, one_entry);
                }
                LaneStep::Harvest(room) => {
                    let mut into = vec![UsedSlot::default(); room];
                    // A batch in one entry is taken whole or not at all.
                    let count = lane.harvest(&mut into).unwrap();
                    prop_assert!(count <= expected.len());
                    prop_assert_eq!(&into[..count], Vec::from_iter(expected.drain(..count)));
                    prop_assert!(room < usize::from(lane.slots()) || expected.is_empty());
                }
                LaneStep::Reclaim if !receive => {
                    let count = usize::from(lane.reclaim().unwrap());
                    prop_assert_eq!(count, expected.len());
                    expected.clear();
                }
                LaneStep::Reclaim => {}
            }
            let out = pushed.len() + held.len() + expected.len();
            prop_assert_eq!(usize::from(lane.free()) + out, usize::from(lane.slots()));
        }
    }
}
