//! What limits a result, percentiles, and what surrounds a measurement.

use hdrhistogram::Histogram;
use serde::Serialize;

use super::open_loop::{RateResult, Stalls, nanos};
use crate::machine::Machine;

/// Shares of time that tell what limits a result.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shares {
    /// In which the load moved frames.
    pub(crate) load_busy: f64,
    /// In which others kept the load off its core.
    pub(crate) load_disturbed: f64,
    /// In which the switch moved frames, if it tells.
    pub(crate) switch_busy: Option<f64>,
}

/// What limits a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Limit {
    /// The load waited: the switch has no more to give.
    SwitchBound,
    /// The load had always work: the switch may have more to give.
    LoadBound,
    /// Others had the load's core for much of the time, and probably the switch's.
    Disturbed,
    /// Both waited: for each other, that is for cache lines that travel between cores.
    BothWait,
    /// The switch copies about as fast as a loop that does nothing else.
    CopyBound,
}

impl Limit {
    /// A side that was busy for more than this share had hardly a moment to wait.
    const BUSY: f64 = 0.9;
    /// A load that was kept waiting for more than this share can't tell much of a switch.
    const DISTURBED: f64 = 0.2;
    /// Of the rate of a plain copy loop.
    const COPY: f64 = 0.8;

    pub(crate) fn of(shares: Shares) -> Self {
        if shares.load_disturbed > Self::DISTURBED {
            Self::Disturbed
        } else if shares.load_busy > Self::BUSY {
            Self::LoadBound
        } else if shares.switch_busy.is_some_and(|busy| busy < Self::BUSY) {
            Self::BothWait
        } else {
            Self::SwitchBound
        }
    }

    /// The same with the switch's rate by that of a plain copy loop.
    pub(crate) fn or_copy(self, by_copy: Option<f64>) -> Self {
        match self {
            Self::SwitchBound | Self::BothWait if by_copy >= Some(Self::COPY) => Self::CopyBound,
            other => other,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SwitchBound => "switch-bound",
            Self::LoadBound => "load-bound",
            Self::Disturbed => "disturbed",
            Self::BothWait => "both-wait",
            Self::CopyBound => "copy-bound",
        }
    }
}

/// Where a measurement was taken, and by which version.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Environment {
    #[serde(flatten)]
    machine: Machine,
    version: &'static str,
}

impl Environment {
    pub(crate) fn here() -> Self {
        Self {
            machine: Machine::here(),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl std::fmt::Display for Environment {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Machine {
            cpu,
            cpus,
            kernel,
            revision,
        } = &self.machine;
        let (version, revision) = (self.version, revision.as_deref().unwrap_or("unknown"));
        write!(
            out,
            "{cpu} ({cpus} CPUs), kernel {kernel}, ringway-bench {version}, revision {revision}"
        )
    }
}

/// The stalls of a run in open loop.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct StallRow {
    /// Times of 1 ms or more in which the load did not look at its rings.
    pub(crate) load_stalls: u64,
    pub(crate) load_longest_stall_ns: u64,
    /// Share of the time that all of them took.
    pub(crate) load_stalled_share: f64,
    /// Share of the frames that took 1 ms or more, whoever stalled.
    pub(crate) frames_late_share: f64,
}

impl StallRow {
    pub(crate) fn of(result: &RateResult) -> Self {
        let Stalls {
            count,
            longest,
            sum,
        } = result.stalls;
        Self {
            load_stalls: count,
            load_longest_stall_ns: nanos(longest),
            load_stalled_share: sum.as_secs_f64() / result.elapsed.as_secs_f64(),
            frames_late_share: result.late_share(),
        }
    }
}

impl std::fmt::Display for StallRow {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "{} stalls of the load, longest {:.1} ms, {:.3} % of the frames late",
            self.load_stalls,
            self.load_longest_stall_ns as f64 / 1e6,
            100.0 * self.frames_late_share
        )
    }
}

/// Percentiles of a latency in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Percentiles {
    pub(crate) min: u64,
    pub(crate) p50: u64,
    pub(crate) p90: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
    pub(crate) max: u64,
}

impl Percentiles {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |percent| histogram.value_at_percentile(percent);
        Self {
            min: histogram.min(),
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            p999: at(99.9),
            max: histogram.max(),
        }
    }
}

impl std::fmt::Display for Percentiles {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |ns: u64| ns as f64 / 1e3;
        write!(
            out,
            "min {:.1} p50 {:.1} p90 {:.1} p99 {:.1} p99.9 {:.1} max {:.1} us",
            us(self.min),
            us(self.p50),
            us(self.p90),
            us(self.p99),
            us(self.p999),
            us(self.max)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_tell_the_limit() {
        let limit = |load_busy, load_disturbed, switch_busy| {
            Limit::of(Shares {
                load_busy,
                load_disturbed,
                switch_busy,
            })
        };
        assert_eq!(limit(0.97, 0.0, Some(1.0)), Limit::LoadBound);
        assert_eq!(limit(0.5, 0.0, Some(0.97)), Limit::SwitchBound);
        assert_eq!(limit(0.5, 0.0, None), Limit::SwitchBound);
        assert_eq!(limit(0.5, 0.0, Some(0.6)), Limit::BothWait);
        assert_eq!(limit(0.97, 0.5, None), Limit::Disturbed);
        assert_eq!(Limit::SwitchBound.or_copy(Some(0.85)), Limit::CopyBound);
        assert_eq!(Limit::SwitchBound.or_copy(Some(0.5)), Limit::SwitchBound);
        assert_eq!(Limit::SwitchBound.or_copy(None), Limit::SwitchBound);
        assert_eq!(Limit::LoadBound.or_copy(Some(0.85)), Limit::LoadBound);
    }
}
