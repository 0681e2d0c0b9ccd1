//! A guest of the load: a front-end whose buffers stay where they are.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ringway_dataplane::driver::features::{
    self, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX,
};
use ringway_dataplane::driver::{
    DeviceFault, DeviceStart, Direction, DriverMemory, DriverMemoryError, EventFd, Frontend,
    FrontendError, Lane, LaneShape, Layout, RingOptions, RingSetupError, RingStart, Segment,
    UsedSlot, WANTED_PROTOCOL_FEATURES, Window,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::frame::Template;

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

/// How the guests of a load drive their rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) layout: Layout,
    pub(crate) mergeable: bool,
    pub(crate) in_order: bool,
    pub(crate) event_idx: bool,
    pub(crate) chained: bool,
    pub(crate) queue_size: u16,
    pub(crate) queues: u16,
    pub(crate) huge: bool,
}

/// Why a guest of the load failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LoadError {
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    #[error(transparent)]
    Memory(#[from] DriverMemoryError),
    #[error(transparent)]
    Ring(#[from] RingSetupError),
    #[error("the back-end broke a rule: {0}")]
    Device(#[from] DeviceFault),
    #[error("an eventfd or socket is unusable: {0}")]
    Io(#[from] io::Error),
    #[error("the back-end does not offer {names}")]
    NotOffered { names: String },
    #[error("the back-end has {offered} queue pairs, not {wanted}")]
    QueuePairs { offered: u64, wanted: u16 },
    #[error("the back-end closed the connection")]
    Closed,
    #[error("no frame came through the switch in {0:?}")]
    NoTraffic(Duration),
    #[error("{0} frames arrived that were not sent or were changed on the way")]
    Corrupt(u64),
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
        let per_slot = if shape.chained { 2 } else { 1 };
        let slots = shape.queue_size / per_slot;
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
        u64::from(shape.queue_size) * (stride(longest) + stride(rx_len) + 64) + 8192
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
        let reclaimed = self.tx.reclaim()?;
        if self.tx.free() >= WORTH_A_PUSH || reclaimed == 0 {
            turn.sent = u64::from(self.transmit(u16::MAX)?);
        }
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

/// A guest of the load.
#[derive(Debug)]
pub(crate) struct LoadGuest {
    frontend: Frontend,
    pub(crate) pairs: Vec<LoadPair>,
    pub(crate) in_order: bool,
}

impl LoadGuest {
    /// Connects to a back-end that listens at `path`, with these frames ready to be sent.
    pub(crate) fn connect(
        path: &Path,
        shape: Shape,
        frames: &[Template],
        flows: u16,
    ) -> Result<Self, LoadError> {
        let mut frontend = Frontend::connect(path)?;
        frontend.set_reply_timeout(REPLY_TIMEOUT)?;
        let offered = frontend.negotiate_protocol(WANTED_PROTOCOL_FEATURES)?;
        let segmented = frames
            .iter()
            .any(|frame| frame.len() > super::frame::MAX_PLAIN + 12);
        let features = choose_features(offered, shape, segmented)?;
        let offered_pairs = frontend.queue_pairs()?;
        if offered_pairs < u64::from(shape.queues) {
            return Err(LoadError::QueuePairs {
                offered: offered_pairs,
                wanted: shape.queues,
            });
        }
        let bytes = LoadPair::memory_bytes(shape, frames) * u64::from(shape.queues);
        let memory = DriverMemory::single(bytes, shape.huge)?;
        let options = RingOptions {
            event_idx: features & VIRTIO_RING_F_EVENT_IDX != 0,
            in_order: features & VIRTIO_F_IN_ORDER != 0,
            indirect: 0,
        };
        let mut pairs = Vec::new();
        for _ in 0..shape.queues {
            let mut pair = LoadPair::new(&memory, shape, options, frames, flows)?;
            pair.tx.set_calls(ringway_dataplane::driver::Calls::Never);
            pair.rx.set_calls(ringway_dataplane::driver::Calls::Never);
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

/// What to negotiate: all that the shape needs, and what else is useful and offered.
fn choose_features(offered: u64, shape: Shape, segmented: bool) -> Result<u64, LoadError> {
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
        (shape.queues > 1, VIRTIO_NET_F_MQ, "VIRTIO_NET_F_MQ"),
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
    let tso = if segmented { features::TSO } else { 0 };
    Ok(chosen | offered & (in_order | tso))
}

#[cfg(test)]
mod tests {
    use super::super::frame::{Route, guest_mac};
    use super::*;

    #[test]
    fn the_last_receive_buffer_of_a_frame_is_never_full() {
        let route = Route {
            from: guest_mac(0),
            to: guest_mac(1),
        };
        for size in (60..9000).step_by(4) {
            let frames = [Template::new(route, size), Template::new(route, 65_000)];
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
        let chosen = choose_features(offered | VIRTIO_F_RING_PACKED, shape, true).unwrap();
        assert_eq!(chosen, offered | VIRTIO_F_RING_PACKED);
    }
}
