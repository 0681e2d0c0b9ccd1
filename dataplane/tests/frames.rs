//! What comes out is what came in: a Linux bridge as oracle, and frames that a kernel hands over in
//! another shape than a wire would. Each test in a network namespace of its own; needs root and
//! iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::process::{Child, Command};

use common::host::{Raw, ip, quiet_namespace, veth, veth_named};
use common::packet::{Packet, judge, pattern};
use common::{Lab, af_xdp, eventually, frame, lab_with_nic, mac, name, receive};
use ringway_api::XdpMode;
use ringway_guest::Guest;

/// All frames of an interface.
fn all_of(ifname: &str) -> Raw {
    Raw::for_type(ifname, u16::try_from(libc::ETH_P_ALL).unwrap())
}

/// A bridge with these interfaces, which forwards and sends nothing of its own.
fn bridge(ports: &[&str]) {
    ip("link add br0 type bridge stp_state 0");
    for port in ports {
        ip(&format!("link set {port} master br0"));
    }
    for protocol in ["ip", "ip6", "arp"] {
        // Of this thread's namespace: netfilter drops IP packets that it finds broken.
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{protocol}tables");
        let _ = std::fs::write(path, "0");
    }
    ip("link set br0 up");
}

/// A frame with service tag and customer tag, as many of them as said.
fn tagged(tags: usize, frame: &[u8]) -> Vec<u8> {
    const TAGS: [[u8; 4]; 2] = [[0x88, 0xa8, 0x20, 100], [0x81, 0, 0xe0, 7]];
    let tags = TAGS[2 - tags..].concat();
    [&frame[..12], &tags, &frame[12..]].concat()
}

/// What follows the addresses of frames of many kinds, from the EtherType or length on.
fn kinds() -> Vec<(&'static str, Vec<u8>)> {
    let ipv4 = |protocol: u8, fragment: u16| {
        let [high, low] = fragment.to_be_bytes();
        [
            &[8, 0, 0x46, 0, 0, 60, 0, 1, high, low, 64, protocol, 0, 0][..],
            &[10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1],
        ]
        .concat()
    };
    let ipv6 = |next: u8, extensions: &[u8]| {
        let fixed = [0x86, 0xdd, 0x60, 0, 0, 0, 0, 40, next, 64];
        [&fixed[..], &[0xfe; 16], &[0xfd; 16], extensions].concat()
    };
    vec![
        ("IPv4 with options, TCP", ipv4(6, 0x4000)),
        ("IPv4, first fragment", ipv4(17, 0x2000)),
        ("IPv4, last fragment", ipv4(17, 0x0010)),
        ("IPv4, SCTP", ipv4(132, 0)),
        (
            "IPv4, UDP port of VXLAN",
            [ipv4(17, 0), vec![0x12, 0xb5, 0x12, 0xb5]].concat(),
        ),
        (
            "IPv6, hop-by-hop options",
            ipv6(0, &[60, 0, 1, 4, 0, 0, 0, 0, 6, 0, 1, 4, 0, 0, 0, 0]),
        ),
        ("IPv6, fragment", ipv6(44, &[17, 0, 0, 1, 0, 0, 0, 9])),
        ("IPv6, no next header", ipv6(59, &[])),
        (
            "IPv4 that lies about its length",
            vec![8, 0, 0x4f, 0, 0xff, 0xff],
        ),
        ("ARP", vec![8, 6, 0, 1, 8, 0, 6, 4, 0, 1]),
        ("MPLS", vec![0x88, 0x47, 0, 1, 0x41, 64]),
        ("LLDP's EtherType", vec![0x88, 0xcc, 2, 7, 4]),
        ("PPPoE", vec![0x88, 0x64, 0x11, 0, 0, 1]),
        (
            "802.3 with LLC, BPDU",
            vec![0, 38, 0x42, 0x42, 3, 0, 0, 0, 0, 0],
        ),
        ("802.3 with SNAP", vec![0, 38, 0xaa, 0xaa, 3, 0, 0, 0, 8, 0]),
        ("of no known EtherType", vec![0xff, 0xff]),
    ]
}

/// Where the frames go: stations, groups, and all reserved addresses (IEEE 802.1Q, table 8-1).
fn destinations() -> Vec<[u8; 6]> {
    let reserved = (0..=0x10).chain([0x20, 0x21]);
    let reserved = reserved.map(|last| [0x01, 0x80, 0xc2, 0, 0, last]);
    let others = [
        mac(2),
        [0xff; 6],
        [0x33, 0x33, 0, 0, 0, 1],
        [1, 0, 0x5e, 0, 0, 1],
        [0; 6],
    ];
    others.into_iter().chain(reserved).collect()
}

/// Frames of all kinds in all lengths to one station, and of one kind to all others.
fn frames() -> Vec<(String, Vec<u8>)> {
    let filled = |to: [u8; 6], from: [u8; 6], kind: &[u8], bytes: usize| {
        let mut frame = [&to[..], &from, kind, &pattern(9100)].concat();
        frame.truncate(bytes);
        frame
    };
    let mut all = Vec::new();
    for tags in 0..=2 {
        for (what, kind) in kinds() {
            for bytes in (14..=80).chain([128, 576, 1513, 1514, 1518, 1522, 9014, 9018]) {
                let frame = tagged(tags, &filled(mac(2), mac(1), &kind, bytes));
                all.push((format!("{what}, {tags} tags, {bytes} bytes"), frame));
            }
        }
        for to in destinations() {
            let frame = tagged(tags, &filled(to, mac(1), &kinds()[13].1, 60));
            all.push((format!("to {to:x?}, {tags} tags"), frame));
        }
        for from in [[0; 6], [0xff; 6], [0x03, 0, 0, 0, 0, 1]] {
            let frame = tagged(tags, &filled(mac(2), from, &[0xff, 0xff], 60));
            all.push((format!("from {from:x?}, {tags} tags"), frame));
        }
    }
    all
}

/// What came up to a marker, of the sender's: kernels send frames of their own.
fn up_to(marker: &[u8], sent: &[u8], mut receive: impl FnMut() -> Vec<u8>) -> Vec<Vec<u8>> {
    let next = std::iter::from_fn(|| Some(receive()).filter(|frame| frame != marker));
    next.filter(|frame| [&sent[6..12], &marker[6..12]].contains(&&frame[6..12]))
        .collect()
}

/// Whether a frame ends within a header that the kernel wants whole, though it forwards by the
/// addresses alone; the switch does not ask for more. It is a tag and two bytes behind it, since the
/// kernel moves the tag out of the frame (net/core/skbuff.c, skb_vlan_untag), or PPPoE's where
/// bridges call netfilter (net/bridge/br_netfilter_hooks.c, br_nf_pre_routing).
fn is_cut_within_its_header(frame: &[u8]) -> bool {
    let is_tagged = matches!(frame[12..14], [0x81, 0] | [0x88, 0xa8]);
    let at = if is_tagged { 16 } else { 12 };
    let behind = frame.get(at..).unwrap_or_default();
    is_tagged && behind.len() < 4 || behind.starts_with(&[0x88, 0x64]) && behind.len() < 2 + 8
}

#[test]
fn frames_of_every_kind_come_out_as_out_of_a_linux_bridge() {
    quiet_namespace();
    veth_named(["from0", "in0"], 1, 9100);
    veth_named(["out0", "to0"], 1, 9100);
    bridge(&["in0", "out0"]);
    let (from, to) = (all_of("from0"), all_of("to0"));
    let lab = Lab::start();
    let mut a = lab.guest("a", Guest::builder());
    let mut b = lab.guest("b", Guest::builder());
    let (mut same, mut differences) = (0, Vec::new());
    for (seed, (what, sent)) in (0..).zip(frames()) {
        let marker = frame(0xff, 1, 60, seed);
        for frame in [&sent, &marker] {
            from.send(frame);
            a.send_frame(frame).unwrap();
        }
        let expected = up_to(&marker, &sent, || to.receive());
        let came = up_to(&marker, &sent, || receive(&mut b).frame);
        if is_cut_within_its_header(&sent) && expected.is_empty() {
            assert!(came == [sent], "{what}");
        } else {
            if came != expected {
                let lengths = |frames: &[Vec<u8>]| frames.iter().map(Vec::len).collect::<Vec<_>>();
                let lengths = (lengths(&came), lengths(&expected));
                differences.push(format!("{what}: {lengths:?}"));
            }
            same += came.len();
        }
    }
    assert!(differences.is_empty(), "{differences:#?}");
    assert!(same > 3000, "{same} frames came out");
}

/// A bridge, as any interface of the kernel's, hands a veth the tag beside the frame.
#[test]
fn a_tag_beside_its_frame_arrives_in_the_frame() {
    for mode in [XdpMode::Copy, XdpMode::Skb] {
        let (lab, _) = lab_with_nic(1, 1500, |nic| nic.mode = mode);
        let mut guest = lab.guest("vm", Guest::builder());
        veth_named(["from0", "in0"], 1, 1500);
        bridge(&["in0", "far0"]);
        let from = all_of("from0");
        for (seed, bytes) in (0..).zip([60, 64, 1514]) {
            for tags in [0, 1, 2] {
                let sent = tagged(tags, &frame(1, 2, bytes, seed));
                // The kernel's packet sockets send one tag beyond the MTU.
                if sent.len() <= 1518 {
                    from.send(&sent);
                    let ours = |frame: &Vec<u8>| frame[6..12] == mac(2);
                    let came = std::iter::from_fn(|| Some(receive(&mut guest).frame)).find(ours);
                    assert!(
                        came.as_ref() == Some(&sent),
                        "{tags} tags, {mode:?}: {came:x?}"
                    );
                }
            }
        }
    }
}

/// A process with a network namespace of its own.
struct Elsewhere(Child);

impl Elsewhere {
    fn start() -> Self {
        let sleep = Command::new("unshare").args(["-n", "sleep", "100"]).spawn();
        let elsewhere = Self(sleep.unwrap());
        let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let here = of("thread-self");
        let pid = elsewhere.0.id().to_string();
        eventually("a namespace", || {
            of(&pid).is_some_and(|there| Some(there) != here)
        });
        elsewhere
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_mode_that_would_lose_tags_is_refused() {
    quiet_namespace();
    veth(1, 1500);
    let elsewhere = Elsewhere::start();
    ip(&format!("link set far0 netns {}", elsewhere.0.id()));
    let lab = Lab::start();
    let mode = |mode| af_xdp(|nic| nic.mode = mode);
    let error = lab
        .switch
        .add_port(name("nic"), mode(XdpMode::Skb))
        .unwrap_err();
    assert!(error.to_string().contains("lose VLAN tags"), "{error}");
    assert!(error.hint().contains("--mode copy"), "{}", error.hint());
    lab.switch
        .add_port(name("nic"), mode(XdpMode::Auto))
        .unwrap();
}

/// Generic XDP comes after the far end's stack, which leaves frames uncut for a veth.
#[test]
fn what_a_veths_far_end_would_leave_uncut_arrives_in_segments() {
    for is_ipv4 in [true, false] {
        let (lab, _) = lab_with_nic(1, 1500, |nic| {
            nic.mode = XdpMode::Skb;
            nic.gro = false;
        });
        let mut guest = lab.guest("vm", Guest::builder());
        let far = Raw::with_headers("far0");
        let packet = Packet::new(is_ipv4, false, pattern(20_000));
        far.send(&[&packet.header(1400)[..10], &packet.open()].concat());
        let mut payload = Vec::new();
        while payload.len() < packet.payload.len() {
            let received = receive(&mut guest);
            let mut segment = received.frame;
            common::packet::complete(&received.header, &mut segment);
            if segment[6..12] == packet.stations[0] {
                payload.extend(judge(&segment).unwrap().payload);
            }
        }
        assert!(payload == packet.payload, "IPv4: {is_ipv4}");
    }
}
