//! The host's side: network namespaces, their interfaces, and raw sockets on these. Needs root and
//! iproute2.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc;

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::DEADLINE;

/// The EtherType of the frames of tests: IEEE 802, for local experiments.
const ETHER_TYPE: u16 = 0x88b5;

/// Of linux/if_packet.h.
const PACKET_AUXDATA: i32 = 8;
const PACKET_VNET_HDR: i32 = 15;
const TP_STATUS_VLAN_VALID: u32 = 0x10;

/// Bytes of the virtio-net header that packet sockets have: without num_buffers.
const HEADER_BYTES: usize = 10;

/// Whether this process may make namespaces, taps and AF_XDP sockets.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Moves this thread, and so those that it starts, into a fresh network namespace.
pub fn fresh_namespace() {
    // SAFETY: only the network namespace changes; nothing else in the process depends on it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .expect("a network namespace: run as root, or without what needs it: --profile user");
}

/// The same with a namespace whose kernel sends no frames of its own, but on IPv4's behalf.
pub fn quiet_namespace() {
    fresh_namespace();
    for interfaces in ["all", "default"] {
        // Of this thread's namespace; absent if the kernel has no IPv6.
        let path = format!("/proc/sys/net/ipv6/conf/{interfaces}/disable_ipv6");
        let _ = std::fs::write(path, "1");
    }
}

/// Runs `ip` with these arguments, and returns what it prints.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// An interface's address. (The namespace's own sysfs is not mounted: iproute2 is asked.)
pub fn mac_of(ifname: &str) -> [u8; 6] {
    let text = ip(&format!("-br link show {ifname}"));
    let mac: ringway_bridge::MacAddr = text.split_whitespace().nth(2).unwrap().parse().unwrap();
    mac.0
}

/// An interface's index.
pub fn index_of(ifname: &str) -> u32 {
    let name = std::ffi::CString::new(ifname).unwrap();
    // SAFETY: the pointer is a valid C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "{ifname}");
    index
}

/// Sets how many queues of each direction an interface has, as `ethtool -L` does with rx and tx.
pub fn set_channels(ifname: &str, count: u32) {
    // `struct ethtool_channels` (linux/ethtool.h), with ETHTOOL_GCHANNELS and ETHTOOL_SCHANNELS.
    let mut channels = [0_u32; 9];
    for command in [0x3c, 0x3d] {
        channels[0] = command;
        if command == 0x3d {
            channels[5..7].fill(count);
        }
        // SAFETY: all zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
        for (to, from) in request.ifr_name.iter_mut().zip(ifname.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request.ifr_ifru.ifru_data = (&raw mut channels).cast();
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        // SAFETY: the request and the structure that it points to are valid.
        let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        assert_eq!(set, 0, "{ifname}: {}", io::Error::last_os_error());
    }
}

/// Another network namespace, as long as this lives.
#[derive(Debug)]
pub struct Elsewhere {
    /// By which `ip link set … netns` knows it.
    pub thread: i32,
    commands: Option<mpsc::Sender<String>>,
    done: mpsc::Receiver<String>,
    handle: Option<std::thread::JoinHandle<()>>,
}

impl Elsewhere {
    /// Makes one.
    pub fn new() -> Self {
        let (commands, to_do) = mpsc::channel::<String>();
        let (tell, done) = mpsc::channel();
        let handle = std::thread::spawn(move || {
            fresh_namespace();
            let number = rustix::thread::gettid().as_raw_nonzero().get();
            tell.send(number.to_string()).unwrap();
            for command in to_do {
                tell.send(ip(&command)).unwrap();
            }
        });
        let thread = done.recv().unwrap().parse().unwrap();
        Self {
            thread,
            commands: Some(commands),
            done,
            handle: Some(handle),
        }
    }

    /// Runs `ip` there.
    pub fn ip(&self, arguments: &str) -> String {
        let commands = self.commands.as_ref().unwrap();
        commands.send(arguments.to_owned()).unwrap();
        self.done.recv().expect("the command failed there")
    }
}

impl Default for Elsewhere {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(handle) = self.handle.take() {
            // A panic was told where it happened.
            let _ = handle.join();
        }
    }
}

/// Runs these lines of `ip -batch`.
pub fn ip_batch(lines: &str) {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    io::Write::write_all(&mut child.stdin.take().unwrap(), lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "ip -batch");
}

/// Makes a veth pair `xdp0` and `far0` with so many queues, and sets it up.
pub fn veth(queues: u16, mtu: u32) {
    veth_named(["xdp0", "far0"], queues, mtu);
}

/// Makes a veth pair of these names, and sets it up.
pub fn veth_named([near, far]: [&str; 2], queues: u16, mtu: u32) {
    let shape = format!("mtu {mtu} numrxqueues {queues} numtxqueues {queues}");
    ip(&format!(
        "link add {near} {shape} type veth peer name {far} {shape}"
    ));
    for ifname in [near, far] {
        // Else the kernel sends frames of its own.
        ip(&format!("link set {ifname} addrgenmode none"));
        ip(&format!("link set {ifname} up"));
    }
}

/// A raw socket on an interface, for frames of the tests unless said otherwise.
#[derive(Debug)]
pub struct Raw {
    socket: OwnedFd,
    /// In front of each frame is a virtio-net header.
    has_header: bool,
}

impl Raw {
    /// For frames of tests.
    pub fn open(ifname: &str) -> Self {
        Self::for_type(ifname, ETHER_TYPE)
    }

    /// For all frames, behind virtio-net headers of which `num_buffers` is left out.
    pub fn with_headers(ifname: &str) -> Self {
        let mut raw = Self::for_type(ifname, u16::try_from(libc::ETH_P_ALL).unwrap());
        raw.set_option(libc::SOL_PACKET, PACKET_VNET_HDR, &1_i32);
        raw.has_header = true;
        raw
    }

    /// For frames of this EtherType.
    pub fn for_type(ifname: &str, ether_type: u16) -> Self {
        let protocol = ether_type.to_be();
        // SAFETY: no pointers. It takes nothing before it is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: the fd is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeros are a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = protocol;
        address.sll_ifindex = i32::try_from(index_of(ifname)).unwrap();
        let bytes = bytes_of(&address);
        // SAFETY: the address is valid for its length.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), bytes) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        let raw = Self {
            socket,
            has_header: false,
        };
        raw.set_option(libc::SOL_PACKET, PACKET_AUXDATA, &1_i32);
        raw.set(libc::SO_RCVBUFFORCE, &(512 << 20_i32));
        raw.set(libc::SO_SNDBUFFORCE, &(64 << 20_i32));
        let seconds = i64::try_from(DEADLINE.as_secs()).unwrap();
        raw.set(libc::SO_RCVTIMEO, &[seconds, 0_i64]);
        raw
    }

    fn set<T>(&self, option: i32, value: &T) {
        self.set_option(libc::SOL_SOCKET, option, value);
    }

    fn set_option<T>(&self, level: i32, option: i32, value: &T) {
        set_option(&self.socket, level, option, value);
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) {
        self.try_send(frame).unwrap();
    }

    /// Sends a frame if the interface takes it.
    ///
    /// # Errors
    /// It doesn't.
    pub fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame is valid for its length.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
            )
        };
        if usize::try_from(sent) == Ok(frame.len()) {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The next frame that came in; those that this side sent are left out.
    pub fn receive(&self) -> Vec<u8> {
        self.receive_with(0).expect("a frame")
    }

    /// The next frame if there is one now.
    pub fn try_receive(&self) -> Option<Vec<u8>> {
        self.receive_with(libc::MSG_DONTWAIT)
    }

    fn receive_with(&self, flags: i32) -> Option<Vec<u8>> {
        // Not filled with zeros for each frame: that would cost more than the frame.
        let mut buffer = Vec::<u8>::with_capacity(70_000);
        loop {
            type Parts = (libc::sockaddr_ll, libc::msghdr, [libc::cmsghdr; 4]);
            // SAFETY: all zeros are a valid address, a valid message and a valid control message.
            let parts: Parts = unsafe { MaybeUninit::zeroed().assume_init() };
            let (mut from, mut message, mut control) = parts;
            let mut piece = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.capacity(),
            };
            message.msg_name = (&raw mut from).cast();
            message.msg_namelen = bytes_of(&from);
            message.msg_iov = &raw mut piece;
            message.msg_iovlen = 1;
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = size_of_val(&control);
            // SAFETY: buffer, address and control buffer are valid for their lengths.
            let count = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, flags) };
            let count = usize::try_from(count).ok()?;
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                // SAFETY: the kernel wrote so many bytes, no more than there is room for.
                unsafe { buffer.set_len(count) };
                if let Some(tag) = tag_of(&message) {
                    self.put_back(tag, &mut buffer);
                }
                return Some(buffer);
            }
        }
    }

    /// Puts the VLAN tag into a frame from which the kernel took it.
    fn put_back(&self, tag: [u8; 4], frame: &mut Vec<u8>) {
        let header_bytes = if self.has_header { HEADER_BYTES } else { 0 };
        let at = header_bytes + 12;
        frame.splice(at..at, tag);
        if self.has_header && frame[0] & super::packet::NEEDS_CSUM != 0 {
            let start = u16::from_le_bytes([frame[6], frame[7]]) + 4;
            frame[6..8].copy_from_slice(&start.to_le_bytes());
        }
    }
}

/// `struct tpacket_auxdata` (linux/if_packet.h).
#[repr(C)]
struct Auxiliary {
    status: u32,
    bytes: u32,
    snapped_bytes: u32,
    l2_offset: u16,
    l3_offset: u16,
    vlan_tci: u16,
    vlan_tpid: u16,
}

/// The VLAN tag that the kernel took from a frame.
fn tag_of(message: &libc::msghdr) -> Option<[u8; 4]> {
    // SAFETY: the kernel filled the message in, and its buffers are still there.
    let first = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: as above.
    let first = unsafe { first.as_ref() }?;
    if (first.cmsg_level, first.cmsg_type) != (libc::SOL_PACKET, PACKET_AUXDATA) {
        return None;
    }
    // SAFETY: as above.
    let data = unsafe { libc::CMSG_DATA(first) };
    // SAFETY: the kernel put one there, of whatever alignment.
    let found = unsafe { data.cast::<Auxiliary>().read_unaligned() };
    let tag = u32::from(found.vlan_tpid) << 16 | u32::from(found.vlan_tci);
    (found.status & TP_STATUS_VLAN_VALID != 0).then_some(tag.to_be_bytes())
}

/// Sets a socket's option.
pub fn set_option<T>(socket: &impl AsRawFd, level: i32, option: i32, value: &T) {
    let (fd, bytes) = (socket.as_raw_fd(), bytes_of(value));
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the value is valid for its length.
    let set = unsafe { libc::setsockopt(fd, level, option, value, bytes) };
    assert_eq!(set, 0, "option {option}: {}", io::Error::last_os_error());
}

fn bytes_of<T>(value: &T) -> u32 {
    size_of_val(value).try_into().unwrap()
}
