//! The frames that the load sends: Ethernet, IPv4 and UDP (or TCP for segmentation offload), with
//! room for a sequence number and a time stamp in the smallest.

use ringway_guest::NET_HEADER_BYTES;

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

/// What frames of a load have besides their size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Style {
    /// Checksums are left to the device.
    pub(crate) checksum: bool,
    /// The switch puts its own address in place of the sender's.
    pub(crate) macs_rewritten: bool,
}

/// Frames of one size on one route, each behind its virtio-net header.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    bytes: Vec<u8>,
    stamp_at: usize,
    /// Where the checksum is that the device completes, if it does.
    checksum_at: Option<usize>,
    macs_rewritten: bool,
}

/// Offset of the payload of IPv4 behind the start of the virtio-net header.
const L4: usize = NET_HEADER_BYTES + ETHERNET + IPV4;

impl Template {
    /// Frames of `size` L2 bytes without the FCS; above [`MAX_PLAIN`] for segmentation.
    pub(crate) fn new(route: Route, size: u32, style: Style) -> Self {
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
        let l4_len = if segmented { TCP } else { UDP };
        // UDP over IPv4 does without a checksum.
        let checksum_in_l4 = match (segmented, style.checksum) {
            (true, _) => Some(16),
            (false, true) => Some(6),
            (false, false) => None,
        };
        if segmented {
            frame[l4 + 4..l4 + 12].fill(0);
            frame[l4 + 12..l4 + 20].copy_from_slice(&[0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
            header[1] = GSO_TCPV4;
            header[2..4].copy_from_slice(&54u16.to_le_bytes());
            header[4..6].copy_from_slice(&GSO_SIZE.to_le_bytes());
        } else {
            let len = be16(frame_len - l4);
            frame[l4 + 4..l4 + 8].copy_from_slice(&[len[0], len[1], 0, 0]);
        }
        if let Some(at) = checksum_in_l4 {
            let sum = pseudo_header_sum(&frame).to_be_bytes();
            frame[l4 + at..l4 + at + 2].copy_from_slice(&sum);
            header[0] = F_NEEDS_CSUM;
            header[6..8].copy_from_slice(&34u16.to_le_bytes());
            // 6 or 16.
            header[8] = u8::try_from(at).unwrap_or(0);
        }
        let mut bytes = header.to_vec();
        bytes.extend(frame);
        let mut template = Self {
            bytes,
            stamp_at: L4 + l4_len,
            checksum_at: checksum_in_l4.map(|at| L4 + at),
            macs_rewritten: style.macs_rewritten,
        };
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

    /// The stamp of a received frame (header in front; its beginning suffices), if it is on this
    /// route.
    pub(crate) fn stamp_of(&self, received: &[u8]) -> Option<Stamp> {
        if !self.is_on_route(received) {
            return None;
        }
        Stamp::from_bytes(received.get(self.stamp_at..)?)
    }

    /// True if a received frame (header in front; its beginning suffices) is on this route.
    pub(crate) fn is_on_route(&self, received: &[u8]) -> bool {
        let macs = self.macs();
        received.get(macs.clone()) == Some(&self.bytes[macs])
    }

    /// True if a received frame (header in front) is one of these, all bytes but flow and stamp
    /// compared. A checksum that was left open is still so, or it is right.
    pub(crate) fn matches(&self, received: &[u8]) -> bool {
        let port = NET_HEADER_BYTES + SOURCE_PORT;
        let stamp_end = (self.stamp_at + Stamp::BYTES).min(self.bytes.len());
        let checksum = self
            .checksum_at
            .map_or(self.stamp_at..self.stamp_at, |at| at..at + 2);
        let behind_macs = NET_HEADER_BYTES + 12;
        let equal = |range: std::ops::Range<usize>| received[range.clone()] == self.bytes[range];
        received.len() == self.bytes.len()
            && self.is_on_route(received)
            && equal(behind_macs..port)
            && equal(port + 2..checksum.start)
            && equal(checksum.end..self.stamp_at)
            && equal(stamp_end..received.len())
            && (self.checksum_at.is_none()
                || if received[0] & F_NEEDS_CSUM != 0 {
                    equal(checksum.clone()) || self.is_dpdks(&received[checksum])
                } else {
                    has_right_checksum(&received[NET_HEADER_BYTES..])
                })
    }

    /// True for the checksum that DPDK leaves open in a frame for segmentation: without the length,
    /// which is that of each segment.
    fn is_dpdks(&self, checksum: &[u8]) -> bool {
        let sum = pseudo_header_sum_with(&self.bytes[NET_HEADER_BYTES..], 0);
        self.bytes[1] == GSO_TCPV4 && checksum == sum.to_be_bytes()
    }

    /// True if a received frame still says how it is to be segmented, if it was sent so.
    pub(crate) fn keeps_segmentation(&self, received: &[u8]) -> bool {
        self.bytes[1] == received[1] && (self.bytes[1] == 0 || self.bytes[4..6] == received[4..6])
    }

    /// True if a received frame is one of these and nobody will know how to segment it.
    pub(crate) fn came_unsegmented(&self, received: &[u8]) -> bool {
        received.len() == self.bytes.len()
            && self.is_on_route(received)
            && !self.keeps_segmentation(received)
    }

    /// The addresses that arrive as they were sent.
    fn macs(&self) -> std::ops::Range<usize> {
        let count = if self.macs_rewritten { 6 } else { 12 };
        NET_HEADER_BYTES..NET_HEADER_BYTES + count
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

/// Sum over addresses, protocol and length of the payload of an IPv4 frame.
fn pseudo_header_sum(frame: &[u8]) -> u16 {
    pseudo_header_sum_with(frame, frame.len() - ETHERNET - IPV4)
}

fn pseudo_header_sum_with(frame: &[u8], len: usize) -> u16 {
    let mut pseudo = frame[ETHERNET + 12..ETHERNET + 20].to_vec();
    pseudo.extend([0, frame[ETHERNET + 9]]);
    pseudo.extend(be16(len));
    ones_complement_sum(&pseudo)
}

/// True if TCP's or UDP's checksum is complete.
fn has_right_checksum(frame: &[u8]) -> bool {
    let payload = ones_complement_sum(&frame[ETHERNET + IPV4..]);
    let [a, b] = [pseudo_header_sum(frame), payload].map(u32::from);
    // Folded sums that add up to all ones.
    (a + b) % 0xffff == 0
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
            let template = Template::new(route(), size, Style::default());
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
        let template = Template::new(route(), MIN_STAMPED, Style::default());
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
            Style::default(),
        );
        assert_eq!(back.stamp_of(&frame), None);
    }

    #[test]
    fn a_checksum_may_be_open_or_right_and_nothing_else() {
        let style = Style {
            checksum: true,
            ..Style::default()
        };
        for (size, at) in [(64, 6), (1501, 6), (65_000, 16)] {
            let template = Template::new(route(), size, style);
            let open = template.for_flow(2);
            assert!(template.matches(&open), "{size}: open");
            let mut complete = open.clone();
            complete[0] = 0;
            assert!(!template.matches(&complete), "{size}: neither");
            complete[L4 + at..L4 + at + 2].fill(0);
            let frame = &complete[NET_HEADER_BYTES..];
            let sum = u32::from(pseudo_header_sum(frame))
                + u32::from(ones_complement_sum(&frame[ETHERNET + IPV4..]));
            let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
            complete[L4 + at..L4 + at + 2].copy_from_slice(&(!folded).to_be_bytes());
            assert!(template.matches(&complete), "{size}: complete");
            complete[L4 + at] ^= 1;
            assert!(!template.matches(&complete), "{size}: wrong");
        }
    }

    #[test]
    fn a_lost_segmentation_header_is_seen() {
        let template = Template::new(route(), 65_000, Style::default());
        let mut frame = template.for_flow(0);
        assert!(template.keeps_segmentation(&frame));
        assert!(!template.came_unsegmented(&frame));
        // As a peer delivers it that clears the whole header.
        frame[..10].fill(0);
        assert!(!template.keeps_segmentation(&frame));
        assert!(template.came_unsegmented(&frame));
        let plain = Template::new(route(), 9000, Style::default());
        assert!(plain.keeps_segmentation(&plain.for_flow(0)));
    }

    #[test]
    fn a_rewritten_source_is_taken_only_where_it_is_expected() {
        let style = Style {
            macs_rewritten: true,
            ..Style::default()
        };
        let (strict, lenient) = (
            Template::new(route(), 128, Style::default()),
            Template::new(route(), 128, style),
        );
        let mut frame = strict.for_flow(0);
        frame[NET_HEADER_BYTES + 8] ^= 0xff;
        assert!(lenient.matches(&frame) && !strict.matches(&frame));
        frame[NET_HEADER_BYTES] ^= 0xff;
        assert!(!lenient.matches(&frame) && !lenient.is_on_route(&frame));
    }
}
