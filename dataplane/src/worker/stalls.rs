//! Bursts that took longer than their frames can have taken, and whose fault that was.
//!
//! A page of a guest's memory that is not there is found by the kernel when the worker touches it, which
//! takes a microsecond or, for a large page, a hundred; and while a front-end takes pages away from its
//! file (`fallocate`, FALLOC_FL_PUNCH_HOLE), whoever touches one of these sleeps until all of them are
//! gone, which is half a second for some gigabytes. No flag forbids that. So such time is found out
//! afterwards, and paid for ([`super::ledger`]).
//!
//! Nothing of this is asked of bursts that take what bursts take. The first that is late only has the
//! next ones timed delivery by delivery, so that the port is known whose memory it was. How many page
//! faults the thread had, what it had of the processor, and how long it waited for a core tells a worker
//! that was kept by memory from one that was pushed aside.

use ringway_bridge::PortId;

use super::thread_times::{ThreadTimes, Times};
use crate::clock::Clock;

/// What a burst may take more than its frames can have: interrupts.
const GRACE_NS: u64 = 20_000;

/// A worker that slept for so long was kept waiting; what is shorter is taken for work.
const ASLEEP_NS: u64 = 1_000_000;

/// What a page fault may take that does not sleep: a large page is filled with zeros.
const FAULT_NS: u64 = 500_000;

/// For how long deliveries are timed after a burst that worked for too long,
const TIMED_AFTER_WORK_NS: u64 = 100_000_000;
/// and after one that slept.
const TIMED_AFTER_SLEEP_NS: u64 = 10_000_000_000;

/// Time that a burst took beyond what it can have taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stall {
    /// The destination in whose delivery it was; none if it was in the source's rings and buffers.
    pub(super) to: Option<PortId>,
    pub(super) ns: u64,
    /// The worker slept; else it worked.
    pub(super) slept: bool,
}

/// A worker's stalls.
#[derive(Debug)]
pub(super) struct Stalls {
    clock: Clock,
    thread: ThreadTimes,
    /// What a burst may take more than its frames can have; any time, if nobody watches.
    grace_ns: u64,
    /// When the kernel was asked last, and what it said.
    asked: (u64, Times),
    /// Time since then in which there was nothing to do.
    idle_ns: u64,
    timed_until_ns: u64,
    is_timing: bool,
    /// The longest delivery of this burst.
    longest: Option<(PortId, u64)>,
}

impl Stalls {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            thread: ThreadTimes::default(),
            grace_ns: u64::MAX,
            asked: (0, Times::default()),
            idle_ns: 0,
            timed_until_ns: 0,
            is_timing: false,
            longest: None,
        }
    }

    /// Begins to watch the calling thread.
    pub(super) fn watch(&mut self) {
        self.thread.watch();
        if let Some(times) = self.thread.read() {
            self.asked = (self.clock.now_ns(), times);
            self.grace_ns = GRACE_NS;
        }
    }

    /// Whether a burst took longer than the most that it can have taken.
    #[inline(always)]
    pub(super) fn is_late(&self, took_ns: u64, most_ns: u64) -> bool {
        took_ns.saturating_sub(most_ns) > self.grace_ns
    }

    /// Whether deliveries are timed.
    #[inline(always)]
    pub(super) fn is_timing(&self) -> bool {
        self.is_timing
    }

    /// The worker had nothing to do for so long.
    pub(super) fn note_idle(&mut self, ns: u64) {
        self.idle_ns += ns;
    }

    /// A burst begins.
    #[cold]
    #[inline(never)]
    pub(super) fn begin(&mut self, now_ns: u64) {
        self.longest = None;
        self.is_timing = now_ns < self.timed_until_ns;
    }

    /// Times a delivery.
    #[cold]
    #[inline(never)]
    pub(super) fn time<T>(&mut self, to: PortId, deliver: impl FnOnce() -> T) -> T {
        let start_ns = self.clock.now_ns();
        let outcome = deliver();
        let took_ns = self.clock.now_ns().saturating_sub(start_ns);
        if self.longest.is_none_or(|(_, longest)| took_ns > longest) {
            self.longest = Some((to, took_ns));
        }
        outcome
    }

    /// Judges a burst that was late; it is over at `now_ns`.
    #[cold]
    #[inline(never)]
    pub(super) fn judge(&mut self, took_ns: u64, most_ns: u64, now_ns: u64) -> Option<Stall> {
        let excess_ns = took_ns.saturating_sub(most_ns);
        let (asked_ns, before) = self.asked;
        let times = self.thread.read()?;
        let idle_ns = std::mem::take(&mut self.idle_ns);
        self.asked = (now_ns, times);
        let had = times.since(before);
        self.attribute(
            excess_ns,
            now_ns,
            had,
            now_ns.saturating_sub(asked_ns + idle_ns),
        )
    }

    /// The same of a thread that had `had` of `passed_ns` in which it was not idle.
    fn attribute(
        &mut self,
        excess_ns: u64,
        now_ns: u64,
        had: Times,
        passed_ns: u64,
    ) -> Option<Stall> {
        if had.faults == 0 {
            return None;
        }
        let slept_ns = passed_ns.saturating_sub(had.processor_ns + had.waited_ns);
        let slept_ns = slept_ns.min(excess_ns);
        let slept = slept_ns >= ASLEEP_NS;
        let (ns, timed_ns) = if slept {
            (slept_ns, TIMED_AFTER_SLEEP_NS)
        } else {
            let worked_ns = excess_ns.saturating_sub(had.waited_ns + slept_ns);
            (
                worked_ns.min(had.faults.saturating_mul(FAULT_NS)),
                TIMED_AFTER_WORK_NS,
            )
        };
        if ns < GRACE_NS {
            return None;
        }
        self.timed_until_ns = self.timed_until_ns.max(now_ns + timed_ns);
        // This one may be anybody's if no delivery was timed.
        let was_timing = std::mem::replace(&mut self.is_timing, true);
        let longest = self.longest.take().filter(|(_, took)| *took >= ns / 2);
        let to = longest.map(|(to, _)| to);
        was_timing.then_some(Stall { to, ns, slept })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const US: u64 = 1_000;
    const MS: u64 = 1_000_000;
    const NOW_NS: u64 = 1_000 * MS;

    fn had(processor_ns: u64, waited_ns: u64) -> Times {
        Times {
            processor_ns,
            waited_ns,
            faults: 3,
        }
    }

    fn stalls(is_timing: bool) -> Stalls {
        Stalls {
            is_timing,
            ..Stalls::new(Clock::since(Instant::now()))
        }
    }

    fn stall(ns: u64, slept: bool) -> Option<Stall> {
        Some(Stall {
            to: None,
            ns,
            slept,
        })
    }

    #[test]
    fn the_first_stall_has_the_next_ones_timed() {
        let mut stalls = stalls(false);
        let times = had(MS, 0);
        assert_eq!(stalls.attribute(400 * MS, NOW_NS, times, 401 * MS), None);
        assert!(stalls.is_timing() && stalls.timed_until_ns == NOW_NS + TIMED_AFTER_SLEEP_NS);
        let again = stalls.attribute(400 * MS, NOW_NS, times, 401 * MS);
        assert_eq!(again, stall(400 * MS, true));
    }

    #[test]
    fn who_loses_its_core_does_not_stall() {
        let mut stalls = stalls(true);
        assert_eq!(
            stalls.attribute(4 * MS, NOW_NS, had(MS, 4 * MS), 5 * MS),
            None
        );
        assert_eq!(stalls.timed_until_ns, 0);
    }

    /// A slow machine, or one that has its core taken away by whoever runs it.
    #[test]
    fn a_burst_without_page_faults_is_late_for_no_fault_of_a_guest() {
        let mut stalls = stalls(true);
        let times = Times {
            faults: 0,
            ..had(25 * MS, 0)
        };
        assert_eq!(stalls.attribute(25 * MS, NOW_NS, times, 25 * MS), None);
        let times = had(25 * MS, 0);
        let judged = stalls.attribute(25 * MS, NOW_NS, times, 25 * MS);
        assert_eq!(judged, stall(3 * FAULT_NS, false));
    }

    #[test]
    fn work_beyond_what_frames_take_is_a_stall_without_the_time_that_others_had() {
        let mut stalls = stalls(true);
        let judged = stalls.attribute(200 * US, NOW_NS, had(9 * MS, 50 * US), 9 * MS);
        assert_eq!(judged, stall(150 * US, false));
        assert_eq!(stalls.timed_until_ns, NOW_NS + TIMED_AFTER_WORK_NS);
    }

    #[test]
    fn a_stall_is_that_of_the_delivery_which_had_most_of_it() {
        let to = PortId::new(7).unwrap();
        let mut stalls = stalls(true);
        stalls.longest = Some((to, 180 * US));
        let judged = stalls.attribute(200 * US, NOW_NS, had(9 * MS, 0), 9 * MS);
        assert_eq!(judged.unwrap().to, Some(to));
        stalls.longest = Some((to, 3 * US));
        let judged = stalls.attribute(200 * US, NOW_NS, had(9 * MS, 0), 9 * MS);
        assert_eq!(judged, stall(200 * US, false));
    }
}
