//! The types of ringway's control API: what is configured, told, refused, and asked for.
//!
//! ```text
//! ringway, any other client --JSON-RPC--> ringwayd --these types--> Switch
//!                                  ringway.toml --^
//! ```
//!
//! The dataplane takes and returns them, so a setting, a counter or an error is declared once:
//! here, with the text that the JSON schema (`docs/control-api.schema.json`) tells of it. Values
//! are parsed once, by the types of this crate; what has a [`PortName`] has a name that a port can
//! have.
//!
//! Names are snake_case and carry their units. Rx and Tx are from the switch's point of view: what
//! a guest transmits is our Rx. Parameters refuse unknown fields; clients should ignore unknown
//! fields of results, because later versions add some.
#![forbid(unsafe_code)]

mod access;
mod error;
mod event;
mod info;
mod measure;
mod method;
mod port;
mod refusal;
mod schema;
mod switch;
mod value;
mod vlan;

pub use access::{AccountName, SocketAccess, SocketMode};
pub use error::{ApiError, ErrorKind};
pub use event::{Event, Occurrence};
pub use info::{
    AfXdpInfo, AfXdpQueueInfo, DaemonReport, FdbEntry, HeaderAction, PolledQueue, PortCounters,
    PortDetail, PortInfo, PortState, QueueInfo, VlanInfo, WorkerDetail, WorkerInfo,
};
pub use measure::{Drops, PairCounters, PortSample, Sample, WorkerSample};
pub use method::{
    CaptureStart, CaptureStartParams, DaemonInfo, Done, FdbAdd, FdbAddParams, FdbDel, FdbDelParams,
    FdbFlush, FdbFlushParams, FdbFlushResult, FdbList, FdbListParams, FdbListResult, MeasureSample,
    Method, MetricsShow, MetricsShowResult, MonitorStart, NoParams, PortAdd, PortAddParams,
    PortDel, PortDelParams, PortDelResult, PortList, PortListResult, PortSet, PortSetParams,
    PortShow, PortShowParams, VlanList, VlanListResult, WorkerList, WorkerListResult, WorkerPin,
    WorkerPinParams, WorkerShow, WorkerShowParams, WorkerUnpin, WorkerUnpinParams,
    WorkerUnpinResult, method_names,
};
pub use port::{
    AfXdpConfig, OnLoop, Pins, PortConfig, PortKind, SocketSpec, TapConfig, VhostUserConfig,
    XdpMode, kinds_with,
};
pub use refusal::SwitchError;
pub use ringway_bridge::DropReason;
pub use schema::document;
pub use switch::{BalanceConfig, IdleConfig, SwitchConfig};
pub use value::{
    BadValue, BusyPoll, FdbLimit, FloodLimit, GroupFwdMask, IfName, MAX_PORT_NAME, MAX_QUEUE_PAIRS,
    MAX_SOCKET_PATH, Mtu, PortName, QueuePairs, SocketPath, UmemFrames,
};
pub use vlan::{VlanConfig, VlanEthertype, VlanMode, VlanNumbers, VlanTag};
