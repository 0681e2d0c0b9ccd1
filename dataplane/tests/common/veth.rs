//! Network namespaces with veth pairs, and raw sockets on them. Needs root and iproute2.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::DEADLINE;

/// The EtherType of the frames of [`super::frame`] (IEEE 802, local experiments).
const ETHER_TYPE: u16 = 0x88b5;

/// Moves this thread, and so the switch's to come, into a fresh namespace.
pub(crate) fn fresh_namespace() {
    // SAFETY: only the network namespace changes; nothing else in the process depends on it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace: run as root");
}

pub(crate) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.unwrap().success(), "ip {arguments}");
}

/// Makes a veth pair `xdp0` and `far0` with so many queues, and sets it up.
pub(crate) fn veth(queues: u16, mtu: u32) {
    let shape = format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}");
    ip(&format!(
        "link add xdp0 {shape} type veth peer name far0 {shape}"
    ));
    for ifname in ["xdp0", "far0"] {
        // Else the kernel sends frames of its own.
        ip(&format!("link set {ifname} addrgenmode none"));
        ip(&format!("link set {ifname} up"));
    }
}

/// A raw socket on an interface, for frames of [`ETHER_TYPE`].
pub(crate) struct Raw(OwnedFd);

impl Raw {
    pub(crate) fn open(ifname: &str) -> Self {
        Self::for_type(ifname, ETHER_TYPE)
    }

    pub(crate) fn for_type(ifname: &str, ether_type: u16) -> Self {
        let ifname = std::ffi::CString::new(ifname).unwrap();
        // SAFETY: the pointer is a valid C string.
        let index = unsafe { libc::if_nametoindex(ifname.as_ptr()) };
        assert_ne!(index, 0, "{ifname:?}");
        let protocol = ether_type.to_be();
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the fd is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeros are a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index).unwrap();
        let bytes = bytes_of(&address);
        // SAFETY: the address is valid for its length.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), bytes) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        let raw = Self(socket);
        raw.set(libc::SO_RCVBUFFORCE, &(64 << 20_i32));
        raw.set(libc::SO_SNDBUFFORCE, &(64 << 20_i32));
        let seconds = i64::try_from(DEADLINE.as_secs()).unwrap();
        raw.set(libc::SO_RCVTIMEO, &[seconds, 0_i64]);
        raw
    }

    fn set<T>(&self, option: i32, value: &T) {
        let fd = self.0.as_raw_fd();
        let bytes = bytes_of(value);
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: the value is valid for its length.
        let set = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, value, bytes) };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        self.try_send(frame).unwrap();
    }

    pub(crate) fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame is valid for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if usize::try_from(sent) == Ok(frame.len()) {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The next frame that came in; those that this side sent are left out.
    pub(crate) fn receive(&self) -> Vec<u8> {
        self.receive_with(0).expect("a frame")
    }

    /// The next frame if there is one now.
    pub(crate) fn try_receive(&self) -> Option<Vec<u8>> {
        self.receive_with(libc::MSG_DONTWAIT)
    }

    fn receive_with(&self, flags: i32) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        loop {
            // SAFETY: all zeros are a valid address.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut bytes = bytes_of(&from);
            // SAFETY: buffer and address are valid for their lengths.
            let count = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    flags,
                    (&raw mut from).cast(),
                    &raw mut bytes,
                )
            };
            let count = usize::try_from(count).ok()?;
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                buffer.truncate(count);
                return Some(buffer);
            }
        }
    }
}

fn bytes_of<T>(value: &T) -> u32 {
    size_of_val(value).try_into().unwrap()
}
