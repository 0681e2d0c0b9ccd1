//! Taps of a real `ringwayd` that exchange frames, and ping, beside a front-end that attacks. Needs
//! root and iproute2.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

/// By this name tests that need root are left out without it.
mod as_root {
    use std::fs::File;
    use std::io::pipe;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use ringway_guest::{
        DESC_F_NEXT, DriverRing, EventFd, Frontend, Guest, SplitArea, SplitDesc, encode,
    };
    use ringway_testbed::host::{Raw, quiet_namespace};
    use ringway_testbed::{beside, eventually};

    use crate::common::{Place, Running, fill};

    /// The taps' stations are the numbers of the taps; the first one sends to the others in turn.
    const TAPS: usize = 3;
    /// Whoever attacks.
    const BAD: u8 = 9;
    /// Frames on their way at once.
    const WINDOW: u64 = 64;
    /// A window without progress for this long is lost.
    const LOST: Duration = Duration::from_millis(5);
    /// How long a ping may take at the 99th percentile.
    const LONGEST_PING: Duration = Duration::from_millis(5);
    const PING_INTERVAL: Duration = Duration::from_millis(1);
    const PING_LOST: Duration = Duration::from_millis(500);
    /// Slices of a measurement; the third in which the machine had least else to do counts.
    const SLICES: usize = 60;
    const SLICE: Duration = Duration::from_millis(10);
    /// Trials of which one has to do.
    /// The rate of taps is also that of the kernel's work for them on the same two cores.
    const TRIALS: u32 = 8;
    /// How soon all is as before.
    const RECOVERY: Duration = Duration::from_secs(1);

    fn mac(station: u8) -> [u8; 6] {
        [0x52, 0x54, 0, 0, 0, station]
    }

    fn frame(to: [u8; 6], from: u8, number: u64) -> Vec<u8> {
        let mut frame = [&to[..], &mac(from), &[0x88, 0xb5], &number.to_be_bytes()].concat();
        frame.resize(64, 0);
        frame
    }

    /// A daemon with taps and a port for the attacker.
    struct Stage {
        place: Place,
        running: Running,
        taps: [Raw; TAPS],
        schedstats: Vec<File>,
        sent: u64,
        /// Of these, those that arrived or were lost,
        done: u64,
        /// and those that arrived.
        arrived: u64,
        progress: Instant,
        ping: Option<(u64, Instant, Duration)>,
        pings: u64,
        last_ping: Instant,
        times: Vec<Duration>,
    }

    /// Frames per second, and the time that 99 in 100 pings kept within.
    struct Pace {
        rate: f64,
        p99: Duration,
    }

    impl Stage {
        fn new(stderr: Stdio) -> Self {
            quiet_namespace();
            let place = Place::new();
            let bad = place.path("bad.sock");
            let taps: String = (0..TAPS)
                .map(|i| format!("[ports.tap{i}]\nkind = \"tap\"\nifname = \"tap{i}\"\n"))
                .collect();
            let bad = bad.display();
            let text = format!("{taps}[ports.bad]\nkind = \"vhost-user\"\nlisten = \"{bad}\"\n");
            let config = place.config(&text);
            let mut command = place.ringwayd(&["--config", config.to_str().unwrap()]);
            let running = place.start_command(command.stderr(stderr));
            let taps = std::array::from_fn(|i| {
                ringway_testbed::host::ip(&format!("link set tap{i} up"));
                Raw::open(&format!("tap{i}"))
            });
            let mut stage = Self {
                schedstats: schedstats(running.child.id()),
                place,
                running,
                taps,
                sent: 0,
                done: 0,
                arrived: 0,
                progress: Instant::now(),
                ping: None,
                pings: 0,
                last_ping: Instant::now(),
                times: Vec::new(),
            };
            for station in 0..3 {
                stage.taps[usize::from(station)].send(&frame([0xff; 6], station, 0));
            }
            eventually("taps hear of each other", || {
                stage.turn();
                stage.times.len() > 10
            });
            stage
        }

        fn bad(&self) -> PathBuf {
            self.place.path("bad.sock")
        }

        /// Fills the window, takes what arrived, and looks after the ping.
        fn turn(&mut self) {
            while self.sent - self.done < WINDOW {
                let to = mac(1 + u8::from(self.sent.is_multiple_of(2)));
                // What the interface doesn't take is lost.
                let _ = self.taps[0].try_send(&frame(to, 0, u64::MAX));
                self.sent += 1;
            }
            for tap in 0..TAPS {
                while let Some(frame) = self.taps[tap].try_receive() {
                    self.take(tap, &frame);
                }
            }
            if self.progress.elapsed() > LOST {
                self.done = self.sent;
                self.progress = Instant::now();
            }
            if self.ping.is_none() && self.last_ping.elapsed() >= PING_INTERVAL {
                self.pings += 1;
                self.last_ping = Instant::now();
                self.ping = Some((self.pings, self.last_ping, self.waited()));
                let to_all = self.pings.is_multiple_of(8);
                let to = if to_all { [0xff; 6] } else { mac(2) };
                let _ = self.taps[1].try_send(&frame(to, 1, self.pings));
            }
            if self.ping.is_some_and(|(_, at, _)| at.elapsed() > PING_LOST) {
                self.answered();
            }
        }

        fn take(&mut self, tap: usize, bytes: &[u8]) {
            let number = u64::from_be_bytes(bytes[14..22].try_into().unwrap());
            let from = &bytes[6..12];
            if from == mac(0) && number == u64::MAX {
                self.done = (self.done + 1).min(self.sent);
                self.arrived += 1;
                self.progress = Instant::now();
            } else if tap == 2 && from == mac(1) {
                let _ = self.taps[2].try_send(&frame(mac(1), 2, number));
            } else if tap == 1 && from == mac(2) && self.ping.is_some_and(|p| p.0 == number) {
                self.answered();
            }
        }

        fn answered(&mut self) {
            let (_, at, waited) = self.ping.take().unwrap();
            let wall = at.elapsed();
            let net = wall.saturating_sub(self.waited().saturating_sub(waited));
            // It was late all the same, or the machine had no part in it.
            if net > LONGEST_PING || net >= wall.mul_f64(0.9) {
                self.times.push(net);
            }
        }

        /// How long the daemon's threads and this one were ready to run and had no core.
        fn waited(&self) -> Duration {
            let waited = |file: &File| {
                let mut text = [0; 64];
                let len = file.read_at(&mut text, 0).unwrap_or(0);
                let text = std::str::from_utf8(&text[..len]).unwrap();
                let ns = text.split_ascii_whitespace().nth(1);
                Duration::from_nanos(ns.map_or(0, |ns| ns.parse().unwrap()))
            };
            self.schedstats.iter().map(waited).sum()
        }

        /// Frames per second of one slice, and the part of it that the machine took.
        fn slice(&mut self, step: &mut impl FnMut()) -> (f64, f64) {
            let (start, arrived, waited) = (Instant::now(), self.arrived, self.waited());
            while start.elapsed() < SLICE {
                step();
                self.turn();
            }
            let wall = start.elapsed().as_secs_f64();
            let waited = self.waited().saturating_sub(waited).as_secs_f64();
            ((self.arrived - arrived) as f64 / wall, waited / wall)
        }

        fn pace(&mut self, mut step: impl FnMut()) -> Pace {
            for _ in 0..4 {
                self.slice(&mut step);
            }
            self.times.clear();
            let mut slices: Vec<_> = (0..SLICES).map(|_| self.slice(&mut step)).collect();
            eventually("a ping comes back", || {
                step();
                self.turn();
                !self.times.is_empty()
            });
            slices.sort_by(|a, b| a.1.total_cmp(&b.1));
            slices.truncate(SLICES / 3);
            self.times.sort();
            Pace {
                rate: slices.iter().map(|slice| slice.0).sum::<f64>() / slices.len() as f64,
                p99: self.times[(self.times.len() * 99).div_ceil(100) - 1],
            }
        }

        /// Measures alone and beside the attack, of which a step is taken each time round.
        #[track_caller]
        fn endure(&mut self, least: f64, what: &str, mut step: impl FnMut()) {
            let (mut alone, footprint) = (self.pace(|| {}), Footprint::of(&self.running));
            for trial in 1.. {
                let beside = self.pace(&mut step);
                let part = beside.rate / alone.rate;
                let (p99, before) = (beside.p99, alone.p99);
                let figures = format!(
                    "{what}: {part:.3} of {:.0} frames/s, ping p99 {p99:?} (alone {before:?})",
                    alone.rate
                );
                eprintln!("{figures}");
                if part >= least && p99 <= LONGEST_PING {
                    break;
                }
                assert!(trial < TRIALS, "{figures}");
                alone = self.pace(|| {});
            }
            let start = Instant::now();
            while self.slice(&mut || {}).0 < 0.5 * alone.rate {
                assert!(
                    start.elapsed() < RECOVERY,
                    "{what}: {RECOVERY:?} afterwards"
                );
            }
            footprint.assert_flat(&self.running);
        }
    }

    /// Those of the daemon's workers and of this thread.
    fn schedstats(daemon: u32) -> Vec<File> {
        let tasks = std::fs::read_dir(format!("/proc/{daemon}/task")).unwrap();
        let tasks = tasks.map(|task| task.unwrap().path());
        let is_worker = |task: &PathBuf| {
            let name = std::fs::read_to_string(task.join("comm"));
            name.is_ok_and(|name| name.starts_with("ringway-w"))
        };
        let own = std::fs::canonicalize("/proc/thread-self").unwrap();
        let open = |task: PathBuf| File::open(task.join("schedstat")).unwrap();
        tasks.filter(is_worker).chain([own]).map(open).collect()
    }

    /// What a session that is still there may have open.
    const SESSION_FDS: usize = 8;

    /// Open files and own memory of the daemon.
    struct Footprint {
        fds: usize,
        private_kib: u64,
    }

    impl Footprint {
        fn of(running: &Running) -> Self {
            let pid = running.child.id();
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("RssAnon:"));
            let kib = line.unwrap().split_whitespace().nth(1).unwrap();
            Self {
                fds: std::fs::read_dir(format!("/proc/{pid}/fd"))
                    .unwrap()
                    .count(),
                private_kib: kib.parse().unwrap(),
            }
        }

        fn assert_flat(&self, running: &Running) {
            eventually("fds and memory are as before", || {
                let now = Self::of(running);
                now.fds <= self.fds + SESSION_FDS && now.private_kib <= self.private_kib + 4096
            });
        }
    }

    /// A guest, and its transmit rings to be written by hand.
    fn attacker(path: &Path, pairs: u16, size: u16) -> (Guest, Vec<SplitArea>) {
        let builder = Guest::builder().bare().queue_pairs(pairs).queue_size(size);
        let mut guest = builder.connect(path).unwrap();
        let area = |pair| match guest.transmit_queue(pair).ring() {
            DriverRing::Split(ring) => ring.area().clone(),
            DriverRing::Packed(_) => panic!("not a split ring"),
        };
        let areas = (0..pairs).map(area).collect();
        (guest, areas)
    }

    /// Offers as much as can be, whatever was used since.
    fn recycle(area: &SplitArea, kick: &EventFd) {
        area.set_avail_idx(area.used_idx().wrapping_add(area.size()));
        if area.used_flags() == 0 {
            kick.signal().unwrap();
        }
    }

    /// Beside rings that are written once and never run dry.
    fn endure_rings(
        (what, least): (&str, f64),
        pairs: u16,
        size: u16,
        write: impl FnOnce(&mut Guest, &[SplitArea]),
    ) {
        let mut stage = Stage::new(Stdio::null());
        let (mut guest, areas) = attacker(&stage.bad(), pairs, size);
        write(&mut guest, &areas);
        stage.endure(least, what, || {
            for (pair, area) in (0..).zip(&areas) {
                recycle(area, guest.transmit_queue(pair).kick());
            }
        });
    }

    #[test]
    fn empty_chains_leave_taps_their_rate_and_ping() {
        const LONGEST: u16 = 1024;
        endure_rings(("empty chains", 0.5), 8, LONGEST, |_, areas| {
            for (area, index) in areas
                .iter()
                .flat_map(|area| (0..LONGEST).map(move |i| (area, i)))
            {
                let next = (index + 1) % LONGEST;
                let desc = SplitDesc {
                    addr: 0,
                    len: 0,
                    flags: if next == 0 { 0 } else { DESC_F_NEXT },
                    next,
                };
                area.write_desc(index, desc);
                area.set_avail_entry(index, 0);
            }
        });
    }

    #[test]
    fn broadcasts_leave_taps_their_rate_and_ping() {
        // Each that passes is taken in for each tap, by the worker's own system call and by whoever reads
        // there. As many as guests are sent leave taps a quarter of their rate.
        endure_rings(("broadcasts", 0.7), 1, 256, |guest, areas| {
            // The driver's first chain, which stays where it is.
            guest.send_frame(&frame([0xff; 6], BAD, 0)).unwrap();
            (0..256).for_each(|slot| areas[0].set_avail_entry(slot, 0));
        });
    }

    /// Runs `attack` on a thread of its own while steps are taken.
    fn endure_thread(stage: &mut Stage, what: &str, attack: impl FnMut() + Send) {
        beside(attack, |go_on| stage.endure(0.5, what, go_on));
    }

    #[test]
    fn guests_that_come_and_go_leave_taps_their_rate_and_ping() {
        let mut stage = Stage::new(Stdio::null());
        let path = stage.bad();
        endure_thread(&mut stage, "reconnects", || {
            let _ = Guest::builder().connect(&path);
        });
    }

    /// SET_VRING_KICK and SEND_RARP as fast as the socket takes them, and a new session as soon as
    /// one ends, into a log that nobody reads.
    #[test]
    fn requests_without_end_and_a_log_that_nobody_reads_leave_taps_their_rate_and_ping() {
        const KICK: u32 = 12;
        const RARP: u32 = 19;
        let (_reader, writer) = pipe().unwrap();
        let mut stage = Stage::new(writer.try_clone().unwrap().into());
        fill(&writer);
        let path = stage.bad();
        let (kick, mut guest) = (EventFd::new().unwrap(), None::<Frontend>);
        let messages = [
            encode(KICK, 1, &1_u64.to_ne_bytes()),
            encode(RARP, 1, &[0x52, 0x54, 0, 0, 1, 1, 0, 0]),
        ];
        endure_thread(&mut stage, "requests", || {
            let Some(frontend) = &guest else {
                guest = Frontend::connect(&path).ok();
                return;
            };
            let [start, announce] = &messages;
            let sent = frontend.send_raw(start, &[kick.as_fd()]);
            if sent
                .and_then(|()| frontend.send_raw(announce, &[]))
                .is_err()
            {
                guest = None;
            }
        });
    }
}
