//! Guest memory, virtqueues, vhost-user sessions, ports and poll-mode workers.
//!
//! ```text
//!  Switch -- commands --> worker: per queue and burst
//!    |                      receive   guest ring | tap | NIC queue
//!    |                      decide    ringway_bridge::Bridge
//!    |                      deliver   guest rings | taps | NIC queues, one copy
//!    +-- sockets --> vhost-user session thread: maps guest memory, starts and stops rings
//! ```
//! A [`Switch`] is all that a control plane needs; its types are those of `ringway-api`. Which
//! module may import which, and where `unsafe` is, is in docs/architecture.md.
//!
//! The feature `af-xdp`, on by default, has ports on a NIC's queues; it takes libxdp and libbpf,
//! which are C.
#![deny(unsafe_code)]
#![cfg_attr(
    not(feature = "af-xdp"),
    allow(
        dead_code,
        unused_imports,
        reason = "some of it serves AF_XDP ports alone"
    )
)]

mod backoff;
mod burst;
mod burst_lock;
mod call;
mod capture;
mod clock;
mod cpus;
mod events;
mod fd_limit;
mod housekeeping;
mod isa;
mod link;
mod log_limit;
mod memory;
mod netlink;
mod offload;
mod placement;
mod port;
mod ring;
mod socket_file;
mod switch;
mod topology;
mod vhost_user;
mod wake;
mod wire;
mod worker;

pub use capture::{CapturedFrame, Direction};
pub use cpus::{allowed_cpus, pin_to_cpu};
pub use events::EventReader;
pub use fd_limit::out_of_fds;
pub use isa::isa_level;
pub use log_limit::LogLimit;
pub use port::awaited;
pub use socket_file::SocketFile;
#[cfg(any(test, feature = "inline"))]
pub use switch::InlineSwitch;
pub use switch::{CaptureReader, Switch};
pub use wake::Heartbeat;
#[cfg(feature = "inline")]
pub use wire::checksum::{copy_and_checksum, internet_checksum};
