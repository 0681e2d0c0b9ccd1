//! The client: one call at a time, each with a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::line::{LineError, Lines};
use crate::api::{ErrorKind, Method};

/// Longest answer taken: a forwarding database of a million entries is half of it.
const MAX_ANSWER: usize = 256 << 20;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody is there, or the connection broke.
    #[error("can't reach the daemon at {path}: {source}")]
    Unreachable {
        /// The control socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No answer in time.
    #[error("no answer from the daemon at {path} within {} s", timeout.as_secs_f64())]
    Timeout {
        /// The control socket.
        path: PathBuf,
        /// How long was waited.
        timeout: Duration,
    },
    /// The daemon refused.
    #[error("{message}")]
    Refused {
        /// The JSON-RPC error code.
        code: i64,
        /// What kind of error, as in [`crate::api::ErrorKind`]; empty if the daemon told none.
        kind: String,
        /// What.
        message: String,
        /// What to do; empty if the daemon told nothing.
        hint: String,
    },
    /// What came is no answer to the call.
    #[error("{path} does not answer like ringwayd: {reason}")]
    Garbled {
        /// The control socket.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    lines: Lines<Deadlined>,
    path: PathBuf,
    timeout: Duration,
    next_id: u64,
}

#[derive(Serialize)]
struct Call<'a, P> {
    jsonrpc: &'static str,
    id: u64,
    method: &'static str,
    params: &'a P,
}

#[derive(Deserialize)]
struct CallAnswer<'a> {
    id: Option<u64>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<CallRefusal>,
}

#[derive(Deserialize)]
struct CallRefusal {
    code: i64,
    message: String,
    #[serde(default)]
    data: CallRefusalData,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CallRefusalData {
    kind: String,
    hint: String,
}

impl Client {
    /// Connects to the control socket at `path`; each call may take up to `timeout`.
    ///
    /// # Errors
    /// Nobody listens, or nobody accepts in time.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, CallError> {
        Ok(Self {
            lines: open(path, timeout)?,
            path: path.to_owned(),
            timeout,
            next_id: 1,
        })
    }

    /// Calls `M` and waits for its result. If the daemon has closed the connection since the last
    /// call, for it was idle, it connects again. After any error but [`CallError::Refused`] the
    /// connection is of no more use.
    ///
    /// # Errors
    /// The daemon refused, went away, or did not answer in time.
    pub fn call<M: Method>(&mut self, params: &M::Params) -> Result<M::Result, CallError> {
        match self.call_once::<M>(params) {
            // The daemon says that it did not carry the call out.
            Err(CallError::Refused { code, .. }) if code == i64::from(ErrorKind::Idle.code()) => {
                self.lines = open(&self.path, self.timeout)?;
                self.call_once::<M>(params)
            }
            answer => answer,
        }
    }

    /// Calls `M`, which turns the connection into a stream.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn stream<M: Method>(mut self, params: &M::Params) -> Result<Notifications, CallError> {
        self.call::<M>(params)?;
        Ok(Notifications(self))
    }

    /// Calls `M`, which turns the connection into a stream of bytes. Returns it with the first
    /// ones.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn bytes<M: Method>(
        mut self,
        params: &M::Params,
    ) -> Result<(UnixStream, Vec<u8>), CallError> {
        self.call::<M>(params)?;
        let (reader, first) = self.lines.into_parts();
        Ok((reader.stream, first))
    }

    fn call_once<M: Method>(&mut self, params: &M::Params) -> Result<M::Result, CallError> {
        let id = self.next_id;
        self.next_id += 1;
        let request = Call {
            jsonrpc: "2.0",
            id,
            method: M::NAME,
            params,
        };
        let mut line = serde_json::to_string(&request).map_err(|e| self.garbled(e.to_string()))?;
        line.push('\n');
        self.lines.get_mut().deadline = Instant::now() + self.timeout;
        let sent = self.lines.get_mut().send(line.as_bytes());
        // A server that refuses the connection says why before it hangs up: read that first.
        let answer = match self.lines.next_line() {
            Ok(Some(line)) => line,
            Ok(None) => {
                let ended = io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up");
                let error = sent.err().unwrap_or(ended);
                return Err(failure(&self.path, self.timeout, error));
            }
            Err(LineError::Io(error)) => return Err(failure(&self.path, self.timeout, error)),
            Err(error @ LineError::TooLong { .. }) => return Err(self.garbled(error.to_string())),
        };
        read_answer::<M>(&self.path, answer, id)
    }

    fn garbled(&self, reason: String) -> CallError {
        CallError::Garbled {
            path: self.path.clone(),
            reason,
        }
    }
}

/// What the server sends without being asked.
#[derive(Debug)]
pub struct Notifications(Client);

#[derive(Deserialize)]
struct Notification<'a> {
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    error: Option<CallRefusal>,
}

impl Notifications {
    /// The connection: readable when there is something, or the server hung up.
    pub fn socket(&self) -> &UnixStream {
        &self.0.lines.get_ref().stream
    }

    /// Whether [`Notifications::receive`] returns at once.
    pub fn is_here(&self) -> bool {
        self.0.lines.has_line()
    }

    /// The parameters of the next notification, once it begins to arrive.
    ///
    /// # Errors
    /// The server hung up, said why it is about to, or does not send the rest in time.
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<T, CallError> {
        let client = &mut self.0;
        client.lines.get_mut().deadline = Instant::now() + client.timeout;
        let (path, timeout) = (client.path.clone(), client.timeout);
        let garbled = |reason: String| CallError::Garbled {
            path: path.clone(),
            reason,
        };
        let line = match client.lines.next_line() {
            Ok(Some(line)) => line,
            Ok(None) => {
                let ended = io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up");
                return Err(failure(&path, timeout, ended));
            }
            Err(LineError::Io(error)) => return Err(failure(&path, timeout, error)),
            Err(error @ LineError::TooLong { .. }) => return Err(garbled(error.to_string())),
        };
        let notification: Notification<'_> =
            serde_json::from_slice(line).map_err(|error| garbled(error.to_string()))?;
        if let Some(error) = notification.error {
            return Err(error.into());
        }
        let params = notification
            .params
            .ok_or_else(|| garbled("no notification".into()))?;
        serde_json::from_str(params.get()).map_err(|error| garbled(error.to_string()))
    }
}

impl From<CallRefusal> for CallError {
    fn from(error: CallRefusal) -> Self {
        Self::Refused {
            code: error.code,
            kind: error.data.kind,
            message: error.message,
            hint: error.data.hint,
        }
    }
}

fn open(path: &Path, timeout: Duration) -> Result<Lines<Deadlined>, CallError> {
    let stream = connect(path, timeout).map_err(|error| failure(path, timeout, error))?;
    let reader = Deadlined {
        stream,
        deadline: Instant::now(),
    };
    Ok(Lines::new(reader, MAX_ANSWER))
}

fn read_answer<M: Method>(path: &Path, line: &[u8], id: u64) -> Result<M::Result, CallError> {
    let garbled = |reason: String| CallError::Garbled {
        path: path.to_owned(),
        reason,
    };
    let response: CallAnswer<'_> =
        serde_json::from_slice(line).map_err(|error| garbled(error.to_string()))?;
    match response {
        CallAnswer {
            error: Some(error), ..
        } => Err(error.into()),
        CallAnswer {
            id: Some(answered),
            result: Some(result),
            ..
        } if answered == id => {
            serde_json::from_str(result.get()).map_err(|error| garbled(error.to_string()))
        }
        _ => Err(garbled("neither result nor error".into())),
    }
}

fn failure(path: &Path, timeout: Duration, error: io::Error) -> CallError {
    let path = path.to_owned();
    match error.kind() {
        // A receive or send timeout of the socket shows as EAGAIN.
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => CallError::Timeout { path, timeout },
        _ => CallError::Unreachable {
            path,
            source: error,
        },
    }
}

/// Connects, and waits at most `timeout` for a place in the listener's backlog.
pub(super) fn connect(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    Ok(socket.into())
}

/// A stream whose reads and writes end at a deadline.
#[derive(Debug)]
struct Deadlined {
    stream: UnixStream,
    deadline: Instant,
}

impl Deadlined {
    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        self.stream.write_all(bytes)
    }
}

impl Read for Deadlined {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.left()?))?;
        self.stream.read(buffer)
    }
}
