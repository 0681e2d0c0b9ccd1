//! Guests whose virtio-net headers and frames lie: classes of CVE-2024-11614, CVE-2026-100236,
//! CVE-2024-0340, CVE-2020-35498, CVE-2023-1668, CVE-2016-10377 and CVE-2016-2074.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::hostile::{BAD, PEER, RawConfig, Stage, plain};
use common::{DEADLINE, eventually, frame, mac, receive};
use etherparse::PacketBuilder;
use ringway_bridge::DropReason;
use ringway_guest::features::{
    TSO, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{Guest, NET_HEADER_BYTES};

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// A bad guest and a peer with all offloads.
fn with_offloads() -> Stage {
    let bad = RawConfig {
        features: RawConfig::default().features | TSO,
        ..RawConfig::default()
    };
    let peer = Guest::builder().features(TSO);
    Stage::with(bad, peer, |_| {})
}

/// A virtio-net header (virtio 1.3, 5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    fn bytes(self) -> [u8; NET_HEADER_BYTES] {
        let mut bytes = [0xee; NET_HEADER_BYTES];
        bytes[..2].copy_from_slice(&[self.flags, self.gso_type]);
        let fields = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        ];
        for (at, field) in fields.into_iter().enumerate() {
            bytes[2 + 2 * at..][..2].copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }
}

fn tcp4(payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(BAD), mac(PEER))
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(1000, 2000, 1, 64);
    written(payload, |bytes, frame| builder.write(frame, bytes).unwrap())
}

fn tcp6(payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(BAD), mac(PEER))
        .ipv6([1; 16], [2; 16], 64)
        .tcp(1000, 2000, 1, 64);
    written(payload, |bytes, frame| builder.write(frame, bytes).unwrap())
}

fn vlan_tcp4(payload: usize) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac(BAD), mac(PEER))
        .single_vlan(7.try_into().unwrap())
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(1000, 2000, 1, 64);
    written(payload, |bytes, frame| builder.write(frame, bytes).unwrap())
}

fn written(payload: usize, write: impl FnOnce(&[u8], &mut Vec<u8>)) -> Vec<u8> {
    let bytes: Vec<u8> = (0..=250).cycle().take(payload).collect();
    let mut frame = Vec::new();
    write(&bytes, &mut frame);
    frame
}

/// Sends each header with the frame, and asserts that just those come out that `expected` maps to
/// a header, with that header. Returns how many were dropped.
fn sweep(
    stage: &mut Stage,
    frame: &[u8],
    headers: &[Header],
    expected: impl Fn(Header) -> Option<Header>,
) -> u64 {
    const BATCH: usize = 32;
    let mut dropped = 0;
    for batch in headers.chunks(BATCH) {
        let mut heads = Vec::new();
        for (slot, header) in (0_u16..).zip(batch) {
            let message = [&header.bytes(), frame].concat();
            let addr = stage.bad.put(u64::from(slot) * 4096, &message);
            let len = u32::try_from(message.len()).unwrap();
            stage.bad.tx.write_chain(slot, &[(addr, len)]);
            heads.push(slot);
        }
        stage.bad.tx.offer(&heads);
        for header in batch {
            let Some(clean) = expected(*header) else {
                dropped += 1;
                continue;
            };
            let received = receive(&mut stage.peer);
            assert_eq!(received.frame, frame, "{header:?}");
            assert_eq!(received.header[..10], clean.bytes()[..10], "{header:?}");
        }
        stage.bad.tx.wait_used();
    }
    dropped
}

/// Values at and around the edges of what a frame of `len` bytes may say, and coarsely between.
fn edges(len: u16) -> Vec<u16> {
    let mut values = vec![
        0, 1, 13, 14, 15, 33, 34, 35, 53, 54, 55, 0x7fff, 0x8000, 0xfffe, 0xffff,
    ];
    values.extend([len - 3, len - 2, len - 1, len, len + 1]);
    values.extend((0..=65_535).step_by(8191));
    values
}

/// CVE-2024-11614: where the checksum is said to be, over all of its range.
#[test]
fn cve_2024_11614_checksums_outside_of_their_frame_are_dropped() {
    let mut stage = with_offloads();
    let mut bad_headers = 0;
    for frame in [tcp4(100), tcp6(2000), frame(PEER, BAD, 60, 1)] {
        let len = u16::try_from(frame.len()).unwrap();
        let header = |(csum_start, csum_offset)| Header {
            flags: NEEDS_CSUM,
            csum_start,
            csum_offset,
            ..Header::default()
        };
        let values = edges(len);
        let headers: Vec<_> = values
            .iter()
            .flat_map(|start| values.iter().map(|offset| header((*start, *offset))))
            .collect();
        bad_headers += sweep(&mut stage, &frame, &headers, |header| {
            let end = u32::from(header.csum_start) + u32::from(header.csum_offset) + 2;
            (header.csum_start >= 14 && end <= u32::from(len)).then_some(header)
        });
    }
    let port = stage.port.clone();
    stage
        .lab
        .eventually_dropped(&port, |c| c.rx_drops[DropReason::BadHeader], bad_headers);
    stage.assert_works();
    stage.finish();
}

/// CVE-2024-11614, CVE-2026-100236: each field of segmentation, all types.
#[test]
fn cve_2026_100236_segmentation_that_contradicts_its_frame_is_dropped() {
    let mut stage = with_offloads();
    let mut dropped = 0;
    for (frame, right_type, hdr_len, csum_start) in [
        (tcp4(2000), GSO_TCPV4, 54, 34),
        (tcp6(2000), GSO_TCPV6, 74, 54),
        (vlan_tcp4(2000), GSO_TCPV4, 58, 38),
    ] {
        let good = Header {
            flags: NEEDS_CSUM,
            gso_type: right_type,
            hdr_len,
            gso_size: 1448,
            csum_start,
            csum_offset: 16,
        };
        let mut headers = vec![good];
        headers.extend((0..=255).map(|gso_type| Header { gso_type, ..good }));
        headers.extend((0..=255).map(|flags| Header { flags, ..good }));
        for value in edges(2054) {
            headers.push(Header {
                hdr_len: value,
                ..good
            });
            headers.push(Header {
                gso_size: value,
                ..good
            });
            headers.push(Header {
                csum_start: value,
                ..good
            });
            headers.push(Header {
                csum_offset: value,
                ..good
            });
        }
        let bytes = u32::try_from(frame.len()).unwrap();
        dropped += sweep(&mut stage, &frame, &headers, |header| {
            let has_csum = header.flags & NEEDS_CSUM != 0;
            let end = u32::from(header.csum_start) + u32::from(header.csum_offset) + 2;
            if header.gso_type == 0 && !has_csum {
                // Nothing is asked for: the other fields mean nothing and do not travel on, nor does
                // DATA_VALID, which a driver must not set (virtio 1.3, 5.1.6.2.1).
                return Some(Header::default());
            }
            let clean = Header {
                flags: NEEDS_CSUM,
                hdr_len: 0,
                gso_size: 0,
                ..header
            };
            if header.gso_type == 0 {
                return (header.csum_start >= 14 && end <= bytes).then_some(clean);
            }
            // ECN was not negotiated, and a guest that lies about its protocol has no TSO.
            let is_right = has_csum
                && header.gso_type == right_type
                && header.gso_size > 0
                && (header.csum_start, header.csum_offset) == (csum_start, 16);
            is_right.then_some(Header {
                hdr_len,
                gso_size: header.gso_size,
                ..clean
            })
        });
    }
    let port = stage.port.clone();
    stage.lab.eventually_dropped(
        &port,
        |c| c.rx_drops[DropReason::BadHeader] + c.rx_drops[DropReason::OffloadNotNegotiated],
        dropped,
    );
    stage.assert_works();
    stage.finish();
}

/// What was not negotiated is not done, whatever the header says.
#[test]
fn offloads_that_were_not_negotiated_are_dropped_in_any_combination() {
    let peer = Guest::builder().features(TSO);
    let mut stage = Stage::with(RawConfig::default(), peer, |_| {});
    let frame = tcp4(2000);
    let headers: Vec<_> = (0..=255)
        .flat_map(|gso_type| [1, 3, 0xff].map(|flags| (flags, gso_type)))
        .map(|(flags, gso_type)| Header {
            flags,
            gso_type,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        })
        .collect();
    let dropped = sweep(&mut stage, &frame, &headers, |_| None);
    assert_eq!(dropped, 768);
    let port = stage.port.clone();
    stage.lab.eventually_dropped(
        &port,
        |c| c.rx_drops[DropReason::OffloadNotNegotiated],
        dropped,
    );
    stage.assert_works();
    stage.finish();
}

/// CVE-2020-35498, CVE-2023-1668, CVE-2016-10377, CVE-2016-2074: every frame cut off at every
/// byte, with and without offloads that have its headers parsed. Short ones are runts, the others
/// pass or are dropped; nothing crashes and each is accounted for.
#[test]
fn cve_2020_35498_frames_cut_off_anywhere_pass_or_are_dropped() {
    let mut stage = with_offloads();
    let mut options = tcp4(20);
    // A TCP header that claims 60 bytes, and an IPv4 header that claims 60.
    options[46] = 0xf0;
    let mut long_ip = tcp4(60);
    long_ip[14] = 0x4f;
    // IPv6 with a chain of extension headers that leads to itself and past the end.
    let mut extensions = tcp6(60);
    extensions[20] = 0;
    extensions[54..62].copy_from_slice(&[0, 0, 1, 4, 0, 0, 0, 0]);
    extensions[62..70].copy_from_slice(&[60, 255, 1, 4, 0, 0, 0, 0]);
    let mut tags = frame(PEER, BAD, 100, 2);
    for at in (12..90).step_by(4) {
        tags[at..at + 4].copy_from_slice(&[0x81, 0, 0, 7]);
    }
    let mut arp = frame(PEER, BAD, 60, 3);
    arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 255, 255, 0, 1]);
    let whole = [
        tcp4(20),
        tcp6(20),
        vlan_tcp4(20),
        options,
        long_ip,
        extensions,
        tags,
        arp,
    ];
    let mut offered = 0;
    for frame in &whole {
        for len in 0..=frame.len() {
            for gso_type in [0, GSO_TCPV4, GSO_TCPV6] {
                for flags in [0, NEEDS_CSUM] {
                    let header = Header {
                        flags,
                        gso_type,
                        hdr_len: 54,
                        gso_size: 10,
                        csum_start: if gso_type == GSO_TCPV6 { 54 } else { 34 },
                        csum_offset: 16,
                    };
                    let message = [&header.bytes(), &frame[..len]].concat();
                    let addr = stage.bad.put(0, &message);
                    let bytes = u32::try_from(message.len()).unwrap();
                    stage.bad.tx.write_chain(0, &[(addr, bytes)]);
                    stage.bad.tx.offer(&[0]);
                    stage.bad.tx.wait_used();
                    while let Some(received) = stage.peer.try_recv(0).unwrap() {
                        assert!(received.frame.len() >= 14);
                        assert!(frame.starts_with(&received.frame));
                    }
                    offered += 1;
                }
            }
        }
    }
    let port = stage.port.clone();
    let runts = whole.len() as u64 * 14 * 6;
    stage
        .lab
        .eventually_dropped(&port, |c| c.rx_drops[DropReason::Runt], runts);
    assert_eq!(stage.lab.counters(&port).rx_frames, offered);
    while stage.peer.try_recv(0).unwrap().is_some() {}
    stage.assert_works();
    stage.finish();
}

/// Frames beyond 64 KiB, and beyond the peer's MTU.
#[test]
fn jumbo_frames_beyond_every_limit_are_dropped_and_counted() {
    const LONGEST: usize = 40 + 65_535 + 14 + 8;
    let mut stage = with_offloads();
    let port = stage.port.clone();
    let mut longest = frame(PEER, BAD, LONGEST, 1);
    let send = |stage: &mut Stage, bytes: &[u8]| {
        let message = plain(bytes);
        let addr = stage.bad.put(0, &message);
        let len = u32::try_from(message.len()).unwrap();
        stage.bad.tx.write_chain(0, &[(addr, len)]);
        stage.bad.tx.offer(&[0]);
    };
    send(&mut stage, &longest);
    assert_eq!(receive(&mut stage.peer).frame, longest);
    longest.push(0);
    send(&mut stage, &longest);
    longest.resize(1 << 19, 0);
    send(&mut stage, &longest);
    // As much as a chain may hold: half of the memory, a thousand times.
    let half = (stage.bad.buffers, 1 << 19);
    stage.bad.tx.write_chain(0, &[half; 250]);
    stage.bad.tx.offer(&[0]);
    stage
        .lab
        .eventually_dropped(&port, |c| c.rx_drops[DropReason::TooLong], 3);
    stage.bad.tx.wait_used();
    // More than 4 GiB is a broken rule.
    let table: Vec<_> = vec![(common::hostile::MAIN, 2 << 20); 255];
    stage.bad.tx.write_chain(0, &table);
    stage.bad.tx.offer(&[0]);
    stage
        .lab
        .eventually_dropped(&port, |c| c.rx_drops[DropReason::TooLong], 4);
    stage.bad.tx.wait_used();
    stage.peer.frontend().set_mtu(1000).unwrap();
    send(&mut stage, &frame(PEER, BAD, 1023, 2));
    stage
        .lab
        .eventually_dropped("peer", |c| c.tx_drops[DropReason::TooLong], 1);
    let fits = frame(PEER, BAD, 1022, 3);
    send(&mut stage, &fits);
    assert_eq!(receive(&mut stage.peer).frame, fits);
    stage.bad.tx.wait_used();
    stage.assert_works();
    stage.finish();
}

/// CVE-2024-0340: of the destination's buffers just header and frame are written, and of the
/// source's header nothing travels on that its flags do not cover. The roles are swapped: the raw
/// guest looks at what it received, and the honest peer's header is full of rubbish.
#[test]
fn cve_2024_0340_receive_buffers_hold_nothing_but_header_and_frame() {
    for mergeable in [true, false] {
        let merge = if mergeable { VIRTIO_NET_F_MRG_RXBUF } else { 0 };
        let config = RawConfig {
            features: VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | merge,
            ..RawConfig::default()
        };
        let mut stage = Stage::with(config, Guest::builder(), |_| {});
        for bytes in [14, 15, 60, 115, 116, 117, 128, 300, 1514] {
            for pieces in 1..4_u32 {
                assert_received_clean(&mut stage, bytes, pieces);
            }
        }
        stage.assert_works();
        stage.finish();
    }
}

/// Receives one frame in a chain of `pieces` buffers with room to spare.
fn assert_received_clean(stage: &mut Stage, bytes: usize, pieces: u32) {
    let area = stage.bad.put(0, &[0xa5; 8192]);
    let buffers: Vec<_> = (0..pieces)
        .map(|i| {
            (
                area + u64::from(i) * 700,
                if i + 1 < pieces { 700 } else { 2000 },
            )
        })
        .collect();
    stage.bad.rx.write_chain(0, &buffers);
    let slot = stage.bad.rx.next & (stage.bad.rx.area.size() - 1);
    stage.bad.rx.offer(&[0]);
    let sent = frame(BAD, PEER, bytes, 5);
    // No flag, no segmentation: all other fields are rubbish, num_buffers too.
    let mut message = vec![0xee; NET_HEADER_BYTES];
    message[..2].copy_from_slice(&[0, 0]);
    message.extend(&sent);
    stage.peer.send(&message).unwrap();
    stage.bad.rx.wait_used();
    let total = NET_HEADER_BYTES + bytes;
    let used = stage.bad.rx.area.used_entry(slot);
    assert_eq!(used, (0, u32::try_from(total).unwrap()));
    let received = stage.bad.bytes(area, 8192);
    assert_eq!(received[..10], [0; 10], "{bytes} bytes in {pieces} pieces");
    assert_eq!(received[10..12], [1, 0], "num_buffers");
    assert_eq!(received[12..total], sent);
    assert!(received[total..].iter().all(|b| *b == 0xa5), "tail touched");
}

/// Legacy receivers have a header of 10 bytes: the frame starts right behind it.
#[test]
fn cve_2024_0340_legacy_receive_buffers_hold_nothing_but_header_and_frame() {
    let config = RawConfig {
        features: VIRTIO_RING_F_INDIRECT_DESC,
        ..RawConfig::default()
    };
    let mut stage = Stage::with(config, Guest::builder(), |_| {});
    for (slot, bytes) in (0..).zip([14, 60, 116, 117, 118, 119, 1514]) {
        let area = stage.bad.put(0, &[0xa5; 4096]);
        stage.bad.rx.write_chain(0, &[(area, 4096)]);
        stage.bad.rx.offer(&[0]);
        let sent = frame(BAD, PEER, bytes, 5);
        let mut message = vec![0xee; NET_HEADER_BYTES];
        message[..2].copy_from_slice(&[0, 0]);
        message.extend(&sent);
        stage.peer.send(&message).unwrap();
        stage.bad.rx.wait_used();
        let total = 10 + bytes;
        let used = stage.bad.rx.area.used_entry(slot);
        assert_eq!(used, (0, u32::try_from(total).unwrap()));
        let received = stage.bad.bytes(area, 4096);
        assert_eq!(received[..10], [0; 10]);
        assert_eq!(received[10..total], sent);
        assert!(received[total..].iter().all(|b| *b == 0xa5), "tail touched");
    }
    assert!(stage.peer.flush(DEADLINE).unwrap());
    eventually("counted", || stage.lab.counters(&stage.port).tx_frames == 7);
    stage.finish();
}
