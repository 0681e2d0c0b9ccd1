//! What a frame costs from one guest's ring to the other's, both guests, worker and bridge in one
//! thread, hot cache.

mod wire;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ringway_dataplane::driver::Layout;
use wire::{BURST, Shape, Wire};

fn whole_burst(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("guest_to_guest");
    group.throughput(Throughput::Elements(u64::from(BURST)));
    for frame_bytes in [64, 256, 512, 1500] {
        let mut wire = Wire::new(Shape::plain(Layout::Split, frame_bytes));
        group.bench_function(format!("split/{frame_bytes}"), |bencher| {
            bencher.iter(|| assert_eq!(wire.burst(), u64::from(BURST)));
        });
    }
    group.finish();
}

criterion_group!(benches, whole_burst);
criterion_main!(benches);
