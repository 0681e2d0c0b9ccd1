//! Guest memory, virtqueues, vhost-user sessions, ports and poll-mode workers.

pub mod driver;
mod info;
mod memory;
mod switch;
#[expect(dead_code, unused_imports, reason = "wired up next")]
mod vhost_user;

pub use info::{
    FdbEntryInfo, PairCounters, PortCounters, PortDetail, PortInfo, PortState, QueueInfo,
    WorkerInfo,
};
pub use switch::{
    IdleConfig, MAX_PORT_NAME, MAX_QUEUE_PAIRS, PortConfig, PortKind, PortName, PortNameError,
    QueuePairs, SocketSpec, Switch, SwitchConfig, SwitchError,
};
