//! Medians, ratios and what surrounds a measurement.

use std::fs;
use std::process::Command;

use serde::Serialize;

/// Median and quartiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) lower_quartile: f64,
    pub(crate) median: f64,
    pub(crate) upper_quartile: f64,
    pub(crate) best: f64,
    pub(crate) samples: usize,
}

impl Spread {
    /// Of these samples, if there are any; quartiles are interpolated.
    pub(crate) fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let best = *sorted.last()?;
        let at = |share: f64| {
            let position = share * (sorted.len() - 1) as f64;
            let (below, above) = (position.floor(), position.ceil());
            let value = |index: f64| usize::try_from(whole(index)).map(|index| sorted[index]);
            let (low, high) = (value(below).unwrap_or(best), value(above).unwrap_or(best));
            low + (high - low) * (position - below)
        };
        Some(Self {
            lower_quartile: at(0.25),
            median: at(0.5),
            upper_quartile: at(0.75),
            best,
            samples: sorted.len(),
        })
    }
}

/// The whole part of a number that is not negative; what doesn't fit is the nearest that does.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the conversion saturates"
)]
pub(crate) fn whole(number: f64) -> u64 {
    number as u64
}

/// What limits a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Limit {
    /// The load waited: the switch has no more to give.
    SwitchBound,
    /// The load had always work: the switch may have more to give.
    LoadBound,
}

impl Limit {
    /// A load that was busy for more than this share had hardly a moment to wait.
    const BUSY: f64 = 0.9;

    pub(crate) fn of(busy_share: f64) -> Self {
        if busy_share > Self::BUSY {
            Self::LoadBound
        } else {
            Self::SwitchBound
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::SwitchBound => "switch-bound",
            Self::LoadBound => "load-bound",
        }
    }
}

/// Where a measurement was taken.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Environment {
    pub(crate) cpu: String,
    pub(crate) kernel: String,
    pub(crate) version: &'static str,
    /// Of the tree from which the program is run, if it is one.
    pub(crate) revision: Option<String>,
}

impl Environment {
    pub(crate) fn of_this_machine() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let revision = Command::new("git")
            .args(["describe", "--always", "--dirty"])
            .output()
            .ok()
            .filter(|output| output.status.success())
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        Self {
            cpu: model.to_owned(),
            kernel: kernel.trim().to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            revision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_interpolated_and_order_does_not_matter() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread.median, 2.5);
        assert_eq!(spread.lower_quartile, 1.75);
        assert_eq!(spread.upper_quartile, 3.25);
        assert_eq!(spread.best, 4.0);
        assert_eq!(Spread::of(&[7.0]).unwrap().upper_quartile, 7.0);
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn a_load_that_never_waits_is_the_limit() {
        assert_eq!(Limit::of(0.97), Limit::LoadBound);
        assert_eq!(Limit::of(0.5), Limit::SwitchBound);
    }
}
