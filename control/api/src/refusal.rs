//! Why the switch refuses something.

use std::path::PathBuf;

use ringway_bridge::MacAddr;

use crate::value::{IfName, PortName};

/// Why the switch refused.
#[derive(Debug, thiserror::Error)]
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
    /// The port has no such queue pair.
    #[error("port {port} has no queue {pair}")]
    NoSuchQueue {
        /// The port.
        port: PortName,
        /// The queue pair.
        pair: u16,
        /// How many it has.
        pairs: u16,
    },
    /// There is no worker of that number.
    #[error("there is no worker {worker}")]
    NoSuchWorker {
        /// The number.
        worker: u16,
        /// How many there are.
        workers: u16,
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
        ifname: IfName,
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The interface can't be used through AF_XDP.
    #[error("can't use {ifname} through AF_XDP: {reason}")]
    AfXdp {
        /// The interface.
        ifname: IfName,
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
    /// A filter of a capture does not compile.
    #[error("filter {filter:?}: {reason}")]
    Filter {
        /// The filter.
        filter: String,
        /// What the compiler says.
        reason: String,
    },
    /// As many clients as may have a stream of this kind already.
    #[error("{most} clients listen to {what} already")]
    TooManyStreams {
        /// What they listen to.
        what: &'static str,
        /// How many may.
        most: usize,
    },
    /// The address is in several VLANs.
    #[error("{mac} is in several VLANs: {vlans}")]
    SeveralVlans {
        /// The address.
        mac: MacAddr,
        /// The VLANs, as `10,20-30`.
        vlans: String,
    },
    /// The port is not in the VLAN, or it is not said which of its VLANs is meant.
    #[error("{reason}")]
    VlanOfPort {
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: String,
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
            Self::NoSuchQueue { pairs, .. } => match pairs.saturating_sub(1) {
                0 => "its only queue is 0".into(),
                last => format!("its queues are 0 to {last}"),
            },
            Self::NoSuchWorker { workers, .. } => match workers.saturating_sub(1) {
                0 => "the only worker is 0; --worker-cpus gives the daemon more".into(),
                last => format!("the workers are 0 to {last}; `ringway worker list` shows them"),
            },
            Self::TooManyPorts => "delete a port first".into(),
            Self::SocketPath { hint, .. }
            | Self::Tap { hint, .. }
            | Self::AfXdp { hint, .. }
            | Self::VlanOfPort { hint, .. } => hint.clone(),
            Self::SeveralVlans { .. } => "say which by --vlan".into(),
            Self::NoSuchFdbEntry { .. } => "`ringway fdb list` shows the entries".into(),
            Self::FdbRefused { .. } => {
                "an entry is a station's own address; `ringway fdb flush` makes room".into()
            }
            Self::Filter { .. } => "pcap-filter(7) tells what filters are like".into(),
            Self::TooManyStreams { .. } => {
                "end one of them: `ss -xp` shows the clients of the control socket".into()
            }
            // EMFILE.
            Self::System { source, .. } if source.raw_os_error() == Some(24) => {
                "raise LimitNOFILE= of the unit (`ulimit -Hn` of a shell), or remove ports".into()
            }
            Self::System { .. } => "see the daemon's log".into(),
        }
    }
}
