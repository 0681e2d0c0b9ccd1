//! Runs at an offered rate, in open loop, and request-response runs, on the rings of a load.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::error::LoadError;
use super::frame::Stamp;
use super::guest::BURST;
use super::load::{HEAD, Load};
use super::meter::cpu_wait;
use super::open_loop::{RateResult, RateRun, Stalls, histogram, nanos};

/// How long an answer may take in a request-response run.
const ANSWER: Duration = Duration::from_secs(2);
/// Turns between two looks at the sockets.
const CHECK_EVERY_TURNS: u32 = 1 << 14;
/// How long frames that are missing at the end may take: a switch may be off its core for a while.
const LATE: Duration = Duration::from_millis(500);

/// What a request-response run measured.
#[derive(Debug)]
pub(crate) struct EchoResult {
    pub(crate) elapsed: Duration,
    pub(crate) transactions: u64,
    pub(crate) round_trip: Histogram<u64>,
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
        let mut run = RateRun::new(self.runs, rate, duration, (self.guests.len(), queues));
        let start = Instant::now();
        let waited = cpu_wait();
        let (mut busy, mut stalls) = (Duration::ZERO, Stalls::default());
        let (mut now, mut quiet_since) = (Duration::ZERO, Duration::ZERO);
        let (mut missing, mut turns) = (true, 0u32);
        while now < duration || (missing && now - quiet_since < LATE) {
            let before = now;
            now = start.elapsed();
            stalls.note(now - before);
            let due = run.due(now);
            let moved = self.rate_turn(&mut run, (start, due), verify)?;
            if moved {
                busy += start.elapsed() - now;
            }
            if moved || run.is_behind(due) {
                quiet_since = now;
            }
            if now >= duration {
                missing = run.is_behind(due) || run.is_missing_some();
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
            stalls,
            waited_for_cpu: cpu_wait().saturating_sub(waited),
            ..run.end()
        })
    }

    /// Has each guest send what is due and take what arrived; whether any frame moved.
    fn rate_turn(
        &mut self,
        run: &mut RateRun,
        (start, due): (Instant, u64),
        verify: bool,
    ) -> Result<bool, LoadError> {
        let mut moved = false;
        for guest in 0..self.guests.len() {
            moved |= self.send_due(guest, run, due)? > 0;
            self.move_by_hand(guest);
            let arrival = nanos(start.elapsed());
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
                self.move_by_hand(guest);
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
            round_trip.saturating_record(nanos(asked.elapsed()));
            transactions += 1;
        }
        Ok(EchoResult {
            elapsed: start.elapsed(),
            transactions,
            round_trip,
        })
    }

    /// Sends the frames of a guest that are due, as far as its ring has room.
    fn send_due(&mut self, guest: usize, run: &mut RateRun, due: u64) -> Result<u16, LoadError> {
        let Some(queue) = run.next_queue(guest, due) else {
            return Ok(0);
        };
        let stamp_at = self.templates[guest][0].stamp_at();
        let pair = &mut self.guests[guest].pairs[queue];
        pair.tx.ring.reclaim()?;
        let room = usize::from(pair.tx.ring.free()).min(BURST);
        let count = run.take_due(guest, due, room, |ahead, stamp| {
            let slot = pair.tx.ring.next_slot(ahead);
            pair.tx.buffers.write(slot, stamp_at, &stamp.bytes());
        });
        Ok(pair.tx.offer(count)?)
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
