//! A tap port: an interface of the host's network stack, one fd per queue.
//!
//! Frames carry a virtio-net header of 12 bytes both ways (IFF_VNET_HDR), so that checksums and
//! segmentation are left to whoever can do them, unless the port is to have no offload; a frame
//! goes to the kernel by one writev from the source's buffers.
#![allow(unsafe_code, reason = "ioctls")]

pub(super) mod receive;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use ringway_api::{Mtu, QueueInfo, SwitchError, TapConfig};
use ringway_bridge::DropReason;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use self::receive::TapReader;
use super::queue::{Job, Limits, Outcome, Refusal, Tools, TxQueue, deliver};
use super::{LinkBase, QueueCounters, max_l2_bytes};
use crate::burst_lock::BurstLock;
use crate::fd_limit::out_of_fds;
use crate::link::{Attachment, LinkName, Opened};
use crate::memory::IoVecs;
use crate::netlink::{Asker, Key};
use crate::offload::OutFrame;
use crate::wire::Offloads;
use crate::wire::net_header::HEADER_BYTES;

/// The network namespace of a thread that opens it.
pub(crate) const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

#[derive(Debug, Default)]
struct Counters {
    rx: QueueCounters,
    tx: QueueCounters,
}

/// A tap interface; without queues, one that is waited for.
pub(crate) struct TapPort {
    pub(crate) link: Arc<LinkBase>,
    /// Its number and name when it was opened.
    opened: Option<(u32, LinkName)>,
    queues: Box<[SyncDevice]>,
    readers: Box<[BurstLock<TapReader>]>,
    counters: Box<[Counters]>,
    mtu: Option<u16>,
    /// What the kernel leaves to us, and takes from us.
    offloads: Offloads,
}

impl std::fmt::Debug for TapPort {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("TapPort")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}

impl TapPort {
    /// Opens the interface's queues, and brings it up; it is created if there is none. Nothing is
    /// changed that is as it should be, so whose tap it is needs no privilege.
    ///
    /// # Errors
    /// An interface that is no tap or in use, no permission.
    pub(crate) fn open(link: Arc<LinkBase>, config: &TapConfig) -> Result<Self, SwitchError> {
        let (ifname, pairs) = (config.ifname.as_str(), config.queues.get());
        let existed = interface_exists(ifname);
        let explain = |error: &io::Error| explain(config, existed, error);
        refuse_others(config, 0)?;
        let queues = open_queues(ifname, pairs).map_err(|error| explain(&error))?;
        // Who came at the same time, and so saw nobody.
        refuse_others(config, pairs)?;
        let offloads = if config.offload { &LADDER[..] } else { &[] };
        let offloads = set_offloads(&queues, offloads).map_err(|error| explain(&error))?;
        if let Some(first) = queues.first() {
            set_up(first, config).map_err(|error| explain(&error))?;
        }
        let counters = queues.iter().map(|_| Counters::default()).collect();
        let reader = |_| BurstLock::new(TapReader::new());
        let readers = queues.iter().map(reader).collect();
        Ok(Self {
            link,
            opened: Some((index_of(ifname), ifname.into())),
            queues,
            readers,
            counters,
            mtu: config.mtu.map(Mtu::get),
            offloads,
        })
    }

    /// The same port with nothing open.
    pub(crate) fn detached(&self) -> Self {
        Self {
            link: Arc::clone(&self.link),
            opened: None,
            queues: Box::default(),
            readers: Box::default(),
            counters: Box::default(),
            mtu: None,
            offloads: Offloads::NONE,
        }
    }

    /// What is open.
    pub(crate) fn attachment(&self) -> Option<Attachment> {
        let (index, name) = self.opened.clone()?;
        let queues = self.pairs();
        Some(Attachment {
            index,
            name,
            what: Opened::Tap { queues },
        })
    }

    /// The name that the interface has now, in whatever namespace it is; `None` if it is gone.
    pub(crate) fn name_now(&self) -> Option<LinkName> {
        let fd = self.queues.first()?.as_raw_fd();
        // SAFETY: all zeros are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF fills in an ifreq through its pointer.
        let got = unsafe { libc::ioctl(fd, libc::TUNGETIFF, &raw mut request) };
        let bytes = request.ifr_name.map(|byte| byte.to_ne_bytes()[0]);
        (got == 0).then(|| LinkName::from_kernel(&bytes))
    }

    /// Whether the interface is in this thread's namespace, as far as that is told.
    pub(crate) fn is_in_this_namespace(&self) -> bool {
        let number = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        let there = self.namespace().map(|fd| rustix::fs::fstat(fd).map(number));
        let here = rustix::fs::stat(OWN_NAMESPACE).map(number);
        !matches!((there, here), (Ok(Ok(there)), Ok(here)) if there != here)
    }

    /// The namespace in which the interface is.
    ///
    /// # Errors
    /// It is gone, or the kernel tells it only to those who may administer that namespace.
    pub(crate) fn namespace(&self) -> io::Result<OwnedFd> {
        let queue = self.queues.first().ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: TUNGETDEVNETNS has no argument.
        let fd = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNGETDEVNETNS) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel made it for this call.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// What the kernel leaves to us, and takes from us.
    #[inline]
    pub(crate) fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// What the tap has, by the names of linux/if_tun.h.
    pub(crate) fn feature_names(&self) -> Vec<&'static str> {
        let set = NAMES.iter().filter(|(_, o)| o.within(self.offloads));
        std::iter::once("IFF_VNET_HDR")
            .chain(set.map(|(name, _)| *name))
            .collect()
    }

    pub(crate) fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// The MTU that frames to the interface are held to.
    pub(crate) fn configured_mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Counters of a queue: our Rx (read), our Tx (written).
    pub(crate) fn queue_counters(&self, pair: u16) -> (&QueueCounters, &QueueCounters) {
        let counters = &self.counters[usize::from(pair)];
        (&counters.rx, &counters.tx)
    }

    pub(crate) fn queue_info(&self, pair: u16, worker: u16) -> QueueInfo {
        let (rx, tx) = self.queue_counters(pair);
        QueueInfo {
            index: pair,
            rx_started: true,
            tx_started: true,
            enabled: true,
            rx_size: 0,
            tx_size: 0,
            worker,
            rx_frames: rx.frames.get(),
            tx_frames: tx.frames.get(),
            calls: 0,
            contended: 0,
            rx_resumed: false,
            tx_resumed: false,
            tolerated: 0,
        }
    }

    /// The fd of a queue, to wait for frames.
    pub(crate) fn fd(&self, pair: u16) -> BorrowedFd<'_> {
        let fd = self.queues[usize::from(pair)].as_raw_fd();
        // SAFETY: the device owns the fd and lives as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// The queue for frames of a source's queue: matched by number, so that a flow stays in one.
    #[inline]
    pub(crate) fn transmit_queue(&self, source_queue: u16) -> u16 {
        source_queue % self.pairs()
    }

    /// Delivers frames to the kernel, one call each: it has no other way.
    pub(crate) fn deliver(&self, job: &Job<'_, '_>, tools: &mut Tools) -> Outcome {
        let queue = self.transmit_queue(job.source_queue);
        let mut tx = TapTx {
            fd: self.fd(queue),
            limits: Limits {
                offloads: self.offloads,
                max_bytes: max_l2_bytes(self.configured_mtu()),
            },
            is_down: false,
        };
        tools.by_calls += job.frames.len();
        let outcome = deliver(&mut tx, job, &mut tools.gso, &mut tools.account);
        if tx.is_down {
            self.link.base.forget_stations();
        }
        // Several workers may write to one tap queue.
        let counters = self.queue_counters(queue).1;
        counters.count(&outcome, &tools.account);
        outcome
    }
}

/// The writing side of a tap's queue.
struct TapTx<'a> {
    fd: BorrowedFd<'a>,
    limits: Limits,
    /// The interface refused a frame of the burst since it is down.
    is_down: bool,
}

impl TxQueue for TapTx<'_> {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn put(&mut self, frame: &mut OutFrame<'_>) -> Result<(), Refusal> {
        let mut parts = IoVecs::new();
        frame.gather(&mut parts);
        match parts.write_to(self.fd) {
            Ok(_) => Ok(()),
            Err(error) => {
                // Down, or deleted.
                let errors = [Some(libc::EIO), Some(libc::EBADFD)];
                self.is_down |= errors.contains(&error.raw_os_error());
                Err(Refusal::Drop(DropReason::HostError))
            }
        }
    }
}

/// Whether this network namespace has an interface of this name. (sysfs may be another's.)
fn interface_exists(ifname: &str) -> bool {
    index_of(ifname) != 0
}

/// The number of an interface; 0 if there is none.
pub(crate) fn index_of(ifname: &str) -> u32 {
    let Ok(text) = CString::new(ifname) else {
        return 0;
    };
    // SAFETY: the pointer is a valid C string.
    unsafe { libc::if_nametoindex(text.as_ptr()) }
}

fn open_queues(ifname: &str, pairs: u16) -> io::Result<Box<[SyncDevice]>> {
    let open = |multi_queue| {
        let device = DeviceBuilder::new()
            .name(ifname)
            .layer(Layer::L2)
            .offload(true)
            .multi_queue(multi_queue)
            .inherit_enable_state()
            .build_sync()?;
        configure(&device)?;
        Ok::<_, io::Error>(device)
    };
    if pairs == 1 {
        // The kernel refuses to attach to a persistent tap in the other mode: try both.
        let single = open(false).or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => open(true),
            _ => Err(error),
        })?;
        return Ok(Box::new([single]));
    }
    (0..pairs).map(|_| open(true)).collect()
}

fn set_up(first: &SyncDevice, config: &TapConfig) -> io::Result<()> {
    let ifname = LinkName::from(config.ifname.as_str());
    let seen = Asker::new().and_then(|mut asker| asker.link(Key::Name(&ifname)));
    let (is_up, mtu) = seen
        .ok()
        .flatten()
        .map_or((false, 0), |seen| (seen.is_up, seen.mtu));
    if let Some(wanted) = config.mtu.filter(|wanted| u32::from(wanted.get()) != mtu) {
        first.set_mtu(wanted.get())?;
    }
    if !is_up {
        match first.enabled(true) {
            // The port waits until whoever may do it has brought it up.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            done => done?,
        }
    }
    if config.persist {
        first.persist()?;
    }
    Ok(())
}

/// Sets what tun-rs does not: a header of 12 bytes; and O_NONBLOCK.
fn configure(device: &SyncDevice) -> io::Result<()> {
    let fd = device.as_raw_fd();
    let bytes = libc::c_int::try_from(HEADER_BYTES).map_err(io::Error::other)?;
    // SAFETY: TUNSETVNETHDRSZ reads an int through its pointer.
    let sized = unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const bytes) };
    if sized < 0 {
        return Err(io::Error::last_os_error());
    }
    device.set_nonblocking(true)
}

/// Sets of offloads, the one that is liked most first, by the flags of TUNSETOFFLOAD.
const LADDER: [(libc::c_uint, Offloads); 2] = [
    (TCP_FLAGS | TUN_F_USO4 | TUN_F_USO6, Offloads::ALL),
    // Before Linux 6.2.
    (
        TCP_FLAGS,
        Offloads::ALL.without(Offloads::USO4.with(Offloads::USO6)),
    ),
];

const TCP_FLAGS: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
/// Of linux/if_tun.h; the kernel takes both or none.
const TUN_F_USO4: libc::c_uint = 0x20;
const TUN_F_USO6: libc::c_uint = 0x40;

/// Offloads by the names of linux/if_tun.h.
const NAMES: [(&str, Offloads); 6] = [
    ("TUN_F_CSUM", Offloads::CSUM),
    ("TUN_F_TSO4", Offloads::TSO4),
    ("TUN_F_TSO6", Offloads::TSO6),
    ("TUN_F_TSO_ECN", Offloads::ECN),
    ("TUN_F_USO4", Offloads::USO4),
    ("TUN_F_USO6", Offloads::USO6),
];

/// Sets the first of `ladder` that the kernel takes, or none if it is empty.
fn set_offloads(
    queues: &[SyncDevice],
    ladder: &[(libc::c_uint, Offloads)],
) -> io::Result<Offloads> {
    let Some(((flags, offloads), worse)) = ladder.split_first() else {
        set_flags(queues, 0)?;
        return Ok(Offloads::NONE);
    };
    match set_flags(queues, *flags) {
        Ok(()) => Ok(*offloads),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && !worse.is_empty() => {
            set_offloads(queues, worse)
        }
        Err(error) => Err(error),
    }
}

fn set_flags(queues: &[SyncDevice], flags: libc::c_uint) -> io::Result<()> {
    for queue in queues {
        let flags = libc::c_ulong::from(flags);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let set = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, flags) };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A tap for several queues can be opened by several programs, each of which then gets a part of the
/// frames: it must have no more queues than `own`.
fn refuse_others(config: &TapConfig, own: u16) -> Result<(), SwitchError> {
    let ifname = &config.ifname;
    let seen = Asker::new().and_then(|mut asker| asker.link(Key::Name(&ifname.as_str().into())));
    // A tap of one queue is the kernel's to refuse.
    let open = seen.ok().flatten().and_then(|seen| seen.tap_queues);
    match open.unwrap_or(0).saturating_sub(own.into()) {
        0 => Ok(()),
        others => Err(SwitchError::Tap {
            ifname: ifname.clone(),
            reason: format!("another program has {others} of its queues open"),
            hint: format!(
                "end it (`grep -lw {ifname} /proc/[0-9]*/fdinfo/*` finds it), or use another \
                 interface name"
            ),
        }),
    }
}

fn explain(config: &TapConfig, existed: bool, error: &io::Error) -> SwitchError {
    if let Some((reason, hint)) = out_of_fds(error) {
        return SwitchError::Tap {
            ifname: config.ifname.clone(),
            reason,
            hint: hint.to_owned(),
        };
    }
    let (reason, hint) = match error.raw_os_error() {
        Some(libc::EACCES) => (
            "/dev/net/tun may not be opened".to_owned(),
            "run ringwayd as root, or let its user open the device (mode 0666 as udev has it)"
                .to_owned(),
        ),
        Some(libc::EPERM) => (
            "not permitted".to_owned(),
            format!(
                "run ringwayd as root or with CAP_NET_ADMIN, or as the user whose tap it is \
                 (`ip tuntap add {} mode tap user USER`, and its MTU as configured)",
                config.ifname
            ),
        ),
        Some(libc::ENOENT | libc::ENODEV) => (
            "there is no /dev/net/tun".to_owned(),
            "load the kernel module tun".to_owned(),
        ),
        Some(libc::EBUSY) => (
            "another process has it open".to_owned(),
            "end that process, or use another interface name".to_owned(),
        ),
        Some(libc::EINVAL) if existed => (
            "it exists and is no tap that can be attached".to_owned(),
            if config.queues.get() > 1 {
                "a tap for several queues is made with `ip tuntap add mode tap multi_queue`"
            } else {
                "choose a name that is free, or make a tap with `ip tuntap add mode tap`"
            }
            .to_owned(),
        ),
        Some(libc::E2BIG) => (
            "it has too many queues open".to_owned(),
            "ask for fewer with --queues".to_owned(),
        ),
        _ => (error.to_string(), "see `ip -d link show`".to_owned()),
    };
    SwitchError::Tap {
        ifname: config.ifname.clone(),
        reason,
        hint,
    }
}
