//! What the kernel tells of network interfaces by rtnetlink: events as they come, and answers about
//! one interface.
//!
//! Of a message only the few attributes are read that ports need. An attribute that a newer kernel
//! writes otherwise, or a name that is no text, is no reason to miss what became of an interface.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{
    DefaultNla, ErrorBuffer, ErrorMessage, NLA_HEADER_SIZE, NLM_F_REQUEST, NLMSG_ERROR,
    NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlaBuffer, NlasIterator,
    Parseable, parse_u32,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    LinkAttribute, LinkFlags, LinkHeader, LinkMessage, LinkMessageBuffer,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::link::{LinkName, Seen};

/// Bytes of a message at most: far more than the kernel writes of one interface.
const MESSAGE_BYTES: usize = 64 << 10;

/// How long an answer is waited for: the kernel answers in the call that asks.
const PATIENCE: Duration = Duration::from_secs(1);

/// Messages that are taken before what they tell is looked at: what an interface that comes and goes
/// without end makes in some 10 ms.
const EVENTS_AT_A_TIME: usize = 1024;

/// `RTNLGRP_LINK` (linux/rtnetlink.h).
const GROUP: u32 = libc::RTNLGRP_LINK;

/// `RTEXT_FILTER_SKIP_STATS` (linux/rtnetlink.h): counters make half of an answer.
const SKIP_STATISTICS: u32 = 8;

/// Nested attributes of `IFLA_XDP` (linux/if_link.h).
const IFLA_XDP_PROG_ID: u16 = 4;

/// Nested attribute of `IFLA_LINKINFO` (linux/if_link.h).
const IFLA_INFO_DATA: u16 = 2;

/// Nested attribute of a tap's `IFLA_INFO_DATA` (linux/if_link.h).
const IFLA_TUN_NUM_QUEUES: u16 = 8;

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Something of an interface is new.
    Link {
        index: u32,
        name: LinkName,
        /// It is deleted, or in another namespace.
        is_gone: bool,
        /// It is set up and has a carrier.
        is_running: bool,
    },
    /// The kernel had no room for events and left some out, or one can't be read.
    Overrun,
}

/// Events of all interfaces of the namespace in which it was made.
#[derive(Debug)]
pub(crate) struct Events {
    socket: Socket,
    buffer: Box<[u8]>,
}

impl Events {
    /// Hears what happens from now on.
    ///
    /// # Errors
    /// No netlink socket can be made.
    pub(crate) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.add_membership(GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self {
            socket,
            buffer: vec![0; MESSAGE_BYTES].into(),
        })
    }

    /// Tells of the events that wait, up to [`EVENTS_AT_A_TIME`] messages; false if there may be more.
    pub(crate) fn take(&mut self, mut hear: impl FnMut(Event)) -> bool {
        for _ in 0..EVENTS_AT_A_TIME {
            match receive(&self.socket, &mut self.buffer) {
                Ok(messages) => match events_of(messages) {
                    Some(events) => events.into_iter().for_each(&mut hear),
                    None => hear(Event::Overrun),
                },
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return true,
                    Some(libc::EINTR) => {}
                    // ENOBUFS: told once, and what there was room for is still to be read.
                    _ => hear(Event::Overrun),
                },
            }
        }
        false
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// By what an interface is asked about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Key<'a> {
    Index(u32),
    Name(&'a LinkName),
    /// In a namespace that [`Asker::namespace`] knows by this id.
    NameIn(i32, &'a LinkName),
}

/// Asks about single interfaces.
#[derive(Debug)]
pub(crate) struct Asker {
    socket: Socket,
    buffer: Box<[u8]>,
    sequence: u32,
}

impl Asker {
    /// For the namespace of this thread.
    ///
    /// # Errors
    /// No netlink socket can be made.
    pub(crate) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self {
            socket,
            buffer: vec![0; MESSAGE_BYTES].into(),
            sequence: 0,
        })
    }

    /// What the kernel tells of an interface, if there is one.
    ///
    /// # Errors
    /// It does not answer, or may not be asked.
    pub(crate) fn link(&mut self, key: Key<'_>) -> io::Result<Option<Seen>> {
        let mut message = LinkMessage::default();
        let mask = SKIP_STATISTICS.to_ne_bytes().to_vec();
        let mut attributes = vec![LinkAttribute::Other(DefaultNla::new(
            libc::IFLA_EXT_MASK,
            mask,
        ))];
        match key {
            Key::Index(index) => message.header.index = index,
            Key::Name(name) => attributes.push(name_attribute(name)),
            Key::NameIn(namespace, name) => {
                attributes.push(LinkAttribute::IfNetnsId(namespace));
                attributes.push(name_attribute(name));
            }
        }
        message.attributes = attributes;
        let answer = self.ask(RouteNetlinkMessage::GetLink(message), |kind, payload| {
            (kind == libc::RTM_NEWLINK).then(|| read(payload))
        });
        match answer {
            Ok(seen) => seen.map(Some).ok_or_else(unreadable),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The id by which this namespace knows another one; `None` if it has none, as of itself.
    ///
    /// # Errors
    /// The kernel does not answer, or may not be asked.
    pub(crate) fn namespace(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        let mut message = NsidMessage::default();
        let fd = fd.as_raw_fd().unsigned_abs();
        message.attributes = vec![NsidAttribute::Fd(fd)];
        self.ask(RouteNetlinkMessage::GetNsId(message), |kind, payload| {
            (kind == libc::RTM_NEWNSID).then(|| {
                // The message's header is a struct rtgenmsg, padded to four bytes.
                let attributes = NlasIterator::new(payload.get(4..)?);
                let mut ids = attributes.filter_map(|attribute| {
                    match NsidAttribute::parse(&attribute.ok()?).ok()? {
                        NsidAttribute::Id(id) => Some(id),
                        _ => None,
                    }
                });
                ids.next()
            })
        })
        .map(|id| id.filter(|id| *id >= 0))
    }

    /// Sends a request, and waits for the first message of the answer that `take` takes.
    fn ask<T>(
        &mut self,
        request: RouteNetlinkMessage,
        mut take: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<T> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        loop {
            let mut rest = match receive(&self.socket, &mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            };
            while let Some((message, after)) = split_message(rest) {
                rest = after;
                // An answer that came too late for the request before.
                if message.sequence_number() != self.sequence {
                    continue;
                }
                if message.message_type() == NLMSG_ERROR {
                    return Err(refusal(message.payload()));
                }
                if let Some(taken) = take(message.message_type(), message.payload()) {
                    return Ok(taken);
                }
            }
        }
    }
}

fn unreadable() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer can't be read",
    )
}

fn refusal(payload: &[u8]) -> io::Error {
    let error = ErrorBuffer::new_checked(&payload).and_then(|buffer| ErrorMessage::parse(&buffer));
    error.map_or_else(|_| unreadable(), |error| error.to_io())
}

fn name_attribute(name: &LinkName) -> LinkAttribute {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    LinkAttribute::Other(DefaultNla::new(libc::IFLA_IFNAME, bytes))
}

/// The messages of the next datagram: of the kernel's, since any process may send to the socket.
fn receive<'b>(socket: &Socket, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    loop {
        let mut room = &mut *buffer;
        let (bytes, from) = socket.recv_from(&mut room, libc::MSG_TRUNC)?;
        if from.port_number() != 0 {
            continue;
        }
        // What is cut off ends with a message that does not fit, which `split_message` refuses.
        let bytes = bytes.min(buffer.len());
        return Ok(&buffer[..bytes]);
    }
}

/// The first message, and what comes behind it.
fn split_message(bytes: &[u8]) -> Option<(NetlinkBuffer<&[u8]>, &[u8])> {
    let message = NetlinkBuffer::new_checked(bytes).ok()?;
    let end = usize::try_from(message.length()).ok()?.next_multiple_of(4);
    Some((message, bytes.get(end..).unwrap_or_default()))
}

/// The events of a datagram; `None` if a part of it can't be read.
fn events_of(mut bytes: &[u8]) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let (message, rest) = split_message(bytes)?;
        bytes = rest;
        let is_gone = match message.message_type() {
            libc::RTM_NEWLINK => false,
            libc::RTM_DELLINK => true,
            _ => continue,
        };
        let seen = read(message.payload())?;
        // What bridges, and families of addresses, tell of their own beside the interface itself.
        events.push(Event::Link {
            index: seen.index,
            is_running: seen.is_running,
            name: seen.name,
            is_gone: is_gone && seen.is_whole,
        });
    }
    Some(events)
}

/// What a message tells of an interface; `None` if it is cut off.
fn read(payload: &[u8]) -> Option<Seen> {
    let header = LinkHeader::parse(payload).ok()?;
    let is_set = |flags| header.flags.contains(flags);
    let mut seen = Seen {
        index: header.index,
        name: LinkName::default(),
        // Messages of AF_BRIDGE tell of a bridge's port, not of the interface (rtnl_fdb and
        // br_ifinfo_notify).
        is_whole: u8::from(header.interface_family) == 0,
        is_up: is_set(LinkFlags::Up),
        is_running: is_set(LinkFlags::Up | LinkFlags::Running),
        mtu: 0,
        promiscuity: 0,
        program: None,
        tap_queues: None,
    };
    for attribute in NlasIterator::new(payload.get(size_of::<LinkMessageBuffer>()..)?) {
        let attribute = attribute.ok()?;
        let value = attribute.value();
        match attribute.kind() {
            libc::IFLA_IFNAME => seen.name = LinkName::from_kernel(value),
            libc::IFLA_MTU => seen.mtu = parse_u32(value).ok()?,
            libc::IFLA_PROMISCUITY => seen.promiscuity = parse_u32(value).ok()?,
            libc::IFLA_XDP => {
                let id = nested(value, IFLA_XDP_PROG_ID).and_then(|id| parse_u32(id).ok());
                seen.program = id.filter(|id| *id != 0);
            }
            libc::IFLA_LINKINFO => {
                let queues = nested(value, IFLA_INFO_DATA)
                    .and_then(|data| nested(data, IFLA_TUN_NUM_QUEUES));
                seen.tap_queues = queues.and_then(|queues| parse_u32(queues).ok());
            }
            _ => {}
        }
    }
    Some(seen)
}

/// The value of an attribute in another's.
fn nested(value: &[u8], kind: u16) -> Option<&[u8]> {
    let found = NlasIterator::new(value)
        .filter_map(Result::ok)
        .find(|attribute: &NlaBuffer<&[u8]>| attribute.kind() == kind)?;
    let end = usize::from(found.length());
    found.into_inner().get(NLA_HEADER_SIZE..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message about interface 5, called `name`, with these attributes behind.
    fn message(kind: u16, name: &[u8], more: Vec<LinkAttribute>) -> Vec<u8> {
        let mut link = LinkMessage::default();
        link.header.index = 5;
        link.header.flags = LinkFlags::Up | LinkFlags::Running;
        link.attributes = vec![name_attribute(&LinkName::from_kernel(name))];
        link.attributes.extend(more);
        let inner = if kind == libc::RTM_DELLINK {
            RouteNetlinkMessage::DelLink(link)
        } else {
            RouteNetlinkMessage::NewLink(link)
        };
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), inner.into());
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn event(name: &[u8], is_gone: bool) -> Event {
        Event::Link {
            index: 5,
            name: LinkName::from_kernel(name),
            is_gone,
            is_running: true,
        }
    }

    #[test]
    fn events_are_read_whatever_the_name_and_attributes_that_nobody_knows() {
        let odd = DefaultNla::new(libc::IFLA_LINK, vec![1; 3]);
        let odd = LinkAttribute::Other(odd);
        let mut bytes = message(libc::RTM_NEWLINK, b"a\xff\x1b", vec![odd]);
        bytes.extend(message(libc::RTM_DELLINK, b"b", vec![]));
        let expected = vec![event(b"a\xff\x1b", false), event(b"b", true)];
        assert_eq!(events_of(&bytes), Some(expected));
    }

    #[test]
    fn a_message_that_is_cut_off_is_never_taken_for_another() {
        let one = message(libc::RTM_NEWLINK, b"rw0", vec![LinkAttribute::Mtu(1400)]);
        let both = [one.clone(), message(libc::RTM_DELLINK, b"rw0", vec![])].concat();
        for end in 1..both.len() {
            let expected = (end == one.len()).then(|| vec![event(b"rw0", false)]);
            assert_eq!(events_of(&both[..end]), expected, "{end} bytes");
        }
        // Lengths that lie, of the message and of an attribute.
        for at in [0, 1, 32, 33] {
            for byte in 0..=u8::MAX {
                let mut lying = one.clone();
                lying[at] = byte;
                let _ = events_of(&lying);
            }
        }
    }

    mod as_root {
        use super::*;
        use ringway_testbed::host::{fresh_namespace, ip, ip_batch};

        #[test]
        fn events_that_there_was_no_room_for_are_told_and_later_ones_heard() {
            fresh_namespace();
            let mut events = Events::new().unwrap();
            ip("tuntap add rw0 mode tap");
            ip_batch(&"link set rw0 up\nlink set rw0 down\n".repeat(2000));
            let (mut overruns, mut others) = (0, 0);
            while !events.take(|event| match event {
                Event::Overrun => overruns += 1,
                Event::Link { .. } => others += 1,
            }) {}
            assert!(overruns > 0 && others > 0, "{overruns} {others}");
            ip("link del rw0");
            let mut heard = Vec::new();
            assert!(events.take(|event| heard.push(event)));
            let name = LinkName::from("rw0");
            assert!(matches!(
                heard.last(),
                Some(Event::Link { name: last, is_gone: true, .. }) if *last == name
            ));
        }

        #[test]
        fn what_is_asked_is_what_there_is() {
            fresh_namespace();
            ip("tuntap add rw0 mode tap");
            ip("link set rw0 mtu 1400 promisc on");
            let mut asker = Asker::new().unwrap();
            let seen = asker.link(Key::Name(&"rw0".into())).unwrap().unwrap();
            assert_eq!((seen.mtu, seen.promiscuity, seen.is_up), (1400, 1, false));
            assert_eq!((seen.program, seen.tap_queues), (None, None));
            ip("link set rw0 name rw1");
            let again = asker.link(Key::Index(seen.index)).unwrap().unwrap();
            assert_eq!(again.name, "rw1".into());
            assert_eq!(asker.link(Key::Name(&"rw0".into())).unwrap(), None);
            assert_eq!(asker.link(Key::Index(1_000_000)).unwrap(), None);
        }
    }
}
