//! `ringway monitor` and the stream that it reads, of a real `ringwayd`.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use common::{Place, Running, end_of, lines_of};
use ringway_control::api::{
    Event, MonitorStart, NoParams, Occurrence as O, PortAdd, PortAddParams, PortConfig, PortDel,
    PortDelParams, PortKind, PortName, PortShow, PortShowParams, VhostUserConfig,
};
use ringway_control::api::{FdbFlush, FdbFlushParams, SocketSpec};
use ringway_control::rpc::{CallError, Client, Notifications};
use ringway_guest::{DriverRing, Guest};
use ringway_testbed::{DEADLINE, eventually};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, kill_process};

/// Events that wait for a listener before it loses some, as docs and help say.
const QUEUE: usize = 16_384;

fn name(port: &str) -> PortName {
    port.parse().unwrap()
}

fn add(client: &mut Client, place: &Place, port: &str) {
    let path = place.path(&format!("{port}.sock"));
    let socket = SocketSpec::Listen(path.as_path().try_into().unwrap());
    let params = PortAddParams {
        name: name(port),
        config: PortConfig::VhostUser(VhostUserConfig::new(socket)),
    };
    client.call::<PortAdd>(&params).unwrap();
}

fn remove(client: &mut Client, port: &str) {
    let params = PortDelParams {
        name: name(port),
        if_exists: false,
    };
    client.call::<PortDel>(&params).unwrap();
}

fn connect(place: &Place, port: &str) -> Guest {
    let path = place.path(&format!("{port}.sock"));
    Guest::builder().connect(&path).unwrap()
}

fn stream(running: &Running) -> Notifications {
    let params = NoParams {};
    running.client().stream::<MonitorStart>(&params).unwrap()
}

/// A client that reads all the time.
struct Reader(Receiver<Event>);

impl Reader {
    fn new(running: &Running) -> Self {
        let mut events = stream(running);
        let (heard, hears) = mpsc::channel();
        std::thread::spawn(move || {
            loop {
                let mut fds = [PollFd::new(events.socket(), PollFlags::IN)];
                if !events.is_here() && poll(&mut fds, None).is_err() {
                    continue;
                }
                let Ok(event) = events.receive() else {
                    return;
                };
                if heard.send(event).is_err() {
                    return;
                }
            }
        });
        Self(hears)
    }

    fn next(&self) -> Event {
        self.0.recv_timeout(DEADLINE).unwrap()
    }

    /// What happens next, down to the first that `is_last` is true of.
    fn until(&self, mut is_last: impl FnMut(&O) -> bool) -> Vec<O> {
        let mut seen = Vec::new();
        loop {
            let what = self.next().what;
            let last = is_last(&what);
            seen.push(what);
            if last {
                return seen;
            }
        }
    }
}

/// An operator who adds ports a and b, and what is told from before that on.
fn with_ports(place: &Place, running: &Running) -> (Client, Reader) {
    let mut client = running.client();
    let events = Reader::new(running);
    add(&mut client, place, "a");
    add(&mut client, place, "b");
    (client, events)
}

/// A broadcast from a station of this number.
fn frame_from(station: u32) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..8].copy_from_slice(&[2, 0]);
    frame[8..12].copy_from_slice(&station.to_be_bytes());
    frame
}

fn mac(station: u32) -> ringway_bridge::MacAddr {
    let frame = frame_from(station);
    ringway_bridge::MacAddr(frame[6..12].try_into().unwrap())
}

#[test]
fn a_ports_life_is_told_in_order() {
    let place = Place::new();
    let running = place.start(&[]);
    let (mut client, events) = with_ports(&place, &running);
    let mut a = connect(&place, "a");
    let told = events.until(|what| matches!(what, O::PortUp { .. }));
    let [a_added, b_added, connected, negotiated, up] = &*told else {
        panic!("{told:?}");
    };
    let kind = PortKind::VhostUser;
    let added = |port| O::PortAdded { port, kind };
    assert_eq!([a_added, b_added], [&added(name("a")), &added(name("b"))]);
    assert_eq!(*connected, O::FrontEndConnected { port: name("a") });
    let O::FeaturesNegotiated { features, .. } = negotiated else {
        panic!("{told:?}");
    };
    let has = |feature: &str| features.iter().any(|name| name == feature);
    assert!(has("VIRTIO_F_VERSION_1"), "{features:?}");
    assert_eq!(*up, O::PortUp { port: name("a") });

    let b = connect(&place, "b");
    events.until(|what| matches!(what, O::PortUp { .. }));
    a.send_frame(&frame_from(1)).unwrap();
    let learned = O::AddressLearned {
        port: name("a"),
        mac: mac(1),
        vlan: None,
    };
    assert_eq!(events.until(|_| true), [learned]);
    drop((a, b));
    let mut down = Vec::new();
    let told = events.until(|what| {
        if let O::PortDown { port, .. } = what {
            down.push(port.clone());
        }
        down.len() == 2
    });
    down.sort();
    assert_eq!(down, [name("a"), name("b")], "{told:?}");
    remove(&mut client, "a");
    let removed = O::PortRemoved { port: name("a") };
    events.until(|what| *what == removed);
}

/// What is told of the thief is exactly what the daemon counted.
#[test]
fn stolen_addresses_moves_and_a_stopped_ring_are_told() {
    let place = Place::new();
    let running = place.start(&[]);
    let (mut client, events) = with_ports(&place, &running);
    let (mut a, mut b) = (connect(&place, "a"), connect(&place, "b"));
    a.send_frame(&frame_from(1)).unwrap();
    let learned = |what: &O| matches!(what, O::AddressLearned { .. });
    let told = events.until(learned);
    let at_a = matches!(told.last(), Some(O::AddressLearned { port, .. }) if *port == name("a"));
    assert!(at_a, "{told:?}");
    // In use at a: seen there a moment ago, each time that b tries.
    let mut stolen = loop {
        a.send_frame(&frame_from(1)).unwrap();
        b.send_frame(&frame_from(1)).unwrap();
        match events.0.try_recv().map(|event| event.what) {
            Ok(O::SpoofAttempts { port, frames }) => {
                assert_eq!(port, name("b"));
                break frames;
            }
            Ok(_) => {}
            Err(_) => std::thread::yield_now(),
        }
    };
    let counted = |client: &mut Client| {
        let port = PortShowParams { name: name("b") };
        let shown = client.call::<PortShow>(&port).unwrap();
        shown.port.counters.fdb_moves_refused
    };
    assert!(b.flush(DEADLINE).unwrap());
    let all = counted(&mut client);
    while stolen < all {
        if let O::SpoofAttempts { port, frames } = events.next().what {
            assert_eq!(port, name("b"));
            stolen += frames;
        }
    }
    assert_eq!(stolen, all);
    // Silent for the time of the hold, it moves.
    let told = eventually_moves(&events, &mut b);
    let from = name("a");
    let (port, mac, vlan) = (name("b"), mac(1), None);
    let moved = O::AddressMoved {
        port,
        mac,
        vlan,
        from,
    };
    assert_eq!(told, moved);
    // More chains offered than the ring has entries (virtio 1.3, 2.7.13.1): a worker stops the
    // ring.
    let queue = b.transmit_queue(0);
    let DriverRing::Split(ring) = queue.ring() else {
        unreachable!("a guest's rings are split unless told");
    };
    let too_many = ring.area().size() + 1;
    let offered = ring.area().used_idx().wrapping_add(too_many);
    ring.area().set_avail_idx(offered);
    queue.kick().signal().unwrap();
    let told = events.until(|what| matches!(what, O::PortError { .. }));
    let Some(O::PortError { port, reason }) = told.last() else {
        unreachable!();
    };
    assert_eq!(*port, name("b"));
    assert!(reason.starts_with("ring 1 stopped: "), "{reason}");
}

fn eventually_moves(events: &Reader, b: &mut Guest) -> O {
    let mut moved = None;
    eventually("the station moves", || {
        b.send_frame(&frame_from(1)).unwrap();
        let next = events.0.try_recv().map(|event| event.what);
        if let Ok(what @ O::AddressMoved { .. }) = next {
            moved = Some(what);
        }
        moved.is_some()
    });
    moved.unwrap()
}

/// Has a guest teach addresses and an operator flush them until so many were told, and returns all
/// events.
fn learn(running: &Running, guest: &mut Guest, events: &Reader, count: usize) -> Vec<Event> {
    /// As many as a port may have.
    const STATIONS: u32 = 4096;
    let mut told = Vec::new();
    while told.len() < count {
        for station in 0..STATIONS {
            guest.send_frame(&frame_from(station)).unwrap();
        }
        let (mut learned, mut forgotten) = (0, 0);
        while forgotten < STATIONS.into() {
            let event = events.next();
            match event.what {
                O::AddressLearned { .. } => learned += 1,
                O::AddressesForgotten { addresses, .. } => forgotten += addresses,
                _ => {}
            }
            told.push(event);
            if learned == STATIONS {
                learned = 0;
                let all = FdbFlushParams::default();
                running.client().call::<FdbFlush>(&all).unwrap();
            }
        }
    }
    told
}

#[test]
fn who_reads_loses_nothing_and_who_does_not_is_told_how_many() {
    let place = Place::new();
    let running = place.start(&[]);
    let mut client = running.client();
    add(&mut client, &place, "a");
    add(&mut client, &place, "b");
    let mut sleeper = stream(&running);
    let reader = Reader::new(&running);
    // Frames have somewhere to go, and nobody waits for it.
    let mut a = connect(&place, "a");
    // What fits into its queue and its socket, twice.
    let told = learn(&running, &mut a, &reader, 2 * QUEUE);
    let numbers: Vec<_> = told.iter().map(|event| event.number).collect();
    let first = numbers[0];
    let all: Vec<_> = (first..first + numbers.len() as u64).collect();
    assert_eq!(numbers, all, "each event reaches who reads");
    // Nobody was held up by who slept, which is told where it missed how many.
    let last = *numbers.last().unwrap();
    let (mut before, mut gaps) = (first - 1, Vec::new());
    while before < last {
        let event: Event = sleeper.receive().unwrap();
        let missing = match event.what {
            O::Gap { lost } => lost,
            _ => 1,
        };
        if missing > 1 {
            gaps.push(missing);
        }
        assert_eq!(event.number, before + missing, "{event:?}");
        before = event.number;
    }
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert!(gaps[0] < (told.len() - QUEUE) as u64, "{gaps:?}");
    // From here on it misses nothing.
    remove(&mut client, "b");
    let removed = O::PortRemoved { port: name("b") };
    loop {
        let event: Event = sleeper.receive().unwrap();
        assert_eq!(event.number, before + 1);
        before = event.number;
        if event.what == removed {
            break;
        }
    }
}

#[test]
fn so_many_may_listen_and_one_more_is_told_what_to_do() {
    let place = Place::new();
    let running = place.start(&[]);
    let mut streams: Vec<_> = (0..16).map(|_| stream(&running)).collect();
    let refused = running.client().stream::<MonitorStart>(&NoParams {});
    let Err(CallError::Refused { kind, hint, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(kind, "too_many_streams");
    assert!(hint.contains("ss -xp"), "{hint}");
    // Who hangs up makes room.
    streams.pop();
    eventually("there is room again", || {
        let next = running.client().stream::<MonitorStart>(&NoParams {});
        next.is_ok()
    });
}

/// `ringway monitor`, running, and its lines.
struct Tool {
    child: Child,
    lines: Receiver<String>,
}

impl Tool {
    /// Starts it, and waits until it has printed a line.
    fn start(place: &Place, client: &mut Client, options: &[&str]) -> (Self, String) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ringway"))
            .arg("-s")
            .arg(place.path("control.sock"))
            .arg("monitor")
            .args(options)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines_of(child.stdout.take().unwrap());
        let tool = Self { child, lines };
        let mut first = None;
        eventually("it prints a line", || {
            add(client, place, "p");
            remove(client, "p");
            first = tool.lines.recv_timeout(Duration::from_millis(10)).ok();
            first.is_some()
        });
        (tool, first.unwrap())
    }

    fn exit_code(mut self) -> (Option<i32>, String) {
        let ended = end_of(&mut self.child, "it ends");
        let stderr = std::io::read_to_string(self.child.stderr.take().unwrap()).unwrap();
        (ended.code(), stderr)
    }
}

#[test]
fn ctrl_c_ends_it_with_0_and_whole_lines() {
    let place = Place::new();
    let running = place.start(&[]);
    let (tool, line) = Tool::start(&place, &mut running.client(), &["-j"]);
    let event: Event = serde_json::from_str(&line).unwrap();
    assert!(
        matches!(event.what, O::PortAdded { .. } | O::PortRemoved { .. }),
        "{event:?}"
    );
    kill_process(Pid::from_child(&tool.child), Signal::INT).unwrap();
    for line in &tool.lines {
        serde_json::from_str::<Event>(&line).unwrap();
    }
    assert_eq!(tool.exit_code(), (Some(0), String::new()));
}

#[test]
fn a_reader_that_goes_ends_it_though_nothing_happens_any_more() {
    let place = Place::new();
    let running = place.start(&[]);
    let mut child = Command::new("sh")
        .arg("-c")
        .arg("\"$0\" -s \"$1\" monitor | head -n 1")
        .arg(env!("CARGO_BIN_EXE_ringway"))
        .arg(place.path("control.sock"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (read, line) = mpsc::channel();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        let mut first = String::new();
        stdout.read_line(&mut first).unwrap();
        read.send(first).unwrap();
    });
    let mut client = running.client();
    let (mut first, mut ports) = (None, 0);
    eventually("it prints a line", || {
        add(&mut client, &place, &format!("p{ports}"));
        ports += 1;
        // Long enough that the line which it prints is of the last event.
        first = line.recv_timeout(Duration::from_millis(200)).ok();
        first.is_some()
    });
    assert!(first.unwrap().ends_with(" added (vhost-user)\n"));
    let ended = end_of(&mut child, "the tool ends though nothing happens");
    assert!(ended.success());
    // The daemon has nobody left to tell.
    eventually("its place is free", || {
        let all: Vec<_> = (0..16)
            .map_while(|_| running.client().stream::<MonitorStart>(&NoParams {}).ok())
            .collect();
        all.len() == 16
    });
}

#[test]
fn each_line_has_the_time_if_it_is_wanted() {
    let place = Place::new();
    let running = place.start(&[]);
    let (tool, line) = Tool::start(&place, &mut running.client(), &["-t"]);
    let (time, event) = line.split_once(' ').unwrap();
    let age = humantime::parse_rfc3339(time).unwrap().elapsed().unwrap();
    assert!(age < DEADLINE, "{line}");
    assert!(event.starts_with("p "), "{line}");
    kill_process(Pid::from_child(&tool.child), Signal::TERM).unwrap();
    assert_eq!(tool.exit_code().0, Some(0));
}

#[test]
fn a_daemon_that_ends_is_told_with_a_hint() {
    let place = Place::new();
    let running = place.start(&[]);
    let (tool, _) = Tool::start(&place, &mut running.client(), &[]);
    running.stop(Signal::TERM);
    let (code, text) = tool.exit_code();
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("it hung up") && text.contains("hint: "),
        "{text}"
    );
}

mod as_root {
    use ringway_control::api::TapConfig;
    use ringway_testbed::host::{fresh_namespace, ip};

    use super::*;

    #[test]
    fn an_interface_that_goes_down_and_away_is_told_with_the_reason() {
        fresh_namespace();
        let place = Place::new();
        let running = place.start(&[]);
        let events = Reader::new(&running);
        let params = PortAddParams {
            name: name("host"),
            config: PortConfig::Tap(TapConfig::new("rw0".parse().unwrap())),
        };
        running.client().call::<PortAdd>(&params).unwrap();
        ip("link set rw0 up");
        let up = O::PortUp { port: name("host") };
        events.until(|what| *what == up);
        ip("link set rw0 down");
        // The kernel's own frames may have taught its address meanwhile.
        let told = events.until(|what| matches!(what, O::PortDown { .. }));
        let Some(O::PortDown { port, reason }) = told.last() else {
            unreachable!();
        };
        assert_eq!(*port, name("host"));
        let reason = reason.as_ref().unwrap();
        assert!(reason.contains("ip link set rw0 up"), "{reason}");
        ip("link set rw0 up");
        events.until(|what| *what == up);
    }
}
