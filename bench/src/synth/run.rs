//! `ringway-bench run`: one switch, one load.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use ringway_dataplane::driver::Layout;
use serde::Serialize;

use super::frame::{MAX_FLOWS, MAX_FRAME, MAX_PLAIN, MIN_FRAME, MIN_STAMPED};
use super::guest::Shape;
use super::load::{Load, LoadConfig, MaxResult, allowed_cpus, pin};
use super::report::{Environment, Limit};
use super::switch::{Kind, Place, Switch, free_huge_pages};

/// Unmeasured time at full rate before each measurement.
const WARM_UP: Duration = Duration::from_millis(200);
/// IMIX: 7 small, 4 medium, 1 large.
const IMIX: [u32; 12] = [64, 64, 64, 64, 64, 64, 64, 576, 576, 576, 576, 1500];

/// What the load is like, for `run` and `compare`.
#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArgs {
    /// Frame sizes in L2 bytes without the FCS, each measured by itself; `imix` is a mix of 64,
    /// 576 and 1500; above 9018 bytes as TCP segments for offload
    #[arg(
        long = "frame",
        value_name = "BYTES",
        value_delimiter = ',',
        default_value = "64,512,1500"
    )]
    frames: Vec<FrameSize>,
    /// Layout of the guests' rings
    #[arg(long, value_enum, default_value = "split")]
    layout: LayoutArg,
    /// Without VIRTIO_NET_F_MRG_RXBUF
    #[arg(long)]
    no_mergeable: bool,
    /// Without VIRTIO_F_IN_ORDER, which is used where it is offered
    #[arg(long)]
    no_in_order: bool,
    /// With VIRTIO_RING_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,
    /// Give the virtio-net header a descriptor of its own
    #[arg(long)]
    chained: bool,
    /// Entries of each ring, a power of two
    #[arg(long, value_name = "N", default_value_t = 1024)]
    queue_size: u16,
    /// Queue pairs of each guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,
    /// UDP flows of each guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    flows: u16,
    /// CPU of the load [default: the last but one that is allowed]
    #[arg(long, value_name = "CPU")]
    load_cpu: Option<usize>,
    /// CPU of the switch's forwarding thread [default: the last that is allowed]
    #[arg(long, value_name = "CPU")]
    switch_cpu: Option<usize>,
    /// Compare the bytes of what arrives
    #[arg(long)]
    verify: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LayoutArg {
    Split,
    Packed,
}

/// One size or the mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameSize {
    Fixed(u32),
    Imix,
}

impl std::str::FromStr for FrameSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "imix" {
            return Ok(Self::Imix);
        }
        match text.parse() {
            Ok(size) if (MIN_FRAME..=MAX_FRAME).contains(&size) => Ok(Self::Fixed(size)),
            _ => Err(format!(
                "a frame has {MIN_FRAME} to {MAX_FRAME} bytes, or is `imix`"
            )),
        }
    }
}

impl std::fmt::Display for FrameSize {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(size) => out.pad(&size.to_string()),
            Self::Imix => out.pad("imix"),
        }
    }
}

impl FrameSize {
    /// Sizes of successive frames.
    pub(crate) fn sizes(self) -> Vec<u32> {
        match self {
            Self::Fixed(size) => vec![size],
            Self::Imix => IMIX.to_vec(),
        }
    }
}

impl LoadArgs {
    /// The sizes to measure.
    pub(crate) fn frames(&self) -> &[FrameSize] {
        &self.frames
    }

    /// Queue pairs of each guest.
    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    /// As in reports.
    pub(crate) fn layout_name(&self) -> &'static str {
        match self.layout {
            LayoutArg::Split => "split",
            LayoutArg::Packed => "packed",
        }
    }

    /// True if frames for segmentation are among them.
    pub(crate) fn segmentation(&self) -> bool {
        let segmented = |size: &FrameSize| size.sizes().iter().any(|size| *size > MAX_PLAIN);
        self.frames.iter().any(segmented)
    }

    /// CPUs of switch and load.
    pub(crate) fn cpus(&self) -> Result<(usize, usize)> {
        let allowed = allowed_cpus().context("can't tell which CPUs are allowed")?;
        let pick = |wanted: Option<usize>, taken: Option<usize>| {
            let free = |cpu: &usize| Some(*cpu) != taken;
            wanted.or_else(|| allowed.iter().copied().rev().find(free))
        };
        let (Some(switch), Some(load)) = (
            pick(self.switch_cpu, self.load_cpu),
            pick(self.load_cpu, self.switch_cpu.or(allowed.last().copied())),
        ) else {
            bail!("one CPU only: switch and load need one each");
        };
        ensure!(switch != load, "switch and load can't share CPU {switch}");
        for cpu in [switch, load] {
            ensure!(
                allowed.contains(&cpu),
                "CPU {cpu} is not allowed to this process"
            );
        }
        Ok((switch, load))
    }

    /// The load for one size on these sockets.
    pub(crate) fn config(&self, size: FrameSize, sockets: &[PathBuf]) -> Result<LoadConfig> {
        ensure!(
            self.queue_size.is_power_of_two() && (4..=32_768).contains(&self.queue_size),
            "a queue has 4 to 32768 entries, a power of two"
        );
        ensure!(self.flows <= MAX_FLOWS, "at most {MAX_FLOWS} flows");
        ensure!(self.queues > 0, "at least one queue pair");
        Ok(LoadConfig {
            sockets: sockets.to_vec(),
            shape: Shape {
                layout: match self.layout {
                    LayoutArg::Split => Layout::Split,
                    LayoutArg::Packed => Layout::Packed,
                },
                mergeable: !self.no_mergeable,
                in_order: !self.no_in_order,
                event_idx: self.event_idx,
                chained: self.chained,
                queue_size: self.queue_size,
                queues: self.queues,
                huge: free_huge_pages().is_ok_and(|free| free > 256),
            },
            sizes: size.sizes(),
            flows: self.flows.max(1),
            verify: self.verify,
        })
    }
}

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
    switch: Kind,
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
    Max {
        frame: String,
        frames_per_second: f64,
        bits_per_second: f64,
        frames_sent: u64,
        frames_received: u64,
        load_busy_share: f64,
        load_ns_per_frame: f64,
        /// Over the best 2 ms.
        best_frames_per_second: f64,
        best_load_ns_per_frame: f64,
        frames_per_turn: f64,
        /// Share of time that the load was kept off its CPU by others.
        load_disturbed_share: f64,
        in_order: bool,
        limit: Limit,
    },
    Rate {
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
        latency_ns: Percentiles,
    },
    Rr {
        frame: String,
        transactions_per_second: f64,
        round_trip_ns: Percentiles,
    },
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Percentiles {
    min: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

impl Percentiles {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |percent| histogram.value_at_percentile(percent);
        Self {
            min: histogram.min(),
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            p999: at(99.9),
            max: histogram.max(),
        }
    }
}

impl std::fmt::Display for Percentiles {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |ns: u64| ns as f64 / 1e3;
        write!(
            out,
            "min {:.1} p50 {:.1} p90 {:.1} p99 {:.1} p99.9 {:.1} max {:.1} us",
            us(self.min),
            us(self.p50),
            us(self.p90),
            us(self.p99),
            us(self.p999),
            us(self.max)
        )
    }
}

/// Runs the load and prints what it measured.
///
/// # Errors
/// No switch, one that dies or lacks what the load needs: nothing is printed of a broken run.
pub(crate) fn run(args: &RunArgs) -> Result<ExitCode> {
    let (switch_cpu, load_cpu) = args.load.cpus()?;
    ensure!(args.duration > 0.0, "a run takes time");
    let stamped = args.mode != Mode::Max;
    let small = |size: &FrameSize| size.sizes().iter().any(|size| *size < MIN_STAMPED);
    ensure!(
        !stamped || !args.load.frames.iter().any(small),
        "a frame with a sequence number has {MIN_STAMPED} bytes or more"
    );
    let mut switch = None;
    let sockets = match (&args.socket_a, &args.socket_b) {
        (Some(a), Some(b)) => vec![a.clone(), b.clone()],
        _ => {
            let place = Place {
                cpu: switch_cpu,
                other_cpu: load_cpu,
                ports: args.pairs.max(1) * 2,
                queues: args.load.queues,
                segmentation: args.load.segmentation(),
            };
            ensure!(
                !args.switch.rewrites_macs(),
                "this load needs MAC addresses left alone"
            );
            switch
                .insert(Switch::start(args.switch, place)?)
                .sockets()
                .to_vec()
        }
    };
    let mut rows = Vec::new();
    for size in args.load.frames() {
        let config = args.load.config(*size, &sockets)?;
        let outcome = on_cpu(load_cpu, || measure(args, *size, &config))?;
        if let Some(switch) = &mut switch {
            switch.check_alive()?;
        }
        let row = outcome.with_context(|| format!("frames of {size} bytes"))?;
        if !args.json {
            print_row(&row);
        }
        rows.push(row);
    }
    if args.json {
        let report = serde_json::json!({
            "environment": Environment::of_this_machine(),
            "layout": args.load.layout_name(),
            "queue_size": args.load.queue_size,
            "queues": args.load.queues,
            "results": rows,
        });
        println!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}

/// One full-rate trial.
pub(crate) fn max_trial(config: &LoadConfig, duration: Duration) -> Result<MaxResult> {
    Ok(Load::connect(config)?.run_max(WARM_UP, duration)?)
}

/// Runs something on a thread of its own that is pinned to a CPU.
pub(crate) fn on_cpu<T: Send>(cpu: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
    let pinned = || -> Result<T> {
        pin(cpu).with_context(|| format!("can't run on CPU {cpu}"))?;
        Ok(work())
    };
    thread::scope(|scope| scope.spawn(pinned).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn measure(args: &RunArgs, size: FrameSize, config: &LoadConfig) -> Result<Row> {
    let duration = Duration::try_from_secs_f64(args.duration)?;
    let mut load = Load::connect(config)?;
    let frame = size.to_string();
    Ok(match args.mode {
        Mode::Max => {
            let in_order = load.guests.iter().all(|guest| guest.in_order);
            let result = load.run_max(WARM_UP, duration)?;
            let full_turns = (result.turns - result.empty_turns).max(1);
            Row::Max {
                frame,
                frames_per_second: result.pps(),
                bits_per_second: result.bits_per_second(),
                frames_sent: result.sent,
                frames_received: result.received,
                load_busy_share: result.busy_share(),
                load_ns_per_frame: result.load_ns_per_frame(),
                best_frames_per_second: result.best_pps,
                best_load_ns_per_frame: result.best_ns_per_frame,
                load_disturbed_share: result.disturbed_share(),
                frames_per_turn: result.received as f64 / full_turns as f64,
                in_order,
                limit: Limit::of(result.busy_share()),
            }
        }
        Mode::Rate => {
            let rate = args.rate.unwrap_or(0.0);
            ensure!(rate > 0.0, "--rate is more than 0");
            let result = load.run_rate(rate, duration, config.verify)?;
            Row::Rate {
                frame,
                frames_offered: result.offered,
                frames_sent: result.sent,
                frames_received: result.received,
                frames_lost: result.lost(),
                frames_duplicated: result.duplicated,
                frames_reordered: result.reordered,
                frames_too_late: result.ancient,
                frames_foreign: result.foreign,
                latency_ns: Percentiles::of(&result.latency),
            }
        }
        Mode::Rr => {
            let result = load.run_echo(duration)?;
            Row::Rr {
                frame,
                transactions_per_second: result.transactions as f64 / result.elapsed.as_secs_f64(),
                round_trip_ns: Percentiles::of(&result.round_trip),
            }
        }
    })
}

fn print_row(row: &Row) {
    match row {
        Row::Max {
            frame,
            frames_per_second,
            bits_per_second,
            frames_sent,
            frames_received,
            load_busy_share,
            load_ns_per_frame,
            best_frames_per_second,
            best_load_ns_per_frame,
            load_disturbed_share,
            limit,
            ..
        } => println!(
            "{frame:>5} B  {:8.3} Mpps {:8.2} Gbit/s  lost {:.3} %  best 2 ms {:.3} Mpps; load busy \
             {:.0} %, {load_ns_per_frame:.1} ns per frame (best {best_load_ns_per_frame:.1}), \
             disturbed {:.0} %: {}",
            frames_per_second / 1e6,
            bits_per_second / 1e9,
            100.0 * frames_sent.saturating_sub(*frames_received) as f64
                / (*frames_sent).max(1) as f64,
            best_frames_per_second / 1e6,
            100.0 * load_busy_share,
            100.0 * load_disturbed_share,
            limit.name()
        ),
        Row::Rate {
            frame,
            frames_offered,
            frames_sent,
            frames_lost,
            frames_duplicated,
            frames_reordered,
            frames_foreign,
            latency_ns,
            ..
        } => println!(
            "{frame:>5} B  offered {frames_offered} sent {frames_sent} lost {frames_lost} \
             duplicated {frames_duplicated} reordered {frames_reordered} foreign {frames_foreign}; \
             {latency_ns}"
        ),
        Row::Rr {
            frame,
            transactions_per_second,
            round_trip_ns,
        } => println!("{frame:>5} B  {transactions_per_second:.0} transactions/s; {round_trip_ns}"),
    }
}
