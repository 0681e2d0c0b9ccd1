//! A turn of a queue of an AF_XDP port.

use super::{Polled, Worker};
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
        // The headers are the receiver's own.
        let taken = self.forward_gathered(port, pair, xdp.sends(), &queue.rx);
        receiver.give_back(taken);
        Polled::of(taken, count)
    }
}
