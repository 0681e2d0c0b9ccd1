//! Sockets that plug themselves: a real `ringwayd`, and front-ends that listen as QEMU does.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::{Place, Running};
use ringway_control::api::{NoParams, PortList, PortName, PortShow, PortShowParams, PortState};
use ringway_guest::{Frontend, Guest};
use ringway_testbed::eventually;
use rustix::process::Signal;

/// A daemon that watches a directory, and what it logs.
struct Stage {
    place: Place,
    running: Option<Running>,
    log: Arc<Mutex<String>>,
}

impl Stage {
    fn start(config: &str) -> Self {
        let place = Place::new();
        let config = place.config(config).display().to_string();
        let auto = place.path("auto").display().to_string();
        let mut running = place.start(&["--config", &config, "--auto", &auto]);
        let stderr = BufReader::new(running.child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                *kept.lock().unwrap() += &(line + "\n");
            }
        });
        Self {
            place,
            running: Some(running),
            log,
        }
    }

    fn path(&self, socket: &str) -> PathBuf {
        self.place.path("auto").join(socket)
    }

    /// What a VMM makes that is there and waits for its back-end.
    fn listen(&self, socket: &str) -> UnixListener {
        UnixListener::bind(self.path(socket)).unwrap()
    }

    fn ports(&self) -> Vec<(String, PortState)> {
        let mut client = self.running.as_ref().unwrap().client();
        let ports = client.call::<PortList>(&NoParams {}).unwrap().ports;
        ports
            .into_iter()
            .map(|port| (port.name.to_string(), port.state))
            .collect()
    }

    fn names(&self) -> Vec<String> {
        self.ports().into_iter().map(|(name, _)| name).collect()
    }

    fn eventually_told(&self, text: &str) {
        eventually(text, || self.log.lock().unwrap().contains(text));
    }

    fn told(&self, text: &str) -> usize {
        self.log.lock().unwrap().matches(text).count()
    }

    fn stop(mut self) {
        let running = self.running.take().unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&running.child),
            Signal::TERM,
        )
        .unwrap();
        assert_eq!(running.notification(), "STOPPING=1\n");
        self.eventually_told("stopped");
    }
}

fn guest(listener: &UnixListener) -> Guest {
    let frontend = Frontend::accept(listener).unwrap();
    Guest::builder().on(frontend).unwrap()
}

fn frame(to: u8, from: u8) -> Vec<u8> {
    let addresses = [2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    [&addresses[..], &[0; 46]].concat()
}

#[test]
fn two_vmms_that_listen_exchange_frames_with_no_command() {
    let stage = Stage::start("[profiles.web]\nqueues = 2\nmtu = 9000\n");
    let mode = fs::metadata(stage.place.path("auto"))
        .unwrap()
        .permissions();
    assert_eq!(mode.mode() & 0o7777, 0o770);
    fs::create_dir(stage.path("web")).unwrap();
    let (vm1, vm2) = (stage.listen("vm1.sock"), stage.listen("web/vm2.sock"));
    let start = Instant::now();
    let (mut one, mut two) = (guest(&vm1), guest(&vm2));
    eprintln!("plugged after {:?}", start.elapsed());
    eventually("a frame passes", || {
        one.send_frame(&frame(2, 1)).unwrap();
        two.try_recv(0).unwrap().is_some()
    });
    let up = |name: &str| (name.to_owned(), PortState::Up);
    assert_eq!(stage.ports(), [up("vm1"), up("vm2")]);
    let name: PortName = "vm2".parse().unwrap();
    let mut client = stage.running.as_ref().unwrap().client();
    let shown = client.call::<PortShow>(&PortShowParams { name }).unwrap();
    assert_eq!(shown.port.config.queues().unwrap().get(), 2);
    assert_eq!(shown.port.config.mtu().unwrap().get(), 9000);
    // What libvirt does to a socket changes nothing.
    fs::set_permissions(stage.path("vm1.sock"), Permissions::from_mode(0o600)).unwrap();
    // A VMM takes its socket with it.
    drop((two, vm2));
    fs::remove_file(stage.path("web/vm2.sock")).unwrap();
    eventually("its port goes", || stage.names() == ["vm1"]);
    assert_eq!(stage.ports(), [up("vm1")]);
    // It comes back, in another profile.
    let vm2 = stage.listen("vm2.sock");
    let mut two = guest(&vm2);
    eventually("a frame passes", || {
        one.send_frame(&frame(2, 1)).unwrap();
        two.try_recv(0).unwrap().is_some()
    });
    stage.stop();
}

#[test]
fn two_hundred_at_once_are_all_plugged() {
    let stage = Stage::start("[profiles.default]\nqueues = 1\n");
    let start = Instant::now();
    let all: Vec<_> = (0..200)
        .map(|n| stage.listen(&format!("vm{n}.sock")))
        .collect();
    let fronts: Vec<_> = all.iter().map(|vm| Frontend::accept(vm).unwrap()).collect();
    eprintln!("{} plugged after {:?}", fronts.len(), start.elapsed());
    assert_eq!(stage.names().len(), 200);
    drop((fronts, all));
    fs::remove_dir_all(stage.place.path("auto")).unwrap();
    stage.eventually_told("can't be looked at");
    // As it is made anew it is watched anew.
    fs::create_dir(stage.place.path("auto")).unwrap();
    eventually("ports without sockets go", || stage.names().is_empty());
    let vm = stage.listen("vm7.sock");
    eventually("it is watched anew", || stage.names() == ["vm7"]);
    Frontend::accept(&vm).unwrap();
    stage.stop();
}

#[test]
fn what_can_be_no_port_is_told_once_and_keeps_nobody_out() {
    let stage = Stage::start("[profiles.web]\n");
    let mut kept = vec![stage.listen("-rf.sock"), stage.listen("a b.sock")];
    fs::write(stage.path("vm2.sock"), "no socket").unwrap();
    let elsewhere = stage.place.path("elsewhere.sock");
    kept.push(UnixListener::bind(&elsewhere).unwrap());
    symlink(&elsewhere, stage.path("vm3.sock")).unwrap();
    for profile in ["web", "wep"] {
        fs::create_dir(stage.path(profile)).unwrap();
    }
    kept.push(stage.listen("wep/vm4.sock"));
    let good = stage.listen("vm1.sock");
    let _front = Frontend::accept(&good).unwrap();
    kept.push(stage.listen("web/vm1.sock"));
    stage.eventually_told("is port vm1 already");
    stage.eventually_told("there is no profile \"wep\"; there are web");
    // Looked at again and again, told once.
    for name in ["vm5.sock", "vm6.sock"] {
        let vm = stage.listen(name);
        kept.extend([vm.try_clone().unwrap()]);
        Frontend::accept(&vm).unwrap();
    }
    assert_eq!(stage.names(), ["vm1", "vm5", "vm6"]);
    for text in [
        "-rf.sock",
        "a b.sock",
        "vm2.sock",
        "vm3.sock",
        "wep/vm4.sock",
        "web/vm1.sock",
    ] {
        let text = format!("{text}\" suppressed=0");
        assert_eq!(
            stage.told(&text),
            1,
            "{text} in {}",
            stage.log.lock().unwrap()
        );
    }
    stage.stop();
}

#[test]
fn a_directory_that_anybody_may_write_to_or_that_is_none_is_refused() {
    let place = Place::new();
    let auto = place.path("auto");
    let refused = |words: &str| {
        let output = place.run(&["--auto", &auto.display().to_string()]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(words), "{text}");
        assert!(!place.path("control.sock").exists());
    };
    fs::create_dir(&auto).unwrap();
    fs::set_permissions(&auto, Permissions::from_mode(0o1777)).unwrap();
    refused("hint: whoever makes a socket there has a port of the switch: chmod o-w");
    fs::remove_dir(&auto).unwrap();
    fs::write(&auto, "a file").unwrap();
    refused("it is no directory");
    let output = place.run(&["--auto", "auto"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_socket_at_which_nobody_listens_any_more_is_no_port_after_a_time() {
    let stage = Stage::start("");
    let vm1 = stage.listen("vm1.sock");
    let front = Frontend::accept(&vm1).unwrap();
    // Killed: the file stays.
    drop((front, vm1));
    eventually("it is told", || {
        let name: PortName = "vm1".parse().unwrap();
        let mut client = stage.running.as_ref().unwrap().client();
        let shown = client.call::<PortShow>(&PortShowParams { name });
        shown.is_ok_and(|shown| {
            let error = shown.last_error.unwrap_or_default();
            error.contains("can't connect to") && error.contains("refused")
        })
    });
    eventually("it is no port", || stage.names().is_empty());
    stage.eventually_told("nobody listens at its socket");
    // The next one at this path is another one.
    fs::remove_file(stage.path("vm1.sock")).unwrap();
    let vm1 = stage.listen("vm1.sock");
    Frontend::accept(&vm1).unwrap();
    stage.stop();
}
