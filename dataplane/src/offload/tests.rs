//! Out frames against etherparse: each is parsed and judged, and together they are the original.

use std::io::Read;
use std::os::fd::AsFd;

use proptest::prelude::*;
use ringway_bridge::{DropReason, Headers, Retag, TAG_BYTES};
use ringway_testbed::packet::{self, GSO_ECN, Packet, complete, judge, pattern, plain_sum};

use super::{Action, GroFrame, GsoScratch, MAX_GSO_SEGMENTS, OutFrames, is_checksum_right};
use crate::burst::{Burst, BurstStorage, Entry};
use crate::memory::{GuestSlice, IoVecs};
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};
use crate::wire::{Features, Offloads, find_open_checksum};

const SEGMENTATION: Offloads = Offloads::ALL.without(Offloads::CSUM);

/// A message in pieces, as a guest's buffers have it.
fn burst<'m>(
    storage: &'m mut BurstStorage,
    message: &'m mut [u8],
    cuts: &[prop::sample::Index],
) -> Burst<'m> {
    let mut ends: Vec<_> = cuts
        .iter()
        .map(|cut| cut.index(message.len() + 1))
        .collect();
    ends.extend([0, message.len()]);
    ends.sort_unstable();
    let mut burst = storage.begin();
    let mark = burst.begin_chain().unwrap();
    let total = u32::try_from(message.len()).unwrap();
    let message = GuestSlice::of(message);
    for pair in ends.windows(2) {
        let [from, to] = [pair[0], pair[1]].map(|at| u32::try_from(at).unwrap());
        assert!(burst.push(mark, message.skip(from).first(to - from)));
    }
    burst.add(mark, Entry::single(0), total);
    burst.take_snapshots(HEADER_BYTES, Offloads::ALL);
    burst
}

/// A message as a driver has it that puts tags in front of what follows the addresses.
fn with_tags(message: &[u8], tags: &[[u8; TAG_BYTES]]) -> Vec<u8> {
    let (front, rest) = message.split_at(HEADER_LEN + 12);
    let mut message = [front, &tags.concat(), rest].concat();
    let grow = |field: &mut [u8]| {
        let value = u16::from_le_bytes([field[0], field[1]]);
        let value = value + u16::try_from(tags.len() * TAG_BYTES).unwrap();
        field.copy_from_slice(&value.to_le_bytes());
    };
    if message[0] & packet::NEEDS_CSUM != 0 {
        grow(&mut message[6..8]);
    }
    message
}

/// An out frame as it arrives in buffers of these sizes, then larger ones.
fn written(frames: &mut OutFrames<'_>, sizes: &[u32], gap: u32) -> Option<Vec<u8>> {
    let mut frame = frames.next()?;
    let needed = frame.total_bytes() - gap;
    let mut buffers = Vec::new();
    let mut room = 0;
    for size in sizes.iter().copied().chain(std::iter::repeat(700)) {
        if room >= needed {
            break;
        }
        buffers.push(vec![0xa5_u8; size as usize]);
        room += size;
    }
    let to: Vec<_> = buffers
        .iter_mut()
        .map(|buffer| GuestSlice::of(buffer))
        .collect();
    frame.write_to(gap, 1, &to);
    let mut all = buffers.concat();
    assert!(
        all[needed as usize..].iter().all(|b| *b == 0xa5),
        "written past its end"
    );
    all.truncate(needed as usize);
    Some(all)
}

/// An out frame as it is given to a tap.
fn gathered(frames: &mut OutFrames<'_>) -> Option<Vec<u8>> {
    let mut frame = frames.next()?;
    let mut parts = IoVecs::new();
    frame.gather(&mut parts);
    // As long as a write to a tap may be, a pipe's reader takes it meanwhile.
    let (mut reader, writer) = std::io::pipe().unwrap();
    let read = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).map(|_| all)
    });
    parts.write_to(writer.as_fd()).unwrap();
    drop(writer);
    Some(read.join().unwrap().unwrap())
}

fn packets() -> impl Strategy<Value = Packet> {
    let shape = (
        any::<bool>(),
        any::<bool>(),
        0..=2_usize,
        0..=10_usize,
        0..=10_usize,
    );
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let numbers = (any::<u16>(), any::<u32>());
    let payload = prop_oneof![0..200_usize, 0..20_000_usize, Just(65_535 - 200)];
    (shape, flags, numbers, payload, any::<u8>()).prop_map(
        |((is_ipv4, is_udp, tags, ip_options, tcp_options), flags, numbers, payload, fill)| {
            let payload = match fill {
                // All ones, and zeros: what sums trip over.
                0..20 => vec![0xff; payload],
                20..40 => vec![0; payload],
                _ => pattern(payload),
            };
            Packet {
                tags,
                ip_options,
                tcp_options,
                fin: flags.0,
                psh: flags.1,
                cwr: flags.2,
                identification: numbers.0,
                sequence: numbers.1,
                ..Packet::new(is_ipv4, is_udp, payload)
            }
        },
    )
}

/// Sets of offloads that a destination can have.
fn takers() -> impl Strategy<Value = Offloads> {
    let all = [
        Offloads::TSO4,
        Offloads::TSO6,
        Offloads::ECN,
        Offloads::USO4,
        Offloads::USO6,
    ];
    prop_oneof![
        Just(Offloads::NONE),
        Just(Offloads::CSUM),
        Just(Offloads::ALL),
        prop::sample::subsequence(all.to_vec(), 0..=5)
            .prop_map(|some| some.into_iter().fold(Offloads::CSUM, Offloads::with)),
    ]
}

fn check_segments(packet: &Packet, gso_size: u16, taken: Offloads, parts: &[Vec<u8>]) {
    let mut payload = Vec::new();
    let count = packet.payload.len().div_ceil(gso_size.into()).max(1);
    assert_eq!(parts.len(), count);
    for (index, part) in parts.iter().enumerate() {
        let (header, frame) = part.split_at(HEADER_LEN);
        let mut frame = frame.to_vec();
        assert_eq!((header[1], &header[2..6], header[10]), (0, &[0; 4][..], 1));
        let was_open = complete(header, &mut frame);
        assert_eq!(was_open, taken != Offloads::NONE);
        if !was_open {
            assert_eq!(header[..10], [0; 10]);
        }
        let judged = judge(&frame).unwrap_or_else(|error| panic!("segment {index}: {error}"));
        let is_last = index + 1 == count;
        assert!(judged.payload.len() <= gso_size.into());
        assert!(is_last || judged.payload.len() == usize::from(gso_size));
        assert_eq!(
            frame[..packet.place().l3],
            packet.frame()[..packet.place().l3]
        );
        if let Some(ip) = judged.ipv4 {
            let step = u16::try_from(index).unwrap();
            assert_eq!(ip.identification, packet.identification.wrapping_add(step));
            assert_eq!(ip.options.len(), 4 * packet.ip_options);
        }
        if let Some(tcp) = judged.tcp {
            let offset = u32::try_from(payload.len()).unwrap();
            assert_eq!(tcp.sequence_number, packet.sequence.wrapping_add(offset));
            assert_eq!(
                (tcp.fin, tcp.psh),
                (packet.fin && is_last, packet.psh && is_last)
            );
            assert_eq!(tcp.cwr, packet.cwr && index == 0);
            assert_eq!((tcp.ack, tcp.acknowledgment_number), (true, 0x0102_0304));
            assert_eq!(tcp.options.len(), 4 * packet.tcp_options);
        }
        payload.extend(judged.payload);
    }
    assert!(payload == packet.payload, "the payload changed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn frames_are_cut_into_what_etherparse_finds_right(
        packet in packets(),
        gso_size in prop_oneof![1..300_u16, 500..9000_u16, Just(1448_u16)],
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        sizes in proptest::collection::vec(1..200_u32, 0..8),
        taken in takers(),
        legacy: bool,
    ) {
        let mut message = [packet.header(gso_size), packet.open()].concat();
        let original = message.clone();
        let mut storage = BurstStorage::new();
        let burst = burst(&mut storage, &mut message, &cuts);
        prop_assert!(burst.rejected().is_empty(), "{:?}", burst.rejected());
        let needs = burst.header(0).needs;
        let mut scratch = GsoScratch::new();
        let count = packet.payload.len().div_ceil(gso_size.into()).max(1);
        let action = Action::between(needs, taken);
        let mut frames = match scratch.frames((&burst, 0, Retag::Keep), taken, u32::MAX) {
            Ok(frames) => frames,
            Err(reason) => {
                prop_assert_eq!(reason, DropReason::TooManySegments);
                prop_assert!(count > MAX_GSO_SEGMENTS as usize && action != Action::Pass);
                return Ok(());
            }
        };
        let mut parts = Vec::new();
        while let Some(mut part) = written(&mut frames, &sizes, if legacy { 2 } else { 0 }) {
            if legacy {
                part.splice(10..10, [1, 0]);
            }
            parts.push(part);
        }
        if action == Action::Pass {
            // Whole, but for its header length, which is told anew.
            prop_assert_eq!(parts.len(), 1);
            prop_assert_eq!(&parts[0][HEADER_LEN..], &original[HEADER_LEN..]);
            prop_assert_eq!(&parts[0][..10], &original[..10]);
        } else {
            check_segments(&packet, gso_size, taken, &parts);
        }
        // Those who gather get the same.
        let mut frames = scratch.frames((&burst, 0, Retag::Keep), taken, u32::MAX).unwrap();
        for part in &parts {
            prop_assert_eq!(&gathered(&mut frames).unwrap(), part);
        }
        prop_assert!(gathered(&mut frames).is_none());
    }

    /// Whatever is done to it on the way besides.
    #[test]
    fn a_frame_with_another_tag_is_what_it_would_be_had_it_come_with_it(
        packet in packets(),
        tags in proptest::collection::vec(any::<[u8; 2]>(), 0..3),
        tag: [u8; 2],
        (gso_size, taken) in (100..9000_u16, takers()),
        what in 0..3,
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let bare = [packet.header(gso_size), packet.open()].concat();
        let tag = [0x81, 0, tag[0], tag[1]];
        let before: Vec<_> = tags.iter().map(|tci| [0x88, 0xa8, tci[0], tci[1]]).collect();
        let (retag, after) = match (what, before.split_first()) {
            (0, Some((_, inner))) => (Retag::Pop, inner.to_vec()),
            (1, Some((_, inner))) => (Retag::Replace(tag), [&[tag][..], inner].concat()),
            _ => (Retag::Push(tag), [&[tag][..], &before].concat()),
        };
        // Three tags are the most that headers are looked for behind.
        prop_assume!(after.len() + packet.tags <= 3 && before.len() + packet.tags <= 3);
        let (mut source, mut expected) = (with_tags(&bare, &before), with_tags(&bare, &after));
        let (mut storage, mut others) = (BurstStorage::new(), BurstStorage::new());
        let source = burst(&mut storage, &mut source, &cuts);
        let expected = burst(&mut others, &mut expected, &[]);
        prop_assert!(source.rejected().is_empty() && expected.rejected().is_empty());
        let (mut scratch, mut other) = (GsoScratch::new(), GsoScratch::new());
        for limit in [1518, u32::MAX] {
            let frames = scratch.frames((&source, 0, retag), taken, limit);
            let as_came = other.frames((&expected, 0, Retag::Keep), taken, limit);
            let (mut frames, mut as_came) = match (frames, as_came) {
                (Ok(frames), Ok(as_came)) => (frames, as_came),
                (frames, as_came) => {
                    prop_assert_eq!(frames.err(), as_came.err());
                    continue;
                }
            };
            prop_assert_eq!(frames.longest_bytes(), as_came.longest_bytes());
            loop {
                let (frame, as_came) = (written(&mut frames, &[], 0), written(&mut as_came, &[], 0));
                prop_assert_eq!(&frame, &as_came);
                if frame.is_none() {
                    break;
                }
            }
        }
    }

    #[test]
    fn checksums_are_completed_wherever_they_are(
        bytes in proptest::collection::vec(any::<u8>(), 60..3000),
        start in any::<prop::sample::Index>(),
        offset in any::<prop::sample::Index>(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        sizes in proptest::collection::vec(1..200_u32, 0..8),
    ) {
        let start = 14 + start.index(bytes.len() - 15);
        let offset = offset.index(bytes.len() - 1 - start);
        let mut header = vec![packet::NEEDS_CSUM, 0, 0, 0, 0, 0];
        for field in [start, offset, 0] {
            header.extend(u16::try_from(field).unwrap().to_le_bytes());
        }
        let mut expected = bytes.clone();
        complete(&header, &mut expected);
        let at = start + offset;
        if expected[at..at + 2] == [0, 0] {
            expected[at..at + 2].copy_from_slice(&[0xff, 0xff]);
        }
        let mut message = [header, bytes].concat();
        let mut storage = BurstStorage::new();
        let burst = burst(&mut storage, &mut message, &cuts);
        prop_assert!(burst.rejected().is_empty(), "{:?}", burst.rejected());
        let mut scratch = GsoScratch::new();
        let mut frames = scratch.frames((&burst, 0, Retag::Keep), Offloads::NONE, u32::MAX).unwrap();
        let part = written(&mut frames, &sizes, 0).unwrap();
        prop_assert_eq!(&part[..HEADER_LEN], &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        prop_assert_eq!(&part[HEADER_LEN..], &expected);
        let mut frames = scratch.frames((&burst, 0, Retag::Keep), Offloads::NONE, u32::MAX).unwrap();
        let part = gathered(&mut frames).unwrap();
        prop_assert_eq!(&part[HEADER_LEN..], &expected);
    }

    #[test]
    fn frames_that_lie_are_dropped_or_cut_and_never_more_than_they_are(
        packet in packets(),
        gso_size in 0..70_u16,
        place in 12..160_usize,
        value: u8,
        length in any::<prop::sample::Index>(),
    ) {
        let mut frame = packet.open();
        frame.truncate(14 + length.index(frame.len()));
        if let Some(byte) = frame.get_mut(place) {
            *byte = value;
        }
        let bytes = frame.len();
        let mut message = [packet.header(gso_size.max(1)), frame].concat();
        message[4..6].copy_from_slice(&gso_size.to_le_bytes());
        let mut storage = BurstStorage::new();
    let burst = burst(&mut storage, &mut message, &[]);
        let mut scratch = GsoScratch::new();
        if !burst.rejected().is_empty() {
            return Ok(());
        }
        let Ok(mut frames) = scratch.frames((&burst, 0, Retag::Keep), Offloads::NONE, u32::MAX) else {
            return Ok(());
        };
        let count = frames.count();
        prop_assert!(count <= MAX_GSO_SEGMENTS);
        let (mut made, mut sum) = (0, 0);
        while let Some(part) = written(&mut frames, &[], 0) {
            made += 1;
            sum += part.len() - HEADER_LEN;
        }
        prop_assert_eq!(made, count);
        prop_assert!(sum <= bytes + made as usize * 250);
    }
}

#[test]
fn each_pair_of_offloads_has_its_action() {
    use Offloads as O;
    let tso = O::CSUM.with(O::TSO4);
    let cases = [
        (O::NONE, O::NONE, Action::Pass),
        (O::ALL, O::ALL, Action::Pass),
        (tso, O::ALL, Action::Pass),
        (O::CSUM, O::NONE, Action::Complete),
        (tso, O::CSUM, Action::Segment),
        (tso.with(O::ECN), tso, Action::Segment),
        (
            O::CSUM.with(O::USO6),
            O::CSUM.with(O::USO4),
            Action::Segment,
        ),
        (tso, O::NONE, Action::SegmentAndComplete),
        (O::ALL, O::NONE, Action::SegmentAndComplete),
    ];
    for (needed, taken, action) in cases {
        assert_eq!(
            Action::between(needed, taken),
            action,
            "{needed:?} {taken:?}"
        );
    }
}

#[test]
fn nothing_is_offloaded_without_checksums() {
    let checksums = Features::VIRTIO_NET_F_CSUM | Features::VIRTIO_NET_F_GUEST_CSUM;
    let features = Features::all() - checksums;
    assert_eq!(Offloads::from_guest(features), Offloads::NONE);
    assert_eq!(Offloads::to_guest(features), Offloads::NONE);
    assert_eq!(Offloads::from_guest(Features::all()), Offloads::ALL);
    assert_eq!(Offloads::to_guest(Features::all()), Offloads::ALL);
    assert_eq!(
        Offloads::from_guest(Features::VIRTIO_NET_F_CSUM | Features::VIRTIO_NET_F_HOST_USO).names(),
        ["checksum", "uso4", "uso6"]
    );
}

/// Why a frame is not delivered to a destination that takes `taken`.
fn refusal(packet: &Packet, gso_size: u16, taken: Offloads, max_bytes: u32) -> Option<DropReason> {
    let mut message = [packet.header(gso_size), packet.open()].concat();
    let mut storage = BurstStorage::new();
    let burst = burst(&mut storage, &mut message, &[]);
    assert!(burst.rejected().is_empty());
    GsoScratch::new()
        .frames((&burst, 0, Retag::Keep), taken, max_bytes)
        .err()
}

#[test]
fn more_segments_than_the_limit_are_refused() {
    let packet = Packet::new(true, false, pattern(51_200));
    assert_eq!(refusal(&packet, 100, Offloads::NONE, 1518), None);
    let reason = Some(DropReason::TooManySegments);
    assert_eq!(refusal(&packet, 99, Offloads::NONE, 1518), reason);
    assert_eq!(refusal(&packet, 1, Offloads::CSUM, 1518), reason);
    assert_eq!(refusal(&packet, 1, Offloads::ALL, 1518), None);
}

#[test]
fn a_segment_beyond_the_mtu_is_refused_whoever_cuts_it() {
    let packet = Packet::new(true, false, pattern(9000));
    for taken in [Offloads::NONE, Offloads::CSUM, Offloads::ALL] {
        assert_eq!(refusal(&packet, 1460, taken, 1514), None);
        let reason = Some(DropReason::TooLong);
        assert_eq!(refusal(&packet, 1461, taken, 1514), reason);
    }
}

#[test]
fn ip_lengths_that_are_not_the_frames_are_refused() {
    for (is_ipv4, at) in [(true, 16), (false, 18)] {
        for wrong in [-1_i16, 1] {
            let packet = Packet::new(is_ipv4, false, pattern(3000));
            let mut message = [packet.header(1000), packet.open()].concat();
            let field = &mut message[HEADER_LEN + at..][..2];
            let told = u16::from_be_bytes([field[0], field[1]]);
            field.copy_from_slice(&told.wrapping_add_signed(wrong).to_be_bytes());
            let mut storage = BurstStorage::new();
            let burst = burst(&mut storage, &mut message, &[]);
            assert!(burst.rejected().is_empty());
            let mut scratch = GsoScratch::new();
            let refused = scratch
                .frames((&burst, 0, Retag::Keep), Offloads::NONE, u32::MAX)
                .err();
            assert_eq!(refused, Some(DropReason::OffloadUnsupported));
        }
    }
}

#[test]
fn headers_longer_than_a_usual_snapshot_are_cut_too() {
    let packet = Packet {
        tags: 2,
        ip_options: 10,
        tcp_options: 10,
        ..Packet::new(true, false, pattern(10_000))
    };
    assert_eq!(packet.place().headers, 142);
    assert_eq!(refusal(&packet, 1000, Offloads::NONE, 1518), None);
}

#[test]
fn congestion_is_told_once_even_if_the_header_does_not_say_ecn() {
    let packet = Packet {
        cwr: true,
        ..Packet::new(true, false, pattern(3000))
    };
    let mut header = packet.header(1000);
    assert_eq!(header[1] & GSO_ECN, GSO_ECN);
    header[1] &= !GSO_ECN;
    let mut message = [header, packet.open()].concat();
    let mut storage = BurstStorage::new();
    let burst = burst(&mut storage, &mut message, &[]);
    let mut scratch = GsoScratch::new();
    let mut frames = scratch
        .frames((&burst, 0, Retag::Keep), Offloads::NONE, u32::MAX)
        .unwrap();
    let mut parts = Vec::new();
    while let Some(part) = written(&mut frames, &[], 0) {
        parts.push(part);
    }
    check_segments(&packet, 1000, Offloads::NONE, &parts);
    let taken = Offloads::CSUM.with(SEGMENTATION.without(Offloads::ECN));
    assert_eq!(
        scratch
            .frames((&burst, 0, Retag::Keep), taken, u32::MAX)
            .unwrap()
            .count(),
        1
    );
}

fn length(frame: &[u8]) -> u32 {
    u32::try_from(frame.len()).unwrap()
}

/// What is found in a frame whose first `seen` bytes are looked at.
fn found_open(frame: &[u8], seen: usize, bytes: u32) -> Option<(u16, u16)> {
    let headers = Headers::parse(&frame[..seen])?;
    find_open_checksum(&frame[..seen], &headers, bytes).map(|open| (open.start, open.offset))
}

proptest! {
    #[test]
    fn a_checksum_is_open_if_it_is_the_pseudo_headers_sum(packet in packets(), spoilt in 0..16_usize) {
        let place = packet.place();
        let all = |frame: &[u8]| found_open(frame, frame.len(), length(frame));
        let mut open = packet.open();
        let told = (place.l4.try_into().unwrap(), place.csum_offset.try_into().unwrap());
        prop_assert_eq!(all(&open), Some(told));
        // Padding is not summed; headers that are not all there are not looked at.
        prop_assert_eq!(found_open(&open, open.len(), length(&open) + 1), None);
        prop_assert_eq!(found_open(&open, place.headers - 1, length(&open)), None);
        let whole = packet.frame();
        if whole != open {
            prop_assert_eq!(all(&whole), None);
        }
        open[place.l4 + place.csum_offset + spoilt / 8] ^= 1 << (spoilt % 8);
        prop_assert_eq!(all(&open), None);
    }
}

#[test]
fn fragments_and_other_protocols_have_no_open_checksum() {
    let packet = Packet::new(true, true, pattern(100));
    for (at, value) in [(14 + 6, 0x20), (14 + 7, 1), (14 + 9, 1), (12, 0)] {
        let mut frame = packet.open();
        frame[at] = value;
        assert_eq!(
            found_open(&frame, frame.len(), length(&frame)),
            None,
            "byte {at}"
        );
    }
}

/// Frames joined for as long as they follow one another: what they became, and how many.
fn joined(frames: &[Vec<u8>]) -> (Vec<u8>, usize) {
    let headers = Headers::parse(&frames[0]).unwrap();
    let Some(mut gro) = GroFrame::begin(&frames[0], &headers, length(&frames[0])) else {
        return (frames[0].clone(), 1);
    };
    let mut payload = frames[0][headers.payload_offset..].to_vec();
    for frame in &frames[1..] {
        if !gro.takes(frame, length(frame)) {
            break;
        }
        gro.add(frame, length(frame));
        payload.extend(&frame[headers.payload_offset..]);
    }
    let mut all = vec![0; HEADER_LEN + gro.headers_bytes()];
    gro.write_headers(&mut all);
    all.extend(payload);
    (all, gro.segments().into())
}

/// The segments of a packet, cut and completed by ourselves.
fn segments(packet: &Packet, gso_size: u16) -> Vec<Vec<u8>> {
    let mut message = [packet.header(gso_size), packet.open()].concat();
    let mut storage = BurstStorage::new();
    let burst = burst(&mut storage, &mut message, &[]);
    let mut scratch = GsoScratch::new();
    let mut frames = scratch
        .frames((&burst, 0, Retag::Keep), Offloads::NONE, u32::MAX)
        .unwrap();
    std::iter::from_fn(|| written(&mut frames, &[], 0))
        .map(|all| all[HEADER_LEN..].to_vec())
        .collect()
}

proptest! {
    /// What was cut is joined to what it was.
    #[test]
    fn segments_become_the_frame_that_they_were(mut packet in packets(), gso_size in 200..9000_u16) {
        (packet.is_udp, packet.fin, packet.cwr, packet.ip_options) = (false, false, false, 0);
        packet.payload.truncate(65_000);
        let parts = segments(&packet, gso_size);
        let (all, count) = joined(&parts);
        prop_assert_eq!(count, parts.len());
        if count > 1 {
            prop_assert_eq!(&all[..10], &packet.header(gso_size)[..10]);
            prop_assert!(all[HEADER_LEN..] == packet.open());
        }
    }
}

fn stream_of_four(sequence: u32) -> Packet {
    Packet {
        psh: false,
        sequence,
        ..Packet::new(true, false, pattern(4))
    }
}

#[test]
fn what_segmentation_could_not_give_back_is_not_joined() {
    type Change = fn(&mut Packet);
    let changes: [(&str, Change); 11] = [
        ("nothing", |_| {}),
        ("a gap", |p| p.sequence = p.sequence.wrapping_add(1)),
        ("a repetition", |p| {
            p.sequence = p.sequence.wrapping_sub(1000)
        }),
        ("a flag", |p| p.cwr = true),
        ("the end", |p| p.fin = true),
        ("a longer segment", |p| p.payload.push(0)),
        ("no payload", |p| p.payload.clear()),
        ("a tag", |p| p.tags = 1),
        ("options", |p| p.tcp_options = 3),
        ("options of IPv4", |p| p.ip_options = 1),
        ("another station", |p| p.stations[0][5] ^= 1),
    ];
    for (what, change) in changes {
        let first = Packet {
            psh: false,
            sequence: u32::MAX - 10,
            ..Packet::new(true, false, pattern(1000))
        };
        let mut second = first.clone();
        second.identification = first.identification.wrapping_add(1);
        second.sequence = first.sequence.wrapping_add(1000);
        change(&mut second);
        let (_, count) = joined(&[first.frame(), second.frame()]);
        assert_eq!(count, if what == "nothing" { 2 } else { 1 }, "{what}");
    }
    // Identifications mean something where a packet may be fragmented.
    let numbered = |step: u16, may_be_fragmented| {
        let mut packet = stream_of_four(if step == 0 { 0 } else { 4 });
        packet.identification = 7 + step;
        let mut frame = packet.frame();
        if may_be_fragmented {
            assert_eq!(frame[20], 0x40);
            frame[20] = 0;
            let place = 24..26;
            frame[place.clone()].fill(0);
            let sum = !plain_sum(&frame[14..34]);
            frame[place].copy_from_slice(&sum.to_be_bytes());
        }
        frame
    };
    for (step, may_be_fragmented, count) in [(1, true, 2), (2, true, 1), (2, false, 2)] {
        let frames = [0, step].map(|step| numbered(step, may_be_fragmented));
        assert_eq!(joined(&frames).1, count, "{step} {may_be_fragmented}");
    }
    let mut spoilt = numbered(1, false);
    spoilt[24] ^= 1;
    let frames = [numbered(0, false), spoilt];
    assert_eq!(joined(&frames).1, 1, "an IPv4 checksum that is wrong");
    let short = Packet {
        psh: false,
        ..Packet::new(false, false, pattern(999))
    };
    let next = |bytes, by: u32| Packet {
        sequence: short.sequence.wrapping_add(by),
        payload: pattern(bytes),
        ..short.clone()
    };
    let frames = [&short, &next(999, 999), &next(998, 1998), &next(998, 2996)];
    let (_, count) = joined(&frames.map(Packet::frame));
    assert_eq!(count, 3, "nothing follows a shorter one");
    let mut pushed = short.clone();
    pushed.psh = true;
    assert_eq!(joined(&[pushed.frame(), next(999, 999).frame()]).1, 1);
    let many: Vec<_> = (0..70).map(|i| next(999, 999 * i).frame()).collect();
    assert_eq!(joined(&many).1, 65, "an IP packet has 65,535 bytes at most");
}

proptest! {
    #[test]
    fn a_checksum_is_right_or_not_wherever_the_pieces_end(
        packet in packets(),
        cut: prop::sample::Index,
        spoilt: prop::sample::Index,
    ) {
        let mut frame = packet.frame();
        let place = packet.place();
        let headers = Headers::parse(&frame).unwrap();
        let at = place.headers + cut.index(frame.len() - place.headers + 1);
        let is_right = |frame: &[u8]| {
            let (head, rest) = frame.split_at(at);
            is_checksum_right(head, &headers, length(frame), [head, rest].into_iter())
        };
        prop_assert!(is_right(&frame));
        let at = place.l4 + spoilt.index(frame.len() - place.l4);
        frame[at] ^= 1;
        prop_assert!(!is_right(&frame));
    }
}
