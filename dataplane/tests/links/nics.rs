//! What happens to NICs only.

use std::os::fd::AsRawFd;

use libbpf_sys as bpf;
use ringway_api::{PortState, XdpMode};
use ringway_xdp::{EXIT, Hook, Instruction, SET, link, load};

use super::bed::{Bed, KINDS, Kind};
use super::common::host::{Elsewhere, index_of, ip, quiet_namespace, set_channels};
use super::common::{eventually, name};

#[test]
fn a_nic_in_another_namespace_is_waited_for() {
    for kind in KINDS.into_iter().filter(|kind| kind.is_nic()) {
        let mut bed = Bed::new(kind);
        let elsewhere = Elsewhere::new();
        let home = rustix::thread::gettid().as_raw_nonzero();
        for _ in 0..2 {
            bed.passes();
            ip(&format!("link set xdp0 netns {}", elsewhere.thread));
            bed.tells(PortState::Down, None, Some("in another network namespace"));
            bed.forgets_host();
            bed.lets_go();
            elsewhere.ip(&format!("link set xdp0 netns {home}"));
            bed.tells(PortState::Down, Some(1500), Some("`ip link set xdp0 up`"));
            ip("link set xdp0 up");
            bed.comes_back();
        }
        bed.passes();
        bed.end();
    }
}

#[test]
fn queues_that_a_nic_gains_are_taken() {
    for kind in KINDS.into_iter().filter(|kind| kind.is_nic()) {
        quiet_namespace();
        kind.make();
        // A veth runs no program with fewer queues than its peer sends by.
        set_channels("far0", 1);
        set_channels("xdp0", 1);
        let mut bed = Bed::with_interface(kind);
        bed.is_up();
        bed.passes();
        assert_eq!(bed.detail().queues.len(), 1);
        let attempts = bed.attempts();
        set_channels("xdp0", 2);
        eventually("it is opened anew", || bed.attempts() > attempts);
        bed.comes_back();
        assert_eq!(bed.detail().queues.len(), 2);
        bed.passes();
        bed.end();
    }
}

#[test]
fn a_nic_stays_promiscuous_whatever_others_do() {
    for kind in KINDS.into_iter().filter(|kind| kind.is_nic()) {
        let mut bed = Bed::new(kind);
        bed.passes();
        ip("link set xdp0 promisc on");
        ip("link set xdp0 promisc off");
        ip("link set xdp0 down");
        ip("link set xdp0 up");
        bed.is_up();
        assert!(ip("-d link show xdp0").contains("promiscuity 1"));
        bed.passes();
        bed.end();
    }
}

/// Detaches the XDP program of this number, as `bpftool link detach` does. (An interface's number is
/// that of others too, in other namespaces.)
fn detach_program(program: u32) {
    let mut id = 0;
    loop {
        // SAFETY: the pointer is valid.
        if unsafe { bpf::bpf_link_get_next_id(id, &raw mut id) } != 0 {
            return;
        }
        // SAFETY: no pointers.
        let fd = unsafe { bpf::bpf_link_get_fd_by_id(id) };
        let mut info = bpf::bpf_link_info::default();
        let mut bytes = u32::try_from(size_of_val(&info)).unwrap();
        // SAFETY: the structure is valid for as many bytes as said.
        let got = unsafe { bpf::bpf_link_get_info_by_fd(fd, &raw mut info, &raw mut bytes) };
        if got == 0 && info.type_ == bpf::BPF_LINK_TYPE_XDP && info.prog_id == program {
            // SAFETY: no pointers.
            assert_eq!(unsafe { bpf::bpf_link_detach(fd) }, 0);
        }
        // SAFETY: the fd is this function's.
        unsafe { libc::close(fd) };
    }
}

#[test]
fn a_program_that_others_take_off_is_put_back() {
    for kind in KINDS.into_iter().filter(|kind| kind.is_nic()) {
        let mut bed = Bed::new(kind);
        bed.passes();
        let program = || bed.detail().af_xdp.map(|nic| nic.program_id);
        let before = program().unwrap();
        detach_program(before);
        eventually("another program is attached", || {
            program().is_some_and(|now| now != before)
        });
        bed.comes_back();
        bed.passes();
        bed.end();
    }
}

#[test]
fn a_program_of_others_keeps_the_port_down_and_is_named() {
    for kind in KINDS.into_iter().filter(|kind| kind.is_nic()) {
        let mut bed = Bed::new(kind);
        bed.passes();
        const PASS: i32 = bpf::XDP_PASS.cast_signed();
        let pass = [
            Instruction::new(SET, (0, 0), 0, PASS),
            Instruction::new(EXIT, (0, 0), 0, 0),
        ];
        let theirs = load(c"others", &pass).unwrap();
        let mut held = None;
        // The port may be faster, and have its own back.
        eventually("the other program is attached", || {
            bed.detail()
                .af_xdp
                .iter()
                .for_each(|nic| detach_program(nic.program_id));
            held = link(&theirs, index_of("xdp0"), Hook::Driver).ok();
            held.is_some()
        });
        bed.lets_go();
        let error = || bed.detail().last_error.unwrap_or_default();
        eventually("it is told", || error().contains("somebody else's"));
        bed.tells(
            PortState::Down,
            Some(1500),
            Some("XDP program of somebody else's"),
        );
        let error = bed.detail().last_error.unwrap();
        assert!(error.contains("`ip link set xdp0 xdp off`"), "{error}");
        bed.forgets_host();
        assert!(held.as_ref().is_some_and(|held| held.as_raw_fd() >= 0));
        drop(held);
        bed.comes_back();
        bed.passes();
        bed.end();
    }
}

#[test]
fn a_port_waits_from_the_start_for_an_interface_that_is_missing_or_down() {
    for is_there in [false, true] {
        let kind = Kind::Nic(XdpMode::Auto);
        quiet_namespace();
        if is_there {
            kind.make();
            ip("link set xdp0 down");
        }
        let mut bed = Bed::with_interface(kind);
        let (mtu, error) = if is_there {
            (Some(1500), "`ip link set xdp0 up`")
        } else {
            (None, "no interface xdp0")
        };
        bed.tells(PortState::Down, mtu, Some(error));
        let refused = bed.lab.switch.add_port(name("other"), kind.config());
        assert!(refused.is_err(), "an operator is told at once");
        if is_there {
            ip("link set xdp0 up");
        } else {
            kind.make();
        }
        bed.comes_back();
        bed.passes();
        bed.end();
    }
}
