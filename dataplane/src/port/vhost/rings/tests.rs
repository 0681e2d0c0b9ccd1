//! Delivery into chains of any shapes against the `virtio-queue` crate.

use proptest::prelude::*;
use virtio_queue::QueueT;

use super::*;
use crate::burst::BurstStorage;
use crate::ring::tests::{
    BUFFERS, Chain, INDIRECT, MERGEABLE, Machine, Source, VERSION_1, bases, chains, places, popped,
};
use crate::wire::{Features, Offloads};

/// Delivers plain frames of these lengths into a ring of three tables of 1,000 one-byte buffers;
/// returns how many were dropped for want of room, how many were refused, and how many descriptors
/// were read.
fn search(lengths: &[usize]) -> (u64, u32, u32) {
    let machine = Machine::new();
    let chains = [const { 1000 }; 3].map(|count| Chain::table(count, 1));
    machine.publish(&chains, &(0..64).collect::<Vec<_>>(), 0, true);
    let mut ring = machine.ring(0, INDIRECT | VERSION_1 | MERGEABLE);
    let view = machine.view();
    let mut frames: Vec<_> = lengths
        .iter()
        .map(|length| {
            let mut frame = vec![0; 12 + length];
            frame[18] = 2;
            frame
        })
        .collect();
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for frame in &mut frames {
        assert!(burst.push_whole(GuestSlice::of(frame)));
    }
    burst.take_snapshots(12, Offloads::NONE);
    let job = Job {
        burst: &burst,
        frames: FrameSet::range(0, lengths.len()),
        no_wait: FrameSet::EMPTY,
        retags: None,
        source_queue: 0,
        owned: 0,
    };
    let limits = Limits {
        offloads: Offloads::NONE,
        max_bytes: u32::MAX,
    };
    let mut tools = Tools::new();
    let (outcome, fault) = deliver_into(&mut ring, &view, limits, &job, &mut tools);
    assert_eq!(fault, None);
    let dropped = tools.account.drops[DropReason::BufferTooSmall];
    (dropped, outcome.refused.len(), outcome.walked)
}

#[test]
fn a_search_in_vain_answers_for_all_frames_that_are_as_long() {
    // Two tables, each found by a descriptor of the ring, are more buffers than a frame may have.
    let once = 2 * 1001;
    assert_eq!(search(&[2500]), (1, 0, once));
    assert_eq!(search(&[2500; 64]), (64, 0, once));
    assert_eq!(search(&[2500, 2499, 2600, 2499]), (4, 0, 2 * once));
    // What is taken in between makes it another question.
    assert_eq!(search(&[2500, 60, 2500]), (2, 0, 2 * once + 1001));
}

#[test]
fn a_delivery_that_has_read_enough_descriptors_has_the_others_wait() {
    let lengths: Vec<_> = (0..64).map(|i| 2900 - i).collect();
    let (dropped, refused, walked) = search(&lengths);
    assert_eq!(walked, 3 * 2002);
    assert_eq!((dropped, refused), (3, 61));
}

proptest! {
    // Frames of any lengths into chains of any shapes: the crate's chains, filled front to back by
    // its own writer, give the same memory, so neither tails nor other buffers are touched.
    #[test]
    fn frames_are_delivered_as_into_the_chains_that_virtio_queue_pops(
        chains in chains(1500),
        places in places(),
        base in bases(),
        mergeable in any::<bool>(),
        legacy in any::<bool>(),
        frames in prop::collection::vec((14..1600_u32, any::<u8>()), 1..8),
    ) {
        let header: u32 = if legacy && !mergeable { 10 } else { 12 };
        let features = INDIRECT
            | if legacy { Features::empty() } else { VERSION_1 }
            | if mergeable { MERGEABLE } else { Features::empty() };
        let [machine, reference] = [Machine::new(), Machine::new()];
        for machine in [&machine, &reference] {
            machine.write(BUFFERS, &vec![0xa5; 200_000]);
            machine.publish(&chains, &places, base, true);
        }
        let mut queue = reference.queue(base);
        let mut free = popped(&reference, &mut queue).into_iter().peekable();
        let mut ring = machine.ring(base, features);
        let view = machine.view();
        let mut tools = Tools::new();
        let limits = Limits { offloads: Offloads::NONE, max_bytes: u32::MAX };
        let mut taken = 0;
        for (length, fill) in frames {
            let source = Source::new(length, fill);
            let (source_view, mut storage) = (source.machine.view(), BurstStorage::new());
            let burst = source.burst(&mut storage, &source_view);
            let job = Job {
                burst: &burst,
                frames: FrameSet::one(0),
                no_wait: FrameSet::EMPTY,
                retags: None,
                source_queue: 0,
                owned: 0,
            };
            let (outcome, fault) = deliver_into(&mut ring, &view, limits, &job, &mut tools);
            prop_assert_eq!(fault, None);
            let account = std::mem::take(&mut tools.account);
            let delivered = match account.drops.nonzero().next() {
                Some((reason, _)) => Err(reason),
                None if outcome.refused.is_empty() => Ok(()),
                None => Err(outcome.refusal),
            };
            let needed = length + header;
            let capacity = |chain: &(u16, Vec<(u64, u32)>)| chain.1.iter().map(|b| b.1).sum::<u32>();
            let mut rooms = free.clone().map(|chain| capacity(&chain));
            let expected = if mergeable {
                let all: u32 = rooms.sum();
                if all >= needed { Ok(()) } else { Err(DropReason::RingFull) }
            } else {
                match rooms.next() {
                    None => Err(DropReason::RingFull),
                    Some(room) if room < needed => Err(DropReason::BufferTooSmall),
                    Some(_) => Ok(()),
                }
            };
            prop_assert_eq!(delivered, expected);
            if delivered.is_err() {
                continue;
            }
            let mut used = Vec::new();
            let mut left = needed;
            while left > 0 {
                let chain = free.next().unwrap();
                let part = left.min(capacity(&chain));
                left -= part;
                used.push((chain, part));
            }
            let buffers = u16::try_from(used.len()).unwrap();
            let mut message = vec![0; 10];
            if header == 12 {
                message.extend(buffers.to_le_bytes());
            }
            message.extend(&source.frame);
            let mut rest = message.as_slice();
            for ((head, pieces), part) in used {
                for (addr, len) in pieces {
                    let (now, later) = rest.split_at(rest.len().min(len as usize));
                    reference.write(addr, now);
                    rest = later;
                }
                queue.add_used(&reference.theirs, head, part).unwrap();
                taken += 1;
            }
        }
        ring.publish();
        prop_assert!(machine.image() == reference.image(), "memory differs");
        prop_assert_eq!(ring.next_avail(), base.wrapping_add(taken));
    }
}

#[test]
fn a_flow_goes_to_the_ring_of_its_number_or_the_next_that_the_worker_owns() {
    let all = u64::MAX;
    let choose = |receivers, owned| [0, 1, 2, 3, 5].map(|q| choose_receiver(receivers, owned, q));
    assert_eq!(choose(0, all), [None; 5]);
    assert_eq!(choose(0b1111, all), [0, 1, 2, 3, 1].map(Some));
    assert_eq!(choose(0b1111, 0b0101), [0, 2, 2, 0, 2].map(Some));
    assert_eq!(choose(0b1111, 0b1010), [1, 1, 3, 3, 1].map(Some));
    // Nothing of one's own: as if all were.
    assert_eq!(choose(0b0011, 0b1100), [0, 1, 0, 1, 1].map(Some));
    // A ring that is stopped.
    assert_eq!(choose(0b1011, all), [0, 1, 3, 3, 3].map(Some));
}

proptest! {
    #[test]
    fn the_chosen_ring_takes_frames_and_is_owned_if_any_is(
        receivers in 1_u64..,
        owned: u64,
        source_queue in 0_u16..64,
        other in 0_u32..64,
    ) {
        let chosen = choose_receiver(receivers, owned, source_queue).unwrap();
        let bit = 1 << chosen;
        prop_assert!(receivers & bit != 0);
        prop_assert!(receivers & owned == 0 || owned & bit != 0);
        // Losing another pair changes nothing.
        let lost = owned & !(1 << other);
        if lost & bit != 0 {
            prop_assert_eq!(choose_receiver(receivers, lost, source_queue), Some(chosen));
        }
    }
}
