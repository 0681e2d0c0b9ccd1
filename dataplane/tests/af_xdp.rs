//! AF_XDP ports on veth pairs, each test in a network namespace of its own. Needs root and
//! iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use common::packet::{Packet, judge, pattern};
use common::veth::{Raw, fresh_namespace, ip, veth};
use common::{Lab, eventually, frame, mac, name, receive};
use etherparse::PacketBuilder;
use ringway_bridge::DropReason;
use ringway_dataplane::driver::features::{TSO, USO};
use ringway_dataplane::driver::{Guest, GuestConfig, NET_HEADER_BYTES};
use ringway_dataplane::{
    AfXdpConfig, AfXdpInfo, PortConfig, PortKind, PortState, QueuePairs, SwitchError, UmemFrames,
    XdpMode,
};

/// Both modes that veth has.
const MODES: [XdpMode; 2] = [XdpMode::Copy, XdpMode::Skb];

fn af_xdp(change: impl FnOnce(&mut AfXdpConfig)) -> PortConfig {
    let mut config = AfXdpConfig {
        ifname: "xdp0".into(),
        queue_pairs: None,
        mode: XdpMode::Auto,
        umem_frames: UmemFrames::DEFAULT,
        busy_poll: None,
    };
    change(&mut config);
    PortConfig {
        kind: PortKind::AfXdp(config),
        mtu: None,
        fdb_limit: None,
        pins: BTreeMap::new(),
    }
}

/// A lab whose port `nic` is one end of a veth pair; a raw socket has the other.
fn lab_with_nic(queues: u16, mtu: u32, change: impl FnOnce(&mut AfXdpConfig)) -> (Lab, Raw) {
    fresh_namespace();
    veth(queues, mtu);
    let lab = Lab::start();
    lab.switch.add_port(name("nic"), af_xdp(change)).unwrap();
    (lab, Raw::open("far0"))
}

fn info(lab: &Lab) -> AfXdpInfo {
    lab.switch.port(&name("nic")).unwrap().af_xdp.unwrap()
}

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
        let mut guest = lab.guest("vm", GuestConfig::default());
        introduce(&mut guest, &far);
        assert_eq!(info(&lab).mode, mode);
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
        let mut guest = lab.guest("vm", GuestConfig::default());
        introduce(&mut guest, &far);
        assert!(info(&lab).multi_buffer);
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

#[test]
fn bursts_of_jumbo_frames_arrive_whole_and_in_order() {
    let (lab, far) = lab_with_nic(1, 9000, |_| {});
    let mut guest = lab.guest("vm", GuestConfig::default());
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
    let config = GuestConfig {
        queue_pairs: 2,
        ..GuestConfig::default()
    };
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
    let (lab, _) = lab_with_nic(2, 1500, |nic| nic.queue_pairs = QueuePairs::new(1));
    let mut guest = lab.guest("vm", GuestConfig::default());
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
    let config = GuestConfig {
        queue_size: 16,
        ..GuestConfig::default()
    };
    let mut guest = lab.guest("vm", config);
    introduce(&mut guest, &far);
    const COUNT: u64 = 500;
    for seed in 0..COUNT {
        far.send(&frame(1, 2, 60, seed));
    }
    let lost = || {
        let queue = info(&lab).queues[0];
        queue.rx_ring_full + queue.rx_fill_empty + queue.rx_dropped
    };
    eventually("the kernel has nowhere to put frames", || lost() > 0);
    let waiting = info(&lab).queues[0];
    assert!(
        waiting.rx_level > 0 && waiting.rx_level <= 64,
        "{waiting:?}"
    );
    // What found a place arrives, in order.
    let mut next = 0;
    while let Some(received) = guest.recv(Duration::from_millis(200)).unwrap() {
        assert_eq!(received.frame, frame(1, 2, 60, next));
        next += 1;
    }
    assert!((64..COUNT).contains(&next), "{next} frames");
    eventually("every chunk is in the fill ring again", || {
        let queue = info(&lab).queues[0];
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
fn chunks_to_send_from_are_used_again_and_again() {
    for mode in MODES {
        let (lab, far) = lab_with_nic(1, 9000, |nic| {
            nic.mode = mode;
            nic.umem_frames = UmemFrames::new(128).unwrap();
        });
        let mut guest = lab.guest("vm", GuestConfig::default());
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
            let queue = info(&lab).queues[0];
            (queue.tx_level, queue.tx_pending) == (0, 0)
        });
        lab.assert_conserved(&["nic", "vm"], 0);
    }
}

#[test]
fn a_sleeping_worker_wakes_for_each_frame() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut guest = lab.guest("vm", GuestConfig::default());
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
        nic.busy_poll = Some(Duration::from_micros(20));
    });
    let mut guest = lab.guest("vm", GuestConfig::default());
    introduce(&mut guest, &far);
    for seed in 0..100 {
        let sent = frame(1, 2, 60, seed);
        far.send(&sent);
        assert_eq!(receive(&mut guest).frame, sent);
    }
}

// The wire has no header to leave anything undone in.
#[test]
fn what_a_guest_left_to_the_device_is_done_before_the_wire() {
    const GSO_SIZE: u16 = 1400;
    for mode in MODES {
        let (lab, far) = lab_with_nic(1, 1500, |config| config.mode = mode);
        let config = GuestConfig {
            features: TSO | USO,
            ..GuestConfig::default()
        };
        let mut guest = lab.guest("vm", config);
        introduce(&mut guest, &far);
        for (is_ipv4, is_udp) in [(true, false), (false, false), (true, true), (false, true)] {
            let far = Raw::for_type("far0", if is_ipv4 { 0x0800 } else { 0x86dd });
            for (bytes, gso_size) in [(1001, 0), (20_001, GSO_SIZE), (65_000, GSO_SIZE)] {
                let packet = Packet::new(is_ipv4, is_udp, pattern(bytes));
                let message = [packet.header(gso_size), packet.open()].concat();
                guest.send(&message).unwrap();
                let mut payload = Vec::new();
                while payload.len() < bytes {
                    let arrived = far.receive();
                    // The interface's own host says a word too.
                    if arrived[6..12] == mac(1) {
                        assert!(arrived.len() <= 1514, "{} bytes", arrived.len());
                        payload.extend(judge(&arrived).unwrap().payload);
                    }
                }
                assert!(payload == packet.payload, "{mode:?}: the payload changed");
            }
        }
        assert_eq!(lab.counters("nic").tx_cut, 8);
    }
}

#[test]
fn frames_longer_than_the_interfaces_mtu_are_dropped_and_counted() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let mut guest = lab.guest("vm", GuestConfig::default());
    introduce(&mut guest, &far);
    guest.send_frame(&frame(2, 1, 1519, 1)).unwrap();
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
    let program = info(&lab).program_id;
    for _ in 0..20 {
        lab.switch.remove_port(&name("nic")).unwrap();
        let sent = frame(1, 2, 60, 2);
        far.send(&sent);
        assert_eq!(host.receive(), sent);
        lab.switch.add_port(name("nic"), af_xdp(|_| {})).unwrap();
        assert_ne!(info(&lab).program_id, program);
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
    let mut a = lab.guest("a", GuestConfig::default());
    let mut b = lab.guest("b", GuestConfig::default());
    introduce(&mut a, &far);
    let state = || lab.switch.port(&name("nic")).unwrap().info.state;
    assert_eq!(state(), PortState::Up);
    let drops = || lab.counters("nic").tx_drops[DropReason::HostError];
    let mut flood = |seed| {
        let sent = frame(0xff, 1, 64, seed);
        a.send_frame(&sent).unwrap();
        while receive(&mut b).frame != sent {}
        sent
    };
    ip("link set xdp0 down");
    assert_eq!(state(), PortState::Down);
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
    assert_eq!(state(), PortState::Down);
    let before = drops();
    let mut seed = 2000;
    while drops() == before {
        flood(seed);
        seed += 1;
    }
    lab.switch.remove_port(&name("nic")).unwrap();
}

/// Why a port is refused, and the hint.
fn refusal(lab: &Lab, config: PortConfig) -> (String, String) {
    let before = lab.switch.ports().len();
    let error = lab.switch.add_port(name("refused"), config).unwrap_err();
    assert!(matches!(error, SwitchError::AfXdp { .. }), "{error}");
    assert_eq!(lab.switch.ports().len(), before, "nothing is half-created");
    let (text, hint) = (error.to_string(), error.hint());
    assert!(!text.contains('\n') && !hint.contains('\n') && !hint.is_empty());
    (text, hint)
}

#[test]
fn interfaces_that_can_not_do_it_are_refused_with_reason_and_remedy() {
    fresh_namespace();
    veth(2, 1500);
    ip("link add off0 type veth peer name off1");
    // Its driver knows nothing of XDP.
    ip("link set lo mtu 1500 up");
    ip("link add jumbo0 mtu 9001 type veth peer name jumbo1");
    ip("link set jumbo0 up");
    let lab = Lab::start();
    let on = |ifname: &str, mode| {
        af_xdp(|nic| {
            nic.ifname = ifname.into();
            nic.mode = mode;
        })
    };
    let cases = [
        (on("none0", XdpMode::Auto), "no such interface", "ip link"),
        (on("off0", XdpMode::Auto), "is down", "ip link set off0 up"),
        (
            on("lo", XdpMode::Copy),
            "can't run XDP programs",
            "--mode skb",
        ),
        (on("xdp0", XdpMode::ZeroCopy), "no zero-copy", "--mode copy"),
        (on("jumbo0", XdpMode::Auto), "MTU of 9001", "mtu 9000"),
        (
            af_xdp(|nic| nic.queue_pairs = QueuePairs::new(3)),
            "3 queues are asked for, and it has 2",
            "ethtool -L",
        ),
    ];
    for (config, reason, remedy) in cases {
        let (text, hint) = refusal(&lab, config.clone());
        assert!(text.contains(reason), "{config:?}: {text}");
        assert!(hint.contains(remedy), "{config:?}: {hint}");
    }
    let mut config = on("xdp0", XdpMode::Auto);
    config.mtu = Some(9001);
    assert!(refusal(&lab, config).0.contains("MTU of 9001"));
    // A driver without XDP serves all the same when the mode is left open.
    lab.switch
        .add_port(name("lo"), on("lo", XdpMode::Auto))
        .unwrap();
    let detail = lab.switch.port(&name("lo")).unwrap();
    assert_eq!(detail.af_xdp.unwrap().mode, XdpMode::Skb);
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

#[test]
fn an_interface_with_a_program_is_refused_with_its_id() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let id = info(&lab).program_id;
    for mode in MODES {
        let (text, hint) = refusal(&lab, af_xdp(|nic| nic.mode = mode));
        assert!(
            text.contains(&format!("has an XDP program already, with id {id}")),
            "{text}"
        );
        assert!(
            hint.contains(&format!("bpftool prog show id {id}")),
            "{hint}"
        );
    }
    far.send(&frame(1, 2, 60, 1));
    eventually("the first port works on", || {
        lab.counters("nic").rx_frames == 1
    });
}

#[test]
fn too_little_memory_that_may_be_locked_is_told() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    fresh_namespace();
    veth(1, 1500);
    let lab = Lab::start();
    let limit = getrlimit(Resource::Memlock);
    let low = Rlimit {
        current: Some(64 << 10),
        ..limit
    };
    setrlimit(Resource::Memlock, low).unwrap();
    // Of this thread only; with it the limit would not count.
    let all = capabilities(None).unwrap();
    let mut fewer = all;
    fewer.effective.remove(CapabilitySet::IPC_LOCK);
    set_capabilities(None, fewer).unwrap();
    let (text, hint) = refusal(&lab, af_xdp(|_| {}));
    assert!(text.contains("not enough memory may be locked"), "{text}");
    assert!(
        hint.contains("ulimit -l") && hint.contains("--umem-frames"),
        "{hint}"
    );
    set_capabilities(None, all).unwrap();
    lab.switch.add_port(name("nic"), af_xdp(|_| {})).unwrap();
    setrlimit(Resource::Memlock, limit).unwrap();
}

#[test]
fn what_needs_privileges_is_told() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    fresh_namespace();
    veth(1, 1500);
    let lab = Lab::start();
    let all = capabilities(None).unwrap();
    for missing in [
        CapabilitySet::NET_RAW,
        CapabilitySet::NET_ADMIN,
        CapabilitySet::BPF,
    ] {
        let mut fewer = all;
        fewer.effective.remove(missing | CapabilitySet::SYS_ADMIN);
        set_capabilities(None, fewer).unwrap();
        let (text, hint) = refusal(&lab, af_xdp(|_| {}));
        assert!(text.contains("not permitted"), "{missing:?}: {text}");
        assert!(
            hint.contains("CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF"),
            "{hint}"
        );
        set_capabilities(None, all).unwrap();
    }
    // What the hint names is enough.
    let mut named = all;
    named.effective = CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW | CapabilitySet::BPF;
    set_capabilities(None, named).unwrap();
    let config = af_xdp(|nic| nic.umem_frames = UmemFrames::new(128).unwrap());
    lab.switch.add_port(name("nic"), config).unwrap();
    set_capabilities(None, all).unwrap();
}

#[test]
fn a_queue_that_another_socket_has_is_refused() {
    let (lab, _) = lab_with_nic(1, 1500, |_| {});
    // A bare socket without a program, on the interface's other end.
    let _other = bare_socket("far0");
    let (text, hint) = refusal(&lab, af_xdp(|nic| nic.ifname = "far0".into()));
    assert!(
        text.contains("queue 0 is bound to another AF_XDP socket"),
        "{text}"
    );
    assert!(hint.contains("ss --xdp"), "{hint}");
}

/// An AF_XDP socket on queue 0 that nothing is redirected to.
fn bare_socket(ifname: &str) -> impl Sized {
    use xsk_rs::config::{LibxdpFlags, SocketConfig, UmemConfig};
    let config = SocketConfig::builder()
        .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
        .build();
    let count = 64.try_into().unwrap();
    let (umem, _) = xsk_rs::Umem::new(UmemConfig::default(), count, false).unwrap();
    // SAFETY: the UMEM is used for one socket only.
    unsafe { xsk_rs::Socket::new(config, &umem, &ifname.parse().unwrap(), 0) }.unwrap()
}
