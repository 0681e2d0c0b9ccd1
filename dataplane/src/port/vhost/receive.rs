//! The receive side: a guest's transmit ring, in a worker's hands for one burst.

use ringway_bridge::DropReason;

use super::allowance::Allowance;
use super::{QueueGuard, QueueState, VhostPort, VhostQueue};
use crate::burst::Burst;
use crate::port::{Completion, Gathered, QueueCounters, RxQueue, Unavailable};
use crate::ring::{AnyRing, RingFault};
use crate::wire::Offloads;

/// A guest's transmit ring that is started.
#[derive(Debug)]
pub(crate) struct VhostRx<'a> {
    port: &'a VhostPort,
    queue: &'a VhostQueue,
    state: QueueGuard<'a>,
    /// The rule that the guest broke behind the frames of the burst.
    fault: Option<RingFault>,
}

impl VhostPort {
    /// The transmit ring of a pair, for one burst.
    ///
    /// # Errors
    /// It is in other hands, or not started.
    #[inline]
    pub(crate) fn rx(&self, pair: u16) -> Result<VhostRx<'_>, Unavailable> {
        let queue = self.transmit_queue(pair);
        let state = queue.try_lock().ok_or(Unavailable::Busy)?;
        if state.started.is_none() {
            return Err(Unavailable::Stopped);
        }
        Ok(VhostRx {
            port: self,
            queue,
            state,
            fault: None,
        })
    }
}

/// What completes frames in a guest's ring.
#[derive(Debug)]
pub(crate) struct VhostCompletion<'m> {
    ring: &'m mut AnyRing,
    allowance: &'m mut Allowance,
}

impl Completion for VhostCompletion<'_> {
    #[inline]
    fn complete(self, burst: &Burst<'_>, taken: usize) -> u64 {
        let (done, again) = burst.frames().split_at(taken);
        let bytes = self.ring.complete_gathered(done);
        self.ring.give_back(again);
        self.allowance.note(taken, bytes);
        bytes
    }
}

impl VhostRx<'_> {
    /// Stops the ring. The chain at fault is a frame received and dropped.
    #[cold]
    fn fail(&mut self, fault: &RingFault) {
        self.queue.counters.frames.add_owned(1);
        self.port.base.rx_drops.add(DropReason::BadDescriptor, 1);
        self.port.fail_queue(self.queue, &mut self.state, fault);
    }
}

impl RxQueue for VhostRx<'_> {
    type Completion<'m>
        = VhostCompletion<'m>
    where
        Self: 'm;

    #[inline]
    fn counters(&self) -> &QueueCounters {
        &self.queue.counters
    }

    #[inline]
    fn gather<'m>(
        &'m mut self,
        limit: usize,
        burst: &mut Burst<'m>,
        _: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<VhostCompletion<'m>> {
        let QueueState {
            started, allowance, ..
        } = &mut *self.state;
        let Some(started) = started else {
            return Gathered::Stopped;
        };
        let (memory, ring) = started.ring.parts();
        let limit = limit.min(allowance.frames());
        self.fault = ring.gather(limit, memory, burst).err();
        if burst.len() == 0 && self.fault.is_none() {
            return Gathered::Nothing;
        }
        Gathered::Frames {
            header_bytes: ring.header_bytes(),
            allowed: started.offloads,
            is_enabled: started.enabled,
            completion: VhostCompletion { ring, allowance },
        }
    }

    #[inline]
    fn finish(&mut self, _taken: usize, _kept: usize) {
        self.port.publish(self.queue, &mut self.state);
        if let Some(fault) = self.fault.take() {
            self.fail(&fault);
        }
    }

    fn arm(&mut self) -> bool {
        let Some(started) = &mut self.state.started else {
            return true;
        };
        // Without a kick fd the ring must be polled for ever.
        if started.is_polled() {
            return false;
        }
        let is_empty = started.ring.arm();
        if !is_empty {
            started.ring.disarm();
        }
        is_empty
    }

    fn disarm(&mut self) {
        if let Some(started) = &mut self.state.started {
            started.ring.disarm();
        }
    }
}
