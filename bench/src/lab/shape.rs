//! What two sets of guests can differ by: their label in all output.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Serialize, Serializer};

/// Sizes and kinds of all ports of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NetworkShape {
    pub(crate) queue_pairs: u16,
    /// L3.
    pub(crate) mtu_bytes: u16,
    pub(crate) host: HostPort,
    pub(crate) offloads: OffloadsOfGuests,
}

impl NetworkShape {
    /// Without spaces, for lines that hold several, and for names of files.
    pub(crate) fn tag(self) -> String {
        let (host, offloads) = (self.host.name(), self.offloads.to_string());
        let offloads = offloads.replace('/', "+");
        format!(
            "q{}-mtu{}-{host}-{offloads}",
            self.queue_pairs, self.mtu_bytes
        )
    }
}

impl fmt::Display for NetworkShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NetworkShape {
            queue_pairs,
            mtu_bytes,
            host,
            offloads,
        } = self;
        write!(
            f,
            "{queue_pairs} queue pair(s), MTU {mtu_bytes}, host on {}, offloads {offloads}",
            host.name()
        )
    }
}

/// How the host is plugged into ringwayd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum HostPort {
    /// A tap interface
    Tap,
    /// An AF_XDP port on one end of a veth pair, whose other end is the host's
    AfXdp,
}

impl HostPort {
    pub(crate) fn name(self) -> &'static str {
        match self {
            HostPort::Tap => "tap",
            HostPort::AfXdp => "af-xdp",
        }
    }
}

/// Offloads that a guest's NIC has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OffloadSet {
    /// What QEMU offers by default: checksums, TSO, USO.
    All,
    /// Checksums both ways, no segmentation.
    Csum,
    None,
}

/// QEMU's properties for checksums left to the other side.
const CHECKSUM_PROPERTIES: [&str; 2] = ["csum", "guest_csum"];

/// QEMU's properties for frames that are longer than the MTU.
const SEGMENTATION_PROPERTIES: [&str; 12] = [
    "gso",
    "host_tso4",
    "host_tso6",
    "host_ecn",
    "host_ufo",
    "host_uso",
    "guest_tso4",
    "guest_tso6",
    "guest_ecn",
    "guest_ufo",
    "guest_uso4",
    "guest_uso6",
];

impl OffloadSet {
    const EVERY: [OffloadSet; 3] = [OffloadSet::All, OffloadSet::Csum, OffloadSet::None];

    fn name(self) -> &'static str {
        match self {
            OffloadSet::All => "all",
            OffloadSet::Csum => "csum",
            OffloadSet::None => "none",
        }
    }

    /// What to append to QEMU's `virtio-net-pci`: everything is on by default.
    pub(crate) fn qemu_properties(self) -> String {
        let off: &[&[&str]] = match self {
            OffloadSet::All => &[],
            OffloadSet::Csum => &[&SEGMENTATION_PROPERTIES],
            OffloadSet::None => &[&CHECKSUM_PROPERTIES, &SEGMENTATION_PROPERTIES],
        };
        off.concat()
            .iter()
            .map(|property| format!(",{property}=off"))
            .collect()
    }

    /// Whether a guest leaves checksums open, and takes frames that do.
    pub(crate) fn checksums(self) -> bool {
        self != OffloadSet::None
    }

    /// Whether a guest sends and takes TCP frames longer than the MTU.
    pub(crate) fn segments(self) -> bool {
        self == OffloadSet::All
    }
}

/// Offloads of guest a and of guest b: `csum`, or `all/none` if they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OffloadsOfGuests(pub(crate) [OffloadSet; 2]);

impl OffloadsOfGuests {
    pub(crate) const fn same(offloads: OffloadSet) -> OffloadsOfGuests {
        OffloadsOfGuests([offloads, offloads])
    }
}

impl fmt::Display for OffloadsOfGuests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.0;
        match a == b {
            true => f.write_str(a.name()),
            false => write!(f, "{}/{}", a.name(), b.name()),
        }
    }
}

impl Serialize for OffloadsOfGuests {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Not a set of offloads.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is none of all, csum, none, nor two of them as in `all/none`")]
pub(crate) struct NoOffloads(String);

impl FromStr for OffloadsOfGuests {
    type Err = NoOffloads;

    fn from_str(text: &str) -> Result<Self, NoOffloads> {
        let one = |name: &str| {
            OffloadSet::EVERY
                .into_iter()
                .find(|offloads| offloads.name() == name)
                .ok_or_else(|| NoOffloads(text.to_owned()))
        };
        let (a, b) = text.split_once('/').unwrap_or((text, text));
        Ok(OffloadsOfGuests([one(a)?, one(b)?]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Option<OffloadsOfGuests> {
        text.parse().ok()
    }

    #[test]
    fn offloads_of_the_guests_may_differ() {
        assert_eq!(
            parse("csum"),
            Some(OffloadsOfGuests::same(OffloadSet::Csum))
        );
        let mixed = parse("all/none").expect("two names");
        assert_eq!(mixed.0, [OffloadSet::All, OffloadSet::None]);
        for text in ["csum", "all/none"] {
            assert_eq!(parse(text).expect("valid").to_string(), text);
        }
        for text in ["", "tso", "all/", "all/none/csum"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn properties_turn_off_what_a_guest_is_not_to_have() {
        assert_eq!(OffloadSet::All.qemu_properties(), "");
        let csum = OffloadSet::Csum.qemu_properties();
        assert!(csum.starts_with(",gso=off,host_tso4=off") && !csum.contains("csum"));
        let none = OffloadSet::None.qemu_properties();
        assert!(none.starts_with(",csum=off,guest_csum=off,gso=off"));
        assert!(!none.contains("mrg_rxbuf"));
    }

    #[test]
    fn a_shape_is_named_by_all_its_parts() {
        let shape = NetworkShape {
            queue_pairs: 2,
            mtu_bytes: 9000,
            host: HostPort::AfXdp,
            offloads: parse("all/csum").expect("valid"),
        };
        assert_eq!(
            shape.to_string(),
            "2 queue pair(s), MTU 9000, host on af-xdp, offloads all/csum"
        );
        assert_eq!(shape.tag(), "q2-mtu9000-af-xdp-all+csum");
        let json = serde_json::to_value(shape).expect("json");
        assert_eq!(json["host"], "af-xdp");
        assert_eq!(json["offloads"], "all/csum");
    }
}
