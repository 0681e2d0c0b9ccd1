//! The port of a guest.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{OnLoop, Pins, read_pins, yes};
use crate::access::{AccountName, SocketAccess, SocketMode};
use crate::value::{BadValue, FdbLimit, FloodLimit, Mtu, QueuePairs, SocketPath};
use crate::vlan::VlanConfig;

/// The vhost-user socket of a port, and which end of it the port takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketSpec {
    /// Wait at this path for front-ends (QEMU is the client).
    Listen(SocketPath),
    /// Connect to this path, and again whenever the connection ends (QEMU is the server).
    Connect(SocketPath),
}

/// A guest's port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "VhostUserFields", into = "VhostUserFields")]
pub struct VhostUserConfig {
    /// The socket.
    pub socket: SocketSpec,
    /// Who may open the socket if the port makes it; what is not said is as the switch has it.
    pub access: SocketAccess,
    /// Most queue pairs that the guest may use.
    pub queues: QueuePairs,
    /// The guest may leave segmentation of what it receives, and checksums, to itself.
    pub guest_offloads: bool,
    /// The guest may have packed rings.
    pub packed: bool,
    /// L3 MTU; `None` takes the front-end's.
    pub mtu: Option<Mtu>,
    /// Most MAC addresses learned behind the port.
    pub fdb_limit: FdbLimit,
    /// Most copies per second that floods of the port's frames make.
    pub flood_limit: FloodLimit,
    /// What happens where frames of others come back through the port.
    pub on_loop: OnLoop,
    /// The VLANs that it is in.
    pub vlan: VlanConfig,
    /// Queue pairs that are polled by a given worker whatever their load.
    pub pins: Pins,
}

/// [`VhostUserConfig`] as it is written: of `listen` and `connect` there is one.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct VhostUserFields {
    /// Absolute path of the socket at which to wait for the front-end; this or `connect`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    listen: Option<SocketPath>,
    /// Absolute path of the front-end's socket to connect to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connect: Option<SocketPath>,
    /// With `listen`: the user, by name or number, whose the socket's file is; absent is as
    /// `[sockets]` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<AccountName>,
    /// With `listen`: the group of the socket's file, by name or number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<AccountName>,
    /// With `listen`: the permissions of the socket's file, in octal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<SocketMode>,
    /// The most queue pairs that the guest may use.
    #[serde(default = "VhostUserConfig::default_queues")]
    queues: QueuePairs,
    /// Offer the guest to receive frames to be segmented, or whose checksum is open
    /// (VIRTIO_NET_F_GUEST_*); false gives it whole frames with their checksums. For guests that
    /// switch these offloads off at run time, as one that loads an XDP program, of which QEMU tells
    /// a back-end nothing.
    #[serde(default = "yes")]
    guest_offloads: bool,
    /// Offer the guest packed rings (VIRTIO_F_RING_PACKED); false leaves it the split ones. For
    /// front-ends whose guest takes what is offered, as user-mode Linux: QEMU has packed=off.
    #[serde(default = "yes")]
    packed: bool,
    /// L3 MTU in bytes; absent takes the front-end's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtu: Option<Mtu>,
    /// Most MAC addresses learned behind the port.
    #[serde(default)]
    fdb_limit: FdbLimit,
    /// Most copies per second that floods of the port's frames make, by each worker that polls its
    /// queues; 0 for no limit. The first copy of a frame does not count.
    #[serde(default)]
    flood_limit: FloodLimit,
    /// What happens where many frames from the port have addresses that are in use behind others.
    #[serde(default, skip_serializing_if = "OnLoop::is_default")]
    on_loop: OnLoop,
    /// The VLANs that it is in; absent is a trunk of all, whose untagged frames are in none.
    #[serde(default, skip_serializing_if = "VlanConfig::is_default")]
    vlan: VlanConfig,
    /// Queue pairs that are polled by a given worker whatever their load: number of the pair, and
    /// of the worker. The switch places the others.
    #[serde(default, skip_serializing_if = "Pins::is_empty")]
    #[serde(deserialize_with = "read_pins")]
    #[schemars(with = "BTreeMap<String, u16>")]
    pins: Pins,
}

impl VhostUserConfig {
    /// A port at `socket` with nothing else said.
    pub fn new(socket: SocketSpec) -> Self {
        Self {
            socket,
            access: SocketAccess::default(),
            queues: Self::default_queues(),
            guest_offloads: true,
            packed: true,
            mtu: None,
            fdb_limit: FdbLimit::DEFAULT,
            flood_limit: FloodLimit::DEFAULT,
            on_loop: OnLoop::Alarm,
            vlan: VlanConfig::default(),
            pins: Pins::default(),
        }
    }

    /// Checks that the port makes the socket of which it is said who may open it.
    ///
    /// # Errors
    /// It connects to one.
    pub fn check_access(&self) -> Result<(), BadValue> {
        if matches!(self.socket, SocketSpec::Connect(_)) && !self.access.is_empty() {
            return Err(BadValue::new(
                "owner, group and mode are of a socket that the port makes",
                "with `connect` they are QEMU's to set; leave them out",
            ));
        }
        Ok(())
    }

    /// An upper bound that costs nothing until the guest starts them, and what guests of up to
    /// eight vCPUs ask for.
    const fn default_queues() -> QueuePairs {
        QueuePairs::EIGHT
    }
}

impl TryFrom<VhostUserFields> for VhostUserConfig {
    type Error = String;

    fn try_from(fields: VhostUserFields) -> Result<Self, String> {
        let socket = match (fields.listen, fields.connect) {
            (Some(path), None) => SocketSpec::Listen(path),
            (None, Some(path)) => SocketSpec::Connect(path),
            (listen, _) => {
                let reason = match listen {
                    None => "a vhost-user port needs the path of a socket",
                    Some(_) => "a vhost-user port can't both listen and connect",
                };
                let hint = "give `listen` if QEMU is the client, `connect` if it is the server";
                return Err(BadValue::new(reason, hint).into_text());
            }
        };
        let access = SocketAccess {
            owner: fields.owner,
            group: fields.group,
            mode: fields.mode,
        };
        let config = Self {
            socket,
            access,
            queues: fields.queues,
            guest_offloads: fields.guest_offloads,
            packed: fields.packed,
            mtu: fields.mtu,
            fdb_limit: fields.fdb_limit,
            flood_limit: fields.flood_limit,
            on_loop: fields.on_loop,
            vlan: fields.vlan,
            pins: fields.pins,
        };
        config.check_access().map_err(BadValue::into_text)?;
        Ok(config)
    }
}

impl From<VhostUserConfig> for VhostUserFields {
    fn from(config: VhostUserConfig) -> Self {
        let (listen, connect) = match config.socket {
            SocketSpec::Listen(path) => (Some(path), None),
            SocketSpec::Connect(path) => (None, Some(path)),
        };
        let SocketAccess { owner, group, mode } = config.access;
        Self {
            listen,
            connect,
            owner,
            group,
            mode,
            queues: config.queues,
            guest_offloads: config.guest_offloads,
            packed: config.packed,
            mtu: config.mtu,
            fdb_limit: config.fdb_limit,
            flood_limit: config.flood_limit,
            on_loop: config.on_loop,
            vlan: config.vlan,
            pins: config.pins,
        }
    }
}
