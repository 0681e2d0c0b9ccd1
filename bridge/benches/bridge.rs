//! What the bridge decides, without rings and memory: the forwarding database, and bursts on it.
#![expect(
    clippy::unwrap_used,
    reason = "what can't be set up has nothing to measure"
)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringway_bridge::{
    Arrivals, Bridge, BridgeConfig, Decisions, FrameHead, FrameSet, MacAddr, Members, PortId, Run,
    Tick,
};

const FRAMES: u32 = 32;
const NOW: Tick = Tick(1);

fn fdb(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fdb");
    for count in [100, 100_000] {
        let (known, unknown) = (stations(count, 0x5254), stations(count, 0x5256));
        let bridge = bridge(&known, port(0));
        let fdb = bridge.fdb();
        let mut case = |name, macs: &[MacAddr], action: &dyn Fn(MacAddr)| {
            let mut next = macs.iter().copied().cycle();
            group.bench_function(format!("{name}/{count}"), |bencher| {
                bencher.iter(|| next.next().map(action));
            });
        };
        case("hit", &known, &|mac| {
            black_box(fdb.lookup(mac, NOW));
        });
        case("miss", &unknown, &|mac| {
            black_box(fdb.lookup(mac, NOW));
        });
        case("learn_known", &known, &|mac| {
            black_box(fdb.learn(mac, port(0), NOW));
        });
        case("move_there_and_back", &known, &|mac| {
            black_box(fdb.learn(mac, port(1), NOW));
            black_box(fdb.learn(mac, port(0), NOW));
        });
        case("learn_new_and_remove", &unknown, &|mac| {
            black_box(fdb.learn(mac, port(0), NOW));
            fdb.remove(mac);
        });
    }
    group.finish();
}

fn forward(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("forward");
    group.throughput(Throughput::Elements(FRAMES.into()));
    let (source, known) = (stations(FRAMES, 0x5254), stations(FRAMES, 0x5256));
    let bridge = bridge(&known, port(1));
    let mut members = Members::new();
    for index in 0..8 {
        members.add(port(index));
    }
    let all = u64::from(u32::MAX);
    let run = |frames, to, from| Run {
        head: head(to, from),
        frames: FrameSet::from_bits(frames),
    };
    let flows = (0..).zip(known.iter().zip(&source));
    let cases = [
        ("unicast_one_flow", vec![run(all, known[0], source[0])]),
        (
            "unicast_32_flows",
            flows
                .map(|(i, (to, from))| run(1 << i, *to, *from))
                .collect(),
        ),
        ("flood", vec![run(all, MacAddr::BROADCAST, source[0])]),
    ];
    for (name, runs) in &cases {
        let burst = Arrivals {
            in_port: port(0),
            runs,
        };
        let mut decisions = Decisions::new();
        group.bench_function(*name, |bencher| {
            bencher.iter(|| bridge.forward(&members, NOW, black_box(&burst), &mut decisions));
        });
    }
    group.finish();
}

fn port(index: u16) -> PortId {
    PortId::new(index).unwrap()
}

/// Stations of one vendor, in an order that no prefetcher guesses.
fn stations(count: u32, vendor: u64) -> Vec<MacAddr> {
    // A prime that divides no count used here: each comes once.
    let scattered = |index| u64::from(index * 7919 % count);
    (0..count)
        .map(|index| MacAddr::from_u64(vendor << 32 | scattered(index)))
        .collect()
}

/// A bridge with room for twice as many stations as it knows, all behind one port.
fn bridge(known: &[MacAddr], behind: PortId) -> Bridge {
    let bridge = Bridge::new(BridgeConfig {
        fdb_capacity: 2 * known.len(),
        ageing_ticks: u32::MAX,
        move_hold_ticks: 0,
        seed: 0x5eed,
        group_fwd_mask: BridgeConfig::BPDUS,
    });
    for mac in known {
        bridge.fdb().learn(*mac, behind, NOW);
    }
    bridge
}

fn head(to: MacAddr, from: MacAddr) -> FrameHead {
    let mut frame = [0; 64];
    frame[..6].copy_from_slice(&to.0);
    frame[6..12].copy_from_slice(&from.0);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    FrameHead::parse(&frame).unwrap()
}

fn brief() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group!(name = benches; config = brief(); targets = fdb, forward);
criterion_main!(benches);
