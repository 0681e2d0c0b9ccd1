//! Two guests and the host on one switch: ringwayd, or what it is compared with.
//!
//! ```text
//!   guest a (10.77.0.1) --+-- switch --+-- guest b (10.77.0.2)
//!                         |            |
//!                         +-- host (10.77.0.254), in a namespace of its own:
//!                             on ringwayd a tap, or a veth pair with AF_XDP on its other end
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::accel::Accel;
use super::guest::{self, Account, GuestNic, GuestSpec, HOST_ADDRESS, HOST_MAC, QemuGuest};
use super::image::Image;
use super::shape::{HostPort, NetworkShape};
use crate::daemon::{Daemon, Programs, RingwayControl};
use crate::netns::NetNs;

/// The interface of the host on ringwayd, on whatever kind of port.
pub(crate) const HOST_INTERFACE: &str = "rw0";

/// The host's port of ringwayd.
pub(crate) const HOST_PORT: &str = "host";

/// The end of a veth pair whose queues ringwayd has; the host's interface is the other.
const NIC: &str = "nic0";

/// The bridge of the baseline, which is also the host's interface there.
const BRIDGE: &str = "br0";

/// What carries the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LabSwitch {
    /// ringwayd: vhost-user ports and the host's.
    Ringway,
    /// QEMU's tap back-end and a Linux bridge, without the kernel's vhost.
    LinuxBridge,
}

impl LabSwitch {
    pub(crate) fn name(self) -> &'static str {
        match self {
            LabSwitch::Ringway => "ringway",
            LabSwitch::LinuxBridge => "linux bridge",
        }
    }
}

/// What all sets of guests share.
#[derive(Clone, Debug)]
pub(crate) struct Base {
    pub(crate) image: Image,
    pub(crate) accel: Accel,
    pub(crate) programs: Programs,
    /// Logs and sockets.
    pub(crate) folder: PathBuf,
    /// Who runs QEMU, on sockets of that group; `None` is who runs the lab.
    pub(crate) account: Option<Account>,
    /// Guests' NICs have `iommu_platform=on`.
    pub(crate) iommu_platform: bool,
}

/// A switch with its host interface and up to two guests. Fields are dropped in this order:
/// guests, switch, namespace.
pub(crate) struct LabNetwork {
    pub(crate) switch: LabSwitch,
    guests: [Option<QemuGuest>; 2],
    daemon: Option<Daemon>,
    pub(crate) namespace: NetNs,
    pub(crate) shape: NetworkShape,
    base: Base,
    folder: PathBuf,
}

impl LabNetwork {
    /// Builds switch and host interface; no guest yet.
    pub(crate) fn new(switch: LabSwitch, shape: NetworkShape, base: &Base) -> Result<LabNetwork> {
        let tag = match switch {
            LabSwitch::Ringway => "ringway",
            LabSwitch::LinuxBridge => "bridge",
        };
        let folder = base.folder.join(format!("{tag}-{}", shape.tag()));
        std::fs::create_dir_all(&folder)?;
        let mut network = LabNetwork {
            switch,
            guests: [None, None],
            daemon: None,
            namespace: NetNs::create(tag)?,
            shape,
            base: base.clone(),
            folder,
        };
        match switch {
            LabSwitch::Ringway => {
                if shape.host == HostPort::AfXdp {
                    network.make_veth()?;
                }
                network.start_daemon()?;
            }
            LabSwitch::LinuxBridge => network.make_bridge()?,
        }
        Ok(network)
    }

    /// Boots both guests side by side and waits for both.
    pub(crate) fn boot(&mut self) -> Result<()> {
        for index in 0..2 {
            self.start_guest(index)?;
        }
        for index in 0..2 {
            self.wait_guest(index)?;
        }
        Ok(())
    }

    /// Starts QEMU; the guest is not up yet.
    pub(crate) fn start_guest(&mut self, index: usize) -> Result<()> {
        let name = guest::NAMES[index];
        let nic = match self.switch {
            LabSwitch::Ringway => GuestNic::VhostUser {
                socket: self.port_socket(name),
            },
            LabSwitch::LinuxBridge => GuestNic::Tap {
                interface: tap_of(index),
            },
        };
        let spec = GuestSpec {
            index,
            queue_pairs: self.shape.queue_pairs,
            mtu: self.shape.mtu_bytes,
            offloads: self.shape.offloads.0[index],
            nic,
            accel: self.base.accel,
            account: self.base.account,
            iommu_platform: self.base.iommu_platform,
        };
        self.guests[index] = None;
        let (image, folder) = (&self.base.image, self.qemu_folder()?);
        let guest = QemuGuest::start(&spec, image, &folder, Some(&self.namespace))
            .with_context(|| format!("guest {name} on {}", self.switch.name()))?;
        self.guests[index] = Some(guest);
        Ok(())
    }

    /// Waits until a started guest takes commands.
    pub(crate) fn wait_guest(&mut self, index: usize) -> Result<()> {
        let (name, switch) = (guest::NAMES[index], self.switch.name());
        self.guest(index)?
            .wait_ready()
            .with_context(|| format!("booting guest {name} on {switch}"))
    }

    pub(crate) fn guest(&mut self, index: usize) -> Result<&mut QemuGuest> {
        self.guests[index]
            .as_mut()
            .with_context(|| format!("guest {} is not started", guest::NAMES[index]))
    }

    /// The namespace and both guests, for what is done to them at once.
    pub(crate) fn guests(&mut self) -> Result<(&NetNs, [&mut QemuGuest; 2])> {
        match &mut self.guests {
            [Some(a), Some(b)] => Ok((&self.namespace, [a, b])),
            _ => bail!("not both guests are started"),
        }
    }

    /// The daemon; an error on the baseline.
    pub(crate) fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("this switch has no daemon")
    }

    /// Its control socket.
    pub(crate) fn control(&self) -> Result<&RingwayControl> {
        Ok(&self.daemon()?.control)
    }

    /// Kills the daemon with SIGKILL.
    pub(crate) fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.process.kill();
        }
    }

    /// Starts the daemon and adds the three ports.
    pub(crate) fn start_daemon(&mut self) -> Result<()> {
        let (programs, namespace) = (&self.base.programs, Some(&self.namespace));
        let daemon = Daemon::start("ringwayd", programs, namespace, &self.folder)?;
        let (queues, mtu) = (
            self.shape.queue_pairs.to_string(),
            self.shape.mtu_bytes.to_string(),
        );
        let sizes = ["--queues", &queues, "--mtu", &mtu];
        let group = self.base.account.map(|account| account.group.to_string());
        for name in guest::NAMES {
            let socket = self.port_socket(name);
            let socket = socket.to_string_lossy();
            let mut words = vec!["port", "add", name, "vhost-user", "--listen", &*socket];
            if let Some(group) = &group {
                words.extend(["--group", group]);
            }
            daemon.control.ringway(&[&words[..], &sizes].concat())?;
        }
        let (kind, interface) = match self.shape.host {
            HostPort::Tap => ("tap", HOST_INTERFACE),
            HostPort::AfXdp => ("af-xdp", NIC),
        };
        let words = ["port", "add", HOST_PORT, kind, "--ifname", interface];
        daemon.control.ringway(&[&words[..], &sizes].concat())?;
        self.daemon = Some(daemon);
        self.configure_host(HOST_INTERFACE)
    }

    /// Logs and sockets of this network.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// What QEMU writes: a folder of its own if it is another user's.
    fn qemu_folder(&self) -> Result<PathBuf> {
        let Some(account) = self.base.account else {
            return Ok(self.folder.clone());
        };
        let folder = self.folder.join("qemu");
        std::fs::create_dir_all(&folder)?;
        std::os::unix::fs::chown(&folder, Some(account.user), Some(account.group))?;
        Ok(folder)
    }

    /// A path for the socket of a vhost-user port.
    pub(crate) fn port_socket(&self, port: &str) -> PathBuf {
        self.folder.join(format!("{port}.sock"))
    }

    /// A veth pair with as many queues at each end as guests have.
    fn make_veth(&self) -> Result<()> {
        let (queues, mtu) = (
            self.shape.queue_pairs.to_string(),
            self.shape.mtu_bytes.to_string(),
        );
        let sizes = ["mtu", &mtu, "numrxqueues", &queues, "numtxqueues", &queues];
        self.namespace.add_veth(NIC, HOST_INTERFACE, &sizes)?;
        self.namespace.ip(&["link", "set", NIC, "up"])?;
        Ok(())
    }

    fn make_bridge(&self) -> Result<()> {
        self.namespace
            .ip(&["link", "add", BRIDGE, "type", "bridge", "stp_state", "0"])?;
        for index in 0..2 {
            let tap = tap_of(index);
            let mut words = vec!["tuntap", "add", "dev", &tap, "mode", "tap", "vnet_hdr"];
            if self.shape.queue_pairs > 1 {
                words.push("multi_queue");
            }
            self.namespace.ip(&words)?;
            let mtu = self.shape.mtu_bytes.to_string();
            self.namespace
                .ip(&["link", "set", &tap, "mtu", &mtu, "master", BRIDGE, "up"])?;
        }
        self.configure_host(BRIDGE)
    }

    fn configure_host(&self, interface: &str) -> Result<()> {
        let mtu = self.shape.mtu_bytes.to_string();
        let address = format!("{HOST_ADDRESS}/24");
        self.namespace
            .ip(&["link", "set", interface, "address", HOST_MAC, "mtu", &mtu])?;
        self.namespace.ip(&["link", "set", interface, "up"])?;
        self.namespace
            .ip(&["addr", "replace", &address, "dev", interface])?;
        Ok(())
    }
}

fn tap_of(index: usize) -> String {
    format!("tap{index}")
}
