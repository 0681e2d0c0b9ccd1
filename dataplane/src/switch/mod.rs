//! The handle by which the control plane runs the dataplane.

mod addresses;
mod balance;
mod capture;
mod fdb;
#[cfg(any(test, feature = "inline"))]
mod inline;
mod links;
mod load;
mod loops;
mod port_table;
mod vlans;
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use ringway_api::{
    AfXdpConfig, HeaderAction, Mtu, Occurrence, PairCounters, PolledQueue, PortConfig, PortDetail,
    PortInfo, PortName, PortState, QueueInfo, QueuePairs, SocketSpec, SwitchConfig, SwitchError,
    TapConfig, VhostUserConfig, WorkerDetail, WorkerInfo,
};
use ringway_bridge::{Bridge, BridgeConfig, PortId, Tick};

#[cfg(any(test, feature = "inline"))]
pub use inline::InlineSwitch;

pub use self::capture::CaptureReader;

use self::links::Links;
use self::loops::Loops;
use self::port_table::{PortTable, State, check_pair};
use self::watch::Watch;
use crate::burst_lock::lock;
use crate::cpus::allowed_cpus;
use crate::events::EventHub;
use crate::fd_limit::out_of_fds;
use crate::housekeeping::{self, Periodic};
use crate::offload::Action;
use crate::placement::QueueId;
use crate::port::{AfXdpPort, LinkBase, Port, PortBase, TapPort, VhostPort};
use crate::socket_file::SocketFile;
use crate::vhost_user::{Endpoint, SessionThread};
use crate::wake::Heartbeat;
use crate::wire::Features;
use crate::worker::WorkerThread;

/// A running switch. All methods may be called from any thread; those that change something run
/// one at a time, and either take full effect or none. Dropping it removes all ports and ends all
/// threads.
pub struct Switch {
    // Dropped in this order: whoever moves queues and opens interfaces, then sessions, then the
    // workers that they talk to, and last the thread that frees workers.
    #[expect(
        dead_code,
        reason = "held for its thread, which ends when it is dropped"
    )]
    balancer: Periodic,
    links: Links,
    sessions: SessionThread<VhostPort>,
    table: Arc<PortTable>,
    bridge: Arc<Bridge>,
    events: EventHub,
    watch: Arc<Mutex<Watch>>,
    epoch: Instant,
    #[expect(
        dead_code,
        reason = "held for its thread, which ends when it is dropped"
    )]
    housekeeping: Periodic,
}

impl std::fmt::Debug for Switch {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Switch")
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
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
            ageing_ticks: Tick::count(config.fdb_ageing),
            move_hold_ticks: Tick::count(config.fdb_move_hold),
            seed: seed(),
            group_fwd_mask: config.group_fwd_mask.get(),
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
        let table = Arc::new(PortTable::new(workers));
        let (events, watch) = (EventHub::default(), Arc::new(Mutex::new(Watch::default())));
        let look_at_ports = {
            let (table, bridge) = (Arc::clone(&table), Arc::clone(&bridge));
            let (events, watch) = (events.clone(), Arc::clone(&watch));
            let mut loops = Loops::default();
            move || {
                if let Some(mut state) = table.try_lock() {
                    loops.look(&table, &mut state, Instant::now());
                    state.forget_behind_down_interfaces();
                    lock(&watch).look(&state, &bridge, &events, Instant::now());
                }
            }
        };
        Ok(Self {
            sessions: SessionThread::start().map_err(system("vhost-user session thread"))?,
            balancer: balance::start(Arc::clone(&table), config.balance, epoch)
                .map_err(system("balancing thread"))?,
            links: Links::start(Arc::clone(&table))
                .map_err(system("threads that watch interfaces"))?,
            table,
            epoch,
            housekeeping: housekeeping::start(Arc::clone(&bridge), epoch, look_at_ports)
                .map_err(system("housekeeping thread"))?,
            bridge,
            events,
            watch,
        })
    }

    /// Adds a port; it forwards as soon as its guest or interface is ready.
    ///
    /// # Errors
    /// A name that is taken, a socket path or interface that can't be used.
    pub fn add_port(&self, name: PortName, config: PortConfig) -> Result<PortInfo, SwitchError> {
        self.add(name, config, false)
    }

    /// The same, but for a port whose interface is missing or down: it is added, and waits for that.
    ///
    /// # Errors
    /// As [`Switch::add_port`], for all other reasons.
    pub fn add_or_await_port(
        &self,
        name: PortName,
        config: PortConfig,
    ) -> Result<PortInfo, SwitchError> {
        self.add(name, config, true)
    }

    fn add(
        &self,
        name: PortName,
        config: PortConfig,
        may_wait: bool,
    ) -> Result<PortInfo, SwitchError> {
        // Before the lock is held, since the system's name service may take its time.
        let file = socket_file(&config)?;
        let mut state = self.table.lock();
        if state.ports.contains_key(&name) {
            return Err(SwitchError::PortExists { name });
        }
        let id = state.free_id().ok_or(SwitchError::TooManyPorts)?;
        let queues = config.queues().unwrap_or(QueuePairs::MAX).get();
        for (pair, worker) in config.pins() {
            check_pair(&name, *pair, queues)?;
            self.table.check_worker(*worker)?;
        }
        refuse_shared(&state, &config)?;
        let base = PortBase::new(name.clone(), id, Arc::clone(&self.bridge), &self.events);
        // What can be refused comes first; nothing of it outlives an error.
        let (port, endpoint) = open_port(base, &config, &file, may_wait)?;
        let is_open = port.queue_pairs() > 0;
        for pair in config.pins().keys().filter(|_| is_open) {
            check_pair(&name, *pair, port.queue_pairs())?;
        }
        let port = Arc::new(port);
        let (pairs, workers) = (port.queue_pairs(), self.table.worker_count());
        let desired = if is_open {
            state.topology.with_port(id, pairs, workers, config.pins())
        } else {
            state.topology.clone()
        };
        let fdb_limit = config.fdb_limit().get();
        self.bridge.fdb().set_limit(id, Some(fdb_limit));
        self.bridge
            .set_flood_limit(id, config.flood_limit().bound());
        let kind = config.kind();
        state.insert(name.clone(), config, Arc::clone(&port));
        // Before the first frame of it.
        self.table.publish_vlans(&mut state);
        self.events.tell(|| Occurrence::PortAdded {
            port: name.clone(),
            kind,
        });
        let added = self.table.change_topology(&mut state, &desired);
        let started = added.and_then(|()| match (&*port, endpoint) {
            (Port::VhostUser(guest), Some(endpoint)) => {
                self.sessions.add(id, endpoint, Arc::clone(guest))
            }
            (Port::Tap(_) | Port::AfXdp(_), _) => {
                self.table.watch(&state, &port)?;
                self.links.add(&port);
                Ok(())
            }
            (Port::VhostUser(_), None) => Ok(()),
        });
        if let Err(source) = started {
            self.take_out(&mut state, &name);
            let what = match out_of_fds(&source) {
                Some((reason, _)) => format!("port {name}: {reason}"),
                None => format!("port {name}"),
            };
            return Err(SwitchError::System { what, source });
        }
        self.port_info(&state, &name)
    }

    /// Removes a port: when this returns, its socket, interface, memory and fds are gone.
    ///
    /// # Errors
    /// There is no such port.
    pub fn remove_port(&self, name: &PortName) -> Result<(), SwitchError> {
        let mut state = self.table.lock();
        state.find(name)?;
        self.take_out(&mut state, name);
        Ok(())
    }

    /// All ports, by name.
    pub fn ports(&self) -> Vec<PortInfo> {
        let state = self.table.lock();
        state
            .ports
            .keys()
            .filter_map(|name| self.port_info(&state, name).ok())
            .collect()
    }

    /// For how long nobody has listened at the socket that a port is to connect to, though its file is
    /// there.
    pub fn refused_for(&self, name: &PortName) -> Option<Duration> {
        let state = self.table.lock();
        let Port::VhostUser(guest) = &*state.find(name).ok()?.port else {
            return None;
        };
        guest.refused_for(Instant::now())
    }

    /// The queues of all ports, by the ports' names.
    pub fn queues(&self) -> Vec<(PortName, Vec<QueueInfo>)> {
        let state = self.table.lock();
        let ports = state.ports.iter();
        ports
            .map(|(name, entry)| (name.clone(), queues(&state, &entry.port)))
            .collect()
    }

    /// One port with its queues.
    ///
    /// # Errors
    /// There is no such port.
    pub fn port(&self, name: &PortName) -> Result<PortDetail, SwitchError> {
        let state = self.table.lock();
        let info = self.port_info(&state, name)?;
        let port = &state.find(name)?.port;
        let (rx_offloads, tx_offloads) = port.offloads();
        let detail = PortDetail {
            port: info,
            queues: queues(&state, port),
            features: Vec::new(),
            protocol_features: Vec::new(),
            connections: 0,
            call_ns: 0,
            closed_for_ms: None,
            mapped_bytes: 0,
            memory_regions: 0,
            last_error: None,
            mtu: None,
            rx_offloads: owned(rx_offloads.names()),
            tx_offloads: owned(tx_offloads.names()),
            actions: header_actions(&state, port),
            af_xdp: None,
        };
        let alarm = loops::alarm(port);
        Ok(match &**port {
            Port::VhostUser(guest) => {
                let (features, protocol_features) = guest.features();
                let (mapped_bytes, memory_regions) = guest.mapped();
                let closed_for = guest.callee.closed_for(Instant::now());
                PortDetail {
                    features: owned(features.names()),
                    protocol_features: owned(protocol_features.names()),
                    connections: guest.connections(),
                    call_ns: guest.callee.spent_ns(),
                    closed_for_ms: closed_for.and_then(|time| time.as_millis().try_into().ok()),
                    mapped_bytes,
                    memory_regions,
                    last_error: alarm.or_else(|| guest.last_error().or_else(|| guest.obstacle())),
                    mtu: guest.mtu(),
                    ..detail
                }
            }
            Port::Tap(tap) => {
                let status = tap.link.status();
                PortDetail {
                    features: owned(tap.feature_names()),
                    mtu: status.mtu,
                    last_error: status.error.or(alarm),
                    ..detail
                }
            }
            Port::AfXdp(xdp) => {
                let status = xdp.link.status();
                let af_xdp = xdp.info();
                // What is held to be true of frames while there are any.
                let in_effect = af_xdp.as_ref().filter(|_| status.state == PortState::Up);
                PortDetail {
                    mtu: in_effect.map_or(status.mtu, |_| Some(xdp.mtu())),
                    last_error: status.error.or(alarm),
                    af_xdp,
                    ..detail
                }
            }
        })
    }

    /// A watch over the workers.
    pub fn heartbeat(&self) -> Heartbeat {
        let workers = self.table.workers.iter();
        Heartbeat::new(workers.map(|worker| Arc::clone(&worker.handle.waker)))
    }

    /// All workers, by index.
    pub fn workers(&self) -> Vec<WorkerInfo> {
        let state = self.table.lock();
        let workers = self.table.workers.iter();
        workers
            .map(|worker| self.worker_info(&state, worker))
            .collect()
    }

    /// One worker with the queues that it polls.
    ///
    /// # Errors
    /// There is no such worker.
    pub fn worker(&self, index: u16) -> Result<WorkerDetail, SwitchError> {
        self.table.check_worker(index)?;
        let state = self.table.lock();
        let queue = |(id, pair, _)| {
            let entry = state.entry_of(id)?;
            let (rx_frames, rx_bytes) = entry.port.received(pair);
            let rate = state.load.queues.get(&QueueId { port: id, pair });
            let rate = rate.copied().unwrap_or_default();
            let seconds = state.load.interval.as_secs_f64();
            let per_second = |n: u64| if n == 0 { 0.0 } else { n as f64 / seconds };
            Some(PolledQueue {
                port: entry.port.base().name.clone(),
                queue: pair,
                is_pinned: entry.config.pins().contains_key(&pair),
                rx_frames,
                rx_bytes,
                frames_per_second: per_second(rate.frames),
                bits_per_second: per_second(rate.bytes) * 8.0,
                recent_busy_share: f64::from(rate.load) / 1000.0,
            })
        };
        let polled = state.topology.pairs().filter(|(_, _, at)| *at == index);
        let mut queues: Vec<_> = polled.filter_map(queue).collect();
        queues.sort_by(|a, b| (&a.port, a.queue).cmp(&(&b.port, b.queue)));
        Ok(WorkerDetail {
            worker: self.worker_info(&state, &self.table.workers[usize::from(index)]),
            interval_seconds: state.load.interval.as_secs_f64(),
            queues,
        })
    }

    fn worker_info(&self, state: &State, worker: &WorkerThread) -> WorkerInfo {
        let recent = state.load.workers.get(usize::from(worker.handle.index));
        WorkerInfo {
            recent_busy_share: f64::from(recent.copied().unwrap_or(0)) / 1000.0,
            ..worker.info(self.epoch)
        }
    }

    /// Has a worker poll a queue pair of a port from now on, whatever its load. Frames that wait
    /// in the queue stay in order and none is lost.
    ///
    /// # Errors
    /// There is no such port, queue pair or worker.
    pub fn pin_queue(&self, port: &PortName, pair: u16, worker: u16) -> Result<(), SwitchError> {
        self.table.set_pin(port, pair, Some(worker))?;
        Ok(())
    }

    /// Leaves it to the switch again where a queue pair is polled; it stays where it is until it is
    /// worth moving. Tells whether it was pinned.
    ///
    /// # Errors
    /// There is no such port or queue pair.
    pub fn unpin_queue(&self, port: &PortName, pair: u16) -> Result<bool, SwitchError> {
        self.table.set_pin(port, pair, None)
    }

    /// Counters of all pairs of ports that exchanged frames since both were added.
    pub fn pairs(&self) -> Vec<PairCounters> {
        let state = self.table.lock();
        let names = state.names();
        let mut sums: BTreeMap<(PortId, PortId), PairCounters> = BTreeMap::new();
        let workers = self.table.workers.iter();
        for pair in workers.flat_map(|worker| worker.handle.pairs.snapshot()) {
            let (Some(from), Some(to)) = (names.get(&pair.from), names.get(&pair.to)) else {
                continue;
            };
            let sum = sums
                .entry((pair.from, pair.to))
                .or_insert_with(|| PairCounters::new((*from).clone(), (*to).clone()));
            sum.frames += pair.frames;
            sum.bytes += pair.bytes;
            sum.drops.add(&pair.drops);
        }
        sums.into_values().collect()
    }

    /// Removes all ports and ends all threads.
    pub fn shutdown(self) {
        drop(self);
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
                self.links.remove(id);
                self.table.unwatch(state, &port);
            }
        }
        self.table.remove_from_workers(state, id);
        self.table.forget_pairs(id);
        self.bridge.fdb().purge_port(id);
        self.bridge.fdb().set_limit(id, None);
        self.bridge.set_flood_limit(id, None);
        state.ports.remove(name);
        self.table.publish_vlans(state);
        let port = name.clone();
        self.events.tell(|| Occurrence::PortRemoved { port });
    }

    fn port_info(&self, state: &State, name: &PortName) -> Result<PortInfo, SwitchError> {
        let entry = state.find(name)?;
        let port = &entry.port;
        let id = port.base().id;
        Ok(PortInfo {
            name: name.clone(),
            id,
            config: entry.config.clone(),
            state: port.state(),
            counters: port.counters(),
            fdb_entries: self.bridge.fdb().count(id),
        })
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let mut state = self.table.lock();
        let names: Vec<_> = state.ports.keys().cloned().collect();
        for name in names {
            self.take_out(&mut state, &name);
        }
    }
}

/// The queues of a port, with their workers.
fn queues(state: &State, port: &Port) -> Vec<QueueInfo> {
    let placement = state.topology.placement(port.base().id);
    port.queues(|pair| placement.get(usize::from(pair)).copied().unwrap_or(0))
}

/// What is done to headers from a port to each other, by name.
fn header_actions(state: &State, from: &Port) -> Vec<HeaderAction> {
    let (rx, _) = from.offloads();
    let others = state
        .ports
        .iter()
        .filter(|(_, entry)| entry.port.base().id != from.base().id);
    others
        .map(|(name, entry)| {
            let (_, tx) = entry.port.offloads();
            HeaderAction {
                to: name.clone(),
                action: Action::between(rx, tx).as_str().to_owned(),
                passed: owned(rx.and(tx).names()),
                done: owned(rx.without(tx).names()),
            }
        })
        .collect()
}

/// Names for a report.
fn owned(names: Vec<&str>) -> Vec<String> {
    names.into_iter().map(str::to_owned).collect()
}

/// Who may open the socket that a port makes.
fn socket_file(config: &PortConfig) -> Result<SocketFile, SwitchError> {
    let PortConfig::VhostUser(VhostUserConfig {
        socket: SocketSpec::Listen(path),
        access,
        ..
    }) = config
    else {
        return Ok(SocketFile::default());
    };
    SocketFile::of(access).map_err(|bad| SwitchError::SocketPath {
        path: path.as_path().to_owned(),
        reason: bad.reason,
        hint: bad.hint,
    })
}

/// An interface is that of one port.
fn refuse_shared(state: &State, config: &PortConfig) -> Result<(), SwitchError> {
    let holder = config.ifname().and_then(|ifname| state.holder_of(ifname));
    let Some(holder) = holder else {
        return Ok(());
    };
    let reason = format!("it is the interface of port {holder} already");
    let hint = format!("`ringway port del {holder}` removes that; or use another interface");
    match config {
        PortConfig::VhostUser(_) => Ok(()),
        PortConfig::Tap(TapConfig { ifname, .. }) => Err(SwitchError::Tap {
            ifname: ifname.clone(),
            reason,
            hint,
        }),
        PortConfig::AfXdp(AfXdpConfig { ifname, .. }) => Err(SwitchError::AfXdp {
            ifname: ifname.clone(),
            reason,
            hint,
        }),
    }
}

/// Opens what is behind a port: everything that can be refused. A port that `may_wait` for its
/// interface comes without queues if that is missing or down.
fn open_port(
    base: PortBase,
    config: &PortConfig,
    file: &SocketFile,
    may_wait: bool,
) -> Result<(Port, Option<Endpoint>), SwitchError> {
    Ok(match config {
        PortConfig::VhostUser(guest) => {
            let endpoint = match &guest.socket {
                SocketSpec::Listen(path) => Endpoint::listen(path.as_path(), file)?,
                SocketSpec::Connect(path) => Endpoint::connect(path.as_path())?,
            };
            let mut withheld = Features::empty();
            if !guest.guest_offloads {
                withheld |= Features::OF_RECEIVE_OFFLOADS;
            }
            if !guest.packed {
                withheld |= Features::VIRTIO_F_RING_PACKED;
            }
            let port = VhostPort::new(base, guest.queues.get(), guest.mtu.map(Mtu::get));
            let port = port.without(withheld);
            (Port::VhostUser(Arc::new(port)), Some(endpoint))
        }
        PortConfig::Tap(tap) => {
            let port = TapPort::open(LinkBase::new(base, &tap.ifname), tap)?;
            (Port::Tap(Box::new(port)), None)
        }
        PortConfig::AfXdp(nic) => {
            let link = LinkBase::new(base, &nic.ifname);
            let opened = AfXdpPort::open(Arc::clone(&link), nic);
            let port = opened.or_else(|error| {
                let waiting = may_wait.then(|| AfXdpPort::wait_for(link, nic));
                waiting.flatten().ok_or(error)
            })?;
            (Port::AfXdp(Box::new(port)), None)
        }
    })
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
    let allowed = allowed_cpus();
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

/// A secret for the hash of the forwarding database: std's own per-process random keys.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(SystemTime::now())
}
