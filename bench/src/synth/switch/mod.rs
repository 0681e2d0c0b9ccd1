//! The switches that the load drives, each started as a user would start it, on one core, with all
//! of its state in a directory of its own.

mod busy;
mod ovs;

use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;
use tempfile::TempDir;

use super::args::{FrameClass, LoadPlace};
use super::frame::guest_mac;
use super::nic::{self, VethPair};
use crate::daemon::{Daemon, Programs, RingwayControl};
use crate::interrupt;
use crate::process::{Origin, Process, ProcessError, find, sibling};

pub(crate) use busy::testpmd_busy_seconds;

/// How long a switch may take to come up: DPDK zeroes its hugepages first.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what a switch does not tell by itself.
const LOOK: Duration = Duration::from_millis(20);
/// Memory of a DPDK program in hugepages, and in pages of 4 KiB, in which packet buffers take more.
const MEGABYTES: u64 = 512;
const MEGABYTES_NO_HUGE: u64 = 1024;
/// Hugepages of 2 MiB that testpmd takes: it needs a few more than it is told.
pub(crate) const TESTPMD_HUGE_PAGES: u64 = 300;
const TESTPMD: &str = "dpdk-testpmd";
const TESTPMD_ORIGIN: Origin = Origin::Package("dpdk-dev");
/// Bound on each command for a switch.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// A switch and a way to set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SwitchKind {
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

impl SwitchKind {
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

    /// True if it can join a guest and a NIC's queue here.
    pub(crate) fn takes_nic(self) -> bool {
        matches!(self, Self::Ringway | Self::Testpmd)
    }

    /// Fails if its program is not there.
    pub(crate) fn check_installed(self) -> Result<(), ProcessError> {
        match self {
            Self::Ringway => find(sibling("ringwayd"), Origin::Workspace),
            Self::Testpmd | Self::TestpmdMac => find(TESTPMD, TESTPMD_ORIGIN),
            Self::OvsDpdk | Self::OvsDpdkFlow => find(ovs::vswitchd(), ovs::ORIGIN),
        }
        .map(drop)
    }

    /// Hugepages of 2 MiB that it can't do without, unless told to.
    pub(crate) fn huge_pages(self) -> u64 {
        match self {
            Self::Ringway => 0,
            Self::Testpmd | Self::TestpmdMac => TESTPMD_HUGE_PAGES,
            Self::OvsDpdk | Self::OvsDpdkFlow => ovs::HUGE_PAGES,
        }
    }
}

/// What a switch is started with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SwitchSetup {
    /// CPU of its only forwarding thread.
    pub(crate) cpu: usize,
    /// CPU for all else.
    pub(crate) other_cpu: usize,
    /// Ports of guests,
    pub(crate) ports: u16,
    /// and one of a NIC's queue.
    pub(crate) nic: bool,
    pub(crate) queues: u16,
    /// The largest frames that will come.
    pub(crate) class: FrameClass,
    /// Segmentation offload is wanted.
    pub(crate) tso: bool,
    /// DPDK programs get hugepages.
    pub(crate) huge: bool,
}

/// A running switch; ended when dropped.
#[derive(Debug)]
pub(crate) struct RunningSwitch {
    kind: SwitchKind,
    /// Ended before their directory goes.
    processes: Vec<Process>,
    sockets: Vec<PathBuf>,
    dir: TempDir,
    version: String,
    /// It connects to its sockets instead.
    connects: bool,
    /// That of ringwayd.
    control: Option<RingwayControl>,
    /// The NIC that it has; goes after its processes.
    veth: Option<VethPair>,
}

impl RunningSwitch {
    /// Starts one and waits until all its sockets listen. To be called from the main thread.
    pub(crate) fn start(kind: SwitchKind, setup: SwitchSetup) -> Result<Self> {
        let dir = TempDir::with_prefix("ringway-bench-").context("can't make a directory")?;
        let sockets = (0..setup.ports)
            .map(|port| dir.path().join(format!("p{port}")))
            .collect();
        let mut switch = Self {
            kind,
            processes: Vec::new(),
            sockets,
            dir,
            version: String::new(),
            connects: false,
            control: None,
            veth: setup
                .nic
                .then(|| VethPair::create(kind.name()))
                .transpose()?,
        };
        match kind {
            SwitchKind::Ringway => switch.start_ringway(setup)?,
            SwitchKind::Testpmd => switch.start_testpmd(setup, "io")?,
            SwitchKind::TestpmdMac => switch.start_testpmd(setup, "mac")?,
            SwitchKind::OvsDpdk => switch.start_ovs(setup, false)?,
            SwitchKind::OvsDpdkFlow => switch.start_ovs(setup, true)?,
        }
        Ok(switch)
    }

    /// Which it is.
    pub(crate) fn kind(&self) -> SwitchKind {
        self.kind
    }

    /// What it says that it is.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// What a load has to know of it.
    pub(crate) fn load_place(&self) -> LoadPlace {
        LoadPlace {
            huge: false,
            macs_rewritten: self.kind.rewrites_macs(),
            listen: self.connects,
        }
    }

    /// The NIC that it has.
    pub(crate) fn veth(&self) -> Result<&VethPair> {
        self.veth.as_ref().context("the switch has no NIC")
    }

    /// Its sockets, by port.
    pub(crate) fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Fails if one of its processes has ended.
    pub(crate) fn check_alive(&mut self) -> Result<(), ProcessError> {
        self.processes.iter_mut().try_for_each(Process::check_alive)
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
        for process in &self.processes {
            process.signal(signal);
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a process of the switch.
    fn spawn(&mut self, command: &Command) -> Result<(), ProcessError> {
        let log = self.path(&format!("log{}", self.processes.len()));
        let namespace = self.veth.as_ref().map(VethPair::namespace);
        let process = Process::spawn(self.kind.name(), command, namespace, &log)?;
        self.processes.push(process);
        Ok(())
    }

    /// Waits until `ready`, as long as all processes live.
    fn wait_until(
        &mut self,
        what: &str,
        mut ready: impl FnMut(&Self) -> bool,
    ) -> Result<(), ProcessError> {
        let deadline = Instant::now() + START_PATIENCE;
        while !ready(self) {
            self.check_alive()?;
            if Instant::now() > deadline {
                let what = format!("{what} within {START_PATIENCE:?}");
                return Err(match self.processes.last() {
                    Some(process) => process.failed(what),
                    None => ProcessError::System {
                        what,
                        source: io::ErrorKind::TimedOut.into(),
                    },
                });
            }
            interrupt::sleep(LOOK)?;
        }
        Ok(())
    }

    fn wait_for_sockets(&mut self) -> Result<(), ProcessError> {
        self.wait_until("did not listen", |switch| {
            switch.sockets.iter().all(|path| path.exists())
        })
    }

    fn start_ringway(&mut self, setup: SwitchSetup) -> Result<(), ProcessError> {
        let programs = Programs::installed(setup.cpu.to_string())?;
        self.version = programs.version()?;
        let namespace = self.veth.as_ref().map(VethPair::namespace);
        let daemon = Daemon::start(self.kind.name(), &programs, namespace, self.dir.path())?;
        self.processes.push(daemon.process);
        let control = self.control.insert(daemon.control);
        let queues = setup.queues.to_string();
        for (port, socket) in self.sockets.iter().enumerate() {
            let (name, socket) = (format!("p{port}"), socket.to_string_lossy());
            let kind = ["vhost-user", "--listen", &socket, "--queues", &queues];
            control.ringway(&[&["port", "add", &name][..], &kind].concat())?;
        }
        if setup.nic {
            control.ringway(&["port", "add", "nic", "af-xdp", "--ifname", nic::IFNAME])?;
        }
        self.wait_for_sockets()
    }

    fn start_testpmd(&mut self, setup: SwitchSetup, mode: &str) -> Result<(), ProcessError> {
        let mut command = testpmd(setup.other_cpu, setup.cpu, setup.huge)?;
        let (queues, tso) = (setup.queues, u8::from(setup.tso));
        for (port, socket) in self.sockets.iter().enumerate() {
            // With `legacy-ol-flags` the virtio-net header of a large frame passes through; else
            // it arrives without, too large for its receiver.
            command.arg("--vdev").arg(format!(
                "net_vhost{port},iface={},queues={queues},tso={tso},legacy-ol-flags={tso}",
                socket.display()
            ));
        }
        if setup.nic {
            // Its busy polling, on by default, is slower on a veth: each look at an empty ring is a
            // system call.
            let ifname = nic::IFNAME;
            let options = "start_queue=0,queue_count=1,busy_budget=0";
            command.args(["--vdev", &format!("net_af_xdp0,iface={ifname},{options}")]);
        }
        let queues = queues.to_string();
        command
            .args(["--", "-i", "--nb-cores=1", "--no-lsc-interrupt"])
            // It would wait for guests for 9 s.
            .arg("--disable-link-check")
            .args(["--rxq", &queues, "--txq", &queues])
            .arg(format!("--forward-mode={mode}"))
            .arg("--auto-start");
        if self.kind.rewrites_macs() {
            for port in 0..setup.ports {
                let mac = guest_mac(port).map(|byte| format!("{byte:02x}")).join(":");
                command.arg(format!("--eth-peer={port},{mac}"));
            }
        }
        self.spawn(&command)?;
        let process = &mut self.processes[0];
        process.wait_for_prompt(START_PATIENCE)?;
        self.version = quoted_after(&process.said(), "RTE Version:").unwrap_or_default();
        self.wait_for_sockets()
    }
}

/// testpmd with one forwarding core and a memory of its own.
pub(crate) fn testpmd(main_cpu: usize, cpu: usize, huge: bool) -> Result<Command, ProcessError> {
    let mut command = Command::new(find(TESTPMD, TESTPMD_ORIGIN)?);
    command
        .args(["-l", &format!("{main_cpu},{cpu}")])
        .args(["--main-lcore", &main_cpu.to_string()])
        .args(["-v", "--no-pci", "--no-telemetry"]);
    if huge {
        command.args(["--in-memory", "--single-file-segments"]);
        command.args(["-m", &MEGABYTES.to_string()]);
    } else {
        command.args(["--no-huge", "--no-shconf"]);
        command.args(["-m", &MEGABYTES_NO_HUGE.to_string()]);
    }
    Ok(command)
}

/// What stands in single quotes behind `key`.
fn quoted_after(text: &str, key: &str) -> Option<String> {
    let mut parts = text.split_once(key)?.1.split('\'');
    Some(parts.nth(1)?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_found_in_a_log() {
        let log = "EAL: Detected NUMA nodes: 1\nEAL: RTE Version: 'DPDK 22.11.11'\n";
        assert_eq!(quoted_after(log, "RTE Version:").unwrap(), "DPDK 22.11.11");
        assert_eq!(quoted_after("", "RTE Version:"), None);
    }
}
