//! AF_XDP ports on veth pairs, each test in a network namespace of its own. Needs root and
//! iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::net::UdpSocket;
use std::process::Command;
use std::time::{Duration, Instant};

use common::endpoint::CSUM;
use common::host::{Raw, ip};
use common::packet::{GSO_TCPV4, Packet, complete, judge, pattern};
use common::{af_xdp, eventually, frame, lab_with_nic, mac, name, nic_info, receive};
use etherparse::PacketBuilder;
use ringway_api::{AfXdpConfig, BusyPoll, Mtu, PortState, QueuePairs, UmemFrames, XdpMode};
use ringway_bridge::DropReason;
use ringway_guest::features::TSO;
use ringway_guest::{FrameSource, Guest, NET_HEADER_BYTES};

/// Both modes that veth has.
const MODES: [XdpMode; 2] = [XdpMode::Copy, XdpMode::Skb];

/// Has the switch learn that station 1 is a guest's.
fn introduce(guest: &mut Guest, far: &Raw) {
    let hello = frame(0xff, 1, 60, 0);
    guest.send_frame(&hello).unwrap();
    while far.receive() != hello {}
}

#[test]
fn frames_of_every_length_pass_both_ways_unchanged() {
    for mode in MODES {
        let (lab, far) = lab_with_nic(1, 1500, |nic| nic.mode = mode);
        let mut guest = lab.guest("vm", Guest::builder());
        introduce(&mut guest, &far);
        assert_eq!(nic_info(&lab).mode, mode);
        for bytes in 60..=1514 {
            let sent = frame(1, 2, bytes, bytes as u64);
            far.send(&sent);
            let received = receive(&mut guest);
            assert_eq!(received.frame, sent, "{bytes} bytes to the guest, {mode:?}");
            assert_eq!(received.header[..10], [0; 10], "a promise was made");
            let sent = frame(2, 1, bytes, bytes as u64 + 1);
            guest.send_frame(&sent).unwrap();
            assert_eq!(
                far.receive(),
                sent,
                "{bytes} bytes from the guest, {mode:?}"
            );
        }
        lab.assert_conserved(&["nic", "vm"], 0);
    }
}

#[test]
fn jumbo_frames_pass_in_several_buffers() {
    for mode in MODES {
        let (lab, far) = lab_with_nic(1, 9000, |nic| nic.mode = mode);
        let mut guest = lab.guest("vm", Guest::builder());
        introduce(&mut guest, &far);
        assert!(nic_info(&lab).multi_buffer);
        for bytes in (60..=9000)
            .step_by(149)
            .chain([3839, 3840, 3841, 7680, 7681, 9014])
        {
            let sent = frame(1, 2, bytes, bytes as u64);
            far.send(&sent);
            assert!(
                receive(&mut guest).frame == sent,
                "{bytes} bytes to the guest, {mode:?}"
            );
            let sent = frame(2, 1, bytes, bytes as u64 + 1);
            guest.send_frame(&sent).unwrap();
            assert!(
                far.receive() == sent,
                "{bytes} bytes from the guest, {mode:?}"
            );
        }
        lab.assert_conserved(&["nic", "vm"], 0);
    }
}

/// A service tag and a customer tag (IEEE 802.1Q, 9.5) in front of what fills the MTU. The kernel
/// lets veth itself carry one less (net/core/dev.c, is_skb_forwardable), so its MTU is greater than
/// the port's.
#[test]
fn two_tags_fit_the_mtu_both_ways() {
    for mtu in [1500, 8900] {
        let (lab, far) = lab_with_nic(1, mtu + 100, |nic| {
            nic.mtu = Mtu::new(u16::try_from(mtu).unwrap());
        });
        let mut guest = lab.guest("vm", Guest::builder());
        introduce(&mut guest, &far);
        let bytes = mtu as usize + 22;
        let sent = frame(1, 2, bytes, 1);
        far.send(&sent);
        assert!(receive(&mut guest).frame == sent, "to the guest, MTU {mtu}");
        guest.send_frame(&frame(2, 1, bytes + 1, 2)).unwrap();
        let sent = frame(2, 1, bytes, 3);
        guest.send_frame(&sent).unwrap();
        assert!(far.receive() == sent, "from the guest, MTU {mtu}");
        lab.eventually_dropped("nic", |c| c.tx_drops[DropReason::TooLong], 1);
    }
}

#[test]
fn bursts_of_jumbo_frames_arrive_whole_and_in_order() {
    let (lab, far) = lab_with_nic(1, 9000, |_| {});
    let mut guest = lab.guest("vm", Guest::builder());
    introduce(&mut guest, &far);
    const COUNT: u64 = 300;
    for seed in 0..COUNT {
        guest.send_frame(&frame(2, 1, 9014, seed)).unwrap();
    }
    for seed in 0..COUNT {
        assert!(
            far.receive() == frame(2, 1, 9014, seed),
            "frame {seed} to the wire"
        );
    }
    for seed in 0..COUNT {
        far.send(&frame(1, 2, 9014, seed));
    }
    for seed in 0..COUNT {
        assert!(
            receive(&mut guest).frame == frame(1, 2, 9014, seed),
            "frame {seed} to the guest"
        );
    }
}

/// A UDP datagram from station 2 to station 1, of a flow that `port` distinguishes.
fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(2), mac(1))
        .ipv4([10, 0, 0, 2], [10, 0, 0, 1], 64)
        .udp(port, 7);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

#[test]
fn two_queues_share_the_frames_and_a_guests_queue_keeps_to_one() {
    let (lab, _) = lab_with_nic(2, 1500, |_| {});
    let config = Guest::builder().queue_pairs(2);
    let mut guest = lab.guest("vm", config);
    let far = Raw::for_type("far0", 0x0800);
    let detail = || lab.switch.port(&name("nic")).unwrap();
    assert_eq!(detail().queues.len(), 2, "all queues that there are");
    const FLOWS: u16 = 64;
    for port in 1..=FLOWS {
        far.send(&datagram(port, &port.to_be_bytes()));
    }
    let mut seen: Vec<_> = (0..FLOWS).map(|_| receive(&mut guest).frame).collect();
    let mut expected: Vec<_> = (1..=FLOWS)
        .map(|port| datagram(port, &port.to_be_bytes()))
        .collect();
    seen.sort();
    expected.sort();
    assert!(seen == expected);
    let queues = detail().queues;
    assert!(queues.iter().all(|queue| queue.rx_frames > 0), "{queues:?}");
    for pair in [0, 1, 1] {
        let mut sent = vec![0; NET_HEADER_BYTES];
        sent.extend(frame(0xff, 1, 100, 1));
        guest.send_on(pair, &sent).unwrap();
    }
    eventually("frames leave by the queue of their number", || {
        let queues = detail().queues;
        (queues[0].tx_frames, queues[1].tx_frames) == (1, 2)
    });
}

#[test]
fn a_port_of_fewer_queues_leaves_the_others_to_the_kernel() {
    let (lab, _) = lab_with_nic(2, 1500, |nic| nic.queues = QueuePairs::new(1));
    let mut guest = lab.guest("vm", Guest::builder());
    let host = Raw::for_type("xdp0", 0x0800);
    let far = Raw::for_type("far0", 0x0800);
    const FLOWS: u16 = 64;
    for port in 1..=FLOWS {
        far.send(&datagram(port, b""));
    }
    let (mut to_guest, mut to_host) = (0, 0);
    eventually("each frame goes one way", || {
        while guest.try_recv(0).unwrap().is_some() {
            to_guest += 1;
        }
        while host.try_receive().is_some() {
            to_host += 1;
        }
        to_guest + to_host == FLOWS
    });
    assert!(to_guest > 0 && to_host > 0, "{to_guest} and {to_host}");
}

#[test]
fn a_guest_that_takes_nothing_fills_the_rings_and_all_flows_when_it_does() {
    // 64 chunks to receive into.
    let small = |nic: &mut AfXdpConfig| nic.umem_frames = UmemFrames::new(128).unwrap();
    let (lab, far) = lab_with_nic(1, 1500, small);
    let config = Guest::builder().queue_size(16);
    let mut guest = lab.guest("vm", config);
    introduce(&mut guest, &far);
    const COUNT: u64 = 500;
    for seed in 0..COUNT {
        far.send(&frame(1, 2, 60, seed));
    }
    let lost = || {
        let queue = nic_info(&lab).queues[0];
        queue.rx_ring_full + queue.rx_fill_empty + queue.rx_dropped
    };
    eventually("the kernel has nowhere to put frames", || lost() > 0);
    let waiting = nic_info(&lab).queues[0];
    assert!(
        waiting.rx_level > 0 && waiting.rx_level <= 64,
        "{waiting:?}"
    );
    // What found a place arrives, in order.
    let mut arrived = 0;
    let mut sent = (0..COUNT).map(|seed| frame(1, 2, 60, seed));
    while let Some(received) = guest.recv(Duration::from_millis(200)).unwrap() {
        assert!(sent.any(|sent| sent == received.frame), "out of order");
        arrived += 1;
    }
    assert!((64..COUNT).contains(&arrived), "{arrived} frames");
    eventually("every chunk is in the fill ring again", || {
        let queue = nic_info(&lab).queues[0];
        (queue.fill_level, queue.rx_level) == (64, 0)
    });
    for seed in 0..COUNT {
        let sent = frame(1, 2, 60, seed);
        far.send(&sent);
        assert_eq!(receive(&mut guest).frame, sent);
    }
    lab.assert_conserved(&["nic", "vm"], 0);
}

#[test]
fn frames_made_at_the_far_end_arrive() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut guest = lab.guest("vm", Guest::builder());
    introduce(&mut guest, &far);
    let made = frame(1, 2, 1514, 7);
    // SAFETY: the pointer is a valid C string.
    let index = unsafe { libc::if_nametoindex(c"far0".as_ptr()) };
    let source = FrameSource::new(index, made.clone()).unwrap();
    for count in [1, 64, 100] {
        source.send(count).unwrap();
        for _ in 0..count {
            assert_eq!(receive(&mut guest).frame, made);
        }
    }
    lab.assert_conserved(&["nic", "vm"], 0);
}

#[test]
fn chunks_to_send_from_are_used_again_and_again() {
    for mode in MODES {
        let (lab, far) = lab_with_nic(1, 9000, |nic| {
            nic.mode = mode;
            nic.umem_frames = UmemFrames::new(128).unwrap();
        });
        let mut guest = lab.guest("vm", Guest::builder());
        introduce(&mut guest, &far);
        // 64 chunks, three a frame, and now and then one of one chunk.
        const COUNT: u64 = 3000;
        let bytes = |seed| if seed % 7 == 0 { 60 } else { 9014 };
        let mut sent = 0;
        for seed in 0..COUNT {
            while sent < COUNT && sent < seed + 200 {
                guest.send_frame(&frame(2, 1, bytes(sent), sent)).unwrap();
                sent += 1;
            }
            assert!(
                far.receive() == frame(2, 1, bytes(seed), seed),
                "frame {seed}"
            );
        }
        eventually("every chunk is back", || {
            let queue = nic_info(&lab).queues[0];
            (queue.tx_level, queue.tx_pending) == (0, 0)
        });
        lab.assert_conserved(&["nic", "vm"], 0);
    }
}

#[test]
fn a_sleeping_worker_wakes_for_each_frame() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut guest = lab.guest("vm", Guest::builder());
    introduce(&mut guest, &far);
    let worker = || lab.switch.workers().remove(0);
    for seed in 0..200 {
        eventually("the worker sleeps", || worker().active_queues == 0);
        let sent = frame(1, 2, 60, seed);
        far.send(&sent);
        assert_eq!(receive(&mut guest).frame, sent);
    }
    eventually("the worker sleeps", || worker().active_queues == 0);
    let (turns, start) = (worker().turns, Instant::now());
    while start.elapsed() < Duration::from_millis(300) {
        assert_eq!(worker().turns, turns, "a turn without a frame");
        std::thread::yield_now();
    }
}

#[test]
fn busy_polling_is_taken_and_frames_pass() {
    let (lab, far) = lab_with_nic(1, 1500, |nic| {
        nic.busy_poll_us = BusyPoll::new(20);
    });
    let mut guest = lab.guest("vm", Guest::builder());
    introduce(&mut guest, &far);
    for seed in 0..100 {
        let sent = frame(1, 2, 60, seed);
        far.send(&sent);
        assert_eq!(receive(&mut guest).frame, sent);
    }
}

/// The kernel at a veth's other end leaves checksums to a NIC that there is none.
#[test]
fn a_checksum_that_the_far_ends_kernel_left_open_is_told_or_completed() {
    for mode in MODES {
        let (lab, _) = lab_with_nic(1, 1500, |config| config.mode = mode);
        let mut guests = [0, CSUM].map(|features| {
            let config = Guest::builder().features(features);
            lab.guest(if features == 0 { "none" } else { "csum" }, config)
        });
        for address in ["10.0.0.2/24", "fd00::2/64"] {
            ip(&format!("addr add {address} dev far0 nodad"));
        }
        // To all stations: a guest of each kind gets the same.
        for address in ["10.0.0.1", "fd00::1"] {
            ip(&format!(
                "neigh replace {address} lladdr ff:ff:ff:ff:ff:ff dev far0"
            ));
        }
        // With the place of the destination's port in the frame.
        for (from, to, l4_place) in [
            ("10.0.0.2:7000", "10.0.0.1:7", 14 + 20 + 2),
            ("[fd00::2]:7000", "[fd00::1]:7", 14 + 40 + 2),
        ] {
            let socket = UdpSocket::bind(from).unwrap();
            for bytes in [1, 64, 1001, 1400] {
                socket.send_to(&pattern(bytes), to).unwrap();
                for guest in &mut guests {
                    let mut arrived = receive(guest);
                    // The kernel has words of its own.
                    while arrived.frame.get(l4_place..l4_place + 2) != Some(&[0, 7]) {
                        arrived = receive(guest);
                    }
                    let is_open = complete(&arrived.header, &mut arrived.frame);
                    let takes_open = guest.features() & CSUM != 0;
                    assert_eq!(is_open, takes_open, "{mode:?} {from} {bytes}");
                    let judged = judge(&arrived.frame).unwrap();
                    assert!(judged.payload == pattern(bytes), "the payload changed");
                }
            }
        }
        assert_eq!(lab.counters("none").tx_csum_completed, 8);
        assert_eq!(lab.counters("csum").tx_csum_completed, 0);
    }
}

/// A TCP packet from station 2 to station 1 with the bytes of a stream from `at` on.
fn stream(at: usize, bytes: usize) -> Packet {
    let mut packet = Packet::new(true, false, pattern(at + bytes).split_off(at));
    packet.stations = [mac(2), mac(1)];
    packet.psh = false;
    packet.identification = 0;
    packet.sequence = u32::try_from(at).unwrap();
    packet
}

/// Receives a stream of TCP up to its byte `end`, each frame of which is judged; returns how many
/// there were.
fn receive_stream(guest: &mut Guest, end: usize) -> usize {
    let (mut payload, mut frames) = (Vec::new(), 0);
    while payload.len() < end {
        let mut arrived = receive(guest);
        let gso_type = arrived.header[1];
        assert!(gso_type == 0 || gso_type == GSO_TCPV4 && guest.features() & TSO == TSO);
        complete(&arrived.header, &mut arrived.frame);
        let judged = judge(&arrived.frame).unwrap();
        let at = judged.tcp.unwrap().sequence_number;
        assert_eq!(at as usize, payload.len(), "out of order");
        payload.extend(judged.payload);
        frames += 1;
    }
    assert!(payload == pattern(end), "the payload changed");
    frames
}

#[test]
fn segments_are_joined_for_a_guest_that_takes_such_frames_and_for_no_other() {
    const SEGMENTS: usize = 60;
    const BYTES: usize = 1000;
    for (features, gro) in [(TSO, true), (TSO, false), (CSUM, true)] {
        let (lab, _) = lab_with_nic(1, 1500, |nic| nic.gro = gro);
        let config = Guest::builder().features(features);
        let mut guest = lab.guest("vm", config);
        let far = Raw::for_type("far0", 0x0800);
        introduce(&mut guest, &Raw::open("far0"));
        let mut rounds = 0;
        // How many of them wait for the worker at a time is up to it.
        eventually("segments are joined, or never", || {
            for index in 0..SEGMENTS {
                far.send(&stream(index * BYTES, BYTES).frame());
            }
            let frames = receive_stream(&mut guest, SEGMENTS * BYTES);
            rounds += 1;
            assert_eq!(frames == SEGMENTS, lab.counters("nic").rx_gro_merged == 0);
            frames < SEGMENTS || (features, gro) != (TSO, true) && rounds == 50
        });
        lab.assert_conserved(&["nic", "vm"], 0);
        let counters = lab.counters("nic");
        let sent = u64::try_from(rounds * SEGMENTS).unwrap();
        assert_eq!(counters.rx_frames, sent, "frames of the wire are counted");
        let bytes = stream(0, BYTES).frame().len();
        assert_eq!(counters.rx_bytes, sent * u64::try_from(bytes).unwrap());
    }
}

#[test]
fn a_segment_whose_checksum_is_wrong_arrives_as_it_came() {
    let (lab, _) = lab_with_nic(1, 1500, |_| {});
    let config = Guest::builder().features(TSO);
    let mut guest = lab.guest("vm", config);
    let far = Raw::for_type("far0", 0x0800);
    introduce(&mut guest, &Raw::open("far0"));
    let mut bad = stream(10_000, 1000).frame();
    *bad.last_mut().unwrap() ^= 0x10;
    eventually("many others are joined", || {
        for index in 0..10 {
            far.send(&stream(index * 1000, 1000).frame());
        }
        far.send(&bad);
        let mut bytes = 0;
        while bytes < 10_000 {
            bytes += receive(&mut guest).frame.len() - stream(0, 0).frame().len();
        }
        let arrived = receive(&mut guest);
        assert_eq!(arrived.header[..10], [0; 10]);
        assert!(arrived.frame == bad);
        lab.counters("nic").rx_gro_merged > 500
    });
}

#[test]
fn frames_longer_than_the_interfaces_mtu_are_dropped_and_counted() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut guest = lab.guest("vm", Guest::builder());
    introduce(&mut guest, &far);
    guest.send_frame(&frame(2, 1, 1523, 1)).unwrap();
    lab.eventually_dropped("nic", |c| c.tx_drops[DropReason::TooLong], 1);
}

#[test]
fn the_interface_is_the_kernels_again_when_the_port_goes() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let host = Raw::open("xdp0");
    far.send(&frame(1, 2, 60, 1));
    eventually("the switch takes frames", || {
        lab.counters("nic").rx_frames == 1
    });
    let program = nic_info(&lab).program_id;
    for _ in 0..20 {
        lab.switch.remove_port(&name("nic")).unwrap();
        let sent = frame(1, 2, 60, 2);
        far.send(&sent);
        assert_eq!(host.receive(), sent);
        lab.switch.add_port(name("nic"), af_xdp(|_| {})).unwrap();
        assert_ne!(nic_info(&lab).program_id, program);
    }
    far.send(&frame(1, 2, 60, 3));
    eventually("the switch takes frames", || {
        lab.counters("nic").rx_frames == 1
    });
    assert_eq!(host.try_receive(), None);
}

#[test]
fn an_interface_that_goes_down_or_away_takes_its_port_down_and_nothing_else() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    introduce(&mut a, &far);
    let state = || lab.switch.port(&name("nic")).unwrap().port.state;
    assert_eq!(state(), PortState::Up);
    let is_down = || state() == PortState::Down;
    let drops = || lab.counters("nic").tx_drops[DropReason::HostError];
    let mut flood = |seed| {
        let sent = frame(0xff, 1, 64, seed);
        a.send_frame(&sent).unwrap();
        while receive(&mut b).frame != sent {}
        sent
    };
    ip("link set xdp0 down");
    eventually("the port is down", is_down);
    // The first may be in the ring before the kernel says no.
    let mut seed = 1;
    while drops() == 0 {
        flood(seed);
        seed += 1;
    }
    ip("link set xdp0 up");
    eventually("the port is up", || state() == PortState::Up);
    let sent = flood(1000);
    while far.receive() != sent {}
    ip("link del xdp0");
    eventually("the port is down", is_down);
    flood(2000);
    lab.switch.remove_port(&name("nic")).unwrap();
}

#[test]
fn stations_behind_an_interface_that_goes_down_are_looked_for_elsewhere() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let hello = frame(0xff, 9, 64, 0);
    far.send(&hello);
    for guest in [&mut a, &mut b] {
        assert_eq!(receive(guest).frame, hello);
    }
    let knows_it = || lab.switch.fdb().iter().any(|entry| entry.mac.0 == mac(9));
    assert!(knows_it());
    ip("link set xdp0 down");
    eventually("it is forgotten", || !knows_it());
    let sent = frame(9, 1, 64, 1);
    a.send_frame(&sent).unwrap();
    assert_eq!(receive(&mut b).frame, sent);
}

#[test]
fn the_interface_receives_frames_for_all_addresses_as_long_as_the_port_is_there() {
    let promiscuity = || {
        let output = Command::new("ip")
            .args(["-d", "link", "show", "xdp0"])
            .output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let mut words = text.split_whitespace();
        words.find(|word| *word == "promiscuity");
        words.next().unwrap().to_owned()
    };
    let (lab, _) = lab_with_nic(1, 1500, |_| {});
    assert_eq!(promiscuity(), "1");
    lab.switch.remove_port(&name("nic")).unwrap();
    assert_eq!(promiscuity(), "0");
}
