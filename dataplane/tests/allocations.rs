//! Forwarding in steady state allocates and frees nothing, whatever becomes of the frames. NIC ports
//! need root and iproute2.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;
#[path = "../benches/wire/mod.rs"]
mod wire;
mod wires;

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::cell::Cell;

use common::endpoint::{ALL, CSUM};
use common::{eventually, frame, mac};
use ringway_guest::{Calls, Layout};
use wire::{BROADCAST, BURST, Shape, Wire, station};
use wires::{STATION, for_segments, wire_with_nic};

const FRAMES: u64 = BURST as u64;

/// Steps that are not counted, so that whatever grows has grown, and steps that are.
const WARM_UP: usize = 64;
const STEPS: usize = 1000;

/// The system's allocator, counting for each thread.
struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls go on to the system's allocator as they are; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, at: *mut u8, block: Block) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(at, block) }
    }
}

/// How often `action` allocates or frees.
fn allocations(mut action: impl FnMut()) -> u64 {
    let before = CALLS.get();
    action();
    CALLS.get() - before
}

/// Asserts that a wire of any kind allocates nothing in `step`, once it was prepared.
fn assert_steady(shape: Shape, prepare: impl Fn(&mut Wire), step: impl Fn(&mut Wire)) {
    for (layout, in_order) in [
        (Layout::Split, true),
        (Layout::Split, false),
        (Layout::Packed, true),
        (Layout::Packed, false),
    ] {
        let mut wire = Wire::new(Shape {
            layout,
            in_order,
            ..shape
        });
        prepare(&mut wire);
        let what = format!("{layout:?}, in order: {in_order}");
        assert_none(&what, || step(&mut wire));
    }
}

/// Asserts that `step` allocates nothing once it was done for a while.
fn assert_none(what: &str, mut step: impl FnMut()) {
    (0..WARM_UP).for_each(|_| step());
    let counted = allocations(|| (0..STEPS).for_each(|_| step()));
    assert_eq!(counted, 0, "{what}, {STEPS} steps");
}

fn plain(frame_bytes: u32) -> Shape {
    Shape::plain(Layout::Split, frame_bytes)
}

#[test]
fn the_counter_counts() {
    let counted = allocations(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(counted, 2);
}

#[test]
fn unicast_frames_allocate_nothing() {
    for bytes in [64, 1500] {
        assert_steady(
            plain(bytes),
            |_| {},
            |wire| assert_eq!(wire.burst(), FRAMES),
        );
    }
}

#[test]
fn frames_in_chains_and_mergeable_buffers_allocate_nothing() {
    let shape = Shape {
        buffer_bytes: 256,
        receive_size: 512,
        chained: true,
        ..plain(1500)
    };
    // 1,512 bytes take six buffers.
    assert_steady(shape, |_| {}, |wire| assert_eq!(wire.burst(), 6 * FRAMES));
}

#[test]
fn floods_allocate_nothing() {
    let shape = Shape {
        guests: 4,
        ..plain(64)
    };
    for to in [BROADCAST, station(100)] {
        assert_steady(
            shape,
            |wire| wire.guests[0].address(to, station(0)),
            |wire| assert_eq!(wire.burst(), 3 * FRAMES),
        );
    }
}

#[test]
fn frames_that_the_bridge_drops_allocate_nothing() {
    let own_port = (station(0), station(0));
    let bad_source = (station(1), BROADCAST);
    for (to, from) in [own_port, bad_source] {
        assert_steady(
            plain(64),
            |wire| wire.guests[0].address(to, from),
            |wire| assert_eq!(wire.burst(), 0),
        );
    }
}

#[test]
fn frames_for_full_rings_allocate_nothing() {
    let send = |wire: &mut Wire| {
        wire.guests[0].tx.push(BURST);
        wire.switch.turn();
        wire.guests[0].tx.reclaim().unwrap()
    };
    // A unicast frame waits for a while before it is dropped.
    assert_steady(plain(64), |_| {}, |wire| assert!(send(wire) <= BURST));
    let three = Shape {
        guests: 3,
        ..plain(64)
    };
    assert_steady(
        three,
        |wire| wire.guests[0].address(BROADCAST, station(0)),
        |wire| assert_eq!(send(wire), BURST),
    );
}

#[test]
fn a_station_that_moves_with_each_burst_allocates_nothing() {
    let shape = Shape {
        guests: 3,
        ..plain(64)
    };
    assert_steady(
        shape,
        |wire| {
            for guest in &wire.guests[..2] {
                guest.address(station(2), station(100));
            }
        },
        |wire| {
            assert_eq!(wire.burst(), FRAMES);
            wire.guests.swap(0, 1);
        },
    );
}

#[test]
fn calls_allocate_nothing() {
    for event_idx in [false, true] {
        let shape = Shape {
            event_idx,
            ..plain(64)
        };
        assert_steady(
            shape,
            |_| {},
            |wire| {
                wire.guests[1].rx.set_calls(Calls::Next);
                assert_eq!(wire.burst(), FRAMES);
            },
        );
    }
}

#[test]
fn segments_and_checksums_allocate_nothing() {
    for (segments, takes, buffers) in [
        (4, 0, 4),
        (4, CSUM, 4),
        // Whole, in two buffers.
        (4, ALL, 2),
        (1, 0, 1),
        (1, ALL, 1),
    ] {
        let (shape, message) = for_segments(segments, station(1), takes);
        assert_steady(
            shape,
            |wire| wire.guests[0].write(&message),
            |wire| assert_eq!(wire.burst(), buffers * FRAMES),
        );
    }
}

#[test]
fn frames_to_and_from_a_nic_allocate_nothing() {
    for segments in [1, 4] {
        let (shape, message) = for_segments(segments, mac(STATION), 0);
        let (mut wire, far) = wire_with_nic(shape);
        wire.guests[0].write(&message);
        assert_none("to the NIC", || {
            wire.guests[0].tx.push(BURST);
            let mut sent = 0;
            eventually("they are sent", || {
                wire.switch.turn();
                sent += wire.guests[0].tx.reclaim().unwrap();
                sent == BURST
            });
        });
        let sent = frame(2, STATION, 1000, 1);
        assert_none("from the NIC", || {
            (0..BURST).for_each(|_| far.send(&sent));
            let mut received = 0;
            eventually("they arrive", || {
                wire.switch.turn();
                received += wire.receive();
                received == FRAMES
            });
        });
    }
}
