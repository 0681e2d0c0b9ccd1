//! The same frames through Open vSwitch as oracle, over random set-ups of VLANs and ports: the same
//! frames come out. Needs root, iproute2 and Open vSwitch, whose datapath in user space is used: it
//! asks nothing of the kernel.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command};
use std::time::Instant;

use common::host::{Raw, quiet_namespace, veth_named};
use common::{DEADLINE, Lab, eventually, frame};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use ringway_api::VlanConfig;
use ringway_guest::Guest;
use serde_json::{Value, from_value, json};
use tempfile::TempDir;

/// Ports of a set-up, each with a station of its own.
const PORTS: u8 = 5;

/// VLANs that ports are in, and one more of frames.
const VLANS: [u16; 3] = [10, 20, 4094];
const NOBODYS: u16 = 30;

/// Open vSwitch with a database of its own.
struct Ovs {
    folder: TempDir,
    children: Vec<Child>,
}

impl Ovs {
    fn start() -> Self {
        let mut ovs = Self {
            folder: TempDir::new().unwrap(),
            children: Vec::new(),
        };
        let schema = "/usr/share/openvswitch/vswitch.ovsschema";
        let (database, socket) = (ovs.path("conf.db"), ovs.path("db.sock"));
        ovs.run("ovsdb-tool", &["create", &database, schema]);
        let remote = format!("--remote=punix:{socket}");
        ovs.spawn("ovsdb-server", &[&database, &remote]);
        eventually("a database", || std::fs::exists(&socket).unwrap());
        ovs.vsctl("--no-wait init");
        let daemon = "/usr/lib/openvswitch-switch/ovs-vswitchd";
        ovs.spawn(daemon, &[&format!("unix:{socket}")]);
        ovs
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(arguments);
        for folder in ["RUN", "LOG", "DB", "SYSCONF"] {
            command.env(format!("OVS_{folder}DIR"), self.folder.path());
        }
        command
    }

    fn spawn(&mut self, program: &str, arguments: &[&str]) {
        let control = self.path(&format!("{}.ctl", self.children.len()));
        let mut command = self.command(program, arguments);
        command.arg(format!("--unixctl={control}"));
        command.args(["--no-chdir", "-vconsole:emer"]);
        let child = command.spawn();
        let hint = "is openvswitch-switch installed? bench/install-packages.sh does it";
        self.children
            .push(child.unwrap_or_else(|error| panic!("{program}: {error}; {hint}")));
    }

    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program, arguments).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn appctl(&self, arguments: &[&str]) -> String {
        let control = self.path("1.ctl");
        self.run("ovs-appctl", &[&["-t", &control][..], arguments].concat())
    }

    /// VLAN and address of all stations that are known.
    fn stations(&self) -> BTreeSet<(u16, String)> {
        let table = self.appctl(&["fdb/show", "br0"]);
        let rows = table.lines().skip(1).map(str::split_whitespace);
        rows.map(|mut row| {
            (
                row.nth(1).unwrap().parse().unwrap(),
                row.next().unwrap().into(),
            )
        })
        .collect()
    }

    /// Returns once the daemon has carried it out.
    fn vsctl(&self, arguments: &str) {
        let database = format!("--db=unix:{}", self.path("db.sock"));
        let arguments: Vec<_> = [database.as_str(), "--timeout=20"]
            .into_iter()
            .chain(arguments.split_whitespace())
            .collect();
        self.run("ovs-vsctl", &arguments);
    }

    /// Forgets what was decided of flows so far, before the last address was learned.
    fn settle(&self) {
        self.appctl(&["dpctl/del-flows"]);
        // The first may be the end of a look that began before.
        for _ in 0..2 {
            self.appctl(&["revalidator/wait"]);
        }
    }

    /// A bridge of these ports and nothing else.
    fn set_up(&self, settings: &[Value]) {
        let mut arguments = "--if-exists del-br br0 -- add-br br0 \
                             -- set bridge br0 datapath_type=netdev"
            .to_owned();
        for (at, setting) in settings.iter().enumerate() {
            arguments += &format!(" -- add-port br0 in{at}");
            for (key, value) in setting.as_object().unwrap() {
                let key = if key == "mode" { "vlan_mode" } else { key };
                let value = value.to_string().replace('"', "");
                arguments += &format!(" {key}={value}");
            }
        }
        self.vsctl(&arguments);
    }
}

impl Drop for Ovs {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn setting() -> impl Strategy<Value = Value> {
    let tag = || prop::sample::select(VLANS.to_vec());
    let list = || prop::sample::subsequence(VLANS.to_vec(), 1..=3);
    let text = |list: &[u16]| {
        list.iter()
            .map(u16::to_string)
            .collect::<Vec<_>>()
            .join(",")
    };
    let native = (list(), any::<prop::sample::Index>(), any::<bool>());
    prop_oneof![
        1 => Just(json!({})),
        2 => tag().prop_map(|tag| json!({ "tag": tag })),
        2 => list().prop_map(move |list| json!({ "trunks": text(&list) })),
        2 => native.prop_map(move |(list, native, is_tagged)| {
            let mode = if is_tagged { "native-tagged" } else { "native-untagged" };
            json!({ "mode": mode, "tag": native.get(&list), "trunks": text(&list) })
        }),
    ]
}

/// The tags of a frame: none, that of a priority, and those of VLANs.
fn tags() -> Vec<Vec<u8>> {
    let of = |vlan: u16, priority: u8| {
        let [high, low] = vlan.to_be_bytes();
        vec![0x81, 0, priority << 5 | high, low]
    };
    let vlans = VLANS.into_iter().chain([NOBODYS]);
    [vec![], of(0, 5)]
        .into_iter()
        .chain(vlans.map(|vlan| of(vlan, 3)))
        .collect()
}

/// A frame of its own from a port's station, with its number.
fn numbered(to: u8, from: u8, tag: &[u8], number: u64) -> Vec<u8> {
    let bare = frame(to, from, 64, number);
    [&bare[..12], tag, &bare[12..]].concat()
}

/// A frame's number, if it is one of ours.
fn number_of(frame: &[u8]) -> Option<u64> {
    let at = (12..frame.len().min(24)).find(|at| frame[*at..].starts_with(&[0x88, 0xb5]))?;
    let number = frame.get(at + 2..at + 10)?;
    Some(u64::from_be_bytes(number.try_into().unwrap()))
}

/// The frames that came out, by port and number.
type Came = BTreeMap<(u8, u64), Vec<Vec<u8>>>;

fn note(came: &mut Came, port: u8, frame: Vec<u8>) {
    if let Some(number) = number_of(&frame) {
        came.entry((port, number)).or_default().push(frame);
    }
}

/// A set-up of guests on ringway's ports.
struct Ours {
    lab: Lab,
    guests: Vec<Guest>,
    /// Frames sent so far.
    sent: u64,
}

impl Ours {
    fn set_up(settings: &[Value]) -> Self {
        let lab = Lab::start();
        let guest = |(port, setting): (u8, &Value)| {
            let vlan: VlanConfig = from_value(setting.clone()).unwrap();
            let path = lab.add_port_with(&format!("p{port}"), |config| config.vlan = vlan);
            Guest::builder().connect(&path).unwrap()
        };
        let guests = (0..).zip(settings).map(guest).collect();
        Self {
            lab,
            guests,
            sent: 0,
        }
    }

    /// Sends a frame from each port with each tag to each of these stations, and shows it to `also`.
    /// Returns what came out.
    fn exchange(&mut self, stations: &[u8], also: impl Fn(u8, &[u8])) -> Came {
        let mut came = Came::new();
        for from in 0..PORTS {
            for tag in tags() {
                for to in stations {
                    let frame = numbered(*to, from + 1, &tag, self.sent);
                    self.sent += 1;
                    let guest = &mut self.guests[usize::from(from)];
                    guest.send_frame(&frame).unwrap();
                    assert!(guest.flush(DEADLINE).unwrap());
                    also(from, &frame);
                    for (port, guest) in (0..).zip(&mut self.guests) {
                        while let Some(received) = guest.try_recv(0).unwrap() {
                            note(&mut came, port, received.frame);
                        }
                    }
                }
            }
        }
        came
    }
}

/// Waits until what comes out of `cables` is `ours`, or for some time. Returns what came.
fn take_all(cables: &[Raw], ours: &Came, settle: impl Fn()) -> Came {
    let mut theirs = Came::new();
    let take = |theirs: &mut Came| {
        for (port, cable) in (0..).zip(cables) {
            while let Some(frame) = cable.try_receive() {
                note(theirs, port, frame);
            }
        }
    };
    let start = Instant::now();
    while theirs != *ours && start.elapsed() < DEADLINE / 2 {
        take(&mut theirs);
        std::thread::yield_now();
    }
    // What is too much must not be too late to be seen.
    settle();
    take(&mut theirs);
    theirs
}

#[test]
fn frames_come_out_as_out_of_open_vswitch_in_any_vlans() {
    quiet_namespace();
    for port in 0..PORTS {
        let names = [format!("out{port}"), format!("in{port}")];
        veth_named([&names[0], &names[1]], 1, 1500);
    }
    let all = u16::try_from(libc::ETH_P_ALL).unwrap();
    let cables: Vec<_> = (0..PORTS)
        .map(|port| Raw::for_type(&format!("out{port}"), all))
        .collect();
    let ovs = Ovs::start();
    let (delivered, lost) = (Cell::new(0), Cell::new(0));
    let config = Config {
        cases: 16,
        failure_persistence: None,
        max_shrink_iters: 3,
        ..Config::default()
    };
    let set_ups = prop::collection::vec(setting(), usize::from(PORTS));
    let run = |settings: Vec<Value>| {
        ovs.set_up(&settings);
        let mut ours = Ours::set_up(&settings);
        // First to all, which teaches each port's station in all of its VLANs: when a flow that is
        // known changes since an address was learned is Open vSwitch's affair.
        for stations in [&[0xff][..], &[1, 2, 3, 4, 5, 99, 0xff]] {
            let before = ours.sent;
            let send = |from: u8, frame: &[u8]| cables[usize::from(from)].send(frame);
            let came = ours.exchange(stations, send);
            let theirs = take_all(&cables, &came, || ovs.settle());
            let known = ours.lab.switch.fdb();
            let known = known
                .iter()
                .map(|of| (of.vlan, of.mac.to_string()))
                .collect();
            prop_assert_eq!(ovs.stations(), known);
            let keys = theirs.keys().chain(came.keys());
            let differences = keys.filter(|key| theirs.get(key) != came.get(key));
            let differences: Vec<_> = differences
                .map(|key| (key, came.get(key), theirs.get(key)))
                .collect();
            prop_assert!(differences.is_empty(), "{:x?}", &differences[..1]);
            let reached: BTreeSet<_> = came.keys().map(|(_, number)| number).collect();
            delivered.set(delivered.get() + came.len());
            lost.set(lost.get() + (ours.sent - before) - reached.len() as u64);
        }
        Ok(())
    };
    TestRunner::new(config).run(&set_ups, run).unwrap();
    let counts = (delivered.get(), lost.get());
    assert!(
        counts.0 > 1000 && counts.1 > 100,
        "came out, and did not: {counts:?}"
    );
}
