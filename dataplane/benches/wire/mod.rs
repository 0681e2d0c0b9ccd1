//! Two guests on an inline switch, all in one thread: what a frame costs, both sides included.
#![allow(
    clippy::unwrap_used,
    reason = "a bench that can't be set up has nothing to measure"
)]

use std::sync::Arc;

use ringway_dataplane::InlineSwitch;
use ringway_dataplane::driver::features::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF,
};
use ringway_dataplane::driver::{
    Calls, DeviceStart, Direction, DriverMemory, EventFd, Frontend, Lane, LaneShape, Layout,
    RingOptions, RingStart, Segment, UsedSlot, WANTED_PROTOCOL_FEATURES,
};
use tempfile::TempDir;

/// Frames made available at once: one turn of the worker.
pub(crate) const BURST: u16 = 32;

const RING_SIZE: u16 = 256;
const STRIDE: u32 = 2304;
const HEADER: u32 = 12;

struct Guest {
    _frontend: Frontend,
    _events: [EventFd; 3],
    _memory: Arc<DriverMemory>,
    tx: Lane,
    rx: Lane,
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
            Guest::connect(&path, layout, frame_bytes, [own, peer])
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
    fn connect(path: &std::path::Path, layout: Layout, frame_bytes: u32, macs: [u8; 2]) -> Self {
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
        let memory = DriverMemory::single(4 << 20, false).unwrap();
        let bytes = u64::from(RING_SIZE) * u64::from(STRIDE);
        let lane = |direction, len: u32| {
            let buffers = memory.alloc(bytes, 64).unwrap();
            let window = memory.window(buffers, bytes).unwrap();
            for slot in 0..usize::from(RING_SIZE) {
                let mut frame = vec![0; HEADER as usize];
                frame.extend([0x52, 0x54, 0, 0, 0, macs[1]]);
                frame.extend([0x52, 0x54, 0, 0, 0, macs[0], 0x88, 0xb5]);
                window.write(slot * STRIDE as usize, &frame);
            }
            let shape = LaneShape {
                layout,
                size: RING_SIZE,
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
            lane
        };
        let mut rx = lane(Direction::Receive, 2048);
        let tx = lane(Direction::Transmit, frame_bytes + HEADER);
        rx.push(RING_SIZE);
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
            _events: events,
            _memory: memory,
            tx,
            rx,
        }
    }
}
