//! Opening an interface's queues: which mode it can, and why not.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringway_api::{AfXdpConfig, MAX_QUEUE_PAIRS, Mtu, QueuePairs, SwitchError, XdpMode};
use ringway_xdp::Hook;
use xsk_rs::Socket;
use xsk_rs::config::{BindFlags, Interface as InterfaceName, LibxdpFlags, QueueSize, SocketConfig};

use super::features::{JOINS, LEAVES_WORK, STRIPS_TAGS};
use super::interface::{Interface, set_option};
use super::program::{self, Program};
use super::receive::{Receiver, Receiving};
use super::transmit::Transmitter;
use super::umem::{ChunkLayout, SharedMemory, os_error};
use super::{AfXdpPort, AfXdpQueue, Hold, MAX_MTU};
use crate::fd_limit::out_of_fds;
use crate::link::{Attachment, Opened as OpenedLink};
use crate::port::{LinkBase, max_l2_bytes};
use crate::wire::Offloads;

/// How long a queue that is bound is tried again: after the end of the process that had it, the
/// kernel lets go of it within some 10 ms.
const BIND_PATIENCE: Duration = Duration::from_millis(300);

/// Pause between two attempts.
const BIND_PAUSE: Duration = Duration::from_millis(2);

/// Entries of a ring that is not used: a socket of xsk-rs has both.
const LEAST_RING: u32 = 2;

/// Frames that the kernel takes from the NIC in one busy poll: its own default elsewhere.
const BUSY_POLL_BUDGET: u32 = 64;

/// Its driver turns the device's offloads off for XDP, which takes a feature of the device.
const VIRTIO_XDP_HINT: &str = "give the device ctrl_guest_offloads=on (QEMU's default), or turn \
     guest_csum, guest_tso4 and all like them off";

/// Without the first its driver refuses with `EINVAL`, without one of the others with `ENOENT`.
const VIRTIO_ZERO_COPY_HINT: &str = "give the device disable-legacy=on,iommu_platform=on, and leave \
     queue_reset and mrg_rxbuf on (QEMU's default); or use --mode copy";

/// Why the interface can't be opened in one mode.
enum OpenRefusal {
    /// Another mode may do.
    Mode(SwitchError),
    /// No mode will.
    Final(SwitchError),
}

/// What is to be opened.
struct Plan<'a> {
    config: &'a AfXdpConfig,
    interface: &'a Interface,
    queues: u16,
    /// Queues that the interface has.
    channels: u16,
    layout: ChunkLayout,
    /// The interface's own.
    interface_mtu: u32,
    /// The name of its driver, if that tells.
    driver: Option<String>,
}

impl AfXdpPort {
    /// Why the interface can't be opened now, but may be later: it is not there, or down.
    pub(crate) fn absence(config: &AfXdpConfig) -> Option<SwitchError> {
        find(config).err()
    }

    /// Attaches a program to the interface and binds its first queues.
    ///
    /// # Errors
    /// An interface that is not there, down, in use, can't do it in this mode or with its MTU; too
    /// few queues, too little memory that may be locked, no permission.
    pub(crate) fn open(link: Arc<LinkBase>, config: &AfXdpConfig) -> Result<Self, SwitchError> {
        let interface = find(config)?;
        let plan = plan(config, &interface)?;
        let (mode, opened) = plan.open_first()?;
        let receives_all = interface
            .receive_all()
            .map_err(|error| not_promiscuous(config, &error))?;
        let attachment = Attachment {
            index: plan.interface.index(),
            name: config.ifname.as_str().into(),
            what: OpenedLink::Nic {
                program: opened.program.id(),
                mtu: plan.interface_mtu,
                channels: plan.channels,
            },
        };
        Ok(Self {
            link,
            mode,
            has_several_chunks: plan.layout.several_chunks,
            sends: plan.sends(mode),
            umem_bytes: opened.umem_bytes,
            is_huge: opened.is_huge,
            mtu: config.mtu.map_or(
                u16::try_from(plan.interface_mtu).unwrap_or(u16::MAX),
                Mtu::get,
            ),
            queues: opened.queues,
            hold: Some(Hold {
                program: opened.program,
                interface,
                _receives_all: receives_all,
                attachment,
            }),
        })
    }
}

/// The interface, if it is there and set up.
fn find(config: &AfXdpConfig) -> Result<Interface, SwitchError> {
    let ifname = config.ifname.as_str();
    let found = Interface::find(ifname).map_err(|error| system(config, "socket", &error))?;
    let Some(interface) = found else {
        return Err(refuse(
            config,
            "there is no such interface",
            "see `ip link`; the interface is to exist already",
        ));
    };
    if !interface.is_up() {
        let hint = format!("`ip link set {ifname} up` sets it up");
        return Err(refuse(config, "it is down", hint));
    }
    Ok(interface)
}

/// What one mode yields.
struct Opened {
    program: Program,
    queues: Box<[AfXdpQueue]>,
    umem_bytes: u64,
    is_huge: bool,
}

fn plan<'a>(config: &'a AfXdpConfig, interface: &'a Interface) -> Result<Plan<'a>, SwitchError> {
    let ifname = &config.ifname;
    let there = interface.queues();
    let queues = match config.queues.map(QueuePairs::get) {
        Some(wanted) if wanted > there => {
            let reason = format!("{wanted} queues are asked for, and it has {there}");
            let hint = format!("ask for fewer, or `ethtool -L {ifname} combined {wanted}` first");
            return Err(refuse(config, reason, hint));
        }
        Some(wanted) => wanted,
        None => there.min(MAX_QUEUE_PAIRS),
    };
    let interface_mtu = interface.mtu().unwrap_or(1500);
    let greatest = interface_mtu.max(config.mtu.map_or(0, |mtu| u32::from(mtu.get())));
    if greatest > MAX_MTU {
        let reason = format!("its MTU of {greatest} is above the {MAX_MTU} that AF_XDP carries");
        let hint = format!("`ip link set {ifname} mtu {MAX_MTU}`, and leave out a greater --mtu");
        return Err(refuse(config, reason, hint));
    }
    Ok(Plan {
        config,
        interface,
        queues,
        channels: there,
        layout: ChunkLayout::for_frames(max_l2_bytes(u16::try_from(greatest).ok())),
        interface_mtu,
        driver: interface.driver(),
    })
}

impl Plan<'_> {
    /// Opens the interface in the first mode of those wanted that it can.
    fn open_first(&self) -> Result<(XdpMode, Opened), SwitchError> {
        let config = self.config;
        let support = program::query(self.interface.index())
            .map_err(|error| system(config, "netlink", &error))?;
        if let Some(id) = support.program {
            return Err(self.has_program(id));
        }
        let modes: &[XdpMode] = match &config.mode {
            XdpMode::Auto => &[XdpMode::ZeroCopy, XdpMode::Copy, XdpMode::Skb],
            mode => std::slice::from_ref(mode),
        };
        let mut refused = None;
        for mode in modes {
            let is_native = *mode != XdpMode::Skb;
            if is_native && self.layout.several_chunks && support.several_buffers == Some(false) {
                refused = Some(self.too_long());
                continue;
            }
            if *mode == XdpMode::ZeroCopy && support.zero_copy == Some(false) {
                refused = Some(self.no_zero_copy());
                continue;
            }
            match self.open(*mode) {
                Ok(opened) => return Ok((*mode, opened)),
                Err(OpenRefusal::Final(error)) => return Err(error),
                Err(OpenRefusal::Mode(error)) => {
                    if config.mode == XdpMode::Auto {
                        tracing::info!(?mode, %error, "the next mode is tried");
                    }
                    refused = Some(error);
                }
            }
        }
        Err(refused.unwrap_or_else(|| refuse(config, "no mode is left", "see `ip -d link`")))
    }

    fn open(&self, mode: XdpMode) -> Result<Opened, OpenRefusal> {
        let hook = match mode {
            XdpMode::Skb => Hook::Generic,
            XdpMode::Auto | XdpMode::ZeroCopy | XdpMode::Copy => Hook::Driver,
        };
        let program = self.attach(mode, hook)?;
        let (mut umem_bytes, mut is_huge) = (0, true);
        let mut queues = Vec::new();
        let layout = match mode {
            XdpMode::ZeroCopy => self.layout.for_zero_copy(),
            XdpMode::Auto | XdpMode::Copy | XdpMode::Skb => self.layout,
        };
        for index in 0..self.queues {
            let memory = SharedMemory::new(layout, self.config.umem_frames.get())
                .map_err(|error| OpenRefusal::Final(self.no_memory(&error)))?;
            umem_bytes += memory.total_bytes;
            is_huge &= memory.is_huge;
            let queue = self.open_queue(index, mode, layout, memory)?;
            program
                .redirect(index, queue.fd())
                .map_err(|error| OpenRefusal::Final(system(self.config, "XSKMAP", &error)))?;
            queues.push(queue);
        }
        Ok(Opened {
            program,
            queues: queues.into(),
            umem_bytes,
            is_huge,
        })
    }

    /// Attaches the program, and sees to it that it gets frames as they are on the wire: with their
    /// tags, and of a length that a wire has.
    fn attach(&self, mode: XdpMode, hook: Hook) -> Result<Program, OpenRefusal> {
        let (interface, is_veth) = (self.interface, self.driver.as_deref() == Some("veth"));
        if is_veth && mode != XdpMode::Skb {
            match Program::attach_to_veth(interface.index(), self.queues) {
                Ok(program) => return Ok(program),
                Err(error)
                    if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) =>
                {
                    return Err(self.cannot_attach(&error));
                }
                // A kernel before 6.8.
                Err(_) => {}
            }
        }
        let left_on = if is_veth {
            let peer = interface.veth_peer();
            peer.map_or(LEAVES_WORK.to_vec(), |peer| peer.switch_off(LEAVES_WORK))
        } else {
            interface.switch_off(STRIPS_TAGS)
        };
        if let Some(feature) = left_on.first() {
            return Err(OpenRefusal::Mode(self.loses_tags(is_veth, feature)));
        }
        if mode == XdpMode::Skb {
            let _ = interface.switch_off(JOINS);
        }
        Program::attach(interface.index(), self.queues, hook)
            .map_err(|error| self.cannot_attach(&error))
    }

    fn loses_tags(&self, is_veth: bool, feature: &str) -> SwitchError {
        let ifname = &self.config.ifname;
        if is_veth {
            return refuse(
                self.config,
                "in this mode it would lose VLAN tags and frames to be cut, which its far end, in \
                 another network namespace, leaves to it",
                "use --mode copy with Linux 6.8 or later, or move the far end here while the port is \
                 added",
            );
        }
        refuse(
            self.config,
            format!("it takes VLAN tags from frames ({feature}), and that can't be switched off"),
            format!("see `ethtool -k {ifname}`; use another interface"),
        )
    }

    /// What frames from the interface may ask for: to have their checksum completed, if its driver
    /// hands on frames that another part of the kernel, or of the host, sent. Offloads of
    /// virtio_net are off while it runs a program itself.
    fn sends(&self, mode: XdpMode) -> Offloads {
        match self.driver.as_deref() {
            Some("veth" | "tun") => Offloads::CSUM,
            Some("virtio_net") if mode == XdpMode::Skb => Offloads::CSUM,
            _ => Offloads::NONE,
        }
    }

    fn open_queue(
        &self,
        index: u16,
        mode: XdpMode,
        layout: ChunkLayout,
        memory: SharedMemory,
    ) -> Result<AfXdpQueue, OpenRefusal> {
        let config = self.config;
        let is_zero_copy = mode == XdpMode::ZeroCopy;
        let mut flags = BindFlags::XDP_USE_NEED_WAKEUP;
        flags |= if is_zero_copy {
            BindFlags::XDP_ZEROCOPY
        } else {
            BindFlags::XDP_COPY
        };
        if layout.several_chunks {
            flags |= BindFlags::XDP_USE_SG;
        }
        let size = config.umem_frames.get() / 2;
        let name: InterfaceName = config.ifname.as_str().parse().map_err(|_| {
            OpenRefusal::Final(refuse(
                config,
                "no interface can have this name",
                "see `ip link`",
            ))
        })?;
        let bind = |rx_size, tx_size| {
            let config = socket_config((rx_size, tx_size), flags)?;
            // SAFETY: sockets that share a UMEM must not load programs, and these don't.
            unsafe { Socket::new(config, &memory.umem, &name, u32::from(index)) }
                .map_err(|error| os_error(&error))
        };
        // In copy mode, each frame that the kernel is done with would wake whoever waits for the
        // receiving socket's events: a second socket, at the same rings of chunks, transmits.
        let first_tx_size = if is_zero_copy { size } else { LEAST_RING };
        let deadline = Instant::now() + BIND_PATIENCE;
        let (mut ring, received, rings) = loop {
            match bind(size, first_tx_size) {
                Ok(socket) => break socket,
                Err(error) => {
                    let is_busy = error.raw_os_error() == Some(libc::EBUSY);
                    if !is_busy || Instant::now() >= deadline {
                        return Err(self.cannot_bind(index, mode, &error));
                    }
                    std::thread::sleep(BIND_PAUSE);
                }
            }
        };
        let Some((fill, completions)) = rings else {
            let error = io::Error::other("no fill ring");
            return Err(OpenRefusal::Final(system(config, "socket", &error)));
        };
        if !is_zero_copy {
            (ring, ..) =
                bind(LEAST_RING, size).map_err(|error| self.cannot_bind(index, mode, &error))?;
        }
        if let Some(time) = config.busy_poll_us {
            let options = [
                (libc::SO_PREFER_BUSY_POLL, 1_u32),
                (libc::SO_BUSY_POLL, time.get()),
                (libc::SO_BUSY_POLL_BUDGET, BUSY_POLL_BUDGET),
            ];
            for (name, value) in options {
                set_option(received.fd(), libc::SOL_SOCKET, name, &value)
                    .map_err(|error| OpenRefusal::Final(system(config, "busy polling", &error)))?;
            }
        }
        let fd = received.fd().as_raw_fd();
        let chunks = memory.chunks;
        let umem = (memory.umem, chunks, layout.room_bytes());
        Ok(AfXdpQueue::new(
            Receiver::new(
                received,
                fill,
                chunks,
                &memory.to_receive,
                Receiving {
                    busy_poll: config.busy_poll_us.is_some(),
                    open_checksums: self.sends(mode) != Offloads::NONE,
                    gro: config.gro,
                },
            ),
            Transmitter::new(ring, completions, umem, memory.to_transmit, is_zero_copy),
            fd,
            size,
        ))
    }

    fn cannot_attach(&self, error: &io::Error) -> OpenRefusal {
        let config = self.config;
        if let Some((reason, hint)) = out_of_fds(error) {
            return OpenRefusal::Final(refuse(config, reason, hint));
        }
        let ifname = &config.ifname;
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => OpenRefusal::Final(not_permitted(config)),
            Some(libc::EBUSY | libc::EEXIST) => {
                // Somebody was faster.
                let support = program::query(self.interface.index()).ok();
                let id = support.and_then(|support| support.program).unwrap_or(0);
                OpenRefusal::Final(self.has_program(id))
            }
            // Through skbs its frames would come merged, and with open checksums.
            Some(libc::EOPNOTSUPP) if self.is_virtio() => OpenRefusal::Final(refuse(
                config,
                "its driver can't run XDP programs while its device merges or checks frames",
                VIRTIO_XDP_HINT,
            )),
            Some(libc::EOPNOTSUPP) => OpenRefusal::Mode(refuse(
                config,
                "its driver can't run XDP programs",
                "use --mode skb, which needs nothing of the driver and is slower",
            )),
            Some(libc::ERANGE | libc::EINVAL) if self.interface_mtu > 1500 => {
                OpenRefusal::Mode(self.too_long())
            }
            _ => OpenRefusal::Mode(refuse(
                config,
                format!("its driver refused the XDP program: {error}"),
                format!("see `ethtool -i {ifname}` and the kernel's log, or use --mode skb"),
            )),
        }
    }

    fn cannot_bind(&self, index: u16, mode: XdpMode, error: &io::Error) -> OpenRefusal {
        let config = self.config;
        if let Some((reason, hint)) = out_of_fds(error) {
            return OpenRefusal::Final(refuse(config, reason, hint));
        }
        let ifname = &config.ifname;
        match error.raw_os_error() {
            Some(libc::EBUSY) => OpenRefusal::Final(refuse(
                config,
                format!("queue {index} is bound to another AF_XDP socket"),
                "end the program that has it; `ss --xdp -p` shows it",
            )),
            Some(libc::ENETDOWN) => OpenRefusal::Final(refuse(
                config,
                "it is down",
                format!("`ip link set {ifname} up` sets it up"),
            )),
            Some(libc::EPERM | libc::EACCES) => OpenRefusal::Final(not_permitted(config)),
            Some(libc::EOPNOTSUPP) if self.layout.several_chunks => {
                OpenRefusal::Mode(self.too_long())
            }
            Some(libc::EOPNOTSUPP) if mode == XdpMode::ZeroCopy => {
                OpenRefusal::Mode(self.no_zero_copy())
            }
            Some(libc::EINVAL | libc::ENOENT) if mode == XdpMode::ZeroCopy && self.is_virtio() => {
                OpenRefusal::Mode(refuse(
                    config,
                    format!("its device is not fit for zero-copy: {error}"),
                    VIRTIO_ZERO_COPY_HINT,
                ))
            }
            _ => OpenRefusal::Mode(refuse(
                config,
                format!("queue {index} can't be bound: {error}"),
                format!("see `ethtool -l {ifname}` and the kernel's log, or use --mode skb"),
            )),
        }
    }

    fn is_virtio(&self) -> bool {
        self.driver.as_deref() == Some("virtio_net")
    }

    fn no_memory(&self, error: &io::Error) -> SwitchError {
        let config = self.config;
        match error.raw_os_error() {
            Some(libc::ENOBUFS) => refuse(
                config,
                "not enough memory may be locked for its frames",
                "raise `ulimit -l` (LimitMEMLOCK= of the unit) or take fewer with --umem-frames",
            ),
            Some(libc::ENOMEM) => refuse(
                config,
                "there is not enough memory for its frames",
                "take fewer with --umem-frames",
            ),
            Some(libc::EPERM | libc::EACCES) => not_permitted(config),
            Some(libc::EAFNOSUPPORT) => refuse(
                config,
                "this kernel or sandbox has no AF_XDP",
                "use a kernel with CONFIG_XDP_SOCKETS and allow the address family AF_XDP",
            ),
            _ => system(config, "UMEM", error),
        }
    }

    fn has_program(&self, id: u32) -> SwitchError {
        let ifname = &self.config.ifname;
        refuse(
            self.config,
            format!("it has an XDP program already, with id {id}"),
            format!(
                "`bpftool prog show id {id}` tells whose; end that, or `ip link set {ifname} xdp off`"
            ),
        )
    }

    fn no_zero_copy(&self) -> SwitchError {
        refuse(
            self.config,
            "its driver has no zero-copy",
            "use --mode copy, or auto for the best there is",
        )
    }

    fn too_long(&self) -> SwitchError {
        let mtu = self.interface_mtu;
        let ifname = &self.config.ifname;
        refuse(
            self.config,
            format!("its MTU of {mtu} is above what its driver carries in this mode"),
            format!("`ip link set {ifname} mtu 1500`, or use --mode skb"),
        )
    }
}

fn socket_config((rx_size, tx_size): (u32, u32), flags: BindFlags) -> io::Result<SocketConfig> {
    let entries = |size| QueueSize::new(size).map_err(io::Error::other);
    Ok(SocketConfig::builder()
        .rx_queue_size(entries(rx_size)?)
        .tx_queue_size(entries(tx_size)?)
        .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
        .bind_flags(flags)
        .build())
}

fn refuse(config: &AfXdpConfig, reason: impl Into<String>, hint: impl Into<String>) -> SwitchError {
    SwitchError::AfXdp {
        ifname: config.ifname.clone(),
        reason: reason.into(),
        hint: hint.into(),
    }
}

fn not_permitted(config: &AfXdpConfig) -> SwitchError {
    refuse(
        config,
        "not permitted",
        "run ringwayd as root or with CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF",
    )
}

fn not_promiscuous(config: &AfXdpConfig, error: &io::Error) -> SwitchError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => not_permitted(config),
        Some(libc::EAFNOSUPPORT) => refuse(
            config,
            "it can't be made to receive frames for all addresses",
            "allow the address family AF_PACKET (RestrictAddressFamilies= of the unit)",
        ),
        _ => system(config, "promiscuous mode", error),
    }
}

fn system(config: &AfXdpConfig, what: &str, error: &io::Error) -> SwitchError {
    if let Some((reason, hint)) = out_of_fds(error) {
        return refuse(config, reason, hint);
    }
    refuse(
        config,
        format!("{what}: {error}"),
        "see the daemon's and the kernel's log",
    )
}
