//! Features of an interface, as `ethtool -k` names them, that keep from XDP what a frame is on the
//! wire: a VLAN tag that lies beside it, segments that were joined or never cut.

use super::interface::Interface;

/// `ETHTOOL_GSTRINGS`, `ETHTOOL_GSTATS`, `ETHTOOL_GFEATURES`, `ETHTOOL_SFEATURES`
/// (linux/ethtool.h).
const GET_STRINGS: u32 = 0x1b;
const GET_STATISTICS: u32 = 0x1d;
const GET_FEATURES: u32 = 0x3a;
const SET_FEATURES: u32 = 0x3b;

/// `ETH_SS_FEATURES`: which strings.
const FEATURE_NAMES: u32 = 4;

/// Bytes of a name (`ETH_GSTRING_LEN`).
const NAME_BYTES: usize = 32;

/// More features than kernels have, 64 by Linux 6.18.
const MAX_FEATURES: usize = 256;

/// What has a NIC take the tag from a frame.
pub(super) const STRIPS_TAGS: &[&str] = &["rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"];

/// What has the kernel join frames before generic XDP sees them.
pub(super) const JOINS: &[&str] = &["rx-gro"];

/// What has the stack at a veth's far end leave tags beside frames, and frames uncut.
pub(super) const LEAVES_WORK: &[&str] = &[
    "tx-vlan-hw-insert",
    "tx-vlan-stag-hw-insert",
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
    "tx-sctp-segmentation",
    "tx-gso-list",
];

impl Interface {
    /// Switches features off, and returns those that stay on nevertheless: fixed ones, or all if
    /// the kernel does not say.
    pub(super) fn switch_off(&self, names: &[&'static str]) -> Vec<&'static str> {
        let Some(known) = self.feature_names() else {
            return names.to_vec();
        };
        let bit = |name: &str| known.iter().position(|known| known == name);
        let words = known.len().div_ceil(32);
        // For each word a mask of what is to change, and what to.
        let mut command = vec![0; 2 + 2 * words];
        command[..2].copy_from_slice(&[SET_FEATURES, word_count(words)]);
        for bit in names.iter().filter_map(|name| bit(name)) {
            command[2 + bit / 32 * 2] |= 1 << (bit % 32);
        }
        // Whether it was done is asked below.
        let _ = self.ethtool(&mut command[..]);
        let mut state = vec![0; 2 + 4 * words];
        state[..2].copy_from_slice(&[GET_FEATURES, word_count(words)]);
        let Some(()) = self.ethtool(&mut state[..]) else {
            return names.to_vec();
        };
        // Available, requested, active, never changed.
        let is_on = |bit: usize| state[2 + bit / 32 * 4 + 2] >> (bit % 32) & 1 != 0;
        let stays = |name: &&&'static str| bit(name).is_some_and(is_on);
        names.iter().filter(stays).copied().collect()
    }

    /// The other end of a veth, if it is in the same network namespace.
    pub(super) fn veth_peer(&self) -> Option<Self> {
        let peer = self.at(self.peer_index()?)?;
        // A number of another namespace may be some interface's here too.
        (peer.is_veth() && peer.peer_index() == Some(self.index())).then_some(peer)
    }

    fn is_veth(&self) -> bool {
        self.driver().as_deref() == Some("veth")
    }

    /// The first of a veth's statistics, `peer_ifindex`.
    fn peer_index(&self) -> Option<u32> {
        let count = self.statistics()?;
        let mut command = vec![0; 2 + 2 * usize::try_from(count).ok()?];
        command[..2].copy_from_slice(&[GET_STATISTICS, count]);
        self.ethtool(&mut command[..])?;
        let &[.., a, b] = command.first_chunk::<4>()?;
        let halves = if cfg!(target_endian = "little") { a } else { b };
        Some(halves)
    }

    fn feature_names(&self) -> Option<Vec<String>> {
        let mut command = vec![0_u32; 3 + MAX_FEATURES * NAME_BYTES / 4];
        command[..2].copy_from_slice(&[GET_STRINGS, FEATURE_NAMES]);
        self.ethtool(&mut command[..])?;
        let count = usize::try_from(command[2]).ok()?.min(MAX_FEATURES);
        let bytes: Vec<u8> = command[3..].iter().flat_map(|w| w.to_ne_bytes()).collect();
        let name = |bytes: &[u8]| {
            let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        };
        Some(bytes.chunks(NAME_BYTES).take(count).map(name).collect())
    }
}

fn word_count(words: usize) -> u32 {
    u32::try_from(words).unwrap_or(u32::MAX)
}
