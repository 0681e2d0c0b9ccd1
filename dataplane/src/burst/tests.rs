//! What a burst makes of the frames that are put into it.

use super::*;

/// A virtio-net header that asks for nothing, of `header_bytes`, and a frame that is told apart by
/// its last source byte.
fn message(header_bytes: usize, station: u8, l2_bytes: usize) -> Vec<u8> {
    let mut message = vec![0; header_bytes + l2_bytes];
    let frame = &mut message[header_bytes..];
    for (at, byte) in frame.iter_mut().enumerate() {
        *byte = u8::try_from(at % 251).unwrap();
    }
    if l2_bytes >= 14 {
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, station, 0x08, 0]);
    }
    message
}

/// Adds a message that is cut at these places.
fn add<'m>(burst: &mut Burst<'m>, message: &'m mut [u8], cuts: &[u32]) {
    let mark = burst.begin_chain().unwrap();
    let whole = GuestSlice::of(message);
    let mut from = 0;
    for to in cuts.iter().copied().chain([whole.len()]) {
        assert!(burst.push(mark, whole.skip(from).first(to - from)));
        from = to;
    }
    burst.add(mark, Entry::single(0), whole.len());
}

fn bytes(mut pieces: Pieces<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 70_000];
    let len = pieces.read(&mut bytes);
    bytes.truncate(len);
    bytes
}

fn run(frames: u64, source: u64) -> (u64, FrameSet) {
    (0x0200_0000_0000 | source, FrameSet::from_bits(frames))
}

fn runs(burst: &Burst<'_>) -> Vec<(u64, FrameSet)> {
    let runs = burst.runs().iter();
    runs.map(|run| (run.head.src, run.frames)).collect()
}

#[test]
fn frames_that_begin_alike_form_a_run_that_a_rejected_one_does_not_end() {
    let mut messages: Vec<_> = [1, 1, 2, 2, 1].map(|n| message(12, n, 60)).into();
    // Shorter than an Ethernet header, between two of station 2.
    messages.insert(3, message(12, 2, 13));
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for message in &mut messages {
        add(&mut burst, message, &[]);
    }
    burst.take_snapshots(12, Offloads::NONE);
    assert_eq!(
        runs(&burst),
        [run(0b11, 1), run(0b1_0100, 2), run(0b10_0000, 1)]
    );
    assert_eq!(burst.rejected(), [(DropReason::Runt, FrameSet::one(3))]);
    assert_eq!(burst.plain(), FrameSet::from_bits(0b11_0111));
}

#[test]
fn a_plain_frame_lies_in_one_buffer_and_asks_for_nothing() {
    let mut messages: Vec<_> = (0..4).map(|_| message(12, 1, 100)).collect();
    messages[1][0] = 1; // NEEDS_CSUM (virtio 1.3, 5.1.6.2), of a checksum at its place
    messages[1][6..10].copy_from_slice(&[34, 0, 16, 0]);
    messages[3][0] = 0xf8; // bits that mean nothing
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for (message, cuts) in messages.iter_mut().zip([&[][..], &[], &[50], &[]]) {
        add(&mut burst, message, cuts);
    }
    burst.take_snapshots(12, Offloads::CSUM);
    assert!(burst.rejected().is_empty());
    assert_eq!(burst.plain(), FrameSet::from_bits(0b1001));
    assert_eq!(burst.header(1).needs, Offloads::CSUM);
    // What is delivered in place of the first bytes asks for nothing, in one buffer.
    let mut clean = [0; HEAD_LEN];
    clean[10] = 1;
    let frame = message(12, 1, 100);
    clean[12..].copy_from_slice(&frame[12..HEAD_LEN]);
    assert_eq!((burst.head(0), burst.head(3)), (&clean, &clean));
}

#[test]
fn what_is_behind_the_snapshot_is_the_rest_of_the_buffers() {
    // The legacy header has no num_buffers (5.1.6.1).
    for (header_bytes, cuts) in [
        (12, &[][..]),
        (12, &[5, 12, 200]),
        (10, &[]),
        (10, &[3, 99]),
    ] {
        let mut message = message(usize::try_from(header_bytes).unwrap(), 7, 300);
        let frame = message[header_bytes as usize..].to_vec();
        let mut storage = BurstStorage::new();
        let mut burst = storage.begin();
        add(&mut burst, &mut message, cuts);
        burst.take_snapshots(header_bytes, Offloads::NONE);
        assert_eq!((burst.total_bytes(0), burst.l2_bytes(0)), (312, 300));
        let seen = burst.snapshot_bytes(0);
        let mut whole = burst.snapshot(0)[12..seen as usize].to_vec();
        whole.extend(bytes(burst.body(0, seen)));
        assert_eq!(whole, frame, "{header_bytes} {cuts:?}");
        assert_eq!(bytes(burst.body(0, 112)), frame[100..]);
    }
}

#[test]
fn lengths_that_no_frame_has_are_rejected() {
    let longest = MAX_FRAME_BYTES as usize;
    let mut messages = [
        message(12, 1, longest),
        message(12, 1, longest + 1),
        vec![0; 11],
    ];
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for message in &mut messages {
        add(&mut burst, message, &[]);
    }
    burst.take_snapshots(12, Offloads::NONE);
    assert_eq!(
        burst.rejected(),
        [
            (DropReason::TooLong, FrameSet::one(1)),
            (DropReason::BadHeader, FrameSet::one(2))
        ]
    );
    assert_eq!(burst.plain(), FrameSet::one(0));
}

#[test]
fn a_burst_ends_at_64_frames_and_begins_empty_again() {
    let mut messages: Vec<_> = (0..MAX_BURST).map(|_| message(12, 1, 60)).collect();
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for message in &mut messages {
        add(&mut burst, message, &[]);
    }
    assert_eq!((burst.begin_chain(), burst.len()), (None, MAX_BURST));
    burst.take_snapshots(12, Offloads::NONE);
    assert_eq!(runs(&burst), [(0x0200_0000_0001, FrameSet::ALL)]);
    let burst = storage.begin();
    assert_eq!((burst.len(), burst.runs().len()), (0, 0));
    assert!(burst.begin_chain().is_some());
}
