//! What is parked comes out whole and in order, is bounded, and shared.

use std::collections::VecDeque;

use proptest::prelude::*;
use ringway_bridge::{FrameSet, MAX_BURST};

use super::*;
use crate::burst::BurstStorage;
use crate::offload::GsoScratch;
use crate::port::{Account, Job, deliver};

fn port(number: u16) -> PortId {
    PortId::new(number).unwrap()
}

/// Header and frame, told apart by `number`; of lengths that take one space or several.
fn message(number: u64, l2_bytes: usize) -> Vec<u8> {
    let mut message = vec![0; HEADER_BYTES as usize + l2_bytes];
    // num_buffers, and a station.
    message[10] = 1;
    message[18] = 0x02;
    message[26..34].copy_from_slice(&number.to_be_bytes());
    let last = message.len() - 1;
    message[last] = number.to_be_bytes()[7];
    message
}

/// Parks messages of `from` for `to`; returns how many of the first were taken.
fn park(parking: &mut Parking, from: u16, to: u16, messages: &mut [Vec<u8>], now_ns: u64) -> usize {
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for message in messages.iter_mut() {
        assert!(burst.push_whole(GuestSlice::of(message)));
    }
    burst.take_snapshots(HEADER_BYTES, Offloads::ALL);
    let job = Job {
        burst: &burst,
        frames: FrameSet::range(0, burst.len()),
        no_wait: FrameSet::EMPTY,
        retags: None,
        source_queue: 0,
        owned: 0,
    };
    let leaving = Leaving {
        from: Some(port(from)),
        to: port(to),
        source_queue: 0,
        outages: 0,
    };
    let mut lot = parking.lot(leaving, now_ns);
    let mut account = Account::default();
    let outcome = deliver(&mut lot, &job, &mut GsoScratch::new(), &mut account);
    assert!(account.is_empty());
    assert_eq!(outcome.refused, outcome.refused.suffix(burst.len()));
    parking.rotate(0);
    outcome.sent.len() as usize
}

/// The frames that leave lot `at`, of which the destination takes `room`.
fn leave(parking: &mut Parking, at: usize, room: usize, now_ns: u64) -> Vec<Vec<u8>> {
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    if parking.leave(at, now_ns, &mut burst).is_none() {
        return Vec::new();
    }
    let messages: Vec<_> = (0..burst.len())
        .map(|index| {
            let mut bytes = vec![0; burst.total_bytes(index) as usize];
            burst.pieces(index).read(&mut bytes);
            bytes
        })
        .collect();
    let gone = room.min(messages.len());
    parking.left(at, gone, gone < messages.len(), now_ns);
    messages[..gone].to_vec()
}

proptest! {
    // A naive reading: one list for each source and destination.
    #[test]
    fn frames_leave_whole_in_order_and_once(
        steps in prop::collection::vec((0..3_u16, 0..3_u16, 1..20_usize, 60..9000_usize), 1..60),
    ) {
        let mut parking = Parking::default();
        let mut model: [[VecDeque<Vec<u8>>; 3]; 3] = Default::default();
        let (mut next, mut now_ns) = (0, 0);
        for (from, to, count, bytes) in steps {
            now_ns += 10 * MAX_RETRY_NS;
            let mut messages: Vec<_> = (0..count)
                .map(|i| message(next + i as u64, bytes + 37 * i))
                .collect();
            next += count as u64;
            let taken = park(&mut parking, from, 3 + to, &mut messages, now_ns);
            model[usize::from(from)][usize::from(to)].extend(messages.drain(..taken));
            if count % 3 == 0 {
                for at in 0..parking.lots() {
                    let Leaving { from, to, .. } = parking.lots[at].leaving;
                    let of_source = &mut model[from.unwrap().index()];
                    let waiting = &mut of_source[to.index() - 3];
                    let mut now_ns = now_ns + MAX_RETRY_NS;
                    for _ in 0..count {
                        now_ns += MAX_RETRY_NS;
                        for left in leave(&mut parking, at, 7, now_ns) {
                            prop_assert_eq!(Some(left), waiting.pop_front());
                        }
                    }
                }
                parking.rotate(1);
            }
            let waiting = model.iter().flatten().filter(|waiting| !waiting.is_empty()).count();
            prop_assert_eq!(parking.lots(), waiting);
        }
        for to in 0..3_u16 {
            parking.remove(port(3 + to));
        }
        prop_assert!(parking.is_empty());
        // No space is lost.
        if let Some(spaces) = &parking.spaces {
            prop_assert_eq!(spaces.free_count, SPACES);
        }
    }
}

/// Parks bursts of short frames until one is refused; returns how many were taken.
fn fill(parking: &mut Parking, from: u16, to: u16) -> usize {
    let mut count = 0;
    loop {
        let mut messages = vec![message(0, 60); MAX_BURST];
        let taken = park(parking, from, to, &mut messages, 0);
        count += taken;
        if taken < MAX_BURST {
            return count;
        }
    }
}

#[test]
fn a_source_and_a_destination_hold_no_more_than_what_is_left() {
    let mut parking = Parking::default();
    let first = fill(&mut parking, 1, 10);
    // What a source has of a lot, the lot may still take; what a lot has, is still free twice.
    assert_eq!(first, SPACES.div_ceil(3));
    let second = fill(&mut parking, 2, 10);
    assert!(second > first / 4, "another source has room: {second}");
    let other = fill(&mut parking, 1, 11);
    assert!(other > first / 4, "another destination has room: {other}");
    for to in 12..24 {
        assert!(fill(&mut parking, 3, to) > 0, "the room for {to}");
    }
    let spaces = parking.spaces.as_ref().unwrap();
    assert_eq!(spaces.bytes.len(), 16 << 20, "all that may be parked");
}

#[test]
fn a_destination_holds_half_of_all_at_most_however_many_send_to_it() {
    let mut parking = Parking::default();
    let held: usize = (1..100).map(|from| fill(&mut parking, from, 200)).sum();
    assert!(held > SPACES / 3 && held <= SPACES / 2, "{held}");
}

#[test]
fn who_was_tried_is_tried_last() {
    let mut parking = Parking::default();
    for to in 10..15 {
        park(&mut parking, 1, to, &mut [message(0, 60)], 0);
    }
    let order = |parking: &Parking| -> Vec<u16> {
        parking
            .lots
            .iter()
            .map(|lot| lot.leaving.to.get())
            .collect()
    };
    parking.rotate(2);
    assert_eq!(order(&parking), [12, 13, 14, 10, 11]);
    parking.rotate(9);
    assert_eq!(order(&parking), [12, 13, 14, 10, 11]);
}

#[test]
fn frames_that_wait_for_too_long_are_told_with_whose_they_were() {
    let mut parking = Parking::default();
    park(
        &mut parking,
        1,
        10,
        &mut [message(0, 60), message(1, 5000)],
        1_000,
    );
    park(&mut parking, 2, 10, &mut [message(2, 60)], 2_000);
    assert_eq!(parking.expire(0, 999), None);
    let expired = |parking: &mut Parking| parking.expire(0, 1_999).map(|gone| gone.from);
    assert_eq!(expired(&mut parking), Some(Some(port(1))));
    // A port that goes takes its name along, not its frames.
    parking.remove(port(1));
    assert_eq!(expired(&mut parking), Some(None));
    parking.rotate(1);
    assert_eq!(expired(&mut parking), None);
    let has = |parking: &Parking, queue, from: Option<u16>| {
        parking.has((port(10), queue), from.map(port))
    };
    assert!(has(&parking, 0, None) && has(&parking, 0, Some(2)));
    assert!(!has(&parking, 0, Some(1)) && !has(&parking, 1, None));
    parking.remove(port(10));
    assert!(parking.is_empty() && !has(&parking, 0, None));
}

#[test]
fn a_destination_that_takes_nothing_is_tried_less_and_less_often() {
    let mut parking = Parking::default();
    park(&mut parking, 1, 10, &mut vec![message(0, 60); 9], 0);
    let mut tries = Vec::new();
    for now_ns in (0..2_000_000).step_by(1_000) {
        let before = parking.lots[0].retry_ns;
        leave(&mut parking, 0, 0, now_ns);
        if parking.lots[0].retry_ns != before {
            tries.push(now_ns);
        }
    }
    assert_eq!(tries[..4], [4_000, 8_000, 16_000, 32_000]);
    assert!(
        tries
            .windows(2)
            .all(|pair| pair[1] - pair[0] <= MAX_RETRY_NS)
    );
    // One that takes some is tried soon again.
    assert_eq!(leave(&mut parking, 0, 4, 3_000_000).len(), 4);
    assert_eq!(parking.lots[0].retry_ns, 3_000_000 + RETRY_NS);
}
