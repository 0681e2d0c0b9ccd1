//! One trial of one switch.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::super::args::{FrameSize, LoadArgs, LoadPlace};
use super::super::error::LoadError;
use super::super::load::{Load, LoadConfig, SETTLE};
use super::super::memcpy;
use super::super::meter::MaxResult;
use super::super::nic::{NicLoad, VethPair};
use super::super::report::{Percentiles, StallRow};
use super::super::run::{WARM_UP, on_cpu};
use super::super::switch::RunningSwitch;
use super::super::virtio_user;
use super::options::{FramePath, LoadDriver};

/// Of the frames that were due, those that may stay unsent before a latency trial tells nothing.
const UNSENT: f64 = 0.01;

/// What all trials have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct TrialSetting<'a> {
    pub(super) path: FramePath,
    pub(super) driver: LoadDriver,
    pub(super) load: &'a LoadArgs,
    pub(super) duration: Duration,
    pub(super) switch_cpu: usize,
    pub(super) load_cpu: usize,
    /// Guests have hugepages.
    pub(super) huge: bool,
}

/// A full-rate trial.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Trial {
    pub(super) frames_per_second: f64,
    pub(super) bits_per_second: f64,
    /// Over the best 2 ms; not told by the virtio-user load.
    pub(super) best_frames_per_second: Option<f64>,
    pub(super) load_busy_share: Option<f64>,
    pub(super) load_disturbed_share: Option<f64>,
    pub(super) frames_lost_share: Option<f64>,
    /// Of the virtio-user load's pool.
    pub(super) load_buffers: Option<u32>,
}

/// A trial in open loop.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct LatencyTrial {
    pub(super) offered_frames_per_second: f64,
    pub(super) one_way_ns: Percentiles,
    pub(super) frames_lost_share: f64,
    pub(super) load_busy_share: f64,
    pub(super) load_disturbed_share: f64,
    #[serde(flatten)]
    pub(super) stalls: StallRow,
}

/// True if another try ends the same way.
pub(super) fn is_final(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<LoadError>())
        .any(LoadError::is_final)
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
            load_buffers: None,
        }
    }
}

impl Trial {
    /// What is known of rates only.
    fn of_rate(frames_per_second: f64, frame_bytes: u32) -> Self {
        Self {
            frames_per_second,
            bits_per_second: frames_per_second * 8.0 * f64::from(frame_bytes),
            best_frames_per_second: None,
            load_busy_share: None,
            load_disturbed_share: None,
            frames_lost_share: None,
            load_buffers: None,
        }
    }
}

impl TrialSetting<'_> {
    /// A switch at full rate.
    pub(super) fn trial(self, frame: FrameSize, switch: &RunningSwitch) -> Result<Trial> {
        let config = self.config(frame, switch)?;
        match self.driver {
            LoadDriver::Synth => {
                let result = on_cpu(self.load_cpu, || -> Result<MaxResult> {
                    self.warm_load(&config, switch)?.run_max(self.duration)
                })??;
                Ok(Trial {
                    // The far end's count is not read often enough to tell.
                    best_frames_per_second: (self.path == FramePath::GuestGuest)
                        .then_some(result.best_pps),
                    ..result.into()
                })
            }
            LoadDriver::VirtioUser => {
                let (cpu, main) = (self.load_cpu, self.switch_cpu);
                let rate = virtio_user::trial(&config, cpu, main, self.duration)?;
                Ok(Trial {
                    load_busy_share: rate.busy_share,
                    load_disturbed_share: Some(rate.disturbed_share),
                    frames_lost_share: Some(rate.lost_share),
                    load_buffers: Some(rate.buffers),
                    ..Trial::of_rate(rate.frames_per_second, config.sizes[0])
                })
            }
        }
    }

    /// A switch at full rate and the share of time in which it had work, if it tells.
    pub(super) fn account(
        self,
        frame: FrameSize,
        switch: &mut RunningSwitch,
    ) -> Result<Option<f64>> {
        if self.driver != LoadDriver::Synth {
            return Ok(None);
        }
        let config = self.config(frame, switch)?;
        let mut load = on_cpu(self.load_cpu, || self.warm_load(&config, switch))??;
        let since = switch.begin_account()?;
        let place = switch.veth().ok();
        on_cpu(self.load_cpu, || -> Result<MaxResult> {
            place.map_or(Ok(()), VethPair::enter)?;
            load.run_max(self.duration)
        })??;
        switch.end_account(since)
    }

    /// A switch, or the load without one, at full rate with stamped frames, in frames per second.
    pub(super) fn stamped_maximum(
        self,
        frame: FrameSize,
        switch: Option<&RunningSwitch>,
    ) -> Result<f64> {
        let config = self.config_of(frame, switch)?;
        on_cpu(self.load_cpu, || -> Result<f64> {
            let mut load = stamping_load(&config, switch)?;
            load.stamped_maximum(WARM_UP)?;
            Ok(load.stamped_maximum(self.duration)?)
        })?
    }

    /// A switch, or the load without one, at an offered rate.
    pub(super) fn latency_trial(
        self,
        frame: FrameSize,
        switch: Option<&RunningSwitch>,
        rate: f64,
    ) -> Result<LatencyTrial> {
        let config = self.config_of(frame, switch)?;
        let result = on_cpu(self.load_cpu, || -> Result<_> {
            let mut load = stamping_load(&config, switch)?;
            load.run_rate(rate, WARM_UP, false)?;
            Ok(load.run_rate(rate, self.duration, config.verify)?)
        })??;
        ensure!(result.received > 0, "no frame arrived");
        ensure!(result.foreign == 0, "{} frames are foreign", result.foreign);
        let unsent = 1.0 - result.sent as f64 / result.offered.max(1) as f64;
        ensure!(
            unsent < UNSENT,
            "{:.1} % of the frames that were due found no room",
            100.0 * unsent
        );
        Ok(LatencyTrial {
            offered_frames_per_second: rate,
            one_way_ns: Percentiles::of(&result.latency),
            frames_lost_share: result.lost() as f64 / result.sent.max(1) as f64,
            load_busy_share: result.busy_share(),
            load_disturbed_share: result.disturbed_share(),
            stalls: StallRow::of(&result),
        })
    }

    /// The load for a switch, or for two guests without one.
    fn config_of(self, frame: FrameSize, switch: Option<&RunningSwitch>) -> Result<LoadConfig> {
        if let Some(switch) = switch {
            return self.config(frame, switch);
        }
        let place = LoadPlace {
            huge: self.huge,
            ..LoadPlace::default()
        };
        let nowhere = [PathBuf::new(), PathBuf::new()];
        self.load.config(frame, &nowhere, place)
    }

    /// A plain copy loop on the switch's core, where copying matters.
    pub(super) fn copy_trial(self, frame: FrameSize) -> Result<Option<Trial>> {
        let FrameSize::Fixed(bytes) = frame else {
            return Ok(None);
        };
        if bytes < memcpy::SMALLEST {
            return Ok(None);
        }
        let place = LoadPlace {
            huge: self.huge,
            ..LoadPlace::default()
        };
        let config = self.load.config(frame, &[], place)?;
        let rate = on_cpu(self.switch_cpu, || memcpy::trial(&config, self.duration))??;
        Ok(Some(Trial::of_rate(rate, bytes)))
    }

    /// A load on this path through which frames flow steadily. Enters the switch's NIC's place.
    fn warm_load(self, config: &LoadConfig, switch: &RunningSwitch) -> Result<AnyLoad> {
        let Some(way) = self.path.way() else {
            return Ok(AnyLoad::Guests(warm_load(config)?));
        };
        let veth = switch.veth()?;
        veth.enter()?;
        let mut load = NicLoad::connect(config, veth, way)?;
        load.warm_up(WARM_UP)?;
        Ok(AnyLoad::Nic(load))
    }

    fn config(self, frame: FrameSize, switch: &RunningSwitch) -> Result<LoadConfig> {
        let place = LoadPlace {
            huge: self.huge,
            ..switch.load_place()
        };
        self.load.config(frame, switch.sockets(), place)
    }
}

/// A load on any path.
enum AnyLoad {
    Guests(Load),
    Nic(NicLoad),
}

impl AnyLoad {
    fn run_max(&mut self, duration: Duration) -> Result<MaxResult> {
        match self {
            Self::Guests(load) => Ok(load.run_max(duration)?),
            Self::Nic(load) => load.run_max(duration),
        }
    }
}

/// A load between guests through which frames flow steadily.
fn warm_load(config: &LoadConfig) -> Result<Load> {
    let mut load = Load::connect(config)?;
    load.warm_up(WARM_UP)?;
    Ok(load)
}

/// A load of stamped frames, with nothing on its way.
fn stamping_load(config: &LoadConfig, switch: Option<&RunningSwitch>) -> Result<Load> {
    if switch.is_none() {
        return Ok(Load::without_switch(config)?);
    }
    let mut load = warm_load(config)?;
    load.drain(SETTLE)?;
    Ok(load)
}
