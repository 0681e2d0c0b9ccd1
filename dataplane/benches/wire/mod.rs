//! Guests on an inline switch, all in one thread: what a frame costs, both sides included.
#![allow(
    clippy::unwrap_used,
    reason = "what can't be set up has nothing to measure"
)]
#![allow(dead_code, reason = "shared by benches and tests; none uses all of it")]

use std::path::Path;
use std::sync::Arc;

use ringway_dataplane::InlineSwitch;
use ringway_guest::features::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_EVENT_IDX,
};
use ringway_guest::{
    Calls, DeviceStart, Direction, DriverMemory, EventFd, Frontend, Lane, LaneShape, Layout,
    RingOptions, RingStart, Segment, UsedSlot, WANTED_PROTOCOL_FEATURES, Window,
};
use tempfile::TempDir;

/// Frames made available at once: one turn of the worker.
pub(crate) const BURST: u16 = 64;

/// Everybody's address.
pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// Entries of a ring unless said otherwise.
pub(crate) const RING_SIZE: u16 = 256;
const STRIDE: u32 = 2304;
const HEADER: u32 = 12;

/// The address of guest `index`, which the switch knows.
pub(crate) const fn station(index: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, index + 1]
}

/// What a wire is like.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layout: Layout,
    pub(crate) frame_bytes: u32,
    /// How many there are; the first sends, to the second unless readdressed.
    pub(crate) guests: u8,
    /// Bytes of a receive buffer, at most 2,048. Buffers are mergeable.
    pub(crate) buffer_bytes: u32,
    /// Entries of the receive ring.
    pub(crate) receive_size: u16,
    /// The header of a frame that is sent has a buffer of its own.
    pub(crate) chained: bool,
    pub(crate) in_order: bool,
    pub(crate) event_idx: bool,
    /// Offload features of the first guest, and of the others.
    pub(crate) offloads: [u64; 2],
}

impl Shape {
    /// Two guests; a frame fits into one buffer.
    pub(crate) const fn plain(layout: Layout, frame_bytes: u32) -> Self {
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

    /// Of guest `index`.
    fn features(self, index: u8) -> u64 {
        let packed = self.layout == Layout::Packed;
        [
            (packed, VIRTIO_F_RING_PACKED),
            (self.in_order, VIRTIO_F_IN_ORDER),
            (self.event_idx, VIRTIO_RING_F_EVENT_IDX),
        ]
        .iter()
        .filter(|(wanted, _)| *wanted)
        .fold(
            VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF | self.offloads[usize::from(index.min(1))],
            |all, (_, bit)| all | bit,
        )
    }
}

/// A guest whose rings are started.
pub(crate) struct Guest {
    pub(crate) tx: Lane,
    pub(crate) rx: Lane,
    frames: Window,
    used: Box<[UsedSlot]>,
    _frontend: Frontend,
    /// Kick of the receive and of the transmit ring, and the call of both.
    events: [EventFd; 3],
    _memory: Arc<DriverMemory>,
}

/// Guests and the switch between them.
pub(crate) struct Wire {
    pub(crate) guests: Vec<Guest>,
    pub(crate) switch: InlineSwitch,
}

impl Wire {
    pub(crate) fn new(shape: Shape) -> Self {
        let folder = TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(1024).unwrap();
        let mut guest = |index: u8| {
            let path = folder.path().join(index.to_string());
            let name = format!("guest{index}").parse().unwrap();
            switch.add_port(name, &path).unwrap();
            let guest = Guest::start(&path, shape, index);
            guest.address(station((index + 1) % shape.guests), station(index));
            guest
        };
        let guests = (0..shape.guests).map(&mut guest).collect();
        let mut wire = Self { guests, switch };
        // Everybody once, so that all stations are learned.
        for _ in 0..shape.guests {
            wire.burst();
            wire.guests.rotate_left(1);
        }
        assert_ne!(wire.burst(), 0);
        wire
    }

    /// Sends a burst from the first guest and takes all buffers back. Returns how many were filled.
    #[inline]
    pub(crate) fn burst(&mut self) -> u64 {
        self.guests[0].tx.push(BURST);
        self.switch.turn();
        let received = self.receive();
        self.guests[0].tx.reclaim().unwrap();
        received
    }

    /// Empties the receive rings of all guests but the first and fills them again. Returns how
    /// many buffers there were.
    #[inline]
    pub(crate) fn receive(&mut self) -> u64 {
        let guests = self.guests[1..].iter_mut();
        guests.map(Guest::receive).sum()
    }
}

impl Guest {
    pub(crate) fn connect(path: &Path, shape: Shape) -> Self {
        Self::start(path, shape, 0)
    }

    fn start(path: &Path, shape: Shape, index: u8) -> Self {
        let mut frontend = Frontend::connect(path).unwrap();
        let offered = frontend
            .negotiate_protocol(WANTED_PROTOCOL_FEATURES)
            .unwrap();
        let slots = u64::from(RING_SIZE) + u64::from(shape.receive_size);
        let memory = DriverMemory::single(slots * 4096 + (2 << 20), false).unwrap();
        let (mut rx, _) = lane(&memory, shape, Direction::Receive, shape.buffer_bytes);
        let (tx, frames) = lane(
            &memory,
            shape,
            Direction::Transmit,
            shape.frame_bytes + HEADER,
        );
        rx.push(shape.receive_size);
        let events = std::array::from_fn(|_| EventFd::new().unwrap());
        let [rx_kick, tx_kick, call] = &events;
        let start = |place, kick| RingStart { place, kick, call };
        let start = DeviceStart {
            features: shape.features(index),
            mtu: None,
            memory: &memory,
            rings: vec![start(rx.place(), rx_kick), start(tx.place(), tx_kick)],
        };
        frontend.start_device(offered, &start).unwrap();
        // The reply to any request says that the session has handled those before it.
        frontend.queue_pairs().unwrap();
        Self {
            tx,
            rx,
            frames,
            used: vec![UsedSlot::default(); usize::from(RING_SIZE)].into(),
            _frontend: frontend,
            events,
            _memory: memory,
        }
    }

    /// Sends a burst, whose frame `n` has the addresses (destination, source) `of(n)`.
    pub(crate) fn send(&mut self, of: impl Fn(u16) -> [[u8; 6]; 2]) {
        for ahead in 0..BURST {
            let slot = usize::from(self.tx.next_slot(ahead));
            let at = slot * STRIDE as usize + HEADER as usize;
            self.frames.write(at, of(ahead).as_flattened());
        }
        self.tx.push(BURST);
    }

    /// Sends up to a burst as it is, and wakes a worker that sleeps.
    pub(crate) fn send_ready(&mut self) {
        let count = self.tx.free().min(BURST);
        self.tx.push(count);
        if count > 0 && self.tx.wants_kick(count) {
            self.events[1].signal().unwrap();
        }
    }

    /// Takes what was received and gives the buffers back; returns how many there were.
    #[inline]
    pub(crate) fn receive(&mut self) -> u64 {
        let mut total = 0;
        loop {
            let count = self.rx.harvest(&mut self.used).unwrap();
            total += count as u64;
            if count < self.used.len() {
                break;
            }
        }
        self.rx.push(self.rx.free());
        total
    }

    /// All frames that it sends from now on are this one, with its header; no longer than those of
    /// its shape.
    pub(crate) fn write(&self, message: &[u8]) {
        for slot in 0..usize::from(RING_SIZE) {
            self.frames.write(slot * STRIDE as usize, message);
        }
    }

    /// Addresses all frames that it sends from now on.
    pub(crate) fn address(&self, to: [u8; 6], from: [u8; 6]) {
        let mut head = [0; HEADER as usize + 14];
        head[12..18].copy_from_slice(&to);
        head[18..24].copy_from_slice(&from);
        head[24..].copy_from_slice(&[0x88, 0xb5]);
        for slot in 0..usize::from(RING_SIZE) {
            self.frames.write(slot * STRIDE as usize, &head);
        }
    }
}

/// A lane of slots of `len` bytes whose driver polls, and the memory of the buffers.
fn lane(
    memory: &Arc<DriverMemory>,
    shape: Shape,
    direction: Direction,
    len: u32,
) -> (Lane, Window) {
    let size = match direction {
        Direction::Transmit => RING_SIZE,
        Direction::Receive => shape.receive_size,
    };
    let bytes = u64::from(size) * u64::from(STRIDE);
    let buffers = memory.alloc(bytes, 64).unwrap();
    let window = memory.window(buffers, bytes).unwrap();
    let header = match direction {
        Direction::Transmit if shape.chained => HEADER,
        _ => 0,
    };
    let of_ring = LaneShape {
        layout: shape.layout,
        size,
        direction,
        per_slot: if header == 0 { 1 } else { 2 },
    };
    let options = RingOptions {
        in_order: shape.in_order,
        event_idx: shape.event_idx,
        ..RingOptions::default()
    };
    let segments = |slot: u16| {
        let addr = buffers + u64::from(slot) * u64::from(STRIDE);
        let rest = Segment {
            addr: addr + u64::from(header),
            len: len - header,
        };
        match header {
            0 => vec![rest],
            len => vec![Segment { addr, len }, rest],
        }
    };
    let mut lane = Lane::new(memory, of_ring, options, segments).unwrap();
    lane.set_calls(Calls::Never);
    (lane, window)
}
