//! The handle by which the control plane runs the dataplane.

use std::fmt;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ringway_bridge::MacAddr;

use crate::info::{FdbEntryInfo, PairCounters, PortDetail, PortInfo, WorkerInfo};

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
    },
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
}

/// Bounds of the idle ladder: spin, then pause, then sleep in epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleConfig {
    /// Poll a silent queue at full speed for this long.
    pub spin: Duration,
    /// Then poll with pauses for this long, then arm notifications and sleep.
    pub pause: Duration,
}

/// How a switch starts.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// One worker per CPU, pinned.
    pub worker_cpus: Vec<usize>,
    /// When workers go to sleep.
    pub idle: IdleConfig,
    /// Entries that the forwarding database can hold.
    pub fdb_capacity: usize,
    /// Learned entries not seen for this long are forgotten (IEEE 802.1Q, 8.8.3: 300 s).
    pub fdb_ageing: Duration,
}

/// Why the switch refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// There is no such CPU, or this process may not run on it.
    #[error("CPU {cpu} does not exist or is not allowed to this process")]
    NoSuchCpu {
        /// The CPU.
        cpu: usize,
        /// CPUs that are allowed, as `0-1,4`.
        allowed: String,
    },
    /// No worker CPU was given, or one twice.
    #[error("worker CPUs: {reason}")]
    BadWorkerCpus {
        /// What is wrong.
        reason: String,
    },
    /// The name is taken.
    #[error("port {name} exists already")]
    PortExists {
        /// The name.
        name: PortName,
    },
    /// There is no port of that name.
    #[error("there is no port {name}")]
    NoSuchPort {
        /// The name.
        name: PortName,
    },
    /// All [`ringway_bridge::MAX_PORTS`] slots are taken.
    #[error("the switch has {max} ports already", max = ringway_bridge::MAX_PORTS)]
    TooManyPorts,
    /// The path of a socket to listen at can't be used.
    #[error("can't listen at {path}: {reason}")]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// What is wrong: a file that is no socket, a live process behind it, …
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The tap can't be created or attached.
    #[error("can't open tap {ifname}: {reason}")]
    Tap {
        /// The interface.
        ifname: String,
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// There is no such row in the forwarding database.
    #[error("the forwarding database has no entry for {mac}")]
    NoSuchFdbEntry {
        /// The address.
        mac: MacAddr,
    },
    /// The forwarding database is full, or the address can't be an entry.
    #[error("can't add {mac} to the forwarding database: {reason}")]
    FdbRefused {
        /// The address.
        mac: MacAddr,
        /// What is wrong.
        reason: String,
    },
    /// A system call failed that has no better explanation.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl SwitchError {
    /// One line that says what to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoSuchCpu { allowed, .. } => format!("allowed CPUs are {allowed}"),
            Self::BadWorkerCpus { .. } => "name each CPU once, as in --worker-cpus 1,2-3".into(),
            Self::PortExists { name } => format!("`ringway port del {name}` removes it"),
            Self::NoSuchPort { .. } => "`ringway port list` shows the ports".into(),
            Self::TooManyPorts => "delete a port first".into(),
            Self::SocketPath { hint, .. } | Self::Tap { hint, .. } => hint.clone(),
            Self::NoSuchFdbEntry { .. } => "`ringway fdb list` shows the entries".into(),
            Self::FdbRefused { .. } => "`ringway fdb flush` forgets learned entries".into(),
            Self::System { .. } => "see the daemon's log".into(),
        }
    }
}

/// A running switch. All methods may be called from any thread; those that change something run
/// one at a time, and either take full effect or none.
#[derive(Debug)]
pub struct Switch {}

impl Switch {
    /// Starts workers and the vhost-user session thread.
    ///
    /// # Errors
    /// A CPU that can't be used, or threads or epoll instances that can't be made.
    pub fn start(config: SwitchConfig) -> Result<Self, SwitchError> {
        let _ = config;
        todo!()
    }

    /// Adds a port; it forwards as soon as its guest or interface is ready.
    ///
    /// # Errors
    /// A name that is taken, a socket path or interface that can't be used.
    pub fn add_port(&self, name: PortName, config: PortConfig) -> Result<PortInfo, SwitchError> {
        let _ = (name, config);
        todo!()
    }

    /// Removes a port: when this returns, its socket, interface, memory and fds are gone.
    ///
    /// # Errors
    /// There is no such port.
    pub fn remove_port(&self, name: &PortName) -> Result<(), SwitchError> {
        let _ = name;
        todo!()
    }

    /// All ports, by name.
    pub fn ports(&self) -> Vec<PortInfo> {
        todo!()
    }

    /// One port with its queues.
    ///
    /// # Errors
    /// There is no such port.
    pub fn port(&self, name: &PortName) -> Result<PortDetail, SwitchError> {
        let _ = name;
        todo!()
    }

    /// The forwarding database, by address.
    pub fn fdb(&self) -> Vec<FdbEntryInfo> {
        todo!()
    }

    /// Adds a static entry, or makes a learned one static.
    ///
    /// # Errors
    /// No such port, a group address, or the database is full.
    pub fn fdb_add(&self, mac: MacAddr, port: &PortName) -> Result<(), SwitchError> {
        let _ = (mac, port);
        todo!()
    }

    /// Deletes an entry, static or learned.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn fdb_del(&self, mac: MacAddr) -> Result<(), SwitchError> {
        let _ = mac;
        todo!()
    }

    /// Forgets the learned entries of all ports or one, and returns how many.
    ///
    /// # Errors
    /// There is no such port.
    pub fn fdb_flush(&self, port: Option<&PortName>) -> Result<usize, SwitchError> {
        let _ = port;
        todo!()
    }

    /// All workers, by index.
    pub fn workers(&self) -> Vec<WorkerInfo> {
        todo!()
    }

    /// Counters of all pairs of ports that exchanged frames since both were added.
    pub fn pairs(&self) -> Vec<PairCounters> {
        todo!()
    }

    /// Removes all ports and ends all threads.
    pub fn shutdown(self) {
        todo!()
    }
}
