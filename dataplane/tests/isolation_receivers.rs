//! Guests that take their frames late, or never: whoever sends to them among others keeps its rate,
//! and a guest that is only busy loses nothing.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::time::{Duration, Instant};

use common::hostile::{BAD, RawConfig, RawGuest, plain};
use common::innocents::{self, Innocents};
use common::{Lab, frame, receive};
use ringway_bridge::DropReason;
use ringway_guest::Guest;

/// One of the innocents has a guest that takes `take` of its frames get the last of each burst.
fn late_receiver(what: &str, mut take: impl FnMut(&RawGuest)) {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let bad = RawGuest::connect(&lab.add_port("bad"), RawConfig::default());
    lab.pin("bad", BAD);
    bad.rx.write_chain(0, &[(bad.buffers, 2048)]);
    bad.rx.name_heads(&[0]);
    innocents.first_waits_for_its_frames();
    let change = |innocents: &mut Innocents| innocents.first_sends_also_to(BAD);
    innocents.endure_after(change, 0.9, what, || take(&bad));
}

#[test]
fn whoever_sends_to_a_frozen_guest_among_others_keeps_its_rate() {
    late_receiver("a guest that takes nothing", |_| {});
}

#[test]
fn whoever_sends_to_a_slow_guest_among_others_keeps_its_rate() {
    let mut last = Instant::now();
    late_receiver("a guest that takes a frame each 9 ms", |bad| {
        if last.elapsed() >= Duration::from_millis(9) {
            last = Instant::now();
            bad.rx
                .area
                .set_avail_idx(bad.rx.area.used_idx().wrapping_add(1));
        }
    });
}

#[test]
fn whoever_sends_to_a_guest_that_stops_and_goes_among_others_keeps_its_rate() {
    let mut last = Instant::now();
    late_receiver("a guest that takes all it can each 2 ms", |bad| {
        if last.elapsed() >= Duration::from_millis(2) {
            last = Instant::now();
            bad.rx.recycle();
        }
    });
}

/// Bursts for a guest whose ring is full for the moment, for another and for one that takes nothing,
/// in turn: the second has all of its frames before the first takes one, and neither loses any.
#[test]
fn frames_for_a_busy_guest_wait_and_hold_up_nobody() {
    const ROOM: u16 = 8;
    const EACH: u64 = 16;
    // The busy one may be late on a busy machine.
    let lab = Lab::with_config(|config| config.idle.backpressure = Duration::from_secs(1));
    let size = |entries| Guest::builder().queue_size(entries);
    let mut source = lab.guest("source", size(256));
    let mut busy = lab.guest("busy", size(ROOM));
    let mut other = lab.guest("other", size(256));
    let _frozen = lab.guest("frozen", size(ROOM));
    let ports = ["source", "busy", "other", "frozen"];
    for (port, station) in ports.iter().zip(1..) {
        lab.pin(port, station);
    }
    let (from, to) = (1, [2, 3, 4]);
    for round in 0..100 {
        let number = |i| round * EACH + i;
        let mixed: Vec<_> = (0..EACH)
            .flat_map(|i| to.map(|to| plain(&frame(to, from, 64, number(i)))))
            .collect();
        assert_eq!(source.send_burst(0, &mixed).unwrap(), mixed.len());
        for guest in [&mut other, &mut busy] {
            for i in 0..EACH {
                assert_eq!(receive(guest).frame[14..22], number(i).to_be_bytes());
            }
        }
    }
    for port in ["busy", "other"] {
        assert_eq!(lab.counters(port).tx_drops[DropReason::RingFull], 0);
    }
}
