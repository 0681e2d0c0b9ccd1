//! The machine in virtual time: what the interface is like comes from a table of the test's.

use super::*;

const PROGRAM: u32 = 7;

/// A port, and the interface that it is to have.
struct Bench {
    link: Link,
    now: Instant,
    seen: Seen,
    channels: u16,
}

fn seen(index: u32, name: &str) -> Seen {
    Seen {
        index,
        name: name.into(),
        is_whole: true,
        is_up: true,
        is_running: true,
        mtu: 1500,
        promiscuity: 0,
        program: None,
        tap_queues: None,
    }
}

impl Bench {
    /// A port that waits.
    fn new(kind: LinkKind) -> Self {
        let now = Instant::now();
        Self {
            link: Link::new(kind, "if0", None, now),
            now,
            seen: seen(3, "if0"),
            channels: 2,
        }
    }

    /// One whose interface is open.
    fn attached(kind: LinkKind) -> Self {
        let mut bench = Self::new(kind);
        assert_eq!(bench.look().order, Some(Order::Attach));
        bench.attach();
        bench
    }

    fn look(&mut self) -> Verdict {
        self.look_after(false, false)
    }

    fn look_after(&mut self, was_gone: bool, was_down: bool) -> Verdict {
        let sight = Sight::Here(self.seen.clone(), Some(self.channels));
        self.link.look(self.now, &sight, was_gone, was_down)
    }

    /// Carries out the order.
    fn attach(&mut self) {
        let what = match self.link.kind {
            LinkKind::Tap => Opened::Tap { queues: 1 },
            LinkKind::Nic => {
                self.seen.program = Some(PROGRAM);
                self.seen.promiscuity = 1;
                Opened::Nic {
                    program: PROGRAM,
                    mtu: self.seen.mtu,
                    channels: self.channels,
                }
            }
        };
        let (index, name) = (self.seen.index, self.seen.name.clone());
        let attachment = Attachment { index, name, what };
        self.link.attached(self.now, attachment);
        assert_eq!(self.look(), Verdict::default());
        assert_eq!(self.state(), (PortState::Up, Some(1500), None));
    }

    fn detach(&mut self) {
        (self.seen.program, self.seen.promiscuity) = (None, 0);
        self.link.detached();
    }

    fn state(&self) -> (PortState, Option<u16>, Option<&str>) {
        let status = self.link.status();
        (status.state, status.mtu, status.error.as_deref())
    }

    fn is_down_for(&self, reason: &str) {
        let (state, _, error) = self.state();
        assert_eq!(state, PortState::Down);
        let error = error.expect("a reason");
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
    }
}

/// What a NIC's interface becomes, and the reason that is told.
type Change = (fn(&mut Bench), &'static str);

const CLOSING: [Change; 6] = [
    (|b| b.seen.program = None, "taken off"),
    (|b| b.seen.program = Some(9), "id 9"),
    (|b| b.seen.mtu = 9000, "was 1500, is 9000"),
    (|b| b.channels = 4, "another number of queues"),
    (|b| b.channels = 1, "another number of queues"),
    (|b| b.seen.promiscuity = 0, "other addresses"),
];

#[test]
fn a_nic_that_is_not_what_was_opened_is_closed_and_opened_anew() {
    for (change, reason) in CLOSING {
        let mut bench = Bench::attached(LinkKind::Nic);
        bench.now += STEADY;
        change(&mut bench);
        let verdict = bench.look();
        assert_eq!((verdict.order, verdict.flush), (Some(Order::Detach), true));
        bench.is_down_for(reason);
        // Until that is done nothing else is.
        assert_eq!(bench.look().order, None);
        bench.seen.mtu = 1500;
        bench.detach();
        assert_eq!(bench.look().order, Some(Order::Attach), "{reason}");
        bench.attach();
    }
}

#[test]
fn what_is_down_stays_open_and_is_flushed_once() {
    for kind in [LinkKind::Tap, LinkKind::Nic] {
        for (is_up, reason) in [(false, "`ip link set if0 up`"), (true, "no carrier")] {
            let mut bench = Bench::attached(kind);
            (bench.seen.is_up, bench.seen.is_running) = (is_up, false);
            let flush = Verdict {
                flush: true,
                order: None,
            };
            assert_eq!(bench.look(), flush);
            bench.is_down_for(reason);
            assert_eq!(bench.look(), Verdict::default());
            (bench.seen.is_up, bench.seen.is_running) = (true, true);
            assert_eq!(bench.look(), Verdict::default());
            assert_eq!(bench.state(), (PortState::Up, Some(1500), None));
            // A moment that nobody saw but the kernel told of.
            assert_eq!(bench.look_after(false, true), flush);
        }
    }
}

#[test]
fn what_is_gone_is_closed_and_waited_for() {
    let mut nic = Bench::attached(LinkKind::Nic);
    let mut tap = Bench::attached(LinkKind::Tap);
    for bench in [&mut nic, &mut tap] {
        let verdict = bench.link.look(bench.now, &Sight::Missing, true, false);
        assert_eq!((verdict.order, verdict.flush), (Some(Order::Detach), true));
        bench.detach();
        bench.now += STEADY;
        let verdict = bench.link.look(bench.now, &Sight::Missing, false, false);
        assert_eq!(verdict, Verdict::default());
        bench.is_down_for("no interface if0");
        assert_eq!(
            (bench.link.look_at(), bench.link.is_polled()),
            (None, false)
        );
        assert_eq!(bench.look().order, Some(Order::Attach));
        bench.attach();
    }
    // The number and the name are there again, but it is not what was opened.
    assert_eq!(nic.look_after(true, false).order, Some(Order::Detach));
    // A tap's fd would have told.
    assert_eq!(tap.look_after(true, false).order, None);
}

#[test]
fn a_tap_elsewhere_is_up_and_one_that_may_not_be_asked_about_too() {
    let mut bench = Bench::attached(LinkKind::Tap);
    let there = Seen {
        mtu: 1400,
        ..seen(99, "eth0")
    };
    bench.link.look(
        bench.now,
        &Sight::Elsewhere(Some(there.clone())),
        true,
        false,
    );
    assert_eq!(bench.state(), (PortState::Up, Some(1400), None));
    assert!(bench.link.is_polled(), "no event tells of it");
    let down = Seen {
        is_up: false,
        is_running: false,
        ..there
    };
    bench
        .link
        .look(bench.now, &Sight::Elsewhere(Some(down)), false, false);
    bench.is_down_for("`ip link set eth0 up` in its network namespace");
    bench
        .link
        .look(bench.now, &Sight::Elsewhere(None), false, false);
    assert_eq!(bench.state(), (PortState::Up, None, None));
}

#[test]
fn an_interface_that_can_not_be_opened_is_tried_ever_more_rarely_and_at_least_twice_a_second() {
    let mut bench = Bench::new(LinkKind::Nic);
    let (begin, mut tries, mut longest) = (bench.now, 0, Duration::ZERO);
    let mut last = bench.now;
    while bench.now < begin + Duration::from_secs(10) {
        if bench.look().order == Some(Order::Attach) {
            tries += 1;
            longest = longest.max(bench.now - last);
            last = bench.now;
            bench.link.failed(bench.now, "queue 0 is bound".to_owned());
            bench.is_down_for("queue 0 is bound");
        }
        let next = bench.link.look_at();
        assert!(next.is_none_or(|at| at > bench.now));
        bench.now += Duration::from_millis(1);
    }
    assert!((20..40).contains(&tries), "{tries}");
    assert!(longest <= LONGEST_PAUSE, "{longest:?}");
    // What keeps it from being tried at all is told as soon as it is seen.
    bench.seen.program = Some(9);
    bench.now += LONGEST_PAUSE;
    assert_eq!(bench.look().order, None);
    bench.is_down_for("id 9");
    bench.seen.program = None;
    assert_eq!(bench.look().order, Some(Order::Attach));
}

#[test]
fn an_interface_that_comes_and_goes_without_end_is_not_opened_each_time() {
    let mut bench = Bench::new(LinkKind::Tap);
    let begin = bench.now;
    let mut opened = 0;
    while bench.now < begin + Duration::from_secs(10) {
        if bench.look().order == Some(Order::Attach) {
            bench.attach();
            opened += 1;
            let gone = bench.link.look(bench.now, &Sight::Missing, true, false);
            assert_eq!(gone.order, Some(Order::Detach));
            bench.detach();
        }
        bench.now += Duration::from_millis(1);
    }
    assert!((20..40).contains(&opened), "{opened}");
}

#[test]
fn a_name_is_one_line_whatever_is_in_it() {
    let name = LinkName::from_kernel(b"a\x1b[2J\n\xff\0rest");
    assert_eq!(name.to_string(), r"a\x1b[2J\n\xff");
    let mut bench = Bench::attached(LinkKind::Tap);
    bench.seen.name = name;
    bench.look();
    let (state, _, error) = bench.state();
    assert_eq!(state, PortState::Up);
    assert!(error.unwrap().contains(r"if0 is called a\x1b[2J\n\xff now"));
}

#[test]
fn what_the_kernel_tells_nobody_is_looked_at_every_50_ms_whatever_is_heard_in_between() {
    let begin = Instant::now();
    let mut rounds = Rounds::new(begin);
    // Events come at odd times, without end.
    let events = (1_u64..).map(|n| Duration::from_micros(n * 7_919));
    let (mut last, mut looks) = (begin, 0);
    for event in events.take_while(|at| *at < Duration::from_secs(10)) {
        // The watcher wakes for an event, or when it is time, whichever is first.
        for now in [rounds.next().min(begin + event), begin + event] {
            if rounds.begin(now) {
                assert_eq!(now - last, LOOK_INTERVAL);
                (last, looks) = (now, looks + 1);
            }
        }
    }
    assert_eq!(looks, 199);
    // One that was kept from running is not early for it the next time.
    let late = last + 3 * LOOK_INTERVAL;
    assert!(rounds.begin(late) && !rounds.begin(late));
    assert_eq!(rounds.next(), late + LOOK_INTERVAL);
}

#[test]
fn an_interface_that_others_have_open_leaves_the_port_impaired() {
    let mut bench = Bench::attached(LinkKind::Tap);
    bench.seen.tap_queues = Some(3);
    assert_eq!(bench.look(), Verdict::default(), "who is behind it stays");
    let (state, _, error) = bench.state();
    assert_eq!(state, PortState::Impaired);
    assert!(error.unwrap().contains("2 queues of if0"));
    // Renamed as well: what is lost comes first.
    bench.seen.name = "if9".into();
    bench.look();
    assert!(bench.state().2.unwrap().contains("2 queues of if9"));
    bench.seen.name = "if0".into();
    (bench.seen.is_up, bench.seen.is_running) = (false, false);
    assert!(bench.look().flush, "it went down");
    bench.is_down_for("`ip link set if0 up`");
    (bench.seen.is_up, bench.seen.is_running) = (true, true);
    bench.seen.tap_queues = Some(1);
    bench.look();
    assert_eq!(bench.state(), (PortState::Up, Some(1500), None));
}

#[test]
fn what_becomes_of_an_interface_while_it_is_opened_or_closed_is_told() {
    let mut bench = Bench::attached(LinkKind::Nic);
    bench.seen.mtu = 9000;
    assert_eq!(bench.look().order, Some(Order::Detach));
    bench.seen.mtu = 1400;
    assert_eq!(bench.look().order, None);
    bench.is_down_for("was 1500, is 9000");
    assert_eq!(bench.state().1, Some(1400));
    bench.link.look(bench.now, &Sight::Missing, true, true);
    bench.is_down_for("no interface if0");
    (bench.seen.is_up, bench.seen.is_running) = (false, false);
    assert_eq!(bench.look().order, None);
    bench.is_down_for("`ip link set if0 up`");
}
