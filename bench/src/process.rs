//! Programs of the host, run to their end with a deadline, or kept beside the bench with a log.
//!
//! Each is in a process group of its own: Ctrl-C is for the bench, which ends its children. One
//! that is kept is also gone if the bench is killed with -9.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::interrupt::{self, Interrupted};
use crate::netns::NetNs;

/// How long a kept program may take to end before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// How long a prompt may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at what a program did.
const LOOK: Duration = Duration::from_millis(2);
/// The longest wait for a program's end between two looks at Ctrl-C.
const SLICE: Duration = Duration::from_millis(50);
/// What testpmd prints when it has done what it was told.
const PROMPT: &str = "testpmd>";
/// Lines of a program's output that an error repeats.
const LAST_WORDS: usize = 3;
/// Words of a command line that an error repeats.
const COMMAND_WORDS: usize = 12;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// It isn't there.
    #[error("{program} is not installed")]
    Missing {
        program: String,
        /// What to do.
        hint: String,
    },
    /// It ended, or never did what was expected.
    #[error("{name} {what}")]
    Failed {
        name: String,
        what: String,
        /// The end of what it printed.
        said: String,
    },
    /// The system is in the way.
    #[error("{what}")]
    System { what: String, source: io::Error },
    /// Somebody wants all of this to end.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

impl ProcessError {
    /// What to do about it, or what the program said.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { hint, .. } => Some(hint.clone()),
            Self::Failed { said, .. } if !said.is_empty() => Some(format!("it said: {said}")),
            _ => None,
        }
    }
}

/// What brings a program, for the hint when it is missing.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Origin {
    /// The bench's script, which installs all that the lab needs.
    LabPackages,
    /// A package of Debian.
    Package(&'static str),
    /// This workspace.
    Workspace,
}

impl Origin {
    /// What to do about anything that the lab lacks.
    pub(crate) const LAB_HINT: &str = "run bench/install-packages.sh as root";

    fn hint(self) -> String {
        match self {
            Self::LabPackages => Self::LAB_HINT.to_owned(),
            Self::Package(name) => {
                format!("`apt-get install --no-install-recommends {name}` brings it")
            }
            Self::Workspace => "`cargo build --release` builds it".to_owned(),
        }
    }
}

/// The file of a program: a path as it is, a name from PATH or where administrators' programs are.
pub(crate) fn find(program: impl AsRef<Path>, origin: Origin) -> Result<PathBuf, ProcessError> {
    let program = program.as_ref();
    if program.components().count() > 1 && program.is_file() {
        return Ok(program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| ProcessError::Missing {
            program: program.display().to_string(),
            hint: origin.hint(),
        })
}

/// A program of the workspace: beside this one, or else from PATH.
pub(crate) fn sibling(program: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .map(|path| path.with_file_name(program))
        .filter(|path| path.exists())
        .unwrap_or_else(|| program.into())
}

/// What a program printed until its end.
#[derive(Debug)]
pub(crate) struct ProgramOutput {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end, whatever its exit status.
///
/// # Errors
/// It can't start, or is still running after `timeout` (it is killed then).
pub(crate) fn run(command: &mut Command, timeout: Duration) -> Result<ProgramOutput, ProcessError> {
    let name = describe(command);
    let unkept = |source| ProcessError::System {
        what: format!("can't keep what {name} prints"),
        source,
    };
    let (stdout, stderr) = capture_in_files(command).map_err(unkept)?;
    let mut child = OwnedChild::spawn(command, &name)?;
    let status = child.wait(Instant::now() + timeout)?;
    let stderr = contents(stderr).map_err(unkept)?;
    let Some(status) = status else {
        return Err(ProcessError::Failed {
            name,
            what: format!("did not end within {timeout:?}"),
            said: last_words(&stderr),
        });
    };
    Ok(ProgramOutput {
        status,
        stdout: contents(stdout).map_err(unkept)?,
        stderr,
    })
}

/// Has a command print into files, which take output of any length without being read meanwhile.
fn capture_in_files(command: &mut Command) -> io::Result<(File, File)> {
    let (stdout, stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?);
    Ok((stdout, stderr))
}

/// Runs a program to its end, which must be a good one, and gives what it printed.
pub(crate) fn run_ok(command: &mut Command, timeout: Duration) -> Result<String, ProcessError> {
    let output = run(command, timeout)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = match last_words(&output.stderr) {
        nothing if nothing.is_empty() => last_words(&output.stdout),
        said => said,
    };
    Err(ProcessError::Failed {
        name: describe(command),
        what: format!("ended with {}", output.status),
        said,
    })
}

/// A program that runs beside the bench; ended when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: OwnedChild,
    log: PathBuf,
}

impl Process {
    /// Starts what `command` says (program, arguments, environment), in `namespace` if one is
    /// given; all that it prints is appended to the log, line by line. To be called from the main
    /// thread: the kernel kills the program when the thread that started it ends.
    pub(crate) fn spawn(
        name: &str,
        command: &Command,
        namespace: Option<&NetNs>,
        log: &Path,
    ) -> Result<Self, ProcessError> {
        // Each of these execs: the pid is the program's own.
        let tied = ["--pdeathsig", "KILL", "--", "stdbuf", "-oL"];
        let tied = behind("setpriv", &tied, command);
        let mut command = match namespace {
            Some(namespace) => namespace.inside(&tied)?,
            None => tied,
        };
        let mut options = File::options();
        let log_file = options.create(true).append(true).open(log);
        let files = log_file.and_then(|file| Ok((file.try_clone()?, file)));
        let (stdout, stderr) = files.map_err(|source| ProcessError::System {
            what: format!("can't make a log for {name}"),
            source,
        })?;
        command.stdin(Stdio::piped()).stdout(stdout).stderr(stderr);
        Ok(Self {
            name: name.to_owned(),
            child: OwnedChild::spawn(&mut command, name)?,
            log: log.to_owned(),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// Fails if it has ended, or when the bench is to end.
    pub(crate) fn check_alive(&mut self) -> Result<(), ProcessError> {
        interrupt::check()?;
        match self.child.ended() {
            Some(status) => Err(self.failed(format!("ended with {status}"))),
            None => Ok(()),
        }
    }

    /// Looks until there is something, for as long as the program lives; `otherwise` tells what the
    /// program did not do in time.
    pub(crate) fn wait_for<T>(
        &mut self,
        otherwise: &str,
        patience: Duration,
        mut look: impl FnMut(&Self) -> Option<T>,
    ) -> Result<T, ProcessError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(found) = look(self) {
                return Ok(found);
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                return Err(self.failed(format!("{otherwise} within {patience:?}")));
            }
            self.child.wait_slice(LOOK);
        }
    }

    /// Sends a signal; a program that has ended shows at the next look.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.pid() {
            let _ = kill_process(pid, signal);
        }
    }

    /// All that it printed so far.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Time that its threads were ready to run and had no CPU.
    pub(crate) fn waited_for_cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid()));
        let waits = tasks.into_iter().flatten().flatten().filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        Duration::from_nanos(waits.sum())
    }

    /// Waits for testpmd's first prompt.
    pub(crate) fn wait_for_prompt(&mut self, patience: Duration) -> Result<(), ProcessError> {
        self.wait_for_answer(0, "first prompt", patience).map(drop)
    }

    /// Gives testpmd a command and returns what it answers.
    pub(crate) fn tell(&mut self, command: &str) -> Result<String, ProcessError> {
        let before = self.said().len();
        let told = match &mut self.child.0.stdin {
            Some(stdin) => writeln!(stdin, "{command}"),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        if told.is_err() {
            self.check_alive()?;
        }
        self.wait_for_answer(before, command, ANSWER_PATIENCE)
    }

    fn wait_for_answer(
        &mut self,
        from: usize,
        what: &str,
        patience: Duration,
    ) -> Result<String, ProcessError> {
        self.wait_for(&format!("did not answer ({what})"), patience, |process| {
            let said = process.said();
            let answer = said.get(from..)?;
            answer
                .trim_end()
                .ends_with(PROMPT)
                .then(|| answer.to_owned())
        })
    }

    /// An error that repeats its last words.
    pub(crate) fn failed(&self, what: impl Into<String>) -> ProcessError {
        ProcessError::Failed {
            name: self.name.clone(),
            what: what.into(),
            said: last_words(&self.said()),
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill();
    }

    /// SIGTERM, and SIGKILL if that doesn't help in time.
    pub(crate) fn stop(&mut self) {
        // One that is stopped takes no other signal but SIGKILL.
        self.signal(Signal::CONT);
        self.signal(Signal::TERM);
        // testpmd sits at its prompt until that is closed.
        drop(self.child.0.stdin.take());
        let deadline = Instant::now() + END_PATIENCE;
        while self.child.ended().is_none() && Instant::now() < deadline {
            self.child.wait_slice(SLICE);
        }
        self.kill();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.child.ended().is_none() {
            self.stop();
        }
    }
}

/// A child that is killed when dropped, and waited for.
#[derive(Debug)]
struct OwnedChild(Child);

impl OwnedChild {
    fn spawn(command: &mut Command, name: &str) -> Result<Self, ProcessError> {
        let child = command.process_group(0).spawn();
        child.map(Self).map_err(|source| ProcessError::System {
            what: format!("can't start {name}"),
            source,
        })
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.0.id()).ok().and_then(Pid::from_raw)
    }

    /// Its exit status if it has ended.
    fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }

    /// Waits for its end; `None` if it is still running at the deadline.
    fn wait(&mut self, deadline: Instant) -> Result<Option<ExitStatus>, Interrupted> {
        loop {
            if let Some(status) = self.ended() {
                return Ok(Some(status));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            interrupt::check()?;
            self.wait_slice(left.min(SLICE));
        }
    }

    /// Waits until it ends, a signal comes, or this time has passed.
    fn wait_slice(&self, slice: Duration) {
        let pidfd = self
            .pid()
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let timeout = Timespec::try_from(slice).ok();
        match &pidfd {
            Some(pidfd) => {
                let _ = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], timeout.as_ref());
            }
            None => std::thread::sleep(slice),
        }
    }

    fn kill(&mut self) {
        // A child that has been waited for is not touched by either.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for OwnedChild {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The command behind another program, which execs it.
pub(crate) fn behind(program: impl AsRef<Path>, words: &[&str], command: &Command) -> Command {
    let mut wrapped = Command::new(program.as_ref());
    wrapped
        .args(words)
        .arg(command.get_program())
        .args(command.get_args());
    for (variable, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(variable, value),
            None => wrapped.env_remove(variable),
        };
    }
    wrapped
}

fn contents(mut file: File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The program and its first arguments, for messages.
fn describe(command: &Command) -> String {
    let mut text = format!("`{}", command.get_program().display());
    for word in command.get_args().take(COMMAND_WORDS) {
        let _ = write!(text, " {}", word.display());
    }
    if command.get_args().len() > COMMAND_WORDS {
        text.push_str(" …");
    }
    text.push('`');
    text
}

fn last_words(log: &str) -> String {
    let lines: Vec<&str> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with(PROMPT))
        .collect();
    lines[lines.len().saturating_sub(LAST_WORDS)..].join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn spawn(script: &str) -> (tempfile::TempDir, Process) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let process = Process::spawn("peer", &shell(script), None, &log).unwrap();
        (folder, process)
    }

    fn is_running(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_prompt_is_told_and_answers() {
        let (_folder, mut process) =
            spawn("echo 'testpmd> '; while read line; do echo \"$line!\"; echo 'testpmd> '; done");
        process.wait_for_prompt(ANSWER_PATIENCE).unwrap();
        let answer = process.tell("show").unwrap();
        assert!(answer.contains("show!"), "{answer}");
    }

    #[test]
    fn a_program_that_ends_is_told_with_its_last_words() {
        let (_folder, mut process) = spawn("echo one; echo two; echo three; echo four; exit 3");
        let error = process.wait_for_prompt(ANSWER_PATIENCE).unwrap_err();
        assert_eq!(error.to_string(), "peer ended with exit status: 3");
        assert_eq!(error.hint().unwrap(), "it said: two / three / four");
    }

    #[test]
    fn a_program_that_never_does_what_is_awaited_is_told_at_the_deadline() {
        let (_folder, mut process) = spawn("echo here; read line");
        process
            .wait_for("did not speak", ANSWER_PATIENCE, |process| {
                (!process.said().is_empty()).then_some(())
            })
            .unwrap();
        let error = process
            .wait_for::<()>("did not listen", SOON, |_| None)
            .unwrap_err();
        assert_eq!(error.to_string(), "peer did not listen within 20ms");
        assert_eq!(error.hint().unwrap(), "it said: here");
    }

    #[test]
    fn a_stopped_program_is_ended_all_the_same() {
        let (_folder, process) = spawn("trap 'exit 0' TERM; while :; do read line; done");
        process.signal(Signal::STOP);
        let (pid, start) = (process.pid(), Instant::now());
        drop(process);
        assert!(!is_running(pid));
        assert!(start.elapsed() < END_PATIENCE);
    }

    #[test]
    fn a_killed_program_is_gone() {
        let (_folder, mut process) = spawn("read line");
        process.kill();
        assert!(!is_running(process.pid()));
        let error = process.check_alive().unwrap_err();
        assert_eq!(error.to_string(), "peer ended with signal: 9 (SIGKILL)");
    }

    #[test]
    fn a_program_that_hangs_is_killed_at_the_deadline() {
        let mut hangs = shell("echo waiting >&2; exec sleep 60");
        let start = Instant::now();
        let error = run(&mut hangs, SOON).unwrap_err();
        let expected = "`sh -c echo waiting >&2; exec sleep 60` did not end within 20ms";
        assert_eq!(error.to_string(), expected);
        assert!(start.elapsed() < END_PATIENCE);
    }

    #[test]
    fn output_longer_than_a_pipe_arrives_whole() {
        let mut long = shell("head -c 300000 /dev/zero | tr '\\0' x; echo done >&2");
        let output = run(&mut long, ANSWER_PATIENCE).unwrap();
        assert_eq!((output.stdout.len(), &*output.stderr), (300_000, "done\n"));
    }

    #[test]
    fn a_bad_end_is_an_error_with_what_was_said_on_either_output() {
        for script in ["echo no; exit 2", "echo yes; echo no >&2; exit 2"] {
            let error = run_ok(&mut shell(script), ANSWER_PATIENCE).unwrap_err();
            let expected = format!("`sh -c {script}` ended with exit status: 2");
            assert_eq!(error.to_string(), expected);
            assert_eq!(error.hint().unwrap(), "it said: no");
        }
        let said = run_ok(&mut shell("echo yes"), ANSWER_PATIENCE).unwrap();
        assert_eq!(said, "yes\n");
    }

    #[test]
    fn a_program_that_is_not_there_names_what_brings_it() {
        let error = find("no-such-program", Origin::Package("some-package")).unwrap_err();
        assert_eq!(error.to_string(), "no-such-program is not installed");
        assert!(error.hint().unwrap().contains("some-package"));
        let error = run(&mut Command::new("/nonexistent/program"), SOON).unwrap_err();
        assert_eq!(error.to_string(), "can't start `/nonexistent/program`");
    }

    #[test]
    fn a_wrapped_command_keeps_its_words_and_its_environment() {
        let mut command = Command::new("peer");
        command.arg("-v").env("HERE", "1").env_remove("GONE");
        let wrapped = behind("ip", &["netns", "exec", "x"], &command);
        assert_eq!(describe(&wrapped), "`ip netns exec x peer -v`");
        assert!(wrapped.get_envs().eq(command.get_envs()));
    }
}
