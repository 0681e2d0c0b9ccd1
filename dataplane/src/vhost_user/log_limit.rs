//! A bound on log lines that a front-end can cause.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::burst_lock::lock;

/// Lines in one period; more would let a front-end fill the disk.
const LINES: u32 = 5;

/// How long the count lasts.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets [`LINES`] lines pass in each [`PERIOD`] and counts the others. Clones share the count: a
/// port has one for all of its sessions, so that to reconnect gains nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogLimit(Arc<Mutex<LineCount>>);

#[derive(Debug, Default)]
struct LineCount {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl LogLimit {
    /// Whether a line may be logged at `now`: `Some` with the number of lines left out since the
    /// last one that passed.
    pub(crate) fn pass(&self, now: Instant) -> Option<u64> {
        let mut state = lock(&self.0);
        let fresh = state
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= PERIOD);
        if fresh {
            state.since = Some(now);
            state.lines = 0;
        }
        if state.lines < LINES {
            state.lines += 1;
            Some(std::mem::take(&mut state.suppressed))
        } else {
            state.suppressed += 1;
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_counted_and_told_later() {
        let limit = LogLimit::default();
        let start = Instant::now();
        for _ in 0..LINES {
            assert_eq!(limit.pass(start), Some(0));
        }
        assert_eq!(limit.clone().pass(start), None);
        assert_eq!(limit.pass(start + PERIOD / 2), None);
        assert_eq!(limit.pass(start + PERIOD), Some(2));
        assert_eq!(limit.pass(start + PERIOD), Some(0));
    }
}
