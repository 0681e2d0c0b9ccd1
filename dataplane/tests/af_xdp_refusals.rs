//! What an AF_XDP port refuses: one line with the reason, one with the remedy, and nothing is left
//! behind. Each test in a network namespace of its own; needs root and iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::host::{Raw, fresh_namespace, index_of, ip, veth};
use common::observe::Footprint;
use common::{Lab, af_xdp, eventually, frame, ifname, lab_with_nic, name, nic_info};
use ringway_api::{Mtu, PortConfig, QueuePairs, SwitchError, UmemFrames, XdpMode};

/// Both modes that veth has.
const MODES: [XdpMode; 2] = [XdpMode::Copy, XdpMode::Skb];

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
    ip("link add br0 type bridge");
    // Its driver runs XDP programs on frames in one buffer only.
    ip("tuntap add tap0 mode tap");
    ip("link set tap0 mtu 9000 up");
    ip("link set br0 up");
    let lab = Lab::start();
    let on = |interface: &str, mode| {
        af_xdp(|nic| {
            nic.ifname = ifname(interface);
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
        (
            on("br0", XdpMode::Copy),
            "can't run XDP programs",
            "--mode skb",
        ),
        (
            on("tap0", XdpMode::Copy),
            "MTU of 9000 is above what its driver carries in this mode",
            "ip link set tap0 mtu 1500",
        ),
        (on("xdp0", XdpMode::ZeroCopy), "no zero-copy", "--mode copy"),
        (on("jumbo0", XdpMode::Auto), "MTU of 9001", "mtu 9000"),
        (
            af_xdp(|nic| nic.queues = QueuePairs::new(3)),
            "3 queues are asked for, and it has 2",
            "ethtool -L",
        ),
    ];
    for (config, reason, remedy) in cases {
        let (text, hint) = refusal(&lab, config.clone());
        assert!(text.contains(reason), "{config:?}: {text}");
        assert!(hint.contains(remedy), "{config:?}: {hint}");
    }
    let config = af_xdp(|nic| nic.mtu = Mtu::new(9001));
    assert!(refusal(&lab, config).0.contains("MTU of 9001"));
    // A driver without XDP serves all the same when the mode is left open.
    lab.switch
        .add_port(name("lo"), on("lo", XdpMode::Auto))
        .unwrap();
    let detail = lab.switch.port(&name("lo")).unwrap();
    assert_eq!(detail.af_xdp.unwrap().mode, XdpMode::Skb);
}

#[test]
fn an_interface_with_a_program_is_refused_with_its_id() {
    let (lab, far) = lab_with_nic(1, 1500, |_| {});
    let id = nic_info(&lab).program_id;
    let other = Lab::start();
    for mode in MODES {
        let (text, hint) = refusal(&other, af_xdp(|nic| nic.mode = mode));
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
fn a_queue_that_another_socket_keeps_is_refused_and_nothing_is_left_behind() {
    fresh_namespace();
    veth(2, 1500);
    let lab = Lab::start();
    let refuse = |mode, queue| {
        let _other = bare_socket("xdp0", queue);
        let (text, hint) = refusal(&lab, af_xdp(|nic| nic.mode = mode));
        let reason = format!("queue {queue} is bound to another AF_XDP socket");
        assert!(text.contains(&reason), "{mode:?}: {text}");
        assert!(hint.contains("ss --xdp"), "{hint}");
        assert_eq!(program_on("xdp0"), None);
    };
    // What the allocator has been given twice, it keeps: a large block is the heap's from the second time on.
    let refuse_each = || {
        refuse(XdpMode::Auto, 0);
        refuse(XdpMode::Copy, 1);
        refuse(XdpMode::Skb, 0);
    };
    refuse_each();
    let footprint = Footprint::now();
    refuse_each();
    footprint.assert_flat();
    lab.switch.add_port(name("nic"), af_xdp(|_| {})).unwrap();
}

#[test]
fn a_queue_that_its_holder_lets_go_meanwhile_is_bound() {
    for mode in MODES {
        fresh_namespace();
        veth(1, 1500);
        let lab = Lab::start();
        let other = bare_socket("xdp0", 0);
        std::thread::scope(|scope| {
            let adding = scope.spawn(|| {
                let config = af_xdp(|nic| nic.mode = mode);
                lab.switch.add_port(name("nic"), config)
            });
            // It comes before the queues are bound.
            eventually("a program", || program_on("xdp0").is_some());
            drop(other);
            adding.join().unwrap().unwrap();
        });
        let far = Raw::open("far0");
        far.send(&frame(1, 2, 60, 1));
        eventually("the switch takes frames", || {
            lab.counters("nic").rx_frames == 1
        });
    }
}

/// The XDP program that is attached to an interface.
fn program_on(ifname: &str) -> Option<u32> {
    let index = i32::try_from(index_of(ifname)).unwrap();
    let mut id = 0;
    // SAFETY: the pointer is valid for writes.
    let result = unsafe { libbpf_sys::bpf_xdp_query_id(index, 0, &raw mut id) };
    assert_eq!(result, 0);
    (id != 0).then_some(id)
}

/// An AF_XDP socket that nothing is redirected to.
fn bare_socket(ifname: &str, queue: u32) -> impl Sized {
    use xsk_rs::config::{LibxdpFlags, SocketConfig, UmemConfig};
    let config = SocketConfig::builder()
        .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
        .build();
    let count = 64.try_into().unwrap();
    let (umem, _) = xsk_rs::Umem::new(UmemConfig::default(), count, false).unwrap();
    let (ifname, mut socket) = (ifname.parse().unwrap(), None);
    // The kernel lets a queue go some time after its socket was closed.
    eventually("the queue is free", || {
        // SAFETY: the UMEM is used for one socket only: one that was refused is none.
        let made = unsafe { xsk_rs::Socket::new(config, &umem, &ifname, queue) };
        socket = made.ok();
        socket.is_some()
    });
    socket.unwrap()
}
