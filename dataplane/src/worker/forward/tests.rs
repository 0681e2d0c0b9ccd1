//! What becomes of frames whose destination is not to be had, in virtual time. The ports have no
//! rings: a delivery that is tried ends in a drop, `port_down`.

use std::time::Instant;

use ringway_bridge::BridgeConfig;

use super::parked::PARKING_TIME;
use super::*;
use crate::burst::BurstStorage;
use crate::events::EventHub;
use crate::memory::GuestSlice;
use crate::port::{PortBase, VhostPort};
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};

const MS: u64 = 1_000_000;
const BACKPRESSURE_NS: u64 = MS;
const PARKING_NS: u64 = PARKING_TIME * BACKPRESSURE_NS;

/// Frames of a burst, and the same as counters have it.
const BURST: usize = 4;
const FRAMES: u64 = BURST as u64;

fn port(number: u16) -> PortId {
    PortId::new(number).unwrap()
}

/// The station behind a port.
fn station(number: u16) -> [u8; 6] {
    let [high, low] = number.to_be_bytes();
    [2, 0, 0, 0, high, low]
}

/// Ports whose stations are known, the first of which sends.
struct Fixture {
    forwarder: Forwarder,
    pairs: PairTable,
    storage: BurstStorage,
    service: Service,
    now_ns: u64,
}

impl Fixture {
    fn new(ports: u16) -> Self {
        let bridge = Arc::new(Bridge::new(BridgeConfig {
            fdb_capacity: 1024,
            ageing_ticks: u32::MAX,
            move_hold_ticks: 0,
            seed: 1,
            group_fwd_mask: BridgeConfig::BPDUS,
        }));
        let mut forwarder = Forwarder::new(
            Arc::clone(&bridge),
            BACKPRESSURE_NS,
            Clock::since(Instant::now()),
        );
        for number in 0..ports {
            let (id, name) = (port(number), format!("p{number}").parse().unwrap());
            let base = PortBase::new(name, id, Arc::clone(&bridge), &EventHub::default());
            let added = Port::VhostUser(Arc::new(VhostPort::new(base, 1, None)));
            forwarder.members.add(id);
            forwarder.ports[id.index()] = Some(Arc::new(added));
            let mac = MacAddr(station(number));
            bridge.fdb().add_static(mac, id).unwrap();
        }
        Self {
            forwarder,
            pairs: PairTable::new(),
            storage: BurstStorage::new(),
            service: Service::default(),
            now_ns: 1,
        }
    }

    fn now(&self) -> Now {
        Now {
            tick: Tick(1),
            ns: self.now_ns,
        }
    }

    /// Has a port wait for what it wasted.
    fn have_wait(&mut self, number: u16, ns: u64) {
        // A descriptor is 10 ns, and each of these is paid for with 24.
        let walked = u32::try_from(ns / 240).unwrap();
        let ledger = &mut self.forwarder.ledger;
        ledger.charge_walk(port(number), walked, (0, 0), self.now_ns);
        assert!(ledger.waits(port(number), self.now_ns + ns - 1_000));
    }

    /// Sends a burst to a port; returns how many frames are given back to the source.
    fn send(&mut self, to: u16) -> u64 {
        let mut frame = [0; HEADER_LEN + 60];
        frame[HEADER_LEN..][..6].copy_from_slice(&station(to));
        frame[HEADER_LEN + 6..][..6].copy_from_slice(&station(0));
        let mut frames = [frame; BURST];
        let now = self.now();
        let mut burst = self.storage.begin();
        for frame in &mut frames {
            assert!(burst.push_whole(GuestSlice::of(frame)));
        }
        burst.take_snapshots(HEADER_BYTES, Offloads::NONE);
        let source = Arc::clone(self.forwarder.ports[0].as_ref().unwrap());
        let sender = Sender {
            port: &source,
            pair: 0,
            service: &mut self.service,
        };
        self.forwarder.forward(sender, &mut burst, &self.pairs, now) as u64
    }

    fn deliver_parked(&mut self) {
        let now = self.now();
        let Self {
            forwarder,
            pairs,
            storage,
            ..
        } = self;
        forwarder.deliver_parked(storage, pairs, now, || now.ns);
    }

    /// Frames for a port that it was tried to deliver, and those that waited for too long.
    fn tried_and_lost(&self, number: u16) -> (u64, u64) {
        let port = self.forwarder.ports[usize::from(number)].as_ref().unwrap();
        let drops = port.base().tx_drops.read();
        (drops[DropReason::PortDown], drops[DropReason::RingFull])
    }
}

#[test]
fn frames_for_a_port_that_pays_for_waste_wait_and_none_overtakes_them() {
    let mut fixture = Fixture::new(3);
    fixture.have_wait(1, 5 * MS);
    assert_eq!(
        (fixture.send(2), fixture.tried_and_lost(2)),
        (0, (FRAMES, 0))
    );
    assert_eq!((fixture.send(1), fixture.tried_and_lost(1)), (0, (0, 0)));
    fixture.now_ns += MS;
    fixture.deliver_parked();
    assert_eq!(fixture.tried_and_lost(1), (0, 0), "it still pays");
    fixture.now_ns += 5 * MS;
    fixture.send(1);
    assert_eq!(
        fixture.tried_and_lost(1),
        (0, 0),
        "they are behind the others"
    );
    fixture.deliver_parked();
    assert_eq!(fixture.tried_and_lost(1), (2 * FRAMES, 0));
    assert!(!fixture.forwarder.has_parked());
    fixture.send(1);
    assert_eq!(fixture.tried_and_lost(1), (3 * FRAMES, 0));
}

#[test]
fn a_source_waits_for_its_only_destination_for_a_while_and_its_frames_for_some_more() {
    let mut fixture = Fixture::new(2);
    fixture.have_wait(1, 50 * MS);
    assert_eq!(fixture.send(1), FRAMES);
    fixture.now_ns += BACKPRESSURE_NS - 1;
    assert_eq!(fixture.send(1), FRAMES);
    fixture.now_ns += 1;
    assert_eq!(fixture.send(1), 0);
    assert_eq!(fixture.tried_and_lost(1), (0, 0), "these are parked");
    fixture.now_ns += PARKING_NS - BACKPRESSURE_NS;
    assert_eq!(fixture.send(1), 0);
    assert_eq!(
        fixture.tried_and_lost(1),
        (0, FRAMES),
        "nothing is parked any more"
    );
    fixture.now_ns += BACKPRESSURE_NS - 1;
    fixture.deliver_parked();
    assert_eq!(fixture.tried_and_lost(1), (0, FRAMES));
    fixture.now_ns += 1;
    fixture.deliver_parked();
    assert_eq!(fixture.tried_and_lost(1), (0, 2 * FRAMES));
    assert!(!fixture.forwarder.has_parked());
}

#[test]
fn a_source_that_had_another_destination_lately_waits_for_none() {
    let mut fixture = Fixture::new(3);
    fixture.have_wait(1, 99 * MS);
    fixture.send(2);
    assert_eq!(fixture.send(1), 0);
    fixture.now_ns += SHARED_NS;
    fixture.have_wait(1, 99 * MS);
    // Whatever it is that waits from then on, it is the only one.
    fixture.forwarder.parking.remove(port(1));
    fixture.forwarder.destinations[1] = Destination::default();
    assert_eq!(fixture.send(1), FRAMES);
}

/// However many lots there are, a turn looks at few, and the next at others.
#[test]
fn few_lots_are_tried_in_a_turn_and_others_in_the_next() {
    const PORTS: u16 = 20;
    let mut fixture = Fixture::new(1 + PORTS);
    for to in 1..=PORTS {
        fixture.have_wait(to, 90 * MS);
        fixture.send(to);
    }
    // The first lot was made when the source had no other destination yet.
    let parked = PORTS - 1;
    fixture.now_ns += PARKING_NS;
    for expired in [8, 16, parked] {
        fixture.deliver_parked();
        let of = (1..=PORTS).filter(|to| fixture.tried_and_lost(*to) == (0, FRAMES));
        assert_eq!(of.count(), usize::from(expired));
    }
}

/// A source whose frames are parked pays for their delivery too, but not for time in which the
/// kernel gave the core to somebody else.
#[test]
fn the_time_of_delivering_what_is_parked_is_charged_to_whose_it_is() {
    // A lot costs 5 us at most here, and who is 20 us ahead of others is passed over.
    for (lots, took_ns, may_poll) in [(1, 1_000 * MS, true), (8, 4_000, false), (8, 400, true)] {
        let mut fixture = Fixture::new(2 + lots);
        fixture.send(1);
        for to in 2..2 + lots {
            fixture.have_wait(to, MS);
            fixture.send(to);
        }
        // They are all paid for, one behind the other.
        fixture.now_ns += 9 * MS;
        let now = fixture.now();
        let mut clock_ns = now.ns;
        let clock = || {
            clock_ns += took_ns;
            clock_ns
        };
        let Fixture {
            forwarder,
            pairs,
            storage,
            ..
        } = &mut fixture;
        forwarder.deliver_parked(storage, pairs, now, clock);
        assert!(!forwarder.has_parked());
        let [source, other] = [0, 1].map(|number| forwarder.ledger.may_poll(port(number), now.ns));
        assert_eq!((source, other), (may_poll, true), "{lots} lots");
    }
}

#[test]
fn frames_wait_for_room_for_their_segments_as_long_as_a_source_waits() {
    let full_since = |full_since_ns| Destination {
        full_since_ns,
        progress: 0,
    };
    let all = |destination: Destination, patience_ns, now_ns| {
        destination.no_wait(patience_ns, now_ns) == FrameSet::ALL
    };
    assert!(!all(full_since(0), MS, 5 * MS));
    assert!(!all(full_since(5), MS, 5 + MS - 1));
    assert!(all(full_since(5), MS, 5 + MS));
    assert!(all(full_since(0), 0, 1), "nobody ever waits");
}

/// A search for room that reads many descriptors is the destination's waste.
#[test]
fn what_a_delivery_reads_is_charged_to_its_destination() {
    let mut fixture = Fixture::new(3);
    let burst = fixture.storage.begin();
    let job = Job {
        burst: &burst,
        frames: FrameSet::EMPTY,
        no_wait: FrameSet::EMPTY,
        retags: None,
        source_queue: 0,
        owned: 0,
    };
    let round = Round::of_parked(Some(port(0)), &fixture.pairs, 1);
    for (to, walked) in [(1, 1024), (2, 0)] {
        let outcome = Outcome {
            walked,
            ..Outcome::refused(&job, DropReason::RingFull)
        };
        fixture.forwarder.settle(&round, port(to), &outcome);
    }
    let waits = [0, 1, 2].map(|number| fixture.forwarder.ledger.waits(port(number), 2));
    assert_eq!(waits, [false, true, false]);
}
