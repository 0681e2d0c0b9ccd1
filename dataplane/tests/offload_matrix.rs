//! Every kind of port to every kind, whatever each side negotiated, with all that the source may
//! send: what arrives is compared byte for byte with what etherparse builds. Needs root and
//! iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::endpoint::{Endpoint, Kind, Message, Open, Setting, messages};
use common::host::quiet_namespace;
use common::{Lab, eventually};
use ringway_api::XdpMode;
use ringway_guest::Layout;

/// Two endpoints of each kind, that know each other.
fn endpoints(lab: &Lab, setting: Setting) -> Vec<Endpoint> {
    let kinds = Kind::ALL.into_iter().chain(Kind::ALL);
    let mut all: Vec<_> = (1..)
        .zip(kinds)
        .map(|(station, kind)| Endpoint::add(lab, kind, station, setting))
        .collect();
    for _ in 0..all.len() {
        let (first, others) = all.split_first_mut().unwrap();
        first.introduce(others.iter_mut());
        all.rotate_left(1);
    }
    all
}

fn settings(mtu: u16, layout: Layout) -> [Setting; 2] {
    [(true, XdpMode::Copy), (false, XdpMode::Skb)].map(|(mergeable, mode)| Setting {
        mtu,
        layout,
        mergeable,
        mode,
    })
}

/// Frames to an endpoint that were cut, and those whose checksum was completed.
fn counted(lab: &Lab, to: &Endpoint) -> (u64, u64) {
    let counters = lab.counters(&to.port);
    (counters.tx_gso_frames, counters.tx_csum_completed)
}

/// What is counted for a message to somebody who takes so much.
fn work(message: &Message, takes: Open) -> (u64, u64) {
    match message.open {
        open if open <= takes => (0, 0),
        Open::Segments => (1, 0),
        _ => (0, 1),
    }
}

fn assert_each_to_each(mtu: u16, layout: Layout) {
    for setting in settings(mtu, layout) {
        quiet_namespace();
        let lab = Lab::start();
        let mut all = endpoints(&lab, setting);
        let (sources, destinations) = all.split_at_mut(Kind::ALL.len());
        for from in sources {
            for to in &mut *destinations {
                let what = format!("{setting:?}: {} to {}", from.port, to.port);
                let before = counted(&lab, to);
                let mut expected = before;
                for message in messages(from.kind, mtu) {
                    let message = message.between(from.station, to.station);
                    from.send(&message);
                    to.expect(&message, &what);
                    let (cut, completed) = work(&message, to.kind.takes());
                    expected = (expected.0 + cut, expected.1 + completed);
                }
                eventually("all is counted", || counted(&lab, to) >= expected);
                assert_eq!(counted(&lab, to), expected, "{what}");
            }
        }
        assert_nothing_is_lost(&lab, all, 0);
    }
}

/// Asserts that nobody got anything else, and that all is accounted for, so many copies too.
fn assert_nothing_is_lost(lab: &Lab, mut all: Vec<Endpoint>, copies: usize) {
    let ports: Vec<_> = all.iter().map(|end| end.port.clone()).collect();
    let ports: Vec<_> = ports.iter().map(String::as_str).collect();
    let hellos = all.len() * (all.len() - 2);
    lab.assert_conserved(&ports, (hellos + copies) as u64);
    for end in &mut all {
        assert_eq!(lab.counters(&end.port).tx_drops.total(), 0, "{}", end.port);
        end.assert_silent();
    }
}

#[test]
fn each_kind_of_port_gets_what_each_kind_sends_at_mtu_1500() {
    assert_each_to_each(1500, Layout::Split);
}

#[test]
fn each_kind_of_port_gets_what_each_kind_sends_at_mtu_1500_with_packed_rings() {
    assert_each_to_each(1500, Layout::Packed);
}

#[test]
fn each_kind_of_port_gets_what_each_kind_sends_at_mtu_9000() {
    assert_each_to_each(9000, Layout::Split);
}

#[test]
fn each_kind_of_port_gets_what_each_kind_sends_at_mtu_9000_with_packed_rings() {
    assert_each_to_each(9000, Layout::Packed);
}

#[test]
fn what_is_sent_to_all_suits_each() {
    for setting in settings(1500, Layout::Split) {
        quiet_namespace();
        let lab = Lab::start();
        let mut all = endpoints(&lab, setting);
        let (from, others) = all.split_first_mut().unwrap();
        let sent = messages(from.kind, setting.mtu);
        let copies = sent.len() * (others.len() - 1);
        for message in sent {
            let message = message.between(from.station, 0xff);
            from.send(&message);
            for to in &mut *others {
                to.expect(&message, &format!("{setting:?}: {}", from.port));
            }
        }
        assert_nothing_is_lost(&lab, all, copies);
    }
}
