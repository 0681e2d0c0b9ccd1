//! From samples to rates: pure arithmetic.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::api::{Drops, PairCounters, PortName, Sample, WorkerSample};

/// Which pairs count.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    /// Only from this port.
    pub from: Option<PortName>,
    /// Only to this port.
    pub to: Option<PortName>,
}

impl Filter {
    fn source(&self, from: &PortName) -> bool {
        self.from.as_ref().is_none_or(|wanted| wanted == from)
    }

    fn pair(&self, from: &PortName, to: &PortName) -> bool {
        self.source(from) && self.to.as_ref().is_none_or(|wanted| wanted == to)
    }
}

/// What flowed in a span of time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Flow {
    /// Its begin, in seconds since the measurement began.
    pub start: f64,
    /// Its end, in seconds since the measurement began.
    pub end: f64,
    /// Its length, in seconds.
    pub seconds: f64,
    /// L2 bytes delivered.
    pub bytes: u64,
    /// L2 bits delivered per second.
    pub bits_per_second: f64,
    /// Frames delivered.
    pub packets: u64,
    /// Frames delivered per second.
    pub packets_per_second: f64,
    /// Frames that the destination could not take.
    pub drops: Drops,
}

/// What flowed from one port to another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Stream {
    /// The source.
    pub from: PortName,
    /// The destination.
    pub to: PortName,
    /// How much.
    #[serde(flatten)]
    pub flow: Flow,
}

/// Frames of a port that found no destination or broke a rule.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct SourceDrops {
    /// The source.
    pub from: PortName,
    /// How many, why.
    pub drops: Drops,
}

/// How a worker spent a span of time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct WorkerUse {
    /// Its number.
    pub index: u16,
    /// Its CPU.
    pub cpu: usize,
    /// In turns that moved frames.
    pub busy_percent: f64,
    /// Polling without finding a frame.
    pub polling_percent: f64,
    /// Asleep.
    pub asleep_percent: f64,
}

/// An interval, or the whole measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Interval {
    /// Pairs that moved or dropped frames.
    pub streams: Vec<Stream>,
    /// All of them.
    pub sum: Flow,
    /// Drops that belong to no pair.
    pub source_drops: Vec<SourceDrops>,
    /// The workers.
    pub workers: Vec<WorkerUse>,
}

#[derive(Clone, Debug, Default)]
struct Amount {
    bytes: u64,
    frames: u64,
    drops: Drops,
}

impl Amount {
    fn is_zero(&self) -> bool {
        self.frames == 0 && self.bytes == 0 && self.drops.total() == 0
    }

    fn add(&mut self, other: &Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.frames = self.frames.saturating_add(other.frames);
        self.drops.add(&other.drops);
    }
}

/// Busy, polling and asleep in nanoseconds.
type WorkerTimes = BTreeMap<u16, (usize, [u64; 3])>;

/// What was counted between two moments.
#[derive(Clone, Debug, Default)]
struct Tally {
    pairs: BTreeMap<(PortName, PortName), Amount>,
    sources: BTreeMap<PortName, Drops>,
    workers: WorkerTimes,
}

/// A measurement in progress.
#[derive(Debug)]
pub(crate) struct Measurement {
    filter: Filter,
    begin_ns: u64,
    last: Sample,
    total: Tally,
}

impl Measurement {
    /// Begins at `first`.
    pub(crate) fn new(filter: Filter, first: Sample) -> Self {
        Self {
            filter,
            begin_ns: first.monotonic_ns,
            last: first,
            total: Tally::default(),
        }
    }

    /// Takes the next sample, and tells what happened since the one before.
    pub(crate) fn push(&mut self, next: Sample) -> Interval {
        let tally = tally(&self.filter, &self.last, &next);
        let span = (self.seconds(&self.last), self.seconds(&next));
        self.total.add(&tally);
        self.last = next;
        interval(&tally, span)
    }

    /// What happened from the first sample to the last.
    pub(crate) fn end(&self) -> Interval {
        interval(&self.total, (0.0, self.seconds(&self.last)))
    }

    fn seconds(&self, sample: &Sample) -> f64 {
        sample.monotonic_ns.saturating_sub(self.begin_ns) as f64 / 1e9
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        for (pair, amount) in &other.pairs {
            self.pairs.entry(pair.clone()).or_default().add(amount);
        }
        for (source, drops) in &other.sources {
            self.sources.entry(source.clone()).or_default().add(drops);
        }
        for (index, (cpu, times)) in &other.workers {
            let (now, sum) = self.workers.entry(*index).or_insert((*cpu, [0; 3]));
            *now = *cpu;
            for (sum, time) in sum.iter_mut().zip(times) {
                *sum = sum.saturating_add(*time);
            }
        }
    }
}

fn tally(filter: &Filter, before: &Sample, after: &Sample) -> Tally {
    let born = |sample: &Sample| -> BTreeMap<PortName, u64> {
        let ports = sample.ports.iter();
        ports
            .map(|port| (port.name.clone(), port.added_monotonic_ns))
            .collect()
    };
    let (born_before, born_after) = (born(before), born(after));
    // A port that was added again under its old name counts from zero.
    let same = |name: &PortName| born_before.get(name) == born_after.get(name);
    let old_pairs: BTreeMap<(&PortName, &PortName), &PairCounters> = before
        .pairs
        .iter()
        .map(|pair| ((&pair.from, &pair.to), pair))
        .collect();
    let mut tally = Tally::default();
    for pair in after
        .pairs
        .iter()
        .filter(|pair| filter.pair(&pair.from, &pair.to))
    {
        let old = old_pairs
            .get(&(&pair.from, &pair.to))
            .filter(|_| same(&pair.from) && same(&pair.to));
        let amount = pair_since(pair, old.copied());
        if !amount.is_zero() {
            let key = (pair.from.clone(), pair.to.clone());
            tally.pairs.insert(key, amount);
        }
    }
    let old_ports: BTreeMap<&PortName, &Drops> = before
        .ports
        .iter()
        .map(|port| (&port.name, &port.rx_drops))
        .collect();
    for port in after.ports.iter().filter(|port| filter.source(&port.name)) {
        let old = old_ports.get(&port.name).filter(|_| same(&port.name));
        let drops = port
            .rx_drops
            .since(old.copied().unwrap_or(&Drops::default()));
        if drops.total() > 0 {
            tally.sources.insert(port.name.clone(), drops);
        }
    }
    tally.workers = worker_times(&before.workers, &after.workers);
    tally
}

/// A count that fell was reset: all of it is new.
fn since(after: u64, before: u64) -> u64 {
    after.checked_sub(before).unwrap_or(after)
}

fn pair_since(after: &PairCounters, before: Option<&PairCounters>) -> Amount {
    // One counter that fell says that all of them were reset.
    let before = before.filter(|b| b.frames <= after.frames && b.bytes <= after.bytes);
    Amount {
        bytes: after.bytes - before.map_or(0, |b| b.bytes),
        frames: after.frames - before.map_or(0, |b| b.frames),
        drops: after
            .drops
            .since(before.map_or(&Drops::default(), |b| &b.drops)),
    }
}

fn worker_times(before: &[WorkerSample], after: &[WorkerSample]) -> WorkerTimes {
    let times = |w: &WorkerSample| [w.busy_ns, w.polling_ns, w.asleep_ns];
    let mut result = WorkerTimes::new();
    for worker in after {
        let old = before.iter().find(|old| old.index == worker.index);
        let old = old.map_or([0; 3], times);
        let mut spent = times(worker);
        for (time, old) in spent.iter_mut().zip(old) {
            *time = since(*time, old);
        }
        result.insert(worker.index, (worker.cpu, spent));
    }
    result
}

fn interval(tally: &Tally, span: (f64, f64)) -> Interval {
    let mut sum = Amount::default();
    for amount in tally.pairs.values() {
        sum.add(amount);
    }
    Interval {
        streams: tally
            .pairs
            .iter()
            .map(|((from, to), amount)| Stream {
                from: from.clone(),
                to: to.clone(),
                flow: flow(amount, span),
            })
            .collect(),
        sum: flow(&sum, span),
        source_drops: tally
            .sources
            .iter()
            .map(|(from, drops)| SourceDrops {
                from: from.clone(),
                drops: drops.clone(),
            })
            .collect(),
        workers: tally
            .workers
            .iter()
            .map(|(i, (cpu, t))| worker_use(*i, *cpu, *t))
            .collect(),
    }
}

fn flow(amount: &Amount, (start, end): (f64, f64)) -> Flow {
    let seconds = (end - start).max(0.0);
    let rate = |n: f64| if seconds > 0.0 { n / seconds } else { 0.0 };
    Flow {
        start,
        end,
        seconds,
        bytes: amount.bytes,
        bits_per_second: rate(amount.bytes as f64 * 8.0),
        packets: amount.frames,
        packets_per_second: rate(amount.frames as f64),
        drops: amount.drops.clone(),
    }
}

/// Parts of the time that the worker accounted for, which need not be that between the samples: it
/// publishes its times in batches.
fn worker_use(index: u16, cpu: usize, times: [u64; 3]) -> WorkerUse {
    let total: f64 = times.iter().map(|time| *time as f64).sum();
    let [busy_percent, polling_percent, asleep_percent] = times.map(|time| {
        if total > 0.0 {
            time as f64 / total * 100.0
        } else {
            0.0
        }
    });
    WorkerUse {
        index,
        cpu,
        busy_percent,
        polling_percent,
        asleep_percent,
    }
}
