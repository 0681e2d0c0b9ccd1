//! Endpoints of every kind, what each may send and take, and what arrives there.
//!
//! ```text
//!   guest       driver with virtqueues --------------- port
//!   tap         packet socket on rwN   -- the kernel -- port
//!   AF_XDP      packet socket on farN  -- veth, xdpN -- port
//! ```

use ringway_api::{Mtu, PortConfig, XdpMode};
use ringway_guest::features::{
    TSO, USO, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_ECN,
};
use ringway_guest::{Guest, GuestBuilder, Layout};

use super::host::{Raw, veth_named};
use super::packet::{GSO_ECN, NEEDS_CSUM, Packet, complete, judge, pattern};
use super::{DEADLINE, Lab, af_xdp, frame, ifname, mac, name, tap};

/// Both sides leave checksums open.
pub(crate) const CSUM: u64 = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_GUEST_CSUM;
/// And whole frames to segment.
pub(crate) const ALL: u64 = TSO | USO | VIRTIO_NET_F_HOST_ECN | VIRTIO_NET_F_GUEST_ECN;

/// The kernel's word that it has seen a right checksum.
const DATA_VALID: u8 = 2;

/// What the header of a frame leaves to others, less to more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Open {
    Nothing,
    Checksum,
    Segments,
}

/// Kinds of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    GuestAll,
    GuestCsum,
    GuestNone,
    TapOffload,
    TapPlain,
    AfXdp,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [
        Self::GuestAll,
        Self::GuestCsum,
        Self::GuestNone,
        Self::TapOffload,
        Self::TapPlain,
        Self::AfXdp,
    ];

    /// The most that frames from it leave open.
    pub(crate) fn sends(self) -> Open {
        match self {
            // The kernel behind a veth, tacitly.
            Self::AfXdp => Open::Checksum,
            // Features come in pairs here.
            _ => self.takes(),
        }
    }

    /// The most that frames to it may leave open.
    pub(crate) fn takes(self) -> Open {
        match self {
            Self::GuestAll | Self::TapOffload => Open::Segments,
            Self::GuestCsum => Open::Checksum,
            Self::GuestNone | Self::TapPlain | Self::AfXdp => Open::Nothing,
        }
    }
}

/// What all endpoints of a lab have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) mtu: u16,
    /// Of guests' rings.
    pub(crate) layout: Layout,
    pub(crate) mergeable: bool,
    /// Of AF_XDP ports.
    pub(crate) mode: XdpMode,
}

impl Setting {
    fn guest(self, features: u64) -> GuestBuilder {
        let config = Guest::builder()
            .features(features)
            .layout(self.layout)
            .mtu(Some(self.mtu));
        if self.mergeable {
            return config;
        }
        let takes_segments = features == ALL;
        config
            .mergeable(false)
            .chained(self.layout == Layout::Split)
            .buffer_size(if takes_segments {
                65_700
            } else {
                u32::from(self.mtu) + 100
            })
            .queue_size(128)
    }
}

/// A packet, and what its sender leaves open of it.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) packet: Packet,
    pub(crate) open: Open,
    /// Payload of a segment; 0 unless segments are left open.
    gso_size: u16,
}

/// All kinds of messages that an endpoint of a kind may send on links of this MTU.
pub(crate) fn messages(kind: Kind, mtu: u16) -> Vec<Message> {
    // Longer ones are cut by the kernel itself.
    let longest = if kind == Kind::TapOffload {
        65_535 - 14
    } else {
        65_535
    };
    let mut messages = Vec::new();
    for (is_ipv4, is_udp) in [(true, false), (false, false), (true, true), (false, true)] {
        let plain = Packet::new(is_ipv4, is_udp, pattern(1001));
        let small = [
            Packet {
                tags: 1,
                ip_options: 2,
                ..plain.clone()
            },
            of_length(&plain, usize::from(mtu)),
            plain.clone(),
        ];
        for open in [Open::Nothing, Open::Checksum] {
            messages.extend(small.iter().cloned().map(|packet| Message {
                packet,
                open,
                gso_size: 0,
            }));
        }
        let signs = Packet {
            fin: true,
            cwr: !is_udp,
            tcp_options: 3,
            ..plain.clone()
        };
        let large = [
            of_length(&plain, longest),
            Packet {
                tags: 1,
                ..of_length(&signs, 40_000)
            },
            Packet {
                ip_options: 3,
                ..of_length(&signs, 20_000)
            },
        ];
        messages.extend(large.into_iter().map(|packet| Message {
            gso_size: mtu - u16::try_from(packet.place().headers - packet.place().l3).unwrap(),
            open: Open::Segments,
            packet,
        }));
    }
    messages.retain(|message| message.open <= kind.sends());
    messages
}

/// The packet with so much payload that it has `l3_bytes`, as IP counts them.
fn of_length(packet: &Packet, l3_bytes: usize) -> Packet {
    let headers = packet.place().headers - packet.place().l3;
    Packet {
        payload: pattern(l3_bytes - headers),
        ..packet.clone()
    }
}

impl Message {
    /// The same between other stations.
    pub(crate) fn between(self, from: u8, to: u8) -> Self {
        let packet = Packet {
            stations: [mac(from), mac(to)],
            ..self.packet
        };
        Self { packet, ..self }
    }

    /// The frames that someone receives who takes `most`, each with what it leaves open.
    fn for_taker(&self, most: Open) -> Vec<Self> {
        let open = self.open.min(most);
        if self.open < Open::Segments || open == Open::Segments {
            return vec![Self {
                open,
                ..self.clone()
            }];
        }
        let packet = &self.packet;
        let parts = packet.payload.chunks(self.gso_size.into());
        let count = u16::try_from(parts.len()).unwrap();
        let segment = |(at, part): (u16, &[u8])| {
            let (is_first, is_last) = (at == 0, at + 1 == count);
            let before = u32::from(at) * u32::from(self.gso_size);
            let packet = Packet {
                identification: packet.identification.wrapping_add(at),
                sequence: packet.sequence.wrapping_add(before),
                fin: packet.fin && is_last,
                psh: packet.psh && is_last,
                cwr: packet.cwr && is_first,
                payload: part.to_vec(),
                ..packet.clone()
            };
            Self {
                packet,
                open,
                gso_size: 0,
            }
        };
        (0..).zip(parts).map(segment).collect()
    }

    fn header(&self) -> Vec<u8> {
        match self.open {
            Open::Nothing => vec![0; 12],
            Open::Checksum | Open::Segments => self.packet.header(self.gso_size),
        }
    }

    fn frame(&self) -> Vec<u8> {
        match self.open {
            Open::Nothing => self.packet.frame(),
            Open::Checksum | Open::Segments => self.packet.open(),
        }
    }
}

/// A port of a lab and who is behind it.
pub(crate) struct Endpoint {
    pub(crate) kind: Kind,
    pub(crate) port: String,
    pub(crate) station: u8,
    mtu: u16,
    side: Side,
}

enum Side {
    Guest(Box<Guest>),
    /// With virtio-net headers.
    Host(Raw),
}

impl Endpoint {
    /// Adds a port to the lab; interfaces are those of this thread's namespace.
    pub(crate) fn add(lab: &Lab, kind: Kind, station: u8, setting: Setting) -> Self {
        let port = format!("{kind:?}{station}");
        let guest = |features| {
            let guest = lab.guest(&port, setting.guest(features));
            Side::Guest(Box::new(guest))
        };
        let host = |interface: &str, mut config: PortConfig| {
            match &mut config {
                PortConfig::VhostUser(guest) => guest.mtu = Mtu::new(setting.mtu),
                PortConfig::Tap(tap) => tap.mtu = Mtu::new(setting.mtu),
                PortConfig::AfXdp(nic) => nic.mtu = Mtu::new(setting.mtu),
            }
            lab.switch.add_port(name(&port), config).unwrap();
            Side::Host(Raw::with_headers(interface))
        };
        let of_tap = |offload| {
            let interface = format!("rw{station}");
            host(&interface, tap(&interface, 1, offload))
        };
        let side = match kind {
            Kind::GuestAll => guest(ALL),
            Kind::GuestCsum => guest(CSUM),
            Kind::GuestNone => guest(0),
            Kind::TapOffload => of_tap(true),
            Kind::TapPlain => of_tap(false),
            Kind::AfXdp => {
                let (near, far) = (format!("xdp{station}"), format!("far{station}"));
                veth_named([&near, &far], 1, setting.mtu.into());
                let config = af_xdp(|nic| {
                    nic.ifname = ifname(&near);
                    nic.mode = setting.mode;
                });
                host(&far, config)
            }
        };
        Self {
            kind,
            port,
            station,
            mtu: setting.mtu,
            side,
        }
    }

    pub(crate) fn send(&mut self, message: &Message) {
        self.send_bytes(&message.header(), &message.frame());
    }

    fn send_bytes(&mut self, header: &[u8], frame: &[u8]) {
        match &mut self.side {
            Side::Guest(guest) => guest.send(&[header, frame].concat()).unwrap(),
            // num_buffers is for rings only.
            Side::Host(raw) => raw.send(&[&header[..10], frame].concat()),
        }
    }

    /// The next virtio-net header and frame.
    fn receive(&mut self) -> ([u8; 10], Vec<u8>) {
        let next = match &mut self.side {
            Side::Guest(guest) => guest.recv(DEADLINE).unwrap().map(|received| {
                assert_ne!(received.num_buffers(), 0, "virtio 1.3, 5.1.6.4.1");
                (*received.header.first_chunk().unwrap(), received.frame)
            }),
            Side::Host(raw) => {
                let bytes = raw.receive();
                let (header, frame) = bytes.split_first_chunk().unwrap();
                Some((*header, frame.to_vec()))
            }
        };
        next.unwrap_or_else(|| panic!("{} gets nothing", self.port))
    }

    /// Nothing is there that was not received.
    pub(crate) fn assert_silent(&mut self) {
        let next = match &mut self.side {
            Side::Guest(guest) => guest.try_recv(0).unwrap().map(|received| received.frame),
            Side::Host(raw) => raw.try_receive(),
        };
        assert_eq!(next, None, "{} got more", self.port);
    }

    /// Says hello to all of these, so that the switch knows where it is.
    pub(crate) fn introduce<'a>(&mut self, others: impl Iterator<Item = &'a mut Self>) {
        let hello = frame(0xff, self.station, 60, self.station.into());
        self.send_bytes(&[0; 12], &hello);
        for other in others {
            assert!(other.receive().1 == hello, "hello to {}", other.port);
        }
    }

    /// Receives what a message becomes for it, and nothing else, byte for byte.
    pub(crate) fn expect(&mut self, message: &Message, what: &str) {
        let what = format!("{what}, {message}, for {}", self.port);
        for (at, expected) in message.for_taker(self.kind.takes()).iter().enumerate() {
            let (header, frame) = self.receive();
            self.assert_legal(&header, &frame, &what);
            let fields = |header: &[u8]| {
                let is_hint = header[0] & NEEDS_CSUM == 0;
                let flags = if is_hint { 0 } else { header[0] };
                // hdr_len is a hint too, and the kernel's own.
                (flags, header[1], header[4..10].to_vec())
            };
            assert_eq!(
                fields(&header),
                fields(&expected.header()),
                "{what}: the header of frame {at}"
            );
            if frame != expected.frame() {
                let mut whole = frame.clone();
                complete(&header, &mut whole);
                let verdict = judge(&whole).map(|judged| judged.payload.len());
                let bytes = frame.len();
                panic!("{what}: frame {at} of {bytes} bytes is another: {verdict:?}");
            }
        }
    }

    /// Asserts what virtio 1.3, 5.1.6.4.1 lets a device give to a driver of this kind.
    fn assert_legal(&self, header: &[u8; 10], frame: &[u8], what: &str) {
        let [flags, gso_type, ..] = *header;
        let takes = self.kind.takes();
        let is_guest = matches!(self.side, Side::Guest(_));
        let allowed = match takes {
            // A packet socket tells what the kernel has found.
            Open::Nothing if is_guest => 0,
            Open::Nothing => DATA_VALID,
            Open::Checksum | Open::Segments => NEEDS_CSUM | DATA_VALID,
        };
        assert_eq!(flags & !allowed, 0, "{what}: flags {flags:#x}");
        let place = super::packet::place_of(frame);
        let l3_bytes = if gso_type == 0 {
            frame.len() - place.l3
        } else {
            assert_eq!(takes, Open::Segments, "{what}: GSO type {gso_type:#x}");
            assert_ne!(flags & NEEDS_CSUM, 0, "{what}: a segmentation alone");
            let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
            assert!(!is_guest || field(2) == place.headers, "{what}: hdr_len");
            assert!(field(4) > 0, "{what}: gso_size");
            let is_ecn = gso_type & GSO_ECN != 0;
            assert!(!is_ecn || place.csum_offset == 16, "{what}: ECN of UDP");
            place.headers - place.l3 + field(4)
        };
        assert!(l3_bytes <= self.mtu.into(), "{what}: {l3_bytes} bytes");
    }
}

impl std::fmt::Display for Message {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Packet {
            is_ipv4,
            is_udp,
            tags,
            payload,
            ..
        } = &self.packet;
        let version = if *is_ipv4 { 4 } else { 6 };
        let protocol = if *is_udp { "UDP" } else { "TCP" };
        let bytes = payload.len();
        write!(
            out,
            "{protocol} over IPv{version}, {tags} tags, {bytes} bytes, open: {:?}",
            self.open
        )
    }
}
