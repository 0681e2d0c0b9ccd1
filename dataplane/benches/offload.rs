//! What header actions cost: checksums, and a TCP frame of 64 KiB towards guests that take it
//! whole, in segments with open checksums, and in whole segments.
#![allow(
    clippy::unwrap_used,
    reason = "what can't be set up has nothing to measure"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ringway_dataplane::{InlineSwitch, copy_and_checksum, internet_checksum};
use ringway_guest::Guest;
use ringway_guest::features::{TSO, VIRTIO_NET_F_GUEST_CSUM};
use ringway_testbed::packet::{self, Packet, pattern};
use tempfile::TempDir;

fn checksum(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for bytes in [64, 1448, 65_536] {
        let data = pattern(bytes);
        let (mut source, mut target) = (data.clone(), vec![0; bytes]);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_with_input(BenchmarkId::new("ours", bytes), &data, |b, data| {
            b.iter(|| internet_checksum(black_box(data)));
        });
        group.bench_function(BenchmarkId::new("ours_copying", bytes), |b| {
            b.iter(|| copy_and_checksum(black_box(&mut target), black_box(&mut source)));
        });
        let mut target = vec![0; bytes];
        group.bench_with_input(BenchmarkId::new("copy_only", bytes), &data, |b, data| {
            b.iter(|| black_box(&mut target).copy_from_slice(black_box(data)));
        });
        group.bench_with_input(BenchmarkId::new("etherparse", bytes), &data, |b, data| {
            b.iter(|| etherparse::checksum::u64_16bit_word::add_slice(0, black_box(data)));
        });
        group.bench_with_input(BenchmarkId::new("plain", bytes), &data, |b, data| {
            b.iter(|| packet::plain_sum(black_box(data)));
        });
    }
    group.finish();
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame_of_64_kib");
    let packet = Packet::new(true, false, pattern(45 * 1448));
    let message = [packet.header(1448), packet.open()].concat();
    group.throughput(Throughput::Bytes(packet.payload.len() as u64));
    for (name, features, arriving) in [
        ("whole", TSO, 1),
        ("open_segments", VIRTIO_NET_F_GUEST_CSUM, 45),
        ("whole_segments", 0, 45),
    ] {
        let folder = TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(16).unwrap();
        let mut guest = |port: &str, features, buffer_size| {
            let path = folder.path().join(port);
            switch.add_port(port.parse().unwrap(), &path).unwrap();
            let config = Guest::builder().features(features).buffer_size(buffer_size);
            config.connect(&path).unwrap()
        };
        let mut from = guest("from", TSO, 70_000);
        let mut to = guest("to", features, 2048);
        group.bench_function(name, |b| {
            b.iter(|| {
                from.send(&message).unwrap();
                let mut arrived = 0;
                while arrived < arriving {
                    switch.turn();
                    while let Some(received) = to.try_recv(0).unwrap() {
                        black_box(received);
                        arrived += 1;
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, checksum, frames);
criterion_main!(benches);
