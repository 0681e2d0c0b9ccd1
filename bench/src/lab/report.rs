//! All figures of a run: one table, or one JSON object.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use super::accel::Accel;
use super::first_line;
use super::guest::QEMU;
use super::image::Image;
use super::measure::{Figure, Test};
use super::network::LabSwitch;
use super::shape::NetworkShape;
use crate::hint::with_hint;
use crate::machine::Machine;
use crate::stats::median;

/// Where the figures are from.
#[derive(Debug, Serialize)]
pub(crate) struct LabMachine {
    cpu: String,
    cpus: usize,
    host_kernel: String,
    guest_kernel: String,
    accel: Accel,
    accel_reason: String,
    qemu: String,
    iperf3: String,
    /// What `ringwayd --version` says; none if it has no part in the run.
    ringwayd: Option<String>,
    git_revision: Option<String>,
}

impl LabMachine {
    pub(crate) fn describe(
        image: &Image,
        accel: Accel,
        accel_reason: String,
        ringwayd: Option<String>,
    ) -> Result<LabMachine> {
        let host = Machine::here();
        Ok(LabMachine {
            cpu: host.cpu,
            cpus: host.cpus,
            host_kernel: host.kernel,
            guest_kernel: image.kernel_version.clone(),
            accel,
            accel_reason,
            qemu: first_line(QEMU, &["--version"])?,
            iperf3: first_line("iperf3", &["--version"])?,
            ringwayd,
            git_revision: host.revision.map(|revision| format!("revision {revision}")),
        })
    }

    fn lines(&self) -> String {
        let mut text = format!(
            "{} ({} CPUs), host {}, guests {} on {}\n{}, {}",
            self.cpu,
            self.cpus,
            self.host_kernel,
            self.guest_kernel,
            self.accel.name(),
            short_version(&self.qemu),
            short_version(&self.iperf3),
        );
        for part in [&self.ringwayd, &self.git_revision].into_iter().flatten() {
            let _ = write!(text, ", {part}");
        }
        text.push('\n');
        text
    }
}

/// One measurement.
#[derive(Debug, Serialize)]
pub(crate) struct LabSample {
    switch: LabSwitch,
    #[serde(flatten)]
    shape: NetworkShape,
    test: Test,
    /// Number of the pair of interleaved runs, from 0.
    pair: u32,
    #[serde(flatten)]
    figure: Option<Figure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl LabSample {
    pub(crate) fn new(
        switch: LabSwitch,
        shape: NetworkShape,
        test: Test,
        pair: u32,
        outcome: Result<Figure>,
    ) -> LabSample {
        let (figure, error) = match outcome {
            Ok(figure) if figure.passed() => (Some(figure), None),
            Ok(figure) => (Some(figure), Some("no frame passed".to_owned())),
            Err(error) => (None, Some(with_hint(&error))),
        };
        LabSample {
            switch,
            shape,
            test,
            pair,
            figure,
            error,
        }
    }

    /// For the progress.
    pub(crate) fn line(&self) -> String {
        let what = match (&self.error, &self.figure) {
            (Some(error), _) => format!("FAILED: {error}"),
            (None, Some(figure)) => {
                format!(
                    "{:.3} {} ({})",
                    figure.headline(),
                    self.test.unit(),
                    figure.remark()
                )
            }
            (None, None) => String::new(),
        };
        let (test, switch) = (self.test.name(), self.switch.name());
        format!("{test}, {switch}, {}: {what}", self.shape)
    }
}

/// ringway over the baseline, in pairs of runs one after the other.
#[derive(Debug, Serialize)]
struct Ratio {
    #[serde(flatten)]
    shape: NetworkShape,
    test: Test,
    median: f64,
    min: f64,
    max: f64,
    pairs: usize,
}

/// A whole run.
#[derive(Debug, Serialize)]
pub(crate) struct LabReport {
    machine: LabMachine,
    duration_seconds: f64,
    samples: Vec<LabSample>,
    /// ringway / Linux bridge; below 1 is better for ping, above 1 for the rest.
    ratios: Vec<Ratio>,
}

impl LabReport {
    pub(crate) fn new(
        machine: LabMachine,
        samples: Vec<LabSample>,
        duration: Duration,
    ) -> LabReport {
        let ratios = ratios(&samples);
        LabReport {
            machine,
            duration_seconds: duration.as_secs_f64(),
            samples,
            ratios,
        }
    }

    pub(crate) fn all_passed(&self) -> bool {
        self.samples.iter().all(|sample| sample.error.is_none())
    }

    /// The table with the machine above it.
    pub(crate) fn table(&self) -> String {
        let mut text = self.machine.lines();
        let mut rows = vec![self.titles()];
        for (shape, test) in cells(&self.samples) {
            rows.push(self.row(shape, test));
        }
        text.push('\n');
        text.push_str(&aligned(&rows));
        if !self.ratios.is_empty() {
            let _ = writeln!(
                text,
                "\nratio: ringway / linux bridge, median (lowest to highest) of {} interleaved \
                 pair(s); below 1 is better for ping, above 1 for the rest",
                self.ratios
                    .iter()
                    .map(|ratio| ratio.pairs)
                    .max()
                    .unwrap_or(0)
            );
        }
        for sample in self.samples.iter().filter(|sample| sample.error.is_some()) {
            let _ = writeln!(text, "{}", sample.line());
        }
        let _ = writeln!(text, "\ntook {:.0} s", self.duration_seconds);
        text
    }

    fn switches(&self) -> Vec<LabSwitch> {
        let mut switches = Vec::new();
        for sample in &self.samples {
            if !switches.contains(&sample.switch) {
                switches.push(sample.switch);
            }
        }
        switches
    }

    fn titles(&self) -> Vec<String> {
        let mut titles = ["queues", "MTU", "host", "offloads", "test"]
            .map(str::to_owned)
            .to_vec();
        let switches = self.switches();
        titles.extend(switches.iter().map(|switch| switch.name().to_owned()));
        titles.push(if switches.len() > 1 {
            "ratio".to_owned()
        } else {
            String::new()
        });
        titles
    }

    fn row(&self, shape: NetworkShape, test: Test) -> Vec<String> {
        let mut row = vec![
            shape.queue_pairs.to_string(),
            shape.mtu_bytes.to_string(),
            shape.host.name().into(),
            shape.offloads.to_string(),
            test.name().into(),
        ];
        let switches = self.switches();
        for &switch in &switches {
            let values: Vec<f64> = self
                .samples
                .iter()
                .filter(|sample| {
                    (sample.switch, sample.shape, sample.test) == (switch, shape, test)
                })
                .filter(|sample| sample.error.is_none())
                .filter_map(|sample| sample.figure.as_ref().map(Figure::headline))
                .collect();
            row.push(if values.is_empty() {
                "FAILED".to_owned()
            } else {
                format!("{} {}", three_digits(median(&values)), test.unit())
            });
        }
        if switches.len() == 1 {
            let only = self.samples.iter().find(|sample| {
                (sample.shape, sample.test) == (shape, test) && sample.error.is_none()
            });
            let figure = only.and_then(|sample| sample.figure.as_ref());
            row.push(figure.map_or_else(String::new, Figure::remark));
        } else {
            let ratio = self
                .ratios
                .iter()
                .find(|ratio| (ratio.shape, ratio.test) == (shape, test));
            row.push(ratio.map_or_else(
                || "-".to_owned(),
                |ratio| format!("{:.2} ({:.2} to {:.2})", ratio.median, ratio.min, ratio.max),
            ));
        }
        row
    }
}

/// Shapes and tests in the order in which they first ran.
fn cells(samples: &[LabSample]) -> Vec<(NetworkShape, Test)> {
    let mut cells = Vec::new();
    for sample in samples {
        if !cells.contains(&(sample.shape, sample.test)) {
            cells.push((sample.shape, sample.test));
        }
    }
    cells
}

fn ratios(samples: &[LabSample]) -> Vec<Ratio> {
    let value = |switch, shape, test, pair| {
        samples
            .iter()
            .find(|sample| {
                (sample.switch, sample.shape, sample.test, sample.pair)
                    == (switch, shape, test, pair)
            })
            .filter(|sample| sample.error.is_none())
            .and_then(|sample| sample.figure.as_ref())
            .map(Figure::headline)
            .filter(|value| *value > 0.0)
    };
    let last = samples.iter().map(|sample| sample.pair).max().unwrap_or(0);
    cells(samples)
        .into_iter()
        .filter_map(|(shape, test)| {
            let values: Vec<f64> = (0..=last)
                .filter_map(|pair| {
                    let ours = value(LabSwitch::Ringway, shape, test, pair)?;
                    Some(ours / value(LabSwitch::LinuxBridge, shape, test, pair)?)
                })
                .collect();
            Some(Ratio {
                shape,
                test,
                median: median(&values),
                min: values.iter().copied().reduce(f64::min)?,
                max: values.iter().copied().reduce(f64::max)?,
                pairs: values.len(),
            })
        })
        .collect()
}

/// Columns padded to their widest cell: numbers and names to the left, one space more between.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Enough digits for three that count.
fn three_digits(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// `QEMU emulator version 10.0.2 (Debian …)` is `QEMU 10.0.2`, `iperf 3.12 (…)` stays.
fn short_version(line: &str) -> String {
    let line = line.split(" (").next().unwrap_or(line);
    line.replace(" emulator version", "")
}

#[cfg(test)]
mod tests {
    use super::super::shape::{HostPort, OffloadSet, OffloadsOfGuests};
    use super::*;

    const SHAPE: NetworkShape = NetworkShape {
        queue_pairs: 1,
        mtu_bytes: 1500,
        host: HostPort::Tap,
        offloads: OffloadsOfGuests::same(OffloadSet::All),
    };

    fn sample(switch: LabSwitch, pair: u32, gbit: f64) -> LabSample {
        let figure = Figure::Tcp {
            bits_per_second: gbit * 1e9,
            retransmits: 0,
        };
        LabSample::new(switch, SHAPE, Test::TcpAB, pair, Ok(figure))
    }

    #[test]
    fn ratios_pair_runs_that_followed_each_other() {
        let mut samples = Vec::new();
        for (pair, ours, theirs) in [(0, 2.0, 1.0), (1, 3.0, 1.0), (2, 10.0, 2.0)] {
            samples.push(sample(LabSwitch::Ringway, pair, ours));
            samples.push(sample(LabSwitch::LinuxBridge, pair, theirs));
        }
        samples.push(sample(LabSwitch::Ringway, 3, 9.0)); // its partner is missing
        let ratios = ratios(&samples);
        assert_eq!(ratios.len(), 1);
        assert_eq!(
            (ratios[0].median, ratios[0].min, ratios[0].max),
            (3.0, 2.0, 5.0)
        );
        assert_eq!(ratios[0].pairs, 3);
    }

    #[test]
    fn a_run_without_frames_counts_as_failed() {
        assert!(sample(LabSwitch::Ringway, 0, 0.0).error.is_some());
        assert!(sample(LabSwitch::Ringway, 0, 0.1).error.is_none());
    }

    #[test]
    fn json_of_a_sample_is_flat_with_units_in_names() {
        let json = serde_json::to_value(sample(LabSwitch::LinuxBridge, 0, 1.0)).expect("json");
        assert_eq!(json["switch"], "linux_bridge");
        assert_eq!(json["mtu_bytes"], 1500);
        assert_eq!(json["host"], "tap");
        assert_eq!(json["offloads"], "all");
        assert_eq!(json["test"], "tcp_a_b");
        assert_eq!(json["bits_per_second"], 1e9);
    }

    #[test]
    fn columns_align() {
        let rows = [
            vec!["a".into(), "bbb".into()],
            vec!["cccc".to_owned(), "d".to_owned()],
        ];
        assert_eq!(aligned(&rows), "a     bbb\ncccc  d\n");
    }

    #[test]
    fn versions_shrink() {
        let line = "QEMU emulator version 10.0.2 (Debian 1:10.0.2)";
        assert_eq!(short_version(line), "QEMU 10.0.2");
    }
}
