//! Frames that were parked, on their way at last. Nothing of it is touched while no destination is full.

use ringway_bridge::{DropReason, FrameSet, PortId};

use super::{Forwarder, Now, Round, capture};
use crate::burst::BurstStorage;
use crate::port::{Job, Outcome};
use crate::wire::Offloads;
use crate::wire::net_header::HEADER_BYTES;
use crate::worker::ledger::max_charge_ns;
use crate::worker::pairs::PairTable;

/// Frames are parked for so many times as long as a source waits.
pub(super) const PARKING_TIME: u64 = 10;

/// Lots that are tried in a turn.
const LOTS_PER_TURN: usize = 8;

impl Forwarder {
    /// How long a frame may be parked, in nanoseconds.
    pub(super) fn parking_ns(&self) -> u64 {
        self.backpressure_ns.saturating_mul(PARKING_TIME)
    }

    /// Whether frames are parked.
    #[inline(always)]
    pub(in crate::worker) fn has_parked(&self) -> bool {
        !self.parking.is_empty()
    }

    /// Tries to deliver what is parked, with `storage` for the bursts, and charges those whose frames
    /// they are for the time that it takes by `clock`, in nanoseconds. Returns how many frames were
    /// delivered; `None` if it was time to try none.
    #[cold]
    pub(in crate::worker) fn deliver_parked(
        &mut self,
        storage: &mut BurstStorage,
        pairs: &PairTable,
        now: Now,
        mut clock: impl FnMut() -> u64,
    ) -> Option<u64> {
        let tries = self.parking.lots().min(LOTS_PER_TURN);
        let (mut sent, mut start_ns) = (None, now.ns);
        for at in 0..tries {
            self.expire_parked(at, pairs, now.ns);
            self.stalls.begin(now.ns);
            let leaving = self.parking.leaving(at);
            let (from, to) = (leaving.and_then(|l| l.from), leaving.map(|l| l.to));
            let Some((frames, bytes)) = self.deliver_lot(at, storage, pairs, now.ns) else {
                continue;
            };
            sent = Some(sent.unwrap_or(0) + frames);
            let end_ns = clock();
            let (by_calls, _) = self.take_work();
            let most_ns = max_charge_ns(frames, bytes, by_calls.into());
            let took_ns = end_ns.saturating_sub(start_ns);
            if let Some(from) = from {
                self.ledger.charge(from, took_ns.min(most_ns));
            }
            if let Some(to) = to.filter(|_| self.stalls.is_late(took_ns, most_ns)) {
                self.charge_late(to, took_ns, most_ns, end_ns);
            }
            start_ns = end_ns;
        }
        self.parking.rotate(tries);
        sent
    }

    /// Drops the frames of a lot that are there for too long, or for a port that was down since.
    fn expire_parked(&mut self, at: usize, pairs: &PairTable, now_ns: u64) {
        let Some(leaving) = self.parking.leaving(at) else {
            return;
        };
        let (since_ns, reason) = if leaving.outages == self.outages(leaving.to) {
            let since_ns = now_ns.saturating_sub(self.parking_ns());
            (since_ns, DropReason::RingFull)
        } else {
            (now_ns, DropReason::PortDown)
        };
        while let Some(old) = self.parking.expire(at, since_ns) {
            let round = Round::of_parked(old.from, pairs, now_ns);
            self.count_drop(&round, old.to, reason, 1);
        }
    }

    /// How often a port was seen down.
    pub(super) fn outages(&self, port: PortId) -> u64 {
        let port = self.ports[port.index()].as_ref();
        port.map_or(0, |port| port.base().outages.get())
    }

    /// Tries to deliver the first frames of a lot, if it is time. Returns how many were, with their
    /// L2 bytes.
    fn deliver_lot(
        &mut self,
        at: usize,
        storage: &mut BurstStorage,
        pairs: &PairTable,
        now_ns: u64,
    ) -> Option<(u64, u64)> {
        let mut burst = storage.begin();
        let leaving = self.parking.leave(at, now_ns, &mut burst)?;
        let to = leaving.to;
        // As when they came.
        let allowed = Offloads::ALL.with(Offloads::VOUCHES);
        burst.take_snapshots(HEADER_BYTES, allowed);
        let job = Job {
            burst: &burst,
            frames: FrameSet::range(0, burst.len()),
            no_wait: self.destinations[to.index()].no_wait(self.backpressure_ns, now_ns),
            // They have the destination's already.
            retags: None,
            source_queue: leaving.source_queue,
            owned: self.owned[to.index()],
        };
        let outcome = match &self.ports[to.index()] {
            Some(port) if !self.ledger.waits(to, now_ns) => port.deliver(&job, &mut self.tools),
            _ => Outcome::refused(&job, DropReason::RingFull),
        };
        if let Some(taps) = &mut self.taps {
            capture::departures(taps, to, &job, &outcome, &self.tools.account);
        }
        let (count, is_full) = (burst.len(), !outcome.refused.is_empty());
        let gone = count - outcome.refused.len() as usize;
        self.parking.left(at, gone, is_full, now_ns);
        let round = Round::of_parked(leaving.from, pairs, now_ns);
        self.settle(&round, to, &outcome);
        if is_full {
            self.destinations[to.index()].note(&outcome, now_ns);
        }
        Some((outcome.sent.len().into(), outcome.sent_bytes))
    }
}
