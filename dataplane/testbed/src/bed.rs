//! Guests on an inline switch, all in one thread: what a frame costs, both sides included.

use std::path::Path;

use ringway_dataplane::InlineSwitch;
use ringway_guest::{
    FixedPair, FixedQueue, FixedSlots, Frontend, Guest, Layout, NET_HEADER_BYTES, UsedSlot,
};
use tempfile::TempDir;

/// Frames made available at once: one turn of the worker.
pub const BURST: u16 = 64;

/// Everybody's address.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// Entries of a ring unless said otherwise.
pub const RING_SIZE: u16 = 256;

/// The address of station `index`, which the switch knows.
pub const fn station(index: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, index + 1]
}

/// What a testbed is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Layout of all rings.
    pub layout: Layout,
    /// L2 bytes of the frames that are sent.
    pub frame_bytes: u32,
    /// How many stations there are; the first sends, to the second unless readdressed.
    pub guests: u8,
    /// Bytes of a receive buffer, at most 2,048. Buffers are mergeable.
    pub buffer_bytes: u32,
    /// Entries of the receive ring.
    pub receive_size: u16,
    /// The header of a frame that is sent has a buffer of its own.
    pub chained: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// Offload features of the first station, and of the others.
    pub offloads: [u64; 2],
}

impl Shape {
    /// Two stations; a frame fits into one buffer.
    pub const fn plain(layout: Layout, frame_bytes: u32) -> Self {
        Self {
            layout,
            frame_bytes,
            guests: 2,
            buffer_bytes: 2048,
            receive_size: RING_SIZE,
            chained: false,
            in_order: true,
            event_idx: false,
            offloads: [0; 2],
        }
    }
}

/// A guest of one queue pair whose rings are started and whose driver polls.
#[derive(Debug)]
pub struct Station {
    /// The queue on which it sends.
    pub tx: FixedQueue,
    /// The queue on which it receives.
    pub rx: FixedQueue,
    used: Box<[UsedSlot]>,
    _frontend: Frontend,
}

/// Stations and the switch between them.
#[derive(Debug)]
pub struct Testbed {
    /// The stations, the sender first.
    pub guests: Vec<Station>,
    /// The switch.
    pub switch: InlineSwitch,
}

impl Testbed {
    /// Stations whose addresses the switch knows.
    pub fn new(shape: Shape) -> Self {
        let folder = TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(1024).unwrap();
        let mut guest = |index: u8| {
            let path = folder.path().join(index.to_string());
            let name = format!("guest{index}").parse().unwrap();
            switch.add_port(name, &path).unwrap();
            let guest = Station::start(&path, shape, index);
            guest.address(station((index + 1) % shape.guests), station(index));
            guest
        };
        let guests = (0..shape.guests).map(&mut guest).collect();
        let mut bed = Self { guests, switch };
        // Everybody once, so that all stations are learned.
        for _ in 0..shape.guests {
            bed.burst();
            bed.guests.rotate_left(1);
        }
        assert_ne!(bed.burst(), 0);
        bed
    }

    /// Sends a burst from the first station and takes all buffers back. Returns how many were
    /// filled.
    #[inline]
    pub fn burst(&mut self) -> u64 {
        self.guests[0].tx.ring.push(BURST);
        self.switch.turn();
        let received = self.receive();
        self.guests[0].tx.ring.reclaim().unwrap();
        received
    }

    /// Empties the receive rings of all stations but the first and fills them again. Returns how
    /// many buffers there were.
    #[inline]
    pub fn receive(&mut self) -> u64 {
        let guests = self.guests[1..].iter_mut();
        guests.map(Station::receive).sum()
    }
}

impl Station {
    /// A station on a port that listens at `path`, with the first one's offloads.
    pub fn connect(path: &Path, shape: Shape) -> Self {
        Self::start(path, shape, 0)
    }

    fn start(path: &Path, shape: Shape, index: u8) -> Self {
        let slots = |entries, len, header_apart| FixedSlots {
            entries,
            lens: vec![len],
            header_apart,
        };
        // The header's twelve bytes are in front of each frame.
        let sent = slots(RING_SIZE, shape.frame_bytes + 12, shape.chained);
        let received = slots(shape.receive_size, shape.buffer_bytes, false);
        let mut guest = Guest::builder()
            .layout(shape.layout)
            .in_order(shape.in_order)
            .event_idx(shape.event_idx)
            .indirect(false)
            .features(shape.offloads[usize::from(index.min(1))])
            .start_fixed(Frontend::connect(path).unwrap(), &[received, sent])
            .unwrap();
        // The reply to any request says that the session has handled those before it.
        guest.frontend.queue_pairs().unwrap();
        let FixedPair { rx, tx } = guest.pairs.remove(0);
        Self {
            tx,
            rx,
            used: vec![UsedSlot::default(); usize::from(RING_SIZE)].into(),
            _frontend: guest.frontend,
        }
    }

    /// Sends a burst, whose frame `n` has the addresses (destination, source) `of(n)`.
    pub fn send(&mut self, of: impl Fn(u16) -> [[u8; 6]; 2]) {
        for ahead in 0..BURST {
            let slot = self.tx.ring.next_slot(ahead);
            let addresses = of(ahead);
            self.tx
                .buffers
                .write(slot, NET_HEADER_BYTES, addresses.as_flattened());
        }
        self.tx.ring.push(BURST);
    }

    /// Sends up to a burst as it is, and wakes a worker that sleeps.
    pub fn send_ready(&mut self) {
        self.tx.offer(BURST).unwrap();
    }

    /// Takes what was received and gives the buffers back; returns how many there were.
    #[inline]
    pub fn receive(&mut self) -> u64 {
        let mut total = 0;
        loop {
            let count = self.rx.ring.harvest(&mut self.used).unwrap();
            total += count as u64;
            if count < self.used.len() {
                break;
            }
        }
        self.rx.ring.push(self.rx.ring.free());
        total
    }

    /// All frames that it sends from now on are this one, with its header; no longer than those of
    /// its shape.
    pub fn write(&self, message: &[u8]) {
        for slot in 0..self.tx.ring.slots() {
            self.tx.buffers.write(slot, 0, message);
        }
    }

    /// Addresses all frames that it sends from now on.
    pub fn address(&self, to: [u8; 6], from: [u8; 6]) {
        self.write(&[&[0; NET_HEADER_BYTES][..], &to, &from, &[0x88, 0xb5]].concat());
    }
}
