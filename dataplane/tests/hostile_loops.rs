//! Guests that would keep a worker busy for ever. Classes of CVE-2020-14378, CVE-2019-3900 and
//! CVE-2026-74356.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::hostile::{BAD, PEER, RX, RawConfig, Stage, TX, chain, plain, table_bytes};
use common::{eventually, frame, receive};
use ringway_bridge::DropReason;
use ringway_guest::features::{
    VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{DESC_F_INDIRECT, DESC_F_NEXT, Guest, SplitDesc};
use ringway_testbed::StopOnDrop;

/// CVE-2020-14378: an index that runs away is a broken rule, not so many chains.
#[test]
fn cve_2020_14378_an_avail_index_that_jumps_stops_its_ring_only() {
    for queue_size in [1, 256] {
        let config = RawConfig {
            queue_size,
            ..RawConfig::default()
        };
        let mut stage = Stage::with(config, Guest::builder(), |_| {});
        for ring in [TX, RX] {
            for jump in [65_535, queue_size + 1, 0x8000, 0xff00] {
                let raw = stage.bad.ring(ring);
                raw.next = raw.next.wrapping_add(jump);
                stage.expect_fault(ring, &[], "ahead of");
            }
        }
        stage.finish();
    }
}

const TOO_LONG: &str = "more than 1024 descriptors";

/// CVE-2020-14378: links that lead back.
#[test]
fn cve_2020_14378_chains_that_link_to_themselves_or_each_other_stop_their_ring_only() {
    for queue_size in [2, 256] {
        let config = RawConfig {
            queue_size,
            ..RawConfig::default()
        };
        let mut stage = Stage::with(config, Guest::builder(), |_| {});
        for ring in [TX, RX] {
            let direction = stage.bad.ring(ring).direction();
            let addr = stage.bad.put(0, &plain(&frame(PEER, BAD, 64, 1)));
            let last = queue_size - 1;
            // Itself; each other; a cycle through the whole table, so longer than the ring.
            let cycles: [Vec<u16>; 3] = [vec![0], vec![0, 1], (0..=last).collect()];
            for cycle in cycles {
                // Empty buffers add nothing to a transmit chain but its length.
                for len in if ring == TX {
                    vec![0, 1, 4096]
                } else {
                    vec![1, 4096]
                } {
                    let descs: Vec<_> = (0..cycle.len())
                        .map(|i| SplitDesc {
                            addr,
                            len,
                            flags: direction | DESC_F_NEXT,
                            next: cycle[(i + 1) % cycle.len()],
                        })
                        .collect();
                    for (index, desc) in cycle.iter().zip(&descs) {
                        stage.bad.ring(ring).area.write_desc(*index, *desc);
                    }
                    stage.expect_fault(ring, &[0], TOO_LONG);
                    offer_table(&mut stage, ring, &descs, TOO_LONG);
                }
            }
        }
        stage.finish();
    }
}

/// Offers an indirect table and expects a fault.
fn offer_table(stage: &mut Stage, ring: u32, table: &[SplitDesc], why: &str) {
    let desc = put_table(stage, table);
    stage.bad.ring(ring).area.write_desc(0, desc);
    stage.expect_fault(ring, &[0], why);
}

/// Writes an indirect table and returns the descriptor of it.
fn put_table(stage: &Stage, table: &[SplitDesc]) -> SplitDesc {
    let bytes = table_bytes(table);
    SplitDesc {
        addr: stage.bad.put(1 << 16, &bytes),
        len: u32::try_from(bytes.len()).unwrap(),
        flags: DESC_F_INDIRECT,
        next: 0,
    }
}

/// virtio 1.3, 2.7.5.3: tables in tables, tables with a successor, tables that were not negotiated.
#[test]
fn indirect_tables_in_tables_or_not_negotiated_stop_their_ring_only() {
    for negotiated in [true, false] {
        let feature = if negotiated {
            VIRTIO_RING_F_INDIRECT_DESC
        } else {
            0
        };
        let config = RawConfig {
            features: VIRTIO_F_VERSION_1 | feature,
            ..RawConfig::default()
        };
        let mut stage = Stage::with(config, Guest::builder(), |_| {});
        for ring in [TX, RX] {
            let direction = stage.bad.ring(ring).direction();
            let addr = stage.bad.put(0, &plain(&frame(PEER, BAD, 64, 1)));
            let mut table = chain(0, &[(addr, 76), (addr, 76)], direction);
            if !negotiated {
                offer_table(&mut stage, ring, &table, "was not negotiated");
                continue;
            }
            // To itself, and to another one behind a buffer.
            for at in [0, 1] {
                let mut nested = table.clone();
                nested[at] = put_table(&stage, &table);
                offer_table(&mut stage, ring, &nested, "points to another table");
            }
            table[1].flags = direction;
            let desc = put_table(&stage, &table);
            let with_next = SplitDesc {
                flags: DESC_F_INDIRECT | DESC_F_NEXT,
                next: 1,
                ..desc
            };
            stage.bad.ring(ring).area.write_desc(0, with_next);
            stage.expect_fault(ring, &[0], "has a next descriptor");
        }
        stage.finish();
    }
}

/// CVE-2019-3900 and CVE-2026-74356: a frame of 64 KiB meets 256 receive chains of 1,024 tiny or
/// empty buffers each. What is looked at for one frame is bounded, so that the innocent pair
/// keeps its pace.
#[test]
fn cve_2019_3900_receive_chains_of_many_tiny_buffers_do_not_hold_up_others() {
    let config = RawConfig {
        features: VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_NET_F_MRG_RXBUF,
        ..RawConfig::default()
    };
    let peer = Guest::builder().buffer_size(32_768);
    let mut stage = Stage::with(config, peer, |_| {});
    for empty in [true, false] {
        let addr = stage.bad.put(0, &[0; 64]);
        let lens = (0..1024).map(|i| (addr, if empty && i > 0 { 0 } else { 1 }));
        let table = chain(0, &lens.collect::<Vec<_>>(), stage.bad.rx.direction());
        let desc = put_table(&stage, &table);
        for index in 0..256 {
            stage.bad.rx.area.write_desc(index, desc);
        }
        let heads: Vec<u16> = (0..256).collect();
        if empty {
            stage.expect_fault(RX, &heads, "no bytes");
            continue;
        }
        stage.bad.rx.offer(&heads);
        let large = plain(&frame(BAD, PEER, 30_000, 1));
        for _ in 0..64 {
            stage.peer.send(&large).unwrap();
        }
        assert!(stage.peer.flush(common::DEADLINE).unwrap());
        stage
            .lab
            .eventually_dropped(&stage.port, |c| c.tx_drops[DropReason::BufferTooSmall], 64);
        assert_eq!(stage.bad.rx.area.used_idx(), stage.bad.rx.next - 256);
        stage.recover(RX);
    }
    stage.finish();
}

/// CVE-2026-74356: a mergeable ring with too few buffers for one frame. Nothing is published until
/// all of the frame fits.
#[test]
fn a_mergeable_ring_with_too_few_buffers_for_a_frame_gets_all_of_it_or_nothing() {
    let config = RawConfig {
        features: VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF,
        ..RawConfig::default()
    };
    let mut stage = Stage::with(config, Guest::builder(), |switch| {
        switch.idle.backpressure = Duration::from_millis(1);
    });
    let buffer = |i: u16| stage.bad.buffers + u64::from(i) * 256;
    let post: Vec<_> = (0..8).map(buffer).collect();
    for (index, addr) in (0..).zip(&post) {
        stage.bad.rx.write_chain(index, &[(*addr, 256)]);
    }
    // 1,012 bytes need 4 buffers.
    stage.bad.rx.offer(&[0, 1, 2]);
    stage.peer.send_frame(&frame(BAD, PEER, 1000, 1)).unwrap();
    let port = stage.port.clone();
    stage
        .lab
        .eventually_dropped(&port, |c| c.tx_drops[DropReason::RingFull], 1);
    assert_eq!(stage.bad.rx.area.used_idx(), 0);
    stage.bad.rx.offer(&[3]);
    let sent = frame(BAD, PEER, 1000, 2);
    stage.peer.send_frame(&sent).unwrap();
    stage.bad.rx.wait_used();
    let received: Vec<u8> = post[..4]
        .iter()
        .flat_map(|addr| stage.bad.bytes(*addr, 256))
        .collect();
    assert_eq!(received[10..12], [4, 0]);
    assert_eq!(received[12..1012], sent);
    stage.assert_works();
    stage.finish();
}

/// CVE-2019-3900: a guest that makes chains available faster than they are consumed has its turn
/// and no more.
#[test]
fn cve_2019_3900_a_guest_that_recycles_faster_than_we_consume_gets_its_share_only() {
    let mut stage = Stage::new();
    let sent = frame(PEER, BAD, 60, 7);
    let addr = stage.bad.put(0, &plain(&sent));
    let size = stage.bad.tx.area.size();
    for index in 0..size {
        stage.bad.tx.write_chain(index, &[(addr, 72)]);
        stage.bad.tx.area.set_avail_entry(index, index);
    }
    let before = stage.innocent_frames();
    let stop = AtomicBool::new(false);
    let (area, kick) = (stage.bad.tx.area.clone(), Arc::clone(&stage.bad.tx.kick));
    let until = &stop;
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        // As far ahead as the rules allow, at every moment.
        scope.spawn(move || {
            while !until.load(Ordering::Relaxed) {
                area.set_avail_idx(area.used_idx().wrapping_add(size));
                if area.used_flags() == 0 {
                    kick.signal().unwrap();
                }
            }
        });
        for _ in 0..20_000 {
            assert_eq!(receive(&mut stage.peer).frame, sent);
        }
        stage.let_innocents_run(2000);
    });
    assert!(stage.innocent_frames() >= before + 2000);
    eventually("the ring runs empty", || {
        while stage.peer.try_recv(0).unwrap().is_some() {}
        stage.bad.tx.area.used_idx() == stage.bad.tx.area.avail_idx()
    });
    while stage.peer.try_recv(0).unwrap().is_some() {}
    assert!(stage.is_started(TX) && stage.is_started(RX));
    stage.bad.tx.next = stage.bad.tx.area.avail_idx();
    stage.assert_works();
    stage.finish();
}
