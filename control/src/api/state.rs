//! Parameters and results of the methods about ports, forwarding database, workers and daemon.

use std::time::Duration;

use ringway_dataplane as dataplane;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::measure::Drops;
use super::port::{ModeName, PortSettings};

/// No parameters: absent or `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

/// Nothing to tell but success: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// Parameters of `port.add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortAddParams {
    /// The new port's name: 1 to 63 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
    pub name: String,
    /// Its settings.
    pub config: PortSettings,
}

/// Parameters of `port.del`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortDelParams {
    /// The port.
    pub name: String,
    /// Succeed also if there is no such port.
    #[serde(default)]
    pub if_exists: bool,
}

/// Result of `port.del`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortDelResult {
    /// Whether there was such a port.
    pub deleted: bool,
}

/// Parameters of `port.show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortShowParams {
    /// The port.
    pub name: String,
}

/// Whether frames can pass through a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// No front-end is connected, no queue is started, or the interface is down.
    Down,
    /// At least one queue pair passes frames.
    Up,
}

impl PortState {
    /// The state as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Up => "up",
        }
    }
}

/// Counters of a port since it was added. Rx is what came from the port, Tx what went to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counters {
    /// Frames taken from the port: what its guest transmitted.
    pub rx_frames: u64,
    /// L2 bytes taken from the port, without FCS and virtio-net headers.
    pub rx_bytes: u64,
    /// Of `rx_frames`, TCP segments that were joined to the frame before and travel on as a part of it.
    pub rx_gro_merged: u64,
    /// Frames delivered to the port, each flooded copy and each segment counted: what its guest
    /// received.
    pub tx_frames: u64,
    /// L2 bytes delivered to the port, without FCS and virtio-net headers.
    pub tx_bytes: u64,
    /// Frames from this port that found no destination or broke a rule.
    pub rx_drops: Drops,
    /// Frames, or segments of such, meant for this port that it could not take.
    pub tx_drops: Drops,
    /// Frames delivered whole whose checksum the switch completed, since the port takes no others.
    pub tx_csum_completed: u64,
    /// Frames that the switch cut into segments, since the port does not take them whole. They are
    /// not among `tx_frames`; their segments are, or among `tx_drops`.
    pub tx_gso_frames: u64,
    /// Segments that they became.
    pub tx_gso_segments: u64,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortReport {
    /// Its name.
    pub name: String,
    /// Its slot; reused after removal.
    pub id: u16,
    /// What it was configured with, defaults filled in.
    pub config: PortSettings,
    /// Whether frames pass.
    pub state: PortState,
    /// MAC addresses learned or configured behind it.
    pub fdb_entries: u32,
    /// Its counters since it was added.
    pub counters: Counters,
}

/// Result of `port.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortListResult {
    /// The ports, by name.
    pub ports: Vec<PortReport>,
}

/// One queue pair of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct QueueReport {
    /// Number of the pair, from 0.
    pub index: u16,
    /// The guest's transmit ring (our Rx) is started.
    pub rx_started: bool,
    /// The guest's receive ring (our Tx) is started.
    pub tx_started: bool,
    /// The front-end has enabled the pair.
    pub enabled: bool,
    /// Entries of the guest's transmit ring; 0 while it is stopped, and for a tap.
    pub rx_size: u16,
    /// Entries of the guest's receive ring; 0 while it is stopped, and for a tap.
    pub tx_size: u16,
    /// Number of the worker that polls the pair.
    pub worker: u16,
    /// Frames taken from this pair.
    pub rx_frames: u64,
    /// Frames delivered to this pair.
    pub tx_frames: u64,
    /// Calls (interrupts) sent to the guest.
    pub calls: u64,
    /// Bursts put off because another worker held the ring.
    pub contended: u64,
}

/// What only an AF_XDP port has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AfXdpReport {
    /// The mode in effect: never `auto`.
    pub mode: ModeName,
    /// Id of the XDP program that is attached to the interface.
    pub program_id: u32,
    /// Frames may span several of the memory's chunks.
    pub multi_buffer: bool,
    /// Memory for frames, of all queues.
    pub umem_bytes: u64,
    /// It is in huge pages.
    pub huge_pages: bool,
    /// Its queues, in order.
    pub queues: Vec<AfXdpQueueReport>,
}

/// The rings of one queue of an AF_XDP port, and what the kernel counted since the port was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AfXdpQueueReport {
    /// Number of the queue, from 0.
    pub index: u16,
    /// Entries of each of the four rings.
    pub ring_size: u32,
    /// Chunks in the fill ring: what the kernel can receive into.
    pub fill_level: u32,
    /// Chunks of received frames that wait for the worker.
    pub rx_level: u32,
    /// Chunks in the transmit ring that the kernel has not taken.
    pub tx_level: u32,
    /// Chunks of frames that are to be sent or were, and that the kernel has not given back.
    pub tx_pending: u32,
    /// Frames lost since the receive ring was full.
    pub rx_ring_full: u64,
    /// Times that the kernel found no chunk in the fill ring.
    pub rx_fill_empty: u64,
    /// Frames that the kernel dropped for other reasons: longer than a chunk, for one.
    pub rx_dropped: u64,
    /// Descriptors in the fill ring that the kernel refused.
    pub rx_invalid: u64,
    /// Descriptors in the transmit ring that the kernel refused.
    pub tx_invalid: u64,
}

/// Result of `port.show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortShowResult {
    /// What `port.list` tells of it.
    pub port: PortReport,
    /// Its queue pairs, in order.
    pub queues: Vec<QueueReport>,
    /// virtio features in effect, or offloads of a tap.
    pub features: Vec<String>,
    /// vhost-user protocol features in effect.
    pub protocol_features: Vec<String>,
    /// Times that a front-end connected.
    pub connections: u64,
    /// Guest memory that is mapped.
    pub mapped_bytes: u64,
    /// Guest memory regions that are mapped.
    pub memory_regions: u32,
    /// Why the last session ended or the device broke; null if it did not.
    pub last_error: Option<String>,
    /// L3 MTU in effect, in bytes; null if nobody told one.
    pub mtu: Option<u16>,
    /// Offloads that frames from the port may ask for: `checksum` (to be completed), `tso4`, `tso6`
    /// (TCP to be segmented), `ecn` (with its signal of congestion), `uso4`, `uso6` (UDP).
    pub rx_offloads: Vec<String>,
    /// Offloads that the port takes, likewise.
    pub tx_offloads: Vec<String>,
    /// What is done to headers on the way to each other port, by name.
    pub actions: Vec<HeaderActionReport>,
    /// What only an AF_XDP port has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub af_xdp: Option<AfXdpReport>,
}

/// What is done to the headers of frames from one port to another: the most that any frame needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HeaderActionReport {
    /// The destination.
    pub to: String,
    /// `pass`, `complete_checksum`, `segment` or `segment_and_complete_checksum`.
    pub action: String,
    /// Offloads that pass through.
    pub passed: Vec<String>,
    /// Offloads that the source may ask for and the destination does not take: the switch does them.
    pub done: Vec<String>,
}

/// Parameters of `fdb.list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FdbListParams {
    /// Only the entries of this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
}

/// An entry of the forwarding database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FdbEntry {
    /// The address, as `52:54:00:00:00:01`.
    pub mac: String,
    /// The port behind which it is.
    pub port: String,
    /// Configured, so never aged or moved.
    pub is_static: bool,
    /// Since a frame from it was last seen; 0 for static entries.
    pub age_seconds: f64,
}

/// Result of `fdb.list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FdbListResult {
    /// The entries, by address.
    pub entries: Vec<FdbEntry>,
}

/// Parameters of `fdb.add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FdbAddParams {
    /// The address: six hexadecimal bytes with colons.
    pub mac: String,
    /// The port behind which it is.
    pub port: String,
}

/// Parameters of `fdb.del`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FdbDelParams {
    /// The address: six hexadecimal bytes with colons.
    pub mac: String,
}

/// Parameters of `fdb.flush`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FdbFlushParams {
    /// Only the entries of this port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
}

/// Result of `fdb.flush`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FdbFlushResult {
    /// How many learned entries were forgotten.
    pub flushed: u64,
}

/// A worker thread; counters since the daemon started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerReport {
    /// Its number, from 0.
    pub index: u16,
    /// The CPU it is pinned to; null if it could not be pinned.
    pub cpu: Option<usize>,
    /// Source queues it polls.
    pub queues: u32,
    /// Of these, how many are in its active list now.
    pub active_queues: u32,
    /// Time in turns that moved frames.
    pub busy_ns: u64,
    /// Time polling without finding a frame.
    pub polling_ns: u64,
    /// Time asleep.
    pub asleep_ns: u64,
    /// Turns of the loop.
    pub turns: u64,
    /// Bursts that held frames.
    pub bursts: u64,
    /// Frames taken from source queues.
    pub frames: u64,
    /// Times it slept in epoll.
    pub sleeps: u64,
    /// Bursts that found a ring in other hands: another worker's, or the session's.
    pub contended: u64,
    /// Its busy share of the last interval over which loads were measured, 0 to 1.
    pub recent_busy_share: f64,
}

/// A queue pair that a worker polls.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PolledQueueReport {
    /// The port.
    pub port: String,
    /// Number of the pair, from 0.
    pub queue: u16,
    /// It stays with this worker, whatever its load.
    pub is_pinned: bool,
    /// Frames taken from it since the port was added.
    pub rx_frames: u64,
    /// L2 bytes taken from it since the port was added.
    pub rx_bytes: u64,
    /// Frames taken from it per second, in the last interval.
    pub frames_per_second: f64,
    /// L2 bits taken from it per second, in the last interval.
    pub bits_per_second: f64,
    /// What it cost the worker in the last interval, as part of a core: an estimate from frames and
    /// bytes.
    pub recent_busy_share: f64,
}

/// Result of `worker.show`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerShowResult {
    /// What `worker.list` tells of it.
    pub worker: WorkerReport,
    /// Length of the last interval over which loads were measured; 0 if there was none yet.
    pub interval_seconds: f64,
    /// The queue pairs that it polls, by port and number.
    pub queues: Vec<PolledQueueReport>,
}

/// Parameters of `worker.pin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkerPinParams {
    /// The port.
    pub port: String,
    /// Number of the queue pair, from 0.
    pub queue: u16,
    /// Number of the worker.
    pub worker: u16,
}

/// Parameters of `worker.unpin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkerUnpinParams {
    /// The port.
    pub port: String,
    /// Number of the queue pair, from 0.
    pub queue: u16,
}

/// Result of `worker.unpin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerUnpinResult {
    /// Whether the queue pair was pinned.
    pub was_pinned: bool,
}

/// Result of `worker.list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerListResult {
    /// The workers, by number.
    pub workers: Vec<WorkerReport>,
}

/// Parameters of `worker.show`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkerShowParams {
    /// The worker's number.
    pub index: u16,
}

/// Result of `daemon.info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DaemonReport {
    /// Version of ringwayd.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since it started.
    pub uptime_seconds: f64,
}

/// `duration` in nanoseconds; 584 years at most.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl From<dataplane::PortState> for PortState {
    fn from(state: dataplane::PortState) -> Self {
        match state {
            dataplane::PortState::Down => Self::Down,
            dataplane::PortState::Up => Self::Up,
        }
    }
}

impl From<&dataplane::PortCounters> for Counters {
    fn from(counters: &dataplane::PortCounters) -> Self {
        Self {
            rx_frames: counters.rx_frames,
            rx_bytes: counters.rx_bytes,
            rx_gro_merged: counters.rx_gro_merged,
            tx_frames: counters.tx_frames,
            tx_bytes: counters.tx_bytes,
            rx_drops: (&counters.rx_drops).into(),
            tx_drops: (&counters.tx_drops).into(),
            tx_csum_completed: counters.tx_csum_completed,
            tx_gso_frames: counters.tx_gso_frames,
            tx_gso_segments: counters.tx_gso_segments,
        }
    }
}

impl From<&dataplane::PortInfo> for PortReport {
    fn from(info: &dataplane::PortInfo) -> Self {
        Self {
            name: info.name.to_string(),
            id: info.id.get(),
            config: (&info.config).into(),
            state: info.state.into(),
            fdb_entries: info.fdb_entries,
            counters: (&info.counters).into(),
        }
    }
}

impl From<&dataplane::QueueInfo> for QueueReport {
    fn from(queue: &dataplane::QueueInfo) -> Self {
        Self {
            index: queue.index,
            rx_started: queue.rx_started,
            tx_started: queue.tx_started,
            enabled: queue.enabled,
            rx_size: queue.rx_size,
            tx_size: queue.tx_size,
            worker: queue.worker,
            rx_frames: queue.rx_frames,
            tx_frames: queue.tx_frames,
            calls: queue.calls,
            contended: queue.contended,
        }
    }
}

impl From<&dataplane::PortDetail> for PortShowResult {
    fn from(detail: &dataplane::PortDetail) -> Self {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Self {
            port: (&detail.info).into(),
            queues: detail.queues.iter().map(Into::into).collect(),
            features: owned(&detail.features),
            protocol_features: owned(&detail.protocol_features),
            connections: detail.connections,
            mapped_bytes: detail.mapped_bytes,
            memory_regions: detail.memory_regions,
            last_error: detail.last_error.clone(),
            mtu: detail.mtu,
            rx_offloads: owned(&detail.rx_offloads),
            tx_offloads: owned(&detail.tx_offloads),
            actions: detail
                .actions
                .iter()
                .map(|action| HeaderActionReport {
                    to: action.to.to_string(),
                    action: action.action.to_owned(),
                    passed: owned(&action.passed),
                    done: owned(&action.done),
                })
                .collect(),
            af_xdp: detail.af_xdp.as_ref().map(Into::into),
        }
    }
}

impl From<&dataplane::AfXdpInfo> for AfXdpReport {
    fn from(info: &dataplane::AfXdpInfo) -> Self {
        let queue = |(index, queue): (u16, &dataplane::AfXdpQueueInfo)| AfXdpQueueReport {
            index,
            ring_size: queue.ring_size,
            fill_level: queue.fill_level,
            rx_level: queue.rx_level,
            tx_level: queue.tx_level,
            tx_pending: queue.tx_pending,
            rx_ring_full: queue.rx_ring_full,
            rx_fill_empty: queue.rx_fill_empty,
            rx_dropped: queue.rx_dropped,
            rx_invalid: queue.rx_invalid,
            tx_invalid: queue.tx_invalid,
        };
        Self {
            mode: info.mode.into(),
            program_id: info.program_id,
            multi_buffer: info.multi_buffer,
            umem_bytes: info.umem_bytes,
            huge_pages: info.huge_pages,
            queues: (0..).zip(&info.queues).map(queue).collect(),
        }
    }
}

impl From<&dataplane::FdbEntryInfo> for FdbEntry {
    fn from(entry: &dataplane::FdbEntryInfo) -> Self {
        Self {
            mac: entry.mac.to_string(),
            port: entry.port.to_string(),
            is_static: entry.is_static,
            age_seconds: entry.age.as_secs_f64(),
        }
    }
}

impl From<&dataplane::WorkerInfo> for WorkerReport {
    fn from(worker: &dataplane::WorkerInfo) -> Self {
        Self {
            index: worker.index,
            cpu: worker.cpu,
            queues: worker.queues,
            active_queues: worker.active_queues,
            busy_ns: nanos(worker.busy),
            polling_ns: nanos(worker.polling),
            asleep_ns: nanos(worker.asleep),
            turns: worker.turns,
            bursts: worker.bursts,
            frames: worker.frames,
            sleeps: worker.sleeps,
            contended: worker.contended,
            recent_busy_share: worker.recent_busy,
        }
    }
}

impl From<&dataplane::PolledQueue> for PolledQueueReport {
    fn from(queue: &dataplane::PolledQueue) -> Self {
        Self {
            port: queue.port.to_string(),
            queue: queue.pair,
            is_pinned: queue.is_pinned,
            rx_frames: queue.rx_frames,
            rx_bytes: queue.rx_bytes,
            frames_per_second: queue.frames_per_second,
            bits_per_second: queue.bits_per_second,
            recent_busy_share: queue.recent_busy,
        }
    }
}

impl From<&dataplane::WorkerDetail> for WorkerShowResult {
    fn from(detail: &dataplane::WorkerDetail) -> Self {
        Self {
            worker: (&detail.info).into(),
            interval_seconds: detail.interval.as_secs_f64(),
            queues: detail.queues.iter().map(Into::into).collect(),
        }
    }
}
