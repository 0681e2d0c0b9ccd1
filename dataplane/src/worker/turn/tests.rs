//! The receive loop over a queue that is made up: what each outcome does to queue and counters.

use ringway_bridge::{BridgeConfig, PortId};

use super::*;
use crate::burst::Burst;
use crate::events::EventHub;
use crate::memory::GuestSlice;
use crate::port::{PortBase, QueueCounters, VhostPort};
use crate::wire::Offloads;
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};

const FRAME_BYTES: usize = 60;

/// What a queue of broadcasts holds.
#[derive(Clone, Copy)]
enum State {
    Enabled,
    Disabled,
    Empty,
    Stopped,
}

/// A queue, and what is done to it.
struct Fake {
    state: State,
    frames: Vec<[u8; HEADER_LEN + FRAME_BYTES]>,
    /// Descriptors that are read one by one.
    walked: u32,
    counters: QueueCounters,
    /// Frames taken and kept, and those that were counted by then.
    finished: Option<(usize, usize, u64)>,
}

impl Fake {
    fn new(state: State, frames: usize) -> Self {
        let mut frame = [0; HEADER_LEN + FRAME_BYTES];
        frame[HEADER_LEN..][..6].fill(0xff);
        frame[HEADER_LEN + 6..][..6].fill(2);
        Self {
            state,
            frames: vec![frame; frames],
            walked: 0,
            counters: QueueCounters::default(),
            finished: None,
        }
    }
}

impl RxQueue for &mut Fake {
    type Completion<'m>
        = ()
    where
        Self: 'm;

    fn counters(&self) -> &QueueCounters {
        &self.counters
    }

    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        _: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<()> {
        let is_enabled = match self.state {
            State::Enabled => true,
            State::Disabled => false,
            State::Empty => return Gathered::Nothing,
            State::Stopped => return Gathered::Stopped,
        };
        for frame in self.frames.iter_mut().take(limit) {
            burst.push_whole(GuestSlice::of(frame));
        }
        burst.note_walked(self.walked);
        Gathered::Frames {
            header_bytes: HEADER_BYTES,
            allowed: Offloads::NONE,
            is_enabled,
            completion: (),
        }
    }

    fn finish(&mut self, taken: usize, kept: usize) {
        self.finished = Some((taken, kept, self.counters.frames.get()));
    }

    fn arm(&mut self) -> bool {
        true
    }
}

/// Three ports of a bridge, none with a ring; what port 0 sends is flooded to the others.
struct Fixture {
    path: Path,
    source: Source,
    other: Arc<Port>,
    pairs: PairTable,
}

impl Fixture {
    fn new() -> Self {
        let bridge = Bridge::new(BridgeConfig {
            fdb_capacity: 16,
            ageing_ticks: u32::MAX,
            move_hold_ticks: 0,
            seed: 1,
            group_fwd_mask: BridgeConfig::BPDUS,
        });
        let bridge = Arc::new(bridge);
        let mut forwarder = Forwarder::new(
            Arc::clone(&bridge),
            0,
            Clock::since(std::time::Instant::now()),
        );
        let [source, other, _] = [0, 1, 2].map(|number| {
            let id = PortId::new(number).unwrap();
            let name = format!("p{number}").parse().unwrap();
            let base = PortBase::new(name, id, Arc::clone(&bridge), &EventHub::default());
            let port = Port::VhostUser(Arc::new(VhostPort::new(base, 1, None)));
            let port = Arc::new(port);
            forwarder.members.add(id);
            forwarder.ports[id.index()] = Some(Arc::clone(&port));
            port
        });
        let token = Token::new(source.base().id, 0, 0);
        let source = Source {
            id: source.base().id,
            has_calls: false,
            port: source,
            token,
            is_active: true,
            service: Service::default(),
        };
        let burst = BurstStorage::new();
        Self {
            path: Path {
                burst,
                forwarder,
                last_bytes: 0,
            },
            source,
            other,
            pairs: PairTable::new(),
        }
    }

    fn receive(&mut self, queue: Result<&mut Fake, Unavailable>, limit: usize) -> Polled {
        let now = Now {
            tick: Tick(1),
            ns: 1,
        };
        let Source { port, service, .. } = &mut self.source;
        let sender = Sender {
            port,
            pair: 0,
            service,
        };
        self.path.receive(sender, queue, limit, &self.pairs, now)
    }

    /// Frames of port 0 that were dropped before, and those for port 1 that were dropped behind
    /// the bridge.
    fn drops(&self) -> [Vec<(DropReason, u64)>; 2] {
        let [rx, tx] = [
            self.source.port.base().rx_drops.read(),
            self.other.base().tx_drops.read(),
        ];
        [rx, tx].map(|drops| drops.nonzero().collect())
    }
}

#[test]
fn frames_are_forwarded_counted_and_then_shown() {
    let (mut fixture, mut queue) = (Fixture::new(), Fake::new(State::Enabled, 5));
    assert_eq!(fixture.receive(Ok(&mut queue), 3), Polled::Frames(3));
    assert_eq!(queue.finished, Some((3, 0, 3)));
    assert_eq!(queue.counters.bytes.get(), 3 * FRAME_BYTES as u64);
    let dropped = vec![(DropReason::PortDown, 3)];
    assert_eq!(fixture.drops(), [vec![], dropped]);
    assert_eq!(fixture.receive(Ok(&mut queue), 64), Polled::Frames(5));
    assert_eq!(queue.finished, Some((5, 0, 8)));
}

#[test]
fn frames_of_a_disabled_queue_are_received_and_dropped() {
    let (mut fixture, mut queue) = (Fixture::new(), Fake::new(State::Disabled, 3));
    assert_eq!(fixture.receive(Ok(&mut queue), 64), Polled::Frames(3));
    assert_eq!(queue.finished, Some((3, 0, 3)));
    let dropped = vec![(DropReason::QueueDisabled, 3)];
    assert_eq!(fixture.drops(), [dropped, vec![]]);
}

#[test]
fn a_queue_with_nothing_in_it_is_left_alone() {
    let mut fixture = Fixture::new();
    for (state, polled) in [
        (State::Empty, Polled::Empty),
        (State::Stopped, Polled::Stopped),
    ] {
        let mut queue = Fake::new(state, 3);
        assert_eq!(fixture.receive(Ok(&mut queue), 64), polled);
        assert_eq!(queue.finished, None);
    }
    assert_eq!(fixture.drops(), [vec![], vec![]]);
}

// That is how a queue whose first frame breaks a rule gets to fail.
#[test]
fn a_burst_without_frames_is_brought_to_its_end_if_the_queue_wants_that() {
    let (mut fixture, mut queue) = (Fixture::new(), Fake::new(State::Enabled, 0));
    assert_eq!(fixture.receive(Ok(&mut queue), 64), Polled::Waiting(0));
    assert_eq!(queue.finished, Some((0, 0, 0)));
}

#[test]
fn a_queue_in_other_hands_is_counted_and_polled_again_and_a_stopped_one_is_not() {
    let mut fixture = Fixture::new();
    assert_eq!(
        fixture.receive(Err(Unavailable::Busy), 64),
        Polled::Waiting(0)
    );
    let contended = fixture.source.port.queue_counters(0).0.contended.get();
    assert_eq!((contended, *fixture.path.forwarder.contended()), (1, 1));
    assert_eq!(
        fixture.receive(Err(Unavailable::Stopped), 64),
        Polled::Stopped
    );
    assert_eq!(*fixture.path.forwarder.contended(), 1);
}

#[test]
fn what_a_burst_reads_for_nothing_has_its_port_wait() {
    let mut fixture = Fixture::new();
    let mut waits = |walked| {
        let mut queue = Fake::new(State::Enabled, 1);
        queue.walked = walked;
        fixture.receive(Ok(&mut queue), 64);
        let id = fixture.source.id;
        fixture.path.forwarder.ledger.waits(id, 2)
    };
    assert_eq!([0, 30, 1024].map(&mut waits), [false, false, true]);
}

/// Whether port 0 may be polled again after bursts that took so long.
fn may_poll_after(fixture: &mut Fixture, bursts: usize, took_ns: u64) -> bool {
    let id = fixture.source.id;
    for _ in 0..bursts {
        let polled = fixture.receive(Ok(&mut Fake::new(State::Enabled, 64)), 64);
        fixture.path.charge((id, false), polled, took_ns, 0);
    }
    fixture.path.forwarder.ledger.may_poll(id, 2)
}

#[test]
fn a_burst_is_charged_its_time_and_more_for_copies() {
    let one_copy = |bursts, took_ns| {
        let mut fixture = Fixture::new();
        fixture
            .path
            .forwarder
            .members
            .remove(PortId::new(2).unwrap());
        may_poll_after(&mut fixture, bursts, took_ns)
    };
    assert!(one_copy(2, 1_000));
    assert!(!one_copy(2, 14_000));
    // What the kernel took besides is nobody's.
    assert!(one_copy(1, 1_000_000));
    let two_copies = may_poll_after(&mut Fixture::new(), 2, 1_000);
    assert!(!two_copies);
}
