//! Guests that break the rules of packed rings, against a real switch: the ring stops, or goes on
//! where the rules leave it open, and nobody else notices.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::path::PathBuf;

use common::hostile::{BAD, Innocents, PEER, RX, TX, plain};
use common::{DEADLINE, Lab, eventually, frame, name, receive};
use ringway_bridge::DropReason;
use ringway_guest::{
    DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE, DriverRing, Guest,
    GuestBuilder, Layout, PackedArea, PackedDesc,
};

const NOT_MEMORY: &str = "is not in guest memory";

/// Entries of the bad guest's rings.
const SIZE: u16 = 16;

/// A switch, its bad guest on packed rings, that one's peer, and two who exchange frames.
struct Scene {
    bad: Option<Guest>,
    peer: Guest,
    path: PathBuf,
    innocents: Innocents,
    faults: [u64; 2],
    seed: u64,
    config: GuestBuilder,
    lab: Lab,
}

impl Scene {
    fn new(config: GuestBuilder) -> Self {
        let lab = Lab::start();
        let innocents = Innocents::start(&lab);
        let peer = lab.guest("peer", Guest::builder());
        lab.pin("peer", PEER);
        let path = lab.add_port("bad");
        lab.pin("bad", BAD);
        Self {
            bad: None,
            peer,
            path,
            innocents,
            faults: [0; 2],
            seed: 0,
            config: config
                .layout(Layout::Packed)
                .queue_size(SIZE)
                .event_idx(false),
            lab,
        }
    }

    /// A fresh bad guest, whose rings are at their start: transmit empty, receive full.
    fn connect(&mut self) -> &mut Guest {
        self.bad = None;
        let bad = self.config.clone().connect(&self.path).unwrap();
        self.bad.insert(bad)
    }

    fn area(&mut self, ring: u32) -> PackedArea {
        let bad = self.bad.as_mut().unwrap();
        let ring = if ring == RX {
            bad.receive_queue(0).ring()
        } else {
            bad.transmit_queue(0).ring()
        };
        match ring {
            DriverRing::Packed(ring) => ring.area().clone(),
            DriverRing::Split(_) => unreachable!("the bad guest's rings are packed"),
        }
    }

    /// Makes the switch look at a ring.
    fn poke(&mut self, ring: u32) {
        self.seed += 1;
        if ring == RX {
            let sent = frame(BAD, PEER, 64, self.seed);
            self.peer.send_frame(&sent).unwrap();
        } else {
            let bad = self.bad.as_mut().unwrap();
            bad.transmit_queue(0).kick().signal().unwrap();
        }
    }

    /// Writes descriptors from slot 0 on, the first one last, and looks away.
    fn offer(&mut self, ring: u32, descs: &[PackedDesc]) {
        let area = self.area(ring);
        for (slot, desc) in descs.iter().enumerate().rev() {
            let slot = u16::try_from(slot).unwrap();
            area.write_desc(slot, *desc);
        }
        self.poke(ring);
    }

    fn is_started(&self, ring: u32) -> bool {
        let queue = &self.lab.switch.port(&name("bad")).unwrap().queues[0];
        if ring == RX {
            queue.tx_started
        } else {
            queue.rx_started
        }
    }

    /// Expects a fresh ring to stop for what is at its start.
    fn expect_fault(&mut self, ring: u32, descs: &[PackedDesc], why: &str) {
        self.connect();
        eventually("the ring starts", || self.is_started(ring));
        self.offer(ring, descs);
        eventually("the bad ring stops", || !self.is_started(ring));
        let error = self.lab.switch.port(&name("bad")).unwrap().last_error;
        let error = error.unwrap();
        assert!(
            error.contains(&format!("ring {ring} stopped")) && error.contains(why),
            "{error:?} is not {why:?}"
        );
        self.faults[ring as usize] += 1;
        let [rx, tx] = self.faults;
        self.lab
            .eventually_dropped("bad", |c| c.tx_drops[DropReason::BadDescriptor], rx);
        self.lab
            .eventually_dropped("bad", |c| c.rx_drops[DropReason::BadDescriptor], tx);
    }

    /// Bytes somewhere in the bad guest's memory.
    fn put(&mut self, bytes: &[u8]) -> u64 {
        let memory = self.bad.as_ref().unwrap().memory();
        let addr = memory.alloc(bytes.len() as u64, 16).unwrap();
        memory.write(addr, bytes).unwrap();
        addr
    }

    fn finish(self) {
        self.innocents.finish(&self.lab);
        self.lab
            .assert_conserved(&["left", "right", "peer", "bad"], 0);
    }
}

fn direction(ring: u32) -> u16 {
    if ring == RX { DESC_F_WRITE } else { 0 }
}

/// A descriptor that is available in the first lap.
fn desc(addr: u64, len: u32, flags: u16) -> PackedDesc {
    PackedDesc {
        addr,
        len,
        id: 0,
        flags: flags | DESC_F_AVAIL,
    }
}

/// CVE-2018-1059 on packed rings: the whole range of a buffer is checked, wherever it stands.
#[test]
fn cve_2018_1059_a_buffer_that_leaves_guest_memory_stops_its_packed_ring() {
    let mut scene = Scene::new(Guest::builder());
    let end = scene
        .connect()
        .memory()
        .regions()
        .next()
        .unwrap()
        .layout
        .size;
    for ring in [TX, RX] {
        let good = desc(0, 64, direction(ring) | DESC_F_NEXT);
        for (addr, len) in [(end, 1), (end - 1, 2), (0, u32::MAX), (u64::MAX, 2)] {
            let bad = desc(addr, len, direction(ring));
            scene.expect_fault(ring, &[bad], NOT_MEMORY);
            scene.expect_fault(ring, &[good, bad], NOT_MEMORY);
        }
        let table = desc(end, 32, DESC_F_INDIRECT);
        scene.expect_fault(ring, &[table], NOT_MEMORY);
        for len in [0, 24, 16 * 1025, u32::MAX] {
            let table = desc(0, len, DESC_F_INDIRECT);
            scene.expect_fault(ring, &[table], "no multiple of 16");
        }
    }
    scene.finish();
}

#[test]
fn buffers_of_the_wrong_direction_or_without_bytes_stop_their_packed_ring() {
    let mut scene = Scene::new(Guest::builder());
    for ring in [TX, RX] {
        let wrong = desc(0, 64, direction(ring) ^ DESC_F_WRITE);
        scene.expect_fault(ring, &[wrong], "buffer has descriptor flags");
    }
    scene.expect_fault(RX, &[desc(0, 0, DESC_F_WRITE)], "no bytes");
    scene.finish();
}

/// CVE-2020-14378 on packed rings: a chain without an end, in a ring shorter and one longer than
/// the longest chain.
#[test]
fn cve_2020_14378_a_packed_chain_without_an_end_stops_its_ring() {
    for (queue_size, most) in [(SIZE, SIZE), (2048, 1024)] {
        let mut scene = Scene::new(Guest::builder());
        scene.config = scene.config.queue_size(queue_size);
        for ring in [TX, RX] {
            let link = desc(0, 1, direction(ring) | DESC_F_NEXT);
            let descs = vec![link; usize::from(queue_size)];
            let why = format!("more than {most} descriptors");
            scene.expect_fault(ring, &descs, &why);
        }
        scene.finish();
    }
}

/// virtio 1.3, 2.8.6: all flags of a list are those of the lap.
#[test]
fn a_chain_that_goes_on_in_descriptors_of_the_wrong_lap_stops_its_ring() {
    let mut scene = Scene::new(Guest::builder());
    for ring in [TX, RX] {
        let first = desc(0, 64, direction(ring) | DESC_F_NEXT);
        for flags in [0, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED] {
            let stale = PackedDesc {
                flags: flags | direction(ring),
                ..first
            };
            scene.expect_fault(ring, &[first, stale], "goes on in descriptor 1");
        }
    }
    scene.finish();
}

#[test]
fn indirect_descriptors_in_chains_or_not_negotiated_stop_their_packed_ring() {
    for indirect in [true, false] {
        let mut scene = Scene::new(Guest::builder().indirect(indirect));
        for ring in [TX, RX] {
            let table = desc(0, 32, DESC_F_INDIRECT);
            if !indirect {
                scene.expect_fault(ring, &[table], "was not negotiated");
                continue;
            }
            let link = desc(0, 64, direction(ring) | DESC_F_NEXT);
            scene.expect_fault(ring, &[link, table], "part of a chain");
            let with_next = desc(0, 32, DESC_F_INDIRECT | DESC_F_NEXT);
            scene.expect_fault(ring, &[with_next, link], "part of a chain");
        }
        scene.finish();
    }
}

/// virtio 1.3, 2.8.7: in a table only WRITE counts, so that a table in a table is a buffer.
#[test]
fn a_table_in_a_packed_table_is_sent_as_the_bytes_it_has() {
    let mut scene = Scene::new(Guest::builder());
    scene.connect();
    let sent = frame(PEER, BAD, 64, 1);
    let head = scene.put(&plain(&sent));
    let inner = scene.put(&[0x5a; 32]);
    let entry = |addr: u64, len: u32, flags: u16| {
        let words = [addr, u64::from(len) | u64::from(flags) << 48];
        words.map(u64::to_le_bytes).concat()
    };
    let table = [
        entry(head, 76, DESC_F_NEXT | DESC_F_USED),
        entry(inner, 32, DESC_F_INDIRECT | DESC_F_NEXT),
    ];
    let table = scene.put(&table.concat());
    scene.offer(TX, &[desc(table, 32, DESC_F_INDIRECT)]);
    let received = receive(&mut scene.peer).frame;
    assert_eq!(received, [&sent[..], &[0x5a; 32]].concat());
    scene.finish();
}

/// DPDK's virtio_user leaves WRITE in entries of what it sends, which net_vhost never minded.
#[test]
fn a_transmit_table_with_buffers_marked_as_writable_is_taken_and_counted() {
    let mut scene = Scene::new(Guest::builder());
    scene.connect();
    let sent = frame(PEER, BAD, 64, 1);
    let (header, body) = (scene.put(&[0; 12]), scene.put(&sent));
    let entry = |addr: u64, len: u32, flags: u16| {
        let words = [addr, u64::from(len) | u64::from(flags) << 48];
        words.map(u64::to_le_bytes).concat()
    };
    let marks = [
        [0, 0],
        [DESC_F_WRITE, 0],
        [0, DESC_F_WRITE],
        [DESC_F_WRITE; 2],
    ];
    let tables: Vec<_> = marks
        .iter()
        .map(|[first, second]| {
            let table = [entry(header, 12, *first), entry(body, 64, *second)].concat();
            desc(scene.put(&table), 32, DESC_F_INDIRECT)
        })
        .collect();
    scene.offer(TX, &tables);
    for _ in &tables {
        assert_eq!(receive(&mut scene.peer).frame, sent);
    }
    let detail = scene.lab.switch.port(&name("bad")).unwrap();
    assert_eq!(detail.queues[0].tolerated, 3);
    assert!(scene.is_started(TX));
    scene.finish();
}

/// An id is the driver's own affair: it comes back as it was, whatever it is.
#[test]
fn ids_beyond_the_ring_come_back_as_they_are() {
    let mut scene = Scene::new(Guest::builder());
    scene.connect();
    let sent = frame(PEER, BAD, 64, 1);
    let addr = scene.put(&plain(&sent));
    let descs = [0xffff, SIZE, 0, 0].map(|id| PackedDesc {
        id,
        ..desc(addr, 76, 0)
    });
    scene.offer(TX, &descs);
    let area = scene.area(TX);
    for (slot, desc) in (0..).zip(descs) {
        assert_eq!(receive(&mut scene.peer).frame, sent);
        eventually("it is used", || {
            area.read_desc(slot).flags & DESC_F_USED != 0
        });
        let used = area.read_desc(slot);
        assert_eq!((used.id, used.flags), (desc.id, DESC_F_AVAIL | DESC_F_USED));
    }
    assert!(scene.is_started(TX));
    scene.finish();
}

/// Descriptors that no lap made available are none, and the worker goes to sleep over them.
#[test]
fn descriptors_of_the_wrong_lap_are_not_taken() {
    let mut scene = Scene::new(Guest::builder());
    scene.connect();
    let sent = frame(PEER, BAD, 64, 1);
    let addr = scene.put(&plain(&sent));
    for flags in [0, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED] {
        let wrong = PackedDesc {
            flags,
            ..desc(addr, 76, 0)
        };
        scene.offer(TX, &[wrong; 4]);
    }
    // A frame of somebody else's passes meanwhile, and none of these.
    let other = frame(BAD, PEER, 64, 2);
    scene.peer.send_frame(&other).unwrap();
    let bad = scene.bad.as_mut().unwrap();
    assert_eq!(bad.recv(DEADLINE).unwrap().unwrap().frame, other);
    assert_eq!(scene.lab.counters("bad").rx_frames, 0);
    assert!(scene.is_started(TX));
    scene.offer(TX, &[desc(addr, 76, 0)]);
    assert_eq!(receive(&mut scene.peer).frame, sent);
    scene.finish();
}

/// A base beyond the ring is refused, and so the ring does not run.
#[test]
fn a_base_beyond_the_packed_ring_is_refused() {
    let mut scene = Scene::new(Guest::builder());
    scene.connect();
    for base in [0x8000_8010, 0x8010_8000, 0x0000_7fff, u32::MAX] {
        let bad = scene.bad.as_mut().unwrap();
        bad.frontend().stop_ring(TX).unwrap();
        let memory = std::sync::Arc::clone(bad.memory());
        let mut place = bad.transmit_queue(0).ring().place();
        place.base = base;
        let kick = ringway_guest::EventFd::new().unwrap();
        let started = bad
            .frontend()
            .start_ring(TX, &memory, place, Some(&kick), None);
        assert!(started.is_err(), "{base:#x}");
        assert!(!scene.is_started(TX));
    }
    scene.finish();
}
