//! What happens to taps only.

use std::os::fd::AsRawFd;

use ringway_api::PortState;

use super::bed::{Bed, KINDS, runs, tells};
use super::common::host::{Elsewhere, ip, quiet_namespace};
use super::common::{Lab, eventually, name, tap};

#[test]
fn a_tap_works_in_whatever_namespace_it_is() {
    for kind in KINDS.into_iter().filter(|kind| !kind.is_nic()) {
        let mut bed = Bed::new(kind);
        bed.passes();
        let elsewhere = Elsewhere::new();
        let home = rustix::thread::gettid().as_raw_nonzero();
        ip(&format!("link set rw0 netns {}", elsewhere.thread));
        // The kernel sets what it moves down.
        let remedy = "`ip link set rw0 up` in its network namespace";
        bed.tells(PortState::Down, Some(1500), Some(remedy));
        bed.forgets_host();
        elsewhere.ip("link set rw0 addrgenmode none");
        elsewhere.ip("link set rw0 up");
        let runs_there = || runs(&elsewhere.ip("-o link show rw0"));
        eventually("it runs there", runs_there);
        bed.tells(PortState::Up, Some(1500), None);
        elsewhere.ip("link set rw0 mtu 1400");
        bed.tells(PortState::Up, Some(1400), None);
        // There it has its name, whatever it is at home.
        elsewhere.ip("link set rw0 name eth0");
        bed.tells(PortState::Up, Some(1400), None);
        elsewhere.ip("link set eth0 down");
        let remedy = "`ip link set eth0 up` in its network namespace";
        bed.tells(PortState::Down, Some(1400), Some(remedy));
        elsewhere.ip("link set eth0 name rw0");
        elsewhere.ip("link set rw0 mtu 1500");
        elsewhere.ip("link set rw0 up");
        eventually("it runs there", runs_there);
        bed.tells(PortState::Up, Some(1500), None);
        elsewhere.ip(&format!("link set rw0 netns {home}"));
        bed.tells(PortState::Down, Some(1500), Some("`ip link set rw0 up`"));
        ip("link set rw0 up");
        bed.is_up();
        bed.passes();
        // With its namespace the interface goes.
        ip(&format!("link set rw0 netns {}", elsewhere.thread));
        drop(elsewhere);
        // The kernel takes its time to be rid of a namespace.
        eventually("it is gone", || {
            bed.detail().port.state == PortState::Down && bed.detail().mtu.is_none()
        });
        bed.tells(PortState::Down, None, Some("no interface rw0"));
        bed.lets_go();
        kind.make();
        bed.comes_back();
        bed.passes();
        bed.end();
    }
}

#[test]
fn a_tap_that_another_daemon_has_open_is_refused_and_one_that_comes_later_is_told() {
    quiet_namespace();
    ip("tuntap add rw0 mode tap multi_queue");
    let [first, second] = [Lab::start(), Lab::start()];
    for queues in [1, 2] {
        first
            .switch
            .add_port(name("port"), tap("rw0", queues, true))
            .unwrap();
        let error = second
            .switch
            .add_port(name("port"), tap("rw0", queues, true));
        let error = error.unwrap_err().to_string();
        let expected = format!("another program has {queues} of its queues open");
        assert!(error.contains(&expected), "{error}");
        eventually("the kernel has it run", || runs(&ip("-o link show rw0")));
        tells(&first.switch, PortState::Up, Some(1500), None);
        // One that does not ask.
        let other = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun");
        let other = other.unwrap();
        // SAFETY: all zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"rw0") {
            *to = libc::c_char::from_ne_bytes([*from]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
        // SAFETY: TUNSETIFF reads and writes an ifreq through its pointer.
        let set = unsafe { libc::ioctl(other.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        let error = Some("1 queues of rw0 open");
        tells(&first.switch, PortState::Impaired, Some(1500), error);
        drop(other);
        tells(&first.switch, PortState::Up, Some(1500), None);
        first.switch.remove_port(&name("port")).unwrap();
    }
}
