//! A vhost-user port: its rings, and how sessions and workers share them.
//!
//! Each ring has a [`BurstLock`](crate::burst_lock::BurstLock). A worker tries it once per burst;
//! the session thread waits for it to start, stop, move or enable the ring, so what it replaces is
//! out of use when its call returns.

mod allowance;
mod device;
mod health;
mod rings;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ringway_api::{PortState, QueueInfo};

use self::health::{Asleep, Kicks, Unreachable};
pub(crate) use self::rings::RxScratch;
pub(super) use self::rings::choose_receiver;
use self::rings::{QueueState, StartedRing, VhostQueue};
use super::{PortBase, QueueCounters};
use crate::burst_lock::lock;
use crate::call::Callee;
use crate::log_limit::LogLimit;
use crate::memory::GuestMemory;
use crate::vhost_user::Announcements;
use crate::wake::Binding;
use crate::wire::{Features, ProtocolFeatures};

/// Why a ring stops whose memory is no longer the guest's (SIGBUS).
const CUT_OFF: &str = "its memory file was cut off";

/// Lines in 10 s that tell why rings of a port were stopped: each is worth reading.
const FAULT_LINES: u32 = 100;

/// A port whose guest is behind a vhost-user socket.
#[derive(Debug)]
pub(crate) struct VhostPort {
    pub(crate) base: PortBase,
    /// Its calls, whatever ring they are of.
    pub(crate) callee: Arc<Callee>,
    /// Guest receive 2n, guest transmit 2n + 1.
    queues: Box<[VhostQueue]>,
    /// Bit n: the guest's receive ring of pair n takes frames.
    receivers: AtomicU64,
    memory: Mutex<Arc<GuestMemory>>,
    /// Features that guests may negotiate.
    offered: Features,
    /// What kicks came to, by queue pair.
    kicks: Box<[Kicks]>,
    configured_mtu: Option<u16>,
    /// What the front-end told, 0 for nothing.
    frontend_mtu: AtomicU16,
    /// Outlives sessions, so that to reconnect gains nothing.
    announced: Mutex<Announcements>,
    features: AtomicU64,
    protocol_features: AtomicU64,
    connections: AtomicU64,
    last_error: Mutex<Option<LastError>>,
    /// Why the front-end's socket can't be connected to, since it could be last.
    unreachable: Mutex<Option<Unreachable>>,
    /// The last sleep of a worker in the guest's memory.
    asleep: Mutex<Option<Asleep>>,
    /// The state that events told last.
    told: Mutex<PortState>,
    /// Of lines that tell of rings: a guest can start and stop them as often as it likes.
    log: LogLimit,
    /// Of lines that tell of rings stopped for a reason of ours, which the others don't crowd out.
    fault_log: LogLimit,
}

/// Why a session ended, or what went wrong in it.
#[derive(Debug)]
struct LastError {
    scope: Scope,
    reason: String,
    /// In which session, by the number of its connection: told until the next one ends.
    session: u64,
    /// Events tell it already.
    is_told: bool,
}

/// What an error is of, which may end it before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    Session,
    /// True until this ring starts again.
    Ring(u16),
    /// True until a front-end is let in.
    Entry,
}

impl VhostPort {
    pub(crate) fn new(base: PortBase, pairs: u16, mtu: Option<u16>) -> Self {
        let rings = 2 * u32::from(pairs);
        Self {
            base,
            callee: Arc::default(),
            queues: (0..2 * pairs).map(|_| VhostQueue::default()).collect(),
            receivers: AtomicU64::new(0),
            memory: Mutex::default(),
            configured_mtu: mtu,
            offered: Features::all(),
            kicks: (0..pairs).map(|_| Kicks::default()).collect(),
            frontend_mtu: AtomicU16::new(0),
            announced: Mutex::default(),
            features: AtomicU64::new(0),
            protocol_features: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            last_error: Mutex::new(None),
            unreachable: Mutex::new(None),
            asleep: Mutex::new(None),
            told: Mutex::new(PortState::Down),
            // A guest that boots starts its rings in firmware and again in its kernel.
            log: LogLimit::new(3 * rings + 5),
            fault_log: LogLimit::new(FAULT_LINES),
        }
    }

    /// The same port, which offers its guests no features of these.
    pub(crate) fn without(mut self, features: Features) -> Self {
        self.offered -= features;
        self
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
            self.watch_kick(pair, &binding, kick)?;
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

    pub(crate) fn mtu(&self) -> Option<u16> {
        let told = self.frontend_mtu.load(Ordering::Relaxed);
        self.configured_mtu.or((told > 0).then_some(told))
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
            rx_resumed: rx.resumed(),
            tx_resumed: tx.resumed(),
            worker,
            rx_frames: rx.counters.frames.get(),
            tx_frames: tx.counters.frames.get(),
            calls: rx.counters.calls.get() + tx.counters.calls.get(),
            contended: rx.counters.contended.get() + tx.counters.contended.get(),
            tolerated: rx.tolerated(),
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
        let error = lock(&self.last_error);
        error.as_ref().map(|error| error.reason.clone())
    }

    /// Bytes and regions of guest memory that are mapped.
    pub(crate) fn mapped(&self) -> (u64, u32) {
        let memory = lock(&self.memory);
        (
            memory.bytes(),
            u32::try_from(memory.regions().len()).unwrap_or(u32::MAX),
        )
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

    fn index_of(&self, queue: &VhostQueue) -> u16 {
        let found = self
            .queues
            .iter()
            .position(|other| std::ptr::eq(other, queue));
        found
            .and_then(|index| u16::try_from(index).ok())
            .unwrap_or(u16::MAX)
    }

    fn set_last_error(&self, scope: Scope, reason: String, is_told: bool) {
        let session = self.connections();
        *lock(&self.last_error) = Some(LastError {
            scope,
            reason,
            session,
            is_told,
        });
    }

    fn forget_errors_before(&self, session: u64) {
        lock(&self.last_error).take_if(|error| error.session < session);
    }

    /// A ring goes again, or a front-end is let in: what was wrong with it is no longer true.
    fn forget_error_of(&self, scope: Scope) {
        lock(&self.last_error).take_if(|error| error.scope == scope);
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

    /// Tells what became of a ring to those who don't take its lock: display, the choice of a
    /// receive ring, and the forwarding database if that was the last one.
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
        // A transmit ring that stops after the last receive ring may have taught something between.
        if started.is_none_or(|started| !started.enabled)
            && self.receivers.load(Ordering::Relaxed) == 0
        {
            self.base.forget_stations();
        }
    }

    /// The queue of a ring, by the protocol's number, which the session has checked.
    fn queue(&self, index: u16) -> &VhostQueue {
        &self.queues[usize::from(index)]
    }
}
