//! Each message in each state: what the ring is then, and what the device was told.

use crossbeam_channel::Receiver;

use super::*;
use crate::memory::Region;
use crate::vhost_user::test_device::{Call, TestDevice, USER_BASE, event, memfd, region};

const SPLIT: Features =
    Features::VIRTIO_F_VERSION_1.union(Features::VHOST_USER_F_PROTOCOL_FEATURES);

/// A ring, what it rests on and what its device was told.
struct Bench {
    ring: Vring,
    on: Footing<TestDevice>,
    seen: Receiver<Call>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Idle,
    Waiting,
    Running,
}

use Name::{Idle, Running, Waiting};

impl Bench {
    /// A ring of which all is told and that has come into a state. One that waits lacks its memory.
    fn new(state: Name) -> Self {
        let (device, seen) = TestDevice::new(1);
        let on = Footing {
            device,
            memory: memory(0),
            features: SPLIT,
        };
        let ring = Vring::new(1);
        let mut bench = Self { ring, on, seen };
        bench.ring.set_size(&bench.on, 256).unwrap();
        bench.ring.set_base(7).unwrap();
        bench.ring.set_addresses(&bench.on, addresses(0)).unwrap();
        if state == Waiting {
            bench.on.memory = Arc::default();
        }
        if state != Idle {
            bench.ring.kick(&bench.on, Some(event())).unwrap();
        }
        assert_eq!(bench.state(), state);
        bench.calls();
        bench
    }

    fn state(&self) -> Name {
        match self.ring.state {
            RingState::Idle => Idle,
            RingState::Waiting(_) => Waiting,
            RingState::Running(..) => Running,
        }
    }

    /// As the session does it.
    fn change_memory(&mut self, slot: u64) -> bool {
        self.on.memory = memory(slot);
        self.ring.leave_memory(&self.on);
        self.ring.start_if_ready(&self.on).is_ok()
    }

    fn calls(&self) -> Vec<Call> {
        self.seen.try_iter().collect()
    }
}

/// A region at a place of its own in the front-end's addresses.
fn memory(slot: u64) -> Arc<GuestMemory> {
    let spec = region(slot);
    let region = Region::map(spec, memfd("vring", spec.size)).unwrap();
    Arc::new(GuestMemory::new(vec![region]).unwrap())
}

fn addresses(offset: u64) -> RingAddresses {
    let desc = USER_BASE + offset;
    RingAddresses {
        desc,
        avail: desc + 0x1000,
        used: desc + 0x2000,
    }
}

fn start(size: u16, base: u32) -> Call {
    Call::Start {
        index: 1,
        size,
        base,
        features: SPLIT.bits(),
        enabled: false,
        kick: true,
        call: false,
    }
}

/// What a front-end does to a ring; `false` if that was refused.
type Message = fn(&mut Bench) -> bool;

/// Goes through all states: the one that follows each, and what the device was told on the way.
fn check(what: &str, message: Message, expected: [(Name, &[Call]); 3]) {
    for (from, (to, calls)) in [Idle, Waiting, Running].into_iter().zip(expected) {
        let mut bench = Bench::new(from);
        assert!(message(&mut bench), "{what} in {from:?} is refused");
        assert_eq!(bench.state(), to, "{what} in {from:?}");
        assert_eq!(bench.calls(), calls, "{what} in {from:?}");
    }
}

#[test]
fn a_ring_starts_on_kick_and_restarts_where_it_is() {
    let kick: Message = |bench| bench.ring.kick(&bench.on, Some(event())).is_ok();
    check(
        "SET_VRING_KICK",
        kick,
        [
            (Running, &[start(256, 7)]),
            (Waiting, &[]),
            (Running, &[Call::Stop(1), start(256, 7)]),
        ],
    );
    let mut bench = Bench::new(Idle);
    bench.ring.kick(&bench.on, None).unwrap();
    let calls = bench.calls();
    assert!(
        matches!(calls[..], [Call::Start { kick: false, .. }]),
        "a ring without a kick fd is polled: {calls:?}"
    );
}

#[test]
fn get_vring_base_stops_a_ring_until_its_next_kick() {
    check(
        "GET_VRING_BASE",
        |bench| bench.ring.stop(&bench.on) == 7,
        [(Idle, &[]), (Idle, &[]), (Idle, &[Call::Stop(1)])],
    );
    for from in [Idle, Waiting, Running] {
        let mut bench = Bench::new(from);
        bench.ring.stop(&bench.on);
        bench.on.memory = memory(0);
        bench.ring.set_base(9).unwrap();
        bench
            .ring
            .set_addresses(&bench.on, addresses(0x4000))
            .unwrap();
        bench.ring.start_if_ready(&bench.on).unwrap();
        assert_eq!(bench.state(), Idle, "{from:?}");
        bench.ring.kick(&bench.on, Some(event())).unwrap();
        assert_eq!(bench.state(), Running, "{from:?}");
        assert_eq!(bench.calls().last(), Some(&start(256, 9)), "{from:?}");
    }
}

#[test]
fn size_and_base_may_change_while_a_ring_does_not_run() {
    check(
        "SET_VRING_NUM, the same",
        |bench| bench.ring.set_size(&bench.on, 256).is_ok(),
        [(Idle, &[]), (Waiting, &[]), (Running, &[])],
    );
    let others: [Message; 2] = [
        |bench| bench.ring.set_size(&bench.on, 128).is_ok(),
        |bench| bench.ring.set_base(8).is_ok(),
    ];
    for (number, change) in others.into_iter().enumerate() {
        for (from, allowed) in [(Idle, true), (Waiting, true), (Running, false)] {
            let mut bench = Bench::new(from);
            assert_eq!(change(&mut bench), allowed, "{number} in {from:?}");
            assert_eq!(bench.state(), from, "{number}");
            assert_eq!(bench.calls(), [], "{number} in {from:?}");
        }
    }
}

#[test]
fn other_addresses_move_a_ring_and_the_same_ones_do_not() {
    check(
        "SET_VRING_ADDR, the same",
        |bench| bench.ring.set_addresses(&bench.on, addresses(0)).is_ok(),
        [(Idle, &[]), (Waiting, &[]), (Running, &[])],
    );
    check(
        "SET_VRING_ADDR, others",
        |bench| {
            bench
                .ring
                .set_addresses(&bench.on, addresses(0x4000))
                .is_ok()
        },
        [
            (Idle, &[]),
            (Waiting, &[]),
            (Running, &[Call::Stop(1), start(256, 7)]),
        ],
    );
    check(
        "SET_VRING_ADDR, outside of memory",
        |bench| {
            bench
                .ring
                .set_addresses(&bench.on, addresses(1 << 30))
                .is_ok()
        },
        [(Idle, &[]), (Waiting, &[]), (Waiting, &[Call::Stop(1)])],
    );
    // Aligned in none of the states: refused as soon as the ring would start.
    for (from, to) in [(Waiting, Waiting), (Running, Waiting)] {
        let mut bench = Bench::new(from);
        bench.on.memory = memory(0);
        let error = bench
            .ring
            .set_addresses(&bench.on, addresses(1))
            .unwrap_err();
        assert!(matches!(error, RingError::Place(_)), "{error}");
        assert_eq!(bench.state(), to);
    }
}

#[test]
fn enabling_is_apart_from_the_state() {
    check(
        "SET_VRING_ENABLE",
        |bench| {
            bench.ring.set_enabled(&bench.on, true);
            bench.ring.enabled
        },
        [
            (Idle, &[]),
            (Waiting, &[]),
            (Running, &[Call::Enable(1, true)]),
        ],
    );
    // Without VHOST_USER_F_PROTOCOL_FEATURES a ring is enabled, whatever was told.
    let mut bench = Bench::new(Idle);
    bench.on.features = Features::VIRTIO_F_VERSION_1;
    bench.ring.set_enabled(&bench.on, false);
    bench.ring.kick(&bench.on, Some(event())).unwrap();
    bench.ring.set_enabled(&bench.on, false);
    let calls = bench.calls();
    assert!(
        matches!(
            calls[..],
            [Call::Start { enabled: true, .. }, Call::Enable(1, true)]
        ),
        "{calls:?}"
    );
}

#[test]
fn a_call_fd_goes_to_a_running_ring_and_is_kept_for_others() {
    check(
        "SET_VRING_CALL",
        |bench| bench.ring.set_call(&bench.on, Some(event())).is_ok(),
        [
            (Idle, &[]),
            (Waiting, &[]),
            (Running, &[Call::Interrupt(1, true)]),
        ],
    );
    check(
        "SET_VRING_ERR",
        |bench| {
            bench.ring.set_err(Some(event()));
            bench.ring.err.is_some()
        },
        [(Idle, &[]), (Waiting, &[]), (Running, &[])],
    );
    let mut bench = Bench::new(Running);
    bench.ring.set_call(&bench.on, Some(event())).unwrap();
    bench.ring.stop(&bench.on);
    bench.ring.reset();
    assert!(bench.ring.call.is_some(), "a reset keeps it");
    assert_eq!((bench.ring.size, bench.ring.base), (None, None));
}

#[test]
fn a_ring_follows_its_memory() {
    check(
        "memory with the ring in it",
        |bench| bench.change_memory(0),
        [(Idle, &[]), (Running, &[start(256, 7)]), (Running, &[])],
    );
    check(
        "memory without the ring",
        |bench| bench.change_memory(3),
        [(Idle, &[]), (Waiting, &[]), (Waiting, &[Call::Stop(1)])],
    );
    let mut bench = Bench::new(Running);
    bench.on.device.advance(1, 500);
    assert!(bench.change_memory(3) && bench.change_memory(0));
    assert_eq!(bench.calls(), [Call::Stop(1), start(256, 500)]);
}

#[test]
fn a_ring_that_runs_is_found_by_the_layout_that_it_started_with() {
    let mut bench = Bench::new(Running);
    bench.on.features |= Features::VIRTIO_F_RING_PACKED;
    // Packed, the ring's last area would need four bytes; split, it needs two thousand.
    bench.ring.addresses = Some(RingAddresses {
        used: USER_BASE + 0x1_0000 - 4,
        ..addresses(0)
    });
    bench.ring.leave_memory(&bench.on);
    assert_eq!(bench.state(), Waiting);
}

/// A worker may stop a ring: where it stood is what the device answers.
#[test]
fn a_ring_that_the_device_stopped_goes_on_where_it_stood() {
    let mut bench = Bench::new(Running);
    bench.on.device.advance(1, 300);
    bench.on.device.fail_ring(1);
    assert_eq!(bench.state(), Running, "nobody has asked");
    bench.ring.kick(&bench.on, Some(event())).unwrap();
    assert_eq!(bench.calls(), [Call::Stop(1), start(256, 300)]);
    bench.on.device.fail_ring(1);
    assert_eq!(bench.ring.stop(&bench.on), 300);
    assert_eq!(bench.ring.stop(&bench.on), 300, "and it stays so");
}

#[test]
fn a_start_that_fails_leaves_a_ring_waiting() {
    let mut bench = Bench::new(Idle);
    bench.on.device.fail_next_start();
    assert!(bench.ring.kick(&bench.on, Some(event())).is_err());
    assert_eq!(bench.state(), Waiting);
    bench.ring.start_if_ready(&bench.on).unwrap();
    assert_eq!(bench.state(), Running);
}

#[test]
fn a_ring_without_a_base_begins_as_fresh_ones_of_its_layout_do() {
    let packed = SPLIT | Features::VIRTIO_F_RING_PACKED;
    for (features, first) in [(SPLIT, 0), (packed, 0x8000_8000)] {
        let mut bench = Bench::new(Idle);
        bench.ring.reset();
        bench.on.features = features;
        assert_eq!(bench.ring.stop(&bench.on), first);
        bench.ring.set_size(&bench.on, 256).unwrap();
        bench.ring.set_addresses(&bench.on, addresses(0)).unwrap();
        bench.ring.kick(&bench.on, Some(event())).unwrap();
        let calls = bench.calls();
        assert!(
            matches!(calls[..], [Call::Start { base, .. }] if base == first),
            "{calls:?}"
        );
    }
}
