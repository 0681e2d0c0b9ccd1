//! Trials of switches in turns: what breaks is told and left out, the rest goes on.

use anyhow::{Context, Result};

use super::super::args::FrameSize;
use super::super::switch::{RunningSwitch, SwitchKind, SwitchSetup};
use super::say_left_out;
use super::table::{COPY, Subject};
use super::trial::{Trial, TrialSetting, is_final};
use crate::interrupt::{self, Interrupted};

/// Times that a trial is repeated if it broke.
const RETRIES: u32 = 2;

/// A switch that is compared.
pub(super) struct Contender {
    kind: SwitchKind,
    /// All are compared with it: nothing is left to do once it died.
    is_first: bool,
    /// Stopped but for its trials; `None` if it did not start, or once it died.
    switch: Option<RunningSwitch>,
}

impl Contender {
    /// Starts a switch; one that does not start is left out, unless it is the first.
    pub(super) fn start(kind: SwitchKind, setup: SwitchSetup, is_first: bool) -> Result<Self> {
        let started = RunningSwitch::start(kind, setup);
        interrupt::check()?;
        let switch = match started {
            Ok(switch) => {
                switch.pause();
                Some(switch)
            }
            Err(error) if is_first => {
                return Err(error).with_context(|| format!("starting {}", kind.name()));
            }
            Err(error) => {
                say_left_out(kind.name(), "", &error);
                None
            }
        };
        Ok(Self {
            kind,
            is_first,
            switch,
        })
    }

    /// Its name, and what it says that it is, if it runs.
    pub(super) fn version(&self) -> Option<(&'static str, &str)> {
        let version = self.switch.as_ref()?.version();
        Some((self.kind.name(), version))
    }

    /// Has the switch run while something is done with it; `None` if there is no switch.
    fn awake<T>(
        &mut self,
        work: impl FnOnce(&mut RunningSwitch) -> T,
    ) -> Result<Option<T>, Interrupted> {
        let Some(switch) = &mut self.switch else {
            return Ok(None);
        };
        switch.resume();
        let outcome = work(switch);
        switch.pause();
        interrupt::check()?;
        Ok(Some(outcome))
    }
}

/// A contender's trials at full rate with one size.
#[derive(Default)]
struct Series {
    /// In the order of the rounds; `None` where a trial broke each time.
    trials: Vec<Option<Trial>>,
    /// Why there are no more.
    left_out: Option<String>,
}

impl Series {
    /// One more trial, unless the contender is left out.
    ///
    /// # Errors
    /// The first contender died.
    fn add(
        &mut self,
        setting: TrialSetting<'_>,
        frame: FrameSize,
        contender: &mut Contender,
    ) -> Result<()> {
        if self.left_out.is_some() {
            return Ok(());
        }
        match contender.awake(|switch| try_trial(setting, frame, switch))? {
            None => self.left_out = Some("it is not running".to_owned()),
            Some(Ok(trial)) => self.trials.push(Some(trial)),
            // It worked before: this trial is left out, the next may pass.
            Some(Err(Broken { died: false, .. })) if !self.trials.is_empty() => {
                self.trials.push(None);
            }
            Some(Err(Broken { died: true, error })) if contender.is_first => return Err(error),
            Some(Err(Broken { died, error })) => {
                say_left_out(contender.kind.name(), &format!(" at {frame} B"), &error);
                self.left_out = Some(format!("{error:#}"));
                if died {
                    self.trials.clear();
                    contender.switch = None;
                }
            }
        }
        Ok(())
    }
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
        if tries > RETRIES || is_final(&error) {
            return Err(Broken { error, died: false });
        }
        let name = switch.kind().name();
        eprintln!("{name}, {frame} B, a trial broke and is repeated: {error:#}");
    }
}

/// Trials at full rate, in turns: a subject for each contender in order, and behind them one for
/// the copy loop where copying matters.
pub(super) fn full_rate(
    rounds: u32,
    setting: TrialSetting<'_>,
    frame: FrameSize,
    contenders: &mut [Contender],
) -> Result<Vec<Subject>> {
    let mut all: Vec<Series> = contenders.iter().map(|_| Series::default()).collect();
    let mut copies = Vec::new();
    for _ in 0..rounds {
        for (contender, series) in contenders.iter_mut().zip(&mut all) {
            series.add(setting, frame, contender)?;
        }
        match setting.copy_trial(frame) {
            Ok(trial) => copies.extend(trial.map(Some)),
            Err(error) => {
                say_left_out(COPY, &format!(" at {frame} B"), &error);
                copies.push(None);
            }
        }
    }
    let first = all[0].trials.clone();
    let of_contenders = contenders.iter().zip(all).map(|(contender, series)| {
        let name = contender.kind.name();
        Subject::new(name, series.trials, series.left_out, &first)
    });
    let mut subjects: Vec<Subject> = of_contenders.collect();
    if !copies.is_empty() {
        subjects.push(Subject::new(COPY, copies, None, &first));
    }
    Ok(subjects)
}

/// One more trial of each switch, not counted, in which it accounts for its time.
pub(super) fn account_all(
    setting: TrialSetting<'_>,
    frame: FrameSize,
    contenders: &mut [Contender],
    subjects: &mut [Subject],
) -> Result<()> {
    for (contender, subject) in contenders.iter_mut().zip(subjects) {
        if !subject.has_results() {
            continue;
        }
        match contender.awake(|switch| setting.account(frame, switch))? {
            Some(Ok(share)) => subject.switch_busy_share = share,
            Some(Err(error)) => {
                eprintln!("{} can't tell its busy share: {error:#}", subject.switch);
            }
            None => {}
        }
    }
    Ok(())
}

/// Does something with each switch that has results, in turns; what breaks is told and left out.
pub(super) fn in_turns<T>(
    rounds: u32,
    contenders: &mut [Contender],
    subjects: &[Subject],
    mut work: impl FnMut(&RunningSwitch) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut results: Vec<Vec<T>> = contenders.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for ((contender, subject), results) in contenders.iter_mut().zip(subjects).zip(&mut results)
        {
            if !subject.has_results() {
                continue;
            }
            match contender.awake(|switch| work(switch))? {
                Some(Ok(result)) => results.push(result),
                Some(Err(error)) => {
                    eprintln!("{}, a latency trial broke: {error:#}", subject.switch);
                }
                None => {}
            }
        }
    }
    Ok(results)
}
