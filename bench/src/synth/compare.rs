//! `ringway-bench compare`: several switches, one load, trials in turns.
//!
//! All switches are started once and stopped (SIGSTOP) while another is measured on their core, so
//! that a trial costs no start-up and neighbouring trials see the same neighbours' noise.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::load::MaxResult;
use super::report::{Environment, Limit, Spread};
use super::run::{FrameSize, LoadArgs, max_trial, on_cpu};
use super::switch::{Kind, Place, Switch, SwitchError};
use super::virtio_user;

/// Times that a trial is repeated if it broke.
const RETRIES: u32 = 2;

/// Who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Driver {
    /// The synthetic guests of `ringway-bench run`
    Synth,
    /// DPDK's virtio driver in testpmd
    VirtioUser,
}

/// Drive ringway and its peers with the same load, in turns.
#[derive(Clone, Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Peers of ringway
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "testpmd,ovs-dpdk"
    )]
    with: Vec<Kind>,
    /// Leave ringway out: the first peer stands in its place
    #[arg(long)]
    peers_only: bool,
    /// Trials of each switch per frame size, in turns
    #[arg(long, value_name = "N", default_value_t = 9)]
    pairs: u32,
    /// Seconds per trial
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    duration: f64,
    /// Who sends and receives
    #[arg(long = "load", value_enum, default_value = "synth")]
    driver: Driver,
    /// Print one JSON object
    #[arg(short = 'j', long)]
    json: bool,
}

/// One trial.
#[derive(Clone, Copy, Debug, Serialize)]
struct Trial {
    frames_per_second: f64,
    bits_per_second: f64,
    /// Over the best 2 ms; not told by the virtio-user load.
    best_frames_per_second: Option<f64>,
    load_busy_share: Option<f64>,
    load_disturbed_share: Option<f64>,
    frames_lost_share: Option<f64>,
}

impl From<MaxResult> for Trial {
    fn from(result: MaxResult) -> Self {
        Self {
            frames_per_second: result.pps(),
            bits_per_second: result.bits_per_second(),
            best_frames_per_second: Some(result.best_pps),
            load_busy_share: Some(result.busy_share()),
            load_disturbed_share: Some(result.disturbed_share()),
            frames_lost_share: Some(result.loss()),
        }
    }
}

/// A switch's trials with one frame size.
#[derive(Debug, Serialize)]
struct Subject {
    switch: &'static str,
    frames_per_second: Option<Spread>,
    bits_per_second: Option<Spread>,
    load_busy_share: Option<Spread>,
    load_disturbed_share: Option<Spread>,
    best_frames_per_second: Option<Spread>,
    limit: Option<Limit>,
    /// In the order of the rounds; `null` where a trial broke each time.
    trials: Vec<Option<Trial>>,
    /// Rate of the first switch by this one's, round by round.
    first_by_this: Option<Spread>,
}

#[derive(Debug, Serialize)]
struct Size {
    frame: String,
    subjects: Vec<Subject>,
}

/// Compares the switches and prints a table or JSON.
///
/// # Errors
/// No switch can be started, or all trials of one frame size broke.
pub(crate) fn compare(args: &CompareArgs) -> Result<ExitCode> {
    let (switch_cpu, load_cpu) = args.load.cpus()?;
    ensure!(
        args.duration > 0.0 && args.pairs > 0,
        "a comparison takes trials and time"
    );
    let place = Place {
        cpu: switch_cpu,
        other_cpu: load_cpu,
        ports: 2,
        queues: args.load.queues(),
        segmentation: args.load.segmentation(),
    };
    let mut wanted = if args.peers_only {
        vec![]
    } else {
        vec![Kind::Ringway]
    };
    wanted.extend(
        args.with
            .iter()
            .filter(|kind| !wanted.contains(kind))
            .copied()
            .collect::<Vec<_>>(),
    );
    let (mut switches, mut missing) = (Vec::new(), Vec::new());
    for kind in wanted {
        ensure!(
            !kind.rewrites_macs() || args.driver == Driver::VirtioUser,
            "{} rewrites MAC addresses: use --load virtio-user",
            kind.name()
        );
        match Switch::start(kind, place) {
            Ok(switch) => {
                switch.pause();
                switches.push(switch);
            }
            Err(error @ SwitchError::Missing { .. }) => {
                eprintln!(
                    "{} is left out: {error}; {}",
                    kind.name(),
                    error.hint().unwrap_or_default()
                );
                missing.push(kind.name());
            }
            Err(error) => return Err(error).with_context(|| format!("starting {}", kind.name())),
        }
    }
    ensure!(!switches.is_empty(), "there is no switch to measure");
    let mut sizes = Vec::new();
    for frame in args.load.frames() {
        let size = measure_size(args, *frame, load_cpu, &mut switches)?;
        if !args.json {
            print_size(&size);
        }
        sizes.push(size);
    }
    if args.json {
        let report = serde_json::json!({
            "environment": Environment::of_this_machine(),
            "load": args.driver.to_possible_value().map(|value| value.get_name().to_owned()),
            "layout": args.load.layout_name(),
            "pairs": args.pairs,
            "missing": missing,
            "sizes": sizes,
        });
        println!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}

fn measure_size(
    args: &CompareArgs,
    frame: FrameSize,
    load_cpu: usize,
    switches: &mut [Switch],
) -> Result<Size> {
    let mut trials = vec![Vec::new(); switches.len()];
    for _ in 0..args.pairs {
        for (switch, trials) in switches.iter_mut().zip(&mut trials) {
            switch.resume();
            let outcome = try_trial(args, frame, load_cpu, switch);
            switch.pause();
            trials.push(outcome?);
        }
    }
    let first: Vec<Option<Trial>> = trials[0].clone();
    let subjects: Vec<Subject> = switches
        .iter()
        .zip(trials)
        .map(|(switch, trials)| subject(switch.kind().name(), trials, &first))
        .collect();
    if subjects
        .iter()
        .all(|subject| subject.frames_per_second.is_none())
    {
        bail!("all trials with frames of {frame} bytes broke");
    }
    Ok(Size {
        frame: frame.to_string(),
        subjects,
    })
}

/// A trial, repeated if it broke; `None` if it broke each time though the switch lives.
fn try_trial(
    args: &CompareArgs,
    frame: FrameSize,
    load_cpu: usize,
    switch: &mut Switch,
) -> Result<Option<Trial>, SwitchError> {
    for _ in 0..=RETRIES {
        let outcome = trial(args, frame, load_cpu, switch);
        switch.check_alive()?;
        match outcome {
            Ok(trial) => return Ok(Some(trial)),
            Err(error) => {
                let name = switch.kind().name();
                eprintln!("{name}, {frame} B, a trial broke: {error:#}");
            }
        }
    }
    Ok(None)
}

fn trial(args: &CompareArgs, frame: FrameSize, load_cpu: usize, switch: &Switch) -> Result<Trial> {
    let duration = Duration::try_from_secs_f64(args.duration)?;
    let config = args.load.config(frame, switch.sockets())?;
    match args.driver {
        Driver::Synth => Ok(on_cpu(load_cpu, || max_trial(&config, duration))??.into()),
        Driver::VirtioUser => {
            let rate = virtio_user::trial(&config, load_cpu, duration)?;
            Ok(Trial {
                frames_per_second: rate,
                bits_per_second: rate * 8.0 * f64::from(config.sizes[0]),
                best_frames_per_second: None,
                load_busy_share: None,
                load_disturbed_share: None,
                frames_lost_share: None,
            })
        }
    }
}

/// Sums up a switch's trials next to the first switch's of the same rounds.
fn subject(switch: &'static str, trials: Vec<Option<Trial>>, first: &[Option<Trial>]) -> Subject {
    let spread = |of: fn(&Trial) -> Option<f64>| {
        Spread::of(&trials.iter().flatten().filter_map(of).collect::<Vec<f64>>())
    };
    let ratios: Vec<f64> = first
        .iter()
        .zip(&trials)
        .filter_map(|(first, this)| {
            Some(first.as_ref()?.frames_per_second / this.as_ref()?.frames_per_second)
        })
        .collect();
    let load_busy_share = spread(|trial| trial.load_busy_share);
    Subject {
        switch,
        frames_per_second: spread(|trial| Some(trial.frames_per_second)),
        bits_per_second: spread(|trial| Some(trial.bits_per_second)),
        load_busy_share,
        load_disturbed_share: spread(|trial| trial.load_disturbed_share),
        best_frames_per_second: spread(|trial| trial.best_frames_per_second),
        limit: load_busy_share.map(|share| Limit::of(share.median)),
        trials,
        first_by_this: Spread::of(&ratios),
    }
}

fn print_size(size: &Size) {
    println!("{} B", size.frame);
    let first = size.subjects[0].switch;
    for subject in &size.subjects {
        let (Some(pps), Some(bits)) = (subject.frames_per_second, subject.bits_per_second) else {
            println!("  {:<14} all trials broke", subject.switch);
            continue;
        };
        let share = |spread: Option<Spread>| spread.map_or(0.0, |spread| 100.0 * spread.median);
        println!(
            "  {:<14} median {:8.3} Mpps {:8.2} Gbit/s  best {:8.3} Mpps  best 2 ms {:8.3} Mpps  \
             load busy {:3.0} %, disturbed {:3.0} %{}",
            subject.switch,
            pps.median / 1e6,
            bits.median / 1e9,
            pps.best / 1e6,
            subject
                .best_frames_per_second
                .map_or(0.0, |spread| spread.best / 1e6),
            share(subject.load_busy_share),
            share(subject.load_disturbed_share),
            subject
                .limit
                .map_or(String::new(), |limit| format!(", {}", limit.name())),
        );
        if let (Some(ratio), true) = (subject.first_by_this, subject.switch != first) {
            println!(
                "  {first} / {:<14} median {:.2}, quartiles {:.2} to {:.2}, {} pairs",
                subject.switch,
                ratio.median,
                ratio.lower_quartile,
                ratio.upper_quartile,
                ratio.samples
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(frames_per_second: f64) -> Option<Trial> {
        Some(Trial {
            frames_per_second,
            bits_per_second: 0.0,
            best_frames_per_second: None,
            load_busy_share: None,
            load_disturbed_share: None,
            frames_lost_share: None,
        })
    }

    #[test]
    fn ratios_pair_the_trials_of_a_round_and_leave_broken_ones_out() {
        let first = [trial(20.0), trial(40.0), None, trial(90.0)];
        let subject = subject(
            "peer",
            vec![trial(10.0), None, trial(5.0), trial(30.0)],
            &first,
        );
        let ratio = subject.first_by_this.unwrap();
        assert_eq!((ratio.samples, ratio.median), (2, 2.5));
        assert_eq!(subject.frames_per_second.unwrap().samples, 3);
    }
}
