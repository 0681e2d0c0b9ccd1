//! The control plane of ringway: the daemon `ringwayd` and the operator's tool `ringway`.
//!
//! ```text
//! ringway (cli) --- rpc::Client ---\ Unix socket, one JSON-RPC 2.0 message a line
//!                                   >--- rpc::Server --- daemon::Service --- Switch
//! any other client ----------------/                 ringwayd (daemon, config)
//! ```
//!
//! - [`api`] is what goes over the socket: methods, parameters, results, error kinds. Its schema is
//!   `docs/control-api.schema.json`.
//! - [`rpc`] carries it: codec, server, client. It knows no method.
//! - [`config`] reads the daemon's TOML file.
//! - [`auto`] makes ports of the sockets in a directory.
//! - [`metrics`] writes what is counted for Prometheus, and serves it over HTTP.
//! - [`daemon`] and [`cli`] are the two programs.
#![forbid(unsafe_code)]

pub mod auto;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod metrics;
pub mod rpc;
pub mod schema;
mod suggest;
mod thread;
mod usage;

pub use ringway_api as api;
