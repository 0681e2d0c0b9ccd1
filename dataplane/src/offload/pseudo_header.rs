//! The sum of TCP's and UDP's pseudo header (RFC 9293, 3.1; RFC 768; RFC 8200, 8.1), and what it tells of
//! frames that come without a virtio-net header.
//!
//! Where the sender is another part of this kernel, as behind a veth, its checksums may be left to a
//! NIC that there is none: the field has the pseudo header's sum then. One in 65,536 whole checksums
//! looks the same, and completing it once more changes nothing, as it is computed from the same
//! bytes.

use ringway_bridge::{Headers, L4Protocol};

/// Where the sum of an open checksum begins, and how far behind that the field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenChecksum {
    pub(crate) start: u16,
    pub(crate) offset: u16,
}

/// The open checksum of a frame of `l2_bytes` in all that begins with `frame`, if it has one.
pub(crate) fn find_open_checksum(
    frame: &[u8],
    headers: &Headers,
    l2_bytes: u32,
) -> Option<OpenChecksum> {
    let offset = match headers.l4_protocol {
        L4Protocol::Tcp => 16,
        L4Protocol::Udp => 6,
    };
    // Padding would be summed too.
    if packet_bytes(frame, headers)? + u32::try_from(headers.l3_offset).ok()? != l2_bytes {
        return None;
    }
    let field = word(frame, headers.l4_offset + usize::from(offset))?;
    let start = u16::try_from(headers.l4_offset).ok()?;
    let l4_bytes = l2_bytes - u32::from(start);
    (field == pseudo_sum(frame, headers, l4_bytes)?).then_some(OpenChecksum { start, offset })
}

/// Bytes of the IP packet, by its header.
pub(crate) fn packet_bytes(frame: &[u8], headers: &Headers) -> Option<u32> {
    let l3 = headers.l3_offset;
    Some(if headers.is_ipv4 {
        u32::from(word(frame, l3 + 2)?)
    } else {
        u32::from(word(frame, l3 + 4)?) + 40
    })
}

/// The sum of the pseudo header, of a packet with `l4_bytes` from its TCP or UDP header on.
pub(crate) fn pseudo_sum(frame: &[u8], headers: &Headers, l4_bytes: u32) -> Option<u16> {
    let l3 = frame.get(headers.l3_offset..)?;
    let addresses = if headers.is_ipv4 {
        l3.get(12..20)?
    } else {
        l3.get(8..40)?
    };
    let protocol = match headers.l4_protocol {
        L4Protocol::Tcp => 6,
        L4Protocol::Udp => 17,
    };
    let (words, _) = addresses.as_chunks();
    let words = words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)));
    let sum = protocol + (l4_bytes & 0xffff) + words.sum::<u32>();
    let sum = (sum >> 16) + (sum & 0xffff);
    u16::try_from((sum >> 16) + (sum & 0xffff)).ok()
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*pair))
}
