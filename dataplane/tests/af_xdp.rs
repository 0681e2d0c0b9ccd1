//! AF_XDP ports on veth pairs, each test in a network namespace of its own. Needs root and
//! iproute2.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::veth::{Raw, fresh_namespace, veth};
use common::{Lab, frame, name, receive};
use ringway_dataplane::driver::{Guest, GuestConfig};
use ringway_dataplane::{AfXdpConfig, AfXdpInfo, PortConfig, PortKind, UmemFrames, XdpMode};

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
