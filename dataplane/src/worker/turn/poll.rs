//! A turn of one queue: its frames are gathered, forwarded, and those that have to wait given back.

use ringway_bridge::DropReason;
use tracing::warn;

use super::{Polled, Worker};
use crate::burst::Burst;
use crate::port::{Port, QueueCounters, TapPort, TapReader, VhostPort};
use crate::wire::net_header::HEADER_BYTES;
use crate::worker::allowance::Allowance;

impl Worker {
    pub(super) fn poll(&mut self, index: usize) -> Polled {
        // Taken out for the time, which is cheaper than another reference to its port.
        let Some(mut source) = self.sources[index].take() else {
            return Polled::Stopped;
        };
        let (port, pair, limit) = (&*source.port, source.token.pair(), source.quantum);
        let polled = match (port, &mut source.reader) {
            (Port::VhostUser(guest), _) => {
                self.poll_guest(port, guest, pair, limit, &mut source.allowance)
            }
            (Port::Tap(tap), Some(reader)) => self.poll_tap(port, tap, pair, reader),
            (Port::Tap(_), None) => Polled::Stopped,
            (Port::AfXdp(xdp), _) => self.poll_af_xdp(port, xdp, pair, limit),
        };
        self.sources[index] = Some(source);
        polled
    }

    fn poll_guest(
        &mut self,
        port: &Port,
        guest: &VhostPort,
        pair: u16,
        limit: usize,
        allowance: &mut Allowance,
    ) -> Polled {
        let queue = guest.transmit_queue(pair);
        let Some(mut state) = queue.try_lock() else {
            queue.counters.contended.add_owned(1);
            *self.forwarder.contended() += 1;
            return Polled::Waiting(0);
        };
        let Some(started) = &mut state.started else {
            return Polled::Stopped;
        };
        let now = self.now();
        let (memory, ring) = started.ring.parts();
        let mut burst = self.burst.begin();
        let limit = limit.min(allowance.frames());
        let gathered = ring.gather(limit, memory, &mut burst);
        let count = burst.len();
        if count == 0 && gathered.is_ok() {
            return Polled::Empty;
        }
        burst.take_snapshots(ring.header_bytes(), started.offloads);
        let given_back = if started.enabled {
            let pairs = &self.handle.pairs;
            self.forwarder.forward(port, pair, &burst, pairs, now)
        } else {
            guest
                .base
                .rx_drops
                .add(DropReason::QueueDisabled, count as u64);
            0
        };
        let taken = count - given_back;
        let (done, again) = burst.frames().split_at(taken);
        let bytes = ring.complete_gathered(done);
        ring.give_back(again);
        queue.counters.frames.add_owned(taken as u64);
        queue.counters.bytes.add_owned(bytes);
        allowance.note(taken, bytes);
        guest.publish(queue, &mut state);
        if let Err(fault) = gathered {
            // The chain at fault is a frame received and dropped.
            queue.counters.frames.add_owned(1);
            guest.base.rx_drops.add(DropReason::BadDescriptor, 1);
            guest.fail_queue(queue, &mut state, &fault);
        }
        Polled::of(taken, count)
    }

    fn poll_tap(
        &mut self,
        port: &Port,
        tap: &TapPort,
        pair: u16,
        reader: &mut TapReader,
    ) -> Polled {
        let now = self.now();
        let mut burst = self.burst.begin();
        if let Err(error) = reader.gather(tap.fd(pair), &mut burst) {
            warn!(port = %tap.base.name, queue = pair, "tap queue failed: {error}");
            return Polled::Stopped;
        }
        let count = burst.len();
        if count == 0 {
            return Polled::Empty;
        }
        let counters = tap.queue_counters(pair).0;
        burst.take_snapshots(HEADER_BYTES, tap.offloads());
        let pairs = &self.handle.pairs;
        let given_back = self.forwarder.forward(port, pair, &burst, pairs, now);
        count_taken(&burst, count - given_back, counters);
        reader.give_back(given_back);
        Polled::of(count - given_back, count)
    }
}

/// Counts the first `taken` frames of a burst from a queue of the host.
pub(super) fn count_taken(burst: &Burst<'_>, taken: usize, counters: &QueueCounters) {
    let bytes = (0..taken).map(|i| u64::from(burst.l2_bytes(i))).sum();
    counters.frames.add_owned(taken as u64);
    counters.bytes.add_owned(bytes);
}
