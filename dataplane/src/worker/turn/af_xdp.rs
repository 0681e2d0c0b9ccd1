//! A turn of a queue of an AF_XDP port.

use super::{Polled, Worker};
use crate::net_header::HEADER_BYTES;
use crate::offload::Offloads;
use crate::port::{AfXdpPort, Port};

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
        receiver.gather(limit, &mut self.burst);
        let count = self.burst.len();
        if count == 0 {
            return Polled::Empty;
        }
        // The headers are the receiver's own: they ask for nothing.
        self.burst.take_snapshots(HEADER_BYTES, Offloads::NONE);
        let now = self.now();
        let pairs = &self.handle.pairs;
        let given_back = self
            .forwarder
            .forward(port, pair, &mut self.burst, pairs, now);
        let taken = count - given_back;
        let bytes = (0..taken).map(|i| u64::from(self.burst.l2_bytes(i))).sum();
        receiver.give_back(taken);
        queue.rx.frames.add_owned(taken as u64);
        queue.rx.bytes.add_owned(bytes);
        if given_back == 0 && taken > 0 {
            Polled::Frames(taken)
        } else {
            Polled::Waiting(taken)
        }
    }
}
