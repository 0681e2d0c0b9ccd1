//! Our side of split rings against the `virtio-queue` crate on random chains, and its decisions on
//! notification against a plain reading of virtio 1.3, 2.7.7 and 2.7.10.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::burst::{Burst, BurstStorage};
use crate::memory::{GuestMemory, Pieces, Region, RegionSpec};
use crate::wire::{Features, Offloads};

const BASE: u64 = 1 << 32;
const BYTES: u64 = 1 << 20;
const DESC: u64 = BASE;
const AVAIL: u64 = BASE + 0x1000;
const USED: u64 = BASE + 0x2000;
const TABLES: u64 = BASE + 0x4000;
pub(crate) const BUFFERS: u64 = BASE + 0x10000;
const SIZE: u16 = 64;
pub(crate) const INDIRECT: Features = Features::VIRTIO_F_INDIRECT_DESC;
pub(crate) const VERSION_1: Features = Features::VIRTIO_F_VERSION_1;
pub(crate) const MERGEABLE: Features = Features::VIRTIO_NET_F_MRG_RXBUF;
const EVENT_IDX: Features = Features::VIRTIO_F_EVENT_IDX;

/// One guest's memory, twice mapped: as the data path has it, and for the crate.
pub(crate) struct Machine {
    ours: Arc<GuestMemory>,
    pub(crate) theirs: GuestMemoryMmap<()>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let file = memfd_create("ring-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, BYTES).unwrap();
        let spec = RegionSpec {
            guest_addr: BASE,
            size: BYTES,
            user_addr: BASE,
            mmap_offset: 0,
        };
        let same: OwnedFd = file.try_clone().unwrap();
        let length = usize::try_from(BYTES).unwrap();
        let offset = FileOffset::new(File::from(same), 0);
        let range = (GuestAddress(BASE), length, Some(offset));
        let region = Region::map(spec, file).unwrap();
        Self {
            ours: Arc::new(GuestMemory::new(vec![region]).unwrap()),
            theirs: GuestMemoryMmap::from_ranges_with_files([range]).unwrap(),
        }
    }

    fn host(&self, addr: u64) -> *mut u8 {
        self.ours.translate_user(addr, 1).unwrap()
    }

    pub(crate) fn ring(&self, base: u16, features: Features) -> SplitRing {
        let at = Areas {
            desc: self.host(DESC),
            driver: self.host(AVAIL),
            device: self.host(USED),
        };
        // SAFETY: the areas are aligned, do not overlap and hold a ring of SIZE entries.
        unsafe { SplitRing::new(SIZE, at, base, features) }
    }

    pub(crate) fn view(&self) -> MemoryView {
        MemoryView::new(Arc::clone(&self.ours))
    }

    pub(crate) fn queue(&self, base: u16) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        let halves = |addr: u64| {
            (
                u32::try_from(addr & 0xffff_ffff).ok(),
                u32::try_from(addr >> 32).ok(),
            )
        };
        let (low, high) = halves(DESC);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(AVAIL);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(USED);
        queue.set_used_ring_address(low, high);
        queue.set_next_avail(base);
        queue.set_next_used(base);
        queue.set_ready(true);
        queue
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.theirs.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    fn write_u16(&self, addr: u64, value: u16) {
        self.write(addr, &value.to_le_bytes());
    }

    fn read_u16(&self, addr: u64) -> u16 {
        let mut bytes = [0; 2];
        self.theirs
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        u16::from_le_bytes(bytes)
    }

    /// All of memory.
    pub(crate) fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
        self.theirs
            .read_slice(&mut bytes, GuestAddress(BASE))
            .unwrap();
        bytes
    }

    /// Guest address of a host pointer.
    fn guest(&self, host: *const u8) -> u64 {
        BASE + u64::try_from(host.addr() - self.host(BASE).addr()).unwrap()
    }

    /// Writes chains, their descriptors taken in the order of `places`, and makes them available
    /// behind index `base`. The used ring stands at `base`, too.
    pub(crate) fn publish(&self, chains: &[Chain], places: &[u16], base: u16, writable: bool) {
        let mut free = places.iter().copied();
        let mut next_table = TABLES;
        let mut buffer = BUFFERS;
        let mut place = |len: u32| {
            let addr = buffer;
            buffer += u64::from(len) + 3;
            addr
        };
        let direction = if writable { 2 } else { 0 };
        for (offset, chain) in (0..).zip(chains) {
            let direct = if chain.indirect { 1 } else { chain.lens.len() };
            let indices: Vec<u16> = free.by_ref().take(direct).collect();
            let last = chain.lens.len() - 1;
            let descs: Vec<[u8; 16]> = (0..)
                .zip(&chain.lens)
                .map(|(i, len): (u16, &u32)| {
                    let more = usize::from(i) < last;
                    let follower = if chain.indirect {
                        i + 1
                    } else {
                        *indices.get(usize::from(i) + 1).unwrap_or(&0)
                    };
                    let next = if more { follower } else { 0 };
                    desc(place(*len), *len, direction | u16::from(more), next)
                })
                .collect();
            if chain.indirect {
                let table = descs.concat();
                self.write(next_table, &table);
                let len = u32::try_from(table.len()).unwrap();
                self.write(
                    DESC + 16 * u64::from(indices[0]),
                    &desc(next_table, len, 4, 0),
                );
                // Not aligned: the specification does not ask for it.
                next_table += u64::from(len) + 4;
            } else {
                for (index, desc) in indices.iter().zip(&descs) {
                    self.write(DESC + 16 * u64::from(*index), desc);
                }
            }
            let slot = base.wrapping_add(offset) % SIZE;
            self.write_u16(AVAIL + 4 + 2 * u64::from(slot), indices[0]);
        }
        let count = u16::try_from(chains.len()).unwrap();
        self.write_u16(AVAIL + 2, base.wrapping_add(count));
        self.write_u16(USED + 2, base);
    }
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Lengths of a chain's buffers.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    lens: Vec<u32>,
    indirect: bool,
}

impl Chain {
    /// A table of `count` buffers of `len` bytes.
    pub(crate) fn table(count: usize, len: u32) -> Self {
        Self {
            lens: vec![len; count],
            indirect: true,
        }
    }
}

pub(crate) fn chains(longest: u32) -> impl Strategy<Value = Vec<Chain>> {
    let lens = prop::collection::vec(prop_oneof![1..20_u32, 1..longest], 1..4);
    let chain = (lens, any::<bool>()).prop_map(|(lens, indirect)| Chain { lens, indirect });
    // At most 3 descriptors each, so that all fit into the table.
    prop::collection::vec(chain, 1..20)
}

pub(crate) fn places() -> impl Strategy<Value = Vec<u16>> {
    Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle()
}

/// An index that is often about to wrap.
pub(crate) fn bases() -> impl Strategy<Value = u16> {
    prop_oneof![any::<u16>(), 65_500..=u16::MAX]
}

/// A frame's slices.
fn slices<'m>(mut pieces: Pieces<'m>) -> impl Iterator<Item = GuestSlice<'m>> {
    std::iter::from_fn(move || Some(pieces.take(u32::MAX)).filter(|slice| slice.len() > 0))
}

/// Head and buffers of each chain that the crate pops.
pub(crate) fn popped(machine: &Machine, queue: &mut Queue) -> Vec<(u16, Vec<(u64, u32)>)> {
    let mut all = Vec::new();
    while let Some(chain) = queue.pop_descriptor_chain(&machine.theirs) {
        let head = chain.head_index();
        all.push((
            head,
            chain.map(|desc| (desc.addr().0, desc.len())).collect(),
        ));
    }
    all
}

proptest! {
    // Heads, buffers, lengths and order; then the used ring, byte by byte.
    #[test]
    fn transmit_chains_are_gathered_as_virtio_queue_pops_them(
        chains in chains(300),
        places in places(),
        base in bases(),
        max in 1..32_usize,
    ) {
        let [machine, reference] = [Machine::new(), Machine::new()];
        for machine in [&machine, &reference] {
            machine.publish(&chains, &places, base, false);
        }
        let mut queue = reference.queue(base);
        let expected = popped(&reference, &mut queue);
        let mut ring = machine.ring(base, VERSION_1 | INDIRECT);
        let view = machine.view();
        let mut storage = BurstStorage::new();
        let mut found = Vec::new();
        loop {
            let mut burst = storage.begin();
            prop_assert_eq!(gather(&mut ring, max, &view, &mut burst), Ok(()));
            prop_assert!(burst.len() <= max);
            if burst.len() == 0 {
                break;
            }
            for (index, frame) in burst.frames().iter().enumerate() {
                let pieces: Vec<_> = slices(burst.pieces(index))
                    .map(|slice| (machine.guest(slice.as_ptr()), slice.len()))
                    .collect();
                prop_assert_eq!(frame.len, pieces.iter().map(|p| p.1).sum::<u32>());
                found.push((frame.entry.id, pieces));
            }
            ring.complete_all(burst.frames(), Direction::FromGuest);
            ring.publish();
        }
        prop_assert_eq!(&found, &expected);
        for (head, _) in &expected {
            queue.add_used(&reference.theirs, *head, 0).unwrap();
        }
        prop_assert!(machine.image() == reference.image(), "used rings differ");
        prop_assert_eq!(ring.next_avail(), queue.next_avail());
    }

    // What is given back is taken again, and nothing of it was used.
    #[test]
    fn chains_given_back_are_gathered_again(
        chains in chains(100),
        places in places(),
        base in bases(),
        back in 0..20_usize,
    ) {
        let machine = Machine::new();
        machine.publish(&chains, &places, base, false);
        let mut ring = machine.ring(base, VERSION_1 | INDIRECT);
        let entries = |burst: &Burst<'_>| burst.frames().iter().map(|f| f.entry.id).collect::<Vec<_>>();
        let view = machine.view();
        let mut storage = BurstStorage::new();
        let mut burst = storage.begin();
        gather(&mut ring, 64, &view, &mut burst).unwrap();
        let all = entries(&burst);
        let back = back.min(all.len());
        ring.give_back(u16::try_from(back).unwrap());
        let mut burst = storage.begin();
        gather(&mut ring, 64, &view, &mut burst).unwrap();
        prop_assert_eq!(entries(&burst), &all[all.len() - back..]);
        prop_assert_eq!(machine.read_u16(USED + 2), base);
    }

    // 2.7.7.2: with EVENT_IDX a call is due if one of the entries just used has the index
    // used_event; without, unless the flag says no. The first call of a ring is always made.
    #[test]
    fn calls_are_decided_as_the_specification_says(
        base in bases(),
        event_idx in any::<bool>(),
        steps in prop::collection::vec((0..12_u16, -20..20_i16, any::<bool>()), 1..100),
    ) {
        let machine = Machine::new();
        machine.write_u16(USED + 2, base);
        let mut ring = machine.ring(base, VERSION_1 | if event_idx { EVENT_IDX } else { Features::empty() });
        let mut index = base;
        let mut is_first = true;
        for (count, distance, no_calls) in steps {
            let event = index.wrapping_add_signed(distance);
            machine.write_u16(AVAIL + 4 + 2 * u64::from(SIZE), event);
            machine.write_u16(AVAIL, u16::from(no_calls));
            let mut is_due = false;
            for _ in 0..count {
                ring.complete(Entry::single(0), 0);
                is_due |= index == event;
                index = index.wrapping_add(1);
            }
            let is_due = if event_idx { is_due || is_first && count > 0 } else { count > 0 && !no_calls };
            is_first &= count == 0;
            prop_assert_eq!(ring.publish(), is_due);
            prop_assert_eq!(machine.read_u16(USED + 2), index);
        }
    }

    // 2.7.10.1: an armed ring asks for a kick for the next entry, and finds what came before it
    // asked. A disarmed one asks for none, or with EVENT_IDX for one that is long past.
    #[test]
    fn kicks_are_asked_for_as_the_specification_says(
        base in bases(),
        event_idx in any::<bool>(),
        steps in prop::collection::vec((0..4_u16, any::<bool>()), 1..100),
    ) {
        let machine = Machine::new();
        machine.write_u16(AVAIL + 2, base);
        let mut ring = machine.ring(base, VERSION_1 | if event_idx { EVENT_IDX } else { Features::empty() });
        let mut index = base;
        for (count, arm) in steps {
            // What the driver decides when it makes `count` more available.
            let wants_kick = |machine: &Machine, from: u16| if event_idx {
                let event = machine.read_u16(USED + 4 + 8 * u64::from(SIZE));
                (0..count).any(|i| from.wrapping_add(i) == event)
            } else {
                count > 0 && machine.read_u16(USED) & 1 == 0
            };
            let offer = |machine: &Machine| machine.write_u16(AVAIL + 2, index.wrapping_add(count));
            if arm {
                prop_assert!(ring.arm(), "the ring is empty");
                prop_assert_eq!(wants_kick(&machine, index), count > 0);
                offer(&machine);
                prop_assert_eq!(ring.arm(), count == 0, "armed a ring that is not empty");
            } else {
                ring.disarm();
                if !event_idx {
                    prop_assert!(!wants_kick(&machine, index));
                }
                offer(&machine);
            }
            prop_assert_eq!(ring.available(), Ok(count));
            ring.take(count);
            index = index.wrapping_add(count);
        }
    }
}

/// A frame in a memory of its own, with the burst that a worker would make of it.
pub(crate) struct Source {
    pub(crate) machine: Machine,
    pub(crate) frame: Vec<u8>,
}

impl Source {
    pub(crate) fn new(length: u32, fill: u8) -> Self {
        let machine = Machine::new();
        let mut frame: Vec<u8> = (0..length).map(|i| (i % 251) as u8 ^ fill).collect();
        // A station's address, not a group's.
        frame[6] &= !1;
        // The header's other fields are rubbish that must not travel on.
        machine.write(
            BUFFERS,
            &[
                0, 0, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee,
            ],
        );
        machine.write(BUFFERS + 12, &frame);
        machine.write(DESC, &desc(BUFFERS, length + 12, 0, 0));
        machine.write_u16(AVAIL + 2, 1);
        Self { machine, frame }
    }

    pub(crate) fn burst<'m>(
        &self,
        storage: &'m mut BurstStorage,
        view: &'m MemoryView,
    ) -> Burst<'m> {
        let mut ring = self.machine.ring(0, VERSION_1);
        let mut burst = storage.begin();
        gather(&mut ring, 1, view, &mut burst).unwrap();
        burst.take_snapshots(ring.header_bytes(), Offloads::NONE);
        assert_eq!(burst.runs().len(), 1);
        burst
    }
}

// Chains that cost and carry nothing: nothing forbids buffers of no bytes in a transmit ring.
#[test]
fn a_burst_ends_once_it_has_read_enough_descriptors_one_by_one() {
    let machine = Machine::new();
    let chains = [const { 900 }; 3].map(|count| Chain::table(count, 0));
    let places: Vec<_> = (0..SIZE).collect();
    machine.publish(&chains, &places, 0, false);
    let mut ring = machine.ring(0, VERSION_1 | INDIRECT);
    let view = machine.view();
    let mut storage = BurstStorage::new();
    // Each chain is a descriptor that leads to the table, and those of the table.
    for (frames, walked) in [(2, 2 * 901), (1, 901), (0, 0)] {
        let mut burst = storage.begin();
        assert_eq!(gather(&mut ring, 64, &view, &mut burst), Ok(()));
        assert_eq!((burst.len(), burst.walked()), (frames, walked));
        ring.complete_all(burst.frames(), Direction::FromGuest);
        ring.publish();
    }
}

// 2.7.9: a batch of an in-order driver's buffers is used by one entry with the last one's id, in
// the first one's place.
#[test]
fn an_in_order_driver_gets_one_used_entry_for_a_burst() {
    let chain = || Chain {
        lens: vec![100],
        indirect: false,
    };
    let machine = Machine::new();
    let base = u16::MAX - 1;
    machine.publish(&[chain(), chain(), chain()], &[9, 4, 7], base, false);
    let untouched = |index: u64| {
        let at = USED + 4 + 8 * (index % u64::from(SIZE));
        [machine.read_u16(at), machine.read_u16(at + 2)]
    };
    let before = [untouched(0xffff), untouched(0)];
    let mut ring = machine.ring(base, VERSION_1 | Features::VIRTIO_F_IN_ORDER);
    let view = machine.view();
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    gather(&mut ring, 32, &view, &mut burst).unwrap();
    assert_eq!(complete_gathered(&mut ring, burst.frames()), 3 * 88);
    ring.publish();
    assert_eq!(machine.read_u16(USED + 2), base.wrapping_add(3));
    assert_eq!(untouched(0xfffe), [7, 0]);
    assert_eq!([untouched(0xffff), untouched(0)], before);
}

// 2.7.13.4.1: flags that were set stay set while polled, and the words do not overlap entries.
#[test]
fn notification_words_lie_behind_the_entries() {
    let machine = Machine::new();
    let mut ring = machine.ring(7, VERSION_1 | EVENT_IDX);
    ring.arm();
    assert_eq!(machine.read_u16(USED + 4 + 8 * u64::from(SIZE)), 7);
    for _ in 0..SIZE {
        ring.complete(Entry::single(0xffff), u32::MAX);
    }
    ring.publish();
    assert_eq!(machine.read_u16(USED + 4 + 8 * u64::from(SIZE)), 7);
    assert_eq!(machine.read_u16(USED), 0);
    let used: u16 = machine
        .theirs
        .load(GuestAddress(USED + 2), Ordering::Acquire)
        .unwrap();
    assert_eq!(u16::from_le(used), SIZE);
}
