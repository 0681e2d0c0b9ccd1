//! What a [`crate::Switch`] tells about itself: snapshots, all counters since the port was added.
//!
//! Rx and Tx are from the switch's point of view: what a guest transmits is our Rx. Bytes are L2
//! bytes without the FCS and without virtio-net headers.

use std::time::Duration;

use ringway_api::{PortConfig, PortName, XdpMode};
use ringway_bridge::{DropCounts, MacAddr, PortId};

/// Whether frames can pass through a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// No front-end is connected, no queue is started, or the interface is down.
    Down,
    /// At least one queue pair passes frames.
    Up,
}

/// Frames and bytes of a port or queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Frames taken from the port.
    pub rx_frames: u64,
    /// L2 bytes taken from the port.
    pub rx_bytes: u64,
    /// Of `rx_frames`, TCP segments that were joined to the frame before and travel on as a part of it.
    pub rx_gro_merged: u64,
    /// Frames delivered to the port, each flooded copy and each segment counted.
    pub tx_frames: u64,
    /// L2 bytes delivered to the port.
    pub tx_bytes: u64,
    /// Frames from this port that found no destination or broke a rule, by reason.
    pub rx_drops: DropCounts,
    /// Frames, or segments of such, meant for this port that it could not take, by reason.
    pub tx_drops: DropCounts,
    /// Frames delivered whole to the port whose checksum was completed, since it takes no others.
    pub tx_csum_completed: u64,
    /// Frames that were cut into segments, since the port does not take them whole. None of them is
    /// in `tx_frames`; their segments are, or in `tx_drops`. So over all ports, frames received, and
    /// flooded copies, are as many as frames delivered and dropped, plus `rx_gro_merged`, less `tx_gso_segments - tx_gso_frames`.
    pub tx_gso_frames: u64,
    /// Segments that they became.
    pub tx_gso_segments: u64,
}

/// A port in a listing.
#[derive(Clone, Debug)]
pub struct PortInfo {
    /// Its name.
    pub name: PortName,
    /// Its slot; reused after removal.
    pub id: PortId,
    /// What it was configured with.
    pub config: PortConfig,
    /// Whether frames pass.
    pub state: PortState,
    /// Its counters since it was added.
    pub counters: PortCounters,
    /// MAC addresses learned or configured behind it.
    pub fdb_entries: u32,
}

/// One queue pair of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// Number of the pair, from 0.
    pub index: u16,
    /// The guest's transmit ring (our Rx) is started.
    pub rx_started: bool,
    /// The guest's receive ring (our Tx) is started.
    pub tx_started: bool,
    /// The front-end has enabled the pair.
    pub enabled: bool,
    /// Entries of the guest's transmit ring, 0 while it is stopped or for a tap.
    pub rx_size: u16,
    /// Entries of the guest's receive ring, 0 while it is stopped or for a tap.
    pub tx_size: u16,
    /// The worker that polls the pair.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AfXdpInfo {
    /// The interface.
    pub ifname: String,
    /// The mode in effect: never [`XdpMode::Auto`].
    pub mode: XdpMode,
    /// Id of the XDP program that is attached to the interface.
    pub program_id: u32,
    /// Frames may span several of the UMEM's chunks (XDP_USE_SG).
    pub multi_buffer: bool,
    /// Bytes of all queues' UMEMs.
    pub umem_bytes: u64,
    /// They are in huge pages.
    pub huge_pages: bool,
    /// Its queues in order.
    pub queues: Vec<AfXdpQueueInfo>,
}

/// The rings of one queue of an AF_XDP port, and what the kernel counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AfXdpQueueInfo {
    /// Entries of each of the four rings.
    pub ring_size: u32,
    /// Chunks in the fill ring: what the kernel can receive into.
    pub fill_level: u32,
    /// Chunks of received frames that wait for the worker.
    pub rx_level: u32,
    /// Chunks in the transmit ring that the kernel has not taken.
    pub tx_level: u32,
    /// Chunks of frames that were sent or are to be, and that the kernel has not given back.
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

/// All that `port show` tells.
#[derive(Clone, Debug)]
pub struct PortDetail {
    /// What the listing tells.
    pub info: PortInfo,
    /// Its queue pairs in order.
    pub queues: Vec<QueueInfo>,
    /// Names of the virtio features in effect (`VIRTIO_NET_F_MRG_RXBUF`, …), or for a tap of its
    /// offloads.
    pub features: Vec<&'static str>,
    /// Names of the vhost-user protocol features in effect.
    pub protocol_features: Vec<&'static str>,
    /// Times that a front-end connected.
    pub connections: u64,
    /// Guest memory that is mapped, in bytes.
    pub mapped_bytes: u64,
    /// Guest memory regions that are mapped.
    pub memory_regions: u32,
    /// Why the last session ended or the device broke, if it did.
    pub last_error: Option<String>,
    /// L3 MTU in effect: configured, or told by the front-end.
    pub mtu: Option<u16>,
    /// Offloads that frames from the port may ask for: `checksum`, `tso4`, `tso6`, `ecn`, `uso4`,
    /// `uso6`.
    pub rx_offloads: Vec<&'static str>,
    /// Offloads that the port takes.
    pub tx_offloads: Vec<&'static str>,
    /// What is done to headers on the way to each other port.
    pub actions: Vec<HeaderAction>,
    /// What only an AF_XDP port has.
    pub af_xdp: Option<AfXdpInfo>,
}

/// What is done to the headers of frames from one port to another: the most that any frame needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderAction {
    /// The destination.
    pub to: PortName,
    /// `pass`, `complete_checksum`, `segment` or `segment_and_complete_checksum`.
    pub action: &'static str,
    /// Offloads that pass through.
    pub passed: Vec<&'static str>,
    /// Offloads that the source may ask for and the switch does, since the destination does not.
    pub done: Vec<&'static str>,
}

/// A row of the forwarding database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbEntryInfo {
    /// The address.
    pub mac: MacAddr,
    /// The port behind which it is.
    pub port: PortName,
    /// Configured, so never aged or moved.
    pub is_static: bool,
    /// Since a frame from it was last seen; zero for static entries.
    pub age: Duration,
}

/// A worker thread.
#[derive(Clone, Debug)]
pub struct WorkerInfo {
    /// Its number, from 0.
    pub index: u16,
    /// The CPU it is pinned to, or `None` if it could not be pinned.
    pub cpu: Option<usize>,
    /// Source queues it polls.
    pub queues: u32,
    /// Of these, how many are in its active list now.
    pub active_queues: u32,
    /// Time spent in turns that moved frames.
    pub busy: Duration,
    /// Time spent polling without finding a frame.
    pub polling: Duration,
    /// Time asleep.
    pub asleep: Duration,
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
    pub recent_busy: f64,
}

/// A queue pair that a worker polls.
#[derive(Clone, Debug)]
pub struct PolledQueue {
    /// The port.
    pub port: PortName,
    /// The queue pair.
    pub pair: u16,
    /// It stays with this worker, whatever its load.
    pub is_pinned: bool,
    /// Frames taken from it since the port was added.
    pub rx_frames: u64,
    /// L2 bytes taken from it since the port was added.
    pub rx_bytes: u64,
    /// Frames taken per second, in the last interval.
    pub frames_per_second: f64,
    /// L2 bits taken per second, in the last interval.
    pub bits_per_second: f64,
    /// What it cost the worker in the last interval, as part of a core: an estimate from frames and
    /// bytes.
    pub recent_busy: f64,
}

/// All that `worker show` tells.
#[derive(Clone, Debug)]
pub struct WorkerDetail {
    /// What the listing tells.
    pub info: WorkerInfo,
    /// Length of the interval over which loads were measured last; zero if there was none yet.
    pub interval: Duration,
    /// The queue pairs that it polls, by port.
    pub queues: Vec<PolledQueue>,
}

/// Frames from one port to another.
#[derive(Clone, Debug)]
pub struct PairCounters {
    /// The source.
    pub from: PortName,
    /// The destination.
    pub to: PortName,
    /// Frames delivered, each flooded copy counted.
    pub frames: u64,
    /// L2 bytes delivered.
    pub bytes: u64,
    /// Frames for this destination that it could not take, by reason.
    pub drops: DropCounts,
}
