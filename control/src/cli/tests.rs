use std::fmt;

use clap::CommandFactory;
use ringway_bridge::PortId;

use super::{Args, print};
use crate::api::{
    AfXdpConfig, AfXdpInfo, AfXdpQueueInfo, BusyPoll, DaemonReport, Drops, FdbEntry, FdbLimit,
    FdbListResult, HeaderAction, Mtu, PolledQueue, PortConfig, PortCounters, PortDetail, PortInfo,
    PortListResult, PortState, QueueInfo, SocketSpec, TapConfig, VhostUserConfig, VlanInfo,
    VlanListResult, WorkerDetail, WorkerInfo, WorkerListResult, XdpMode,
};

fn drops(list: &[(&str, u64)]) -> Drops {
    Drops(list.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect())
}

fn vm() -> PortInfo {
    PortInfo {
        name: "vm1".parse().unwrap(),
        id: PortId::new(0).unwrap(),
        config: PortConfig::VhostUser(VhostUserConfig {
            mtu: Mtu::new(9000),
            fdb_limit: FdbLimit::new(16).unwrap(),
            pins: [(0, 1)].into(),
            ..VhostUserConfig::new(SocketSpec::Listen("/run/ringway/vm1.sock".parse().unwrap()))
        }),
        state: PortState::Up,
        fdb_entries: 1,
        counters: PortCounters {
            rx_frames: 12_345_678,
            rx_gro_merged: 1_250_000,
            rx_bytes: 18_000_000_000,
            tx_frames: 99_999,
            tx_bytes: 6_600_000,
            rx_drops: drops(&[("no_destination", 3)]),
            tx_drops: drops(&[("ring_full", 120), ("port_down", 7_000_000)]),
            tx_csum_completed: 17,
            tx_gso_frames: 12,
            tx_gso_segments: 540,
            fdb_moves: 3,
            fdb_moves_refused: 1_200,
            fdb_limit_hits: 7,
            ..PortCounters::default()
        },
    }
}

fn tap() -> PortInfo {
    PortInfo {
        name: "a-rather-long-name.of-a-port".parse().unwrap(),
        id: PortId::new(1).unwrap(),
        config: PortConfig::Tap(TapConfig {
            persist: true,
            offload: false,
            ..TapConfig::new("rw0".parse().unwrap())
        }),
        state: PortState::Down,
        fdb_entries: 0,
        counters: PortCounters::default(),
    }
}

fn queue(index: u16, rx_size: u16) -> QueueInfo {
    QueueInfo {
        index,
        rx_started: rx_size > 0,
        tx_started: rx_size > 0,
        enabled: rx_size > 0,
        rx_size,
        tx_size: rx_size,
        worker: index % 2,
        rx_frames: 1_000 * u64::from(rx_size),
        tx_frames: 0,
        calls: 12,
        contended: 0,
        rx_resumed: false,
        tx_resumed: false,
        tolerated: 0,
    }
}

fn vm_detail() -> PortDetail {
    PortDetail {
        port: vm(),
        queues: vec![
            QueueInfo {
                tx_resumed: true,
                ..queue(0, 1024)
            },
            queue(1, 0),
        ],
        features: vec!["VIRTIO_F_VERSION_1".into(), "VIRTIO_NET_F_MRG_RXBUF".into()],
        protocol_features: vec!["MQ".into(), "REPLY_ACK".into()],
        connections: 2,
        call_ns: 12_345_678,
        closed_for_ms: None,
        mapped_bytes: 512 << 20,
        memory_regions: 2,
        last_error: Some("the front-end hung up".into()),
        mtu: Some(9000),
        rx_offloads: vec!["checksum".into(), "tso4".into()],
        tx_offloads: vec!["checksum".into()],
        actions: vec![
            action("b", "pass", &["checksum", "tso4"], &[]),
            action("c", "segment", &["checksum"], &["tso4"]),
            action("host", "pass", &["checksum", "tso4"], &[]),
        ],
        af_xdp: None,
    }
}

fn action(to: &str, action: &str, passed: &[&str], done: &[&str]) -> HeaderAction {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    HeaderAction {
        to: to.parse().unwrap(),
        action: action.into(),
        passed: owned(passed),
        done: owned(done),
    }
}

fn tap_detail() -> PortDetail {
    PortDetail {
        port: tap(),
        queues: vec![],
        features: vec![],
        protocol_features: vec![],
        connections: 0,
        call_ns: 0,
        closed_for_ms: None,
        mapped_bytes: 0,
        memory_regions: 0,
        last_error: None,
        mtu: None,
        rx_offloads: vec![],
        tx_offloads: vec![],
        actions: vec![],
        af_xdp: None,
    }
}

fn nic_detail() -> PortDetail {
    let port = PortInfo {
        name: "uplink".parse().unwrap(),
        config: PortConfig::AfXdp(AfXdpConfig {
            busy_poll_us: BusyPoll::new(20),
            ..AfXdpConfig::new("eth1".parse().unwrap())
        }),
        state: PortState::Up,
        ..tap()
    };
    let ring = |index| AfXdpQueueInfo {
        index,
        ring_size: 2048,
        fill_level: 2016,
        rx_level: 32,
        tx_level: 0,
        tx_pending: 64,
        rx_ring_full: 1_000_000 * u64::from(index),
        rx_fill_empty: 3,
        rx_dropped: 0,
        rx_invalid: 0,
        tx_invalid: 0,
    };
    PortDetail {
        port,
        queues: vec![queue(0, 2048), queue(1, 2048)],
        mtu: Some(9000),
        af_xdp: Some(AfXdpInfo {
            mode: XdpMode::Copy,
            program_id: 42,
            multi_buffer: true,
            umem_bytes: 32 << 20,
            huge_pages: true,
            queues: vec![ring(0), ring(1)],
        }),
        ..tap_detail()
    }
}

fn worker(index: u16, cpu: usize) -> WorkerInfo {
    WorkerInfo {
        index,
        cpu,
        queues: 9,
        active_queues: u32::from(index),
        busy_ns: 1_000_000_000 * u64::from(index),
        polling_ns: 500_000_000 * u64::from(index),
        asleep_ns: 2_500_000_000 * u64::from(index),
        turns: 123_456_789,
        bursts: 1000,
        frames: 31_400,
        sleeps: 42,
        contended: 7 * u64::from(index),
        recent_busy_share: 0.75 * f64::from(index),
    }
}

/// What `print` writes, after checking what holds for all of it.
fn written<T>(print: impl Fn(&mut dyn fmt::Write, &T) -> fmt::Result, value: &T) -> String {
    let mut text = String::new();
    print(&mut text, value).unwrap();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        assert_eq!(line, line.trim_end(), "a trailing space");
    }
    text
}

#[test]
fn port_list() {
    let ports = vec![tap(), vm()];
    insta::assert_snapshot!(written(print::ports, &PortListResult { ports }));
}

#[test]
fn port_list_without_ports() {
    let ports = vec![];
    insta::assert_snapshot!(written(print::ports, &PortListResult { ports }));
}

#[test]
fn port_show_of_a_guest() {
    insta::assert_snapshot!(written(print::port, &vm_detail()));
}

#[test]
fn port_show_of_a_tap() {
    insta::assert_snapshot!(written(print::port, &tap_detail()));
}

#[test]
fn port_show_of_a_nic() {
    insta::assert_snapshot!(written(print::port, &nic_detail()));
}

#[test]
fn port_show_of_a_nic_as_json() {
    insta::assert_snapshot!(serde_json::to_string_pretty(&nic_detail()).unwrap());
}

#[test]
fn port_show_as_json() {
    insta::assert_snapshot!(serde_json::to_string_pretty(&vm_detail()).unwrap());
}

#[test]
fn fdb_list() {
    let entry = |mac: &str, vlan, is_static, age_seconds| FdbEntry {
        mac: mac.parse().unwrap(),
        vlan,
        port: "vm1".parse().unwrap(),
        is_static,
        age_seconds,
    };
    let entries = vec![
        entry("52:54:00:00:00:01", 0, false, 12.34),
        entry("52:54:00:00:00:02", 4094, true, 0.0),
        entry("52:54:00:00:00:03", 10, false, 0.05),
    ];
    insta::assert_snapshot!(written(print::fdb, &FdbListResult { entries }));
}

#[test]
fn vlan_list() {
    let row = |vlans: &str, tagged: &[&str], untagged: &[&str]| VlanInfo {
        vlans: vlans.into(),
        tagged: tagged.iter().map(|name| name.parse().unwrap()).collect(),
        untagged: untagged.iter().map(|name| name.parse().unwrap()).collect(),
    };
    let vlans = vec![
        row("0", &[], &["host"]),
        row("1-9,11-4094", &["host", "uplink"], &[]),
        row("10", &["host", "uplink"], &["vm1", "vm2"]),
    ];
    insta::assert_snapshot!(written(print::vlans, &VlanListResult { vlans }));
    let vlans = vec![];
    insta::assert_snapshot!(
        "vlan_list_without_vlans",
        written(print::vlans, &VlanListResult { vlans })
    );
}

#[test]
fn worker_list() {
    let workers = vec![worker(0, 2), worker(1, 3)];
    insta::assert_snapshot!(written(print::workers, &WorkerListResult { workers }));
}

#[test]
fn worker_show() {
    let queue = |port: &str, queue, rx_frames: u64, is_pinned| PolledQueue {
        port: port.parse().unwrap(),
        queue,
        is_pinned,
        rx_frames,
        rx_bytes: rx_frames * 1500,
        frames_per_second: rx_frames as f64 / 10.0,
        bits_per_second: rx_frames as f64 * 1200.0,
        recent_busy_share: rx_frames as f64 / 1e8,
    };
    let show = |queues| WorkerDetail {
        worker: worker(1, 3),
        interval_seconds: 5.0,
        queues,
    };
    let queues = vec![
        queue("vm1", 0, 12_345_678, false),
        queue("vm1", 1, 0, false),
        queue("vm2", 1, 0, true),
        queue("vm2", 5, 1, false),
    ];
    insta::assert_snapshot!(written(print::worker, &show(queues.clone())));
    let silent = show(queues[1..2].to_vec());
    insta::assert_snapshot!(
        "worker_show_without_frames",
        written(print::worker, &silent)
    );
    let json = serde_json::to_string_pretty(&show(queues)).unwrap();
    insta::assert_snapshot!("worker_show_as_json", json);
}

#[test]
fn info() {
    let info = DaemonReport {
        version: "0.1.0".into(),
        pid: 4711,
        uptime_seconds: 7_500.0,
    };
    insta::assert_snapshot!(written(print::info, &info));
}

/// The help text of `ringway` or one of its subcommands, at a fixed width.
fn help(path: &[&str]) -> String {
    let mut command = Args::command().term_width(100);
    command.build();
    let mut found = &mut command;
    for name in path {
        found = found.find_subcommand_mut(name).unwrap();
    }
    let text = found.render_long_help().to_string();
    text.replace(
        &format!(" [env: RINGWAY_CONTROL={}]", socket_variable()),
        " [env: RINGWAY_CONTROL=]",
    )
}

fn socket_variable() -> String {
    std::env::var("RINGWAY_CONTROL").unwrap_or_default()
}

#[test]
fn help_texts() {
    insta::assert_snapshot!("help", help(&[]));
    insta::assert_snapshot!("help_port_add", help(&["port", "add"]));
    insta::assert_snapshot!(
        "help_port_add_vhost_user",
        help(&["port", "add", "vhost-user"])
    );
    insta::assert_snapshot!("help_port_add_tap", help(&["port", "add", "tap"]));
    insta::assert_snapshot!("help_port_add_af_xdp", help(&["port", "add", "af-xdp"]));
    insta::assert_snapshot!("help_port_list", help(&["port", "list"]));
    insta::assert_snapshot!("help_port_set", help(&["port", "set"]));
    insta::assert_snapshot!("help_vlan", help(&["vlan"]));
    insta::assert_snapshot!("help_fdb_list", help(&["fdb", "list"]));
    insta::assert_snapshot!("help_port_show", help(&["port", "show"]));
    insta::assert_snapshot!("help_drops", help(&["drops"]));
    insta::assert_snapshot!("help_capture", help(&["capture"]));
    insta::assert_snapshot!("help_monitor", help(&["monitor"]));
    insta::assert_snapshot!("help_measure", help(&["measure"]));
    insta::assert_snapshot!("help_worker", help(&["worker"]));
    insta::assert_snapshot!("help_worker_list", help(&["worker", "list"]));
    insta::assert_snapshot!("help_worker_show", help(&["worker", "show"]));
    insta::assert_snapshot!("help_worker_pin", help(&["worker", "pin"]));
    let daemon = crate::daemon::Args::command()
        .term_width(100)
        .render_long_help();
    insta::assert_snapshot!("help_ringwayd", daemon.to_string());
}
