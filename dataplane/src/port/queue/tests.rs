//! The loop over a queue that does what it is told: what becomes of a burst is conserved, and each
//! frame is booked once, under its own reason.

use std::collections::VecDeque;

use proptest::prelude::*;
use ringway_bridge::MAX_BURST;

use super::*;
use crate::burst::{BurstStorage, Entry};
use crate::memory::GuestSlice;
use crate::wire::net_header::HEADER_LEN;

/// What a queue answers to a frame.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Taken,
    Refused(Refusal),
}

/// A queue that answers as told, and has room ever after.
struct Told {
    answers: VecDeque<Answer>,
    /// How many plain frames it takes at a time.
    plain_at_a_time: u32,
    plain_limit: u32,
    must_wait: bool,
    taken: Vec<u32>,
}

impl Told {
    fn new(answers: impl IntoIterator<Item = Answer>) -> Self {
        Self {
            answers: answers.into_iter().collect(),
            plain_at_a_time: 0,
            plain_limit: u32::MAX,
            must_wait: false,
            taken: Vec::new(),
        }
    }
}

impl TxQueue for Told {
    fn limits(&self) -> Limits {
        Limits {
            offloads: Offloads::NONE,
            max_bytes: 1514,
        }
    }

    fn put_plain(&mut self, burst: &Burst<'_>, frames: FrameSet) -> (FrameSet, u64) {
        let (mut sent, mut bytes) = (FrameSet::EMPTY, 0);
        let plain = frames.leading(burst.plain()).iter();
        for index in plain.take(self.plain_at_a_time.min(self.plain_limit) as usize) {
            self.plain_limit -= 1;
            self.taken.push(burst.l2_bytes(index));
            bytes += u64::from(burst.l2_bytes(index));
            sent |= FrameSet::one(index);
        }
        (sent, bytes)
    }

    fn should_wait_for(&mut self, _count: u32, _total_bytes: u32) -> Result<bool, Refusal> {
        Ok(self.must_wait)
    }

    fn put(&mut self, frame: &mut OutFrame<'_>) -> Result<(), Refusal> {
        match self.answers.pop_front().unwrap_or(Answer::Taken) {
            Answer::Taken => {
                self.taken.push(frame.l2_bytes());
                Ok(())
            }
            Answer::Refused(refusal) => Err(refusal),
        }
    }
}

/// A plain frame, told apart by its length.
fn plain(l2_bytes: usize) -> Vec<u8> {
    let mut message = vec![0; HEADER_LEN + l2_bytes];
    message[HEADER_LEN + 6] = 0x02;
    message
}

/// TCP over IPv4 to be segmented into `count` segments of 100 bytes (virtio 1.3, 5.1.6.2).
fn segmented(count: u16) -> Vec<u8> {
    let payload = 100 * usize::from(count);
    let mut header = vec![1, 1, 54, 0];
    for field in [100_u16, 34, 16, 0] {
        header.extend(field.to_le_bytes());
    }
    let mut frame = vec![0; 54 + payload];
    frame[6] = 0x02;
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14] = 0x45;
    let total = u16::try_from(40 + payload).unwrap();
    frame[16..18].copy_from_slice(&total.to_be_bytes());
    frame[23] = 6;
    frame[46] = 5 << 4;
    [header, frame].concat()
}

/// Delivers `messages` to `queue`.
fn run(queue: &mut Told, messages: &mut [Vec<u8>], no_wait: FrameSet) -> (Outcome, Account) {
    let mut storage = BurstStorage::new();
    let mut burst = storage.begin();
    for message in messages.iter_mut() {
        let mark = burst.begin_chain().unwrap();
        let slice = GuestSlice::of(message);
        assert!(burst.push(mark, slice));
        burst.add(mark, Entry::single(0), slice.len());
    }
    burst.take_snapshots(12, Offloads::ALL);
    assert!(burst.rejected().is_empty(), "{:?}", burst.rejected());
    let job = Job {
        burst: &burst,
        frames: FrameSet::ALL - FrameSet::from_index(burst.len()),
        no_wait,
        retags: None,
        source_queue: 0,
        owned: 0,
    };
    let (mut gso, mut account) = (GsoScratch::new(), Account::default());
    let outcome = deliver(queue, &job, &mut gso, &mut account);
    (outcome, account)
}

fn answers() -> impl Strategy<Value = Answer> {
    let reason = prop::sample::select(DropReason::ALL.to_vec());
    prop_oneof![
        12 => Just(Answer::Taken),
        6 => reason.prop_map(|reason| Answer::Refused(Refusal::Drop(reason))),
        1 => Just(Answer::Refused(Refusal::Full)),
        1 => Just(Answer::Refused(Refusal::Broken)),
    ]
}

proptest! {
    // A naive reading of the contract: one frame after the other, until one finds the queue full or
    // broken.
    #[test]
    fn any_mix_of_outcomes_is_conserved_and_booked_under_its_own_reason(
        answers in prop::collection::vec(answers(), 1..=MAX_BURST),
    ) {
        let lengths: Vec<_> = (60..60 + answers.len()).collect();
        let mut messages: Vec<_> = lengths.iter().map(|bytes| plain(*bytes)).collect();
        let (mut sent, mut refused) = (FrameSet::EMPTY, FrameSet::EMPTY);
        let mut drops = DropCounts::default();
        let mut sent_bytes = 0;
        let all = FrameSet::ALL - FrameSet::from_index(answers.len());
        for (index, answer) in answers.iter().enumerate() {
            match answer {
                Answer::Taken => {
                    sent |= FrameSet::one(index);
                    sent_bytes += lengths[index] as u64;
                }
                Answer::Refused(Refusal::Drop(reason)) => drops[*reason] += 1,
                Answer::Refused(Refusal::Full) => {
                    refused = all & FrameSet::from_index(index);
                    break;
                }
                Answer::Refused(Refusal::Broken) => {
                    drops[DropReason::BadDescriptor] += (answers.len() - index) as u64;
                    break;
                }
            }
        }
        let (outcome, account) = run(&mut Told::new(answers), &mut messages, FrameSet::EMPTY);
        prop_assert_eq!((outcome.sent, outcome.sent_bytes), (sent, sent_bytes));
        prop_assert_eq!(outcome.refused, refused);
        prop_assert_eq!(account.drops, drops);
        let all_told = u64::from(outcome.sent.len() + outcome.refused.len()) + account.drops.total();
        prop_assert_eq!(all_told, u64::from(all.len()));
    }

    // Segments behind the last that was delivered are drops of their own.
    #[test]
    fn segments_are_conserved_too(
        counts in prop::collection::vec(2..20_u16, 1..10),
        answers in prop::collection::vec(answers(), 0..100),
    ) {
        let mut messages: Vec<_> = counts.iter().map(|count| segmented(*count)).collect();
        let mut queue = Told::new(answers);
        let (outcome, account) = run(&mut queue, &mut messages, FrameSet::ALL);
        let taken = queue.taken.len() as u64;
        prop_assert_eq!(taken, u64::from(outcome.sent.len()) + account.extra_delivered());
        prop_assert_eq!(account.gso_frames, u64::from(outcome.sent.len()));
        let of_sent: u64 = outcome.sent.iter().map(|index| u64::from(counts[index])).sum();
        prop_assert_eq!(account.gso_segments, of_sent);
        // Frames of which nothing was delivered are dropped whole, or wait.
        let whole = counts.len() as u64 - u64::from(outcome.sent.len() + outcome.refused.len());
        prop_assert_eq!(account.drops.total(), whole + account.lost_segments);
        prop_assert_eq!(account.is_empty(), account == Account::default());
    }
}

#[test]
fn five_reasons_in_one_burst_are_five_reasons() {
    let reasons = [
        DropReason::TooLong,
        DropReason::BufferTooSmall,
        DropReason::OffloadUnsupported,
        DropReason::TooManySegments,
        DropReason::HostError,
    ];
    let answers = reasons.map(|reason| Answer::Refused(Refusal::Drop(reason)));
    let mut messages: Vec<_> = (0..5).map(|_| plain(60)).collect();
    let (outcome, account) = run(&mut Told::new(answers), &mut messages, FrameSet::EMPTY);
    assert!(outcome.sent.is_empty() && outcome.refused.is_empty());
    let counted: Vec<_> = account.drops.nonzero().collect();
    assert_eq!(counted, reasons.map(|reason| (reason, 1)));
}

#[test]
fn frames_keep_their_order_between_the_two_ways() {
    let mut messages = vec![plain(60), plain(61), segmented(2), plain(62), plain(63)];
    let mut queue = Told::new([]);
    queue.plain_at_a_time = 8;
    let (outcome, _) = run(&mut queue, &mut messages, FrameSet::EMPTY);
    assert_eq!(queue.taken, [60, 61, 154, 154, 62, 63]);
    assert_eq!(outcome.sent.len(), 5);
}

#[test]
fn a_full_queue_refuses_all_that_is_behind() {
    let mut messages = vec![plain(60), plain(61), plain(62)];
    let mut queue = Told::new([Answer::Refused(Refusal::Full)]);
    (queue.plain_at_a_time, queue.plain_limit) = (8, 1);
    let (outcome, account) = run(&mut queue, &mut messages, FrameSet::EMPTY);
    assert_eq!(queue.taken, [60]);
    assert_eq!(outcome.refused, FrameSet::from_bits(0b110));
    assert_eq!(outcome.refusal, DropReason::RingFull);
    assert!(account.is_empty());
}

#[test]
fn a_frame_that_is_segmented_waits_for_room_for_all_unless_it_must_not() {
    for (no_wait, sent) in [(FrameSet::EMPTY, 0), (FrameSet::one(0), 1)] {
        let mut queue = Told::new([]);
        queue.must_wait = true;
        let (outcome, _) = run(&mut queue, &mut [segmented(3)], no_wait);
        assert_eq!(
            (outcome.sent.len(), outcome.refused.len()),
            (sent, 1 - sent)
        );
    }
}

#[test]
fn a_frame_beyond_the_mtu_is_dropped_and_the_next_one_is_not() {
    let mut messages = vec![plain(1515), plain(1514)];
    let mut queue = Told::new([]);
    let (outcome, account) = run(&mut queue, &mut messages, FrameSet::EMPTY);
    assert_eq!(outcome.sent, FrameSet::one(1));
    assert_eq!(account.drops[DropReason::TooLong], 1);
}
