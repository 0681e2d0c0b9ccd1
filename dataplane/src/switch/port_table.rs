//! Ports and workers, and who polls what: everything that changes it goes through here, one change
//! at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use crossbeam_channel as channel;
use ringway_api::{IfName, PortConfig, PortName, PortState, SwitchError};
use ringway_bridge::PortId;
use tracing::warn;

use super::capture::Captures;
use super::load::LoadMeter;
use crate::burst_lock::lock;
use crate::capture::Tap;
use crate::port::{Port, index_of};
use crate::topology::{Action, Topology, diff};
use crate::wake::{Binding, Token, Waker};
use crate::worker::{Command, WorkerThread};

/// What changes when ports come and go.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) ports: BTreeMap<PortName, PortEntry>,
    pub(super) topology: Topology,
    /// Counts additions, so that tokens of a slot's successive ports differ.
    generation: u32,
    /// What the queues took lately.
    pub(super) load: LoadMeter,
    /// Workers tell VLANs apart.
    pub(super) has_vlans: bool,
    /// Who captures frames.
    pub(super) captures: Captures,
}

/// A port as the switch keeps it.
#[derive(Debug)]
pub(super) struct PortEntry {
    pub(super) config: PortConfig,
    pub(super) port: Arc<Port>,
    pub(super) generation: u32,
}

/// The state, and the workers that carry it out.
#[derive(Debug)]
pub(super) struct PortTable {
    state: Mutex<State>,
    pub(super) workers: Vec<WorkerThread>,
}

impl State {
    /// # Errors
    /// There is no such port.
    pub(super) fn find(&self, name: &PortName) -> Result<&PortEntry, SwitchError> {
        let missing = || SwitchError::NoSuchPort { name: name.clone() };
        self.ports.get(name).ok_or_else(missing)
    }

    /// The names of all ports.
    pub(super) fn names(&self) -> BTreeMap<PortId, &PortName> {
        self.ports
            .iter()
            .map(|(name, entry)| (entry.port.base().id, name))
            .collect()
    }

    /// The names of all ports, with the generations of their slots.
    pub(super) fn generations(&self) -> BTreeMap<PortId, (&PortName, u32)> {
        let ports = self.ports.iter();
        ports
            .map(|(name, entry)| (entry.port.base().id, (name, entry.generation)))
            .collect()
    }

    /// The first slot that no port has, one that waits for its interface included.
    pub(super) fn free_id(&self) -> Option<PortId> {
        let taken: BTreeSet<_> = self.ports.values().map(|e| e.port.base().id).collect();
        (0..u16::MAX)
            .map_while(PortId::new)
            .find(|id| !taken.contains(id))
    }

    /// Notes a port that is to be added to the topology.
    pub(super) fn insert(&mut self, name: PortName, config: PortConfig, port: Arc<Port>) {
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let entry = PortEntry {
            config,
            port,
            generation,
        };
        self.ports.insert(name, entry);
    }

    /// Has a port, in no worker at the moment, be `port` from now on.
    pub(super) fn replace(&mut self, name: &PortName, port: Arc<Port>) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(entry) = self.ports.get_mut(name) {
            entry.port = port;
            entry.generation = self.generation;
        }
    }

    /// The port whose interface has this name.
    pub(super) fn holder_of(&self, ifname: &IfName) -> Option<&PortName> {
        let ifname = ifname.as_str();
        let index = index_of(ifname);
        let mut ports = self.ports.iter();
        let holder = ports.find(|(_, entry)| entry.port.has_interface(ifname, index));
        holder.map(|(name, _)| name)
    }

    /// Forgets stations behind interfaces that are down: what was on its way when they went down was
    /// learned from afterwards.
    pub(super) fn forget_behind_down_interfaces(&self) {
        let ports = self.ports.values().map(|entry| &entry.port);
        for port in ports.filter(|port| port.base().has_stations()) {
            // A guest's port forgets by itself, when its last receive ring stops.
            let status = port.link().map(|link| link.status().state);
            if status == Some(PortState::Down) {
                port.base().forget_stations();
            }
        }
    }

    pub(super) fn entry_of(&self, id: PortId) -> Option<&PortEntry> {
        self.ports.values().find(|entry| entry.port.base().id == id)
    }
}

impl PortEntry {
    fn token(&self, pair: u16) -> Token {
        Token::new(self.port.base().id, pair, self.generation)
    }
}

/// # Errors
/// A port of so many `pairs` has no such one.
pub(super) fn check_pair(port: &PortName, pair: u16, pairs: u16) -> Result<(), SwitchError> {
    if pair < pairs {
        Ok(())
    } else {
        let port = port.clone();
        Err(SwitchError::NoSuchQueue { port, pair, pairs })
    }
}

impl PortTable {
    /// Without ports.
    pub(super) fn new(workers: Vec<WorkerThread>) -> Self {
        Self {
            state: Mutex::default(),
            workers,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The same for housekeeping, which must not wait: `None` while ports are being changed.
    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Number of workers.
    pub(super) fn worker_count(&self) -> u16 {
        u16::try_from(self.workers.len()).unwrap_or(u16::MAX)
    }

    /// # Errors
    /// There is no such worker.
    pub(super) fn check_worker(&self, worker: u16) -> Result<(), SwitchError> {
        let workers = self.worker_count();
        if worker < workers {
            Ok(())
        } else {
            Err(SwitchError::NoSuchWorker { worker, workers })
        }
    }

    /// Carries out the difference between the running topology and `desired`; `state` has the
    /// ports of both.
    ///
    /// # Errors
    /// A worker can't wait for a queue; what came before in the difference is done, and the rest
    /// not.
    pub(super) fn change_topology(&self, state: &mut State, desired: &Topology) -> io::Result<()> {
        for action in diff(&state.topology, desired) {
            match &action {
                Action::Remove(id) => {
                    self.tell_all(|_, done| Command::RemovePort { id: *id, done });
                }
                Action::Add(id, placement) => {
                    if let Some(entry) = state.entry_of(*id) {
                        self.add_to_workers(entry, placement)?;
                    }
                }
                Action::Move { id, pair, from, to } => {
                    if let Some(entry) = state.entry_of(*id) {
                        self.move_pair(entry, *pair, *from, *to)?;
                    }
                }
            }
            state.topology.apply(&action);
        }
        Ok(())
    }

    fn add_to_workers(&self, entry: &PortEntry, placement: &[u16]) -> io::Result<()> {
        let pairs = || (0..).zip(placement);
        for (pair, worker) in pairs() {
            if let Port::VhostUser(guest) = &*entry.port {
                guest.bind(pair, self.binding(entry, pair, *worker))?;
            }
        }
        self.tell_all(|worker, done| {
            let own = pairs().filter(|(_, owner)| **owner == worker);
            Command::AddPort {
                port: Arc::clone(&entry.port),
                sources: own.map(|(pair, _)| entry.token(pair)).collect(),
                done,
            }
        });
        Ok(())
    }

    fn waker(&self, worker: u16) -> &Arc<Waker> {
        &self.workers[usize::from(worker)].handle.waker
    }

    fn binding(&self, entry: &PortEntry, pair: u16, worker: u16) -> Binding {
        Binding {
            waker: Arc::clone(self.waker(worker)),
            token: entry.token(pair),
        }
    }

    /// Hands a pair over: its events go to the new worker, the old one lets go of it between two
    /// turns, and the new one looks at it. What happens meanwhile is found by that look.
    fn move_pair(&self, entry: &PortEntry, pair: u16, from: u16, to: u16) -> io::Result<()> {
        let binding = self.binding(entry, pair, to);
        let [from, to] = [from, to].map(|worker| &self.workers[usize::from(worker)].handle);
        match &*entry.port {
            Port::VhostUser(guest) => guest.bind(pair, binding)?,
            port @ (Port::Tap(_) | Port::AfXdp(_)) => {
                if let Some(fd) = port.fd(pair) {
                    binding.watch(fd)?;
                    from.waker.unwatch(fd);
                }
            }
        }
        let (port, token) = (Arc::clone(&entry.port), entry.token(pair));
        let (done, answered) = channel::bounded(1);
        from.send(Command::Release { token, done });
        // Fails only if the worker ended, and then nobody polls anything.
        let _ = answered.recv();
        let (done, answered) = channel::bounded(1);
        to.send(Command::Adopt { port, token, done });
        let _ = answered.recv();
        Ok(())
    }

    /// Sends each worker a command and waits until all have executed it.
    pub(super) fn tell_all(&self, command: impl Fn(u16, channel::Sender<()>) -> Command) {
        let (done, all_done) = channel::bounded(self.workers.len());
        for worker in &self.workers {
            worker
                .handle
                .send(command(worker.handle.index, done.clone()));
        }
        drop(done);
        // Ends when every worker has answered and so dropped its sender.
        for () in &all_done {}
    }

    /// Has a port's queues that are fds of ours wake their workers.
    pub(super) fn watch(&self, state: &State, port: &Port) -> io::Result<()> {
        let id = port.base().id;
        let Some(entry) = state.entry_of(id) else {
            return Ok(());
        };
        for (pair, worker) in (0..).zip(state.topology.placement(id)) {
            if let Some(fd) = port.fd(pair) {
                self.waker(*worker).watch(fd, entry.token(pair))?;
            }
        }
        Ok(())
    }

    /// Has these queues wake nobody.
    pub(super) fn unwatch(&self, state: &State, port: &Port) {
        for (pair, worker) in (0..).zip(state.topology.placement(port.base().id)) {
            if let Some(fd) = port.fd(pair) {
                self.waker(*worker).unwatch(fd);
            }
        }
    }

    /// Pins a pair to a worker, which polls it when this returns, or lets the switch choose again.
    /// Tells whether it was pinned before.
    ///
    /// # Errors
    /// No such port, pair or worker, or the worker can't wait for the queue; nothing changed.
    pub(super) fn set_pin(
        &self,
        name: &PortName,
        pair: u16,
        worker: Option<u16>,
    ) -> Result<bool, SwitchError> {
        let mut state = self.lock();
        let entry = state.find(name)?;
        check_pair(name, pair, entry.port.queue_pairs())?;
        if let Some(worker) = worker {
            self.check_worker(worker)?;
            let id = entry.port.base().id;
            let desired = state.topology.with_pair_at(id, pair, worker);
            self.change_topology(&mut state, &desired)
                .map_err(|source| SwitchError::System {
                    what: format!("queue {pair} of port {name}"),
                    source,
                })?;
        }
        let Some(entry) = state.ports.get_mut(name) else {
            return Ok(false);
        };
        let pins = entry.config.pins_mut();
        let old = match worker {
            Some(worker) => pins.insert(pair, worker),
            None => pins.remove(&pair),
        };
        Ok(old.is_some())
    }

    /// Gives each worker its tap, and returns when all have them.
    pub(super) fn add_taps(&self, taps: Vec<Tap>) {
        let (done, all_done) = channel::bounded(self.workers.len());
        for (worker, tap) in self.workers.iter().zip(taps) {
            let (tap, done) = (Box::new(tap), done.clone());
            worker.handle.send(Command::AddTap { tap, done });
        }
        drop(done);
        for () in &all_done {}
    }

    /// Takes a capture's taps from the workers.
    pub(super) fn remove_taps(&self, id: u64) {
        self.tell_all(|_, done| Command::RemoveTap { id, done });
    }

    /// Has the workers forget what they counted of a port by pairs, which has left them for good.
    pub(super) fn forget_pairs(&self, id: PortId) {
        self.tell_all(|_, done| Command::ForgetPairs { id, done });
    }

    /// Takes a port out of all workers. Nothing of this can be refused.
    pub(super) fn remove_from_workers(&self, state: &mut State, id: PortId) {
        let desired = state.topology.without_port(id);
        if let Err(error) = self.change_topology(state, &desired) {
            warn!("removing port {id:?} from the workers: {error}");
        }
    }
}
