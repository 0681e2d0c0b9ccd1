//! The daemon's log. Whoever logs puts a line into a bounded channel and goes on; one thread alone
//! writes to standard error. So nobody else notices that it is full, closed, or a pipe that nobody
//! reads.
//!
//! ```text
//!   any thread -- put, never waits --> channel -- ringway-log, may wait --> standard error
//!                  no room: counted -----------> "log lines were lost"
//! ```

use std::io::{self, Write};
use std::panic::{self, PanicHookInfo};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{self as channel, Receiver, RecvTimeoutError, Sender};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The name of the thread that writes.
const THREAD: &str = "ringway-log";

/// Lines that may wait to be written: some seconds of all that the limits let pass.
const MAX_LINES: usize = 1024;

/// Longest line; what is beyond is cut off. With [`MAX_LINES`] it bounds the memory that lines
/// take. A pipe takes so much at once or nothing (`PIPE_BUF`).
const MAX_LINE_BYTES: usize = 4096;

/// How long the end of the process waits for lines to be written.
const FLUSH: Duration = Duration::from_millis(200);

/// Least time between two lines that tell of lost ones.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// What the thread is to do.
enum Job {
    Write(Box<[u8]>),
    /// Answer: all before this is written.
    Answer(Sender<()>),
}

/// The near end of the log; clones share it.
#[derive(Clone)]
pub(super) struct Log {
    jobs: Sender<Job>,
    lost: Arc<AtomicU64>,
}

impl Log {
    /// Starts the thread that writes to standard error. It ends with the process.
    ///
    /// # Errors
    /// There can be no further thread.
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, taken) = channel::bounded(MAX_LINES);
        let lost = Arc::new(AtomicU64::new(0));
        let log = Self {
            jobs,
            lost: Arc::clone(&lost),
        };
        thread::Builder::new()
            .name(THREAD.into())
            .spawn(move || write_all(&taken, &lost))?;
        Ok(log)
    }

    /// Has `line` written, unless [`MAX_LINES`] wait already: then it is counted as lost.
    pub(super) fn put(&self, line: &[u8]) {
        if self.jobs.try_send(Job::Write(bounded(line))).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until all lines are written, for at most [`FLUSH`].
    pub(super) fn flush(&self) {
        let deadline = Instant::now() + FLUSH;
        let (done, is_done) = channel::bounded(1);
        if self.jobs.send_deadline(Job::Answer(done), deadline).is_ok() {
            // What is not written by then is not written.
            let _ = is_done.recv_deadline(deadline);
        }
    }

    /// The last line before the process ends.
    fn put_last(&self, line: &[u8]) {
        if thread::current().name() == Some(THREAD) {
            // Nobody else writes to it, so room found is room left.
            if has_room() {
                let _ = io::stderr().write(&bounded(line));
            }
        } else {
            self.put(line);
            self.flush();
        }
    }
}

/// As tracing has it: one call for each line.
impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A copy of the line; one that is too long is cut.
fn bounded(line: &[u8]) -> Box<[u8]> {
    if line.len() <= MAX_LINE_BYTES {
        return line.into();
    }
    let mut cut = line[..MAX_LINE_BYTES].to_vec();
    cut[MAX_LINE_BYTES - 1] = b'\n';
    cut.into()
}

/// Whether standard error takes [`MAX_LINE_BYTES`] without a wait.
fn has_room() -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// The thread: writes line after line, and tells of lost ones once standard error takes lines
/// again.
fn write_all(jobs: &Receiver<Job>, lost: &AtomicU64) {
    let mut told = 0;
    let mut told_at = None::<Instant>;
    let mut is_writable = false;
    loop {
        // Lines are lost only while others wait or by this thread, so none is overslept.
        let job = if lost.load(Ordering::Relaxed) == told {
            jobs.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            jobs.recv_timeout(TELL_INTERVAL)
        };
        match job {
            Ok(Job::Write(line)) => {
                is_writable = write(&line).is_ok();
                if !is_writable {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(Job::Answer(done)) => drop(done.send(())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let in_all = lost.load(Ordering::Relaxed);
        let is_due = told_at.is_none_or(|at| at.elapsed() >= TELL_INTERVAL);
        if is_writable && is_due && in_all != told && !jobs.is_full() {
            // Comes back to this thread as a line like any other. If others take its room all the
            // same, the next one has it in `in_all`.
            tracing::warn!(lost = in_all - told, in_all, "log lines were lost");
            told = in_all;
            told_at = Some(Instant::now());
            is_writable = false;
        }
    }
}

/// Writes a line, and waits for room as long as it takes.
fn write(mut line: &[u8]) -> io::Result<()> {
    let mut stderr = io::stderr();
    while !line.is_empty() {
        match stderr.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => line = line.get(n..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Somebody who shares the pipe made it so.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// From now on a panic of any thread ends the process by SIGABRT, after one line that says which
/// thread and where: half a switch looks healthy and is not, and a supervisor starts a whole one.
pub(super) fn abort_on_panic(log: Log) {
    panic::set_hook(Box::new(move |panic| {
        log.put_last(describe(panic).as_bytes());
        process::abort();
    }));
}

fn describe(panic: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let name = thread.name().unwrap_or("without a name");
    let place = panic.location().map(ToString::to_string);
    let place = place.as_deref().unwrap_or("an unknown place");
    let message = panic.payload_as_str().unwrap_or("no message");
    let message = message.replace('\n', " ");
    format!("ringwayd: error: thread {name} panicked at {place}, the process ends: {message}\n")
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::io::{PipeReader, Read, pipe};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus, Stdio};

    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

    use super::*;

    /// Tells the test below that it is the child.
    const PANICS_IN: &str = "RINGWAY_TEST_PANICS_IN";

    const SIGABRT: i32 = 6;

    /// Not a test of its own: what the others start as a child process.
    #[test]
    fn child_that_panics() {
        let Ok(name) = env::var(PANICS_IN) else {
            return;
        };
        let log = Log::start().unwrap();
        abort_on_panic(log);
        let thread = thread::Builder::new().name(name);
        let joined = thread.spawn(|| panic!("two\nlines")).unwrap().join();
        panic!("it lives on after {joined:?}");
    }

    /// Runs the child until it ends.
    fn run(name: &str, stderr: impl Into<Stdio>) -> ExitStatus {
        Command::new(env::current_exe().unwrap())
            .args(["--exact", "daemon::log::tests::child_that_panics"])
            .arg("--nocapture")
            .env(PANICS_IN, name)
            .stdout(Stdio::null())
            .stderr(stderr)
            .status()
            .unwrap()
    }

    /// A pipe into which nothing more goes, and that nobody reads.
    fn full_pipe() -> (PipeReader, OwnedFd) {
        let (reader, mut writer) = pipe().unwrap();
        let flags = fcntl_getfl(writer.as_fd()).unwrap();
        fcntl_setfl(writer.as_fd(), flags | OFlags::NONBLOCK).unwrap();
        while writer.write(&[b'x'; 4096]).is_ok() {}
        fcntl_setfl(writer.as_fd(), flags).unwrap();
        (reader, writer.into())
    }

    #[test]
    fn a_panic_in_any_thread_ends_the_process_after_one_line() {
        for name in ["ringway-w7", THREAD] {
            let (mut reader, writer) = pipe().unwrap();
            assert_eq!(run(name, writer).signal(), Some(SIGABRT), "{name}");
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            let start =
                format!("ringwayd: error: thread {name} panicked at control/src/daemon/log.rs");
            let lines: Vec<_> = text
                .lines()
                .filter(|line| line.starts_with(&start))
                .collect();
            assert_eq!(lines.len(), 1, "{text}");
            assert!(
                lines[0].ends_with(", the process ends: two lines"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_panic_ends_the_process_while_nobody_reads_its_log() {
        for name in ["ringway-w7", THREAD] {
            let (_reader, writer) = full_pipe();
            assert_eq!(run(name, writer).signal(), Some(SIGABRT), "{name}");
            let full = std::fs::File::options().write(true).open("/dev/full");
            assert_eq!(run(name, full.unwrap()).signal(), Some(SIGABRT), "{name}");
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_and_ends() {
        let line = bounded(&[b'x'; 2 * MAX_LINE_BYTES]);
        assert_eq!(line.len(), MAX_LINE_BYTES);
        assert_eq!(line.last(), Some(&b'\n'));
        assert_eq!(&*bounded(b"short\n"), b"short\n");
    }
}
