//! Software segmentation: the headers of the segments that one frame becomes.
//!
//! The first bytes of the source's frame, in private memory, are the template; what differs from
//! segment to segment is written over it: lengths, IPv4's identification and checksum, TCP's
//! sequence number and flags, and the sum of the pseudo header.

use ringway_bridge::{Headers, L4Protocol};

use crate::wire::fields::{checksum_at, dword, packet_bytes, put, put_packet_bytes, tcp, word};

/// TCP flags that only the last segment keeps.
const OF_THE_LAST: u8 = tcp::FIN | tcp::PSH;
/// What only the first keeps (virtio 1.3, 5.1.6.2.1; RFC 3168, 6.1.2: it answers one signal once).
const OF_THE_FIRST: u8 = tcp::CWR;

/// Segments one frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segmenter {
    l3: usize,
    l4: usize,
    /// Where the payload begins.
    payload: usize,
    is_ipv4: bool,
    protocol: L4Protocol,
    segment_bytes: u32,
    /// Payload to come.
    left: u32,
    /// Segments made.
    made: u16,
    /// Of the pseudo header without its length.
    pseudo_sum: u16,
    identification: u16,
    sequence: u32,
    flags: u8,
}

impl Segmenter {
    /// Segments a frame of `frame_bytes` that begins with `frame`, its headers at least, with
    /// `segment_bytes` of payload each; `None` if the length that its IP header tells is not its
    /// length.
    pub(super) fn new(
        frame: &[u8],
        headers: &Headers,
        frame_bytes: u32,
        segment_bytes: u16,
    ) -> Option<Self> {
        let (l3, l4) = (headers.l3_offset, headers.l4_offset);
        let before = |offset: usize| u32::try_from(offset).ok();
        if frame_bytes.checked_sub(before(l3)?) != Some(packet_bytes(frame, headers)) {
            return None;
        }
        let is_tcp = headers.l4_protocol == L4Protocol::Tcp;
        // What the source put there is a sum over addresses, protocol and the whole length.
        let seed = word(frame, checksum_at(headers.l4_protocol, l4));
        let l4_bytes = u16::try_from(frame_bytes - before(l4)?).ok()?;
        Some(Self {
            l3,
            l4,
            payload: headers.payload_offset,
            is_ipv4: headers.is_ipv4,
            protocol: headers.l4_protocol,
            segment_bytes: u32::from(segment_bytes.max(1)),
            left: frame_bytes.checked_sub(before(headers.payload_offset)?)?,
            made: 0,
            pseudo_sum: add(seed, !l4_bytes),
            identification: word(frame, l3 + 4),
            sequence: if is_tcp {
                dword(frame, l4 + tcp::SEQUENCE)
            } else {
                0
            },
            flags: if is_tcp { frame[l4 + tcp::FLAGS] } else { 0 },
        })
    }

    /// Segments to come, at least one.
    pub(super) fn count(&self) -> u32 {
        self.left.div_ceil(self.segment_bytes).max(1)
    }

    /// Payload of the next segment.
    pub(super) fn next_bytes(&self) -> u32 {
        self.left.min(self.segment_bytes)
    }

    /// Bytes of all headers.
    pub(super) fn headers_bytes(&self) -> usize {
        self.payload
    }

    /// Where the checksum's sum begins, and where the checksum is.
    pub(super) fn checksum(&self) -> (usize, usize) {
        (self.l4, checksum_at(self.protocol, self.l4))
    }

    /// Writes the next segment's headers over `frame`, the last segment's or the template, and
    /// returns how many bytes of payload follow.
    pub(super) fn next(&mut self, frame: &mut [u8]) -> u32 {
        let bytes = self.next_bytes();
        let is_last = bytes == self.left;
        // All fit: the whole frame has no more than 64 KiB.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "within the packet's length"
        )]
        let length_from = |offset: usize| (self.payload - offset) as u16 + bytes as u16;
        if self.is_ipv4 {
            let identification = self.identification.wrapping_add(self.made);
            put(frame, self.l3 + 4, identification);
        }
        put_packet_bytes(frame, self.l3, self.is_ipv4, length_from(self.l3).into());
        let l4_bytes = length_from(self.l4);
        match self.protocol {
            L4Protocol::Tcp => {
                let at = self.l4 + tcp::SEQUENCE;
                frame[at..at + 4].copy_from_slice(&self.sequence.to_be_bytes());
                let mut hidden = 0;
                if !is_last {
                    hidden |= OF_THE_LAST;
                }
                if self.made > 0 {
                    hidden |= OF_THE_FIRST;
                }
                frame[self.l4 + tcp::FLAGS] = self.flags & !hidden;
                self.sequence = self.sequence.wrapping_add(bytes);
            }
            L4Protocol::Udp => put(frame, self.l4 + 4, l4_bytes),
        }
        let seed = add(self.pseudo_sum, l4_bytes);
        put(frame, checksum_at(self.protocol, self.l4), seed);
        self.left -= bytes;
        self.made += 1;
        bytes
    }
}

/// The ones' complement sum.
fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u16::from(carry)
}
