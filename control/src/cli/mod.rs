//! The operator's tool `ringway`.

mod args;
mod capture;
mod drops;
mod external;
mod interrupt;
mod measure;
mod monitor;
mod print;
mod table;
#[cfg(test)]
mod tests;
mod units;

use std::fmt;
use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use serde::Serialize;
use serde_json::{Value, json};

pub use args::{Args, DEFAULT_TIMEOUT};
pub use units::Rate;

use self::args::{FdbVerb, Noun, PortVerb, WorkerVerb};
use crate::api::{
    BadValue, DaemonInfo, FdbAdd, FdbDel, FdbFlush, FdbList, Method, MetricsShow, NoParams,
    PortAdd, PortAddParams, PortDel, PortList, PortSet, PortShow, VlanList, WorkerInfo, WorkerList,
    WorkerPin, WorkerShow, WorkerShowParams, WorkerUnpin,
};
use crate::rpc::{CallError, Client};
use crate::usage;

/// Exit code: refused by the daemon, or output that can't be written.
pub const EXIT_REFUSED: u8 = 1;
/// Exit code: a command line that makes no sense.
pub const EXIT_USAGE: u8 = usage::USAGE;
/// Exit code: the daemon is not reachable.
pub const EXIT_UNREACHABLE: u8 = 3;
/// Exit code: the daemon did not answer in time.
pub const EXIT_TIMEOUT: u8 = 4;
/// Exit code: measured below `--min`.
pub const EXIT_BELOW_MIN: u8 = 5;

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failure {
    code: u8,
    kind: String,
    what: String,
    hint: String,
}

impl Failure {
    fn new(
        code: u8,
        kind: impl Into<String>,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            code,
            kind: kind.into(),
            what: what.into(),
            hint: hint.into(),
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "kind": self.kind,
            "message": self.what,
            "hint": self.hint,
            "exit_code": self.code,
        })
    }
}

/// Why a command ends before its end.
#[derive(Debug)]
enum Stop {
    /// With an error that is still to be told.
    Failed(Failure),
    /// With an error that the output tells already.
    Told(u8),
    /// Nobody reads the output any more: quietly.
    Unread,
}

impl Stop {
    /// Something on this side went wrong.
    fn local(error: &io::Error) -> Self {
        let hint = "see `ulimit -a` and `df`";
        Self::Failed(Failure::new(EXIT_REFUSED, "local", error.to_string(), hint))
    }
}

impl From<CallError> for Stop {
    fn from(error: CallError) -> Self {
        let what = error.to_string();
        Self::Failed(match error {
            CallError::Refused { kind, hint, .. } => Failure::new(EXIT_REFUSED, kind, what, hint),
            CallError::Timeout { .. } => {
                let hint = "is ringwayd stopped or overloaded? --timeout waits longer";
                Failure::new(EXIT_TIMEOUT, "timeout", what, hint)
            }
            CallError::Unreachable { source, .. } => {
                let hint = match source.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "run as root, or as a member of the socket's group"
                    }
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        "is ringwayd running? -s or RINGWAY_CONTROL names its control socket"
                    }
                    _ => "is this the control socket of ringwayd? See the daemon's log",
                };
                Failure::new(EXIT_UNREACHABLE, "unreachable", what, hint)
            }
            CallError::Garbled { .. } => {
                let hint = "is this the control socket of ringwayd, and of this version?";
                Failure::new(EXIT_UNREACHABLE, "garbled", what, hint)
            }
        })
    }
}

/// Options that contradict each other.
impl From<BadValue> for Stop {
    fn from(bad: BadValue) -> Self {
        Self::Failed(Failure::new(EXIT_USAGE, "usage", bad.reason, bad.hint))
    }
}

impl From<fmt::Error> for Stop {
    fn from(error: fmt::Error) -> Self {
        Self::local(&io::Error::other(error))
    }
}

/// Runs `ringway` with the process's arguments.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if wants_json() && !usage::is_display(&error) => {
            let (what, hint) = usage::explain(&error);
            let failure = Failure::new(EXIT_USAGE, "usage", what, hint);
            return finish(Err(Stop::Failed(failure)), true);
        }
        Err(error) => return usage::exit("ringway", &error),
    };
    finish(run(&args), args.json)
}

/// Whether `-j` is there, for a command line that clap gave up on.
fn wants_json() -> bool {
    std::env::args_os().any(|arg| arg == "-j" || arg == "--json")
}

fn finish(outcome: Result<(), Stop>, as_json: bool) -> ExitCode {
    match outcome {
        Ok(()) | Err(Stop::Unread) => ExitCode::SUCCESS,
        Err(Stop::Told(code)) => code.into(),
        Err(Stop::Failed(failure)) => {
            if as_json {
                // If it can't be written, the exit code still tells.
                let _ = emit_json(&json!({ "error": failure.to_json() }));
            } else {
                let Failure { what, hint, .. } = &failure;
                let hint = if hint.is_empty() {
                    "see the daemon's log"
                } else {
                    hint
                };
                let _ = writeln!(io::stderr(), "ringway: error: {what}\n  hint: {hint}");
            }
            failure.code.into()
        }
    }
}

fn run(args: &Args) -> Result<(), Stop> {
    match &args.noun {
        Noun::Port(verb) => port(args, verb),
        Noun::Fdb(verb) => fdb(args, verb),
        Noun::Vlan => ask::<VlanList>(args, &NoParams {}, print::vlans),
        Noun::Worker(verb) => worker(args, verb),
        Noun::Metrics => {
            ask::<MetricsShow>(args, &NoParams {}, |out, shown| out.write_str(&shown.text))
        }
        Noun::Drops(wanted) => drops::run(&mut connect(args)?, wanted, args.json),
        Noun::Measure(measure) => measure::run(&mut connect(args)?, measure, args.json),
        Noun::Capture(wanted) => capture::run(connect(args)?, wanted),
        Noun::Monitor(monitor) => monitor::run(connect(args)?, monitor, args.json),
        Noun::Info => ask::<DaemonInfo>(args, &NoParams {}, print::info),
        Noun::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Args::command(), "ringway", &mut script);
            emit_bytes(&script)
        }
        Noun::Man { directory } => man(directory).map_err(|error| Stop::local(&error)),
        Noun::External(words) => external::run(words, &args.socket),
    }
}

fn connect(args: &Args) -> Result<Client, Stop> {
    Ok(Client::connect(&args.socket, args.timeout)?)
}

/// Calls `M` and prints its result.
fn ask<M: Method>(
    args: &Args,
    params: &M::Params,
    print: impl FnOnce(&mut dyn fmt::Write, &M::Result) -> fmt::Result,
) -> Result<(), Stop> {
    let result = connect(args)?.call::<M>(params)?;
    if args.json {
        return emit_json(&result);
    }
    let mut text = String::new();
    print(&mut text, &result)?;
    emit(&text)
}

fn port(args: &Args, verb: &PortVerb) -> Result<(), Stop> {
    match verb {
        PortVerb::Add { name, kind } => {
            let params = PortAddParams {
                name: name.clone(),
                config: kind.config()?,
            };
            ask::<PortAdd>(args, &params, |out, port| {
                writeln!(out, "port {} added", port.name)
            })
        }
        PortVerb::Del(params) => ask::<PortDel>(args, params, |out, result| {
            let name = &params.name;
            match result.deleted {
                true => writeln!(out, "port {name} deleted"),
                false => writeln!(out, "there was no port {name}"),
            }
        }),
        PortVerb::Set(set) => ask::<PortSet>(args, &set.params()?, |out, port| {
            writeln!(out, "port {}: vlans {}", port.name, port.config.vlan())
        }),
        PortVerb::List => ask::<PortList>(args, &NoParams {}, print::ports),
        PortVerb::Show(params) => ask::<PortShow>(args, params, print::port),
    }
}

fn fdb(args: &Args, verb: &FdbVerb) -> Result<(), Stop> {
    match verb {
        FdbVerb::List(params) => ask::<FdbList>(args, params, print::fdb),
        FdbVerb::Add(params) => ask::<FdbAdd>(args, params, |out, _| {
            writeln!(out, "{} is behind {}", params.mac, params.port)
        }),
        FdbVerb::Del(params) => ask::<FdbDel>(args, params, |out, _| {
            writeln!(out, "{} deleted", params.mac)
        }),
        FdbVerb::Flush(params) => ask::<FdbFlush>(args, params, |out, result| {
            writeln!(out, "{} learned entries forgotten", result.flushed)
        }),
    }
}

fn worker(args: &Args, verb: &WorkerVerb) -> Result<(), Stop> {
    match verb {
        WorkerVerb::List => ask::<WorkerList>(args, &NoParams {}, print::workers),
        WorkerVerb::Show { index: Some(index) } => {
            let params = WorkerShowParams { index: *index };
            ask::<WorkerShow>(args, &params, print::worker)
        }
        WorkerVerb::Show { index: None } => all_workers(args),
        WorkerVerb::Pin(params) => ask::<WorkerPin>(args, params, |out, _| {
            let (port, queue, worker) = (&params.port, params.queue, params.worker);
            writeln!(out, "queue {queue} of {port} is polled by worker {worker}")
        }),
        WorkerVerb::Unpin(params) => ask::<WorkerUnpin>(args, params, |out, result| {
            let (port, queue) = (&params.port, params.queue);
            match result.was_pinned {
                true => writeln!(out, "queue {queue} of {port} is no longer pinned"),
                false => writeln!(out, "queue {queue} of {port} was not pinned"),
            }
        }),
    }
}

/// `ringway worker show` without a number: `{"workers": […]}`, or a block for each.
fn all_workers(args: &Args) -> Result<(), Stop> {
    let mut client = connect(args)?;
    let list = client.call::<WorkerList>(&NoParams {})?.workers;
    let mut all = Vec::new();
    for WorkerInfo { index, .. } in list {
        all.push(client.call::<WorkerShow>(&WorkerShowParams { index })?);
    }
    if args.json {
        return emit_json(&json!({ "workers": all }));
    }
    let mut text = String::new();
    for (at, worker) in all.iter().enumerate() {
        if at > 0 {
            text.push('\n');
        }
        print::worker(&mut text, worker)?;
    }
    emit(&text)
}

fn man(directory: &std::path::Path) -> io::Result<()> {
    clap_mangen::generate_to(Args::command().disable_help_subcommand(true), directory)?;
    let daemon = clap_mangen::Man::new(crate::daemon::Args::command()).section("8");
    let mut page = Vec::new();
    daemon.render(&mut page)?;
    std::fs::write(directory.join("ringwayd.8"), page)
}

fn emit(text: &str) -> Result<(), Stop> {
    emit_bytes(text.as_bytes())
}

fn emit_json(value: &impl Serialize) -> Result<(), Stop> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| Stop::local(&error.into()))?;
    text.push('\n');
    emit(&text)
}

fn emit_bytes(bytes: &[u8]) -> Result<(), Stop> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Stop::Unread),
        Err(error) => Err(Stop::local(&error)),
    }
}
