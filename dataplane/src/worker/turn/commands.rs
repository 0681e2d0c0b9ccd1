//! What a worker is told: ports and queues that come and go, frames of our own, memory that was cut
//! off.

use std::sync::Arc;

use ringway_bridge::PortId;
use tracing::debug;

use super::{Path, Source, Worker};
use crate::call;
use crate::capture::Taps;
use crate::memory::{GuestSlice, breaks};
use crate::port::Port;
use crate::wake::{Token, WakeRequest};
use crate::wire::Offloads;
use crate::wire::net_header::{HEADER_BYTES, HEADER_LEN};
use crate::worker::forward::{Sender, Service};
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
                Command::ForgetPairs { id, done } => {
                    self.handle.pairs.forget(id);
                    if let Some(taps) = &mut self.path.forwarder.taps {
                        taps.forget(id);
                    }
                    let _ = done.send(());
                }
                Command::AddTap { tap, done } => {
                    let taps = &mut self.path.forwarder.taps;
                    taps.get_or_insert_with(|| Box::new(Taps::new())).add(*tap);
                    let _ = done.send(());
                }
                Command::RemoveTap { id, done } => {
                    let taps = &mut self.path.forwarder.taps;
                    taps.take_if(|taps| taps.remove(id));
                    let _ = done.send(());
                }
                Command::SetVlans { vlans, done } => {
                    self.path.forwarder.set_vlans(vlans);
                    let _ = done.send(());
                }
                Command::Release { token, done } => {
                    self.release(token);
                    let _ = done.send(());
                }
                Command::Adopt { port, token, done } => {
                    self.adopt(port, token);
                    let _ = done.send(());
                }
                Command::Stop => return false,
            }
        }
        while let Ok(request) = inbox.requests.try_recv() {
            match request {
                WakeRequest::Activate(token) => self.activate(token),
                WakeRequest::Inject { from, frame } => self.inject(from, &frame),
                WakeRequest::Call(call) => call::owe(&call),
            }
        }
        true
    }

    fn add_port(&mut self, port: Arc<Port>, sources: Vec<Token>) {
        let id = port.base().id;
        debug!(worker = self.handle.index, port = %port.base().name, "port added");
        let forwarder = &mut self.path.forwarder;
        forwarder.forget(id);
        forwarder.members.add(id);
        forwarder.ports[id.index()] = Some(Arc::clone(&port));
        forwarder.owned[id.index()] = 0;
        for token in sources {
            self.adopt(Arc::clone(&port), token);
        }
    }

    /// Polls a queue from now on, beginning with a look at it.
    fn adopt(&mut self, port: Arc<Port>, token: Token) {
        self.path.forwarder.owned[port.base().id.index()] |= 1 << token.pair();
        let source = Some(Source {
            id: port.base().id,
            has_calls: !matches!(*port, Port::VhostUser(_)),
            port,
            token,
            is_active: false,
            service: Service::default(),
        });
        let free = self.sources.iter().position(Option::is_none);
        let index = free.unwrap_or(self.sources.len());
        if free.is_some() {
            self.sources[index] = source;
        } else {
            self.sources.push(source);
        }
        self.by_token.insert(token, index);
        self.activate(token);
        self.count_queues();
    }

    /// Polls a queue no more. Its last burst is published; frames that wait stay with it.
    fn release(&mut self, token: Token) {
        let Some(index) = self.by_token.remove(&token) else {
            return;
        };
        self.schedule.remove(index);
        if let Some(source) = self.sources[index].take() {
            let id = source.port.base().id;
            self.path.forwarder.owned[id.index()] &= !(1 << token.pair());
        }
        self.count_queues();
    }

    fn count_queues(&self) {
        self.handle.stats.queues.set(self.by_token.len() as u64);
        self.count_active();
    }

    fn remove_port(&mut self, id: PortId) {
        let of_port = |source: &&Source| source.port.base().id == id;
        let sources = self.sources.iter().flatten().filter(of_port);
        let tokens: Vec<_> = sources.map(|source| source.token).collect();
        for token in tokens {
            self.release(token);
        }
        let forwarder = &mut self.path.forwarder;
        forwarder.members.remove(id);
        forwarder.ports[id.index()] = None;
        forwarder.forget(id);
    }

    /// Forwards a frame of our own making, in the name of a port, and believes it: a front-end
    /// announces where its guest is now.
    fn inject(&mut self, from: PortId, frame: &[u8]) {
        let Some(port) = self.path.forwarder.ports[from.index()].clone() else {
            return;
        };
        let mut bytes = vec![0; HEADER_LEN];
        bytes.extend_from_slice(frame);
        let now = self.now();
        let Path {
            burst, forwarder, ..
        } = &mut self.path;
        forwarder.announce(from, frame, now.tick);
        let mut burst = burst.begin();
        burst.push_whole(GuestSlice::of(&mut bytes));
        burst.take_snapshots(HEADER_BYTES, Offloads::NONE);
        // It has no ring to wait in.
        let mut service = Service::NEVER_WAITS;
        let sender = Sender {
            port: &port,
            pair: 0,
            service: &mut service,
        };
        forwarder.forward(sender, &mut burst, &self.handle.pairs, now);
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
        for port in self.path.forwarder.ports.iter().flatten() {
            if let Port::VhostUser(guest) = &**port {
                all &= guest.stop_broken_queues();
            }
        }
        if all {
            self.seen_breaks = breaks;
        }
    }
}
