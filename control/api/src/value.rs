//! Values that can't hold what they must not: parsed once, from JSON, TOML or a command line.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// What can't be, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct BadValue {
    /// What is wrong with it.
    pub reason: String,
    /// What to do.
    pub hint: String,
}

impl BadValue {
    pub(crate) fn new(reason: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            hint: hint.into(),
        }
    }

    /// As an error of serde's, which carries one text: the hint is its second line.
    pub(crate) fn into_serde<E: de::Error>(self) -> E {
        E::custom(self.into_text())
    }

    /// As one text, as [`BadValue::from_serde`] reads it.
    pub(crate) fn into_text(self) -> String {
        format!("{}\n{}", self.reason, self.hint)
    }

    /// The value's own refusal, if that is what serde's error tells.
    pub fn from_serde(message: &str) -> Option<Self> {
        let (reason, hint) = message.split_once('\n')?;
        Some(Self::new(reason, hint))
    }
}

/// Longest part of a refused text that is told.
const MAX_SHOWN: usize = 64;

/// A refused text for an error: quoted, and not all of it if it is long.
pub(crate) fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(MAX_SHOWN).collect::<String>())
}

/// serde and a JSON schema for a text that is read by `FromStr` and written by `Display`.
macro_rules! text {
    ($name:ident, $($keyword:literal: $value:expr),*) => {
        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.pad(&self.0)
            }
        }

        impl $name {
            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = Cow::<'de, str>::deserialize(from)?;
                text.parse().map_err(BadValue::into_serde)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string" $(, $keyword: $value)* })
            }
        }
    };
}

/// serde, a JSON schema and `FromStr` for a number with bounds.
macro_rules! number {
    ($name:ident($int:ident) $range:expr, format: $format:literal, what: $what:literal, hint: $hint:expr) => {
        impl $name {
            /// The value, if it is one.
            pub fn new(value: $int) -> Option<Self> {
                Self::is_one(value).then_some(Self(value))
            }

            /// As a number.
            pub const fn get(self) -> $int {
                self.0
            }
        }

        impl TryFrom<$int> for $name {
            type Error = BadValue;

            fn try_from(value: $int) -> Result<Self, BadValue> {
                Self::new(value).ok_or_else(|| BadValue::new(format!($what, value), $hint))
            }
        }

        impl FromStr for $name {
            type Err = BadValue;

            fn from_str(text: &str) -> Result<Self, BadValue> {
                let bad = |_| BadValue::new(format!("{} is no such number", shown(text)), $hint);
                text.parse::<$int>().map_err(bad)?.try_into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(out)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(to)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                $int::deserialize(from)?
                    .try_into()
                    .map_err(BadValue::into_serde)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "type": "integer", "format": $format,
                    "minimum": $range.start(), "maximum": $range.end(),
                })
            }
        }
    };
}

pub(crate) use {number, text};

/// Longest port name, in bytes: fits a column of a terminal and a socket's file name.
pub const MAX_PORT_NAME: usize = 63;

/// A port's name: 1 to [`MAX_PORT_NAME`] of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortName(String);

text!(PortName, "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$");

impl FromStr for PortName {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if starts_well && text.len() <= MAX_PORT_NAME && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        Err(BadValue::new(
            format!("{} can't name a port", shown(text)),
            "a name has 1 to 63 of A-Z a-z 0-9 . _ - and starts with a letter or digit",
        ))
    }
}

/// Longest interface name: IFNAMSIZ is 16 with the closing NUL.
const MAX_IFNAME: usize = 15;

/// A name that a network interface can have, as in `ip link`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IfName(String);

text!(IfName, "minLength": 1, "maxLength": MAX_IFNAME);

impl FromStr for IfName {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let hint = "name an interface as in `ip link`, for example rw0";
        if text.is_empty() || text.len() > MAX_IFNAME {
            let reason = format!("an interface name has 1 to {MAX_IFNAME} bytes");
            return Err(BadValue::new(reason, hint));
        }
        let bad = |b: u8| matches!(b, b'/' | b':' | b'%') || !b.is_ascii_graphic();
        if text == "." || text == ".." || text.bytes().any(bad) {
            let reason = format!("{} can't name an interface", shown(text));
            return Err(BadValue::new(reason, hint));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one for the closing NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// A path that a Unix socket can have: absolute, of [`MAX_SOCKET_PATH`] bytes at most.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketPath(String);

text!(SocketPath, "pattern": "^/", "maxLength": MAX_SOCKET_PATH);

impl SocketPath {
    /// As a path.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl FromStr for SocketPath {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let hint = "give an absolute path such as /run/ringway/vm1.sock";
        if text.contains('\0') {
            return Err(BadValue::new("the path has a NUL byte", hint));
        }
        if !text.starts_with('/') {
            let reason = format!("{} is not an absolute path", shown(text));
            return Err(BadValue::new(reason, hint));
        }
        if text.len() > MAX_SOCKET_PATH {
            return Err(BadValue::new(
                format!("a path of {} bytes", text.len()),
                format!("the path of a socket has at most {MAX_SOCKET_PATH} bytes (unix(7))"),
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// For paths that are known to be text, as those of a temporary directory.
impl TryFrom<&Path> for SocketPath {
    type Error = BadValue;

    fn try_from(path: &Path) -> Result<Self, BadValue> {
        let text = path.to_str();
        let bad = || BadValue::new(format!("{path:?} is no UTF-8"), "use another path");
        text.ok_or_else(bad)?.parse()
    }
}

/// Most queue pairs of a port: one bit each in a `u64` mask of usable queues.
pub const MAX_QUEUE_PAIRS: u16 = 64;

/// How many queue pairs a port has: 1 to [`MAX_QUEUE_PAIRS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairs(u16);

number!(QueuePairs(u16) 1..=MAX_QUEUE_PAIRS, format: "uint16", what: "{} queue pairs",
    hint: format!("a port has 1 to {MAX_QUEUE_PAIRS} queue pairs"));

impl QueuePairs {
    /// [`MAX_QUEUE_PAIRS`].
    pub const MAX: Self = Self(MAX_QUEUE_PAIRS);
    /// One pair.
    pub const ONE: Self = Self(1);
    /// Eight pairs.
    pub const EIGHT: Self = Self(8);

    fn is_one(count: u16) -> bool {
        (1..=MAX_QUEUE_PAIRS).contains(&count)
    }
}

/// An L3 MTU in bytes: [`Mtu::MIN`] to [`Mtu::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mtu(u16);

number!(Mtu(u16) Mtu::MIN..=Mtu::MAX, format: "uint16", what: "an MTU of {} bytes",
    hint: format!("an MTU is {} to {} bytes, without the Ethernet header", Self::MIN, Self::MAX));

impl Mtu {
    /// Least: IPv4's (RFC 791), and what Linux takes for Ethernet devices.
    pub const MIN: u16 = 68;
    /// Greatest that Linux takes for virtio-net and tap: 65,535 less room for the header.
    pub const MAX: u16 = 65_521;

    fn is_one(bytes: u16) -> bool {
        (Self::MIN..=Self::MAX).contains(&bytes)
    }
}

/// Which of the reserved group addresses 01-80-C2-00-00-00 to 0f (IEEE 802.1Q, table 8-1) frames are
/// forwarded to, a bit for the last digit of each: the kernel's `group_fwd_mask` of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupFwdMask(u16);

number!(GroupFwdMask(u16) 0..=u16::MAX, format: "uint16", what: "a mask of {}",
    hint: "leave out bit 1 (2): PAUSE frames are for the next station only (IEEE 802.3, 31B)");

impl GroupFwdMask {
    /// BPDUs of others pass, as through a Linux bridge without STP.
    pub const DEFAULT: Self = Self(1);

    fn is_one(mask: u16) -> bool {
        mask & 2 == 0
    }
}

impl Default for GroupFwdMask {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// How many frames a queue's UMEM holds: a power of two, [`UmemFrames::MIN`] to
/// [`UmemFrames::MAX`]. Half of them are to receive into, half to transmit from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UmemFrames(u32);

number!(UmemFrames(u32) UmemFrames::MIN..=UmemFrames::MAX, format: "uint32", what: "{} frames",
    hint: format!("give a power of two from {} to {}", Self::MIN, Self::MAX));

impl UmemFrames {
    /// Least: a burst each way.
    pub const MIN: u32 = 128;
    /// Most: rings of 32,768 entries, 256 MiB with the greater chunks.
    pub const MAX: u32 = 65_536;
    /// Rings of 2,048 entries, as the kernel's own tools have: a millisecond at 2 Mpps.
    pub const DEFAULT: Self = Self(4096);

    fn is_one(count: u32) -> bool {
        count.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&count)
    }
}

impl Default for UmemFrames {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// For how long the kernel polls a NIC: 1 to [`BusyPoll::MAX`] microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyPoll(u32);

number!(BusyPoll(u32) 1..=BusyPoll::MAX, format: "uint32", what: "{} microseconds",
    hint: format!("give 1 to {}, or leave it out for interrupts", Self::MAX));

impl BusyPoll {
    /// Longest: what a turn of the worker waits at most.
    pub const MAX: u32 = 1000;

    fn is_one(us: u32) -> bool {
        (1..=Self::MAX).contains(&us)
    }
}

/// Most MAC addresses that are learned behind a port: at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdbLimit(u32);

number!(FdbLimit(u32) 1..=u32::MAX, format: "uint32", what: "a limit of {} addresses",
    hint: "give 1 or more, or leave it out for the default");

impl FdbLimit {
    /// More than a guest has that runs others inside, and a quarter of the database by default: what
    /// VMware's switch allows a port too.
    pub const DEFAULT: Self = Self(4096);

    fn is_one(count: u32) -> bool {
        count > 0
    }
}

impl Default for FdbLimit {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Copies that floods of a port's frames may make in a second, of each worker that polls its
/// queues; 0 for no limit. A frame that is flooded to n ports makes n - 1: the first costs no more
/// than a frame that is not flooded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloodLimit(u32);

number!(FloodLimit(u32) 0..=u32::MAX, format: "uint32", what: "a limit of {} copies per second",
    hint: "give a number of copies per second, or 0 for no limit");

impl FloodLimit {
    /// A few hundredths of a worker's time. To two other ports it is a million frames in a second,
    /// to 63 it is 16,000: far above what healthy stations broadcast, and five streams of video.
    pub const DEFAULT: Self = Self(1_000_000);

    /// The limit, if there is one.
    pub const fn bound(self) -> Option<u32> {
        match self.0 {
            0 => None,
            copies => Some(copies),
        }
    }

    const fn is_one(_: u32) -> bool {
        true
    }
}

impl Default for FloodLimit {
    fn default() -> Self {
        Self::DEFAULT
    }
}
