//! What tests and benches of several crates stand on: a [`Testbed`] of guests on an inline switch,
//! all in one thread; [`packet`]s built and judged by etherparse; and network namespaces of the
//! [`host`]. No program depends on it.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "what can't be set up fails the test"
)]

mod bed;
pub mod host;
pub mod packet;

use std::time::{Duration, Instant};

pub use bed::{BROADCAST, BURST, RING_SIZE, Shape, Station, Testbed, station};

/// How long anything may take that should happen at once.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < DEADLINE,
            "{what} did not happen within {DEADLINE:?}"
        );
        std::thread::yield_now();
    }
}
