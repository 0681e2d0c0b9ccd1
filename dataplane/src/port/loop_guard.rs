//! Whether a port's own frames, or those of stations behind other ports, come back through it: a pure
//! value, asked in regular intervals.
//!
//! In a loop each flooded frame returns with a source address that was in use behind another port a moment
//! ago. The forwarding database refuses that move and counts it; many refusals in one interval are an alarm.
//! A guest that spoofs addresses of others looks the same, and is treated so.

use std::time::{Duration, Instant};

use ringway_api::OnLoop;

use crate::backoff::{Backoff, Growth};

/// Frames with a refused source in one interval that are an alarm. A station that really moves causes
/// some, until it is idle for as long as addresses are held.
const ALARM_FRAMES: u64 = 100;

/// How long an alarm is told after the last interval that was one.
const TOLD_FOR: Duration = Duration::from_secs(10);

/// For how long the port is blocked. A loop that is still there is found again at once.
const BLOCKED: Growth = Growth {
    base: Duration::from_secs(5),
    max: Duration::from_secs(300),
    healthy: Duration::from_secs(60),
};

/// What is known of a port.
#[derive(Debug)]
pub(crate) struct LoopGuard {
    /// Refusals until the last look.
    refused: u64,
    backoff: Backoff,
    seen: Option<Seen>,
}

/// The last alarm.
#[derive(Clone, Copy, Debug)]
struct Seen {
    frames: u64,
    at: Instant,
    blocked_until: Option<Instant>,
}

impl Default for LoopGuard {
    fn default() -> Self {
        Self {
            refused: 0,
            backoff: Backoff::new(BLOCKED),
            seen: None,
        }
    }
}

impl LoopGuard {
    /// A look at `now`, when so many frames had been refused since the port was added. True if this
    /// interval is an alarm, and none was told lately.
    pub(crate) fn look(&mut self, refused: u64, on_loop: OnLoop, now: Instant) -> bool {
        let frames = refused.saturating_sub(self.refused);
        self.refused = refused;
        if frames < ALARM_FRAMES || self.is_blocked(now) {
            return false;
        }
        let was_told = self.alarm(now).is_some();
        let blocked_until = match on_loop {
            OnLoop::Alarm => None,
            OnLoop::Block => Some(now + self.backoff.fail(now)),
        };
        self.seen = Some(Seen {
            frames,
            at: now,
            blocked_until,
        });
        !was_told || blocked_until.is_some()
    }

    /// Whether the port was ever blocked.
    pub(crate) fn was_blocked(&self) -> bool {
        self.seen.is_some_and(|seen| seen.blocked_until.is_some())
    }

    /// Whether the port is to pass no frames.
    pub(crate) fn is_blocked(&self, now: Instant) -> bool {
        let until = self.seen.and_then(|seen| seen.blocked_until);
        until.is_some_and(|until| now < until)
    }

    /// What is to be told, while there is something.
    pub(crate) fn alarm(&self, now: Instant) -> Option<String> {
        let Seen {
            frames,
            at,
            blocked_until,
        } = self.seen?;
        let what = format!(
            "{frames} frames in a second came from addresses in use behind other ports: a loop through \
             another switch, or a guest that spoofs (`ringway fdb list`)"
        );
        let left = blocked_until.map(|until| until.saturating_duration_since(now));
        match left.filter(|left| !left.is_zero()) {
            Some(left) => Some(format!("blocked for {} s: {what}", left.as_secs() + 1)),
            None => (now.saturating_duration_since(at) < TOLD_FOR).then_some(what),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn many_refusals_in_one_interval_are_an_alarm_told_once() {
        let (mut guard, start) = (LoopGuard::default(), Instant::now());
        assert!(!guard.look(ALARM_FRAMES - 1, OnLoop::Alarm, start));
        assert_eq!(guard.alarm(start), None);
        assert!(guard.look(2 * ALARM_FRAMES, OnLoop::Alarm, start + SECOND));
        assert!(!guard.look(9 * ALARM_FRAMES, OnLoop::Alarm, start + 2 * SECOND));
        assert!(!guard.is_blocked(start + 2 * SECOND));
        assert!(guard.alarm(start + 2 * SECOND).is_some());
        assert_eq!(guard.alarm(start + 2 * SECOND + TOLD_FOR), None);
    }

    #[test]
    fn a_loop_that_stays_blocks_for_longer_each_time() {
        let (mut guard, mut now) = (LoopGuard::default(), Instant::now());
        let mut refused = 0;
        for expected in [5, 10, 20, 40, 80, 160, 300, 300] {
            refused += ALARM_FRAMES;
            assert!(guard.look(refused, OnLoop::Block, now));
            assert!(guard.alarm(now).unwrap().starts_with("blocked for "));
            let blocked = Duration::from_secs(expected);
            assert!(guard.is_blocked(now + blocked - SECOND));
            now += blocked;
            assert!(!guard.is_blocked(now));
        }
    }

    #[test]
    fn what_comes_while_it_is_blocked_is_no_alarm() {
        let (mut guard, now) = (LoopGuard::default(), Instant::now());
        guard.look(ALARM_FRAMES, OnLoop::Block, now);
        assert!(!guard.look(9 * ALARM_FRAMES, OnLoop::Block, now + SECOND));
        assert!(!guard.is_blocked(now + BLOCKED.base));
    }
}
