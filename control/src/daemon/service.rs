//! What the daemon does for each method.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringway_api::{
    ApiError, BadValue, CaptureStart, CaptureStartParams, DaemonInfo, DaemonReport, Done,
    ErrorKind, FdbAdd, FdbDel, FdbFlush, FdbFlushResult, FdbList, FdbListParams, FdbListResult,
    MeasureSample, Method, MetricsShow, MetricsShowResult, MonitorStart, PortAdd, PortAddParams,
    PortConfig, PortDel, PortDelParams, PortDelResult, PortInfo, PortList, PortListResult,
    PortName, PortSample, PortSet, PortSetParams, PortShow, Sample, SocketAccess, SocketSpec,
    SwitchError, VlanList, VlanListResult, WorkerList, WorkerListResult, WorkerPin, WorkerSample,
    WorkerShow, WorkerUnpin, WorkerUnpinResult, method_names,
};
use ringway_dataplane::{CaptureReader, LogLimit, Switch};
use rustix::time::{ClockId, clock_gettime};
use serde_json::value::RawValue;

use super::streams;
use crate::metrics::Snapshot;
use crate::rpc::{Reply, describe};
use crate::suggest::{Unknown, nearest};

/// Lines in 10 s that tell of changes: as many as a file may have ports.
const LOG_LINES: u32 = 1000;

/// The switch behind the control API.
#[derive(Debug)]
pub struct Service {
    switch: Switch,
    /// Who may open the sockets of ports that don't say.
    socket_access: SocketAccess,
    started_ns: u64,
    /// When each port was added: tells a port from its namesake that was there before. Held while
    /// the set of ports changes, so that a sample sees names and counters of one moment.
    added: Mutex<BTreeMap<PortName, u64>>,
    /// Of lines that tell of changes.
    log: LogLimit,
}

impl Service {
    /// Serves `switch`, which has no ports yet. The sockets that ports make are for those whom
    /// `socket_access` names, as far as the port does not say.
    pub fn new(switch: Switch, socket_access: SocketAccess) -> Self {
        Self {
            switch,
            socket_access,
            started_ns: monotonic_ns(),
            added: Mutex::default(),
            log: LogLimit::new(LOG_LINES),
        }
    }

    /// Adds a port.
    ///
    /// # Errors
    /// As [`Switch::add_port`].
    pub fn add_port(&self, name: PortName, config: PortConfig) -> Result<PortInfo, SwitchError> {
        self.add(name, config, Switch::add_port)
    }

    /// Adds a port; one whose interface is missing or down waits for that.
    ///
    /// # Errors
    /// As [`Switch::add_or_await_port`].
    pub fn add_or_await_port(
        &self,
        name: PortName,
        config: PortConfig,
    ) -> Result<PortInfo, SwitchError> {
        self.add(name, config, Switch::add_or_await_port)
    }

    /// Who may open the sockets of ports that don't say.
    pub(super) fn socket_access(&self) -> &SocketAccess {
        &self.socket_access
    }

    /// Removes a port; false if there is none.
    pub fn remove_port(&self, name: &PortName) -> bool {
        let params = PortDelParams {
            name: name.clone(),
            if_exists: true,
        };
        self.port_del(params).is_ok_and(|result| result.deleted)
    }

    /// As [`Switch::refused_for`].
    pub fn refused_for(&self, name: &PortName) -> Option<Duration> {
        self.switch.refused_for(name)
    }

    fn add(
        &self,
        name: PortName,
        mut config: PortConfig,
        add: impl FnOnce(&Switch, PortName, PortConfig) -> Result<PortInfo, SwitchError>,
    ) -> Result<PortInfo, SwitchError> {
        if let PortConfig::VhostUser(guest) = &mut config
            && matches!(guest.socket, SocketSpec::Listen(_))
        {
            guest.access = guest.access.or(&self.socket_access);
        }
        let mut added = self.lock();
        let info = add(&self.switch, name.clone(), config)?;
        added.insert(name, monotonic_ns());
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            tracing::info!(port = %info.name, suppressed, "port added");
        }
        Ok(info)
    }

    /// Answers one call.
    ///
    /// # Errors
    /// No such method, bad parameters, or the switch refuses.
    pub fn handle(&self, method: &str, params: Option<&RawValue>) -> Result<Reply, ApiError> {
        match method {
            MonitorStart::NAME => {
                read_params::<MonitorStart>(params)?;
                streams::events(self.switch.events()?).map(Reply::Stream)
            }
            CaptureStart::NAME => {
                let params = read_params::<CaptureStart>(params)?;
                streams::capture(self.capture(&params)?).map(Reply::Stream)
            }
            _ => self.call(method, params).map(Reply::Result),
        }
    }

    fn capture(&self, params: &CaptureStartParams) -> Result<CaptureReader, ApiError> {
        if params.ports.is_empty() {
            let (what, hint) = ("no port to capture", "name one or more: `ports`");
            return Err(ApiError::new(ErrorKind::InvalidParams, what, hint));
        }
        let snap_bytes = params.snap_bytes.unwrap_or(u32::MAX);
        let filter = params.filter.as_deref();
        let reader = self.switch.capture(&params.ports, snap_bytes, filter)?;
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            let ports = reader.ports();
            tracing::info!(?ports, filter, suppressed, "capture begun");
        }
        Ok(reader)
    }

    fn call(&self, method: &str, params: Option<&RawValue>) -> Result<Box<RawValue>, ApiError> {
        match method {
            PortAdd::NAME => reply::<PortAdd>(params, |p| self.port_add(p)),
            PortDel::NAME => reply::<PortDel>(params, |p| self.port_del(p)),
            PortList::NAME => reply::<PortList>(params, |_| {
                let ports = self.switch.ports();
                Ok(PortListResult { ports })
            }),
            PortShow::NAME => reply::<PortShow>(params, |p| Ok(self.switch.port(&p.name)?)),
            PortSet::NAME => reply::<PortSet>(params, |p| self.port_set(p)),
            VlanList::NAME => reply::<VlanList>(params, |_| {
                let vlans = self.switch.vlans();
                Ok(VlanListResult { vlans })
            }),
            FdbList::NAME => reply::<FdbList>(params, |p| self.fdb_list(p)),
            FdbAdd::NAME => reply::<FdbAdd>(params, |p| {
                self.switch.fdb_add(p.mac, &p.port, p.vlan)?;
                Ok(Done {})
            }),
            FdbDel::NAME => reply::<FdbDel>(params, |p| {
                self.switch.fdb_del(p.mac, p.vlan)?;
                Ok(Done {})
            }),
            FdbFlush::NAME => reply::<FdbFlush>(params, |p| {
                let flushed = self.switch.fdb_flush(p.port.as_ref(), p.vlan, p.mac)?;
                Ok(FdbFlushResult {
                    flushed: flushed.try_into().unwrap_or(u64::MAX),
                })
            }),
            WorkerList::NAME => reply::<WorkerList>(params, |_| {
                let workers = self.switch.workers();
                Ok(WorkerListResult { workers })
            }),
            WorkerShow::NAME => reply::<WorkerShow>(params, |p| Ok(self.switch.worker(p.index)?)),
            WorkerPin::NAME => reply::<WorkerPin>(params, |p| {
                self.switch.pin_queue(&p.port, p.queue, p.worker)?;
                if let Some(suppressed) = self.log.pass(Instant::now()) {
                    let (port, queue, worker) = (&p.port, p.queue, p.worker);
                    tracing::info!(%port, queue, worker, suppressed, "queue pinned");
                }
                Ok(Done {})
            }),
            WorkerUnpin::NAME => reply::<WorkerUnpin>(params, |p| {
                let was_pinned = self.switch.unpin_queue(&p.port, p.queue)?;
                if let Some(suppressed) = self.log.pass(Instant::now()) {
                    let (port, queue) = (&p.port, p.queue);
                    tracing::info!(%port, queue, was_pinned, suppressed, "queue unpinned");
                }
                Ok(WorkerUnpinResult { was_pinned })
            }),
            MeasureSample::NAME => reply::<MeasureSample>(params, |_| Ok(self.sample())),
            MetricsShow::NAME => reply::<MetricsShow>(params, |_| {
                let text = self.metrics();
                Ok(MetricsShowResult { text })
            }),
            DaemonInfo::NAME => reply::<DaemonInfo>(params, |_| Ok(self.info())),
            _ => Err(no_such_method(method)),
        }
    }

    /// Removes all ports and ends all threads of the switch.
    pub fn shutdown(self) {
        self.switch.shutdown();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PortName, u64>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn port_add(&self, params: PortAddParams) -> Result<PortInfo, ApiError> {
        params.config.check_pins().map_err(|bad| {
            let message = format!("config.pins: {bad}");
            ApiError::new(ErrorKind::InvalidParams, message, bad.hint)
        })?;
        Ok(self.add_port(params.name, params.config)?)
    }

    fn port_del(&self, params: PortDelParams) -> Result<PortDelResult, ApiError> {
        let name = params.name;
        let mut added = self.lock();
        match self.switch.remove_port(&name) {
            Ok(()) => {
                added.remove(&name);
                if let Some(suppressed) = self.log.pass(Instant::now()) {
                    tracing::info!(port = %name, suppressed, "port removed");
                }
                Ok(PortDelResult { deleted: true })
            }
            Err(SwitchError::NoSuchPort { .. }) if params.if_exists => {
                Ok(PortDelResult { deleted: false })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn port_set(&self, params: PortSetParams) -> Result<PortInfo, ApiError> {
        let PortSetParams { name, vlan } = params;
        let Some(vlan) = vlan else {
            return Ok(self.switch.port(&name)?.port);
        };
        let info = self.switch.set_vlan(&name, vlan)?;
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            let vlans = info.config.vlan().to_string();
            tracing::info!(port = %name, vlans, suppressed, "port changed");
        }
        Ok(info)
    }

    fn fdb_list(&self, params: FdbListParams) -> Result<FdbListResult, ApiError> {
        let mut entries = self.switch.fdb();
        if let Some(name) = params.port {
            self.switch.port(&name)?;
            entries.retain(|entry| entry.port == name);
        }
        if let Some(vlan) = params.vlan {
            entries.retain(|entry| entry.vlan == vlan.get());
        }
        Ok(FdbListResult { entries })
    }

    fn sample(&self) -> Sample {
        let added = self.lock();
        let pairs = self.switch.pairs();
        let ports = self.switch.ports();
        let workers = self.switch.workers();
        let monotonic_ns = monotonic_ns();
        let port_sample = |info: PortInfo| PortSample {
            added_monotonic_ns: added.get(&info.name).copied().unwrap_or(0),
            name: info.name,
            rx_drops: info.counters.rx_drops,
        };
        Sample {
            monotonic_ns,
            pairs,
            ports: ports.into_iter().map(port_sample).collect(),
            workers: workers.iter().map(WorkerSample::from).collect(),
        }
    }

    /// All counters, as Prometheus reads them.
    pub(super) fn metrics(&self) -> String {
        let snapshot = Snapshot {
            daemon: self.info(),
            ports: self.switch.ports(),
            queues: self.switch.queues(),
            pairs: self.switch.pairs(),
            workers: self.switch.workers(),
        };
        snapshot.text()
    }

    fn info(&self) -> DaemonReport {
        let uptime = Duration::from_nanos(monotonic_ns().saturating_sub(self.started_ns));
        DaemonReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: uptime.as_secs_f64(),
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn reply<M: Method>(
    params: Option<&RawValue>,
    run: impl FnOnce(M::Params) -> Result<M::Result, ApiError>,
) -> Result<Box<RawValue>, ApiError> {
    let result = run(read_params::<M>(params)?)?;
    serde_json::value::to_raw_value(&result).map_err(|error| {
        let message = format!("the result of {} can't be written: {error}", M::NAME);
        ApiError::new(ErrorKind::InternalError, message, "report it")
    })
}

fn read_params<M: Method>(params: Option<&RawValue>) -> Result<M::Params, ApiError> {
    serde_json::from_str(params.map_or("{}", RawValue::get)).map_err(|error| {
        let reason = describe(&error);
        let (reason, hint) = if let Some(bad) = BadValue::from_serde(&reason) {
            (bad.reason, bad.hint)
        } else if let Some(unknown) = Unknown::read(&reason) {
            let hint = unknown.hint();
            (reason, hint)
        } else {
            let hint = "docs/control-api.schema.json has the parameters of all methods";
            (reason, hint.into())
        };
        let message = format!("parameters of {}: {reason}", M::NAME);
        ApiError::new(ErrorKind::InvalidParams, message, hint)
    })
}

fn no_such_method(method: &str) -> ApiError {
    let shown: String = method.chars().take(64).collect();
    let hint = match nearest(&shown, method_names().iter().copied()) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("the methods are {}", method_names().join(", ")),
    };
    let message = format!("there is no method {shown:?}");
    ApiError::new(ErrorKind::MethodNotFound, message, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<M: Method>(params: &str) -> ApiError {
        let raw = RawValue::from_string(params.to_owned()).unwrap();
        match read_params::<M>(Some(&raw)) {
            Ok(_) => panic!("taken: {params}"),
            Err(error) => error,
        }
    }

    #[test]
    fn absent_parameters_are_an_empty_object() {
        assert_eq!(
            read_params::<PortList>(None).unwrap(),
            ringway_api::NoParams {}
        );
        assert!(read_params::<PortShow>(None).is_err());
    }

    #[test]
    fn unknown_and_duplicate_fields_and_wrong_types_are_refused() {
        let error = refused::<PortAdd>(r#"{"name":"a","config":{"kind":"tap","ifnam":"x"}}"#);
        assert_eq!(error.kind, ErrorKind::InvalidParams);
        assert_eq!(error.hint, "did you mean `ifname`?");
        let error = refused::<PortShow>(r#"{"name":"a","name":"b"}"#);
        assert!(error.message.contains("duplicate field `name`"), "{error}");
        let error = refused::<PortAdd>(r#"{"name":"a","config":{"kind":"vhostuser"}}"#);
        assert_eq!(error.hint, "did you mean `vhost-user`?");
        for params in [
            r#"{"name":7}"#,
            r#"{"name":null}"#,
            r#"{"name":["a"]}"#,
            r#"{}"#,
            r#"{"name":"a","if_exists":"yes"}"#,
            r#"{"name":"a","if_exists":1}"#,
        ] {
            assert!(
                refused::<PortDel>(params)
                    .message
                    .starts_with("parameters of port.del: ")
            );
        }
        for queues in ["-1", "1.5", "65536", "\"2\"", "[]"] {
            let config = format!(r#"{{"kind":"tap","ifname":"x","queues":{queues}}}"#);
            refused::<PortAdd>(&format!(r#"{{"name":"a","config":{config}}}"#));
        }
        refused::<PortList>(r#"{"verbose":true}"#);
    }

    #[test]
    fn names_with_slashes_nuls_or_300_bytes_are_refused() {
        for name in ["", "a/b", "../x", "a\0", "-a", "a b", "ä", &"x".repeat(300)] {
            let params = serde_json::json!({ "name": name }).to_string();
            let error = refused::<PortShow>(&params);
            assert_eq!(error.kind, ErrorKind::InvalidParams, "{name:?}");
            assert!(error.message.len() < 200, "{}", error.message);
            assert!(!error.message.contains('\0'));
            assert!(error.hint.contains("1 to 63"), "{}", error.hint);
        }
    }

    #[test]
    fn a_setting_of_another_kind_is_refused_and_its_own_kind_told() {
        let error =
            refused::<PortAdd>(r#"{"name":"a","config":{"kind":"tap","ifname":"x","gro":true}}"#);
        assert!(error.message.contains("`gro`"), "{error}");
        assert_eq!(error.hint, "it belongs to kind af-xdp; leave it out");
        let error = refused::<PortAdd>(r#"{"name":"a","mtu":1500}"#);
        assert_eq!(error.hint, "known here: name, config");
    }

    #[test]
    fn a_method_that_is_almost_right_is_suggested() {
        assert_eq!(no_such_method("port.lst").hint, "did you mean `port.list`?");
        let error = no_such_method(&"x".repeat(1 << 20));
        assert!(error.message.len() < 100);
    }

    #[test]
    fn a_bad_mac_address_is_shown_in_part_only() {
        let params = |mac: &str| serde_json::json!({ "mac": mac }).to_string();
        let good = RawValue::from_string(params("52:54:00:00:00:01")).unwrap();
        assert!(read_params::<FdbDel>(Some(&good)).is_ok());
        let error = refused::<FdbDel>(&params(&":".repeat(100_000)));
        assert!(error.message.len() < 200);
    }
}
