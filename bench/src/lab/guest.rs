//! A QEMU guest: its process, its boot, its monitor.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;
use serde_json::Value;

use super::accel::Accel;
use super::console::{CommandAnswer, Console};
use super::image::Image;
use super::shape::OffloadSet;
use crate::interrupt;
use crate::netns::NetNs;
use crate::process::{Origin, Process, behind, find};

/// The QEMU program.
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// Memory of a guest: iperf3 needs tens of megabytes, the rest is socket buffers.
const MEMORY: &str = "512M";

/// How long QEMU waits before it connects again to a back-end that went away.
const RECONNECT_MS: u32 = 200;

/// Names of the two guests in all output.
pub(crate) const NAMES: [&str; 2] = ["a", "b"];

/// The host's address on the lab's network.
pub(crate) const HOST_ADDRESS: &str = "10.77.0.254";

/// The host's MAC address on the lab's network.
pub(crate) const HOST_MAC: &str = "52:54:00:77:00:fe";

/// The address of guest 0 or 1 on the lab's network.
pub(crate) fn address(index: usize) -> String {
    format!("10.77.0.{}", index + 1)
}

/// What the guest's NIC is plugged into.
#[derive(Clone, Debug)]
pub(crate) enum GuestNic {
    /// No NIC.
    None,
    /// A vhost-user back-end that listens.
    VhostUser { socket: PathBuf },
    /// A tap interface that exists, without the kernel's vhost.
    Tap { interface: String },
    /// The same with a device of this kind, by QEMU's name and properties. The guest gives it no
    /// address.
    Device {
        interface: String,
        /// Queues of the tap.
        queues: u16,
        device: String,
    },
}

/// Whose QEMU is, in numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Account {
    pub(crate) user: u32,
    pub(crate) group: u32,
}

impl Account {
    /// The command, run by this account, which is in no other group.
    pub(crate) fn runs(self, command: &Command) -> Command {
        let (user, group) = (self.user.to_string(), self.group.to_string());
        let words = ["--reuid", &user, "--regid", &group, "--clear-groups"];
        // Whoever changes its user loses what it was tied by.
        let tied = ["--pdeathsig", "KILL", "--"];
        behind("setpriv", &[&words[..], &tied].concat(), command)
    }
}

/// What to boot.
#[derive(Clone, Debug)]
pub(crate) struct GuestSpec {
    /// 0 or 1: gives name, MAC and IP address.
    pub(crate) index: usize,
    /// Queue pairs, and as many vCPUs.
    pub(crate) queue_pairs: u16,
    /// L3 MTU.
    pub(crate) mtu: u16,
    pub(crate) offloads: OffloadSet,
    pub(crate) nic: GuestNic,
    pub(crate) accel: Accel,
    /// Who runs QEMU; `None` is who runs the lab.
    pub(crate) account: Option<Account>,
    /// The NIC's addresses are the platform's (VIRTIO_F_ACCESS_PLATFORM).
    pub(crate) iommu_platform: bool,
}

/// A guest that was started.
pub(crate) struct QemuGuest {
    process: Process,
    console: Console,
    monitor: PathBuf,
    accel: Accel,
}

impl QemuGuest {
    /// Starts QEMU, in `namespace` if one is given. Logs and sockets go to `folder`. Returns at
    /// once: call [`QemuGuest::wait_ready`]. To be called from the main thread.
    pub(crate) fn start(
        spec: &GuestSpec,
        image: &Image,
        folder: &Path,
        namespace: Option<&NetNs>,
    ) -> Result<QemuGuest> {
        let name = NAMES[spec.index];
        let sockets = Sockets {
            commands: folder.join(format!("{name}.commands")),
            monitor: folder.join(format!("{name}.qmp")),
            log: folder.join(format!("{name}-console.log")),
        };
        for stale in [&sockets.commands, &sockets.monitor] {
            let _ = std::fs::remove_file(stale);
        }
        let mut command = Command::new(find(QEMU, Origin::LabPackages)?);
        arguments(&mut command, spec, image, &sockets);
        if let Some(account) = spec.account {
            command = account.runs(&command);
        }
        let qemu_log = folder.join(format!("{name}-qemu.log"));
        let mut process = Process::spawn("QEMU", &command, namespace, &qemu_log)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(folder.join(format!("{name}-commands.log")))?;
        let commands = process.wait_for("did not open its sockets", CONNECT_TIMEOUT, |_| {
            UnixStream::connect(&sockets.commands).ok()
        })?;
        Ok(QemuGuest {
            console: Console::new(commands, log)?,
            process,
            monitor: sockets.monitor,
            accel: spec.accel,
        })
    }

    /// Waits for the shell, after start or reboot.
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.accel.boot_timeout();
        self.wait_ready_until(deadline)
    }

    pub(crate) fn wait_ready_until(&mut self, deadline: Instant) -> Result<()> {
        loop {
            match self.console.poll_ready() {
                Ok(true) => return Ok(()),
                Ok(false) => self.process.check_alive()?,
                Err(error) => return Err(self.why(error)),
            }
            if Instant::now() >= deadline {
                let late = anyhow!("the guest did not reach its shell in time");
                return Err(self.why(late));
            }
        }
    }

    /// The true reason of what was seen of the guest: what QEMU says, who knows of a guest that it
    /// stopped or of its own end, or else what was seen.
    fn why(&mut self, seen: anyhow::Error) -> anyhow::Error {
        if let Err(interrupted) = interrupt::check() {
            return interrupted.into();
        }
        let status = monitor_command(&self.monitor, "query-status").ok();
        if let Some(stopped) = status.and_then(|status| stopped(&status, &self.process.said())) {
            return anyhow!(stopped);
        }
        // Its sockets close a moment before it is gone; its last words are in the error then.
        let _ = self
            .process
            .wait_for::<()>("did not end", END_TIMEOUT, |_| None);
        match self.process.check_alive() {
            Err(ended) => ended.into(),
            Ok(()) => seen,
        }
    }

    /// Runs a command; its exit status must be 0.
    pub(crate) fn run(&mut self, command: &str, timeout: Duration) -> Result<String> {
        let answer = self.try_run(command, timeout)?;
        if answer.status != 0 {
            bail!(
                "guest command `{command}`: status {}: {}",
                answer.status,
                answer.text.trim()
            );
        }
        Ok(answer.text)
    }

    /// Runs a command whatever its exit status.
    pub(crate) fn try_run(&mut self, command: &str, timeout: Duration) -> Result<CommandAnswer> {
        self.console.run(command, timeout)
    }

    /// Reboots from inside and waits for the shell.
    pub(crate) fn reboot(&mut self) -> Result<()> {
        self.console.send("reboot -f")?;
        self.wait_ready()
    }

    /// Resets the machine from outside (QMP `system_reset`) and waits for the shell.
    pub(crate) fn reset(&mut self) -> Result<()> {
        monitor_command(&self.monitor, "system_reset")?;
        self.wait_ready()
    }

    /// Takes the NIC's driver away, gives it back and configures the NIC again.
    pub(crate) fn rebind_driver(&mut self) -> Result<()> {
        let command = "d=$(basename $(readlink /sys/class/net/eth0/device)); \
                       cd /sys/bus/virtio/drivers/virtio_net && \
                       echo $d >unbind && sleep 0.2 && echo $d >bind && netup";
        self.run(command, Duration::from_secs(20)).map(drop)
    }

    /// Sends QEMU a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills QEMU with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        // Nothing of the guest is worth a clean end.
        self.process.kill();
    }
}

/// QEMU opens its sockets before it does anything slow.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long QEMU may take to be gone once its sockets are closed.
const END_TIMEOUT: Duration = Duration::from_secs(1);

struct Sockets {
    commands: PathBuf,
    monitor: PathBuf,
    log: PathBuf,
}

fn arguments(command: &mut Command, spec: &GuestSpec, image: &Image, sockets: &Sockets) {
    let pairs = spec.queue_pairs;
    command.args(["-M", "q35", "-display", "none", "-nodefaults", "-m", MEMORY]);
    command.args(spec.accel.qemu_arguments());
    command.args(["-smp", &pairs.to_string()]);
    command.args([
        "-object",
        &format!("memory-backend-memfd,id=mem,size={MEMORY},share=on"),
        "-numa",
        "node,memdev=mem",
    ]);
    command
        .arg("-serial")
        .arg(format!("file:{}", sockets.log.display()));
    command.arg("-qmp").arg(format!(
        "unix:{},server=on,wait=off",
        sockets.monitor.display()
    ));
    // Not a second UART: under load the guest lost whole FIFOs of what was sent to it.
    command.arg("-chardev").arg(format!(
        "socket,id=commands,path={},server=on,wait=off",
        sockets.commands.display()
    ));
    command.args(["-device", "virtio-serial-pci"]);
    command.args(["-device", "virtserialport,chardev=commands,name=ringway"]);
    let mut line = "console=ttyS0 quiet panic=0 mitigations=off ipv6.disable=1".to_owned();
    line += &add_nic(command, spec);
    command
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initramfs);
    command.arg("-append").arg(line);
}

/// Adds the guest's NIC; gives what the kernel's command line has to say of it.
fn add_nic(command: &mut Command, spec: &GuestSpec) -> String {
    let (pairs, mac) = (spec.queue_pairs, mac(spec.index));
    let netdev = match &spec.nic {
        GuestNic::None => return String::new(),
        GuestNic::VhostUser { socket } => {
            command.arg("-chardev").arg(format!(
                "socket,id=backend,path={},reconnect-ms={RECONNECT_MS}",
                socket.display()
            ));
            format!("vhost-user,id=net,chardev=backend,queues={pairs}")
        }
        GuestNic::Tap { interface } => tap(interface, pairs),
        GuestNic::Device {
            interface,
            queues,
            device,
        } => {
            command.arg("-netdev").arg(tap(interface, *queues));
            command
                .arg("-device")
                .arg(format!("{device},netdev=net,mac={mac},romfile="));
            // virtio_net in zero-copy sends a header from its module's memory and takes the wrong
            // physical address for it: one without RAM, which reads as zeros, unless the kernel is
            // laid out anew.
            return " nokaslr".to_owned();
        }
    };
    command.arg("-netdev").arg(netdev);
    let platform = match spec.iommu_platform {
        true => ",disable-legacy=on,iommu_platform=on",
        false => "",
    };
    command.arg("-device").arg(format!(
        "virtio-net-pci,netdev=net,mac={mac},mq={},vectors={},host_mtu={},romfile={}",
        if pairs > 1 { "on" } else { "off" },
        2 * pairs + 2,
        spec.mtu,
        spec.offloads.qemu_properties() + platform
    ));
    format!(" rw.ip={}/24 rw.mtu={}", address(spec.index), spec.mtu)
}

fn tap(interface: &str, queues: u16) -> String {
    format!("tap,id=net,ifname={interface},script=no,downscript=no,vhost=off,queues={queues}")
}

/// The MAC address of guest 0 or 1.
pub(crate) fn mac(index: usize) -> String {
    format!("52:54:00:77:00:{:02x}", index + 1)
}

/// One command to QEMU's monitor (QMP), and what it returns.
fn monitor_command(path: &Path, name: &str) -> Result<Value> {
    let stream = UnixStream::connect(path).context("connecting to QEMU's monitor")?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut writer = stream.try_clone()?;
    let mut lines = BufReader::new(stream).lines();
    lines.next().context("QEMU's monitor said nothing")??;
    let mut returned = Value::Null;
    for command in ["qmp_capabilities", name] {
        writeln!(writer, "{}", serde_json::json!({ "execute": command }))?;
        returned = loop {
            let line = lines
                .next()
                .context("QEMU's monitor closed the connection")??;
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU's monitor refused {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                break value.take();
            }
        };
    }
    Ok(returned)
}

/// Why a guest stands still, if it does: its status (QMP's `query-status`), and what QEMU said of
/// it, which a dump of registers may follow.
fn stopped(status: &Value, said: &str) -> Option<String> {
    if status["running"] != false {
        return None;
    }
    let name = status["status"].as_str().unwrap_or("unknown");
    let of_error = |line: &&str| line.contains("rror") || line.contains("fail");
    let said = said.lines().find(of_error);
    let said = said.map_or_else(String::new, |line| format!("; it said: {}", line.trim()));
    Some(format!("QEMU stopped the guest with status {name}{said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_stands_still_is_told_with_its_status_and_the_error_before_the_dump() {
        let status = |running, name| serde_json::json!({ "running": running, "status": name });
        let dump = "KVM internal error. Suberror: 1\nextra data[0]: 0x0\nRAX=0 RBX=0\n";
        assert_eq!(stopped(&status(true, "running"), dump), None);
        let expected = "QEMU stopped the guest with status internal-error; it said: KVM internal \
                        error. Suberror: 1";
        let told = stopped(&status(false, "internal-error"), dump);
        assert_eq!(told.as_deref(), Some(expected));
        let told = stopped(&status(false, "guest-panicked"), "");
        let expected = "QEMU stopped the guest with status guest-panicked";
        assert_eq!(told.as_deref(), Some(expected));
    }

    /// They need QEMU.
    mod as_root {
        use super::*;
        use crate::hint::with_hint;

        #[test]
        fn the_monitor_tells_that_a_guest_stands_still() {
            let folder = tempfile::tempdir().unwrap();
            let monitor = folder.path().join("qmp");
            let mut command = Command::new(find(QEMU, Origin::LabPackages).unwrap());
            command
                .args([
                    "-M",
                    "none",
                    "-nodefaults",
                    "-display",
                    "none",
                    "-S",
                    "-qmp",
                ])
                .arg(format!("unix:{},server=on,wait=off", monitor.display()));
            let log = folder.path().join("log");
            let mut qemu = Process::spawn("QEMU", &command, None, &log).unwrap();
            let status = qemu
                .wait_for("did not answer", CONNECT_TIMEOUT, |_| {
                    monitor_command(&monitor, "query-status").ok()
                })
                .unwrap();
            let told = stopped(&status, &qemu.said());
            let expected = "QEMU stopped the guest with status prelaunch";
            assert_eq!(told.as_deref(), Some(expected));
        }

        #[test]
        fn of_a_qemu_that_ends_its_own_words_are_told() {
            let folder = tempfile::tempdir().unwrap();
            let spec = GuestSpec {
                index: 0,
                queue_pairs: 1,
                mtu: 1500,
                offloads: OffloadSet::All,
                nic: GuestNic::None,
                accel: Accel::Tcg,
                account: None,
                iommu_platform: false,
            };
            let nowhere = PathBuf::from("/nonexistent/kernel");
            let image = Image {
                kernel: nowhere.clone(),
                initramfs: nowhere,
                kernel_version: String::new(),
            };
            let error = QemuGuest::start(&spec, &image, folder.path(), None)
                .and_then(|mut guest| guest.wait_ready())
                .unwrap_err();
            let told = with_hint(&error);
            assert!(told.starts_with("QEMU ended with exit status: 1"), "{told}");
            assert!(told.contains("/nonexistent/kernel"), "{told}");
        }
    }
}
