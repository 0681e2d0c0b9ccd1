//! The server: a thread that accepts, and a thread for each connection.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringway_dataplane::{LogLimit, out_of_fds};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, UCred};

use super::codec::{self, Answer, Handler};
use super::line::{LineError, Lines};
use super::places::{Entry, Places};
use super::reserve::Reserve;
use super::{ControlSocket, MAX_LINE};
use crate::api::{ApiError, ErrorKind};

/// Most connections at a time; one more is told so and closed. An idle connection costs a thread
/// that sleeps and a few KiB.
pub const MAX_CONNECTIONS: usize = 128;

/// Of these, how many only root and the daemon's own user may have: enough for a few operators with
/// a `ringway measure` each.
pub const KEPT_CONNECTIONS: usize = 8;

/// A client that has not finished a request this long after its last answer is dropped. Whoever asks
/// at longer intervals connects again, as [`super::Client`] does.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A client that has not read an answer after this long is dropped.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes given to the kernel at once: its timeout counts per call and buffer.
const WRITE_CHUNK: usize = 16 << 10;

/// Requests that run when the server ends have this long to be answered.
const GRACE: Duration = Duration::from_secs(2);

/// Pause after a failed accept (no fds left), so that it can't spin.
const ACCEPT_BACKOFF: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Lines in 10 s that tell of connections: a command of the tool is one.
const LOG_LINES: u32 = 20;

/// Stack of a connection's thread: requests are flat, so this is plenty.
const STACK: usize = 256 << 10;

/// On what terms clients are served.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// In place of [`WRITE_TIMEOUT`].
    pub write_timeout: Duration,
    /// In place of [`IDLE_TIMEOUT`].
    pub idle_timeout: Duration,
    /// Whether the user with this id is an operator.
    pub is_operator: fn(u32) -> bool,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            write_timeout: WRITE_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            is_operator: |uid| uid == 0 || uid == rustix::process::geteuid().as_raw(),
        }
    }
}

/// A running server; [`Server::shutdown`] or dropping it ends all connections and threads.
#[derive(Debug)]
pub struct Server {
    connections: Arc<Connections>,
    wake: UnixStream,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `socket` with `handler`, whose calls come from many threads.
    ///
    /// # Errors
    /// A thread or a socket can't be made.
    pub fn start(socket: ControlSocket, handler: Arc<Handler>) -> io::Result<Self> {
        Self::start_on(socket, handler, Terms::default())
    }

    /// As [`Server::start`], on other terms than the usual ones.
    ///
    /// # Errors
    /// A thread or a socket can't be made.
    pub fn start_on(
        socket: ControlSocket,
        handler: Arc<Handler>,
        terms: Terms,
    ) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        let connections = Arc::new(Connections {
            places: Mutex::default(),
            closed: Condvar::new(),
            terms,
            log: LogLimit::new(LOG_LINES),
        });
        let shared = Arc::clone(&connections);
        let acceptor = thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_all(&socket, &woken, &shared, &handler))?;
        Ok(Self {
            connections,
            wake,
            acceptor: Some(acceptor),
        })
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.connections.lock().taken()
    }

    /// Waits until no connection is open.
    pub fn wait_until_idle(&self) {
        self.connections.wait_until_none(self.connections.lock());
    }

    /// Stops accepting, removes the socket's file, lets running requests finish for a moment, and
    /// closes all connections. When this returns, no handler runs any more.
    pub fn shutdown(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        let _ = self.wake.shutdown(Shutdown::Both);
        if acceptor.join().is_err() {
            tracing::error!("the thread that accepts connections panicked");
        }
        self.connections.close_all();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The open connections, each with a handle by which to close it.
#[derive(Debug)]
struct Connections {
    places: Mutex<Places<UnixStream>>,
    closed: Condvar,
    terms: Terms,
    /// Of all clients together, who may connect as often as they like.
    log: LogLimit,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Places<UnixStream>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_all(&self) {
        let shut = |places: &Places<UnixStream>, how| {
            for stream in places.handles() {
                let _ = stream.shutdown(how);
            }
        };
        let places = self.lock();
        shut(&places, Shutdown::Read);
        let wait = self
            .closed
            .wait_timeout_while(places, GRACE, |places| !places.is_empty());
        let (places, _) = wait.unwrap_or_else(PoisonError::into_inner);
        shut(&places, Shutdown::Both);
        self.wait_until_none(places);
    }

    fn wait_until_none(&self, places: MutexGuard<'_, Places<UnixStream>>) {
        let none = self.closed.wait_while(places, |places| !places.is_empty());
        drop(none.unwrap_or_else(PoisonError::into_inner));
    }
}

/// A connection's place, which it leaves however its thread ends.
struct Registered {
    connections: Arc<Connections>,
    place: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.lock().leave(self.place);
        self.connections.closed.notify_all();
    }
}

fn accept_all(
    socket: &ControlSocket,
    woken: &UnixStream,
    connections: &Arc<Connections>,
    handler: &Arc<Handler>,
) {
    let mut failing = false;
    let mut reserve = Reserve::default();
    loop {
        reserve.fill(socket.listener().as_fd());
        let mut fds = [
            PollFd::new(woken, PollFlags::IN),
            PollFd::new(socket.listener(), PollFlags::IN),
        ];
        let (watched, timeout) = if failing {
            (&mut fds[..1], Some(&ACCEPT_BACKOFF))
        } else {
            (&mut fds[..], None)
        };
        match poll(watched, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "poll of the control socket failed");
                return;
            }
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        match reserve.open(|| socket.listener().accept()) {
            Ok((stream, _)) => {
                failing = false;
                let admitted = reserve
                    .open(|| stream.try_clone())
                    .and_then(|handle| admit(stream, handle, connections, handler));
                if let Err(error) = admitted
                    && let Some(suppressed) = connections.log.pass(Instant::now())
                {
                    tracing::warn!(%error, suppressed, "a control connection was dropped");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => failing = false,
            Err(error) => {
                if !failing && let Some(suppressed) = connections.log.pass(Instant::now()) {
                    let (error, hint) = out_of_fds(&error)
                        .unwrap_or_else(|| (error.to_string(), "clients wait until it is over"));
                    tracing::warn!(error, hint, suppressed, "can't accept control connections");
                }
                failing = true;
            }
        }
    }
}

fn admit(
    stream: UnixStream,
    handle: UnixStream,
    connections: &Arc<Connections>,
    handler: &Arc<Handler>,
) -> io::Result<()> {
    // Who is at the other end (SO_PEERCRED: as of their connect).
    let peer = rustix::net::sockopt::socket_peercred(stream.as_fd()).ok();
    let span = span_of(peer.as_ref());
    let is_operator = peer.is_some_and(|peer| (connections.terms.is_operator)(peer.uid.as_raw()));
    let Some(place) = take_place(handle, connections, is_operator) else {
        if let Some(suppressed) = connections.log.pass(Instant::now()) {
            span.in_scope(|| tracing::warn!(suppressed, "refused: too many connections"));
        }
        return refuse(&stream, is_operator);
    };
    let registered = Registered {
        connections: Arc::clone(connections),
        place,
    };
    let handler = Arc::clone(handler);
    thread::Builder::new()
        .name("control-conn".into())
        .stack_size(STACK)
        .spawn(move || {
            let registered = registered;
            span.in_scope(|| serve(&stream, &*handler, &registered));
            drop(handler);
            drop(registered);
        })?;
    Ok(())
}

/// A place for a client, if it may have one. Who has to go for it is told why.
fn take_place(handle: UnixStream, connections: &Connections, is_operator: bool) -> Option<u64> {
    let mut places = connections.lock();
    match places.enter(handle, is_operator, Instant::now()) {
        Entry::Admitted(place) => Some(place),
        Entry::Full => None,
        Entry::Instead { place, leaves } => {
            if let Some(idle) = places.handle(leaves) {
                say_last(idle, &idle_for_an_operator());
                // Its thread finds the end of its requests.
                let _ = idle.shutdown(Shutdown::Both);
            }
            Some(place)
        }
    }
}

fn span_of(peer: Option<&UCred>) -> tracing::Span {
    match peer {
        Some(peer) => tracing::info_span!(
            "control",
            pid = peer.pid.as_raw_nonzero().get(),
            uid = peer.uid.as_raw(),
            gid = peer.gid.as_raw()
        ),
        None => tracing::info_span!("control"),
    }
}

/// Tells a client that there is no place for it.
fn refuse(stream: &UnixStream, is_operator: bool) -> io::Result<()> {
    let (places, hint) = if is_operator {
        let hint =
            "each of them waits for an answer: try again, or end clients that `ss -xp` shows";
        (MAX_CONNECTIONS, hint)
    } else {
        let hint = "close other clients of the control socket (`ss -xp` shows them) and try again, \
                    or ask as root: a few connections are kept for it";
        (MAX_CONNECTIONS - KEPT_CONNECTIONS, hint)
    };
    let what = format!("all {places} control connections are taken");
    say_last(
        stream,
        &ApiError::new(ErrorKind::TooManyConnections, what, hint),
    );
    Ok(())
}

/// Says why a connection ends. Who does not read it, does not get it: it does not wait.
pub(super) fn say_last(stream: &UnixStream, error: &ApiError) {
    let mut line = codec::error_line(error);
    line.push('\n');
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = rustix::net::send(stream, line.as_bytes(), flags);
}

fn serve(stream: &UnixStream, handler: &Handler, registered: &Registered) {
    let (connections, place) = (&*registered.connections, registered.place);
    let (terms, log) = (&connections.terms, &connections.log);
    if let Some(suppressed) = log.pass(Instant::now()) {
        tracing::info!(suppressed, "connected");
    }
    let reader = Patient {
        stream,
        deadline: Instant::now() + terms.idle_timeout,
    };
    let mut lines = Lines::new(reader, MAX_LINE);
    loop {
        let Answer { line, stream: feed } = match lines.next_line() {
            Ok(Some(_)) if !connections.lock().begin(place) => break,
            Ok(Some(line)) => codec::answer(line, handler),
            Ok(None) => break,
            Err(LineError::TooLong { max }) => {
                if let Some(suppressed) = log.pass(Instant::now()) {
                    tracing::warn!(suppressed, "dropped: sent a line of more than {max} bytes");
                }
                let _ = send(
                    stream,
                    codec::error_line(&too_long(max)),
                    terms.write_timeout,
                );
                break;
            }
            Err(LineError::Io(error)) if is_timeout(&error) => {
                tracing::debug!("dropped: idle");
                say_last(stream, &idle(terms.idle_timeout));
                break;
            }
            Err(LineError::Io(error)) => {
                tracing::debug!(%error, "read failed");
                break;
            }
        };
        if let Some(response) = line
            && let Err(error) = send(stream, response, terms.write_timeout)
        {
            if let Some(suppressed) = log.pass(Instant::now()) {
                tracing::warn!(%error, suppressed, "dropped: does not read its answers");
            }
            break;
        }
        let now = Instant::now();
        if !connections.lock().answered(place, now) {
            break;
        }
        if let Some(feed) = feed {
            // Who takes nothing is idle, so that an operator may have the place of a client that
            // sleeps.
            let keep = || connections.lock().answered(place, Instant::now());
            feed.carry(stream, keep);
            break;
        }
        lines.get_mut().deadline = now + terms.idle_timeout;
    }
    tracing::debug!("disconnected");
}

/// A client's requests, until it has not finished one for too long: single bytes put nothing off.
struct Patient<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut stream = self.stream;
        stream.read(buffer)
    }
}

/// A receive timeout of a socket shows as EAGAIN.
fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
    )
}

fn idle(timeout: Duration) -> ApiError {
    ApiError::new(
        ErrorKind::Idle,
        format!("no request within {} s", timeout.as_secs_f64()),
        "connect again for the next request; the connection is closed",
    )
}

fn idle_for_an_operator() -> ApiError {
    ApiError::new(
        ErrorKind::Idle,
        format!("all {MAX_CONNECTIONS} control connections were taken, and this one idle"),
        "connect again for the next request; the connection is closed",
    )
}

fn too_long(max: usize) -> ApiError {
    ApiError::new(
        ErrorKind::LineTooLong,
        format!("a line of more than {max} bytes"),
        "send one request on each line; the connection is closed",
    )
}

/// Writes all of `response` and a newline within `timeout`.
fn send(mut stream: &UnixStream, mut response: String, timeout: Duration) -> io::Result<()> {
    response.push('\n');
    let deadline = Instant::now() + timeout;
    let mut rest = response.as_bytes();
    while !rest.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_write_timeout(Some(left))?;
        let (chunk, _) = rest.split_at(rest.len().min(WRITE_CHUNK));
        match stream.write(chunk) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
