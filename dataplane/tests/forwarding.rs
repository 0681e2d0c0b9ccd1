//! Frames between synthetic guests, over real sockets and shared memory.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::time::{Duration, Instant};

use common::{LAYOUTS, Lab, eventually, frame, mac, name, receive};
use ringway_api::{FdbLimit, FloodLimit, GroupFwdMask, Mtu, PortState, SwitchConfig};
use ringway_bridge::{DropReason, MacAddr};
use ringway_guest::{Guest, GuestBuilder, Layout};

#[test]
fn two_guests_exchange_frames_whole() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    for (seed, bytes) in [14, 15, 60, 115, 116, 117, 128, 200, 1514, 1999]
        .into_iter()
        .enumerate()
    {
        let there = frame(2, 1, bytes, seed as u64);
        a.send_frame(&there).unwrap();
        assert_eq!(receive(&mut b).frame, there);
        let back = frame(1, 2, bytes, seed as u64 + 100);
        b.send_frame(&back).unwrap();
        assert_eq!(receive(&mut a).frame, back);
    }
    // The very first frame was flooded to one port, so there are no extra copies.
    lab.assert_conserved(&["a", "b"], 0);
    assert_eq!(lab.counters("a").rx_frames, 10);
    assert_eq!(lab.counters("b").tx_bytes, lab.counters("a").rx_bytes);
}

#[test]
fn runts_are_dropped_and_counted() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    a.send_frame(&[1; 13]).unwrap();
    let good = frame(2, 1, 64, 1);
    a.send_frame(&good).unwrap();
    assert_eq!(receive(&mut b).frame, good);
    lab.eventually_dropped("a", |c| c.rx_drops[DropReason::Runt], 1);
}

#[test]
fn every_kind_of_buffer_takes_every_size() {
    let split = kinds_of(Layout::Split);
    let mut packed = kinds_of(Layout::Packed);
    // A packed ring's size need not be a power of two.
    packed.push(packed[0].clone().queue_size(7));
    let kinds = [split, packed].concat();
    // All at one switch: what differs is who sends to whom.
    let lab = Lab::start();
    let connect = |first: u8| {
        let connect = |(station, kind): (u8, &GuestBuilder)| {
            let port = format!("p{station}");
            let guest = lab.guest(&port, kind.clone());
            lab.pin(&port, station);
            (station, guest)
        };
        (first..).zip(&kinds).map(connect).collect::<Vec<_>>()
    };
    let (mut sources, mut destinations) = (connect(1), connect(101));
    for (from, source) in &mut sources {
        for (to, destination) in &mut destinations {
            for (seed, bytes) in [64, 116, 117, 200, 240].into_iter().enumerate() {
                let there = frame(*to, *from, bytes, seed as u64);
                source.send_frame(&there).unwrap();
                let received = receive(destination).frame;
                assert_eq!(received, there, "{from} to {to}, {bytes} bytes");
            }
        }
    }
}

/// Guests that differ in all that rings can differ in but their layout.
fn kinds_of(layout: Layout) -> Vec<GuestBuilder> {
    let base = Guest::builder().layout(layout);
    vec![
        base.clone(),
        base.clone().mergeable(false),
        base.clone().chained(true),
        base.clone().chained(true).indirect(false).mergeable(false),
        // Several chains of two descriptors for one frame.
        base.clone().chained(true).indirect(false).buffer_size(128),
        base.clone().event_idx(false),
        base.clone().in_order(true),
        base.clone().buffer_size(256),
        base.clone().regions(3).queue_size(64),
        base.queue_size(4),
    ]
}

#[test]
fn a_frame_too_large_for_unmergeable_buffers_is_dropped_and_counted() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let small = Guest::builder().mergeable(false).buffer_size(512);
    let mut b = lab.guest("b", small);
    a.send_frame(&frame(2, 1, 501, 1)).unwrap();
    let marker = frame(2, 1, 500, 2);
    a.send_frame(&marker).unwrap();
    assert_eq!(receive(&mut b).frame, marker);
    lab.eventually_dropped("b", |c| c.tx_drops[DropReason::BufferTooSmall], 1);
}

#[test]
fn frames_over_the_mtu_are_dropped_and_counted() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let path = lab.add_port_with("b", |config| config.mtu = Mtu::new(1000));
    let mut b = Guest::builder().connect(&path).unwrap();
    // The longest frame is the MTU, an Ethernet header and two VLAN tags.
    a.send_frame(&frame(2, 1, 1023, 1)).unwrap();
    let fits = frame(2, 1, 1022, 2);
    a.send_frame(&fits).unwrap();
    assert_eq!(receive(&mut b).frame, fits);
    lab.eventually_dropped("b", |c| c.tx_drops[DropReason::TooLong], 1);
}

/// As by a Linux bridge with STP off (net/bridge/br_input.c, br_handle_frame): BPDUs pass, frames to
/// the other addresses of IEEE 802.1Q, table 8-1 do not, unless they are told to.
#[test]
fn bpdus_of_others_pass_and_other_reserved_addresses_only_if_told() {
    for (mask, passing) in [(0x0001, &[0x0][..]), (0x4000, &[0xe]), (0, &[])] {
        let mask = GroupFwdMask::new(mask).unwrap();
        let lab = Lab::with_config(|config| config.group_fwd_mask = mask);
        let mut a = lab.guest("a", Guest::builder());
        let mut b = lab.guest("b", Guest::builder());
        for last in 0..16 {
            let mut reserved = frame(2, 1, 60, last.into());
            reserved[..6].copy_from_slice(&[0x01, 0x80, 0xc2, 0, 0, last]);
            a.send_frame(&reserved).unwrap();
            if passing.contains(&last) {
                assert_eq!(receive(&mut b).frame, reserved);
            }
        }
        let marker = frame(0xff, 1, 60, 16);
        a.send_frame(&marker).unwrap();
        assert_eq!(receive(&mut b).frame, marker, "{mask:?}");
        let dropped = 16 - passing.len() as u64;
        lab.eventually_dropped("a", |c| c.rx_drops[DropReason::LinkLocal], dropped);
    }
}

#[test]
fn unknown_and_group_addresses_are_flooded_and_known_ones_are_not() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let mut c = lab.guest("c", Guest::builder());
    let unknown = frame(2, 1, 64, 1);
    a.send_frame(&unknown).unwrap();
    let group = frame(0xff, 1, 64, 2);
    a.send_frame(&group).unwrap();
    for guest in [&mut b, &mut c] {
        assert_eq!(receive(guest).frame, unknown);
        assert_eq!(receive(guest).frame, group);
    }
    let answer = frame(1, 2, 64, 3);
    b.send_frame(&answer).unwrap();
    assert_eq!(receive(&mut a).frame, answer);
    let known = frame(2, 1, 64, 4);
    a.send_frame(&known).unwrap();
    assert_eq!(receive(&mut b).frame, known);
    // Had it been flooded, c would see it before the next frame for all.
    let group = frame(0xff, 1, 64, 5);
    a.send_frame(&group).unwrap();
    assert_eq!(receive(&mut c).frame, group);
    lab.assert_conserved(&["a", "b", "c"], 3);
    let macs: Vec<_> = lab
        .switch
        .fdb()
        .iter()
        .map(|e| (e.mac.0[5], e.port.to_string()))
        .collect();
    assert_eq!(macs, [(1, "a".to_owned()), (2, "b".to_owned())]);
}

#[test]
fn a_station_that_moves_is_followed() {
    // Once it was silent at the old port for the time to hold, or at once.
    for hold in [SwitchConfig::DEFAULT_FDB_MOVE_HOLD, Duration::ZERO] {
        let lab = Lab::with_config(|config| config.fdb_move_hold = hold);
        let mut a = lab.guest("a", Guest::builder());
        let mut b = lab.guest("b", Guest::builder());
        let mut c = lab.guest("c", Guest::builder());
        let hello = frame(0xff, 9, 64, 1);
        b.send_frame(&hello).unwrap();
        assert_eq!(receive(&mut a).frame, hello);
        let mut hellos = 0;
        let at_b = lab.switch.fdb()[0].clone();
        assert_eq!(at_b.port.as_str(), "b");
        eventually("the station is followed", || {
            c.send_frame(&hello).unwrap();
            hellos += 1;
            // A frame that was not learned from is broadcast all the same.
            assert_eq!(receive(&mut a).frame, hello);
            lab.counters("c").fdb_moves == 1
        });
        assert_eq!(hold.is_zero(), hellos == 1);
        assert_eq!(lab.counters("c").fdb_moves_refused, hellos - 1);
        let to_station = frame(9, 1, 64, 3);
        a.send_frame(&to_station).unwrap();
        while receive(&mut c).frame != to_station {}
    }
}

/// One frame with another's source had its traffic go to whoever sent it.
#[test]
fn an_address_in_use_can_not_be_taken_but_be_announced_and_configured() {
    let lab = Lab::with_config(|config| config.fdb_move_hold = Duration::from_secs(60));
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let mut thief = lab.guest("thief", Guest::builder());
    b.send_frame(&frame(0xff, 2, 64, 0)).unwrap();
    for guest in [&mut a, &mut thief] {
        assert_eq!(receive(guest).frame, frame(0xff, 2, 64, 0));
    }
    for seed in 1..=20 {
        // A RARP frame of a guest is a frame like any other.
        let mut stolen = frame(1, 2, 64, seed);
        stolen[12..14].copy_from_slice(&[0x80, 0x35]);
        thief.send_frame(&stolen).unwrap();
        eventually("it was refused", || {
            lab.counters("thief").fdb_moves_refused == seed
        });
        let to_b = frame(2, 1, 64, seed);
        a.send_frame(&to_b).unwrap();
        while receive(&mut b).frame != to_b {}
    }
    let mut at = |sent: Vec<u8>, guest: &mut Guest| {
        a.send_frame(&sent).unwrap();
        while receive(guest).frame != sent {}
    };
    // The front-end knows where its guest is.
    thief.frontend().send_rarp(mac(2)).unwrap();
    eventually("it moved", || lab.counters("thief").fdb_moves == 1);
    at(frame(2, 1, 64, 100), &mut thief);
    lab.switch
        .fdb_add(MacAddr(mac(2)), &name("b"), None)
        .unwrap();
    at(frame(2, 1, 64, 101), &mut b);
}

/// Of 1,000 sources of one port none locks another port out of a database for 64.
#[test]
fn a_port_that_floods_the_database_locks_nobody_out() {
    let lab = Lab::with_config(|config| config.fdb_capacity = 64);
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let limited = lab.add_port_with("limited", |config| {
        config.fdb_limit = FdbLimit::new(3).unwrap();
    });
    let mut limited = Guest::builder().connect(&limited).unwrap();
    let from = |n: u16| {
        let mut sent = frame(0xff, 0, 64, n.into());
        sent[10..12].copy_from_slice(&n.to_be_bytes());
        sent
    };
    for n in 0..1000 {
        a.send_frame(&from(n)).unwrap();
        while b.try_recv(0).unwrap().is_some() {}
        if n < 100 {
            limited.send_frame(&from(10_000 + n)).unwrap();
        }
        while limited.try_recv(0).unwrap().is_some() {}
        while a.try_recv(0).unwrap().is_some() {}
    }
    let refused = |port: &str| {
        let counters = lab.counters(port);
        (counters.fdb_refused_full, counters.fdb_limit_hits)
    };
    eventually("all were heard", || refused("limited") == (0, 97));
    eventually("the database is full", || refused("a").0 >= 1000 - 64);
    b.send_frame(&from(20_000)).unwrap();
    eventually("b is known", || {
        lab.switch.fdb().iter().any(|e| e.port.as_str() == "b")
    });
    // That of b, and those of `limited` that were heard when the database was full already.
    let evictions = lab.counters("a").fdb_evictions;
    assert!((1..=1 + 3).contains(&evictions), "{evictions}");
}

#[test]
fn what_a_port_floods_beyond_its_limit_is_dropped_and_the_rest_of_it_is_not() {
    // A copy in a second, and all ports once at first: 4,096 copies that count, of two a frame.
    const FRAMES: u64 = 3000;
    const PASS: u64 = 4096 / 2;
    let lab = Lab::start();
    let flooder = lab.add_port_with("flooder", |config| {
        config.flood_limit = FloodLimit::new(1).unwrap();
    });
    let mut flooder = Guest::builder().connect(&flooder).unwrap();
    let mut others = ["a", "b", "c"].map(|port| lab.guest(port, Guest::builder()));
    for seed in 0..FRAMES {
        flooder.send_frame(&frame(0xff, 1, 64, seed)).unwrap();
        for other in &mut others {
            while other.try_recv(0).unwrap().is_some() {}
        }
    }
    let dropped = || lab.counters("flooder").rx_drops[DropReason::FloodLimit];
    eventually("all were sent", || {
        lab.counters("flooder").rx_frames == FRAMES
    });
    // A few may have passed in the seconds that the test took.
    let passed = FRAMES - dropped();
    assert!((PASS..PASS + 20).contains(&passed), "{passed}");
    lab.assert_conserved(&["flooder", "a", "b", "c"], 2 * passed);
    let others_flood = frame(0xff, 2, 64, FRAMES);
    let [a, b, _] = &mut others;
    a.send_frame(&others_flood).unwrap();
    while receive(b).frame != others_flood {}
    let known = frame(2, 1, 64, FRAMES);
    flooder.send_frame(&known).unwrap();
    while receive(a).frame != known {}
}

/// State and last error of port a.
fn health_of_a(lab: &Lab) -> (PortState, String) {
    let port = lab.switch.port(&name("a")).unwrap();
    (port.port.state, port.last_error.unwrap_or_default())
}

#[test]
fn a_guest_that_is_served_one_way_only_is_not_plainly_up() {
    type Disable = fn(&mut Guest);
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    assert_eq!(health_of_a(&lab), (PortState::Up, String::new()));
    let ways: [(Disable, &str); 2] = [
        (
            |a| a.frontend().enable_ring(0, false).unwrap(),
            "the guest gets no frame by queue pair 0, whose ring 0 is disabled",
        ),
        (
            |a| a.frontend().enable_ring(1, false).unwrap(),
            "no frame is taken from the guest by queue pair 0, whose ring 1 is disabled",
        ),
    ];
    for (ring, (disable, what)) in (0..).zip(ways) {
        disable(&mut a);
        eventually("it is told", || health_of_a(&lab).0 == PortState::Impaired);
        let (_, told) = health_of_a(&lab);
        assert!(told.starts_with(what), "{told}");
        a.frontend().enable_ring(ring, true).unwrap();
        eventually("it is up again", || health_of_a(&lab).0 == PortState::Up);
        assert_eq!(health_of_a(&lab).1, "");
    }
    a.frontend().stop_ring(1).unwrap();
    let (state, told) = health_of_a(&lab);
    assert_eq!(state, PortState::Impaired);
    assert!(told.contains("ring 1 is not started"), "{told}");
    a.frontend().stop_ring(0).unwrap();
    assert_eq!(health_of_a(&lab), (PortState::Down, String::new()));
}

/// As with memory that QEMU does not share: what the guest writes is in pages of its own.
#[test]
fn a_guest_whose_kicks_show_nothing_is_not_plainly_up() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    assert_eq!(health_of_a(&lab).0, PortState::Up);
    a.transmit_queue(0).kick().signal().unwrap();
    eventually("it is told", || health_of_a(&lab).0 == PortState::Impaired);
    let (_, told) = health_of_a(&lab);
    assert!(told.contains("share=on"), "{told}");
    let first = frame(0xff, 1, 64, 1);
    a.send_frame(&first).unwrap();
    assert_eq!(receive(&mut b).frame, first);
    eventually("it is up", || {
        health_of_a(&lab) == (PortState::Up, String::new())
    });
}

/// A station moves and says nothing: the frame to it is flooded, since its old port forgot it.
#[test]
fn a_station_that_moves_silently_off_a_port_that_goes_down_is_found_by_the_next_frame() {
    type GoDown = fn(&mut Guest);
    let ways: [GoDown; 3] = [
        |guest| _ = guest.frontend().stop_ring(0).unwrap(),
        |guest| guest.frontend().enable_ring(0, false).unwrap(),
        // The guest goes on transmitting while its receive ring is stopped.
        |guest| {
            guest.frontend().stop_ring(0).unwrap();
            guest.send_frame(&frame(0xff, 9, 64, 8)).unwrap();
            guest.frontend().stop_ring(1).unwrap();
        },
    ];
    for go_down in ways {
        let lab = Lab::start();
        let mut a = lab.guest("a", Guest::builder());
        let mut b = lab.guest("b", Guest::builder());
        let mut c = lab.guest("c", Guest::builder());
        let hello = frame(0xff, 9, 64, 1);
        b.send_frame(&hello).unwrap();
        assert_eq!(receive(&mut a).frame, hello);
        assert_eq!(receive(&mut c).frame, hello);
        go_down(&mut b);
        // The answer to a request says that those before it are carried out.
        b.frontend().queue_pairs().unwrap();
        while a.recv(Duration::ZERO).unwrap().is_some() {}
        while c.recv(Duration::ZERO).unwrap().is_some() {}
        let to_station = frame(9, 1, 64, 3);
        a.send_frame(&to_station).unwrap();
        assert_eq!(receive(&mut c).frame, to_station);
    }
}

#[test]
fn a_guest_that_vanishes_is_forgotten_and_one_that_keeps_a_ring_is_not() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder().queue_pairs(2));
    let mut b = lab.guest("b", Guest::builder());
    for (guest, from) in [(&mut a, 1), (&mut b, 2)] {
        guest.send_frame(&frame(0xff, from, 64, 0)).unwrap();
    }
    let behind = |port: &str| {
        let entries = lab.switch.fdb();
        entries.iter().filter(|e| e.port.as_str() == port).count()
    };
    eventually("both are known", || (behind("a"), behind("b")) == (1, 1));
    lab.switch
        .fdb_add(MacAddr(mac(3)), &name("b"), None)
        .unwrap();
    a.frontend().stop_ring(0).unwrap();
    a.frontend().queue_pairs().unwrap();
    assert_eq!(behind("a"), 1, "its second receive ring is left");
    drop(b);
    eventually("b has its static entry only", || behind("b") == 1);
    assert_eq!((behind("a"), lab.switch.fdb()[1].is_static), (1, true));
}

#[test]
fn a_full_destination_costs_no_frame_while_the_source_may_wait() {
    for [from, to] in LAYOUTS {
        for in_order in [false, true] {
            let lab = Lab::start();
            let mut a = lab.guest(
                "a",
                Guest::builder()
                    .layout(from)
                    .in_order(in_order)
                    .queue_size(512),
            );
            let mut b = lab.guest(
                "b",
                Guest::builder().layout(to).in_order(in_order).queue_size(8),
            );
            for round in 0..20 {
                let burst: Vec<_> = (0..100).map(|i| frame(2, 1, 64, round * 100 + i)).collect();
                a.send_burst(0, &with_headers(&burst)).unwrap();
                for sent in &burst {
                    assert_eq!(&receive(&mut b).frame, sent);
                }
            }
            lab.assert_conserved(&["a", "b"], 0);
            assert_eq!(lab.counters("b").tx_drops.total(), 0);
        }
    }
}

/// Chains of several descriptors are given back whole.
#[test]
fn chains_that_wait_for_a_full_destination_come_again_whole() {
    for [from, to] in LAYOUTS {
        let lab = Lab::start();
        let mut a = lab.guest(
            "a",
            Guest::builder()
                .layout(from)
                .indirect(false)
                .chained(true)
                .buffer_size(256),
        );
        let mut b = lab.guest("b", Guest::builder().layout(to).queue_size(4));
        for round in 0..40 {
            // Of 2, 3 and 4 descriptors.
            let lengths = (0..20).map(|i| 200 + 250 * (i % 3));
            let burst: Vec<_> = (0..)
                .zip(lengths)
                .map(|(i, bytes)| frame(2, 1, bytes, round * 100 + i))
                .collect();
            a.send_burst(0, &with_headers(&burst)).unwrap();
            for sent in &burst {
                assert_eq!(&receive(&mut b).frame, sent);
            }
        }
        lab.assert_conserved(&["a", "b"], 0);
        assert_eq!(lab.counters("b").tx_drops.total(), 0);
    }
}

#[test]
fn a_full_destination_delays_others_at_most_by_the_time_of_backpressure() {
    let backpressure = Duration::from_millis(1);
    let lab = Lab::with_config(|config| config.idle.backpressure = backpressure);
    let mut a = lab.guest("a", Guest::builder().queue_size(512));
    let b = lab.guest("b", Guest::builder().queue_size(8));
    let mut c = lab.guest("c", Guest::builder().queue_size(512));
    // Learn where b and c are, then let b's ring fill up.
    let mut b = b;
    b.send_frame(&frame(0xff, 2, 64, 0)).unwrap();
    receive(&mut a);
    receive(&mut c);
    c.send_frame(&frame(0xff, 3, 64, 0)).unwrap();
    receive(&mut a);
    receive(&mut b);
    let burst: Vec<_> = (0..200)
        .map(|i| frame(if i % 2 == 0 { 2 } else { 3 }, 1, 64, i))
        .collect();
    a.send_burst(0, &with_headers(&burst)).unwrap();
    for sent in burst.iter().skip(1).step_by(2) {
        assert_eq!(&receive(&mut c).frame, sent);
    }
    // Those for b are parked for ten times as long, and then dropped.
    eventually("what b does not take is dropped", || {
        lab.counters("b").tx_drops[DropReason::RingFull] >= 100 - 8
    });
    lab.assert_conserved(&["a", "b", "c"], 2);
}

fn with_headers(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    frames
        .iter()
        .map(|frame| [vec![0; 12], frame.clone()].concat())
        .collect()
}

#[test]
fn several_queue_pairs_keep_to_their_numbers() {
    let lab = Lab::start();
    let config = Guest::builder().queue_pairs(3);
    let mut a = lab.guest("a", config.clone());
    let mut b = lab.guest("b", config);
    for pair in [2, 0, 1, 2] {
        let sent = frame(2, 1, 64, u64::from(pair));
        a.send_on(pair, &with_headers(std::slice::from_ref(&sent))[0])
            .unwrap();
        let received = receive(&mut b);
        assert_eq!((received.frame, received.pair), (sent, pair));
    }
}

#[test]
fn a_sleeping_worker_wakes_for_each_frame() {
    for [from, to] in LAYOUTS {
        for event_idx in [true, false] {
            let lab = Lab::start();
            let guest = |port, layout| {
                // Few entries, so that the rings wrap.
                let config = Guest::builder()
                    .layout(layout)
                    .event_idx(event_idx)
                    .queue_size(16);
                lab.guest(port, config)
            };
            let mut a = guest("a", from);
            let mut b = guest("b", to);
            for seed in 0..50 {
                let sleeps = lab.switch.workers()[0].sleeps;
                let asleep = || lab.switch.workers()[0].active_queues == 0;
                eventually("the worker sleeps", asleep);
                let sent = frame(2, 1, 64, seed);
                a.send_frame(&sent).unwrap();
                assert_eq!(receive(&mut b).frame, sent);
                eventually("it was woken", || lab.switch.workers()[0].sleeps > sleeps);
            }
        }
    }
}

#[test]
fn ports_come_and_go_under_traffic_without_disturbing_others() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    for round in 0..50_u64 {
        let burst: Vec<_> = (0..40).map(|i| frame(2, 1, 300, round * 40 + i)).collect();
        a.send_burst(0, &with_headers(&burst)).unwrap();
        let mut c = lab.guest("c", Guest::builder());
        c.send_frame(&frame(0xff, 3, 64, round)).unwrap();
        for sent in &burst {
            // Frames of c come in between.
            let mut next = receive(&mut b).frame;
            if next[11] == 3 {
                next = receive(&mut b).frame;
            }
            assert_eq!(&next, sent, "round {round}");
        }
        lab.switch.remove_port(&name("c")).unwrap();
        while a.recv(Duration::ZERO).unwrap().is_some() {}
    }
}

#[test]
fn a_guest_that_moved_here_is_announced_and_learned() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let mac = [0x52, 0x54, 0, 0, 0, 9];
    a.frontend().send_rarp(mac).unwrap();
    let announced = receive(&mut b).frame;
    assert_eq!(announced[..6], [0xff; 6]);
    assert_eq!(announced[6..14], [&mac[..], &[0x80, 0x35]].concat());
    // Each is a broadcast to all: once a second is enough.
    let start = Instant::now();
    for _ in 0..20 {
        a.frontend().send_rarp(mac).unwrap();
    }
    // The answer to a request says that those before it are carried out.
    a.frontend().queue_pairs().unwrap();
    let marker = frame(0xff, 1, 64, 1);
    a.send_frame(&marker).unwrap();
    let mut announced = 0;
    while receive(&mut b).frame != marker {
        announced += 1;
    }
    assert!(announced <= start.elapsed().as_secs(), "{announced}");
    eventually("the switch knows it behind a", || {
        lab.switch
            .fdb()
            .iter()
            .any(|entry| entry.mac.0 == mac && entry.port.as_str() == "a")
    });
    lab.assert_conserved(&["a", "b"], 0);
}
