//! Generic receive offload: TCP segments that follow one another are joined into one frame to be
//! segmented again.
//!
//! ```text
//!   segments  | headers | payload 1 | | headers | payload 2 | | headers | payload 3 |
//!                  |          |____________________ | ______________________|
//!   one frame | headers' | payload 1 | payload 2 | payload 3 |
//! ```
//! What a receiver that takes such frames makes of them is what it would have made of the segments:
//! all that they have in their headers is the same in all, or can be told from the first: that is
//! what [`GroFrame::takes`] looks for, in the manner of GRO. The rest is left as it came.

use ringway_bridge::{Headers, L4Protocol};

use crate::wire::Offloads;
use crate::wire::checksum::Sum;
use crate::wire::fields::tcp::{ACK, ECE, FLAGS, PSH, SEQUENCE};
use crate::wire::fields::{
    checksum_at, dword, ipv4_sum, packet_bytes, put, put_packet_bytes, word,
};
use crate::wire::net_header::{self, HEADER_LEN};
use crate::wire::pseudo_sum;

/// Longest IP packet.
const MAX_PACKET_BYTES: u32 = 65_535;

/// A segment, and those behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroFrame<'a> {
    /// The first segment's frame, its headers at least.
    frame: &'a [u8],
    headers: Headers,
    /// Payload of each segment but the last.
    segment_bytes: u32,
    payload_bytes: u32,
    segments: u16,
    /// PSH, if the last has it.
    push: u8,
    /// No segment follows the last.
    is_over: bool,
}

impl<'a> GroFrame<'a> {
    /// A joined frame of one segment so far, whose frame of `l2_bytes` begins with `frame`, if
    /// others could follow.
    pub(crate) fn begin(frame: &'a [u8], headers: &Headers, l2_bytes: u32) -> Option<Self> {
        if headers.l4_protocol != L4Protocol::Tcp {
            return None;
        }
        let payload_bytes = payload_bytes(headers, l2_bytes)?;
        let flags = frame[headers.l4_offset + FLAGS];
        let is_data = payload_bytes > 0 && flags & !(PSH | ECE) == ACK;
        // No options and extension headers: what they say need not hold for the whole.
        let ip_bytes = headers.l4_offset - headers.l3_offset;
        let is_usual = ip_bytes == if headers.is_ipv4 { 20 } else { 40 };
        (is_data && is_usual && has_sound_ip_header(frame, headers, l2_bytes)).then_some(Self {
            frame,
            headers: *headers,
            segment_bytes: payload_bytes,
            payload_bytes,
            segments: 1,
            push: flags & PSH,
            is_over: flags & PSH != 0,
        })
    }

    /// What a destination must take for the segments to be joined.
    pub(crate) fn needs(&self) -> Offloads {
        let kind = if self.headers.is_ipv4 {
            Offloads::TSO4
        } else {
            Offloads::TSO6
        };
        kind.with(Offloads::CSUM)
    }

    /// Whether the frame of `l2_bytes` that begins with `frame` is the next segment.
    pub(crate) fn takes(&self, frame: &[u8], l2_bytes: u32) -> bool {
        let Headers {
            l3_offset: l3,
            l4_offset: l4,
            payload_offset: end,
            is_ipv4,
            ..
        } = self.headers;
        let Some(payload_bytes) = payload_bytes(&self.headers, l2_bytes) else {
            return false;
        };
        if self.is_over || payload_bytes == 0 || payload_bytes > self.segment_bytes {
            return false;
        }
        if self.packet_bytes() + payload_bytes > MAX_PACKET_BYTES {
            return false;
        }
        let Some(theirs) = frame.get(..end) else {
            return false;
        };
        let ours = &self.frame[..end];
        let checksum = checksum_at(L4Protocol::Tcp, l4);
        let same = |from: usize, to: usize| ours[from..to] == theirs[from..to];
        // Neither lengths, IPv4's identification and checksum, nor what TCP counts and sums.
        let same_packet = if is_ipv4 {
            same(0, l3 + 2) && same(l3 + 6, l3 + 10) && same(l3 + 12, l4 + SEQUENCE)
        } else {
            same(0, l3 + 4) && same(l3 + 6, l4 + SEQUENCE)
        };
        same_packet
            && same(l4 + SEQUENCE + 4, l4 + FLAGS)
            && (ours[l4 + FLAGS] ^ theirs[l4 + FLAGS]) & !PSH == 0
            && same(l4 + FLAGS + 1, checksum)
            && same(checksum + 2, end)
            && dword(theirs, l4 + SEQUENCE)
                == dword(ours, l4 + SEQUENCE).wrapping_add(self.payload_bytes)
            && (!is_ipv4 || self.identification_fits(theirs))
            && has_sound_ip_header(theirs, &self.headers, l2_bytes)
    }

    /// Adds the frame that it [takes](Self::takes).
    pub(crate) fn add(&mut self, frame: &[u8], l2_bytes: u32) {
        let payload_bytes = payload_bytes(&self.headers, l2_bytes).unwrap_or(0);
        self.payload_bytes += payload_bytes;
        self.segments += 1;
        self.push = frame[self.headers.l4_offset + FLAGS] & PSH;
        self.is_over = self.push != 0 || payload_bytes < self.segment_bytes;
    }

    /// Frames in it.
    pub(crate) fn segments(&self) -> u16 {
        self.segments
    }

    /// Bytes of the headers of each.
    pub(crate) fn headers_bytes(&self) -> usize {
        self.headers.payload_offset
    }

    /// Writes the virtio-net header and the headers of the whole into `to`, which is as long.
    pub(crate) fn write_headers(&self, to: &mut [u8]) {
        let Headers {
            l3_offset: l3,
            l4_offset: l4,
            payload_offset: end,
            is_ipv4,
            ..
        } = self.headers;
        let (header, frame) = to.split_at_mut(HEADER_LEN);
        frame.copy_from_slice(&self.frame[..end]);
        let fitting = |bytes: u32| u16::try_from(bytes).unwrap_or(u16::MAX);
        let packet_bytes = self.packet_bytes();
        put_packet_bytes(frame, l3, is_ipv4, packet_bytes);
        frame[l4 + FLAGS] |= self.push;
        let l4_bytes = packet_bytes - fitting_u32(l4 - l3);
        let sum = pseudo_sum(frame, &self.headers, l4_bytes);
        put(frame, checksum_at(L4Protocol::Tcp, l4), sum);
        let offset = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX);
        net_header::set_gso_tcp(
            header,
            is_ipv4,
            (offset(end), fitting(self.segment_bytes)),
            offset(l4),
        );
    }

    /// Bytes of the IP packet that all of it is.
    fn packet_bytes(&self) -> u32 {
        let headers = self.headers.payload_offset - self.headers.l3_offset;
        fitting_u32(headers) + self.payload_bytes
    }

    /// Whether the identification is one that segmentation would have made, or means nothing (RFC
    /// 6864, 4.1: where DF is set).
    fn identification_fits(&self, theirs: &[u8]) -> bool {
        let l3 = self.headers.l3_offset;
        let is_atomic = theirs[l3 + 6] & 0x40 != 0;
        let expected = word(self.frame, l3 + 4).wrapping_add(self.segments);
        is_atomic || word(theirs, l3 + 4) == expected
    }
}

/// Whether the checksum of a TCP packet is right, whose parts are given in order.
pub(crate) fn is_checksum_right<'a>(
    frame: &[u8],
    headers: &Headers,
    l2_bytes: u32,
    parts: impl Iterator<Item = &'a [u8]>,
) -> bool {
    let l4_bytes = l2_bytes - fitting_u32(headers.l4_offset);
    let mut sum = Sum::default();
    sum.add(&pseudo_sum(frame, headers, l4_bytes).to_be_bytes());
    let mut skip = headers.l4_offset;
    for part in parts {
        sum.add(part.get(skip..).unwrap_or_default());
        skip = skip.saturating_sub(part.len());
    }
    sum.finish_plain() == [0; 2]
}

/// Whether the IP header tells the frame's length, and IPv4's is as its checksum has it.
fn has_sound_ip_header(frame: &[u8], headers: &Headers, l2_bytes: u32) -> bool {
    let l3 = headers.l3_offset;
    let is_whole = packet_bytes(frame, headers) == l2_bytes - fitting_u32(l3);
    is_whole && (!headers.is_ipv4 || ipv4_sum(frame, l3) == [0; 2])
}

/// Bytes behind the headers, if all of these are there.
fn payload_bytes(headers: &Headers, l2_bytes: u32) -> Option<u32> {
    l2_bytes.checked_sub(fitting_u32(headers.payload_offset))
}

fn fitting_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
