//! Frame headers, read from a private copy of a frame's first bytes.

use crate::DropReason;

/// Most VLAN tags that [`Headers::parse`] skips: a service tag and a customer tag (802.1ad), and one
/// that a port of a VLAN puts before them.
pub const MAX_VLAN_TAGS: usize = 3;

/// Most IPv6 extension headers that [`Headers::parse`] skips. RFC 8200, 4.1 has seven in its
/// recommended order; more come from attackers only.
pub const MAX_EXTENSION_HEADERS: usize = 8;

const ETHERNET_BYTES: usize = 14;
const MAC_BITS: u64 = (1 << 48) - 1;
const GROUP_BIT: u64 = 1 << 40;
const LINK_LOCAL: u64 = 0x0180_c200_0000;

/// What the bridge needs of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameHead {
    /// Destination MAC in the low 48 bits, as [`MacAddr::to_u64`](crate::MacAddr::to_u64).
    pub dst: u64,
    /// Source MAC in the low 48 bits.
    pub src: u64,
    /// EtherType, or length, behind the addresses: of the outer VLAN tag if there is one.
    pub ether_type: u16,
}

impl FrameHead {
    /// Reads the Ethernet header of a frame that begins with `first_bytes`.
    ///
    /// # Errors
    /// [`DropReason::Runt`] if they are fewer than an Ethernet header has.
    #[inline]
    pub fn parse(first_bytes: &[u8]) -> Result<Self, DropReason> {
        let Some(header) = first_bytes.first_chunk::<ETHERNET_BYTES>() else {
            return Err(DropReason::Runt);
        };
        // Two loads that overlap, rather than fourteen of a byte.
        let (Some(low), Some(high)) = (header.first_chunk(), header.last_chunk()) else {
            return Err(DropReason::Runt);
        };
        let high = u64::from_be_bytes(*high);
        Ok(Self {
            dst: u64::from_be_bytes(*low) >> 16,
            src: high >> 16,
            ether_type: (high & 0xffff) as u16,
        })
    }
}

/// Whether a MAC in the low 48 bits is multicast or broadcast.
#[inline]
pub(crate) const fn is_group(mac: u64) -> bool {
    mac & GROUP_BIT != 0
}

/// Whether a MAC in the low 48 bits is one that bridges do not forward (IEEE 802.1Q, 8.6.3).
#[inline]
pub(crate) const fn is_link_local(mac: u64) -> bool {
    mac & MAC_BITS & !0xf == LINK_LOCAL
}

/// Whether a MAC in the low 48 bits can be a station's: neither a group address nor zero.
#[inline]
pub(crate) const fn is_station(mac: u64) -> bool {
    mac & GROUP_BIT == 0 && mac & MAC_BITS != 0
}

/// The transport protocols that offloads know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L4Protocol {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
}

/// Where the headers of a TCP or UDP frame are, for the checks of offloads. Offsets are in bytes
/// from the start of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Start of the IP header.
    pub l3_offset: usize,
    /// Start of the TCP or UDP header.
    pub l4_offset: usize,
    /// Start of the payload: the length of all headers.
    pub payload_offset: usize,
    /// IPv4 rather than IPv6.
    pub is_ipv4: bool,
    /// Which header is at `l4_offset`.
    pub l4_protocol: L4Protocol,
}

impl Headers {
    /// Walks the headers in `frame`, the first bytes of a frame, all of which must be there.
    ///
    /// Skips up to [`MAX_VLAN_TAGS`] tags, IPv4 options and up to [`MAX_EXTENSION_HEADERS`] IPv6
    /// extension headers. `None` if the headers are truncated, exceed the length that the IP header
    /// gives, or are not those of a whole TCP or UDP packet: fragments have no offloads. Whether
    /// the payload is as long as the IP header says is not looked at.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let (ether_type, l3_offset) = skip_tags(frame)?;
        let packet = frame.get(l3_offset..)?;
        let (protocol, l4, packet_bytes, is_ipv4) = match ether_type {
            0x0800 => ipv4(packet).map(|(protocol, l4, bytes)| (protocol, l4, bytes, true))?,
            0x86dd => ipv6(packet).map(|(protocol, l4, bytes)| (protocol, l4, bytes, false))?,
            _ => return None,
        };
        let (l4_protocol, l4_bytes) = transport(protocol, packet.get(l4..)?)?;
        let headers_bytes = l4 + l4_bytes;
        (headers_bytes <= packet_bytes).then_some(Self {
            l3_offset,
            l4_offset: l3_offset + l4,
            payload_offset: l3_offset + headers_bytes,
            is_ipv4,
            l4_protocol,
        })
    }
}

/// The EtherType behind the VLAN tags and the offset of what follows it.
fn skip_tags(frame: &[u8]) -> Option<(u16, usize)> {
    let mut offset = ETHERNET_BYTES - 2;
    for _ in 0..=MAX_VLAN_TAGS {
        let ether_type = be16(frame, offset)?;
        if !matches!(ether_type, 0x8100 | 0x88a8 | 0x9100) {
            return Some((ether_type, offset + 2));
        }
        offset += 4;
    }
    None
}

/// Protocol, header length and packet length (RFC 791, 3.1).
fn ipv4(packet: &[u8]) -> Option<(u8, usize, usize)> {
    const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
    let fixed = packet.first_chunk::<20>()?;
    let header_bytes = usize::from(fixed[0] & 0xf) * 4;
    let is_whole = be16(fixed, 6)? & MORE_FRAGMENTS_AND_OFFSET == 0;
    let is_sound = fixed[0] >> 4 == 4 && header_bytes >= fixed.len();
    (is_sound && is_whole).then_some((fixed[9], header_bytes, be16(fixed, 2)?.into()))
}

/// Protocol, length of the header with its extensions, and packet length (RFC 8200, 3 and 4).
fn ipv6(packet: &[u8]) -> Option<(u8, usize, usize)> {
    const OFFSET_AND_MORE_FRAGMENTS: u16 = 0xfff9;
    let fixed = packet.first_chunk::<40>()?;
    if fixed[0] >> 4 != 6 {
        return None;
    }
    let packet_bytes = fixed.len() + usize::from(be16(fixed, 4)?);
    let mut next = fixed[6];
    let mut offset = fixed.len();
    for _ in 0..=MAX_EXTENSION_HEADERS {
        let length = |unit, first| {
            let units = packet.get(offset + 1).copied().map(usize::from)?;
            Some(units * unit + first)
        };
        let extension_bytes = match next {
            // Hop-by-hop, routing, destination options, mobility, HIP, shim6.
            0 | 43 | 60 | 135 | 139 | 140 => length(8, 8)?,
            44 if be16(packet, offset + 2)? & OFFSET_AND_MORE_FRAGMENTS == 0 => 8,
            44 => return None,
            51 => length(4, 8)?, // authentication header, RFC 4302, 2.2
            _ => return Some((next, offset, packet_bytes)),
        };
        next = *packet.get(offset)?;
        offset += extension_bytes;
    }
    None
}

/// The protocol and the length of its header, all of which is in `segment`.
fn transport(protocol: u8, segment: &[u8]) -> Option<(L4Protocol, usize)> {
    let (protocol, header_bytes) = match protocol {
        6 => (L4Protocol::Tcp, usize::from(segment.get(12)? >> 4) * 4),
        17 => (L4Protocol::Udp, 8),
        _ => return None,
    };
    let shortest = match protocol {
        L4Protocol::Tcp => 20,
        L4Protocol::Udp => 8,
    };
    (header_bytes >= shortest && header_bytes <= segment.len()).then_some((protocol, header_bytes))
}

fn be16(bytes: &[u8], offset: usize) -> Option<u16> {
    let &[high, low] = bytes.get(offset..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes([high, low]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MacAddr;

    fn head(dst: &str, src: &str) -> FrameHead {
        let mac = |text: &str| text.parse::<MacAddr>().unwrap();
        let frame = [&mac(dst).0[..], &mac(src).0[..], &[0x08, 0x06]].concat();
        FrameHead::parse(&frame).unwrap()
    }

    #[test]
    fn an_ethernet_header_is_read_in_network_order() {
        let head = head("52:54:00:ab:cd:ef", "02:00:00:00:00:01");
        assert_eq!(head.dst, 0x5254_00ab_cdef);
        assert_eq!(head.src, 0x0200_0000_0001);
        assert_eq!(head.ether_type, 0x0806);
    }

    #[test]
    fn frames_below_fourteen_bytes_are_runts() {
        for len in 0..14 {
            assert_eq!(FrameHead::parse(&[2; 14][..len]), Err(DropReason::Runt));
        }
        assert!(FrameHead::parse(&[2; 14]).is_ok());
    }

    #[test]
    fn addresses_are_classified() {
        let mac = |text: &str| text.parse::<MacAddr>().unwrap().to_u64();
        assert!(is_station(mac("02:00:00:00:00:01")) && is_station(mac("fe:ff:ff:ff:ff:ff")));
        assert!(!is_station(0) && !is_station(mac("01:00:00:00:00:01")));
        assert!(is_group(mac("ff:ff:ff:ff:ff:ff")) && is_group(mac("33:33:00:00:00:01")));
        assert!(!is_group(mac("fe:ff:ff:ff:ff:ff")));
        assert!(is_link_local(mac("01:80:c2:00:00:00")) && is_link_local(mac("01:80:c2:00:00:0f")));
        assert!(!is_link_local(mac("01:80:c2:00:00:10")));
        assert!(!is_link_local(mac("01:80:c2:00:01:00")));
    }
}
