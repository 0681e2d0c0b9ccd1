//! The frames that the load sends: Ethernet, IPv4 and UDP (or TCP for segmentation offload), with
//! room for a sequence number and a time stamp in the smallest.

use ringway_dataplane::driver::NET_HEADER_BYTES;

/// Smallest frame: Ethernet's minimum without the FCS, rounded to the 64 that peers quote.
pub(crate) const MIN_FRAME: u32 = 60;
/// Smallest frame that carries a [`Stamp`].
pub(crate) const MIN_STAMPED: u32 = 64;
/// Largest frame that is sent without segmentation offload: 9,000 bytes of payload and a VLAN tag.
pub(crate) const MAX_PLAIN: u32 = 9018;
/// Largest frame: an IPv4 packet of 65,535 bytes.
pub(crate) const MAX_FRAME: u32 = 65_549;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const UDP: usize = 8;
const TCP: usize = 20;

/// Offset of the source port, which tells the flow.
const SOURCE_PORT: usize = ETHERNET + IPV4;
/// Port of flow 0.
const FIRST_PORT: u16 = 1024;
/// Most flows: ports above [`FIRST_PORT`].
pub(crate) const MAX_FLOWS: u16 = u16::MAX - FIRST_PORT;

/// Gso type and flags of the virtio-net header (virtio 1.3, 5.1.6).
const F_NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
/// Payload of each segment: an MTU of 1,500.
const GSO_SIZE: u16 = 1460;

/// Who sends to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// MAC address of the sender.
    pub(crate) from: [u8; 6],
    /// MAC address of the receiver.
    pub(crate) to: [u8; 6],
}

/// What a frame says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Number of the frame on its route, from 0.
    pub(crate) sequence: u64,
    /// When it was due, in nanoseconds of the run.
    pub(crate) due_ns: u64,
}

impl Stamp {
    /// Bytes of a stamp in a frame.
    pub(crate) const BYTES: usize = 16;

    /// As it lies in a frame.
    pub(crate) fn bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8..].copy_from_slice(&self.due_ns.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Self {
            sequence: word(0)?,
            due_ns: word(8)?,
        })
    }
}

/// Frames of one size on one route, each behind its virtio-net header.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    bytes: Vec<u8>,
    stamp_at: usize,
}

impl Template {
    /// Frames of `size` L2 bytes without the FCS; above [`MAX_PLAIN`] for segmentation.
    pub(crate) fn new(route: Route, size: u32) -> Self {
        let size = size.clamp(MIN_FRAME, MAX_FRAME);
        let segmented = size > MAX_PLAIN;
        let frame_len = size as usize;
        let mut frame: Vec<u8> = (0..frame_len).map(filler).collect();
        frame[..6].copy_from_slice(&route.to);
        frame[6..12].copy_from_slice(&route.from);
        frame[12..14].copy_from_slice(&0x0800u16.to_be_bytes());
        let l3_len = be16(frame_len - ETHERNET);
        let protocol = if segmented { 6 } else { 17 };
        let ip = &mut frame[ETHERNET..ETHERNET + IPV4];
        ip.copy_from_slice(&[
            0x45,
            0,
            l3_len[0],
            l3_len[1],
            0,
            0,
            0x40,
            0,
            64,
            protocol,
            0,
            0,
            10,
            0,
            0,
            route.from[5],
            10,
            0,
            0,
            route.to[5],
        ]);
        let checksum = !ones_complement_sum(ip);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        let l4 = ETHERNET + IPV4;
        frame[l4 + 2..l4 + 4].copy_from_slice(&9u16.to_be_bytes());
        let mut header = [0; NET_HEADER_BYTES];
        let l4_len = if segmented {
            frame[l4 + 4..l4 + 12].fill(0);
            frame[l4 + 12..l4 + 16].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]);
            // The pseudo header's sum: the device or the receiver completes it.
            let mut pseudo = frame[ETHERNET + 12..ETHERNET + 20].to_vec();
            pseudo.extend([0, protocol]);
            pseudo.extend(be16(frame_len - l4));
            let sum = ones_complement_sum(&pseudo).to_be_bytes();
            frame[l4 + 16..l4 + 20].copy_from_slice(&[sum[0], sum[1], 0, 0]);
            header[0] = F_NEEDS_CSUM;
            header[1] = GSO_TCPV4;
            header[2..4].copy_from_slice(&54u16.to_le_bytes());
            header[4..6].copy_from_slice(&GSO_SIZE.to_le_bytes());
            header[6..8].copy_from_slice(&34u16.to_le_bytes());
            header[8..10].copy_from_slice(&16u16.to_le_bytes());
            TCP
        } else {
            let len = be16(frame_len - l4);
            // No checksum: allowed for UDP over IPv4.
            frame[l4 + 4..l4 + 8].copy_from_slice(&[len[0], len[1], 0, 0]);
            UDP
        };
        let stamp_at = NET_HEADER_BYTES + l4 + l4_len;
        let mut bytes = header.to_vec();
        bytes.extend(frame);
        let mut template = Self { bytes, stamp_at };
        template.set_flow(0);
        template
    }

    /// Header and frame, for this flow.
    pub(crate) fn for_flow(&self, flow: u16) -> Vec<u8> {
        let mut copy = self.clone();
        copy.set_flow(flow);
        copy.bytes
    }

    /// Bytes of header and frame.
    pub(crate) fn len(&self) -> u32 {
        // At most MAX_FRAME and a header.
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }

    /// Offset of the stamp behind the start of the virtio-net header.
    pub(crate) fn stamp_at(&self) -> usize {
        self.stamp_at
    }

    /// The stamp of a received frame (header in front), if it is on this route and of this size.
    pub(crate) fn stamp_of(&self, received: &[u8]) -> Option<Stamp> {
        let macs = NET_HEADER_BYTES..NET_HEADER_BYTES + 12;
        if received.get(macs.clone())? != &self.bytes[macs] {
            return None;
        }
        Stamp::from_bytes(received.get(self.stamp_at..)?)
    }

    /// True if a received frame (header in front) is one of these, all bytes but flow and stamp
    /// compared.
    pub(crate) fn matches(&self, received: &[u8]) -> bool {
        let port = NET_HEADER_BYTES + SOURCE_PORT;
        let stamp_end = (self.stamp_at + Stamp::BYTES).min(self.bytes.len());
        received.len() == self.bytes.len()
            && received[NET_HEADER_BYTES..port] == self.bytes[NET_HEADER_BYTES..port]
            && received[port + 2..self.stamp_at] == self.bytes[port + 2..self.stamp_at]
            && received[stamp_end..] == self.bytes[stamp_end..]
    }

    fn set_flow(&mut self, flow: u16) {
        let at = NET_HEADER_BYTES + SOURCE_PORT;
        let port = FIRST_PORT + flow % MAX_FLOWS;
        self.bytes[at..at + 2].copy_from_slice(&port.to_be_bytes());
    }
}

/// The MAC address of a guest: locally administered, in QEMU's range.
pub(crate) fn guest_mac(guest: u16) -> [u8; 6] {
    let [high, low] = (guest + 1).to_be_bytes();
    [0x52, 0x54, 0x00, 0x72, high, low]
}

/// Payload by offset: 251 is prime, so that a shift by any power of two shows.
fn filler(offset: usize) -> u8 {
    u8::try_from(offset % 251).unwrap_or(0)
}

fn be16(len: usize) -> [u8; 2] {
    u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes()
}

fn ones_complement_sum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> Route {
        Route {
            from: guest_mac(0),
            to: guest_mac(1),
        }
    }

    #[test]
    fn frames_have_the_size_asked_for_and_valid_headers() {
        for size in [60, 64, 1500, 9000, 65_000] {
            let template = Template::new(route(), size);
            let bytes = template.for_flow(3);
            assert_eq!(bytes.len(), NET_HEADER_BYTES + size as usize);
            let frame = &bytes[NET_HEADER_BYTES..];
            assert_eq!(frame[..6], guest_mac(1));
            assert_eq!(frame[6..12], guest_mac(0));
            assert_eq!(ones_complement_sum(&frame[14..34]), 0xffff);
            assert_eq!(
                u32::from(u16::from_be_bytes([frame[16], frame[17]])),
                size - 14
            );
            assert_eq!(u16::from_be_bytes([frame[34], frame[35]]), 1027);
            assert_eq!(bytes[1], u8::from(size > MAX_PLAIN));
        }
    }

    #[test]
    fn a_stamp_is_read_back_and_a_changed_byte_is_seen() {
        let template = Template::new(route(), MIN_STAMPED);
        let mut frame = template.for_flow(7);
        let stamp = Stamp {
            sequence: 5,
            due_ns: 99,
        };
        let at = template.stamp_at();
        frame[at..at + Stamp::BYTES].copy_from_slice(&stamp.bytes());
        assert_eq!(template.stamp_of(&frame), Some(stamp));
        assert!(template.matches(&frame));
        for at in [NET_HEADER_BYTES, NET_HEADER_BYTES + 30, frame.len() - 1] {
            let mut bad = frame.clone();
            bad[at] ^= 1;
            assert!(!template.matches(&bad), "byte {at}");
        }
        assert!(!template.matches(&frame[..frame.len() - 1]));
        let back = Template::new(
            Route {
                from: guest_mac(1),
                to: guest_mac(0),
            },
            MIN_STAMPED,
        );
        assert_eq!(back.stamp_of(&frame), None);
    }
}
