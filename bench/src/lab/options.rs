//! The command line of the lab, and the plan that it amounts to.

use std::path::PathBuf;

use clap::Args;
use ringway_control::config::CpuList;

use super::accel::AccelChoice;
use super::measure::{Effort, Test, TestGroup};
use super::network::LabSwitch;
use super::scenario::Scenario;
use super::shape::{HostPort, NetworkShape, OffloadSet, OffloadsOfGuests};
use crate::daemon::Programs;
use crate::process::sibling;

/// Queue pairs beyond the vCPUs of any guest here make no sense.
const MAX_QUEUE_PAIRS: i64 = 16;

/// Options of `ringway-bench lab`.
///
/// Without options: one and two queue pairs at MTU 1500 and 9000, all tests, three seconds each.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// Queue pairs of each guest, also its vCPUs [default: 1,2; with --quick or --baseline: 1]
    #[arg(long, value_delimiter = ',', value_name = "N,…",
          value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUE_PAIRS))]
    queues: Vec<u16>,

    /// L3 MTU of every port [default: 1500,9000; with --quick or --baseline: 1500]
    #[arg(long, value_delimiter = ',', value_name = "BYTES,…",
          value_parser = clap::value_parser!(u16).range(576..=9216))]
    mtu: Vec<u16>,

    /// The host's port on ringwayd (on a Linux bridge the host is at the bridge itself)
    #[arg(long, value_enum, default_value_t = HostPort::Tap)]
    host: HostPort,

    /// Offloads of the guests' NICs: all, csum (checksums only), none; as in `all/none` for guest a
    /// and guest b [default: all; with --scenario af-xdp: all,csum,none]
    #[arg(long, value_delimiter = ',', value_name = "SET,…")]
    offloads: Vec<OffloadsOfGuests>,

    /// Length of each iperf3 run [default: 3; with --quick: 1]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: Option<u32>,

    /// With --baseline: how often every test runs on both, in turns
    #[arg(long, value_name = "N", default_value_t = 3,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pairs: u32,

    /// Boot a second set of guests on QEMU tap + Linux bridge (no vhost) and print the ratios
    #[arg(long)]
    baseline: bool,

    /// Measure QEMU tap + Linux bridge alone, without ringwayd
    #[arg(long, conflicts_with_all = ["baseline", "scenario"])]
    baseline_only: bool,

    /// What to measure
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "TEST,…",
        default_value = "ping,tcp,udp"
    )]
    tests: Vec<TestGroup>,

    /// Offered rate of the UDP tests, Mbit/s of payload
    #[arg(long, value_name = "MBIT", default_value_t = 10)]
    udp_rate: u32,

    /// One shape and one-second runs: proves that it works, says little about speed
    #[arg(long)]
    quick: bool,

    /// Run acceptance scenarios instead; exit code 1 if one fails
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,…",
        conflicts_with = "baseline"
    )]
    scenario: Vec<Scenario>,

    /// What the guests run on
    #[arg(long, value_enum, default_value_t = AccelChoice::Auto)]
    accel: AccelChoice,

    /// CPUs of ringwayd's workers [default: the last CPU]
    #[arg(long, value_name = "LIST")]
    worker_cpus: Option<String>,

    /// The daemon [default: beside this program]
    #[arg(long, value_name = "PATH")]
    ringwayd: Option<PathBuf>,

    /// The operator's tool [default: beside this program]
    #[arg(long, value_name = "PATH")]
    ringway: Option<PathBuf>,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// Keep the logs also when all is well
    #[arg(long)]
    keep_logs: bool,
}

/// What shapes are made of. Of what the operator chose a list is empty where nothing was said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choices {
    pub(crate) queues: Vec<u16>,
    pub(crate) mtus: Vec<u16>,
    pub(crate) offloads: Vec<OffloadsOfGuests>,
}

/// What to do, with every default filled in.
#[derive(Debug)]
pub(crate) struct LabPlan {
    given: Choices,
    defaults: Choices,
    host: HostPort,
    pub(crate) pairs: u32,
    pub(crate) switches: Vec<LabSwitch>,
    pub(crate) tests: Vec<Test>,
    pub(crate) effort: Effort,
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) accel: AccelChoice,
    pub(crate) programs: Programs,
    pub(crate) json: bool,
    pub(crate) keep_logs: bool,
}

impl LabArgs {
    pub(crate) fn plan(self) -> LabPlan {
        let up_to = if self.quick || self.baseline { 1 } else { 2 };
        let mut tests: Vec<Test> = self
            .tests
            .iter()
            .flat_map(|group| group.tests())
            .copied()
            .collect();
        tests.sort();
        tests.dedup();
        let switches = match (self.baseline, self.baseline_only) {
            (true, _) => vec![LabSwitch::Ringway, LabSwitch::LinuxBridge],
            (_, true) => vec![LabSwitch::LinuxBridge],
            _ => vec![LabSwitch::Ringway],
        };
        LabPlan {
            given: Choices {
                queues: self.queues,
                mtus: self.mtu,
                offloads: self.offloads,
            },
            defaults: Choices {
                queues: [1, 2][..up_to].to_vec(),
                mtus: [1500, 9000][..up_to].to_vec(),
                offloads: vec![OffloadsOfGuests::same(OffloadSet::All)],
            },
            host: self.host,
            pairs: if self.baseline { self.pairs } else { 1 },
            switches,
            tests,
            effort: Effort {
                seconds: self.seconds.unwrap_or(if self.quick { 1 } else { 3 }),
                udp_mbit_per_s: self.udp_rate,
            },
            scenarios: Scenario::expand(&self.scenario),
            accel: self.accel,
            programs: Programs {
                ringwayd: self.ringwayd.unwrap_or_else(|| sibling("ringwayd")),
                ringway: self.ringway.unwrap_or_else(|| sibling("ringway")),
                worker_cpus: self.worker_cpus.unwrap_or_else(last_cpu),
            },
            json: self.json,
            keep_logs: self.keep_logs,
        }
    }
}

impl LabPlan {
    /// Every combination of what was chosen, on the host's port that was chosen.
    pub(crate) fn shapes(&self) -> Vec<NetworkShape> {
        self.shapes_or(&self.defaults, self.host)
    }

    /// As [`LabPlan::shapes`], with other defaults.
    pub(crate) fn shapes_or(&self, defaults: &Choices, host: HostPort) -> Vec<NetworkShape> {
        let mut shapes = Vec::new();
        for &queue_pairs in or(&self.given.queues, &defaults.queues) {
            for &mtu_bytes in or(&self.given.mtus, &defaults.mtus) {
                for &offloads in or(&self.given.offloads, &defaults.offloads) {
                    shapes.push(NetworkShape {
                        queue_pairs,
                        mtu_bytes,
                        host,
                        offloads,
                    });
                }
            }
        }
        shapes
    }

    pub(crate) fn needs_ringway(&self) -> bool {
        self.switches.contains(&LabSwitch::Ringway) || !self.scenarios.is_empty()
    }

    /// Steps of the progress bar, about.
    pub(crate) fn steps(&self) -> u64 {
        if !self.scenarios.is_empty() {
            return 1 + self.scenarios.len() as u64;
        }
        let tests = self.tests.len() as u64 * u64::from(self.pairs);
        1 + self.shapes().len() as u64 * self.switches.len() as u64 * (1 + tests)
    }
}

fn or<'a, T>(given: &'a [T], default: &'a [T]) -> &'a [T] {
    if given.is_empty() { default } else { given }
}

/// The last CPU that is allowed: guests prefer it no more than the first ones, and the kernel's own
/// work prefers CPU 0.
fn last_cpu() -> String {
    let allowed = CpuList::allowed().ok();
    let last = allowed.and_then(|cpus| cpus.highest()).unwrap_or(0);
    last.to_string()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: LabArgs,
    }

    fn plan(words: &[&str]) -> LabPlan {
        let words = ["lab"].iter().chain(words);
        Cli::try_parse_from(words)
            .expect("valid options")
            .args
            .plan()
    }

    #[test]
    fn default_is_every_shape_on_ringway_once() {
        let plan = plan(&[]);
        assert_eq!(plan.shapes().len(), 4);
        assert_eq!(plan.switches, [LabSwitch::Ringway]);
        assert_eq!((plan.pairs, plan.tests.len()), (1, 7));
    }

    #[test]
    fn baseline_alternates_on_one_shape_unless_told() {
        let plan = plan(&["--baseline", "--queues", "2", "--tests", "tcp,tcp-guests"]);
        assert_eq!(
            plan.shapes(),
            [NetworkShape {
                queue_pairs: 2,
                mtu_bytes: 1500,
                host: HostPort::Tap,
                offloads: OffloadsOfGuests::same(OffloadSet::All),
            }]
        );
        assert_eq!(plan.switches, [LabSwitch::Ringway, LabSwitch::LinuxBridge]);
        assert_eq!(
            (plan.pairs, plan.tests.len()),
            (3, 4),
            "a test named twice runs once"
        );
    }

    #[test]
    fn host_and_offloads_are_part_of_each_shape() {
        let words = ["--quick", "--host", "af-xdp", "--offloads", "csum,all/none"];
        let shapes = plan(&words).shapes();
        assert!(shapes.iter().all(|shape| shape.host == HostPort::AfXdp));
        let offloads = shapes.iter().map(|shape| shape.offloads.to_string());
        assert_eq!(offloads.collect::<Vec<_>>(), ["csum", "all/none"]);
    }

    #[test]
    fn defaults_of_a_scenario_yield_to_what_was_given() {
        let defaults = Choices {
            queues: vec![2],
            mtus: vec![1500, 9000],
            offloads: vec![OffloadsOfGuests::same(OffloadSet::None)],
        };
        let shapes = plan(&["--mtu", "576"]).shapes_or(&defaults, HostPort::AfXdp);
        assert_eq!(shapes.len(), 1);
        assert_eq!((shapes[0].queue_pairs, shapes[0].mtu_bytes), (2, 576));
    }

    #[test]
    fn baseline_only_needs_no_daemon() {
        assert!(!plan(&["--baseline-only"]).needs_ringway());
        assert!(plan(&["--scenario", "idle"]).needs_ringway());
    }

    #[test]
    fn bad_values_are_usage_errors() {
        for words in [
            ["lab", "--queues", "0"],
            ["lab", "--mtu", "90000"],
            ["lab", "--tests", "x"],
            ["lab", "--offloads", "tso"],
            ["lab", "--host", "veth"],
        ] {
            assert!(Cli::try_parse_from(words).is_err(), "{words:?}");
        }
    }
}
