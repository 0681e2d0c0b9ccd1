//! Latency in open loop, at rates that are the same for all switches, beside that of the load alone.

use anyhow::{Context, Result};
use serde::Serialize;

use super::super::args::FrameSize;
use super::super::report::Percentiles;
use super::contender::{Contender, in_turns};
use super::table::Subject;
use super::trial::{LatencyTrial, TrialSetting};
use crate::interrupt;
use crate::stats::Spread;

/// Shares of the slowest switch's maximum with stamped frames at which latency is measured.
const SHARES: [f64; 3] = [0.1, 0.5, 0.9];
/// A rate above this share of what the load does alone is the load's limit.
const LOAD_BOUND: f64 = 0.9;
/// How the trials are chosen that percentiles are told of.
pub(super) const RULE: &str = "percentiles are medians over the quiet trials, in which the load was \
     never away for 1 ms or more, or over all if none was quiet; one that such stalls reach is the \
     machine's and not told; stalls and late frames (1 ms or more) are of all trials";

/// A rate that is offered to all switches.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Level {
    frames_per_second: f64,
    /// Its share of the slowest switch's maximum, if it was chosen by that.
    share_of_slowest: Option<f64>,
}

/// What was measured at one offered rate.
#[derive(Debug, Serialize)]
pub(super) struct Latency {
    offered_frames_per_second: f64,
    /// By the lowest of the switches' medians at full rate with stamped frames; `null` for a rate
    /// that was asked for.
    share_of_slowest: Option<f64>,
    /// The rate is about what the load does without a switch, or more.
    load_bound: bool,
    one_way: OneWay,
    /// The same of the load alone, in the same rounds.
    without_switch: Option<OneWay>,
    frames_lost_share: Spread,
    load_busy_share: Spread,
    load_disturbed_share: Spread,
    /// Of all trials.
    load_stalls: u64,
    load_longest_stall_ns: u64,
    frames_late_share: Spread,
    trials: Vec<LatencyTrial>,
}

/// Percentiles of quiet trials; `null` where the machine's stalls reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct OneWay {
    /// 0: they are of all trials.
    quiet_trials: usize,
    p50_ns: Option<Spread>,
    p99_ns: Option<Spread>,
    p999_ns: Option<Spread>,
}

impl OneWay {
    fn of(trials: &[LatencyTrial]) -> Self {
        let quiet: Vec<&LatencyTrial> = trials
            .iter()
            .filter(|trial| trial.stalls.load_stalls == 0)
            .collect();
        let used = if quiet.is_empty() {
            trials.iter().collect()
        } else {
            quiet.clone()
        };
        let spread = |percentile: f64, of: fn(&Percentiles) -> u64| {
            // Frames that are due in a stall are late by its length: they are the slowest.
            let reached = 1.0 - percentile / 100.0;
            let told = used
                .iter()
                .filter(|t| t.stalls.load_stalled_share < reached);
            Spread::of(&told.map(|t| of(&t.one_way_ns) as f64).collect::<Vec<f64>>())
        };
        Self {
            quiet_trials: quiet.len(),
            p50_ns: spread(50.0, |p| p.p50),
            p99_ns: spread(99.0, |p| p.p99),
            p999_ns: spread(99.9, |p| p.p999),
        }
    }
}

impl std::fmt::Display for OneWay {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |spread: Option<Spread>| {
            spread.map_or_else(
                || "the machine's".to_owned(),
                |spread| format!("{:.1} us", spread.median / 1e3),
            )
        };
        let (p50, p99, p999) = (us(self.p50_ns), us(self.p99_ns), us(self.p999_ns));
        write!(out, "p50 {p50}, p99 {p99}, p99.9 {p999}")
    }
}

impl Latency {
    /// Of these trials, if there are any, beside those of the load alone.
    fn of(
        level: Level,
        trials: Vec<LatencyTrial>,
        alone: &[LatencyTrial],
        load_maximum: Option<Spread>,
    ) -> Option<Self> {
        let spread =
            |of: fn(&LatencyTrial) -> f64| Spread::of(&trials.iter().map(of).collect::<Vec<f64>>());
        let bound = load_maximum.map(|most| LOAD_BOUND * most.median);
        Some(Self {
            offered_frames_per_second: level.frames_per_second,
            share_of_slowest: level.share_of_slowest,
            load_bound: bound.is_some_and(|bound| level.frames_per_second > bound),
            one_way: OneWay::of(&trials),
            without_switch: (!alone.is_empty()).then(|| OneWay::of(alone)),
            frames_lost_share: spread(|t| t.frames_lost_share)?,
            load_busy_share: spread(|t| t.load_busy_share)?,
            load_disturbed_share: spread(|t| t.load_disturbed_share)?,
            load_stalls: trials.iter().map(|t| t.stalls.load_stalls).sum(),
            load_longest_stall_ns: trials
                .iter()
                .map(|t| t.stalls.load_longest_stall_ns)
                .max()?,
            frames_late_share: spread(|t| t.stalls.frames_late_share)?,
            trials,
        })
    }

    /// A line of the table.
    pub(super) fn line(&self, switch: &str) -> String {
        let share = self.share_of_slowest.map_or_else(String::new, |share| {
            format!(", {:.0} % of the slowest", 100.0 * share)
        });
        let alone = self
            .without_switch
            .map_or_else(|| "unknown".to_owned(), |alone| alone.to_string());
        format!(
            "  {switch:<14} at {:.3} Mpps{share}: one way {} (without a switch {alone}), {} of {} \
             trials quiet, {} stalls, longest {:.1} ms, late {:.3} %, lost {:.3} %, load busy {:.0} %, \
             disturbed {:.0} %{}",
            self.offered_frames_per_second / 1e6,
            self.one_way,
            self.one_way.quiet_trials,
            self.trials.len(),
            self.load_stalls,
            self.load_longest_stall_ns as f64 / 1e6,
            100.0 * self.frames_late_share.median,
            100.0 * self.frames_lost_share.median,
            100.0 * self.load_busy_share.median,
            100.0 * self.load_disturbed_share.median,
            if self.load_bound { ": load-bound" } else { "" },
        )
    }
}

/// The rates that are offered to all: those asked for that the slowest can take, and shares of what
/// it takes.
fn levels(asked: &[f64], slowest: f64) -> Vec<Level> {
    let most = SHARES[SHARES.len() - 1] * slowest;
    let asked = asked
        .iter()
        .filter(|rate| **rate <= most)
        .map(|rate| Level {
            frames_per_second: *rate,
            share_of_slowest: None,
        });
    let shares = SHARES.iter().map(|share| Level {
        frames_per_second: share * slowest,
        share_of_slowest: Some(*share),
    });
    asked.chain(shares).collect()
}

/// Trials in open loop, in turns, after some that find out what each switch can take of them. What
/// the load alone can take is returned.
pub(super) fn measure_latency(
    (rounds, asked): (u32, &[f64]),
    setting: TrialSetting<'_>,
    frame: FrameSize,
    contenders: &mut [Contender],
    subjects: &mut [Subject],
) -> Result<Option<Spread>> {
    let maxima = in_turns(rounds, contenders, subjects, |switch| {
        setting.stamped_maximum(frame, Some(switch))
    })?;
    for (subject, maxima) in subjects.iter_mut().zip(maxima) {
        subject.stamped_frames_per_second = Spread::of(&maxima);
    }
    let alone = (0..rounds).map(|_| setting.stamped_maximum(frame, None));
    let load_maximum = Spread::of(&alone.collect::<Result<Vec<f64>>>()?);
    let medians = subjects.iter().filter_map(|s| s.stamped_frames_per_second);
    let slowest = medians.map(|spread| spread.median).min_by(f64::total_cmp);
    let slowest = slowest.context("no switch took stamped frames")?;
    for level in levels(asked, slowest) {
        let rate = level.frames_per_second;
        let mut alone = Vec::new();
        let mut trials: Vec<Vec<LatencyTrial>> = vec![Vec::new(); contenders.len()];
        for _ in 0..rounds {
            match setting.latency_trial(frame, None, rate) {
                Ok(trial) => alone.push(trial),
                Err(error) => eprintln!("without a switch, a latency trial broke: {error:#}"),
            }
            interrupt::check()?;
            let round = in_turns(1, contenders, subjects, |switch| {
                setting.latency_trial(frame, Some(switch), rate)
            })?;
            trials
                .iter_mut()
                .zip(round)
                .for_each(|(all, new)| all.extend(new));
        }
        for (subject, trials) in subjects.iter_mut().zip(trials) {
            let latency = Latency::of(level, trials, &alone, load_maximum);
            subject.latency.extend(latency);
        }
    }
    Ok(load_maximum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::report::StallRow;

    /// A trial whose percentiles are all this, with stalls of this share of its time.
    fn trial(ns: u64, stalls: u64, stalled: f64) -> LatencyTrial {
        LatencyTrial {
            offered_frames_per_second: 1e5,
            one_way_ns: Percentiles {
                min: ns,
                p50: ns,
                p90: ns,
                p99: ns,
                p999: ns,
                max: ns,
            },
            frames_lost_share: 0.0,
            load_busy_share: 0.1,
            load_disturbed_share: 0.0,
            stalls: StallRow {
                load_stalls: stalls,
                load_longest_stall_ns: stalls * 1_000_000,
                load_stalled_share: stalled,
                frames_late_share: stalled,
            },
        }
    }

    #[test]
    fn all_switches_are_offered_the_same_rates_which_the_slowest_can_take() {
        let rates = |asked: &[f64]| -> Vec<f64> {
            let of_level = |level: &Level| level.frames_per_second;
            levels(asked, 1000.0).iter().map(of_level).collect()
        };
        assert_eq!(
            rates(&[10.0, 900.0, 901.0]),
            [10.0, 900.0, 100.0, 500.0, 900.0]
        );
        assert_eq!(rates(&[]), [100.0, 500.0, 900.0]);
    }

    #[test]
    fn percentiles_are_of_the_quiet_trials_and_stalls_of_all() {
        let trials = vec![
            trial(3_000, 0, 0.0),
            trial(90_000, 2, 0.05),
            trial(5_000, 0, 0.0),
        ];
        let level = levels(&[], 1e5)[0];
        let latency = Latency::of(level, trials, &[trial(200, 0, 0.0)], None).unwrap();
        assert_eq!(latency.one_way.quiet_trials, 2);
        assert_eq!(latency.one_way.p99_ns.unwrap().median, 4_000.0);
        assert_eq!(
            (latency.load_stalls, latency.load_longest_stall_ns),
            (2, 2_000_000)
        );
        let line = latency.line("ringway");
        assert!(
            line.contains("2 of 3 trials quiet, 2 stalls, longest 2.0 ms"),
            "{line}"
        );
        assert!(line.contains("without a switch p50 0.2"), "{line}");
    }

    #[test]
    fn a_percentile_that_stalls_reach_is_the_machines() {
        let one_way = OneWay::of(&[trial(3_000, 1, 0.005), trial(3_000, 9, 0.02)]);
        assert_eq!(one_way.quiet_trials, 0);
        let samples = |spread: Option<Spread>| spread.map_or(0, |spread| spread.samples);
        let told = [one_way.p50_ns, one_way.p99_ns, one_way.p999_ns].map(samples);
        assert_eq!(told, [2, 1, 0]);
        let told = one_way.to_string();
        assert_eq!(told, "p50 3.0 us, p99 3.0 us, p99.9 the machine's");
    }

    #[test]
    fn a_rate_near_the_loads_own_is_load_bound() {
        let level = Level {
            frames_per_second: 100.0,
            share_of_slowest: None,
        };
        let bound = |most: f64| {
            let latency = Latency::of(level, vec![trial(1, 0, 0.0)], &[], Spread::of(&[most]));
            latency.unwrap().line("testpmd").ends_with(": load-bound")
        };
        assert!(bound(109.0) && !bound(120.0));
    }
}
