//! Open vSwitch with its userspace datapath, database and all in one directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::args::FrameClass;
use super::{COMMAND_TIMEOUT, MEGABYTES, RunningSwitch, SwitchSetup};
use crate::process::{Origin, ProcessError, find, run_ok};

pub(super) const ORIGIN: Origin = Origin::Package("openvswitch-switch-dpdk");
/// Debian's, and that of a build with DPDK from source.
const VSWITCHD: [&str; 2] = [
    "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk",
    "/usr/local/sbin/ovs-vswitchd",
];
/// Enough for the packet buffers of ports with jumbo frames.
const MOST_MEGABYTES: u64 = 1024;
pub(super) const HUGE_PAGES: u64 = MOST_MEGABYTES / 2 + 44;
/// How long the database may take to answer.
const DATABASE_SECONDS: u32 = 5;
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

impl RunningSwitch {
    pub(super) fn start_ovs(&mut self, setup: SwitchSetup, flow: bool) -> Result<(), ProcessError> {
        if !setup.huge {
            return Err(ProcessError::Failed {
                name: self.kind.name().to_owned(),
                what: "can't do without hugepages: it runs DPDK with --in-memory, which excludes \
                       --no-huge"
                    .to_owned(),
                said: String::new(),
            });
        }
        let vswitchd = vswitchd();
        self.version = run_ok(Command::new(vswitchd).arg("--version"), COMMAND_TIMEOUT)?
            .lines()
            .map(str::trim)
            .collect::<Vec<_>>()
            .join(", ");
        let (database, socket) = (self.path("conf.db"), self.path("db.sock"));
        let mut create = self.ovs("ovsdb-tool")?;
        create.arg("create").arg(&database).arg(SCHEMA);
        run_ok(&mut create, COMMAND_TIMEOUT)?;
        let mut server = self.ovs("ovsdb-server")?;
        server
            .arg(&database)
            .arg(format!("--remote=p{}", self.ovs_remote()))
            .arg(format!("--unixctl={}", self.path("db.ctl").display()));
        self.spawn(&server)?;
        self.wait_until("did not open its database", |_| socket.exists())?;
        self.vsctl(&["--no-wait", "init"])?;
        let settings = settings(setup);
        let mut words = vec!["--no-wait", "set", "Open_vSwitch", "."];
        words.extend(settings.iter().map(String::as_str));
        self.vsctl(&words)?;
        let mut daemon = self.ovs(vswitchd)?;
        daemon
            .arg(self.ovs_remote())
            .arg(format!("--unixctl={}", self.ovs_control().display()));
        self.spawn(&daemon)?;
        self.wait_until("did not open its control socket", |switch| {
            switch.ovs_control().exists()
        })?;
        self.add_ovs_ports(setup)?;
        self.wait_until("did not open its ports", Self::has_ovs_ports)?;
        if flow {
            self.add_ovs_flows(setup)?;
        }
        if self.connects {
            return Ok(());
        }
        self.wait_for_sockets()
    }

    fn add_ovs_ports(&mut self, setup: SwitchSetup) -> Result<(), ProcessError> {
        // Ports that listen never offer segmentation offload.
        self.connects = setup.tso;
        let datapath = ["--", "set", "bridge", "br0", "datapath_type=netdev"];
        self.vsctl(&[&["--no-wait", "add-br", "br0"][..], &datapath].concat())?;
        for port in 0..setup.ports {
            let name = format!("p{port}");
            let add = [
                "--no-wait",
                "add-port",
                "br0",
                &name,
                "--",
                "set",
                "Interface",
                &name,
            ];
            let path = format!(
                "options:vhost-server-path={}",
                self.sockets[usize::from(port)].display()
            );
            let mut words = add.to_vec();
            if self.connects {
                words.extend(["type=dpdkvhostuserclient", &path]);
            } else {
                words.push("type=dpdkvhostuser");
            }
            if setup.class == FrameClass::Jumbo {
                words.push("mtu_request=9000");
            }
            self.vsctl(&words)?;
        }
        Ok(())
    }

    /// True once each port has a number, which is none as long as it has not been opened.
    fn has_ovs_ports(&self) -> bool {
        let number = |port| {
            let name = format!("p{port}");
            let said = self.vsctl(&["get", "Interface", &name, "ofport"]).ok()?;
            said.trim().parse::<u16>().ok()
        };
        (0..self.sockets.len()).all(|port| number(port).is_some())
    }

    /// From each port to its partner, in place of learning.
    fn add_ovs_flows(&mut self, setup: SwitchSetup) -> Result<(), ProcessError> {
        let bridge = format!("unix:{}", self.path("br0.mgmt").display());
        for port in 1..=setup.ports {
            let partner = ((port - 1) ^ 1) + 1;
            let flow = format!("in_port={port},actions=output:{partner}");
            let mut add = self.ovs("ovs-ofctl")?;
            add.args(["add-flow", &bridge, &flow]);
            run_ok(&mut add, COMMAND_TIMEOUT)?;
        }
        Ok(())
    }

    /// `ovs-appctl`: asks the daemon.
    pub(super) fn appctl(&self, words: &[&str]) -> Result<String, ProcessError> {
        let mut command = self.ovs("ovs-appctl")?;
        command
            .args(["-T", "5", "-t"])
            .arg(self.ovs_control())
            .args(words);
        run_ok(&mut command, COMMAND_TIMEOUT)
    }

    fn vsctl(&self, words: &[&str]) -> Result<String, ProcessError> {
        let mut command = self.ovs("ovs-vsctl")?;
        command
            .arg(format!("--timeout={DATABASE_SECONDS}"))
            .arg(format!("--db={}", self.ovs_remote()))
            .args(words);
        run_ok(&mut command, COMMAND_TIMEOUT)
    }

    /// A program of Open vSwitch with its state in the switch's directory.
    fn ovs(&self, program: &str) -> Result<Command, ProcessError> {
        let mut command = Command::new(find(program, ORIGIN)?);
        for variable in ["OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR"] {
            command.env(variable, self.dir.path());
        }
        Ok(command)
    }

    fn ovs_remote(&self) -> String {
        format!("unix:{}", self.path("db.sock").display())
    }

    fn ovs_control(&self) -> PathBuf {
        self.path("vs.ctl")
    }
}

/// The daemon's program.
pub(super) fn vswitchd() -> &'static str {
    VSWITCHD
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap_or(VSWITCHD[0])
}

/// What is set in the database before the daemon reads it.
fn settings(setup: SwitchSetup) -> Vec<String> {
    let mask = |cpu: usize| 1u128 << cpu;
    let memory = |what, megabytes| format!("other_config:dpdk-socket-{what}={megabytes}");
    vec![
        memory("mem", MEGABYTES),
        memory("limit", MOST_MEGABYTES),
        "other_config:dpdk-init=true".to_owned(),
        format!("other_config:pmd-cpu-mask={:#x}", mask(setup.cpu)),
        format!("other_config:dpdk-lcore-mask={:#x}", mask(setup.other_cpu)),
        "other_config:vhost-sock-dir=.".to_owned(),
        // Else one pool of 262,144 packet buffers takes what ports with jumbo frames would need.
        "other_config:per-port-memory=true".to_owned(),
        "other_config:dpdk-extra=--no-pci --no-telemetry --in-memory".to_owned(),
        format!("other_config:userspace-tso-enable={}", setup.tso),
    ]
}
