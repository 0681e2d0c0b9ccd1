//! `ringwayd` with an AF_XDP port, in a network namespace of its own. Needs root and iproute2.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::net::UdpSocket;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Place, Running};
use ringway_control::api::{
    PortAdd, PortAddParams, PortDel, PortDelParams, PortDetail, PortShow, PortShowParams, XdpMode,
};
use ringway_control::rpc::Client;
use ringway_guest::Guest;
use ringway_testbed::host::{fresh_namespace, ip};
use ringway_testbed::{DEADLINE, eventually};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, gettid, remove_capability_from_bounding_set};

/// Within this a daemon that was killed is to forward again after its start.
const RESTART: Duration = Duration::from_secs(1);

/// A veth pair: `xdp0` (10.0.0.1) here, `far0` (10.0.0.2) in another namespace, from which
/// datagrams come without end. Or, since `--mode skb` wants the far end of `xdp0` here, a bridge is
/// between them.
struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn start(mode: &str) -> Self {
        let address = "address 02:00:00:00:00:01";
        if mode == "skb" {
            ip(&format!("link add xdp0 {address} type veth peer name mid0"));
            ip("link add mid1 type veth peer name far0");
            ip("link add br0 type bridge");
            for port in ["mid0", "mid1"] {
                ip(&format!("link set {port} master br0 up"));
            }
            ip("link set br0 up");
        } else {
            ip(&format!("link add xdp0 {address} type veth peer name far0"));
        }
        ip("addr add 10.0.0.1/24 dev xdp0");
        ip("link set xdp0 up");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (ready, is_ready) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            fresh_namespace();
            ready.send(gettid().as_raw_nonzero()).unwrap();
            may_go.recv().unwrap();
            ip("addr add 10.0.0.2/24 dev far0");
            ip("link set far0 up");
            ip("neigh add 10.0.0.1 lladdr 02:00:00:00:00:01 dev far0");
            let socket = UdpSocket::bind("10.0.0.2:0").unwrap();
            while !stopped.load(Ordering::Relaxed) {
                // What does not get through is not missed.
                let _ = socket.send_to(&[0; 100], "10.0.0.1:9");
            }
        });
        ip(&format!("link set far0 netns {}", is_ready.recv().unwrap()));
        go.send(()).unwrap();
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A daemon with these ports.
fn start_with(place: &Place, text: &str) -> Running {
    let config = place.config(text);
    place.start(&["--config", config.to_str().unwrap()])
}

/// A daemon with a guest's port and one of xdp0.
fn start_with_nic(place: &Place, mode: &str) -> Running {
    let vm = place.path("vm.sock");
    let text = format!(
        "[ports.vm]\nkind = \"vhost-user\"\nlisten = \"{}\"\n\
         [ports.nic]\nkind = \"af-xdp\"\nifname = \"xdp0\"\nmode = \"{mode}\"\n",
        vm.display()
    );
    start_with(place, &text)
}

fn show_nic(place: &Place) -> PortDetail {
    let name = "nic".parse().unwrap();
    Client::connect(&place.path("control.sock"), DEADLINE)
        .unwrap()
        .call::<PortShow>(&PortShowParams { name })
        .unwrap()
}

fn ringway(place: &Place, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ringway"))
        .arg("--socket")
        .arg(place.path("control.sock"))
        .args(arguments.split(' '))
        .output()
        .unwrap()
}

/// Whether datagrams reach a socket of this namespace's kernel.
fn kernel_receives(socket: &UdpSocket) -> bool {
    socket.recv(&mut [0; 200]).is_ok()
}

/// A guest that sends as well as it can to everybody.
fn send_without_end(mut guest: Guest, stop: &AtomicBool) {
    // Behind a header of zeros.
    let mut frame = [0xff; 72];
    frame[..12].fill(0);
    frame[18..24].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    while !stop.load(Ordering::Relaxed) {
        guest.send_burst(0, &[frame; 32]).unwrap();
    }
}

#[test]
fn after_kill_9_under_load_the_interface_is_the_kernels_and_a_restart_binds_within_a_second() {
    for (mode, shown) in [("copy", "prog/xdp"), ("skb", "prog/xdp")] {
        fresh_namespace();
        let place = Place::new();
        let _load = Load::start(mode);
        let socket = UdpSocket::bind("10.0.0.1:9").unwrap();
        socket.set_nonblocking(true).unwrap();
        eventually("the kernel receives", || kernel_receives(&socket));
        for _ in 0..3 {
            let start = Instant::now();
            let mut daemon = start_with_nic(&place, mode);
            let mut client = daemon.client();
            let show = PortShowParams {
                name: "nic".parse().unwrap(),
            };
            let mut counters = || client.call::<PortShow>(&show).unwrap().port.counters;
            let before = counters().rx_frames;
            eventually("the switch receives", || {
                counters().rx_frames > before + 1000
            });
            let took = start.elapsed();
            assert!(took < RESTART, "{took:?} from start to frames");
            let guest = Guest::builder().connect(&place.path("vm.sock"));
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| send_without_end(guest.unwrap(), &stop));
                let before = counters();
                eventually("frames flow both ways", || {
                    let now = counters();
                    now.rx_frames > before.rx_frames + 1000
                        && now.tx_frames > before.tx_frames + 10_000
                });
                assert!(ip("-d link show dev xdp0").contains(shown));
                while kernel_receives(&socket) {}
                assert!(!kernel_receives(&socket), "a frame went to the kernel");
                daemon.child.kill().unwrap();
                daemon.child.wait().unwrap();
                stop.store(true, Ordering::Relaxed);
            });
            assert!(!ip("-d link show dev xdp0").contains(shown));
            eventually("the kernel receives", || kernel_receives(&socket));
        }
    }
}

#[test]
fn a_port_of_the_file_is_shown_deleted_and_added_again_as_it_was() {
    fresh_namespace();
    let place = Place::new();
    let _load = Load::start("copy");
    let daemon = start_with_nic(&place, "auto");
    let show = show_nic(&place);
    let xdp = show.af_xdp.unwrap();
    assert_eq!(xdp.mode, XdpMode::Copy);
    assert_eq!((xdp.multi_buffer, xdp.queues.len()), (false, 1));
    assert_eq!(xdp.umem_bytes, 4096 * 2048);
    assert_eq!(show.mtu, Some(1500));
    let id = xdp.program_id;
    assert!(ip("-d link show dev xdp0").contains(&format!("prog/xdp id {id} ")));
    let output = ringway(&place, "port show nic");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\n  mode            copy (auto)\n"), "{text}");
    assert!(
        text.contains(&format!("\n  xdp program     id {id}\n")),
        "{text}"
    );
    assert!(text.contains("  TX PENDING  "), "{text}");

    let mut client = daemon.client();
    let (name, if_exists) = ("nic".parse().unwrap(), false);
    let settings = show.port.config;
    client
        .call::<PortDel>(&PortDelParams { name, if_exists })
        .unwrap();
    assert!(!ip("-d link show dev xdp0").contains("prog/xdp"));
    let added = client.call::<PortAdd>(&PortAddParams {
        name: "nic".parse().unwrap(),
        config: settings.clone(),
    });
    assert_eq!(added.unwrap().config, settings);
}

#[test]
fn what_is_refused_is_one_line_with_a_hint() {
    fresh_namespace();
    let place = Place::new();
    let _load = Load::start("copy");
    ip("link set lo mtu 1500 up");
    ip("link add off0 type veth peer name off1");
    let _daemon = start_with_nic(&place, "auto");
    let cases = [
        (
            "--ifname none0",
            "none0 through AF_XDP: there is no such interface",
        ),
        ("--ifname off0", "off0 through AF_XDP: it is down"),
        (
            "--ifname lo --mode copy",
            "lo through AF_XDP: its driver can't run XDP programs",
        ),
        (
            "--ifname lo --queues 2",
            "lo through AF_XDP: 2 queues are asked for, and it has 1",
        ),
        (
            "--ifname lo --mtu 9001",
            "lo through AF_XDP: its MTU of 9001 is above",
        ),
        (
            "--ifname xdp0",
            "xdp0 through AF_XDP: it is the interface of port nic already",
        ),
    ];
    for (arguments, reason) in cases {
        let output = ringway(&place, &format!("port add x af-xdp {arguments}"));
        assert_eq!(output.status.code(), Some(1), "{arguments}");
        let text = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].contains(reason), "{arguments}: {text}");
        assert!(lines[1].starts_with("  hint: "), "{text}");
    }
    // Nothing is left of them, nor disturbed.
    let text = String::from_utf8(ringway(&place, "-j port list").stdout).unwrap();
    assert!(!text.contains("\"x\""), "{text}");
    for wrong in [
        "--mode fast",
        "--umem-frames 100",
        "--busy-poll-us 1001",
        "--queues 0",
    ] {
        let output = ringway(&place, &format!("port add x af-xdp --ifname lo {wrong}"));
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("hint: "), "{text}");
    }
}

#[test]
fn too_little_memory_that_may_be_locked_is_one_line_with_a_hint() {
    fresh_namespace();
    let place = Place::new();
    let _load = Load::start("copy");
    // Of this thread, and of the processes that it starts.
    remove_capability_from_bounding_set(CapabilitySet::IPC_LOCK).unwrap();
    let limit = Some(64 << 10);
    let low = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(Resource::Memlock, low).unwrap();
    let _daemon = start_with(&place, "");
    let output = ringway(&place, "port add nic af-xdp --ifname xdp0");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    let expected = "ringway: error: can't use xdp0 through AF_XDP: not enough memory may be locked for its \
                    frames\n  hint: raise `ulimit -l` (LimitMEMLOCK= of the unit) or take fewer with \
                    --umem-frames\n";
    assert_eq!(text, expected);
    assert!(!ip("-d link show dev xdp0").contains("prog/xdp"));
    let text = String::from_utf8(ringway(&place, "-j port list").stdout).unwrap();
    assert!(!text.contains("\"nic\""), "{text}");
}

#[test]
fn a_daemon_waits_for_an_interface_that_is_missing_or_down_unless_it_is_strict() {
    fresh_namespace();
    let place = Place::new();
    let config = place.config("[ports.nic]\nkind = \"af-xdp\"\nifname = \"xdp0\"\n");
    let config = config.to_str().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    for (reason, remedy) in [
        ("there is no such interface", "ip link"),
        ("it is down", "`ip link set xdp0 up`"),
    ] {
        if reason == "it is down" {
            ip("link add xdp0 type veth peer name far0");
        }
        let checked = place.run(&["--check", "--config", config]);
        assert!(checked.status.success());
        let told = text(checked.stdout);
        assert!(told.starts_with("port nic will wait: "), "{told}");
        assert!(told.contains(reason) && told.contains(remedy), "{told}");
        for more in [&["--check"][..], &[]] {
            let output = place.run(&[&["--strict", "--config", config], more].concat());
            assert_eq!(output.status.code(), Some(1));
            let refused = text(output.stderr);
            let expected = format!("port nic: can't use xdp0 through AF_XDP: {reason}");
            assert!(refused.contains(&expected), "{refused}");
            assert!(refused.contains("hint: "), "{refused}");
        }
    }
    ip("link del xdp0");
    let _daemon = place.start(&["--config", config]);
    let shown = show_nic(&place);
    assert_eq!(shown.port.state.as_str(), "down");
    assert!(shown.last_error.unwrap().contains("no interface xdp0"));
    ip("link add xdp0 type veth peer name far0");
    ip("link set far0 up");
    ip("link set xdp0 up");
    eventually("the port is up", || {
        show_nic(&place).port.state.as_str() == "up"
    });
    assert_eq!(show_nic(&place).last_error, None);
}
