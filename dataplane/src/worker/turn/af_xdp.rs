//! A turn of a queue of an AF_XDP port.

use super::{Polled, Worker};
use crate::port::{AfXdpPort, Merged, Port};
use crate::wire::Offloads;

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
        self.burst.clear();
        let now = self.now().tick;
        let forwarder = &self.forwarder;
        let takes = |frame: &[u8]| forwarder.takes(port, frame, now);
        receiver.gather(limit, &mut self.burst, takes);
        let count = self.burst.len();
        if count == 0 {
            return Polled::Empty;
        }
        // The headers are the receiver's own.
        let taken = self.forward_gathered(port, pair, Offloads::ALL, &queue.rx);
        let merged = receiver.give_back(taken);
        if merged != Merged::default() {
            queue.rx.frames.add_owned(merged.frames);
            queue.rx.bytes.add_owned(merged.bytes);
            queue.merged.add_owned(merged.frames);
        }
        Polled::of(taken, count)
    }
}
