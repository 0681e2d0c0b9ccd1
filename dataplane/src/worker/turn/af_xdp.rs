//! A turn of a queue of an AF_XDP port.

use super::poll::count_taken;
use super::{Polled, Worker};
use crate::port::{AfXdpPort, Merged, Port};
use crate::wire::Offloads;
use crate::wire::net_header::HEADER_BYTES;

impl Worker {
    pub(super) fn poll_af_xdp(
        &mut self,
        port: &Port,
        xdp: &AfXdpPort,
        pair: u16,
        limit: usize,
    ) -> Polled {
        let queue = xdp.queue(pair);
        let Some(mut receiver) = queue.try_receiver() else {
            queue.rx.contended.add_owned(1);
            return Polled::Waiting(0);
        };
        let now = self.now();
        let mut burst = self.burst.begin();
        let forwarder = &self.forwarder;
        let takes = |frame: &[u8]| forwarder.takes(port, frame, now.tick);
        receiver.gather(limit, &mut burst, takes);
        let count = burst.len();
        if count == 0 {
            return Polled::Empty;
        }
        // The headers are the receiver's own.
        burst.take_snapshots(HEADER_BYTES, Offloads::ALL);
        let pairs = &self.handle.pairs;
        let taken = count - self.forwarder.forward(port, pair, &burst, pairs, now);
        count_taken(&burst, taken, &queue.rx);
        let merged = receiver.give_back(taken);
        if merged != Merged::default() {
            queue.rx.frames.add_owned(merged.frames);
            queue.rx.bytes.add_owned(merged.bytes);
            queue.merged.add_owned(merged.frames);
        }
        Polled::of(taken, count)
    }
}
