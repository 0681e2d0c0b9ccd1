//! What a guest that teaches addresses without end does to others.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::time::Duration;

use common::innocents::{self, Innocents};
use common::{mac, name};
use ringway_bridge::MacAddr;
use ringway_guest::Layout;
use ringway_testbed::{Shape, Station};

const ATTACKER: u8 = 66;

/// A new source in each frame, and those of the innocents among them.
#[test]
fn addresses_without_end_and_those_of_others_do_others_no_harm() {
    // So long that no innocent is silent for it, whatever else the machine does.
    let lab = innocents::lab_with(|config| config.fdb_move_hold = Duration::from_secs(60));
    let mut innocents = Innocents::new(&lab);
    let path = lab.add_port("attacker");
    let mut attacker = Station::connect(&path, Shape::plain(Layout::Split, 64));
    let mut number = 0_u32;
    // To itself: what is learned is all that it is about.
    attacker.address(mac(ATTACKER), mac(ATTACKER));
    let own = MacAddr(mac(ATTACKER));
    lab.switch.fdb_add(own, &name("attacker"), None).unwrap();
    let slots = attacker.tx.ring.slots();
    innocents.endure(0.5, "addresses without end", || {
        attacker.tx.ring.reclaim().unwrap();
        for _ in 0..64 {
            number += 1;
            let slot = u16::try_from(number % u32::from(slots)).unwrap();
            let [a, b, c, d] = number.to_be_bytes();
            let stolen = mac(1 + u8::try_from(number / 8 % 3).unwrap());
            let new = [2, a, b, c, d, 1];
            let source = if number.is_multiple_of(8) {
                stolen
            } else {
                new
            };
            attacker.tx.buffers.write(slot, 12 + 6, &source);
        }
        attacker.tx.offer(u16::MAX).unwrap();
    });
    let counters = lab.counters("attacker");
    assert_eq!(counters.fdb_moves, 0);
    assert!(counters.fdb_moves_refused > 0 && counters.fdb_refused_full > 0);
    assert!(innocents::INNOCENTS.into_iter().all(|station| {
        let port = lab
            .switch
            .fdb()
            .into_iter()
            .find(|e| e.mac.0 == mac(station));
        port.unwrap().port.as_str() == format!("station{station}")
    }));
}
