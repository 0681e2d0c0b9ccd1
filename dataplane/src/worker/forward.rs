//! From a gathered burst to delivered frames: the bridge decides, then each destination's frames
//! are copied under one lock, published once and announced by at most one call.

mod capture;
mod parked;

use std::sync::Arc;
use std::time::Duration;

use ringway_bridge::{
    Arrivals, Bridge, Decisions, DropReason, FrameSet, MAX_PORTS, MacAddr, Members, PortId,
    Station, Tick, Vlans,
};

use super::ledger::Ledger;
use super::pairs::{Pair, PairTable};
use super::parking::{Leaving, Parking};
use super::stalls::{Stall, Stalls};
use crate::burst::Burst;
use crate::capture::Taps;
use crate::clock::Clock;
use crate::offload::Retags;
use crate::port::{Job, Outcome, Port, Tools, deliver};
use crate::wire::Offloads;

/// A destination that is full goes on taking frames as long as it takes so many, or bytes of as
/// many frames of ordinary length, in the time that a source waits.
const PROGRESS: u64 = ringway_bridge::MAX_BURST as u64;

/// Bytes that are as much as a frame.
const BYTES_PER_FRAME: u64 = 2048;

/// Copies to guests that cost as much as one to a tap: some 50 ns and 1.6 µs.
const COPIES_PER_CALL: u64 = 32;

/// A source that had frames for two destinations serves both for at least so long, in nanoseconds:
/// none of them holds it up.
const SHARED_NS: u64 = 100_000_000;

/// All that forwarding needs of the worker.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) ports: Box<[Option<Arc<Port>>]>,
    pub(super) members: Members,
    /// Nothing while no port says which VLANs it is in. Looked at once a burst.
    in_vlans: Option<Box<InVlans>>,
    bridge: Arc<Bridge>,
    decisions: Decisions,
    tools: Tools,
    destinations: Box<[Destination]>,
    /// How long a full destination holds a source up that has no other: the source waits for so
    /// long before frames are dropped.
    backpressure_ns: u64,
    /// Frames that wait for destinations while their sources go on.
    parking: Parking,
    /// Copies of frames that went to several ports, since they were charged last.
    flooded: u64,
    pub(super) ledger: Ledger,
    pub(super) stalls: Stalls,
    /// Captures, while there are any.
    pub(super) taps: Option<Box<Taps>>,
    /// Queues of ports that hold frames for which the kernel had no room.
    pub(super) unsent: Vec<(PortId, u16)>,
    /// Per destination: the queue pairs that this worker polls, a bit each. Frames go to their
    /// receive rings, so that no other worker wants the same lock.
    pub(super) owned: Box<[u64]>,
}

/// What forwarding in VLANs takes besides.
#[derive(Debug)]
struct InVlans {
    /// Which port is in which VLAN.
    vlans: Arc<Vlans>,
    /// What becomes of a burst's tags at the destination that it is delivered to.
    retags: Retags,
}

impl InVlans {
    /// What becomes of the tags of `frames`, for `to`.
    fn retags(&mut self, to: PortId, frames: FrameSet, decisions: &Decisions) -> &Retags {
        let to = self.vlans.of(to);
        self.retags.decide(to, frames, decisions.classes());
        &self.retags
    }
}

/// A point in time, in the units of its users.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) tick: Tick,
    pub(super) ns: u64,
}

/// What is known of a destination.
#[derive(Clone, Copy, Debug, Default)]
struct Destination {
    /// Since when it is full, having taken no more than a few frames, in nanoseconds of the
    /// worker's clock; 0 while it is not.
    full_since_ns: u64,
    /// What it took since, in frames.
    progress: u64,
}

impl Destination {
    /// Frames that are not to wait until there is room for all of their segments: none, or all of
    /// them if it did not take enough for `patience_ns`.
    #[inline]
    fn no_wait(self, patience_ns: u64, now_ns: u64) -> FrameSet {
        let since_ns = self.full_since_ns;
        if since_ns == 0 && patience_ns != 0 || now_ns.saturating_sub(since_ns) < patience_ns {
            FrameSet::EMPTY
        } else {
            FrameSet::ALL
        }
    }

    /// Notes what a delivery to it came to, and returns for how long it is full.
    fn note(&mut self, outcome: &Outcome, now_ns: u64) -> u64 {
        self.progress += u64::from(outcome.sent.len()) + outcome.sent_bytes / BYTES_PER_FRAME;
        if self.full_since_ns == 0 || self.progress >= PROGRESS {
            *self = Self {
                full_since_ns: now_ns.max(1),
                progress: 0,
            };
        }
        now_ns.saturating_sub(self.full_since_ns)
    }
}

/// Whether a source queue serves one destination, which may hold it up, or several.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Service {
    /// The destination of its last frame that had one.
    to: Option<PortId>,
    /// It counts as shared until then, on the worker's clock.
    shared_until_ns: u64,
}

impl Service {
    /// That of a source which can't wait.
    pub(super) const NEVER_WAITS: Self = Self {
        to: None,
        shared_until_ns: u64::MAX,
    };

    /// Notes the destinations of a burst. Flooded frames tell nothing.
    #[inline]
    fn note(&mut self, to: PortId, is_only: bool, now_ns: u64) {
        if self.to != Some(to) || !is_only {
            self.change(to, now_ns);
        }
    }

    #[cold]
    fn change(&mut self, to: PortId, now_ns: u64) {
        if self.to.is_some() {
            self.shared_until_ns = self.shared_until_ns.max(now_ns + SHARED_NS);
        }
        self.to = Some(to);
    }

    fn is_shared(&self, now_ns: u64) -> bool {
        now_ns < self.shared_until_ns
    }
}

/// A source queue whose burst is forwarded.
#[derive(Debug)]
pub(super) struct Sender<'a> {
    pub(super) port: &'a Port,
    pub(super) pair: u16,
    pub(super) service: &'a mut Service,
}

/// What the deliveries of one burst have in common.
struct Round<'a> {
    /// Whose frames they are; nobody's if the port went.
    from: Option<PortId>,
    /// Frames that their destination has no room for may wait in the source.
    may_wait: bool,
    pairs: &'a PairTable,
    now_ns: u64,
}

impl<'a> Round<'a> {
    /// That of frames which were parked, of a port or of one that went.
    fn of_parked(from: Option<PortId>, pairs: &'a PairTable, now_ns: u64) -> Self {
        Self {
            from,
            may_wait: false,
            pairs,
            now_ns,
        }
    }

    #[inline(always)]
    fn pair(&self, to: PortId) -> Option<&'a Pair> {
        self.pairs.get(self.from?, to)
    }
}

impl Forwarder {
    pub(super) fn new(bridge: Arc<Bridge>, backpressure_ns: u64, clock: Clock) -> Self {
        Self {
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            members: Members::new(),
            in_vlans: None,
            bridge,
            decisions: Decisions::new(),
            tools: Tools::new(),
            destinations: vec![Destination::default(); MAX_PORTS].into(),
            backpressure_ns,
            parking: Parking::default(),
            flooded: 0,
            ledger: Ledger::new(),
            taps: None,
            stalls: Stalls::new(clock),
            unsent: Vec::with_capacity(MAX_PORTS),
            owned: vec![0; MAX_PORTS].into(),
        }
    }

    /// Forgets what is known of a port whose slot changes hands.
    pub(super) fn forget(&mut self, id: PortId) {
        self.destinations[id.index()] = Destination::default();
        self.ledger.forget(id);
        self.parking.remove(id);
    }

    /// How many frames were delivered by system calls, and how many copies of frames went to several
    /// ports, since this was asked last.
    #[inline]
    pub(super) fn take_work(&mut self) -> (u32, u64) {
        let by_calls = std::mem::take(&mut self.tools.by_calls);
        (by_calls, std::mem::take(&mut self.flooded))
    }

    /// Rings found in other hands, ever.
    pub(super) fn contended(&mut self) -> &mut u64 {
        &mut self.tools.contended
    }

    /// Finds out who is to blame for a burst that was late, and charges it for what it took beyond the
    /// most that it can have taken.
    #[cold]
    #[inline(never)]
    pub(super) fn charge_late(&mut self, from: PortId, took_ns: u64, most_ns: u64, now_ns: u64) {
        let Some(stall) = self.stalls.judge(took_ns, most_ns, now_ns) else {
            return;
        };
        let Stall { to, ns, slept } = stall;
        match (to, slept) {
            (Some(to), false) => self.ledger.charge_destination(to, ns, now_ns),
            (None, false) => self.ledger.charge(from, ns),
            (to, true) => self.charge_sleep(to.unwrap_or(from), ns, now_ns),
        }
    }

    /// Has a guest pay for memory that had the worker sleep. (The kernel has its own reasons to sleep
    /// in a call for a tap or a NIC.)
    fn charge_sleep(&mut self, id: PortId, ns: u64, now_ns: u64) {
        if let Some(Port::VhostUser(port)) = self.ports[id.index()].as_deref() {
            let waits_ns = self.ledger.charge_sleep(id, ns, now_ns);
            port.note_sleep(Duration::from_nanos(ns), Duration::from_nanos(waits_ns));
        }
    }

    /// Has the station that `frame` is from be behind `port` from now on, whoever used its address a
    /// moment ago.
    pub(super) fn announce(&self, port: PortId, frame: &[u8], now: Tick) {
        if let Some([_, _, _, _, _, _, a, b, c, d, e, f]) = frame.first_chunk() {
            let mac = MacAddr([*a, *b, *c, *d, *e, *f]);
            if let Some(station) = self.in_vlan_of(mac, port, frame) {
                self.bridge.fdb().announce(station, port, now);
            }
        }
    }

    /// The station of an address in the VLAN that a frame of `port` is in which begins with `frame`;
    /// none if the port does not take it.
    fn in_vlan_of(&self, mac: MacAddr, port: PortId, frame: &[u8]) -> Option<Station> {
        let Some(InVlans { vlans, .. }) = self.in_vlans.as_deref() else {
            return Some(mac.into());
        };
        let [high, low, tci @ ..] = frame.get(12..18)?.first_chunk::<6>()?;
        let vlan = vlans
            .of(port)
            .vlan_of(u16::from_be_bytes([*high, *low]), || {
                Some(u16::from_be_bytes([tci[0], tci[1]]))
            });
        Some(Station::new(mac, vlan.ok()?))
    }

    /// Forwards a burst whose snapshots are taken, and returns how many of its last frames are to
    /// be given back to the source, since their destination is full for the moment. All others
    /// are delivered or dropped, and counted.
    #[inline]
    pub(super) fn forward(
        &mut self,
        sender: Sender<'_>,
        burst: &mut Burst<'_>,
        pairs: &PairTable,
        now: Now,
    ) -> usize {
        if self.in_vlans.is_none() {
            self.forward_burst::<false>(sender, burst, pairs, now)
        } else {
            self.forward_burst::<true>(sender, burst, pairs, now)
        }
    }

    /// [`Forwarder::forward`], compiled for switches with VLANs and for those without.
    #[inline(never)]
    fn forward_burst<const HAS_VLANS: bool>(
        &mut self,
        sender: Sender<'_>,
        burst: &mut Burst<'_>,
        pairs: &PairTable,
        now: Now,
    ) -> usize {
        let Sender {
            port: source,
            pair: source_queue,
            service,
        } = sender;
        let from = source.base().id;
        // In our hands for the burst: what is done to the tags is part of each job.
        let mut in_vlans = if HAS_VLANS {
            self.in_vlans.take()
        } else {
            None
        };
        let plain = burst.plain();
        self.decide(from, burst, now.tick, in_vlans.as_deref());
        let round = Round {
            from: Some(from),
            may_wait: self.note_service(from, service, now.ns),
            pairs,
            now_ns: now.ns,
        };
        if let Some(taps) = &mut self.taps {
            let dropped = burst.rejected().iter().chain(self.decisions.drops());
            taps.arrivals((from, source_queue), burst, dropped);
        }
        let mut waiting = FrameSet::EMPTY;
        for at in 0..self.decisions.destinations().len() {
            let (to, frames) = self.decisions.destinations()[at];
            let Some(port) = &self.ports[to.index()] else {
                continue;
            };
            let retags = in_vlans
                .as_deref_mut()
                .map(|within| within.retags(to, frames, &self.decisions));
            if let Some(retags) = retags {
                burst.set_plain(plain, retags.frames());
            }
            let job = Job {
                burst: &*burst,
                frames,
                no_wait: self.destinations[to.index()].no_wait(self.backpressure_ns, now.ns),
                retags,
                source_queue,
                owned: self.owned[to.index()],
            };
            let rivals = round.from.filter(|_| round.may_wait);
            let is_behind = self.parking.has((to, source_queue), rivals);
            let outcome = if is_behind || self.ledger.waits(to, now.ns) {
                Outcome::refused(&job, DropReason::RingFull)
            } else if self.stalls.is_timing() {
                let (tools, job) = (&mut self.tools, &job);
                self.stalls.time(to, || port.deliver(job, tools))
            } else {
                port.deliver(&job, &mut self.tools)
            };
            if let Some(taps) = &mut self.taps {
                capture::departures(taps, to, &job, &outcome, &self.tools.account);
            }
            self.settle(&round, to, &outcome);
            if !outcome.refused.is_empty() {
                waiting |= self.keep(&round, to, &job, &outcome);
            }
        }
        if HAS_VLANS {
            self.in_vlans = in_vlans;
        }
        self.count_source_drops(source, burst);
        waiting.len() as usize
    }

    /// Has the workers' ports be in these VLANs from the next burst on, or tell none apart.
    pub(super) fn set_vlans(&mut self, vlans: Option<Arc<Vlans>>) {
        let within = |vlans| InVlans {
            vlans,
            retags: Retags::new(),
        };
        self.in_vlans = vlans.map(within).map(Box::new);
    }

    /// Has the bridge decide on a burst.
    #[inline(always)]
    fn decide(&mut self, from: PortId, burst: &Burst<'_>, now: Tick, in_vlans: Option<&InVlans>) {
        let heads = Arrivals {
            in_port: from,
            runs: burst.runs(),
        };
        let out = &mut self.decisions;
        match in_vlans {
            None => self.bridge.forward(&self.members, now, &heads, out),
            Some(InVlans { vlans, .. }) => {
                let within = (&self.members, &**vlans);
                let tci = |index| burst.tci(index);
                self.bridge.forward_in_vlans(within, now, &heads, tci, out);
            }
        }
    }

    /// Notes which destinations a source's burst has, and returns whether the one that it has may
    /// hold the source up.
    #[inline]
    fn note_service(&mut self, from: PortId, service: &mut Service, now_ns: u64) -> bool {
        if let [(to, _)] = self.decisions.destinations() {
            service.note(*to, true, now_ns);
            return !service.is_shared(now_ns);
        }
        let flooded = self.decisions.flooded();
        if !flooded.is_empty() {
            self.charge_flood_by_calls(from, flooded);
        }
        for (to, frames) in self.decisions.destinations() {
            self.flooded += u64::from((*frames & flooded).len());
            if !(*frames - flooded).is_empty() {
                service.note(*to, false, now_ns);
            }
        }
        false
    }

    /// Charges a source for what it floods to ports that take each frame by a system call.
    #[cold]
    fn charge_flood_by_calls(&mut self, from: PortId, flooded: FrameSet) {
        let takes_calls = |to: PortId| {
            let port = self.ports[to.index()].as_deref();
            matches!(port, Some(Port::Tap(_)))
        };
        let destinations = self.decisions.destinations().iter();
        let taps = destinations.filter(|(to, _)| takes_calls(*to));
        let copies: u64 = taps
            .map(|(_, frames)| u64::from((*frames & flooded).len()))
            .sum();
        self.decisions
            .charge_flood(from, copies * (COPIES_PER_CALL - 1));
    }

    /// Counts what happened to a destination's frames.
    #[inline(always)]
    fn settle(&mut self, round: &Round<'_>, to: PortId, outcome: &Outcome) {
        if let Some(pair) = round.pair(to) {
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
        if outcome.walked > 0 {
            let worth = (outcome.sent.len().into(), outcome.sent_bytes);
            self.ledger
                .charge_walk(to, outcome.walked, worth, round.now_ns);
        }
        if outcome.refused.is_empty() && !outcome.sent.is_empty() {
            self.destinations[to.index()].full_since_ns = 0;
        }
    }

    /// Decides on frames that found their destination full: the last of a burst that has no other
    /// are given back to the source, others are parked, and what there is no room for is dropped.
    /// Returns those that are given back.
    #[cold]
    fn keep(
        &mut self,
        round: &Round<'_>,
        to: PortId,
        job: &Job<'_, '_>,
        outcome: &Outcome,
    ) -> FrameSet {
        let full_ns = self.destinations[to.index()].note(outcome, round.now_ns);
        let mut given_back = FrameSet::EMPTY;
        if round.may_wait && full_ns < self.backpressure_ns {
            given_back = outcome.refused.suffix(job.burst.len());
            if let (Some(taps), Some(from)) = (&mut self.taps, round.from) {
                taps.gave_back((from, job.source_queue), given_back.len());
            }
        }
        let mut left = outcome.refused - given_back;
        if !left.is_empty() && full_ns < self.parking_ns() {
            let leaving = Leaving {
                from: round.from,
                to,
                source_queue: job.source_queue,
                outages: self.outages(to),
            };
            let mut lot = self.parking.lot(leaving, round.now_ns);
            let job = Job {
                frames: left,
                ..*job
            };
            let Tools { gso, account, .. } = &mut self.tools;
            left = deliver(&mut lot, &job, gso, account).refused;
            self.parking.rotate(0);
            if !self.tools.account.is_empty() {
                self.count_account(round, to);
            }
        }
        if !left.is_empty() {
            if let Some(taps) = &mut self.taps {
                capture::dropped(taps, to, job, (outcome.refusal, left));
            }
            self.count_drop(round, to, outcome.refusal, left.len().into());
        }
        given_back
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
        let to = frame.first_chunk().map(|mac| MacAddr(*mac));
        let to = to.and_then(|to| self.in_vlan_of(to, source.base().id, frame));
        let to = to.and_then(|to| self.bridge.fdb().lookup(to, now));
        let port = to.and_then(|to| self.ports[to.index()].as_ref());
        match port {
            Some(port) if port.base().id != source.base().id => port.offloads().1,
            _ => Offloads::NONE,
        }
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
        if let Some(pair) = round.pair(to) {
            pair.drop(reason, frames);
        }
    }

    fn count_source_drops(&self, source: &Port, burst: &Burst<'_>) {
        for (reason, frames) in burst.rejected().iter().chain(self.decisions.drops()) {
            source.base().rx_drops.add(*reason, u64::from(frames.len()));
        }
    }
}

#[cfg(test)]
mod tests;
