//! Delivery to a queue of an AF_XDP port.

use ringway_bridge::{DropReason, PortId};

use super::{Forwarder, Outcome, lock_for_burst};
use crate::burst::Burst;
use crate::offload::Workbench;
use crate::port::{AfXdpPort, Port, Sent, max_l2_bytes};
use crate::worker::parcels::put_parcels;

/// Delivers the frames of `mask` to queue `pair`, with one call to the kernel. Notes in `unsent` that
/// some are to be sent later.
pub(super) fn deliver_to_af_xdp(
    port: &AfXdpPort,
    pair: u16,
    (mask, haste): (u64, u64),
    burst: &Burst,
    bench: &mut Workbench,
    (unsent, contended): (&mut Vec<(PortId, u16)>, &mut u64),
) -> Outcome {
    let queue = port.queue(pair);
    let try_lock = || queue.try_transmitter();
    let Some(mut transmitter) = lock_for_burst(try_lock, &queue.tx, contended) else {
        return Outcome {
            busy: mask,
            ..Outcome::default()
        };
    };
    if !transmitter.begin() {
        return Outcome::all(mask, DropReason::HostError);
    }
    let max_bytes = max_l2_bytes(Some(port.mtu()));
    let mut outcome = Outcome::default();
    let mut left = mask;
    while left != 0 {
        // The common frames in one go, then one that is not, and again.
        let (sent, bytes) = transmitter.put_plain(burst, left, max_bytes);
        outcome.sent |= sent;
        outcome.sent_bytes += bytes;
        left &= !sent;
        if left == 0 {
            break;
        }
        let index = left.trailing_zeros() as usize;
        let is_hasty = haste >> index & 1 != 0;
        match put_parcels(&mut transmitter, (burst, index), max_bytes, is_hasty, bench) {
            Ok(bytes) => outcome.sent(index, bytes),
            // Frames behind it are refused too, lest they overtake it.
            Err(DropReason::RingFull) => {
                outcome.full = left;
                break;
            }
            Err(reason) => outcome.drop(1 << index, reason),
        }
        left &= left - 1;
    }
    // Also if nothing was put: what fills the ring may be what the kernel had no room for.
    if transmitter.submit() == Sent::Later && !unsent.contains(&(port.base.id, pair)) {
        unsent.push((port.base.id, pair));
    }
    let frames = u64::from(outcome.sent.count_ones()) + bench.tally.extra_delivered();
    queue.tx.frames.add_owned(frames);
    queue.tx.bytes.add_owned(outcome.sent_bytes);
    outcome
}

impl Forwarder {
    /// Has the kernel send what it had no room for before.
    #[cold]
    pub(in crate::worker) fn send_again(&mut self) {
        let ports = &self.ports;
        self.unsent.retain(|(id, pair)| match &ports[id.index()] {
            Some(port) => match &**port {
                Port::AfXdp(port) if *pair < port.pairs() => port
                    .queue(*pair)
                    .try_transmitter()
                    .is_none_or(|mut transmitter| transmitter.send() == Sent::Later),
                _ => false,
            },
            None => false,
        });
    }
}
