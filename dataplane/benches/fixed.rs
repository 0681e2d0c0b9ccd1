//! A fixed number of bursts, for instruction counts: `fixed BURSTS FRAME_BYTES [split|packed]`.
//! `instructions.sh` runs it.

use ringway_dataplane::isa_level;
use ringway_guest::Layout;
use ringway_testbed::{BURST, Shape, Testbed};

fn main() {
    let arguments: Vec<_> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    let number = |at: usize, default| {
        arguments
            .get(at)
            .map_or(default, |text| text.parse().expect("a number"))
    };
    let (bursts, frame_bytes) = (number(0, 1000), number(1, 64));
    let layout = match arguments.get(2).map(String::as_str) {
        Some("packed") => Layout::Packed,
        _ => Layout::Split,
    };
    println!("variant: {}", isa_level());
    println!("frames: {}", bursts * u32::from(BURST));
    counted(&mut Testbed::new(Shape::plain(layout, frame_bytes)), bursts);
}

/// What is counted, by its name.
#[inline(never)]
fn counted(bed: &mut Testbed, bursts: u32) {
    for _ in 0..bursts {
        assert_eq!(bed.burst(), u64::from(BURST));
    }
}
