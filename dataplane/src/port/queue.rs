//! A queue of a port as a worker has it for one burst, whatever the port's kind, and the loop that
//! delivers a burst's frames to it.
//!
//! A kind of port implements [`RxQueue`] and [`TxQueue`], has a function `rx(pair)` that takes a
//! queue to receive from and a function `deliver` that takes one to deliver to, and a line in
//! `with_rx_queue!` and in [`super::Port::deliver`]: the kind is looked at once per burst.
//!
//! Frames are delivered in order. One that finds no room refuses those behind it, lest they
//! overtake it. One that is segmented is delivered from its beginning, as far as there is room: it
//! counts as delivered if its first segment was, and each segment behind the last that was
//! delivered is a drop of its own. Before that, it waits for room for all of its segments as other
//! frames wait for theirs.

use ringway_bridge::{DropCounts, DropReason, FrameSet, Retag};

use super::QueueCounters;
use super::vhost::RxScratch;
use crate::burst::Burst;
use crate::isa::for_this_cpu;
use crate::offload::{GsoScratch, OutFrame, OutFrames, Retags};
use crate::wire::Offloads;

/// Why a queue can't be taken for a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unavailable {
    /// Somebody else has it, or waits for it: try again.
    Busy,
    /// It is stopped or gone: no event but a new start brings it back.
    Stopped,
}

/// What there is in a queue.
#[derive(Debug)]
pub(crate) enum Gathered<C> {
    /// The burst has frames; or none, and is to be brought to its end all the same.
    Frames {
        /// Bytes of the header in front of each frame: 10 or 12.
        header_bytes: u32,
        /// What the frames may ask for.
        allowed: Offloads,
        /// If not, the frames are received and dropped.
        is_enabled: bool,
        completion: C,
    },
    Nothing,
    /// It is stopped or gone.
    Stopped,
}

/// What completes a burst while its frames lie in the queue's memory.
pub(crate) trait Completion {
    /// Completes the burst's first `taken` frames; the others are gathered again. Returns the L2
    /// bytes of those that were taken.
    fn complete(self, burst: &Burst<'_>, taken: usize) -> u64;
}

/// Nothing is to be done as long as the frames are there.
impl Completion for () {
    #[inline]
    fn complete(self, burst: &Burst<'_>, taken: usize) -> u64 {
        (0..taken).map(|i| u64::from(burst.l2_bytes(i))).sum()
    }
}

/// A queue that its worker has for one burst: gathered, forwarded, completed, counted, finished.
/// Frames that have to wait for their destination stay with the queue and are gathered again.
pub(crate) trait RxQueue {
    /// What completes a burst.
    type Completion<'m>: Completion
    where
        Self: 'm;

    fn counters(&self) -> &QueueCounters;

    /// Puts up to `limit` frames into the empty burst. `takes` tells what the destination of a
    /// frame that begins so may be asked for.
    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        takes: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<Self::Completion<'m>>;

    /// Ends the burst, of which the first `taken` frames were completed and counted and `kept`
    /// others stay: shows the other side what was completed.
    fn finish(&mut self, taken: usize, kept: usize);

    /// Has the next frame be an event, and returns whether the queue is still empty, so that
    /// waiting for the event can't miss a frame.
    fn arm(&mut self) -> bool;

    /// The queue is polled from now on: its events are not needed.
    fn disarm(&mut self) {}
}

/// An expression of `$queue`, which is a queue of `$port` taken for one burst or why it can't be: a
/// `Result<impl RxQueue, Unavailable>`.
macro_rules! with_rx_queue {
    ($port:expr, $pair:expr, $queue:ident => $body:expr) => {{
        match $port {
            $crate::port::Port::VhostUser(port) => {
                let $queue = port.rx($pair);
                $body
            }
            $crate::port::Port::Tap(port) => {
                let $queue = port.rx($pair);
                $body
            }
            $crate::port::Port::AfXdp(port) => {
                let $queue = port.rx($pair);
                $body
            }
        }
    }};
}
pub(crate) use with_rx_queue;

/// A worker spins this many times for a queue that another worker holds, roughly one burst.
const LOCK_TRIES: u32 = 400;

/// What a queue takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) offloads: Offloads,
    /// Longest frame, L2 bytes.
    pub(crate) max_bytes: u32,
}

/// Why a queue did not take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It has no room for the moment.
    Full,
    /// It never takes this frame.
    Drop(DropReason),
    /// Its other side broke a rule: it takes nothing any more.
    Broken,
}

/// The transmitting side of a queue, ours for one burst.
pub(crate) trait TxQueue {
    /// What it takes.
    fn limits(&self) -> Limits;

    /// Delivers frames of the common kind, in order, until one is of another kind or finds no room:
    /// plain ones ([`Burst::plain`]) that are short enough and need one buffer. Returns those
    /// that were delivered and their L2 bytes; the others are for [`TxQueue::put`].
    #[inline(always)]
    fn put_plain(&mut self, _burst: &Burst<'_>, _frames: FrameSet) -> (FrameSet, u64) {
        (FrameSet::EMPTY, 0)
    }

    /// Whether `count` frames of up to `total_bytes`, with their headers, had better wait: there
    /// will be room for all of them, and there is not yet.
    ///
    /// # Errors
    /// The queue is broken.
    fn should_wait_for(&mut self, _count: u32, _total_bytes: u32) -> Result<bool, Refusal> {
        Ok(false)
    }

    /// Delivers a frame.
    ///
    /// # Errors
    /// Why it was not.
    fn put(&mut self, frame: &mut OutFrame<'_>) -> Result<(), Refusal>;
}

/// Frames for one destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a, 'm> {
    pub(crate) burst: &'a Burst<'m>,
    pub(crate) frames: FrameSet,
    /// Those whose segments are delivered as far as there is room, rather than wait for it.
    pub(crate) no_wait: FrameSet,
    /// What the destination's VLANs make of the frames' tags; nothing in a switch without VLANs. The
    /// burst knows which they are.
    pub(crate) retags: Option<&'a Retags>,
    /// The source's queue: a flow stays in one queue of the destination.
    pub(crate) source_queue: u16,
    /// The destination's queue pairs that this worker polls, a bit each: no other worker wants
    /// their locks.
    pub(crate) owned: u64,
}

/// What became of a job's frames. Those in no set, and segments, are in the [`Account`].
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) sent: FrameSet,
    pub(crate) sent_bytes: u64,
    /// Frames that found the destination full or busy; they may be tried again.
    pub(crate) refused: FrameSet,
    /// Which of the two: `RingFull` or `RingBusy`.
    pub(crate) refusal: DropReason,
    /// The queue pair that holds frames for which the kernel had no room yet.
    pub(crate) unsent: Option<u16>,
    /// Descriptors of the destination that were read one by one; of the common ones, a buffer each,
    /// none.
    pub(crate) walked: u32,
}

impl Outcome {
    /// None of a job's frames is delivered yet: `RingFull` or, since somebody else has the queue,
    /// `RingBusy`.
    pub(crate) fn refused(job: &Job<'_, '_>, refusal: DropReason) -> Self {
        Self {
            refused: job.frames,
            refusal,
            ..Self::new()
        }
    }

    /// Frames that were delivered, each segment counted.
    #[inline]
    pub(crate) fn frames(&self, account: &Account) -> u64 {
        u64::from(self.sent.len()) + account.extra_delivered()
    }

    fn new() -> Self {
        Self {
            sent: FrameSet::EMPTY,
            sent_bytes: 0,
            refused: FrameSet::EMPTY,
            refusal: DropReason::RingFull,
            unsent: None,
            walked: 0,
        }
    }
}

/// What was done to the frames for one destination in one burst, but for those that were delivered
/// as they were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    is_used: bool,
    /// Frames, and segments of frames that were delivered in part, that were not.
    pub(crate) drops: DropCounts,
    /// Frames that were delivered whole, with their checksum completed.
    pub(crate) csum_completed: u64,
    /// Frames that were segmented and delivered at least in part,
    pub(crate) gso_frames: u64,
    /// and the segments that they became.
    pub(crate) gso_segments: u64,
    /// Segments that were not delivered: they are in `drops` too.
    lost_segments: u64,
}

impl Account {
    /// Whether nothing is in it.
    #[inline(always)]
    pub(crate) fn is_empty(&self) -> bool {
        !self.is_used
    }

    /// Counts frames that were not delivered.
    #[cold]
    pub(crate) fn drop(&mut self, frames: u32, reason: DropReason) {
        self.is_used |= frames > 0;
        self.drops[reason] += u64::from(frames);
    }

    /// Frames delivered beyond one for each that was segmented.
    pub(crate) fn extra_delivered(&self) -> u64 {
        self.gso_segments - self.lost_segments - self.gso_frames
    }
}

/// What delivery works with. Once per worker.
#[derive(Debug)]
pub(crate) struct Tools {
    pub(crate) gso: GsoScratch,
    pub(crate) rx: RxScratch,
    pub(crate) account: Account,
    /// Queues found in other hands, ever.
    pub(crate) contended: u64,
    /// Frames for which system calls were made, since this was asked last.
    pub(crate) by_calls: u32,
}

impl Tools {
    pub(crate) fn new() -> Self {
        Self {
            gso: GsoScratch::new(),
            rx: RxScratch::new(),
            account: Account::default(),
            contended: 0,
            by_calls: 0,
        }
    }

    /// What `try_lock` gives, tried again for as long as somebody else's burst may take; counts
    /// that it was not to be had at once.
    #[inline]
    pub(crate) fn lock<G>(
        &mut self,
        counters: &QueueCounters,
        try_lock: impl Fn() -> Option<G>,
    ) -> Option<G> {
        if let Some(guard) = try_lock() {
            return Some(guard);
        }
        counters.contended.add(1);
        self.contended += 1;
        (0..LOCK_TRIES).find_map(|_| {
            std::hint::spin_loop();
            try_lock()
        })
    }

    /// None of a job's frames is delivered, for this reason.
    pub(crate) fn drop_all(&mut self, job: &Job<'_, '_>, reason: DropReason) -> Outcome {
        self.account.drop(job.frames.len(), reason);
        Outcome::new()
    }
}

for_this_cpu! {
    /// Delivers a job's frames for as long as there is room.
    pub(crate) fn deliver<Q: TxQueue>(
        queue: &mut Q,
        job: &Job<'_, '_>,
        gso: &mut GsoScratch,
        account: &mut Account,
    ) -> Outcome = deliver_frames;
}

#[inline(always)]
fn deliver_frames<Q: TxQueue>(
    queue: &mut Q,
    job: &Job<'_, '_>,
    gso: &mut GsoScratch,
    account: &mut Account,
) -> Outcome {
    let mut outcome = Outcome::new();
    let mut left = job.frames;
    loop {
        // The common frames in one go, then one that is not, and again.
        let (sent, bytes) = queue.put_plain(job.burst, left);
        outcome.sent |= sent;
        outcome.sent_bytes += bytes;
        left -= sent;
        let Some(index) = left.first() else {
            return outcome;
        };
        match put_any(queue, job, index, gso, account) {
            Ok(bytes) => {
                outcome.sent |= FrameSet::one(index);
                outcome.sent_bytes += bytes;
            }
            Err(Refusal::Full) => {
                outcome.refused = left;
                return outcome;
            }
            Err(Refusal::Drop(reason)) => account.drop(1, reason),
            Err(Refusal::Broken) => {
                account.drop(left.len(), DropReason::BadDescriptor);
                return outcome;
            }
        }
        left = left.without_first();
    }
}

/// Delivers a frame of any kind, and returns how many L2 bytes were delivered.
#[cold]
fn put_any<Q: TxQueue>(
    queue: &mut Q,
    job: &Job<'_, '_>,
    index: usize,
    gso: &mut GsoScratch,
    account: &mut Account,
) -> Result<u64, Refusal> {
    let Limits {
        offloads,
        max_bytes,
    } = queue.limits();
    let retag = job.retags.map_or(Retag::Keep, |retags| retags.of(index));
    let mut frames = gso
        .frames((job.burst, index, retag), offloads, max_bytes)
        .map_err(Refusal::Drop)?;
    let (count, longest) = (frames.count(), frames.longest_bytes());
    if count > 1 && !job.no_wait.contains(index) && queue.should_wait_for(count, longest)? {
        return Err(Refusal::Full);
    }
    put_all(queue, &mut frames, account)
}

/// Delivers what one frame became until one is refused.
fn put_all<Q: TxQueue>(
    queue: &mut Q,
    frames: &mut OutFrames<'_>,
    account: &mut Account,
) -> Result<u64, Refusal> {
    let (mut sent, mut bytes) = (0, 0);
    let mut refusal = None;
    while let Some(mut frame) = frames.next() {
        match queue.put(&mut frame) {
            Ok(()) => {
                sent += 1;
                bytes += u64::from(frame.l2_bytes());
            }
            Err(refusal) if sent == 0 => return Err(refusal),
            Err(why) => {
                refusal = Some(why);
                break;
            }
        }
    }
    let count = frames.count();
    if count > 1 {
        account.is_used = true;
        account.gso_frames += 1;
        account.gso_segments += u64::from(count);
        account.lost_segments += u64::from(count - sent);
        let reason = match refusal {
            Some(Refusal::Drop(reason)) => reason,
            Some(Refusal::Broken) => DropReason::BadDescriptor,
            Some(Refusal::Full) | None => DropReason::RingFull,
        };
        account.drop(count - sent, reason);
    } else if frames.completes() {
        account.is_used = true;
        account.csum_completed += 1;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
