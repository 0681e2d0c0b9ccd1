//! When a worker polls on, pauses or sleeps: a pure value that is told what each turn found.
//!
//! ```text
//!   silence    0 ............ spin ................... spin + pause
//!   a worker   spins          pauses, longer and longer
//!   a source   is polled                              has its notifications on, is not polled
//! ```
//! With no source left to poll the worker sleeps until an event. While frames wait for room it
//! naps, since nobody tells when there is some. On a core that somebody else wants there is no
//! silence to wait for: what is empty is armed at once, and what waits naps at once.

use std::time::Duration;

/// How long to sleep while frames wait for a destination without free buffers.
const NAP: Duration = Duration::from_micros(100);

/// While queues are busy, events of the others are looked for this often: one system call of half
/// a microsecond each time.
const EVENT_INTERVAL_NS: u64 = 50_000;

/// A pause grows by one instruction for so many nanoseconds of silence beyond the time to spin.
const NS_PER_PAUSE: u64 = 256;

/// Longest run of pause instructions between two polls of a silent queue: some microseconds.
const MAX_PAUSES: u64 = 64;

/// How long silence lasts, and what follows from it. Times are nanoseconds of the worker's clock.
#[derive(Debug)]
pub(super) struct Idle {
    spin_ns: u64,
    /// A source that was silent for this long is armed.
    silent_ns: u64,
    /// When a frame was last taken from any source.
    last_frame_ns: u64,
    last_look_ns: u64,
}

/// What a turn found.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turn {
    /// Frames that were taken.
    pub(super) frames: u64,
    /// Sources that are to be polled again.
    pub(super) active: usize,
    /// Frames stay in a source until a destination or a lock is free.
    pub(super) is_waiting: bool,
    /// Frames stay in a transmit ring until the kernel has room.
    pub(super) has_unsent: bool,
    /// Somebody else wants the core.
    pub(super) is_contended: bool,
}

/// What a worker does after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The next turn, at once.
    Spin,
    /// So many pause instructions, then the next turn.
    Pause(u64),
    /// Sleep until an event, or for so long.
    Sleep(Option<Duration>),
}

impl Idle {
    /// A worker spins through silences of `spin`, [`Duration::MAX`] for ever, and then pauses for
    /// `pause`.
    pub(super) fn new(spin: Duration, pause: Duration) -> Self {
        Self {
            spin_ns: saturating_ns(spin),
            silent_ns: saturating_ns(spin.saturating_add(pause)),
            last_frame_ns: 0,
            last_look_ns: 0,
        }
    }

    /// Whether the worker ever leaves its core to others.
    pub(super) fn may_sleep(&self) -> bool {
        self.spin_ns != u64::MAX
    }

    /// Whether an empty source whose last frame came at `last_frame_ns` is to be armed.
    #[inline]
    pub(super) fn is_silent(&self, now_ns: u64, last_frame_ns: u64, is_contended: bool) -> bool {
        is_contended || now_ns - last_frame_ns >= self.silent_ns
    }

    /// What to do after `turn`, which ended at `now_ns`.
    #[inline]
    pub(super) fn after(&mut self, now_ns: u64, turn: Turn) -> Next {
        if turn.frames > 0 {
            self.last_frame_ns = now_ns;
            return Next::Spin;
        }
        if turn.active == 0 {
            return Next::Sleep(turn.has_unsent.then_some(NAP));
        }
        let silent_ns = now_ns - self.last_frame_ns;
        if turn.is_waiting && (turn.is_contended || silent_ns > self.spin_ns) {
            return Next::Sleep(Some(NAP));
        }
        match silent_ns.saturating_sub(self.spin_ns) / NS_PER_PAUSE {
            0 => Next::Spin,
            pauses => Next::Pause(pauses.min(MAX_PAUSES)),
        }
    }

    /// Whether a worker that is awake is to look for events now, which it then does.
    #[inline]
    pub(super) fn takes_a_look(&mut self, now_ns: u64) -> bool {
        let is_due = now_ns - self.last_look_ns > EVENT_INTERVAL_NS;
        if is_due {
            self.last_look_ns = now_ns;
        }
        is_due
    }

    /// Notes the end of a sleep, which took the events there were. After an event the worker polls
    /// at full speed; a nap is part of the silence.
    pub(super) fn woke(&mut self, now_ns: u64, was_nap: bool) {
        self.last_look_ns = now_ns;
        if !was_nap {
            self.last_frame_ns = now_ns;
        }
    }
}

/// Nanoseconds, of which 64 bits hold 584 years.
pub(super) fn saturating_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPIN_NS: u64 = 50_000;
    const PAUSE_NS: u64 = 250_000;
    /// What a turn takes.
    const STEP_NS: u64 = 500;

    const EMPTY: Turn = Turn {
        frames: 0,
        active: 1,
        is_waiting: false,
        has_unsent: false,
        is_contended: false,
    };
    const WAITING: Turn = Turn {
        is_waiting: true,
        ..EMPTY
    };
    const FRAMES: Turn = Turn {
        frames: 64,
        ..EMPTY
    };

    /// A worker that took its last frame at the time returned.
    fn idle() -> (Idle, u64) {
        let [spin, pause] = [SPIN_NS, PAUSE_NS].map(Duration::from_nanos);
        let mut idle = Idle::new(spin, pause);
        let now_ns = 1_000_000_000;
        assert_eq!(idle.after(now_ns, FRAMES), Next::Spin);
        (idle, now_ns)
    }

    #[test]
    fn a_silent_worker_spins_then_pauses_ever_longer_then_arms_and_sleeps() {
        let (mut idle, last_ns) = idle();
        let (mut now_ns, mut longest) = (last_ns, 0);
        while !idle.is_silent(now_ns, last_ns, false) {
            now_ns += STEP_NS;
            match idle.after(now_ns, EMPTY) {
                Next::Spin => assert!(now_ns - last_ns < SPIN_NS + NS_PER_PAUSE),
                Next::Pause(count) => {
                    assert!(now_ns - last_ns > SPIN_NS && count >= longest);
                    longest = count;
                }
                Next::Sleep(timeout) => panic!("sleeps for {timeout:?}"),
            }
        }
        assert_eq!(now_ns - last_ns, SPIN_NS + PAUSE_NS);
        assert_eq!(longest, MAX_PAUSES);
        let nobody = Turn { active: 0, ..EMPTY };
        assert_eq!(idle.after(now_ns, nobody), Next::Sleep(None));
    }

    #[test]
    fn a_frame_ends_the_silence() {
        let (mut idle, last_ns) = idle();
        let later_ns = last_ns + SPIN_NS + PAUSE_NS - 1;
        assert!(matches!(idle.after(later_ns, EMPTY), Next::Pause(_)));
        assert_eq!(idle.after(later_ns, FRAMES), Next::Spin);
        assert_eq!(idle.after(later_ns + SPIN_NS, EMPTY), Next::Spin);
        assert!(!idle.is_silent(later_ns + SPIN_NS, later_ns, false));
    }

    #[test]
    fn frames_that_wait_are_polled_at_full_speed_first_and_by_naps_then() {
        let (mut idle, last_ns) = idle();
        assert_eq!(idle.after(last_ns + SPIN_NS, WAITING), Next::Spin);
        let mut now_ns = last_ns + SPIN_NS + 1;
        for _ in 0..100 {
            assert_eq!(idle.after(now_ns, WAITING), Next::Sleep(Some(NAP)));
            now_ns += saturating_ns(NAP);
            idle.woke(now_ns, true);
        }
        // There is room: the worker is at work again.
        assert_eq!(
            idle.after(
                now_ns,
                Turn {
                    is_waiting: true,
                    ..FRAMES
                }
            ),
            Next::Spin
        );
        assert_eq!(idle.after(now_ns + STEP_NS, WAITING), Next::Spin);
    }

    #[test]
    fn on_a_core_that_somebody_else_wants_nothing_is_waited_for() {
        let (mut idle, last_ns) = idle();
        assert!(idle.is_silent(last_ns, last_ns, true));
        let contended = |turn| Turn {
            is_contended: true,
            ..turn
        };
        let now_ns = last_ns + STEP_NS;
        assert_eq!(
            idle.after(now_ns, contended(WAITING)),
            Next::Sleep(Some(NAP))
        );
        assert_eq!(idle.after(now_ns, contended(FRAMES)), Next::Spin);
        // What could not be armed, for want of a lock, is tried again.
        assert_eq!(idle.after(now_ns, contended(EMPTY)), Next::Spin);
    }

    #[test]
    fn what_the_kernel_had_no_room_for_is_tried_again_after_a_nap() {
        let (mut idle, last_ns) = idle();
        let unsent = Turn {
            active: 0,
            has_unsent: true,
            ..EMPTY
        };
        assert_eq!(idle.after(last_ns, unsent), Next::Sleep(Some(NAP)));
    }

    #[test]
    fn after_an_event_a_sleeper_polls_at_full_speed() {
        let (mut idle, last_ns) = idle();
        let now_ns = last_ns + 3_600_000_000_000;
        idle.woke(now_ns, false);
        assert_eq!(idle.after(now_ns + SPIN_NS, EMPTY), Next::Spin);
        assert!(matches!(
            idle.after(now_ns + 2 * SPIN_NS, EMPTY),
            Next::Pause(_)
        ));
    }

    #[test]
    fn a_worker_that_is_to_spin_for_ever_does() {
        let mut idle = Idle::new(Duration::MAX, Duration::ZERO);
        let now_ns = u64::MAX - 1;
        assert!(!idle.may_sleep() && !idle.is_silent(now_ns, 0, false));
        assert_eq!(idle.after(now_ns, EMPTY), Next::Spin);
        assert_eq!(idle.after(now_ns, WAITING), Next::Spin);
    }

    #[test]
    fn events_are_looked_for_now_and_then() {
        let (mut idle, last_ns) = idle();
        idle.woke(last_ns, true);
        let turns = (1..=1000).filter(|turn| idle.takes_a_look(last_ns + turn * STEP_NS));
        assert_eq!(
            turns.count() as u64,
            1000 * STEP_NS / (EVENT_INTERVAL_NS + STEP_NS)
        );
    }
}
