//! A port's settings: one shape for the API, the configuration file and what is reported back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringway_dataplane::{
    AfXdpConfig, MAX_QUEUE_PAIRS, PortConfig, PortKind, QueuePairs, SocketSpec, UmemFrames, XdpMode,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Queue pairs that a guest may use when nothing else is said: an upper bound that costs nothing
/// until the guest starts them, and what guests of up to eight vCPUs ask for.
pub const DEFAULT_VHOST_USER_QUEUES: u16 = 8;

/// Queue pairs of a tap when nothing else is said: each is an open file that is polled.
pub const DEFAULT_TAP_QUEUES: u16 = 1;

/// Least MTU: IPv4's (RFC 791), and what Linux takes for Ethernet devices.
pub const MIN_MTU: u16 = 68;

/// Greatest MTU that Linux takes for virtio-net and tap: 65,535 less room for the header.
pub const MAX_MTU: u16 = 65_521;

/// Longest busy poll: what a turn of the worker waits at most.
const MAX_BUSY_POLL_US: u32 = 1000;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one for the closing NUL (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Longest interface name: IFNAMSIZ is 16 with the closing NUL.
const MAX_IFNAME: usize = 15;

/// What is behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KindName {
    /// A guest, through a vhost-user socket: `listen` or `connect`, `queues`, `mtu`, `fdb_limit`.
    VhostUser,
    /// A tap interface of the host: `ifname`, `queues`, `mtu`, `persist`, `offload`,
    /// `fdb_limit`.
    Tap,
    /// Queues of a NIC or veth through AF_XDP: `ifname`, `queues`, `mode`, `umem_frames`,
    /// `busy_poll_us`, `gro`, `mtu`, `fdb_limit`.
    AfXdp,
}

impl KindName {
    /// The kind as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VhostUser => "vhost-user",
            Self::Tap => "tap",
            Self::AfXdp => "af-xdp",
        }
    }
}

/// How an AF_XDP port exchanges frames with the kernel.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum ModeName {
    /// The first of the others that works
    Auto,
    /// The NIC writes into the switch's memory: if its driver can
    ZeroCopy,
    /// The driver hands frames over, the kernel copies them: most drivers, and veth
    Copy,
    /// The kernel hands them over later, more slowly: any driver
    Skb,
}

impl ModeName {
    /// The mode as it is written.
    pub const fn as_str(self) -> &'static str {
        self.to_mode().as_str()
    }

    const fn to_mode(self) -> XdpMode {
        match self {
            Self::Auto => XdpMode::Auto,
            Self::ZeroCopy => XdpMode::ZeroCopy,
            Self::Copy => XdpMode::Copy,
            Self::Skb => XdpMode::Skb,
        }
    }
}

impl From<XdpMode> for ModeName {
    fn from(mode: XdpMode) -> Self {
        match mode {
            XdpMode::Auto => Self::Auto,
            XdpMode::ZeroCopy => Self::ZeroCopy,
            XdpMode::Copy => Self::Copy,
            XdpMode::Skb => Self::Skb,
        }
    }
}

/// A port's settings. Which fields belong to which kind is said at [`KindName`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSettings {
    /// What is behind the port.
    pub kind: KindName,
    /// vhost-user: absolute path of the socket at which to wait for the front-end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<PathBuf>,
    /// vhost-user: absolute path of the front-end's socket to connect to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connect: Option<PathBuf>,
    /// tap: name of the interface; created if there is none. af-xdp: of one that exists and is up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ifname: Option<String>,
    /// Queue pairs, 1 to 64; for vhost-user (default 8) the most that the guest may use, for a tap
    /// (default 1) the number to open, for af-xdp (default: all) the interface's first ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub queues: Option<u16>,
    /// L3 MTU in bytes, 68 to 65521; absent takes the front-end's or the interface's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 68, max = 65521))]
    pub mtu: Option<u16>,
    /// tap: leave the interface in place when the port goes (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persist: Option<bool>,
    /// tap: leave checksums and segmentation to others, and take such frames (default true); false
    /// gives the interface, and takes from it, whole frames with their checksums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload: Option<bool>,
    /// af-xdp: how frames are exchanged with the kernel (default auto).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<ModeName>,
    /// af-xdp: frames of memory for each queue, half of them each way: a power of two, 128 to 65536
    /// (default 4096). A frame takes 2 KiB, or 4 KiB if the MTU is above 1774.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 128, max = 65536))]
    pub umem_frames: Option<u32>,
    /// af-xdp: have the kernel poll the NIC for so many microseconds, 1 to 1000, rather than wait for
    /// its interrupts (default: interrupts).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub busy_poll_us: Option<u32>,
    /// af-xdp: join received TCP segments that follow one another, towards ports that take such frames
    /// (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gro: Option<bool>,
    /// Most MAC addresses learned behind the port; absent leaves the database's size as the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub fdb_limit: Option<u32>,
    /// Queue pairs that are polled by a given worker whatever their load: number of the pair, and of
    /// the worker. The switch places the others.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pins: BTreeMap<String, u16>,
}

/// A setting that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct SettingError {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
    /// What to do.
    pub hint: String,
}

impl SettingError {
    fn new(field: &'static str, reason: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
            hint: hint.into(),
        }
    }
}

impl PortSettings {
    /// Settings of `kind` with nothing else said.
    pub fn new(kind: KindName) -> Self {
        Self {
            kind,
            listen: None,
            connect: None,
            ifname: None,
            queues: None,
            mtu: None,
            persist: None,
            offload: None,
            mode: None,
            umem_frames: None,
            busy_poll_us: None,
            gro: None,
            fdb_limit: None,
            pins: BTreeMap::new(),
        }
    }

    /// The settings as the dataplane takes them.
    ///
    /// # Errors
    /// A field that is missing, belongs to another kind, or is out of range.
    pub fn to_config(&self) -> Result<PortConfig, SettingError> {
        self.refuse_others()?;
        let kind = match self.kind {
            KindName::VhostUser => PortKind::VhostUser {
                socket: self.socket()?,
                queue_pairs: self.queue_pairs(DEFAULT_VHOST_USER_QUEUES)?,
            },
            KindName::Tap => PortKind::Tap {
                ifname: self.checked_ifname()?,
                queue_pairs: self.queue_pairs(DEFAULT_TAP_QUEUES)?,
                persist: self.persist.unwrap_or(false),
                offload: self.offload.unwrap_or(true),
            },
            KindName::AfXdp => {
                let queue_pairs = self.queues.map(|count| self.queue_pairs(count));
                PortKind::AfXdp(AfXdpConfig {
                    ifname: self.checked_ifname()?,
                    queue_pairs: queue_pairs.transpose()?,
                    mode: self.mode.map_or(XdpMode::Auto, ModeName::to_mode),
                    umem_frames: self.checked_umem_frames()?,
                    busy_poll: self.checked_busy_poll()?,
                    gro: self.gro.unwrap_or(true),
                })
            }
        };
        let mut config = PortConfig {
            kind,
            mtu: self.checked_mtu()?,
            fdb_limit: self.checked_fdb_limit()?,
            pins: BTreeMap::new(),
        };
        config.pins = check_pins(&self.pins, config.queue_pairs().get())?;
        Ok(config)
    }

    /// Refuses what belongs to other kinds.
    fn refuse_others(&self) -> Result<(), SettingError> {
        use KindName::{AfXdp, Tap, VhostUser};
        let settings: [(_, _, &[KindName]); 9] = [
            ("listen", self.listen.is_some(), &[VhostUser]),
            ("connect", self.connect.is_some(), &[VhostUser]),
            ("ifname", self.ifname.is_some(), &[Tap, AfXdp]),
            ("persist", self.persist.is_some(), &[Tap]),
            ("offload", self.offload.is_some(), &[Tap]),
            ("mode", self.mode.is_some(), &[AfXdp]),
            ("umem_frames", self.umem_frames.is_some(), &[AfXdp]),
            ("busy_poll_us", self.busy_poll_us.is_some(), &[AfXdp]),
            ("gro", self.gro.is_some(), &[AfXdp]),
        ];
        for (field, is_given, kinds) in settings {
            if is_given && !kinds.contains(&self.kind) {
                let kinds: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
                return Err(SettingError::new(
                    field,
                    format!("not a setting of kind {}", self.kind.as_str()),
                    format!("it belongs to kind {}; leave it out", kinds.join(" and ")),
                ));
            }
        }
        Ok(())
    }

    fn checked_umem_frames(&self) -> Result<UmemFrames, SettingError> {
        let Some(count) = self.umem_frames else {
            return Ok(UmemFrames::DEFAULT);
        };
        UmemFrames::new(count).ok_or_else(|| {
            let (min, max) = (UmemFrames::MIN, UmemFrames::MAX);
            SettingError::new(
                "umem_frames",
                format!("{count} frames"),
                format!("give a power of two from {min} to {max}"),
            )
        })
    }

    fn checked_busy_poll(&self) -> Result<Option<Duration>, SettingError> {
        match self.busy_poll_us {
            Some(us) if !(1..=MAX_BUSY_POLL_US).contains(&us) => Err(SettingError::new(
                "busy_poll_us",
                format!("{us} microseconds"),
                format!("give 1 to {MAX_BUSY_POLL_US}, or leave it out for interrupts"),
            )),
            us => Ok(us.map(|us| Duration::from_micros(us.into()))),
        }
    }

    fn socket(&self) -> Result<SocketSpec, SettingError> {
        match (&self.listen, &self.connect) {
            (Some(path), None) => {
                check_socket_path("listen", path)?;
                Ok(SocketSpec::Listen(path.clone()))
            }
            (None, Some(path)) => {
                check_socket_path("connect", path)?;
                Ok(SocketSpec::Connect(path.clone()))
            }
            (None, None) => Err(SettingError::new(
                "listen",
                "a vhost-user port needs the path of a socket",
                "give `listen` if QEMU is the client, `connect` if it is the server",
            )),
            (Some(_), Some(_)) => Err(SettingError::new(
                "connect",
                "a vhost-user port can't both listen and connect",
                "give `listen` if QEMU is the client, `connect` if it is the server",
            )),
        }
    }

    fn checked_ifname(&self) -> Result<String, SettingError> {
        let hint = "name an interface as in `ip link`, for example rw0";
        let Some(name) = &self.ifname else {
            return Err(SettingError::new(
                "ifname",
                format!(
                    "a port of kind {} needs an interface name",
                    self.kind.as_str()
                ),
                hint,
            ));
        };
        let bad = |b: u8| b == b'/' || b == b':' || b == b'%' || !b.is_ascii_graphic();
        if name.is_empty() || name.len() > MAX_IFNAME {
            let reason = format!("an interface name has 1 to {MAX_IFNAME} bytes");
            return Err(SettingError::new("ifname", reason, hint));
        }
        if name == "." || name == ".." || name.bytes().any(bad) {
            let reason = format!("{name:?} can't name an interface");
            return Err(SettingError::new("ifname", reason, hint));
        }
        Ok(name.clone())
    }

    fn queue_pairs(&self, default: u16) -> Result<QueuePairs, SettingError> {
        let count = self.queues.unwrap_or(default);
        QueuePairs::new(count).ok_or_else(|| {
            SettingError::new(
                "queues",
                format!("{count} queue pairs"),
                format!("a port has 1 to {MAX_QUEUE_PAIRS} queue pairs"),
            )
        })
    }

    fn checked_mtu(&self) -> Result<Option<u16>, SettingError> {
        match self.mtu {
            Some(mtu) if !(MIN_MTU..=MAX_MTU).contains(&mtu) => Err(SettingError::new(
                "mtu",
                format!("an MTU of {mtu} bytes"),
                format!("an MTU is {MIN_MTU} to {MAX_MTU} bytes, without the Ethernet header"),
            )),
            mtu => Ok(mtu),
        }
    }

    fn checked_fdb_limit(&self) -> Result<Option<u32>, SettingError> {
        match self.fdb_limit {
            Some(0) => Err(SettingError::new(
                "fdb_limit",
                "a limit of 0 addresses",
                "give 1 or more, or leave it out for no limit",
            )),
            limit => Ok(limit),
        }
    }
}

/// Pins as the dataplane takes them; `queue_pairs` are those of the port. Whether the workers exist
/// is for the switch to say.
fn check_pins(
    pins: &BTreeMap<String, u16>,
    queue_pairs: u16,
) -> Result<BTreeMap<u16, u16>, SettingError> {
    let check = |(pair, worker): (&String, &u16)| match pair.parse::<u16>() {
        Ok(number) if number < queue_pairs && number.to_string() == *pair => Ok((number, *worker)),
        _ => {
            let shown: String = pair.chars().take(16).collect();
            Err(SettingError::new(
                "pins",
                format!("the port has no queue {shown:?}"),
                format!("its queues are 0 to {}", queue_pairs - 1),
            ))
        }
    };
    pins.iter().map(check).collect()
}

/// Checks a path before anything is made of it.
pub(crate) fn check_socket_path(field: &'static str, path: &Path) -> Result<(), SettingError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let hint = "give an absolute path such as /run/ringway/vm1.sock";
    if bytes.contains(&0) {
        return Err(SettingError::new(field, "the path has a NUL byte", hint));
    }
    if !path.is_absolute() {
        let reason = format!("{:?} is not an absolute path", path.display().to_string());
        return Err(SettingError::new(field, reason, hint));
    }
    if bytes.len() > MAX_SOCKET_PATH {
        return Err(SettingError::new(
            field,
            format!("a path of {} bytes", bytes.len()),
            format!("the path of a socket has at most {MAX_SOCKET_PATH} bytes (unix(7))"),
        ));
    }
    Ok(())
}

impl From<&PortConfig> for PortSettings {
    fn from(config: &PortConfig) -> Self {
        let mut settings = match &config.kind {
            PortKind::VhostUser {
                socket,
                queue_pairs,
            } => {
                let mut settings = Self::new(KindName::VhostUser);
                match socket {
                    SocketSpec::Listen(path) => settings.listen = Some(path.clone()),
                    SocketSpec::Connect(path) => settings.connect = Some(path.clone()),
                }
                settings.queues = Some(queue_pairs.get());
                settings
            }
            PortKind::Tap {
                ifname,
                queue_pairs,
                persist,
                offload,
            } => {
                let mut settings = Self::new(KindName::Tap);
                settings.ifname = Some(ifname.clone());
                settings.queues = Some(queue_pairs.get());
                settings.persist = Some(*persist);
                settings.offload = Some(*offload);
                settings
            }
            PortKind::AfXdp(xdp) => {
                let mut settings = Self::new(KindName::AfXdp);
                settings.ifname = Some(xdp.ifname.clone());
                settings.queues = xdp.queue_pairs.map(QueuePairs::get);
                settings.mode = Some(xdp.mode.into());
                settings.umem_frames = Some(xdp.umem_frames.get());
                let us = xdp.busy_poll.map(|time| time.as_micros());
                settings.busy_poll_us = us.map(|us| u32::try_from(us).unwrap_or(u32::MAX));
                settings.gro = Some(xdp.gro);
                settings
            }
        };
        settings.mtu = config.mtu;
        settings.fdb_limit = config.fdb_limit;
        let pins = config.pins.iter();
        settings.pins = pins.map(|(pair, at)| (pair.to_string(), *at)).collect();
        settings
    }
}

#[cfg(test)]
mod tests;
