//! `ringway capture`, of a real `ringwayd`, judged by tshark.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::io::Read;
use std::net::Shutdown;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::{Place, Running, end_of, lines_of};
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::interface_statistics::InterfaceStatisticsOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use ringway_control::api::{
    CaptureStart, CaptureStartParams, NoParams, PortDel, PortDelParams, PortList, PortName,
};
use ringway_guest::Guest;
use ringway_testbed::{DEADLINE, eventually};
use rustix::process::{Pid, Signal, kill_process};

/// Two guests on a daemon.
struct Bed {
    place: Place,
    running: Running,
    a: Guest,
    b: Guest,
}

impl Bed {
    fn new() -> Self {
        let place = Place::new();
        let port = |name: &str| {
            let path = place.path(&format!("{name}.sock"));
            let path = path.display();
            format!("[ports.{name}]\nkind = \"vhost-user\"\nlisten = \"{path}\"\n")
        };
        let config = place.config(&(port("a") + &port("b")));
        let running = place.start(&["--config", config.to_str().unwrap()]);
        let [a, b] = ["a", "b"].map(|name| {
            let path = place.path(&format!("{name}.sock"));
            Guest::builder().connect(&path).unwrap()
        });
        Self {
            place,
            running,
            a,
            b,
        }
    }

    fn tool(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringway"));
        let socket = self.place.path("control.sock");
        command.arg("-s").arg(socket).arg("capture").args(args);
        command
    }

    /// Sends a frame from a, which b receives.
    fn pass(&mut self, frame: &[u8]) {
        self.a.send_frame(frame).unwrap();
        let received = self.b.recv(DEADLINE).unwrap().expect("a frame is lost");
        assert_eq!(received.frame, frame);
    }
}

/// A broadcast of this length, which begins and ends with its number.
fn frame(number: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![number; len];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// `ringway capture … -w FILE`, once it captures.
fn start(bed: &Bed, file: &Path, args: &[&str]) -> Child {
    let mut tool = bed.tool(args);
    tool.arg("-w").arg(file).stderr(Stdio::piped());
    let mut child = tool.spawn().unwrap();
    eventually("the file has its head", || {
        let ended = child.try_wait().unwrap();
        assert_eq!(ended, None, "{args:?}");
        std::fs::metadata(file).is_ok_and(|file| file.len() > 0)
    });
    child
}

/// Ends it by Ctrl-C, and returns what it says.
fn stop(child: Child) -> String {
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert_eq!(status.code(), Some(0));
    String::from_utf8(stderr).unwrap()
}

/// What tshark reads of a file: these fields of each frame.
fn tshark(file: &Path, fields: &[&str]) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    command.arg("-r").arg(file).args(["-T", "fields"]);
    command.args(fields.iter().flat_map(|field| ["-e", field]));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let fields = |line: &str| line.split('\t').map(str::to_owned).collect();
    text.lines().map(fields).collect()
}

/// One frame of a file: port, comments, bytes, length on the wire.
type Read1 = (u32, Vec<String>, Vec<u8>, u32);

/// All frames, and how many copies are lost.
fn read(file: impl Read) -> (Vec<Read1>, u64) {
    let mut reader = PcapNgReader::new(file).unwrap();
    let (mut frames, mut lost) = (Vec::new(), 0);
    while let Some(block) = reader.next_block() {
        match block.unwrap() {
            Block::EnhancedPacket(frame) => {
                let comments = frame.options.iter().filter_map(|option| match option {
                    EnhancedPacketOption::Comment(text) => Some(text.to_string()),
                    _ => None,
                });
                let comments = comments.collect();
                let bytes = frame.data.to_vec();
                frames.push((frame.interface_id, comments, bytes, frame.original_len));
            }
            Block::InterfaceStatistics(statistics) => {
                for option in statistics.options {
                    if let InterfaceStatisticsOption::IsbIfDrop(copies) = option {
                        lost += copies;
                    }
                }
            }
            _ => {}
        }
    }
    (frames, lost)
}

#[test]
fn a_frame_is_there_in_and_out_whole_with_its_ports_and_time() {
    let mut bed = Bed::new();
    let file = bed.place.path("trace.pcapng");
    let child = start(&bed, &file, &["a", "b"]);
    let sent: Vec<_> = (0..50)
        .map(|n| frame(n, 60 + 29 * usize::from(n)))
        .collect();
    for frame in &sent {
        bed.pass(frame);
    }
    let said = stop(child);
    assert_eq!(
        said,
        "100 frames captured, 0 lost since they were not read in time\n"
    );
    let fields = [
        "frame.interface_name",
        "frame.packet_flags_direction",
        "frame.len",
        "frame.time_epoch",
    ];
    let told = tshark(&file, &fields);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    for (pair, frame) in told.chunks(2).zip(&sent) {
        let len = frame.len().to_string();
        // Of epb_flags: 1 is inbound, 2 outbound.
        for (fields, (port, direction)) in pair.iter().zip([("a", "1"), ("b", "2")]) {
            let is = [fields[0].as_str(), last_digit(&fields[1]), &fields[2]];
            assert_eq!(is, [port, direction, &len]);
            let age = now.as_secs_f64() - fields[3].parse::<f64>().unwrap();
            assert!((0.0..DEADLINE.as_secs_f64()).contains(&age), "{fields:?}");
        }
    }
    let (frames, lost) = read(std::fs::File::open(&file).unwrap());
    assert_eq!((frames.len(), lost), (100, 0));
    for (pair, frame) in frames.chunks(2).zip(&sent) {
        assert!(pair.iter().all(|(_, _, bytes, _)| bytes == frame));
        assert_eq!(pair[0].1, ["queue 0"]);
    }
}

/// tshark writes the direction as 0x00000001, or as 1.
fn last_digit(field: &str) -> &str {
    &field[field.len() - 1..]
}

#[test]
fn a_filter_and_a_length_bound_what_is_there() {
    let mut bed = Bed::new();
    let file = bed.place.path("trace.pcapng");
    // Of a frame's whole length, whatever is kept of it.
    let filter = [
        "a", "-l", "20", "ether", "proto", "0x88b5", "and", "greater", "1000",
    ];
    let child = start(&bed, &file, &filter);
    for len in [60, 999, 1000, 1514] {
        bed.pass(&frame(7, len));
    }
    stop(child);
    let (frames, _) = read(std::fs::File::open(&file).unwrap());
    let told: Vec<_> = frames
        .iter()
        .map(|(.., bytes, len)| (bytes.len(), *len))
        .collect();
    assert_eq!(told, [(20, 1000), (20, 1514)]);
}

#[test]
fn a_filter_that_does_not_compile_and_a_port_that_is_missing_are_refused() {
    let bed = Bed::new();
    let file = bed.place.path("trace.pcapng");
    let path = file.to_str().unwrap();
    let refused = |args: &[&str]| {
        let output = bed.tool(args).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("  hint: "), "{text}");
        (output.status.code(), text)
    };
    let (code, text) = refused(&["a", "-w", path, "tcp", "prot", "80"]);
    // The compiler's own words.
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("filter \"tcp prot 80\": ") && text.contains("syntax error"),
        "{text}"
    );
    let (code, text) = refused(&["nobody", "-w", path]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("there is no port nobody"), "{text}");
    let (code, text) = refused(&["a", "-w", "/no/such/file"]);
    assert_eq!(code, Some(1), "{text}");
}

#[test]
fn what_is_dropped_is_there_with_the_reason() {
    let mut bed = Bed::new();
    let file = bed.place.path("trace.pcapng");
    let child = start(&bed, &file, &["a", "b"]);
    // To a reserved address (IEEE 802.1Q, table 8-1), and shorter than an Ethernet header.
    let mut reserved = frame(1, 60);
    reserved[..6].copy_from_slice(&[1, 0x80, 0xc2, 0, 0, 0x0e]);
    bed.a.send_frame(&reserved).unwrap();
    bed.a.send_frame(&[2; 9]).unwrap();
    // What comes behind them is through: so are they.
    bed.pass(&frame(3, 60));
    stop(child);
    let (frames, _) = read(std::fs::File::open(&file).unwrap());
    let told: Vec<_> = frames
        .iter()
        .map(|(_, comments, bytes, _)| {
            (
                comments.last().unwrap_or(&String::new()).clone(),
                bytes.len(),
            )
        })
        .collect();
    let is_there = |comment: &str, len: usize| told.contains(&(comment.to_owned(), len));
    assert!(is_there("dropped: link_local", 60), "{told:?}");
    assert!(is_there("dropped: runt", 9), "{told:?}");
    assert_eq!(told.len(), 4, "{told:?}");
    // As people look for it.
    let comments = tshark(&file, &["frame.comment"]);
    assert!(
        comments.iter().any(|c| c[0].contains("dropped: runt")),
        "{comments:?}"
    );
}

#[test]
fn tshark_reads_from_a_pipe_while_it_runs() {
    let mut bed = Bed::new();
    let mut capture = bed
        .tool(&["a", "-w", "-"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut tshark = Command::new("tshark")
        .args(["-l", "-i", "-", "-T", "fields", "-e", "frame.len"])
        .stdin(capture.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = lines_of(tshark.stdout.take().unwrap());
    let mut seen = None;
    eventually("tshark prints a frame", || {
        bed.pass(&frame(9, 77));
        seen = heard.try_recv().ok();
        seen.is_some()
    });
    assert_eq!(seen.unwrap(), "77");
    assert_eq!(capture.try_wait().unwrap(), None, "it still runs");
    // Its reader goes, and so does it.
    // It has a child of its own, dumpcap, which it ends for this signal.
    kill_process(Pid::from_child(&tshark), Signal::INT).unwrap();
    tshark.wait().unwrap();
    assert_eq!(end_of(&mut capture, "it ends").code(), Some(0));
}

#[test]
fn lines_tell_what_passes() {
    let mut bed = Bed::new();
    let mut child = bed
        .tool(&["a", "b"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let heard = lines_of(child.stdout.take().unwrap());
    let mut told = Vec::new();
    eventually("it prints both", || {
        bed.pass(&frame(9, 77));
        told.extend(heard.try_iter());
        told.len() >= 2
    });
    let what = "02:00:00:00:00:01 > ff:ff:ff:ff:ff:ff, ethertype 0x88b5, length 77";
    for (line, way) in told.iter().zip(["a In ", "b Out"]) {
        let (_, rest) = line.split_once(' ').unwrap();
        assert_eq!(rest, format!("{way} {what}"));
    }
    stop(child);
}

/// A client that reads nothing: the copies are lost, and counted; the frames are not.
#[test]
fn who_does_not_read_costs_copies_and_no_frame() {
    let mut bed = Bed::new();
    let params = CaptureStartParams {
        ports: vec!["a".parse().unwrap()],
        snap_bytes: None,
        filter: None,
    };
    let (mut stream, mut file) = bed.running.client().bytes::<CaptureStart>(&params).unwrap();
    // More than the ring of a worker, what is made of it, and a socket hold.
    let frames = 16_000;
    let long = frame(5, 1514);
    let mut sent = 0;
    while sent < frames {
        bed.pass(&long);
        sent += 1;
    }
    // Others are served meanwhile.
    let ports = bed.running.client().call::<PortList>(&NoParams {}).unwrap();
    let counters = &ports.ports[0].counters;
    assert_eq!(
        (counters.rx_frames, counters.rx_bytes),
        (frames, frames * 1514)
    );
    // It wakes, and wants the end.
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_to_end(&mut file).unwrap();
    let (copies, lost) = read(&*file);
    assert!(lost > 0 && copies.len() > 1000, "{} {lost}", copies.len());
    assert_eq!(copies.len() as u64 + lost, frames);
    assert!(copies.iter().all(|(.., bytes, _)| *bytes == long));
}

#[test]
fn a_port_that_goes_ends_no_capture() {
    let mut bed = Bed::new();
    let file = bed.place.path("trace.pcapng");
    let child = start(&bed, &file, &["a", "b"]);
    bed.pass(&frame(1, 60));
    let name: PortName = "b".parse().unwrap();
    let gone = PortDelParams {
        name,
        if_exists: false,
    };
    bed.running.client().call::<PortDel>(&gone).unwrap();
    bed.a.send_frame(&frame(2, 61)).unwrap();
    assert!(bed.a.flush(DEADLINE).unwrap());
    stop(child);
    let (frames, _) = read(std::fs::File::open(&file).unwrap());
    let told: Vec<_> = frames
        .iter()
        .map(|(port, comments, bytes, _)| (*port, comments.len(), bytes.len()))
        .collect();
    // The last one has no destination any more, which is a second comment.
    assert_eq!(told, [(0, 1, 60), (1, 0, 60), (0, 2, 61)]);
}
