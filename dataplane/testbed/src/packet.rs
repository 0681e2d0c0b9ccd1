//! TCP and UDP packets, whole and as drivers leave them to others, built and judged by etherparse.
use etherparse::{
    IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6FlowLabel, Ipv6Header,
    Ipv6RawExtHeader, NetHeaders, PacketBuilder, PacketHeaders, TcpHeader, TransportHeader,
    UdpHeader, VlanId,
};

/// Flag of the virtio-net header: the checksum is open (virtio 1.3, 5.1.6).
pub const NEEDS_CSUM: u8 = 1;
/// Its gso_type: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// Its gso_type: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// Its gso_type: UDP.
pub const GSO_UDP_L4: u8 = 5;
/// In its gso_type: TCP's CWR is set.
pub const GSO_ECN: u8 = 0x80;

/// A packet from station 1 to station 2.
#[derive(Clone, Debug)]
pub struct Packet {
    /// IPv4; else IPv6.
    pub is_ipv4: bool,
    /// UDP; else TCP.
    pub is_udp: bool,
    /// VLAN tags, at most 2.
    pub tags: usize,
    /// Words of four bytes of IPv4 options, at most 10; or extension headers of 8 bytes.
    pub ip_options: usize,
    /// Words of four bytes of TCP options, at most 10.
    pub tcp_options: usize,
    /// TCP's FIN.
    pub fin: bool,
    /// TCP's PSH.
    pub psh: bool,
    /// TCP's CWR.
    pub cwr: bool,
    /// IPv4's identification.
    pub identification: u16,
    /// TCP's sequence number.
    pub sequence: u32,
    /// MAC addresses of sender and receiver.
    pub stations: [[u8; 6]; 2],
    /// Bytes behind the headers.
    pub payload: Vec<u8>,
}

/// Where a packet's checksum is.
#[derive(Clone, Copy, Debug)]
pub struct HeaderPlace {
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of TCP's or UDP's header.
    pub l4: usize,
    /// Bytes of all headers.
    pub headers: usize,
    /// Offset of the checksum in TCP's or UDP's header.
    pub csum_offset: usize,
}

impl Packet {
    /// A packet without tags and options.
    pub fn new(is_ipv4: bool, is_udp: bool, payload: Vec<u8>) -> Self {
        Self {
            is_ipv4,
            is_udp,
            tags: 0,
            ip_options: 0,
            tcp_options: 0,
            fin: false,
            psh: true,
            cwr: false,
            identification: 0xfffe,
            sequence: 0xffff_f000,
            stations: [[0x52, 0x54, 0, 0, 0, 1], [0x52, 0x54, 0, 0, 0, 2]],
            payload,
        }
    }

    /// Where its headers are.
    pub fn place(&self) -> HeaderPlace {
        let l3 = 14 + 4 * self.tags;
        let l4 = l3
            + if self.is_ipv4 {
                20 + 4 * self.ip_options
            } else {
                40 + 8 * self.ip_options
            };
        let (l4_bytes, csum_offset) = if self.is_udp {
            (8, 6)
        } else {
            (20 + 4 * self.tcp_options, 16)
        };
        HeaderPlace {
            l3,
            l4,
            headers: l4 + l4_bytes,
            csum_offset,
        }
    }

    /// The whole frame, with its checksums.
    pub fn frame(&self) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(self.stations[0], self.stations[1]);
        let id = |id: u16| VlanId::try_new(id).unwrap();
        let ip = self.ip();
        let step = match self.tags {
            0 => builder.ip(ip),
            1 => builder.single_vlan(id(7)).ip(ip),
            _ => builder.double_vlan(id(100), id(7)).ip(ip),
        };
        let mut frame = Vec::new();
        if self.is_udp {
            step.udp(7000, 7001)
                .write(&mut frame, &self.payload)
                .unwrap();
        } else {
            let mut tcp = TcpHeader::new(1000, 2000, self.sequence, 64);
            (tcp.ack, tcp.acknowledgment_number) = (true, 0x0102_0304);
            (tcp.fin, tcp.psh, tcp.cwr) = (self.fin, self.psh, self.cwr);
            tcp.set_options_raw(&vec![1; 4 * self.tcp_options]).unwrap();
            step.tcp_header(tcp)
                .write(&mut frame, &self.payload)
                .unwrap();
        }
        assert_eq!(frame.len(), self.place().headers + self.payload.len());
        frame
    }

    fn ip(&self) -> IpHeaders {
        let protocol = if self.is_udp {
            IpNumber::UDP
        } else {
            IpNumber::TCP
        };
        if self.is_ipv4 {
            let mut ip = Ipv4Header::new(0, 64, protocol, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
            ip.identification = self.identification;
            ip.options = vec![1; 4 * self.ip_options].as_slice().try_into().unwrap();
            return IpHeaders::Ipv4(ip, Ipv4Extensions::default());
        }
        let mut extensions = Ipv6Extensions::default();
        if self.ip_options > 0 {
            // One header of destination options, padded (PadN).
            let bytes = 8 * self.ip_options - 2;
            let mut options = vec![0; bytes];
            options[..2].copy_from_slice(&[1, u8::try_from(bytes - 2).unwrap()]);
            let header = Ipv6RawExtHeader::new_raw(protocol, &options).unwrap();
            extensions.destination_options = Some(header);
        }
        let ip = Ipv6Header {
            traffic_class: 0,
            flow_label: Ipv6FlowLabel::ZERO,
            payload_length: 0,
            next_header: protocol,
            hop_limit: 64,
            source: [0xfe; 16],
            destination: [0xfd; 16],
        };
        IpHeaders::Ipv6(ip, extensions)
    }

    /// The frame as a driver leaves it: the checksum is the sum of the pseudo header.
    pub fn open(&self) -> Vec<u8> {
        let mut frame = self.frame();
        let place = self.place();
        let addresses = if self.is_ipv4 {
            frame[place.l3 + 12..place.l3 + 20].to_vec()
        } else {
            frame[place.l3 + 8..place.l3 + 40].to_vec()
        };
        let l4_bytes = u16::try_from(frame.len() - place.l4).unwrap();
        let protocol = if self.is_udp { 17 } else { 6 };
        let pseudo = [&addresses[..], &l4_bytes.to_be_bytes(), &[0, protocol]].concat();
        let at = place.l4 + place.csum_offset;
        frame[at..at + 2].copy_from_slice(&plain_sum(&pseudo).to_be_bytes());
        frame
    }

    /// The virtio-net header that leaves the checksum open, and the segmentation if `gso_size` is
    /// not 0.
    pub fn header(&self, gso_size: u16) -> Vec<u8> {
        let place = self.place();
        let mut gso_type = match (gso_size, self.is_udp, self.is_ipv4) {
            (0, ..) => 0,
            (_, true, _) => GSO_UDP_L4,
            (_, false, true) => GSO_TCPV4,
            (_, false, false) => GSO_TCPV6,
        };
        if self.cwr && gso_size > 0 && !self.is_udp {
            gso_type |= GSO_ECN;
        }
        let mut header = vec![NEEDS_CSUM, gso_type];
        for field in [
            place.headers,
            gso_size.into(),
            place.l4,
            place.csum_offset,
            0,
        ] {
            header.extend(u16::try_from(field).unwrap().to_le_bytes());
        }
        header
    }
}

/// The ones' complement sum, as slow as RFC 1071 has it.
pub fn plain_sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u64::from);
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// Completes the checksum that a received header leaves open, as a receiver would; true if it did.
pub fn complete(header: &[u8], frame: &mut [u8]) -> bool {
    let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let is_open = header[0] & NEEDS_CSUM != 0;
    if is_open {
        let (start, at) = (field(6), field(6) + field(8));
        // UDP takes 0 for none (RFC 768); whoever verifies takes the two for the same.
        let sum = match !plain_sum(&frame[start..]) {
            0 => 0xffff,
            sum => sum,
        };
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    is_open
}

/// What a frame holds whose lengths and checksums are right.
#[derive(Debug)]
pub struct Judged {
    /// Its IPv4 header.
    pub ipv4: Option<Ipv4Header>,
    /// Its TCP header.
    pub tcp: Option<TcpHeader>,
    /// Its UDP header.
    pub udp: Option<UdpHeader>,
    /// Bytes behind the headers.
    pub payload: Vec<u8>,
}

/// Parses a frame of TCP or UDP.
///
/// # Errors
/// What is wrong with its lengths or checksums.
pub fn judge(frame: &[u8]) -> Result<Judged, String> {
    let parsed = PacketHeaders::from_ethernet_slice(frame).map_err(|error| error.to_string())?;
    let payload = parsed.payload.slice();
    // Both zeros of ones' complement are right.
    let same = |told: u16, right: u16| told == right || (told, right) == (0xffff, 0);
    let check = |what: &str, told: u16, right: u16| {
        if same(told, right) {
            Ok(())
        } else {
            Err(format!("{what} is {told:#x}, not {right:#x}"))
        }
    };
    let at = payload.as_ptr().addr() - frame.as_ptr().addr();
    if at + payload.len() != frame.len() {
        return Err(format!(
            "{} bytes hold a payload up to {}",
            frame.len(),
            at + payload.len()
        ));
    }
    let mut judged = Judged {
        ipv4: None,
        tcp: None,
        udp: None,
        payload: payload.to_vec(),
    };
    let Some(net) = parsed.net else {
        return Err("no IP header".into());
    };
    if let NetHeaders::Ipv4(ip, _) = &net {
        check(
            "IPv4's checksum",
            ip.header_checksum,
            ip.calc_header_checksum(),
        )?;
        judged.ipv4 = Some(ip.clone());
    }
    match parsed.transport {
        Some(TransportHeader::Tcp(tcp)) => {
            let right = match &net {
                NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(ip, payload),
                NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(ip, payload),
                _ => return Err("no IP header".into()),
            };
            check("TCP's checksum", tcp.checksum, right.unwrap())?;
            judged.tcp = Some(tcp);
        }
        Some(TransportHeader::Udp(udp)) => {
            let right = match &net {
                NetHeaders::Ipv4(ip, _) => udp.calc_checksum_ipv4(ip, payload),
                NetHeaders::Ipv6(ip, _) => udp.calc_checksum_ipv6(ip, payload),
                _ => return Err("no IP header".into()),
            };
            check("UDP's checksum", udp.checksum, right.unwrap())?;
            let length = u16::try_from(payload.len() + 8).unwrap();
            check("UDP's length", udp.length, length)?;
            judged.udp = Some(udp);
        }
        _ => return Err("neither TCP nor UDP".into()),
    }
    Ok(judged)
}

/// Where the headers of a frame of TCP or UDP are.
pub fn place_of(frame: &[u8]) -> HeaderPlace {
    let parsed = PacketHeaders::from_ethernet_slice(frame).unwrap();
    let headers = parsed.payload.slice().as_ptr().addr() - frame.as_ptr().addr();
    let transport = parsed.transport.unwrap();
    let l4 = headers - transport.header_len();
    HeaderPlace {
        l3: l4 - parsed.net.unwrap().header_len(),
        l4,
        headers,
        csum_offset: if transport.tcp().is_some() { 16 } else { 6 },
    }
}

/// Bytes that no shift or swap leaves as they are.
pub fn pattern(bytes: usize) -> Vec<u8> {
    (0..=250).cycle().take(bytes).collect()
}
