//! What goes over the control socket: methods, their parameters and results, and error kinds.
//!
//! Names are snake_case and carry their units. Rx and Tx are from the switch's point of view: what
//! a guest transmits is our Rx. Parameters refuse unknown fields; clients should ignore unknown
//! fields of results, because later versions add some.

mod error;
mod measure;
mod method;
mod port;
mod schema;
mod state;

pub use error::{ApiError, ErrorKind};
pub use measure::{Drops, PairSample, PortSample, Sample, WorkerSample};
pub(crate) use method::names as method_names;
pub use method::{
    DaemonInfo, FdbAdd, FdbDel, FdbFlush, FdbList, MeasureSample, Method, PortAdd, PortDel,
    PortList, PortShow, WorkerList, WorkerPin, WorkerShow, WorkerUnpin,
};
pub(crate) use port::check_socket_path;
pub use port::{
    DEFAULT_TAP_QUEUES, DEFAULT_VHOST_USER_QUEUES, KindName, MAX_MTU, MIN_MTU, ModeName,
    PortSettings, SettingError,
};
pub use schema::document;
pub use state::{
    AfXdpQueueReport, AfXdpReport, Counters, DaemonReport, Done, FdbAddParams, FdbDelParams,
    FdbEntry, FdbFlushParams, FdbFlushResult, FdbListParams, FdbListResult, HeaderActionReport,
    NoParams, PolledQueueReport, PortAddParams, PortDelParams, PortDelResult, PortListResult,
    PortReport, PortShowParams, PortShowResult, PortState, QueueReport, WorkerListResult,
    WorkerPinParams, WorkerReport, WorkerShowParams, WorkerShowResult, WorkerUnpinParams,
    WorkerUnpinResult,
};
