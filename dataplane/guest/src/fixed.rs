//! A guest whose buffers stay where they are and whose driver polls: for load and benches.

use std::io;
use std::sync::Arc;

use super::buffers::BufferPool;
use super::builder::{GuestBuilder, ring_options};
use super::event::EventFd;
use super::frontend::Frontend;
use super::guest::GuestError;
use super::memory::DriverMemory;
use super::preposted::{BufferSide, Preposted, PrepostedShape};
use super::queue::{Calls, Layout};
use super::session::RingSetup;

/// Least distance from one buffer to the next: that of DPDK's packet buffers.
const MIN_STRIDE: u32 = 2304;

/// What the slots of a fixed guest's rings of one direction look like.
#[derive(Clone, Debug)]
pub struct FixedSlots {
    /// Entries of the ring; a power of two.
    pub entries: u16,
    /// Bytes of the slots' buffers, virtio-net header included, taken in turn.
    pub lens: Vec<u32>,
    /// The header has a descriptor of its own.
    pub header_apart: bool,
}

impl FixedSlots {
    /// Bytes of memory that a ring takes with its buffers.
    pub fn ring_bytes(&self) -> u64 {
        // Descriptors, rings and an indirect table of two for each.
        u64::from(self.entries) * u64::from(self.stride() + 64) + 4096
    }

    fn stride(&self) -> u32 {
        let longest = self.lens.iter().max().copied().unwrap_or(0);
        longest.next_multiple_of(64).max(MIN_STRIDE)
    }

    fn per_slot(&self) -> u16 {
        if self.header_apart { 2 } else { 1 }
    }
}

/// One ring of a fixed guest, with its buffers and events.
#[derive(Debug)]
pub struct FixedQueue {
    /// The ring.
    pub ring: Preposted,
    /// A buffer for each slot.
    pub buffers: BufferPool,
    kick: EventFd,
    /// Nobody waits on it: the driver polls.
    call: EventFd,
}

impl FixedQueue {
    fn new(
        memory: &Arc<DriverMemory>,
        layout: Layout,
        features: u64,
        direction: BufferSide,
        slots: &FixedSlots,
    ) -> Result<Self, GuestError> {
        let options = ring_options(features, slots.per_slot());
        let per_slot = if options.indirect > 0 {
            1
        } else {
            slots.per_slot()
        };
        let buffers = BufferPool::new(memory, slots.entries / per_slot, slots.stride())?;
        let shape = PrepostedShape {
            layout,
            size: slots.entries,
            direction,
            per_slot: slots.per_slot(),
        };
        let mut ring = Preposted::new(memory, shape, options, |slot| {
            let len = slots.lens[usize::from(slot) % slots.lens.len()];
            buffers.describe(slot, len, slots.header_apart)
        })?;
        ring.set_calls(Calls::Never);
        Ok(Self {
            ring,
            buffers,
            kick: EventFd::new()?,
            call: EventFd::new()?,
        })
    }

    /// Makes up to `count` slots available, and wakes a device that sleeps. Returns how many.
    ///
    /// # Errors
    /// The kick is unusable.
    #[inline]
    pub fn offer(&mut self, count: u16) -> io::Result<u16> {
        let count = count.min(self.ring.free());
        if count > 0 {
            self.ring.push(count);
            if self.ring.wants_kick(count) {
                self.kick.signal()?;
            }
        }
        Ok(count)
    }

    fn start(&self) -> RingSetup<'_> {
        RingSetup {
            place: self.ring.place(),
            kick: &self.kick,
            call: &self.call,
        }
    }
}

/// A queue pair of a fixed guest.
#[derive(Debug)]
pub struct FixedPair {
    /// What the device fills; all of it is available at first.
    pub rx: FixedQueue,
    /// What the driver fills; none of it is available at first.
    pub tx: FixedQueue,
}

/// The queue pairs of a fixed guest, which no device has been told of.
#[derive(Debug)]
pub struct FixedRings {
    /// In which they lie.
    pub memory: Arc<DriverMemory>,
    /// The queue pairs.
    pub pairs: Vec<FixedPair>,
}

impl FixedRings {
    pub(crate) fn new(
        config: &GuestBuilder,
        features: u64,
        [rx_slots, tx_slots]: &[FixedSlots; 2],
    ) -> Result<Self, GuestError> {
        let memory = config.memory(rx_slots.ring_bytes() + tx_slots.ring_bytes())?;
        let queue =
            |direction, slots| FixedQueue::new(&memory, config.layout, features, direction, slots);
        let mut pairs = Vec::new();
        for _ in 0..config.queue_pairs {
            let (mut rx, tx) = (
                queue(BufferSide::Receive, rx_slots)?,
                queue(BufferSide::Transmit, tx_slots)?,
            );
            // Nobody listens yet; a back-end looks at each ring once when it starts.
            rx.ring.push(u16::MAX);
            pairs.push(FixedPair { rx, tx });
        }
        Ok(Self { memory, pairs })
    }
}

/// A guest of fixed buffers that is connected to a back-end.
#[derive(Debug)]
pub struct FixedGuest {
    /// The session.
    pub frontend: Frontend,
    /// Virtio features in effect.
    pub features: u64,
    /// The queue pairs.
    pub pairs: Vec<FixedPair>,
}

impl FixedGuest {
    pub(crate) fn start(
        frontend: Frontend,
        config: &GuestBuilder,
        slots: &[FixedSlots; 2],
    ) -> Result<Self, GuestError> {
        let negotiated = config.negotiate(frontend)?;
        let features = negotiated.features;
        let FixedRings { memory, pairs } = FixedRings::new(config, features, slots)?;
        let rings = pairs
            .iter()
            .flat_map(|pair| [pair.rx.start(), pair.tx.start()]);
        let frontend = negotiated.start(&memory, rings.collect())?;
        Ok(Self {
            frontend,
            features,
            pairs,
        })
    }
}
