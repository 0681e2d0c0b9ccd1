//! DPDK's virtio_user as a front-end: two of its ports, between which testpmd has frames circulate
//! through the switch.
//!
//! Needs what `bench/install-packages.sh` unpacks, and the daemon and its tool built by the same
//! command. Whatever is missing fails the test. No hugepages are needed.

mod common;

use std::process::Command;
use std::thread::available_parallelism;

use common::{Switch, Talker, alone, eventually, unpacked};
use serde_json::Value;

/// Names of the ports, and of the guests behind them.
const PORTS: [&str; 2] = ["p0", "p1"];
const MACS: [&str; 2] = ["52:54:00:00:00:01", "52:54:00:00:00:02"];

/// Frames that have to pass each way: every slot of the rings many times.
const ENOUGH: u64 = 100_000;

/// Times that the daemon is killed under load,
const KILLS: usize = 20;
/// and frames that pass each way before the next time: each slot of the rings several times.
const ENOUGH_OF_ONE: u64 = 5_000;

/// A testpmd with two ports, ended with the value.
struct Testpmd(Talker);

impl Testpmd {
    /// With a forwarding mode of its own, rings of `entries`, and these options of both ports besides.
    fn start(switch: &Switch, mode: &str, entries: u16, options: &str) -> Self {
        let from = unpacked("dpdk", "testpmd");
        let library = from.join("lib");
        let cpus = available_parallelism().expect("a number of CPUs");
        // Packet buffers for four rings, and some to spare, of which a megabyte holds some 400.
        let buffers = 4 * u32::from(entries) + 4096;
        let mut command = Command::new(from.join("testpmd"));
        command
            .env("LD_LIBRARY_PATH", library)
            // Its two threads share all CPUs, with the switch too.
            .arg(format!("--lcores=(0,1)@(0-{})", cpus.get() - 1))
            .args(["--no-pci", "--no-huge", "--no-shconf", "--no-telemetry"])
            .args(["-m", &(128 + buffers / 300).to_string()])
            .arg("-d")
            .arg(from.join("drivers"));
        for (at, (port, mac)) in PORTS.iter().zip(MACS).enumerate() {
            let socket = switch.path(port);
            command.arg("--vdev").arg(format!(
                "net_virtio_user{at},path={},mac={mac},queues=1,queue_size={entries},{options}",
                socket.display()
            ));
        }
        let entries = entries.to_string();
        command
            .args(["--", "-i", "--nb-cores=1"])
            .arg(format!("--forward-mode={mode}"))
            // Else a start throws away what lies in the rings.
            .args(["--no-flush-rx", "--disable-link-check"])
            .arg(format!("--eth-peer=0,{}", MACS[1]))
            .arg(format!("--eth-peer=1,{}", MACS[0]))
            .arg(format!("--total-num-mbufs={buffers}"))
            .args(["--txd", &entries, "--rxd", &entries]);
        let mut testpmd = Self(Talker::start(&mut command));
        testpmd.0.hear("testpmd> ");
        testpmd
    }

    /// Has it carry out a line.
    fn ask(&mut self, line: &str) {
        self.0.tell(line);
        // It repeats the line, before which there may be prompts of before.
        self.0.hear(line);
        self.0.hear("testpmd> ");
    }

    /// What it said to all that it was asked, which it tells no sooner than at its end.
    fn end(mut self) -> String {
        self.0.tell("quit");
        self.0.hear("Bye...")
    }

    /// Waits until it is rid of the connections to a daemon that ended when so much had been said. It
    /// sees each end several times and closes as often: what comes back meanwhile is closed too.
    fn wait_until_disconnected(&self, since: usize) {
        eventually("testpmd notices that the daemon is gone", || {
            let said = self.0.said();
            let count = |what: String| said[since..].matches(&what).count();
            (0..).zip(PORTS).all(|(at, name)| {
                let seen = count(format!("virtio-user port {at} is down"));
                let in_vain = count(format!("/{name}) Expected valid Vhost FD"));
                seen > 1 && in_vain == seen - 1
            })
        });
    }

    /// Sends so many bursts of 32 frames from each port, and each frame on that comes back.
    fn circulate(&mut self, bursts: u32) {
        self.ask(&format!("start tx_first {bursts}"));
    }
}

/// A count of the first queue pair.
fn count(port: &Value, name: &str) -> u64 {
    port["queues"][0][name].as_u64().expect("a count")
}

/// Waits until enough frames went each way.
fn wait_for_frames(switch: &Switch, enough: u64) {
    for name in PORTS {
        eventually("frames pass", || {
            let port = switch.port(name);
            ["rx_frames", "tx_frames"]
                .map(|way| count(&port, way))
                .iter()
                .all(|way| *way > enough)
        });
    }
}

/// Both ports work, and nothing was refused to anybody. What testpmd forwards from one to the other is a
/// loop, and may be told as one.
fn assert_served(switch: &Switch) {
    for name in PORTS {
        let port = switch.port(name);
        assert_eq!(port["port"]["state"], "up", "{port}");
        let error = port["last_error"].as_str().unwrap_or_default();
        let is_loop = error.contains("a loop through another switch");
        assert!(error.is_empty() || is_loop, "{port}");
    }
}

fn add_ports(switch: &Switch, options: &[&str]) {
    for name in PORTS {
        switch.add_port(name, &[&["--queues", "1"], options].concat());
    }
}

/// It leaves WRITE in the descriptors of its indirect tables (virtio 1.3, 2.8.7).
#[test]
fn frames_of_several_segments_pass_packed_rings_whole_and_are_counted() {
    let _alone = alone();
    for mergeable in [0, 1] {
        let switch = Switch::start();
        add_ports(&switch, &[]);
        let options = format!("packed_vq=1,mrg_rxbuf={mergeable}");
        let mut testpmd = Testpmd::start(&switch, "mac", 256, &options);
        testpmd.ask("set txpkts 100,200,300");
        testpmd.circulate(1);
        wait_for_frames(&switch, ENOUGH);
        assert_served(&switch);
        for name in PORTS {
            assert!(count(&switch.port(name), "tolerated") > 0);
        }
        testpmd.ask("stop");
        testpmd.ask("show port stats all");
        let said = testpmd.end();
        let statistics: Vec<&str> = said.split("NIC statistics for port").skip(1).collect();
        assert_eq!(statistics.len(), 2, "{said}");
        for of_port in statistics {
            let total = |key: &str| {
                let (_, rest) = of_port.split_once(key).expect("a total");
                let number = rest.split_whitespace().next().expect("a word");
                number.parse::<u64>().expect("a number")
            };
            let frames = total("RX-packets:");
            assert!(frames > ENOUGH, "{said}");
            assert_eq!(total("RX-bytes:"), 600 * frames, "{said}");
        }
    }
}

/// The largest rings (virtio 1.3, 2.7, 2.8.10.1), gone round so often that indices of 16 bits wrap.
#[test]
fn rings_of_32768_entries_of_both_layouts_take_frames_lap_after_lap() {
    let _alone = alone();
    for packed in [0, 1] {
        let switch = Switch::start();
        add_ports(&switch, &[]);
        let mut testpmd = Testpmd::start(&switch, "mac", 32_768, &format!("packed_vq={packed}"));
        testpmd.circulate(64);
        wait_for_frames(&switch, 4 * 65_536);
        assert_served(&switch);
        for name in PORTS {
            let port = switch.port(name);
            for size in ["rx_size", "tx_size"] {
                assert_eq!(count(&port, size), 32_768, "{port}");
            }
        }
        drop(testpmd);
    }
}

/// Rings that went on at their used index, of which the log says as much as `port show`.
fn resumed_rings(switch: &Switch) -> usize {
    let rings = PORTS.into_iter().flat_map(|name| {
        let port = switch.port(name);
        ["rx_resumed", "tx_resumed"].map(|ring| port["queues"][0][ring] == true)
    });
    let count = rings.filter(|resumed| *resumed).count();
    let told = switch.log().matches("goes on at its used index").count();
    assert_eq!(told, count);
    count
}

/// Ports that send without end, while the daemon is killed and started again. Returns how often a
/// ring went on at its used index.
fn kill_and_restart(packed: bool) -> usize {
    let mut switch = Switch::start();
    add_ports(&switch, &["--connect"]);
    let options = format!("packed_vq={},server=1", u8::from(packed));
    let mut testpmd = Testpmd::start(&switch, "flowgen", 256, &options);
    testpmd.ask("start");
    wait_for_frames(&switch, ENOUGH);
    let mut resumed = 0;
    for _ in 0..KILLS {
        if packed {
            // It resets packed rings a millisecond after it told its other thread not to use them.
            testpmd.ask("stop");
        }
        let since = testpmd.0.said().len();
        switch.kill();
        testpmd.wait_until_disconnected(since);
        switch.start_again();
        add_ports(&switch, &["--connect"]);
        if packed {
            for name in PORTS {
                eventually("the port is up", || {
                    switch.port(name)["port"]["state"] == "up"
                });
            }
            assert_served(&switch);
            testpmd.ask("start");
        }
        wait_for_frames(&switch, ENOUGH_OF_ONE);
        assert_served(&switch);
        resumed += resumed_rings(&switch);
    }
    resumed
}

/// With `server=1` it says base 0 of each split ring to a back-end that comes back, wherever the ring
/// stands, and leaves the rings as they are.
#[test]
fn traffic_of_split_rings_goes_on_each_time_that_the_daemon_is_killed_and_started_again() {
    let _alone = alone();
    let resumed = kill_and_restart(false);
    // One in 2,048 stands at 0 by chance: indices go by bursts of 32.
    assert!(resumed >= 4 * KILLS - 4, "{resumed}");
}

/// It begins packed rings anew for a back-end that comes back, so their base is that of fresh rings.
#[test]
fn traffic_of_packed_rings_goes_on_each_time_that_the_daemon_is_killed_and_started_again() {
    let _alone = alone();
    assert_eq!(kill_and_restart(true), 0);
}
