//! JSON-RPC 2.0 over a Unix stream socket, one message or batch a line.
//!
//! ```text
//! bytes --Lines--> line --codec::answer--> response line        (no I/O in the codec)
//! ```
//!
//! Requests of one connection are answered in order. A request may turn its connection into a
//! [`Stream`]: then the server alone speaks, until the client hangs up. Nothing that a client sends
//! costs more than the limits named here; a client that breaks one loses its connection only.

mod client;
mod codec;
mod line;
mod places;
mod reserve;
mod server;
mod socket;
mod stream;

pub use client::{CallError, Client, Notifications};
pub(crate) use codec::describe;
pub use codec::{Answer, Handler, MAX_BATCH, MAX_BATCH_RESPONSE, Reply, answer, error_line};
pub use line::{LineError, Lines};
pub use server::{IDLE_TIMEOUT, KEPT_CONNECTIONS, MAX_CONNECTIONS, Server, Terms, WRITE_TIMEOUT};
pub use socket::{BindError, ControlSocket};
pub use stream::Stream;

/// Longest request line, in bytes without the newline: a batch of [`MAX_BATCH`] of the longest
/// sensible requests is a tenth of it.
pub const MAX_LINE: usize = 1 << 20;
