//! Fields of headers that were found to be all there, in network byte order.

use ringway_bridge::{Headers, L4Protocol};

use super::checksum::Sum;
use crate::wire::net_header::checksum_offset;

/// Offsets in a TCP header, and its flags (RFC 9293, 3.1; RFC 3168, 6.1).
pub(crate) mod tcp {
    pub(crate) const SEQUENCE: usize = 4;
    pub(crate) const FLAGS: usize = 13;
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
    pub(crate) const ECE: u8 = 0x40;
    pub(crate) const CWR: u8 = 0x80;
}

pub(crate) fn word(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

pub(crate) fn dword(frame: &[u8], at: usize) -> u32 {
    u32::from(word(frame, at)) << 16 | u32::from(word(frame, at + 2))
}

pub(crate) fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Where the checksum is of a TCP or UDP header at `l4`.
pub(crate) fn checksum_at(protocol: L4Protocol, l4: usize) -> usize {
    l4 + usize::from(checksum_offset(protocol))
}

/// Bytes of the IP packet, as its header has them.
pub(crate) fn packet_bytes(frame: &[u8], headers: &Headers) -> u32 {
    let l3 = headers.l3_offset;
    if headers.is_ipv4 {
        u32::from(word(frame, l3 + 2))
    } else {
        u32::from(word(frame, l3 + 4)) + 40
    }
}

/// Writes the length of an IP packet into its header at `l3`, and IPv4's checksum.
pub(crate) fn put_packet_bytes(frame: &mut [u8], l3: usize, is_ipv4: bool, bytes: u32) {
    let fitting = |bytes: u32| u16::try_from(bytes).unwrap_or(u16::MAX);
    if !is_ipv4 {
        return put(frame, l3 + 4, fitting(bytes - 40));
    }
    put(frame, l3 + 2, fitting(bytes));
    put(frame, l3 + 10, 0);
    let sum = ipv4_sum(frame, l3);
    frame[l3 + 10..l3 + 12].copy_from_slice(&sum);
}

/// The checksum of the IPv4 header at `l3`: zeros if the one that it has is right.
pub(crate) fn ipv4_sum(frame: &[u8], l3: usize) -> [u8; 2] {
    let header_bytes = usize::from(frame[l3] & 0xf) * 4;
    let mut sum = Sum::default();
    sum.add(&frame[l3..l3 + header_bytes]);
    sum.finish_plain()
}
