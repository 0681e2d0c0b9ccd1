//! The list of methods: name, parameters, result and one sentence each.

use ringway_bridge::MacAddr;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::info::{
    DaemonReport, FdbEntry, PortDetail, PortInfo, VlanInfo, WorkerDetail, WorkerInfo,
};
use crate::measure::Sample;
use crate::port::PortConfig;
use crate::value::PortName;
use crate::vlan::{VlanConfig, VlanTag};

/// A method of the control API.
pub trait Method {
    /// Its name on the wire.
    const NAME: &'static str;
    /// One sentence for the schema document.
    const ABOUT: &'static str;
    /// Its parameters: an object, by name.
    type Params: Serialize + DeserializeOwned + JsonSchema;
    /// Its result: an object.
    type Result: Serialize + DeserializeOwned + JsonSchema;
}

macro_rules! methods {
    ($($name:ident = $wire:literal ($params:ty) -> $result:ty: $about:literal;)*) => {
        $(
            #[doc = concat!("`", $wire, "`: ", $about)]
            #[derive(Debug)]
            pub enum $name {}

            impl Method for $name {
                const NAME: &'static str = $wire;
                const ABOUT: &'static str = $about;
                type Params = $params;
                type Result = $result;
            }
        )*

        /// Shows `visitor` every method, in the order of the list.
        pub(crate) fn for_each(visitor: &mut crate::schema::Visitor<'_>) {
            $(visitor.method::<$name>();)*
        }

        /// The names of all methods.
        pub fn method_names() -> &'static [&'static str] {
            &[$($wire),*]
        }
    };
}

methods! {
    PortAdd = "port.add" (PortAddParams) -> PortInfo:
        "Adds a port; it forwards as soon as its guest or interface is ready.";
    PortDel = "port.del" (PortDelParams) -> PortDelResult:
        "Removes a port: afterwards its socket, interface and memory are gone.";
    PortList = "port.list" (NoParams) -> PortListResult:
        "All ports, by name.";
    PortShow = "port.show" (PortShowParams) -> PortDetail:
        "One port with its queue pairs and session.";
    PortSet = "port.set" (PortSetParams) -> PortInfo:
        "Changes settings of a port; what is not given stays.";
    VlanList = "vlan.list" (NoParams) -> VlanListResult:
        "Which ports are in which VLAN.";
    FdbList = "fdb.list" (FdbListParams) -> FdbListResult:
        "The forwarding database, by address.";
    FdbAdd = "fdb.add" (FdbAddParams) -> Done:
        "Adds a static entry, or makes a learned one static.";
    FdbDel = "fdb.del" (FdbDelParams) -> Done:
        "Deletes an entry, static or learned.";
    FdbFlush = "fdb.flush" (FdbFlushParams) -> FdbFlushResult:
        "Forgets learned entries: all, or those of a port, a VLAN, an address.";
    WorkerList = "worker.list" (NoParams) -> WorkerListResult:
        "All workers, by number.";
    WorkerShow = "worker.show" (WorkerShowParams) -> WorkerDetail:
        "One worker with the queue pairs that it polls.";
    WorkerPin = "worker.pin" (WorkerPinParams) -> Done:
        "Has a worker poll a queue pair, whatever its load; no frame is lost.";
    WorkerUnpin = "worker.unpin" (WorkerUnpinParams) -> WorkerUnpinResult:
        "Leaves it to the daemon again which worker polls a queue pair.";
    MeasureSample = "measure.sample" (NoParams) -> Sample:
        "All counters at one moment; two samples make an interval.";
    MonitorStart = "monitor.start" (NoParams) -> Done:
        "Turns the connection into a stream of events, until the client hangs up.";
    MetricsShow = "metrics.show" (NoParams) -> MetricsShowResult:
        "All counters of one moment, in the text format of Prometheus.";
    CaptureStart = "capture.start" (CaptureStartParams) -> Done:
        "Turns the connection into a stream of frames of some ports: a pcapng file follows the answer. \
         Shut the connection down for writing to have its end.";
    DaemonInfo = "daemon.info" (NoParams) -> DaemonReport:
        "Version, process and uptime of the daemon.";
}

/// No parameters: absent or `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

/// Nothing to tell but success: `{}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// Parameters of `port.add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortAddParams {
    /// The new port's name: 1 to 63 of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
    pub name: PortName,
    /// Its settings.
    pub config: PortConfig,
}

/// Parameters of `port.del`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct PortDelParams {
    /// The port.
    pub name: PortName,
    /// Succeed also if there is no such port.
    #[cfg_attr(feature = "clap", arg(long))]
    #[serde(default)]
    pub if_exists: bool,
}

/// Result of `port.del`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortDelResult {
    /// Whether there was such a port.
    pub deleted: bool,
}

/// Parameters of `port.show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct PortShowParams {
    /// The port.
    pub name: PortName,
}

/// Parameters of `port.set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSetParams {
    /// The port.
    pub name: PortName,
    /// The VLANs that it is in from now on, all that is said of them; `{}` says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanConfig>,
}

/// Result of `vlan.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VlanListResult {
    /// VLANs with the same ports together, by number; none if no port says which it is in.
    pub vlans: Vec<VlanInfo>,
}

/// Parameters of `capture.start`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CaptureStartParams {
    /// The ports: at least one.
    pub ports: Vec<PortName>,
    /// Most bytes that are kept of each frame; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snap_bytes: Option<u32>,
    /// Which frames, as pcap-filter(7) says it; absent for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

/// Result of `port.list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PortListResult {
    /// The ports, by name.
    pub ports: Vec<PortInfo>,
}

/// Parameters of `fdb.list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct FdbListParams {
    /// Only those of this port.
    #[cfg_attr(feature = "clap", arg(long, value_name = "PORT"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortName>,
    /// Only those in this VLAN.
    #[cfg_attr(feature = "clap", arg(long, value_name = "VLAN"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTag>,
}

/// Result of `fdb.list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct FdbListResult {
    /// The entries, by address.
    pub entries: Vec<FdbEntry>,
}

/// Parameters of `fdb.add`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct FdbAddParams {
    /// The address, as 52:54:00:00:00:01.
    pub mac: MacAddr,
    /// The port behind which it is.
    pub port: PortName,
    /// The VLAN in which it is there [default: that of the port's untagged frames].
    #[cfg_attr(feature = "clap", arg(long, value_name = "VLAN"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTag>,
}

/// Parameters of `fdb.del`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct FdbDelParams {
    /// The address, as 52:54:00:00:00:01.
    pub mac: MacAddr,
    /// The VLAN in which it is; needed if it is in several.
    #[cfg_attr(feature = "clap", arg(long, value_name = "VLAN"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTag>,
}

/// Parameters of `fdb.flush`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct FdbFlushParams {
    /// Only those of this port.
    #[cfg_attr(feature = "clap", arg(long, value_name = "PORT"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortName>,
    /// Only those in this VLAN.
    #[cfg_attr(feature = "clap", arg(long, value_name = "VLAN"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTag>,
    /// Only those of this address.
    #[cfg_attr(feature = "clap", arg(long, value_name = "MAC"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
}

/// Result of `fdb.flush`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FdbFlushResult {
    /// How many learned entries were forgotten.
    pub flushed: u64,
}

/// Parameters of `worker.pin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct WorkerPinParams {
    /// The port.
    pub port: PortName,
    /// Number of the queue pair, from 0.
    pub queue: u16,
    /// Number of the worker.
    pub worker: u16,
}

/// Parameters of `worker.unpin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
#[serde(deny_unknown_fields)]
pub struct WorkerUnpinParams {
    /// The port.
    pub port: PortName,
    /// Number of the queue pair, from 0.
    pub queue: u16,
}

/// Result of `worker.unpin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerUnpinResult {
    /// Whether the queue pair was pinned.
    pub was_pinned: bool,
}

/// Result of `worker.list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerListResult {
    /// The workers, by number.
    pub workers: Vec<WorkerInfo>,
}

/// Result of `metrics.show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MetricsShowResult {
    /// The text, version 0.0.4 of the format.
    pub text: String,
}

/// Parameters of `worker.show`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkerShowParams {
    /// The worker's number.
    pub index: u16,
}
