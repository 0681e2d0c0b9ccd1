//! A run at an offered rate in open loop, without clock and rings: which frames are due, what became
//! of them, and how long each took.
//!
//! Frame n of a guest is due at n / rate after the start, carries that time, and is sent as soon as
//! it has come. When the switch or the load falls behind, the waiting counts as latency instead of
//! vanishing from the sample (coordinated omission), and the rate stays what was asked for.

use std::time::Duration;

use hdrhistogram::Histogram;

use super::frame::Stamp;
use crate::stats::whole;

/// How far back a late frame is told from one that came twice, in frames.
const WINDOW: u64 = 1 << 16;
/// Longest latency that is told apart: 60 s.
const MAX_LATENCY_NS: u64 = 60_000_000_000;
/// The queue in which a frame was sent lies above this bit of its sequence number: switches keep
/// the order of frames of a queue, not that of a guest's.
const QUEUE_SHIFT: u32 = 48;
/// The number of the run lies above this one, so that stragglers of an earlier run are told apart.
const RUN_SHIFT: u32 = 40;

/// What became of the frames of a route.
#[derive(Clone, Debug, Default)]
struct Tracker {
    seen: Vec<u64>,
    /// One above the highest sequence number.
    next: u64,
    unique: u64,
    duplicated: u64,
    reordered: u64,
    /// Came so late that they can't be told from duplicates.
    ancient: u64,
}

impl Tracker {
    /// Notes that a frame arrived.
    fn arrived(&mut self, sequence: u64) {
        self.seen.resize((WINDOW / 64) as usize, 0);
        if sequence + WINDOW < self.next {
            self.ancient += 1;
            return;
        }
        if sequence >= self.next {
            // Places that come into the window are unseen.
            for fresh in self.next.max(sequence.saturating_sub(WINDOW))..=sequence {
                let (word, bit) = Self::place(fresh);
                self.seen[word] &= !bit;
            }
            self.next = sequence + 1;
        } else {
            self.reordered += 1;
        }
        let (word, bit) = Self::place(sequence);
        if self.seen[word] & bit != 0 {
            self.duplicated += 1;
            self.reordered -= 1;
        } else {
            self.seen[word] |= bit;
            self.unique += 1;
        }
    }

    fn place(sequence: u64) -> (usize, u64) {
        let at = sequence % WINDOW;
        ((at / 64) as usize, 1 << (at % 64))
    }
}

/// What a run at an offered rate measured, over all routes.
#[derive(Debug)]
pub(crate) struct RateResult {
    pub(crate) offered: u64,
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) duplicated: u64,
    pub(crate) reordered: u64,
    /// Came so late that they can't be told from duplicates.
    pub(crate) ancient: u64,
    /// Frames that are not the load's, or were changed.
    pub(crate) foreign: u64,
    pub(crate) latency: Histogram<u64>,
    /// Of the load: times in which it did not look at its rings.
    pub(crate) stalls: Stalls,
    pub(crate) elapsed: Duration,
    /// Time in turns that moved frames.
    pub(crate) busy: Duration,
    /// Time that the load was ready to run and had no CPU.
    pub(crate) waited_for_cpu: Duration,
}

impl RateResult {
    /// Share of time in which the load moved frames.
    pub(crate) fn busy_share(&self) -> f64 {
        self.busy.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Share of time that others kept the load off its CPU.
    pub(crate) fn disturbed_share(&self) -> f64 {
        self.waited_for_cpu.as_secs_f64() / self.elapsed.as_secs_f64()
    }

    /// Share of the frames that took a stall's time or more, whoever stalled.
    pub(crate) fn late_share(&self) -> f64 {
        let late = self
            .latency
            .count_between(nanos(Stalls::SHORTEST), u64::MAX);
        late as f64 / self.latency.len().max(1) as f64
    }

    /// Frames that were sent and never arrived.
    pub(crate) fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }
}

/// Times in which the load did not run: turns that took far longer than any work of theirs. The
/// machine has them, whatever the switch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stalls {
    pub(crate) count: u64,
    pub(crate) longest: Duration,
    pub(crate) sum: Duration,
}

impl Stalls {
    /// A turn works for microseconds; a scheduler's or a hypervisor's stall takes this or more.
    pub(crate) const SHORTEST: Duration = Duration::from_millis(1);

    /// Notes the time from one turn to the next.
    #[inline]
    pub(super) fn note(&mut self, turn: Duration) {
        if turn >= Self::SHORTEST {
            self.count += 1;
            self.longest = self.longest.max(turn);
            self.sum += turn;
        }
    }
}

/// When the frames of a guest are due.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    /// Frames per second; infinite if as many as are taken.
    rate: f64,
    duration: Duration,
    /// How many there are.
    frames: u64,
}

impl Schedule {
    fn new(rate: f64, duration: Duration) -> Self {
        Self {
            rate,
            duration,
            frames: whole(duration.as_secs_f64() * rate),
        }
    }

    /// The first nanosecond at which a frame is due.
    fn due_ns(&self, frame: u64) -> u64 {
        whole((frame as f64 * 1e9 / self.rate).ceil())
    }

    /// How many frames are due by now: those whose time has come, the first at once. At an endless
    /// rate none once the run is over.
    fn due(&self, now: Duration) -> u64 {
        if self.rate.is_infinite() {
            return if now < self.duration { self.frames } else { 0 };
        }
        let now_ns = nanos(now);
        let mut due = whole(now_ns as f64 * self.rate / 1e9);
        // What is due at this very nanosecond may lie on either side of the rounding.
        while due > 0 && self.due_ns(due - 1) > now_ns {
            due -= 1;
        }
        while due < self.frames && self.due_ns(due) <= now_ns {
            due += 1;
        }
        due.min(self.frames)
    }
}

/// The sending side of a route: one guest's queues in turn.
#[derive(Clone, Debug, Default)]
struct RateSource {
    sent: u64,
    queue: usize,
    /// Frames sent by each queue.
    by_queue: Vec<u64>,
}

/// A run at an offered rate while it goes on.
#[derive(Debug)]
pub(super) struct RateRun {
    number: u8,
    /// Of each guest.
    schedule: Schedule,
    /// By guest.
    sources: Vec<RateSource>,
    /// By receiving guest and sending queue.
    trackers: Vec<Vec<Tracker>>,
    pub(super) foreign: u64,
    latency: Histogram<u64>,
}

impl RateRun {
    /// A run in which so many guests with so many queues offer `rate` in sum, equally.
    pub(super) fn new(
        number: u8,
        rate: f64,
        duration: Duration,
        (guests, queues): (usize, usize),
    ) -> Self {
        let source = RateSource {
            by_queue: vec![0; queues],
            ..RateSource::default()
        };
        Self {
            number,
            schedule: Schedule::new(rate / guests as f64, duration),
            sources: vec![source; guests],
            trackers: vec![vec![Tracker::default(); queues]; guests],
            foreign: 0,
            latency: histogram(),
        }
    }

    /// How many frames each guest should have sent by now.
    pub(super) fn due(&self, now: Duration) -> u64 {
        self.schedule.due(now)
    }

    /// The queue by which a guest sends next; `None` while it has sent all that is due.
    pub(super) fn next_queue(&mut self, guest: usize, due: u64) -> Option<usize> {
        let source = &mut self.sources[guest];
        if source.sent >= due {
            return None;
        }
        source.queue = (source.queue + 1) % source.by_queue.len();
        Some(source.queue)
    }

    /// Takes the frames that a guest is to send now by that queue, at most as many as there is room
    /// for, and gives each one's stamp and its place among them. Returns how many.
    pub(super) fn take_due(
        &mut self,
        guest: usize,
        due: u64,
        room: usize,
        mut each: impl FnMut(u16, Stamp),
    ) -> u16 {
        let source = &mut self.sources[guest];
        let count = due.saturating_sub(source.sent).min(room as u64);
        // No ring holds more.
        let count = u16::try_from(count).unwrap_or(0);
        let in_queue = (source.queue as u64) << QUEUE_SHIFT
            | u64::from(self.number) << RUN_SHIFT
            | source.by_queue[source.queue];
        for ahead in 0..count {
            let stamp = Stamp {
                sequence: in_queue + u64::from(ahead),
                due_ns: self.schedule.due_ns(source.sent + u64::from(ahead)),
            };
            each(ahead, stamp);
        }
        source.sent += u64::from(count);
        source.by_queue[source.queue] += u64::from(count);
        count
    }

    /// Notes a frame that arrived at a guest, at this time of the run in nanoseconds. Stragglers of
    /// an earlier run don't count.
    pub(super) fn arrived(&mut self, guest: usize, stamp: Stamp, arrival_ns: u64) {
        let (queue, of_run, number) = split_sequence(stamp.sequence);
        if of_run != self.number {
            return;
        }
        let Some(tracker) = self.trackers[guest].get_mut(queue) else {
            self.foreign += 1;
            return;
        };
        tracker.arrived(number);
        let took = arrival_ns.saturating_sub(stamp.due_ns);
        self.latency.saturating_record(took);
    }

    /// Whether a guest has not sent yet what is due.
    pub(super) fn is_behind(&self, due: u64) -> bool {
        self.sources.iter().any(|source| source.sent < due)
    }

    pub(super) fn sent(&self) -> u64 {
        self.sources.iter().map(|source| source.sent).sum()
    }

    /// Whether frames that were sent have not arrived.
    pub(super) fn is_missing_some(&self) -> bool {
        self.sum(|tracker| tracker.unique) < self.sent()
    }

    fn sum(&self, of: fn(&Tracker) -> u64) -> u64 {
        self.trackers.iter().flatten().map(of).sum()
    }

    /// What became of the frames; how long it took is for the caller to tell.
    pub(super) fn end(self) -> RateResult {
        let guests = self.sources.len() as u64;
        RateResult {
            offered: self.schedule.frames.saturating_mul(guests),
            sent: self.sent(),
            received: self.sum(|t| t.unique),
            duplicated: self.sum(|t| t.duplicated),
            reordered: self.sum(|t| t.reordered),
            ancient: self.sum(|t| t.ancient),
            foreign: self.foreign,
            latency: self.latency,
            stalls: Stalls::default(),
            elapsed: Duration::ZERO,
            busy: Duration::ZERO,
            waited_for_cpu: Duration::ZERO,
        }
    }
}

/// An empty histogram of nanoseconds, three digits.
pub(super) fn histogram() -> Histogram<u64> {
    // The bounds are constants that it accepts.
    Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).unwrap_or_else(|_| unreachable!())
}

/// The duration in nanoseconds.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Queue, run, and number in both.
fn split_sequence(sequence: u64) -> (usize, u8, u64) {
    // A queue's number has 16 bits.
    let queue = usize::try_from(sequence >> QUEUE_SHIFT).unwrap_or(usize::MAX);
    let run = sequence.to_be_bytes()[2];
    (queue, run, sequence & ((1 << RUN_SHIFT) - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track(sequences: impl IntoIterator<Item = u64>) -> (u64, u64, u64, u64) {
        let mut tracker = Tracker::default();
        for sequence in sequences {
            tracker.arrived(sequence);
        }
        (
            tracker.unique,
            tracker.duplicated,
            tracker.reordered,
            tracker.ancient,
        )
    }

    #[test]
    fn loss_duplication_and_reordering_are_told_apart() {
        assert_eq!(track([0, 1, 2, 3]), (4, 0, 0, 0));
        assert_eq!(track([0, 2, 3]), (3, 0, 0, 0));
        assert_eq!(track([0, 2, 1, 3]), (4, 0, 1, 0));
        assert_eq!(track([0, 1, 1, 2, 0]), (3, 2, 0, 0));
        assert_eq!(track([0, 3, 1, 1, 2]), (4, 1, 2, 0));
    }

    #[test]
    fn a_sequence_number_tells_its_queue_and_run() {
        let sequence = 3 << QUEUE_SHIFT | 5 << RUN_SHIFT | 77;
        assert_eq!(split_sequence(sequence), (3, 5, 77));
        assert_eq!(split_sequence(u64::MAX), (0xffff, 0xff, (1 << 40) - 1));
    }

    #[test]
    fn frames_of_this_run_count_by_queue_and_others_do_not() {
        let mut run = RateRun::new(5, 100.0, Duration::from_secs(1), (2, 2));
        for (queue, number_of_run, number) in [(0, 5, 0), (1, 5, 0), (0, 4, 1), (2, 5, 0)] {
            let sequence = queue << QUEUE_SHIFT | number_of_run << RUN_SHIFT | number;
            let due_ns = 1_000;
            run.arrived(1, Stamp { sequence, due_ns }, 2_000);
        }
        let result = run.end();
        assert_eq!((result.received, result.foreign), (2, 1));
        assert_eq!((result.offered, result.latency.max()), (100, 1_000));
    }

    #[test]
    fn what_is_due_begins_at_once_and_ends_with_the_run() {
        let second = Duration::from_secs(1);
        let due = |rate, now| RateRun::new(0, rate, second, (2, 1)).due(now);
        assert_eq!(due(100.0, Duration::ZERO), 1);
        assert_eq!(due(100.0, Duration::from_nanos(19_999_999)), 1);
        assert_eq!(due(100.0, Duration::from_millis(20)), 2);
        assert_eq!(due(100.0, second / 2), 26);
        assert_eq!(due(100.0, second * 2), 50);
        assert_eq!(due(0.5, second / 2), 0);
        assert_eq!(due(f64::INFINITY, second / 2), u64::MAX);
        assert_eq!(due(f64::INFINITY, second), 0);
    }

    /// Two guests in virtual time, through a switch that takes none: the load looks at the clock at
    /// each of these times.
    fn through_no_switch(
        rate: f64,
        duration: Duration,
        looks: impl Iterator<Item = u64>,
    ) -> RateResult {
        let mut run = RateRun::new(1, rate, duration, (2, 1));
        for now_ns in looks {
            let due = run.due(Duration::from_nanos(now_ns));
            for guest in [0, 1] {
                while run.next_queue(guest, due).is_some() {
                    let mut arriving = Vec::new();
                    run.take_due(guest, due, 64, |_, stamp| arriving.push(stamp));
                    for stamp in arriving {
                        run.arrived(guest ^ 1, stamp, now_ns);
                    }
                }
            }
        }
        run.end()
    }

    #[test]
    fn a_switch_of_no_delay_has_a_latency_of_nothing_at_any_rate() {
        let duration = Duration::from_micros(200);
        for rate in [10_000.0, 30_000.0, 100_000.0, 7e6, 60e6] {
            let result = through_no_switch(rate, duration, 0..=nanos(duration));
            assert_eq!(result.latency.max(), 0, "{rate} frames/s");
            assert!(result.offered > 0, "{rate} frames/s");
            assert_eq!(
                (result.sent, result.received),
                (result.offered, result.offered)
            );
        }
    }

    #[test]
    fn a_stall_of_the_sender_shows_in_the_frames_that_were_due_in_it_and_not_in_the_rate() {
        // 50 frames a millisecond from each guest; the load is away from 10 to 35 ms.
        let (rate, duration) = (100_000.0, Duration::from_millis(100));
        let (away, back) = (10_000_000, 35_000_000);
        let looks = (0..=nanos(duration))
            .step_by(1_000)
            .filter(|now| !(away..back).contains(now));
        let result = through_no_switch(rate, duration, looks);
        assert_eq!((result.offered, result.received), (10_000, 10_000));
        assert_eq!(result.latency.len(), 10_000);
        let late = |longer_than| result.latency.count_between(longer_than, u64::MAX);
        // Due at 10.00, 10.02 … 34.98 ms: 1,250 of each guest, all but the last 50 by 1 ms or more.
        assert_eq!(late(1), 2 * 1_250);
        assert_eq!(late(1_010_000), 2 * 1_200);
        let longest = result.latency.max();
        assert!(
            result.latency.equivalent(longest, back - away),
            "{longest} ns"
        );
    }

    #[test]
    fn the_window_moves_on_and_forgets() {
        let twice = (0..200_000).chain([199_999, 1]);
        assert_eq!(track(twice), (200_000, 1, 0, 1));
        assert_eq!(track([0, WINDOW * 3, WINDOW * 3 - 1]), (3, 0, 1, 0));
    }
}
