//! What a comparison found, for one size of frames.

use std::fmt::Write as _;

use serde::Serialize;

use super::super::report::{Limit, Shares};
use super::latency::{self, Latency};
use super::options::FramePath;
use super::trial::Trial;
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
    /// Buffers in the load's pool, of the virtio-user load.
    load_buffers: Option<u32>,
    /// With time stamps in the frames: the lowest of all switches' is what shares of `latency` are
    /// of.
    pub(super) stamped_frames_per_second: Option<Spread>,
    pub(super) latency: Vec<Latency>,
}

/// All that was found with one size.
#[derive(Debug, Serialize)]
pub(super) struct SizeResult {
    pub(super) frame: String,
    pub(super) path: FramePath,
    pub(super) subjects: Vec<Subject>,
    /// What the load does without a switch, with stamped frames.
    pub(super) load_stamped_frames_per_second: Option<Spread>,
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
        let load_buffers = trials.iter().flatten().find_map(|trial| trial.load_buffers);
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
            load_buffers,
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
        if let (Some(Limit::LoadBound), Some(buffers)) = (self.limit, self.load_buffers) {
            let _ = write!(line, ", with a pool of {buffers} buffers");
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
    let rates = size.subjects.iter().map(|subject| subject.latency.len());
    for rate in 0..rates.max().unwrap_or(0) {
        for subject in &size.subjects {
            if let Some(latency) = subject.latency.get(rate) {
                println!("{}", latency.line(subject.switch));
            }
        }
    }
    if let Some(most) = size.load_stamped_frames_per_second {
        println!(
            "  without a switch the load does {:.3} Mpps; {}",
            most.median / 1e6,
            latency::RULE
        );
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
            load_buffers: None,
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
    fn a_result_that_the_load_limits_names_its_pool_of_buffers() {
        let of_load = |busy| {
            let trial = Trial {
                load_busy_share: Some(busy),
                load_buffers: Some(5120),
                ..trial(10.0).unwrap()
            };
            let mut size = SizeResult {
                frame: "64".into(),
                path: FramePath::GuestGuest,
                subjects: vec![Subject::new("ringway", vec![Some(trial)], None, &[])],
                load_stamped_frames_per_second: None,
            };
            size.name_limits();
            size.subjects[0].line()
        };
        let line = of_load(0.99);
        assert!(
            line.ends_with(": load-bound, with a pool of 5120 buffers"),
            "{line}"
        );
        let line = of_load(0.5);
        assert!(line.ends_with(": switch-bound"), "{line}");
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
            load_stamped_frames_per_second: None,
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
