//! `ringway-bench run` and `compare` from outside: what they print, and how they end.
//!
//! One at a time, and not beside the lab's guests: several polling loads on two CPUs would stall
//! each other for so long that trials count as broken. Needs two CPUs, and the daemon and its tool
//! built by the same command. Peers are not needed: what is checked is function, never figures.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringway_control::api::{NoParams, PortList};
use ringway_control::rpc::Client;
use ringway_guest::{Frontend, encode, features};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;
use vhost::vhost_user::message::FrontendReq;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at what a daemon did.
const LOOK: Duration = Duration::from_millis(5);
/// Times that a run is tried whose switch stalled.
const TRIES: u32 = 5;
/// A run that is still going when the test is over.
const FOR_EVER: &str = "60";
/// Header flag of vhost-user: version 1, and this is a reply.
const REPLY: u32 = 5;

/// What a test holds while its load runs.
fn alone() -> File {
    let lock = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab.lock");
    let lock = File::create(&lock).expect("a lock file in the target folder");
    lock.lock().expect("an exclusive lock");
    lock
}

/// The bench with a directory of its own for what it makes.
fn bench(folder: &TempDir, arguments: &[&str]) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_ringway-bench"));
    for name in ["ringwayd", "ringway"] {
        assert!(
            program.with_file_name(name).is_file(),
            "{name} is not built: run the tests of the whole workspace"
        );
    }
    let mut command = Command::new(program);
    command.env("TMPDIR", folder.path()).args(arguments);
    command
}

fn run(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().expect("a directory");
    let output = bench(&folder, arguments)
        .output()
        .expect("the bench starts");
    assert_eq!(left_in(folder.path()), Vec::<PathBuf>::new(), "left behind");
    output
}

/// Whether a run failed as one does whose switch had no core, or no turn for one of its guests, for
/// as long as others took the machine.
fn was_starved(stderr: &str) -> bool {
    let signs = [
        "no frame came through the switch",
        "received nothing while others did",
    ];
    signs.iter().any(|sign| stderr.contains(sign))
}

/// What a run reports; one that was starved is tried again.
fn report(arguments: &[&str]) -> Value {
    for tries in 1.. {
        let output = run(arguments);
        let stderr = stderr(&output);
        if output.status.success() {
            return serde_json::from_slice(&output.stdout).expect("one JSON object");
        }
        let is_tried_again = was_starved(&stderr) && tries < TRIES;
        assert!(is_tried_again, "{arguments:?}:\n{stderr}");
    }
    unreachable!("the last try returns or fails")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn left_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the directory");
    entries.flatten().map(|entry| entry.path()).collect()
}

/// Whether a process ends in time, or has.
fn ends_within(pid: u32, time: Duration) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Ok(pidfd) = pidfd_open(pid.expect("a pid"), PidfdFlags::empty()) else {
        return true;
    };
    let time = Timespec::try_from(time).expect("a time that the kernel takes");
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&time)) == Ok(1)
}

/// A run that goes on until it is ended, and the pid of its ringwayd, through which frames pass.
fn endless_run(folder: &TempDir) -> (Child, u32) {
    started_run(folder, &["--duration", FOR_EVER])
}

/// A run through whose ringwayd frames pass, and the daemon's pid.
fn started_run(folder: &TempDir, arguments: &[&str]) -> (Child, u32) {
    let bench = bench(folder, &["run", "--frame", "64"])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the bench starts");
    // Guests are connected once its worker has taken frames.
    let deadline = Instant::now() + PATIENCE;
    while frames_taken(folder) <= Some(1000) {
        assert!(!ends_within(bench.id(), LOOK), "the bench ended");
        assert!(Instant::now() < deadline, "no frames within {PATIENCE:?}");
    }
    let daemon = child_of(bench.id()).expect("the bench has a daemon");
    (bench, daemon)
}

/// Where the daemon that a run in this folder started listens.
fn control_socket(folder: &TempDir) -> Option<PathBuf> {
    Some(left_in(folder.path()).first()?.join("control.sock"))
}

/// Frames that the daemon has taken from its first port, if there is one.
fn frames_taken(folder: &TempDir) -> Option<u64> {
    let mut client = Client::connect(&control_socket(folder)?, PATIENCE).ok()?;
    let listed = client.call::<PortList>(&NoParams {}).ok()?;
    Some(listed.ports.first()?.counters.rx_frames)
}

/// The tool, for the daemon that a run in this folder started.
fn ringway(folder: &TempDir, arguments: &[&str]) -> Option<Output> {
    let socket = control_socket(folder)?;
    let tool = Path::new(env!("CARGO_BIN_EXE_ringway-bench")).with_file_name("ringway");
    let mut command = Command::new(tool);
    command.arg("-s").arg(socket).args(arguments).output().ok()
}

/// The child of a process that has only one.
fn child_of(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn send_signal(pid: u32, signal: &str) {
    let sent = Command::new("kill")
        .args([signal, &pid.to_string()])
        .status()
        .expect("kill runs");
    assert!(sent.success());
}

#[test]
fn frames_of_all_sizes_pass_verified_in_every_shape() {
    let _alone = alone();
    for shape in [
        "--layout split",
        "--layout packed --chained",
        "--layout packed --indirect --no-in-order",
        "--no-mergeable --event-idx --queue-size 256",
        "--indirect --queue-size 64 --checksum",
        "--tso --checksum --flows 100",
    ] {
        let mut arguments = vec!["run", "-j", "--duration", "0.1", "--verify"];
        arguments.extend(["--frame", "60,imix,1500,9000,65000"]);
        arguments.extend(shape.split_whitespace());
        let report = report(&arguments);
        let results = report["results"].as_array().expect("results");
        assert_eq!(results.len(), 5, "{shape}");
        for result in results {
            assert!(
                result["frames_received"].as_u64() > Some(0),
                "{shape}: {result}"
            );
            assert!(result["switch_busy_share"].as_f64() > Some(0.0), "{result}");
        }
    }
}

#[test]
fn several_pairs_with_several_queues_pass_verified_at_once() {
    let _alone = alone();
    let report = report(&[
        "run",
        "-j",
        "--duration",
        "0.2",
        "--verify",
        "--frame",
        "64,65000",
        "--pairs",
        "3",
        "--queues",
        "2",
        "--flows",
        "16",
    ]);
    assert_eq!(report["guests"], 6);
    assert_eq!(report["queues"], 2);
    for result in report["results"].as_array().expect("results") {
        assert!(result["frames_received"].as_u64() > Some(0), "{result}");
    }
}

#[test]
fn the_largest_queue_works() {
    let _alone = alone();
    let report = report(&[
        "run",
        "-j",
        "--duration",
        "0.1",
        "--frame",
        "64",
        "--queue-size",
        "32768",
    ]);
    assert_eq!(report["queue_size"], 32_768);
}

/// A few frames through rings that hold them all: each arrives, once, in order.
#[test]
fn an_offered_rate_far_below_the_maximum_arrives_whole() {
    let _alone = alone();
    let report = report(&[
        "run",
        "-j",
        "--mode",
        "rate",
        "--rate",
        "4000",
        "--duration",
        "0.3",
        "--verify",
        "--frame",
        "64,9000",
        "--pairs",
        "2",
        "--queues",
        "2",
    ]);
    for result in report["results"].as_array().expect("results") {
        assert_eq!(result["frames_offered"], 1200, "{result}");
        assert_eq!(result["frames_received"], 1200, "{result}");
        for none in ["lost", "duplicated", "reordered", "too_late", "foreign"] {
            assert_eq!(result[format!("frames_{none}")], 0, "{none}: {result}");
        }
        assert!(result["latency_ns"]["p50"].as_u64() > Some(0), "{result}");
        let alone = &result["without_switch_ns"];
        assert!(alone["max"].as_u64() >= alone["p50"].as_u64(), "{result}");
        assert!(alone["max"].as_u64() > Some(0), "{result}");
        assert!(result["load_stalls"].is_u64(), "{result}");
    }
}

#[test]
fn requests_are_answered() {
    let _alone = alone();
    let report = report(&[
        "run",
        "-j",
        "--mode",
        "rr",
        "--duration",
        "0.1",
        "--frame",
        "64",
    ]);
    let result = &report["results"][0];
    assert!(result["transactions_per_second"].as_f64() > Some(0.0));
}

/// ringway alone: rates, its busy share, latency at three levels, and the copy loop for long
/// frames.
#[test]
fn a_comparison_tells_rates_shares_latency_and_the_copy_loop() {
    let _alone = alone();
    let report = report(&[
        "compare",
        "-j",
        "--peers-only",
        "--with",
        "ringway",
        "--frame",
        "64,9000",
        "--pairs",
        "2",
        "--duration",
        "0.1",
        "--latency",
        "--latency-rates",
        "5000",
    ]);
    assert!(
        report["latency_rule"]
            .as_str()
            .is_some_and(|rule| rule.contains("quiet"))
    );
    let sizes = report["sizes"].as_array().expect("sizes");
    assert_eq!(sizes.len(), 2);
    assert!(report["versions"]["ringway"].is_string());
    let names = |size: &Value| -> Vec<String> {
        let subjects = size["subjects"].as_array().expect("subjects");
        subjects
            .iter()
            .map(|subject| subject["switch"].as_str().expect("a name").to_owned())
            .collect()
    };
    assert_eq!(names(&sizes[0]), ["ringway"]);
    assert_eq!(names(&sizes[1]), ["ringway", "memcpy"]);
    assert!(sizes[1]["subjects"][1]["first_by_this"]["median"].as_f64() > Some(0.0));
    for size in sizes {
        let ringway = &size["subjects"][0];
        assert!(ringway["limit"].is_string(), "{ringway}");
        assert!(ringway["switch_busy_share"].as_f64() > Some(0.0));
        let rates = ringway["latency"].as_array().expect("rates");
        assert_eq!(rates[0]["offered_frames_per_second"], 5000.0, "{ringway}");
        assert_eq!(rates[1]["share_of_slowest"], 0.1, "{ringway}");
        for rate in rates {
            let median = |side: &str| rate[side]["p50_ns"]["median"].as_f64();
            let trials = rate["trials"].as_array().map_or(0, Vec::len);
            assert!(trials > 0, "{rate}");
            // Half of the frames were due in stalls, or it is told.
            let told = median("one_way") > Some(0.0) || rate["load_stalls"].as_u64() > Some(0);
            assert!(told, "{rate}");
            assert!(rate["without_switch"].is_object(), "{rate}");
        }
        let alone = &size["load_stamped_frames_per_second"]["median"];
        assert!(alone.as_f64() > Some(0.0), "{size}");
    }
}

/// Namespaces of labs and comparisons that have ended.
fn namespaces_left() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten();
    let is_left = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let owner = name
            .strip_prefix("ringway-lab-")
            .and_then(|rest| rest.split('-').next());
        owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(is_left)
        .collect()
}

/// Needs root and iproute2, as the lab does.
#[test]
fn a_nic_takes_the_place_of_the_second_guest() {
    let _alone = alone();
    let report = report(&[
        "compare",
        "-j",
        "--peers-only",
        "--with",
        "ringway",
        "--path",
        "guest-nic,nic-guest",
        "--frame",
        "64,1500",
        "--pairs",
        "1",
        "--duration",
        "0.1",
    ]);
    let sizes = report["sizes"].as_array().expect("sizes");
    let is = |size: &Value, frame: &str, path: &str| size["frame"] == frame && size["path"] == path;
    for (size, frame) in sizes.iter().zip(["64", "64", "1500", "1500"]) {
        assert!(
            is(size, frame, "guest-nic") || is(size, frame, "nic-guest"),
            "{size}"
        );
        let ringway = &size["subjects"][0];
        assert!(
            ringway["frames_per_second"]["median"].as_f64() > Some(0.0),
            "{size}"
        );
        assert!(ringway["switch_busy_share"].as_f64() > Some(0.0), "{size}");
    }
    assert_eq!(sizes.len(), 4);
    assert_eq!(namespaces_left(), Vec::<PathBuf>::new(), "left behind");
}

#[test]
fn what_a_nic_has_not_is_refused_with_a_hint() {
    let output = run(&["compare", "--path", "guest-nic", "--latency"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let expected = "error: latency and bytes are checked between guests only\n\
                    hint: leave out --latency and --verify, or paths with a NIC\n";
    assert_eq!(stderr(&output), expected);
}

#[test]
fn a_run_that_is_ended_stops_its_switch_and_removes_its_files() {
    let _alone = alone();
    for signal in ["-INT", "-TERM"] {
        let folder = tempfile::tempdir().expect("a directory");
        let (bench, daemon) = endless_run(&folder);
        send_signal(bench.id(), signal);
        let output = bench.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        assert_eq!(stderr(&output), "interrupted\n");
        assert!(output.stdout.is_empty(), "a figure of a broken run");
        assert!(!Path::new(&format!("/proc/{daemon}")).exists());
        assert_eq!(left_in(folder.path()), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_run_that_is_killed_takes_its_switch_along() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a directory");
    let (mut bench, daemon) = endless_run(&folder);
    bench.kill().expect("it is killed");
    bench.wait().expect("it ends");
    assert!(ends_within(daemon, PATIENCE), "the daemon goes on");
}

#[test]
fn a_switch_that_dies_is_told_and_no_figure_is_printed() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a directory");
    let (bench, daemon) = endless_run(&folder);
    send_signal(daemon, "-KILL");
    let output = bench.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty(), "a figure of a broken run");
    let stderr = stderr(&output);
    let first = stderr.lines().next();
    assert_eq!(first, Some("error: ringway ended with signal: 9 (SIGKILL)"));
}

/// How a run ends that found its switch broken.
fn assert_broken(bench: Child, folder: &TempDir, error: &str) {
    let output = bench.wait_with_output().expect("it ends");
    let stderr = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(output.stdout.is_empty(), "a figure of a broken run");
    assert!(stderr.starts_with(error), "{stderr}");
    assert_eq!(left_in(folder.path()), Vec::<PathBuf>::new());
}

#[test]
fn a_switch_that_stalls_is_broken_and_not_slow() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a directory");
    let (bench, daemon) = started_run(&folder, &["--duration", "3"]);
    send_signal(daemon, "-STOP");
    let error = "error: frames of 64 bytes: no frame came through the switch";
    assert_broken(bench, &folder, error);
}

#[test]
fn a_switch_that_sends_frames_to_the_wrong_guest_is_broken() {
    let _alone = alone();
    for tries in 1.. {
        let folder = tempfile::tempdir().expect("a directory");
        let (bench, _) = started_run(&folder, &["--duration", "3", "--pairs", "2"]);
        // The second guest's address, said to be behind the third's port.
        let moved = ["fdb", "add", "52:54:00:72:00:02", "p2"];
        let said = ringway(&folder, &moved).expect("the tool runs");
        assert!(said.status.success(), "{}", stderr(&said));
        let output = bench.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty(), "a figure of a broken run");
        let stderr = stderr(&output);
        if stderr.contains("came to the wrong guest") || stderr.contains("received nothing") {
            return;
        }
        assert!(was_starved(&stderr) && tries < TRIES, "{stderr}");
    }
}

/// A back-end that answers GET_FEATURES with these and acknowledges nothing else.
fn scripted_backend(path: &Path, offered: u64) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).expect("a socket");
    thread::spawn(move || {
        let backend = Frontend::accept(&listener).expect("a front-end");
        while let Ok(message) = backend.receive() {
            if message.request == FrontendReq::GET_FEATURES as u32 {
                let reply = encode(message.request, REPLY, &offered.to_ne_bytes());
                backend.send_raw(&reply, &[]).expect("it listens");
            }
        }
    })
}

/// What `run` says of a back-end with these features.
fn refusal(offered: u64, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().expect("a directory");
    let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
    let backends = [&a, &b].map(|path| scripted_backend(path, offered));
    let made = tempfile::tempdir().expect("a directory");
    let output = bench(&made, &["run", "--duration", "0.1"])
        .args(arguments)
        .arg("--socket-a")
        .arg(&a)
        .arg("--socket-b")
        .arg(&b)
        .output()
        .expect("the bench starts");
    let [first, _] = backends;
    first.join().expect("the first back-end");
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    stderr(&output)
}

#[test]
fn a_feature_that_the_back_end_lacks_is_named_with_a_hint() {
    let _alone = alone();
    let said = refusal(features::VIRTIO_F_VERSION_1, &["--frame", "64"]);
    let expected = "error: frames of 64 bytes: the back-end does not offer VIRTIO_NET_F_MRG_RXBUF";
    assert_eq!(said.lines().next(), Some(expected));
    assert!(said.contains("hint: leave out what needs it"), "{said}");
    let said = refusal(
        features::VIRTIO_F_VERSION_1 | features::VIRTIO_NET_F_MRG_RXBUF,
        &["--frame", "65000"],
    );
    assert!(said.contains("VIRTIO_NET_F_HOST_TSO4"), "{said}");
}

#[test]
fn a_back_end_that_is_not_there_is_one_line_and_a_hint() {
    let _alone = alone();
    let output = run(&[
        "run",
        "--socket-a",
        "/nonexistent/a",
        "--socket-b",
        "/nonexistent/b",
    ]);
    let expected = "error: frames of 64 bytes: can't connect to /nonexistent/a: No such file or \
                    directory (os error 2)";
    let stderr = stderr(&output);
    assert_eq!(stderr.lines().next(), Some(expected));
    assert!(stderr.contains("hint: start the switch first"), "{stderr}");
}

#[test]
fn one_cpu_is_too_few() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a directory");
    let bench = bench(&folder, &["run"]);
    let output = Command::new("taskset")
        .args(["-c", "0"])
        .arg(bench.get_program())
        .arg("run")
        .output()
        .expect("taskset of util-linux");
    assert_eq!(
        stderr(&output),
        "error: one CPU only: switch and load need one each\nhint: allow for a second one \
         (taskset, cpuset, container limits)\n"
    );
}

#[test]
fn peers_that_are_not_installed_are_named_with_their_packages() {
    let _alone = alone();
    let folder = tempfile::tempdir().expect("a directory");
    let output = bench(&folder, &["compare", "--peers-only", "--with", "testpmd"])
        .env("PATH", "/nonexistent")
        .output()
        .expect("the bench starts");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "testpmd is left out: dpdk-testpmd is not installed; `apt-get install \
         --no-install-recommends dpdk-dev` brings it\nerror: there is no switch to measure\n"
    );
}
