//! Forwarding in steady state allocates and frees nothing, whatever becomes of the frames. NIC
//! ports need root and iproute2.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;
mod testbeds;

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::cell::Cell;

use common::endpoint::{ALL, CSUM};
use common::{eventually, frame, mac};
use ringway_guest::{Calls, Layout};
use ringway_testbed::{BROADCAST, BURST, Shape, Testbed, station};
use testbeds::{STATION, bed_with_nic, for_segments};

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

/// Asserts that a bed of any kind allocates nothing in `step`, once it was prepared.
fn assert_steady(shape: Shape, prepare: impl Fn(&mut Testbed), step: impl Fn(&mut Testbed)) {
    for (layout, in_order) in [
        (Layout::Split, true),
        (Layout::Split, false),
        (Layout::Packed, true),
        (Layout::Packed, false),
    ] {
        let mut bed = Testbed::new(Shape {
            layout,
            in_order,
            ..shape
        });
        prepare(&mut bed);
        let what = format!("{layout:?}, in order: {in_order}");
        assert_none(&what, || step(&mut bed));
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
        assert_steady(plain(bytes), |_| {}, |bed| assert_eq!(bed.burst(), FRAMES));
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
    assert_steady(shape, |_| {}, |bed| assert_eq!(bed.burst(), 6 * FRAMES));
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
            |bed| bed.guests[0].address(to, station(0)),
            |bed| assert_eq!(bed.burst(), 3 * FRAMES),
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
            |bed| bed.guests[0].address(to, from),
            |bed| assert_eq!(bed.burst(), 0),
        );
    }
}

#[test]
fn frames_for_full_rings_allocate_nothing() {
    let send = |bed: &mut Testbed| {
        bed.guests[0].tx.ring.push(BURST);
        bed.switch.turn();
        bed.guests[0].tx.ring.reclaim().unwrap()
    };
    // A unicast frame waits for a while before it is dropped.
    assert_steady(plain(64), |_| {}, |bed| assert!(send(bed) <= BURST));
    let three = Shape {
        guests: 3,
        ..plain(64)
    };
    assert_steady(
        three,
        |bed| bed.guests[0].address(BROADCAST, station(0)),
        |bed| assert_eq!(send(bed), BURST),
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
        |bed| {
            for guest in &bed.guests[..2] {
                guest.address(station(2), station(100));
            }
        },
        |bed| {
            assert_eq!(bed.burst(), FRAMES);
            bed.guests.swap(0, 1);
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
            |bed| {
                bed.guests[1].rx.ring.set_calls(Calls::Next);
                assert_eq!(bed.burst(), FRAMES);
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
            |bed| bed.guests[0].write(&message),
            |bed| assert_eq!(bed.burst(), buffers * FRAMES),
        );
    }
}

/// What needs root, which `--profile user` leaves out.
mod as_root {
    use super::*;

    #[test]
    fn frames_to_and_from_a_nic_allocate_nothing() {
        for segments in [1, 4] {
            let (shape, message) = for_segments(segments, mac(STATION), 0);
            let (mut bed, far) = bed_with_nic(shape);
            bed.guests[0].write(&message);
            assert_none("to the NIC", || {
                bed.guests[0].tx.ring.push(BURST);
                let mut sent = 0;
                eventually("they are sent", || {
                    bed.switch.turn();
                    sent += bed.guests[0].tx.ring.reclaim().unwrap();
                    sent == BURST
                });
            });
            let sent = frame(2, STATION, 1000, 1);
            assert_none("from the NIC", || {
                (0..BURST).for_each(|_| far.send(&sent));
                let mut received = 0;
                eventually("they arrive", || {
                    bed.switch.turn();
                    received += bed.receive();
                    received == FRAMES
                });
            });
        }
    }
}
