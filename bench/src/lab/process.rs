//! Programs of the host: run with a deadline, or kept and ended by their own pid.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

use super::{hinted, interrupt};

/// How often an awaited program is looked at.
const POLL: Duration = Duration::from_millis(2);

/// How long a program may take to end after SIGTERM.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// What a program of the host printed.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end.
///
/// # Errors
/// If it can't start, or is still running after `timeout` (it is killed then).
pub(crate) fn run(command: &mut Command, timeout: Duration) -> Result<Output> {
    let name = describe(command);
    let mut stdout = tempfile::tempfile()?;
    let mut stderr = tempfile::tempfile()?;
    let child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting `{name}`"))?;
    let mut kept = Kept { child, name };
    let status = kept.wait(timeout)?;
    Ok(Output {
        status,
        stdout: contents(&mut stdout)?,
        stderr: contents(&mut stderr)?,
    })
}

/// As [`run`], and a status other than 0 is an error with the program's last line.
pub(crate) fn run_ok(command: &mut Command, timeout: Duration) -> Result<Output> {
    let output = run(command, timeout)?;
    if !output.status.success() {
        let said = if output.stderr.trim().is_empty() {
            &output.stdout
        } else {
            &output.stderr
        };
        bail!(
            "`{}`: {}: {}",
            describe(command),
            output.status,
            said.trim()
        );
    }
    Ok(output)
}

/// A program that runs beside the lab and is ended when this is dropped.
pub(crate) struct Kept {
    child: Child,
    name: String,
}

impl Kept {
    /// Starts a program whose output goes to `log`.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Result<Kept> {
        let name = describe(command);
        let file = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting `{name}`"))?;
        Ok(Kept { child, name })
    }

    /// Its pid. `ip netns exec` and `setpriv` in front of it exec, so this is the program's own.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status if it ended.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end; kills it at the deadline.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                self.kill();
                bail!(
                    "`{}` did not end within {} s",
                    self.name,
                    timeout.as_secs_f32()
                );
            }
            interrupt::check()?;
            std::thread::sleep(POLL);
        }
    }

    /// SIGKILL, and waits until the process is gone.
    pub(crate) fn kill(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }

    /// SIGTERM, then SIGKILL if that doesn't help.
    pub(crate) fn stop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + STOP_GRACE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        self.kill();
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A program that dies with the lab, even if the lab is killed with -9. Start it from the main
/// thread: the kernel ties this to the thread that started it.
pub(crate) fn tied(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program.as_ref());
    command
}

/// Finds a program that the lab needs.
pub(crate) fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| hinted(format!("{program} is missing"), super::INSTALL_HINT))
}

fn contents(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The program and its first arguments, for messages.
fn describe(command: &Command) -> String {
    let words: Vec<_> = command
        .get_args()
        .map(|word| word.to_string_lossy())
        .collect();
    let mut text = command.get_program().to_string_lossy().into_owned();
    for word in words.iter().take(12) {
        text.push(' ');
        text.push_str(word);
    }
    if words.len() > 12 {
        text.push_str(" …");
    }
    text
}
