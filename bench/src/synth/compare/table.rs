//! What a comparison found, for one size of frames.

use std::fmt::Write as _;

use serde::Serialize;

use super::super::report::{Limit, Shares};
use super::options::FramePath;
use super::trial::{LatencyTrial, Trial};
use crate::stats::Spread;

/// The row of the plain copy loop.
pub(super) const COPY: &str = "memcpy";

/// A switch's trials with one frame size, or the copy loop's.
#[derive(Debug, Serialize)]
pub(super) struct Subject {
    pub(super) switch: &'static str,
    pub(super) frames_per_second: Option<Spread>,
    bits_per_second: Option<Spread>,
    best_frames_per_second: Option<Spread>,
    frames_lost_share: Option<Spread>,
    load_busy_share: Option<Spread>,
    load_disturbed_share: Option<Spread>,
    /// By its own account, in one more trial at full rate; `null` if it has none.
    pub(super) switch_busy_share: Option<f64>,
    limit: Option<Limit>,
    /// Why there is nothing, or nothing more.
    left_out: Option<String>,
    /// In the order of the rounds; `null` where a trial broke each time.
    trials: Vec<Option<Trial>>,
    /// Rate of the first switch by this one's, round by round.
    first_by_this: Option<Spread>,
    /// With time stamps in the frames: what the rates of `latency` are shares of.
    pub(super) stamped_frames_per_second: Option<Spread>,
    pub(super) latency: Vec<Latency>,
}

/// Latency at one offered rate.
#[derive(Debug, Serialize)]
pub(super) struct Latency {
    /// Offered rate by the switch's own median at full rate with stamped frames.
    share_of_maximum: f64,
    offered_frames_per_second: f64,
    one_way_p50_ns: Spread,
    one_way_p99_ns: Spread,
    frames_lost_share: Spread,
    load_busy_share: Spread,
    load_disturbed_share: Spread,
    trials: Vec<LatencyTrial>,
}

/// All that was found with one size.
#[derive(Debug, Serialize)]
pub(super) struct SizeResult {
    pub(super) frame: String,
    pub(super) path: FramePath,
    pub(super) subjects: Vec<Subject>,
}

impl Subject {
    /// Sums up a switch's trials next to the first switch's of the same rounds.
    pub(super) fn new(
        switch: &'static str,
        trials: Vec<Option<Trial>>,
        left_out: Option<String>,
        first: &[Option<Trial>],
    ) -> Self {
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
        Self {
            switch,
            frames_per_second: spread(|trial| Some(trial.frames_per_second)),
            bits_per_second: spread(|trial| Some(trial.bits_per_second)),
            best_frames_per_second: spread(|trial| trial.best_frames_per_second),
            frames_lost_share: spread(|trial| trial.frames_lost_share),
            load_busy_share: spread(|trial| trial.load_busy_share),
            load_disturbed_share: spread(|trial| trial.load_disturbed_share),
            switch_busy_share: None,
            limit: None,
            left_out,
            first_by_this: Spread::of(&ratios),
            trials,
            stamped_frames_per_second: None,
            latency: Vec::new(),
        }
    }

    pub(super) fn has_results(&self) -> bool {
        self.frames_per_second.is_some()
    }

    fn shares(&self) -> Option<Shares> {
        Some(Shares {
            load_busy: self.load_busy_share?.median,
            load_disturbed: self.load_disturbed_share.map_or(0.0, |share| share.median),
            switch_busy: self.switch_busy_share,
        })
    }

    fn line(&self) -> String {
        let (Some(pps), Some(bits)) = (self.frames_per_second, self.bits_per_second) else {
            let why = self.left_out.as_deref().unwrap_or("all trials broke");
            return format!("  {:<14} left out: {why}", self.switch);
        };
        let mut line = format!(
            "  {:<14} median {:8.3} Mpps {:8.2} Gbit/s  best {:8.3} Mpps",
            self.switch,
            pps.median / 1e6,
            bits.median / 1e9,
            pps.best / 1e6,
        );
        if self.switch == COPY {
            return line;
        }
        if let Some(best) = self.best_frames_per_second {
            let _ = write!(line, "  best 2 ms {:8.3} Mpps", best.best / 1e6);
        }
        let percent = |share: Option<f64>| {
            share.map_or("unknown".to_owned(), |share| {
                format!("{:.0} %", 100.0 * share)
            })
        };
        let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
        let _ = write!(
            line,
            "  lost {}  busy: switch {}, load {}",
            percent(median(self.frames_lost_share)),
            percent(self.switch_busy_share),
            percent(median(self.load_busy_share)),
        );
        if let Some(disturbed) = self.load_disturbed_share {
            let _ = write!(line, ", disturbed {}", percent(Some(disturbed.median)));
        }
        if let Some(limit) = self.limit {
            let _ = write!(line, ": {}", limit.name());
        }
        line
    }

    fn ratio_line(&self, first: &str) -> Option<String> {
        let ratio = self.first_by_this.filter(|_| self.switch != first)?;
        Some(format!(
            "  {first} / {:<14} median {:.2}, quartiles {:.2} to {:.2}, {} pairs",
            self.switch, ratio.median, ratio.lower_quartile, ratio.upper_quartile, ratio.samples
        ))
    }
}

impl Latency {
    /// Of these trials, if there are any.
    pub(super) fn of(share_of_maximum: f64, trials: Vec<LatencyTrial>) -> Option<Self> {
        let spread =
            |of: fn(&LatencyTrial) -> f64| Spread::of(&trials.iter().map(of).collect::<Vec<f64>>());
        Some(Self {
            share_of_maximum,
            offered_frames_per_second: spread(|t| t.offered_frames_per_second)?.median,
            one_way_p50_ns: spread(|t| t.one_way_ns.p50 as f64)?,
            one_way_p99_ns: spread(|t| t.one_way_ns.p99 as f64)?,
            frames_lost_share: spread(|t| t.frames_lost_share)?,
            load_busy_share: spread(|t| t.load_busy_share)?,
            load_disturbed_share: spread(|t| t.load_disturbed_share)?,
            trials,
        })
    }

    fn line(&self, switch: &str) -> String {
        let us = |spread: Spread| spread.median / 1e3;
        format!(
            "  {switch:<14} at {:2.0} % ({:.3} Mpps) one way p50 {:8.1} us, p99 {:8.1} us (quartiles \
             {:.1} to {:.1}), lost {:.3} %, load busy {:.0} %, disturbed {:.0} %",
            100.0 * self.share_of_maximum,
            self.offered_frames_per_second / 1e6,
            us(self.one_way_p50_ns),
            us(self.one_way_p99_ns),
            self.one_way_p99_ns.lower_quartile / 1e3,
            self.one_way_p99_ns.upper_quartile / 1e3,
            100.0 * self.frames_lost_share.median,
            100.0 * self.load_busy_share.median,
            100.0 * self.load_disturbed_share.median,
        )
    }
}

impl SizeResult {
    /// True if anything was measured.
    pub(super) fn has_results(&self) -> bool {
        let switches = |subject: &&Subject| subject.switch != COPY;
        self.subjects
            .iter()
            .filter(switches)
            .any(Subject::has_results)
    }

    /// True if a switch was left out.
    pub(super) fn left_out(&self) -> bool {
        self.subjects
            .iter()
            .any(|subject| subject.left_out.is_some())
    }

    /// Says of each result what limits it.
    pub(super) fn name_limits(&mut self) {
        let rate = |subject: &Subject| subject.frames_per_second.map(|pps| pps.median);
        let copy = self
            .subjects
            .iter()
            .find(|subject| subject.switch == COPY)
            .and_then(rate);
        for subject in &mut self.subjects {
            let by_copy = rate(subject).zip(copy).map(|(switch, copy)| switch / copy);
            subject.limit = subject
                .shares()
                .map(|shares| Limit::of(shares).or_copy(by_copy));
        }
    }
}

/// Prints what was found with one size.
pub(super) fn print_size(size: &SizeResult) {
    match size.path {
        FramePath::GuestGuest => println!("\n{} B", size.frame),
        path => println!("\n{} B, {}", size.frame, path.name()),
    }
    let first = size.subjects[0].switch;
    for subject in &size.subjects {
        println!("{}", subject.line());
    }
    for line in size.subjects.iter().filter_map(|s| s.ratio_line(first)) {
        println!("{line}");
    }
    for subject in &size.subjects {
        for latency in &subject.latency {
            println!("{}", latency.line(subject.switch));
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
            load_busy_share: Some(0.3),
            load_disturbed_share: None,
            frames_lost_share: None,
        })
    }

    #[test]
    fn ratios_pair_the_trials_of_a_round_and_leave_broken_ones_out() {
        let first = [trial(20.0), trial(40.0), None, trial(90.0)];
        let trials = vec![trial(10.0), None, trial(5.0), trial(30.0)];
        let subject = Subject::new("peer", trials, None, &first);
        let ratio = subject.first_by_this.unwrap();
        assert_eq!((ratio.samples, ratio.median), (2, 2.5));
        assert_eq!(subject.frames_per_second.unwrap().samples, 3);
        let line = subject.ratio_line("ringway").unwrap();
        assert!(line.contains("ringway / peer"), "{line}");
        assert_eq!(subject.ratio_line("peer"), None);
    }

    #[test]
    fn a_switch_near_the_copy_loop_is_bound_by_it_and_one_without_trials_has_no_figure() {
        let first = vec![trial(90.0)];
        let mut size = SizeResult {
            frame: "9000".into(),
            path: FramePath::GuestGuest,
            subjects: vec![
                Subject::new("ringway", first.clone(), None, &first),
                Subject::new("testpmd", vec![trial(50.0)], None, &first),
                Subject::new("ovs-dpdk", vec![], Some("it died".into()), &first),
                Subject::new(COPY, vec![trial(100.0)], None, &first),
            ],
        };
        size.name_limits();
        let limits: Vec<_> = size.subjects.iter().map(|subject| subject.limit).collect();
        let (copy, switch) = (Some(Limit::CopyBound), Some(Limit::SwitchBound));
        assert_eq!(limits[..3], [copy, switch, None]);
        assert!(size.has_results() && size.left_out());
        let line = size.subjects[2].line();
        assert_eq!(line, "  ovs-dpdk       left out: it died");
        let ratio = size.subjects[3].ratio_line("ringway").unwrap();
        assert!(ratio.contains("median 0.90"), "{ratio}");
    }
}
