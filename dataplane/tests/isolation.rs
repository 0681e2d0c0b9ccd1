//! The measure by which attacks are judged, itself.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::time::{Duration, Instant};

use common::innocents::{self, Innocents};

#[test]
fn whom_nobody_attacks_keeps_its_rate() {
    let lab = innocents::lab();
    Innocents::new(&lab).endure(0.9, "nobody", || {});
}

#[test]
fn time_that_the_switch_has_no_work_is_missed() {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let alone = innocents.alone();
    let beside = innocents.pace(|| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(500) {}
    });
    let part = beside.part_of(&alone);
    assert!(
        part < 0.5,
        "{part:.3} of the rate with frames in half of the time"
    );
    innocents.assert_recovers(&alone, "idling");
}
