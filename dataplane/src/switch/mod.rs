//! The handle by which the control plane runs the dataplane.

mod config;
mod error;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel;
use ringway_bridge::{Bridge, BridgeConfig, DropCounts, MacAddr, PortId, Tick};

pub use config::{
    AfXdpConfig, IdleConfig, MAX_PORT_NAME, MAX_QUEUE_PAIRS, PortConfig, PortKind, PortName,
    PortNameError, QueuePairs, SocketSpec, SwitchConfig, UmemFrames, XdpMode,
};
pub use error::SwitchError;

use crate::features;
use crate::housekeeping::Housekeeping;
use crate::info::{FdbEntryInfo, PairCounters, PortDetail, PortInfo, WorkerInfo};
use crate::port::{AfXdpPort, Binding, Port, PortBase, TapPort, VhostPort};
use crate::topology::{Action, Topology, diff};
use crate::vhost_user::{Endpoint, SessionThread};
use crate::worker::{Command, Token, WorkerThread};

/// A running switch. All methods may be called from any thread; those that change something run
/// one at a time, and either take full effect or none. Dropping it removes all ports and ends all
/// threads.
pub struct Switch {
    state: Mutex<State>,
    bridge: Arc<Bridge>,
    // Dropped in this order: sessions before the workers that they talk to.
    sessions: SessionThread<VhostPort>,
    workers: Vec<WorkerThread>,
    epoch: Instant,
    #[expect(
        dead_code,
        reason = "held for its thread, which ends when it is dropped"
    )]
    housekeeping: Housekeeping,
}

impl std::fmt::Debug for Switch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Switch")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// What changes when ports come and go.
#[derive(Debug, Default)]
struct State {
    ports: BTreeMap<PortName, Entry>,
    topology: Topology,
    /// Counts additions, so that tokens of a slot's successive ports differ.
    generation: u32,
}

#[derive(Debug)]
struct Entry {
    config: PortConfig,
    port: Arc<Port>,
}

impl Switch {
    /// Starts the workers and the vhost-user session thread.
    ///
    /// # Errors
    /// A CPU that can't be used, or threads or epoll instances that can't be made.
    pub fn start(config: SwitchConfig) -> Result<Self, SwitchError> {
        check_cpus(&config.worker_cpus)?;
        let epoch = Instant::now();
        let bridge = Arc::new(Bridge::new(BridgeConfig {
            fdb_capacity: config.fdb_capacity,
            ageing_ticks: ticks(config.fdb_ageing),
            seed: seed(),
        }));
        let start = |(index, cpu): (u16, &usize)| {
            WorkerThread::start(index, *cpu, Arc::clone(&bridge), config.idle, epoch)
        };
        let workers = (0..)
            .zip(&config.worker_cpus)
            .map(start)
            .collect::<Result<_, _>>()?;
        let system = |what: &str| {
            let what = what.to_owned();
            |source| SwitchError::System { what, source }
        };
        Ok(Self {
            state: Mutex::default(),
            sessions: SessionThread::start().map_err(system("vhost-user session thread"))?,
            workers,
            epoch,
            housekeeping: Housekeeping::start(Arc::clone(&bridge), epoch)
                .map_err(system("housekeeping thread"))?,
            bridge,
        })
    }

    /// Adds a port; it forwards as soon as its guest or interface is ready.
    ///
    /// # Errors
    /// A name that is taken, a socket path or interface that can't be used.
    pub fn add_port(&self, name: PortName, config: PortConfig) -> Result<PortInfo, SwitchError> {
        let mut state = self.lock();
        if state.ports.contains_key(&name) {
            return Err(SwitchError::PortExists { name });
        }
        let id = state.topology.free_id().ok_or(SwitchError::TooManyPorts)?;
        let base = PortBase::new(name.clone(), id);
        // What can be refused comes first; nothing of it outlives an error.
        let (port, endpoint) = open_port(base, &config)?;
        let port = Arc::new(port);
        state.generation = state.generation.wrapping_add(1);
        let workers = u16::try_from(self.workers.len()).unwrap_or(u16::MAX);
        let desired = state.topology.with_port(id, port.queue_pairs(), workers);
        self.bridge.fdb().set_limit(id, config.fdb_limit);
        state.ports.insert(
            name.clone(),
            Entry {
                config,
                port: Arc::clone(&port),
            },
        );
        self.change_topology(&mut state, desired);
        let started = match (&*port, endpoint) {
            (Port::VhostUser(guest), Some(endpoint)) => {
                self.sessions.add(id, endpoint, Arc::clone(guest))
            }
            (Port::Tap(_) | Port::AfXdp(_), _) => self.watch(&state, &port),
            (Port::VhostUser(_), None) => Ok(()),
        };
        if let Err(source) = started {
            self.take_out(&mut state, &name);
            return Err(SwitchError::System {
                what: format!("port {name}"),
                source,
            });
        }
        self.port_info(&state, &name)
    }

    /// Removes a port: when this returns, its socket, interface, memory and fds are gone.
    ///
    /// # Errors
    /// There is no such port.
    pub fn remove_port(&self, name: &PortName) -> Result<(), SwitchError> {
        let mut state = self.lock();
        find(&state, name)?;
        self.take_out(&mut state, name);
        Ok(())
    }

    /// All ports, by name.
    pub fn ports(&self) -> Vec<PortInfo> {
        let state = self.lock();
        state
            .ports
            .keys()
            .filter_map(|name| self.port_info(&state, name).ok())
            .collect()
    }

    /// One port with its queues.
    ///
    /// # Errors
    /// There is no such port.
    pub fn port(&self, name: &PortName) -> Result<PortDetail, SwitchError> {
        let state = self.lock();
        let info = self.port_info(&state, name)?;
        let port = &find(&state, name)?.port;
        let placement = state.topology.placement(port.base().id);
        let queues = port.queues(|pair| placement.get(usize::from(pair)).copied().unwrap_or(0));
        Ok(match &**port {
            Port::VhostUser(guest) => {
                let (features, protocol_features) = guest.features();
                let (mapped_bytes, memory_regions) = guest.mapped();
                PortDetail {
                    info,
                    queues,
                    features: features::virtio_names(features),
                    protocol_features: features::protocol_names(protocol_features),
                    connections: guest.connections(),
                    mapped_bytes,
                    memory_regions,
                    last_error: guest.last_error(),
                    mtu: guest.mtu(),
                    af_xdp: None,
                }
            }
            Port::Tap(tap) => PortDetail {
                info,
                queues,
                features: features::TAP_OFFLOADS.to_vec(),
                protocol_features: Vec::new(),
                connections: 0,
                mapped_bytes: 0,
                memory_regions: 0,
                last_error: None,
                mtu: tap.mtu(),
                af_xdp: None,
            },
            Port::AfXdp(xdp) => PortDetail {
                info,
                queues,
                features: Vec::new(),
                protocol_features: Vec::new(),
                connections: 0,
                mapped_bytes: 0,
                memory_regions: 0,
                last_error: None,
                mtu: Some(xdp.mtu()),
                af_xdp: Some(xdp.info()),
            },
        })
    }

    /// The forwarding database, by address.
    pub fn fdb(&self) -> Vec<FdbEntryInfo> {
        let state = self.lock();
        let names = names(&state);
        let now = now_tick(self.epoch);
        let mut entries = Vec::new();
        self.bridge
            .fdb()
            .for_each(|mac, port, is_static, last_seen| {
                if let Some(name) = names.get(&port) {
                    let age_ticks = if is_static { 0 } else { now.since(last_seen) };
                    entries.push(FdbEntryInfo {
                        mac,
                        port: (*name).clone(),
                        is_static,
                        age: Duration::from_secs(1) * age_ticks / Tick::PER_SECOND,
                    });
                }
            });
        entries.sort_by_key(|entry| entry.mac);
        entries
    }

    /// Adds a static entry, or makes a learned one static.
    ///
    /// # Errors
    /// No such port, a group address, or the database is full.
    pub fn fdb_add(&self, mac: MacAddr, port: &PortName) -> Result<(), SwitchError> {
        let state = self.lock();
        let id = find(&state, port)?.port.base().id;
        let added = self.bridge.fdb().add_static(mac, id);
        added.map_err(|error| SwitchError::FdbRefused {
            mac,
            reason: error.to_string(),
        })
    }

    /// Deletes an entry, static or learned.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn fdb_del(&self, mac: MacAddr) -> Result<(), SwitchError> {
        let removed = self.bridge.fdb().remove(mac);
        if removed {
            Ok(())
        } else {
            Err(SwitchError::NoSuchFdbEntry { mac })
        }
    }

    /// Forgets the learned entries of all ports or one, and returns how many.
    ///
    /// # Errors
    /// There is no such port.
    pub fn fdb_flush(&self, port: Option<&PortName>) -> Result<usize, SwitchError> {
        let state = self.lock();
        let id = port.map(|name| find(&state, name).map(|entry| entry.port.base().id));
        Ok(self.bridge.fdb().flush(id.transpose()?))
    }

    /// All workers, by index.
    pub fn workers(&self) -> Vec<WorkerInfo> {
        self.workers
            .iter()
            .map(|worker| worker.info(self.epoch))
            .collect()
    }

    /// Counters of all pairs of ports that exchanged frames since both were added.
    pub fn pairs(&self) -> Vec<PairCounters> {
        let state = self.lock();
        let names = names(&state);
        let mut sums: BTreeMap<(PortId, PortId), PairCounters> = BTreeMap::new();
        for pair in self
            .workers
            .iter()
            .flat_map(|worker| worker.handle.pairs.snapshot())
        {
            let (Some(from), Some(to)) = (names.get(&pair.from), names.get(&pair.to)) else {
                continue;
            };
            let sum = sums
                .entry((pair.from, pair.to))
                .or_insert_with(|| PairCounters {
                    from: (*from).clone(),
                    to: (*to).clone(),
                    frames: 0,
                    bytes: 0,
                    drops: DropCounts::default(),
                });
            sum.frames += pair.frames;
            sum.bytes += pair.bytes;
            for (reason, count) in pair.drops.nonzero() {
                sum.drops[reason] += count;
            }
        }
        sums.into_values().collect()
    }

    /// Removes all ports and ends all threads.
    pub fn shutdown(self) {
        drop(self);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held would have left each entry whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out the difference between the running topology and `desired`; `state` has the
    /// ports of both.
    fn change_topology(&self, state: &mut State, desired: Topology) {
        for action in diff(&state.topology, &desired) {
            match action {
                Action::Remove(id) => {
                    self.tell_all(|_, done| Command::RemovePort { id, done });
                }
                Action::Add(id, placement) => {
                    let found = state
                        .ports
                        .values()
                        .find(|entry| entry.port.base().id == id);
                    if let Some(Entry { port, .. }) = found {
                        self.add_to_workers(port, &placement, state.generation);
                    }
                }
            }
        }
        state.topology = desired;
    }

    fn add_to_workers(&self, port: &Arc<Port>, placement: &[u16], generation: u32) {
        let id = port.base().id;
        let pairs = || (0..).zip(placement);
        if let Port::VhostUser(guest) = &**port {
            let binding = |(pair, worker): (u16, &u16)| Binding {
                worker: Arc::clone(&self.workers[usize::from(*worker)].handle),
                token: Token::new(id, pair, generation),
            };
            guest.bind(pairs().map(binding).collect());
        }
        self.tell_all(|worker, done| {
            let own = pairs().filter(|(_, owner)| **owner == worker);
            let sources = own
                .map(|(pair, _)| Token::new(id, pair, generation))
                .collect();
            Command::AddPort {
                port: Arc::clone(port),
                sources,
                done,
            }
        });
    }

    /// Sends each worker a command and waits until all have executed it.
    fn tell_all(&self, command: impl Fn(u16, channel::Sender<()>) -> Command) {
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
    fn watch(&self, state: &State, port: &Port) -> std::io::Result<()> {
        let id = port.base().id;
        for (pair, worker) in (0..).zip(state.topology.placement(id)) {
            let token = Token::new(id, pair, state.generation);
            if let Some(fd) = port.fd(pair) {
                self.workers[usize::from(*worker)].handle.watch(fd, token)?;
            }
        }
        Ok(())
    }

    /// Takes a port out, in the reverse order of its coming.
    fn take_out(&self, state: &mut State, name: &PortName) {
        let Some(entry) = state.ports.get(name) else {
            return;
        };
        let port = Arc::clone(&entry.port);
        let id = port.base().id;
        match &*port {
            Port::VhostUser(_) => self.sessions.remove(id),
            Port::Tap(_) | Port::AfXdp(_) => {
                for (pair, worker) in (0..).zip(state.topology.placement(id)) {
                    if let Some(fd) = port.fd(pair) {
                        self.workers[usize::from(*worker)].handle.unwatch(fd);
                    }
                }
            }
        }
        let desired = state.topology.without_port(id);
        self.change_topology(state, desired);
        self.bridge.fdb().purge_port(id);
        self.bridge.fdb().set_limit(id, None);
        state.ports.remove(name);
    }

    fn port_info(&self, state: &State, name: &PortName) -> Result<PortInfo, SwitchError> {
        let Entry { config, port } = find(state, name)?;
        let id = port.base().id;
        Ok(PortInfo {
            name: name.clone(),
            id,
            config: config.clone(),
            state: port.state(),
            counters: port.counters(),
            fdb_entries: self.bridge.fdb().count(id),
        })
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let mut state = self.lock();
        let names: Vec<_> = state.ports.keys().cloned().collect();
        for name in names {
            self.take_out(&mut state, &name);
        }
    }
}

fn find<'a>(state: &'a State, name: &PortName) -> Result<&'a Entry, SwitchError> {
    let missing = || SwitchError::NoSuchPort { name: name.clone() };
    state.ports.get(name).ok_or_else(missing)
}

fn names(state: &State) -> BTreeMap<PortId, &PortName> {
    state
        .ports
        .iter()
        .map(|(name, entry)| (entry.port.base().id, name))
        .collect()
}

/// Opens what is behind a port: everything that can be refused.
fn open_port(base: PortBase, config: &PortConfig) -> Result<(Port, Option<Endpoint>), SwitchError> {
    match &config.kind {
        PortKind::VhostUser {
            socket,
            queue_pairs,
        } => {
            let endpoint = match socket {
                SocketSpec::Listen(path) => Endpoint::listen(path)?,
                SocketSpec::Connect(path) => Endpoint::connect(path)?,
            };
            let guest = VhostPort::new(base, queue_pairs.get(), config.mtu);
            Ok((Port::VhostUser(Arc::new(guest)), Some(endpoint)))
        }
        PortKind::Tap {
            ifname,
            queue_pairs,
            persist,
        } => {
            let tap = TapPort::open(base, ifname, queue_pairs.get(), config.mtu, *persist)?;
            Ok((Port::Tap(Box::new(tap)), None))
        }
        PortKind::AfXdp(xdp) => {
            let port = AfXdpPort::open(base, xdp, config.mtu)?;
            Ok((Port::AfXdp(Box::new(port)), None))
        }
    }
}

/// Each worker CPU exists, is allowed to this process and is named once.
fn check_cpus(cpus: &[usize]) -> Result<(), SwitchError> {
    let bad = |reason: &str| {
        Err(SwitchError::BadWorkerCpus {
            reason: reason.to_owned(),
        })
    };
    if cpus.is_empty() {
        return bad("there must be at least one");
    }
    let allowed: Vec<_> = core_affinity::get_core_ids()
        .unwrap_or_default()
        .iter()
        .map(|core| core.id)
        .collect();
    for (at, cpu) in cpus.iter().enumerate() {
        if !allowed.contains(cpu) {
            let allowed = allowed
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(",");
            return Err(SwitchError::NoSuchCpu { cpu: *cpu, allowed });
        }
        if cpus[..at].contains(cpu) {
            return bad(&format!("CPU {cpu} is named twice"));
        }
    }
    Ok(())
}

/// Time since `epoch` in ticks.
pub(crate) fn now_tick(epoch: Instant) -> Tick {
    Tick(ticks(epoch.elapsed()))
}

fn ticks(duration: Duration) -> u32 {
    let ticks = duration.as_millis() * u128::from(Tick::PER_SECOND) / 1000;
    u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// A secret for the hash of the forwarding database: std's own per-process random keys.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(SystemTime::now())
}
