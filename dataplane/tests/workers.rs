//! Several workers: queues of one guest polled by different threads, and queues that change hands.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{DEADLINE, LAYOUTS, Lab, eventually, frame, mac, name, receive};
use ringway_api::{BalanceConfig, PortState, SwitchError};
use ringway_guest::{Guest, Layout};

/// A switch with two workers whose queues stay where they are put.
fn two_workers() -> Lab {
    Lab::with_config(|config| {
        let cores = core_affinity::get_core_ids().unwrap();
        assert!(cores.len() >= 2, "these tests need two CPUs");
        config.worker_cpus = cores[..2].iter().map(|core| core.id).collect();
        config.balance = BalanceConfig {
            is_on: false,
            ..BalanceConfig::DEFAULT
        };
    })
}

/// A guest of `pairs` at the port of its station, known to the switch.
fn guest(lab: &Lab, station: u8, pairs: u16, layout: Layout) -> Guest {
    let port = port_of(station);
    let config = Guest::builder().queue_pairs(pairs).layout(layout);
    let guest = lab.guest(&port, config);
    lab.pin(&port, station);
    eventually("all queues are up", || {
        let queues = lab.switch.port(&name(&port)).unwrap().queues;
        let up = queues.iter().filter(|q| q.enabled && q.tx_started);
        up.count() == usize::from(pairs)
    });
    guest
}

fn port_of(station: u8) -> String {
    format!("p{station}")
}

/// The worker that polls a pair.
fn worker_of(lab: &Lab, station: u8, pair: u16) -> u16 {
    let detail = lab.switch.port(&name(&port_of(station))).unwrap();
    detail.queues[usize::from(pair)].worker
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; 12], frame].concat()
}

/// Frames sent at once on one pair.
const BURST: u64 = 16;

/// One end of an exchange: sends `frames` numbered frames on each pair to `peer`, and expects as
/// many of each pair of the peer's.
struct Station {
    guest: Guest,
    own: u8,
    peer: u8,
    sent: Vec<u64>,
    flows: Vec<Flow>,
}

/// What arrived of the frames that the peer sent on one pair.
#[derive(Default)]
struct Flow {
    seen: Vec<bool>,
    count: u64,
    /// The last number of each ring in which it came.
    last: HashMap<u16, u64>,
}

impl Station {
    fn new(guest: Guest, own: u8, peer: u8, peer_pairs: u16) -> Self {
        let pairs = guest.queue_pairs();
        Self {
            guest,
            own,
            peer,
            sent: vec![0; pairs.into()],
            flows: (0..peer_pairs).map(|_| Flow::default()).collect(),
        }
    }

    /// Sends and receives until each side has all of `frames` a pair, or `stop` is set.
    fn exchange(&mut self, frames: u64, stop: &AtomicBool) {
        let start = Instant::now();
        // Exchanges of one pair of stations follow each other: numbers go on.
        let goal = self.sent[0] + frames;
        while self.sent.iter().any(|sent| *sent < goal)
            || self.flows.iter().any(|flow| flow.count < goal)
        {
            assert!(
                start.elapsed() < 3 * DEADLINE,
                "station {} sent {:?} and received {:?} of {goal}",
                self.own,
                self.sent,
                self.flows.iter().map(|f| f.count).collect::<Vec<_>>()
            );
            if stop.load(Ordering::Relaxed) {
                return;
            }
            self.step(goal);
        }
    }

    fn step(&mut self, goal: u64) {
        let mut is_idle = true;
        for pair in 0..self.guest.queue_pairs() {
            let sent = &mut self.sent[usize::from(pair)];
            let numbers = *sent..goal.min(*sent + BURST);
            let burst: Vec<_> = numbers
                .map(|number| {
                    let seed = u64::from(pair) << 32 | number;
                    with_header(&frame(self.peer, self.own, 64, seed))
                })
                .collect();
            *sent += self.guest.send_burst(pair, &burst).unwrap() as u64;
            while let Some(received) = self.guest.try_recv(pair).unwrap() {
                is_idle = false;
                self.take(pair, &received.frame);
            }
        }
        if is_idle {
            std::thread::yield_now();
        }
    }

    /// Notes a frame: each comes once, and those of a flow in order within a ring.
    fn take(&mut self, ring: u16, bytes: &[u8]) {
        let seed = u64::from_be_bytes(bytes[14..22].try_into().unwrap());
        assert_eq!(
            bytes,
            frame(self.own, self.peer, 64, seed),
            "not as it was sent"
        );
        let (pair, number) = (usize::try_from(seed >> 32).unwrap(), seed & 0xffff_ffff);
        let flow = &mut self.flows[pair];
        let at = usize::try_from(number).unwrap();
        if flow.seen.len() <= at {
            flow.seen.resize(at + 1, false);
        }
        assert!(!flow.seen[at], "frame {number} of pair {pair} came twice");
        flow.seen[at] = true;
        flow.count += 1;
        let last = flow.last.insert(ring, number);
        assert!(
            last.is_none_or(|last| last < number),
            "frame {number} of pair {pair} came after {last:?} in ring {ring}"
        );
    }

    /// In how many rings each flow came.
    fn rings(&self) -> Vec<usize> {
        self.flows.iter().map(|flow| flow.last.len()).collect()
    }
}

/// Two stations that exchange frames, each in a thread of its own, while `meanwhile` is called
/// again and again; it returns how often.
fn exchange(a: &mut Station, b: &mut Station, frames: u64, mut meanwhile: impl FnMut()) -> u64 {
    let stop = AtomicBool::new(false);
    let running = AtomicUsize::new(2);
    let run = |station: &mut Station| {
        // Also if it panics, so that nobody waits for it.
        let _done = Done(&running, &stop);
        station.exchange(frames, &stop);
        // Both have all, or one gave up.
        std::mem::forget(_done);
        running.fetch_sub(1, Ordering::Relaxed);
    };
    let mut times = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| run(a));
        scope.spawn(|| run(b));
        while running.load(Ordering::Relaxed) > 0 {
            meanwhile();
            times += 1;
            std::thread::yield_now();
        }
    });
    times
}

/// Ends the other threads of an exchange when one fails.
struct Done<'a>(&'a AtomicUsize, &'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Stations 1 and 2 of so many pairs.
fn stations(lab: &Lab, pairs: [u16; 2], [first, second]: [Layout; 2]) -> (Station, Station) {
    let a = guest(lab, 1, pairs[0], first);
    let b = guest(lab, 2, pairs[1], second);
    (
        Station::new(a, 1, 2, pairs[1]),
        Station::new(b, 2, 1, pairs[0]),
    )
}

#[test]
fn a_worker_delivers_into_receive_rings_of_its_own() {
    let lab = two_workers();
    let mut guests: Vec<_> = (1..=3)
        .map(|station| guest(&lab, station, 2, Layout::Split))
        .collect();
    // The pairs of the second are polled crosswise.
    let first_pairs = [1, 2, 3].map(|station| worker_of(&lab, station, 0));
    assert_eq!(first_pairs, [0, 1, 0]);
    for (from, to, pair) in [
        (1, 2, 0),
        (1, 2, 1),
        (2, 3, 0),
        (2, 3, 1),
        (1, 3, 0),
        (3, 1, 1),
    ] {
        let sent = frame(to, from, 64, 7);
        let source = &mut guests[usize::from(from) - 1];
        source.send_on(pair, &with_header(&sent)).unwrap();
        let received = receive(&mut guests[usize::from(to) - 1]);
        assert_eq!(received.frame, sent);
        let workers = [
            worker_of(&lab, from, pair),
            worker_of(&lab, to, received.pair),
        ];
        assert_eq!(workers[0], workers[1], "from {from} queue {pair} to {to}");
    }
    // A worker that has none of the destination's rings takes the one of the same number.
    for pair in [0, 1] {
        lab.switch.pin_queue(&name("p2"), pair, 0).unwrap();
    }
    let sent = frame(2, 1, 64, 8);
    guests[0].send_on(1, &with_header(&sent)).unwrap();
    assert_eq!(worker_of(&lab, 1, 1), 1);
    assert_eq!(receive(&mut guests[1]).pair, 1);
}

#[test]
fn frames_of_both_queues_arrive_once_and_in_order_with_two_workers() {
    for layouts in LAYOUTS {
        let lab = two_workers();
        let (mut a, mut b) = stations(&lab, [2, 2], layouts);
        exchange(&mut a, &mut b, 5_000, || {});
        for station in [&a, &b] {
            assert_eq!(station.rings(), [1, 1], "a flow keeps to its ring");
        }
        let frames = lab
            .switch
            .workers()
            .iter()
            .map(|w| w.frames)
            .collect::<Vec<_>>();
        assert!(
            frames.iter().all(|frames| *frames > 0),
            "one worker had all: {frames:?}"
        );
        lab.assert_conserved(&["p1", "p2"], 0);
    }
}

#[test]
fn frames_arrive_once_and_in_order_while_their_queues_change_hands() {
    for (layouts, pairs) in [
        (LAYOUTS[0], [2, 2]),
        (LAYOUTS[3], [2, 2]),
        // Both workers want one ring, so the order is that of the whole flow.
        (LAYOUTS[0], [2, 1]),
    ] {
        let lab = two_workers();
        let (mut a, mut b) = stations(&lab, pairs, layouts);
        let mut moves: u16 = 0;
        exchange(&mut a, &mut b, 20_000, || {
            let station = 1 + moves % 2;
            let pair = moves / 2 % pairs[usize::from(station) - 1];
            let port = name(&format!("p{station}"));
            let worker = moves / 4 % 2;
            lab.switch.pin_queue(&port, pair, worker).unwrap();
            moves = moves.wrapping_add(1);
        });
        assert!(moves > 20, "only {moves} moves while frames flowed");
        if pairs[1] == 1 {
            assert_eq!(b.rings(), [1, 1]);
        }
        lab.assert_conserved(&["p1", "p2"], 0);
        let drops = ["p1", "p2"].map(|port| lab.counters(port).tx_drops.total());
        assert_eq!(drops, [0, 0]);
    }
}

#[test]
fn ports_and_guests_come_and_go_while_queues_change_hands() {
    let lab = two_workers();
    let (mut a, mut b) = stations(&lab, [2, 2], LAYOUTS[0]);
    let c = guest(&lab, 3, 2, Layout::Split);
    let config = Guest::builder().queue_pairs(2);
    let mut c = Some(c);
    let mut times: u16 = 0;
    exchange(&mut a, &mut b, 20_000, || {
        let worker = times % 2;
        lab.switch.pin_queue(&name("p1"), 0, worker).unwrap();
        lab.switch.pin_queue(&name("p3"), 1, 1 - worker).unwrap();
        drop(guest(&lab, 4, 2, Layout::Packed));
        lab.switch.remove_port(&name("p4")).unwrap();
        drop(c.take());
        let state = || lab.switch.port(&name("p3")).unwrap().port.state;
        eventually("the third port is down", || state() == PortState::Down);
        c = Some(config.clone().connect(&lab.socket("p3")).unwrap());
        times += 1;
    });
    assert!(times > 2, "only {times} rounds while frames flowed");
    let mut c = c.unwrap();
    // Its queues are polled by the workers to which they were pinned while it was away.
    for pair in [0, 1] {
        let hello = frame(1, 3, 64, 1 << 40 | u64::from(pair));
        c.send_on(pair, &with_header(&hello)).unwrap();
        eventually("its frame arrives", || {
            let rings = [0, 1].map(|ring| a.guest.try_recv(ring).unwrap());
            rings.into_iter().flatten().any(|r| r.frame == hello)
        });
    }
}

#[test]
fn two_workers_that_want_one_ring_are_counted_and_lose_nothing() {
    let lab = two_workers();
    let (mut a, mut b) = stations(&lab, [2, 1], LAYOUTS[0]);
    let contended = || -> u64 { lab.switch.workers().iter().map(|w| w.contended).sum() };
    // Sessions take rings too, to start them.
    let before = contended();
    let start = Instant::now();
    while contended() == before {
        assert!(start.elapsed() < 3 * DEADLINE, "the workers never met");
        exchange(&mut a, &mut b, 5_000, || {});
    }
    assert_eq!(b.rings(), [1, 1]);
    lab.assert_conserved(&["p1", "p2"], 0);
    let of_queues = || -> u64 {
        let ports = ["p1", "p2"].map(|port| lab.switch.port(&name(port)).unwrap().queues);
        ports.iter().flatten().map(|queue| queue.contended).sum()
    };
    // Workers publish once a turn.
    eventually("workers and queues agree", || contended() == of_queues());
}

#[test]
fn a_queue_that_sleeps_wakes_its_new_worker() {
    for layout in [Layout::Split, Layout::Packed] {
        let lab = two_workers();
        let mut a = guest(&lab, 1, 1, layout);
        let mut b = guest(&lab, 2, 1, layout);
        for round in 0..50_u16 {
            let asleep = || lab.switch.workers().iter().all(|w| w.active_queues == 0);
            eventually("the workers sleep", asleep);
            let worker = round % 2;
            lab.switch.pin_queue(&name("p1"), 0, worker).unwrap();
            assert_eq!(worker_of(&lab, 1, 0), worker);
            eventually("they sleep again", asleep);
            let frames = || lab.switch.workers()[usize::from(worker)].frames;
            let before = frames();
            let sent = frame(2, 1, 64, round.into());
            a.send_frame(&sent).unwrap();
            assert_eq!(receive(&mut b).frame, sent);
            eventually("the new worker took it", || frames() == before + 1);
        }
    }
}

#[test]
fn what_can_not_be_pinned_is_refused_and_changes_nothing() {
    let lab = two_workers();
    let _guest = guest(&lab, 1, 1, Layout::Split);
    let pin = |port: &str, pair, worker| lab.switch.pin_queue(&name(port), pair, worker);
    assert!(matches!(
        pin("p9", 0, 0),
        Err(SwitchError::NoSuchPort { .. })
    ));
    assert!(matches!(
        pin("p1", 8, 0),
        Err(SwitchError::NoSuchQueue {
            pair: 8,
            pairs: 8,
            ..
        })
    ));
    assert!(matches!(
        pin("p1", 0, 2),
        Err(SwitchError::NoSuchWorker {
            worker: 2,
            workers: 2
        })
    ));
    assert!(!lab.switch.unpin_queue(&name("p1"), 0).unwrap());
    assert_eq!(worker_of(&lab, 1, 0), 0);
    pin("p1", 0, 1).unwrap();
    let pins = || {
        lab.switch
            .port(&name("p1"))
            .unwrap()
            .port
            .config
            .pins()
            .clone()
    };
    assert_eq!(pins().into_iter().collect::<Vec<_>>(), [(0, 1)]);
    assert!(lab.switch.unpin_queue(&name("p1"), 0).unwrap());
    assert!(pins().is_empty());
    assert_eq!(
        worker_of(&lab, 1, 0),
        1,
        "it stays until something else is better"
    );
}

#[test]
fn a_port_is_added_with_its_pins_or_not_at_all() {
    let lab = two_workers();
    let path = lab.add_port_with("p1", |config| config.pins = [(0, 1), (2, 1)].into());
    let placement: Vec<_> = (0..4).map(|pair| worker_of(&lab, 1, pair)).collect();
    assert_eq!(placement, [1, 0, 1, 0]);
    let mut guest = Guest::builder().connect(&path).unwrap();
    guest.send_frame(&frame(0xff, 1, 64, 1)).unwrap();
    eventually("the frame is taken", || lab.switch.workers()[1].frames == 1);
    let mut config = lab.switch.port(&name("p1")).unwrap().port.config;
    *config.pins_mut() = [(0, 2)].into();
    let refused = lab.switch.add_port(name("p2"), config);
    assert!(matches!(
        refused,
        Err(SwitchError::NoSuchWorker { worker: 2, .. })
    ));
    assert_eq!(lab.switch.ports().len(), 1);
}

#[test]
fn loads_are_measured_and_told_by_worker() {
    let interval = Duration::from_millis(20);
    let lab = Lab::with_config(|config| config.balance.interval = interval);
    let mut a = guest(&lab, 1, 1, Layout::Split);
    let mut b = guest(&lab, 2, 1, Layout::Split);
    assert_eq!(mac(2), frame(2, 1, 64, 0)[..6]);
    eventually("the load shows", || {
        let sent = frame(2, 1, 1000, 1);
        a.send_frame(&sent).unwrap();
        receive(&mut b);
        let detail = lab.switch.worker(0).unwrap();
        let queue = &detail.queues[0];
        assert_eq!((queue.port.as_str(), queue.queue), ("p1", 0));
        assert_eq!(detail.queues.len(), 16);
        let is_consistent = queue.bits_per_second == queue.frames_per_second * 8000.0;
        detail.interval_seconds >= interval.as_secs_f64()
            && queue.frames_per_second > 0.0
            && is_consistent
    });
    assert!(matches!(
        lab.switch.worker(1),
        Err(SwitchError::NoSuchWorker {
            worker: 1,
            workers: 1
        })
    ));
    assert_eq!(lab.switch.ports()[0].state, PortState::Up);
}
