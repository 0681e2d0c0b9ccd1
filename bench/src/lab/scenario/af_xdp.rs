//! The host behind AF_XDP on a veth pair, guests with every kind of offloads: each byte and each
//! checksum is right.

use anyhow::Result;
use serde_json::Value;

use super::super::capture::Capture;
use super::super::guest::NAMES;
use super::super::measure::{Effort, Figure, Test, measure};
use super::super::network::{HOST_INTERFACE, HOST_PORT, LabNetwork};
use super::super::options::Choices;
use super::super::shape::{HostPort, NetworkShape, OffloadSet, OffloadsOfGuests};
use super::{Findings, ScenarioStage};
use crate::interrupt;

/// What runs beside a capture of what the host receives, and how many packets must have been
/// checked at least.
const CAPTURED: [(Test, usize); 2] = [(Test::TcpAHost, 1_000), (Test::UdpAHost, 100)];

const OTHERS: [Test; 7] = [
    Test::PingAB,
    Test::PingAHost,
    Test::TcpHostA,
    Test::UdpHostA,
    Test::BytesAB,
    Test::BytesAHost,
    Test::BytesHostA,
];

/// What UDP may lose at a moderate rate: emulated guests are slow at times.
const MAX_LOST_PERCENT: f64 = 20.0;

/// Ethernet header: what a frame is longer than its MTU.
const ETHERNET_BYTES: u32 = 14;

pub(super) fn af_xdp(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let defaults = Choices {
        queues: vec![2],
        mtus: vec![1500, 9000],
        offloads: [OffloadSet::All, OffloadSet::Csum, OffloadSet::None]
            .map(OffloadsOfGuests::same)
            .to_vec(),
    };
    let mut findings = Findings::default();
    for shape in stage.plan.shapes_or(&defaults, HostPort::AfXdp) {
        stage.progress.say(&format!("af-xdp: {}", shape.tag()));
        let mut run = ShapeRun {
            stage,
            shape,
            network: stage.guests(shape)?,
            findings: Findings::default(),
        };
        run.negotiated()?;
        for (test, at_least) in CAPTURED {
            run.captured(test, at_least)?;
        }
        for test in OTHERS {
            run.test(test)?;
        }
        run.work_of_ringwayd()?;
        run.finish(&mut findings);
    }
    Ok(findings)
}

/// All tests of one shape.
struct ShapeRun<'a> {
    stage: &'a ScenarioStage<'a>,
    shape: NetworkShape,
    network: LabNetwork,
    findings: Findings,
}

impl ShapeRun<'_> {
    /// Guests have the offloads that this shape is about.
    fn negotiated(&mut self) -> Result<()> {
        for (name, offloads) in NAMES.iter().zip(self.shape.offloads.0) {
            let mut expected = Vec::new();
            if offloads.checksums() {
                expected.push("checksum");
            }
            if offloads.segments() {
                expected.push("tso4");
            }
            let shown = self.network.control()?.port(name)?;
            for (field, offloads) in [
                ("rx_offloads", shown.rx_offloads),
                ("tx_offloads", shown.tx_offloads),
            ] {
                let has = |wanted: &&str| offloads.iter().any(|offload| offload == wanted);
                let found: Vec<_> = ["checksum", "tso4"].into_iter().filter(has).collect();
                self.findings.require(found == expected, || {
                    format!("guest {name} {field} {found:?} instead of {expected:?}")
                });
            }
        }
        Ok(())
    }

    fn test(&mut self, test: Test) -> Result<()> {
        let effort = Effort {
            seconds: 2,
            ..self.stage.plan.effort
        };
        let outcome = measure(&mut self.network, test, effort);
        interrupt::check()?;
        let findings = &mut self.findings;
        match outcome {
            Ok(figure) => {
                findings.require(figure.passed(), || format!("{} is 0", test.name()));
                if let Figure::Udp { lost_percent, .. } = figure {
                    findings.require(lost_percent <= MAX_LOST_PERCENT, || {
                        format!("{}: {lost_percent:.1} % lost", test.name())
                    });
                }
                if let Figure::Bytes { .. } = figure {
                    findings.words.push(format!("{} unchanged", test.name()));
                }
                let value = serde_json::to_value(&figure)?;
                findings.figures.insert(format!("{test:?}"), value);
                let (headline, unit) = (figure.headline(), test.unit());
                let said = format!("{} {headline:.2} {unit}", test.name());
                self.stage
                    .progress
                    .say(&format!("af-xdp: {said} ({})", figure.remark()));
            }
            Err(error) => {
                self.stage.progress.say(&format!("af-xdp: {error:#}"));
                findings.failures.push(format!("{error:#}"));
            }
        }
        Ok(())
    }

    /// A test while all that reaches the host is captured; no frame of that may be wrong.
    fn captured(&mut self, test: Test, at_least: usize) -> Result<()> {
        let folder = self.network.folder();
        let capture = Capture::start(&self.network.namespace, HOST_INTERFACE, folder)?;
        self.test(test)?;
        let checked = capture.check()?;
        let (findings, sums) = (&mut self.findings, &checked.checksums);
        let allowed = u32::from(self.shape.mtu_bytes) + ETHERNET_BYTES;
        findings.require(checked.longest_bytes <= allowed, || {
            format!(
                "{}: a frame of {} bytes",
                test.name(),
                checked.longest_bytes
            )
        });
        findings.require(sums.wrong == 0, || {
            let first = sums.first_wrong.as_deref().unwrap_or_default();
            format!("{}: {} wrong checksums: {first}", test.name(), sums.wrong)
        });
        findings.require(sums.right == sums.packets && sums.right >= at_least, || {
            format!(
                "{}: {} of {} packets have right checksums, {at_least} at least were expected",
                test.name(),
                sums.right,
                sums.packets
            )
        });
        findings.words.push(format!(
            "{}: {} frames of at most {} bytes, {} checksums right",
            test.name(),
            checked.frames,
            checked.longest_bytes,
            sums.right
        ));
        let value = serde_json::to_value(&checked)?;
        findings.figures.insert(format!("{test:?}_captured"), value);
        Ok(())
    }

    /// What guest a left to others was done by ringwayd, and only that.
    fn work_of_ringwayd(&mut self) -> Result<()> {
        let [a, b] = self.shape.offloads.0;
        let control = self.network.control()?;
        let of_host = control.port(HOST_PORT)?.port.counters;
        let of_b = control.port("b")?.port.counters;
        let (completed, cut) = ("tx_csum_completed", "tx_gso_frames");
        let b_needs_segments = a.segments() && !b.segments();
        for (port, field, count, is_expected) in [
            (
                HOST_PORT,
                completed,
                of_host.tx_csum_completed,
                a.checksums(),
            ),
            (HOST_PORT, cut, of_host.tx_gso_frames, a.segments()),
            ("b", cut, of_b.tx_gso_frames, b_needs_segments),
        ] {
            self.findings.require((count > 0) == is_expected, || {
                format!("{field} of {port} is {count}")
            });
            let key = format!("{port}_{field}");
            self.findings
                .note(&key, count, format!("{field} of {port} {count}"));
        }
        Ok(())
    }

    /// Adds what was found to the scenario's findings.
    fn finish(self, findings: &mut Findings) {
        let tag = self.shape.tag();
        let Findings {
            failures,
            figures,
            words,
        } = self.findings;
        let failures = failures
            .into_iter()
            .map(|failure| format!("{tag}: {failure}"));
        findings.failures.extend(failures);
        findings.words.push(format!("{tag}: {}", words.join(", ")));
        findings.figures.insert(tag, Value::from(figures));
    }
}
