//! The data path's copy routine next to the language's own, in the cache as far as both sides fit.

// The source itself: it stands alone, and the library need not show it.
#[path = "../src/memory/copy.rs"]
#[allow(dead_code, reason = "the library uses the rest")]
mod copy;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// From a header to the largest frame.
const SIZES: [usize; 10] = [12, 64, 116, 256, 512, 1024, 1500, 4096, 16_384, 65_536];

fn copies(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("copy");
    for len in SIZES {
        group.throughput(Throughput::Bytes(len as u64));
        let (source, mut target) = (vec![1_u8; len], vec![0_u8; len]);
        let (from, to) = (source.as_ptr(), target.as_mut_ptr());
        group.bench_function(format!("ours/{len}"), |bencher| {
            // SAFETY: both vectors have `len` bytes and nobody else uses them meanwhile.
            bencher.iter(|| unsafe { copy::copy(black_box(to), black_box(from), black_box(len)) });
        });
        group.bench_function(format!("ptr/{len}"), |bencher| {
            let copy = || {
                // SAFETY: likewise.
                unsafe { black_box(to).copy_from_nonoverlapping(black_box(from), black_box(len)) }
            };
            bencher.iter(copy);
        });
    }
    group.finish();
}

fn brief() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group!(name = benches; config = brief(); targets = copies);
criterion_main!(benches);
