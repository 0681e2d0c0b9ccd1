//! A bound on log lines that a guest, a front-end or a client can cause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

/// Lines in one period, of a limit that is not told otherwise; more would let a front-end fill the
/// disk.
const LINES: u32 = 5;

/// How long the count lasts.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets so many lines pass in each 10 s and counts the others. Clones share the count: a port has
/// one for all of its sessions, so that to reconnect gains nothing.
#[derive(Clone, Debug)]
pub struct LogLimit(Arc<Limit>);

#[derive(Debug)]
struct Limit {
    lines: u32,
    period: Mutex<Period>,
    /// Lines left out that no line has told of yet.
    suppressed: AtomicU64,
}

#[derive(Debug, Default)]
struct Period {
    since: Option<Instant>,
    lines: u32,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new(LINES)
    }
}

impl LogLimit {
    /// A limit of `lines` in 10 s.
    pub fn new(lines: u32) -> Self {
        Self(Arc::new(Limit {
            lines,
            period: Mutex::default(),
            suppressed: AtomicU64::new(0),
        }))
    }

    /// Whether a line may be logged at `now`: `Some` with the number of lines left out since the
    /// last one that passed. It never waits: of two threads that ask at once, one is left out.
    pub fn pass(&self, now: Instant) -> Option<u64> {
        let may_pass = match self.0.period.try_lock() {
            Ok(mut period) => period.count(self.0.lines, now),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().count(self.0.lines, now),
            Err(TryLockError::WouldBlock) => false,
        };
        if may_pass {
            Some(self.0.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.0.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

impl Period {
    /// Counts a line, if there is room for it.
    fn count(&mut self, most: u32, now: Instant) -> bool {
        let is_over = |since| now.saturating_duration_since(since) >= PERIOD;
        if self.since.is_none_or(is_over) {
            self.since = Some(now);
            self.lines = 0;
        }
        let may_pass = self.lines < most;
        self.lines += u32::from(may_pass);
        may_pass
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

    #[test]
    fn whoever_asks_while_another_does_is_left_out_and_counted() {
        let limit = LogLimit::default();
        let held = limit.0.period.lock().unwrap();
        assert_eq!(limit.pass(Instant::now()), None);
        drop(held);
        assert_eq!(limit.pass(Instant::now()), Some(1));
    }
}
