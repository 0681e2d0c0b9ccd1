//! Checksums that a sender left open, recognised by what stands in their place.
//!
//! A frame that comes by AF_XDP has no virtio-net header to tell. Where the sender is another part of
//! this kernel, as behind a veth, its TCP and UDP checksums may be left to a NIC that there is none:
//! the field has the sum of the pseudo header then. One in 65,536 whole checksums looks the same,
//! and completing it once more changes nothing, as it is computed from the same bytes.

use ringway_bridge::{Headers, L4Protocol};

/// Where the sum of an open checksum begins, and how far behind that the field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpenChecksum {
    pub(crate) start: u16,
    pub(crate) offset: u16,
}

/// The open checksum of a frame of `l2_bytes` in all that begins with `frame`, if it has one.
pub(crate) fn find_open_checksum(frame: &[u8], l2_bytes: u32) -> Option<OpenChecksum> {
    let headers = Headers::parse(frame)?;
    let (protocol, offset) = match headers.l4_protocol {
        L4Protocol::Tcp => (6, 16),
        L4Protocol::Udp => (17, 6),
    };
    let l4_bytes = l2_bytes.checked_sub(u32::try_from(headers.l4_offset).ok()?)?;
    let l3 = frame.get(headers.l3_offset..)?;
    let (addresses, packet_bytes) = if headers.is_ipv4 {
        (l3.get(12..20)?, u32::from(word(l3, 2)?))
    } else {
        (l3.get(8..40)?, u32::from(word(l3, 4)?) + 40)
    };
    // Padding would be summed too.
    if packet_bytes + u32::try_from(headers.l3_offset).ok()? != l2_bytes {
        return None;
    }
    let (words, _) = addresses.as_chunks::<2>();
    let mut sum = protocol + l4_bytes;
    sum += words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum::<u32>();
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let start = u16::try_from(headers.l4_offset).ok()?;
    let field = word(frame, headers.l4_offset + usize::from(offset))?;
    (u32::from(field) == sum).then_some(OpenChecksum { start, offset })
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*pair))
}
