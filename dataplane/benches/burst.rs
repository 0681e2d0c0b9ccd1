//! What a burst costs, all in one thread, hot cache.
//!
//! `guest_to_guest` is everything: both guests, worker and bridge. `gather` and `deliver` time the
//! worker alone, and nearly one ring alone.

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use ringway_guest::Layout;
use ringway_testbed::{BROADCAST, BURST, Shape, Testbed, station};

const LAYOUTS: [(&str, Layout); 2] = [("split", Layout::Split), ("packed", Layout::Packed)];

/// Rings to which each frame goes in `deliver`, so that what gathering costs hardly counts.
const RECEIVERS: u8 = 8;

fn whole(criterion: &mut Criterion) {
    let mut group = group(criterion, "guest_to_guest", 1);
    for (name, layout) in LAYOUTS {
        for frame_bytes in [64, 256, 512, 1500] {
            let mut bed = Testbed::new(Shape::plain(layout, frame_bytes));
            group.bench_function(format!("{name}/{frame_bytes}"), |bencher| {
                bencher.iter(|| assert_eq!(bed.burst(), u64::from(BURST)));
            });
        }
    }
}

/// Frames that the bridge drops: taken from the source's ring, checked, completed.
fn gather(criterion: &mut Criterion) {
    let mut group = group(criterion, "gather", 1);
    worker(&mut group, 2, |bed| {
        bed.guests[0].address(station(0), station(0));
    });
}

/// Frames that are flooded: per copy, and an eighth of `gather`.
fn deliver(criterion: &mut Criterion) {
    let mut group = group(criterion, "deliver", RECEIVERS);
    worker(&mut group, RECEIVERS + 1, |bed| {
        bed.guests[0].address(BROADCAST, station(0));
    });
}

fn group<'a>(criterion: &'a mut Criterion, name: &str, copies: u8) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    let elements = u64::from(BURST) * u64::from(copies);
    group.throughput(Throughput::Elements(elements));
    group
}

fn worker(group: &mut BenchmarkGroup<'_, WallTime>, guests: u8, prepare: fn(&Testbed)) {
    for (name, layout) in LAYOUTS {
        for frame_bytes in [64, 1500] {
            let plain = Shape::plain(layout, frame_bytes);
            let mut bed = Testbed::new(Shape { guests, ..plain });
            prepare(&bed);
            group.bench_function(format!("{name}/{frame_bytes}"), |bencher| {
                bencher.iter_custom(|turns| (0..turns).map(|_| turn(&mut bed)).sum());
            });
        }
    }
}

/// How long the worker takes for one burst.
fn turn(bed: &mut Testbed) -> Duration {
    bed.guests[0].tx.ring.push(BURST);
    let start = Instant::now();
    bed.switch.turn();
    let took = start.elapsed();
    bed.receive();
    assert_eq!(bed.guests[0].tx.ring.reclaim(), Ok(BURST));
    took
}

fn brief() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
}

criterion_group!(name = benches; config = brief(); targets = whole, gather, deliver);
criterion_main!(benches);
