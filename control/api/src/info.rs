//! What the switch tells about itself: snapshots, all counters since the port was added.
//!
//! Rx and Tx are from the switch's point of view: what a guest transmits is our Rx. Bytes are L2
//! bytes without the FCS and without virtio-net headers.

use ringway_bridge::{MacAddr, PortId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::measure::Drops;
use crate::port::{PortConfig, XdpMode};
use crate::value::PortName;

/// Whether frames can pass through a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PortState {
    /// No front-end is connected, no queue is started, or the interface is down.
    Down,
    /// At least one queue pair passes frames, and none one way only.
    Up,
    /// A queue pair passes frames one way only, the port is blocked since a loop was seen, or its guest kicks and shows none, or another program
    /// has the tap open as well and takes a part of its frames: `last_error` says which.
    Impaired,
}

impl PortState {
    /// The state as it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Up => "up",
            Self::Impaired => "impaired",
        }
    }
}

/// PortCounters of a port since it was added. Rx is what came from the port, Tx what went to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortCounters {
    /// Frames taken from the port: what its guest transmitted.
    pub rx_frames: u64,
    /// L2 bytes taken from the port, without FCS and virtio-net headers.
    pub rx_bytes: u64,
    /// Of `rx_frames`, TCP segments that were joined to the frame before and travel on as a part of
    /// it.
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
    /// Learned addresses that moved to the port from another.
    pub fdb_moves: u64,
    /// Frames from the port with a source address that was in use behind another port a moment ago,
    /// and so did not move here: a spoof, a loop, or a station that moved too fast.
    pub fdb_moves_refused: u64,
    /// Addresses learned behind the port that made room in the full database for ports with fewer.
    pub fdb_evictions: u64,
    /// Frames whose source was not learned since the port has as many addresses as it may.
    pub fdb_limit_hits: u64,
    /// Frames whose source was not learned since the database is full and the port has its share.
    pub fdb_refused_full: u64,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortInfo {
    /// Its name.
    pub name: PortName,
    /// Its slot; reused after removal.
    pub id: PortId,
    /// What it was configured with, defaults filled in.
    pub config: PortConfig,
    /// Whether frames pass.
    pub state: PortState,
    /// MAC addresses learned or configured behind it.
    pub fdb_entries: u32,
    /// Its counters since it was added.
    pub counters: PortCounters,
}

/// One queue pair of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct QueueInfo {
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
    /// The guest's transmit ring went on at its used index when it started: its front-end said 0
    /// of a ring that had been used, as DPDK's virtio_user does after a restart of ours. Frames of
    /// the last burst before may come twice.
    pub rx_resumed: bool,
    /// The same of the guest's receive ring.
    pub tx_resumed: bool,
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
    /// Frames taken from the guest since its transmit ring started although their descriptors broke
    /// a rule, which does no harm: DPDK's virtio_user marks buffers in an indirect table of a packed
    /// ring as ones to be written.
    pub tolerated: u64,
}

/// What only an AF_XDP port has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AfXdpInfo {
    /// The mode in effect: never `auto`.
    pub mode: XdpMode,
    /// Id of the XDP program that is attached to the interface.
    pub program_id: u32,
    /// Frames may span several of the memory's chunks.
    pub multi_buffer: bool,
    /// Memory for frames, of all queues.
    pub umem_bytes: u64,
    /// It is in huge pages.
    pub huge_pages: bool,
    /// Its queues, in order.
    pub queues: Vec<AfXdpQueueInfo>,
}

/// The rings of one queue of an AF_XDP port, and what the kernel counted since the port was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AfXdpQueueInfo {
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
pub struct PortDetail {
    /// What `port.list` tells of it.
    pub port: PortInfo,
    /// Its queue pairs, in order.
    pub queues: Vec<QueueInfo>,
    /// virtio features in effect, or offloads of a tap.
    pub features: Vec<String>,
    /// vhost-user protocol features in effect.
    pub protocol_features: Vec<String>,
    /// Times that a front-end connected.
    pub connections: u64,
    /// Time that workers spent in calls (interrupts) to the guest since the port was added.
    pub call_ns: u64,
    /// Milliseconds in which no front-end may use the port, since calls to the one before were slow
    /// or blocked; null if one may.
    pub closed_for_ms: Option<u64>,
    /// Guest memory that is mapped.
    pub mapped_bytes: u64,
    /// Guest memory regions that are mapped.
    pub memory_regions: u32,
    /// Why the last session ended or the device broke, or what is wrong with the interface and what to
    /// do about it; null if all is well.
    pub last_error: Option<String>,
    /// L3 MTU in effect, in bytes; null if nobody told one, or there is no interface.
    pub mtu: Option<u16>,
    /// Offloads that frames from the port may ask for: `checksum` (to be completed), `tso4`, `tso6`
    /// (TCP to be segmented), `ecn` (with its signal of congestion), `uso4`, `uso6` (UDP).
    pub rx_offloads: Vec<String>,
    /// Offloads that the port takes, likewise.
    pub tx_offloads: Vec<String>,
    /// What is done to headers on the way to each other port, by name.
    pub actions: Vec<HeaderAction>,
    /// What only an AF_XDP port has, while its interface is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub af_xdp: Option<AfXdpInfo>,
}

/// What is done to the headers of frames from one port to another: the most that any frame needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HeaderAction {
    /// The destination.
    pub to: PortName,
    /// `pass`, `complete_checksum`, `segment` or `segment_and_complete_checksum`.
    pub action: String,
    /// Offloads that pass through.
    pub passed: Vec<String>,
    /// Offloads that the source may ask for and the destination does not take: the switch does
    /// them.
    pub done: Vec<String>,
}

/// VLANs with the same ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VlanInfo {
    /// The VLANs, as `10,20-30`; 0 is where untagged frames are of ports that say nothing.
    pub vlans: String,
    /// The ports that its frames leave with its tag, by name.
    pub tagged: Vec<PortName>,
    /// The ports that its frames leave without, by name.
    pub untagged: Vec<PortName>,
}

/// An entry of the forwarding database.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FdbEntry {
    /// The address, as `52:54:00:00:00:01`.
    pub mac: MacAddr,
    /// The VLAN in which it is there; 0 where untagged frames are of ports that say nothing of VLANs.
    pub vlan: u16,
    /// The port behind which it is.
    pub port: PortName,
    /// Configured, so never aged or moved.
    pub is_static: bool,
    /// Since a frame from it was last seen; 0 for static entries.
    pub age_seconds: f64,
}

/// A worker thread; counters since the daemon started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerInfo {
    /// Its number, from 0.
    pub index: u16,
    /// The CPU it is pinned to.
    pub cpu: usize,
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
pub struct PolledQueue {
    /// The port.
    pub port: PortName,
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
pub struct WorkerDetail {
    /// What `worker.list` tells of it.
    pub worker: WorkerInfo,
    /// Length of the last interval over which loads were measured; 0 if there was none yet.
    pub interval_seconds: f64,
    /// The queue pairs that it polls, by port and number.
    pub queues: Vec<PolledQueue>,
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
