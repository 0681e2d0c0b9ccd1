use super::rates::{Filter, Measurement};
use super::report;
use crate::api::{Drops, PairCounters, PortSample, Sample, WorkerSample};

const SECOND: u64 = 1_000_000_000;

fn drops(list: &[(&str, u64)]) -> Drops {
    Drops(list.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect())
}

fn port(name: &str, added: u64) -> PortSample {
    PortSample {
        name: name.parse().unwrap(),
        added_monotonic_ns: added,
        rx_drops: Drops::default(),
    }
}

fn pair(from: &str, to: &str, frames: u64, bytes: u64) -> PairCounters {
    PairCounters {
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        frames,
        bytes,
        drops: Drops::default(),
    }
}

fn sample(seconds: u64, pairs: Vec<PairCounters>) -> Sample {
    Sample {
        monotonic_ns: 100 * SECOND + seconds * SECOND,
        pairs,
        ports: vec![port("a", 1), port("b", 2), port("c", 3)],
        workers: vec![WorkerSample {
            index: 0,
            cpu: 1,
            busy_ns: seconds * SECOND / 4,
            polling_ns: seconds * SECOND / 4,
            asleep_ns: seconds * SECOND / 2,
        }],
    }
}

#[test]
fn rates_come_from_differences_over_the_daemons_own_seconds() {
    let mut measurement = Measurement::new(
        Filter::default(),
        sample(0, vec![pair("a", "b", 1000, 100_000)]),
    );
    let interval = measurement.push(sample(2, vec![pair("a", "b", 3000, 1_100_000)]));
    let flow = &interval.streams[0].flow;
    assert_eq!((flow.start, flow.end, flow.seconds), (0.0, 2.0, 2.0));
    assert_eq!((flow.packets, flow.bytes), (2000, 1_000_000));
    assert_eq!(flow.packets_per_second, 1000.0);
    assert_eq!(flow.bits_per_second, 4_000_000.0);
    assert_eq!(interval.sum, *flow);
    let worker = &interval.workers[0];
    let shares = [
        worker.busy_percent,
        worker.polling_percent,
        worker.asleep_percent,
    ];
    assert_eq!(shares, [25.0, 25.0, 50.0]);
}

#[test]
fn a_pair_that_is_new_counts_from_zero_and_one_that_is_silent_is_left_out() {
    let old = vec![pair("a", "b", 5, 500)];
    let mut measurement = Measurement::new(Filter::default(), sample(0, old.clone()));
    let mut new = old;
    new.push(pair("b", "a", 7, 700));
    let interval = measurement.push(sample(1, new));
    assert_eq!(interval.streams.len(), 1);
    assert_eq!(interval.streams[0].from.as_str(), "b");
    assert_eq!(interval.streams[0].flow.packets, 7);
}

#[test]
fn counters_that_fell_count_from_zero() {
    let mut measurement = Measurement::new(
        Filter::default(),
        sample(0, vec![pair("a", "b", 1000, 100_000)]),
    );
    let interval = measurement.push(sample(1, vec![pair("a", "b", 10, 1000)]));
    assert_eq!(interval.sum.packets, 10);
    // Frames passed the old count but bytes did not: all was reset.
    let mut measurement = Measurement::new(
        Filter::default(),
        sample(0, vec![pair("a", "b", 10, 15_000)]),
    );
    let interval = measurement.push(sample(1, vec![pair("a", "b", 20, 1200)]));
    assert_eq!((interval.sum.packets, interval.sum.bytes), (20, 1200));
}

#[test]
fn a_port_added_again_counts_from_zero_even_if_its_counters_grew() {
    let mut measurement =
        Measurement::new(Filter::default(), sample(0, vec![pair("a", "b", 10, 1000)]));
    let mut next = sample(1, vec![pair("a", "b", 30, 3000)]);
    next.ports[1] = port("b", 99);
    let interval = measurement.push(next);
    assert_eq!((interval.sum.packets, interval.sum.bytes), (30, 3000));
}

#[test]
fn the_end_sums_all_intervals_over_a_reset() {
    let mut measurement =
        Measurement::new(Filter::default(), sample(0, vec![pair("a", "b", 0, 0)]));
    measurement.push(sample(1, vec![pair("a", "b", 100, 10_000)]));
    measurement.push(sample(2, vec![]));
    measurement.push(sample(4, vec![pair("a", "b", 60, 6_000)]));
    let end = measurement.end();
    assert_eq!((end.sum.packets, end.sum.bytes), (160, 16_000));
    assert_eq!((end.sum.seconds, end.sum.packets_per_second), (4.0, 40.0));
}

#[test]
fn the_filter_keeps_one_direction() {
    let filter = Filter {
        from: Some("a".parse().unwrap()),
        to: Some("b".parse().unwrap()),
    };
    let mut measurement = Measurement::new(filter, sample(0, vec![]));
    let pairs = vec![
        pair("a", "b", 1, 60),
        pair("b", "a", 2, 120),
        pair("a", "c", 4, 240),
    ];
    let mut next = sample(1, pairs);
    next.ports[0].rx_drops = drops(&[("runt", 3)]);
    next.ports[1].rx_drops = drops(&[("runt", 5)]);
    let interval = measurement.push(next);
    assert_eq!(interval.sum.packets, 1);
    assert_eq!(interval.source_drops.len(), 1);
    assert_eq!(interval.source_drops[0].from.as_str(), "a");
}

#[test]
fn two_samples_of_one_moment_have_no_rate() {
    let mut measurement = Measurement::new(Filter::default(), sample(0, vec![]));
    let interval = measurement.push(sample(0, vec![pair("a", "b", 1, 60)]));
    assert_eq!(interval.sum.packets_per_second, 0.0);
    assert_eq!(interval.sum.seconds, 0.0);
    let none = Measurement::new(Filter::default(), Sample::default()).end();
    assert_eq!(none.sum.bits_per_second, 0.0);
}

/// Two intervals with traffic both ways and drops of both sorts, and one with none.
fn example() -> (Vec<super::Interval>, super::Interval) {
    let mut measurement = Measurement::new(Filter::default(), sample(0, vec![]));
    let mut busy = sample(
        1,
        vec![
            pair("vm1", "vm2", 812_345, 1_176_250_000),
            pair("vm2", "vm1", 40_000, 2_640_000),
        ],
    );
    busy.pairs[0].drops = drops(&[("ring_full", 12), ("too_long", 120_000)]);
    busy.ports[0].rx_drops = drops(&[("no_destination", 3)]);
    let mut intervals = vec![measurement.push(busy.clone())];
    busy.monotonic_ns += SECOND;
    intervals.push(measurement.push(busy));
    (intervals, measurement.end())
}

#[test]
fn text_report() {
    let (intervals, end) = example();
    let mut text = String::new();
    report::heading(&mut text).unwrap();
    for interval in &intervals {
        report::interval(&mut text, interval).unwrap();
    }
    report::summary(&mut text, &end).unwrap();
    assert!(text.lines().all(|line| line.trim_end() == line));
    insta::assert_snapshot!(text);
}

#[test]
fn json_report() {
    let (intervals, end) = example();
    let document = serde_json::json!({ "intervals": intervals, "end": end });
    insta::assert_snapshot!(format!("{document:#}"));
}

#[test]
fn min_is_checked_against_the_average() {
    let (_, end) = example();
    let below = |min: &str| super::below(min.parse().unwrap(), &end);
    assert!(below("4.71G").is_none());
    assert!(below("426kpps").is_none());
    let failure = below("5G").unwrap();
    assert_eq!(failure.code, 5);
    assert_eq!(
        failure.what,
        "measured 4.72 Gbit/s, below --min 5.00 Gbit/s"
    );
    assert!(below("1Mpps").is_some());
}
