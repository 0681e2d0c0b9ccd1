//! `ringway-bench compare`: several switches, one load, trials in turns.
//!
//! All switches are started once and stopped (SIGSTOP) while another is measured on their core, so
//! that a trial costs no start-up and neighbouring trials see the same neighbours' noise. Sizes that
//! want switches set up in another way (MTU, segmentation offload) are measured on switches of their
//! own.

mod options;
mod table;
mod trial;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use super::args::{FrameClass, FrameSize};
use super::huge::{HugePages, free_pages, pages_of_load};
use super::report::Environment;
use super::switch::{RunningSwitch, SwitchKind, SwitchSetup, TESTPMD_HUGE_PAGES};
use crate::hint::hint_of;
use crate::interrupt;
use crate::netns::NetNs;
use crate::stats::Spread;
pub(crate) use options::CompareArgs;
use options::{FramePath, LoadDriver};
use table::{COPY, Latency, SizeResult, Subject, print_size};
use trial::{Trial, TrialSetting};

/// Times that a trial is repeated if it broke.
const RETRIES: u32 = 2;
/// Shares of a switch's own maximum with stamped frames at which its latency is measured.
const LEVELS: [f64; 3] = [0.1, 0.5, 0.9];
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
    ensure!(
        args.duration > 0.0 && args.pairs > 0,
        "a comparison takes trials and time"
    );
    if args.latency {
        ensure!(
            args.driver == LoadDriver::Synth,
            "the virtio-user load can't measure latency"
        );
        args.load.check_stamps()?;
    }
    if args.has_nic() {
        args.check_nic()?;
        NetNs::remove_stale();
    }
    let (kinds, missing) = contenders(args)?;
    let (_pages, huge) = memory(args, &kinds)?;
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
    for class in classes(args.load.frames()) {
        for nic in [false, true] {
            measure_class(args, setting, (class, nic), &kinds, &mut report)?;
        }
    }
    if args.json {
        let json = serde_json::json!({
            "environment": environment,
            "versions": report.versions,
            "load": args.driver.to_possible_value().map(|value| value.get_name().to_owned()),
            "layout": args.load.layout_name(),
            "queue_size": args.load.queue_size(),
            "queues": args.load.queues(),
            "hugepages": huge,
            "pairs": args.pairs,
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

/// Hugepages for DPDK programs and, where there are any, the guests. All switches are measured with
/// guests of the same kind.
fn memory(args: &CompareArgs, kinds: &[SwitchKind]) -> Result<(Option<HugePages>, bool)> {
    if !args.load.huge() {
        return Ok((None, false));
    }
    let load = pages_of_load(args.load.memory_bytes(2)?);
    let of_load = match args.driver {
        LoadDriver::Synth => 0,
        LoadDriver::VirtioUser => TESTPMD_HUGE_PAGES,
    };
    let programs = kinds.iter().map(|kind| kind.huge_pages()).sum::<u64>() + of_load;
    if programs == 0 {
        return Ok((None, load.is_some_and(|pages| free_pages() >= pages)));
    }
    let pages = HugePages::reserve(programs + load.unwrap_or(0))?;
    Ok((Some(pages), load.is_some()))
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
    let kinds: Vec<SwitchKind> = kinds
        .iter()
        .copied()
        .filter(|kind| !nic || kind.takes_nic())
        .collect();
    let place = SwitchSetup {
        cpu: setting.switch_cpu,
        other_cpu: setting.load_cpu,
        ports: if nic { 1 } else { 2 },
        nic,
        queues: args.load.queues(),
        class,
        tso: args.load.tso() || class == FrameClass::Segmented,
        huge: args.load.huge(),
    };
    let mut switches: Vec<Option<RunningSwitch>> = Vec::new();
    for kind in &kinds {
        let started = RunningSwitch::start(*kind, place);
        interrupt::check()?;
        match started {
            Ok(switch) => {
                switch.pause();
                report
                    .versions
                    .insert(kind.name(), switch.version().to_owned());
                switches.push(Some(switch));
            }
            Err(error) if switches.is_empty() => {
                return Err(error).with_context(|| format!("starting {}", kind.name()));
            }
            Err(error) => {
                say_left_out(kind.name(), "", &error);
                report.left_out = true;
                switches.push(None);
            }
        }
    }
    let frames = args.load.frames().iter();
    for frame in frames.filter(|frame| frame.class() == class) {
        for path in &paths {
            let setting = TrialSetting {
                path: *path,
                ..setting
            };
            let size = measure_size(args, setting, *frame, &kinds, &mut switches)?;
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
    kinds: &[SwitchKind],
    switches: &mut [Option<RunningSwitch>],
) -> Result<SizeResult> {
    let mut trials = vec![Vec::new(); switches.len()];
    let mut copies = Vec::new();
    let mut cannot: Vec<Option<String>> = vec![None; switches.len()];
    for _ in 0..args.pairs {
        for (i, slot) in switches.iter_mut().enumerate() {
            if cannot[i].is_some() {
                continue;
            }
            let Some(switch) = slot else {
                cannot[i] = Some("it is not running".to_owned());
                continue;
            };
            let outcome = awake(switch, |switch| try_trial(setting, frame, switch));
            interrupt::check()?;
            match outcome {
                Ok(trial) => trials[i].push(Some(trial)),
                // It worked before: this one is left out, the next may pass.
                Err(Broken { died: false, .. }) if !trials[i].is_empty() => trials[i].push(None),
                Err(Broken { died, error }) => {
                    if died && i == 0 {
                        return Err(error);
                    }
                    say_left_out(kinds[i].name(), &format!(" at {frame} B"), &error);
                    cannot[i] = Some(format!("{error:#}"));
                    if died {
                        trials[i].clear();
                        *slot = None;
                    }
                }
            }
        }
        match setting.copy_trial(frame) {
            Ok(trial) => copies.extend(trial.map(Some)),
            Err(error) => {
                say_left_out(COPY, &format!(" at {frame} B"), &error);
                copies.push(None);
            }
        }
    }
    let first = trials[0].clone();
    let mut subjects: Vec<Subject> = kinds
        .iter()
        .zip(trials)
        .zip(cannot)
        .map(|((kind, trials), cannot)| Subject::new(kind.name(), trials, cannot, &first))
        .collect();
    account_all(setting, frame, switches, &mut subjects)?;
    if args.latency {
        measure_latency(args, setting, frame, switches, &mut subjects)?;
    }
    if !copies.is_empty() {
        subjects.push(Subject::new(COPY, copies, None, &first));
    }
    let mut size = SizeResult {
        frame: frame.to_string(),
        path: setting.path,
        subjects,
    };
    size.name_limits();
    ensure!(
        size.has_results(),
        "all trials with frames of {frame} bytes broke"
    );
    Ok(size)
}

/// Has a switch run while something is done with it.
fn awake<T>(switch: &mut RunningSwitch, work: impl FnOnce(&mut RunningSwitch) -> T) -> T {
    switch.resume();
    let outcome = work(switch);
    switch.pause();
    outcome
}

/// Why there is no trial.
struct Broken {
    error: anyhow::Error,
    /// The switch is gone for good.
    died: bool,
}

/// A trial, repeated if it broke.
fn try_trial(
    setting: TrialSetting<'_>,
    frame: FrameSize,
    switch: &mut RunningSwitch,
) -> Result<Trial, Broken> {
    let mut tries = 0;
    loop {
        let outcome = setting.trial(frame, switch);
        if let Err(error) = switch.check_alive() {
            let error = error.into();
            return Err(Broken { error, died: true });
        }
        let error = match outcome {
            Ok(trial) => return Ok(trial),
            Err(error) => error,
        };
        tries += 1;
        if tries > RETRIES || trial::is_final(&error) {
            return Err(Broken { error, died: false });
        }
        let name = switch.kind().name();
        eprintln!("{name}, {frame} B, a trial broke and is repeated: {error:#}");
    }
}

/// One more trial of each switch, not counted, in which it accounts for its time.
fn account_all(
    setting: TrialSetting<'_>,
    frame: FrameSize,
    switches: &mut [Option<RunningSwitch>],
    subjects: &mut [Subject],
) -> Result<()> {
    for (slot, subject) in switches.iter_mut().zip(subjects) {
        let Some(switch) = slot.as_mut().filter(|_| subject.has_results()) else {
            continue;
        };
        let outcome = awake(switch, |switch| setting.account(frame, switch));
        interrupt::check()?;
        match outcome {
            Ok(share) => subject.switch_busy_share = share,
            Err(error) => eprintln!("{} can't tell its busy share: {error:#}", subject.switch),
        }
    }
    Ok(())
}

/// Trials in open loop, in turns, after some that find out what each switch can take of them.
fn measure_latency(
    args: &CompareArgs,
    setting: TrialSetting<'_>,
    frame: FrameSize,
    switches: &mut [Option<RunningSwitch>],
    subjects: &mut [Subject],
) -> Result<()> {
    let rounds = args.pairs.min(LATENCY_ROUNDS);
    let maxima = in_turns(rounds, switches, subjects, |switch, _| {
        setting.stamped_maximum(frame, switch)
    })?;
    for (subject, maxima) in subjects.iter_mut().zip(maxima) {
        subject.stamped_frames_per_second = Spread::of(&maxima);
    }
    for level in LEVELS {
        let trials = in_turns(rounds, switches, subjects, |switch, subject| {
            let max = subject.stamped_frames_per_second;
            let max = max.context("its maximum is unknown")?;
            setting.latency_trial(frame, switch, level * max.median)
        })?;
        for (subject, trials) in subjects.iter_mut().zip(trials) {
            subject.latency.extend(Latency::of(level, trials));
        }
    }
    Ok(())
}

/// Does something with each switch that has results, in turns; what breaks is told and left out.
fn in_turns<T>(
    rounds: u32,
    switches: &mut [Option<RunningSwitch>],
    subjects: &[Subject],
    mut work: impl FnMut(&RunningSwitch, &Subject) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut results: Vec<Vec<T>> = switches.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for (i, slot) in switches.iter_mut().enumerate() {
            let Some(switch) = slot.as_mut().filter(|_| subjects[i].has_results()) else {
                continue;
            };
            let outcome = awake(switch, |switch| work(switch, &subjects[i]));
            interrupt::check()?;
            match outcome {
                Ok(result) => results[i].push(result),
                Err(error) => {
                    let name = subjects[i].switch;
                    eprintln!("{name}, a latency trial broke: {error:#}");
                }
            }
        }
    }
    Ok(results)
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
