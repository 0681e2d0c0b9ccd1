//! The daemon `ringwayd`: starts the switch and its ports, serves the control socket, ends cleanly.

mod args;
mod log;
mod pcapng;
mod servers;
mod service;
mod streams;
mod watchdog;

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use ringway_api::{PortConfig, PortName, SwitchConfig, SwitchError};
use ringway_dataplane::{SocketFile, Switch, awaited};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing_subscriber::EnvFilter;

pub use args::Args;
use log::Log;
use servers::{Beside, Servers};
pub use service::Service;

use crate::config::{Config, ConfigError, CpuList, DEFAULT_CONTROL, LogFormat};
use crate::rpc::{BindError, ControlSocket};
use crate::usage;

/// Why the daemon did not start.
#[derive(Debug)]
struct Failure {
    what: String,
    hint: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "ringwayd: error: {}\n  hint: {}", self.what, self.hint)
    }
}

impl From<SwitchError> for Failure {
    fn from(error: SwitchError) -> Self {
        Self {
            what: error.to_string(),
            hint: error.hint(),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self {
            what: error.to_string(),
            hint: error.hint,
        }
    }
}

impl From<BindError> for Failure {
    fn from(error: BindError) -> Self {
        Self {
            what: error.to_string(),
            hint: error.hint,
        }
    }
}

/// Runs `ringwayd` with the process's arguments. Exit codes: 0 done, 1 refused, 2 usage. A panic of any
/// thread ends the process by SIGABRT.
pub fn main() -> ExitCode {
    let args = match <Args as clap::Parser>::try_parse() {
        Ok(args) => args,
        Err(error) => return usage::exit("ringwayd", &error),
    };
    let log = match Log::start() {
        Ok(log) => log,
        Err(error) => {
            let _ = writeln!(io::stderr(), "ringwayd: error: no thread to log: {error}");
            return ExitCode::FAILURE;
        }
    };
    log::abort_on_panic(log.clone());
    let outcome = run(&args, &log);
    if let Err(failure) = &outcome {
        log.put(format!("{failure}\n").as_bytes());
    }
    log.flush();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(args: &Args, log: &Log) -> Result<(), Failure> {
    let mut config = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    args.override_config(&mut config);
    let worker_cpus = worker_cpus(config.worker_cpus.take())?;
    if args.check {
        check_access(&config)?;
        let ports = config.ports.len();
        check_interfaces(&config.ports, args.strict)?;
        // A closed pipe is no reason to fail.
        let _ = writeln!(io::stdout(), "ok: {ports} ports, worker CPUs {worker_cpus}");
        return Ok(());
    }
    init_logging(config.log_format.unwrap_or_default(), log.clone());
    raise_fd_limit();
    // Registered before anything is made, so that no signal can leave something behind.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(|error| Failure {
        what: format!("can't handle signals: {error}"),
        hint: "see `ulimit -n`".into(),
    })?;
    serve(config, worker_cpus, signals, args.strict)
}

/// Whoever is to own a socket exists.
fn check_access(config: &Config) -> Result<(), Failure> {
    let of_ports = config.ports.iter().filter_map(|(name, port)| match port {
        PortConfig::VhostUser(guest) => Some((format!("port {name}"), &guest.access)),
        _ => None,
    });
    let all = [
        ("control socket".to_owned(), &config.control_access),
        ("[sockets]".to_owned(), &config.socket_access),
    ];
    for (whose, access) in all.into_iter().chain(of_ports) {
        SocketFile::of(access).map_err(|bad| Failure {
            what: format!("{whose}: {}", bad.reason),
            hint: bad.hint,
        })?;
    }
    Ok(())
}

fn worker_cpus(given: Option<CpuList>) -> Result<CpuList, Failure> {
    let system = |error: io::Error| Failure {
        what: format!("can't tell which CPUs are allowed: {error}"),
        hint: "name them with --worker-cpus".into(),
    };
    let allowed = CpuList::allowed().map_err(system)?;
    let Some(given) = given else {
        let highest = allowed.highest().unwrap_or(0);
        return Ok(CpuList::from(highest));
    };
    match given.outside(&allowed).first() {
        None => Ok(given),
        Some(cpu) => Err(SwitchError::NoSuchCpu {
            cpu: *cpu,
            allowed: allowed.to_string(),
        }
        .into()),
    }
}

fn init_logging(format: LogFormat, log: Log) {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env_lossy();
    let logger = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(move || log.clone());
    match format {
        LogFormat::Text => logger.init(),
        LogFormat::Json => logger.json().init(),
    }
}

/// Each queue pair takes four fds or more, and the usual soft limit is 1,024.
fn raise_fd_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "can't raise the limit of open files");
    }
}

fn serve(
    config: Config,
    worker_cpus: CpuList,
    mut signals: Signals,
    is_strict: bool,
) -> Result<(), Failure> {
    let control = config.control.unwrap_or_else(|| DEFAULT_CONTROL.into());
    // First of all, so that a second daemon fails before it touches a port.
    let socket = ControlSocket::bind(&control, &config.control_access)?;
    let switch = Switch::start(SwitchConfig {
        worker_cpus: worker_cpus.clone().into(),
        idle: config.idle,
        balance: config.balance,
        fdb_capacity: config.fdb_capacity,
        fdb_ageing: config.fdb_ageing,
        fdb_move_hold: config.fdb_move_hold,
        group_fwd_mask: config.group_fwd_mask,
    })?;
    let heartbeat = switch.heartbeat();
    let service = Arc::new(Service::new(switch, config.socket_access));
    if let Err(failure) = add_ports(&service, config.ports, is_strict) {
        end(service);
        return Err(failure);
    }
    let beside = Beside {
        metrics: config.metrics,
        auto: config.auto,
        profiles: config.profiles,
    };
    let servers = match Servers::start(socket, beside, &service) {
        Ok(servers) => servers,
        Err(failure) => {
            end(service);
            return Err(failure);
        }
    };
    tracing::info!(control = %control.display(), %worker_cpus, "ready");
    notify(&[NotifyState::Ready]);
    if let Err(error) = watchdog::start(heartbeat) {
        tracing::error!(%error, "no thread to feed the watchdog");
    }
    wait_for_end(&mut signals);
    notify(&[NotifyState::Stopping]);
    drop(servers);
    end(service);
    tracing::info!("stopped");
    Ok(())
}

/// Returns when a signal is to end the daemon. A hang-up is not: daemons read their configuration anew
/// for it, of a terminal that closed it tells a foreground process, and nobody means that guests
/// lose their network.
fn wait_for_end(signals: &mut Signals) {
    for signal in signals.forever() {
        if signal != SIGHUP {
            tracing::info!(signal, "stopping");
            return;
        }
        tracing::info!(
            "SIGHUP: the configuration is read at start only; `ringway port` changes ports, \
             SIGTERM ends the daemon"
        );
    }
}

/// Says which interfaces would be waited for, or refuses the first of them.
fn check_interfaces(ports: &[(PortName, PortConfig)], is_strict: bool) -> Result<(), Failure> {
    for (name, config) in ports {
        let Some(absence) = awaited(config) else {
            continue;
        };
        if is_strict {
            return Err(not_added(name, &absence));
        }
        let hint = absence.hint();
        // A closed pipe is no reason to fail.
        let _ = writeln!(io::stdout(), "port {name} will wait: {absence}; {hint}");
    }
    Ok(())
}

fn add_ports(
    service: &Service,
    ports: Vec<(PortName, PortConfig)>,
    is_strict: bool,
) -> Result<(), Failure> {
    for (name, config) in ports {
        let described = name.clone();
        let added = if is_strict {
            service.add_port(name, config)
        } else {
            service.add_or_await_port(name, config)
        };
        added.map_err(|error| not_added(&described, &error))?;
    }
    Ok(())
}

fn not_added(port: &PortName, error: &SwitchError) -> Failure {
    Failure {
        what: format!("port {port}: {error}"),
        hint: error.hint(),
    }
}

/// Removes all ports and ends the workers.
fn end(service: Arc<Service>) {
    match Arc::into_inner(service) {
        Some(service) => service.shutdown(),
        // Nobody else can hold it once the server has ended.
        None => tracing::error!("a control connection outlived its server"),
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "can't notify the service manager");
    }
}
