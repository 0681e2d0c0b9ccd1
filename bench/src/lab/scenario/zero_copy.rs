//! AF_XDP on drivers that have zero-copy: ringwayd inside a guest, between its NIC and a tap.
//!
//! ```text
//!   host, in a namespace         guest
//!   tap0 (10.77.0.254) == QEMU == eth0 -- AF_XDP -- ringwayd -- rw0, a tap (10.77.0.1)
//! ```

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ringway_control::api::PortDetail;
use serde_json::{Map, Value};

use super::super::accel::Accel;
use super::super::guest::{GuestNic, GuestSpec, HOST_ADDRESS, QemuGuest, address};
use super::super::image;
use super::super::image::{Image, prepare_zero_copy};
use super::super::measure::{
    Figure, Peer, SLACK, client_command, client_timeout, parse_ping, parse_tcp, start_host_server,
};
use super::super::shape::OffloadSet;
use super::{Findings, ScenarioStage};
use crate::hint::with_hint;
use crate::interrupt;
use crate::netns::NetNs;
use crate::process::{Origin, find};
use crate::stats::median;

/// What the guest loads: the NICs' drivers, taps, and what `ss --xdp` asks.
const DRIVERS: [&str; 4] = ["virtio_net", "igb", "tun", "xsk_diag"];

/// The host's interface, into which QEMU puts what the guest's NIC sends.
const TAP: &str = "tap0";

/// The guest's address for the switch's tap; its NIC has another, which it must not filter by.
const TAP_MAC: &str = "52:54:00:77:00:0a";

/// How long frames may take to pass after a port was added: igb negotiates its link anew.
const GIVE_UP: Duration = Duration::from_secs(15);

/// Payloads of the pings: short, around the 1,024 bytes that some NICs count room in, longest.
const PING_BYTES: [u32; 4] = [56, 982, 983, 1472];

/// Pings of each length.
const PINGS: usize = 5;

/// Calls the operator's tool in the guest.
const RINGWAY: &str = "ringway -s /tmp/control";

/// A NIC of the guest.
struct NicKind {
    name: &'static str,
    /// QEMU's name and properties. Zero-copy of virtio_net needs the platform's DMA.
    device: &'static str,
    queues: u16,
    /// Frames that come as skbs have their checksums. A virtio NIC's that never saw a wire have
    /// not, and its driver tells only the kernel's stack.
    skbs_are_whole: bool,
}

const KINDS: [NicKind; 3] = [
    NicKind {
        name: "virtio_net",
        device: "virtio-net-pci,disable-legacy=on,iommu_platform=on",
        queues: 1,
        skbs_are_whole: false,
    },
    NicKind {
        name: "virtio_net-2-queues",
        device: "virtio-net-pci,disable-legacy=on,iommu_platform=on,mq=on,vectors=6",
        queues: 2,
        skbs_are_whole: false,
    },
    NicKind {
        name: "igb",
        device: "igb",
        queues: 1,
        skbs_are_whole: true,
    },
];

/// Every kind of NIC, one guest after the other.
pub(super) fn zero_copy(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let programs = &stage.base.programs;
    let programs = [
        programs.ringwayd.clone(),
        programs.ringway.clone(),
        find("ss", Origin::LabPackages)?,
    ];
    std::fs::create_dir_all(&stage.base.folder)?;
    let cache = image::cache_folder()?;
    let image = prepare_zero_copy(&cache, &DRIVERS, &programs, &stage.base.folder)?;
    findings.note(
        "kernel",
        image.kernel_version.clone(),
        image.kernel_version.clone(),
    );
    for kind in &KINDS {
        stage.progress.say(&format!("zero-copy: {}", kind.name));
        let outcome = NicGuest::boot(stage, &image, kind).and_then(|mut setup| {
            let outcome = setup.prove();
            if outcome.is_err() {
                setup.keep_state();
            }
            outcome
        });
        interrupt::check()?;
        match outcome {
            Ok((figures, words)) => {
                findings.note(kind.name, figures, format!("{}: {words}", kind.name));
            }
            Err(error) => findings
                .failures
                .push(format!("{}: {}", kind.name, with_hint(&error))),
        }
    }
    Ok(findings)
}

/// A guest with a NIC.
struct NicGuest {
    guest: QemuGuest,
    namespace: NetNs,
    /// For logs.
    folder: PathBuf,
    max_restart: Duration,
    skbs_are_whole: bool,
}

impl NicGuest {
    fn boot(stage: &ScenarioStage<'_>, image: &Image, kind: &NicKind) -> Result<NicGuest> {
        let folder = stage.base.folder.join(kind.name);
        std::fs::create_dir_all(&folder)?;
        let namespace = NetNs::create("zero-copy")?;
        let mut words = vec!["tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"];
        if kind.queues > 1 {
            words.push("multi_queue");
        }
        namespace.ip(&words)?;
        namespace.ip(&["link", "set", TAP, "up"])?;
        let host = format!("{HOST_ADDRESS}/24");
        namespace.ip(&["addr", "add", &host, "dev", TAP])?;
        let spec = GuestSpec {
            index: 0,
            // Its CPUs: one for ringwayd's worker, one for all else.
            queue_pairs: 2,
            mtu: 1500,
            offloads: OffloadSet::All,
            nic: GuestNic::Device {
                interface: TAP.to_owned(),
                queues: kind.queues,
                device: kind.device.to_owned(),
            },
            accel: stage.base.accel,
            account: None,
            iommu_platform: false,
        };
        let mut guest = QemuGuest::start(&spec, image, &folder, Some(&namespace))?;
        guest.wait_ready()?;
        guest.run("ip link set eth0 up", SLACK)?;
        Ok(NicGuest {
            guest,
            namespace,
            folder,
            max_restart: max_restart(stage.base.accel),
            skbs_are_whole: kind.skbs_are_whole,
        })
    }

    /// All that is to hold, with the figures and the words for the line.
    fn prove(&mut self) -> Result<(Map<String, Value>, String)> {
        let mut figures = Map::new();
        self.start_daemon()?;
        let mut words = vec![self.mode("zero-copy", &mut figures)?];
        self.guest
            .run("ip link set eth0 down; sleep 1; ip link set eth0 up", SLACK)?;
        self.wait_for_ping().context("after the link was down")?;
        let mut slowest = Duration::ZERO;
        for pause in [true, false] {
            self.kill_under_load(pause)?;
            slowest = slowest.max(self.restart()?);
        }
        let slowest_ms = slowest.as_millis();
        figures.insert("restart_ms".to_owned(), u64::try_from(slowest_ms)?.into());
        if slowest > self.max_restart {
            bail!("bound no sooner than {slowest_ms} ms after its restart");
        }
        words.push(format!("bound {slowest_ms} ms after a restart"));
        for mode in ["auto", "copy", "skb"] {
            self.guest.run(
                &format!("{RINGWAY} port del nic && {RINGWAY} port del host"),
                SLACK,
            )?;
            words.push(self.mode(mode, &mut figures)?);
        }
        Ok((figures, words.join(", ")))
    }

    /// Adds both ports, the NIC in this mode, and sends through it.
    fn mode(&mut self, mode: &str, figures: &mut Map<String, Value>) -> Result<String> {
        self.add_ports(mode)?;
        self.check_mode(mode)?;
        self.wait_for_ping()?;
        let ping_ms = self.ping_all_lengths().with_context(|| mode.to_owned())?;
        let key = mode.replace('-', "_");
        figures.insert(format!("{key}_ping_ms"), ping_ms.into());
        if mode == "skb" && !self.skbs_are_whole {
            return Ok(format!("{mode} {ping_ms:.2} ms"));
        }
        let sent = self.tcp(false).with_context(|| mode.to_owned())?;
        let received = self.tcp(true).with_context(|| mode.to_owned())?;
        figures.insert(format!("{key}_from_guest_gbit_per_s"), sent.into());
        figures.insert(format!("{key}_to_guest_gbit_per_s"), received.into());
        Ok(format!(
            "{mode} {ping_ms:.2} ms {sent:.2} and {received:.2} Gbit/s"
        ))
    }

    fn start_daemon(&mut self) -> Result<()> {
        // Who waits for it knows when all that it had is given back.
        let command = format!(
            "rm -f /tmp/ended; (sh -c 'echo $$ >/tmp/pid; exec ringwayd --control /tmp/control \
             --worker-cpus 1' >>/tmp/ringwayd.log 2>&1; touch /tmp/ended) & \
             n=200; until {RINGWAY} port list >/dev/null 2>&1; do \
             n=$((n-1)); [ $n -gt 0 ] || exit 1; usleep 10000; done"
        );
        self.guest.run(&command, SLACK).map(drop)
    }

    fn add_ports(&mut self, mode: &str) -> Result<()> {
        let command = format!("{} && {}", add_nic(mode), add_tap());
        self.guest.run(&command, SLACK).map(drop)
    }

    /// What ringwayd says, and what the kernel says of each queue.
    fn check_mode(&mut self, mode: &str) -> Result<()> {
        let wanted = if mode == "auto" { "zero-copy" } else { mode };
        let text = self
            .guest
            .run(&format!("{RINGWAY} -j port show nic"), SLACK)?;
        let shown: PortDetail =
            serde_json::from_str(&text).context("reading `ringway -j port show`")?;
        let in_effect = shown.af_xdp.map(|af_xdp| af_xdp.mode.as_str());
        if in_effect != Some(wanted) {
            bail!("mode {mode}: `port show` says {in_effect:?}");
        }
        let sockets = self.guest.run("ss -H --xdp -e", SLACK)?;
        let is_zero_copy = i32::from(wanted == "zero-copy");
        let expected = format!(",zc:{is_zero_copy},");
        let queues = sockets.matches("umem(").count();
        if queues == 0 || sockets.matches(&expected).count() != queues {
            bail!("mode {mode}: the kernel says {}", sockets.trim());
        }
        Ok(())
    }

    fn wait_for_ping(&mut self) -> Result<()> {
        let deadline = Instant::now() + GIVE_UP;
        let ping = format!("ping -c 1 -W 1 {HOST_ADDRESS}");
        while self.guest.try_run(&ping, SLACK)?.status != 0 {
            interrupt::check()?;
            if Instant::now() >= deadline {
                bail!("no ping was answered for {} s", GIVE_UP.as_secs());
            }
        }
        Ok(())
    }

    /// Every ping must be answered. Gives the median of the short ones in milliseconds.
    fn ping_all_lengths(&mut self) -> Result<f64> {
        let mut short = Vec::new();
        for bytes in PING_BYTES {
            let command = format!("ping -c {PINGS} -i 0.1 -W 2 -s {bytes} {HOST_ADDRESS}");
            let answer = self.guest.try_run(&command, SLACK)?;
            let answered = parse_ping(&answer.text);
            if answered.len() != PINGS {
                bail!(
                    "{} of {PINGS} pings of {bytes} bytes answered",
                    answered.len()
                );
            }
            if short.is_empty() {
                short = answered;
            }
        }
        Ok(median(&short))
    }

    /// Gbit/s from the guest's tap to the host, or the other way.
    fn tcp(&mut self, reverse: bool) -> Result<f64> {
        let _server = start_host_server(&self.namespace)?;
        let options = if reverse { "-i 0 -R" } else { "-i 0" };
        let command = client_command(Peer::Host, options, SECONDS);
        let answer = self.guest.try_run(&command, client_timeout(SECONDS))?;
        let figure = parse_tcp(&answer.text)?;
        match &figure {
            Figure::Tcp {
                bits_per_second, ..
            } if *bits_per_second > 0.0 => Ok(figure.headline()),
            _ => bail!("no byte passed"),
        }
    }

    /// SIGKILL while frames pass both ways; then, unless ringwayd is to be restarted at once, the
    /// NIC must have no socket, filter by its address again and serve the kernel. That it has no
    /// program either shows at the restart, which would be refused.
    fn kill_under_load(&mut self, uses_nic: bool) -> Result<()> {
        self.wait_for_ping()?;
        let _server = start_host_server(&self.namespace)?;
        let client = client_command(Peer::Host, "-i 0 -R", 60);
        let load = format!(
            "{client} >/dev/null 2>&1 & sleep 1; kill -9 $(cat /tmp/pid); \
             until [ -e /tmp/ended ]; do usleep 5000; done"
        );
        self.guest.run(&load, SLACK)?;
        if uses_nic {
            let gone = "n=100; while [ -n \"$(ss -H --xdp)\" ]; do \
                        n=$((n-1)); [ $n -gt 0 ] || exit 1; usleep 20000; done";
            self.guest.run(gone, SLACK).context("sockets remain")?;
            let filters = "[ $(($(cat /sys/class/net/eth0/flags) & 0x100)) = 0 ]";
            self.guest
                .run(filters, SLACK)
                .context("it is promiscuous")?;
            let own = address(1);
            self.guest
                .run(&format!("ip addr add {own}/24 dev eth0"), SLACK)?;
            self.wait_for_ping()
                .context("the NIC does not serve the kernel after ringwayd was killed")?;
            self.guest.run("ip addr flush dev eth0", SLACK)?;
        }
        self.guest.try_run("killall -q -9 iperf3", SLACK)?;
        Ok(())
    }

    /// Starts ringwayd again. Gives the time until the NIC's queues were bound.
    fn restart(&mut self) -> Result<Duration> {
        let started = self.uptime()?;
        self.start_daemon()?;
        self.guest.run(&add_nic("zero-copy"), SLACK)?;
        let took = self.uptime()?.saturating_sub(started);
        self.guest.run(&add_tap(), SLACK)?;
        self.check_mode("zero-copy")?;
        self.wait_for_ping()?;
        Ok(took)
    }

    fn uptime(&mut self) -> Result<Duration> {
        let text = self.guest.run("cat /proc/uptime", SLACK)?;
        let seconds = text.split_whitespace().next().unwrap_or_default();
        Ok(Duration::from_secs_f64(seconds.parse()?))
    }

    /// Puts what is worth knowing after a failure beside the logs.
    fn keep_state(&mut self) {
        let command = format!(
            "cat /tmp/ringwayd.log; {RINGWAY} port show nic; ss --xdp -e; dmesg | tail -n 40"
        );
        let told = self.guest.try_run(&command, SLACK);
        let text = told.map_or_else(|error| format!("{error:#}"), |answer| answer.text);
        // The failure is told anyway.
        let _ = std::fs::write(self.folder.join("state.log"), text);
    }
}

/// Length of each TCP run.
const SECONDS: u32 = 2;

fn add_nic(mode: &str) -> String {
    format!("{RINGWAY} port add nic af-xdp --ifname eth0 --mode {mode}")
}

fn add_tap() -> String {
    let own = address(0);
    format!(
        "{RINGWAY} port add host tap --ifname rw0 && ip link set rw0 address {TAP_MAC} && \
         ip addr add {own}/24 dev rw0 && ip link set rw0 up"
    )
}

/// Promise: from the start of ringwayd after a SIGKILL until the NIC's queues are bound. An
/// emulated processor takes several times as long.
fn max_restart(accel: Accel) -> Duration {
    match accel {
        Accel::Kvm => Duration::from_secs(1),
        Accel::Tcg => Duration::from_secs(5),
    }
}
