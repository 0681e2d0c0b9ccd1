//! Which sources a worker polls in a turn, and in which order: a pure value.
//!
//! Each active source has one burst a turn. A source whose frames have to wait for a destination
//! comes first in the next turn until it had a full burst, and then others that wait come before
//! it: deficit round robin. Else the room at that destination would go to whoever is polled first
//! each time.

use ringway_bridge::MAX_BURST;

/// A source that is polled in each turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Active {
    /// Its index among the worker's sources.
    pub(super) source: usize,
    /// When it last had a frame, or became active.
    pub(super) last_frame_ns: u64,
    /// Frames that it may take in this turn.
    pub(super) quantum: usize,
    /// Its frames had to wait, before it had a full burst.
    waits: bool,
}

impl Active {
    fn new(source: usize, now_ns: u64) -> Self {
        Self {
            source,
            last_frame_ns: now_ns,
            quantum: MAX_BURST,
            waits: false,
        }
    }
}

/// What polling a source found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Polled {
    /// So many frames were taken.
    Frames(usize),
    /// So many were taken; there are more, or may be, but they have to wait: poll again.
    Waiting(usize),
    Empty,
    /// The queue is stopped or gone: no event but a new start brings it back.
    Stopped,
}

impl Polled {
    /// Of `count` frames that were gathered so many were taken.
    #[inline]
    pub(super) fn of(taken: usize, count: usize) -> Self {
        if taken == count && taken > 0 {
            Self::Frames(taken)
        } else {
            Self::Waiting(taken)
        }
    }

    /// Frames that were taken.
    #[inline]
    pub(super) fn frames(self) -> usize {
        match self {
            Self::Frames(count) | Self::Waiting(count) => count,
            Self::Empty | Self::Stopped => 0,
        }
    }
}

/// The active sources, in the order in which they are polled.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// Those of this turn, of which `at` were polled,
    turn: Vec<Active>,
    at: usize,
    /// and those of the next, of which `first` have to be first.
    next: Vec<Active>,
    first: usize,
}

impl Schedule {
    /// Between two turns: how many sources are active.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.turn.len()
    }

    /// Between two turns: a source becomes active. It must not be.
    pub(super) fn add(&mut self, source: usize, now_ns: u64) {
        self.turn.push(Active::new(source, now_ns));
    }

    /// Between two turns: a source goes, if it is active.
    pub(super) fn remove(&mut self, source: usize) {
        self.turn.retain(|active| active.source != source);
    }

    /// Between two turns: the worker slept, which counts as silence of none of them.
    pub(super) fn woke(&mut self, now_ns: u64) {
        for active in &mut self.turn {
            active.last_frame_ns = now_ns;
            active.quantum = MAX_BURST;
        }
    }

    /// The next source to poll in this turn; `None` ends it. A source that is not given to
    /// [`Schedule::keep`] is active no more.
    #[inline]
    pub(super) fn pick(&mut self) -> Option<Active> {
        if let Some(active) = self.turn.get(self.at) {
            self.at += 1;
            return Some(*active);
        }
        std::mem::swap(&mut self.turn, &mut self.next);
        self.next.clear();
        (self.at, self.first) = (0, 0);
        None
    }

    /// Passes a source over in this turn: it is as early in the next.
    #[cold]
    pub(super) fn skip(&mut self, active: Active) {
        if active.waits {
            self.next.insert(self.first, active);
            self.first += 1;
        } else {
            self.next.push(active);
        }
    }

    /// Has a source that was polled at `now_ns` polled in the next turn too.
    #[inline]
    pub(super) fn keep(&mut self, active: Active, polled: Polled, now_ns: u64) {
        match polled {
            Polled::Waiting(count) if count < active.quantum => {
                self.keep_first(active, active.quantum - count, now_ns);
            }
            Polled::Frames(_) | Polled::Waiting(_) => {
                self.next.push(Active::new(active.source, now_ns));
            }
            Polled::Empty | Polled::Stopped => {
                self.next.push(Active {
                    waits: false,
                    ..active
                });
            }
        }
    }

    /// Has a source polled before those that don't wait.
    #[cold]
    fn keep_first(&mut self, active: Active, quantum: usize, now_ns: u64) {
        let active = Active {
            source: active.source,
            last_frame_ns: now_ns,
            quantum,
            waits: true,
        };
        self.next.insert(self.first, active);
        self.first += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(sources: usize) -> Schedule {
        let mut schedule = Schedule::default();
        (0..sources).for_each(|source| schedule.add(source, 0));
        schedule
    }

    /// One turn in which polling tells `polled` of each source. Returns who was polled.
    fn turn(schedule: &mut Schedule, mut polled: impl FnMut(Active) -> Polled) -> Vec<usize> {
        let mut order = Vec::new();
        while let Some(active) = schedule.pick() {
            order.push(active.source);
            let found = polled(active);
            if found != Polled::Stopped {
                schedule.keep(active, found, 7);
            }
        }
        order
    }

    #[test]
    fn sources_without_trouble_keep_their_order_and_those_that_leave_leave() {
        let mut schedule = schedule(3);
        let some = [Polled::Frames(9), Polled::Empty, Polled::Frames(64)];
        assert_eq!(turn(&mut schedule, |active| some[active.source]), [0, 1, 2]);
        let leaves = |active: Active| match active.source {
            1 => Polled::Stopped,
            _ => Polled::Empty,
        };
        assert_eq!(turn(&mut schedule, leaves), [0, 1, 2]);
        schedule.add(1, 8);
        assert_eq!(turn(&mut schedule, |_| Polled::Empty), [0, 2, 1]);
        schedule.remove(0);
        assert_eq!(turn(&mut schedule, |_| Polled::Empty), [2, 1]);
        assert_eq!(schedule.len(), 2);
    }

    #[test]
    fn silence_is_counted_from_the_last_frame_that_was_taken_or_waits() {
        let mut schedule = schedule(3);
        let found = [Polled::Empty, Polled::Frames(1), Polled::Waiting(0)];
        turn(&mut schedule, |active| found[active.source]);
        let mut since = [None; 3];
        turn(&mut schedule, |active| {
            since[active.source] = Some(active.last_frame_ns);
            Polled::Empty
        });
        assert_eq!(since, [Some(0), Some(7), Some(7)]);
        schedule.woke(9);
        assert!(schedule.turn.iter().all(|active| active.last_frame_ns == 9));
    }

    #[test]
    fn a_source_that_waits_is_first_until_it_had_a_burst_and_then_behind_those_that_wait() {
        let mut schedule = schedule(3);
        let mut quanta = Vec::new();
        let mut one_and_two_wait = |schedule: &mut Schedule| {
            turn(schedule, |active| match active.source {
                0 => Polled::Frames(64),
                1 => {
                    quanta.push(active.quantum);
                    Polled::Waiting(24)
                }
                _ => Polled::Waiting(0),
            })
        };
        assert_eq!(one_and_two_wait(&mut schedule), [0, 1, 2]);
        assert_eq!(one_and_two_wait(&mut schedule), [1, 2, 0]);
        assert_eq!(one_and_two_wait(&mut schedule), [1, 2, 0]);
        assert_eq!(one_and_two_wait(&mut schedule), [2, 1, 0]);
        assert_eq!(quanta, [64, 40, 16, 64]);
    }

    #[test]
    fn a_source_that_is_passed_over_keeps_its_place() {
        let mut schedule = schedule(3);
        turn(&mut schedule, |active| match active.source {
            2 => Polled::Waiting(1),
            _ => Polled::Frames(1),
        });
        while let Some(active) = schedule.pick() {
            schedule.skip(active);
        }
        assert_eq!(turn(&mut schedule, |_| Polled::Frames(1)), [2, 0, 1]);
    }

    /// What each of `count` sources, which never run dry, gets of a destination that takes `room`
    /// frames a turn. `limit` is what the source itself may take.
    fn shares(count: usize, room: usize, limit: usize, turns: usize) -> Vec<usize> {
        let mut schedule = schedule(count);
        let mut taken = vec![0; count];
        for _ in 0..turns {
            let mut left = room;
            turn(&mut schedule, |active| {
                let gathered = active.quantum.min(limit);
                let sent = gathered.min(left);
                left -= sent;
                taken[active.source] += sent;
                Polled::of(sent, gathered)
            });
        }
        taken
    }

    #[test]
    fn nobody_starves_at_a_destination_that_all_want() {
        for count in 1..=9 {
            for room in [1, 16, 63, 64, 65, 100, 256, 1000] {
                for limit in [MAX_BURST, 4] {
                    let shares = shares(count, room, limit, 64 * 20);
                    let (least, most) = (shares.iter().min(), shares.iter().max());
                    let apart = most.unwrap() - least.unwrap();
                    assert!(apart <= 2 * MAX_BURST, "{room} a turn: {shares:?}");
                    assert!(shares.iter().all(|taken| *taken > 0), "{shares:?}");
                }
            }
        }
    }
}
