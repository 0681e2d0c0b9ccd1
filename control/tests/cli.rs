//! The binary `ringway`: exit codes, errors and JSON, against a daemon that gives canned answers.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ringway_control::api::{
    ApiError, DaemonInfo, DaemonReport, ErrorKind, MeasureSample, Method, PairCounters, PortDel,
    PortDelResult, PortList, PortListResult, PortSample, Sample, SocketAccess, WorkerList,
    WorkerListResult, WorkerSample,
};
use ringway_control::rpc::{ControlSocket, Reply, Server};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

struct Daemon {
    _server: Server,
    directory: tempfile::TempDir,
}

/// A daemon with the ports a and b, between which 1,000 frames of 125 bytes pass from each sample
/// to the next, which are a second apart by its clock.
fn daemon() -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let socket = ControlSocket::bind(
        &directory.path().join("control.sock"),
        &SocketAccess::default(),
    )
    .unwrap();
    let samples = AtomicU64::new(0);
    let handler =
        move |method: &str, _: Option<&RawValue>| answer(method, &samples).map(Reply::Result);
    Daemon {
        _server: Server::start(socket, Arc::new(handler)).unwrap(),
        directory,
    }
}

fn answer(method: &str, samples: &AtomicU64) -> Result<Box<RawValue>, ApiError> {
    let refused = || ApiError::new(ErrorKind::NoSuchPort, "there is no port x", "see the list");
    Ok(match method {
        PortList::NAME => to_raw_value(&PortListResult { ports: vec![] }),
        PortDel::NAME => to_raw_value(&PortDelResult { deleted: true }),
        WorkerList::NAME => to_raw_value(&WorkerListResult { workers: vec![] }),
        DaemonInfo::NAME => to_raw_value(&DaemonReport {
            version: "0.0.0".into(),
            pid: 1,
            uptime_seconds: 1.0,
        }),
        MeasureSample::NAME => to_raw_value(&sample(samples.fetch_add(1, Ordering::Relaxed))),
        _ => return Err(refused()),
    }
    .unwrap())
}

fn sample(n: u64) -> Sample {
    let port = |name: &str| PortSample {
        name: name.parse().unwrap(),
        added_monotonic_ns: 1,
        rx_drops: Default::default(),
    };
    Sample {
        monotonic_ns: (10 + n) * 1_000_000_000,
        pairs: vec![PairCounters {
            from: "a".parse().unwrap(),
            to: "b".parse().unwrap(),
            frames: 1_000 * n,
            bytes: 125_000 * n,
            drops: Default::default(),
        }],
        ports: vec![port("a"), port("b")],
        workers: vec![WorkerSample {
            index: 0,
            cpu: 1,
            busy_ns: n,
            polling_ns: n,
            asleep_ns: 2 * n,
        }],
    }
}

fn ringway(socket: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringway"));
    command.env_remove("RINGWAY_CONTROL").arg("-s").arg(socket);
    command
}

impl Daemon {
    fn ringway(&self, args: &[&str]) -> Command {
        let mut command = ringway(&self.directory.path().join("control.sock"));
        command.args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.ringway(args).output().unwrap()
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// An error has two lines: what, and what to do.
fn must_be_two_lines(output: &Output) {
    let error = text(&output.stderr);
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(lines[0].starts_with("ringway: error: "), "{error}");
    assert!(lines[1].starts_with("  hint: "), "{error}");
    assert!(output.stdout.is_empty());
}

#[test]
fn exit_0_when_done() {
    let daemon = daemon();
    let output = daemon.run(&["port", "list"]);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("no ports"));
    let output = daemon.run(&["port", "del", "a", "--if-exists"]);
    assert_eq!(text(&output.stdout), "port a deleted\n");
}

#[test]
fn drops_are_of_ports_that_exist() {
    let daemon = daemon();
    let output = daemon.run(&["drops", "-i", "0.1", "--port", "a"]);
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "no frame was dropped\n");
    let output = daemon.run(&["drops", "-i", "0.1", "-j"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json, serde_json::json!({ "seconds": 1.0, "drops": [] }));
    let output = daemon.run(&["drops", "--port", "x"]);
    assert_eq!(code(&output), 1);
    must_be_two_lines(&output);
}

#[test]
fn exit_1_when_the_daemon_refuses() {
    let output = daemon().run(&["port", "show", "x"]);
    assert_eq!(code(&output), 1);
    must_be_two_lines(&output);
    assert_eq!(
        text(&output.stderr),
        "ringway: error: there is no port x\n  hint: see the list\n"
    );
}

#[test]
fn exit_2_for_a_command_line_that_makes_no_sense() {
    let cases: [&[&str]; 14] = [
        &["port"],
        &["port", "lst"],
        &["port", "list", "--frob"],
        &["port", "add", "a"],
        &["port", "add", "a/b", "tap", "--ifname", "rw0"],
        &["port", "add", "a", "tap"],
        &["port", "add", "a", "tap", "--ifname", "sixteen_bytes_xx"],
        &[
            "port", "add", "a", "tap", "--ifname", "rw0", "--queues", "65",
        ],
        &["port", "add", "a", "vhost-user"],
        &[
            "port",
            "add",
            "a",
            "vhost-user",
            "--listen",
            "/a",
            "--connect",
            "/b",
        ],
        &[
            "port",
            "add",
            "a",
            "vhost-user",
            "--listen",
            "/a",
            "--mtu",
            "70000",
        ],
        &["fdb", "add", "52:54", "a"],
        &["measure", "-i", "0"],
        &["prot", "list"],
    ];
    for args in cases {
        let output = ringway(Path::new("/nonexistent"))
            .args(args)
            .output()
            .unwrap();
        assert_eq!(code(&output), 2, "{args:?}");
        must_be_two_lines(&output);
    }
}

#[test]
fn exit_3_when_nobody_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let stale = directory.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let long = directory.path().join("x".repeat(300));
    for path in [&directory.path().join("missing"), &stale, &file, &long] {
        let output = ringway(path).args(["port", "list"]).output().unwrap();
        assert_eq!(code(&output), 3, "{}", path.display());
        must_be_two_lines(&output);
    }
}

#[test]
fn exit_3_when_another_program_answers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let answering = std::thread::spawn(move || {
        for answer in ["220 smtp ready\n", "{}\n", "", "{\"id\":9,\"result\":{}}\n"] {
            let (stream, _) = listener.accept().unwrap();
            BufReader::new(&stream)
                .read_line(&mut String::new())
                .unwrap();
            std::io::Write::write_all(&mut &stream, answer.as_bytes()).unwrap();
        }
    });
    for _ in 0..4 {
        let output = ringway(&path).args(["port", "list"]).output().unwrap();
        assert_eq!(code(&output), 3, "{}", text(&output.stderr));
        must_be_two_lines(&output);
    }
    answering.join().unwrap();
}

#[test]
fn exit_4_when_the_daemon_does_not_answer() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let _deaf = UnixListener::bind(&path).unwrap();
    let output = ringway(&path)
        .args(["--timeout", "0.2", "port", "list"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 4);
    must_be_two_lines(&output);
    assert!(
        text(&output.stderr).contains("within 0.2 s"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn exit_5_when_measured_below_min() {
    let daemon = daemon();
    let measure = |min: &str| daemon.run(&["measure", "-t", "0.2", "-i", "0.1", "--min", min]);
    // 1,000 frames of 125 bytes a second are 1 Mbit/s.
    for met in ["1M", "0.9Mbit/s", "1kpps"] {
        assert_eq!(code(&measure(met)), 0, "{met}");
    }
    for missed in ["1.1M", "1001pps"] {
        let output = measure(missed);
        assert_eq!(code(&output), 5, "{missed}");
        assert!(text(&output.stderr).contains("below --min"));
        assert!(text(&output.stdout).contains("average"));
    }
}

#[test]
fn json_is_one_object_also_for_errors() {
    let daemon = daemon();
    let nowhere = |args: &[&str]| {
        ringway(Path::new("/nonexistent"))
            .args(args)
            .output()
            .unwrap()
    };
    let cases = [
        (daemon.run(&["-j", "port", "list"]), 0, ""),
        (daemon.run(&["port", "show", "x", "-j"]), 1, "no_such_port"),
        (nowhere(&["-j", "port", "lst"]), 2, "usage"),
        (nowhere(&["-j", "prot"]), 2, "usage"),
        (nowhere(&["-j", "port", "list"]), 3, "unreachable"),
    ];
    for (output, exit, kind) in cases {
        assert_eq!(code(&output), exit);
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(value.is_object() && output.stderr.is_empty());
        if !kind.is_empty() {
            assert_eq!(value["error"]["kind"], kind);
            assert_eq!(value["error"]["exit_code"], exit);
            assert!(!value["error"]["hint"].as_str().unwrap().is_empty());
        }
    }
}

#[test]
fn measure_as_json_has_start_intervals_and_end() {
    let output = daemon().run(&[
        "measure", "-t", "0.3", "-i", "0.1", "-j", "--from", "a", "--min", "2M",
    ]);
    assert_eq!(code(&output), 5);
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["start"]["interval_seconds"], 0.1);
    assert_eq!(value["intervals"].as_array().unwrap().len(), 3);
    assert_eq!(value["intervals"][1]["streams"][0]["packets"], 1000);
    assert_eq!(value["intervals"][1]["sum"]["start"], 1.0);
    assert_eq!(value["end"]["sum"]["packets"], 3000);
    assert_eq!(value["end"]["sum"]["bits_per_second"], 1e6);
    assert_eq!(value["end"]["workers"][0]["busy_percent"], 25.0);
    assert_eq!(value["error"]["kind"], "below_min");
}

#[test]
fn measure_of_a_port_that_is_not_there_is_refused() {
    let output = daemon().run(&["measure", "--from", "vm1"]);
    assert_eq!(code(&output), 1);
    assert!(text(&output.stderr).contains("there is no port vm1"));
}

#[test]
fn measure_ends_with_the_averages_when_interrupted() {
    let daemon = daemon();
    let mut child = daemon
        .ringway(&["measure", "-t", "0", "-i", "0.1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("PAIR"));
    assert!(lines.next().unwrap().unwrap().starts_with("a -> b"));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let rest: Vec<_> = lines.map(|line| line.unwrap()).collect();
    assert!(rest.iter().any(|line| line.contains("average")), "{rest:?}");
    assert!(rest.last().unwrap().starts_with("worker 0 (CPU 1)"));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let daemon = daemon();
    let mut commands = [
        daemon.ringway(&["measure", "-t", "0", "-i", "0.1"]),
        daemon.ringway(&["port", "list"]),
        daemon.ringway(&["-j", "port", "show", "x"]),
        daemon.ringway(&["--help"]),
        daemon.ringway(&["completions", "bash"]),
    ];
    for command in &mut commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert!(matches!(code(&output), 0 | 1), "{command:?}");
        assert_eq!(text(&output.stderr), "", "{command:?}");
    }
}

#[test]
fn an_unknown_noun_runs_a_program_of_path() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("ringway-hello");
    std::fs::write(
        &program,
        "#!/bin/sh\necho \"$RINGWAY_CONTROL $*\"\nexit 42\n",
    )
    .unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", directory.path().display());
    let run = |args: &[&str]| {
        let mut command = ringway(Path::new("/a.sock"));
        command.env("PATH", &path).args(args).output().unwrap()
    };
    let output = run(&["hello", "--world", "2"]);
    assert_eq!(code(&output), 42);
    assert_eq!(text(&output.stdout), "/a.sock --world 2\n");
    // With a slash it would be a path from the working directory.
    let sub = directory.path().join("ringway-sub");
    std::fs::create_dir(&sub).unwrap();
    std::fs::copy(&program, sub.join("hello")).unwrap();
    let mut command = ringway(Path::new("/a.sock"));
    let output = command
        .current_dir(&directory)
        .arg("sub/hello")
        .output()
        .unwrap();
    assert_eq!(code(&output), 2);
    let output = run(&["meassure"]);
    assert_eq!(code(&output), 2);
    assert!(text(&output.stderr).contains("did you mean `measure`?"));
}

#[test]
fn the_socket_may_come_from_the_environment() {
    let daemon = daemon();
    let output = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .env(
            "RINGWAY_CONTROL",
            daemon.directory.path().join("control.sock"),
        )
        .args(["worker", "list"])
        .output()
        .unwrap();
    assert_eq!(code(&output), 0);
}

#[test]
fn completions_and_manual_pages_are_written() {
    let nowhere = Path::new("/nonexistent");
    for shell in ["bash", "zsh", "fish"] {
        let output = ringway(nowhere)
            .args(["completions", shell])
            .output()
            .unwrap();
        assert!(text(&output.stdout).contains("vhost-user"), "{shell}");
    }
    let directory = tempfile::tempdir().unwrap();
    let output = ringway(nowhere)
        .arg("man")
        .arg(directory.path())
        .output()
        .unwrap();
    assert_eq!(code(&output), 0, "{}", text(&output.stderr));
    for page in ["ringway.1", "ringway-port-add.1", "ringwayd.8"] {
        let mut text = String::new();
        let mut file = std::fs::File::open(directory.path().join(page)).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.contains(".SH"), "{page}");
    }
}
