//! `ringway drops`: which frames are dropped, on which way and why; those that are dropped now come
//! first.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use ringway_bridge::DropReason;
use serde::Serialize;

use super::args::DropsArgs;
use super::measure::{Filter, Measurement, must_exist};
use super::table::Table;
use super::{Stop, emit, emit_json, units};
use crate::api::{Drops, MeasureSample, NoParams, PortName, Sample};
use crate::rpc::Client;

/// Frames that one reason kept from one port, or from all.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    /// The port that they came from.
    from: PortName,
    /// The port that they were for; absent if they had no destination or broke a rule.
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<PortName>,
    /// Why.
    reason: String,
    /// How many in a second, in the interval.
    frames_per_second: f64,
    /// How many since both ports were added.
    frames: u64,
}

/// All of them, and over how long their rates were taken.
#[derive(Debug, PartialEq, Serialize)]
struct Report {
    seconds: f64,
    drops: Vec<Row>,
}

/// Takes two samples and prints what was dropped.
pub(super) fn run(client: &mut Client, args: &DropsArgs, as_json: bool) -> Result<(), Stop> {
    let first = client.call::<MeasureSample>(&NoParams {})?;
    if let Some(port) = &args.port {
        must_exist(port, &first)?;
    }
    std::thread::sleep(args.interval);
    let second = client.call::<MeasureSample>(&NoParams {})?;
    let report = report(first, second, args.port.as_ref());
    if as_json {
        return emit_json(&report);
    }
    let mut text = String::new();
    write(&mut text, &report)?;
    emit(&text)
}

type Way = (PortName, Option<PortName>);

fn report(first: Sample, second: Sample, port: Option<&PortName>) -> Report {
    let totals = ways(&second);
    let mut measurement = Measurement::new(Filter::default(), first);
    let lately = measurement.push(second);
    let mut recent = BTreeMap::<Way, Drops>::new();
    for stream in lately.streams {
        recent.insert((stream.from, Some(stream.to)), stream.flow.drops);
    }
    for source in lately.source_drops {
        recent.insert((source.from, None), source.drops);
    }
    let concerns = |way: &Way| {
        port.is_none_or(|port| way.0 == *port || way.1.as_ref().is_some_and(|to| to == port))
    };
    let seconds = lately.sum.seconds;
    let mut drops = Vec::new();
    for (way, total) in totals.into_iter().filter(|(way, _)| concerns(way)) {
        for (reason, frames) in total.0.into_iter().filter(|(_, frames)| *frames > 0) {
            let lately = recent.get(&way).and_then(|drops| drops.0.get(&reason));
            let lately = lately.copied().unwrap_or(0);
            let frames_per_second = if seconds > 0.0 {
                lately as f64 / seconds
            } else {
                0.0
            };
            let (from, to) = way.clone();
            drops.push(Row {
                from,
                to,
                reason,
                frames_per_second,
                frames,
            });
        }
    }
    // Ways come in the order of their names, which is that of equals.
    drops.sort_by(|a, b| {
        let rate = b.frames_per_second.total_cmp(&a.frames_per_second);
        rate.then(b.frames.cmp(&a.frames))
    });
    Report { seconds, drops }
}

fn ways(sample: &Sample) -> BTreeMap<Way, Drops> {
    let pairs = sample.pairs.iter().map(|pair| {
        let way = (pair.from.clone(), Some(pair.to.clone()));
        (way, pair.drops.clone())
    });
    let sources = sample
        .ports
        .iter()
        .map(|port| ((port.name.clone(), None), port.rx_drops.clone()));
    pairs.chain(sources).collect()
}

fn write(out: &mut dyn Write, report: &Report) -> fmt::Result {
    if report.drops.is_empty() {
        return writeln!(out, "no frame was dropped");
    }
    let mut table = Table::new("FROM|TO|REASON|>NOW|>SINCE THE START");
    for row in &report.drops {
        let to = row.to.as_ref().map_or("(none)", PortName::as_str);
        let now = match row.frames_per_second {
            0.0 => "-".to_owned(),
            rate => units::packet_rate(rate),
        };
        table.row([
            row.from.to_string(),
            to.to_owned(),
            row.reason.clone(),
            now,
            units::count(row.frames),
        ]);
    }
    table.write(out)?;
    writeln!(out)?;
    for reason in DropReason::ALL {
        if report.drops.iter().any(|row| row.reason == reason.as_str()) {
            writeln!(out, "{}: {}", reason.as_str(), reason.describe())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{PairCounters, PortSample};

    const SECOND: u64 = 1_000_000_000;

    fn drops(list: &[(&str, u64)]) -> Drops {
        Drops(list.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect())
    }

    /// Ports a, b and c; a was added at this time.
    fn sample(at: u64, added: u64, pairs: &[(&str, &str, Drops)], of_a: Drops) -> Sample {
        let port = |name: &str, added, rx_drops| PortSample {
            name: name.parse().unwrap(),
            added_monotonic_ns: added,
            rx_drops,
        };
        let pair = |(from, to, drops): &(&str, &str, Drops)| {
            let mut pair = PairCounters::new(from.parse().unwrap(), to.parse().unwrap());
            pair.drops = drops.clone();
            pair
        };
        Sample {
            monotonic_ns: at,
            pairs: pairs.iter().map(pair).collect(),
            ports: vec![
                port("a", added, of_a),
                port("b", 1, Drops::default()),
                port("c", 1, Drops::default()),
            ],
            workers: Vec::new(),
        }
    }

    fn rows(report: &Report) -> Vec<(&str, Option<&str>, &str, f64, u64)> {
        let rows = report.drops.iter();
        rows.map(|row| {
            let to = row.to.as_ref().map(PortName::as_str);
            let (from, reason) = (row.from.as_str(), row.reason.as_str());
            (from, to, reason, row.frames_per_second, row.frames)
        })
        .collect()
    }

    fn two() -> (Sample, Sample) {
        let before = [
            ("a", "b", drops(&[("ring_full", 100), ("too_long", 9)])),
            ("c", "b", drops(&[])),
        ];
        let after = [
            ("a", "b", drops(&[("ring_full", 100), ("too_long", 9)])),
            ("c", "b", drops(&[("ring_full", 50)])),
        ];
        (
            sample(SECOND, 1, &before, drops(&[("runt", 1)])),
            sample(3 * SECOND, 1, &after, drops(&[("runt", 5)])),
        )
    }

    #[test]
    fn what_is_dropped_now_comes_first_and_then_the_most() {
        let (before, after) = two();
        let report = report(before, after, None);
        assert_eq!(report.seconds, 2.0);
        assert_eq!(
            rows(&report),
            [
                ("c", Some("b"), "ring_full", 25.0, 50),
                ("a", None, "runt", 2.0, 5),
                ("a", Some("b"), "ring_full", 0.0, 100),
                ("a", Some("b"), "too_long", 0.0, 9),
            ]
        );
    }

    #[test]
    fn a_port_has_what_is_from_it_and_for_it() {
        let of = |port: &str| {
            let (before, after) = two();
            let report = report(before, after, Some(&port.parse().unwrap()));
            report.drops.len()
        };
        assert_eq!((of("a"), of("b"), of("c")), (3, 3, 1));
    }

    #[test]
    fn a_port_that_was_added_again_counts_from_zero() {
        let (before, mut after) = two();
        after.ports[0].added_monotonic_ns = 2 * SECOND;
        after.pairs.remove(0);
        let report = report(before, after, None);
        assert_eq!(
            rows(&report),
            [
                ("c", Some("b"), "ring_full", 25.0, 50),
                ("a", None, "runt", 2.5, 5),
            ]
        );
    }

    #[test]
    fn for_people_each_reason_has_its_sentence_once() {
        let (before, after) = two();
        let mut text = String::new();
        write(&mut text, &report(before, after, None)).unwrap();
        insta::assert_snapshot!(text);
        let mut text = String::new();
        let (_, after) = two();
        let none = sample(SECOND, 1, &[], Drops::default());
        let later = Sample {
            monotonic_ns: after.monotonic_ns,
            ..none.clone()
        };
        write(&mut text, &report(none, later, None)).unwrap();
        assert_eq!(text, "no frame was dropped\n");
    }
}
