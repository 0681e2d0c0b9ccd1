//! Guest memory, virtqueues, vhost-user sessions, ports and poll-mode workers.

mod burst;
mod burst_lock;
mod copy;
mod housekeeping;
mod info;
mod isa;
mod memory;
mod offload;
mod placement;
mod port;
mod ring;
mod switch;
mod topology;
mod vhost_user;
mod wake;
mod wire;
mod worker;

pub use info::{
    AfXdpInfo, AfXdpQueueInfo, FdbEntryInfo, HeaderAction, PairCounters, PolledQueue, PortCounters,
    PortDetail, PortInfo, PortState, QueueInfo, WorkerDetail, WorkerInfo,
};
pub use isa::isa_level;
pub use ringway_api::{
    AfXdpConfig, BalanceConfig, IdleConfig, MAX_PORT_NAME, MAX_QUEUE_PAIRS, PortConfig, PortKind,
    PortName, PortNameError, QueuePairs, SocketSpec, SwitchConfig, SwitchError, UmemFrames,
    XdpMode,
};
pub use switch::{InlineSwitch, Switch};
#[doc(hidden)]
pub use wire::checksum::{copy_and_checksum, internet_checksum};
