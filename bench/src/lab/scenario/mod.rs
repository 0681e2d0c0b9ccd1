//! Acceptance runs: each ends with a line PASS or FAIL and its figures.

mod access;
mod af_xdp;
mod churn;
mod neighbours;
mod platform;
mod quiet;
mod recovery;
mod zero_copy;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Map, Value};

use super::measure::{Effort, Test, measure};
use super::network::{Base, LabNetwork, LabSwitch};
use super::options::LabPlan;
use super::progress::Progress;
use super::report::LabMachine;
use super::shape::NetworkShape;
use crate::hint::with_hint;
use crate::interrupt;

/// What to prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scenario {
    /// CPU of ringwayd with two silent guests, and how fast the first frame after idle passes
    Idle,
    /// TCP between the guests while a third port is added and deleted in a loop
    Churn,
    /// ringwayd killed with -9 and started again under traffic, ten times
    DaemonKill,
    /// QEMU killed with -9: port down, memory and files given back, boots again
    GuestKill,
    /// Guest rebooted, machine reset, driver unbound and bound
    Reboot,
    /// Memory of ringwayd besides guest memory
    Rss,
    /// Every shape: ping and TCP guest-guest and guest-host, both ways
    Matrix,
    /// The host behind AF_XDP, guests with all, some and no offloads, MTU 1500 and 9000, two queue
    /// pairs: ping, TCP, UDP, hashed bytes, and every frame that reaches the host has right
    /// checksums and length
    AfXdp,
    /// TCP from the host to a guest while the host floods another that is frozen, slow, or stops and
    /// goes: no frame for the first is dropped
    Neighbours,
    /// QEMU as a user of its own, on sockets that its group may open and nobody else
    Access,
    /// Guests whose NICs have iommu_platform=on, as confidential guests' have, with no virtual IOMMU
    Platform,
    /// All of the above
    All,
    /// ringwayd in a guest, its NIC (virtio_net, igb) in zero-copy: modes, traffic, kill -9. Not
    /// part of all: `bench/install-packages.sh zero-copy` gets the kernel that has it
    ZeroCopy,
}

impl Scenario {
    /// `all` spelled out, nothing twice.
    pub(crate) fn expand(chosen: &[Scenario]) -> Vec<Scenario> {
        let all = chosen.contains(&Scenario::All);
        let by_all = |one: Scenario| all && one != Scenario::ZeroCopy;
        Scenario::value_variants()
            .iter()
            .copied()
            .filter(|one| *one != Scenario::All)
            .filter(|one| by_all(*one) || chosen.contains(one))
            .collect()
    }

    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// What a scenario found.
#[derive(Debug, Default, Serialize)]
struct Findings {
    /// What did not hold, in words; empty when all did.
    failures: Vec<String>,
    figures: Map<String, Value>,
    #[serde(skip)]
    words: Vec<String>,
}

impl Findings {
    /// A figure for the JSON, and the words for the line.
    fn note(&mut self, name: &str, value: impl Into<Value>, words: String) {
        self.figures.insert(name.to_owned(), value.into());
        self.words.push(words);
    }

    /// Something that has to hold.
    fn require(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.failures.push(otherwise());
        }
    }

    fn line(&self, scenario: Scenario) -> String {
        let word = if self.failures.is_empty() {
            "PASS"
        } else {
            "FAIL"
        };
        let mut parts = self.failures.clone();
        parts.extend(self.words.iter().cloned());
        format!("{word} {}: {}", scenario.name(), parts.join("; "))
    }
}

#[derive(Serialize)]
struct ScenarioOutcome {
    scenario: Scenario,
    passed: bool,
    duration_seconds: f64,
    #[serde(flatten)]
    findings: Findings,
}

#[derive(Serialize)]
struct Outcomes {
    machine: LabMachine,
    scenarios: Vec<ScenarioOutcome>,
}

/// What scenarios work with.
struct ScenarioStage<'a> {
    plan: &'a LabPlan,
    base: Base,
    progress: &'a Progress,
}

impl ScenarioStage<'_> {
    /// ringwayd with its ports; no guest yet.
    fn switch(&self, shape: NetworkShape) -> Result<LabNetwork> {
        LabNetwork::new(LabSwitch::Ringway, shape, &self.base)
    }

    /// ringwayd with both guests up.
    fn guests(&self, shape: NetworkShape) -> Result<LabNetwork> {
        let mut network = self.switch(shape)?;
        network.boot()?;
        Ok(network)
    }

    /// What `run` finds with each shape, of which it is given the label.
    fn each_shape(
        &self,
        name: &str,
        run: impl Fn(&Self, NetworkShape, &str, &mut Findings) -> Result<()>,
    ) -> Result<Findings> {
        let mut findings = Findings::default();
        for shape in self.plan.shapes() {
            let label = shape.tag();
            self.progress.say(&format!("{name}: {label}"));
            run(self, shape, &label, &mut findings).with_context(|| label.clone())?;
        }
        Ok(findings)
    }

    /// The shape of scenarios that need only one.
    fn shape(&self) -> Result<NetworkShape> {
        self.plan
            .shapes()
            .first()
            .copied()
            .context("no queue count or MTU was given")
    }
}

/// Runs the scenarios one after the other, also after one failed. Whether all passed.
pub(crate) fn run_all(
    plan: &LabPlan,
    base: &Base,
    machine: LabMachine,
    progress: &Progress,
) -> Result<bool> {
    let mut outcomes = Vec::new();
    for &scenario in &plan.scenarios {
        progress.step(&format!("scenario {}", scenario.name()));
        let folder = base.folder.join(scenario.name());
        let base = Base {
            folder,
            ..base.clone()
        };
        let stage = ScenarioStage {
            plan,
            base,
            progress,
        };
        let started = Instant::now();
        let findings = match run(scenario, &stage) {
            Ok(findings) => findings,
            Err(error) => {
                interrupt::check()?;
                Findings {
                    failures: vec![with_hint(&error)],
                    ..Findings::default()
                }
            }
        };
        let line = findings.line(scenario);
        if plan.json {
            progress.say(&line);
        } else {
            progress.print(&line);
        }
        outcomes.push(ScenarioOutcome {
            scenario,
            passed: findings.failures.is_empty(),
            duration_seconds: started.elapsed().as_secs_f64(),
            findings,
        });
    }
    progress.finish();
    let passed = outcomes.iter().all(|outcome| outcome.passed);
    if plan.json {
        let outcomes = Outcomes {
            machine,
            scenarios: outcomes,
        };
        println!("{}", serde_json::to_string_pretty(&outcomes)?);
    }
    Ok(passed)
}

fn run(scenario: Scenario, stage: &ScenarioStage<'_>) -> Result<Findings> {
    match scenario {
        Scenario::Idle => quiet::idle(stage),
        Scenario::Rss => quiet::rss(stage),
        Scenario::Churn => churn::churn(stage),
        Scenario::DaemonKill => recovery::daemon_kill(stage),
        Scenario::GuestKill => recovery::guest_kill(stage),
        Scenario::Reboot => recovery::reboot(stage),
        Scenario::Matrix => matrix(stage),
        Scenario::AfXdp => af_xdp::af_xdp(stage),
        Scenario::Neighbours => neighbours::neighbours(stage),
        Scenario::Access => access::access(stage),
        Scenario::Platform => platform::platform(stage),
        Scenario::ZeroCopy => zero_copy::zero_copy(stage),
        Scenario::All => bail!("`all` is expanded before"),
    }
}

/// Tests of the matrix: both kinds of ping, TCP in all four directions.
const MATRIX_TESTS: [Test; 6] = [
    Test::PingAB,
    Test::PingAHost,
    Test::TcpAB,
    Test::TcpBA,
    Test::TcpAHost,
    Test::TcpHostA,
];

fn matrix(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    for shape in stage.plan.shapes() {
        let label = shape.tag();
        stage.progress.say(&format!("matrix: {label}"));
        let mut network = stage.guests(shape)?;
        let mut words = Vec::new();
        for test in MATRIX_TESTS {
            let effort = Effort {
                seconds: 2,
                ..stage.plan.effort
            };
            let outcome = measure(&mut network, test, effort);
            interrupt::check()?;
            match outcome {
                Ok(figure) => {
                    findings.require(figure.passed(), || format!("{label}: {} is 0", test.name()));
                    let key = format!("{label}-{test:?}");
                    findings.figures.insert(key, serde_json::to_value(&figure)?);
                    words.push(format!("{:.2}", figure.headline()));
                }
                Err(error) => findings.failures.push(format!("{label}: {error:#}")),
            }
        }
        findings.words.push(format!("{label} {}", words.join(" ")));
    }
    findings
        .words
        .push("(ms guest, ms host, Gbit/s a->b, b->a, guest->host, host->guest)".to_owned());
    Ok(findings)
}

/// One-second proofs that frames pass between all three, both ways.
fn traffic_passes(network: &mut LabNetwork, findings: &mut Findings, when: &str) -> Result<()> {
    let effort = Effort {
        seconds: 1,
        udp_mbit_per_s: 1,
    };
    for test in [Test::PingAB, Test::PingAHost, Test::TcpAB, Test::TcpBA] {
        let outcome = measure(network, test, effort);
        interrupt::check()?;
        match outcome {
            Ok(figure) => {
                findings.require(figure.passed(), || format!("{when}: {} is 0", test.name()));
            }
            Err(error) => findings.failures.push(format!("{when}: {error:#}")),
        }
    }
    Ok(())
}

/// Waits until something holds; whether it did in time.
fn holds_within(limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        if condition()? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        interrupt::sleep(Duration::from_millis(20))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_means_each_once() {
        let all = Scenario::expand(&[Scenario::All, Scenario::Idle]);
        // But for itself, and what takes a kernel of its own.
        let expected = Scenario::value_variants().len() - 2;
        assert_eq!(all.len(), expected);
        assert!(!all.contains(&Scenario::All) && !all.contains(&Scenario::ZeroCopy));
        let more = Scenario::expand(&[Scenario::ZeroCopy, Scenario::All]);
        assert_eq!(more.len(), expected + 1);
        assert_eq!(
            Scenario::expand(&[Scenario::Rss, Scenario::Rss]),
            [Scenario::Rss]
        );
        assert!(Scenario::expand(&[]).is_empty());
    }

    #[test]
    fn a_failure_comes_first_in_the_line() {
        let mut findings = Findings::default();
        findings.note("cpu_percent", 0.4, "0.4 % of a core".to_owned());
        assert_eq!(
            findings.line(Scenario::DaemonKill),
            "PASS daemon-kill: 0.4 % of a core"
        );
        findings.require(false, || "too slow".to_owned());
        assert_eq!(
            findings.line(Scenario::Idle),
            "FAIL idle: too slow; 0.4 % of a core"
        );
    }
}
