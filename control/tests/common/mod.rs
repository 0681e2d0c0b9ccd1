//! A directory with a daemon in it.
#![allow(dead_code, reason = "no test uses all of it")]

use std::fs::Permissions;
use std::io::{BufRead, BufReader, ErrorKind, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver};

use ringway_control::rpc::Client;
use ringway_testbed::eventually;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process};

pub(crate) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn config(&self, text: &str) -> PathBuf {
        let path = self.path("ringway.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn ringwayd(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringwayd"));
        command.env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET");
        command
            .arg("--control")
            .arg(self.path("control.sock"))
            .args(args);
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.ringwayd(args).output().unwrap()
    }

    /// Starts the daemon and waits for READY=1.
    pub(crate) fn start(&self, args: &[&str]) -> Running {
        let mut command = self.ringwayd(args);
        self.start_command(command.stderr(Stdio::piped()))
    }

    /// The same by a command of the test's own.
    pub(crate) fn start_command(&self, command: &mut Command) -> Running {
        // A daemon that ran here before had one too.
        let _ = std::fs::remove_file(self.path("notify.sock"));
        let notify = UnixDatagram::bind(self.path("notify.sock")).unwrap();
        // The daemon may be another user's.
        let all = Permissions::from_mode(0o777);
        std::fs::set_permissions(self.path("notify.sock"), all).unwrap();
        command.env("NOTIFY_SOCKET", self.path("notify.sock"));
        let child = command.spawn().unwrap();
        let running = Running {
            child,
            notify,
            control: self.path("control.sock"),
        };
        assert_eq!(running.notification(), "READY=1\n");
        running
    }
}

pub(crate) struct Running {
    pub(crate) child: Child,
    notify: UnixDatagram,
    control: PathBuf,
}

impl Running {
    pub(crate) fn notification(&self) -> String {
        let timeout = std::time::Duration::from_secs(20);
        self.notify.set_read_timeout(Some(timeout)).unwrap();
        let mut buffer = [0; 100];
        let n = loop {
            match self.notify.recv(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result.unwrap(),
            }
        };
        String::from_utf8(buffer[..n].to_vec()).unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.control, std::time::Duration::from_secs(10)).unwrap()
    }

    pub(crate) fn stop(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        assert_eq!(self.notification(), "STOPPING=1\n");
        let stderr = self.child.stderr.take().unwrap();
        let log: Vec<_> = BufReader::new(stderr).lines().map(Result::unwrap).collect();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{log:?}");
        assert!(!self.control.exists());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a program has ended.
#[track_caller]
pub(crate) fn end_of(child: &mut Child, what: &str) -> ExitStatus {
    let mut ended = None;
    eventually(what, || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    ended.unwrap()
}

/// The lines of a program's output, as they come. The pipe is closed when nobody wants more of them.
pub(crate) fn lines_of(output: impl Read + Send + 'static) -> Receiver<String> {
    let (read, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if read.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Fills the pipe to the last byte.
pub(crate) fn fill(mut writer: &PipeWriter) {
    let flags = fcntl_getfl(writer.as_fd()).unwrap();
    fcntl_setfl(writer.as_fd(), flags | OFlags::NONBLOCK).unwrap();
    for size in [4096, 1] {
        while writer.write(&vec![b'\n'; size]).is_ok() {}
    }
    fcntl_setfl(writer.as_fd(), flags).unwrap();
}
