//! Tap ports, each test in a network namespace of its own. Needs root and iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::net::UdpSocket;
use std::process::Command;

use common::host::{ip, mac_of, quiet_namespace};
use common::{DEADLINE, Lab, eventually, frame, name, receive, tap};
use etherparse::{PacketBuilder, PacketHeaders, TransportHeader};
use ringway_api::{FloodLimit, IfName, PortConfig, PortState, SwitchConfig, SwitchError};
use ringway_bridge::DropReason;
use ringway_guest::{Guest, features::TSO};

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

fn exists(ifname: &str) -> bool {
    let output = Command::new("ip").args(["link", "show", ifname]).output();
    output.unwrap().status.success()
}

/// A lab with a tap `rw0` at 10.0.0.1 whose neighbour 10.0.0.2 is the guest.
fn lab_with_host(queues: u16) -> Lab {
    lab_with_host_and(queues, |_| {})
}

/// The same at a switch of which more is said.
fn lab_with_host_and(queues: u16, change: impl FnOnce(&mut SwitchConfig)) -> Lab {
    quiet_namespace();
    let lab = Lab::with_config(change);
    let config = tap("rw0", queues, true);
    lab.switch.add_port(name("host"), config).unwrap();
    ip("addr add 10.0.0.1/24 dev rw0");
    ip("neigh add 10.0.0.2 lladdr 52:54:00:00:00:01 dev rw0");
    lab
}

fn datagram(payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(GUEST, mac_of("rw0"))
        .ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64)
        .udp(7000, 7001);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

/// The next UDP datagram's payload that a guest receives; the kernel sends others on its own.
fn receive_datagram(guest: &mut Guest) -> Vec<u8> {
    loop {
        let received = receive(guest).frame;
        let headers = PacketHeaders::from_ethernet_slice(&received).unwrap();
        if let (Some(TransportHeader::Udp(udp)), payload) = (headers.transport, headers.payload)
            && udp.destination_port == 7000
        {
            return payload.slice().to_vec();
        }
    }
}

/// One frame may be lost in finding out; housekeeping finds out without any.
#[test]
fn stations_behind_a_tap_that_goes_down_are_looked_for_elsewhere_at_once() {
    for by_traffic in [true, false] {
        let lab = lab_with_host(1);
        let mut a = lab.guest("vm", Guest::builder());
        let mut b = lab.guest("b", Guest::builder());
        let socket = UdpSocket::bind("10.0.0.1:7001").unwrap();
        socket.send_to(&[1], "10.0.0.2:7000").unwrap();
        let host = mac_of("rw0");
        let knows_host = || lab.switch.fdb().iter().any(|entry| entry.mac.0 == host);
        eventually("the host is known", knows_host);
        ip("link set rw0 down");
        if !by_traffic {
            eventually("the host is forgotten", || !knows_host());
        }
        let mut sent = frame(9, 1, 64, 0);
        sent[..6].copy_from_slice(&host);
        if by_traffic {
            a.send_frame(&sent).unwrap();
            // Lost at the tap, unless housekeeping was faster.
            eventually("the first frame is away", || {
                lab.counters("host").tx_drops[DropReason::HostError] == 1 || !knows_host()
            });
        }
        a.send_frame(&sent).unwrap();
        while receive(&mut b).frame != sent {}
    }
}

/// A copy to a tap costs as much as 32 to guests: a system call.
#[test]
fn what_is_flooded_to_taps_costs_its_source_more() {
    // A copy in a second, and 4,096 at first: of three, the first of which is free, two count 31 more.
    const FRAMES: u64 = 200;
    const PASS: u64 = 4096 / (2 + 2 * 31);
    let lab = lab_with_host(1);
    let second = tap("rw1", 1, true);
    lab.switch.add_port(name("host1"), second).unwrap();
    let flooder = lab.add_port_with("flooder", |config| {
        config.flood_limit = FloodLimit::new(1).unwrap();
    });
    let mut flooder = Guest::builder().connect(&flooder).unwrap();
    let mut other = lab.guest("other", Guest::builder());
    for seed in 0..FRAMES {
        flooder.send_frame(&frame(0xff, 1, 64, seed)).unwrap();
        assert!(flooder.flush(DEADLINE).unwrap());
        while other.try_recv(0).unwrap().is_some() {}
    }
    let passed = FRAMES - lab.counters("flooder").rx_drops[DropReason::FloodLimit];
    // A copy more is there in each second that the test takes.
    assert!((PASS..PASS + 3).contains(&passed), "{passed}");
}

#[test]
fn host_and_guest_exchange_datagrams() {
    for queues in [1, 2] {
        let lab = lab_with_host(queues);
        let config = Guest::builder().features(TSO);
        let mut guest = lab.guest("vm", config);
        let socket = UdpSocket::bind("10.0.0.1:7001").unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        for bytes in [1, 100, 1472] {
            let sent: Vec<u8> = (0..=250).cycle().take(bytes).collect();
            guest.send_frame(&datagram(&sent)).unwrap();
            let mut buffer = [0; 2000];
            let (count, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(
                (&buffer[..count], from.to_string()),
                (&sent[..], "10.0.0.2:7000".into())
            );
            // The kernel leaves the checksum to whoever can complete it: the guest negotiated it.
            socket.send_to(&sent, from).unwrap();
            assert_eq!(receive_datagram(&mut guest), sent);
        }
    }
}

#[test]
fn a_tap_s_queue_changes_hands_and_loses_nothing() {
    let lab = lab_with_host_and(1, |config| {
        let cores = core_affinity::get_core_ids().unwrap();
        config.worker_cpus = cores[..2].iter().map(|core| core.id).collect();
    });
    let config = Guest::builder().features(TSO);
    let mut guest = lab.guest("vm", config);
    let socket = UdpSocket::bind("10.0.0.1:7001").unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    for round in 0..50_u16 {
        for port in ["host", "vm"] {
            let pinned = lab.switch.pin_queue(&name(port), 0, round / 2 % 2);
            pinned.unwrap();
            let (there, back) = (round.to_le_bytes(), round.to_be_bytes());
            guest.send_frame(&datagram(&there)).unwrap();
            // More than one, so that some wait in the tap when it changes hands.
            socket.send_to(&back, "10.0.0.2:7000").unwrap();
            socket.send_to(&there, "10.0.0.2:7000").unwrap();
            let mut buffer = [0; 100];
            let count = socket.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..count], there);
            lab.switch.pin_queue(&name(port), 0, round % 2).unwrap();
            assert_eq!(receive_datagram(&mut guest), back);
            assert_eq!(receive_datagram(&mut guest), there);
        }
    }
}

#[test]
fn frames_that_were_read_and_wait_go_along_with_their_queue() {
    let lab = lab_with_host_and(1, |config| {
        let cores = core_affinity::get_core_ids().unwrap();
        config.worker_cpus = cores[..2].iter().map(|core| core.id).collect();
    });
    let config = Guest::builder().features(TSO).queue_size(4);
    let mut guest = lab.guest("vm", config);
    let socket = UdpSocket::bind("10.0.0.1:7001").unwrap();
    // So that the switch knows where the guest is: a frame for all ports would not wait.
    guest.send_frame(&datagram(b"here")).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.recv(&mut [0; 10]).unwrap();
    // What the kernel sent before there was a guest.
    let dropped = lab.counters("vm").tx_drops.total();
    for round in 0..4_u8 {
        let before = lab.counters("vm").tx_frames;
        for number in 0..16 {
            socket.send_to(&[round, number], "10.0.0.2:7000").unwrap();
        }
        eventually("the guest's ring is full", || {
            lab.counters("vm").tx_frames >= before + 4
        });
        lab.switch
            .pin_queue(&name("host"), 0, 1 - u16::from(round) % 2)
            .unwrap();
        for number in 0..16 {
            assert_eq!(receive_datagram(&mut guest), [round, number]);
        }
    }
    assert_eq!(lab.counters("vm").tx_drops.total(), dropped);
}

#[test]
fn a_checksum_that_the_host_left_open_is_completed_for_a_guest_without_offloads() {
    let lab = lab_with_host(1);
    let mut guest = lab.guest("vm", Guest::builder());
    let socket = UdpSocket::bind("10.0.0.1:7001").unwrap();
    guest.send_frame(&datagram(b"hello")).unwrap();
    let mut buffer = [0; 100];
    socket.recv_from(&mut buffer).unwrap();
    socket
        .send_to(b"an open checksum", "10.0.0.2:7000")
        .unwrap();
    assert_eq!(receive_datagram(&mut guest), b"an open checksum");
    eventually("the work is counted", || {
        lab.counters("vm").tx_csum_completed > 0
    });
}

#[test]
fn interfaces_go_with_their_port_unless_they_are_to_stay() {
    quiet_namespace();
    let lab = Lab::start();
    for (ifname, queues, persist) in [("rw0", 1, false), ("rw1", 4, false), ("rw2", 1, true)] {
        let mut config = tap(ifname, queues, true);
        if let PortConfig::Tap(tap) = &mut config {
            tap.persist = persist;
        }
        lab.switch.add_port(name("p"), config).unwrap();
        let detail = lab.switch.port(&name("p")).unwrap();
        assert_eq!(detail.port.state, PortState::Up);
        assert_eq!(detail.queues.len(), usize::from(queues));
        assert!(exists(ifname));
        lab.switch.remove_port(&name("p")).unwrap();
        assert_eq!(exists(ifname), persist, "{ifname}");
    }
    // What stayed, and what others made, can be attached.
    ip("tuntap add rw3 mode tap multi_queue");
    ip("tuntap add rw4 mode tap");
    for (ifname, queues) in [("rw2", 1), ("rw3", 2), ("rw3", 1), ("rw4", 1)] {
        lab.switch
            .add_port(name("p"), tap(ifname, queues, true))
            .unwrap();
        lab.switch.remove_port(&name("p")).unwrap();
        assert!(exists(ifname), "{ifname} was there before");
    }
}

#[test]
fn interfaces_that_can_not_be_taps_are_refused_with_a_reason() {
    quiet_namespace();
    let lab = Lab::start();
    ip("tuntap add rw4 mode tap");
    ip("tuntap add rw5 mode tun");
    let cases = [
        ("lo", 1, "no tap"),
        ("rw4", 2, "no tap"),
        ("rw5", 1, "no tap"),
    ];
    // A name that no interface can have does not come as far as the switch.
    for ifname in ["a/b", "sixteen-letters-", ""] {
        let error = ifname.parse::<IfName>().unwrap_err();
        assert!(error.to_string().contains("name"), "{ifname}: {error}");
        assert!(!error.hint.is_empty());
    }
    for (ifname, queues, part) in cases {
        let error = lab
            .switch
            .add_port(name("p"), tap(ifname, queues, true))
            .unwrap_err();
        assert!(
            matches!(error, SwitchError::Tap { .. }),
            "{ifname}: {error}"
        );
        assert!(error.to_string().contains(part), "{ifname}: {error}");
        assert!(!error.hint().is_empty());
        assert!(lab.switch.ports().is_empty(), "nothing is half-created");
    }
    lab.switch.add_port(name("p"), tap("rw6", 1, true)).unwrap();
    let busy = lab
        .switch
        .add_port(name("q"), tap("rw6", 1, true))
        .unwrap_err();
    assert!(busy.to_string().contains("port p already"), "{busy}");
    let other = Lab::start();
    let busy = other.switch.add_port(name("q"), tap("rw6", 1, true));
    let busy = busy.unwrap_err();
    assert!(busy.to_string().contains("another process"), "{busy}");
}

#[test]
fn an_interface_that_is_deleted_takes_its_port_down_and_nothing_else() {
    let lab = lab_with_host(1);
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    ip("link del rw0");
    eventually("the port is down", || {
        lab.switch.port(&name("host")).unwrap().port.state == PortState::Down
    });
    let sent = frame(0xff, 1, 64, 1);
    a.send_frame(&sent).unwrap();
    while receive(&mut b).frame != sent {}
    lab.switch.remove_port(&name("host")).unwrap();
}
