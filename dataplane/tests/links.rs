//! Interfaces that change under their ports: each change of an interface for each kind of port. Each
//! test in network namespaces of its own; needs root and iproute2.
//!
//! Beside each case two guests exchange frames all the time, and lose none.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use common::host::{Elsewhere, Raw, index_of, ip, ip_batch, quiet_namespace, set_channels, veth};
use common::{Lab, af_xdp, eventually, frame, ifname, name, receive, tap};
use libbpf_sys as bpf;
use ringway_api::{PortConfig, PortDetail, PortState, XdpMode};
use ringway_guest::Guest;
use ringway_xdp::{EXIT, Hook, Instruction, SET, link, load};

/// Stations of frames: the innocent pair's, the guest's, and the one behind the interface.
const LEFT: u8 = 1;
const RIGHT: u8 = 2;
const GUEST: u8 = 3;
const HOST: u8 = 4;

/// What stands behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tap(u16),
    Nic(XdpMode),
}

const KINDS: [Kind; 4] = [
    Kind::Tap(1),
    Kind::Tap(2),
    Kind::Nic(XdpMode::Copy),
    Kind::Nic(XdpMode::Skb),
];

impl Kind {
    fn is_nic(self) -> bool {
        matches!(self, Self::Nic(_))
    }

    fn ifname(self) -> &'static str {
        if self.is_nic() { "xdp0" } else { "rw0" }
    }

    /// Where frames are exchanged with the port.
    fn far(self) -> &'static str {
        if self.is_nic() { "far0" } else { "rw0" }
    }

    fn config(self) -> PortConfig {
        match self {
            Self::Tap(queues) => tap("rw0", queues, true),
            Self::Nic(mode) => af_xdp(|nic| nic.mode = mode),
        }
    }

    /// Makes the interface, as an operator does.
    fn make(self) {
        match self {
            Self::Tap(queues) => {
                let many = if queues > 1 { " multi_queue" } else { "" };
                ip(&format!("tuntap add rw0 mode tap{many}"));
            }
            Self::Nic(_) => veth(2, 1500),
        }
    }
}

/// A switch with the port `port` of the interface, a guest at `vm`, and two innocents.
struct Bed {
    lab: Lab,
    kind: Kind,
    guest: Guest,
    seed: u64,
    innocents: Innocents,
}

impl Bed {
    fn new(kind: Kind) -> Self {
        quiet_namespace();
        if kind.is_nic() {
            kind.make();
        }
        Self::with_interface(kind)
    }

    /// The same with an interface as it is, or with none.
    fn with_interface(kind: Kind) -> Self {
        let lab = Lab::start();
        let innocents = Innocents::start(&lab);
        let guest = lab.guest("vm", Guest::builder());
        let added = lab.switch.add_or_await_port(name("port"), kind.config());
        added.unwrap();
        Self {
            lab,
            kind,
            guest,
            seed: 0,
            innocents,
        }
    }

    fn detail(&self) -> PortDetail {
        self.lab.switch.port(&name("port")).unwrap()
    }

    /// Waits until the port tells this, and nothing of the remedy is missing.
    fn tells(&self, state: PortState, mtu: Option<u16>, error: Option<&str>) {
        let found = || {
            let detail = self.detail();
            (detail.port.state, detail.mtu, detail.last_error)
        };
        let is_right = || {
            let (now, mtu_now, error_now) = found();
            now == state
                && mtu_now == mtu
                && match (error, error_now) {
                    (None, None) => true,
                    (Some(part), Some(text)) => text.contains(part) && !text.contains('\n'),
                    _ => false,
                }
        };
        eventually(
            &format!("{state:?} {mtu:?} {error:?}, not {:?}", found()),
            is_right,
        );
        // What it lists is the same.
        let listed = self.lab.switch.ports();
        let listed = listed.iter().find(|port| port.name == name("port"));
        assert_eq!(listed.unwrap().state, state);
    }

    fn is_up(&self) {
        self.tells(PortState::Up, Some(1500), None);
    }

    /// Frames pass both ways; those that are on their way while the port changes may be lost.
    fn passes(&mut self) {
        let far = Raw::open(self.kind.far());
        self.passes_with(&far);
    }

    fn passes_with(&mut self, far: &Raw) {
        let seed = self.seed;
        self.seed += 2;
        let (there, back) = (
            frame(GUEST, HOST, 100, seed),
            frame(HOST, GUEST, 100, seed + 1),
        );
        eventually("a frame comes from the interface", || {
            let _ = far.try_send(&there);
            while let Some(got) = self.guest.try_recv(0).unwrap() {
                if got.frame == there {
                    return self.knows_host();
                }
            }
            false
        });
        eventually("a frame goes to the interface", || {
            self.guest.send_frame(&back).unwrap();
            while let Some(got) = far.try_receive() {
                if got == back {
                    return true;
                }
            }
            false
        });
    }

    /// Whether the station behind the interface is known.
    fn knows_host(&self) -> bool {
        let host = common::mac(HOST);
        self.lab
            .switch
            .fdb()
            .iter()
            .any(|entry| entry.mac.0 == host)
    }

    /// Frames that were on their way when the port went down may be learned from for a moment.
    fn forgets_host(&self) {
        eventually("the host is forgotten", || !self.knows_host());
    }

    /// The end of each case.
    fn end(self) {
        let carried = self.innocents.end();
        assert!(carried > 0, "the innocents stood still");
        let drops = |port| self.lab.counters(port).tx_drops.total();
        assert_eq!((drops("left"), drops("right")), (0, 0));
        self.lab.switch.remove_port(&name("port")).unwrap();
    }
}

/// Two guests that send one frame at a time to and fro.
struct Innocents {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Innocents {
    fn start(lab: &Lab) -> Self {
        let mut left = lab.guest("left", Guest::builder());
        let mut right = lab.guest("right", Guest::builder());
        let is_over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&is_over);
        let run = move || {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let sent = frame(RIGHT, LEFT, 100, count);
                left.send_frame(&sent).unwrap();
                // What is flooded comes here too.
                while receive(&mut right).frame != sent {}
                let sent = frame(LEFT, RIGHT, 100, count);
                right.send_frame(&sent).unwrap();
                while receive(&mut left).frame != sent {}
                count += 1;
            }
            count
        };
        Self {
            is_over,
            thread: std::thread::spawn(run),
        }
    }

    /// How often a frame went there and another one back; a frame that is lost fails the test.
    fn end(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("an innocent lost a frame")
    }
}

#[test]
fn an_interface_that_goes_down_and_up() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.is_up();
        bed.passes();
        let interface = kind.ifname();
        ip(&format!("link set {interface} down"));
        let remedy = format!("`ip link set {interface} up`");
        bed.tells(PortState::Down, Some(1500), Some(&remedy));
        bed.forgets_host();
        ip(&format!("link set {interface} up"));
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_that_loses_its_carrier() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let [off, on] = if kind.is_nic() {
            ["link set far0 down", "link set far0 up"]
        } else {
            ["link set rw0 carrier off", "link set rw0 carrier on"]
        };
        ip(off);
        bed.tells(PortState::Down, Some(1500), Some("no carrier"));
        bed.forgets_host();
        ip(on);
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_that_is_deleted_and_made_anew() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        for _ in 0..3 {
            bed.passes();
            let interface = kind.ifname();
            ip(&format!("link del {interface}"));
            let error = format!("no interface {interface}");
            bed.tells(PortState::Down, None, Some(&error));
            bed.forgets_host();
            assert_eq!(bed.detail().queues.len(), 0);
            kind.make();
            bed.is_up();
        }
        let before = bed.detail().port.counters;
        bed.passes();
        let after = bed.detail().port.counters;
        assert!(before.rx_frames >= 3 && before.tx_frames >= 3, "they go on");
        assert!(after.rx_frames > before.rx_frames && after.tx_frames > before.tx_frames);
        assert!(after.rx_bytes >= after.rx_frames * 60);
        bed.end();
    }
}

/// Even one that has the same number.
#[test]
fn an_interface_that_was_replaced_before_anybody_looked() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let index = index_of(kind.ifname());
        match kind {
            Kind::Tap(1) => ip_batch("link del rw0\ntuntap add rw0 mode tap\n"),
            Kind::Tap(_) => ip_batch("link del rw0\ntuntap add rw0 mode tap multi_queue\n"),
            Kind::Nic(_) => {
                let add = "numrxqueues 2 numtxqueues 2";
                ip_batch(&format!(
                    "link del xdp0\n\
                     link add xdp0 index {index} {add} type veth peer name far0 {add}\n\
                     link set far0 addrgenmode none up\nlink set xdp0 addrgenmode none up\n"
                ));
            }
        }
        bed.passes();
        bed.is_up();
        bed.end();
    }
}

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
            elsewhere.ip(&format!("link set xdp0 netns {home}"));
            bed.tells(PortState::Down, Some(1500), Some("`ip link set xdp0 up`"));
            ip("link set xdp0 up");
            bed.is_up();
        }
        bed.passes();
        bed.end();
    }
}

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
        bed.is_up();
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
        bed.is_up();
        elsewhere.ip(&format!("link set rw0 netns {home}"));
        bed.tells(PortState::Down, Some(1500), Some("`ip link set rw0 up`"));
        ip("link set rw0 up");
        bed.is_up();
        bed.passes();
        // With its namespace the interface goes.
        ip(&format!("link set rw0 netns {}", elsewhere.thread));
        drop(elsewhere);
        bed.tells(PortState::Down, None, Some("no interface rw0"));
        kind.make();
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_that_is_renamed_works_on_and_tells() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let old = kind.ifname();
        ip(&format!("link set {old} down"));
        // An escape sequence, a byte that is no text, and what a shell would run.
        let new = "\x1b[2J;reboot";
        let renamed = std::process::Command::new("ip")
            .args(["link", "set", old, "name", new])
            .status();
        assert!(renamed.unwrap().success());
        let shown = "\\x1b[2J;reboot";
        let remedy = format!("`ip link set {shown} up`");
        bed.tells(PortState::Down, Some(1500), Some(&remedy));
        ip(&format!("link set {new} up"));
        let error = format!("{old} is called {shown} now");
        bed.tells(PortState::Up, Some(1500), Some(&error));
        let far = Raw::open(if kind.is_nic() { "far0" } else { new });
        bed.passes_with(&far);
        // Another one with the old name is none of its business.
        ip(&format!("link add {old} type bridge"));
        ip(&format!("link del {old}"));
        bed.tells(PortState::Up, Some(1500), Some(&error));
        ip(&format!("link set {new} down"));
        ip(&format!("link set {new} name {old}"));
        ip(&format!("link set {old} up"));
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_mtu_that_changes_is_told_and_in_effect() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        for mtu in [1400, 1600, 1500] {
            ip(&format!("link set {} mtu {mtu}", kind.ifname()));
            bed.tells(PortState::Up, Some(mtu), None);
            bed.passes();
        }
        if kind.is_nic() {
            // Its far end has 1500: longer frames are lost there, and are let through here.
            ip("link set xdp0 mtu 1400");
            bed.tells(PortState::Up, Some(1400), None);
            let sent = |bed: &Bed| bed.detail().port.counters.tx_drops;
            let before = sent(&bed).total();
            bed.guest.send_frame(&frame(HOST, GUEST, 1500, 9)).unwrap();
            eventually("it is too long", || sent(&bed).total() > before);
        }
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
        bed.passes();
        assert_eq!(bed.detail().queues.len(), 1);
        set_channels("xdp0", 2);
        eventually("both queues are taken", || bed.detail().queues.len() == 2);
        bed.is_up();
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

/// Detaches the XDP program of an interface, as `bpftool link detach` does.
fn detach_program(interface: u32) {
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
        // SAFETY: it is a link of the kind that is looked for next.
        let index = unsafe { info.__bindgen_anon_1.xdp.ifindex };
        if got == 0 && info.type_ == bpf::BPF_LINK_TYPE_XDP && index == interface {
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
        let before = program();
        assert!(before.is_some());
        detach_program(index_of("xdp0"));
        eventually("another program is attached", || {
            program().is_some_and(|now| Some(now) != before)
        });
        bed.is_up();
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
            detach_program(index_of("xdp0"));
            held = link(&theirs, index_of("xdp0"), Hook::Driver).ok();
            held.is_some()
        });
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
        bed.is_up();
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
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn a_port_that_waits_keeps_its_slot() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let slot = bed.detail().port.id;
        ip(&format!("link del {}", kind.ifname()));
        bed.tells(PortState::Down, None, Some("no interface"));
        let mut late = bed.lab.guest("late", Guest::builder());
        let of_late = bed.lab.switch.port(&name("late")).unwrap().port.id;
        assert_ne!(of_late, slot);
        kind.make();
        bed.is_up();
        assert_eq!(bed.detail().port.id, slot);
        bed.passes();
        let sent = frame(0xff, GUEST, 100, 7);
        bed.guest.send_frame(&sent).unwrap();
        while receive(&mut late).frame != sent {}
        bed.end();
    }
}

/// Events come faster than they are looked at, and some are lost.
#[test]
fn an_interface_that_flaps_a_thousand_times_is_in_the_right_state_at_the_end() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        bed.passes();
        let interface = kind.ifname();
        let flap = format!("link set {interface} down\nlink set {interface} up\n");
        ip_batch(&flap.repeat(1000));
        bed.is_up();
        bed.passes();
        ip_batch(&(flap.repeat(100) + &format!("link set {interface} down\n")));
        let remedy = format!("`ip link set {interface} up`");
        bed.tells(PortState::Down, Some(1500), Some(&remedy));
        bed.end();
    }
}

/// Ports come and go at the same time as their interfaces.
#[test]
fn ports_are_added_and_removed_while_their_interface_comes_and_goes() {
    for kind in KINDS {
        let mut bed = Bed::new(kind);
        for _ in 0..20 {
            ip(&format!("link del {}", kind.ifname()));
            bed.lab.switch.remove_port(&name("port")).unwrap();
            kind.make();
            let added = bed.lab.switch.add_port(name("port"), kind.config());
            added.unwrap();
        }
        bed.is_up();
        bed.passes();
        bed.end();
    }
}

#[test]
fn an_interface_is_that_of_one_port_whatever_its_name_is_by_now() {
    quiet_namespace();
    let lab = Lab::start();
    let nic = |interface: &str| {
        af_xdp(|nic| {
            nic.ifname = ifname(interface);
            nic.mode = XdpMode::Skb;
        })
    };
    ip("tuntap add rw0 mode tap multi_queue");
    lab.switch.add_port(name("a"), tap("rw0", 2, true)).unwrap();
    let refused = |config: PortConfig| {
        let error = lab.switch.add_port(name("b"), config).unwrap_err();
        assert!(!error.hint().is_empty() && lab.switch.ports().len() == 1);
        format!("{error}; {}", error.hint())
    };
    for config in [tap("rw0", 2, true), nic("rw0")] {
        let error = refused(config);
        assert!(error.contains("port a already"), "{error}");
        assert!(error.contains("`ringway port del a`"), "{error}");
    }
    ip("link set rw0 down");
    ip("link set rw0 name rw9");
    ip("link set rw9 up");
    for config in [tap("rw9", 2, true), nic("rw9")] {
        assert!(refused(config).contains("port a already"));
    }
    // Nothing of this has touched the first one.
    eventually("it is up", || {
        lab.switch.port(&name("a")).unwrap().port.state == PortState::Up
    });
}

#[test]
fn a_tap_that_another_daemon_has_open_is_refused_and_one_that_comes_later_is_told() {
    quiet_namespace();
    ip("tuntap add rw0 mode tap multi_queue");
    let [first, second] = [Lab::start(), Lab::start()];
    for queues in [1, 2] {
        first
            .switch
            .add_port(name("p"), tap("rw0", queues, true))
            .unwrap();
        let error = second.switch.add_port(name("p"), tap("rw0", queues, true));
        let error = error.unwrap_err().to_string();
        let expected = format!("another program has {queues} of its queues open");
        assert!(error.contains(&expected), "{error}");
        let told = || first.switch.port(&name("p")).unwrap().last_error;
        assert_eq!(told(), None);
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
        eventually("the other is told", || {
            told().is_some_and(|error| error.contains("1 queues of rw0 open"))
        });
        drop(other);
        eventually("it is gone", || told().is_none());
        first.switch.remove_port(&name("p")).unwrap();
    }
}
