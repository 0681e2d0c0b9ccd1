//! A daemon without file descriptors left: what comes then is told why, nothing spins, and all works as
//! soon as there are some.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::{Place, Running};
use ringway_control::api::{
    NoParams, PortAdd, PortAddParams, PortConfig, PortDetail, PortList, PortName, PortShow,
    PortShowParams, PortState, SocketSpec, VhostUserConfig,
};
use ringway_control::rpc::{CallError, Client};
use ringway_guest::Guest;
use ringway_testbed::eventually;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

/// A daemon with the port `vm`, and a client who was there in time.
struct Bed {
    place: Place,
    running: Running,
    client: Client,
}

impl Bed {
    fn new() -> Self {
        let place = Place::new();
        let socket = place.path("vm.sock");
        let socket = socket.display();
        let config = place.config(&format!(
            "[ports.vm]\nkind = \"vhost-user\"\nlisten = \"{socket}\"\n"
        ));
        let log = File::create(place.path("log")).unwrap();
        let mut command = place.ringwayd(&["--config", config.to_str().unwrap()]);
        let running = place.start_command(command.stderr(log));
        let client = running.client();
        let mut bed = Self {
            place,
            running,
            client,
        };
        // Nothing is being opened any more when this is answered.
        assert_eq!(bed.port().port.state, PortState::Down);
        bed
    }

    fn socket(&self) -> PathBuf {
        self.place.path("vm.sock")
    }

    fn port(&mut self) -> PortDetail {
        let name = "vm".parse().unwrap();
        self.client
            .call::<PortShow>(&PortShowParams { name })
            .unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.place.path("log")).unwrap()
    }

    /// Leaves the daemon so many descriptors; returns the limit.
    fn leave(&self, more: u64) -> u64 {
        let folder = format!("/proc/{}/fd", self.running.child.id());
        let open: BTreeSet<u64> = std::fs::read_dir(folder)
            .unwrap()
            .map(|fd| fd.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        let free = (0..).filter(|number| !open.contains(number));
        let limit = free
            .take(usize::try_from(more).unwrap() + 1)
            .last()
            .unwrap();
        self.set_limit(Some(limit));
        limit
    }

    fn set_limit(&self, current: Option<u64>) {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let current = current.or(maximum);
        let pid = Pid::from_child(&self.running.child);
        prlimit(Some(pid), Resource::Nofile, Rlimit { current, maximum }).unwrap();
    }

    /// Processor time of the daemon so far.
    fn spent(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.running.child.id()));
        let stat = stat.unwrap();
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap()
            .split_whitespace()
            .collect();
        let ticks: u64 = fields[11..13]
            .iter()
            .map(|f| f.parse::<u64>().unwrap())
            .sum();
        // USER_HZ is 100 on all that Linux runs on here.
        Duration::from_millis(ticks * 10)
    }
}

/// What is told has the limit and the remedy.
fn names_the_limit(text: &str, limit: u64) -> bool {
    let count = format!("all {limit} file descriptors");
    text.contains(&count) && text.contains("LimitNOFILE=") && !text.contains('\n')
}

#[test]
fn whoever_comes_when_there_are_no_fds_left_is_told_why_and_served_once_there_are() {
    let mut bed = Bed::new();
    let limit = bed.leave(0);
    let (socket, other) = (bed.socket(), bed.place.path("other.sock"));
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| Guest::builder().connect(&socket));
        eventually("the port says what is in the way", || {
            let error = bed.port().last_error.unwrap_or_default();
            names_the_limit(&error, limit)
        });
        // A port can't be added.
        let name: PortName = "other".parse().unwrap();
        let spec = SocketSpec::Listen(other.as_path().try_into().unwrap());
        let config = PortConfig::VhostUser(VhostUserConfig::new(spec));
        let added = bed.client.call::<PortAdd>(&PortAddParams { name, config });
        let Err(CallError::Refused { message, hint, .. }) = added else {
            panic!("{added:?}");
        };
        let error = format!("{message}; {hint}");
        assert!(names_the_limit(&error, limit), "{error}");
        assert!(!other.exists());
        // Who wants to know gets in all the same.
        let mut operator = bed.running.client();
        let ports = operator.call::<PortList>(&NoParams {}).unwrap().ports;
        assert_eq!(ports.len(), 1, "nothing of what was refused is left");
        let (start, before) = (Instant::now(), bed.spent());
        while start.elapsed() < Duration::from_secs(1) {
            assert_eq!(bed.port().port.state, PortState::Down);
            std::thread::sleep(Duration::from_millis(50));
        }
        let spent = bed.spent() - before;
        assert!(
            spent < start.elapsed() / 2,
            "{spent:?} in {:?}",
            start.elapsed()
        );
        assert!(!guest.is_finished());
        bed.set_limit(None);
        let guest = guest.join().unwrap().unwrap();
        eventually("the guest is served", || {
            let detail = bed.port();
            (detail.port.state, detail.last_error) == (PortState::Up, None)
        });
        drop(guest);
    });
    let log = bed.log();
    let lines = log
        .lines()
        .filter(|line| line.contains("no front-end can be let in"));
    let lines: Vec<_> = lines.collect();
    assert!((1..=5).contains(&lines.len()), "{log}");
    assert!(
        lines.iter().all(|line| names_the_limit(line, limit)),
        "{log}"
    );
}

#[test]
fn a_message_whose_fds_there_is_no_room_for_ends_its_session_with_that_reason() {
    let mut bed = Bed::new();
    // For the connection, and for none of the guest's memory.
    let limit = bed.leave(1);
    assert!(Guest::builder().connect(&bed.socket()).is_err());
    eventually("the port says what was in the way", || {
        let error = bed.port().last_error.unwrap_or_default();
        error.contains("fds of a message") && names_the_limit(&error, limit)
    });
    bed.set_limit(None);
    let guest = Guest::builder().connect(&bed.socket()).unwrap();
    eventually("the guest is served", || {
        bed.port().port.state == PortState::Up
    });
    drop(guest);
}
