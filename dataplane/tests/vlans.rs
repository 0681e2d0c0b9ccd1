//! VLANs: who gets a frame, with which tag, and what remains of its offloads. Taps and NICs need root
//! and iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use common::host::{ip, quiet_namespace, veth};
use common::packet::{Packet, judge, pattern};
use common::{DEADLINE, Lab, af_xdp, frame, ifname, mac, name, receive, tap};
use ringway_api::{VlanConfig, VlanTag};
use ringway_bridge::{DropReason, MacAddr};
use ringway_guest::features::TSO;
use ringway_guest::{Guest, GuestBuilder, Layout};
use serde_json::{Value, from_value, json};

/// Tags of VLAN 10: a customer's and a service's.
const C10: [u8; 4] = [0x81, 0, 0, 10];
const S10: [u8; 4] = [0x88, 0xa8, 0, 10];

fn vlan(fields: Value) -> VlanConfig {
    from_value(fields).unwrap()
}

/// A guest on a port of these VLANs.
fn guest_in(lab: &Lab, port: &str, fields: Value, guest: GuestBuilder) -> Guest {
    let path = lab.add_port_with(port, |config| config.vlan = vlan(fields));
    guest.connect(&path).unwrap()
}

fn tagged(tags: &[[u8; 4]], frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}

/// Sends a frame, and returns once it was forwarded.
fn send(from: &mut Guest, frame: &[u8]) {
    from.send_frame(frame).unwrap();
    assert!(from.flush(DEADLINE).unwrap());
}

/// What a guest was given so far.
fn taken(guest: &mut Guest) -> Vec<Vec<u8>> {
    let next = std::iter::from_fn(|| guest.try_recv(0).unwrap());
    next.map(|received| received.frame).collect()
}

/// Ports of all modes, those of VLAN 10 first.
fn ports() -> [(&'static str, Value); 8] {
    [
        ("access", json!({ "tag": 10 })),
        ("trunk", json!({ "trunks": "10,20" })),
        (
            "native",
            json!({ "mode": "native-untagged", "tag": 10, "trunks": "10,20" }),
        ),
        ("tagged", json!({ "mode": "native-tagged", "tag": 10 })),
        ("tunnel", json!({ "mode": "dot1q-tunnel", "tag": 10 })),
        ("uplink", json!({ "trunks": "10", "ethertype": "802.1ad" })),
        ("other", json!({ "tag": 20 })),
        ("all", json!({})),
    ]
}

#[test]
fn a_flood_reaches_the_ports_of_its_vlan_each_with_its_own_tag() {
    for layout in [Layout::Split, Layout::Packed] {
        let lab = Lab::start();
        let guest = |(port, fields): &(&str, Value)| {
            guest_in(&lab, port, fields.clone(), Guest::builder().layout(layout))
        };
        let mut access = guest(&("a", json!({ "tag": 10 })));
        let mut guests: Vec<_> = ports().iter().map(guest).collect();
        for (seed, bytes) in (0..).zip([14, 17, 20, 60, 64, 1500, 1514]) {
            let bare = frame(0xff, 1, bytes, seed);
            // Its own priority stays where there is a tag.
            for (tags, [c, s]) in [
                (&[][..], [C10, S10]),
                (
                    &[[0x81, 0, 0x60, 0]],
                    [[0x81, 0, 0x60, 10], [0x88, 0xa8, 0x60, 10]],
                ),
            ] {
                send(&mut access, &tagged(tags, &bare));
                for ((port, _), guest) in ports().iter().zip(&mut guests) {
                    let expected = match *port {
                        "access" | "native" | "tunnel" => vec![bare.clone()],
                        "uplink" => vec![tagged(&[s], &bare)],
                        "other" => vec![],
                        _ => vec![tagged(&[c], &bare)],
                    };
                    assert!(taken(guest) == expected, "{bytes} bytes, {tags:?}: {port}");
                }
            }
        }
    }
}

#[test]
fn a_frame_of_a_vlan_that_its_port_is_not_in_is_dropped_and_teaches_nothing() {
    let lab = Lab::start();
    let mut access = guest_in(&lab, "access", json!({ "tag": 10 }), Guest::builder());
    let mut trunk = guest_in(&lab, "trunk", json!({ "trunks": "10" }), Guest::builder());
    let mut all = guest_in(&lab, "all", json!({}), Guest::builder());
    let bare = frame(0xff, 1, 60, 1);
    let of = |vid: u16| {
        let [high, low] = vid.to_be_bytes();
        tagged(&[[0x81, 0, high, low]], &bare)
    };
    // Its own VLAN's tag is none that an access port takes.
    for frame in [of(10), of(20), of(4095)] {
        send(&mut access, &frame);
    }
    for frame in [bare.clone(), of(0), of(20), of(4095)] {
        send(&mut trunk, &frame);
    }
    send(&mut all, &of(4095));
    for (port, expected) in [("access", 3), ("trunk", 4), ("all", 1)] {
        let denied =
            |counters: ringway_api::PortCounters| counters.rx_drops[DropReason::VlanDenied];
        lab.eventually_dropped(port, denied, expected);
    }
    // A tag that is cut off.
    send(&mut trunk, &of(10)[..17]);
    lab.eventually_dropped("trunk", |counters| counters.rx_drops[DropReason::Runt], 1);
    for guest in [&mut access, &mut trunk, &mut all] {
        assert!(taken(guest).is_empty());
    }
    assert!(lab.switch.fdb().is_empty());
}

#[test]
fn an_address_may_be_in_two_vlans_at_once() {
    let lab = Lab::start();
    let mut trunk = guest_in(
        &lab,
        "trunk",
        json!({ "trunks": "10,20" }),
        Guest::builder(),
    );
    let mut hosts = [10, 20].map(|tag| {
        let port = format!("host{tag}");
        guest_in(&lab, &port, json!({ "tag": tag }), Guest::builder())
    });
    // Both have the same address, as a router's interfaces may.
    for host in &mut hosts {
        send(host, &frame(0xff, 7, 60, 1));
    }
    taken(&mut trunk);
    for (at, vid) in [(0, 10), (1, 20), (0, 10)] {
        let to_it = tagged(&[[0x81, 0, 0, vid]], &frame(7, 1, 64, 5));
        send(&mut trunk, &to_it);
        assert!(taken(&mut hosts[at]) == [frame(7, 1, 64, 5)]);
        assert!(taken(&mut hosts[1 - at]).is_empty());
    }
    let entries = lab.switch.fdb();
    let entries: Vec<_> = entries.iter().map(|of| (of.mac.0, of.vlan)).collect();
    assert_eq!(
        entries,
        [(mac(1), 10), (mac(1), 20), (mac(7), 10), (mac(7), 20)]
    );
}

#[test]
fn learned_entries_are_flushed_by_vlan_address_and_port_and_static_ones_stay() {
    let lab = Lab::start();
    let trunk = json!({ "trunks": "10,20" });
    let mut a = guest_in(&lab, "a", trunk.clone(), Guest::builder());
    let mut b = guest_in(&lab, "b", trunk, Guest::builder());
    let tag = |vlan: u16| VlanTag::new(vlan).unwrap();
    let mac_of = |station| MacAddr(mac(station));
    let entries = || {
        let entries = lab.switch.fdb();
        let told = entries
            .iter()
            .map(|of| (of.mac.0[5], of.vlan, of.is_static));
        told.collect::<Vec<_>>()
    };
    let mut teach = || {
        for vid in [10, 20] {
            for (guest, station) in [(&mut a, 1), (&mut b, 2)] {
                let frame = frame(0xff, station, 60, 0);
                send(guest, &tagged(&[[0x81, 0, 0, vid]], &frame));
            }
        }
    };
    lab.switch
        .fdb_add(mac_of(3), &name("a"), Some(tag(10)))
        .unwrap();
    let flush = |port: Option<&str>, vlan, station: Option<u8>| {
        let port = port.map(name);
        let mac = station.map(mac_of);
        lab.switch.fdb_flush(port.as_ref(), vlan, mac).unwrap()
    };
    let pinned = (3, 10, true);
    teach();
    assert_eq!(flush(None, Some(tag(10)), None), 2);
    assert_eq!(entries(), [(1, 20, false), (2, 20, false), pinned]);
    teach();
    assert_eq!(flush(None, None, Some(2)), 2);
    assert_eq!(entries(), [(1, 10, false), (1, 20, false), pinned]);
    teach();
    assert_eq!(flush(Some("a"), Some(tag(20)), Some(1)), 1);
    assert_eq!(flush(Some("b"), Some(tag(20)), Some(1)), 0);
    assert_eq!(flush(None, None, None), 3);
    assert_eq!(entries(), [pinned]);
}

/// IEEE 802.1Q-2022, 15: a provider carries its customers' frames as they are.
#[test]
fn customers_frames_cross_a_service_vlan_unchanged() {
    let lab = Lab::start();
    let tunnel = |port: &str| {
        let fields = json!({ "mode": "dot1q-tunnel", "tag": 10 });
        guest_in(&lab, port, fields, Guest::builder())
    };
    let (mut a, mut b) = (tunnel("a"), tunnel("b"));
    let fields = json!({ "trunks": "10,11", "ethertype": "802.1ad" });
    let mut uplink = guest_in(&lab, "uplink", fields, Guest::builder());
    for tags in [
        &[][..],
        &[C10],
        &[[0x81, 0, 0xe0, 0]],
        &[S10, C10],
        &[[0x81, 0, 0xff, 0xff]],
    ] {
        let frame = tagged(tags, &frame(0xff, 1, 100, 3));
        send(&mut a, &frame);
        assert!(taken(&mut b) == [frame.clone()], "{tags:?}");
        let carried = [&frame[..12], &S10, &frame[12..]].concat();
        assert!(taken(&mut uplink) == [carried.clone()], "{tags:?}");
        send(&mut uplink, &carried);
        assert!(
            taken(&mut a) == [frame.clone()] && taken(&mut b) == [frame],
            "{tags:?}"
        );
    }
}

#[test]
fn tcp_to_be_segmented_keeps_its_offloads_with_another_tag() {
    for is_ipv4 in [true, false] {
        let lab = Lab::start();
        let with_offloads = || Guest::builder().features(TSO);
        let mut access = guest_in(&lab, "access", json!({ "tag": 7 }), with_offloads());
        let trunk = json!({ "trunks": "7" });
        let mut whole = guest_in(&lab, "whole", trunk.clone(), with_offloads());
        let mut cut = guest_in(&lab, "cut", trunk, Guest::builder());
        let bare = Packet {
            stations: [mac(1), [0xff; 6]],
            ..Packet::new(is_ipv4, false, pattern(20_000))
        };
        let in_vlan = Packet {
            tags: 1,
            ..bare.clone()
        };
        let message = |packet: &Packet| [packet.header(1400), packet.open()].concat();

        access.send(&message(&bare)).unwrap();
        let received = receive(&mut whole);
        assert!(received.frame == in_vlan.open(), "IPv4: {is_ipv4}");
        assert_eq!(received.header[..10], in_vlan.header(1400)[..10]);
        assert_segments(&mut cut, &in_vlan);

        whole.send(&message(&in_vlan)).unwrap();
        let received = receive(&mut access);
        assert!(received.frame == bare.open(), "IPv4: {is_ipv4}");
        assert_eq!(received.header[..10], bare.header(1400)[..10]);
        assert_segments(&mut cut, &in_vlan);
        lab.assert_conserved(&["access", "whole", "cut"], 2);
    }
}

/// Segments of 1,400 bytes with the packet's tag and right checksums, that are the packet together.
fn assert_segments(guest: &mut Guest, packet: &Packet) {
    let mut together = Vec::new();
    while together.len() < packet.payload.len() {
        let segment = receive(guest).frame;
        let place = packet.place();
        assert_eq!(segment[12..place.l3], packet.open()[12..place.l3]);
        assert!(segment.len() <= place.headers + 1400);
        together.extend(judge(&segment).unwrap().payload);
    }
    assert!(together == packet.payload);
}

#[test]
fn frames_that_wait_for_a_full_destination_have_its_tag() {
    let lab = Lab::start();
    let mut a = guest_in(&lab, "a", json!({ "tag": 10 }), Guest::builder());
    let small = Guest::builder().queue_size(64);
    let mut slow = guest_in(&lab, "slow", json!({ "trunks": "10" }), small);
    let mut other = guest_in(&lab, "other", json!({ "tag": 10 }), Guest::builder());
    send(&mut slow, &tagged(&[C10], &frame(0xff, 2, 60, 0)));
    send(&mut other, &frame(0xff, 3, 60, 0));
    for guest in [&mut a, &mut other] {
        taken(guest);
    }
    taken(&mut slow);
    for seed in 0..300 {
        // With two destinations a source waits for neither.
        send(&mut a, &frame(3, 1, 60, seed));
        send(&mut a, &frame(2, 1, 60, seed));
        assert!(taken(&mut other) == [frame(3, 1, 60, seed)]);
    }
    for seed in 0..300 {
        let expected = tagged(&[C10], &frame(2, 1, 60, seed));
        assert!(receive(&mut slow).frame == expected, "frame {seed}");
    }
}

/// The MTU has room for two tags.
#[test]
fn a_frame_whose_tag_makes_it_too_long_is_dropped_there() {
    let lab = Lab::start();
    let mut a = guest_in(&lab, "a", json!({ "tag": 10 }), Guest::builder());
    let path = lab.add_port_with("trunk", |config| {
        config.vlan = vlan(json!({ "trunks": "10" }));
        config.mtu = ringway_api::Mtu::new(1500);
    });
    let mut trunk = Guest::builder().connect(&path).unwrap();
    let mut other = guest_in(&lab, "other", json!({ "tag": 10 }), Guest::builder());
    for (bytes, passes) in [(1518, true), (1519, false)] {
        let long = frame(0xff, 1, bytes, 1);
        send(&mut a, &long);
        assert!(taken(&mut other) == [long.clone()]);
        let expected = if passes {
            vec![tagged(&[C10], &long)]
        } else {
            vec![]
        };
        assert!(taken(&mut trunk) == expected, "{bytes} bytes");
    }
    let too_long = |counters: ringway_api::PortCounters| counters.tx_drops[DropReason::TooLong];
    lab.eventually_dropped("trunk", too_long, 1);
}

#[test]
fn a_port_changes_its_vlans_and_what_was_learned_behind_it_is_forgotten() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let mut c = lab.guest("c", Guest::builder());
    assert!(lab.switch.vlans().is_empty());
    let anything = tagged(&[[0x81, 0, 0xff, 0xff]], &frame(0xff, 2, 60, 1));
    send(&mut b, &anything);
    assert!(taken(&mut a) == [anything.clone()] && taken(&mut c) == [anything]);
    let set = |port: &str, fields| lab.switch.set_vlan(&name(port), vlan(fields)).unwrap();

    set("b", json!({ "tag": 10 }));
    assert!(lab.switch.fdb().is_empty());
    send(&mut a, &frame(2, 1, 60, 2));
    assert!(taken(&mut c) == [frame(2, 1, 60, 2)] && taken(&mut b).is_empty());
    set("a", json!({ "tag": 10 }));
    send(&mut a, &frame(2, 1, 60, 3));
    assert!(taken(&mut b) == [frame(2, 1, 60, 3)]);
    assert!(taken(&mut c) == [tagged(&[C10], &frame(2, 1, 60, 3))]);
    let told: Vec<_> = lab.switch.vlans();
    let names =
        |names: &[ringway_api::PortName]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let told: Vec<_> = told
        .iter()
        .map(|of| (of.vlans.as_str(), names(&of.tagged), names(&of.untagged)))
        .collect();
    let own = |names: &[&str]| {
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        told,
        [
            ("0", own(&[]), own(&["c"])),
            ("1-9,11-4094", own(&["c"]), own(&[])),
            ("10", own(&["c"]), own(&["a", "b"])),
        ]
    );
    // A port that goes takes its VLANs along, and with the last that says any all are one LAN again.
    lab.switch.remove_port(&name("a")).unwrap();
    set("b", json!({}));
    assert!(lab.switch.vlans().is_empty());
    let anything = tagged(&[[0x81, 0, 0xff, 0xff]], &frame(0xff, 2, 60, 4));
    send(&mut b, &anything);
    assert!(taken(&mut c) == [anything]);
}

/// A front-end announces where its guest is: in the VLAN of its port.
#[test]
fn an_announced_station_is_announced_in_its_vlan() {
    let lab = Lab::start();
    let mut a = guest_in(&lab, "a", json!({ "tag": 10 }), Guest::builder());
    let mut trunk = guest_in(&lab, "trunk", json!({ "trunks": "10" }), Guest::builder());
    let mut other = guest_in(&lab, "other", json!({ "tag": 20 }), Guest::builder());
    a.frontend().send_rarp(mac(1)).unwrap();
    let rarp = receive(&mut trunk).frame;
    assert_eq!(rarp[6..18], [&mac(1)[..], &C10, &[0x80, 0x35]].concat());
    send(&mut trunk, &tagged(&[C10], &frame(1, 2, 60, 1)));
    assert!(taken(&mut a) == [frame(1, 2, 60, 1)]);
    assert!(taken(&mut other).is_empty());
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hash = DefaultHasher::new();
    hash.write(bytes);
    hash.finish()
}

/// What needs root, which `--profile user` leaves out.
mod as_root {
    use super::*;

    /// A switch with an untagged tap `rw0` of this thread's namespace, and a tagged uplink.
    fn add_ports(lab: &Lab, uplink: &str, address: &str) {
        let mut tap = tap("rw0", 1, true);
        *tap.vlan_mut() = vlan(json!({ "tag": 10 }));
        lab.switch.add_port(name("tap"), tap).unwrap();
        ip(&format!("addr add {address}/24 dev rw0"));
        let nic = af_xdp(|nic| {
            nic.ifname = ifname(uplink);
            nic.vlan = vlan(json!({ "trunks": "10" }));
        });
        lab.switch.add_port(name("nic"), nic).unwrap();
    }

    /// Two switches with a cable between them, on which all is tagged: what the kernel of one side
    /// leaves to be segmented is cut with tags, and what comes is joined and loses them.
    #[test]
    fn tcp_crosses_a_tagged_cable_between_two_switches_whole() {
        quiet_namespace();
        veth(1, 1500);
        let here = Lab::start();
        let data = pattern(8 << 20);
        let (tell, told) = mpsc::channel();
        let (plug, is_plugged) = mpsc::channel();
        add_ports(&here, "xdp0", "10.0.0.1");
        std::thread::scope(|scope| {
            let receiver = scope.spawn(move || {
                quiet_namespace();
                tell.send(rustix::thread::gettid().as_raw_nonzero())
                    .unwrap();
                is_plugged.recv_timeout(DEADLINE).unwrap();
                ip("link set far0 up");
                // It watches the interfaces of the namespace that it starts in.
                let there = Lab::start();
                add_ports(&there, "far0", "10.0.0.2");
                let listener = TcpListener::bind("10.0.0.2:5000").unwrap();
                tell.send(rustix::thread::gettid().as_raw_nonzero())
                    .unwrap();
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(DEADLINE)).unwrap();
                let mut received = Vec::new();
                stream.read_to_end(&mut received).unwrap();
                stream.write_all(&hash(&received).to_le_bytes()).unwrap();
                there.assert_conserved(&["tap", "nic"], 0);
                assert!(there.counters("nic").rx_gro_merged > 0, "none was joined");
            });
            let thread = told.recv_timeout(DEADLINE).unwrap();
            ip(&format!("link set far0 netns {thread}"));
            plug.send(()).unwrap();
            told.recv_timeout(DEADLINE)
                .expect("the other side is ready");
            let address = "10.0.0.2:5000".parse().unwrap();
            let connected = TcpStream::connect_timeout(&address, DEADLINE / 4);
            let mut stream = connected.unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.write_all(&data).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut theirs = [0; 8];
            stream.read_exact(&mut theirs).unwrap();
            assert_eq!(u64::from_le_bytes(theirs), hash(&data));
            receiver.join().unwrap();
        });
        here.assert_conserved(&["tap", "nic"], 0);
        assert!(here.counters("nic").tx_gso_frames > 0, "none was cut");
    }
}
