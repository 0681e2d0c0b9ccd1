//! Small value types that can't hold a bad value.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::VlanId;

/// Most ports that a bridge has: bounds the per-worker destination scratch (24 bytes a port) and
/// leaves the forwarding database 16 bits for a port.
pub const MAX_PORTS: usize = 4096;

/// Most frames in a burst: one bit each in a [`crate::FrameSet`].
pub const MAX_BURST: usize = 64;

/// A port's slot in the bridge, below [`MAX_PORTS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema),
    serde(try_from = "u16", into = "u16")
)]
pub struct PortId(u16);

impl PortId {
    /// The port in slot `index`, or `None` from [`MAX_PORTS`] on.
    pub const fn new(index: u16) -> Option<Self> {
        if (index as usize) < MAX_PORTS {
            Some(Self(index))
        } else {
            None
        }
    }

    /// The port whose low bits are `bits`; for numbers that came from a `PortId`.
    pub(crate) const fn from_bits(bits: u16) -> Self {
        const { assert!(MAX_PORTS.is_power_of_two() && MAX_PORTS <= 1 << 16) };
        #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
        const MASK: u16 = (MAX_PORTS - 1) as u16;
        Self(bits & MASK)
    }

    /// The slot as an index into per-port tables.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The slot as a number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl From<PortId> for u16 {
    fn from(id: PortId) -> Self {
        id.0
    }
}

impl TryFrom<u16> for PortId {
    type Error = NoSuchSlot;

    fn try_from(index: u16) -> Result<Self, NoSuchSlot> {
        Self::new(index).ok_or(NoSuchSlot(index))
    }
}

/// A number from [`MAX_PORTS`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no slot {0}: a bridge has {MAX_PORTS}")]
pub struct NoSuchSlot(u16);

/// A station: an address in a VLAN. The same address in another VLAN is another station's
/// (independent learning, IEEE 802.1Q-2022, 8.8.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Station {
    /// The address.
    pub mac: MacAddr,
    /// The VLAN.
    pub vlan: VlanId,
}

impl Station {
    /// An address in a VLAN.
    pub const fn new(mac: MacAddr, vlan: VlanId) -> Self {
        Self { mac, vlan }
    }
}

/// In no VLAN.
impl From<MacAddr> for Station {
    fn from(mac: MacAddr) -> Self {
        Self::new(mac, VlanId::NONE)
    }
}

/// Coarse time for ageing: tenths of a second since the bridge was made. Wraps after 13 years;
/// ages are computed with wrapping subtraction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tick(pub u32);

impl Tick {
    /// Ticks in one second.
    pub const PER_SECOND: u32 = 10;

    /// The tick that `elapsed` after the bridge was made falls into.
    pub fn after(elapsed: Duration) -> Self {
        Self(Self::count(elapsed))
    }

    /// How many whole ticks `duration` has.
    pub fn count(duration: Duration) -> u32 {
        let ticks = duration.as_millis() * u128::from(Self::PER_SECOND) / 1000;
        u32::try_from(ticks).unwrap_or(u32::MAX)
    }

    /// Ticks from `earlier` to `self`.
    pub const fn since(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0)
    }

    /// Ticks from `earlier` to `self`, or 0 if `earlier` is the later one: workers read the clock
    /// independently, so that an entry may have been refreshed in this worker's future.
    pub(crate) const fn age_of(self, earlier: Self) -> u32 {
        let age = self.since(earlier);
        if age > u32::MAX / 2 { 0 } else { age }
    }
}

/// An Ethernet MAC address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize, schemars::JsonSchema),
    serde(try_from = "String", into = "String")
)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether the I/G bit is set: multicast or broadcast (IEEE 802.3, 3.2.3).
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether it is one of `01:80:c2:00:00:00` to `0f`, which a bridge must not forward
    /// (IEEE 802.1Q, 8.6.3).
    pub const fn is_link_local(self) -> bool {
        matches!(self.0, [0x01, 0x80, 0xc2, 0x00, 0x00, 0x00..=0x0f])
    }

    /// The address in the low 48 bits, first byte highest.
    pub const fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The inverse of [`MacAddr::to_u64`]; the high 16 bits are ignored.
    pub const fn from_u64(value: u64) -> Self {
        let [_, _, a, b, c, d, e, f] = value.to_be_bytes();
        Self([a, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddr {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, ParseMacError> {
        text.parse()
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, out)
    }
}

/// A text that is no MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address: six hexadecimal bytes with colons, as 52:54:00:00:00:01")]
pub struct ParseMacError(String);

/// Longest part of a refused text that the error tells.
const MAX_SHOWN: usize = 64;

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let error = || ParseMacError(text.chars().take(MAX_SHOWN).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            Err(error())
        } else {
            Ok(Self(bytes))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_round_trip_through_text_and_integer() {
        let mac: MacAddr = "52:54:00:ab:cd:ef".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        assert_eq!(MacAddr::from_u64(mac.to_u64()), mac);
        assert_eq!(mac.to_u64(), 0x5254_00ab_cdef);
    }

    #[test]
    fn texts_that_are_no_mac_address_are_refused() {
        for text in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:01",
            "5254:00:ab:cd:ef",
            "+1:54:00:00:00:00",
            "zz:54:00:ab:cd:ef",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn port_ids_end_below_the_limit() {
        assert!(PortId::new(4095).is_some());
        assert!(PortId::new(4096).is_none());
    }
}
