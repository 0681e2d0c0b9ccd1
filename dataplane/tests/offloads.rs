//! Any port talks to any other, whatever each side negotiated: what arrives is parsed and summed by
//! etherparse. Taps need root and iproute2; each such test has network namespaces of its own.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc;

use common::packet::{Packet, complete, judge, pattern};
use common::{DEADLINE, Lab, eventually, frame, name, receive};
use ringway_bridge::DropReason;
use ringway_dataplane::driver::features::{
    TSO, USO, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_ECN,
};
use ringway_dataplane::driver::{Guest, GuestConfig, Layout, NET_HEADER_BYTES, Received};
use ringway_dataplane::{PortConfig, PortKind, QueuePairs};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const CSUM: u64 = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_GUEST_CSUM;
const ALL: u64 = TSO | USO | VIRTIO_NET_F_HOST_ECN | VIRTIO_NET_F_GUEST_ECN;

/// What a side negotiates.
const SETS: [u64; 3] = [ALL, CSUM, 0];

/// Segments that an MTU of 1,500 has room for, whatever the headers.
const GSO_SIZE: u16 = 1400;

/// What a guest that negotiated `set` may send, and for each what it carries.
fn messages(set: u64) -> Vec<(Packet, Vec<u8>)> {
    let mut messages = Vec::new();
    for (is_ipv4, is_udp) in [(true, false), (false, false), (true, true), (false, true)] {
        let small = Packet::new(is_ipv4, is_udp, pattern(1001));
        messages.push((
            small.clone(),
            [vec![0; NET_HEADER_BYTES], small.frame()].concat(),
        ));
        if set != 0 {
            messages.push((small.clone(), [small.header(0), small.open()].concat()));
        }
        if set == ALL {
            let bytes = if is_udp { 20_001 } else { 65_535 - 200 };
            let large = Packet {
                tags: 1,
                tcp_options: 3,
                fin: true,
                cwr: true,
                ..Packet::new(is_ipv4, is_udp, pattern(bytes))
            };
            messages.push((
                large.clone(),
                [large.header(GSO_SIZE), large.open()].concat(),
            ));
        }
    }
    messages
}

/// Kinds of buffers that a guest can receive into which negotiated `set`.
fn receivers(set: u64) -> Vec<GuestConfig> {
    let config = GuestConfig {
        features: set,
        ..GuestConfig::default()
    };
    let whole = if set == ALL { 65_700 } else { 1600 };
    vec![
        config.clone(),
        GuestConfig {
            layout: Layout::Packed,
            buffer_size: 1600,
            ..config.clone()
        },
        GuestConfig {
            mergeable: false,
            chained: true,
            buffer_size: whole,
            queue_size: 128,
            ..config.clone()
        },
        GuestConfig {
            layout: Layout::Packed,
            mergeable: false,
            buffer_size: whole,
            queue_size: 128,
            ..config
        },
    ]
}

/// Receives what a packet became for a guest that negotiated `set`, and judges it.
fn assert_arrives(guest: &mut Guest, packet: &Packet, set: u64, what: &str) {
    let mut payload = Vec::new();
    while payload.len() < packet.payload.len() {
        let Received {
            header, mut frame, ..
        } = receive(guest);
        let is_open = complete(&header, &mut frame);
        assert!(!is_open || set != 0, "{what}: an open checksum");
        assert!(header[1] == 0 || set == ALL, "{what}: a segmentation");
        assert!(
            set == ALL || frame.len() <= 1500,
            "{what}: {} bytes",
            frame.len()
        );
        if header[1] != 0 {
            // Whole, as it was sent.
            assert_eq!(frame.len(), packet.place().headers + packet.payload.len());
        }
        let judged = judge(&frame).unwrap_or_else(|error| panic!("{what}: {error}"));
        payload.extend(judged.payload);
    }
    assert!(payload == packet.payload, "{what}: the payload changed");
}

#[test]
fn guests_with_any_offloads_exchange_any_frames() {
    for from in SETS {
        for to in SETS {
            for (kind, receiver) in receivers(to).into_iter().enumerate() {
                let lab = Lab::start();
                let sender = GuestConfig {
                    features: from,
                    buffer_size: if kind % 2 == 0 { 65_700 } else { 2048 },
                    ..GuestConfig::default()
                };
                let mut a = lab.guest("a", sender);
                let mut b = lab.guest("b", receiver);
                for (packet, message) in messages(from) {
                    a.send(&message).unwrap();
                    let what = format!("{from:#x} to {to:#x}, kind {kind}, {:?}", packet.place());
                    assert_arrives(&mut b, &packet, to, &what);
                }
                lab.assert_conserved(&["a", "b"], 0);
                let counters = lab.counters("b");
                assert_eq!(counters.tx_drops.total(), 0);
                let large = if from == ALL { 4 } else { 0 };
                let open = if from == 0 { 0 } else { 4 };
                let (cut, completed) = match to {
                    ALL => (0, 0),
                    CSUM => (large, 0),
                    _ => (large, open),
                };
                assert_eq!((counters.tx_cut, counters.tx_completed), (cut, completed));
            }
        }
    }
}

#[test]
fn flooded_frames_suit_each_destination() {
    let lab = Lab::start();
    let guest = |port: &str, features| {
        let config = GuestConfig {
            features,
            ..GuestConfig::default()
        };
        lab.guest(port, config)
    };
    let mut a = guest("a", ALL);
    let mut others = SETS.map(|set| (guest(&format!("to-{set:x}"), set), set));
    for _ in 0..3 {
        for (packet, message) in messages(ALL) {
            a.send(&message).unwrap();
            for (other, set) in &mut others {
                assert_arrives(other, &packet, *set, &format!("to {set:#x}"));
            }
        }
    }
    let ports = ["a", &format!("to-{ALL:x}"), &format!("to-{CSUM:x}"), "to-0"];
    let sent = 3 * messages(ALL).len() as u64;
    lab.assert_conserved(&ports, 2 * sent);
}

/// A TCP packet that becomes 45 segments.
fn forty_five() -> (Packet, Vec<u8>) {
    let packet = Packet::new(true, false, pattern(44 * 1400 + 7));
    let message = [packet.header(1400), packet.open()].concat();
    (packet, message)
}

fn sender_and_small_receiver(lab: &Lab, queue_size: u16, layout: Layout) -> (Guest, Guest) {
    let sender = GuestConfig {
        features: TSO,
        ..GuestConfig::default()
    };
    let receiver = GuestConfig {
        queue_size,
        layout,
        ..GuestConfig::default()
    };
    let mut a = lab.guest("a", sender);
    let mut b = lab.guest("b", receiver);
    b.send_frame(&frame(1, 2, 64, 1)).unwrap();
    receive(&mut a);
    (a, b)
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
        eventually("the ring is full", || lab.counters("b").tx_cut == 2);
        for _ in 0..4 {
            assert_arrives(&mut b, &packet, 0, "waited");
        }
        lab.assert_conserved(&["a", "b"], 0);
        let counters = lab.counters("b");
        assert_eq!((counters.tx_cut, counters.tx_segments), (4, 180));
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
        assert_eq!((counters.tx_cut, counters.tx_segments), (1, 45));
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
    assert_arrives(&mut b, &packet, 0, "within the MTU");
    lab.assert_conserved(&["a", "b"], 0);
}

/// Moves this thread into a fresh network namespace.
fn fresh_namespace() {
    // SAFETY: only the network namespace changes; nothing else in the process depends on it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace: run as root");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Adds a tap `rw0` of this thread's namespace, with an address, and without IPv6's own traffic.
fn add_tap(lab: &Lab, port: &str, offload: bool, address: &str) {
    let kind = PortKind::Tap {
        ifname: "rw0".to_owned(),
        queue_pairs: QueuePairs::new(1).unwrap(),
        persist: false,
        offload,
    };
    let path = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    // Of this thread's namespace; absent if the kernel has no IPv6.
    let _ = std::fs::write(path, "1");
    let config = PortConfig {
        kind,
        mtu: None,
        fdb_limit: None,
        pins: std::collections::BTreeMap::new(),
    };
    lab.switch.add_port(name(port), config).unwrap();
    ip(&format!("addr add {address}/24 dev rw0"));
}

/// A packet socket that sees what arrives at `rw0`, and keeps it until it is asked.
struct Capture(OwnedFd);

impl Capture {
    fn start() -> Self {
        // SAFETY: a C string.
        let index = unsafe { libc::if_nametoindex(c"rw0".as_ptr()) };
        let protocol = u16::to_be(u16::try_from(libc::ETH_P_ALL).unwrap());
        // SAFETY: no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol.into(),
            )
        };
        assert!(fd >= 0, "a packet socket: run as root");
        // SAFETY: nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 512 << 20);
        // SAFETY: all zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index).unwrap();
        let bytes = u32::try_from(size_of_val(&address)).unwrap();
        // SAFETY: the address is valid for its length.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), bytes) };
        assert_eq!(bound, 0);
        Self(socket)
    }

    /// The frames of TCP and UDP that arrived, not those that this side sent.
    fn arrived(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            // SAFETY: all zeros are valid.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut bytes = u32::try_from(size_of_val(&from)).unwrap();
            // SAFETY: buffer and address are valid for their lengths.
            let count = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut bytes,
                )
            };
            let Ok(count) = usize::try_from(count) else {
                return frames;
            };
            let is_ours = u16::from_be(from.sll_protocol) == 0x0800;
            if from.sll_pkttype == libc::PACKET_HOST && is_ours {
                frames.push(buffer[..count].to_vec());
            }
        }
    }
}

fn set_option(socket: &impl AsRawFd, level: i32, option: i32, value: i32) {
    let bytes = u32::try_from(size_of_val(&value)).unwrap();
    // SAFETY: the value is valid for its length.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            bytes,
        )
    };
    assert_eq!(
        set,
        0,
        "option {option}: {}",
        std::io::Error::last_os_error()
    );
}

fn mac_of_rw0() -> [u8; 6] {
    let output = Command::new("ip")
        .args(["-br", "link", "show", "rw0"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac: ringway_bridge::MacAddr = text.split_whitespace().nth(2).unwrap().parse().unwrap();
    mac.0
}

#[test]
fn taps_with_and_without_offloads_take_what_guests_send() {
    for offload in [true, false] {
        for set in SETS {
            fresh_namespace();
            let lab = Lab::start();
            add_tap(&lab, "host", offload, "10.0.0.2");
            let config = GuestConfig {
                features: set,
                ..GuestConfig::default()
            };
            let mut guest = lab.guest("vm", config);
            let capture = Capture::start();
            let stations = [[0x52, 0x54, 0, 0, 0, 1], mac_of_rw0()];
            let mut sent = Vec::new();
            for (packet, _) in messages(set) {
                // What the capture sees of a tagged frame is not what came.
                let packet = Packet {
                    stations,
                    tags: 0,
                    ..packet
                };
                if !packet.is_ipv4 {
                    continue;
                }
                let gso_size = if packet.payload.len() > 1500 {
                    GSO_SIZE
                } else {
                    0
                };
                let message = match set {
                    0 => [vec![0; NET_HEADER_BYTES], packet.frame()].concat(),
                    _ => [packet.header(gso_size), packet.open()].concat(),
                };
                guest.send(&message).unwrap();
                sent.extend(packet.payload);
            }
            let mut payload = Vec::new();
            eventually("all arrives", || {
                for frame in capture.arrived() {
                    // The kernel shows packet sockets a checksum that it was left as open.
                    let judged = if offload && set != 0 {
                        etherparse::PacketHeaders::from_ethernet_slice(&frame)
                            .map(|parsed| parsed.payload.slice().to_vec())
                            .map_err(|error| error.to_string())
                    } else {
                        judge(&frame).map(|judged| judged.payload)
                    };
                    assert!(offload || frame.len() <= 1514, "{} bytes", frame.len());
                    payload.extend(judged.unwrap());
                }
                payload.len() >= sent.len()
            });
            assert!(
                payload == sent,
                "offload {offload}, {set:#x}: the payload changed"
            );
            lab.assert_conserved(&["host", "vm"], 0);
            let counters = lab.counters("host");
            assert_eq!(counters.tx_cut > 0, !offload && set == ALL);
            assert_eq!(counters.tx_completed > 0, !offload && set != 0);
        }
    }
}

#[test]
fn guests_with_any_offloads_take_what_taps_give() {
    /// Of linux/udp.h: bytes of a segment.
    const UDP_SEGMENT: i32 = 103;
    for offload in [true, false] {
        for set in SETS {
            fresh_namespace();
            let lab = Lab::start();
            add_tap(&lab, "host", offload, "10.0.0.1");
            ip("neigh add 10.0.0.2 lladdr 52:54:00:00:00:02 dev rw0");
            let config = GuestConfig {
                features: set,
                ..GuestConfig::default()
            };
            let mut guest = lab.guest("vm", config);
            let socket = UdpSocket::bind("10.0.0.1:7001").unwrap();
            let segment = i32::from(GSO_SIZE);
            set_option(&socket, libc::SOL_UDP, UDP_SEGMENT, segment);
            let sent = pattern(10 * usize::from(GSO_SIZE) + 5);
            socket.send_to(&sent, "10.0.0.2:7000").unwrap();
            let mut payload = Vec::new();
            let mut most = 0;
            while payload.len() < sent.len() {
                let Received {
                    header, mut frame, ..
                } = receive(&mut guest);
                let is_open = complete(&header, &mut frame);
                assert!(!is_open || set != 0);
                // Its own announcements aside.
                if let Ok(judged) = judge(&frame)
                    && judged.udp.is_some_and(|udp| udp.destination_port == 7000)
                {
                    most = most.max(frame.len());
                    payload.extend(judged.payload);
                }
            }
            assert!(
                payload == sent,
                "offload {offload}, {set:#x}: the payload changed"
            );
            assert_eq!(most > 1514, offload && set == ALL, "{most} bytes");
        }
    }
}

/// Sends `bytes` over TCP from a namespace to another through two taps, compares hashes, and
/// returns what arrived as frames.
fn transfer(offloads: [bool; 2], bytes: usize) -> Vec<Vec<u8>> {
    fresh_namespace();
    let lab = Lab::start();
    add_tap(&lab, "from", offloads[0], "10.0.0.1");
    let (ready, is_ready) = mpsc::channel();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            fresh_namespace();
            add_tap(&lab, "to", offloads[1], "10.0.0.2");
            let listener = TcpListener::bind("10.0.0.2:5000").unwrap();
            let capture = Capture::start();
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
            capture.arrived()
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
        let cut = lab.counters("to").tx_cut;
        assert_eq!(cut > 0, offloads == [true, false], "{cut} frames were cut");
        frames
    })
}

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

#[test]
fn what_is_done_to_headers_is_told_for_each_pair() {
    let lab = Lab::start();
    let guest = |port: &str, features| {
        let config = GuestConfig {
            features,
            ..GuestConfig::default()
        };
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
            Some((what, done.to_owned())),
            "{from} to {to}"
        );
    }
    assert_eq!(action("all", "all"), None);
}
