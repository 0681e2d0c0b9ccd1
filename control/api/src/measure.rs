//! Samples of all counters, from which clients compute rates.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Index;

use ringway_bridge::DropReason;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::info::WorkerInfo;
use crate::value::PortName;

/// Frames that were dropped, by reason; a reason that is absent has none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drops(pub BTreeMap<String, u64>);

impl Drops {
    /// The sum over all reasons.
    pub fn total(&self) -> u64 {
        self.0.values().fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Adds the counts of `other`.
    pub fn add(&mut self, other: &Self) {
        for (reason, n) in &other.0 {
            let count = self.0.entry(reason.clone()).or_default();
            *count = count.saturating_add(*n);
        }
    }

    /// What was counted since `earlier`; a count that fell was reset, so all of it is new.
    pub fn since(&self, earlier: &Self) -> Self {
        let delta = |reason: &String, n: u64| {
            let before = earlier.0.get(reason).copied().unwrap_or(0);
            n.checked_sub(before).unwrap_or(n)
        };
        self.0
            .iter()
            .map(|(reason, n)| (reason.clone(), delta(reason, *n)))
            .filter(|(_, n)| *n > 0)
            .collect::<BTreeMap<_, _>>()
            .into()
    }
}

impl From<BTreeMap<String, u64>> for Drops {
    fn from(counts: BTreeMap<String, u64>) -> Self {
        Self(counts)
    }
}

impl FromIterator<(DropReason, u64)> for Drops {
    /// The counts that are not zero.
    fn from_iter<I: IntoIterator<Item = (DropReason, u64)>>(counts: I) -> Self {
        let counts = counts.into_iter().filter(|(_, n)| *n > 0);
        Self(
            counts
                .map(|(reason, n)| (reason.as_str().to_owned(), n))
                .collect(),
        )
    }
}

impl Drops {
    /// The reasons with a count that is not zero, in the order of [`DropReason::ALL`].
    pub fn nonzero(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        let counts = DropReason::ALL
            .into_iter()
            .map(|reason| (reason, self[reason]));
        counts.filter(|(_, n)| *n > 0)
    }
}

impl Index<DropReason> for Drops {
    type Output = u64;

    fn index(&self, reason: DropReason) -> &u64 {
        self.0.get(reason.as_str()).unwrap_or(&0)
    }
}

impl JsonSchema for Drops {
    fn schema_name() -> Cow<'static, str> {
        "Drops".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let reasons: serde_json::Map<_, _> = DropReason::ALL
            .into_iter()
            .map(|reason| {
                let count = serde_json::json!({
                    "type": "integer", "minimum": 0, "description": reason.describe(),
                });
                (reason.as_str().to_owned(), count)
            })
            .collect();
        json_schema!({
            "type": "object",
            "description": "Frames that were dropped, by reason; a reason that is absent has none.",
            "properties": reasons,
            "additionalProperties": { "type": "integer", "minimum": 0 },
        })
    }
}

/// All counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Sample {
    /// When: the daemon host's CLOCK_MONOTONIC, in nanoseconds.
    pub monotonic_ns: u64,
    /// Pairs of ports that exchanged frames since both were added.
    pub pairs: Vec<PairCounters>,
    /// All ports, by name.
    pub ports: Vec<PortSample>,
    /// All workers, by number.
    pub workers: Vec<WorkerSample>,
}

/// Frames from one port to another since both were added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PairCounters {
    /// The source port.
    pub from: PortName,
    /// The destination port.
    pub to: PortName,
    /// Frames delivered, each flooded copy counted.
    pub frames: u64,
    /// L2 bytes delivered, without FCS and virtio-net headers.
    pub bytes: u64,
    /// Frames for this destination that it could not take.
    pub drops: Drops,
}

impl PairCounters {
    /// Two ports that exchanged nothing yet.
    pub fn new(from: PortName, to: PortName) -> Self {
        Self {
            from,
            to,
            frames: 0,
            bytes: 0,
            drops: Drops::default(),
        }
    }
}

/// A port's part of a sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortSample {
    /// Its name.
    pub name: PortName,
    /// When it was added, by the clock of `monotonic_ns`: another value under the same name means
    /// that the port was added again and its counters began at zero.
    pub added_monotonic_ns: u64,
    /// Frames from this port that found no destination or broke a rule: in no pair's drops.
    pub rx_drops: Drops,
}

/// A worker's part of a sample: time since the daemon started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerSample {
    /// Its number.
    pub index: u16,
    /// The CPU it is pinned to.
    pub cpu: usize,
    /// Time in turns that moved frames.
    pub busy_ns: u64,
    /// Time polling without finding a frame.
    pub polling_ns: u64,
    /// Time asleep.
    pub asleep_ns: u64,
}

impl From<&WorkerInfo> for WorkerSample {
    fn from(worker: &WorkerInfo) -> Self {
        Self {
            index: worker.index,
            cpu: worker.cpu,
            busy_ns: worker.busy_ns,
            polling_ns: worker.polling_ns,
            asleep_ns: worker.asleep_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_since_an_earlier_sample_leave_out_what_did_not_move() {
        let drops = |list: &[(&str, u64)]| -> Drops {
            Drops(list.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect())
        };
        let earlier = drops(&[("ring_full", 5), ("runt", 2), ("too_long", 9)]);
        let later = drops(&[("ring_full", 7), ("runt", 2), ("too_long", 3)]);
        let since = later.since(&earlier);
        assert_eq!(since, drops(&[("ring_full", 2), ("too_long", 3)]));
        assert_eq!(since.total(), 5);
    }

    #[test]
    fn every_drop_reason_is_in_the_schema() {
        let schema = schemars::schema_for!(Drops);
        for reason in DropReason::ALL {
            assert!(schema.as_value()["properties"][reason.as_str()].is_object());
        }
    }
}
