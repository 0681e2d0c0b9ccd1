//! How ports and the switch are configured.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Longest port name, in bytes: fits a column of a terminal and a socket's file name.
pub const MAX_PORT_NAME: usize = 63;

/// Most queue pairs of a port: one bit each in a `u64` mask of usable queues.
pub const MAX_QUEUE_PAIRS: u16 = 64;

/// A port's name: 1 to [`MAX_PORT_NAME`] of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortName(String);

impl PortName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(&self.0)
    }
}

/// A text that can't name a port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} can't name a port")]
pub struct PortNameError(String);

impl FromStr for PortName {
    type Err = PortNameError;

    fn from_str(text: &str) -> Result<Self, PortNameError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts_well = text
            .as_bytes()
            .first()
            .is_some_and(u8::is_ascii_alphanumeric);
        if starts_well && text.len() <= MAX_PORT_NAME && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(PortNameError(
                text.chars().take(MAX_PORT_NAME + 1).collect(),
            ))
        }
    }
}

/// How many queue pairs a port may have: 1 to [`MAX_QUEUE_PAIRS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairs(NonZeroU16);

impl QueuePairs {
    /// [`MAX_QUEUE_PAIRS`].
    pub const MAX: Self = Self(NonZeroU16::new(MAX_QUEUE_PAIRS).unwrap());

    /// `count` pairs, or `None` if that is zero or more than [`MAX_QUEUE_PAIRS`].
    pub fn new(count: u16) -> Option<Self> {
        NonZeroU16::new(count)
            .filter(|n| n.get() <= MAX_QUEUE_PAIRS)
            .map(Self)
    }

    /// The number of pairs.
    pub fn get(self) -> u16 {
        self.0.get()
    }
}

/// The end of a vhost-user socket that the port takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketSpec {
    /// Wait at this path for front-ends (QEMU is the client).
    Listen(PathBuf),
    /// Connect to this path, and again whenever the connection ends (QEMU is the server).
    Connect(PathBuf),
}

/// What is behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A guest, through a vhost-user front-end.
    VhostUser {
        /// The socket.
        socket: SocketSpec,
        /// Most queue pairs that the front-end may use.
        queue_pairs: QueuePairs,
    },
    /// A tap interface of the host.
    Tap {
        /// Interface name; created if there is none.
        ifname: String,
        /// Queue pairs to open.
        queue_pairs: QueuePairs,
        /// Leave the interface in place when the port goes.
        persist: bool,
        /// Let the kernel leave checksums and segmentation to others, and take such frames.
        offload: bool,
    },
    /// Queues of a network interface, through AF_XDP sockets.
    AfXdp(AfXdpConfig),
}

/// How AF_XDP sockets are fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XdpMode {
    /// The first of the others that works.
    #[default]
    Auto,
    /// The NIC writes into and reads from the switch's memory.
    ZeroCopy,
    /// The driver runs the program; the kernel copies frames.
    Copy,
    /// The kernel makes an skb of each frame first: for any driver.
    Skb,
}

impl XdpMode {
    /// The mode as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
            Self::Skb => "skb",
        }
    }
}

/// How many frames a queue's UMEM holds: a power of two, [`UmemFrames::MIN`] to
/// [`UmemFrames::MAX`]. Half of them are to receive into, half to transmit from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UmemFrames(u32);

impl UmemFrames {
    /// Least: a burst each way.
    pub const MIN: u32 = 128;

    /// Most: rings of 32,768 entries, 256 MiB with the greater chunks.
    pub const MAX: u32 = 65_536;

    /// Rings of 2,048 entries, as the kernel's own tools have: a millisecond at 2 Mpps.
    pub const DEFAULT: Self = Self(4096);

    /// `count` frames, or `None` if that is no power of two or out of range.
    pub fn new(count: u32) -> Option<Self> {
        let fits = count.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&count);
        fits.then_some(Self(count))
    }

    /// The number of frames.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl Default for UmemFrames {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// An AF_XDP port's own settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AfXdpConfig {
    /// Interface name; it exists and is up.
    pub ifname: String,
    /// Queues to take, from the first on; `None` takes all.
    pub queue_pairs: Option<QueuePairs>,
    /// How frames are exchanged with the kernel.
    pub mode: XdpMode,
    /// Frames of each queue's UMEM.
    pub umem_frames: UmemFrames,
    /// Have the kernel poll the NIC for as long, rather than wait for its interrupts.
    pub busy_poll: Option<Duration>,
    /// Join TCP segments that follow one another, for ports that take such frames.
    pub gro: bool,
}

/// A port's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// What is behind it.
    pub kind: PortKind,
    /// L3 MTU; `None` takes the front-end's or the interface's.
    pub mtu: Option<u16>,
    /// Most learned MAC addresses behind it; `None` leaves the database's size as the limit.
    pub fdb_limit: Option<u32>,
    /// Queue pairs that are polled by a given worker whatever their load: pair and worker.
    pub pins: BTreeMap<u16, u16>,
}

impl PortConfig {
    /// Queue pairs of the port: for a guest the most that it may use, for a NIC the most that there
    /// can be unless a number is given.
    pub fn queue_pairs(&self) -> QueuePairs {
        match &self.kind {
            PortKind::VhostUser { queue_pairs, .. } | PortKind::Tap { queue_pairs, .. } => {
                *queue_pairs
            }
            PortKind::AfXdp(xdp) => xdp.queue_pairs.unwrap_or(QueuePairs::MAX),
        }
    }
}

/// Bounds of the idle ladder: spin, then pause, then sleep in epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleConfig {
    /// Poll a silent queue at full speed for this long; less if somebody else wants the core, unless
    /// it is [`Duration::MAX`], which means for ever.
    pub spin: Duration,
    /// Then poll with pauses for this long, then arm notifications and sleep.
    pub pause: Duration,
    /// Let a source wait this long for a destination that has no free buffers before its frames
    /// are dropped; counted from the last frame that the destination took.
    pub backpressure: Duration,
}

impl IdleConfig {
    /// Long enough to bridge the gaps of a TCP flow, short enough that a packet a millisecond
    /// costs a third of a core at most.
    pub const DEFAULT: Self = Self {
        spin: Duration::from_micros(50),
        pause: Duration::from_micros(250),
        backpressure: Duration::from_millis(10),
    };
}

impl Default for IdleConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Whether and how often queues move from busy workers to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalanceConfig {
    /// Queues move. If not, loads are measured all the same.
    pub is_on: bool,
    /// Loads are measured over this long, and a few queues move at the end of it if that relieves
    /// a busy worker.
    pub interval: Duration,
}

impl BalanceConfig {
    /// On; long enough to average over what TCP does, short enough that an operator sees it work.
    pub const DEFAULT: Self = Self {
        is_on: true,
        interval: Duration::from_secs(5),
    };
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// How a switch starts.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// One worker per CPU, pinned.
    pub worker_cpus: Vec<usize>,
    /// When workers go to sleep.
    pub idle: IdleConfig,
    /// When queues move between workers.
    pub balance: BalanceConfig,
    /// Entries that the forwarding database can hold.
    pub fdb_capacity: usize,
    /// Learned entries not seen for this long are forgotten (IEEE 802.1Q, 8.8.3: 300 s).
    pub fdb_ageing: Duration,
}
