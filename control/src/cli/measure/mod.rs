//! `ringway measure`: samples at regular times, turned into intervals.

mod rates;
mod report;
#[cfg(test)]
mod tests;

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use self::rates::Interval;
pub(super) use self::rates::{Filter, Measurement};
use super::args::MeasureArgs;
use super::interrupt::Interrupt;
use super::units::Rate;
use super::{EXIT_BELOW_MIN, EXIT_REFUSED, Failure, Stop, emit, emit_json};
use crate::api::{DaemonInfo, DaemonReport, MeasureSample, NoParams, PortName, Sample};
use crate::rpc::Client;

/// Measures, and prints as it goes.
pub(super) fn run(client: &mut Client, args: &MeasureArgs, as_json: bool) -> Result<(), Stop> {
    let interrupt = Interrupt::new()?;
    let daemon = client.call::<DaemonInfo>(&NoParams {})?;
    let first = client.call::<MeasureSample>(&NoParams {})?;
    let filter = Filter {
        from: args.from.clone(),
        to: args.to.clone(),
    };
    for name in [&filter.from, &filter.to].into_iter().flatten() {
        must_exist(name, &first)?;
    }
    let started = SystemTime::now();
    let mut measurement = Measurement::new(filter, first);
    let mut intervals = Vec::new();
    if !as_json {
        let mut text = String::new();
        report::heading(&mut text)?;
        emit(&text)?;
    }
    let outcome = sample_all(client, args, &interrupt, |sample| {
        let interval = measurement.push(sample);
        if as_json {
            intervals.push(interval);
            return Ok(());
        }
        let mut text = String::new();
        report::interval(&mut text, &interval)?;
        emit(&text)
    });
    let failure = match outcome {
        Ok(()) => None,
        Err(Stop::Failed(failure)) => Some(failure),
        Err(stop) => return Err(stop),
    };
    let end = measurement.end();
    let failure = failure.or_else(|| args.min.and_then(|min| below(min, &end)));
    if !as_json {
        let mut text = String::new();
        report::summary(&mut text, &end)?;
        emit(&text)?;
        return failure.map_or(Ok(()), |failure| Err(Stop::Failed(failure)));
    }
    let mut document = document(args, &daemon, started, &intervals, &end);
    match failure {
        None => emit_json(&document),
        Some(failure) => {
            document["error"] = failure.to_json();
            emit_json(&document)?;
            Err(Stop::Told(failure.code))
        }
    }
}

/// A port that is not there now is more likely a typing error than a port to come.
pub(super) fn must_exist(name: &PortName, sample: &Sample) -> Result<(), Stop> {
    if sample.ports.iter().any(|port| port.name == *name) {
        return Ok(());
    }
    Err(Stop::Failed(Failure::new(
        EXIT_REFUSED,
        "no_such_port",
        format!("there is no port {name}"),
        "`ringway port list` shows the ports",
    )))
}

/// Calls `take` with a sample at the end of each interval, until the time is over or a signal
/// comes.
fn sample_all(
    client: &mut Client,
    args: &MeasureArgs,
    interrupt: &Interrupt,
    mut take: impl FnMut(Sample) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let begin = Instant::now();
    let end = (!args.time.is_zero()).then(|| begin + args.time);
    let mut next = begin;
    loop {
        next += args.interval;
        let due = end.map_or(next, |end| next.min(end));
        let interrupted = interrupt.wait_until(due)?;
        take(client.call::<MeasureSample>(&NoParams {})?)?;
        if interrupted || end == Some(due) {
            return Ok(());
        }
    }
}

fn below(min: Rate, end: &Interval) -> Option<Failure> {
    let (is_below, measured) = match min {
        Rate::BitsPerSecond(least) => {
            let rate = end.sum.bits_per_second;
            (rate < least, Rate::BitsPerSecond(rate))
        }
        Rate::PacketsPerSecond(least) => {
            let rate = end.sum.packets_per_second;
            (rate < least, Rate::PacketsPerSecond(rate))
        }
    };
    is_below.then(|| {
        Failure::new(
            EXIT_BELOW_MIN,
            "below_min",
            format!("measured {measured}, below --min {min}"),
            "drops and busy workers above tell what limits it",
        )
    })
}

fn document(
    args: &MeasureArgs,
    daemon: &DaemonReport,
    started: SystemTime,
    intervals: &[Interval],
    end: &Interval,
) -> Value {
    let unix_seconds = started
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64());
    json!({
        "start": {
            "version": format!("ringway {}", env!("CARGO_PKG_VERSION")),
            "daemon_version": daemon.version,
            "daemon_pid": daemon.pid,
            "unix_seconds": unix_seconds,
            "from": args.from,
            "to": args.to,
            "duration_seconds": args.time.as_secs_f64(),
            "interval_seconds": args.interval.as_secs_f64(),
        },
        "intervals": intervals,
        "end": end,
    })
}
