//! Guests whose addresses and lengths lie, against a real switch. Classes of
//! CVE-2018-1059, CVE-2020-10725, CVE-2022-2132 and CVE-2026-86566.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::hostile::{
    BAD, GAP, GUARD_BYTES, MAIN, MAIN_BYTES, MAIN_END, PEER, RX, RawConfig, Stage, TX, chain,
    plain, set_addresses, table_bytes,
};
use common::{eventually, frame, receive};
use ringway_bridge::DropReason;
use ringway_guest::features::{
    VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{DESC_F_INDIRECT, DESC_F_NEXT, Guest, SplitDesc};

/// Ranges that are not wholly guest memory, of which some begin or end in it.
fn ranges_outside() -> Vec<(u64, u32)> {
    let main = u32::try_from(MAIN_BYTES).unwrap();
    let gap = u32::try_from(GAP).unwrap();
    vec![
        (MAIN_END - 1, 4096),
        (MAIN_END - 1, 2),
        (MAIN_END - 4096, 4097),
        (MAIN_END, 1),
        // From one region to the next, over the gap between them.
        (MAIN_END - 64, 64 + gap + 64),
        (MAIN - GAP - 64, 64 + gap + 64),
        (MAIN_END - 1, gap + 2),
        (MAIN - 1, 2),
        (MAIN, main + 1),
        (MAIN, u32::MAX),
        (MAIN_END + GAP + GUARD_BYTES - 1, 2),
        (0, 64),
        (MAIN - (1 << 31), u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 63, 64),
        (u64::MAX - 10, u32::MAX),
    ]
}

const NOT_MEMORY: &str = "is not in guest memory";

/// CVE-2018-1059: the whole range of a buffer is checked, wherever in a chain or table it stands.
#[test]
fn cve_2018_1059_a_buffer_that_leaves_guest_memory_stops_its_ring_only() {
    let mut stage = Stage::new();
    for ring in [TX, RX] {
        for bad in ranges_outside() {
            let good = (stage.bad.put(0, &plain(&frame(PEER, BAD, 64, 1))), 40);
            stage.bad.ring(ring).write_chain(0, &[bad]);
            stage.expect_fault(ring, &[0], NOT_MEMORY);
            stage.bad.ring(ring).write_chain(7, &[good, bad]);
            stage.expect_fault(ring, &[7], NOT_MEMORY);
            let table = chain(0, &[good, bad], stage.bad.ring(ring).direction());
            offer_table(&mut stage, ring, &table, NOT_MEMORY);
        }
    }
    stage.finish();
}

/// Offers an indirect table and expects a fault.
fn offer_table(stage: &mut Stage, ring: u32, table: &[SplitDesc], why: &str) {
    let bytes = table_bytes(table);
    let addr = stage.bad.put(1 << 16, &bytes);
    let len = u32::try_from(bytes.len()).unwrap();
    stage.bad.ring(ring).area.write_desc(3, indirect(addr, len));
    stage.expect_fault(ring, &[3], why);
}

fn indirect(addr: u64, len: u32) -> SplitDesc {
    SplitDesc {
        addr,
        len,
        flags: DESC_F_INDIRECT,
        next: 0,
    }
}

/// CVE-2018-1059 once more: indirect tables are guest memory as a whole, too.
#[test]
fn cve_2018_1059_an_indirect_table_that_leaves_guest_memory_stops_its_ring_only() {
    let mut stage = Stage::new();
    for ring in [TX, RX] {
        let buffers = stage.bad.buffers;
        let tables = [
            (indirect(MAIN_END - 16, 32), NOT_MEMORY),
            (indirect(MAIN_END - 8, 16), NOT_MEMORY),
            (indirect(MAIN_END - 16, 8192), NOT_MEMORY),
            (indirect(MAIN - 16, 32), NOT_MEMORY),
            (indirect(0, 16), NOT_MEMORY),
            (indirect(u64::MAX - 15, 16), NOT_MEMORY),
            (indirect(u64::MAX - 15, 32), NOT_MEMORY),
            (indirect(buffers, 0), "no multiple of 16"),
            (indirect(buffers, 24), "no multiple of 16"),
            (indirect(buffers, u32::MAX), "no multiple of 16"),
            (indirect(buffers, 0xffff_fff0), "too large"),
            (indirect(buffers, 16 * 1025), "too large"),
        ];
        for (desc, why) in tables {
            stage.bad.ring(ring).area.write_desc(9, desc);
            // A range that begins in memory but leaves it is told as crossing regions.
            let begins_inside = desc.addr >= MAIN && desc.addr < MAIN_END;
            let why = if why == NOT_MEMORY && begins_inside {
                "crosses regions"
            } else {
                why
            };
            stage.expect_fault(ring, &[9], why);
        }
    }
    stage.finish();
}

/// The areas of a ring are guest memory as a whole and aligned, or the ring does not start.
#[test]
fn cve_2018_1059_a_ring_that_leaves_guest_memory_does_not_start() {
    let mut stage = Stage::new();
    let main = stage.bad.memory.user_addr(MAIN).unwrap();
    let end = main + MAIN_BYTES;
    for ring in [TX, RX] {
        let place = stage.bad.ring(ring).area.place();
        let good = [place.desc, place.driver, place.device]
            .map(|addr| stage.bad.memory.user_addr(addr).unwrap());
        let bad = [
            end,
            end - 2,
            end - 16,
            end - 64,
            main - 16,
            0,
            u64::MAX - 15,
            u64::MAX - 4095,
            // A guest address is no user address.
            MAIN,
        ];
        for area in 0..3 {
            for address in bad {
                let mut addresses = good;
                addresses[area] = address;
                // Not refused: the memory may come later. But nothing runs.
                set_addresses(&mut stage.bad.frontend, ring, addresses).unwrap();
                assert!(!stage.is_started(ring), "area {area} at {address:#x}");
            }
            let mut misaligned = good;
            misaligned[area] += 1;
            let answer = set_addresses(&mut stage.bad.frontend, ring, misaligned);
            assert!(answer.is_err(), "area {area} is misaligned");
            assert!(!stage.is_started(ring));
            set_addresses(&mut stage.bad.frontend, ring, good).unwrap();
            stage.assert_works();
        }
    }
    stage.finish();
}

/// The last entry's bytes count: an area that fits but for its event field is refused.
#[test]
fn a_ring_whose_event_field_is_outside_of_guest_memory_does_not_start() {
    let mut stage = Stage::new();
    let end = stage.bad.memory.user_addr(MAIN).unwrap() + MAIN_BYTES;
    let size = u64::from(stage.bad.tx.area.size());
    let place = stage.bad.tx.area.place();
    let good = [place.desc, place.driver, place.device]
        .map(|addr| stage.bad.memory.user_addr(addr).unwrap());
    for (area, bytes) in [(1, 4 + 2 * size), (2, 4 + 8 * size)] {
        let mut addresses = good;
        addresses[area] = end - bytes;
        let answer = set_addresses(&mut stage.bad.frontend, TX, addresses);
        assert!(answer.is_err() && !stage.is_started(TX), "area {area}");
        set_addresses(&mut stage.bad.frontend, TX, good).unwrap();
        stage.assert_works();
    }
    stage.finish();
}

/// CVE-2020-10725: a bad address with length 0, or a good one, in each slot of a batch. The
/// address of no bytes is nobody's business: that chain is a frame too short, and no other is
/// touched.
#[test]
fn cve_2020_10725_a_bad_address_with_length_0_in_any_slot_of_a_batch_is_one_bad_frame() {
    const BATCH: u16 = 32;
    let mut stage = Stage::new();
    let frames: Vec<_> = (0..u64::from(BATCH))
        .map(|i| frame(PEER, BAD, 60, i))
        .collect();
    let mut bad_frames = 0;
    for address in [0, MAIN_END, u64::MAX, stage.bad.buffers] {
        for bad_slot in 0..BATCH {
            let heads: Vec<u16> = (0..BATCH).collect();
            for (slot, bytes) in (0..).zip(&frames) {
                let addr = stage.bad.put(u64::from(slot) * 128, &plain(bytes));
                stage.bad.tx.write_chain(slot, &[(addr, 72)]);
            }
            stage.bad.tx.write_chain(bad_slot, &[(address, 0)]);
            stage.bad.tx.offer(&heads);
            for (slot, sent) in (0..).zip(&frames) {
                if slot != bad_slot {
                    assert_eq!(&receive(&mut stage.peer).frame, sent, "slot {slot}");
                }
            }
            stage.bad.tx.wait_used();
            bad_frames += 1;
        }
    }
    let port = stage.port.clone();
    stage
        .lab
        .eventually_dropped(&port, |c| c.rx_drops[DropReason::BadHeader], bad_frames);
    stage.assert_works();
    stage.finish();
}

/// The same in receive rings, where no driver posts empty buffers: QEMU's "zero sized buffers are
/// not allowed".
#[test]
fn cve_2020_10725_an_empty_receive_buffer_stops_its_ring_only() {
    let mut stage = Stage::new();
    let good = (stage.bad.buffers, 64);
    for address in [0, MAIN_END, u64::MAX, stage.bad.buffers] {
        for buffers in [
            vec![(address, 0)],
            vec![good, (address, 0)],
            vec![(address, 0), good],
        ] {
            stage.bad.rx.write_chain(0, &buffers);
            stage.expect_fault(RX, &[0], "no bytes");
        }
    }
    stage.finish();
}

/// CVE-2022-2132, CVE-2026-86566: the header may come in any pieces.
#[test]
fn cve_2022_2132_a_header_in_any_pieces_is_one_header() {
    let mut stage = Stage::new();
    for (seed, bytes) in (0..).zip([14, 60, 116, 117, 300]) {
        let sent = frame(PEER, BAD, bytes, seed);
        let message = plain(&sent);
        let len = u32::try_from(message.len()).unwrap();
        let addr = stage.bad.put(0, &message);
        let byte = |at: u32| (addr + u64::from(at), 1);
        let rest = |from: u32| (addr + u64::from(from), len - from);
        let cuts: Vec<Vec<(u64, u32)>> = vec![
            (0..12).map(byte).chain([rest(12)]).collect(),
            (0..11).map(byte).chain([rest(11)]).collect(),
            vec![(addr, 11), rest(11)],
            vec![(addr, 13), rest(13)],
            vec![(addr, 6), (addr + 6, 6), (addr + 12, 1), rest(13)],
            (0..len.min(250))
                .map(byte)
                .chain([rest(len.min(250))])
                .collect(),
        ];
        for buffers in cuts {
            let buffers: Vec<_> = buffers.into_iter().filter(|(_, len)| *len > 0).collect();
            stage.bad.tx.write_chain(0, &buffers);
            stage.bad.tx.offer(&[0]);
            assert_eq!(receive(&mut stage.peer).frame, sent, "{buffers:x?}");
            stage.bad.tx.wait_used();
            let table = table_bytes(&chain(0, &buffers, 0));
            // Tables may lie anywhere: 2.7 asks for alignment of a ring's own table only.
            let at = stage.bad.put((1 << 16) + u64::from(len % 16), &table);
            let desc = indirect(at, u32::try_from(table.len()).unwrap());
            stage.bad.tx.area.write_desc(0, desc);
            stage.bad.tx.offer(&[0]);
            assert_eq!(
                receive(&mut stage.peer).frame,
                sent,
                "{buffers:x?} indirect"
            );
            stage.bad.tx.wait_used();
        }
    }
    stage.finish();
}

/// CVE-2022-2132: chains of just a header or less are dropped, and the queue goes on.
#[test]
fn cve_2022_2132_chains_shorter_than_header_and_frame_are_dropped_and_the_queue_goes_on() {
    for features in [VIRTIO_F_VERSION_1, 0] {
        let config = RawConfig {
            features: features | VIRTIO_RING_F_INDIRECT_DESC,
            ..RawConfig::default()
        };
        let mut stage = Stage::with(config, Guest::builder(), |_| {});
        let header = if features == 0 { 10 } else { 12 };
        let addr = stage.bad.put(0, &[0; 64]);
        let (mut short, mut runts) = (0, 0);
        for len in 1..header + 14 {
            for buffers in [
                vec![(addr, len)],
                (0..len).map(|i| (addr + u64::from(i), 1)).collect(),
            ] {
                stage.bad.tx.write_chain(0, &buffers);
                stage.bad.tx.offer(&[0]);
                stage.bad.tx.wait_used();
                if len < header {
                    short += 1;
                } else {
                    runts += 1;
                }
            }
        }
        let port = stage.port.clone();
        let lab = &stage.lab;
        lab.eventually_dropped(&port, |c| c.rx_drops[DropReason::BadHeader], short);
        lab.eventually_dropped(&port, |c| c.rx_drops[DropReason::Runt], runts);
        if features != 0 {
            stage.assert_works();
        }
        assert!(stage.is_started(TX));
        stage.finish();
    }
}

/// CVE-2022-2132 in the other direction: receive chains of 12 buffers of 1 byte.
#[test]
fn cve_2022_2132_receive_buffers_of_1_byte_take_header_and_frame_in_pieces() {
    for mergeable in [true, false] {
        let merge = if mergeable { VIRTIO_NET_F_MRG_RXBUF } else { 0 };
        let config = RawConfig {
            features: VIRTIO_F_VERSION_1 | merge,
            ..RawConfig::default()
        };
        let mut stage = Stage::with(config, Guest::builder(), |_| {});
        let area = stage.bad.put(0, &[0xa5; 4096]);
        let heads: Vec<u16> = (0..12).map(|i| i * 12).collect();
        for head in &heads {
            let byte = |i: u64| (area + u64::from(*head) + i, 1);
            let bytes: Vec<_> = (0..12).map(byte).collect();
            stage.bad.rx.write_chain(*head, &bytes);
        }
        stage.bad.rx.offer(&heads);
        let sent = frame(BAD, PEER, 70, 3);
        stage.peer.send_frame(&sent).unwrap();
        if mergeable {
            eventually("the frame is there", || stage.bad.rx.area.used_idx() == 7);
            let received = stage.bad.bytes(area, 4096);
            assert_eq!(received[..10], [0; 10]);
            assert_eq!(received[10..12], [7, 0], "num_buffers");
            assert_eq!(received[12..82], sent);
            assert!(received[82..].iter().all(|b| *b == 0xa5));
            let used: Vec<_> = (0..7).map(|i| stage.bad.rx.area.used_entry(i)).collect();
            let expected: Vec<_> = (0..7)
                .map(|i| (u32::from(heads[i]), if i < 6 { 12 } else { 10 }))
                .collect();
            assert_eq!(used, expected);
        } else {
            let port = stage.port.clone();
            stage
                .lab
                .eventually_dropped(&port, |c| c.tx_drops[DropReason::BufferTooSmall], 1);
            assert_eq!(stage.bad.rx.area.used_idx(), 0, "nothing was published");
            assert!(stage.bad.bytes(area, 4096).iter().all(|b| *b == 0xa5));
        }
        stage.recover(RX);
        stage.finish();
    }
}

/// CVE-2021-3839 and CVE-2026-86565 for descriptors: an index is compared before it is used.
#[test]
fn cve_2021_3839_descriptor_indices_beyond_the_table_stop_their_ring_only() {
    let mut stage = Stage::new();
    for ring in [TX, RX] {
        let good = (stage.bad.put(0, &plain(&frame(PEER, BAD, 64, 1))), 40);
        for index in [256, 257, 0x7fff, 0x8000, 0xffff] {
            stage.expect_fault(ring, &[index], "does not exist");
            let mut descs = chain(0, &[good, good], stage.bad.ring(ring).direction());
            descs[0].next = index;
            stage.bad.ring(ring).area.write_desc(0, descs[0]);
            stage.expect_fault(ring, &[0], "does not exist");
            descs[0].next = if index == 256 { 2 } else { index };
            offer_table(&mut stage, ring, &descs, "does not exist");
        }
        // The wrong direction: as a whole, and in the middle of a chain.
        let direction = stage.bad.ring(ring).direction();
        for flags in [direction ^ 2, direction ^ 2 | DESC_F_NEXT] {
            let mut descs = chain(0, &[good, good], direction);
            descs[1].flags = flags;
            offer_table(&mut stage, ring, &descs, "flags");
            stage.bad.ring(ring).area.write_desc(0, descs[1]);
            stage.expect_fault(ring, &[0], "flags");
        }
    }
    stage.finish();
}
