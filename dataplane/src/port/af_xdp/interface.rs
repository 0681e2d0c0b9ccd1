//! What the kernel tells of a network interface.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::netdevice;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `ETHTOOL_GDRVINFO` (linux/ethtool.h).
const GET_DRIVER: u32 = 0x03;

/// `ETHTOOL_GCHANNELS` (linux/ethtool.h).
const GET_CHANNELS: u32 = 0x3c;

/// `struct ethtool_channels` (linux/ethtool.h).
#[derive(Default)]
#[repr(C)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// `struct ethtool_drvinfo` (linux/ethtool.h).
#[repr(C)]
struct Driver {
    command: u32,
    name: [u8; 32],
    /// Versions, bus, and counts of other things.
    rest: [u8; 160],
}

/// An interface of the network namespace in which it was found, wherever it is asked from.
#[derive(Debug)]
pub(super) struct Interface {
    index: u32,
    /// A socket of that namespace, for requests.
    socket: OwnedFd,
}

impl Interface {
    /// The interface of this name, if there is one.
    ///
    /// # Errors
    /// No socket can be made.
    pub(super) fn find(name: &str) -> io::Result<Option<Self>> {
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(netdevice::name_to_index(&socket, name)
            .ok()
            .map(|index| Self { index, socket }))
    }

    /// Its number.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Whether it is set up (IFF_UP).
    pub(super) fn is_up(&self) -> bool {
        self.has_flags(libc::IFF_UP)
    }

    /// Whether it is set up and has a carrier (IFF_RUNNING).
    pub(super) fn is_running(&self) -> bool {
        self.has_flags(libc::IFF_UP | libc::IFF_RUNNING)
    }

    /// Its L3 MTU.
    pub(super) fn mtu(&self) -> Option<u32> {
        let request = self.ask(libc::SIOCGIFMTU)?;
        // SAFETY: SIOCGIFMTU fills in this member, and any bytes are an int.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        u32::try_from(mtu).ok()
    }

    /// The name of its driver, if that tells.
    pub(super) fn driver(&self) -> Option<String> {
        let mut driver = Driver {
            command: GET_DRIVER,
            name: [0; 32],
            rest: [0; 160],
        };
        let mut request = self.request()?;
        request.ifr_ifru.ifru_data = (&raw mut driver).cast();
        self.send(libc::SIOCETHTOOL, request)?;
        let name = driver.name.split(|byte| *byte == 0).next()?;
        String::from_utf8(name.to_vec()).ok()
    }

    /// Its receive queues that have a transmit queue too; 1 if the driver doesn't tell.
    pub(super) fn queues(&self) -> u16 {
        let mut channels = Channels {
            command: GET_CHANNELS,
            ..Channels::default()
        };
        let told = self.request().and_then(|mut request| {
            request.ifr_ifru.ifru_data = (&raw mut channels).cast();
            self.send(libc::SIOCETHTOOL, request)
        });
        let count = match told {
            Some(_) => channels.combined + channels.rx.min(channels.tx),
            None => 1,
        };
        u16::try_from(count.max(1)).unwrap_or(u16::MAX)
    }

    fn has_flags(&self, flags: libc::c_int) -> bool {
        self.ask(libc::SIOCGIFFLAGS).is_some_and(|request| {
            // SAFETY: SIOCGIFFLAGS fills in this member, and any bytes are a short.
            let set = unsafe { request.ifr_ifru.ifru_flags };
            libc::c_int::from(set) & flags == flags
        })
    }

    fn ask(&self, what: libc::c_ulong) -> Option<libc::ifreq> {
        self.send(what, self.request()?)
    }

    /// A request about the interface by the name that it has now.
    fn request(&self) -> Option<libc::ifreq> {
        let name = netdevice::index_to_name(self.socket.as_fd(), self.index).ok()?;
        // SAFETY: all zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        Some(request)
    }

    fn send(&self, what: libc::c_ulong, mut request: libc::ifreq) -> Option<libc::ifreq> {
        let fd = self.socket.as_raw_fd();
        // SAFETY: the request is a valid ifreq; what it points to, if anything, is its caller's and
        // as long as the command in it says.
        let answer = unsafe { libc::ioctl(fd, what, &raw mut request) };
        (answer == 0).then_some(request)
    }
}
