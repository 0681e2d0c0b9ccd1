//! A vhost-user port: its rings, and how sessions and workers share them.
//!
//! Each ring has a [`BurstLock`]. A worker tries it once per burst; the session thread waits for it
//! to start, stop, move or enable the ring, so what it replaces is out of use when its call returns.

mod allowance;
mod device;
mod receive;
mod tx;

pub(crate) use tx::RxScratch;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use self::allowance::Allowance;
use super::call::{Blocked, signal};
use super::{PortBase, QueueCounters};
use crate::burst_lock::BurstLock;
use crate::info::{PortState, QueueInfo};
use crate::memory::GuestMemory;
use crate::ring::{Ring, RingAddresses, RingFault};
use crate::wake::Binding;
use crate::wire::{Features, Offloads, ProtocolFeatures};

/// Why a ring stops whose memory is no longer the guest's (SIGBUS).
const CUT_OFF: &str = "its memory file was cut off";

/// Why a ring stops whose front-end holds up whoever calls it.
const CALL_BLOCKS: &str = "its call fd blocks";

/// A ring that is started.
#[derive(Debug)]
pub(crate) struct StartedRing {
    pub(crate) ring: Ring,
    /// Frames pass; a transmit ring that is disabled is drained and discarded.
    pub(crate) enabled: bool,
    /// What the guest may send through the ring, or takes from it.
    pub(crate) offloads: Offloads,
    addresses: RingAddresses,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
}

impl StartedRing {
    /// The front-end gave no kick fd: the ring must be polled for ever.
    fn is_polled(&self) -> bool {
        self.kick.is_none()
    }

    /// Sends the guest a call, if the driver does not poll.
    ///
    /// # Errors
    /// The front-end made its fd block: the ring is to be stopped.
    #[inline]
    fn call(&self) -> Result<(), Blocked> {
        self.call.as_ref().map_or(Ok(()), signal)
    }
}

/// What a worker needs of a queue. What state its ring is in, the session knows.
#[derive(Debug, Default)]
pub(crate) struct QueueState {
    pub(crate) started: Option<StartedRing>,
    /// Where a ring stood that stopped without the session, which asks for it by `stop_ring`.
    stopped_at: Option<u32>,
    /// Who polls it: of a transmit ring.
    binding: Option<Binding>,
    /// How much may be taken at a time: of a transmit ring.
    allowance: Allowance,
}

/// One virtqueue.
#[derive(Debug, Default)]
pub(crate) struct VhostQueue {
    state: BurstLock<QueueState>,
    /// For display: entries of the started ring, or 0.
    size: AtomicU16,
    /// For display: whether the ring is enabled, or was when it stopped.
    is_enabled: AtomicBool,
    pub(crate) counters: QueueCounters,
}

/// A queue in a worker's hands for one burst.
pub(crate) type QueueGuard<'a> = MutexGuard<'a, QueueState>;

impl VhostQueue {
    /// The queue for one burst, or `None` if somebody else has it or waits for it.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<QueueGuard<'_>> {
        self.state.try_lock()
    }

    /// The queue, once the worker that has it is done with its burst.
    fn lock(&self) -> QueueGuard<'_> {
        self.state.lock()
    }

    fn is_started(&self) -> bool {
        self.size.load(Ordering::Relaxed) > 0
    }
}

/// A port whose guest is behind a vhost-user socket.
#[derive(Debug)]
pub(crate) struct VhostPort {
    pub(crate) base: PortBase,
    /// Guest receive 2n, guest transmit 2n + 1.
    queues: Box<[VhostQueue]>,
    /// Bit n: the guest's receive ring of pair n takes frames.
    receivers: AtomicU64,
    memory: Mutex<Arc<GuestMemory>>,
    configured_mtu: Option<u16>,
    /// What the front-end told, 0 for nothing.
    frontend_mtu: AtomicU16,
    features: AtomicU64,
    protocol_features: AtomicU64,
    connections: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl VhostPort {
    pub(crate) fn new(base: PortBase, pairs: u16, mtu: Option<u16>) -> Self {
        Self {
            base,
            queues: (0..2 * pairs).map(|_| VhostQueue::default()).collect(),
            receivers: AtomicU64::new(0),
            memory: Mutex::default(),
            configured_mtu: mtu,
            frontend_mtu: AtomicU16::new(0),
            features: AtomicU64::new(0),
            protocol_features: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            last_error: Mutex::new(None),
        }
    }

    /// Tells who polls a pair: before the session starts, and whenever it changes. The kick fd of a
    /// started ring passes to the new worker, which has to look at the ring once afterwards.
    ///
    /// # Errors
    /// The new worker can't poll the kick fd; nothing changed.
    pub(crate) fn bind(&self, pair: u16, binding: Binding) -> std::io::Result<()> {
        let mut state = self.transmit_queue(pair).lock();
        let started = state.started.as_ref();
        if let Some(kick) = started.and_then(|started| started.kick.as_ref()) {
            binding.watch(kick.as_fd())?;
            if let Some(old) = &state.binding {
                old.unwatch(kick.as_fd());
            }
        }
        state.binding = Some(binding);
        Ok(())
    }

    pub(crate) fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len() / 2).unwrap_or(u16::MAX)
    }

    /// The ring into which the guest transmits.
    #[inline]
    pub(crate) fn transmit_queue(&self, pair: u16) -> &VhostQueue {
        &self.queues[2 * usize::from(pair) + 1]
    }

    /// The ring from which the guest receives frames of a source's queue `source_queue`, or `None`
    /// if there is none now. `owned` has a bit for each pair that the worker polls which asks.
    #[inline]
    pub(crate) fn receive_queue(&self, source_queue: u16, owned: u64) -> Option<&VhostQueue> {
        // Relaxed: only a hint; the ring itself is read under its lock.
        let receivers = self.receivers.load(Ordering::Relaxed);
        let pair = choose_receiver(receivers, owned, source_queue)?;
        self.queues.get(2 * pair)
    }

    pub(crate) fn mtu(&self) -> Option<u16> {
        let told = self.frontend_mtu.load(Ordering::Relaxed);
        self.configured_mtu.or((told > 0).then_some(told))
    }

    pub(crate) fn state(&self) -> PortState {
        let any =
            |queue: &VhostQueue| queue.is_started() && queue.is_enabled.load(Ordering::Relaxed);
        if self.queues.iter().any(any) {
            PortState::Up
        } else {
            PortState::Down
        }
    }

    /// Counters of a pair: our Rx (guest transmit), our Tx (guest receive).
    pub(crate) fn queue_counters(&self, pair: u16) -> (&QueueCounters, &QueueCounters) {
        let at = 2 * usize::from(pair);
        (&self.queues[at + 1].counters, &self.queues[at].counters)
    }

    pub(crate) fn queue_info(&self, pair: u16, worker: u16) -> QueueInfo {
        let at = 2 * usize::from(pair);
        let (tx, rx) = (&self.queues[at], &self.queues[at + 1]);
        QueueInfo {
            index: pair,
            rx_started: rx.is_started(),
            tx_started: tx.is_started(),
            enabled: rx.is_enabled.load(Ordering::Relaxed) || tx.is_enabled.load(Ordering::Relaxed),
            rx_size: rx.size.load(Ordering::Relaxed),
            tx_size: tx.size.load(Ordering::Relaxed),
            worker,
            rx_frames: rx.counters.frames.get(),
            tx_frames: tx.counters.frames.get(),
            calls: rx.counters.calls.get() + tx.counters.calls.get(),
            contended: rx.counters.contended.get() + tx.counters.contended.get(),
        }
    }

    /// Virtio and protocol features in effect.
    pub(crate) fn features(&self) -> (Features, ProtocolFeatures) {
        let (virtio, protocol) = (&self.features, &self.protocol_features);
        (
            Features::from_bits_retain(virtio.load(Ordering::Relaxed)),
            ProtocolFeatures::from_bits_retain(protocol.load(Ordering::Relaxed)),
        )
    }

    pub(crate) fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    pub(crate) fn last_error(&self) -> Option<String> {
        self.last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Bytes and regions of guest memory that are mapped.
    pub(crate) fn mapped(&self) -> (u64, u32) {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        (
            memory.bytes(),
            u32::try_from(memory.regions().len()).unwrap_or(u32::MAX),
        )
    }

    /// Stops a ring whose guest broke the rules, from the worker that found out: counted and
    /// logged here, once, since the ring is gone afterwards.
    #[cold]
    pub(crate) fn fail_queue(&self, queue: &VhostQueue, state: &mut QueueState, why: &RingFault) {
        let started = state.started.as_ref();
        if started.is_some_and(|started| started.ring.is_broken()) {
            // Zero pages broke the rule, not the guest.
            self.stop_in_worker(queue, state, CUT_OFF);
        } else {
            self.stop_in_worker(queue, state, &why.to_string());
        }
    }

    /// Shows the guest what was completed in a ring, and calls it if it wants that. A ring whose
    /// call fd blocked is stopped.
    #[inline]
    pub(crate) fn publish(&self, queue: &VhostQueue, state: &mut QueueState) {
        let Some(started) = &mut state.started else {
            return;
        };
        if started.ring.publish() {
            queue.counters.calls.add_owned(1);
            if started.call().is_err() {
                self.stop_in_worker(queue, state, CALL_BLOCKS);
            }
        }
    }

    /// Stops every ring whose memory was cut off (SIGBUS); returns without those that are busy,
    /// and false if there were such.
    #[cold]
    pub(crate) fn stop_broken_queues(&self) -> bool {
        let mut all = true;
        for queue in &self.queues {
            if !queue.is_started() {
                continue;
            }
            let Some(mut state) = queue.try_lock() else {
                all = false;
                continue;
            };
            if state
                .started
                .as_ref()
                .is_some_and(|started| started.ring.is_broken())
            {
                self.stop_in_worker(queue, &mut state, CUT_OFF);
            }
        }
        all
    }

    /// Stops a started ring for a reason of ours. A ring that was stopped in the same burst stays as
    /// it is: where it stood and the first reason are kept.
    #[cold]
    fn stop_in_worker(&self, queue: &VhostQueue, state: &mut QueueState, why: &str) {
        if state.started.is_none() {
            return;
        }
        let index = self.index_of(queue);
        warn!(port = %self.base.name, ring = index, "ring stopped: {why}");
        self.set_last_error(Some(format!("ring {index} stopped: {why}")));
        state.stopped_at = self.take_started(queue, index, state);
    }

    fn index_of(&self, queue: &VhostQueue) -> u16 {
        let found = self
            .queues
            .iter()
            .position(|other| std::ptr::eq(other, queue));
        found
            .and_then(|index| u16::try_from(index).ok())
            .unwrap_or(u16::MAX)
    }

    fn set_last_error(&self, error: Option<String>) {
        *self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = error;
    }

    /// Takes a started ring out of use. Its kick fd leaves the worker's epoll instance first: the
    /// front-end holds the same file, so closing it alone would leave it there.
    fn take_started(&self, queue: &VhostQueue, index: u16, state: &mut QueueState) -> Option<u32> {
        let started = state.started.take()?;
        if let (Some(kick), Some(binding)) = (&started.kick, &state.binding) {
            binding.unwatch(kick.as_fd());
        }
        self.show(queue, index, state);
        Some(started.ring.base())
    }

    /// Tells what became of a ring to those who don't take its lock: display, and the choice of a
    /// receive ring.
    fn show(&self, queue: &VhostQueue, index: u16, state: &QueueState) {
        let started = state.started.as_ref();
        let size = started.map_or(0, |started| started.ring.size());
        queue.size.store(size, Ordering::Relaxed);
        if let Some(started) = started {
            queue.is_enabled.store(started.enabled, Ordering::Relaxed);
        }
        if index.is_multiple_of(2) {
            let bit = 1 << (index / 2);
            if started.is_some_and(|started| started.enabled) {
                self.receivers.fetch_or(bit, Ordering::Relaxed);
            } else {
                self.receivers.fetch_and(!bit, Ordering::Relaxed);
            }
        }
    }

    /// The queue of a ring, by the protocol's number, which the session has checked.
    fn queue(&self, index: u16) -> &VhostQueue {
        &self.queues[usize::from(index)]
    }
}

/// Which of `receivers` takes the frames of a source's queue: the one of the same number, so that a
/// flow stays in one ring, or the next that is `owned`. If another pair changes hands, the choice
/// stays.
#[inline]
pub(super) fn choose_receiver(receivers: u64, owned: u64, source_queue: u16) -> Option<usize> {
    let own = receivers & owned;
    if own >> source_queue & 1 != 0 {
        return Some(source_queue.into());
    }
    choose_other(receivers, own, source_queue)
}

/// The choice where the ring of the same number is not the worker's, or stopped.
fn choose_other(receivers: u64, own: u64, source_queue: u16) -> Option<usize> {
    if receivers == 0 {
        return None;
    }
    let mask = if own == 0 { receivers } else { own };
    let start = u32::from(source_queue) % receivers.count_ones();
    let pair = start + mask.rotate_right(start).trailing_zeros();
    Some((pair % u64::BITS) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_flow_goes_to_the_ring_of_its_number_or_the_next_that_the_worker_owns() {
        let all = u64::MAX;
        let choose =
            |receivers, owned| [0, 1, 2, 3, 5].map(|q| choose_receiver(receivers, owned, q));
        assert_eq!(choose(0, all), [None; 5]);
        assert_eq!(choose(0b1111, all), [0, 1, 2, 3, 1].map(Some));
        assert_eq!(choose(0b1111, 0b0101), [0, 2, 2, 0, 2].map(Some));
        assert_eq!(choose(0b1111, 0b1010), [1, 1, 3, 3, 1].map(Some));
        // Nothing of one's own: as if all were.
        assert_eq!(choose(0b0011, 0b1100), [0, 1, 0, 1, 1].map(Some));
        // A ring that is stopped.
        assert_eq!(choose(0b1011, all), [0, 1, 3, 3, 3].map(Some));
    }

    proptest! {
        #[test]
        fn the_chosen_ring_takes_frames_and_is_owned_if_any_is(
            receivers in 1_u64..,
            owned: u64,
            source_queue in 0_u16..64,
            other in 0_u32..64,
        ) {
            let chosen = choose_receiver(receivers, owned, source_queue).unwrap();
            let bit = 1 << chosen;
            prop_assert!(receivers & bit != 0);
            prop_assert!(receivers & owned == 0 || owned & bit != 0);
            // Losing another pair changes nothing.
            let lost = owned & !(1 << other);
            if lost & bit != 0 {
                prop_assert_eq!(choose_receiver(receivers, lost, source_queue), Some(chosen));
            }
        }
    }
}
