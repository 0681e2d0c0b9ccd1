//! The event loop of the session thread.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use ringway_bridge::PortId;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use tracing::Span;

use super::device::Device;
use super::endpoint::Endpoint;
use super::foreign::Closing;
use super::link::{Link, SPEAK_WITHIN, SessionState};
use super::price::{self, Budget};
use super::server::SessionCommand;
use super::session::Session;
use super::socket::Connection;
use crate::backoff::{Backoff, Growth};
use crate::call::Verdict;
use crate::fd_limit;
use crate::log_limit::LogLimit;

/// The eventfd's token in the epoll instance.
pub(super) const WAKE: u64 = u64::MAX;

/// Events taken from the kernel at once.
const MAX_EVENTS: usize = 64;

/// Connections that one listener accepts before the others have their turn.
const MAX_ACCEPTS_PER_TURN: usize = 8;

/// Delays before another try to connect, the first one also after a session that was in use, or to accept
/// after one failed. A front-end that is back is found within the longest, and one that there were no
/// fds for let in.
const RECONNECT: Growth = Growth {
    base: Duration::from_millis(20),
    max: Duration::from_secs(1),
    healthy: Duration::from_secs(10),
};

/// All that the session thread owns.
pub(super) struct Reactor<D: Device> {
    epoll: OwnedFd,
    wake: Arc<OwnedFd>,
    inbox: Receiver<SessionCommand<D>>,
    ports: HashMap<PortId, ServedPort<D>>,
    /// When ports want to be looked at. An entry counts only if the port's `timer` says the same.
    timers: BTreeSet<(Instant, PortId)>,
    /// Makes tokens differ, so that an event of an fd that is gone is recognised.
    generation: u64,
}

struct ServedPort<D: Device> {
    endpoint: Endpoint,
    device: Arc<D>,
    span: Span,
    /// Of the listener, if there is one.
    token: u64,
    link: Option<Link<D>>,
    /// The earliest of what follows, and of the link's own times.
    timer: Option<Instant>,
    /// What its front-ends cost.
    budget: Budget,
    /// Until when nobody is let in, or connected to.
    rests_until: Option<Instant>,
    reconnect: Backoff,
    /// Connections so far.
    connections: u64,
    /// The last reason why no connection came about; told only when it changes.
    connect_error: Option<Errno>,
    /// Shared with the sessions.
    log: LogLimit,
    closing: Closing,
}

impl<D: Device> ServedPort<D> {
    /// This process has no fds or memory for another front-end: tells so, and how long to wait.
    fn bar(&mut self, error: Errno) -> Duration {
        let (now, error) = (Instant::now(), fd_limit::explain(&error.into()));
        let _entered = self.span.enter();
        if let Some(suppressed) = self.log.pass(now) {
            tracing::error!(%error, suppressed, "no front-end can be let in");
        }
        self.device
            .barred(format!("no front-end can be let in: {error}"));
        self.reconnect.fail(now)
    }
}

impl<D: Device> Reactor<D> {
    pub(super) fn new(
        epoll: OwnedFd,
        wake: Arc<OwnedFd>,
        inbox: Receiver<SessionCommand<D>>,
    ) -> Self {
        Self {
            epoll,
            wake,
            inbox,
            ports: HashMap::new(),
            timers: BTreeSet::new(),
            generation: 0,
        }
    }

    /// Serves until [`SessionCommand::Stop`].
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        loop {
            let timeout = self.next_timeout();
            events.clear();
            let spare = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, spare, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "epoll failed; all vhost-user sessions end");
                    return;
                }
            }
            // Sessions before listeners: a front-end that reconnects closes its old socket first.
            let mut woken = false;
            for event in &events {
                match event.data.u64() {
                    WAKE => woken = true,
                    token => self.serve_link(token, event.flags),
                }
            }
            for event in &events {
                self.serve_listener(event.data.u64());
            }
            self.run_timers();
            if woken {
                if !self.run_commands() {
                    return;
                }
                self.close_condemned();
            }
        }
    }

    /// Returns false when the thread is to end.
    fn run_commands(&mut self) -> bool {
        // Emptied before the inbox, so that a command after this wakes the thread again.
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        loop {
            match self.inbox.try_recv() {
                Ok(SessionCommand::Add {
                    id,
                    endpoint,
                    device,
                    done,
                }) => drop(done.send(self.add(id, endpoint, device))),
                Ok(SessionCommand::Remove { id, done }) => {
                    self.remove(id);
                    let _ = done.send(());
                }
                Ok(SessionCommand::Stop) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn add(&mut self, id: PortId, endpoint: Endpoint, device: Arc<D>) -> io::Result<()> {
        if self.ports.contains_key(&id) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let span = tracing::info_span!("port", id = id.get(), path = %endpoint.path().display());
        device.set_alarm(Arc::clone(&self.wake));
        let token = self.token(id);
        let connects = match &endpoint {
            Endpoint::Listen(listener) => {
                let data = EventData::new_u64(token);
                epoll::add(&self.epoll, listener, data, EventFlags::IN)?;
                false
            }
            Endpoint::Connect(_) => true,
        };
        let port = ServedPort {
            endpoint,
            device,
            span,
            token,
            link: None,
            timer: None,
            budget: Budget::default(),
            rests_until: None,
            reconnect: Backoff::new(RECONNECT),
            connections: 0,
            connect_error: None,
            log: LogLimit::default(),
            closing: Closing::default(),
        };
        self.ports.insert(id, port);
        if connects {
            self.connect(id);
        }
        Ok(())
    }

    fn remove(&mut self, id: PortId) {
        let Some(mut port) = self.ports.remove(&id) else {
            return;
        };
        if let Some(timer) = port.timer.take() {
            self.timers.remove(&(timer, id));
        }
        // Closing its fds takes them out of the epoll instance: nothing else holds them.
        if let Some(mut link) = port.link.take() {
            link.session.close(None);
        }
    }

    /// Ends the sessions of the ports that are to be closed, and has nobody use them for a while.
    fn close_condemned(&mut self) {
        let verdicts = self.ports.iter().filter_map(|(id, port)| {
            let verdict = port.device.take_verdict()?;
            Some((*id, verdict))
        });
        let verdicts: Vec<_> = verdicts.collect();
        for (id, Verdict { why, closed_for }) in verdicts {
            let Some(port) = self.ports.get(&id) else {
                continue;
            };
            let span = port.span.clone();
            let _entered = span.enter();
            self.end_link(id, Some(format!("port closed for {closed_for:?}: {why}")));
            self.rest(id, closed_for);
        }
    }

    fn token(&mut self, id: PortId) -> u64 {
        // 2^48 registrations do not come about, so no token equals WAKE.
        self.generation += 1;
        self.generation << 16 | u64::from(id.get())
    }

    fn serve_link(&mut self, token: u64, flags: EventFlags) {
        let Some(id) = port_of(token) else {
            return;
        };
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        let Some(link) = port.link.as_mut().filter(|link| link.token == token) else {
            return;
        };
        let span = link.span.clone();
        let _entered = span.enter();
        let watched = match link.serve(flags, &mut port.budget) {
            SessionState::Goes => link.watch(&self.epoll),
            SessionState::Pauses(owed) => {
                if let Some(suppressed) = port.log.pass(Instant::now()) {
                    tracing::warn!(
                        ?owed,
                        suppressed,
                        "the front-end asks too much and has to wait"
                    );
                }
                link.pause(&self.epoll, Instant::now() + owed)
            }
            SessionState::Ended(reason) => return self.end_link(id, reason),
        };
        match watched {
            Ok(()) => self.schedule(id),
            Err(error) => self.end_link(id, Some(format!("can't watch the socket: {error}"))),
        }
    }

    fn end_link(&mut self, id: PortId, reason: Option<String>) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        let Some(mut link) = port.link.take() else {
            return;
        };
        if let Some(suppressed) = port.log.pass(Instant::now()) {
            match &reason {
                Some(reason) => tracing::warn!(reason, suppressed, "session ended"),
                None => tracing::info!(suppressed, "front-end disconnected"),
            }
        }
        if link.session.negotiated() {
            port.reconnect.forget();
        }
        let start = Instant::now();
        link.session.close(reason);
        drop(link);
        port.budget.charge(start, start.elapsed());
        if let Endpoint::Connect(_) = port.endpoint {
            self.retry_later(id);
        }
    }

    fn serve_listener(&mut self, token: u64) {
        let Some(id) = port_of(token) else {
            return;
        };
        let Some(port) = self.ports.get(&id).filter(|port| port.token == token) else {
            return;
        };
        let span = port.span.clone();
        let _entered = span.enter();
        for _ in 0..MAX_ACCEPTS_PER_TURN {
            let Some(port) = self.ports.get_mut(&id) else {
                return;
            };
            let Endpoint::Listen(listener) = &port.endpoint else {
                return;
            };
            let now = Instant::now();
            if let Some(owed) = port.budget.owed(now) {
                return self.rest(id, owed);
            }
            match listener.accept() {
                Ok(socket) => {
                    port.budget.charge(now, price::CONNECTION);
                    self.accepted(id, socket);
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    // The listener stays readable, so look away for a while.
                    let delay = port.bar(error);
                    return self.rest(id, delay);
                }
            }
        }
    }

    /// Leaves a port's listener alone for a while; its front-ends wait in the backlog.
    fn rest(&mut self, id: PortId, time: Duration) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        if let Endpoint::Listen(listener) = &port.endpoint {
            let data = EventData::new_u64(port.token);
            if let Err(error) = epoll::modify(&self.epoll, listener, data, EventFlags::empty()) {
                tracing::error!(%error, "can't pause the listener");
            }
        }
        port.rests_until = Some(Instant::now() + time);
        self.schedule(id);
    }

    /// One front-end at a time, unless the one before has hung up already.
    fn accepted(&mut self, id: PortId, socket: OwnedFd) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        // Whoever is turned away may have sent files already.
        let connection = Connection::new(socket, port.closing.clone());
        let refusal = if port.closing.is_full() {
            Some("files of the one before don't close")
        } else {
            let occupied = port.link.as_ref().is_some_and(|link| !link.has_hung_up());
            occupied.then_some("there is one already")
        };
        if let Some(reason) = refusal {
            if let Some(suppressed) = port.log.pass(Instant::now()) {
                tracing::warn!(reason, suppressed, "front-end turned away");
            }
            return;
        }
        if port.link.is_some() {
            self.end_link(id, None);
        }
        self.open_link(id, connection);
    }

    fn open_link(&mut self, id: PortId, connection: Connection) {
        let token = self.token(id);
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        if let Err(error) = epoll::add(
            &self.epoll,
            &connection,
            EventData::new_u64(token),
            EventFlags::IN,
        ) {
            if let Some(suppressed) = port.log.pass(Instant::now()) {
                tracing::error!(%error, suppressed, "can't watch a front-end's socket");
            }
            drop(connection);
            if let Endpoint::Connect(_) = port.endpoint {
                self.retry_later(id);
            }
            return;
        }
        port.connections += 1;
        let number = port.connections;
        let span = tracing::info_span!(parent: &port.span, "connection", number);
        if let Some(suppressed) = port.log.pass(Instant::now()) {
            span.in_scope(|| tracing::info!(suppressed, "front-end connected"));
        }
        let device = Arc::clone(&port.device);
        // Whoever we connect to keeps nobody out, and may be slow to accept.
        let listens = matches!(port.endpoint, Endpoint::Listen(_));
        port.link = Some(Link {
            session: Session::new(device, port.log.clone()),
            connection,
            token,
            span,
            watches_write: false,
            paused_until: None,
            speak_by: listens.then(|| Instant::now() + SPEAK_WITHIN),
        });
        self.schedule(id);
    }

    fn connect(&mut self, id: PortId) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        let Endpoint::Connect(connector) = &port.endpoint else {
            return;
        };
        match connector.connect() {
            Ok(socket) => {
                port.connect_error = None;
                port.budget.charge(Instant::now(), price::CONNECTION);
                let connection = Connection::new(socket, port.closing.clone());
                self.open_link(id, connection);
            }
            Err(error @ (Errno::MFILE | Errno::NFILE)) => {
                let delay = port.bar(error);
                self.rest(id, delay);
            }
            Err(error) => {
                port.device.unreachable(port.endpoint.path(), error);
                if port.connect_error.replace(error) != Some(error)
                    && let Some(suppressed) = port.log.pass(Instant::now())
                {
                    let reason = io::Error::from(error);
                    port.span.in_scope(
                        || tracing::info!(%reason, suppressed, "no front-end yet, will try again"),
                    );
                }
                self.retry_later(id);
            }
        }
    }

    fn retry_later(&mut self, id: PortId) {
        if let Some(port) = self.ports.get_mut(&id) {
            let now = Instant::now();
            let owed = port.budget.owed(now).unwrap_or_default();
            let delay = port.reconnect.fail(now).max(owed);
            self.rest(id, delay);
        }
    }

    /// Sets the port's timer to what comes first.
    fn schedule(&mut self, id: PortId) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        let link = port.link.as_ref();
        let of_link = |time: fn(&Link<D>) -> Option<Instant>| link.and_then(time);
        let times = [
            port.rests_until,
            of_link(|link| link.paused_until),
            of_link(|link| link.speak_by),
        ];
        let at = times.into_iter().flatten().min();
        let before = std::mem::replace(&mut port.timer, at);
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.timers.remove(&(before, id));
        }
        if let Some(at) = at {
            self.timers.insert((at, id));
        }
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        while let Some((at, id)) = self.timers.first().copied() {
            if at > now {
                return;
            }
            self.timers.pop_first();
            if let Some(port) = self.ports.get_mut(&id) {
                port.timer = None;
            }
            self.end_rest(id, now);
            self.look_at_link(id, now);
            self.schedule(id);
        }
    }

    /// Lets front-ends in again, or tries to connect again, if it is time.
    fn end_rest(&mut self, id: PortId, now: Instant) {
        let Some(port) = self.ports.get_mut(&id) else {
            return;
        };
        if port.rests_until.is_none_or(|until| until > now) {
            return;
        }
        port.rests_until = None;
        match &port.endpoint {
            Endpoint::Connect(_) => self.connect(id),
            Endpoint::Listen(listener) => {
                let data = EventData::new_u64(port.token);
                if let Err(error) = epoll::modify(&self.epoll, listener, data, EventFlags::IN) {
                    tracing::error!(%error, "can't resume the listener");
                }
            }
        }
    }

    /// Reads a paused front-end again, or ends the session of a silent one, if it is time.
    fn look_at_link(&mut self, id: PortId, now: Instant) {
        let Some(link) = self.ports.get_mut(&id).and_then(|port| port.link.as_mut()) else {
            return;
        };
        let span = link.span.clone();
        let _entered = span.enter();
        let is_due = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        if is_due(link.paused_until) {
            if let Err(error) = link.resume(&self.epoll) {
                self.end_link(id, Some(format!("can't watch the socket: {error}")));
            }
        } else if is_due(link.speak_by) {
            self.end_link(id, Some("the front-end does not speak".to_owned()));
        }
    }

    fn next_timeout(&self) -> Option<Timespec> {
        let (at, _) = self.timers.first()?;
        let wait = at.saturating_duration_since(Instant::now());
        // Seconds are ever asked for, so this can't fail.
        Timespec::try_from(wait).ok()
    }
}

/// The port that a token belongs to.
fn port_of(token: u64) -> Option<PortId> {
    u16::try_from(token & 0xffff).ok().and_then(PortId::new)
}
