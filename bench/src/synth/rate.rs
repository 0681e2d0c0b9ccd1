//! Runs at an offered rate, in open loop, and request-response runs.
//!
//! A frame carries the time at which it was due, not that at which it was sent: when the switch or
//! the load falls behind, the waiting counts as latency instead of vanishing from the sample.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::error::LoadError;
use super::frame::Stamp;
use super::guest::BURST;
use super::load::{HEAD, Load};
use super::meter::cpu_wait;
use crate::stats::whole;

/// How far back a late frame is told from one that came twice, in frames.
const WINDOW: u64 = 1 << 16;
/// Longest latency that is told apart: 60 s.
const MAX_LATENCY_NS: u64 = 60_000_000_000;
/// How long an answer may take in a request-response run.
const ANSWER: Duration = Duration::from_secs(2);
/// Turns between two looks at the sockets.
const CHECK_EVERY_TURNS: u32 = 1 << 14;
/// The queue in which a frame was sent lies above this bit of its sequence number: switches keep
/// the order of frames of a queue, not that of a guest's.
const QUEUE_SHIFT: u32 = 48;
/// The number of the run lies above this one, so that stragglers of an earlier run are told apart.
const RUN_SHIFT: u32 = 40;
/// How long frames that are missing at the end may take: a switch may be off its core for a while.
const LATE: Duration = Duration::from_millis(500);

/// What became of the frames of a route.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tracker {
    seen: Vec<u64>,
    /// One above the highest sequence number.
    next: u64,
    pub(crate) unique: u64,
    pub(crate) duplicated: u64,
    pub(crate) reordered: u64,
    /// Came so late that they can't be told from duplicates.
    pub(crate) ancient: u64,
}

impl Tracker {
    /// Notes that a frame arrived.
    pub(crate) fn arrived(&mut self, sequence: u64) {
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

    /// Frames that were sent and never arrived.
    pub(crate) fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received)
    }
}

/// What a request-response run measured.
#[derive(Debug)]
pub(crate) struct EchoResult {
    pub(crate) elapsed: Duration,
    pub(crate) transactions: u64,
    pub(crate) round_trip: Histogram<u64>,
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
struct RateRun {
    number: u8,
    /// Frames per second that each guest offers; infinite if as many as are taken.
    per_guest: f64,
    duration: Duration,
    start: Instant,
    /// By guest.
    sources: Vec<RateSource>,
    /// By receiving guest and sending queue.
    trackers: Vec<Vec<Tracker>>,
    foreign: u64,
    latency: Histogram<u64>,
}

impl RateRun {
    fn start(number: u8, rate: f64, duration: Duration, (guests, queues): (usize, usize)) -> Self {
        let source = RateSource {
            by_queue: vec![0; queues],
            ..RateSource::default()
        };
        Self {
            number,
            per_guest: rate / guests as f64,
            duration,
            start: Instant::now(),
            sources: vec![source; guests],
            trackers: vec![vec![Tracker::default(); queues]; guests],
            foreign: 0,
            latency: histogram(),
        }
    }

    /// Frames that each guest should have sent by now; at an endless rate none once the run is
    /// over.
    fn due(&self, now: Duration) -> u64 {
        if self.per_guest.is_finite() || now < self.duration {
            whole(now.min(self.duration).as_secs_f64() * self.per_guest)
        } else {
            0
        }
    }

    /// Notes a frame that arrived at a guest, at this time of the run in nanoseconds. Stragglers of
    /// an earlier run don't count.
    fn arrived(&mut self, guest: usize, stamp: Stamp, arrival_ns: u64) {
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
        self.latency.saturating_record(took.max(1));
    }

    /// Whether a guest has not sent yet what is due.
    fn is_behind(&self, due: u64) -> bool {
        self.sources.iter().any(|source| source.sent < due)
    }

    fn sent(&self) -> u64 {
        self.sources.iter().map(|source| source.sent).sum()
    }

    fn sum(&self, of: fn(&Tracker) -> u64) -> u64 {
        self.trackers.iter().flatten().map(of).sum()
    }

    /// What became of the frames; how long it took is for the caller to tell.
    fn end(self) -> RateResult {
        let per_guest = whole(self.duration.as_secs_f64() * self.per_guest);
        RateResult {
            offered: per_guest.saturating_mul(self.sources.len() as u64),
            sent: self.sent(),
            received: self.sum(|t| t.unique),
            duplicated: self.sum(|t| t.duplicated),
            reordered: self.sum(|t| t.reordered),
            ancient: self.sum(|t| t.ancient),
            foreign: self.foreign,
            latency: self.latency,
            elapsed: Duration::ZERO,
            busy: Duration::ZERO,
            waited_for_cpu: Duration::ZERO,
        }
    }
}

/// An empty histogram of nanoseconds, three digits.
fn histogram() -> Histogram<u64> {
    // The bounds are constants that it accepts.
    Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).unwrap_or_else(|_| unreachable!())
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Load {
    /// Frames per second that arrive when guests offer as many as are taken, stamped as those of
    /// [`Load::run_rate`]: it costs the load and the switch more than frames that lie ready.
    pub(crate) fn stamped_maximum(&mut self, duration: Duration) -> Result<f64, LoadError> {
        let result = self.run_rate(f64::INFINITY, duration, false)?;
        Ok(result.received as f64 / duration.as_secs_f64())
    }

    /// Offers `rate` frames per second in sum, equally from all guests, for `duration`. What found
    /// no room in time is sent late; of an endless rate it is not sent.
    pub(crate) fn run_rate(
        &mut self,
        rate: f64,
        duration: Duration,
        verify: bool,
    ) -> Result<RateResult, LoadError> {
        self.runs = self.runs.wrapping_add(1);
        let queues = self.guests[0].pairs.len();
        let mut run = RateRun::start(self.runs, rate, duration, (self.guests.len(), queues));
        let waited = cpu_wait();
        let mut busy = Duration::ZERO;
        let (mut now, mut quiet_since) = (Duration::ZERO, Duration::ZERO);
        let (mut missing, mut turns) = (true, 0u32);
        while now < duration || (missing && now - quiet_since < LATE) {
            now = run.start.elapsed();
            let due = run.due(now);
            let moved = self.rate_turn(&mut run, due, verify)?;
            if moved {
                busy += run.start.elapsed() - now;
            }
            if moved || run.is_behind(due) {
                quiet_since = now;
            }
            if now >= duration {
                missing = run.is_behind(due) || run.sum(|t| t.unique) < run.sent();
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(CHECK_EVERY_TURNS) {
                self.check_alive()?;
                if now > duration + ANSWER {
                    break;
                }
            }
        }
        self.check_alive()?;
        Ok(RateResult {
            elapsed: now,
            busy,
            waited_for_cpu: cpu_wait().saturating_sub(waited),
            ..run.end()
        })
    }

    /// Has each guest send what is due and take what arrived; whether any frame moved.
    fn rate_turn(&mut self, run: &mut RateRun, due: u64, verify: bool) -> Result<bool, LoadError> {
        let mut moved = false;
        for guest in 0..self.guests.len() {
            moved |= self.send_due(guest, &mut run.sources[guest], due, run.per_guest)? > 0;
            let arrival = nanos(run.start.elapsed());
            let came = self.take_stamped(guest, verify, |stamp| {
                run.arrived(guest, stamp, arrival);
            })?;
            run.foreign += came.foreign;
            moved |= came.frames > 0;
        }
        Ok(moved)
    }

    /// Sends one frame at a time from the first guest of each pair and back from the second, for
    /// `duration`.
    pub(crate) fn run_echo(&mut self, duration: Duration) -> Result<EchoResult, LoadError> {
        let mut round_trip = histogram();
        let start = Instant::now();
        let mut transactions = 0;
        while start.elapsed() < duration {
            if transactions % 1024 == 0 {
                self.check_alive()?;
            }
            let asked = Instant::now();
            for guest in [0, 1] {
                let stamp = Stamp {
                    sequence: transactions,
                    due_ns: 0,
                };
                let pair = &mut self.guests[guest].pairs[0];
                pair.tx.ring.reclaim()?;
                let at = self.templates[guest][0].stamp_at();
                pair.tx
                    .buffers
                    .write(pair.tx.ring.next_slot(0), at, &stamp.bytes());
                pair.tx.offer(1)?;
                let mut arrived = false;
                while !arrived {
                    self.take_stamped(guest ^ 1, false, |seen| {
                        arrived |= seen.sequence == stamp.sequence;
                    })?;
                    if asked.elapsed() > ANSWER {
                        self.check_alive()?;
                        return Err(LoadError::NoTraffic(ANSWER));
                    }
                }
            }
            round_trip.saturating_record(nanos(asked.elapsed()).max(1));
            transactions += 1;
        }
        Ok(EchoResult {
            elapsed: start.elapsed(),
            transactions,
            round_trip,
        })
    }

    /// Sends the frames of a guest that are due, as far as its ring has room.
    fn send_due(
        &mut self,
        guest: usize,
        source: &mut RateSource,
        due: u64,
        per_guest: f64,
    ) -> Result<u16, LoadError> {
        if source.sent >= due {
            return Ok(0);
        }
        let stamp_at = self.templates[guest][0].stamp_at();
        let pairs = &mut self.guests[guest].pairs;
        source.queue = (source.queue + 1) % pairs.len();
        let pair = &mut pairs[source.queue];
        pair.tx.ring.reclaim()?;
        let count = (due - source.sent)
            .min(BURST as u64)
            .min(u64::from(pair.tx.ring.free()));
        // At most BURST.
        let count = u16::try_from(count).unwrap_or(0);
        let in_queue = (source.queue as u64) << QUEUE_SHIFT
            | u64::from(self.runs) << RUN_SHIFT
            | source.by_queue[source.queue];
        for ahead in 0..count {
            let number = source.sent + u64::from(ahead);
            let stamp = Stamp {
                sequence: in_queue + u64::from(ahead),
                due_ns: whole(number as f64 * 1e9 / per_guest),
            };
            let slot = pair.tx.ring.next_slot(ahead);
            pair.tx.buffers.write(slot, stamp_at, &stamp.bytes());
        }
        let sent = pair.tx.offer(count)?;
        source.sent += u64::from(sent);
        source.by_queue[source.queue] += u64::from(sent);
        Ok(sent)
    }

    /// Takes what arrived at a guest and tells the stamps of its partner's frames. Their bytes are
    /// only looked at to `verify` them.
    fn take_stamped(
        &mut self,
        guest: usize,
        verify: bool,
        mut each: impl FnMut(Stamp),
    ) -> Result<Came, LoadError> {
        let expected = &self.templates[guest ^ 1];
        let mut came = Came::default();
        let mut head = [0; HEAD];
        for pair in &mut self.guests[guest].pairs {
            let mut take = |stamp| match stamp {
                Some(stamp) => each(stamp),
                None => came.foreign += 1,
            };
            came.frames += if verify {
                pair.receive(|frame| {
                    let whole = expected
                        .iter()
                        .any(|t| t.matches(frame) && t.keeps_segmentation(frame));
                    take(expected[0].stamp_of(frame).filter(|_| whole));
                })? as u64
            } else {
                let turn = pair.peek(&mut head, |head| take(expected[0].stamp_of(head)))?;
                turn.received
            };
        }
        Ok(came)
    }
}

/// What came to a guest in one turn.
#[derive(Clone, Copy, Debug, Default)]
struct Came {
    frames: u64,
    /// Of these, frames that are not its partner's, or were changed.
    foreign: u64,
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
        let mut run = RateRun::start(5, 100.0, Duration::from_secs(1), (2, 2));
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
    fn what_is_due_ends_with_the_run() {
        let second = Duration::from_secs(1);
        let due = |rate, now| RateRun::start(0, rate, second, (2, 1)).due(now);
        assert_eq!(due(100.0, second / 2), 25);
        assert_eq!(due(100.0, second * 2), 50);
        assert_eq!(due(f64::INFINITY, second / 2), u64::MAX);
        assert_eq!(due(f64::INFINITY, second), 0);
    }

    #[test]
    fn the_window_moves_on_and_forgets() {
        let twice = (0..200_000).chain([199_999, 1]);
        assert_eq!(track(twice), (200_000, 1, 0, 1));
        assert_eq!(track([0, WINDOW * 3, WINDOW * 3 - 1]), (3, 0, 1, 0));
    }
}
