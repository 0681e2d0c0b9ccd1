//! The driver's rings against devices: the virtio-queue crate for split rings, and a plain reading
//! of the specification for packed ones.

mod devices;

use std::collections::VecDeque;

use proptest::prelude::*;

use self::devices::{BufferPool, Device, PackedDevice, SplitDevice};
use super::*;

fn ring_and_device(
    layout: Layout,
    size: u16,
    options: RingOptions,
) -> (DriverRing, Box<dyn Device>) {
    let memory = DriverMemory::single(1 << 20, false).unwrap();
    let ring = DriverRing::new(&memory, layout, size, options).unwrap();
    let device: Box<dyn Device> = match &ring {
        DriverRing::Split(ring) => Box::new(SplitDevice::new(&memory, ring.area(), options)),
        DriverRing::Packed(ring) => Box::new(PackedDevice::new(&memory, ring.area(), options)),
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
    let mut added: VecDeque<(u32, BufferPool)> = VecDeque::new();
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
                let buffer = |i: usize| Buffer {
                    addr: u64::from(token) << 16 | i as u64,
                    len: 1 + token % 1000 + u32::try_from(i).unwrap(),
                };
                let readable: Vec<Buffer> = (0..readable).map(buffer).collect();
                let writable: Vec<Buffer> = (10..10 + writable).map(buffer).collect();
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
    let make = |layout, size| DriverRing::new(&memory, layout, size, RingOptions::default());
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
            let buffer = Buffer { addr: 0, len: 10 };
            let misuse = |id: u16, len: u32| {
                let (mut ring, mut device) = ring_and_device(layout, 4, options);
                ring.add(&[], &[buffer], 7).unwrap();
                ring.add(&[], &[buffer], 8).unwrap();
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
    let mut ring = SplitDriverRing::new(&memory, 4, RingOptions::default()).unwrap();
    memory
        .write(ring.place().device + 2, &9u16.to_le_bytes())
        .unwrap();
    let fault = DeviceFault::UsedIndex {
        used: 9,
        available: 0,
    };
    assert_eq!(ring.reap(&mut Vec::new()), Err(fault));
}

/// A preposted ring and a device on the same ring.
fn preposted_and_device(
    shape: PrepostedShape,
    options: RingOptions,
) -> (Preposted, Box<dyn Device>) {
    let memory = DriverMemory::single(1 << 20, false).unwrap();
    let ring = Preposted::new(&memory, shape, options, |slot| {
        let buffer = |part| Buffer {
            addr: u64::from(slot) << 16 | u64::from(part),
            len: 100,
        };
        (0..shape.per_slot).map(buffer).collect()
    })
    .unwrap();
    let device: Box<dyn Device> = match ring.areas() {
        (Some(area), _) => Box::new(SplitDevice::new(&memory, area, options)),
        (_, Some(area)) => Box::new(PackedDevice::new(&memory, area, options)),
        _ => unreachable!("a ring has one layout"),
    };
    (ring, device)
}

#[derive(Clone, Debug)]
enum SlotStep {
    Push(u16),
    Use {
        share: usize,
        reverse: bool,
        one_entry: bool,
    },
    Harvest(usize),
    Reclaim,
}

fn slot_steps() -> impl Strategy<Value = Vec<SlotStep>> {
    let step = prop_oneof![
        (1u16..100).prop_map(SlotStep::Push),
        (1usize..9, any::<bool>(), any::<bool>()).prop_map(|(share, reverse, one_entry)| {
            SlotStep::Use {
                share,
                reverse,
                one_entry,
            }
        }),
        (1usize..140).prop_map(SlotStep::Harvest),
        Just(SlotStep::Reclaim),
    ];
    prop::collection::vec(step, 1..400)
}

proptest! {
    #[test]
    fn preposted_rings_show_the_device_their_buffers_and_get_each_slot_back_once(
        shape in (any::<bool>(), 1u32..8, any::<bool>(), any::<bool>()),
        event_idx in any::<bool>(),
        in_order in any::<bool>(),
        indirect in 0u16..3,
        steps in slot_steps(),
    ) {
        let (packed, log, receive, two) = shape;
        let direction = if receive { BufferSide::Receive } else { BufferSide::Transmit };
        let shape = PrepostedShape {
            layout: if packed { Layout::Packed } else { Layout::Split },
            size: 1 << log,
            direction,
            per_slot: if two { 2 } else { 1 },
        };
        let options = RingOptions { event_idx, in_order, indirect };
        let (mut ring, mut device) = preposted_and_device(shape, options);
        let descs_of_slot = if indirect == 2 { 1 } else { shape.per_slot };
        prop_assert_eq!(ring.slots(), shape.size / descs_of_slot);
        let (mut pushed, mut held) = (VecDeque::new(), VecDeque::new());
        let mut expected: VecDeque<UsedSlot> = VecDeque::new();
        for step in steps {
            match step {
                SlotStep::Push(count) => {
                    let count = count.min(ring.free());
                    pushed.extend((0..count).map(|ahead| ring.next_slot(ahead)));
                    ring.push(count);
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
                    if ring.free() > 0 {
                        pushed.push_back(ring.next_slot(0));
                        ring.push(1);
                        prop_assert!(ring.wants_kick(1));
                    }
                }
                SlotStep::Use { share, reverse, one_entry } => {
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
                SlotStep::Harvest(room) => {
                    let mut into = vec![UsedSlot::default(); room];
                    // A batch in one entry is taken whole or not at all.
                    let count = ring.harvest(&mut into).unwrap();
                    prop_assert!(count <= expected.len());
                    prop_assert_eq!(&into[..count], Vec::from_iter(expected.drain(..count)));
                    prop_assert!(room < usize::from(ring.slots()) || expected.is_empty());
                }
                SlotStep::Reclaim if !receive => {
                    let count = usize::from(ring.reclaim().unwrap());
                    prop_assert_eq!(count, expected.len());
                    expected.clear();
                }
                SlotStep::Reclaim => {}
            }
            let out = pushed.len() + held.len() + expected.len();
            prop_assert_eq!(usize::from(ring.free()) + out, usize::from(ring.slots()));
        }
    }
}
