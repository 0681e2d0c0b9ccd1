//! `ringwayd` whose standard error takes nothing: frames go on, the tool is answered, SIGTERM ends
//! it. What guests and clients can cause to be logged is bounded.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, pipe};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Place, Running, end_of, fill};
use ringway_control::api::{NoParams, PortList};
use ringway_guest::Guest;
use ringway_testbed::DEADLINE;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, Signal, kill_process};

/// Within this the tool is answered, and the daemon ends after SIGTERM.
const PROMPT: Duration = Duration::from_secs(1);

/// Two guests that talk through the daemon.
struct Pair {
    a: Guest,
    b: Guest,
}

impl Pair {
    fn connect(place: &Place) -> Self {
        let [a, b] = ["a.sock", "b.sock"].map(|name| {
            let guest = Guest::builder().connect(&place.path(name));
            guest.unwrap()
        });
        Self { a, b }
    }

    /// Frames arrive each way.
    fn talk(&mut self) {
        for number in 0..100_u8 {
            pass(number, &mut self.a, &mut self.b);
            pass(number, &mut self.b, &mut self.a);
        }
    }
}

/// A frame from one to the other.
fn pass(number: u8, from: &mut Guest, to: &mut Guest) {
    let mut frame = [number; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    from.send_frame(&frame).unwrap();
    let received = to.recv(DEADLINE).unwrap().expect("a frame is lost");
    assert_eq!(received.frame, frame);
}

/// A daemon with two ports, not started.
fn command(place: &Place) -> Command {
    let port = |name: &str| {
        let path = place.path(&format!("{name}.sock"));
        let path = path.display();
        format!("[ports.{name}]\nkind = \"vhost-user\"\nlisten = \"{path}\"\n")
    };
    let config = place.config(&(port("a") + &port("b")));
    place.ringwayd(&["--config", config.to_str().unwrap()])
}

/// The daemon does all that it is for, also what it logs.
fn assert_serves(place: &Place, running: &Running) {
    let mut pair = Pair::connect(place);
    pair.talk();
    for _ in 0..10 {
        // A line each.
        let ports = running.client().call::<PortList>(&NoParams {});
        assert_eq!(ports.unwrap().ports.len(), 2);
    }
    let start = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .arg("--socket")
        .arg(place.path("control.sock"))
        .args(["port", "list"])
        .output()
        .unwrap();
    let took = start.elapsed();
    assert!(
        output.status.success() && took < PROMPT,
        "{output:?} {took:?}"
    );
    // A front-end that vanishes and comes back is logged too.
    drop(pair);
    Pair::connect(place).talk();
}

fn assert_ends(mut running: Running) {
    let start = Instant::now();
    kill_process(Pid::from_child(&running.child), Signal::TERM).unwrap();
    let ended = end_of(&mut running.child, "SIGTERM ends the daemon");
    let took = start.elapsed();
    assert_eq!(ended.code(), Some(0));
    assert!(took < PROMPT, "{took:?} from SIGTERM to the end");
}

fn assert_lives_with(stderr: impl Into<Stdio>) {
    let place = Place::new();
    let running = place.start_command(command(&place).stderr(stderr));
    assert_serves(&place, &running);
    assert_ends(running);
}

#[test]
fn a_full_device_for_standard_error_stops_nothing() {
    assert_lives_with(File::options().write(true).open("/dev/full").unwrap());
}

#[test]
fn a_pipe_that_is_full_from_the_start_stops_nothing() {
    let (_reader, writer) = pipe().unwrap();
    fill(&writer);
    assert_lives_with(writer);
}

#[test]
fn a_pipe_whose_reader_is_gone_stops_nothing() {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    assert_lives_with(writer);
}

#[test]
fn a_fifo_that_nobody_reads_stops_nothing() {
    let place = Place::new();
    let path = place.path("fifo");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    // Opened so, as by `2<>fifo`, it needs no reader.
    let fifo = File::options().read(true).write(true).open(path).unwrap();
    let writer = PipeWriter::from(std::os::fd::OwnedFd::from(fifo));
    fill(&writer);
    assert_lives_with(writer);
}

#[test]
fn standard_error_that_is_closed_stops_nothing() {
    let place = Place::new();
    let inner = command(&place);
    let mut outer = Command::new("sh");
    outer.env_remove("RUST_LOG");
    outer.args(["-c", r#"exec "$@" 2>&-"#, "sh"]);
    outer.arg(inner.get_program()).args(inner.get_args());
    let running = place.start_command(&mut outer);
    assert_serves(&place, &running);
    assert_ends(running);
}

/// A daemon that logs into a pipe which is full by now.
fn start_then_fill(place: &Place, level: &str) -> (Running, PipeReader) {
    let (reader, writer) = pipe().unwrap();
    let mut command = command(place);
    command.env("RUST_LOG", level);
    let running = place.start_command(command.stderr(writer.try_clone().unwrap()));
    fill(&writer);
    (running, reader)
}

#[test]
fn a_pipe_that_fills_up_and_one_whose_reader_goes_away_stop_nothing() {
    let place = Place::new();
    let (running, reader) = start_then_fill(&place, "info");
    assert_serves(&place, &running);
    drop(reader);
    assert_serves(&place, &running);
    assert_ends(running);
}

#[test]
fn lines_that_are_lost_are_counted_and_told_when_the_pipe_is_read_again() {
    let place = Place::new();
    let (running, reader) = start_then_fill(&place, "debug");
    // At this level each leaves a line.
    for _ in 0..2000 {
        running.client().call::<PortList>(&NoParams {}).unwrap();
    }
    let (told, is_told) = mpsc::channel();
    let read = std::thread::spawn(move || {
        let mut lines = 0_u64;
        for line in BufReader::new(reader).lines().map(Result::unwrap) {
            lines += u64::from(line.contains("disconnected"));
            if let Some((_, lost)) = line.split_once("log lines were lost lost=") {
                let lost = lost.split(' ').next().unwrap().parse::<u64>().unwrap();
                let _ = told.send(lost);
            }
        }
        lines
    });
    let lost = is_told
        .recv_timeout(DEADLINE)
        .expect("nobody tells of lost lines");
    assert_ends(running);
    let read = read.join().unwrap();
    assert!(
        read >= 900 && lost > 500 && read + lost >= 2000,
        "{read} read, {lost} lost"
    );
}

/// Ends the daemon, and returns what it logged.
fn log_of(mut running: Running) -> String {
    let mut stderr = running.child.stderr.take().unwrap();
    let read = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    assert_ends(running);
    read.join().unwrap()
}

fn count(log: &str, what: &str) -> usize {
    log.lines().filter(|line| line.contains(what)).count()
}

#[test]
fn a_front_end_that_starts_its_rings_without_end_is_logged_a_few_times() {
    let place = Place::new();
    let running = place.start_command(command(&place).stderr(Stdio::piped()));
    let mut guest = Guest::builder().connect(&place.path("a.sock")).unwrap();
    guest.frontend().set_reply_timeout(DEADLINE).unwrap();
    for _ in 0..2000 {
        guest.stop().unwrap();
        guest.resume().unwrap();
    }
    let log = log_of(running);
    let lines = count(&log, "ring started") + count(&log, "ring stopped");
    // A limit of 11 in 10 s, and the machine may be slow.
    assert!((1..=66).contains(&lines), "{lines} lines");
}

#[test]
fn front_ends_and_clients_that_come_and_go_without_end_are_logged_a_few_times() {
    let place = Place::new();
    let running = place.start_command(command(&place).stderr(Stdio::piped()));
    for _ in 0..500 {
        let connected = std::os::unix::net::UnixStream::connect(place.path("a.sock"));
        drop(connected.unwrap());
        running.client().call::<PortList>(&NoParams {}).unwrap();
    }
    let log = log_of(running);
    let lines = count(&log, "onnected");
    assert!((1..=150).contains(&lines), "{lines} lines");
}

#[test]
fn the_watchdog_is_fed_while_the_workers_sleep_and_while_they_forward() {
    let place = Place::new();
    let mut command = command(&place);
    command.env("WATCHDOG_USEC", "200000").stderr(Stdio::null());
    let running = place.start_command(&mut command);
    for _ in 0..5 {
        assert_eq!(running.notification(), "WATCHDOG=1\n");
    }
    let mut pair = Pair::connect(&place);
    for _ in 0..5 {
        pair.talk();
        assert_eq!(running.notification(), "WATCHDOG=1\n");
    }
    assert_ends(running);
}
