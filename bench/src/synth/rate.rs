//! Runs at an offered rate, in open loop, and request-response runs.
//!
//! A frame carries the time at which it was due, not that at which it was sent: when the switch or
//! the load falls behind, the waiting counts as latency instead of vanishing from the sample.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::frame::Stamp;
use super::guest::{BURST, LoadError};
use super::load::{Load, SETTLE};
use super::report::whole;

/// How far back a late frame is told from one that came twice, in frames.
const WINDOW: u64 = 1 << 16;
/// Longest latency that is told apart: 60 s.
const MAX_LATENCY_NS: u64 = 60_000_000_000;
/// How long an answer may take in a request-response run.
const ANSWER: Duration = Duration::from_secs(2);
/// Turns between two looks at the sockets.
const CHECK_EVERY_TURNS: u32 = 1 << 14;

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
}

impl RateResult {
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
struct Source {
    sent: u64,
    queue: usize,
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
    /// Offers `rate` frames per second in sum, equally from all guests, for `duration`.
    pub(crate) fn run_rate(
        &mut self,
        rate: f64,
        duration: Duration,
        verify: bool,
    ) -> Result<RateResult, LoadError> {
        let guests = self.guests.len();
        let per_guest = rate / guests as f64;
        let mut sources = vec![Source::default(); guests];
        let mut trackers = vec![Tracker::default(); guests];
        let (mut latency, mut foreign, mut turns) = (histogram(), 0, 0u32);
        let start = Instant::now();
        let (mut now, mut quiet_since) = (Duration::ZERO, Duration::ZERO);
        while now < duration || now - quiet_since < SETTLE {
            now = start.elapsed();
            let due = whole(now.min(duration).as_secs_f64() * per_guest);
            for (guest, source) in sources.iter_mut().enumerate() {
                self.send_due(guest, source, due, per_guest)?;
                let before = trackers[guest].unique;
                let arrival = nanos(start.elapsed());
                foreign += self.take_stamped(guest, verify, |stamp| {
                    trackers[guest].arrived(stamp.sequence);
                    let took = arrival.saturating_sub(stamp.due_ns);
                    latency.saturating_record(took.max(1));
                })?;
                if trackers[guest].unique != before || source.sent < due {
                    quiet_since = now;
                }
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
        let sum = |of: fn(&Tracker) -> u64| trackers.iter().map(of).sum();
        Ok(RateResult {
            offered: whole(duration.as_secs_f64() * per_guest) * guests as u64,
            sent: sources.iter().map(|source| source.sent).sum(),
            received: sum(|t| t.unique),
            duplicated: sum(|t| t.duplicated),
            reordered: sum(|t| t.reordered),
            ancient: sum(|t| t.ancient),
            foreign,
            latency,
        })
    }

    /// Sends one frame at a time from the first guest of each pair and back from the second, for
    /// `duration`.
    pub(crate) fn run_echo(&mut self, duration: Duration) -> Result<EchoResult, LoadError> {
        let mut round_trip = histogram();
        let start = Instant::now();
        let mut transactions = 0;
        while start.elapsed() < duration {
            let asked = Instant::now();
            for guest in [0, 1] {
                let stamp = Stamp {
                    sequence: transactions,
                    due_ns: 0,
                };
                let pair = &mut self.guests[guest].pairs[0];
                pair.tx.reclaim()?;
                let at = self.templates[guest][0].stamp_at();
                pair.tx_space
                    .write(pair.tx.next_slot(0), at, &stamp.bytes());
                pair.transmit(1)?;
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
        source: &mut Source,
        due: u64,
        per_guest: f64,
    ) -> Result<(), LoadError> {
        if source.sent >= due {
            return Ok(());
        }
        let stamp_at = self.templates[guest][0].stamp_at();
        let pairs = &mut self.guests[guest].pairs;
        source.queue = (source.queue + 1) % pairs.len();
        let pair = &mut pairs[source.queue];
        pair.tx.reclaim()?;
        let count = (due - source.sent)
            .min(BURST as u64)
            .min(u64::from(pair.tx.free()));
        // At most BURST.
        let count = u16::try_from(count).unwrap_or(0);
        for ahead in 0..count {
            let sequence = source.sent + u64::from(ahead);
            let stamp = Stamp {
                sequence,
                due_ns: whole(sequence as f64 * 1e9 / per_guest),
            };
            let slot = pair.tx.next_slot(ahead);
            pair.tx_space.write(slot, stamp_at, &stamp.bytes());
        }
        source.sent += u64::from(pair.transmit(count)?);
        Ok(())
    }

    /// Takes what arrived at a guest. Returns how many frames were not its partner's.
    fn take_stamped(
        &mut self,
        guest: usize,
        verify: bool,
        mut each: impl FnMut(Stamp),
    ) -> Result<u64, LoadError> {
        let expected = &self.templates[guest ^ 1];
        let mut foreign = 0;
        for pair in &mut self.guests[guest].pairs {
            pair.receive(|frame| {
                let intact = !verify || expected.iter().any(|t| t.matches(frame));
                match expected[0].stamp_of(frame) {
                    Some(stamp) if intact => each(stamp),
                    _ => foreign += 1,
                }
            })?;
        }
        Ok(foreign)
    }
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
    fn the_window_moves_on_and_forgets() {
        let twice = (0..200_000).chain([199_999, 1]);
        assert_eq!(track(twice), (200_000, 1, 0, 1));
        assert_eq!(track([0, WINDOW * 3, WINDOW * 3 - 1]), (3, 0, 1, 0));
    }
}
