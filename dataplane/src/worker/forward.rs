//! From a gathered burst to delivered frames: the bridge decides, then each destination's frames
//! are copied under one lock, published once and announced by at most one call.

use std::sync::Arc;

use ringway_bridge::{
    Bridge, Decisions, DropReason, FrameSet, MAX_PORTS, MacAddr, Members, PortId, Tick,
};

use super::pairs::PairTable;
use crate::burst::Burst;
use crate::port::{Job, Outcome, Port, Tools};
use crate::wire::Offloads;

/// All that forwarding needs of the worker.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) ports: Box<[Option<Arc<Port>>]>,
    pub(super) members: Members,
    bridge: Arc<Bridge>,
    decisions: Decisions,
    tools: Tools,
    /// Per destination: since when its receive ring is full without having taken a frame, in
    /// nanoseconds of the worker's clock; 0 while it takes frames.
    full_since: Box<[u64]>,
    /// How long a full destination holds a source up: a source waits for so long before frames are
    /// dropped.
    pub(super) backpressure_ns: u64,
    /// Queues of ports that hold frames for which the kernel had no room.
    pub(super) unsent: Vec<(PortId, u16)>,
    /// Per destination: the queue pairs that this worker polls, a bit each. Frames go to their
    /// receive rings, so that no other worker wants the same lock.
    pub(super) owned: Box<[u64]>,
}

/// A point in time, in the units of its users.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) tick: Tick,
    pub(super) ns: u64,
}

/// What the deliveries of one burst have in common.
struct Round<'a> {
    from: PortId,
    /// Frames with several destinations, which can't wait: those that have them would get them
    /// twice.
    flooded: FrameSet,
    pairs: &'a PairTable,
    now_ns: u64,
}

impl Forwarder {
    pub(super) fn new(bridge: Arc<Bridge>, backpressure_ns: u64) -> Self {
        Self {
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            members: Members::new(),
            bridge,
            decisions: Decisions::new(),
            tools: Tools::new(),
            full_since: vec![0; MAX_PORTS].into(),
            backpressure_ns,
            unsent: Vec::with_capacity(MAX_PORTS),
            owned: vec![0; MAX_PORTS].into(),
        }
    }

    /// Forgets what is known of a destination whose slot changes hands.
    pub(super) fn reset_destination(&mut self, id: PortId) {
        self.full_since[id.index()] = 0;
    }

    /// Rings found in other hands, ever.
    pub(super) fn contended(&mut self) -> &mut u64 {
        &mut self.tools.contended
    }

    /// Has the station that `frame` is from be behind `port` from now on, whoever used its address a
    /// moment ago.
    pub(super) fn announce(&self, port: PortId, frame: &[u8], now: Tick) {
        if let Some([_, _, _, _, _, _, a, b, c, d, e, f]) = frame.first_chunk() {
            let station = MacAddr([*a, *b, *c, *d, *e, *f]);
            self.bridge.fdb().announce(station, port, now);
        }
    }

    /// Forwards a burst whose snapshots are taken, and returns how many of its last frames are to
    /// be given back to the source, since their destination is full for the moment. All others
    /// are delivered or dropped, and counted.
    pub(super) fn forward(
        &mut self,
        source: &Port,
        source_queue: u16,
        burst: &Burst<'_>,
        pairs: &PairTable,
        now: Now,
    ) -> usize {
        let from = source.base().id;
        let heads = ringway_bridge::Arrivals {
            in_port: from,
            runs: burst.runs(),
        };
        self.bridge
            .forward(&self.members, now.tick, &heads, &mut self.decisions);
        let has_two_ports = self.members.len() <= 2;
        let flooded = if has_two_ports {
            FrameSet::EMPTY
        } else {
            self.decisions.flooded()
        };
        let round = Round {
            from,
            flooded,
            pairs,
            now_ns: now.ns,
        };
        let mut waiting = FrameSet::EMPTY;
        for at in 0..self.decisions.destinations().len() {
            let (to, frames) = self.decisions.destinations()[at];
            let Some(port) = &self.ports[to.index()] else {
                continue;
            };
            let job = Job {
                burst,
                frames,
                no_wait: self.no_wait(to, flooded, now.ns),
                source_queue,
                owned: self.owned[to.index()],
            };
            let outcome = port.deliver(&job, &mut self.tools);
            waiting |= self.settle(&round, to, &outcome);
        }
        let given_back = waiting.suffix(burst.len());
        let late = waiting - given_back;
        if !late.is_empty() {
            self.drop_late(&round, late);
        }
        self.count_source_drops(source, burst);
        given_back.len() as usize
    }

    /// Counts what happened to a destination's frames, and returns those that are to wait for it.
    #[inline]
    fn settle(&mut self, round: &Round<'_>, to: PortId, outcome: &Outcome) -> FrameSet {
        if let Some(pair) = round.pairs.get(round.from, to) {
            pair.frames.add_owned(outcome.frames(&self.tools.account));
            pair.bytes.add_owned(outcome.sent_bytes);
        }
        if !self.tools.account.is_empty() {
            self.count_account(round, to);
        }
        if let Some(pair) = outcome.unsent
            && !self.unsent.contains(&(to, pair))
        {
            self.unsent.push((to, pair));
        }
        if outcome.refused.is_empty() {
            if !outcome.sent.is_empty() {
                self.full_since[to.index()] = 0;
            }
            return FrameSet::EMPTY;
        }
        let wait = if self.may_wait(to, outcome, round.now_ns) {
            outcome.refused - round.flooded
        } else {
            FrameSet::EMPTY
        };
        let dropped = (outcome.refused - wait).len();
        if dropped > 0 {
            self.count_drop(round, to, outcome.refusal, u64::from(dropped));
        }
        wait
    }

    /// Has the kernel send what it had no room for before.
    #[cold]
    pub(super) fn send_again(&mut self) {
        let ports = &self.ports;
        self.unsent.retain(|(id, pair)| {
            let port = ports[id.index()].as_ref();
            port.is_some_and(|port| port.send_again(*pair))
        });
    }

    /// What the one destination of a frame from `source` takes that begins with `frame`; nothing if
    /// it has none or several.
    pub(super) fn takes(&self, source: &Port, frame: &[u8], now: Tick) -> Offloads {
        let Some(to) = frame.first_chunk().map(|mac| MacAddr(*mac)) else {
            return Offloads::NONE;
        };
        let to = self.bridge.fdb().lookup(to, now);
        let port = to.and_then(|to| self.ports[to.index()].as_ref());
        match port {
            Some(port) if port.base().id != source.base().id => port.offloads().1,
            _ => Offloads::NONE,
        }
    }

    /// Frames that are not to wait until a destination has room for all of their segments: those
    /// that can't wait at all, or all of them if it did not take a frame for long.
    #[inline]
    fn no_wait(&self, to: PortId, flooded: FrameSet, now_ns: u64) -> FrameSet {
        let since = self.full_since[to.index()];
        if since == 0 && self.backpressure_ns != 0
            || now_ns.saturating_sub(since) < self.backpressure_ns
        {
            flooded
        } else {
            FrameSet::ALL
        }
    }

    /// Whether a source waits for a destination that refused frames: for `backpressure_ns` since it
    /// last took one.
    #[cold]
    fn may_wait(&mut self, to: PortId, outcome: &Outcome, now_ns: u64) -> bool {
        let since = &mut self.full_since[to.index()];
        if !outcome.sent.is_empty() || *since == 0 {
            *since = now_ns.max(1);
        }
        now_ns.saturating_sub(*since) < self.backpressure_ns
    }

    /// Counts what was done to a destination's frames, and empties the account.
    #[cold]
    fn count_account(&mut self, round: &Round<'_>, to: PortId) {
        let account = std::mem::take(&mut self.tools.account);
        if let Some(port) = &self.ports[to.index()] {
            let counters = &port.base().tx_offloads;
            counters.csum_completed.add(account.csum_completed);
            counters.gso_frames.add(account.gso_frames);
            counters.gso_segments.add(account.gso_segments);
        }
        for (reason, frames) in account.drops.nonzero() {
            self.count_drop(round, to, reason, frames);
        }
    }

    fn count_drop(&self, round: &Round<'_>, to: PortId, reason: DropReason, frames: u64) {
        if let Some(port) = &self.ports[to.index()] {
            port.base().tx_drops.add(reason, frames);
        }
        if let Some(pair) = round.pairs.get(round.from, to) {
            pair.drop(reason, frames);
        }
    }

    /// Drops frames that were to wait but are followed by others that were delivered: giving them
    /// back would deliver those twice.
    #[cold]
    fn drop_late(&self, round: &Round<'_>, late: FrameSet) {
        for (to, frames) in self.decisions.destinations() {
            let dropped = (*frames & late).len();
            if dropped > 0 {
                self.count_drop(round, *to, DropReason::RingFull, u64::from(dropped));
            }
        }
    }

    fn count_source_drops(&self, source: &Port, burst: &Burst<'_>) {
        for (reason, frames) in burst.rejected().iter().chain(self.decisions.drops()) {
            source.base().rx_drops.add(*reason, u64::from(frames.len()));
        }
    }
}
