//! A daemon with very many ports.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ringway_control::api::{
    NoParams, PortAdd, PortAddParams, PortConfig, PortList, PortName, PortState, SocketSpec,
    VhostUserConfig, WorkerList,
};
use ringway_control::rpc::Client;
use ringway_guest::Guest;
use ringway_testbed::{DEADLINE, eventually};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Ports in the test.
const PORTS: u32 = 1000;

/// What a connected idle port may take of the daemon's own memory.
const KIB_PER_PORT: u64 = 64;

/// How long it may take to add the ports and to connect their guests.
const CONNECT: Duration = Duration::from_secs(20);

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    fn waited(&self) -> Duration {
        waited_for_cpu(&self.0.id().to_string())
    }

    /// Resident memory that belongs to the daemon alone: guest memory is shared with the guests,
    /// programs and libraries with their files.
    fn private_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:"));
        line.unwrap()
            .split_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }
}

/// How long the threads of a process were ready to run and did not (`schedstat`, proc(5)).
fn waited_for_cpu(process: &str) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let waited_ns = |task: std::io::Result<std::fs::DirEntry>| -> u64 {
        let text = std::fs::read_to_string(task.unwrap().path().join("schedstat"));
        let text = text.unwrap_or_default();
        text.split(' ').nth(1).map_or(0, |ns| ns.parse().unwrap())
    };
    Duration::from_nanos(tasks.map(waited_ns).sum())
}

fn connect(control: &Path) -> Client {
    Client::connect(control, DEADLINE).unwrap()
}

#[test]
fn a_thousand_idle_ports_connect_fast_and_take_little_memory_each() {
    // Each guest has 8 fds here, and 7 there.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let files = u64::from(PORTS) * 8 + 100;
    assert!(
        limit.maximum.is_none_or(|maximum| maximum >= files),
        "needs {files} open files: raise `ulimit -Hn`"
    );
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control.sock");
    let daemon = Command::new(env!("CARGO_BIN_EXE_ringwayd"))
        .env("RUST_LOG", "warn")
        .env_remove("NOTIFY_SOCKET")
        .arg("--control")
        .arg(&control)
        .stderr(Stdio::null())
        .spawn();
    let daemon = Daemon(daemon.unwrap());
    eventually("the daemon listens", || {
        Client::connect(&control, DEADLINE).is_ok()
    });
    let mut client = connect(&control);
    let before_kib = daemon.private_kib();
    let waited_before = [daemon.waited(), waited_for_cpu("self")];
    let start = Instant::now();
    let guests: Vec<_> = (0..PORTS)
        .map(|number| {
            let name: PortName = format!("p{number}").parse().unwrap();
            let path = folder.path().join(name.as_str());
            let socket = SocketSpec::Listen(path.as_path().try_into().unwrap());
            let config = PortConfig::VhostUser(VhostUserConfig::new(socket));
            client
                .call::<PortAdd>(&PortAddParams { name, config })
                .unwrap();
            let config = Guest::builder()
                .queue_size(64)
                .buffer_size(256)
                .indirect(false);
            config.connect(&path).unwrap()
        })
        .collect();
    eventually("all ports are up", || {
        let list = client.call::<PortList>(&NoParams {}).unwrap().ports;
        list.iter()
            .filter(|port| port.state == PortState::Up)
            .count()
            == guests.len()
    });
    // On a machine with other work to do, both sides wait for a CPU most of the time.
    let took = start.elapsed();
    let waited = [daemon.waited(), waited_for_cpu("self")];
    let waited = [waited[0] - waited_before[0], waited[1] - waited_before[1]];
    let needed = took.saturating_sub(waited[0].max(waited[1]));
    assert!(needed < CONNECT, "{needed:?} to connect {PORTS} guests");
    eventually("the worker sleeps", || {
        let workers = client.call::<WorkerList>(&NoParams {}).unwrap().workers;
        workers.iter().all(|worker| worker.active_queues == 0)
    });
    let per_port = daemon.private_kib().saturating_sub(before_kib) / u64::from(PORTS);
    println!("{took:?} to connect {PORTS} guests, without waiting for a CPU {needed:?}");
    println!("{per_port} KiB of memory each");
    assert!(per_port <= KIB_PER_PORT, "{per_port} KiB a port");
}
