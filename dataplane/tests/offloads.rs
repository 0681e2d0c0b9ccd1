//! Frames that pass whole, headers that are refused, segments and their room, real TCP through
//! taps, and what is told of each pair. Every pair of kinds is in `offload_matrix`. Taps need root
//! and iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use common::endpoint::{ALL, CSUM};
use common::host::{Raw, ip, quiet_namespace};
use common::packet::{GSO_TCPV4, NEEDS_CSUM, Packet, judge, pattern};
use common::{DEADLINE, LAYOUTS, Lab, eventually, frame, mac, name, receive, tap};
use ringway_bridge::DropReason;
use ringway_guest::features::{
    TSO, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};
use ringway_guest::{Guest, GuestBuilder, Layout, NET_HEADER_BYTES};

/// The part of [`TSO`] that is of what a guest sends.
const SEND_TSO: u64 = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6;

/// A TCP packet that becomes 45 segments.
fn forty_five() -> (Packet, Vec<u8>) {
    let packet = Packet::new(true, false, pattern(44 * 1400 + 7));
    let message = [packet.header(1400), packet.open()].concat();
    (packet, message)
}

fn sender_and_small_receiver(lab: &Lab, queue_size: u16, layout: Layout) -> (Guest, Guest) {
    let sender = Guest::builder().features(TSO);
    let receiver = Guest::builder().queue_size(queue_size).layout(layout);
    let mut a = lab.guest("a", sender);
    let mut b = lab.guest("b", receiver);
    b.send_frame(&frame(1, 2, 64, 1)).unwrap();
    receive(&mut a);
    (a, b)
}

/// A guest that negotiated all offloads, and can take frames of 64 KiB in merged buffers.
fn with_offloads() -> GuestBuilder {
    Guest::builder().features(TSO)
}

/// A virtio-net header (virtio 1.3, 5.1.6).
fn header(flags: u8, gso_type: u8, hdr_len: u16, gso_size: u16, csum: (u16, u16)) -> Vec<u8> {
    let mut header = vec![flags, gso_type];
    for field in [hdr_len, gso_size, csum.0, csum.1, 0] {
        header.extend(field.to_le_bytes());
    }
    header
}

#[test]
fn a_tso_frame_of_64_kib_passes_whole() {
    let packet = Packet::new(true, false, pattern(65_535 - 40));
    let frame = packet.open();
    let message = [packet.header(1448), frame.clone()].concat();
    for [from, to] in LAYOUTS {
        // One buffer, a chain of 33, and a table of as many.
        for (buffer_size, indirect) in [(65_600, true), (2048, false), (2048, true)] {
            let lab = Lab::start();
            let mut a = lab.guest(
                "a",
                with_offloads()
                    .layout(from)
                    .buffer_size(buffer_size)
                    .indirect(indirect),
            );
            let mut b = lab.guest("b", with_offloads().layout(to));
            // More than a lap of both rings.
            for _ in 0..20 {
                a.send(&message).unwrap();
                let received = receive(&mut b);
                assert_eq!(received.frame, frame);
                assert_eq!(
                    received.num_buffers(),
                    33,
                    "65,561 bytes in buffers of 2,048"
                );
                assert_eq!(received.header[..10], message[..10]);
            }
        }
    }
}

/// IPv6 tells the length behind its header, so its packets are up to 40 bytes longer than IPv4's.
#[test]
fn the_longest_frames_of_tcp_over_ipv6_pass_whole_and_are_cut() {
    for (tags, payload) in [(0, 65_502), (2, 65_502), (0, 65_515), (2, 65_515)] {
        let lab = Lab::start();
        let mut a = lab.guest("a", with_offloads().buffer_size(2048));
        let mut whole = lab.guest("whole", with_offloads());
        let mut cut = lab.guest("cut", Guest::builder());
        let packet = Packet {
            tags,
            stations: [mac(1), [0xff; 6]],
            ..Packet::new(false, false, pattern(payload))
        };
        a.send(&[packet.header(1400), packet.open()].concat())
            .unwrap();
        assert!(
            receive(&mut whole).frame == packet.open(),
            "{tags}, {payload}"
        );
        let mut together = Vec::new();
        while together.len() < payload {
            together.extend(judge(&receive(&mut cut).frame).unwrap().payload);
        }
        assert!(together == packet.payload, "{tags} tags, {payload} bytes");
    }
}

#[test]
fn tcp_behind_long_extension_headers_passes_whole_and_is_cut() {
    // The longest option that there is takes 257 bytes (RFC 8200, 4.2).
    for (tags, ip_options) in [(0, 16), (2, 16), (0, 32), (2, 32)] {
        let lab = Lab::start();
        let mut a = lab.guest("a", with_offloads());
        let mut whole = lab.guest("whole", with_offloads());
        let mut cut = lab.guest("cut", Guest::builder());
        let packet = Packet {
            tags,
            ip_options,
            tcp_options: 10,
            stations: [mac(1), [0xff; 6]],
            ..Packet::new(false, false, pattern(8000))
        };
        a.send(&[packet.header(1000), packet.open()].concat())
            .unwrap();
        assert!(
            receive(&mut whole).frame == packet.open(),
            "{tags}, {ip_options}"
        );
        let segments = (0..8).map(|_| judge(&receive(&mut cut).frame).unwrap().payload);
        let together = segments.collect::<Vec<_>>().concat();
        assert!(
            together == packet.payload,
            "{tags} tags, {ip_options} words"
        );
    }
}

#[test]
fn an_offload_that_the_source_did_not_negotiate_is_dropped_and_counted() {
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", with_offloads());
    let packet = Packet::new(true, false, pattern(100));
    a.send(&[packet.header(0), packet.open()].concat()).unwrap();
    let marker = frame(2, 1, 64, 1);
    a.send_frame(&marker).unwrap();
    assert_eq!(receive(&mut b).frame, marker);
    lab.eventually_dropped("a", |c| c.rx_drops[DropReason::OffloadNotNegotiated], 1);
}

/// A guest that loads an XDP program takes such frames no more (virtio 1.3, 5.1.6.5.6.1), and QEMU
/// has no message for that.
#[test]
fn a_port_without_guest_offloads_gets_whole_frames_with_their_checksums() {
    let lab = Lab::start();
    let socket = lab.add_port_with("b", |guest| guest.guest_offloads = false);
    let mut a = lab.guest("a", with_offloads());
    assert!(with_offloads().connect(&socket).is_err(), "not offered");
    let mut b = Guest::builder()
        .features(SEND_TSO)
        .connect(&socket)
        .unwrap();
    b.send_frame(&frame(1, 2, 64, 1)).unwrap();
    receive(&mut a);
    let (packet, message) = forty_five();
    a.send(&message).unwrap();
    let mut payload = Vec::new();
    for _ in 0..45 {
        let segment = receive(&mut b);
        assert_eq!(segment.header[..2], [0, 0], "neither flags nor GSO type");
        payload.extend(judge(&segment.frame).unwrap().payload);
    }
    assert_eq!(payload, pattern(44 * 1400 + 7));
    // What it sends is left to others as before.
    let mut frame = packet.open();
    let (to, from) = frame[..12].split_at_mut(6);
    to.swap_with_slice(from);
    b.send(&[packet.header(1400), frame.clone()].concat())
        .unwrap();
    assert_eq!(receive(&mut a).frame, frame);
}

// CVE-2024-11614, CVE-2026-100236: fields of the header are checked against the frame.
#[test]
fn headers_that_contradict_their_frame_are_dropped() {
    let lab = Lab::start();
    let mut a = lab.guest("a", with_offloads().buffer_size(4096));
    let mut b = lab.guest("b", with_offloads());
    let segment = Packet::new(true, false, pattern(3000)).open();
    let frame_bytes = u16::try_from(segment.len()).unwrap();
    let bad = [
        header(NEEDS_CSUM, 0, 0, 0, (frame_bytes, 0)),
        header(NEEDS_CSUM, 0, 0, 0, (65_535, 65_535)),
        header(NEEDS_CSUM, 0, 0, 0, (34, frame_bytes - 34 - 1)),
        header(NEEDS_CSUM, 0, 0, 0, (13, 16)),
        header(NEEDS_CSUM, GSO_TCPV4, 54, 0, (34, 16)),
        header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, (35, 16)),
        header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, (34, 6)),
        header(NEEDS_CSUM, 4, 54, 1448, (34, 16)),
        header(0, GSO_TCPV4, 54, 1448, (34, 16)),
    ];
    for header in &bad {
        a.send(&[&header[..], &segment].concat()).unwrap();
    }
    // A header length that lies is replaced by the frame's own.
    let lie = header(NEEDS_CSUM, GSO_TCPV4, 65_535, 1448, (34, 16));
    a.send(&[lie, segment.clone()].concat()).unwrap();
    let received = receive(&mut b);
    assert_eq!(received.frame, segment);
    assert_eq!(received.header[2..4], 54_u16.to_le_bytes());
    lab.eventually_dropped("a", |c| c.rx_drops[DropReason::BadHeader], bad.len() as u64);
}

/// Receives the segments of a packet, all checksums complete.
fn assert_arrives(guest: &mut Guest, packet: &Packet) {
    let mut payload = Vec::new();
    while payload.len() < packet.payload.len() {
        payload.extend(judge(&receive(guest).frame).unwrap().payload);
    }
    assert!(payload == packet.payload, "the payload changed");
}

#[test]
fn a_frame_waits_for_room_for_all_of_its_segments() {
    for layout in [Layout::Split, Layout::Packed] {
        let lab = Lab::start();
        let (mut a, mut b) = sender_and_small_receiver(&lab, 128, layout);
        let (packet, message) = forty_five();
        for _ in 0..4 {
            a.send(&message).unwrap();
        }
        // Two of them fit; the others wait.
        eventually("the ring is full", || lab.counters("b").tx_gso_frames == 2);
        for _ in 0..4 {
            assert_arrives(&mut b, &packet);
        }
        lab.assert_conserved(&["a", "b"], 0);
        let counters = lab.counters("b");
        assert_eq!((counters.tx_gso_frames, counters.tx_gso_segments), (4, 180));
        assert_eq!(counters.tx_drops.total(), 0);
    }
}

#[test]
fn of_a_frame_too_long_for_the_ring_the_beginning_arrives_and_the_rest_is_counted() {
    for layout in [Layout::Split, Layout::Packed] {
        let lab = Lab::start();
        let (mut a, mut b) = sender_and_small_receiver(&lab, 16, layout);
        let (packet, message) = forty_five();
        a.send(&message).unwrap();
        lab.eventually_dropped("b", |c| c.tx_drops[DropReason::RingFull], 29);
        let mut payload = Vec::new();
        for _ in 0..16 {
            payload.extend(judge(&receive(&mut b).frame).unwrap().payload);
        }
        assert!(payload == packet.payload[..16 * 1400]);
        lab.assert_conserved(&["a", "b"], 0);
        let counters = lab.counters("b");
        assert_eq!((counters.tx_gso_frames, counters.tx_gso_segments), (1, 45));
        assert_eq!(counters.tx_frames, 16);
        // And on it goes.
        let marker = frame(2, 1, 64, 9);
        a.send_frame(&marker).unwrap();
        assert_eq!(receive(&mut b).frame, marker);
    }
}

#[test]
fn segments_that_no_mtu_needs_are_refused_by_reason() {
    let lab = Lab::start();
    let (mut a, mut b) = sender_and_small_receiver(&lab, 256, Layout::Split);
    let packet = Packet::new(true, false, pattern(60_000));
    a.send(&[packet.header(1), packet.open()].concat()).unwrap();
    lab.eventually_dropped("b", |c| c.tx_drops[DropReason::TooManySegments], 1);
    let mut lie = [packet.header(1000), packet.open()].concat();
    lie[NET_HEADER_BYTES + 17] ^= 1;
    a.send(&lie).unwrap();
    lab.eventually_dropped("b", |c| c.tx_drops[DropReason::OffloadUnsupported], 1);
    b.frontend().set_mtu(1000).unwrap();
    a.send(&[packet.header(1000), packet.open()].concat())
        .unwrap();
    lab.eventually_dropped("b", |c| c.tx_drops[DropReason::TooLong], 1);
    a.send(&[packet.header(960), packet.open()].concat())
        .unwrap();
    assert_arrives(&mut b, &packet);
    lab.assert_conserved(&["a", "b"], 0);
}

/// Adds a tap `rw0` of this thread's namespace, with an address.
fn add_tap(lab: &Lab, port: &str, offload: bool, address: &str) {
    lab.switch
        .add_port(name(port), tap("rw0", 1, offload))
        .unwrap();
    ip(&format!("addr add {address}/24 dev rw0"));
}

/// Sends `bytes` over TCP from a namespace to another through two taps, compares hashes, and
/// returns what arrived as frames.
fn transfer(offloads: [bool; 2], bytes: usize) -> Vec<Vec<u8>> {
    quiet_namespace();
    let lab = Lab::start();
    add_tap(&lab, "from", offloads[0], "10.0.0.1");
    let (ready, is_ready) = mpsc::channel();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            quiet_namespace();
            add_tap(&lab, "to", offloads[1], "10.0.0.2");
            let listener = TcpListener::bind("10.0.0.2:5000").unwrap();
            let capture = Raw::for_type("rw0", 0x0800);
            ready.send(()).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            let mut hash = DefaultHasher::new();
            let mut buffer = vec![0; 1 << 16];
            let mut received = 0;
            loop {
                let count = stream.read(&mut buffer).unwrap();
                if count == 0 {
                    break;
                }
                hash.write(&buffer[..count]);
                received += count;
            }
            assert_eq!(received, bytes);
            stream.write_all(&hash.finish().to_le_bytes()).unwrap();
            std::iter::from_fn(|| capture.try_receive()).collect::<Vec<_>>()
        });
        is_ready.recv().unwrap();
        let mut stream = TcpStream::connect("10.0.0.2:5000").unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut hash = DefaultHasher::new();
        let data = pattern(1 << 20);
        for from in (0..bytes).step_by(data.len()) {
            let part = &data[..data.len().min(bytes - from)];
            stream.write_all(part).unwrap();
            hash.write(part);
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut theirs = [0; 8];
        stream.read_exact(&mut theirs).unwrap();
        assert_eq!(u64::from_le_bytes(theirs), hash.finish());
        let frames = receiver.join().unwrap();
        lab.assert_conserved(&["from", "to"], 0);
        let cut = lab.counters("to").tx_gso_frames;
        assert_eq!(cut > 0, offloads == [true, false], "{cut} frames were cut");
        frames
    })
}

/// What needs root, which `--profile user` leaves out.
mod as_root {
    use super::*;

    #[test]
    fn tcp_between_taps_with_different_offloads_arrives_whole_in_frames_of_the_mtu() {
        for (offloads, bytes) in [
            ([true, false], 24 << 20),
            ([false, false], 4 << 20),
            ([false, true], 4 << 20),
        ] {
            let frames = transfer(offloads, bytes);
            assert!(frames.len() >= bytes / 1460, "{} frames", frames.len());
            for frame in frames {
                assert!(frame.len() <= 1514, "{offloads:?}: {} bytes", frame.len());
                let judged = judge(&frame).unwrap_or_else(|error| panic!("{offloads:?}: {error}"));
                assert!(judged.tcp.is_some());
            }
        }
    }
}

#[test]
fn what_is_done_to_headers_is_told_for_each_pair() {
    let lab = Lab::start();
    let guest = |port: &str, features| {
        let config = Guest::builder().features(features);
        lab.guest(port, config)
    };
    let _guests = [guest("all", ALL), guest("csum", CSUM), guest("none", 0)];
    let action = |from: &str, to: &str| {
        let detail = lab.switch.port(&name(from)).unwrap();
        let found = detail
            .actions
            .into_iter()
            .find(|action| action.to == name(to));
        found.map(|action| (action.action, action.done.join(" ")))
    };
    let segmentation = "tso4 tso6 ecn uso4 uso6";
    let everything = format!("checksum {segmentation}");
    let expected = [
        ("all", "csum", "segment", segmentation),
        ("all", "none", "segment_and_complete_checksum", &everything),
        ("csum", "all", "pass", ""),
        ("csum", "none", "complete_checksum", "checksum"),
        ("none", "all", "pass", ""),
        ("none", "csum", "pass", ""),
    ];
    for (from, to, what, done) in expected {
        assert_eq!(
            action(from, to),
            Some((what.to_owned(), done.to_owned())),
            "{from} to {to}"
        );
    }
    assert_eq!(action("all", "all"), None);
}
