//! The binary `ringwayd`: what it checks, what it refuses, and a run with real ports.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use common::Place;
use ringway_control::api::{
    DaemonInfo, FdbAdd, FdbAddParams, FdbDel, FdbDelParams, FdbFlush, FdbFlushParams, FdbList,
    FdbListParams, FdbListResult, MeasureSample, NoParams, PortAdd, PortAddParams, PortConfig,
    PortDel, PortDelParams, PortList, PortName, PortSet, PortSetParams, PortShow, PortShowParams,
    QueuePairs, SocketSpec, VhostUserConfig, VlanList, VlanTag, WorkerList, WorkerPin,
    WorkerPinParams, WorkerShow, WorkerShowParams, WorkerUnpin, WorkerUnpinParams,
};
use ringway_control::rpc::{CallError, Client};
use rustix::process::{Pid, Signal, kill_process};

fn error(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    // Log lines may precede the error.
    let at = text
        .find("ringwayd: error: ")
        .unwrap_or_else(|| panic!("no error: {text}"));
    let error = text[at..].to_owned();
    assert_eq!(error.lines().count(), 2, "{error}");
    assert!(
        error.lines().nth(1).unwrap().starts_with("  hint: "),
        "{error}"
    );
    error
}

fn name(port: &str) -> PortName {
    port.parse().unwrap()
}

fn vm(name: &str, listen: &Path) -> String {
    let listen = listen.display();
    format!("[ports.{name}]\nkind = \"vhost-user\"\nlisten = \"{listen}\"\nqueues = 2\n")
}

#[test]
fn check_accepts_the_sample_file_and_makes_nothing() {
    let place = Place::new();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/ringway.toml");
    let output = place.run(&["--check", "--config", sample.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stdout.starts_with(b"ok: 3 ports"));
    assert!(!place.path("control.sock").exists());
}

#[test]
fn who_does_not_exist_can_not_have_a_socket() {
    let place = Place::new();
    let socket = place.path("vm1.sock");
    let port = vm("vm1", &socket);
    for (text, what) in [
        (
            "[sockets]\ngroup = \"no-such\"\n".to_owned(),
            "[sockets]: there is no group no-such",
        ),
        (
            "[daemon]\ncontrol_owner = \"no-such\"\n".to_owned(),
            "there is no user no-such",
        ),
        (port + "owner = \"no-such\"\n", "port vm1: "),
    ] {
        let path = place.config(&text);
        let path = path.to_str().unwrap();
        let output = place.run(&["--check", "--config", path]);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(error(&output).contains(what), "{}", error(&output));
        // Neither does the daemon start, but for a default that no port takes.
        if !text.starts_with("[sockets]") {
            let output = place.run(&["--config", path]);
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(error(&output).contains("there is no user no-such"));
        }
        assert!(!socket.exists() && !place.path("control.sock").exists());
    }
}

mod as_root {
    use std::os::unix::fs::MetadataExt;
    use std::process::Stdio;

    use ringway_control::api::{Mtu, PortState, TapConfig};
    use ringway_testbed::eventually;
    use ringway_testbed::host::{fresh_namespace, ip};

    use super::*;

    /// A user of no name.
    const USER: u32 = 64_055;

    #[test]
    fn a_users_own_tap_needs_no_privilege() {
        fresh_namespace();
        let user_of = |name: &str| format!("tuntap add name {name} mode tap user {USER}");
        ip(&user_of("own0"));
        ip("link set own0 mtu 1400 up");
        ip(&user_of("down0"));
        ip("tuntap add name other0 mode tap user 64056");
        let place = Place::new();
        std::os::unix::fs::chown(place.path(""), Some(USER), Some(USER)).unwrap();
        let program = place.path("ringwayd");
        std::fs::copy(env!("CARGO_BIN_EXE_ringwayd"), &program).unwrap();
        // With a device that everybody may open, as udev makes it, also where there is none.
        let script = "mknod -m 666 $1 c 10 200 && mount --bind $1 /dev/net/tun && \
                      exec setpriv --reuid $2 --regid $2 --clear-groups $3 --control $4";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh"]);
        command.arg(place.path("tun")).arg(USER.to_string());
        command.arg(program).arg(place.path("control.sock"));
        let running = place.start_command(command.stderr(Stdio::piped()));
        let mut client = running.client();
        let mut add = |port: &str, mtu: Option<u16>| {
            let mut tap = TapConfig::new(port.parse().unwrap());
            tap.mtu = mtu.and_then(Mtu::new);
            let config = PortConfig::Tap(tap);
            let name = name(port);
            client.call::<PortAdd>(&PortAddParams { name, config })
        };
        assert_eq!(add("own0", Some(1400)).unwrap().state, PortState::Up);
        // What it may not change is said, or waited for.
        assert_eq!(add("down0", None).unwrap().state, PortState::Down);
        for (port, mtu) in [("other0", None), ("new0", None)] {
            match add(port, mtu).unwrap_err() {
                CallError::Refused { message, hint, .. } => {
                    assert!(message.contains("not permitted"), "{message}");
                    assert!(hint.contains(&format!("ip tuntap add {port} ")), "{hint}");
                }
                other => panic!("{other:?}"),
            }
        }
        ip("link set down0 up");
        let mut client = running.client();
        eventually("the port is up", || {
            let ports = client.call::<PortList>(&NoParams {}).unwrap().ports;
            ports.iter().all(|port| port.state == PortState::Up)
        });
    }

    #[test]
    fn sockets_are_for_whom_the_configuration_says() {
        let place = Place::new();
        let sockets = ["vm1", "vm2", "vm3"].map(|vm| place.path(&format!("{vm}.sock")));
        let config = place.config(
            &["[daemon]\ncontrol_mode = \"0600\"\n[sockets]\ngroup = \"64055\"\n".to_owned()]
                .into_iter()
                .chain([vm("vm1", &sockets[0]), vm("vm2", &sockets[1])])
                .chain(["owner = \"64056\"\nmode = \"0666\"\n".to_owned()])
                .collect::<String>(),
        );
        let running = place.start(&[
            "--config",
            config.to_str().unwrap(),
            "--control-group",
            "64057",
        ]);
        let listen = SocketSpec::Listen(sockets[2].as_path().try_into().unwrap());
        let mut guest = VhostUserConfig::new(listen);
        guest.access.group = "64058".parse().ok();
        let added = running.client().call::<PortAdd>(&PortAddParams {
            name: name("vm3"),
            config: PortConfig::VhostUser(guest),
        });
        added.unwrap();
        let control = place.path("control.sock");
        let found = [&control].into_iter().chain(&sockets);
        let found = found.map(|path| {
            let there = std::fs::symlink_metadata(path).unwrap();
            (there.uid(), there.gid(), there.mode() & 0o777)
        });
        assert_eq!(
            found.collect::<Vec<_>>(),
            [
                (0, 64_057, 0o600),
                (0, 64_055, 0o660),
                (64_056, 64_055, 0o666),
                (0, 64_058, 0o660),
            ]
        );
    }
}

#[test]
fn a_hang_up_ends_nothing() {
    let place = Place::new();
    let config = place.config(&vm("vm1", &place.path("vm1.sock")));
    let mut running = place.start(&["--config", config.to_str().unwrap()]);
    let mut log = BufReader::new(running.child.stderr.take().unwrap());
    for _ in 0..2 {
        kill_process(Pid::from_child(&running.child), Signal::HUP).unwrap();
        let told = log
            .by_ref()
            .lines()
            .any(|line| line.unwrap().contains("SIGHUP"));
        assert!(told, "the daemon is gone");
        let ports = running.client().call::<PortList>(&NoParams {});
        assert_eq!(ports.unwrap().ports.len(), 1);
    }
    running.child.stderr = Some(log.into_inner());
    running.stop(Signal::TERM);
    assert!(!place.path("vm1.sock").exists());
}

#[test]
fn check_tells_file_line_key_and_near_miss() {
    let place = Place::new();
    let path = place.config("[ports.vm1]\nkind = \"vhost-user\"\nquees = 2\n");
    let output = place.run(&["--check", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let expected = format!(
        "ringwayd: error: {}:3: unknown key `quees`\n  hint: did you mean `queues`?\n",
        path.display()
    );
    assert_eq!(error(&output), expected);
}

#[test]
fn refusals_exit_with_1_and_leave_nothing() {
    let place = Place::new();
    let binary = place.path("binary");
    std::fs::write(&binary, b"\xff\xfe").unwrap();
    let cases: [(&[&str], &str); 5] = [
        (&["--worker-cpus", "1023"], "CPU 1023 does not exist"),
        (&["--config", "/nonexistent.toml"], "can't be read"),
        (&["--config", "/"], "can't be read"),
        (&["--config", binary.to_str().unwrap()], "utf-8"),
        (&["--control", "/nonexistent/x.sock"], "can't listen at"),
    ];
    for (args, what) in cases {
        let mut command = place.ringwayd(&[]);
        if args[0] == "--control" {
            command = Command::new(env!("CARGO_BIN_EXE_ringwayd"));
        }
        let output = command.args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(
            error(&output).contains(what),
            "{args:?}: {}",
            error(&output)
        );
        assert!(!place.path("control.sock").exists());
    }
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        ["--worker-cpus", "3-1"],
        ["--worker-cpus", "0-99999999999"],
        ["--log-format", "xml"],
        ["--frob", "x"],
        ["extra", "words"],
    ] {
        let output = Place::new().run(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        error(&output);
    }
}

#[test]
fn a_socket_that_is_taken_is_refused_and_left_alone() {
    let place = Place::new();
    let path = place.path("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let output = place.run(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).contains("a live process listens there"));
    assert!(path.exists());
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let output = place.run(&[]);
    assert!(error(&output).contains("a file that is no socket"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_port_that_can_not_be_added_takes_those_before_it_along() {
    let place = Place::new();
    let taken = place.path("taken.sock");
    std::fs::write(&taken, "precious").unwrap();
    let first = place.path("vm1.sock");
    let path = place.config(&(vm("vm1", &first) + &vm("vm2", &taken)));
    let output = place.run(&["--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(error(&output).contains("port vm2: "), "{}", error(&output));
    assert!(!first.exists() && !place.path("control.sock").exists());
    assert_eq!(std::fs::read_to_string(&taken).unwrap(), "precious");
}

#[test]
fn a_run_with_ports_from_the_file_and_over_the_socket() {
    let place = Place::new();
    let vm1 = place.path("vm1.sock");
    let vm2 = place.path("vm2.sock");
    let path = place.config(&vm("vm1", &vm1));
    let running = place.start(&["--config", path.to_str().unwrap()]);
    let mut client = running.client();
    assert_eq!(
        client.call::<DaemonInfo>(&NoParams {}).unwrap().pid,
        running.child.id()
    );

    let add = PortAddParams {
        name: name("vm2"),
        config: PortConfig::VhostUser(VhostUserConfig::new(SocketSpec::Listen(
            vm2.as_path().try_into().unwrap(),
        ))),
    };
    let added = client.call::<PortAdd>(&add).unwrap();
    assert_eq!(added.config.queues(), QueuePairs::new(8));
    refused("port_exists", client.call::<PortAdd>(&add));
    let ports = client.call::<PortList>(&NoParams {}).unwrap().ports;
    let names: Vec<_> = ports.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["vm1", "vm2"]);
    assert_eq!(ports[0].config.queues(), QueuePairs::new(2));
    assert!(vm1.exists() && vm2.exists());

    let workers = client.call::<WorkerList>(&NoParams {}).unwrap().workers;
    assert_eq!(workers.len(), 1);
    let index = 7;
    refused(
        "no_such_worker",
        client.call::<WorkerShow>(&WorkerShowParams { index }),
    );
    let pin = |port: &str, queue, worker| WorkerPinParams {
        port: name(port),
        queue,
        worker,
    };
    refused("no_such_port", client.call::<WorkerPin>(&pin("vm9", 0, 0)));
    refused("no_such_queue", client.call::<WorkerPin>(&pin("vm1", 2, 0)));
    refused(
        "no_such_worker",
        client.call::<WorkerPin>(&pin("vm1", 1, 1)),
    );
    client.call::<WorkerPin>(&pin("vm1", 1, 0)).unwrap();
    let shown = client.call::<WorkerShow>(&WorkerShowParams { index: 0 });
    let shown = shown.unwrap();
    assert_eq!(shown.worker.queues, 2 + 8);
    let pinned: Vec<_> = shown.queues.iter().filter(|q| q.is_pinned).collect();
    assert_eq!(pinned.len(), 1);
    assert_eq!((pinned[0].port.as_str(), pinned[0].queue), ("vm1", 1));
    let ports = client.call::<PortList>(&NoParams {}).unwrap().ports;
    assert_eq!(*ports[0].config.pins(), [(1, 0)].into());
    let unpin = WorkerUnpinParams {
        port: name("vm1"),
        queue: 1,
    };
    assert!(client.call::<WorkerUnpin>(&unpin).unwrap().was_pinned);
    assert!(!client.call::<WorkerUnpin>(&unpin).unwrap().was_pinned);
    let sample = client.call::<MeasureSample>(&NoParams {}).unwrap();
    assert_eq!(sample.ports.len(), 2);
    assert!(sample.ports.iter().all(|port| port.added_monotonic_ns > 0));

    let del = PortDelParams {
        name: name("vm2"),
        if_exists: false,
    };
    assert!(client.call::<PortDel>(&del).unwrap().deleted);
    assert!(!vm2.exists());
    refused("no_such_port", client.call::<PortDel>(&del));
    let show = PortShowParams { name: name("vm2") };
    refused("no_such_port", client.call::<PortShow>(&show));
    let del = PortDelParams {
        if_exists: true,
        ..del
    };
    assert!(!client.call::<PortDel>(&del).unwrap().deleted);
    running.stop(Signal::TERM);
    assert!(!vm1.exists());
}

#[test]
fn static_entries_of_the_forwarding_database() {
    let place = Place::new();
    let path = place.config(&vm("vm1", &place.path("vm1.sock")));
    let running = place.start(&["--config", path.to_str().unwrap()]);
    let mut client = running.client();
    let add = |mac: &str, port: &str| FdbAddParams {
        mac: mac.parse().unwrap(),
        port: name(port),
        vlan: None,
    };
    client
        .call::<FdbAdd>(&add("52:54:00:00:00:01", "vm1"))
        .unwrap();
    refused(
        "no_such_port",
        client.call::<FdbAdd>(&add("52:54:00:00:00:02", "vm9")),
    );
    refused(
        "fdb_refused",
        client.call::<FdbAdd>(&add("01:00:5e:00:00:01", "vm1")),
    );
    client.call::<FdbFlush>(&FdbFlushParams::default()).unwrap();
    let of = |port: &str| FdbListParams {
        port: Some(name(port)),
        vlan: None,
    };
    let FdbListResult { entries } = client.call::<FdbList>(&of("vm1")).unwrap();
    assert_eq!(entries.len(), 1);
    assert!(entries[0].is_static);
    refused("no_such_port", client.call::<FdbList>(&of("vm9")));
    running.stop(Signal::INT);
}

#[test]
fn vlans_are_configured_changed_and_told_and_entries_are_of_one() {
    let place = Place::new();
    let ports = [
        vm("vm1", &place.path("vm1.sock")),
        "vlan = { tag = 10 }\n".into(),
        vm("vm2", &place.path("vm2.sock")),
    ];
    let path = place.config(&ports.concat());
    let running = place.start(&["--config", path.to_str().unwrap()]);
    let mut client = running.client();
    let vlans = |client: &mut Client| client.call::<VlanList>(&NoParams {}).unwrap().vlans;
    let told = vlans(&mut client);
    assert_eq!(told.last().unwrap().vlans, "10");
    assert_eq!(told.last().unwrap().tagged, [name("vm2")]);
    assert_eq!(told.last().unwrap().untagged, [name("vm1")]);

    let tag = |number: u16| Some(VlanTag::new(number).unwrap());
    let add = |port: &str, vlan| FdbAddParams {
        mac: "52:54:00:00:00:01".parse().unwrap(),
        port: name(port),
        vlan,
    };
    // In the port's own VLAN, in one of its others, and in one that it is not in.
    client.call::<FdbAdd>(&add("vm1", None)).unwrap();
    client.call::<FdbAdd>(&add("vm2", tag(20))).unwrap();
    refused("vlan_of_port", client.call::<FdbAdd>(&add("vm1", tag(20))));
    let entries = client.call::<FdbList>(&FdbListParams::default()).unwrap();
    let entries: Vec<_> = entries
        .entries
        .iter()
        .map(|entry| (entry.vlan, entry.port.as_str(), entry.is_static))
        .collect();
    assert_eq!(entries, [(10, "vm1", true), (20, "vm2", true)]);
    let del = |vlan| FdbDelParams {
        mac: "52:54:00:00:00:01".parse().unwrap(),
        vlan,
    };
    refused("several_vlans", client.call::<FdbDel>(&del(None)));
    client.call::<FdbDel>(&del(tag(20))).unwrap();
    client.call::<FdbDel>(&del(None)).unwrap();
    refused("no_such_fdb_entry", client.call::<FdbDel>(&del(None)));

    let set = |vlan: &str| PortSetParams {
        name: name("vm1"),
        vlan: Some(serde_json::from_str(vlan).unwrap()),
    };
    let info = client.call::<PortSet>(&set(r#"{"trunks":"20"}"#)).unwrap();
    assert_eq!(info.config.vlan().to_string(), "trunk of 20");
    // It has no VLAN of its own.
    refused("vlan_of_port", client.call::<FdbAdd>(&add("vm1", None)));
    client.call::<PortSet>(&set("{}")).unwrap();
    assert!(vlans(&mut client).is_empty());
    refused("vlan_of_port", client.call::<FdbAdd>(&add("vm1", tag(10))));
    running.stop(Signal::TERM);
}

fn refused<T: std::fmt::Debug>(expected: &str, result: Result<T, CallError>) {
    match result {
        Err(CallError::Refused { kind, hint, .. }) => {
            assert_eq!(kind, expected);
            assert!(!hint.is_empty());
        }
        other => panic!("{expected}: {other:?}"),
    }
}

#[test]
fn a_daemon_killed_with_9_can_be_started_again_at_once() {
    let place = Place::new();
    let vm1 = place.path("vm1.sock");
    let path = place.config(&vm("vm1", &vm1));
    let args = ["--config", path.to_str().unwrap()];
    let mut running = place.start(&args);
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    assert!(place.path("control.sock").exists() && vm1.exists());
    let running = place.start(&args);
    assert_eq!(
        running
            .client()
            .call::<PortList>(&NoParams {})
            .unwrap()
            .ports
            .len(),
        1
    );
    running.stop(Signal::TERM);
}
