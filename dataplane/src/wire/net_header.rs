//! The virtio-net header (virtio 1.3, 5.1.6): what a frame asks for, and whether it may.
//!
//! Each frame's header is checked once, in the worker's private snapshot, and replaced by a clean
//! one: fields that the flags don't cover are zero, `hdr_len` is what the frame's own headers say,
//! `num_buffers` is 1 until a destination needs more. Nothing of the source's padding travels on.

use ringway_bridge::{DropReason, Headers, L4Protocol};

use crate::wire::Offloads;

/// Bytes of `struct virtio_net_hdr` with `num_buffers`, the only form used inside ringway.
pub(crate) const HEADER_BYTES: u32 = 12;

/// [`HEADER_BYTES`] as a length of slices.
pub(crate) const HEADER_LEN: usize = HEADER_BYTES as usize;

/// Longest frame: an IPv6 packet behind an Ethernet header with two VLAN tags. Its length does not
/// count its header of 40 bytes (RFC 8200, 3).
pub(crate) const MAX_FRAME_BYTES: u32 = 40 + 65_535 + 14 + 8;

const FLAG_NEEDS_CSUM: u8 = 1;
const FLAG_DATA_VALID: u8 = 2;
/// The bits of flags and gso_type, as the header's first two bytes, that ask something of the
/// destination or tell it something.
pub(crate) const ASKING: u16 = 0xff00 | (FLAG_NEEDS_CSUM | FLAG_DATA_VALID) as u16;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Offset of the checksum in a TCP header, or in a UDP header.
pub(crate) const fn checksum_offset(protocol: L4Protocol) -> u16 {
    match protocol {
        L4Protocol::Tcp => 16,
        L4Protocol::Udp => 6,
    }
}

/// What was found in a frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Checked {
    /// Offloads that a destination must take.
    pub(crate) needs: Offloads,
    /// A source that may vouch for it has verified the checksum; a hint that a destination may not
    /// understand.
    pub(crate) data_valid: bool,
    /// Longest frame on the wire, L2 bytes: the frame itself, or its longest segment.
    pub(crate) wire_bytes: u32,
}

impl Checked {
    /// Of a frame of no length.
    pub(crate) const NONE: Self = Self {
        needs: Offloads::NONE,
        data_valid: false,
        wire_bytes: 0,
    };
}

/// Checks the header in `snapshot`'s first [`HEADER_BYTES`] against the frame behind it and what
/// its source negotiated, and replaces it by a clean one. `snapshot` holds `seen_bytes` of header
/// and frame, `frame_bytes` is the length of the whole frame.
///
/// # Errors
/// `OffloadNotNegotiated`, or `BadHeader` if the fields contradict each other or the frame.
pub(crate) fn check<const N: usize>(
    snapshot: &mut [u8; N],
    seen_bytes: u32,
    frame_bytes: u32,
    allowed: Offloads,
) -> Result<Checked, DropReason> {
    const { assert!(N >= HEADER_LEN) };
    if u16::from_le_bytes([snapshot[0], snapshot[1]]) & ASKING == 0 {
        snapshot[..HEADER_LEN].copy_from_slice(&clean(0, 0, 0, 0, [0, 0]));
        return Ok(Checked {
            wire_bytes: frame_bytes,
            ..Checked::NONE
        });
    }
    let seen = &mut snapshot[..(seen_bytes as usize).min(N)];
    match seen.split_first_chunk_mut() {
        Some((header, frame)) => check_offloads(header, frame, frame_bytes, allowed),
        None => Err(DropReason::BadHeader),
    }
}

fn check_offloads(
    header: &mut [u8; HEADER_LEN],
    frame: &[u8],
    frame_bytes: u32,
    allowed: Offloads,
) -> Result<Checked, DropReason> {
    let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (flags, gso_type) = (header[0], header[1]);
    let (gso_size, csum_start, csum_offset) = (field(4), field(6), field(8));
    if flags & FLAG_NEEDS_CSUM == 0 {
        // 5.1.6.2.1: a driver that sets gso_type must set NEEDS_CSUM too.
        if gso_type != 0 {
            return Err(DropReason::BadHeader);
        }
        // 5.1.6.2.1: a driver must not set DATA_VALID. A guest's word would have others take broken
        // frames for whole ones.
        let data_valid = Offloads::VOUCHES.within(allowed);
        let flags = if data_valid { FLAG_DATA_VALID } else { 0 };
        *header = clean(flags, 0, 0, 0, [0, 0]);
        return Ok(Checked {
            data_valid,
            wire_bytes: frame_bytes,
            ..Checked::NONE
        });
    }
    // 5.1.6.2.2: the device must check that the checksum lies in the frame.
    let csum_end = u32::from(csum_start) + u32::from(csum_offset) + 2;
    if csum_start < 14 || csum_end > frame_bytes {
        return Err(DropReason::BadHeader);
    }
    let mut needs = Offloads::CSUM;
    if gso_type == 0 {
        if !needs.within(allowed) {
            return Err(DropReason::OffloadNotNegotiated);
        }
        *header = clean(FLAG_NEEDS_CSUM, 0, 0, 0, [csum_start, csum_offset]);
        return Ok(Checked {
            needs,
            data_valid: false,
            wire_bytes: frame_bytes,
        });
    }
    let headers = Headers::parse(frame).ok_or(DropReason::BadHeader)?;
    let (kind, is_ipv4) = match gso_type & !GSO_ECN {
        GSO_TCPV4 => (Offloads::TSO4, true),
        GSO_TCPV6 => (Offloads::TSO6, false),
        GSO_UDP_L4 if headers.is_ipv4 => (Offloads::USO4, true),
        GSO_UDP_L4 => (Offloads::USO6, false),
        // UFO and types to come: no feature of ours allows them.
        _ => return Err(DropReason::OffloadNotNegotiated),
    };
    let protocol = match gso_type & !GSO_ECN {
        GSO_UDP_L4 => L4Protocol::Udp,
        _ => L4Protocol::Tcp,
    };
    needs = needs.with(kind);
    let has_ecn = gso_type & GSO_ECN != 0;
    if has_ecn {
        needs = needs.with(Offloads::ECN);
    }
    if !needs.within(allowed) {
        return Err(DropReason::OffloadNotNegotiated);
    }
    let headers_bytes = u16::try_from(headers.payload_offset).map_err(|_| DropReason::BadHeader)?;
    let consistent = headers.is_ipv4 == is_ipv4
        && headers.l4_protocol == protocol
        && headers.l4_offset == usize::from(csum_start)
        && csum_offset == checksum_offset(protocol)
        && (protocol == L4Protocol::Tcp || !has_ecn)
        && u32::from(headers_bytes) <= frame_bytes
        && gso_size > 0;
    if !consistent {
        return Err(DropReason::BadHeader);
    }
    *header = clean(
        FLAG_NEEDS_CSUM,
        gso_type,
        headers_bytes,
        gso_size,
        [csum_start, csum_offset],
    );
    let segment = u32::from(headers_bytes) + u32::from(gso_size);
    Ok(Checked {
        needs,
        data_valid: false,
        wire_bytes: segment.min(frame_bytes),
    })
}

/// A header with these fields and one buffer.
#[inline]
const fn clean(
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum: [u16; 2],
) -> [u8; HEADER_LEN] {
    let [hdr_low, hdr_high] = hdr_len.to_le_bytes();
    let [gso_low, gso_high] = gso_size.to_le_bytes();
    let [start_low, start_high] = csum[0].to_le_bytes();
    let [offset_low, offset_high] = csum[1].to_le_bytes();
    [
        flags,
        gso_type,
        hdr_low,
        hdr_high,
        gso_low,
        gso_high,
        start_low,
        start_high,
        offset_low,
        offset_high,
        1,
        0,
    ]
}

/// Writes `num_buffers` into a header.
#[inline]
pub(crate) fn set_num_buffers(snapshot: &mut [u8], buffers: u16) {
    let [low, high] = buffers.to_le_bytes();
    snapshot[10] = low;
    snapshot[11] = high;
}

/// Whether a header that was not checked yet asks for segmentation.
pub(crate) fn wants_segmentation(snapshot: &[u8]) -> bool {
    snapshot[0] & FLAG_NEEDS_CSUM != 0 && snapshot[1] != 0
}

/// Makes a header ask for nothing and tell nothing, for one buffer.
pub(crate) fn clear(snapshot: &mut [u8]) {
    snapshot[..HEADER_LEN].copy_from_slice(&clean(0, 0, 0, 0, [0, 0]));
}

/// Moves what a header that was checked tells of the frame's headers by so many bytes: a tag comes or
/// goes in front of them. False if they don't lie behind the addresses then.
pub(crate) fn shift(header: &mut [u8], by: i16) -> bool {
    if header[0] & FLAG_NEEDS_CSUM == 0 {
        return true;
    }
    let fields = Fields::of(header);
    let start = fields.csum_start.checked_add_signed(by);
    let Some(start) = start.filter(|start| *start >= 14) else {
        return false;
    };
    header[6..8].copy_from_slice(&start.to_le_bytes());
    if header[1] != 0 {
        let hdr_len = u16::from_le_bytes([header[2], header[3]]);
        let hdr_len = hdr_len.saturating_add_signed(by);
        header[2..4].copy_from_slice(&hdr_len.to_le_bytes());
    }
    true
}

/// Makes a header ask for nothing but its checksum.
pub(crate) fn set_needs_csum(snapshot: &mut [u8], csum_start: u16, csum_offset: u16) {
    let header = clean(FLAG_NEEDS_CSUM, 0, 0, 0, [csum_start, csum_offset]);
    snapshot[..HEADER_LEN].copy_from_slice(&header);
}

/// Makes a header ask for TCP's segmentation, which asks for its checksum too. `lengths` are those
/// of all headers and of a segment.
pub(crate) fn set_gso_tcp(header: &mut [u8], is_ipv4: bool, lengths: (u16, u16), csum_start: u16) {
    let gso_type = if is_ipv4 { GSO_TCPV4 } else { GSO_TCPV6 };
    let csum = [csum_start, checksum_offset(L4Protocol::Tcp)];
    let clean = clean(FLAG_NEEDS_CSUM, gso_type, lengths.0, lengths.1, csum);
    header[..HEADER_LEN].copy_from_slice(&clean);
}

/// Fields of a header that was checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields {
    pub(crate) gso_size: u16,
    pub(crate) csum_start: u16,
    pub(crate) csum_offset: u16,
}

impl Fields {
    pub(crate) fn of(snapshot: &[u8]) -> Self {
        let field = |at: usize| u16::from_le_bytes([snapshot[at], snapshot[at + 1]]);
        Self {
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        }
    }
}
