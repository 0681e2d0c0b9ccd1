//! ringwayd as a child, and the `ringway` command that talks to it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::hint::hinted;
use crate::netns::NetNs;
use crate::process::{Output, Process, run, run_ok};

/// How long the daemon may take until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// Bound on each `ringway` command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// Ticks per second in /proc/PID/stat: USER_HZ, 100 on every architecture with QEMU guests.
const TICKS_PER_SECOND: f64 = 100.0;

/// Where the programs are, and what the daemon runs on.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) ringwayd: PathBuf,
    pub(crate) ringway: PathBuf,
    pub(crate) worker_cpus: String,
}

impl Programs {
    /// # Errors
    /// If one of the two doesn't exist or doesn't run.
    pub(crate) fn check(&self) -> Result<String> {
        for path in [&self.ringwayd, &self.ringway] {
            if !path.is_file() {
                return Err(hinted(
                    format!("{} does not exist", path.display()),
                    "build the workspace with `cargo build --release`, or give --ringwayd and \
                     --ringway",
                ));
            }
        }
        let said = run_ok(
            Command::new(&self.ringwayd).arg("--version"),
            COMMAND_TIMEOUT,
        )?;
        Ok(said.trim().to_owned())
    }
}

/// A daemon with a control socket of its own.
pub(crate) struct Daemon {
    process: Process,
    programs: Programs,
    socket: PathBuf,
}

impl Daemon {
    /// Starts the daemon inside `namespace`, so that its taps are made there, and waits until it
    /// answers. To be called from the main thread.
    pub(crate) fn start(programs: &Programs, namespace: &NetNs, folder: &Path) -> Result<Daemon> {
        let socket = folder.join("control.sock");
        let mut command = Command::new(&programs.ringwayd);
        command.arg("--control").arg(&socket);
        command.args(["--worker-cpus", &programs.worker_cpus]);
        let log = folder.join("ringwayd.log");
        let mut process = Process::spawn("ringwayd", &command, Some(namespace), &log)?;
        process.wait_for("did not open its control socket", START_TIMEOUT, |_| {
            UnixStream::connect(&socket).ok().map(drop)
        })?;
        Ok(Daemon {
            process,
            programs: programs.clone(),
            socket,
        })
    }

    /// `ringway ARGUMENTS…`, whatever its exit code.
    pub(crate) fn command(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.programs.ringway);
        command.arg("-s").arg(&self.socket).args(arguments);
        Ok(run(&mut command, COMMAND_TIMEOUT)?)
    }

    /// `ringway ARGUMENTS…`, which must succeed.
    pub(crate) fn ringway(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments)?;
        if !output.status.success() {
            bail!("ringway {}: {}", arguments.join(" "), output.stderr.trim());
        }
        Ok(output.stdout)
    }

    /// A field of `ringway -j port show`.
    pub(crate) fn port_field(&self, port: &str, field: &str) -> Result<Value> {
        let text = self.ringway(&["-j", "port", "show", port])?;
        let json: Value = serde_json::from_str(&text)
            .with_context(|| format!("`ringway -j port show {port}` is no JSON"))?;
        find_field(&json, field)
            .cloned()
            .with_context(|| format!("`ringway -j port show {port}` has no `{field}`"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// CPU time used so far, all threads.
    pub(crate) fn cpu_seconds(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        cpu_seconds_of(&text).context("/proc/PID/stat is not as expected")
    }

    /// Open file descriptors.
    pub(crate) fn open_files(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count())
    }

    /// A line of /proc/PID/status in bytes, as `RssAnon`.
    pub(crate) fn memory_bytes(&self, field: &str) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        memory_bytes_of(&text, field).with_context(|| format!("/proc/PID/status has no {field}"))
    }
}

/// The first field of this name, at any depth: the command nests what belongs together.
pub(crate) fn find_field<'a>(json: &'a Value, field: &str) -> Option<&'a Value> {
    match json {
        Value::Object(map) => map
            .get(field)
            .or_else(|| map.values().find_map(|value| find_field(value, field))),
        Value::Array(list) => list.iter().find_map(|value| find_field(value, field)),
        _ => None,
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

    #[test]
    fn fields_are_found_at_any_depth() {
        let json = serde_json::json!({"port": {"name": "a", "detail": {"mapped_bytes": 7}}});
        assert_eq!(find_field(&json, "mapped_bytes"), Some(&Value::from(7)));
        assert_eq!(find_field(&json, "nothing"), None);
    }
}
