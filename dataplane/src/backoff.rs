//! A delay that grows with each time that something went wrong: a pure value.

use std::time::{Duration, Instant};

/// How delays grow, and when they are forgotten.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Growth {
    /// The first delay.
    pub(crate) base: Duration,
    /// The longest one.
    pub(crate) max: Duration,
    /// What goes well for so long after a delay makes the next one the first again.
    pub(crate) healthy: Duration,
}

/// Delays that double.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    growth: Growth,
    /// The delay that was given last, and its end.
    last: Option<(Duration, Instant)>,
}

impl Backoff {
    pub(crate) const fn new(growth: Growth) -> Self {
        Self { growth, last: None }
    }

    /// Something went wrong at `now`: how long to wait before it is tried again. The time in which
    /// it was waited counts neither as healthy nor as ill.
    pub(crate) fn fail(&mut self, now: Instant) -> Duration {
        let delay = match self.last {
            Some((delay, end)) if now.saturating_duration_since(end) < self.growth.healthy => {
                delay.saturating_mul(2).min(self.growth.max)
            }
            _ => self.growth.base,
        };
        self.last = Some((delay, now + delay));
        delay
    }

    /// All is well: the next delay is the first again.
    pub(crate) fn forget(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const GROWTH: Growth = Growth {
        base: MS,
        max: Duration::from_millis(50),
        healthy: Duration::from_secs(1),
    };

    #[test]
    fn delays_double_from_the_first_to_the_longest() {
        let mut backoff = Backoff::new(GROWTH);
        let mut now = Instant::now();
        let delays: Vec<_> = (0..8)
            .map(|_| {
                let delay = backoff.fail(now);
                now += delay;
                delay.as_millis()
            })
            .collect();
        assert_eq!(delays, [1, 2, 4, 8, 16, 32, 50, 50]);
    }

    #[test]
    fn what_goes_well_for_long_enough_after_the_delay_is_forgotten() {
        let mut backoff = Backoff::new(GROWTH);
        let start = Instant::now();
        assert_eq!(backoff.fail(start), MS);
        assert_eq!(backoff.fail(start + GROWTH.healthy), 2 * MS);
        let ends = start + GROWTH.healthy + 2 * MS;
        assert_eq!(backoff.fail(ends + GROWTH.healthy - MS), 4 * MS);
        let ends = ends + GROWTH.healthy - MS + 4 * MS;
        assert_eq!(backoff.fail(ends + GROWTH.healthy), MS);
    }

    #[test]
    fn delays_are_forgotten_at_once_if_told() {
        let mut backoff = Backoff::new(GROWTH);
        let now = Instant::now();
        backoff.fail(now);
        backoff.fail(now);
        backoff.forget();
        assert_eq!(backoff.fail(now), MS);
    }
}
