//! Ports: what can stand behind a slot of the bridge.

#[cfg_attr(not(feature = "af-xdp"), path = "no_af_xdp.rs")]
mod af_xdp;
mod counters;
mod loop_guard;
mod queue;
mod tap;
mod vhost;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ringway_api::{
    IfName, Occurrence, PortConfig, PortCounters, PortName, PortState, QueueInfo, SwitchError,
};
use ringway_bridge::{Bridge, FdbTally, PortId};

pub(crate) use af_xdp::AfXdpPort;
pub(crate) use counters::{Counter, DropCounters, OffloadCounters, QueueCounters};
pub(crate) use loop_guard::LoopGuard;
pub(crate) use queue::{
    Account, Completion, Gathered, Job, Limits, Outcome, Refusal, RxQueue, Tools, TxQueue,
    Unavailable, deliver, with_rx_queue,
};
pub(crate) use tap::{OWN_NAMESPACE, TapPort, index_of};
pub(crate) use vhost::VhostPort;

use crate::burst_lock::lock;
use crate::events::EventHub;
use crate::link::{Attachment, LinkStatus, Order};
use crate::log_limit::LogLimit;
use crate::wire::Offloads;

/// A port as workers see it. Dispatched once per burst.
#[derive(Debug)]
pub(crate) enum Port {
    VhostUser(Arc<VhostPort>),
    Tap(Box<TapPort>),
    AfXdp(Box<AfXdpPort>),
}

/// What all kinds of port have.
#[derive(Debug)]
pub(crate) struct PortBase {
    pub(crate) name: PortName,
    pub(crate) id: PortId,
    /// Frames from this port that went nowhere.
    pub(crate) rx_drops: DropCounters,
    /// Frames for this port that it could not take.
    pub(crate) tx_drops: DropCounters,
    /// What was done to frames for this port.
    pub(crate) tx_offloads: OffloadCounters,
    /// Frames forwarded in its name that came from none of its queues.
    pub(crate) injected: QueueCounters,
    /// Of lines that tell what the port floods and teaches.
    pub(crate) watch_log: LogLimit,
    /// Whether its own frames come back through it.
    pub(crate) loop_guard: Mutex<LoopGuard>,
    /// How often it was seen down: what waits for it is for whoever was there before.
    pub(crate) outages: Counter,
    bridge: Arc<Bridge>,
    events: EventHub,
    /// Of events that its guest or front-end can cause.
    event_limit: LogLimit,
}

/// Events in 10 s that a guest or its front-end can cause: a few reboots, each with all that
/// belongs to it.
const EVENTS: u32 = 100;

/// What a port of an interface keeps while what it has open is closed and opened anew.
#[derive(Debug)]
pub(crate) struct LinkBase {
    pub(crate) base: PortBase,
    /// The name by which the port was configured.
    pub(crate) ifname: Box<str>,
    status: Mutex<LinkStatus>,
    /// Of the watcher.
    pub(crate) looks: Looks,
    /// What queues counted that are closed by now: our Rx, our Tx.
    closed: (QueueCounters, QueueCounters),
    /// Of these, frames that travelled on as part of the one before.
    closed_merged: Counter,
}

/// How often the watcher looked at an interface: counts that tell how soon, whatever else the machine
/// does meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    made: AtomicU64,
    /// Times that the interface was to be opened.
    attempts: AtomicU64,
}

impl Looks {
    /// The watcher has looked, and told what it saw.
    pub(crate) fn count(&self, order: Option<Order>) {
        if order == Some(Order::Attach) {
            self.attempts.fetch_add(1, Ordering::Relaxed);
        }
        // Pairs with the load in `read`: what was told before is seen by whoever sees the count.
        self.made.fetch_add(1, Ordering::Release);
    }

    /// Looks, and attempts to open the interface, since the port was added.
    #[cfg(any(test, feature = "inline"))]
    pub(crate) fn read(&self) -> (u64, u64) {
        // Pairs with the addition in `count`.
        let made = self.made.load(Ordering::Acquire);
        (made, self.attempts.load(Ordering::Relaxed))
    }
}

impl LinkBase {
    pub(crate) fn new(base: PortBase, ifname: &IfName) -> Arc<Self> {
        Arc::new(Self {
            base,
            ifname: ifname.as_str().into(),
            status: Mutex::new(LinkStatus::NEW),
            looks: Looks::default(),
            closed: Default::default(),
            closed_merged: Counter::default(),
        })
    }

    /// What is known of the interface.
    pub(crate) fn status(&self) -> LinkStatus {
        lock(&self.status).clone()
    }

    pub(crate) fn set_status(&self, status: LinkStatus) {
        *lock(&self.status) = status;
    }
}

impl PortBase {
    pub(crate) fn new(name: PortName, id: PortId, bridge: Arc<Bridge>, events: &EventHub) -> Self {
        Self {
            name,
            id,
            rx_drops: DropCounters::default(),
            tx_drops: DropCounters::default(),
            tx_offloads: OffloadCounters::default(),
            injected: QueueCounters::default(),
            watch_log: LogLimit::new(1),
            loop_guard: Mutex::default(),
            outages: Counter::default(),
            bridge,
            events: events.clone(),
            event_limit: LogLimit::new(EVENTS),
        }
    }

    /// Tells what happened to the port, if anybody listens; what is too much is counted, and told
    /// with the next event. Not for workers.
    pub(crate) fn tell(&self, what: impl FnOnce(PortName) -> Occurrence) {
        if self.events.is_heard()
            && let Some(suppressed) = self.event_limit.pass(Instant::now())
        {
            self.events.tell_after(suppressed, what(self.name.clone()));
        }
    }

    /// Tells in which state the port is, `reason` being why it is not up.
    pub(crate) fn tell_state(&self, state: PortState, reason: Option<String>) {
        self.tell(|port| match state {
            PortState::Up => Occurrence::PortUp { port },
            PortState::Down => Occurrence::PortDown { port, reason },
            PortState::Impaired => Occurrence::PortImpaired {
                port,
                reason: reason.unwrap_or_default(),
            },
        });
    }

    /// What the forwarding database did and refused of the port since it was added.
    pub(crate) fn fdb_tally(&self) -> FdbTally {
        self.bridge.fdb().tally(self.id)
    }

    /// Whether stations were learned behind the port.
    pub(crate) fn has_stations(&self) -> bool {
        self.bridge.fdb().count(self.id) > 0
    }

    /// Notes that the port is down. Forgets which stations are behind it: by the next frame those are
    /// found that turned up elsewhere. Never waits, and costs nothing if there is none.
    #[cold]
    pub(crate) fn forget_stations(&self) {
        self.outages.add(1);
        self.bridge.fdb().flush_port(self.id);
    }
}

impl Port {
    pub(crate) fn base(&self) -> &PortBase {
        match self {
            Self::VhostUser(port) => &port.base,
            Self::Tap(port) => &port.link.base,
            Self::AfXdp(port) => &port.link.base,
        }
    }

    /// What a port of an interface keeps while that comes and goes.
    pub(crate) fn link(&self) -> Option<&Arc<LinkBase>> {
        match self {
            Self::VhostUser(_) => None,
            Self::Tap(port) => Some(&port.link),
            Self::AfXdp(port) => Some(&port.link),
        }
    }

    /// What is open of an interface.
    pub(crate) fn attachment(&self) -> Option<Attachment> {
        match self {
            Self::VhostUser(_) => None,
            Self::Tap(port) => port.attachment(),
            Self::AfXdp(port) => port.attachment(),
        }
    }

    /// Whether an interface of this thread's namespace is the port's: the one that it has open,
    /// whatever that is called by now, or the one that it waits for.
    pub(crate) fn has_interface(&self, ifname: &str, index: u32) -> bool {
        match (self, self.attachment()) {
            (Self::VhostUser(_), _) => false,
            (_, None) => self.link().is_some_and(|link| *link.ifname == *ifname),
            (Self::Tap(tap), Some(_)) => {
                tap.name_now() == Some(ifname.into()) && tap.is_in_this_namespace()
            }
            (Self::AfXdp(_), Some(open)) => open.index == index,
        }
    }

    /// The same port with nothing open; its counters go on. `None` if it has no interface.
    pub(crate) fn detached(&self) -> Option<Self> {
        let link = self.link()?;
        for pair in 0..self.queue_pairs() {
            let (rx, tx) = self.queue_counters(pair);
            let (closed_rx, closed_tx) = &link.closed;
            for (closed, counters) in [(closed_rx, rx), (closed_tx, tx)] {
                closed.frames.add(counters.frames.get());
                closed.bytes.add(counters.bytes.get());
            }
        }
        match self {
            Self::VhostUser(_) => None,
            Self::Tap(port) => Some(Self::Tap(Box::new(port.detached()))),
            Self::AfXdp(port) => {
                link.closed_merged.add(port.merged());
                Some(Self::AfXdp(Box::new(port.detached())))
            }
        }
    }

    /// Delivers frames to the port, in order, as far as there is room.
    #[inline(always)]
    pub(crate) fn deliver(&self, job: &Job<'_, '_>, tools: &mut Tools) -> Outcome {
        match self {
            Self::VhostUser(port) => port.deliver(job, tools),
            Self::Tap(port) => port.deliver(job, tools),
            Self::AfXdp(port) => port.deliver(job, tools),
        }
    }

    /// Has the kernel send what it had no room for before; true if some is left.
    #[cold]
    pub(crate) fn send_again(&self, pair: u16) -> bool {
        match self {
            Self::AfXdp(port) => port.send_again(pair),
            Self::VhostUser(_) | Self::Tap(_) => false,
        }
    }

    /// Queue pairs that workers poll.
    pub(crate) fn queue_pairs(&self) -> u16 {
        match self {
            Self::VhostUser(port) => port.pairs(),
            Self::Tap(port) => port.pairs(),
            Self::AfXdp(port) => port.pairs(),
        }
    }

    /// A port that is blocked passes nothing, whatever it could.
    pub(crate) fn state(&self) -> PortState {
        let state = match self {
            Self::VhostUser(port) => port.state(),
            Self::Tap(port) => port.link.status().state,
            Self::AfXdp(port) => port.link.status().state,
        };
        match state {
            PortState::Up if lock(&self.base().loop_guard).is_blocked(Instant::now()) => {
                PortState::Impaired
            }
            state => state,
        }
    }

    /// Notes that a kick, or what is one to other ports, came for a pair.
    pub(crate) fn note_kick(&self, pair: u16, is_polled: bool) {
        if let Self::VhostUser(port) = self {
            port.note_kick(pair, is_polled);
        }
    }

    /// What frames from the port may ask for, and what it takes, as negotiated now.
    pub(crate) fn offloads(&self) -> (Offloads, Offloads) {
        match self {
            Self::VhostUser(port) => {
                let (features, _) = port.features();
                (Offloads::from_guest(features), Offloads::to_guest(features))
            }
            Self::Tap(port) => (port.offloads(), port.offloads()),
            Self::AfXdp(port) => (port.sends(), Offloads::NONE),
        }
    }

    pub(crate) fn counters(&self) -> PortCounters {
        let injected = &self.base().injected;
        let learning = self.base().fdb_tally();
        let mut sum = PortCounters {
            rx_frames: injected.frames.get(),
            rx_bytes: injected.bytes.get(),
            rx_drops: self.base().rx_drops.read(),
            tx_drops: self.base().tx_drops.read(),
            tx_csum_completed: self.base().tx_offloads.csum_completed.get(),
            tx_gso_frames: self.base().tx_offloads.gso_frames.get(),
            tx_gso_segments: self.base().tx_offloads.gso_segments.get(),
            fdb_moves: learning.moves,
            fdb_moves_refused: learning.moves_refused,
            fdb_evictions: learning.evictions,
            fdb_limit_hits: learning.limit_hits,
            fdb_refused_full: learning.refused_full,
            ..PortCounters::default()
        };
        for pair in 0..self.queue_pairs() {
            let (rx, tx) = self.queue_counters(pair);
            sum.rx_frames += rx.frames.get();
            sum.rx_bytes += rx.bytes.get();
            sum.tx_frames += tx.frames.get();
            sum.tx_bytes += tx.bytes.get();
        }
        if let Some(link) = self.link() {
            let (rx, tx) = &link.closed;
            sum.rx_frames += rx.frames.get();
            sum.rx_bytes += rx.bytes.get();
            sum.tx_frames += tx.frames.get();
            sum.tx_bytes += tx.bytes.get();
            sum.rx_gro_merged = link.closed_merged.get();
        }
        if let Self::AfXdp(port) = self {
            sum.rx_gro_merged += port.merged();
        }
        sum
    }

    /// Counters of a queue pair: our Rx (taken from it), our Tx (given to it).
    pub(crate) fn queue_counters(&self, pair: u16) -> (&QueueCounters, &QueueCounters) {
        match self {
            Self::VhostUser(port) => port.queue_counters(pair),
            Self::Tap(port) => port.queue_counters(pair),
            Self::AfXdp(port) => {
                let queue = port.queue(pair);
                (&queue.rx, &queue.tx)
            }
        }
    }

    /// The fd by which the kernel tells of frames in a queue, if that is how it does.
    pub(crate) fn fd(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        match self {
            Self::VhostUser(_) => None,
            Self::Tap(port) => Some(port.fd(pair)),
            Self::AfXdp(port) => Some(port.queue(pair).fd()),
        }
    }

    /// Frames and bytes taken from a pair since the port was added.
    pub(crate) fn received(&self, pair: u16) -> (u64, u64) {
        let (rx, _) = self.queue_counters(pair);
        (rx.frames.get(), rx.bytes.get())
    }

    /// The queue pairs; `worker_of` tells who polls a pair.
    pub(crate) fn queues(&self, worker_of: impl Fn(u16) -> u16) -> Vec<QueueInfo> {
        let pairs = 0..self.queue_pairs();
        pairs
            .map(|pair| {
                let worker = worker_of(pair);
                match self {
                    Self::VhostUser(port) => port.queue_info(pair, worker),
                    Self::Tap(port) => port.queue_info(pair, worker),
                    Self::AfXdp(port) => port.queue_info(pair, worker),
                }
            })
            .collect()
    }
}

/// Why a port's interface can't be opened now, but may be later: it is missing, or down. A tap that is
/// missing is made.
pub fn awaited(config: &PortConfig) -> Option<SwitchError> {
    match config {
        PortConfig::AfXdp(nic) => AfXdpPort::absence(nic),
        PortConfig::Tap(_) | PortConfig::VhostUser(_) => None,
    }
}

/// Ethernet header, service tag and customer tag (IEEE 802.1Q, 9.5): what bridges put in front of a
/// packet that fills the MTU.
const L2_HEADER_BYTES: u32 = 14 + 2 * 4;

/// Longest L2 frame for an L3 MTU.
pub(crate) fn max_l2_bytes(mtu: Option<u16>) -> u32 {
    mtu.map_or(u32::MAX, |mtu| u32::from(mtu) + L2_HEADER_BYTES)
}

// And whose headers are found behind them.
const _: () = assert!(ringway_bridge::MAX_VLAN_TAGS >= 2);
