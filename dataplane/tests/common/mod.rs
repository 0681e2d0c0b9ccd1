//! A switch with synthetic guests on real vhost-user sockets.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "helpers of tests, not all used by each"
)]

pub(crate) mod endpoint;
pub(crate) mod fuse;
pub(crate) mod hostile;
pub(crate) mod innocents;
pub(crate) mod observe;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ringway_api::{
    AfXdpConfig, AfXdpInfo, BalanceConfig, GroupFwdMask, IdleConfig, IfName, PortConfig,
    PortCounters, PortName, QueuePairs, SocketSpec, SwitchConfig, TapConfig, VhostUserConfig,
};
use ringway_dataplane::Switch;
use ringway_guest::{Guest, GuestBuilder, Layout, ReceivedFrame};
use tempfile::TempDir;

pub(crate) use ringway_testbed::{DEADLINE, eventually, host, packet};

/// All pairs of layouts, in order.
pub(crate) const LAYOUTS: [[Layout; 2]; 4] = [
    [Layout::Split, Layout::Split],
    [Layout::Split, Layout::Packed],
    [Layout::Packed, Layout::Split],
    [Layout::Packed, Layout::Packed],
];

/// A running switch and the folder of its sockets.
pub(crate) struct Lab {
    pub(crate) switch: Arc<Switch>,
    folder: TempDir,
}

impl Lab {
    /// A switch with one worker on the first CPU that this process may use.
    pub(crate) fn start() -> Self {
        Self::with_config(|_| {})
    }

    pub(crate) fn with_config(change: impl FnOnce(&mut SwitchConfig)) -> Self {
        let cpu = core_affinity::get_core_ids().unwrap()[0].id;
        let mut config = SwitchConfig {
            worker_cpus: vec![cpu],
            idle: IdleConfig {
                backpressure: DEADLINE,
                ..IdleConfig::default()
            },
            balance: BalanceConfig::DEFAULT,
            fdb_capacity: 1024,
            fdb_ageing: Duration::from_secs(300),
            fdb_move_hold: SwitchConfig::DEFAULT_FDB_MOVE_HOLD,
            group_fwd_mask: GroupFwdMask::DEFAULT,
        };
        change(&mut config);
        Self {
            switch: Arc::new(Switch::start(config).unwrap()),
            folder: TempDir::new().unwrap(),
        }
    }

    pub(crate) fn socket(&self, port: &str) -> PathBuf {
        self.folder.path().join(format!("{port}.sock"))
    }

    /// Adds a vhost-user port with up to 8 queue pairs that listens.
    pub(crate) fn add_port(&self, port: &str) -> PathBuf {
        self.add_port_with(port, |_| {})
    }

    pub(crate) fn add_port_with(
        &self,
        port: &str,
        change: impl FnOnce(&mut VhostUserConfig),
    ) -> PathBuf {
        let path = self.socket(port);
        let socket = SocketSpec::Listen(path.as_path().try_into().unwrap());
        let mut config = VhostUserConfig::new(socket);
        change(&mut config);
        let config = PortConfig::VhostUser(config);
        self.switch.add_port(name(port), config).unwrap();
        path
    }

    /// Adds a port and connects a guest to it.
    pub(crate) fn guest(&self, port: &str, config: GuestBuilder) -> Guest {
        let path = self.add_port(port);
        config.connect(&path).unwrap()
    }

    pub(crate) fn counters(&self, port: &str) -> PortCounters {
        self.switch.port(&name(port)).unwrap().port.counters
    }

    /// Waits until a port's count of drops is `expected`: counters of a source follow those of the
    /// destination by the rest of a burst.
    pub(crate) fn eventually_dropped(
        &self,
        port: &str,
        count: impl Fn(PortCounters) -> u64,
        expected: u64,
    ) {
        eventually("the drops are counted", || {
            count(self.counters(port)) >= expected
        });
        assert_eq!(count(self.counters(port)), expected);
    }

    /// Asserts that every frame received was delivered or dropped for a reason, or joined to one
    /// that was, or cut into segments that were. `extra_copies` is what floods to several ports
    /// made of one frame. Counters of a source follow those of the destination by the rest of a
    /// burst, hence the wait.
    pub(crate) fn assert_conserved(&self, ports: &[&str], extra_copies: u64) {
        eventually("received + copies = sent + dropped", || {
            let all: Vec<_> = ports.iter().map(|port| self.counters(port)).collect();
            let received: u64 = all.iter().map(|c| c.rx_frames - c.rx_gro_merged).sum();
            let sent: u64 = all.iter().map(|c| c.tx_frames).sum();
            let dropped: u64 = all
                .iter()
                .map(|c| c.rx_drops.total() + c.tx_drops.total())
                .sum();
            let segments: u64 = all
                .iter()
                .map(|c| c.tx_gso_segments - c.tx_gso_frames)
                .sum();
            received + extra_copies + segments == sent + dropped
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A worker that hangs can't be joined: let the test end and say what failed.
        if std::thread::panicking() {
            std::mem::forget(Arc::clone(&self.switch));
        }
    }
}

pub(crate) fn name(port: &str) -> PortName {
    port.parse().unwrap()
}

pub(crate) fn ifname(name: &str) -> IfName {
    name.parse().unwrap()
}

pub(crate) fn tap(interface: &str, queues: u16, offload: bool) -> PortConfig {
    PortConfig::Tap(TapConfig {
        queues: QueuePairs::new(queues).unwrap(),
        offload,
        ..TapConfig::new(ifname(interface))
    })
}

/// All queues of `xdp0`, unless changed.
pub(crate) fn nic_config(change: impl FnOnce(&mut AfXdpConfig)) -> AfXdpConfig {
    let mut config = AfXdpConfig::new(ifname("xdp0"));
    change(&mut config);
    config
}

pub(crate) fn af_xdp(change: impl FnOnce(&mut AfXdpConfig)) -> PortConfig {
    PortConfig::AfXdp(nic_config(change))
}

/// A lab whose port `nic` is one end of a veth pair in a fresh namespace; a raw socket has the
/// other.
pub(crate) fn lab_with_nic(
    queues: u16,
    mtu: u32,
    change: impl FnOnce(&mut AfXdpConfig),
) -> (Lab, host::Raw) {
    host::fresh_namespace();
    host::veth(queues, mtu);
    let lab = Lab::start();
    lab.switch.add_port(name("nic"), af_xdp(change)).unwrap();
    (lab, host::Raw::open("far0"))
}

pub(crate) fn nic_info(lab: &Lab) -> AfXdpInfo {
    lab.switch.port(&name("nic")).unwrap().af_xdp.unwrap()
}

/// An Ethernet frame of `bytes` from station `from` to station `to` (0xff: broadcast), filled with
/// a pattern that depends on `seed`.
pub(crate) fn frame(to: u8, from: u8, bytes: usize, seed: u64) -> Vec<u8> {
    let mut frame = Vec::with_capacity(bytes);
    frame.extend(mac(to));
    frame.extend(mac(from));
    frame.extend([0x88, 0xb5]);
    frame.extend(seed.to_be_bytes());
    let mut next = seed;
    while frame.len() < bytes {
        next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        frame.push((next >> 56) as u8);
    }
    frame.truncate(bytes);
    frame
}

pub(crate) fn mac(station: u8) -> [u8; 6] {
    if station == 0xff {
        [0xff; 6]
    } else {
        [0x52, 0x54, 0, 0, 0, station]
    }
}

/// Receives one frame or fails.
pub(crate) fn receive(guest: &mut Guest) -> ReceivedFrame {
    guest.recv(DEADLINE).unwrap().expect("a frame")
}
