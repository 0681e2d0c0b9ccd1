//! Queues that crowd one worker, under real load.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::time::{Duration, Instant};

use common::{DEADLINE, Lab, name};
use ringway_api::BalanceConfig;
use ringway_guest::Layout;
use ringway_testbed::{Shape, Station, station};

#[test]
fn queues_that_fill_one_worker_are_spread_over_two() {
    let lab = Lab::with_config(|config| {
        let cores = core_affinity::get_core_ids().unwrap();
        assert!(cores.len() >= 2, "this test needs two CPUs");
        config.worker_cpus = cores[..2].iter().map(|core| core.id).collect();
        config.balance = BalanceConfig {
            is_on: true,
            interval: Duration::from_millis(100),
        };
    });
    // Stations 1 and 3 send, to 2 and 4; first queues go to the workers in turn.
    let mut guests: Vec<_> = [[1, 2], [2, 1], [3, 4], [4, 3]]
        .into_iter()
        .map(|macs: [u8; 2]| {
            let port = format!("p{}", macs[0]);
            let path = lab.add_port(&port);
            lab.pin(&port, macs[0]);
            let guest = Station::connect(&path, Shape::plain(Layout::Split, 1500));
            let [own, peer] = macs.map(|number| station(number - 1));
            guest.address(peer, own);
            guest
        })
        .collect();
    let placement =
        || ["p1", "p3"].map(|port| lab.switch.port(&name(port)).unwrap().queues[0].worker);
    assert_eq!(placement(), [0, 0]);
    let start = Instant::now();
    let mut arrived = [0; 2];
    while placement() == [0, 0] {
        assert!(
            start.elapsed() < DEADLINE,
            "nothing moved, {arrived:?} frames"
        );
        for _ in 0..1000 {
            for (pair, arrived) in guests.chunks_exact_mut(2).zip(&mut arrived) {
                pair[0].send_ready();
                *arrived += pair[1].receive();
                pair[0].tx.ring.reclaim().unwrap();
            }
        }
    }
    let moved = placement();
    assert!(moved == [0, 1] || moved == [1, 0], "{moved:?}");
    // What is sent goes on arriving.
    let before = arrived;
    while arrived
        .iter()
        .zip(before)
        .any(|(now, before)| *now <= before + 1000)
    {
        assert!(
            start.elapsed() < 2 * DEADLINE,
            "{arrived:?} after {before:?}"
        );
        for (pair, arrived) in guests.chunks_exact_mut(2).zip(&mut arrived) {
            pair[0].send_ready();
            *arrived += pair[1].receive();
            pair[0].tx.ring.reclaim().unwrap();
        }
    }
}
