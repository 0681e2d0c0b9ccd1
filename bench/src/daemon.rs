//! ringwayd as a child, and what is asked of it and told it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use ringway_control::api::{Method, PortDetail, PortShow, PortShowParams};
use ringway_control::rpc::{CallError, Client};

use crate::hint::hinted;
use crate::netns::NetNs;
use crate::process::{Origin, Process, ProcessError, find, run_ok, sibling};

/// How long the daemon may take until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// Bound on each call and each `ringway` command.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Ticks per second in /proc/PID/stat: USER_HZ, 100 on every architecture with QEMU guests.
const TICKS_PER_SECOND: f64 = 100.0;

/// Where the programs are, and what the daemon runs on.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) ringwayd: PathBuf,
    pub(crate) ringway: PathBuf,
    /// CPUs of the daemon's workers, as on its command line.
    pub(crate) worker_cpus: String,
}

impl Programs {
    /// Those beside this program, or else from PATH.
    pub(crate) fn installed(worker_cpus: String) -> Result<Self, ProcessError> {
        Ok(Self {
            ringwayd: find(sibling("ringwayd"), Origin::Workspace)?,
            ringway: find(sibling("ringway"), Origin::Workspace)?,
            worker_cpus,
        })
    }

    /// # Errors
    /// If one of the two doesn't exist.
    pub(crate) fn check(&self) -> Result<()> {
        for path in [&self.ringwayd, &self.ringway] {
            if !path.is_file() {
                return Err(hinted(
                    format!("{} does not exist", path.display()),
                    "build the workspace with `cargo build --release`, or give --ringwayd and \
                     --ringway",
                ));
            }
        }
        Ok(())
    }

    /// What the daemon says of its version.
    pub(crate) fn version(&self) -> Result<String, ProcessError> {
        let mut command = Command::new(&self.ringwayd);
        let said = run_ok(command.arg("--version"), CALL_TIMEOUT)?;
        Ok(said.trim().to_owned())
    }
}

/// A daemon's control socket, and the operator's tool for it.
#[derive(Debug)]
pub(crate) struct RingwayControl {
    path: PathBuf,
    ringway: PathBuf,
}

impl RingwayControl {
    /// Calls a method of the control API.
    pub(crate) fn call<M: Method>(&self, params: &M::Params) -> Result<M::Result, CallError> {
        Client::connect(&self.path, CALL_TIMEOUT)?.call::<M>(params)
    }

    /// All that the daemon tells of a port.
    pub(crate) fn port(&self, name: &str) -> Result<PortDetail> {
        let name = name.parse()?;
        Ok(self.call::<PortShow>(&PortShowParams { name })?)
    }

    /// `ringway ARGUMENTS…`, as an operator would type it; it must succeed.
    pub(crate) fn ringway(&self, arguments: &[&str]) -> Result<(), ProcessError> {
        let mut command = Command::new(&self.ringway);
        command.arg("-s").arg(&self.path).args(arguments);
        run_ok(&mut command, CALL_TIMEOUT).map(drop)
    }
}

/// A daemon with a control socket of its own.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) process: Process,
    pub(crate) control: RingwayControl,
}

impl Daemon {
    /// Starts the daemon, called `name` in errors, in `namespace` if one is given, so that its
    /// taps are made there, and waits until it listens. To be called from the main thread.
    pub(crate) fn start(
        name: &str,
        programs: &Programs,
        namespace: Option<&NetNs>,
        folder: &Path,
    ) -> Result<Self, ProcessError> {
        let path = folder.join("control.sock");
        let mut command = Command::new(&programs.ringwayd);
        command.arg("--control").arg(&path);
        command.args(["--worker-cpus", &programs.worker_cpus]);
        let log = folder.join("ringwayd.log");
        let mut process = Process::spawn(name, &command, namespace, &log)?;
        process.wait_for("did not open its control socket", START_TIMEOUT, |_| {
            UnixStream::connect(&path).ok().map(drop)
        })?;
        let ringway = programs.ringway.clone();
        Ok(Self {
            process,
            control: RingwayControl { path, ringway },
        })
    }

    /// CPU time used so far, all threads.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.process.pid()))?;
        cpu_seconds_of(&text).context("/proc/PID/stat is not as expected")
    }

    /// Open file descriptors.
    pub(crate) fn open_files(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.process.pid()))?.count())
    }

    /// A line of /proc/PID/status in bytes, as `RssAnon`.
    pub(crate) fn memory_bytes(&self, field: &str) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid()))?;
        memory_bytes_of(&text, field).with_context(|| format!("/proc/PID/status has no {field}"))
    }
}

/// utime + stime: fields 14 and 15 of proc(5), counted behind the name, which may hold spaces.
fn cpu_seconds_of(stat: &str) -> Option<f64> {
    let behind_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = behind_name.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

fn memory_bytes_of(status: &str, field: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_name_with_spaces() {
        let stat = "12 (ring (way) d) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3 0";
        assert_eq!(cpu_seconds_of(stat), Some(2.0));
        assert_eq!(cpu_seconds_of("12 (x"), None);
    }

    #[test]
    fn memory_lines_match_whole_names() {
        let status = "VmRSS:\t   100 kB\nRssAnon:\t    40 kB\n";
        assert_eq!(memory_bytes_of(status, "RssAnon"), Some(40 * 1024));
        assert_eq!(memory_bytes_of(status, "Rss"), None);
    }
}
