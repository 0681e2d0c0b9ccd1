//! The receive side of a port, whatever its kind: one queue, taken for one burst.
//!
//! A kind of port implements [`RxQueue`], has a function `rx(pair)` that takes a queue, and a line in
//! `with_rx_queue!`, which is how a worker gets at it: the kind is looked at once per burst.

use super::QueueCounters;
use crate::burst::Burst;
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
    /// Completes the burst's first `taken` frames; the others are gathered again. Returns the L2 bytes
    /// of those that were taken.
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

    /// Puts up to `limit` frames into the empty burst. `takes` tells what the destination of a frame
    /// that begins so may be asked for.
    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        takes: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<Self::Completion<'m>>;

    /// Ends the burst, of which the first `taken` frames were completed and counted and `kept` others
    /// stay: shows the other side what was completed.
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
