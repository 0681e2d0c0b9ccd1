//! Guests that forward at full rate beside an attacker, and what they notice of it.
//!
//! Three guests keep their transmit rings filled to the brim, for each other in turn, so that the
//! worker is never without work of theirs and each of its bursts has several destinations. Two more
//! send one frame at a time to and fro: a ping, now and then to all. Nobody's address is configured.
//!
//! One thread drives all of them and takes a step of the attack each time round, so that an attack
//! that is no more than what stands in a ring costs no core. The rate is that of the moments in
//! which both the worker and the driver had their cores, and the median of many short slices: what
//! else the machine does takes moments away, not frames. A worker that blocks has no such excuse.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use ringway_api::{IdleConfig, SwitchConfig};
use ringway_guest::{Layout, UsedSlot};
use ringway_testbed::{BURST, RING_SIZE, Shape, Station};

use super::observe::{Footprint, alone, capture_log};
use super::{DEADLINE, Lab, eventually, mac};

/// Stations that exchange frames at full rate.
pub(crate) const INNOCENTS: [u8; 3] = [1, 2, 3];
/// Stations of the ping.
const PING: u8 = 4;
const PONG: u8 = 5;

/// How much longer than alone a ping may take at the 99th percentile. (Alone it takes some 50 µs, and
/// more only where whoever runs the machine takes its cores away, which no thread is told.)
pub(crate) const LONGEST_PING: Duration = Duration::from_millis(5);

/// Frames in a row for one destination: a burst of 64 has several.
const RUN: u16 = 8;
/// Slices of one measurement, and how much of undisturbed moments makes one.
const SLICES: usize = 21;
const SLICE: Duration = Duration::from_millis(5);
/// A slice ends after so long all the same, if there was any such moment.
const LONGEST_SLICE: Duration = Duration::from_millis(100);
/// A moment: long enough to ask the kernel three times, short beside a scheduler's slice.
const MOMENT: Duration = Duration::from_micros(200);
/// A moment counts if both threads ran for this part of it, a ping if they waited for their cores
/// for no more than the rest of its time, or if it is late without that time.
const UNDISTURBED: f64 = 0.9;
/// What the switch may take once and keep: the memory of frames that wait.
const KEPT_BYTES: u64 = 24 << 20;
/// Trials of which one has to do.
const TRIALS: u32 = 3;
/// Slices before a measurement, for caches, learning, and what an attack is allowed at first.
const WARM_UP: usize = 5;
/// Time from one ping to the next: so rarely that they cost nothing.
const PING_INTERVAL: Duration = Duration::from_micros(200);
/// A ping that takes this long is lost.
const PING_LOST: Duration = Duration::from_millis(200);
/// One ping in so many goes to all.
const BROADCAST_EVERY: u64 = 8;
/// How soon everything is as it was once an attacker stops.
const RECOVERY: Duration = Duration::from_secs(1);

/// A source address lies here in a buffer, its last byte is the station.
const SOURCE_AT: usize = 12 + 11;
/// A ping's number lies here.
const NUMBER_AT: usize = 12 + 14;

/// L2 bytes of all frames.
const FRAME_BYTES: u32 = 64;

/// A switch for attacks: the worker never sleeps, so that nobody's waking up is measured; all
/// else is as by default.
pub(crate) fn lab() -> Lab {
    lab_with(|_| {})
}

pub(crate) fn lab_with(change: impl FnOnce(&mut SwitchConfig)) -> Lab {
    capture_log();
    Lab::with_config(|config| {
        config.idle = IdleConfig {
            spin: Duration::MAX,
            ..IdleConfig::DEFAULT
        };
        change(config);
    })
}

/// Something of each of [`INNOCENTS`].
type Of<T> = [T; INNOCENTS.len()];
/// Frames per second.
type Rates = Of<f64>;

/// What the innocents saw in one measurement.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// Frames per second of each that arrived at the others.
    rates: Rates,
    /// Times of all pings, ascending.
    pings: Vec<Duration>,
}

impl Pace {
    /// The time that 99 in 100 pings keep within.
    pub(crate) fn ping_p99(&self) -> Duration {
        self.pings[(self.pings.len() * 99).div_ceil(100) - 1]
    }

    /// What is left of another rate to whoever lost most of it.
    pub(crate) fn part_of(&self, alone: &Self) -> f64 {
        least_part(&self.rates, &alone.rates)
    }

    /// Whether the innocents have at least this part of the rate that they have alone, and their
    /// pings are in time; and the figures.
    fn is_undisturbed(&self, alone: &Self, least: f64, what: &str) -> (bool, String) {
        let (part, p99) = (self.part_of(alone), self.ping_p99());
        let figures = format!(
            "{what}: {part:.3} of {:.2} Mpps, ping p99 {p99:?} (alone {:?}), max {:?}, {} pings",
            alone.rates.iter().sum::<f64>() / 1e6,
            alone.ping_p99(),
            self.pings.last(),
            self.pings.len(),
        );
        eprintln!("{figures}");
        (
            part >= least && p99 <= alone.ping_p99() + LONGEST_PING,
            figures,
        )
    }
}

/// What is left of other rates to whoever lost most.
fn least_part(rates: &Rates, of: &Rates) -> f64 {
    let parts = rates.iter().zip(of).map(|(rate, of)| rate / of);
    parts.fold(f64::INFINITY, f64::min)
}

/// The guests, driven by the thread that made them.
pub(crate) struct Innocents {
    busy: Vec<Station>,
    ping: Ping,
    used: Box<[UsedSlot]>,
    first_waits: bool,
    /// Frames of each that arrived at the others.
    frames: Of<u64>,
    threads: Threads,
    _alone: MutexGuard<'static, ()>,
}

impl Innocents {
    /// Connects all, has the switch learn their addresses, and puts the calling thread on a core
    /// that is not the worker's, if there is one.
    pub(crate) fn new(lab: &Lab) -> Self {
        let alone = alone();
        if let Some(cpu) = core_affinity::get_core_ids().unwrap().get(1) {
            core_affinity::set_for_current(*cpu);
        }
        let connect = |station: u8| {
            let path = lab.add_port(&format!("station{station}"));
            Station::connect(&path, Shape::plain(Layout::Split, FRAME_BYTES))
        };
        let mut innocents = Self {
            busy: INNOCENTS.map(connect).into(),
            ping: Ping::new(connect(PING), connect(PONG)),
            used: vec![UsedSlot::default(); usize::from(RING_SIZE)].into(),
            first_waits: false,
            frames: [0; INNOCENTS.len()],
            threads: Threads::new(),
            _alone: alone,
        };
        innocents.introduce();
        for from in INNOCENTS {
            innocents.address(from);
        }
        innocents
    }

    /// A frame of each to all.
    fn introduce(&mut self) {
        for station in INNOCENTS {
            let sender = &mut self.busy[usize::from(station) - 1];
            sender.address([0xff; 6], mac(station));
            sender.tx.offer(1).unwrap();
            eventually("a hello is taken", || {
                sender.tx.ring.reclaim().unwrap() == 1
            });
        }
        for _ in 0..2 * BROADCAST_EVERY {
            let before = self.ping.times.len();
            eventually("a ping comes back", || {
                self.turn();
                self.ping.times.len() > before
            });
        }
        self.ping.times.clear();
    }

    /// Has one of them send to the others in turn.
    fn address(&mut self, from: u8) {
        let others = INNOCENTS.iter().filter(|to| **to != from);
        let to: Vec<u8> = others.copied().collect();
        let sender = &self.busy[usize::from(from) - 1];
        for slot in 0..sender.tx.ring.slots() {
            let to = to[usize::from(slot / RUN) % to.len()];
            let addresses = [mac(to), mac(from)];
            sender.tx.buffers.write(slot, 12, addresses.as_flattened());
        }
    }

    /// From now on the first of them sends bursts of 64 frames, each when all of the one before were
    /// taken.
    pub(crate) fn first_waits_for_its_frames(&mut self) {
        self.first_waits = true;
    }

    /// From now on the last of 64 frames of the first of them goes elsewhere.
    pub(crate) fn first_sends_also_to(&mut self, station: u8) {
        let sender = &self.busy[0];
        // Its first frame was a hello, so that each burst ends with such a slot.
        for slot in (0..RING_SIZE).step_by(BURST.into()) {
            sender.tx.buffers.write(slot, 12, &mac(station));
        }
    }

    /// Takes what arrived, fills all rings, and looks after the ping.
    fn turn(&mut self) {
        for (at, station) in self.busy.iter_mut().enumerate() {
            station.tx.ring.reclaim().unwrap();
            let free = station.tx.ring.free();
            let offered = match self.first_waits && at == 0 {
                false => free,
                true if free == RING_SIZE => BURST,
                true => 0,
            };
            station.tx.offer(offered).unwrap();
        }
        for at in 0..self.busy.len() {
            self.receive(at);
        }
        self.ping.turn(&mut self.used, &self.threads);
    }

    fn receive(&mut self, at: usize) {
        let station = &mut self.busy[at];
        let count = station.rx.ring.harvest(&mut self.used).unwrap();
        for used in &self.used[..count] {
            let mut source = [0];
            station.rx.buffers.read(used.slot, SOURCE_AT, &mut source);
            // Stations count from 1.
            if let Some(count) = self.frames.get_mut(usize::from(source[0].wrapping_sub(1))) {
                *count += 1;
            }
        }
        station.rx.offer(u16::MAX).unwrap();
    }

    /// Runs beside an attack, of which a step is taken each time round.
    pub(crate) fn pace(&mut self, mut attack: impl FnMut()) -> Pace {
        for _ in 0..WARM_UP {
            self.slice(&mut attack);
        }
        self.ping.times.clear();
        let slices: Vec<Rates> = (0..SLICES).map(|_| self.slice(&mut attack)).collect();
        let rates = std::array::from_fn(|at| {
            let mut rates: Vec<f64> = slices.iter().map(|rates| rates[at]).collect();
            rates.sort_by(f64::total_cmp);
            rates[SLICES / 2]
        });
        let start = Instant::now();
        while self.ping.times.is_empty() {
            assert!(start.elapsed() < DEADLINE, "no ping came back");
            attack();
            self.turn();
        }
        let mut pings = std::mem::take(&mut self.ping.times);
        pings.sort();
        Pace { rates, pings }
    }

    /// Runs without any attack.
    pub(crate) fn alone(&mut self) -> Pace {
        self.pace(|| {})
    }

    /// Measures alone and beside an attack: asserts that the innocents keep `least` of their rate and
    /// their pings, that all is as before within a second, and that the process holds no more than
    /// it did. Cores may be of another speed from one measurement to the next: there are three
    /// trials.
    #[track_caller]
    pub(crate) fn endure(&mut self, least: f64, what: &str, attack: impl FnMut()) {
        self.endure_after(|_| {}, least, what, attack);
    }

    /// The same where the attack takes a change of the innocents.
    #[track_caller]
    pub(crate) fn endure_after(
        &mut self,
        change: impl FnOnce(&mut Self),
        least: f64,
        what: &str,
        mut attack: impl FnMut(),
    ) {
        let mut alone = self.alone();
        change(self);
        let footprint = Footprint::now();
        for trial in 1.. {
            let beside = self.pace(&mut attack);
            let (is_undisturbed, figures) = beside.is_undisturbed(&alone, least, what);
            if is_undisturbed {
                break;
            }
            assert!(trial < TRIALS, "{figures}");
            alone = self.alone();
        }
        self.assert_recovers(&alone, what);
        footprint.assert_grown_below(KEPT_BYTES);
    }

    /// Asserts that within a second some slice is as fast as those without an attack.
    #[track_caller]
    pub(crate) fn assert_recovers(&mut self, alone: &Pace, what: &str) {
        let mut best = 0.0_f64;
        let mut passed = Duration::ZERO;
        while passed < RECOVERY {
            best = best.max(least_part(&self.slice(&mut || {}), &alone.rates));
            if best >= 0.9 {
                return;
            }
            passed += SLICE;
        }
        panic!("{what}: {best:.3} of the rate {RECOVERY:?} after the attack");
    }

    /// The rates of one slice.
    fn slice(&mut self, attack: &mut impl FnMut()) -> Rates {
        let begin = self.threads.times();
        let (mut moments, mut frames) = (Duration::ZERO, [0; INNOCENTS.len()]);
        loop {
            let (start, before) = (self.threads.times(), self.frames);
            while start.at.elapsed() < MOMENT {
                attack();
                self.turn();
            }
            let moment = self.threads.times().since(&start);
            if moment.is_undisturbed() {
                moments += moment.wall;
                frames = std::array::from_fn(|at| frames[at] + self.frames[at] - before[at]);
            }
            let all = self.threads.times().since(&begin);
            assert!(all.wall < DEADLINE, "the machine is too busy to measure");
            if moments >= SLICE || all.wall >= LONGEST_SLICE && !moments.is_zero() {
                let seconds = moments.as_secs_f64() / (1.0 - all.blocked_part());
                return frames.map(|frames| frames as f64 / seconds);
            }
        }
    }
}

/// Two guests with one frame on its way between them.
struct Ping {
    near: Station,
    far: Station,
    number: u64,
    sent: Option<Sent>,
    last: Instant,
    /// Of those that came back or were lost.
    times: Vec<Duration>,
}

struct Sent {
    at: Instant,
    waited: Duration,
}

impl Ping {
    fn new(near: Station, far: Station) -> Self {
        for station in [&near, &far] {
            station.address([0; 6], [0; 6]);
        }
        Self {
            near,
            far,
            number: 0,
            sent: None,
            last: Instant::now(),
            times: Vec::new(),
        }
    }

    fn turn(&mut self, used: &mut [UsedSlot], threads: &Threads) {
        if let Some(number) = take_from(&mut self.far, PING, used) {
            send(&mut self.far, [mac(PING), mac(PONG)], number);
        }
        let answer = take_from(&mut self.near, PONG, used);
        if let Some(sent) = &self.sent {
            let wall = sent.at.elapsed();
            if answer == Some(self.number) || wall >= PING_LOST {
                let machine = threads.waited().saturating_sub(sent.waited);
                let net = wall.saturating_sub(machine);
                // It was late all the same, or the machine had no part in it.
                if net > LONGEST_PING || net >= wall.mul_f64(UNDISTURBED) {
                    self.times.push(net);
                }
                self.sent = None;
            }
        } else if self.last.elapsed() >= PING_INTERVAL {
            self.number += 1;
            let to_all = self.number.is_multiple_of(BROADCAST_EVERY);
            let to = if to_all { [0xff; 6] } else { mac(PONG) };
            let waited = threads.waited();
            self.last = Instant::now();
            self.sent = Some(Sent {
                at: self.last,
                waited,
            });
            send(&mut self.near, [to, mac(PING)], self.number);
        }
    }
}

fn send(station: &mut Station, addresses: [[u8; 6]; 2], number: u64) {
    station.tx.ring.reclaim().unwrap();
    let slot = station.tx.ring.next_slot(0);
    station.tx.buffers.write(slot, 12, addresses.as_flattened());
    station
        .tx
        .buffers
        .write(slot, NUMBER_AT, &number.to_be_bytes());
    station.tx.offer(1).unwrap();
}

/// Takes all that arrived; the number of the last frame from a station.
fn take_from(station: &mut Station, from: u8, used: &mut [UsedSlot]) -> Option<u64> {
    let mut number = None;
    let count = station.rx.ring.harvest(used).unwrap();
    for used in &used[..count] {
        let (mut source, mut bytes) = ([0; 6], [0; 8]);
        station
            .rx
            .buffers
            .read(used.slot, SOURCE_AT - 5, &mut source);
        station.rx.buffers.read(used.slot, NUMBER_AT, &mut bytes);
        if source == mac(from) {
            number = Some(u64::from_be_bytes(bytes));
        }
    }
    if count > 0 {
        station.rx.offer(u16::MAX).unwrap();
    }
    number
}

/// What the kernel knows of the worker's thread and the calling one.
struct Threads {
    worker: libc::clockid_t,
    schedstats: [File; 2],
}

/// What both threads had since they started, and when.
struct Times {
    at: Instant,
    ran: [Duration; 2],
    /// The worker was ready to run and had no core.
    worker_waited: Duration,
}

/// What they had of some time.
struct Moment {
    wall: Duration,
    ran: [Duration; 2],
    worker_waited: Duration,
}

impl Times {
    fn since(&self, start: &Self) -> Moment {
        Moment {
            wall: self.at - start.at,
            ran: [0, 1].map(|i| self.ran[i].saturating_sub(start.ran[i])),
            worker_waited: self.worker_waited.saturating_sub(start.worker_waited),
        }
    }
}

impl Moment {
    /// Both had their cores.
    fn is_undisturbed(&self) -> bool {
        let least = self.wall.mul_f64(UNDISTURBED);
        self.ran.iter().all(|ran| *ran >= least)
    }

    /// The part in which the worker neither ran nor waited for its core.
    fn blocked_part(&self) -> f64 {
        let [worker_ran, _] = self.ran;
        let blocked = self.wall.saturating_sub(worker_ran + self.worker_waited);
        blocked.as_secs_f64() / self.wall.as_secs_f64()
    }
}

impl Threads {
    fn new() -> Self {
        let own = std::fs::canonicalize("/proc/thread-self").unwrap();
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let mut tasks = tasks.map(|task| task.unwrap().path());
        let is_worker = |task: &PathBuf| {
            let name = std::fs::read_to_string(task.join("comm"));
            name.is_ok_and(|name| name.starts_with("ringway-w0"))
        };
        let worker = tasks.find(is_worker).unwrap();
        let id: i32 = worker
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        Self {
            // The kernel's name of a thread's clock (CPUCLOCK_PERTHREAD, CPUCLOCK_SCHED).
            worker: !id << 3 | 6,
            schedstats: [worker, own].map(|task| File::open(task.join("schedstat")).unwrap()),
        }
    }

    fn times(&self) -> Times {
        let ran = [self.worker, libc::CLOCK_THREAD_CPUTIME_ID].map(|clock| {
            let mut time = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: `time` is a place for a time.
            let code = unsafe { libc::clock_gettime(clock, &raw mut time) };
            assert_eq!(code, 0, "no clock of the worker's");
            let [seconds, ns] = [time.tv_sec, time.tv_nsec].map(|n| u64::try_from(n).unwrap());
            Duration::from_secs(seconds) + Duration::from_nanos(ns)
        });
        Times {
            at: Instant::now(),
            ran,
            worker_waited: waited(&self.schedstats[0]),
        }
    }

    /// For how long the two were ready to run and had no core.
    fn waited(&self) -> Duration {
        self.schedstats.iter().map(waited).sum()
    }
}

fn waited(schedstat: &File) -> Duration {
    let mut text = [0; 64];
    let len = schedstat.read_at(&mut text, 0).unwrap();
    // On the CPU, ready without one, and slices.
    let text = std::str::from_utf8(&text[..len]).unwrap();
    let ns = text.split_ascii_whitespace().nth(1).unwrap();
    Duration::from_nanos(ns.parse().unwrap())
}
