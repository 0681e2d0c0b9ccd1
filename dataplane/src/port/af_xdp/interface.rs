//! What the kernel tells of a network interface.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::netdevice;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// `ETHTOOL_GDRVINFO` (linux/ethtool.h).
const GET_DRIVER: u32 = 0x03;

/// `ETHTOOL_GCHANNELS` (linux/ethtool.h).
const GET_CHANNELS: u32 = 0x3c;

/// `PACKET_MR_PROMISC` (linux/if_packet.h).
const PROMISCUOUS: libc::c_ushort = 1;

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
    /// Versions, bus, and a count of flags.
    texts: [u32; 36],
    statistics: u32,
    /// Lengths of other things.
    rest: [u32; 3],
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

    /// Another interface of its namespace.
    pub(super) fn at(&self, index: u32) -> Option<Self> {
        let socket = self.socket.try_clone().ok()?;
        Some(Self { index, socket })
    }

    /// How many numbers its driver counts, as `ethtool -S` shows them.
    pub(super) fn statistics(&self) -> Option<u32> {
        self.driver_info().map(|driver| driver.statistics)
    }

    /// Its number.
    pub(super) fn index(&self) -> u32 {
        self.index
    }

    /// Whether it is set up (IFF_UP).
    pub(super) fn is_up(&self) -> bool {
        self.has_flags(libc::IFF_UP)
    }

    /// Its L3 MTU.
    pub(super) fn mtu(&self) -> Option<u32> {
        let request = self.ask(libc::SIOCGIFMTU)?;
        // SAFETY: SIOCGIFMTU fills in this member, and any bytes are an int.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        u32::try_from(mtu).ok()
    }

    /// Its receive queues that have a transmit queue too; 1 if the driver doesn't tell.
    pub(super) fn queues(&self) -> u16 {
        self.channels().unwrap_or(1)
    }

    /// The same; `None` if the driver doesn't tell, or the interface was renamed meanwhile: it is asked
    /// about by name.
    pub(super) fn channels(&self) -> Option<u16> {
        let mut channels = Channels {
            command: GET_CHANNELS,
            ..Channels::default()
        };
        self.ethtool(&mut channels)?;
        let count = channels.combined + channels.rx.min(channels.tx);
        Some(u16::try_from(count.max(1)).unwrap_or(u16::MAX))
    }

    /// The name of its driver, as `ethtool -i` tells it.
    pub(super) fn driver(&self) -> Option<String> {
        let driver = self.driver_info()?;
        let name = driver.name.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    fn driver_info(&self) -> Option<Driver> {
        let mut driver = Driver {
            command: GET_DRIVER,
            name: [0; 32],
            texts: [0; 36],
            statistics: 0,
            rest: [0; 3],
        };
        self.ethtool(&mut driver)?;
        Some(driver)
    }

    /// Has it receive frames for whatever address, as a port of a switch must: a NIC takes but
    /// those for its own otherwise. It does so until the socket that this gives is closed.
    ///
    /// # Errors
    /// No permission (`EPERM`), or no packet sockets in this kernel or sandbox (`EAFNOSUPPORT`).
    pub(super) fn receive_all(&self) -> io::Result<OwnedFd> {
        // Without a protocol it gets no frames itself.
        let socket = socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let request = libc::packet_mreq {
            mr_ifindex: i32::try_from(self.index).map_err(io::Error::other)?,
            mr_type: PROMISCUOUS,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        let (level, name) = (libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP);
        set_option(&socket, level, name, &request)?;
        Ok(socket)
    }

    fn has_flags(&self, flags: libc::c_int) -> bool {
        self.ask(libc::SIOCGIFFLAGS).is_some_and(|request| {
            // SAFETY: SIOCGIFFLAGS fills in this member, and any bytes are a short.
            let set = unsafe { request.ifr_ifru.ifru_flags };
            libc::c_int::from(set) & flags == flags
        })
    }

    /// Has a command of ethtool filled in: `T` is its structure.
    pub(super) fn ethtool<T: ?Sized>(&self, command: &mut T) -> Option<()> {
        let mut request = self.request()?;
        request.ifr_ifru.ifru_data = std::ptr::from_mut(command).cast();
        self.send(libc::SIOCETHTOOL, request).map(drop)
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

/// Sets a socket option. `T` is what the kernel expects there.
pub(super) fn set_option<T>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let bytes = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the value is valid for its length, and the kernel only reads it.
    let set = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, bytes) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const _: () = assert!(size_of::<Driver>() == 196);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_has_no_driver_and_one_queue() {
        let loopback = Interface::find("lo").unwrap().unwrap();
        assert_eq!((loopback.driver(), loopback.queues()), (None, 1));
        assert!(Interface::find("none0").unwrap().is_none());
    }
}
