//! What a run at full rate measures.

use std::hint;
use std::time::{Duration, Instant};

use super::guest::PairTurn;

/// How often a full-rate run looks whether the switch still lives.
const CHECK_EVERY: Duration = Duration::from_millis(20);
/// Pauses after a turn that found less than this many frames: looking at the rings less often costs
/// switch and load fewer cache misses (load busy 20 instead of 40 % of the time, the same rate).
const PAUSES: u32 = 16;
const FULL_TURN: u64 = 64;
/// Stretches of which the best is told; shorter than a scheduler's time slice.
const WINDOW: Duration = Duration::from_millis(2);

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

/// Measures a run while it goes on.
#[derive(Debug)]
pub(crate) struct Meter {
    pub(crate) result: MaxResult,
    start: Instant,
    end: Instant,
    /// Since when the turn lasts that is under way.
    now: Instant,
    next_check: Instant,
    last_frame: Instant,
    stretch: Stretch,
    waited: Duration,
}

impl Meter {
    /// Begins a run of this length.
    pub(crate) fn start(duration: Duration) -> Self {
        let waited = cpu_wait();
        let start = Instant::now();
        Self {
            result: MaxResult::default(),
            start,
            end: start + duration,
            now: start,
            next_check: start + CHECK_EVERY,
            last_frame: start,
            stretch: Stretch {
                start,
                received: 0,
                busy: Duration::ZERO,
            },
            waited,
        }
    }

    /// Notes what one turn of the load did, and pauses if it `moved` few frames.
    #[inline]
    pub(crate) fn note(&mut self, turn: PairTurn, moved: u64) {
        let turned = Instant::now();
        let result = &mut self.result;
        result.turns += 1;
        if turn.sent + turn.received == 0 {
            result.empty_turns += 1;
        } else {
            result.busy += turned - self.now;
        }
        result.sent += turn.sent;
        result.received += turn.received;
        result.bytes += turn.bytes;
        self.now = turned;
        if moved < FULL_TURN {
            (0..PAUSES).for_each(|_| hint::spin_loop());
            self.now = Instant::now();
        }
        if turn.received > 0 {
            self.last_frame = self.now;
        }
        result.longest_gap = result.longest_gap.max(self.now - self.last_frame);
        result.end_stretch(&mut self.stretch, self.now);
    }

    /// How long it has lasted.
    pub(crate) fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    pub(crate) fn is_over(&self) -> bool {
        self.now >= self.end
    }

    /// Whether to look if all is well, true every now and then.
    #[inline]
    pub(crate) fn is_time_to_check(&mut self) -> bool {
        let is_due = self.now >= self.next_check;
        if is_due {
            self.next_check = self.now + CHECK_EVERY;
        }
        is_due
    }

    /// Ends it.
    pub(crate) fn end(mut self) -> MaxResult {
        self.result.bytes -= 12 * self.result.received;
        self.result.elapsed = self.elapsed();
        self.result.waited_for_cpu = cpu_wait().saturating_sub(self.waited);
        self.result
    }
}

/// Time that the calling thread was ready to run and had no CPU, since it started.
pub(crate) fn cpu_wait() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let wait = text.split_whitespace().nth(1);
    Duration::from_nanos(wait.and_then(|ns| ns.parse().ok()).unwrap_or(0))
}
