//! A guest of the load: a front-end whose buffers stay where they are.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringway_guest::features::{
    self, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{
    DeviceStart, Direction, DriverMemory, EventFd, Frontend, Lane, LaneShape, Layout, RingOptions,
    RingStart, Segment, UsedSlot, WANTED_PROTOCOL_FEATURES, Window,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::LoadError;
use super::frame::{MAX_PLAIN, Template};
use crate::interrupt;

/// Slots made available or taken back at once; peers use bursts of 32.
pub(crate) const BURST: usize = 64;
/// Fewer slots than this wait for company, unless nothing else is going on.
const WORTH_A_PUSH: u16 = 32;

/// Bytes of a mergeable receive buffer, and the distance from one buffer to the next: that of
/// DPDK's packet buffers.
const MERGE_BUFFER: u32 = 2048;
const BUFFER_STRIDE: u32 = 2304;

/// How long a back-end may take to answer a request.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks whether the run is to end.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// How the guests of a load drive their rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layout: Layout,
    pub(crate) mergeable: bool,
    pub(crate) in_order: bool,
    pub(crate) event_idx: bool,
    /// The virtio-net header has a buffer of its own.
    pub(crate) chained: bool,
    /// The two buffers of a chain lie in an indirect table.
    pub(crate) indirect: bool,
    /// Segmentation offload, also if no frame needs it.
    pub(crate) tso: bool,
    /// Checksum offload.
    pub(crate) checksum: bool,
    pub(crate) queue_size: u16,
    pub(crate) queues: u16,
    pub(crate) huge: bool,
}

impl Shape {
    fn per_slot(self) -> u16 {
        if self.chained { 2 } else { 1 }
    }

    /// Chains that a ring holds.
    pub(crate) fn slots(self) -> u16 {
        if self.indirect {
            self.queue_size
        } else {
            self.queue_size / self.per_slot()
        }
    }

    fn ring_options(self, features: u64) -> RingOptions {
        RingOptions {
            event_idx: features & VIRTIO_RING_F_EVENT_IDX != 0,
            in_order: features & VIRTIO_F_IN_ORDER != 0,
            indirect: if self.indirect { self.per_slot() } else { 0 },
        }
    }
}

/// Memory of the buffers of one lane.
#[derive(Debug)]
pub(crate) struct BufferSpace {
    window: Window,
    addr: u64,
    stride: u32,
}

impl BufferSpace {
    fn new(memory: &Arc<DriverMemory>, count: u16, stride: u32) -> Result<Self, LoadError> {
        let bytes = u64::from(count) * u64::from(stride);
        let addr = memory.alloc(bytes, 64)?;
        let window = memory.window(addr, bytes)?;
        Ok(Self {
            window,
            addr,
            stride,
        })
    }

    /// Copies bytes into a slot's buffer.
    #[inline]
    pub(crate) fn write(&self, slot: u16, offset: usize, bytes: &[u8]) {
        let at = usize::from(slot) * self.stride as usize + offset;
        self.window.write(at, bytes);
    }

    /// Copies bytes out of a slot's buffer.
    #[inline]
    pub(crate) fn read(&self, slot: u16, offset: usize, bytes: &mut [u8]) {
        let at = usize::from(slot) * self.stride as usize + offset;
        self.window.read(at, bytes);
    }

    fn segments(&self, slot: u16, len: u32, chained: bool) -> Vec<Segment> {
        let addr = self.addr + u64::from(slot) * u64::from(self.stride);
        if chained {
            vec![
                Segment { addr, len: 12 },
                Segment {
                    addr: addr + 12,
                    len: len.saturating_sub(12),
                },
            ]
        } else {
            vec![Segment { addr, len }]
        }
    }
}

/// What a queue pair did in one turn.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    /// Frames whose last buffer arrived.
    pub(crate) received: u64,
    /// Bytes that arrived, virtio-net headers included.
    pub(crate) bytes: u64,
    /// Frames made available.
    pub(crate) sent: u64,
}

impl std::ops::AddAssign for Turn {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.received += other.received;
        self.bytes += other.bytes;
        self.sent += other.sent;
    }
}

/// A queue pair of a load's guest.
#[derive(Debug)]
pub(crate) struct LoadPair {
    pub(crate) tx: Lane,
    pub(crate) rx: Lane,
    pub(crate) tx_space: BufferSpace,
    pub(crate) rx_space: BufferSpace,
    /// Bytes of a receive buffer.
    rx_len: u32,
    tx_kick: EventFd,
    rx_kick: EventFd,
    /// Nobody waits on it: the load polls.
    call: EventFd,
    /// What arrived of a frame whose last buffer did not.
    partial: Vec<u8>,
    /// The beginning of the frame that is arriving was not looked at.
    headless: bool,
}

impl LoadPair {
    fn new(
        memory: &Arc<DriverMemory>,
        shape: Shape,
        options: RingOptions,
        frames: &[Template],
        flows: u16,
    ) -> Result<Self, LoadError> {
        let longest = frames.iter().map(Template::len).max().unwrap_or(0);
        let rx_len = receive_buffer(shape.mergeable, frames);
        let (per_slot, slots) = (shape.per_slot(), shape.slots());
        let stride = |len: u32| {
            len.max(MERGE_BUFFER)
                .next_multiple_of(64)
                .max(BUFFER_STRIDE)
        };
        let tx_space = BufferSpace::new(memory, slots, stride(longest))?;
        let rx_space = BufferSpace::new(memory, slots, stride(rx_len))?;
        let lane_shape = |direction| LaneShape {
            layout: shape.layout,
            size: shape.queue_size,
            direction,
            per_slot,
        };
        let template = |slot: u16| &frames[usize::from(slot) % frames.len()];
        for slot in 0..slots {
            tx_space.write(slot, 0, &template(slot).for_flow(slot % flows.max(1)));
        }
        let tx = Lane::new(memory, lane_shape(Direction::Transmit), options, |slot| {
            tx_space.segments(slot, template(slot).len(), shape.chained)
        })?;
        let rx = Lane::new(memory, lane_shape(Direction::Receive), options, |slot| {
            rx_space.segments(slot, rx_len, shape.chained)
        })?;
        Ok(Self {
            tx,
            rx,
            tx_space,
            rx_space,
            rx_len,
            tx_kick: EventFd::new()?,
            rx_kick: EventFd::new()?,
            call: EventFd::new()?,
            partial: Vec::new(),
            headless: false,
        })
    }

    /// Bytes of memory that such a pair needs.
    fn memory_bytes(shape: Shape, frames: &[Template]) -> u64 {
        let longest = frames.iter().map(Template::len).max().unwrap_or(0);
        let rx_len = receive_buffer(shape.mergeable, frames);
        let stride = |len: u32| u64::from(len.next_multiple_of(64).max(BUFFER_STRIDE));
        u64::from(shape.queue_size) * (stride(longest) + stride(rx_len) + 128) + 8192
    }

    /// Offers up to `count` frames that lie ready. Returns how many.
    #[inline]
    pub(crate) fn transmit(&mut self, count: u16) -> Result<u16, LoadError> {
        let count = count.min(self.tx.free());
        if count > 0 {
            self.tx.push(count);
            if self.tx.wants_kick(count) {
                self.tx_kick.signal()?;
            }
        }
        Ok(count)
    }

    /// Gives received buffers back, if there are enough or `all`.
    #[inline]
    pub(crate) fn recycle(&mut self, all: bool) -> Result<(), LoadError> {
        let free = self.rx.free();
        if free >= WORTH_A_PUSH || (all && free > 0) {
            self.rx.push(free);
            if self.rx.wants_kick(free) {
                self.rx_kick.signal()?;
            }
        }
        Ok(())
    }

    /// Takes what arrived, gives the buffers back and refills the transmit ring; frames are not
    /// looked at.
    #[inline]
    pub(crate) fn turn(&mut self) -> Result<Turn, LoadError> {
        let taken = self.take()?;
        Ok(Turn {
            sent: self.refill()?,
            ..taken
        })
    }

    /// Takes what arrived and gives the buffers back; frames are not looked at.
    #[inline]
    pub(crate) fn take(&mut self) -> Result<Turn, LoadError> {
        let mut turn = Turn::default();
        let mut used = [UsedSlot::default(); BURST];
        let count = self.rx.harvest(&mut used)?;
        for slot in &used[..count] {
            turn.bytes += u64::from(slot.len);
            turn.received += u64::from(slot.len < self.rx_len);
        }
        if let Some(last) = used[..count].last() {
            self.headless = last.len >= self.rx_len;
        }
        self.recycle(count == 0)?;
        Ok(turn)
    }

    /// Refills the transmit ring. Returns how many frames were offered.
    #[inline]
    pub(crate) fn refill(&mut self) -> Result<u64, LoadError> {
        let reclaimed = self.tx.reclaim()?;
        if self.tx.free() >= WORTH_A_PUSH || reclaimed == 0 {
            return Ok(self.transmit(u16::MAX)?.into());
        }
        Ok(0)
    }

    /// Takes frames that arrived and shows the beginning of each, header in front, at most
    /// `head.len()` bytes. `each` gets zeros where the first buffer ends before that.
    pub(crate) fn peek(
        &mut self,
        head: &mut [u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<Turn, LoadError> {
        let mut turn = Turn::default();
        let mut used = [UsedSlot::default(); BURST];
        let count = self.rx.harvest(&mut used)?;
        let mut inside = self.headless || !self.partial.is_empty();
        for slot in &used[..count] {
            if !inside {
                let len = (slot.len as usize).min(head.len());
                self.rx_space.read(slot.slot, 0, &mut head[..len]);
                head[len..].fill(0);
                each(head);
            }
            inside = slot.len >= self.rx_len;
            turn.received += u64::from(!inside);
            turn.bytes += u64::from(slot.len);
        }
        self.partial.clear();
        self.headless = inside;
        self.recycle(count == 0)?;
        Ok(turn)
    }

    /// Takes frames that arrived, header in front of each, joined from their buffers.
    pub(crate) fn receive(&mut self, mut each: impl FnMut(&[u8])) -> Result<usize, LoadError> {
        let mut used = [UsedSlot::default(); BURST];
        let count = self.rx.harvest(&mut used)?;
        let mut frames = 0;
        if self.headless {
            self.partial.clear();
        }
        for slot in &used[..count] {
            let start = self.partial.len();
            self.partial.resize(start + slot.len as usize, 0);
            self.rx_space.read(slot.slot, 0, &mut self.partial[start..]);
            if slot.len < self.rx_len {
                if !std::mem::take(&mut self.headless) {
                    each(&self.partial);
                }
                self.partial.clear();
                frames += 1;
            }
        }
        self.recycle(count == 0)?;
        Ok(frames)
    }
}

/// Bytes of a receive buffer for frames of this size.
pub(crate) fn receive_buffer_bytes(shape: Shape, frame: u32) -> u32 {
    if shape.mergeable {
        MERGE_BUFFER
    } else {
        frame + 64
    }
}

/// Bytes of a receive buffer such that the last buffer of every frame is not full: that tells
/// frames apart without a look at their headers.
fn receive_buffer(mergeable: bool, frames: &[Template]) -> u32 {
    if !mergeable {
        return frames.iter().map(Template::len).max().unwrap_or(0) + 64;
    }
    let full = |size: u32| frames.iter().any(|frame| frame.len() % size == 0);
    (0..)
        .map(|step| MERGE_BUFFER - 4 * step)
        .find(|size| !full(*size))
        .unwrap_or(MERGE_BUFFER)
}

/// A socket at which a guest waits for its back-end; its file goes with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens in place of whoever did before.
    pub(crate) fn bind(path: &Path) -> Result<Self, LoadError> {
        let _ = std::fs::remove_file(path);
        let socket = UnixListener::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Waits for the back-end.
    pub(crate) fn accept(&self) -> Result<Frontend, LoadError> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        while Instant::now() < deadline {
            match self.socket.accept() {
                Ok((socket, _)) => {
                    socket.set_nonblocking(false)?;
                    return Ok(Frontend::new(socket));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
                    interrupt::check()?;
                    // A signal ends it early, which the next look finds.
                    let _ = poll(&mut fds, Some(&LOOK));
                }
                Err(e) => return Err(e.into()),
            }
        }
        Err(LoadError::NotConnected(REPLY_TIMEOUT))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A guest of the load.
#[derive(Debug)]
pub(crate) struct LoadGuest {
    frontend: Frontend,
    pub(crate) pairs: Vec<LoadPair>,
    pub(crate) in_order: bool,
}

impl LoadGuest {
    /// Starts all queues of a session in which nothing was said yet, with these frames ready to be
    /// sent.
    pub(crate) fn start(
        mut frontend: Frontend,
        shape: Shape,
        frames: &[Template],
        flows: u16,
    ) -> Result<Self, LoadError> {
        frontend.set_reply_timeout(REPLY_TIMEOUT)?;
        let offered = frontend.negotiate_protocol(WANTED_PROTOCOL_FEATURES)?;
        let segmented = frames.iter().any(|frame| frame.len() > MAX_PLAIN + 12);
        let features = choose_features(offered, shape, segmented || shape.tso)?;
        let offered_pairs = frontend.queue_pairs()?;
        if offered_pairs < u64::from(shape.queues) {
            return Err(LoadError::QueuePairs {
                offered: offered_pairs,
                wanted: shape.queues,
            });
        }
        let memory = DriverMemory::single(memory_bytes(shape, frames), shape.huge)?;
        let options = shape.ring_options(features);
        let mut pairs = Vec::new();
        for _ in 0..shape.queues {
            let mut pair = LoadPair::new(&memory, shape, options, frames, flows)?;
            pair.tx.set_calls(ringway_guest::Calls::Never);
            pair.rx.set_calls(ringway_guest::Calls::Never);
            // Nobody listens yet; a back-end looks at each ring once when it starts.
            pair.rx.push(u16::MAX);
            pairs.push(pair);
        }
        let start = |place, kick, call| RingStart { place, kick, call };
        let rings = pairs.iter().flat_map(|pair: &LoadPair| {
            [
                start(pair.rx.place(), &pair.rx_kick, &pair.call),
                start(pair.tx.place(), &pair.tx_kick, &pair.call),
            ]
        });
        let device = DeviceStart {
            features,
            mtu: None,
            memory: &memory,
            rings: rings.collect(),
        };
        frontend.start_device(offered, &device)?;
        Ok(Self {
            frontend,
            pairs,
            in_order: options.in_order,
        })
    }

    /// Fails once the back-end has gone.
    pub(crate) fn check_alive(&self) -> Result<(), LoadError> {
        let mut fds = [PollFd::new(self.frontend.socket(), PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())).map_err(io::Error::from)?;
        if fds[0].revents().is_empty() {
            Ok(())
        } else {
            Err(LoadError::Closed)
        }
    }
}

/// Bytes of memory that a guest needs.
pub(crate) fn memory_bytes(shape: Shape, frames: &[Template]) -> u64 {
    LoadPair::memory_bytes(shape, frames) * u64::from(shape.queues)
}

/// What to negotiate: all that the shape needs, and what else is useful and offered.
fn choose_features(offered: u64, shape: Shape, tso: bool) -> Result<u64, LoadError> {
    let needed = [
        (true, VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"),
        (
            shape.layout == Layout::Packed,
            VIRTIO_F_RING_PACKED,
            "VIRTIO_F_RING_PACKED",
        ),
        (
            shape.mergeable,
            VIRTIO_NET_F_MRG_RXBUF,
            "VIRTIO_NET_F_MRG_RXBUF",
        ),
        (
            shape.event_idx,
            VIRTIO_RING_F_EVENT_IDX,
            "VIRTIO_RING_F_EVENT_IDX",
        ),
        (
            shape.indirect,
            VIRTIO_RING_F_INDIRECT_DESC,
            "VIRTIO_RING_F_INDIRECT_DESC",
        ),
        (shape.queues > 1, VIRTIO_NET_F_MQ, "VIRTIO_NET_F_MQ"),
        (
            tso || shape.checksum,
            VIRTIO_NET_F_CSUM,
            "VIRTIO_NET_F_CSUM",
        ),
        (
            tso || shape.checksum,
            VIRTIO_NET_F_GUEST_CSUM,
            "VIRTIO_NET_F_GUEST_CSUM",
        ),
        (tso, VIRTIO_NET_F_HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
        (tso, VIRTIO_NET_F_GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
    ];
    let missing: Vec<&str> = needed
        .iter()
        .filter(|(wanted, bit, _)| *wanted && offered & bit == 0)
        .map(|(_, _, name)| *name)
        .collect();
    if !missing.is_empty() {
        return Err(LoadError::NotOffered {
            names: missing.join(", "),
        });
    }
    let chosen = needed
        .iter()
        .filter(|(wanted, ..)| *wanted)
        .fold(0, |sum, (_, bit, _)| sum | bit);
    let in_order = if shape.in_order { VIRTIO_F_IN_ORDER } else { 0 };
    let tso = if tso { features::TSO } else { 0 };
    Ok(chosen | offered & (in_order | tso))
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Route, Style, guest_mac};
    use super::*;

    #[test]
    fn the_last_receive_buffer_of_a_frame_is_never_full() {
        let route = Route {
            from: guest_mac(0),
            to: guest_mac(1),
        };
        let style = Style::default();
        for size in (60..9000).step_by(4) {
            let frames = [
                Template::new(route, size, style),
                Template::new(route, 65_000, style),
            ];
            for mergeable in [true, false] {
                let buffer = receive_buffer(mergeable, &frames);
                assert!(frames.iter().all(|frame| frame.len() % buffer != 0));
            }
        }
    }

    #[test]
    fn features_that_are_needed_and_not_offered_are_named() {
        let shape = Shape {
            layout: Layout::Packed,
            mergeable: true,
            in_order: true,
            event_idx: false,
            chained: false,
            indirect: false,
            tso: false,
            checksum: false,
            queue_size: 256,
            queues: 1,
            huge: false,
        };
        let offered = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF;
        let error = choose_features(offered, shape, false)
            .unwrap_err()
            .to_string();
        assert!(
            error.ends_with("does not offer VIRTIO_F_RING_PACKED"),
            "{error}"
        );
        let offered = offered | VIRTIO_F_RING_PACKED;
        assert_eq!(choose_features(offered, shape, false).unwrap(), offered);
        let error = choose_features(offered, shape, true)
            .unwrap_err()
            .to_string();
        assert!(error.contains("VIRTIO_NET_F_HOST_TSO4"), "{error}");
        let all = offered | features::TSO;
        assert_eq!(choose_features(all, shape, true).unwrap(), all);
    }
}
