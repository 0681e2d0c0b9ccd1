//! The load: pairs of guests on one thread, each guest sending to its partner.

use std::hint;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ringway_dataplane::driver::Frontend;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::error::LoadError;
use super::frame::{Route, Stamp, Style, Template, guest_mac};
use super::guest::{Listener, LoadGuest, Shape, memory_bytes};
use crate::interrupt;

/// How long the first frame may take: a switch learns, a back-end starts its queues.
const FIRST_FRAME: Duration = Duration::from_secs(5);
/// How often a full-rate run looks whether the switch still lives.
const CHECK_EVERY: Duration = Duration::from_millis(20);
/// Pauses after a turn that found less than this many frames: looking at the rings less often costs
/// switch and load fewer cache misses (load busy 20 instead of 40 % of the time, the same rate).
const PAUSES: u32 = 16;
const FULL_TURN: u64 = 64;
/// Stretches of which the best is told; shorter than a scheduler's time slice.
const WINDOW: Duration = Duration::from_millis(2);
/// A switch that passes nothing for so long has stalled; it may still be setting itself up in the
/// warm-up, which is repeated for as long as [`FIRST_FRAME`].
const STALL: Duration = Duration::from_millis(250);
/// How long frames on their way may stay unseen before they count as lost.
pub(crate) const SETTLE: Duration = Duration::from_millis(50);

/// Bytes of a frame and the header in front of it that tell route and stamp, with TCP's header
/// between.
pub(crate) const HEAD: usize = 12 + 14 + 20 + 20 + Stamp::BYTES;

/// What the load is made of.
#[derive(Clone, Debug)]
pub(crate) struct LoadConfig {
    /// Sockets of the switch, two per pair of guests.
    pub(crate) sockets: Vec<PathBuf>,
    /// The guests listen there and the switch connects.
    pub(crate) listen: bool,
    pub(crate) shape: Shape,
    /// Sizes of the frames, taken in turn.
    pub(crate) sizes: Vec<u32>,
    pub(crate) style: Style,
    pub(crate) flows: u16,
    /// Compare every byte that arrives.
    pub(crate) verify: bool,
}

impl LoadConfig {
    /// Frames that this guest sends, one template per size.
    fn templates(&self, guest: u16) -> Vec<Template> {
        let route = Route {
            from: guest_mac(guest),
            to: guest_mac(guest ^ 1),
        };
        self.sizes
            .iter()
            .map(|size| Template::new(route, *size, self.style))
            .collect()
    }

    /// A session for each guest.
    fn frontends(&self) -> Result<Vec<Frontend>, LoadError> {
        if !self.listen {
            let connect = |path: &PathBuf| Ok(Frontend::connect(path)?);
            return self.sockets.iter().map(connect).collect();
        }
        let listeners: Vec<Listener> = self
            .sockets
            .iter()
            .map(|path| Listener::bind(path))
            .collect::<Result<_, _>>()?;
        listeners.iter().map(Listener::accept).collect()
    }

    /// Bytes of memory that all guests need together.
    pub(crate) fn memory_bytes(&self, guests: u16) -> u64 {
        memory_bytes(self.shape, &self.templates(0)) * u64::from(guests)
    }
}

/// What a full-rate run measured.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MaxResult {
    pub(crate) elapsed: Duration,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// L2 bytes received.
    pub(crate) bytes: u64,
    /// Time in turns of the load that moved frames.
    pub(crate) busy: Duration,
    /// Turns of the load, and those that found nothing.
    pub(crate) turns: u64,
    pub(crate) empty_turns: u64,
    /// Longest time without a frame.
    pub(crate) longest_gap: Duration,
    /// Most frames per second over [`WINDOW`], and the load's time per frame there: what both can
    /// do while nobody takes their cores away.
    pub(crate) best_pps: f64,
    pub(crate) best_ns_per_frame: f64,
    /// Time that the load was ready to run and had no CPU.
    pub(crate) waited_for_cpu: Duration,
    /// A guest to which nothing came.
    pub(crate) silent_guest: Option<usize>,
    /// Frames that came to the wrong guest, of those that were looked at.
    pub(crate) foreign: u64,
}

/// A short stretch of a run.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    start: Instant,
    received: u64,
    busy: Duration,
}

impl MaxResult {
    /// Frames received per second.
    pub(crate) fn pps(&self) -> f64 {
        self.received as f64 / self.elapsed.as_secs_f64()
    }

    /// L2 bits received per second.
    pub(crate) fn bits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64()
    }

    /// Share of time in which the load moved frames.
    pub(crate) fn busy_share(&self) -> f64 {
        self.busy.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Time of the load per frame, sending and receiving together.
    pub(crate) fn load_ns_per_frame(&self) -> f64 {
        self.busy.as_nanos() as f64 / self.received.max(1) as f64
    }

    /// Share of sent frames that did not arrive, not counting those on their way at both ends.
    pub(crate) fn loss(&self) -> f64 {
        (1.0 - self.received as f64 / self.sent.max(1) as f64).max(0.0)
    }

    /// Share of time that others kept the load off its CPU.
    pub(crate) fn disturbed_share(&self) -> f64 {
        self.waited_for_cpu.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Notes a stretch that ends now, if it is long enough.
    fn end_stretch(&mut self, stretch: &mut Stretch, now: Instant) {
        let took = now - stretch.start;
        if took < WINDOW {
            return;
        }
        let frames = self.received - stretch.received;
        let pps = frames as f64 / took.as_secs_f64();
        if pps > self.best_pps {
            self.best_pps = pps;
            let busy = self.busy - stretch.busy;
            self.best_ns_per_frame = busy.as_nanos() as f64 / frames as f64;
        }
        *stretch = Stretch {
            start: now,
            received: self.received,
            busy: self.busy,
        };
    }
}

/// Guests that are connected; 2n and 2n + 1 are partners.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) guests: Vec<LoadGuest>,
    /// Frames that each guest sends, one template per size.
    pub(crate) templates: Vec<Vec<Template>>,
    /// Runs with stamped frames so far.
    pub(crate) runs: u8,
    verify: bool,
}

impl Load {
    /// Connects all guests and waits until each one's frames arrive.
    pub(crate) fn connect(config: &LoadConfig) -> Result<Self, LoadError> {
        let count = u16::try_from(config.sockets.len()).unwrap_or(u16::MAX);
        let templates: Vec<_> = (0..count).map(|guest| config.templates(guest)).collect();
        let guests = config
            .frontends()?
            .into_iter()
            .zip(&templates)
            .map(|(frontend, frames)| {
                LoadGuest::start(frontend, config.shape, frames, config.flows)
            })
            .collect::<Result<_, _>>()?;
        let mut load = Self {
            guests,
            templates,
            runs: 0,
            verify: config.verify,
        };
        load.teach()?;
        Ok(load)
    }

    /// Sends frames from each guest until each has heard its partner: the switch knows all then.
    fn teach(&mut self) -> Result<(), LoadError> {
        let start = Instant::now();
        let mut heard = vec![false; self.guests.len()];
        let mut unsegmented = false;
        let mut next = Duration::ZERO;
        while heard.contains(&false) {
            if start.elapsed() > FIRST_FRAME {
                self.check_alive()?;
                return Err(if unsegmented {
                    LoadError::Unsegmented
                } else {
                    LoadError::NoTraffic(FIRST_FRAME)
                });
            }
            if start.elapsed() >= next {
                interrupt::check()?;
                // A few at a time: unknown destinations are flooded.
                next += Duration::from_millis(5);
                for pair in self.guests.iter_mut().flat_map(|guest| &mut guest.pairs) {
                    pair.tx.reclaim()?;
                    pair.transmit(4)?;
                }
            }
            for (i, guest) in self.guests.iter_mut().enumerate() {
                let expected = &self.templates[i ^ 1];
                for pair in &mut guest.pairs {
                    pair.receive(|frame| {
                        let whole = |t: &Template| t.matches(frame) && t.keeps_segmentation(frame);
                        heard[i] |= expected.iter().any(whole);
                        unsegmented |= expected.iter().any(|t| t.came_unsegmented(frame));
                    })?;
                }
            }
        }
        self.drain(SETTLE)
    }

    /// Receives and forgets until nothing came for `quiet`.
    pub(crate) fn drain(&mut self, quiet: Duration) -> Result<(), LoadError> {
        let mut last = Instant::now();
        while last.elapsed() < quiet {
            for pair in self.guests.iter_mut().flat_map(|guest| &mut guest.pairs) {
                pair.tx.reclaim()?;
                if pair.receive(|_| ())? > 0 {
                    last = Instant::now();
                }
            }
        }
        self.check_alive()
    }

    /// Fails once the switch has gone, or when the run is to end.
    pub(crate) fn check_alive(&self) -> Result<(), LoadError> {
        interrupt::check()?;
        self.guests.iter().try_for_each(LoadGuest::check_alive)
    }

    /// Sends at full rate, unmeasured, until the switch forwards steadily.
    pub(crate) fn warm_up(&mut self, warm_up: Duration) -> Result<(), LoadError> {
        let start = Instant::now();
        while self.full_rate(warm_up)?.longest_gap > STALL.min(warm_up / 2) {
            if start.elapsed() > FIRST_FRAME {
                return Err(LoadError::NoTraffic(STALL));
            }
        }
        Ok(())
    }

    /// Sends as fast as frames are taken, both ways, for `duration`. A switch that stalls, leaves
    /// a guest out or floods is no slow one: it broke the run.
    pub(crate) fn run_max(&mut self, duration: Duration) -> Result<MaxResult, LoadError> {
        let result = self.full_rate(duration)?;
        if result.longest_gap > STALL {
            return Err(LoadError::NoTraffic(result.longest_gap));
        }
        if let Some(guest) = result.silent_guest {
            return Err(LoadError::OneWay(guest));
        }
        if result.foreign > 0 {
            return Err(LoadError::Flooded(result.foreign));
        }
        if self.verify {
            self.check_frames()?;
        }
        Ok(result)
    }

    fn full_rate(&mut self, duration: Duration) -> Result<MaxResult, LoadError> {
        let mut result = MaxResult::default();
        let waited = cpu_wait();
        let start = Instant::now();
        let (mut now, mut next_check, mut last_frame) = (start, start + CHECK_EVERY, start);
        let mut stretch = Stretch {
            start,
            received: 0,
            busy: Duration::ZERO,
        };
        let mut received_by = vec![0; self.guests.len()];
        let end = start + duration;
        while now < end {
            let (mut sent, mut received) = (0, 0);
            for (guest, received_by) in self.guests.iter_mut().zip(&mut received_by) {
                for pair in &mut guest.pairs {
                    let turn = pair.turn()?;
                    sent += turn.sent;
                    received += turn.received;
                    *received_by += turn.received;
                    result.bytes += turn.bytes;
                }
            }
            let turned = Instant::now();
            result.turns += 1;
            if sent + received == 0 {
                result.empty_turns += 1;
            } else {
                result.busy += turned - now;
            }
            result.sent += sent;
            result.received += received;
            now = turned;
            if received < FULL_TURN {
                (0..PAUSES).for_each(|_| hint::spin_loop());
                now = Instant::now();
            }
            if received > 0 {
                last_frame = now;
            }
            result.longest_gap = result.longest_gap.max(now - last_frame);
            result.end_stretch(&mut stretch, now);
            if now >= next_check {
                next_check = now + CHECK_EVERY;
                self.check_alive()?;
                self.check_routes(&mut result)?;
            }
        }
        result.bytes -= 12 * result.received;
        result.elapsed = now - start;
        result.waited_for_cpu = cpu_wait().saturating_sub(waited);
        result.silent_guest = received_by.iter().position(|received| *received == 0);
        Ok(result)
    }

    /// Looks at the addresses of what comes next at each queue: a sample, so that it costs nothing.
    fn check_routes(&mut self, result: &mut MaxResult) -> Result<(), LoadError> {
        let mut head = [0; HEAD];
        for (i, guest) in self.guests.iter_mut().enumerate() {
            let expected = &self.templates[i ^ 1][0];
            for pair in &mut guest.pairs {
                let foreign = &mut result.foreign;
                let turn = pair.peek(&mut head, |head| {
                    *foreign += u64::from(!expected.is_on_route(head));
                })?;
                result.received += turn.received;
                result.bytes += turn.bytes;
            }
        }
        Ok(())
    }

    /// Compares what arrives with what was sent, for a while at full rate.
    fn check_frames(&mut self) -> Result<(), LoadError> {
        let end = Instant::now() + Duration::from_millis(200);
        let mut corrupt = 0;
        while Instant::now() < end {
            for (i, guest) in self.guests.iter_mut().enumerate() {
                let expected = &self.templates[i ^ 1];
                for pair in &mut guest.pairs {
                    pair.tx.reclaim()?;
                    pair.transmit(32)?;
                    pair.receive(|frame| {
                        let whole = |t: &Template| t.matches(frame) && t.keeps_segmentation(frame);
                        corrupt += u64::from(!expected.iter().any(whole));
                    })?;
                }
            }
        }
        if corrupt > 0 {
            return Err(LoadError::Corrupt(corrupt));
        }
        Ok(())
    }
}

/// Time that the calling thread was ready to run and had no CPU, since it started.
pub(crate) fn cpu_wait() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let wait = text.split_whitespace().nth(1);
    Duration::from_nanos(wait.and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

/// Pins the calling thread to a CPU.
pub(crate) fn pin(cpu: usize) -> std::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None::<Pid>, &set)?)
}

/// CPUs that this process may run on.
pub(crate) fn allowed_cpus() -> std::io::Result<Vec<usize>> {
    let set = sched_getaffinity(None::<Pid>)?;
    Ok((0..CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .collect())
}
