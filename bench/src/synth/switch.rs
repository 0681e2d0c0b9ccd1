//! The switches that the load drives, each started as a user would start it, on one core, with all
//! of its state in a directory of its own.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long a switch may take to come up: DPDK zeroes its hugepages first.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to end before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// Hugepages of 2 MiB that DPDK programs take.
pub(crate) const HUGE_PAGES_PER_PEER: u64 = 300;
const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";
const OVS_VSWITCHD: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";

/// A switch and a way to set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// ringwayd with a learning bridge
    Ringway,
    /// DPDK testpmd that passes frames from port to port unseen
    Testpmd,
    /// DPDK testpmd that rewrites MAC addresses
    TestpmdMac,
    /// Open vSwitch's userspace datapath with a learning bridge
    OvsDpdk,
    /// Open vSwitch's userspace datapath with a flow from port to port
    OvsDpdkFlow,
}

impl Kind {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ringway => "ringway",
            Self::Testpmd => "testpmd",
            Self::TestpmdMac => "testpmd-mac",
            Self::OvsDpdk => "ovs-dpdk",
            Self::OvsDpdkFlow => "ovs-dpdk-flow",
        }
    }

    /// True if frames get other MAC addresses on their way.
    pub(crate) fn rewrites_macs(self) -> bool {
        self == Self::TestpmdMac
    }
}

/// What a switch is started with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// CPU of its only forwarding thread.
    pub(crate) cpu: usize,
    /// CPU for all else.
    pub(crate) other_cpu: usize,
    pub(crate) ports: u16,
    pub(crate) queues: u16,
    /// Frames above 9 KiB will come.
    pub(crate) segmentation: bool,
}

/// Why a switch is not there.
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
    /// It ended or never listened.
    #[error("{name} {what}:\n{log}")]
    Failed {
        name: &'static str,
        what: String,
        /// The end of its log.
        log: String,
    },
    /// The system is in the way.
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
}

impl SwitchError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<&str> {
        match self {
            Self::Missing { hint, .. } => Some(hint),
            _ => None,
        }
    }
}

/// A running switch; ended when dropped.
#[derive(Debug)]
pub(crate) struct Switch {
    kind: Kind,
    dir: TempDir,
    children: Vec<Child>,
    sockets: Vec<PathBuf>,
}

impl Switch {
    /// Starts one and waits until all its sockets listen.
    pub(crate) fn start(kind: Kind, place: Place) -> Result<Self, SwitchError> {
        let dir = TempDir::with_prefix("ringway-bench-").map_err(|source| SwitchError::System {
            what: "can't make a directory".into(),
            source,
        })?;
        let sockets = (0..place.ports)
            .map(|port| dir.path().join(format!("p{port}")))
            .collect();
        let mut switch = Self {
            kind,
            dir,
            children: Vec::new(),
            sockets,
        };
        match kind {
            Kind::Ringway => switch.start_ringway(place)?,
            Kind::Testpmd => switch.start_testpmd(place, "io")?,
            Kind::TestpmdMac => switch.start_testpmd(place, "mac")?,
            Kind::OvsDpdk => switch.start_ovs(place, false)?,
            Kind::OvsDpdkFlow => switch.start_ovs(place, true)?,
        }
        Ok(switch)
    }

    /// Which it is.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Sockets that it listens at, by port.
    pub(crate) fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Fails if one of its processes has ended.
    pub(crate) fn check_alive(&mut self) -> Result<(), SwitchError> {
        for child in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(self.failed(format!("ended with {status}")));
            }
        }
        Ok(())
    }

    /// Takes it off its core.
    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Puts it back.
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        for child in &self.children {
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                // One that has ended shows at the next look.
                let _ = kill_process(pid, signal);
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn failed(&self, what: String) -> SwitchError {
        SwitchError::Failed {
            name: self.kind.name(),
            what,
            log: log_tail(&self.path("log")),
        }
    }

    /// Starts a process of the switch; all that it prints goes to the log.
    fn spawn(&mut self, mut command: Command, package: &str) -> Result<(), SwitchError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let system = |what: &str, source| SwitchError::System {
            what: format!("{what} {program}"),
            source,
        };
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .map_err(|e| system("can't make a log for", e))?;
        let errors = log.try_clone().map_err(|e| system("can't log for", e))?;
        let child = command
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(errors)
            // Ctrl-C is for the bench, which ends its children.
            .process_group(0)
            .spawn()
            .map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => missing(&program, package),
                _ => system("can't start", source),
            })?;
        self.children.push(child);
        Ok(())
    }

    /// Waits until `ready`, as long as all processes live.
    fn wait_until(
        &mut self,
        what: &str,
        mut ready: impl FnMut(&Self) -> bool,
    ) -> Result<(), SwitchError> {
        let deadline = Instant::now() + START_PATIENCE;
        while !ready(self) {
            self.check_alive()?;
            if Instant::now() > deadline {
                return Err(self.failed(format!("{what} within {START_PATIENCE:?}")));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn wait_for_sockets(&mut self) -> Result<(), SwitchError> {
        self.wait_until("did not listen", |switch| {
            switch.sockets.iter().all(|path| path.exists())
        })
    }

    fn start_ringway(&mut self, place: Place) -> Result<(), SwitchError> {
        let hint = "cargo build --release";
        let control = self.path("control.sock");
        let mut daemon = Command::new(sibling("ringwayd"));
        daemon
            .arg("--control")
            .arg(&control)
            .args(["--worker-cpus", &place.cpu.to_string()]);
        self.spawn(daemon, hint)?;
        self.wait_until("did not open its control socket", |_| control.exists())?;
        for (port, socket) in self.sockets.clone().iter().enumerate() {
            let mut add = Command::new(sibling("ringway"));
            add.arg("-s")
                .arg(&control)
                .args(["port", "add", &format!("p{port}"), "vhost-user", "--listen"])
                .arg(socket)
                .args(["--queues", &place.queues.to_string()]);
            self.run(add, hint)?;
        }
        self.wait_for_sockets()
    }

    fn start_testpmd(&mut self, place: Place, mode: &str) -> Result<(), SwitchError> {
        reserve_huge_pages()?;
        let prefix = format!("rb{}", std::process::id());
        let mut command = Command::new("dpdk-testpmd");
        command
            .args(["-l", &format!("{},{}", place.other_cpu, place.cpu)])
            .args(["--main-lcore", &place.other_cpu.to_string()])
            .args(["--no-pci", "--in-memory", "--single-file-segments"])
            .args(["-m", "512", "--file-prefix", &prefix]);
        let tso = u8::from(place.segmentation);
        for (port, socket) in self.sockets.iter().enumerate() {
            let queues = place.queues;
            let socket = socket.display();
            command.arg("--vdev").arg(format!(
                "net_vhost{port},iface={socket},queues={queues},tso={tso}"
            ));
        }
        let queues = place.queues.to_string();
        command
            .args(["--", "-i", "--nb-cores=1", "--no-lsc-interrupt"])
            .args(["--rxq", &queues, "--txq", &queues])
            .arg(format!("--forward-mode={mode}"))
            .arg("--auto-start");
        self.spawn(command, "dpdk-dev")?;
        self.wait_for_sockets()?;
        self.wait_until("did not start forwarding", |switch| {
            // Its prompt; all else is buffered.
            fs::read_to_string(switch.path("log")).is_ok_and(|log| log.contains("testpmd>"))
        })
    }

    fn start_ovs(&mut self, place: Place, flow: bool) -> Result<(), SwitchError> {
        let package = "openvswitch-switch-dpdk";
        if !Path::new(OVS_VSWITCHD).exists() {
            return Err(missing(OVS_VSWITCHD, package));
        }
        reserve_huge_pages()?;
        let dir = self.dir.path().to_path_buf();
        let ovs = |program: &str| {
            let mut command = Command::new(program);
            for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR"] {
                command.env(variable, &dir);
            }
            command
        };
        let (database, socket) = (self.path("conf.db"), self.path("db.sock"));
        let remote = format!("unix:{}", socket.display());
        let mut create = ovs("ovsdb-tool");
        create
            .arg("create")
            .arg(&database)
            .arg("/usr/share/openvswitch/vswitch.ovsschema");
        self.run(create, package)?;
        let mut server = ovs("ovsdb-server");
        server
            .arg(&database)
            .arg(format!("--remote=p{remote}"))
            .arg(format!("--unixctl={}", self.path("db.ctl").display()));
        self.spawn(server, package)?;
        self.wait_until("did not open its database", |_| socket.exists())?;
        let vsctl = |words: &[&str]| {
            let mut command = ovs("ovs-vsctl");
            command.arg(format!("--db={remote}")).args(words);
            command
        };
        let set = [
            "other_config:dpdk-init=true".to_owned(),
            format!("other_config:pmd-cpu-mask={:#x}", 1u64 << place.cpu),
            format!(
                "other_config:dpdk-lcore-mask={:#x}",
                1u64 << place.other_cpu
            ),
            "other_config:dpdk-socket-mem=512".to_owned(),
            "other_config:vhost-sock-dir=.".to_owned(),
            format!(
                "other_config:dpdk-extra=--no-pci --file-prefix ro{} --in-memory",
                std::process::id()
            ),
            format!("other_config:userspace-tso-enable={}", place.segmentation),
        ];
        self.run(vsctl(&["--no-wait", "init"]), package)?;
        let mut words = vec!["--no-wait", "set", "Open_vSwitch", "."];
        words.extend(set.iter().map(String::as_str));
        self.run(vsctl(&words), package)?;
        let mut vswitchd = ovs(OVS_VSWITCHD);
        vswitchd
            .arg(&remote)
            .arg(format!("--unixctl={}", self.path("vs.ctl").display()));
        self.spawn(vswitchd, package)?;
        let datapath = ["--", "set", "bridge", "br0", "datapath_type=netdev"];
        let bridge = [&["add-br", "br0"][..], &datapath].concat();
        self.run(vsctl(&bridge), package)?;
        for port in 0..place.ports {
            let name = format!("p{port}");
            let add = ["add-port", "br0", &name, "--", "set", "Interface", &name];
            self.run(
                vsctl(&[&add[..], &["type=dpdkvhostuser"]].concat()),
                package,
            )?;
        }
        if flow {
            let bridge = format!("unix:{}", self.path("br0.mgmt").display());
            for port in 1..=place.ports {
                let partner = ((port - 1) ^ 1) + 1;
                let mut add = ovs("ovs-ofctl");
                let flow = format!("in_port={port},actions=output:{partner}");
                add.args(["add-flow", &bridge, &flow]);
                self.run(add, package)?;
            }
        }
        self.wait_for_sockets()
    }

    /// Runs a command of the switch to its end.
    fn run(&self, mut command: Command, package: &str) -> Result<(), SwitchError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let output =
            command
                .stdin(Stdio::null())
                .output()
                .map_err(|source| match source.kind() {
                    io::ErrorKind::NotFound => missing(&program, package),
                    _ => SwitchError::System {
                        what: format!("can't run {program}"),
                        source,
                    },
                })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(self.failed(format!("refused `{program}`: {}", said.trim())))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.resume();
        self.signal(Signal::TERM);
        let deadline = Instant::now() + END_PATIENCE;
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            // Either it has ended, and this does nothing, or it has had its time.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn missing(program: &str, package: &str) -> SwitchError {
    let hint = if package.starts_with("cargo") {
        format!("`{package}` builds it")
    } else {
        format!("`apt-get install --no-install-recommends {package}` brings it")
    };
    SwitchError::Missing {
        program: program.to_owned(),
        hint,
    }
}

/// A program of ours: beside this one, or else from PATH.
fn sibling(program: &str) -> PathBuf {
    std::env::current_exe()
        .ok()
        .map(|path| path.with_file_name(program))
        .filter(|path| path.exists())
        .unwrap_or_else(|| program.into())
}

/// Sees to it that one more DPDK program finds its hugepages.
fn reserve_huge_pages() -> Result<(), SwitchError> {
    let fail = |source| SwitchError::System {
        what: format!("can't reserve {HUGE_PAGES_PER_PEER} hugepages of 2 MiB more"),
        source,
    };
    let total: u64 = read_number(NR_HUGEPAGES).map_err(fail)?;
    let free = free_huge_pages().map_err(fail)?;
    if free < HUGE_PAGES_PER_PEER {
        let wanted = total + HUGE_PAGES_PER_PEER - free;
        fs::write(NR_HUGEPAGES, wanted.to_string()).map_err(fail)?;
        if free_huge_pages().map_err(fail)? < HUGE_PAGES_PER_PEER {
            return Err(fail(io::ErrorKind::OutOfMemory.into()));
        }
    }
    Ok(())
}

/// Free hugepages of 2 MiB.
pub(crate) fn free_huge_pages() -> io::Result<u64> {
    read_number("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
}

fn read_number(path: &str) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, path.to_owned()))
}

fn log_tail(path: &Path) -> String {
    let log = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}
