//! Events: what happens in the switch, told when it happens.

use ringway_bridge::MacAddr;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::port::PortKind;
use crate::value::PortName;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Counts events while anybody listens: the next one has the next number. A gap has that of the
    /// last event that it stands for.
    pub number: u64,
    /// When it was noticed, in seconds since 1970 (UTC).
    pub unix_seconds: f64,
    /// Events of the same port left out since the one before: a guest or its front-end made too
    /// many of them. Absent for none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub suppressed: u64,
    /// What.
    #[serde(flatten)]
    pub what: Occurrence,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the form that serde asks for"
)]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What happened. Counts are of what came since the event of this kind and port before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Occurrence {
    /// A port was added.
    PortAdded {
        /// The port.
        port: PortName,
        /// What is behind it.
        kind: PortKind,
    },
    /// A port was removed.
    PortRemoved {
        /// The port.
        port: PortName,
    },
    /// Frames pass through a port.
    PortUp {
        /// The port.
        port: PortName,
    },
    /// A port serves its guest in part only.
    PortImpaired {
        /// The port.
        port: PortName,
        /// What is in the way.
        reason: String,
    },
    /// No frame passes through a port.
    PortDown {
        /// The port.
        port: PortName,
        /// Why; absent if nothing is wrong: its guest or front-end stopped it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Something was refused to a port's front-end, or one of its rings was stopped.
    PortError {
        /// The port.
        port: PortName,
        /// What went wrong.
        reason: String,
    },
    /// A front-end connected to a port, or was connected to.
    FrontEndConnected {
        /// The port.
        port: PortName,
    },
    /// The session with a port's front-end ended.
    FrontEndDisconnected {
        /// The port.
        port: PortName,
        /// Why; absent if the front-end hung up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A guest and its front-end have chosen features.
    FeaturesNegotiated {
        /// The port.
        port: PortName,
        /// Those of virtio.
        features: Vec<String>,
        /// Those of the vhost-user protocol.
        protocol_features: Vec<String>,
    },
    /// A station was seen behind a port for the first time, or again after it was forgotten.
    AddressLearned {
        /// The port.
        port: PortName,
        /// The station's address.
        mac: MacAddr,
        /// The VLAN that it is in; absent for none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vlan: Option<u16>,
    },
    /// A station is behind another port now.
    AddressMoved {
        /// That port.
        port: PortName,
        /// The station's address.
        mac: MacAddr,
        /// The VLAN that it is in; absent for none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vlan: Option<u16>,
        /// The port that it left.
        from: PortName,
    },
    /// Stations behind a port are known no more: they were silent for too long, the port went down,
    /// or an operator said so.
    AddressesForgotten {
        /// The port.
        port: PortName,
        /// How many.
        addresses: u64,
    },
    /// A port taught addresses beyond what it may.
    AddressesRefused {
        /// The port.
        port: PortName,
        /// Frames whose source was not learned since the port has as many addresses as it may.
        limit_hits: u64,
        /// Frames whose source was not learned since the database is full.
        refused_full: u64,
        /// Its addresses that made room in the full database for others.
        evictions: u64,
    },
    /// Frames from a port had a source address that was in use behind another port a moment ago.
    SpoofAttempts {
        /// The port.
        port: PortName,
        /// How many frames.
        frames: u64,
    },
    /// A port flooded more than it may.
    FloodsDropped {
        /// The port.
        port: PortName,
        /// Frames that were dropped for it.
        frames: u64,
    },
    /// Events are missing here: the client was too slow to read them.
    Gap {
        /// How many.
        lost: u64,
    },
}
