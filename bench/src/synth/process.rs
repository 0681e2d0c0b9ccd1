//! A program that is measured or that measures: with a log, ended by its own pid, and gone even if
//! this process is killed.

use std::fs;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::interrupt::{self, Interrupted};
use crate::lab::tied;

/// How long a program may take to end before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// How long a prompt may take to answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at a log or a child.
const POLL: Duration = Duration::from_millis(1);
/// What testpmd prints when it has done what it was told.
const PROMPT: &str = "testpmd>";
/// Lines of a log that an error repeats.
const LAST_WORDS: usize = 3;

/// Why a program is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SwitchError {
    /// It isn't installed.
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
        /// The end of its log.
        log: String,
    },
    /// The system is in the way.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
    /// Somebody wants all of this to end.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

impl SwitchError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { hint, .. } => Some(hint.clone()),
            Self::Failed { log, .. } if log.is_empty() => None,
            Self::Failed { log, .. } => Some(format!("it said: {log}")),
            _ => None,
        }
    }
}

/// A running program; ended when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts what `command` says (program, arguments, environment); all that it prints goes to the
    /// log, line by line. `package` brings it. To be called from the main thread, to which its life
    /// is tied.
    pub(crate) fn spawn(
        name: &str,
        command: &Command,
        package: &str,
        log: PathBuf,
    ) -> Result<Self, SwitchError> {
        let program = find(command, package)?;
        let system = |what: &str, source| SwitchError::System {
            what: format!("{what} {name}"),
            source,
        };
        let output = fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|e| system("can't make a log for", e))?;
        let errors = output.try_clone().map_err(|e| system("can't log for", e))?;
        // DPDK's programs keep what they print to a file until there is a lot of it.
        let mut wrapped = tied("stdbuf");
        wrapped.arg("-oL").arg(program).args(command.get_args());
        for (variable, value) in command.get_envs() {
            wrapped.env(variable, value.unwrap_or_default());
        }
        let child = wrapped
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(errors)
            // Ctrl-C is for the bench, which ends its children.
            .process_group(0)
            .spawn()
            .map_err(|e| system("can't start", e))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Its exit status if it has ended.
    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Fails if it has ended.
    pub(crate) fn check_alive(&mut self) -> Result<(), SwitchError> {
        interrupt::check()?;
        match self.ended() {
            Some(status) => Err(self.failed(format!("ended with {status}"))),
            None => Ok(()),
        }
    }

    /// Sends a signal; a program that has ended shows at the next look.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
    }

    /// All that it printed so far.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Time that its threads were ready to run and had no CPU.
    pub(crate) fn waited_for_cpu(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let waits = tasks.into_iter().flatten().flatten().filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        Duration::from_nanos(waits.sum())
    }

    /// Waits for testpmd's first prompt.
    pub(crate) fn wait_for_prompt(&mut self, patience: Duration) -> Result<(), SwitchError> {
        self.wait_for_answer(0, "first prompt", patience)?;
        Ok(())
    }

    /// Gives testpmd a command and returns what it answers.
    pub(crate) fn tell(&mut self, command: &str) -> Result<String, SwitchError> {
        let before = self.said().len();
        let told = match &mut self.child.stdin {
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
    ) -> Result<String, SwitchError> {
        let deadline = Instant::now() + patience;
        loop {
            let said = self.said();
            if let Some(answer) = said.get(from..)
                && answer.trim_end().ends_with(PROMPT)
            {
                return Ok(answer.to_owned());
            }
            self.check_alive()?;
            if Instant::now() > deadline {
                return Err(self.failed(format!("did not answer ({what}) within {patience:?}")));
            }
            thread::sleep(POLL);
        }
    }

    /// An error that repeats its last words.
    pub(crate) fn failed(&self, what: String) -> SwitchError {
        SwitchError::Failed {
            name: self.name.clone(),
            what,
            log: last_words(&self.said()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that is stopped takes no other signal but SIGKILL.
        self.signal(Signal::CONT);
        self.signal(Signal::TERM);
        // testpmd sits at its prompt until that is closed.
        drop(self.child.stdin.take());
        let deadline = Instant::now() + END_PATIENCE;
        while self.ended().is_none() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
        // Either it has ended, and this does nothing, or it has had its time.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command of a switch to its end and returns what it printed.
pub(crate) fn run(command: &mut Command, package: &str) -> Result<String, SwitchError> {
    interrupt::check()?;
    let program = find(command, package)?;
    let name = program.display().to_string();
    let output = command
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .map_err(|source| SwitchError::System {
            what: format!("can't run {name}"),
            source,
        })?;
    if !output.status.success() {
        return Err(SwitchError::Failed {
            name,
            what: format!("ended with {}", output.status),
            log: last_words(&String::from_utf8_lossy(&output.stderr)),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A program of ours: beside this one, or else from PATH.
pub(crate) fn sibling(program: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .map(|path| path.with_file_name(program))
        .filter(|path| path.exists())
        .unwrap_or_else(|| program.into())
}

/// The file of a command's program.
pub(crate) fn find(command: &Command, package: &str) -> Result<PathBuf, SwitchError> {
    let program = Path::new(command.get_program());
    if program.components().count() > 1 && program.is_file() {
        return Ok(program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| SwitchError::Missing {
            program: program.display().to_string(),
            hint: if package.starts_with("cargo") {
                format!("`{package}` builds it")
            } else {
                format!("`apt-get install --no-install-recommends {package}` brings it")
            },
        })
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

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn spawn(script: &str) -> (tempfile::TempDir, Process) {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let process = Process::spawn("peer", &shell(script), "dash", log).unwrap();
        (folder, process)
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
    fn a_stopped_program_is_ended_all_the_same() {
        let (_folder, process) = spawn("trap 'exit 0' TERM; while :; do read line; done");
        process.signal(Signal::STOP);
        let pid = process.child.id();
        let start = Instant::now();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert!(start.elapsed() < END_PATIENCE);
    }

    #[test]
    fn a_program_that_is_not_there_names_its_package() {
        let command = Command::new("no-such-program");
        let error = run(&mut { command }, "some-package").unwrap_err();
        assert_eq!(error.to_string(), "no-such-program is not installed");
        assert!(error.hint().unwrap().contains("some-package"));
    }
}
