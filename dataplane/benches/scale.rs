//! What many ports, addresses and copies cost: each figure is a ratio of two cases that are
//! measured in turns, the median of the rounds with the extremes.
//!
//! `cargo bench --bench scale [fdb|flood|idle]`
#![allow(
    clippy::unwrap_used,
    reason = "a bench that can't be set up has nothing to measure"
)]

use std::time::{Duration, Instant};

use ringway_api::{
    BalanceConfig, GroupFwdMask, IdleConfig, PortConfig, PortName, SocketSpec, SwitchConfig,
    VhostUserConfig,
};
use ringway_bridge::MacAddr;
use ringway_dataplane::{InlineSwitch, Switch};
use ringway_guest::{Guest, Layout};
use ringway_testbed::{BURST, RING_SIZE, Shape, Station};
use tempfile::TempDir;

/// Whether each is to be done once, to see that it runs, as criterion has it.
fn is_test() -> bool {
    std::env::args().any(|argument| argument == "--test")
}

/// Pairs of measurements.
fn rounds() -> usize {
    if is_test() { 1 } else { 15 }
}

fn main() {
    let only: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let is_wanted = |name: &str| only.is_empty() || only.iter().any(|wanted| wanted == name);
    if is_wanted("fdb") {
        fdb();
    }
    if is_wanted("flood") {
        flood();
    }
    if is_wanted("idle") {
        idle();
    }
}

/// Measures the two cases in turns, `case(which)` in any unit, and prints median and extremes of
/// second / first.
fn compare(what: &str, promise: &str, mut case: impl FnMut(usize) -> f64) {
    for which in [0, 1] {
        case(which);
    }
    let mut firsts = Vec::new();
    let mut seconds = Vec::new();
    let mut ratios = Vec::new();
    for round in 0..rounds() {
        // Who comes first takes turns too.
        let [one, other] = [round % 2, 1 - round % 2].map(|which| (which, case(which)));
        let (first, second) = if one.0 == 0 {
            (one.1, other.1)
        } else {
            (other.1, one.1)
        };
        firsts.push(first);
        seconds.push(second);
        ratios.push(second / first);
    }
    let [first, second, ratio] = [firsts, seconds, ratios].map(|mut all| {
        all.sort_by(f64::total_cmp);
        (all[0], all[all.len() / 2], all[all.len() - 1])
    });
    println!(
        "{what}: {:.3} ({:.3} to {:.3}), {:.1} against {:.1}; promised: {promise}",
        ratio.1, ratio.0, ratio.2, second.1, first.1,
    );
}

/// Guests with plain frames and receive rings of `receive_size`.
fn shape(frame_bytes: u32, receive_size: u16) -> Shape {
    Shape {
        receive_size,
        ..Shape::plain(Layout::Split, frame_bytes)
    }
}

/// An inline switch with guests, all of which send to the next one's station.
struct Inline {
    switch: InlineSwitch,
    guests: Vec<Station>,
    _folder: TempDir,
}

impl Inline {
    fn new(ports: u8, fdb_capacity: usize, frame_bytes: u32, rx_size: u16) -> Self {
        let folder = TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(fdb_capacity).unwrap();
        let guests = (0..ports)
            .map(|port| {
                let name = format!("p{port}");
                let path = folder.path().join(&name);
                switch.add_port(name.parse().unwrap(), &path).unwrap();
                Station::connect(&path, shape(frame_bytes, rx_size))
            })
            .collect();
        Self {
            switch,
            guests,
            _folder: folder,
        }
    }

    /// Sends a burst from the first guest; returns the switch's time for each frame that arrives,
    /// in nanoseconds.
    fn burst(&mut self, of: impl Fn(u16) -> [[u8; 6]; 2]) -> f64 {
        self.guests[0].send(of);
        let start = Instant::now();
        self.switch.turn();
        let took = start.elapsed();
        let arrived: u64 = self.guests.iter_mut().map(Station::receive).sum();
        self.guests[0].tx.ring.reclaim().unwrap();
        assert_eq!(arrived % u64::from(BURST), 0, "frames were lost");
        took.as_nanos() as f64 / arrived as f64
    }
}

/// Of bursts, so that one during which somebody else had the CPU does not count.
fn median(mut costs: Vec<f64>) -> f64 {
    costs.sort_by(f64::total_cmp);
    costs[costs.len() / 2]
}

/// Station `number` behind guest `port`.
fn station(port: u8, number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [0x52, port, a, b, c, d]
}

/// A bed whose switch knows `entries` addresses, and 10,000 flows between them.
struct Flows {
    inline: Inline,
    flows: Vec<[[u8; 6]; 2]>,
}

impl Flows {
    fn new(entries: u32) -> Self {
        let mut inline = Inline::new(2, 200_000, 64, RING_SIZE);
        let each = entries / 2;
        for port in [1, 0] {
            inline.guests.swap(0, usize::from(port));
            for first in (0..each).step_by(BURST.into()) {
                let learn = |n| {
                    let number = (first + u32::from(n)).min(each - 1);
                    [station(1 - port, 0), station(port, number)]
                };
                inline.burst(learn);
            }
            inline.guests.swap(0, usize::from(port));
        }
        // A linear congruence visits them in no order that a prefetcher knows.
        let mut random = 1_u32;
        let mut next = |range: u32| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((u64::from(random) * u64::from(range)) >> 32) as u32
        };
        let flows = (0..10_000).map(|_| [station(1, next(each)), station(0, next(each))]);
        let flows = flows.collect();
        Self { inline, flows }
    }

    /// Frames per microsecond of the switch's time.
    fn measure(&mut self) -> f64 {
        let mut costs = Vec::new();
        for _ in 0..10 {
            for flows in self.flows.chunks_exact(BURST.into()) {
                costs.push(self.inline.burst(|n| flows[usize::from(n)]));
            }
        }
        1e3 / median(costs)
    }
}

fn fdb() {
    let mut cases = [100_000, 100].map(Flows::new);
    compare(
        "frames per microsecond over 10,000 flows, 100,000 addresses against 100",
        "0.8 or more",
        |which| cases[1 - which].measure(),
    );
}

fn flood() {
    // The last bed's guest spreads its buffers over as much memory as 64 guests have.
    let cases = [(64, RING_SIZE), (1500, RING_SIZE), (1500, 64 * RING_SIZE)];
    for (frame_bytes, unicast_size) in cases {
        let mut bed = Inline::new(2, 1024, frame_bytes, unicast_size);
        let mut many = Inline::new(65, 1024, frame_bytes, RING_SIZE);
        let unicast = |_| [station(1, 0), station(0, 0)];
        let group = |_| [[0xff; 6], station(0, 0)];
        // The bed has to know where its station is.
        bed.guests.swap(0, 1);
        bed.burst(|_| [station(0, 0), station(1, 0)]);
        bed.guests.swap(0, 1);
        let what = format!(
            "ns for a copy of {frame_bytes} bytes to 64 ports against a unicast frame to a ring of \
             {unicast_size}"
        );
        compare(&what, "1.2 or less", |which| match which {
            0 => median((0..10_000).map(|_| bed.burst(unicast)).collect()),
            _ => median((0..500).map(|_| many.burst(group)).collect()),
        });
    }
}

/// A switch with a worker on the first CPU, and two guests that this thread plays.
struct Busy {
    a: Station,
    b: Station,
    _idle: Vec<Guest>,
    _switch: Switch,
    _folder: TempDir,
}

impl Busy {
    fn new(idle_ports: u32) -> Self {
        let folder = TempDir::new().unwrap();
        let switch = Switch::start(SwitchConfig {
            worker_cpus: vec![core_affinity::get_core_ids().unwrap()[0].id],
            idle: IdleConfig::DEFAULT,
            balance: BalanceConfig::DEFAULT,
            fdb_capacity: 4096,
            fdb_ageing: Duration::from_secs(300),
            fdb_move_hold: SwitchConfig::DEFAULT_FDB_MOVE_HOLD,
            group_fwd_mask: GroupFwdMask::DEFAULT,
        })
        .unwrap();
        let add = |name: String| {
            let path = folder.path().join(&name);
            let socket = SocketSpec::Listen(path.as_path().try_into().unwrap());
            let config = PortConfig::VhostUser(VhostUserConfig::new(socket));
            switch.add_port(name.parse().unwrap(), config).unwrap();
            path
        };
        let idle = (0..idle_ports).map(|number| {
            let path = add(format!("idle{number}"));
            let config = Guest::builder()
                .queue_size(16)
                .buffer_size(256)
                .indirect(false);
            config.connect(&path).unwrap()
        });
        let idle = idle.collect();
        let busy = |name: &str, macs: [u8; 2]| {
            let path = add(name.to_owned());
            let guest = Station::connect(&path, shape(64, RING_SIZE));
            let [own, peer] = macs.map(|number| station(number, 0));
            guest.address(peer, own);
            let port: PortName = name.parse().unwrap();
            switch.fdb_add(MacAddr(own), &port, None).unwrap();
            guest
        };
        let (a, b) = (busy("a", [1, 2]), busy("b", [2, 1]));
        Self {
            a,
            b,
            _idle: idle,
            _switch: switch,
            _folder: folder,
        }
    }

    /// Thousands of frames per second.
    fn measure(&mut self) -> f64 {
        let start = Instant::now();
        let mut frames = 0;
        let took = loop {
            for _ in 0..256 {
                self.a.send_ready();
                frames += self.b.receive();
                self.a.tx.ring.reclaim().unwrap();
            }
            let took = start.elapsed();
            if took > Duration::from_millis(200) {
                break took;
            }
        };
        frames as f64 / took.as_secs_f64() / 1e3
    }
}

fn idle() {
    let cores = core_affinity::get_core_ids().unwrap();
    if cores.len() < 2 {
        println!("idle ports: skipped, as it takes two CPUs");
        return;
    }
    let many = if is_test() { 10 } else { 1000 };
    let mut cases = [0, many].map(Busy::new);
    core_affinity::set_for_current(cores[1]);
    compare(
        &format!("kpps of two busy ports, {many} idle ones beside them against none"),
        "0.95 or more",
        |which| cases[which].measure(),
    );
}
