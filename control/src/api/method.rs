//! The list of methods: name, parameters, result and one sentence each.

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::measure::Sample;
use super::state::{
    DaemonReport, Done, FdbAddParams, FdbDelParams, FdbFlushParams, FdbFlushResult, FdbListParams,
    FdbListResult, NoParams, PortAddParams, PortDelParams, PortDelResult, PortListResult,
    PortReport, PortShowParams, PortShowResult, WorkerListResult, WorkerPinParams,
    WorkerShowParams, WorkerShowResult, WorkerUnpinParams, WorkerUnpinResult,
};

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

        /// Calls `visit` for every method, in the order of the list.
        pub(super) fn for_each(visit: &mut super::schema::Visitor<'_>) {
            $(visit.method::<$name>();)*
        }

        /// The names of all methods.
        pub(crate) fn names() -> &'static [&'static str] {
            &[$($wire),*]
        }
    };
}

methods! {
    PortAdd = "port.add" (PortAddParams) -> PortReport:
        "Adds a port; it forwards as soon as its guest or interface is ready.";
    PortDel = "port.del" (PortDelParams) -> PortDelResult:
        "Removes a port: afterwards its socket, interface and memory are gone.";
    PortList = "port.list" (NoParams) -> PortListResult:
        "All ports, by name.";
    PortShow = "port.show" (PortShowParams) -> PortShowResult:
        "One port with its queue pairs and session.";
    FdbList = "fdb.list" (FdbListParams) -> FdbListResult:
        "The forwarding database, by address.";
    FdbAdd = "fdb.add" (FdbAddParams) -> Done:
        "Adds a static entry, or makes a learned one static.";
    FdbDel = "fdb.del" (FdbDelParams) -> Done:
        "Deletes an entry, static or learned.";
    FdbFlush = "fdb.flush" (FdbFlushParams) -> FdbFlushResult:
        "Forgets the learned entries of all ports or one.";
    WorkerList = "worker.list" (NoParams) -> WorkerListResult:
        "All workers, by number.";
    WorkerShow = "worker.show" (WorkerShowParams) -> WorkerShowResult:
        "One worker with the queue pairs that it polls.";
    WorkerPin = "worker.pin" (WorkerPinParams) -> Done:
        "Has a worker poll a queue pair, whatever its load; no frame is lost.";
    WorkerUnpin = "worker.unpin" (WorkerUnpinParams) -> WorkerUnpinResult:
        "Leaves it to the daemon again which worker polls a queue pair.";
    MeasureSample = "measure.sample" (NoParams) -> Sample:
        "All counters at one moment; two samples make an interval.";
    DaemonInfo = "daemon.info" (NoParams) -> DaemonReport:
        "Version, process and uptime of the daemon.";
}
