//! What a worker is told: ports and queues that come and go, frames of our own, memory that was cut off.

use std::sync::Arc;

use ringway_bridge::PortId;
use tracing::debug;

use super::{Source, Worker};
use crate::burst::{Entry, Frame};
use crate::memory::{GuestSlice, breaks};
use crate::port::Port;
use crate::wake::{Request, Token};
use crate::wire::Offloads;
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};
use crate::worker::{Command, Inbox};

impl Worker {
    /// Executes the commands and requests that wait; false after [`Command::Stop`].
    #[cold]
    pub(super) fn take_commands(&mut self, inbox: &Inbox) -> bool {
        self.handle.waker.answer();
        while let Ok(command) = inbox.commands.try_recv() {
            match command {
                Command::AddPort {
                    port,
                    sources,
                    done,
                } => {
                    self.add_port(port, sources);
                    // The sender waits unless it gave up.
                    let _ = done.send(());
                }
                Command::RemovePort { id, done } => {
                    self.remove_port(id);
                    let _ = done.send(());
                }
                Command::Release { token, done } => {
                    let source = self.release(token);
                    let _ = done.send(source.map(Box::new));
                }
                Command::Adopt { source, done } => {
                    self.adopt(*source);
                    let _ = done.send(());
                }
                Command::Stop => return false,
            }
        }
        while let Ok(request) = inbox.requests.try_recv() {
            match request {
                Request::Activate(token) => self.activate(token),
                Request::Inject { from, frame } => self.inject(from, &frame),
            }
        }
        true
    }

    fn add_port(&mut self, port: Arc<Port>, sources: Vec<Token>) {
        let id = port.base().id;
        debug!(worker = self.handle.index, port = %port.base().name, "port added");
        self.forwarder.reset_destination(id);
        self.forwarder.members.add(id);
        self.forwarder.ports[id.index()] = Some(Arc::clone(&port));
        self.forwarder.owned[id.index()] = 0;
        for token in sources {
            self.adopt(Source::new(Arc::clone(&port), token));
        }
    }

    /// Polls a source from now on, beginning with a look at it.
    fn adopt(&mut self, source: Source) {
        let token = source.token;
        self.forwarder.owned[source.port.base().id.index()] |= 1 << token.pair();
        let free = self.sources.iter().position(Option::is_none);
        let index = free.unwrap_or(self.sources.len());
        if free.is_some() {
            self.sources[index] = Some(source);
        } else {
            self.sources.push(Some(source));
        }
        self.by_token.insert(token, index);
        self.activate(token);
        self.count_queues();
    }

    /// Polls a source no more. Its last burst is published, and frames that wait are in its ring or
    /// its reader.
    fn release(&mut self, token: Token) -> Option<Source> {
        let index = self.by_token.remove(&token)?;
        self.active.retain(|active| *active != index);
        let mut source = self.sources.get_mut(index)?.take()?;
        source.is_active = false;
        self.forwarder.owned[source.port.base().id.index()] &= !(1 << token.pair());
        self.count_queues();
        Some(source)
    }

    fn count_queues(&self) {
        let stats = &self.handle.stats;
        stats.queues.set(self.by_token.len() as u64);
        stats.active_queues.set(self.active.len() as u64);
    }

    fn remove_port(&mut self, id: PortId) {
        self.forwarder.members.remove(id);
        self.forwarder.ports[id.index()] = None;
        self.forwarder.owned[id.index()] = 0;
        self.handle.pairs.forget(id);
        for index in 0..self.sources.len() {
            let slot = &mut self.sources[index];
            if slot
                .as_ref()
                .is_some_and(|source| source.port.base().id == id)
                && let Some(source) = slot.take()
            {
                self.by_token.remove(&source.token);
                self.active.retain(|active| *active != index);
            }
        }
        self.count_queues();
    }

    /// Forwards a frame of our own making, in the name of a port.
    fn inject(&mut self, from: PortId, frame: &[u8]) {
        let Some(port) = self.forwarder.ports[from.index()].clone() else {
            return;
        };
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend_from_slice(frame);
        let frame_with_header = Frame::direct(GuestSlice::of(&mut bytes), Entry::single(0));
        let now = self.now();
        let mut burst = self.burst.begin();
        burst.extend(1, || Some(frame_with_header));
        burst.take_snapshots(HEADER_BYTES, Offloads::NONE);
        // It has no ring to wait in.
        let patience_ns = std::mem::replace(&mut self.forwarder.patience_ns, 0);
        self.forwarder
            .forward(&port, 0, &burst, &self.handle.pairs, now);
        self.forwarder.patience_ns = patience_ns;
        let counters = &port.base().injected;
        counters.frames.add(1);
        counters.bytes.add(frame.len() as u64);
    }

    /// Stops the queues whose memory was cut off; those in other hands at the moment are tried
    /// again in the next turn.
    #[cold]
    pub(super) fn stop_broken(&mut self) {
        let breaks = breaks();
        let mut all = true;
        for port in self.forwarder.ports.iter().flatten() {
            if let Port::VhostUser(guest) = &**port {
                all &= guest.stop_broken_queues();
            }
        }
        if all {
            self.seen_breaks = breaks;
        }
    }
}
