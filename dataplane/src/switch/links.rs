//! The threads that watch the interfaces of ports, and that open and close them as these come and go.
//!
//! ```text
//!   kernel -- events, answers --> watcher -- Attach, Detach --> attacher -- commands --> workers
//!                                   ^ |                            |
//!                        status <-----+                            |
//!                                   +------ attached, failed ------+
//! ```
//! The watcher decides ([`Link`]) and never waits for ports: it takes no lock of the switch's. The
//! attacher has the time that opening an interface takes, and holds the lock of the port table only
//! to exchange a port for another.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{self as channel, Receiver, Sender};
use ringway_api::{PortConfig, PortName, PortState, SwitchError};
use ringway_bridge::PortId;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use tracing::{info, warn};

use super::port_table::{PortTable, State, check_pair};
use crate::fd_limit;
use crate::link::{Link, LinkKind, LinkName, LinkStatus, Order, Rounds, Sight};
use crate::log_limit::LogLimit;
use crate::netlink::{Asker, Event, Events, Key};
use crate::port::{AfXdpPort, LinkBase, OWN_NAMESPACE, Port, TapPort};

/// What the watcher is told.
enum Command {
    /// A port is there; answered when its status is.
    Add { port: Arc<Port>, done: Sender<()> },
    /// A port is to go; answered when the watcher has nothing of it any more.
    Remove { id: PortId, done: Sender<()> },
    /// A port is another one from now on; answered when the watcher has nothing of the old one.
    Exchange { port: Arc<Port>, done: Sender<()> },
    /// How an order ended.
    Ended {
        link: Arc<LinkBase>,
        order: Order,
        result: Result<(), String>,
    },
    /// End the thread.
    Stop,
}

/// The watcher, for others.
#[derive(Clone, Debug)]
struct Handle {
    commands: Sender<Command>,
    /// Ends the watcher's wait.
    bell: Arc<OwnedFd>,
}

impl Handle {
    fn send(&self, command: Command) {
        // The watcher lives until `Stop`, the last command.
        if self.commands.send(command).is_ok() {
            // An eventfd write fails only if its counter is full, and then it is readable anyway.
            let _ = rustix::io::write(&*self.bell, &1_u64.to_ne_bytes());
        }
    }

    /// Sends a command and waits until it is carried out.
    fn call(&self, command: impl FnOnce(Sender<()>) -> Command) {
        let (done, is_done) = channel::bounded(1);
        self.send(command(done));
        // Fails only if the watcher ended.
        let _ = is_done.recv();
    }
}

/// Both threads. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Links {
    watcher: Handle,
    threads: Vec<JoinHandle<()>>,
}

impl Links {
    /// Starts the threads, for interfaces of this thread's network namespace.
    ///
    /// # Errors
    /// No netlink socket, eventfd or thread can be made.
    pub(super) fn start(table: Arc<PortTable>) -> io::Result<Self> {
        let (commands, received) = channel::unbounded();
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let handle = Handle {
            commands,
            bell: Arc::clone(&bell),
        };
        let (orders, to_do) = channel::unbounded();
        let watcher = Watcher {
            commands: received,
            bell,
            events: Events::new()?,
            asker: Asker::new()?,
            home: rustix::fs::stat(OWN_NAMESPACE)
                .ok()
                .map(|ns| (ns.st_dev, ns.st_ino)),
            ports: BTreeMap::new(),
            orders,
            rounds: Rounds::new(Instant::now()),
        };
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run)
        };
        let mut links = Self {
            watcher: handle.clone(),
            threads: Vec::new(),
        };
        let threads = &mut links.threads;
        threads.push(spawn("ringway-links", Box::new(|| watcher.run()))?);
        let attacher = Attacher {
            table,
            watcher: handle,
        };
        threads.push(spawn(
            "ringway-attach",
            Box::new(move || to_do.iter().for_each(|order| attacher.carry_out(&order))),
        )?);
        Ok(links)
    }

    /// Watches the interface of a port, whose status is known when this returns.
    pub(super) fn add(&self, port: &Arc<Port>) {
        let port = Arc::clone(port);
        self.watcher.call(|done| Command::Add { port, done });
    }

    /// Watches the interface of a port no more. What is open of it is nobody's but the caller's then.
    pub(super) fn remove(&self, id: PortId) {
        self.watcher.call(|done| Command::Remove { id, done });
    }
}

#[cfg(any(test, feature = "inline"))]
impl super::Switch {
    /// How often the interface of a port was looked at, and was to be opened, since the port was added:
    /// by which tests tell how soon something was seen, whatever else the machine does.
    ///
    /// # Errors
    /// There is no such port.
    pub fn looks_at(&self, name: &PortName) -> Result<(u64, u64), SwitchError> {
        let state = self.table.lock();
        let link = state.find(name)?.port.link();
        Ok(link.map_or((0, 0), |link| link.looks.read()))
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.watcher.send(Command::Stop);
        for thread in self.threads.drain(..) {
            // A panic was told where it happened.
            let _ = thread.join();
        }
    }
}

/// An order to the attacher.
struct Request {
    link: Arc<LinkBase>,
    order: Order,
}

/// A port as the watcher has it.
struct Watched {
    port: Arc<Port>,
    base: Arc<LinkBase>,
    link: Link,
    /// Something may be new.
    is_touched: bool,
    /// It was heard that what is open is gone, or that it was down.
    was_gone: bool,
    was_down: bool,
    /// The kernel did not answer.
    is_uncertain: bool,
    log: LogLimit,
}

struct Watcher {
    commands: Receiver<Command>,
    bell: Arc<OwnedFd>,
    events: Events,
    asker: Asker,
    /// Device and number of the namespace's file.
    home: Option<(u64, u64)>,
    ports: BTreeMap<PortId, Watched>,
    orders: Sender<Request>,
    rounds: Rounds,
}

impl Watcher {
    fn run(mut self) {
        let mut has_more = false;
        loop {
            if !has_more {
                self.wait();
            }
            if !self.take_commands() {
                return;
            }
            has_more = !self.hear();
            self.look(Instant::now());
        }
    }

    /// Waits for an event or a command, or until a port is to be looked at anyway.
    fn wait(&self) {
        let now = Instant::now();
        let is_polled = |port: &Watched| port.link.is_polled() || port.is_uncertain;
        let polled = self.ports.values().any(is_polled);
        let retries = self.ports.values().filter_map(|port| port.link.look_at());
        let next = retries.chain(polled.then(|| self.rounds.next())).min();
        let timeout = next.map(|next| {
            let timeout = next.saturating_duration_since(now);
            Timespec {
                tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: timeout.subsec_nanos().into(),
            }
        });
        let mut fds = [self.events.as_fd(), self.bell.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => warn!("poll for interfaces: {error}"),
        }
        // Emptied before the commands are taken: one that comes later rings again.
        let _ = rustix::io::read(&*self.bell, &mut [0; 8]);
    }

    /// Carries out the commands that wait; false after [`Command::Stop`].
    fn take_commands(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            let now = Instant::now();
            match command {
                Command::Add { port, done } => {
                    self.add(port, now);
                    // Whoever asks waits for it.
                    let _ = done.send(());
                }
                Command::Remove { id, done } => {
                    self.ports.remove(&id);
                    let _ = done.send(());
                }
                Command::Exchange { port, done } => {
                    if let Some(watched) = find(&mut self.ports, port.link()) {
                        watched.port = port;
                    }
                    let _ = done.send(());
                }
                Command::Ended {
                    link,
                    order,
                    result,
                } => self.ended(&link, order, result, now),
                Command::Stop => return false,
            }
        }
        true
    }

    fn add(&mut self, port: Arc<Port>, now: Instant) {
        let Some(base) = port.link().cloned() else {
            return;
        };
        let kind = match &*port {
            Port::AfXdp(_) => LinkKind::Nic,
            Port::Tap(_) | Port::VhostUser(_) => LinkKind::Tap,
        };
        let id = base.base.id;
        let watched = Watched {
            link: Link::new(kind, &base.ifname, port.attachment(), now),
            port,
            base,
            is_touched: true,
            was_gone: false,
            was_down: false,
            is_uncertain: false,
            log: LogLimit::default(),
        };
        self.ports.insert(id, watched);
        self.look(now);
    }

    fn ended(
        &mut self,
        link: &Arc<LinkBase>,
        order: Order,
        result: Result<(), String>,
        now: Instant,
    ) {
        // The port may be gone by now.
        let Some(watched) = find(&mut self.ports, Some(link)) else {
            return;
        };
        match (order, result, watched.port.attachment()) {
            (Order::Attach, Ok(()), Some(attachment)) => watched.link.attached(now, attachment),
            (Order::Attach, Err(reason), _) => watched.link.failed(now, reason),
            (Order::Attach | Order::Detach, ..) => watched.link.detached(),
        }
        watched.is_touched = true;
        watched.publish(now);
    }

    /// Takes the events that wait, and notes which ports they are of; false if there may be more.
    fn hear(&mut self) -> bool {
        let (mut touched, mut gone, mut down) = (HashSet::new(), HashSet::new(), HashSet::new());
        let mut names = HashSet::new();
        let mut is_overrun = false;
        let all = self.events.take(|event| match event {
            Event::Link {
                index,
                name,
                is_gone,
                is_running,
            } => {
                touched.insert(index);
                names.insert(name);
                if is_gone {
                    gone.insert(index);
                }
                if !is_running {
                    down.insert(index);
                }
            }
            Event::Overrun => is_overrun = true,
        });
        if touched.is_empty() && !is_overrun {
            return all;
        }
        for port in self.ports.values_mut() {
            let index = port.link.attachment().map(|open| open.index);
            let is_of = |set: &HashSet<u32>| index.is_some_and(|index| set.contains(&index));
            let is_named = |name: &LinkName| names.contains(name);
            port.is_touched |= is_overrun || is_of(&touched) || is_named(port.link.ifname());
            port.was_gone |= is_of(&gone);
            port.was_down |= is_of(&down);
        }
        all
    }

    /// Looks at the ports of which something may be new.
    fn look(&mut self, now: Instant) {
        let is_time = self.rounds.begin(now);
        for port in self.ports.values_mut() {
            let is_polled = is_time && (port.link.is_polled() || port.is_uncertain);
            let is_due = port.link.look_at().is_some_and(|at| at <= now);
            if port.is_touched || is_polled || is_due {
                let order = port.look(&mut self.asker, self.home, now);
                port.base.looks.count(order);
                if let Some(order) = order {
                    let link = Arc::clone(&port.base);
                    // The attacher lives longer than the watcher.
                    let _ = self.orders.send(Request { link, order });
                }
            }
        }
    }
}

/// The port that keeps `link`.
fn find<'a>(
    ports: &'a mut BTreeMap<PortId, Watched>,
    link: Option<&Arc<LinkBase>>,
) -> Option<&'a mut Watched> {
    let link = link?;
    let watched = ports.get_mut(&link.base.id)?;
    Arc::ptr_eq(&watched.base, link).then_some(watched)
}

impl Watched {
    /// Looks at the interface, tells of it, and returns what is to be done.
    fn look(&mut self, asker: &mut Asker, home: Option<(u64, u64)>, now: Instant) -> Option<Order> {
        self.is_touched = false;
        let sight = match self.sight(asker, home) {
            Ok(sight) => sight,
            Err(error) => {
                if !self.is_uncertain {
                    let port = &self.base.base.name;
                    warn!(%port, "can't ask about the interface: {error}");
                }
                self.is_uncertain = true;
                return None;
            }
        };
        self.is_uncertain = false;
        let verdict = self.link.look(now, &sight, self.was_gone, self.was_down);
        (self.was_gone, self.was_down) = (false, false);
        if verdict.flush {
            self.base.base.forget_stations();
        }
        self.publish(now);
        verdict.order
    }

    /// What there is in place of the interface.
    fn sight(&self, asker: &mut Asker, home: Option<(u64, u64)>) -> io::Result<Sight> {
        let (key, channels) = match (self.link.attachment(), &*self.port) {
            (Some(_), Port::Tap(tap)) => return sight_of_tap(tap, asker, home),
            (Some(open), Port::AfXdp(nic)) => (Key::Index(open.index), nic.channels()),
            (_, _) => (Key::Name(self.link.ifname()), None),
        };
        let seen = asker.link(key)?;
        Ok(seen.map_or(Sight::Missing, |seen| Sight::Here(seen, channels)))
    }

    /// Tells what is known of the interface, if it is new.
    fn publish(&self, now: Instant) {
        let status = self.link.status();
        let told = self.base.status();
        if *status == told {
            return;
        }
        self.base.set_status(status.clone());
        let is_same = |status: &LinkStatus| (status.state, status.error.clone());
        if is_same(status) == is_same(&told) {
            return;
        }
        let base = &self.base.base;
        base.tell_state(status.state, status.error.clone());
        let Some(suppressed) = self.log.pass(now) else {
            return;
        };
        let (port, state) = (&self.base.base.name, status.state.as_str());
        match (&status.error, status.state) {
            (Some(error), _) => warn!(%port, state, suppressed, "{error}"),
            (None, PortState::Up | PortState::Impaired) => {
                info!(%port, state, suppressed, "the interface is up")
            }
            (None, PortState::Down) => info!(%port, state, suppressed, "the interface is down"),
        }
    }
}

/// What became of the interface of a tap that is open.
fn sight_of_tap(tap: &TapPort, asker: &mut Asker, home: Option<(u64, u64)>) -> io::Result<Sight> {
    let Some(name) = tap.name_now() else {
        return Ok(Sight::Missing);
    };
    let index = tap.attachment().map(|open| open.index);
    let place = tap.namespace().ok();
    let number = place.as_ref().and_then(|fd| rustix::fs::fstat(fd).ok());
    let is_home = number.map(|ns| home == Some((ns.st_dev, ns.st_ino)));
    if is_home != Some(false) {
        return match asker.link(Key::Name(&name))? {
            // Who may not be told the namespace knows the interface by its number.
            Some(seen) if is_home == Some(true) || Some(seen.index) == index => {
                Ok(Sight::Here(seen, None))
            }
            _ if is_home.is_none() => Ok(Sight::Elsewhere(None)),
            // It was renamed or moved between the two questions.
            _ => Err(io::ErrorKind::NotFound.into()),
        };
    }
    let Some(place) = place else {
        return Ok(Sight::Elsewhere(None));
    };
    // Who may not ask there knows at least that the fd works.
    let seen = match asker.namespace(place.as_fd()) {
        Ok(Some(id)) => asker.link(Key::NameIn(id, &name)).ok().flatten(),
        Ok(None) | Err(_) => None,
    };
    Ok(Sight::Elsewhere(seen))
}

/// Opens and closes interfaces.
struct Attacher {
    table: Arc<PortTable>,
    watcher: Handle,
}

impl Attacher {
    fn carry_out(&self, Request { link, order }: &Request) {
        let result = match order {
            Order::Attach => self.attach(link),
            Order::Detach => self.detach(link),
        };
        // A port that is gone has nobody to be told.
        if let Some(result) = result {
            self.watcher.send(Command::Ended {
                link: Arc::clone(link),
                order: *order,
                result,
            });
        }
    }

    /// Takes a port out of the workers and closes what it has open. `None` if the port is gone.
    fn detach(&self, link: &Arc<LinkBase>) -> Option<Result<(), String>> {
        let mut state = self.table.lock();
        let (name, old, _) = find_port(&state, link)?;
        self.table.unwatch(&state, &old);
        self.table.remove_from_workers(&mut state, link.base.id);
        self.exchange(&mut state, &name, Arc::new(old.detached()?));
        // Closed without the lock: that takes a while.
        drop(state);
        drop(old);
        Some(Ok(()))
    }

    /// Opens the interface of a port, and has the workers serve it. `None` if the port is gone.
    fn attach(&self, link: &Arc<LinkBase>) -> Option<Result<(), String>> {
        let (name, _, config) = find_port(&self.table.lock(), link)?;
        // Without the lock: what others hold is waited for.
        let port = match open(link, &name, &config) {
            Ok(port) => Arc::new(port),
            Err(error) => return Some(Err(format!("{error}; {}", error.hint()))),
        };
        let mut state = self.table.lock();
        let (name, waiting, config) = find_port(&state, link)?;
        self.exchange(&mut state, &name, Arc::clone(&port));
        let (id, pairs) = (link.base.id, port.queue_pairs());
        let workers = self.table.worker_count();
        let desired = state.topology.with_port(id, pairs, workers, config.pins());
        let served = self.table.change_topology(&mut state, &desired);
        let served = served.and_then(|()| self.table.watch(&state, &port));
        Some(served.map_err(|error| {
            self.table.remove_from_workers(&mut state, id);
            self.exchange(&mut state, &name, waiting);
            format!("can't wait for its queues: {}", fd_limit::explain(&error))
        }))
    }

    /// Has a port be another one, for the switch and the watcher.
    fn exchange(&self, state: &mut State, name: &PortName, port: Arc<Port>) {
        state.replace(name, Arc::clone(&port));
        self.watcher.call(|done| Command::Exchange { port, done });
    }
}

/// The port that keeps `link`, if it was not removed.
fn find_port(state: &State, link: &Arc<LinkBase>) -> Option<(PortName, Arc<Port>, PortConfig)> {
    let name = &link.base.name;
    let entry = state.ports.get(name)?;
    let is_it = entry.port.link().is_some_and(|own| Arc::ptr_eq(own, link));
    is_it.then(|| (name.clone(), Arc::clone(&entry.port), entry.config.clone()))
}

fn open(link: &Arc<LinkBase>, name: &PortName, config: &PortConfig) -> Result<Port, SwitchError> {
    let link = Arc::clone(link);
    let port = match config {
        PortConfig::Tap(tap) => Port::Tap(Box::new(TapPort::open(link, tap)?)),
        PortConfig::AfXdp(nic) => Port::AfXdp(Box::new(AfXdpPort::open(link, nic)?)),
        PortConfig::VhostUser(_) => {
            return Err(SwitchError::NoSuchPort { name: name.clone() });
        }
    };
    for pair in config.pins().keys() {
        check_pair(name, *pair, port.queue_pairs())?;
    }
    Ok(port)
}
