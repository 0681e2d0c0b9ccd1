//! What tests of real front-ends stand on: a ringwayd of their own, and programs that are talked to.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at what tells nothing by itself.
const LOOK: Duration = Duration::from_millis(20);

/// What a test holds while its guests run: they wait for each other.
pub(crate) fn alone() -> File {
    let lock = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab.lock");
    let lock = File::create(&lock).expect("a lock file in the target folder");
    lock.lock().expect("an exclusive lock");
    lock
}

/// Waits until a condition holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} within {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
}

/// A daemon with a folder for its sockets. Ended, and the folder removed, with the value.
pub(crate) struct Switch {
    daemon: Child,
    pub(crate) folder: TempDir,
}

impl Switch {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let daemon = Self::spawn(&folder);
        let switch = Self { daemon, folder };
        switch.wait_until_ready();
        switch
    }

    fn spawn(folder: &TempDir) -> Child {
        Command::new(program("ringwayd"))
            .arg("--control")
            .arg(folder.path().join("control"))
            .stderr(File::create(folder.path().join("log")).expect("a log"))
            .spawn()
            .expect("ringwayd starts")
    }

    /// Kills the daemon with -9.
    pub(crate) fn kill(&mut self) {
        self.daemon.kill().expect("it is killed");
        self.daemon.wait().expect("it ends");
    }

    /// Starts another daemon in the place of one that was killed, without ports and with a log of its
    /// own.
    pub(crate) fn start_again(&mut self) {
        self.daemon = Self::spawn(&self.folder);
        self.wait_until_ready();
    }

    fn wait_until_ready(&self) {
        eventually("ringwayd answers", || {
            self.ringway(&["port", "list"]).status.success()
        });
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn ringway(&self, arguments: &[&str]) -> Output {
        Command::new(program("ringway"))
            .arg("-s")
            .arg(self.path("control"))
            .args(arguments)
            .output()
            .expect("ringway starts")
    }

    /// Adds a port of that name, whose socket has that name in the folder.
    pub(crate) fn add_port(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let path = self.path(name);
        let place = path.to_string_lossy();
        let end = if arguments.contains(&"--connect") {
            vec!["--connect", &*place]
        } else {
            vec!["--listen", &*place]
        };
        let others = arguments.iter().filter(|option| **option != "--connect");
        let mut all = vec!["port", "add", name, "vhost-user"];
        all.extend(end);
        all.extend(others);
        let output = self.ringway(&all);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{all:?}: {stderr}");
        path
    }

    /// What `port show` tells, as JSON.
    pub(crate) fn port(&self, name: &str) -> Value {
        let output = self.ringway(&["--json", "port", "show", name]);
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        if std::thread::panicking() {
            eprintln!("ringwayd:\n{}", self.log());
        }
    }
}

/// Where `bench/install-packages.sh` unpacks what it does not install.
pub(crate) fn unpacked(name: &str, program: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("a home")).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    let folder = cache.join("ringway").join(name);
    assert!(
        folder.join(program).is_file(),
        "{program} is not in {}: `sh bench/install-packages.sh` unpacks it there",
        folder.display()
    );
    folder
}

/// A program of the workspace, built beside this crate's own.
pub(crate) fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_ringway-bench")).with_file_name(name);
    assert!(
        path.is_file(),
        "{} is not built: run the tests of the whole workspace (`cargo nextest run --workspace`)",
        path.display()
    );
    path
}

/// A program that is talked to through its standard input and output, with standard error among the
/// latter. Killed with the value.
pub(crate) struct Talker {
    child: Child,
    said: Arc<(Mutex<String>, Condvar)>,
    /// How much of it was read.
    read: usize,
}

impl Talker {
    pub(crate) fn start(command: &mut Command) -> Self {
        let (mut output, said_by_it) = std::io::pipe().expect("a pipe");
        let errors = said_by_it.try_clone().expect("a pipe's end");
        let child = command
            .stdin(Stdio::piped())
            .stdout(said_by_it)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let said: Arc<(Mutex<String>, Condvar)> = Arc::default();
        let all = Arc::clone(&said);
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut chunk) {
                let text = String::from_utf8_lossy(&chunk[..count]);
                all.0.lock().expect("no panic").push_str(&text);
                all.1.notify_all();
            }
        });
        Self {
            child,
            said,
            read: 0,
        }
    }

    pub(crate) fn tell(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        stdin.write_all(line.as_bytes()).expect("it listens");
        stdin.write_all(b"\n").expect("it listens");
    }

    /// All that it said until now.
    pub(crate) fn said(&self) -> String {
        self.said.0.lock().expect("no panic").clone()
    }

    /// What it says up to `end`, from where the last call ended.
    pub(crate) fn hear(&mut self, end: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut said = self.said.0.lock().expect("no panic");
        loop {
            if let Some(at) = said[self.read..].find(end) {
                let answer = said[self.read..self.read + at].to_owned();
                self.read += at + end.len();
                return answer;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "`{end}` within {PATIENCE:?} in:\n{said}");
            (said, _) = self.said.1.wait_timeout(said, left).expect("no panic");
        }
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
