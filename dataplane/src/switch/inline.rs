//! A switch whose worker has no thread.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel as channel;
use ringway_api::{AfXdpConfig, IdleConfig, PortName, SwitchError};
use ringway_bridge::{Bridge, BridgeConfig, PortId, Tick};

use crate::events::EventHub;
use crate::port::{AfXdpPort, LinkBase, Port, PortBase, VhostPort};
use crate::socket_file::SocketFile;
use crate::vhost_user::{Endpoint, SessionThread};
use crate::wake::{Binding, Token};
use crate::worker::{Command, Inbox, Worker, WorkerHandle};

/// A switch of vhost-user and AF_XDP ports whose worker runs in the caller's thread, one turn at a
/// time, and never sleeps: for benches, instruction counts and tests that want no scheduler in
/// between. Sessions have their thread as ever; it is idle once the rings are started.
pub struct InlineSwitch {
    worker: Worker,
    bridge: Arc<Bridge>,
    handle: Arc<WorkerHandle>,
    inbox: Inbox,
    // Ends, and stops all rings, before the worker's tables go.
    sessions: SessionThread<VhostPort>,
    guests: Vec<Arc<VhostPort>>,
    ports: u16,
}

impl std::fmt::Debug for InlineSwitch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("InlineSwitch")
            .field("guests", &self.guests)
            .finish_non_exhaustive()
    }
}

impl InlineSwitch {
    /// A switch without ports, whose forwarding database holds `fdb_capacity` addresses.
    ///
    /// # Errors
    /// No epoll instance, eventfd or thread can be made.
    pub fn new(fdb_capacity: usize) -> Result<Self, SwitchError> {
        let bridge = Arc::new(Bridge::new(BridgeConfig {
            fdb_capacity,
            ageing_ticks: u32::MAX,
            move_hold_ticks: Tick::PER_SECOND,
            seed: 0x5eed,
            group_fwd_mask: BridgeConfig::BPDUS,
        }));
        let (handle, inbox) = WorkerHandle::new(0, Instant::now())?;
        let sessions = SessionThread::start().map_err(|source| SwitchError::System {
            what: "session thread".into(),
            source,
        })?;
        // Nobody waits for events here, so no queue may leave the active list; and how much time
        // passes from one turn to the next says nothing of guests.
        let idle = IdleConfig {
            spin: Duration::MAX,
            pause: Duration::ZERO,
            backpressure: Duration::from_secs(10),
        };
        let worker = Worker::new(Arc::clone(&handle), Arc::clone(&bridge), idle);
        Ok(Self {
            worker,
            bridge,
            handle,
            inbox,
            sessions,
            guests: Vec::new(),
            ports: 0,
        })
    }

    /// Adds a port of one queue pair that listens at `socket`. While all ports have a guest, the
    /// worker polls all of its queues and has no events to look for.
    ///
    /// # Errors
    /// The path can't be used, or there are [`ringway_bridge::MAX_PORTS`] ports.
    pub fn add_port(&mut self, name: PortName, socket: &Path) -> Result<(), SwitchError> {
        let id = self.next_id()?;
        let endpoint = Endpoint::listen(socket, &SocketFile::default())?;
        let base = PortBase::new(name, id, Arc::clone(&self.bridge), &EventHub::default());
        let guest = Arc::new(VhostPort::new(base, 1, None));
        for pair in 0..guest.pairs() {
            let (waker, token) = (Arc::clone(&self.handle.waker), Token::new(id, pair, 0));
            let bound = guest.bind(pair, Binding { waker, token });
            bound.map_err(|source| SwitchError::System {
                what: "kick".into(),
                source,
            })?;
        }
        self.add_to_worker(Port::VhostUser(Arc::clone(&guest)));
        self.guests.push(Arc::clone(&guest));
        self.sessions
            .add(id, endpoint, guest)
            .map_err(|source| SwitchError::System {
                what: "session".into(),
                source,
            })
    }

    /// Adds a port of an interface's queues.
    ///
    /// # Errors
    /// The interface can't be used that way, or there are [`ringway_bridge::MAX_PORTS`] ports.
    pub fn add_af_xdp_port(
        &mut self,
        name: PortName,
        config: &AfXdpConfig,
    ) -> Result<(), SwitchError> {
        let (id, bridge) = (self.next_id()?, Arc::clone(&self.bridge));
        let base = PortBase::new(name, id, bridge, &EventHub::default());
        let port = AfXdpPort::open(LinkBase::new(base, &config.ifname), config)?;
        self.add_to_worker(Port::AfXdp(Box::new(port)));
        Ok(())
    }

    fn next_id(&self) -> Result<PortId, SwitchError> {
        PortId::new(self.ports).ok_or(SwitchError::TooManyPorts)
    }

    fn add_to_worker(&mut self, port: Port) {
        let id = port.base().id;
        let pairs = 0..port.queue_pairs();
        let (done, _) = channel::bounded(1);
        self.handle.send(Command::AddPort {
            port: Arc::new(port),
            sources: pairs.map(|pair| Token::new(id, pair, 0)).collect(),
            done,
        });
        self.turn();
        self.ports += 1;
    }

    /// Polls each active queue once.
    #[inline]
    pub fn turn(&mut self) {
        self.worker.step(&self.inbox);
    }

    /// Frames taken from all queues so far.
    pub fn frames(&self) -> u64 {
        self.handle.stats.frames.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringway_guest::{EventFd, Guest};
    use vhost::vhost_user::message::FrontendReq;

    /// The thread of all sessions would be held up by a call that is slow.
    #[test]
    fn a_worker_makes_the_call_that_a_new_call_fd_is_owed() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(16).unwrap();
        let path = folder.path().join("a");
        switch.add_port("a".parse().unwrap(), &path).unwrap();
        let mut guest = Guest::builder().connect(&path).unwrap();
        let call = EventFd::new().unwrap();
        let frontend = guest.frontend();
        frontend
            .set_vring_fd(FrontendReq::SET_VRING_CALL, 0, Some(&call))
            .unwrap();
        // The answer to a request says that those before it are carried out.
        frontend.queue_pairs().unwrap();
        assert_eq!(call.take().unwrap(), 0);
        switch.turn();
        assert_eq!(call.take().unwrap(), 1);
    }

    #[test]
    fn a_ring_in_other_hands_is_counted_and_its_frames_wait() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut switch = InlineSwitch::new(16).unwrap();
        let mut guest = |name: &str| {
            let path = folder.path().join(name);
            switch.add_port(name.parse().unwrap(), &path).unwrap();
            Guest::builder().connect(&path).unwrap()
        };
        let (mut a, mut b) = (guest("a"), guest("b"));
        for guest in [&mut a, &mut b] {
            // The answer to a request says that those before it are carried out.
            guest.frontend().queue_pairs().unwrap();
        }
        let mut frame = [0x52; 60];
        frame[..6].fill(0xff);
        a.send_frame(&frame).unwrap();
        let of_b = Arc::clone(&switch.guests[1]);
        let ring = of_b.receive_queue(0, u64::MAX).unwrap();
        let other_hands = ring.try_lock().unwrap();
        switch.turn();
        let contended = || {
            (
                switch.handle.stats.contended.get(),
                ring.counters.contended.get(),
            )
        };
        assert_eq!(contended(), (1, 1));
        assert_eq!((switch.frames(), b.try_recv(0).unwrap()), (0, None));
        drop(other_hands);
        switch.turn();
        assert_eq!(b.try_recv(0).unwrap().unwrap().frame, frame);
        assert_eq!(switch.frames(), 1);
        assert_eq!(ring.counters.contended.get(), 1);
    }
}
