//! Rings and guests that stop and come back.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::{LAYOUTS, Lab, eventually, frame, receive};
use ringway_api::PortState;
use ringway_guest::{EventFd, Guest, Layout, RingPlace};

#[test]
fn rings_that_are_stopped_go_on_where_they_were() {
    for [from, to] in LAYOUTS {
        let lab = Lab::start();
        let guest = |port, layout| {
            let config = Guest::builder().layout(layout).queue_size(16);
            lab.guest(port, config)
        };
        let mut a = guest("a", from);
        let mut b = guest("b", to);
        for round in 0..20_u64 {
            // 7 and 16 have no common factor: every slot and lap comes.
            for seed in 0..7 {
                let sent = frame(2, 1, 64, round * 7 + seed);
                a.send_frame(&sent).unwrap();
                assert_eq!(receive(&mut b).frame, sent);
            }
            let stopped = if round % 2 == 0 { &mut a } else { &mut b };
            assert!(stopped.flush(common::DEADLINE).unwrap());
            let bases = stopped.stop().unwrap();
            let starts = [
                stopped.receive_queue(0).ring().place().base,
                stopped.transmit_queue(0).ring().place().base,
            ];
            let layout = if round % 2 == 0 { from } else { to };
            if layout == Layout::Packed {
                assert_eq!(bases[1], starts[1], "the driver's account is the device's");
            }
            stopped.resume().unwrap();
        }
        lab.assert_conserved(&["a", "b"], 0);
    }
}

/// DPDK's virtio_user tells the avail half of a fresh packed ring's base only.
#[test]
fn a_packed_ring_starts_with_half_a_base() {
    let lab = Lab::start();
    let config = Guest::builder().layout(Layout::Packed);
    let mut a = lab.guest("a", config.clone());
    let mut b = lab.guest("b", config);
    for guest in [&mut a, &mut b] {
        let memory = std::sync::Arc::clone(guest.memory());
        for index in [0, 1] {
            let frontend = guest.frontend();
            let base = frontend.stop_ring(index).unwrap();
            assert_eq!(base, 0x8000_8000);
        }
        let places = [
            guest.receive_queue(0).ring().place(),
            guest.transmit_queue(0).ring().place(),
        ];
        for (index, place) in (0..).zip(places) {
            let half = RingPlace {
                base: 0x8000,
                ..place
            };
            let kick = EventFd::new().unwrap();
            let call = EventFd::new().unwrap();
            let frontend = guest.frontend();
            frontend
                .start_ring(index, &memory, half, Some(&kick), Some(&call))
                .unwrap();
            frontend.enable_ring(index, true).unwrap();
            assert_eq!(frontend.stop_ring(index).unwrap(), 0x8000_8000);
        }
        guest.resume().unwrap();
    }
    let sent = frame(2, 1, 64, 1);
    a.send_frame(&sent).unwrap();
    assert_eq!(receive(&mut b).frame, sent);
}

/// DPDK's virtio_user says 0 of each split ring when its back-end comes back, wherever the ring stands.
/// What was used is not taken again, what waits is, and a ring that was never used is fresh.
#[test]
fn a_split_ring_that_was_used_goes_on_there_though_its_front_end_says_0() {
    let lab = Lab::start();
    let config = Guest::builder().queue_size(16);
    let mut a = lab.guest("a", config.clone());
    let mut b = lab.guest("b", config);
    for seed in 0..21 {
        let sent = frame(2, 1, 64, seed);
        a.send_frame(&sent).unwrap();
        assert_eq!(receive(&mut b).frame, sent);
    }
    assert!(a.flush(common::DEADLINE).unwrap());
    b.stop().unwrap();
    a.stop().unwrap();
    let waiting = [31, 32, 33].map(|seed| frame(2, 1, 64, seed));
    for frame in &waiting {
        a.send_frame(frame).unwrap();
    }
    for guest in [&mut b, &mut a] {
        let memory = std::sync::Arc::clone(guest.memory());
        let places = [
            guest.receive_queue(0).ring().place(),
            guest.transmit_queue(0).ring().place(),
        ];
        for (index, place) in (0..).zip(places) {
            let place = RingPlace { base: 0, ..place };
            let kick = EventFd::new().unwrap();
            let frontend = guest.frontend();
            frontend
                .start_ring(index, &memory, place, Some(&kick), None)
                .unwrap();
            frontend.enable_ring(index, true).unwrap();
        }
    }
    for sent in waiting {
        let mut came = None;
        eventually("the frame comes", || {
            came = b.try_recv(0).unwrap();
            came.is_some()
        });
        assert_eq!(came.unwrap().frame, sent);
    }
    assert_eq!(b.try_recv(0).unwrap(), None);
    let resumed = |port| {
        let detail = lab.switch.port(&common::name(port)).unwrap();
        [detail.queues[0].rx_resumed, detail.queues[0].tx_resumed]
    };
    assert_eq!((resumed("a"), resumed("b")), ([true, false], [false, true]));
    assert_eq!(
        (a.stop().unwrap(), b.stop().unwrap()),
        (vec![0, 24], vec![24, 0])
    );
    a.resume().unwrap();
    b.resume().unwrap();
    assert_eq!((resumed("a"), resumed("b")), ([false; 2], [false; 2]));
    let sent = frame(2, 1, 64, 34);
    a.send_frame(&sent).unwrap();
    assert_eq!(receive(&mut b).frame, sent);
    lab.assert_conserved(&["a", "b"], 0);
}

/// QEMU, and virtio_user whose back-end comes back, start rings with the kick fds that they had before,
/// which an edge-triggered epoll instance finds readable for a kick of then.
#[test]
fn a_kick_of_before_a_ring_started_is_not_in_vain() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    a.transmit_queue(0).kick().signal().unwrap();
    let hello = frame(1, 2, 64, 1);
    b.send_frame(&hello).unwrap();
    assert_eq!(receive(&mut a).frame, hello);
    assert!(b.flush(common::DEADLINE).unwrap());
    let state_of_a = || lab.switch.port(&common::name("a")).unwrap().port.state;
    for seed in 2..8 {
        a.stop().unwrap();
        b.stop().unwrap();
        // It is taken after b's ring started, so after the worker was told of a's.
        let sent = frame(1, 2, 64, seed);
        b.send_frame(&sent).unwrap();
        a.resume().unwrap();
        b.resume().unwrap();
        assert_eq!(receive(&mut a).frame, sent);
        assert_eq!(state_of_a(), PortState::Up);
    }
    eventually("one of now is told", || {
        // A ring that is still polled needs none.
        a.transmit_queue(0).kick().signal().unwrap();
        state_of_a() == PortState::Impaired
    });
}

#[test]
fn a_guest_that_comes_back_finds_its_port() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let path = lab.add_port("b");
    for seed in 0..20 {
        let mut b = Guest::builder().connect(&path).unwrap();
        let sent = frame(0xff, 1, 64, seed);
        a.send_frame(&sent).unwrap();
        assert_eq!(receive(&mut b).frame, sent);
        drop(b);
        eventually("the port is down and its memory unmapped", || {
            let port = lab.switch.port(&common::name("b")).unwrap();
            port.port.state == PortState::Down && port.mapped_bytes == 0
        });
    }
}
