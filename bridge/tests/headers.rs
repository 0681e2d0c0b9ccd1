//! Header offsets against etherparse: packets that it builds, whole, truncated and damaged.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use etherparse::{
    IpAuthHeader, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions,
    Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, Ipv6RoutingExtensions, PacketBuilder,
    SlicedPacket, TcpHeader, TransportSlice, VlanId,
};
use proptest::prelude::*;
use ringway_bridge::{Headers, L4Protocol};

#[derive(Clone, Debug)]
struct Packet {
    tags: usize,
    ip: IpHeaders,
    /// TCP with options of so many words, or UDP.
    tcp_option_words: Option<usize>,
    payload: Vec<u8>,
}

impl Packet {
    fn build(&self) -> Vec<u8> {
        let id = |n| VlanId::try_new(n).unwrap();
        let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let ip = self.ip.clone();
        let step = match self.tags {
            0 => ethernet.ip(ip),
            1 => ethernet.single_vlan(id(7)).ip(ip),
            _ => ethernet.double_vlan(id(7), id(8)).ip(ip),
        };
        let mut frame = Vec::new();
        match self.tcp_option_words {
            Some(words) => {
                let mut tcp = TcpHeader::new(1, 2, 3, 4);
                tcp.set_options_raw(&vec![1; words * 4]).unwrap();
                step.tcp_header(tcp)
                    .write(&mut frame, &self.payload)
                    .unwrap();
            }
            None => step.udp(1, 2).write(&mut frame, &self.payload).unwrap(),
        }
        frame
    }

    fn expected(&self, frame: &[u8]) -> Headers {
        let payload_offset = frame.len() - self.payload.len();
        let l4_bytes = self.tcp_option_words.map_or(8, |words| 20 + words * 4);
        Headers {
            l3_offset: 14 + 4 * self.tags,
            l4_offset: payload_offset - l4_bytes,
            payload_offset,
            is_ipv4: matches!(self.ip, IpHeaders::Ipv4(..)),
            l4_protocol: match self.tcp_option_words {
                Some(_) => L4Protocol::Tcp,
                None => L4Protocol::Udp,
            },
        }
    }
}

fn ipv4() -> impl Strategy<Value = IpHeaders> {
    (0..=10usize).prop_map(|option_words| {
        let mut header =
            Ipv4Header::new(0, 64, IpNumber::TCP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        header.options = vec![1; option_words * 4].as_slice().try_into().unwrap();
        IpHeaders::Ipv4(header, Ipv4Extensions::default())
    })
}

fn ipv6() -> impl Strategy<Value = IpHeaders> {
    let options = || {
        prop::option::of((0..4usize).prop_map(|units| {
            Ipv6RawExtHeader::new_raw(IpNumber::TCP, &vec![0; 6 + units * 8]).unwrap()
        }))
    };
    let auth = prop::option::of((0..4usize).prop_map(|units| {
        // In IPv6 a multiple of 8 bytes (RFC 4302, 2.2); the fixed part has 12.
        IpAuthHeader::new(IpNumber::TCP, 1, 2, &vec![0; 4 + units * 8]).unwrap()
    }));
    let fragment = prop::option::of(Just(Ipv6FragmentHeader::new(
        IpNumber::TCP,
        Default::default(),
        false,
        9,
    )));
    (options(), options(), options(), options(), fragment, auth).prop_map(
        |(hop_by_hop_options, destination_options, routing, last, fragment, auth)| {
            let routing = routing.map(|routing| Ipv6RoutingExtensions {
                routing,
                final_destination_options: last,
            });
            let extensions = Ipv6Extensions {
                hop_by_hop_options,
                destination_options,
                routing,
                fragment,
                auth,
            };
            IpHeaders::Ipv6(Ipv6Header::default(), extensions)
        },
    )
}

fn packet() -> impl Strategy<Value = Packet> {
    let payload = prop::collection::vec(any::<u8>(), 0..60);
    (
        0..=2usize,
        prop_oneof![ipv4(), ipv6()],
        prop::option::of(0..=10usize),
        payload,
    )
        .prop_map(|(tags, ip, tcp_option_words, payload)| Packet {
            tags,
            ip,
            tcp_option_words,
            payload,
        })
}

/// Where etherparse finds the TCP or UDP header, and its length.
fn l4_by_etherparse(frame: &[u8]) -> Option<(usize, usize)> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let (segment, header_bytes) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.slice(), tcp.header_slice().len()),
        Some(TransportSlice::Udp(udp)) => (udp.slice(), 8),
        _ => return None,
    };
    Some((
        segment.as_ptr().addr() - frame.as_ptr().addr(),
        header_bytes,
    ))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn headers_are_found_where_they_were_built(packet in packet()) {
        let frame = packet.build();
        prop_assert_eq!(Headers::parse(&frame), Some(packet.expected(&frame)));
    }

    #[test]
    fn headers_need_all_their_bytes_and_not_one_of_the_payload(packet in packet()) {
        let frame = packet.build();
        let headers = packet.expected(&frame);
        for len in 0..=frame.len() {
            let expected = (len >= headers.payload_offset).then_some(headers);
            prop_assert_eq!(Headers::parse(&frame[..len]), expected, "{} bytes", len);
        }
    }

    /// Damage at one byte, so that the others still lead somewhere.
    #[test]
    fn damaged_headers_are_refused_or_read_as_etherparse_reads_them(
        packet in packet(),
        at in any::<prop::sample::Index>(),
        byte: u8,
    ) {
        let mut frame = packet.build();
        *at.get_mut(&mut frame) = byte;
        let Some(headers) = Headers::parse(&frame) else { return Ok(()) };
        prop_assert!(headers.payload_offset <= frame.len());
        prop_assert!(headers.l3_offset + 20 <= headers.l4_offset);
        prop_assert!(headers.l4_offset + 8 <= headers.payload_offset);
        if let Some((l4_offset, l4_bytes)) = l4_by_etherparse(&frame) {
            prop_assert_eq!(headers.l4_offset, l4_offset);
            prop_assert_eq!(headers.payload_offset - headers.l4_offset, l4_bytes);
        }
    }

    #[test]
    fn noise_never_leads_beyond_the_slice(
        mut frame in prop::collection::vec(any::<u8>(), 0..200),
        ether_type in prop::sample::select(vec![[8, 0], [0x86, 0xdd], [0x81, 0]]),
        version: u8,
        next in prop::sample::select(vec![0, 6, 17, 43, 44, 51, 60]),
    ) {
        if let Some(start) = frame.get_mut(12..24) {
            start[..2].copy_from_slice(&ether_type);
            start[2] = if ether_type[0] == 8 { 0x40 } else { 0x60 } | (version % 32);
            start[8] = next;
            start[11] = next;
        }
        if let Some(headers) = Headers::parse(&frame) {
            prop_assert!(headers.payload_offset <= frame.len());
        }
    }
}

fn udp4() -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(1, 2)
        .write(&mut frame, &[0; 18])
        .unwrap();
    frame
}

fn with_bytes(mut frame: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    frame[at..at + bytes.len()].copy_from_slice(bytes);
    frame
}

#[test]
fn ipv4_fragments_have_no_l4_headers() {
    assert!(
        Headers::parse(&with_bytes(udp4(), 20, &[0x40, 0])).is_some(),
        "do not fragment"
    );
    assert_eq!(
        Headers::parse(&with_bytes(udp4(), 20, &[0x20, 0])),
        None,
        "more fragments"
    );
    assert_eq!(
        Headers::parse(&with_bytes(udp4(), 20, &[0, 1])),
        None,
        "offset"
    );
    assert_eq!(
        Headers::parse(&with_bytes(udp4(), 20, &[0x10, 0])),
        None,
        "offset"
    );
}

/// CVE-2016-10377: a total length below the header length made the rest of the packet negative.
#[test]
fn a_total_length_below_the_headers_is_refused() {
    for total in 0..28u8 {
        assert_eq!(
            Headers::parse(&with_bytes(udp4(), 16, &[0, total])),
            None,
            "{total}"
        );
    }
    assert!(Headers::parse(&with_bytes(udp4(), 16, &[0, 28])).is_some());
}

/// CVE-2020-35498: padding behind the packet was taken for a part of it.
#[test]
fn ethernet_padding_is_no_header() {
    let mut frame = udp4();
    frame.resize(200, 0xff);
    assert_eq!(
        Headers::parse(&frame).map(|headers| headers.payload_offset),
        Some(42)
    );
    let ends_in_padding = with_bytes(frame, 16, &[0, 27]);
    assert_eq!(Headers::parse(&ends_in_padding), None);
}

/// CVE-2023-1668: IP protocol 0 was taken for "any".
#[test]
fn ip_protocol_zero_is_no_transport() {
    assert_eq!(Headers::parse(&with_bytes(udp4(), 23, &[0])), None);
}

/// CVE-2016-2074: a stack of labels was followed beyond what was reserved for it.
#[test]
fn a_fourth_vlan_tag_is_not_followed() {
    let tagged = |tags: usize| {
        let frame = udp4();
        [&frame[..12], &[0x81, 0, 0, 7].repeat(tags), &frame[12..]].concat()
    };
    assert_eq!(
        Headers::parse(&tagged(3)).map(|headers| headers.l3_offset),
        Some(26)
    );
    for tags in [4, 5, 300] {
        assert_eq!(Headers::parse(&tagged(tags)), None, "{tags}");
    }
}

fn udp6_behind(extensions: &[u8], first: u8) -> Vec<u8> {
    let payload_bytes = u8::try_from(extensions.len() + 8).unwrap();
    let fixed = [
        &[0x60, 0, 0, 0, 0, payload_bytes, first, 64][..],
        &[0xfe; 32],
    ]
    .concat();
    let ethernet = [&[2; 12][..], &[0x86, 0xdd]].concat();
    [&ethernet, &fixed, extensions, &[0, 1, 0, 2, 0, 8, 0, 0]].concat()
}

#[test]
fn eight_ipv6_extension_headers_are_followed_and_no_more() {
    let options = |n: usize| {
        let mut headers = [60, 0, 1, 4, 0, 0, 0, 0].repeat(n);
        headers[(n - 1) * 8] = 17;
        udp6_behind(&headers, 60)
    };
    assert_eq!(
        Headers::parse(&options(8)).map(|headers| headers.l4_offset),
        Some(14 + 40 + 64)
    );
    assert_eq!(Headers::parse(&options(9)), None);
}

#[test]
fn ipv6_fragments_have_no_l4_headers_unless_atomic() {
    let fragment = |offset: [u8; 2]| udp6_behind(&[17, 0, offset[0], offset[1], 0, 0, 0, 1], 44);
    assert!(Headers::parse(&fragment([0, 0])).is_some());
    assert_eq!(Headers::parse(&fragment([0, 1])), None, "more fragments");
    assert_eq!(Headers::parse(&fragment([0, 8])), None, "offset");
}

#[test]
fn an_ipv6_payload_length_below_the_headers_is_refused() {
    for payload in 0..8 {
        assert_eq!(
            Headers::parse(&with_bytes(udp6_behind(&[], 17), 19, &[payload])),
            None
        );
    }
    assert!(Headers::parse(&udp6_behind(&[], 17)).is_some());
}

#[test]
fn a_tcp_header_length_below_twenty_bytes_is_refused() {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], [4; 6])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(1, 2, 3, 4)
        .write(&mut frame, &[0; 60])
        .unwrap();
    for words in 0..16 {
        let expected = (words >= 5).then_some(34 + usize::from(words) * 4);
        let damaged = with_bytes(frame.clone(), 46, &[words << 4]);
        assert_eq!(
            Headers::parse(&damaged).map(|headers| headers.payload_offset),
            expected
        );
    }
}
