//! Interfaces that change under their ports: each change of an interface for each kind of port. Each
//! test in network namespaces of its own; needs root and iproute2.
//!
//! Beside each case two guests exchange frames all the time, and lose none.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod bed;
#[path = "../common/mod.rs"]
mod common;
mod nics;
mod taps;

use bed::{Bed, GUEST, HOST, KINDS, Kind, runs};
use common::host::{index_of, ip, ip_batch, quiet_namespace};
use common::{Lab, af_xdp, eventually, frame, ifname, name, receive, tap};
use ringway_api::{PortConfig, PortState, XdpMode};
use ringway_guest::Guest;

#[test]
fn an_interface_that_goes_down_and_up() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let interface = kind.ifname();
        ip(&format!("link set {interface} down"));
        let remedy = format!("`ip link set {interface} up`");
        bed.tells(PortState::Down, Some(1500), Some(&remedy));
        bed.forgets_host();
        ip(&format!("link set {interface} up"));
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_that_loses_its_carrier() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let [off, on] = if kind.is_nic() {
            ["link set far0 down", "link set far0 up"]
        } else {
            ["link set rw0 carrier off", "link set rw0 carrier on"]
        };
        ip(off);
        // The kernel takes its time to tell anybody.
        let interface = kind.ifname();
        eventually("the kernel sees it", || {
            !runs(&ip(&format!("-o link show {interface}")))
        });
        bed.tells(PortState::Down, Some(1500), Some("no carrier"));
        bed.forgets_host();
        ip(on);
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_that_is_deleted_and_made_anew() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        for _ in 0..3 {
            bed.passes();
            let interface = kind.ifname();
            ip(&format!("link del {interface}"));
            let error = format!("no interface {interface}");
            bed.tells(PortState::Down, None, Some(&error));
            bed.forgets_host();
            bed.lets_go();
            kind.make();
            bed.comes_back();
        }
        let before = bed.detail().port.counters;
        bed.passes();
        let after = bed.detail().port.counters;
        assert!(before.rx_frames >= 3 && before.tx_frames >= 3, "they go on");
        assert!(after.rx_frames > before.rx_frames && after.tx_frames > before.tx_frames);
        assert!(after.rx_bytes >= after.rx_frames * 60);
        bed.end();
    }
}

/// Even one that has the same number.
#[test]
fn an_interface_that_was_replaced_before_anybody_looked() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let index = index_of(kind.ifname());
        let attempts = bed.attempts();
        match kind {
            Kind::Tap(1) => ip_batch("link del rw0\ntuntap add rw0 mode tap\n"),
            Kind::Tap(_) => ip_batch("link del rw0\ntuntap add rw0 mode tap multi_queue\n"),
            Kind::Nic(_) => {
                let add = "numrxqueues 2 numtxqueues 2";
                ip_batch(&format!(
                    "link del xdp0\n\
                     link add xdp0 index {index} {add} type veth peer name far0 {add}\n\
                     link set far0 addrgenmode none up\nlink set xdp0 addrgenmode none up\n"
                ));
            }
        }
        eventually("the other one is opened", || bed.attempts() > attempts);
        bed.comes_back();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_that_is_renamed_works_on_and_tells() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let old = kind.ifname();
        ip(&format!("link set {old} down"));
        // An escape sequence, a byte that is no text, and what a shell would run.
        let new = "\x1b[2J;reboot";
        let renamed = std::process::Command::new("ip")
            .args(["link", "set", old, "name", new])
            .status();
        assert!(renamed.unwrap().success());
        let shown = "\\x1b[2J;reboot";
        let remedy = format!("`ip link set {shown} up`");
        bed.tells(PortState::Down, Some(1500), Some(&remedy));
        ip(&format!("link set {new} up"));
        eventually("the kernel has it run", || {
            runs(&ip(&format!("-o link show {new}")))
        });
        let error = format!("{old} is called {shown} now");
        bed.tells(PortState::Up, Some(1500), Some(&error));
        bed.passes_at(if kind.is_nic() { "far0" } else { new });
        // Another one with the old name is none of its business.
        ip(&format!("link add {old} type bridge"));
        ip(&format!("link del {old}"));
        bed.tells(PortState::Up, Some(1500), Some(&error));
        ip(&format!("link set {new} down"));
        ip(&format!("link set {new} name {old}"));
        ip(&format!("link set {old} up"));
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_mtu_that_changes_is_told_and_in_effect() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        for mtu in [1400, 1600, 1500] {
            ip(&format!("link set {} mtu {mtu}", kind.ifname()));
            if kind.is_nic() {
                bed.comes_back_with(mtu);
            } else {
                bed.tells(PortState::Up, Some(mtu), None);
            }
            bed.passes();
        }
        if kind.is_nic() {
            // Its far end has 1500: longer frames are lost there, and are let through here.
            ip("link set xdp0 mtu 1400");
            bed.comes_back_with(1400);
            let sent = |bed: &Bed| bed.detail().port.counters.tx_drops;
            let before = sent(&bed).total();
            bed.guest.send_frame(&frame(HOST, GUEST, 1500, 9)).unwrap();
            eventually("it is too long", || sent(&bed).total() > before);
        }
        bed.end();
    }
}

#[test]
fn a_port_that_waits_keeps_its_slot() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let slot = bed.detail().port.id;
        ip(&format!("link del {}", kind.ifname()));
        bed.tells(PortState::Down, None, Some("no interface"));
        let mut late = bed.lab.guest("late", Guest::builder());
        let of_late = bed.lab.switch.port(&name("late")).unwrap().port.id;
        assert_ne!(of_late, slot);
        bed.lets_go();
        kind.make();
        bed.comes_back();
        assert_eq!(bed.detail().port.id, slot);
        bed.passes();
        let sent = frame(0xff, GUEST, 100, 7);
        bed.guest.send_frame(&sent).unwrap();
        while receive(&mut late).frame != sent {}
        bed.end();
    }
}

/// Events come faster than they are looked at, and some are lost.
#[test]
fn an_interface_that_flaps_a_thousand_times_is_in_the_right_state_at_the_end() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let interface = kind.ifname();
        let flap = format!("link set {interface} down\nlink set {interface} up\n");
        ip_batch(&flap.repeat(1000));
        bed.is_up();
        bed.passes();
        ip_batch(&(flap.repeat(100) + &format!("link set {interface} down\n")));
        let remedy = format!("`ip link set {interface} up`");
        bed.tells(PortState::Down, Some(1500), Some(&remedy));
        bed.end();
    }
}

/// Ports come and go at the same time as their interfaces.
#[test]
fn ports_are_added_and_removed_while_their_interface_comes_and_goes() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        for _ in 0..20 {
            ip(&format!("link del {}", kind.ifname()));
            bed.lab.switch.remove_port(&name("port")).unwrap();
            kind.make();
            let added = bed.lab.switch.add_port(name("port"), kind.config());
            added.unwrap();
        }
        bed.comes_back();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_is_that_of_one_port_whatever_its_name_is_by_now() {
    quiet_namespace();
    let lab = Lab::start();
    let nic = |interface: &str| {
        af_xdp(|nic| {
            nic.ifname = ifname(interface);
            nic.mode = XdpMode::Skb;
        })
    };
    ip("tuntap add rw0 mode tap multi_queue");
    lab.switch.add_port(name("a"), tap("rw0", 2, true)).unwrap();
    let refused = |config: PortConfig| {
        let error = lab.switch.add_port(name("b"), config).unwrap_err();
        assert!(!error.hint().is_empty() && lab.switch.ports().len() == 1);
        format!("{error}; {}", error.hint())
    };
    for config in [tap("rw0", 2, true), nic("rw0")] {
        let error = refused(config);
        assert!(error.contains("port a already"), "{error}");
        assert!(error.contains("`ringway port del a`"), "{error}");
    }
    ip("link set rw0 down");
    ip("link set rw0 name rw9");
    ip("link set rw9 up");
    for config in [tap("rw9", 2, true), nic("rw9")] {
        assert!(refused(config).contains("port a already"));
    }
    // Nothing of this has touched the first one.
    eventually("it is up", || {
        lab.switch.port(&name("a")).unwrap().port.state == PortState::Up
    });
}
