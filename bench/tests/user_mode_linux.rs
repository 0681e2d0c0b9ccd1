//! User-mode Linux as a front-end: its driver (arch/um/drivers/virtio_uml.c) speaks vhost-user by
//! itself, with pipes for calls, a memory table with room to spare and no device model.
//!
//! Needs what `bench/install-packages.sh` unpacks, and the daemon and its tool built by the same
//! command. Whatever is missing fails the test.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use common::{Switch, Talker, alone, eventually, unpacked};

/// What each guest sends to the other.
const MEBIBYTES: u32 = 100;

/// A guest.
struct Guest {
    console: Talker,
    address: &'static str,
}

impl Guest {
    /// Boots a guest on the port behind `socket`; `folder` is for its root and its sockets.
    fn boot(folder: &Path, socket: &Path, name: &str, address: &'static str) -> Self {
        let from = unpacked("user-mode-linux", "linux");
        let root = folder.join(format!("root-{name}"));
        for place in ["bin", "proc", "sys", "dev", "tmp"] {
            std::fs::create_dir_all(root.join(place)).expect("a folder");
        }
        for module in ["failover.ko", "net_failover.ko", "virtio_net.ko"] {
            std::fs::copy(from.join(module), root.join(module)).expect("a module");
        }
        let busybox = root.join("bin/busybox");
        std::fs::copy("/bin/busybox", &busybox).expect("busybox-static is installed");
        let init = root.join("init");
        std::fs::write(&init, include_str!("user_mode_linux.sh")).expect("a file");
        std::fs::set_permissions(&init, PermissionsExt::from_mode(0o755)).expect("its mode");
        let console = Talker::start(
            Command::new(from.join("linux"))
                // Its interpreter and its libc are there (see bench/install-packages.sh).
                .current_dir(&from)
                .env("LD_LIBRARY_PATH", &from)
                .args(["mem=320M", "quiet", "con0=fd:0,fd:1", "con=null"])
                .args(["rootfstype=hostfs", "rw", "init=/init"])
                .arg(format!("rootflags={}", root.display()))
                .arg(format!("uml_dir={}", folder.display()))
                .arg(format!("umid={name}"))
                .arg(format!("virtio_uml.device={}:1", socket.display()))
                .arg(format!("rw.ip={address}")),
        );
        let mut guest = Self { console, address };
        guest.console.hear("@@ready@@");
        guest
    }

    /// Runs a line, which has to succeed, and returns what it printed.
    fn run(&mut self, line: &str) -> String {
        self.begin(line);
        self.end()
    }

    fn begin(&mut self, line: &str) {
        self.console.tell(line);
    }

    fn end(&mut self) -> String {
        let said = self.console.hear("@@end ");
        let status = self.console.hear("@@");
        assert_eq!(status, "0", "{said}");
        said
    }
}

/// The guest's hash of a file.
fn hash(guest: &mut Guest, file: &str) -> String {
    let said = guest.run(&format!("sha256sum {file}"));
    let hash = said.split_whitespace().find(|word| word.len() == 64);
    hash.unwrap_or_else(|| panic!("no hash in {said}"))
        .to_owned()
}

fn send(from: &mut Guest, to: &mut Guest) {
    let count = MEBIBYTES;
    from.run(&format!(
        "dd if=/dev/urandom of=/tmp/sent bs=1M count={count} 2>/dev/null"
    ));
    // Its input must not end, or it tells the sender that all is over.
    to.begin("mkfifo /tmp/in; nc -l -p 5000 <>/tmp/in >/tmp/came");
    let address = to.address;
    // The other side may not listen yet.
    from.run(&format!("until nc {address} 5000 </tmp/sent; do :; done"));
    to.end();
    assert_eq!(hash(to, "/tmp/came"), hash(from, "/tmp/sent"));
    from.run("rm /tmp/sent");
    to.run("rm /tmp/came /tmp/in");
}

/// Two guests on ports of one queue pair, with these options besides, all of whose rings are of
/// that layout.
fn guests_talk(options: &[&str], layout: &str) {
    let _alone = alone();
    let switch = Switch::start();
    let folder = switch.folder.path();
    let [mut a, mut b] = [("a", "10.0.0.1"), ("b", "10.0.0.2")].map(|(name, address)| {
        let socket = switch.add_port(name, &[&["--queues", "1"], options].concat());
        Guest::boot(folder, &socket, name, address)
    });
    let started = || switch.log().matches("ring started").count();
    eventually("all rings are told", || started() >= 4);
    let of_layout = switch.log().matches(&format!("layout={layout}")).count();
    assert_eq!(of_layout, started(), "{}", switch.log());
    let said = a.run("ping -c 5 -w 20 10.0.0.2");
    assert!(said.contains(" 0% packet loss"), "{said}");
    send(&mut a, &mut b);
    send(&mut b, &mut a);
    for name in ["a", "b"] {
        let port = switch.port(name);
        assert_eq!(port["last_error"], serde_json::Value::Null, "{port}");
        assert_eq!(port["port"]["state"], "up", "{port}");
    }
}

/// Its driver takes packed rings where they are offered.
#[test]
fn two_guests_ping_and_send_each_other_bytes_that_arrive_unchanged() {
    guests_talk(&[], "Packed");
}

#[test]
fn two_guests_with_split_rings_ping_and_send_each_other_bytes_that_arrive_unchanged() {
    guests_talk(&["--no-packed"], "Split");
}

/// A port with several queue pairs offers a control queue, which nobody serves here.
#[test]
fn a_guest_that_would_drive_a_control_queue_is_refused_with_a_hint() {
    let _alone = alone();
    let switch = Switch::start();
    let socket = switch.add_port("a", &[]);
    let folder = switch.folder.path();
    // It says that it is ready although it has no NIC.
    let _guest = Guest::boot(folder, &socket, "a", "10.0.0.1");
    eventually("the reason is told", || {
        let error = switch.port("a")["last_error"].to_string();
        error.contains("VIRTIO_NET_F_CTRL_VQ") && error.contains("--queues 1")
    });
}
