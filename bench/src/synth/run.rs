//! `ringway-bench run`: one switch, one load.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use ringway_control::config::pin_to_cpu;
use serde::Serialize;

use super::args::{FrameSize, LoadArgs, LoadPlace};
use super::load::{Load, LoadConfig};
use super::report::{Environment, Limit, Percentiles, Shares, StallRow};
use super::switch::{RunningSwitch, SwitchKind};
use crate::interrupt;

/// Unmeasured time at full rate before each measurement.
pub(crate) const WARM_UP: Duration = Duration::from_millis(200);

/// How frames are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// As fast as the switch takes them, both ways
    Max,
    /// At `--rate`, whether the switch keeps up or not
    Rate,
    /// One at a time, there and back
    Rr,
}

/// Drive a switch with synthetic guests and measure it.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Socket of the switch for the first guest; without it a switch is started
    #[arg(long, value_name = "PATH", requires = "socket_b")]
    socket_a: Option<PathBuf>,
    /// Socket of the switch for the second guest
    #[arg(long, value_name = "PATH", requires = "socket_a")]
    socket_b: Option<PathBuf>,
    /// The switch to start
    #[arg(
        long,
        value_enum,
        default_value = "ringway",
        conflicts_with = "socket_a"
    )]
    switch: SwitchKind,
    /// Pairs of guests
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        conflicts_with = "socket_a"
    )]
    pairs: u16,
    /// How frames are sent
    #[arg(long, value_enum, default_value = "max")]
    mode: Mode,
    /// Frames per second offered by all guests together, for `--mode rate`
    #[arg(long, value_name = "PPS", required_if_eq("mode", "rate"))]
    rate: Option<f64>,
    /// Seconds per frame size
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    duration: f64,
    /// Print one JSON object
    #[arg(short = 'j', long)]
    json: bool,
}

/// One size's result as JSON.
#[derive(Debug, Serialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
enum Row {
    Max(MaxRow),
    Rate(RateRow),
    Rr(RrRow),
}

#[derive(Debug, Serialize)]
struct MaxRow {
    frame: String,
    frames_per_second: f64,
    bits_per_second: f64,
    frames_sent: u64,
    frames_received: u64,
    load_busy_share: f64,
    /// By its own account; null if it has none.
    switch_busy_share: Option<f64>,
    load_ns_per_frame: f64,
    /// Over the best 2 ms.
    best_frames_per_second: f64,
    best_load_ns_per_frame: f64,
    frames_per_turn: f64,
    /// Share of time that the load was kept off its CPU by others.
    load_disturbed_share: f64,
    in_order: bool,
    limit: Limit,
}

#[derive(Debug, Serialize)]
struct RateRow {
    frame: String,
    frames_offered: u64,
    frames_sent: u64,
    frames_received: u64,
    frames_lost: u64,
    frames_duplicated: u64,
    frames_reordered: u64,
    /// So late that they can't be told from duplicates; counted as lost.
    frames_too_late: u64,
    frames_foreign: u64,
    load_busy_share: f64,
    load_disturbed_share: f64,
    #[serde(flatten)]
    stalls: StallRow,
    latency_ns: Percentiles,
    /// Of the same load without a switch, right after it: the floor of `latency_ns`.
    without_switch_ns: Percentiles,
}

#[derive(Debug, Serialize)]
struct RrRow {
    frame: String,
    transactions_per_second: f64,
    round_trip_ns: Percentiles,
    /// Of the same load without a switch, right after it: the floor of `round_trip_ns`.
    without_switch_ns: Percentiles,
}

/// Runs the load and prints what it measured.
///
/// # Errors
/// No switch, one that dies or lacks what the load needs: nothing is printed of a broken run.
pub(crate) fn run(args: &RunArgs) -> Result<ExitCode> {
    interrupt::install()?;
    let (switch_cpu, load_cpu) = args.load.cpus()?;
    ensure!(args.duration > 0.0, "a run takes time");
    if args.mode != Mode::Max {
        args.load.check_stamps()?;
    }
    let guests = args.pairs.max(1) * 2;
    let programs = match args.socket_a {
        Some(_) => 0,
        None => args.switch.huge_pages(),
    };
    let (_pages, huge) = args.load.huge_pages(programs, guests)?;
    let mut switch = None;
    let sockets = match (&args.socket_a, &args.socket_b) {
        (Some(a), Some(b)) => vec![a.clone(), b.clone()],
        _ => {
            let classes = args.load.frames.iter().map(|frame| frame.class());
            let class = classes.max().context("no frame size")?;
            let cpus = (switch_cpu, load_cpu);
            let setup = args.load.switch_setup(class, cpus, guests, false);
            let started = switch.insert(RunningSwitch::start(args.switch, setup)?);
            started.sockets().to_vec()
        }
    };
    let place = switch
        .as_ref()
        .map_or(LoadPlace::default(), RunningSwitch::load_place);
    let place = LoadPlace { huge, ..place };
    let mut rows = Vec::new();
    for size in &args.load.frames {
        let config = args.load.config(*size, &sockets, place)?;
        let outcome = measure(args, *size, &config, load_cpu, switch.as_mut());
        // A switch that died tells more than the load that misses it.
        if let Some(switch) = &mut switch {
            switch.check_alive()?;
        }
        let row = outcome.with_context(|| format!("frames of {size} bytes"))?;
        if !args.json {
            println!("{row}");
        }
        rows.push(row);
    }
    if args.json {
        let report = serde_json::json!({
            "environment": Environment::here(),
            "switch": switch.as_ref().map(|switch| switch.kind().name()),
            "switch_version": switch.as_ref().map(RunningSwitch::version),
            "layout": args.load.layout,
            "queue_size": args.load.queue_size,
            "queues": args.load.queues,
            "guests": guests,
            "hugepages": huge,
            "results": rows,
        });
        println!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs something on a thread of its own that is pinned to a CPU.
pub(crate) fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
    let pinned = || -> Result<T> {
        anyhow::ensure!(pin_to_cpu(cpu), "can't run on CPU {cpu}");
        Ok(work())
    };
    thread::scope(|scope| scope.spawn(pinned).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Measures one size; the load works on its own CPU, all else happens here.
fn measure(
    args: &RunArgs,
    size: FrameSize,
    config: &LoadConfig,
    cpu: usize,
    switch: Option<&mut RunningSwitch>,
) -> Result<Row> {
    let duration = Duration::try_from_secs_f64(args.duration)?;
    let frame = size.to_string();
    match args.mode {
        Mode::Max => max_row(frame, config, duration, cpu, switch),
        Mode::Rate => {
            let rate = args.rate.unwrap_or(0.0);
            ensure!(rate > 0.0, "--rate is more than 0");
            on_cpu(cpu, || rate_row(frame, config, rate, duration))?
        }
        Mode::Rr => on_cpu(cpu, || {
            let result = Load::connect(config)?.run_echo(duration)?;
            let floor = Load::without_switch(config)?.run_echo(duration)?;
            Ok(Row::Rr(RrRow {
                frame,
                transactions_per_second: result.transactions as f64 / result.elapsed.as_secs_f64(),
                round_trip_ns: Percentiles::of(&result.round_trip),
                without_switch_ns: Percentiles::of(&floor.round_trip),
            }))
        })?,
    }
}

fn max_row(
    frame: String,
    config: &LoadConfig,
    duration: Duration,
    cpu: usize,
    mut switch: Option<&mut RunningSwitch>,
) -> Result<Row> {
    let mut load = on_cpu(cpu, || -> Result<Load> {
        let mut load = Load::connect(config)?;
        load.warm_up(WARM_UP)?;
        Ok(load)
    })??;
    // testpmd's account costs it a little: it is for comparisons, in a run of its own.
    let tells = |switch: &&mut RunningSwitch| {
        !matches!(switch.kind(), SwitchKind::Testpmd | SwitchKind::TestpmdMac)
    };
    let account = match switch.as_mut().filter(|switch| tells(switch)) {
        Some(switch) => Some(switch.begin_account()?),
        None => None,
    };
    let result = on_cpu(cpu, || load.run_max(duration))??;
    let switch_busy_share = match (switch, account) {
        (Some(switch), Some(since)) => switch.end_account(since)?,
        _ => None,
    };
    let full_turns = (result.turns - result.empty_turns).max(1);
    let shares = Shares {
        load_busy: result.busy_share(),
        load_disturbed: result.disturbed_share(),
        switch_busy: switch_busy_share,
    };
    Ok(Row::Max(MaxRow {
        frame,
        frames_per_second: result.pps(),
        bits_per_second: result.bits_per_second(),
        frames_sent: result.sent,
        frames_received: result.received,
        load_busy_share: shares.load_busy,
        switch_busy_share,
        load_ns_per_frame: result.load_ns_per_frame(),
        best_frames_per_second: result.best_pps,
        best_load_ns_per_frame: result.best_ns_per_frame,
        load_disturbed_share: shares.load_disturbed,
        frames_per_turn: result.received as f64 / full_turns as f64,
        in_order: load.guests.iter().all(|guest| guest.in_order),
        limit: Limit::of(shares),
    }))
}

fn rate_row(frame: String, config: &LoadConfig, rate: f64, duration: Duration) -> Result<Row> {
    let mut load = Load::connect(config)?;
    load.run_rate(rate, WARM_UP, false)?;
    let result = load.run_rate(rate, duration, config.verify)?;
    // Its memory is the other's.
    drop(load);
    let mut load = Load::without_switch(config)?;
    load.run_rate(rate, WARM_UP, false)?;
    let floor = load.run_rate(rate, duration, config.verify)?;
    Ok(Row::Rate(RateRow {
        frame,
        frames_offered: result.offered,
        frames_sent: result.sent,
        frames_received: result.received,
        frames_lost: result.lost(),
        frames_duplicated: result.duplicated,
        frames_reordered: result.reordered,
        frames_too_late: result.ancient,
        frames_foreign: result.foreign,
        load_busy_share: result.busy_share(),
        load_disturbed_share: result.disturbed_share(),
        stalls: StallRow::of(&result),
        latency_ns: Percentiles::of(&result.latency),
        without_switch_ns: Percentiles::of(&floor.latency),
    }))
}

impl std::fmt::Display for Row {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Max(row) => row.fmt(out),
            Self::Rate(row) => row.fmt(out),
            Self::Rr(row) => write!(
                out,
                "{:>5} B  {:.0} transactions/s; {}; without a switch {}",
                row.frame, row.transactions_per_second, row.round_trip_ns, row.without_switch_ns
            ),
        }
    }
}

impl std::fmt::Display for MaxRow {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lost = self.frames_sent.saturating_sub(self.frames_received);
        let lost_percent = 100.0 * lost as f64 / self.frames_sent.max(1) as f64;
        write!(
            out,
            "{:>5} B  {:8.3} Mpps {:8.2} Gbit/s  lost {lost_percent:.3} %  best 2 ms {:.3} Mpps; \
             busy: load {:.0} %",
            self.frame,
            self.frames_per_second / 1e6,
            self.bits_per_second / 1e9,
            self.best_frames_per_second / 1e6,
            100.0 * self.load_busy_share,
        )?;
        if let Some(share) = self.switch_busy_share {
            write!(out, ", switch {:.0} %", 100.0 * share)?;
        }
        write!(
            out,
            "; {:.1} ns of load per frame (best {:.1}), disturbed {:.0} %: {}",
            self.load_ns_per_frame,
            self.best_load_ns_per_frame,
            100.0 * self.load_disturbed_share,
            self.limit.name()
        )
    }
}

impl std::fmt::Display for RateRow {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            out,
            "{:>5} B  offered {} sent {} lost {} duplicated {} reordered {} foreign {}; {}; without a \
             switch {}; {}; load busy {:.0} %, disturbed {:.0} %",
            self.frame,
            self.frames_offered,
            self.frames_sent,
            self.frames_lost,
            self.frames_duplicated,
            self.frames_reordered,
            self.frames_foreign,
            self.latency_ns,
            self.without_switch_ns,
            self.stalls,
            100.0 * self.load_busy_share,
            100.0 * self.load_disturbed_share,
        )
    }
}
