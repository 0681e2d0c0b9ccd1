//! `ringway-bench compare`: several switches, one load, trials in turns.
//!
//! All switches are started once and stopped (SIGSTOP) while another is measured on their core, so
//! that a trial costs no start-up and neighbouring trials see the same neighbours' noise. Sizes
//! that want switches set up in another way (MTU, segmentation offload) are measured on switches of
//! their own.

mod contender;
mod latency;
mod options;
mod table;
mod trial;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::ValueEnum;

use super::args::{FrameClass, FrameSize};
use super::report::Environment;
use super::switch::{SwitchKind, TESTPMD_HUGE_PAGES};
use crate::hint::hint_of;
use crate::interrupt;
use crate::netns::NetNs;
use contender::{Contender, account_all, full_rate};
use latency::measure_latency;
pub(crate) use options::CompareArgs;
use options::{FramePath, LoadDriver};
use table::{SizeResult, Subject, print_size};
use trial::TrialSetting;

/// Most rounds of latency trials.
const LATENCY_ROUNDS: u32 = 5;

/// Compares the switches and prints a table or JSON. The exit code is that of a failure if a switch
/// that is installed was left out somewhere.
///
/// # Errors
/// ringway does not work, nothing is there to be measured, or somebody ended the comparison.
pub(crate) fn compare(args: &CompareArgs) -> Result<ExitCode> {
    interrupt::install()?;
    let (switch_cpu, load_cpu) = args.load.cpus()?;
    args.check()?;
    if args.has_nic() {
        NetNs::remove_stale();
    }
    let (kinds, missing) = contenders(args)?;
    let of_load = match args.driver {
        LoadDriver::Synth => 0,
        LoadDriver::VirtioUser => TESTPMD_HUGE_PAGES,
    };
    let programs = kinds.iter().map(|kind| kind.huge_pages()).sum::<u64>() + of_load;
    let (_pages, huge) = args.load.huge_pages(programs, 2)?;
    let setting = TrialSetting {
        path: FramePath::GuestGuest,
        driver: args.driver,
        load: &args.load,
        duration: Duration::try_from_secs_f64(args.duration)?,
        switch_cpu,
        load_cpu,
        huge,
    };
    let environment = Environment::here();
    if !args.json {
        println!("{environment}");
    }
    let mut report = Comparison::default();
    for class in classes(&args.load.frames) {
        for nic in [false, true] {
            measure_class(args, setting, (class, nic), &kinds, &mut report)?;
        }
    }
    if args.json {
        let json = serde_json::json!({
            "environment": environment,
            "versions": report.versions,
            "load": args.driver.to_possible_value().map(|value| value.get_name().to_owned()),
            "layout": args.load.layout,
            "queue_size": args.load.queue_size,
            "queues": args.load.queues,
            "hugepages": huge,
            "pairs": args.pairs,
            "latency_rule": args.latency.then_some(latency::RULE),
            "missing": missing,
            "sizes": report.sizes,
        });
        println!("{json}");
    }
    Ok(if report.left_out {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// What was measured so far.
#[derive(Debug, Default)]
struct Comparison {
    sizes: Vec<SizeResult>,
    /// What each switch says that it is.
    versions: std::collections::BTreeMap<&'static str, String>,
    /// A switch that is installed did not work.
    left_out: bool,
}

/// The switches to measure, and the names of those that are not installed.
fn contenders(args: &CompareArgs) -> Result<(Vec<SwitchKind>, Vec<&'static str>)> {
    let mut kinds = if args.peers_only {
        vec![]
    } else {
        vec![SwitchKind::Ringway]
    };
    let mut missing = Vec::new();
    for kind in &args.with {
        if kinds.contains(kind) {
            continue;
        }
        if args.has_nic() && !kind.takes_nic() {
            eprintln!(
                "{} is left out: only guests are joined to it here",
                kind.name()
            );
            continue;
        }
        match kind.check_installed() {
            Ok(()) => kinds.push(*kind),
            Err(error) => {
                let hint = error.hint().unwrap_or_default();
                eprintln!("{} is left out: {error}; {hint}", kind.name());
                missing.push(kind.name());
            }
        }
    }
    ensure!(!kinds.is_empty(), "there is no switch to measure");
    Ok((kinds, missing))
}

/// The set-ups that these sizes want, each once.
fn classes(frames: &[FrameSize]) -> Vec<FrameClass> {
    let mut classes: Vec<FrameClass> = frames.iter().map(|frame| frame.class()).collect();
    classes.sort_unstable();
    classes.dedup();
    classes
}

/// Starts the switches, with a NIC or without, and measures all sizes of a class on all such paths.
fn measure_class(
    args: &CompareArgs,
    setting: TrialSetting<'_>,
    (class, nic): (FrameClass, bool),
    kinds: &[SwitchKind],
    report: &mut Comparison,
) -> Result<()> {
    let is_meant = |path: &&FramePath| path.way().is_some() == nic;
    let paths: Vec<FramePath> = args.paths.iter().filter(is_meant).copied().collect();
    if paths.is_empty() {
        return Ok(());
    }
    let cpus = (setting.switch_cpu, setting.load_cpu);
    let setup = args
        .load
        .switch_setup(class, cpus, if nic { 1 } else { 2 }, nic);
    let mut contenders = Vec::new();
    for kind in kinds.iter().filter(|kind| !nic || kind.takes_nic()) {
        let contender = Contender::start(*kind, setup, contenders.is_empty())?;
        let version = contender.version();
        let version = version.map(|(name, version)| (name, version.to_owned()));
        report.versions.extend(version);
        contenders.push(contender);
    }
    let frames = args.load.frames.iter();
    for frame in frames.filter(|frame| frame.class() == class) {
        for path in &paths {
            let setting = TrialSetting {
                path: *path,
                ..setting
            };
            let size = measure_size(args, setting, *frame, &mut contenders)?;
            report.left_out |= size.left_out();
            if !args.json {
                print_size(&size);
            }
            report.sizes.push(size);
        }
    }
    Ok(())
}

/// All trials with one size.
fn measure_size(
    args: &CompareArgs,
    setting: TrialSetting<'_>,
    frame: FrameSize,
    contenders: &mut [Contender],
) -> Result<SizeResult> {
    let mut subjects = full_rate(args.pairs, setting, frame, contenders)?;
    account_all(setting, frame, contenders, &mut subjects)?;
    let mut load_maximum = None;
    if args.latency && subjects.iter().any(Subject::has_results) {
        let plan = (args.pairs.min(LATENCY_ROUNDS), &args.latency_rates[..]);
        load_maximum = measure_latency(plan, setting, frame, contenders, &mut subjects)?;
    }
    let mut size = SizeResult {
        frame: frame.to_string(),
        path: setting.path,
        subjects,
        load_stamped_frames_per_second: load_maximum,
    };
    size.name_limits();
    ensure!(
        size.has_results(),
        "all trials with frames of {frame} bytes broke"
    );
    Ok(size)
}

/// One line, and what to do.
fn say_left_out(name: &str, at: &str, error: &anyhow::Error) {
    let hint = hint_of(error).map_or(String::new(), |hint| format!("; {hint}"));
    eprintln!("{name} is left out{at}: {error:#}{hint}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_want_the_same_switch_are_measured_together() {
        let frames: Vec<FrameSize> = ["65000", "64", "9000", "1500", "imix"]
            .map(|text| text.parse().unwrap())
            .to_vec();
        let expected = [
            FrameClass::Standard,
            FrameClass::Jumbo,
            FrameClass::Segmented,
        ];
        assert_eq!(classes(&frames), expected);
    }
}
