//! Two guests on an inline switch, all in one thread: what a frame costs, both sides included.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "a bench that can't be set up has nothing to measure, and none uses all"
)]

use std::sync::Arc;

use ringway_dataplane::InlineSwitch;
use ringway_dataplane::driver::features::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF,
};
use ringway_dataplane::driver::{
    Calls, DeviceStart, Direction, DriverMemory, EventFd, Frontend, Lane, LaneShape, Layout,
    RingOptions, RingStart, Segment, UsedSlot, WANTED_PROTOCOL_FEATURES, Window,
};
use tempfile::TempDir;

/// Frames made available at once: one turn of the worker.
pub(crate) const BURST: u16 = 32;

/// Entries of a ring unless said otherwise.
pub(crate) const RING_SIZE: u16 = 256;
const STRIDE: u32 = 2304;
const HEADER: u32 = 12;

/// A guest with one queue pair whose frames are ready in its buffers.
pub(crate) struct Guest {
    _frontend: Frontend,
    /// Kick of the receive and of the transmit ring, and the call of both.
    events: [EventFd; 3],
    _memory: Arc<DriverMemory>,
    pub(crate) tx: Lane,
    pub(crate) rx: Lane,
    /// The buffers of `tx`.
    frames: Window,
}

/// Guest a, the switch and guest b.
pub(crate) struct Wire {
    a: Guest,
    b: Guest,
    switch: InlineSwitch,
    _folder: TempDir,
}

impl Wire {
    /// A wire for frames of `frame_bytes` from a to b, whose stations the switch knows.
    pub(crate) fn new(layout: Layout, frame_bytes: u32) -> Self {
        let folder = TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(1024).unwrap();
        let mut add = |name: &str, own: u8, peer: u8| {
            let path = folder.path().join(name);
            switch.add_port(name.parse().unwrap(), &path).unwrap();
            Guest::connect(&path, layout, frame_bytes, [own, peer], RING_SIZE)
        };
        let a = add("a", 1, 2);
        let b = add("b", 2, 1);
        let mut wire = Self {
            a,
            b,
            switch,
            _folder: folder,
        };
        // Both directions once, so that both stations are learned.
        assert_eq!(wire.burst(), u64::from(BURST));
        std::mem::swap(&mut wire.a, &mut wire.b);
        assert_eq!(wire.burst(), u64::from(BURST));
        std::mem::swap(&mut wire.a, &mut wire.b);
        wire
    }

    /// Sends a burst from a to b and takes all buffers back. Returns the frames that arrived.
    #[inline]
    pub(crate) fn burst(&mut self) -> u64 {
        self.a.tx.push(BURST);
        self.switch.turn();
        let mut used = [UsedSlot::default(); BURST as usize];
        let count = self.b.rx.harvest(&mut used).unwrap();
        self.b.rx.push(self.b.rx.free());
        self.a.tx.reclaim().unwrap();
        count as u64
    }
}

impl Guest {
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

    /// Takes what was received and gives the buffers back; returns how many frames.
    #[inline]
    pub(crate) fn receive(&mut self) -> usize {
        let mut used = [UsedSlot::default(); 64];
        let mut total = 0;
        loop {
            let count = self.rx.harvest(&mut used).unwrap();
            total += count;
            if count < used.len() {
                break;
            }
        }
        self.rx.push(self.rx.free());
        total
    }

    /// A guest whose frames go from station `macs[0]` to `macs[1]`.
    pub(crate) fn connect(
        path: &std::path::Path,
        layout: Layout,
        frame_bytes: u32,
        macs: [u8; 2],
        rx_size: u16,
    ) -> Self {
        let mut frontend = Frontend::connect(path).unwrap();
        let offered = frontend
            .negotiate_protocol(WANTED_PROTOCOL_FEATURES)
            .unwrap();
        let packed = if layout == Layout::Packed {
            VIRTIO_F_RING_PACKED
        } else {
            0
        };
        let features = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF | VIRTIO_F_IN_ORDER | packed;
        let slots = u64::from(RING_SIZE) + u64::from(rx_size);
        let memory = DriverMemory::single(slots * 4096 + (2 << 20), false).unwrap();
        let lane = |direction, size: u16, len: u32| {
            let bytes = u64::from(size) * u64::from(STRIDE);
            let buffers = memory.alloc(bytes, 64).unwrap();
            let window = memory.window(buffers, bytes).unwrap();
            for slot in 0..usize::from(size) {
                let mut frame = vec![0; HEADER as usize];
                frame.extend([0x52, 0x54, 0, 0, 0, macs[1]]);
                frame.extend([0x52, 0x54, 0, 0, 0, macs[0], 0x88, 0xb5]);
                window.write(slot * STRIDE as usize, &frame);
            }
            let shape = LaneShape {
                layout,
                size,
                direction,
                per_slot: 1,
            };
            let options = RingOptions {
                in_order: true,
                ..RingOptions::default()
            };
            let mut lane = Lane::new(&memory, shape, options, |slot| {
                let addr = buffers + u64::from(slot) * u64::from(STRIDE);
                vec![Segment { addr, len }]
            })
            .unwrap();
            lane.set_calls(Calls::Never);
            (lane, window)
        };
        let (mut rx, _) = lane(Direction::Receive, rx_size, 2048);
        let (tx, frames) = lane(Direction::Transmit, RING_SIZE, frame_bytes + HEADER);
        rx.push(rx_size);
        let events = [
            EventFd::new().unwrap(),
            EventFd::new().unwrap(),
            EventFd::new().unwrap(),
        ];
        let [rx_kick, tx_kick, call] = &events;
        let rings = vec![
            RingStart {
                place: rx.place(),
                kick: rx_kick,
                call,
            },
            RingStart {
                place: tx.place(),
                kick: tx_kick,
                call,
            },
        ];
        let start = DeviceStart {
            features,
            mtu: None,
            memory: &memory,
            rings,
        };
        frontend.start_device(offered, &start).unwrap();
        // The reply to any request says that the session has handled those before it.
        frontend.queue_pairs().unwrap();
        Self {
            _frontend: frontend,
            events,
            _memory: memory,
            tx,
            rx,
            frames,
        }
    }
}
