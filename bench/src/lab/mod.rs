//! `ringway-bench lab`: two QEMU guests and the host on ringwayd, measured by ping, iperf3 and
//! hashed transfers.
//!
//! The way of a run: [`image`] makes what the guests boot, [`accel`] decides between KVM and TCG,
//! [`network`] builds a switch with its guests in a [`NetNs`], [`mod@measure`] runs one test on it,
//! [`report`] prints them all. [`scenario`] holds the acceptance runs. Whatever is started is
//! ended by a `Drop`, also after Ctrl-C ([`crate::interrupt`]).

mod accel;
mod bytes;
mod capture;
mod console;
mod cpio;
mod guest;
mod image;
mod measure;
mod network;
mod options;
mod progress;
mod report;
mod scenario;
mod shape;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

pub(crate) use options::LabArgs;

use crate::hint::hinted;
use crate::interrupt;
use crate::netns::NetNs;
use crate::process::{Origin, find, run_ok};

use measure::measure;
use network::{Base, LabNetwork, LabSwitch};
use options::LabPlan;
use progress::Progress;
use report::{LabMachine, LabReport, LabSample};
use shape::NetworkShape;

/// Runs the lab. The exit code is that of a failure when a measurement or a scenario failed.
///
/// # Errors
/// If the lab can't do its work: something is missing, a guest doesn't boot.
pub(crate) fn run(args: LabArgs) -> Result<ExitCode> {
    interrupt::install()?;
    if !rustix::process::geteuid().is_root() {
        return Err(hinted(
            "the lab needs root for its network namespace and taps",
            "run it with sudo -E",
        ));
    }
    let plan = args.plan();
    let folder = tempfile::Builder::new().prefix("ringway-lab-").tempdir()?;
    let outcome = run_in(&plan, folder.path());
    if interrupt::requested() {
        return Err(interrupt::Interrupted.into());
    }
    let failed = !matches!(&outcome, Ok(true));
    if failed || plan.keep_logs {
        let kept = folder.keep();
        eprintln!("logs: {}", kept.display());
    }
    outcome.map(|good| {
        if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    })
}

/// Whether everything passed.
fn run_in(plan: &LabPlan, folder: &Path) -> Result<bool> {
    let started = Instant::now();
    let progress = Progress::new(plan.steps());
    find(guest::QEMU, Origin::LabPackages)?;
    find("iperf3", Origin::LabPackages)?;
    NetNs::remove_stale();
    let revision = if plan.needs_ringway() {
        plan.programs.check()?;
        Some(plan.programs.version()?)
    } else {
        None
    };
    progress.step("preparing the guest image");
    let cache = image::cache_folder()?;
    let image = image::prepare(&cache)?;
    let (accel, reason) = accel::choose(plan.accel, &image, &cache, folder, |text| {
        progress.step(text)
    })?;
    progress.say(&format!("guests run on {} ({reason})", accel.name()));
    let machine = LabMachine::describe(&image, accel, reason, revision)?;
    let base = Base {
        image,
        accel,
        programs: plan.programs.clone(),
        folder: folder.to_owned(),
        account: None,
        iommu_platform: false,
    };
    if !plan.scenarios.is_empty() {
        return scenario::run_all(plan, &base, machine, &progress);
    }
    let mut samples = Vec::new();
    for shape in plan.shapes() {
        measure_shape(plan, shape, &base, &progress, &mut samples)?;
    }
    progress.finish();
    let report = LabReport::new(machine, samples, started.elapsed());
    if plan.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(report.all_passed())
}

/// Boots the guests on every switch and runs all tests, alternating between the switches. Those
/// that don't run are booted and silent.
fn measure_shape(
    plan: &LabPlan,
    shape: NetworkShape,
    base: &Base,
    progress: &Progress,
    samples: &mut Vec<LabSample>,
) -> Result<()> {
    let mut sets = Vec::new();
    for &switch in &plan.switches {
        progress.step(&format!("booting two guests on {}", label(switch, shape)));
        let started = Instant::now();
        let mut network = LabNetwork::new(switch, shape, base)?;
        network.boot()?;
        let seconds = started.elapsed().as_secs_f32();
        progress.say(&format!(
            "{}: both guests up after {seconds:.1} s",
            label(switch, shape)
        ));
        sets.push(network);
    }
    for pair in 0..plan.pairs {
        for &test in &plan.tests {
            for network in &mut sets {
                progress.step(&format!(
                    "{}, {}",
                    label(network.switch, shape),
                    test.name()
                ));
                let outcome = measure(network, test, plan.effort);
                interrupt::check()?;
                let sample = LabSample::new(network.switch, shape, test, pair, outcome);
                progress.say(&sample.line());
                samples.push(sample);
            }
        }
    }
    Ok(())
}

fn label(switch: LabSwitch, shape: NetworkShape) -> String {
    format!("{}, {shape}", switch.name())
}

/// First line of what a program prints, for versions.
fn first_line(program: &str, arguments: &[&str]) -> Result<String> {
    let said = run_ok(
        Command::new(program).args(arguments),
        Duration::from_secs(10),
    )?;
    let line = said.lines().next().context("it printed nothing")?;
    Ok(line.trim().to_owned())
}
