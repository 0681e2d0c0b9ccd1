//! The sum of TCP's and UDP's pseudo header (RFC 9293, 3.1; RFC 768; RFC 8200, 8.1), and what it
//! tells of frames that come without a virtio-net header.
//!
//! Where the sender is another part of this kernel, as behind a veth, its checksums may be left to
//! a NIC that there is none: the field has the pseudo header's sum then. One in 65,536 whole
//! checksums looks the same, and completing it once more changes nothing, as it is computed from
//! the same bytes.

use ringway_bridge::{Headers, L4Protocol};

use super::fields::{packet_bytes, word};
use crate::wire::net_header::checksum_offset;

/// Where the sum of an open checksum begins, and how far behind that the field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenChecksum {
    pub(crate) start: u16,
    pub(crate) offset: u16,
}

/// The open checksum of a frame of `l2_bytes` in all that begins with `frame`, where these headers
/// were found, if it has one.
pub(crate) fn find_open_checksum(
    frame: &[u8],
    headers: &Headers,
    l2_bytes: u32,
) -> Option<OpenChecksum> {
    let start = u16::try_from(headers.l4_offset).ok()?;
    let offset = checksum_offset(headers.l4_protocol);
    // Padding would be summed too.
    if packet_bytes(frame, headers) + u32::try_from(headers.l3_offset).ok()? != l2_bytes {
        return None;
    }
    let field = word(frame, headers.l4_offset + usize::from(offset));
    let is_open = field == pseudo_sum(frame, headers, l2_bytes - u32::from(start));
    is_open.then_some(OpenChecksum { start, offset })
}

/// The sum of the pseudo header, of a packet with `l4_bytes` from its TCP or UDP header on.
pub(crate) fn pseudo_sum(frame: &[u8], headers: &Headers, l4_bytes: u32) -> u16 {
    let l3 = headers.l3_offset;
    let addresses = if headers.is_ipv4 {
        l3 + 12..l3 + 20
    } else {
        l3 + 8..l3 + 40
    };
    let protocol = match headers.l4_protocol {
        L4Protocol::Tcp => 6,
        L4Protocol::Udp => 17,
    };
    let words: u32 = addresses
        .step_by(2)
        .map(|at| u32::from(word(frame, at)))
        .sum();
    let sum = protocol + (l4_bytes & 0xffff) + words;
    let sum = (sum >> 16) + (sum & 0xffff);
    u16::try_from((sum >> 16) + (sum & 0xffff)).unwrap_or(u16::MAX)
}
