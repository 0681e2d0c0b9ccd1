//! What the switch counts, in the text format of Prometheus: for `ringway metrics`, and over HTTP.
//!
//! Names follow Prometheus' conventions (prometheus.io/docs/practices/naming): one prefix, base units,
//! `_total` for what only grows. `promtool check metrics` judges them in a test.

mod http;

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};
use ringway_api::{DaemonReport, Drops, PairCounters, PortInfo, PortName, PortState, QueueInfo};
use ringway_api::{PortCounters, WorkerInfo};

pub use http::{CONTENT_TYPE, DEFAULT_LISTEN, Exporter};

/// All that is told, of one moment.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) daemon: DaemonReport,
    pub(crate) ports: Vec<PortInfo>,
    pub(crate) queues: Vec<(PortName, Vec<QueueInfo>)>,
    pub(crate) pairs: Vec<PairCounters>,
    pub(crate) workers: Vec<WorkerInfo>,
}

/// Label and value, in the order in which they are written.
type Labels<'a> = &'a [(&'static str, &'a str)];

/// A count of each port, by its name and help.
type PortCount = (&'static str, &'static str, fn(&PortCounters) -> u64);

const PORT_COUNTS: [PortCount; 13] = [
    (
        "receive_frames",
        "Frames taken from the port: what its guest transmitted.",
        |c| c.rx_frames,
    ),
    (
        "receive_bytes",
        "L2 bytes taken from the port, without FCS and virtio-net headers.",
        |c| c.rx_bytes,
    ),
    (
        "transmit_frames",
        "Frames delivered to the port, each flooded copy and each segment counted.",
        |c| c.tx_frames,
    ),
    (
        "transmit_bytes",
        "L2 bytes delivered to the port, without FCS and virtio-net headers.",
        |c| c.tx_bytes,
    ),
    (
        "gro_merged_frames",
        "Received TCP segments that were joined to the frame before.",
        |c| c.rx_gro_merged,
    ),
    (
        "checksums_completed",
        "Frames delivered whole whose checksum the switch completed.",
        |c| c.tx_csum_completed,
    ),
    (
        "segmented_frames",
        "Frames that the switch cut into segments for the port.",
        |c| c.tx_gso_frames,
    ),
    ("segments", "Segments that these frames became.", |c| {
        c.tx_gso_segments
    }),
    (
        "fdb_moves",
        "Learned addresses that moved to the port from another.",
        |c| c.fdb_moves,
    ),
    (
        "fdb_moves_refused",
        "Frames with a source address that was in use behind another port a moment ago.",
        |c| c.fdb_moves_refused,
    ),
    (
        "fdb_evictions",
        "Addresses learned behind the port that made room for ports with fewer.",
        |c| c.fdb_evictions,
    ),
    (
        "fdb_limit_hits",
        "Frames whose source was not learned since the port has as many addresses as it may.",
        |c| c.fdb_limit_hits,
    ),
    (
        "fdb_refused_full",
        "Frames whose source was not learned since the database is full.",
        |c| c.fdb_refused_full,
    ),
];

impl Snapshot {
    /// The text.
    pub(crate) fn text(&self) -> String {
        let mut families = Families::default();
        self.daemon(&mut families);
        self.ports(&mut families);
        self.queues(&mut families);
        self.pairs(&mut families);
        self.workers(&mut families);
        families.text()
    }

    fn daemon(&self, out: &mut Families) {
        let info = "The version of ringwayd; always 1.";
        let version = &*self.daemon.version;
        out.gauge("ringway_build_info", info)
            .add(&[("version", version)], 1.0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let started = now.unwrap_or_default().as_secs_f64() - self.daemon.uptime_seconds;
        out.gauge(
            "process_start_time_seconds",
            "When the daemon started, since the Unix epoch.",
        )
        .add(&[], started);
    }

    fn ports(&self, out: &mut Families) {
        let mut infos = out.gauge("ringway_port_info", "What kind of port it is; always 1.");
        for port in &self.ports {
            let kind = port.config.kind().as_str();
            infos.add(&[("port", port.name.as_str()), ("kind", kind)], 1.0);
        }
        let help = "Whether frames pass: 1 for the state that the port is in, 0 for the others.";
        let mut states = out.gauge("ringway_port_state", help);
        for port in &self.ports {
            for state in [PortState::Up, PortState::Impaired, PortState::Down] {
                let labels = [("port", port.name.as_str()), ("state", state.as_str())];
                states.add(&labels, f64::from(u8::from(port.state == state)));
            }
        }
        let help = "MAC addresses learned or configured behind the port.";
        let mut entries = out.gauge("ringway_port_fdb_entries", help);
        for port in &self.ports {
            entries.add(&[("port", port.name.as_str())], port.fdb_entries.into());
        }
        for (name, help, count) in PORT_COUNTS {
            let mut counts = out.counter(format_args!("ringway_port_{name}_total"), help);
            for port in &self.ports {
                counts.add(&[("port", port.name.as_str())], of(count(&port.counters)));
            }
        }
        let help = "Frames from the port (receive) or for it (transmit) that were dropped.";
        let mut drops = out.counter("ringway_port_dropped_frames_total", help);
        for port in &self.ports {
            let counters = &port.counters;
            let ways = [
                ("receive", &counters.rx_drops),
                ("transmit", &counters.tx_drops),
            ];
            for (direction, of_way) in ways {
                let labels = [("port", port.name.as_str()), ("direction", direction)];
                drops.add_drops(&labels, of_way);
            }
        }
    }

    fn queues(&self, out: &mut Families) {
        type Count = (&'static str, &'static str, fn(&QueueInfo) -> u64);
        const COUNTS: [Count; 4] = [
            ("receive_frames", "Frames taken from the queue pair.", |q| {
                q.rx_frames
            }),
            (
                "transmit_frames",
                "Frames delivered to the queue pair.",
                |q| q.tx_frames,
            ),
            ("calls", "Calls (interrupts) sent to the guest.", |q| {
                q.calls
            }),
            (
                "contended",
                "Bursts put off because another worker held the ring.",
                |q| q.contended,
            ),
        ];
        // A guest may use 8 pairs and mostly has one.
        let is_used =
            |q: &&QueueInfo| q.rx_started || q.tx_started || q.rx_frames + q.tx_frames > 0;
        let each = || {
            let ports = self.queues.iter();
            ports.flat_map(|(port, queues)| {
                let used = queues.iter().filter(is_used);
                used.map(move |queue| (port, queue))
            })
        };
        for (name, help, count) in COUNTS {
            let mut counts = out.counter(format_args!("ringway_queue_{name}_total"), help);
            for (port, queue) in each() {
                let index = queue.index.to_string();
                let labels = [("port", port.as_str()), ("queue", &index)];
                counts.add(&labels, of(count(queue)));
            }
        }
        let help = "Number of the worker that polls the queue pair.";
        let mut workers = out.gauge("ringway_queue_worker", help);
        for (port, queue) in each() {
            let index = queue.index.to_string();
            let labels = [("port", port.as_str()), ("queue", &index)];
            workers.add(&labels, queue.worker.into());
        }
    }

    fn pairs(&self, out: &mut Families) {
        fn ways(pair: &PairCounters) -> [(&'static str, &str); 2] {
            [("from", pair.from.as_str()), ("to", pair.to.as_str())]
        }
        let help = "Frames delivered from one port to another, each flooded copy counted.";
        let mut frames = out.counter("ringway_pair_frames_total", help);
        for pair in &self.pairs {
            frames.add(&ways(pair), of(pair.frames));
        }
        let help = "L2 bytes delivered from one port to another.";
        let mut bytes = out.counter("ringway_pair_bytes_total", help);
        for pair in &self.pairs {
            bytes.add(&ways(pair), of(pair.bytes));
        }
        let help = "Frames from one port to another that were dropped.";
        let mut drops = out.counter("ringway_pair_dropped_frames_total", help);
        for pair in &self.pairs {
            drops.add_drops(&ways(pair), &pair.drops);
        }
    }

    fn workers(&self, out: &mut Families) {
        type Count = (&'static str, &'static str, fn(&WorkerInfo) -> f64);
        const COUNTS: [Count; 8] = [
            ("busy_seconds", "Time in turns that moved frames.", |w| {
                seconds(w.busy_ns)
            }),
            (
                "polling_seconds",
                "Time polling without finding a frame.",
                |w| seconds(w.polling_ns),
            ),
            ("asleep_seconds", "Time asleep.", |w| seconds(w.asleep_ns)),
            ("turns", "Turns of the loop.", |w| of(w.turns)),
            ("bursts", "Bursts that held frames.", |w| of(w.bursts)),
            ("frames", "Frames taken from source queues.", |w| {
                of(w.frames)
            }),
            ("sleeps", "Times it slept.", |w| of(w.sleeps)),
            (
                "contended",
                "Bursts that found a ring in other hands.",
                |w| of(w.contended),
            ),
        ];
        for (name, help, count) in COUNTS {
            let mut counts = out.counter(format_args!("ringway_worker_{name}_total"), help);
            for worker in &self.workers {
                counts.add(&[("worker", &worker.index.to_string())], count(worker));
            }
        }
        let help = "The CPU that the worker is pinned to.";
        let mut cpus = out.gauge("ringway_worker_cpu", help);
        for worker in &self.workers {
            let cpu = u32::try_from(worker.cpu).unwrap_or(u32::MAX);
            cpus.add(&[("worker", &worker.index.to_string())], cpu.into());
        }
        let help = "Queue pairs that the worker polls: all, and those with frames lately.";
        let mut queues = out.gauge("ringway_worker_queues", help);
        for worker in &self.workers {
            let index = worker.index.to_string();
            let all = [("worker", &*index), ("which", "all")];
            queues.add(&all, worker.queues.into());
            let active = [("worker", &*index), ("which", "active")];
            queues.add(&active, worker.active_queues.into());
        }
    }
}

/// A count as Prometheus has numbers: exact to 2^53.
fn of(count: u64) -> f64 {
    count as f64
}

fn seconds(ns: u64) -> f64 {
    of(ns) / 1e9
}

/// What is told, by name.
#[derive(Default)]
struct Families(Vec<MetricFamily>);

/// The one that is being filled.
struct Family<'a>(&'a mut MetricFamily);

impl Families {
    fn counter(&mut self, name: impl fmt::Display, help: &str) -> Family<'_> {
        self.family(&name, help, MetricType::COUNTER)
    }

    fn gauge(&mut self, name: &str, help: &str) -> Family<'_> {
        self.family(&name, help, MetricType::GAUGE)
    }

    fn family(&mut self, name: &dyn fmt::Display, help: &str, kind: MetricType) -> Family<'_> {
        let mut family = MetricFamily::default();
        family.set_name(name.to_string());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        Family(self.0.push_mut(family))
    }

    fn text(mut self) -> String {
        // The encoder refuses families without a metric.
        self.0.retain(|family| !family.get_metric().is_empty());
        let mut text = Vec::new();
        let written = TextEncoder::new().encode(&self.0, &mut text);
        debug_assert!(written.is_ok(), "{written:?}");
        String::from_utf8(text).unwrap_or_default()
    }
}

impl Family<'_> {
    fn add(&mut self, labels: Labels<'_>, value: f64) {
        let pair = |(name, value): &(&str, &str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        let mut metric = Metric::from_label(labels.iter().map(pair).collect());
        if self.0.get_field_type() == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.0.mut_metric().push(metric);
    }

    fn add_drops(&mut self, labels: Labels<'_>, drops: &Drops) {
        for (reason, frames) in drops.nonzero() {
            let mut all = labels.to_vec();
            all.push(("reason", reason.as_str()));
            self.add(&all, of(frames));
        }
    }
}
