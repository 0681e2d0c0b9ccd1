//! The server: a thread that accepts, and a thread for each connection.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringway_dataplane::LogLimit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::codec::{self, Handler};
use super::line::{LineError, Lines};
use super::{ControlSocket, MAX_LINE};
use crate::api::{ApiError, ErrorKind};

/// Most connections at a time; one more is told so and closed. An idle connection costs a thread
/// that sleeps and a few KiB.
pub const MAX_CONNECTIONS: usize = 128;

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
        Self::start_with_timeout(socket, handler, WRITE_TIMEOUT)
    }

    /// As [`Server::start`], with another time than [`WRITE_TIMEOUT`].
    ///
    /// # Errors
    /// A thread or a socket can't be made.
    pub fn start_with_timeout(
        socket: ControlSocket,
        handler: Arc<Handler>,
        write_timeout: Duration,
    ) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        let connections = Arc::new(Connections {
            table: Mutex::default(),
            closed: Condvar::new(),
            write_timeout,
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
        self.connections.lock().open.len()
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
    table: Mutex<OpenConnections>,
    closed: Condvar,
    write_timeout: Duration,
    /// Of all clients together, who may connect as often as they like.
    log: LogLimit,
}

#[derive(Debug, Default)]
struct OpenConnections {
    open: BTreeMap<u64, UnixStream>,
    next: u64,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, OpenConnections> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close_all(&self) {
        let shut = |table: &OpenConnections, how| {
            for stream in table.open.values() {
                let _ = stream.shutdown(how);
            }
        };
        let table = self.lock();
        shut(&table, Shutdown::Read);
        let wait = self
            .closed
            .wait_timeout_while(table, GRACE, |table| !table.open.is_empty());
        let (table, _) = wait.unwrap_or_else(PoisonError::into_inner);
        shut(&table, Shutdown::Both);
        self.wait_until_none(table);
    }

    fn wait_until_none(&self, table: MutexGuard<'_, OpenConnections>) {
        let none = self
            .closed
            .wait_while(table, |table| !table.open.is_empty());
        drop(none.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Takes its connection out of the table, however its thread ends.
struct Registered {
    connections: Arc<Connections>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.lock().open.remove(&self.id);
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
    loop {
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
        match socket.listener().accept() {
            Ok((stream, _)) => {
                failing = false;
                if let Err(error) = admit(stream, connections, handler)
                    && let Some(suppressed) = connections.log.pass(Instant::now())
                {
                    tracing::warn!(%error, suppressed, "a control connection was dropped");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => failing = false,
            Err(error) => {
                if !failing && let Some(suppressed) = connections.log.pass(Instant::now()) {
                    tracing::warn!(%error, suppressed, "can't accept control connections");
                }
                failing = true;
            }
        }
    }
}

fn admit(
    stream: UnixStream,
    connections: &Arc<Connections>,
    handler: &Arc<Handler>,
) -> io::Result<()> {
    let span = span_of(&stream);
    let registered = {
        let mut table = connections.lock();
        if table.open.len() >= MAX_CONNECTIONS {
            drop(table);
            span.in_scope(|| tracing::debug!("refused: too many connections"));
            return refuse(&stream);
        }
        let id = table.next;
        table.next += 1;
        table.open.insert(id, stream.try_clone()?);
        Registered {
            connections: Arc::clone(connections),
            id,
        }
    };
    let handler = Arc::clone(handler);
    thread::Builder::new()
        .name("control-conn".into())
        .stack_size(STACK)
        .spawn(move || {
            let registered = registered;
            span.in_scope(|| serve(&stream, &*handler, &registered.connections));
            drop(handler);
            drop(registered);
        })?;
    Ok(())
}

/// A span with who is at the other end (SO_PEERCRED: as of their connect).
fn span_of(stream: &UnixStream) -> tracing::Span {
    match rustix::net::sockopt::socket_peercred(stream.as_fd()) {
        Ok(peer) => tracing::info_span!(
            "control",
            pid = peer.pid.as_raw_nonzero().get(),
            uid = peer.uid.as_raw(),
            gid = peer.gid.as_raw()
        ),
        Err(_) => tracing::info_span!("control"),
    }
}

/// One line into an empty socket buffer: it can't block.
fn refuse(mut stream: &UnixStream) -> io::Result<()> {
    let error = ApiError::new(
        ErrorKind::TooManyConnections,
        format!("all {MAX_CONNECTIONS} control connections are taken"),
        "close other clients of the control socket, then try again",
    );
    let mut line = codec::error_line(&error);
    line.push('\n');
    stream.set_nonblocking(true)?;
    stream.write_all(line.as_bytes())
}

fn serve(stream: &UnixStream, handler: &Handler, connections: &Connections) {
    let Connections {
        write_timeout, log, ..
    } = connections;
    if let Some(suppressed) = log.pass(Instant::now()) {
        tracing::info!(suppressed, "connected");
    }
    let mut lines = Lines::new(stream, MAX_LINE);
    loop {
        let response = match lines.next_line() {
            Ok(Some(line)) => codec::answer(line, handler),
            Ok(None) => break,
            Err(LineError::TooLong { max }) => {
                if let Some(suppressed) = log.pass(Instant::now()) {
                    tracing::warn!(suppressed, "dropped: sent a line of more than {max} bytes");
                }
                let _ = send(stream, codec::error_line(&too_long(max)), *write_timeout);
                break;
            }
            Err(LineError::Io(error)) => {
                tracing::debug!(%error, "read failed");
                break;
            }
        };
        if let Some(response) = response
            && let Err(error) = send(stream, response, *write_timeout)
        {
            if let Some(suppressed) = log.pass(Instant::now()) {
                tracing::warn!(%error, suppressed, "dropped: does not read its answers");
            }
            break;
        }
    }
    tracing::debug!("disconnected");
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
