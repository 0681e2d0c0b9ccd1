//! How a port is configured: one shape for the API, the configuration file and what is told.

mod vhost_user;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::value::{
    BadValue, BusyPoll, FdbLimit, FloodLimit, IfName, Mtu, QueuePairs, UmemFrames, shown,
};
use crate::vlan::VlanConfig;

pub use vhost_user::{SocketSpec, VhostUserConfig};

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PortKind {
    /// A guest, through a vhost-user socket.
    VhostUser,
    /// A tap interface of the host.
    Tap,
    /// Queues of a NIC or veth through AF_XDP.
    AfXdp,
}

impl PortKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::VhostUser, Self::Tap, Self::AfXdp];

    /// The kind as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Tap => "tap",
            Self::AfXdp => "af-xdp",
        }
    }
}

/// A port's configuration, with the defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum PortConfig {
    /// A guest, through a vhost-user socket.
    VhostUser(VhostUserConfig),
    /// A tap interface of the host.
    Tap(TapConfig),
    /// Queues of a NIC or veth through AF_XDP.
    AfXdp(AfXdpConfig),
}

/// The port of a tap interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapConfig {
    /// Name of the interface; created if there is none.
    pub ifname: IfName,
    /// Queue pairs to open.
    #[serde(default = "TapConfig::default_queues")]
    pub queues: QueuePairs,
    /// L3 MTU in bytes; absent takes the interface's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Leave the interface in place when the port goes.
    #[serde(default)]
    pub persist: bool,
    /// Leave checksums and segmentation to others, and take such frames; false gives the interface,
    /// and takes from it, whole frames with their checksums.
    #[serde(default = "yes")]
    pub offload: bool,
    /// Most MAC addresses learned behind the port.
    #[serde(default)]
    pub fdb_limit: FdbLimit,
    /// Most copies per second that floods of the port's frames make, by each worker that polls its
    /// queues; 0 for no limit. The first copy of a frame does not count.
    #[serde(default)]
    pub flood_limit: FloodLimit,
    /// What happens where many frames from the port have addresses that are in use behind others.
    #[serde(default, skip_serializing_if = "OnLoop::is_default")]
    pub on_loop: OnLoop,
    /// The VLANs that it is in; absent is a trunk of all, whose untagged frames are in none.
    #[serde(default, skip_serializing_if = "VlanConfig::is_default")]
    pub vlan: VlanConfig,
    /// Queue pairs that are polled by a given worker whatever their load: number of the pair, and
    /// of the worker. The switch places the others.
    #[serde(default, skip_serializing_if = "Pins::is_empty")]
    #[serde(deserialize_with = "read_pins")]
    #[schemars(with = "BTreeMap<String, u16>")]
    pub pins: Pins,
}

impl TapConfig {
    /// A port of `ifname` with nothing else said.
    pub fn new(ifname: IfName) -> Self {
        Self {
            ifname,
            queues: Self::default_queues(),
            mtu: None,
            persist: false,
            offload: true,
            fdb_limit: FdbLimit::DEFAULT,
            flood_limit: FloodLimit::DEFAULT,
            on_loop: OnLoop::Alarm,
            vlan: VlanConfig::default(),
            pins: Pins::default(),
        }
    }

    /// Each is an open file that is polled.
    const fn default_queues() -> QueuePairs {
        QueuePairs::ONE
    }
}

/// The port of a network interface, through AF_XDP sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AfXdpConfig {
    /// Name of the interface, which exists and is up.
    pub ifname: IfName,
    /// Queues to take, from the first on; absent takes all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<QueuePairs>,
    /// L3 MTU in bytes; absent takes the interface's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// How frames are exchanged with the kernel.
    #[serde(default)]
    pub mode: XdpMode,
    /// Frames of memory for each queue, half of them each way: a power of two. A frame takes 2 KiB,
    /// or 4 KiB if the MTU is above 1770.
    #[serde(default)]
    pub umem_frames: UmemFrames,
    /// Have the kernel poll the NIC for so many microseconds, rather than wait for its interrupts;
    /// absent leaves interrupts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub busy_poll_us: Option<BusyPoll>,
    /// Join received TCP segments that follow one another, towards ports that take such frames.
    #[serde(default = "yes")]
    pub gro: bool,
    /// Most MAC addresses learned behind the port.
    #[serde(default)]
    pub fdb_limit: FdbLimit,
    /// Most copies per second that floods of the port's frames make, by each worker that polls its
    /// queues; 0 for no limit. The first copy of a frame does not count.
    #[serde(default)]
    pub flood_limit: FloodLimit,
    /// What happens where many frames from the port have addresses that are in use behind others.
    #[serde(default, skip_serializing_if = "OnLoop::is_default")]
    pub on_loop: OnLoop,
    /// The VLANs that it is in; absent is a trunk of all, whose untagged frames are in none.
    #[serde(default, skip_serializing_if = "VlanConfig::is_default")]
    pub vlan: VlanConfig,
    /// Queue pairs that are polled by a given worker whatever their load: number of the pair, and
    /// of the worker. The switch places the others.
    #[serde(default, skip_serializing_if = "Pins::is_empty")]
    #[serde(deserialize_with = "read_pins")]
    #[schemars(with = "BTreeMap<String, u16>")]
    pub pins: Pins,
}

impl AfXdpConfig {
    /// A port of `ifname` with nothing else said.
    pub fn new(ifname: IfName) -> Self {
        Self {
            ifname,
            queues: None,
            mtu: None,
            mode: XdpMode::Auto,
            umem_frames: UmemFrames::DEFAULT,
            busy_poll_us: None,
            gro: true,
            fdb_limit: FdbLimit::DEFAULT,
            flood_limit: FloodLimit::DEFAULT,
            on_loop: OnLoop::Alarm,
            vlan: VlanConfig::default(),
            pins: Pins::default(),
        }
    }
}

fn yes() -> bool {
    true
}

/// How an AF_XDP port exchanges frames with the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum XdpMode {
    /// The first of the others that works
    #[default]
    Auto,
    /// The NIC writes into the switch's memory: if its driver can
    ZeroCopy,
    /// The driver hands frames over, the kernel copies them: most drivers, and veth
    Copy,
    /// The kernel hands them over later, more slowly: any driver
    Skb,
}

impl XdpMode {
    /// The mode as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
            Self::Skb => "skb",
        }
    }
}

/// What happens where many frames from a port have addresses that are in use behind others: a loop, or
/// a guest that spoofs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum OnLoop {
    /// It is told
    #[default]
    Alarm,
    /// It is told, and the port passes no frames for 5 s, for longer each time
    Block,
}

impl OnLoop {
    /// It is as it is when nothing is said.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
    fn is_default(&self) -> bool {
        *self == Self::Alarm
    }

    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Alarm => "alarm",
            Self::Block => "block",
        }
    }
}

/// Queue pairs that are polled by a given worker whatever their load: pair and worker.
pub type Pins = BTreeMap<u16, u16>;

/// Reads pins, whose keys are texts in JSON and TOML.
fn read_pins<'de, D: Deserializer<'de>>(from: D) -> Result<Pins, D::Error> {
    let texts = BTreeMap::<String, u16>::deserialize(from)?;
    let read = |(pair, worker): (String, u16)| match pair.parse::<u16>() {
        // One way to write each number, or two keys could be one.
        Ok(number) if number.to_string() == pair => Ok((number, worker)),
        _ => {
            let reason = format!("the port has no queue {}", shown(&pair));
            let hint = "queues are numbered from 0, as in `pins = { 0 = 1 }`";
            Err(BadValue::new(reason, hint).into_serde())
        }
    };
    texts.into_iter().map(read).collect()
}

/// Runs `$body` for the configuration of whichever kind.
macro_rules! of_any_kind {
    ($config:expr, $inner:ident => $body:expr) => {
        match $config {
            PortConfig::VhostUser($inner) => $body,
            PortConfig::Tap($inner) => $body,
            PortConfig::AfXdp($inner) => $body,
        }
    };
}

impl PortConfig {
    /// A configuration of `kind` from its fields without `kind`: for sources that tell where an
    /// error is, which serde's own way to read tagged enums loses.
    ///
    /// # Errors
    /// Those of the source, a field that is unknown, missing, or can't have its value.
    pub fn of_kind<'de, D: Deserializer<'de>>(kind: PortKind, fields: D) -> Result<Self, D::Error> {
        Ok(match kind {
            PortKind::VhostUser => Self::VhostUser(Deserialize::deserialize(fields)?),
            PortKind::Tap => Self::Tap(Deserialize::deserialize(fields)?),
            PortKind::AfXdp => Self::AfXdp(Deserialize::deserialize(fields)?),
        })
    }

    /// What is behind the port.
    pub const fn kind(&self) -> PortKind {
        match self {
            Self::VhostUser(_) => PortKind::VhostUser,
            Self::Tap(_) => PortKind::Tap,
            Self::AfXdp(_) => PortKind::AfXdp,
        }
    }

    /// Queue pairs of the port: for a guest the most that it may use, for a NIC a number only if
    /// one is given.
    pub const fn queues(&self) -> Option<QueuePairs> {
        match self {
            Self::VhostUser(guest) => Some(guest.queues),
            Self::Tap(tap) => Some(tap.queues),
            Self::AfXdp(nic) => nic.queues,
        }
    }

    /// The network interface, if that is what is behind the port.
    pub const fn ifname(&self) -> Option<&IfName> {
        match self {
            Self::VhostUser(_) => None,
            Self::Tap(tap) => Some(&tap.ifname),
            Self::AfXdp(nic) => Some(&nic.ifname),
        }
    }

    /// L3 MTU, if one is given.
    pub const fn mtu(&self) -> Option<Mtu> {
        of_any_kind!(self, config => config.mtu)
    }

    /// Most MAC addresses learned behind the port.
    pub const fn fdb_limit(&self) -> FdbLimit {
        of_any_kind!(self, config => config.fdb_limit)
    }

    /// Most copies per second that floods of its frames make.
    pub const fn flood_limit(&self) -> FloodLimit {
        of_any_kind!(self, config => config.flood_limit)
    }

    /// The VLANs that it is in.
    pub const fn vlan(&self) -> &VlanConfig {
        of_any_kind!(self, config => &config.vlan)
    }

    /// The same, to be changed.
    pub const fn vlan_mut(&mut self) -> &mut VlanConfig {
        of_any_kind!(self, config => &mut config.vlan)
    }

    /// What happens where frames of others come back through the port.
    pub const fn on_loop(&self) -> OnLoop {
        of_any_kind!(self, config => config.on_loop)
    }

    /// Queue pairs with a worker of their own choice.
    pub const fn pins(&self) -> &Pins {
        of_any_kind!(self, config => &config.pins)
    }

    /// The same, to be changed.
    pub const fn pins_mut(&mut self) -> &mut Pins {
        of_any_kind!(self, config => &mut config.pins)
    }

    /// Checks that the port has the queue pairs that are pinned. Whether the workers exist is for
    /// the switch to say.
    ///
    /// # Errors
    /// It has not.
    pub fn check_pins(&self) -> Result<(), BadValue> {
        let pairs = self.queues().unwrap_or(QueuePairs::MAX).get();
        match self.pins().keys().find(|pair| **pair >= pairs) {
            None => Ok(()),
            Some(pair) => Err(BadValue::new(
                format!("the port has no queue {pair}"),
                format!("its queues are 0 to {}", pairs - 1),
            )),
        }
    }
}

/// The kinds of port that have a setting `field`.
pub fn kinds_with(field: &str) -> Vec<PortKind> {
    let schema = schemars::schema_for!(PortConfig);
    let kinds = schema.as_value()["oneOf"].as_array();
    let kinds = kinds.map_or(&[][..], Vec::as_slice);
    let has = |kind: &PortKind| {
        kinds.iter().any(|schema| {
            schema["properties"]["kind"]["const"] == kind.as_str()
                && schema["properties"][field].is_object()
        })
    };
    PortKind::ALL.into_iter().filter(has).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// `fields` over a tap's, a guest's or a NIC's with nothing else said.
    fn settings(kind: PortKind, fields: &Value) -> Value {
        let mut all = match kind {
            PortKind::VhostUser => json!({ "listen": "/vm1" }),
            PortKind::Tap | PortKind::AfXdp => json!({ "ifname": "eth1" }),
        };
        all["kind"] = json!(kind.as_str());
        let object = all.as_object_mut().unwrap();
        object.extend(fields.as_object().unwrap().clone());
        object.retain(|_, value| !value.is_null());
        all
    }

    #[test]
    fn settings_survive_the_way_to_the_dataplane_and_back() {
        let vm = json!({
            "owner": "root", "group": "64055", "mode": "0600", "queues": 2, "guest_offloads": false, "packed": false, "mtu": 9000, "fdb_limit": 4, "flood_limit": 0, "on_loop": "block", "vlan": { "tag": 10 }, "pins": { "0": 1, "1": 0 },
        });
        let tap = json!({
            "queues": 1, "persist": true, "offload": false, "fdb_limit": 4096, "flood_limit": 1_000_000,
        });
        let nic = json!({
            "queues": 4, "mode": "zero-copy", "umem_frames": 1024, "busy_poll_us": 20, "gro": false,
            "fdb_limit": 1, "flood_limit": 1,
        });
        for (kind, fields) in PortKind::ALL.into_iter().zip([vm, tap, nic]) {
            let written = settings(kind, &fields);
            let config: PortConfig = serde_json::from_value(written.clone()).unwrap();
            assert_eq!(config.kind(), kind);
            assert_eq!(serde_json::to_value(&config).unwrap(), written);
            // Key by key, for sources that know where a key is.
            let mut fields = written;
            fields.as_object_mut().unwrap().remove("kind");
            assert_eq!(PortConfig::of_kind(kind, fields).unwrap(), config);
        }
    }

    #[test]
    fn queues_default_to_eight_for_guests_one_for_a_tap_and_all_of_a_nic() {
        let read = |kind| serde_json::from_value(settings(kind, &json!({}))).unwrap();
        let vm: PortConfig = read(PortKind::VhostUser);
        assert_eq!(vm.queues(), QueuePairs::new(8));
        let PortConfig::Tap(tap) = read(PortKind::Tap) else {
            panic!("another kind");
        };
        assert_eq!(tap, TapConfig::new("eth1".parse().unwrap()));
        assert_eq!((tap.queues.get(), tap.offload), (1, true));
        let PortConfig::AfXdp(nic) = read(PortKind::AfXdp) else {
            panic!("another kind");
        };
        assert_eq!(nic, AfXdpConfig::new("eth1".parse().unwrap()));
        assert_eq!((nic.queues, nic.mode), (None, XdpMode::Auto));
        assert_eq!((nic.umem_frames.get(), nic.busy_poll_us), (4096, None));
        assert!(nic.gro);
    }

    #[test]
    fn bad_settings_are_refused() {
        use PortKind::{AfXdp, Tap, VhostUser};
        let long = format!("/{}", "x".repeat(107));
        let cases = [
            (VhostUser, json!({ "listen": null }), "needs the path"),
            (VhostUser, json!({ "listen": "relative.sock" }), "absolute"),
            (VhostUser, json!({ "listen": "/a\0b" }), "NUL"),
            (VhostUser, json!({ "listen": long }), "108 bytes"),
            (VhostUser, json!({ "offload": false }), "`offload`"),
            (VhostUser, json!({ "connect": "/b" }), "listen and connect"),
            (VhostUser, json!({ "ifname": "rw0" }), "`ifname`"),
            (VhostUser, json!({ "mode": "rw" }), "no mode"),
            (VhostUser, json!({ "mode": 432 }), "`432`"),
            (VhostUser, json!({ "group": "a b" }), "can't name"),
            (
                VhostUser,
                json!({ "listen": null, "connect": "/b", "group": "kvm" }),
                "that the port makes",
            ),
            (Tap, json!({ "mode": "0660" }), "`mode`"),
            (VhostUser, json!({ "queues": 0 }), "0 queue pairs"),
            (VhostUser, json!({ "queues": 65 }), "65 queue pairs"),
            (VhostUser, json!({ "mtu": 67 }), "MTU of 67"),
            (VhostUser, json!({ "fdb_limit": 0 }), "limit of 0"),
            (VhostUser, json!({ "pins": { "+1": 0 } }), "no queue \"+1\""),
            (Tap, json!({ "mode": "copy" }), "`mode`"),
            (Tap, json!({ "vlan": { "tag": 0 } }), "VLAN 0"),
            (Tap, json!({ "vlan": { "tags": "1" } }), "`tags`"),
            (AfXdp, json!({ "persist": true }), "`persist`"),
            (Tap, json!({ "gro": true }), "`gro`"),
            (AfXdp, json!({ "umem_frames": 1000 }), "1000 frames"),
            (AfXdp, json!({ "busy_poll_us": 0 }), "0 microseconds"),
            (AfXdp, json!({ "queues": 0 }), "0 queue pairs"),
            (AfXdp, json!({ "ifname": null }), "`ifname`"),
            (Tap, json!({ "ifname": null }), "`ifname`"),
            (Tap, json!({ "ifname": "" }), "1 to 15 bytes"),
            (
                Tap,
                json!({ "ifname": "sixteen_bytes_xx" }),
                "1 to 15 bytes",
            ),
            (Tap, json!({ "ifname": "a/b" }), "can't name an interface"),
            (Tap, json!({ "ifname": "a b" }), "can't name an interface"),
            (Tap, json!({ "ifname": "rw%d" }), "can't name an interface"),
            (Tap, json!({ "ifname": ".." }), "can't name an interface"),
        ];
        for (kind, fields, expected) in cases {
            let read = serde_json::from_value::<PortConfig>(settings(kind, &fields));
            let error = read.expect_err(expected).to_string();
            assert!(error.contains(expected), "{fields}: {error}");
            if !error.contains('`') {
                let bad = BadValue::from_serde(&error).expect(expected);
                assert!(!bad.hint.is_empty() && !bad.hint.contains('\n'));
            }
        }
        let longest = json!({ "listen": format!("/{}", "x".repeat(106)) });
        let read = serde_json::from_value::<PortConfig>(settings(VhostUser, &longest));
        assert!(read.is_ok());
    }

    #[test]
    fn pins_are_of_queues_that_the_port_has() {
        let read = |pins| serde_json::from_value(settings(PortKind::VhostUser, &pins)).unwrap();
        let config: PortConfig = read(json!({ "pins": { "7": 0 } }));
        assert!(config.check_pins().is_ok());
        let config: PortConfig = read(json!({ "pins": { "8": 0 } }));
        assert_eq!(
            config.check_pins().unwrap_err().hint,
            "its queues are 0 to 7"
        );
    }

    #[test]
    fn a_setting_tells_its_kinds() {
        use PortKind::{AfXdp, Tap, VhostUser};
        assert_eq!(kinds_with("ifname"), [Tap, AfXdp]);
        assert_eq!(kinds_with("gro"), [AfXdp]);
        assert_eq!(kinds_with("connect"), [VhostUser]);
        assert_eq!(kinds_with("frob"), []);
    }
}
