//! A fixed number of bursts, for instruction counts: `fixed BURSTS FRAME_BYTES [split|packed]`.
//! `instructions.sh` runs it.

mod wire;

use ringway_dataplane::isa_level;
use ringway_guest::Layout;
use wire::{BURST, Shape, Wire};

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
    counted(&mut Wire::new(Shape::plain(layout, frame_bytes)), bursts);
}

/// What is counted, by its name.
#[inline(never)]
fn counted(wire: &mut Wire, bursts: u32) {
    for _ in 0..bursts {
        assert_eq!(wire.burst(), u64::from(BURST));
    }
}
