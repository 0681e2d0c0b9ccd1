//! Copies of frames for whoever captures them.
//!
//! ```text
//!   worker: burst --> Tap: filter, first bytes --> ring of bytes, one for each worker
//!                                                     |  full: the copy is lost, and counted
//!   thread of the capture's client: CaptureReader <---+
//! ```
//! A worker has a [`Taps`] only while somebody captures. Frames of ports that nobody captures cost a
//! look for each burst then, and nothing otherwise. Nothing waits, allocates or makes a system call
//! in a worker for it.

mod filter;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringway_bridge::{DropReason, FrameSet, MAX_PORTS, PortId};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

pub(crate) use self::filter::Filter;
use crate::burst::Burst;
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};

/// Bytes that wait in each worker for the client of a capture: some 10 ms of a worker's frames.
const RING_BYTES: usize = 4 << 20;

/// Longest frame that is copied: an IP packet of 64 KiB behind its headers.
const LONGEST: usize = 65_535 + 22;

/// What precedes each frame in a ring.
const RECORD_BYTES: usize = 24;

/// How often a capture's client looks whether there is something: workers ring no bell.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A port that no tap has among its ports.
const NOT_CAPTURED: u16 = u16::MAX;

/// Whether a frame is on its way from a port into the switch, or out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Taken from the port: what its guest sent.
    In,
    /// For the port: what its guest receives.
    Out,
}

/// A frame that was captured, or that could not be delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedFrame {
    /// The number of its port among those that are captured.
    pub interface: u16,
    /// When, in nanoseconds since 1970 (UTC): the same for all frames of a burst.
    pub unix_ns: u64,
    /// Which way.
    pub direction: Direction,
    /// The queue pair that it came from; `None` on the way out.
    pub queue: Option<u16>,
    /// Why it went no further.
    pub dropped: Option<DropReason>,
    /// L2 bytes.
    pub wire_bytes: u32,
    /// The first of these.
    pub bytes: Vec<u8>,
}

/// Copies that got lost since the capture began, by the number of the port: one cell for each.
type Lost = Arc<[AtomicU64]>;

/// One capture's part of a worker.
#[derive(Debug)]
pub(crate) struct Tap {
    id: u64,
    /// By port: its number among those that are captured.
    interfaces: Box<[u16]>,
    snap_bytes: usize,
    filter: Option<Filter>,
    ring: rtrb::Producer<u8>,
    lost: Lost,
}

/// All captures of a worker.
#[derive(Debug)]
pub(crate) struct Taps {
    all: Vec<Tap>,
    frame: Box<[u8]>,
    /// Frames given back to their source queue, which will come again: they were copied already.
    given_back: HashMap<(PortId, u16), u32>,
}

/// Frames of one burst, at one place of their way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Passing {
    pub(crate) port: PortId,
    pub(crate) direction: Direction,
    pub(crate) queue: Option<u16>,
    pub(crate) frames: FrameSet,
    pub(crate) dropped: Option<DropReason>,
}

impl Taps {
    pub(crate) fn new() -> Self {
        Self {
            all: Vec::new(),
            frame: vec![0; LONGEST].into(),
            given_back: HashMap::new(),
        }
    }

    pub(crate) fn add(&mut self, tap: Tap) {
        self.all.push(tap);
    }

    /// Ends a capture; true if it was the last one.
    pub(crate) fn remove(&mut self, id: u64) -> bool {
        self.all.retain(|tap| tap.id != id);
        self.all.is_empty()
    }

    /// Captures a port no more, which is gone for good.
    pub(crate) fn forget(&mut self, port: PortId) {
        for tap in &mut self.all {
            tap.interfaces[port.index()] = NOT_CAPTURED;
        }
        self.given_back.retain(|(of, _), _| *of != port);
    }

    /// Copies a burst that was taken from a queue, which the bridge has decided on: `dropped` are
    /// those that go no further.
    #[cold]
    pub(crate) fn arrivals<'d>(
        &mut self,
        (port, queue): (PortId, u16),
        burst: &Burst<'_>,
        dropped: impl Iterator<Item = &'d (DropReason, FrameSet)>,
    ) {
        let again = self.given_back.remove(&(port, queue)).unwrap_or(0);
        let seen = FrameSet::range(0, (again as usize).min(burst.len()));
        let mut passed = FrameSet::range(0, burst.len()) - seen;
        let all = Passing {
            port,
            direction: Direction::In,
            queue: Some(queue),
            frames: passed,
            dropped: None,
        };
        for (reason, frames) in dropped {
            passed -= *frames;
            self.copy(
                burst,
                Passing {
                    frames: *frames - seen,
                    dropped: Some(*reason),
                    ..all
                },
            );
        }
        self.copy(
            burst,
            Passing {
                frames: passed,
                ..all
            },
        );
    }

    /// Notes how many frames a queue has to give once more.
    #[cold]
    pub(crate) fn gave_back(&mut self, from: (PortId, u16), frames: u32) {
        if frames > 0 {
            self.given_back.insert(from, frames);
        }
    }

    /// Copies frames to all captures that want them.
    #[cold]
    pub(crate) fn copy(&mut self, burst: &Burst<'_>, passing: Passing) {
        if passing.frames.is_empty() {
            return;
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let unix_ns = since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        });
        for tap in &mut self.all {
            let interface = tap.interfaces[passing.port.index()];
            if interface == NOT_CAPTURED {
                continue;
            }
            for index in passing.frames.iter() {
                let read = tap.wanted_bytes(burst, index);
                let bytes = read_frame(burst, index, &mut self.frame[..read]);
                let head = Head {
                    unix_ns,
                    wire_bytes: burst.total_bytes(index).saturating_sub(HEADER_BYTES),
                    interface,
                    queue: passing.queue,
                    direction: passing.direction,
                    dropped: passing.dropped,
                };
                tap.offer(head, &self.frame[..bytes]);
            }
        }
    }
}

/// Reads the beginning of a frame as far as there is room; returns how much that is.
fn read_frame(burst: &Burst<'_>, index: usize, to: &mut [u8]) -> usize {
    let is_rejected = |(_, frames): &(DropReason, FrameSet)| frames.contains(index);
    if burst.rejected().iter().any(is_rejected) {
        // It has no snapshot to rely on.
        return burst.pieces(index).skip(HEADER_BYTES).read(to);
    }
    // What is delivered: the source may have changed its buffers since.
    let seen = burst.snapshot_bytes(index);
    let head = &burst.snapshot(index)[HEADER_LEN..seen as usize];
    let from_head = head.len().min(to.len());
    to[..from_head].copy_from_slice(&head[..from_head]);
    let rest = &mut to[from_head..];
    from_head + burst.body(index, seen).read(rest)
}

impl Tap {
    /// How much of a frame has to be read: a filter may ask how long it is.
    fn wanted_bytes(&self, burst: &Burst<'_>, index: usize) -> usize {
        let most = match self.filter {
            Some(_) => LONGEST,
            None => self.snap_bytes.min(LONGEST),
        };
        (burst.total_bytes(index) as usize)
            .saturating_sub(HEADER_LEN)
            .min(most)
    }

    fn offer(&mut self, head: Head, frame: &[u8]) {
        let is_wanted = |filter: &Filter| filter.matches(frame);
        if !self.filter.as_ref().is_none_or(is_wanted) {
            return;
        }
        let bytes = &frame[..frame.len().min(self.snap_bytes)];
        if self.ring.slots() < RECORD_BYTES + bytes.len() {
            self.lost[usize::from(head.interface)].fetch_add(1, Ordering::Relaxed);
            return;
        }
        // There is room for both, and a reader that sees the first waits for the second.
        let _ = self.ring.push_entire_slice(&head.encode(bytes.len()));
        let _ = self.ring.push_entire_slice(bytes);
    }
}

/// What is kept of a frame beside its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    unix_ns: u64,
    wire_bytes: u32,
    interface: u16,
    queue: Option<u16>,
    direction: Direction,
    dropped: Option<DropReason>,
}

/// That of a frame that came from no queue.
const NO_QUEUE: u16 = u16::MAX;

impl Head {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a frame is shorter than 2^17, and there are few reasons"
    )]
    fn encode(self, bytes: usize) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[..8].copy_from_slice(&self.unix_ns.to_le_bytes());
        record[8..12].copy_from_slice(&self.wire_bytes.to_le_bytes());
        record[12..16].copy_from_slice(&(bytes as u32).to_le_bytes());
        record[16..18].copy_from_slice(&self.interface.to_le_bytes());
        record[18..20].copy_from_slice(&self.queue.unwrap_or(NO_QUEUE).to_le_bytes());
        record[20] = u8::from(self.direction == Direction::Out);
        record[21] = self.dropped.map_or(0, |reason| reason as u8 + 1);
        record
    }

    fn decode(record: &[u8; RECORD_BYTES]) -> (Self, usize) {
        let u16_at = |at: usize| u16::from_le_bytes([record[at], record[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let queue = u16_at(18);
        let head = Self {
            unix_ns: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            wire_bytes: u32_at(8),
            interface: u16_at(16),
            queue: (queue != NO_QUEUE).then_some(queue),
            direction: if record[20] == 0 {
                Direction::In
            } else {
                Direction::Out
            },
            dropped: usize::from(record[21])
                .checked_sub(1)
                .map(|at| DropReason::ALL[at]),
        };
        (head, u32_at(12) as usize)
    }
}

/// Both ends of a capture.
pub(crate) struct Ends {
    /// One for each worker.
    pub(crate) taps: Vec<Tap>,
    pub(crate) rings: CaptureRings,
}

/// The reader's ends of a capture's rings.
#[derive(Debug)]
pub(crate) struct CaptureRings {
    rings: Vec<rtrb::Consumer<u8>>,
    lost: Lost,
}

/// Makes a capture of these ports for as many workers as there are filters, each of which may be
/// absent.
pub(crate) fn make(
    id: u64,
    ports: &[PortId],
    snap_bytes: u32,
    filters: Vec<Option<Filter>>,
) -> Ends {
    let mut interfaces = vec![NOT_CAPTURED; MAX_PORTS].into_boxed_slice();
    for (number, port) in (0..).zip(ports) {
        interfaces[port.index()] = number;
    }
    let lost: Lost = ports.iter().map(|_| AtomicU64::new(0)).collect();
    let mut rings = Vec::new();
    let taps = filters.into_iter().map(|filter| {
        let (ring, read) = rtrb::RingBuffer::new(RING_BYTES);
        rings.push(read);
        Tap {
            id,
            interfaces: interfaces.clone(),
            snap_bytes: snap_bytes as usize,
            filter,
            ring,
            lost: Arc::clone(&lost),
        }
    });
    let taps = taps.collect();
    Ends {
        taps,
        rings: CaptureRings { rings, lost },
    }
}

impl CaptureRings {
    /// The next frame, of those that wait in the workers the one that passed first.
    pub(crate) fn next(&mut self) -> Option<CapturedFrame> {
        let heads = self.rings.iter_mut().enumerate().filter_map(|(at, ring)| {
            let head = peek(ring)?;
            Some((head.0.unix_ns, at, head))
        });
        let (_, at, (head, len)) = heads.min_by_key(|(unix_ns, at, _)| (*unix_ns, *at))?;
        let chunk = self.rings[at].read_chunk(RECORD_BYTES + len).ok()?;
        let (first, second) = chunk.as_slices();
        let bytes = first.iter().chain(second).skip(RECORD_BYTES).copied();
        let frame = CapturedFrame {
            interface: head.interface,
            unix_ns: head.unix_ns,
            direction: head.direction,
            queue: head.queue,
            dropped: head.dropped,
            wire_bytes: head.wire_bytes,
            bytes: bytes.collect(),
        };
        chunk.commit_all();
        Some(frame)
    }

    /// Copies lost so far, by the number of the port.
    pub(crate) fn lost(&self) -> Vec<u64> {
        let lost = self.lost.iter();
        lost.map(|lost| lost.load(Ordering::Relaxed)).collect()
    }
}

/// What the next frame in a ring is like, if it is there whole.
fn peek(ring: &mut rtrb::Consumer<u8>) -> Option<(Head, usize)> {
    let waiting = ring.slots();
    // Not committed, it stays where it is.
    let chunk = ring.read_chunk(RECORD_BYTES).ok()?;
    let (first, second) = chunk.as_slices();
    let mut record = [0; RECORD_BYTES];
    record[..first.len()].copy_from_slice(first);
    record[first.len()..].copy_from_slice(second);
    let (head, len) = Head::decode(&record);
    (waiting >= RECORD_BYTES + len).then_some((head, len))
}

/// An fd that is readable each time that a capture is to be looked at.
///
/// # Errors
/// There is no fd left.
pub(crate) fn clock() -> io::Result<OwnedFd> {
    let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
    let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
    let interval = Timespec {
        tv_sec: 0,
        tv_nsec: LOOK_INTERVAL.subsec_nanos().into(),
    };
    let regular = Itimerspec {
        it_interval: interval,
        it_value: interval,
    };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &regular)?;
    Ok(timer)
}
