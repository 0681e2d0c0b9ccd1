//! Frames for everybody, and addresses without end: what one port has copied or learned is not at
//! the others' cost.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::hostile::{BAD, PEER, RawConfig, RawGuest, plain};
use common::innocents::{self, INNOCENTS, Innocents};
use common::{DEADLINE, Lab, eventually, frame, mac, name, receive};
use ringway_guest::Guest;

/// Ports of a switch under floods.
const PORTS: usize = 64;
/// The longest broadcast of a standard MTU.
const LONGEST: usize = 1514;

fn raw(lab: &Lab, port: &str) -> RawGuest {
    RawGuest::connect(&lab.add_port(port), RawConfig::default())
}

/// Guests that have room for every frame, again and again, so that there are [`PORTS`] in all.
fn audience(lab: &Lab) -> Vec<RawGuest> {
    let count = PORTS - lab.switch.ports().len() - 1;
    let guest = |i| {
        let guest = raw(lab, &format!("idle{i}"));
        guest.rx.write_chain(0, &[(guest.buffers, 2048)]);
        guest.rx.name_heads(&[0]);
        guest
    };
    (0..count).map(guest).collect()
}

/// A transmit ring whose frames are these in turn.
fn transmit(guest: &RawGuest, frames: &[Vec<u8>]) {
    let mut heads = Vec::new();
    for (head, frame) in (0..guest.tx.area.size()).zip(frames) {
        let message = plain(frame);
        let addr = guest.put(u64::from(head) * 2048, &message);
        let len = u32::try_from(message.len()).unwrap();
        guest.tx.write_chain(head, &[(addr, len)]);
        heads.push(head);
    }
    guest.tx.name_heads(&heads);
}

fn flood(to: u8, bytes: usize) {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let audience = audience(&lab);
    let bad = raw(&lab, "bad");
    transmit(&bad, &[frame(to, BAD, bytes, 1)]);
    let what = format!("frames of {bytes} B to {to:#x} of {PORTS} ports");
    innocents.endure(0.9, &what, || {
        bad.tx.recycle();
        audience.iter().for_each(|guest| guest.rx.recycle());
    });
}

#[test]
fn broadcasts_without_end_leave_others_their_rate() {
    flood(0xff, 60);
}

#[test]
fn long_broadcasts_without_end_leave_others_their_rate() {
    flood(0xff, LONGEST);
}

#[test]
fn frames_for_nobody_without_end_leave_others_their_rate() {
    flood(77, 60);
}

/// A guest that sends with the addresses of others, all the time.
#[test]
fn stolen_addresses_leave_others_their_rate() {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let bad = raw(&lab, "bad");
    let stolen = INNOCENTS.map(|station| frame(PEER, station, 60, 1));
    transmit(&bad, &stolen);
    innocents.endure(0.5, "sources of others", || bad.tx.recycle());
}

/// One frame with another's source, while the other is silent.
#[test]
fn a_stolen_address_brings_no_frame_to_the_thief() {
    let lab = Lab::start();
    let [mut a, mut b, mut thief] =
        ["a", "b", "thief"].map(|port| lab.guest(port, Guest::builder()));
    let [of_a, of_b] = [1, 2];
    for (guest, own) in [(&mut a, of_a), (&mut b, of_b)] {
        guest.send_frame(&frame(0xff, own, 60, 0)).unwrap();
        receive(&mut thief);
    }
    receive(&mut b);
    receive(&mut a);
    thief.send_frame(&frame(of_a, of_b, 60, 1)).unwrap();
    assert!(thief.flush(DEADLINE).unwrap());
    let secret = frame(of_b, of_a, 60, 2);
    a.send_frame(&secret).unwrap();
    assert_eq!(receive(&mut b).frame, secret);
    assert_eq!(thief.try_recv(0).unwrap(), None);
}

/// More addresses than the database holds, before and while others come.
#[test]
fn addresses_without_end_leave_the_database_to_others() {
    const ADDRESSES: u16 = 40_000;
    let lab = innocents::lab();
    let bad = raw(&lab, "bad");
    let frames: Vec<_> = (0..bad.tx.area.size())
        .map(|_| frame(PEER, BAD, 60, 1))
        .collect();
    transmit(&bad, &frames);
    for number in 0..ADDRESSES {
        let head = number % bad.tx.area.size();
        let [high, low] = number.to_be_bytes();
        bad.put(u64::from(head) * 2048 + 12 + 6, &[2, 0, 0, 1, high, low]);
        bad.tx.area.set_avail_idx(number.wrapping_add(1));
        let room = || bad.tx.area.used_idx().wrapping_add(bad.tx.area.size()) != number + 1;
        eventually("there is room", room);
    }
    let mut innocents = Innocents::new(&lab);
    innocents.endure(0.9, "a database that was filled", || {});
    let known = lab.switch.fdb();
    for station in INNOCENTS {
        let is_known = known.iter().any(|entry| {
            entry.mac.0 == mac(station) && entry.port == name(&format!("station{station}"))
        });
        assert!(is_known, "station {station} is not known");
    }
}

/// A guest goes, and its address is behind another port, which is silent.
#[test]
fn a_station_that_moved_silently_is_found_by_the_next_frame() {
    let lab = Lab::start();
    let [mut a, mut old, mut new] =
        ["a", "old", "new"].map(|port| lab.guest(port, Guest::builder()));
    let [of_a, moved] = [1, 2];
    old.send_frame(&frame(0xff, moved, 60, 0)).unwrap();
    receive(&mut a);
    receive(&mut new);
    let known = frame(moved, of_a, 60, 1);
    a.send_frame(&known).unwrap();
    assert_eq!(receive(&mut old).frame, known);
    drop(old);
    eventually("the port is down", || {
        let port = lab.switch.port(&name("old")).unwrap();
        port.port.state == ringway_api::PortState::Down
    });
    let next = frame(moved, of_a, 60, 2);
    a.send_frame(&next).unwrap();
    assert_eq!(receive(&mut new).frame, next);
}
