//! The frames that the load sends: Ethernet, IPv4 and UDP (or TCP for segmentation offload), with
//! room for a sequence number and a time stamp in the smallest.

use etherparse::checksum::Sum16BitWords;
use etherparse::{EtherType, Ethernet2Header, IpNumber, Ipv4Header, TcpHeader, UdpHeader};
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

/// Offset of the source port, which tells the flow.
const SOURCE_PORT: usize = ETHERNET + IPV4;
/// Port of flow 0.
const FIRST_PORT: u16 = 1024;
/// Port that nobody listens at: "discard" (RFC 863).
const DESTINATION_PORT: u16 = 9;
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

/// Offset of the payload of IPv4 in a frame, and behind the start of the virtio-net header.
const L4_IN_FRAME: usize = ETHERNET + IPV4;
const L4: usize = NET_HEADER_BYTES + L4_IN_FRAME;

impl Template {
    /// Frames of `size` L2 bytes without the FCS; above [`MAX_PLAIN`] for segmentation.
    pub(crate) fn new(route: Route, size: u32, style: Style) -> Self {
        let size = size.clamp(MIN_FRAME, MAX_FRAME);
        let is_segmented = size > MAX_PLAIN;
        let mut frame = headers(route, size as usize, is_segmented);
        let stamp_at = NET_HEADER_BYTES + frame.len();
        frame.extend((frame.len()..size as usize).map(filler));
        let mut header = [0; NET_HEADER_BYTES];
        if is_segmented {
            header[1] = GSO_TCPV4;
            header[2..4].copy_from_slice(&54u16.to_le_bytes());
            header[4..6].copy_from_slice(&GSO_SIZE.to_le_bytes());
        }
        // UDP over IPv4 does without a checksum.
        let checksum_in_l4: Option<u8> = match (is_segmented, style.checksum) {
            (true, _) => Some(16),
            (false, true) => Some(6),
            (false, false) => None,
        };
        let mut bytes = [&header[..], &frame].concat();
        if let Some(at) = checksum_in_l4 {
            bytes[0] = F_NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&34u16.to_le_bytes());
            bytes[8] = at;
            let at = L4 + usize::from(at);
            bytes[at..at + 2].copy_from_slice(&open_checksum(&frame, size as usize - L4_IN_FRAME));
        }
        Self {
            bytes,
            stamp_at,
            checksum_at: checksum_in_l4.map(|at| L4 + usize::from(at)),
            macs_rewritten: style.macs_rewritten,
        }
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
        let open = open_checksum(&self.bytes[NET_HEADER_BYTES..], 0);
        self.bytes[1] == GSO_TCPV4 && checksum == open
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

/// Ethernet, IPv4 and UDP or TCP headers of a frame of this size, checksums of UDP and TCP left 0.
fn headers(route: Route, size: usize, is_tcp: bool) -> Vec<u8> {
    let address = |mac: [u8; 6]| [10, 0, 0, mac[5]];
    let ethernet = Ethernet2Header {
        source: route.from,
        destination: route.to,
        ether_type: EtherType::IPV4,
    };
    let mut ip = Ipv4Header {
        total_len: length(size - ETHERNET),
        time_to_live: 64,
        protocol: if is_tcp { IpNumber::TCP } else { IpNumber::UDP },
        source: address(route.from),
        destination: address(route.to),
        dont_fragment: true,
        ..Ipv4Header::default()
    };
    ip.header_checksum = ip.calc_header_checksum();
    let mut headers = [&ethernet.to_bytes()[..], &ip.to_bytes()].concat();
    if is_tcp {
        let mut tcp = TcpHeader::new(FIRST_PORT, DESTINATION_PORT, 0, u16::MAX);
        tcp.ack = true;
        headers.extend(tcp.to_bytes());
    } else {
        let udp = UdpHeader {
            source_port: FIRST_PORT,
            destination_port: DESTINATION_PORT,
            length: length(size - L4_IN_FRAME),
            checksum: 0,
        };
        headers.extend(udp.to_bytes());
    }
    headers
}

/// A length as headers have it. The largest frame's is all that 16 bits hold.
fn length(bytes: usize) -> u16 {
    u16::try_from(bytes).unwrap_or(u16::MAX)
}

/// Sum over addresses, protocol and this length of the payload of an IPv4 frame.
fn pseudo_header_sum(frame: &[u8], len: usize) -> Sum16BitWords {
    Sum16BitWords::new()
        .add_slice(&frame[ETHERNET + 12..ETHERNET + 20])
        .add_2bytes([0, frame[ETHERNET + 9]])
        .add_2bytes(length(len).to_be_bytes())
}

/// What stands in place of a checksum that the device completes.
fn open_checksum(frame: &[u8], len: usize) -> [u8; 2] {
    (!pseudo_header_sum(frame, len).ones_complement()).to_ne_bytes()
}

/// True if TCP's or UDP's checksum is complete.
fn has_right_checksum(frame: &[u8]) -> bool {
    let payload = &frame[L4_IN_FRAME..];
    let sum = pseudo_header_sum(frame, payload.len()).add_slice(payload);
    sum.ones_complement() == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sum of 16-bit words, folded, independent of the crate that builds the frames.
    fn ones_complement_sum(bytes: &[u8]) -> u16 {
        let sum: u32 = bytes
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
    }

    fn pseudo_header_sum(frame: &[u8]) -> u16 {
        let mut pseudo = frame[26..34].to_vec();
        pseudo.extend([0, frame[23]]);
        pseudo.extend(u16::try_from(frame.len() - 34).unwrap().to_be_bytes());
        ones_complement_sum(&pseudo)
    }

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
