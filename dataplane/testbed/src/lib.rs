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

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// Tells a thread to stop, also when the test fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How long an attack without a step to take leaves its core to others.
const REST: Duration = Duration::from_micros(100);

/// Runs `attack` on a thread of its own, at most once for each step of `run`. While no steps are
/// taken the thread costs next to nothing: of two cores, those who are measured want both.
pub fn beside(mut attack: impl FnMut() + Send, run: impl FnOnce(&mut dyn FnMut())) {
    let (stop, steps) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                if std::mem::replace(&mut seen, steps.load(Ordering::Relaxed)) == seen {
                    std::thread::park_timeout(REST);
                } else {
                    attack();
                }
            }
        });
        run(&mut || {
            steps.fetch_add(1, Ordering::Relaxed);
        });
    });
}
