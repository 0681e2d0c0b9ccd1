//! Front-ends that break the rules, and sockets that come and go.

use super::*;

/// CVE-2019-14818, CVE-2022-0669, CVE-2020-10726.
#[test]
fn no_message_leaks_its_fds() {
    let bed = Bed::new();
    let (_device, seen) = bed.listen(0);
    for request in (0..50).chain([0x100, u32::MAX]) {
        for body in [0, 8, 16, 40, 264] {
            let mut front = Front::connect(&bed.path(0));
            front.run(&tell(16, body64(&[OFFERED_PROTOCOL_FEATURES])));
            let fd = memfd("server-leak", 0);
            let message = wire(request, true, &vec![0; body]);
            send_with_fds(&front.0, &message, &[fd.as_fd(); 8]);
            let _ = front.0.shutdown(std::net::Shutdown::Write);
            front.expect_end();
            wait_for(&seen, |call| matches!(call, Call::Disconnected(_)));
        }
    }
    bed.thread.remove(port(0));
    assert_eq!(open_memfds("server-leak"), 0);
}

#[test]
fn call_fds_that_come_again_do_not_pile_up() {
    let bed = Bed::new();
    let _port = bed.listen(0);
    let mut front = Front::connect(&bed.path(0));
    let fd = memfd("server-calls", 0);
    for round in 0..20_000_u64 {
        send_with_fds(
            &front.0,
            &wire(13, false, &body64(&[round % 2])),
            &[fd.as_fd()],
        );
        if round % 64 == 0 {
            // So that no fds are in flight in the socket while they are counted.
            front.ask(1, &[]);
            assert!(open_memfds("server-calls") <= 3);
        }
    }
    drop((front, fd));
    bed.thread.remove(port(0));
    assert_eq!(open_memfds("server-calls"), 0);
}

/// CVE-2020-10723 and the rows "message framing" and "index truncated before it is checked".
#[test]
fn a_broken_rule_is_answered_if_asked_for_and_ends_the_session() {
    let bed = Bed::new();
    let (_device, seen) = bed.listen(0);
    let broken = [
        wire(8, true, &body32(&[0, 0])),
        wire(8, true, &body32(&[0, 32769])),
        wire(8, true, &body32(&[0, 3])),
        wire(8, true, &body32(&[0x1_0000, 256])),
        wire(18, true, &body32(&[u32::MAX, 1])),
        wire(2, true, &body64(&[u64::MAX])),
        wire(2, true, &[0; 7]),
        wire(2, true, &[0; 9]),
        wire(12, true, &body64(&[0x1_0100])),
    ];
    for message in broken {
        let mut front = Front::connect(&bed.path(0));
        front.run(&tell(16, body64(&[OFFERED_PROTOCOL_FEATURES])));
        front.0.write_all(&message).unwrap();
        let request = u32::from_ne_bytes(message[..4].try_into().unwrap());
        assert_eq!(front.reply(request), 1_u64.to_ne_bytes());
        front.expect_end();
        let end = wait_for(&seen, |call| matches!(call, Call::Disconnected(_)));
        assert!(matches!(end, Call::Disconnected(Some(_))), "{end:?}");
    }
}

#[test]
fn half_a_message_holds_up_nobody() {
    let bed = Bed::new();
    let _silent_port = bed.listen(0);
    let _other_port = bed.listen(1);
    let mut silent = Front::connect(&bed.path(0));
    let message = wire(2, false, &body64(&[FEATURES]));
    for byte in &message[..message.len() - 1] {
        silent.0.write_all(&[*byte]).unwrap();
        let mut other = Front::connect(&bed.path(1));
        assert_eq!(other.ask(1, &[]), OFFERED_FEATURES);
        other.0.shutdown(std::net::Shutdown::Write).unwrap();
        other.expect_end();
    }
    silent.0.write_all(&message[message.len() - 1..]).unwrap();
    assert_eq!(silent.ask(1, &[]), OFFERED_FEATURES);
}

#[test]
fn a_chatty_front_end_holds_up_nobody_and_loses_the_session_if_it_does_not_read() {
    let bed = Bed::new();
    let (_device, seen) = bed.listen(0);
    let _other_port = bed.listen(1);
    let chatty = Front::connect(&bed.path(0));
    let flood = std::thread::spawn(move || {
        let questions = wire(1, false, &[]).repeat(100);
        let mut chatty = chatty.0;
        while chatty.write_all(&questions).is_ok() {}
    });
    let mut other = Front::connect(&bed.path(1));
    for _ in 0..1000 {
        assert_eq!(other.ask(1, &[]), OFFERED_FEATURES);
    }
    let end = wait_for(&seen, |call| matches!(call, Call::Disconnected(_)));
    let reason = "the front-end does not read its replies";
    assert_eq!(end, Call::Disconnected(Some(reason.into())));
    flood.join().unwrap();
}

/// Requests have a price: over budget, their own front-end waits.
#[test]
fn a_front_end_that_asks_too_much_waits_and_nobody_else_does() {
    const REQUESTS: u32 = 7000;
    let bed = Bed::new();
    let _port = bed.listen(0);
    let _other_port = bed.listen(1);
    let mut chatty = Front::connect(&bed.path(0));
    let enable = wire(18, false, &body32(&[0, 1]));
    let start = Instant::now();
    let flood = std::thread::spawn(move || {
        for _ in 0..REQUESTS {
            chatty.0.write_all(&enable).unwrap();
        }
        assert_eq!(chatty.ask(1, &[]), OFFERED_FEATURES);
        start.elapsed()
    });
    let mut other = Front::connect(&bed.path(1));
    let mut answers = 0;
    while !flood.is_finished() {
        assert_eq!(other.ask(1, &[]), OFFERED_FEATURES);
        answers += 1;
        std::thread::yield_now();
    }
    // 100 us each, of which 500 ms come at once and the rest in four times their time.
    assert!(flood.join().unwrap() > Duration::from_millis(700));
    assert!(answers > 100, "{answers}");
}

#[test]
fn front_ends_that_come_and_go_without_end_are_let_in_by_and_by() {
    let bed = Bed::new();
    let _port = bed.listen(0);
    let start = Instant::now();
    for _ in 0..650 {
        Front::connect(&bed.path(0)).ask(1, &[]);
    }
    assert!(start.elapsed() > Duration::from_millis(400));
}

#[test]
fn who_never_speaks_or_stops_within_a_message_is_sent_away_and_who_is_idle_is_not() {
    let bed = Bed::new();
    let _ports = [bed.listen(0), bed.listen(1), bed.listen(2)];
    let mut idle = Front::connect(&bed.path(2));
    assert_eq!(idle.ask(1, &[]), OFFERED_FEATURES);
    let mut mute = Front::connect(&bed.path(0));
    let mut halting = Front::connect(&bed.path(1));
    assert_eq!(halting.ask(1, &[]), OFFERED_FEATURES);
    halting.0.write_all(&wire(1, false, &[])[..5]).unwrap();
    mute.expect_end();
    halting.expect_end();
    assert_eq!(idle.ask(1, &[]), OFFERED_FEATURES);
    assert_eq!(Front::connect(&bed.path(0)).ask(1, &[]), OFFERED_FEATURES);
}

#[test]
fn a_second_front_end_is_turned_away_until_the_first_has_gone() {
    let bed = Bed::new();
    let (_device, seen) = bed.listen(0);
    let mut first = Front::connect(&bed.path(0));
    assert_eq!(first.ask(1, &[]), OFFERED_FEATURES);
    for _ in 0..20 {
        Front::connect(&bed.path(0)).expect_end();
    }
    assert_eq!(first.ask(1, &[]), OFFERED_FEATURES);
    for _ in 0..200 {
        // Both events may reach the thread at once.
        drop(first);
        first = Front::connect(&bed.path(0));
        assert_eq!(first.ask(1, &[]), OFFERED_FEATURES);
        wait_for(&seen, |call| matches!(call, Call::Disconnected(_)));
    }
}

#[test]
fn removing_a_port_leaves_nothing_of_it() {
    let bed = Bed::new();
    let (device, seen) = bed.listen(0);
    let mut front = Front::connect(&bed.path(0));
    for step in qemu_connects().into_iter().chain(qemu_starts(true, 0)) {
        front.run(&step);
    }
    assert_eq!(front.ask(40, &[]), 15);
    bed.thread.remove(port(0));
    assert!(!bed.path(0).exists());
    assert!(!device.is_started(0) && !device.is_started(1));
    assert_eq!(seen.try_iter().last(), Some(Call::Disconnected(None)));
    assert_eq!(Arc::strong_count(&device), 1);
    front.expect_end();
    bed.thread.remove(port(0));
    let _again = bed.listen(0);
    assert_eq!(Front::connect(&bed.path(0)).ask(1, &[]), OFFERED_FEATURES);
}

#[test]
fn a_port_can_not_be_added_twice() {
    let bed = Bed::new();
    let _port = bed.listen(0);
    let (device, _seen) = TestDevice::new(1);
    let endpoint = Endpoint::listen(&bed.path(1), &SocketFile::default()).unwrap();
    let error = bed.thread.add(port(0), endpoint, device).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(!bed.path(1).exists(), "the refused endpoint is gone");
    assert_eq!(Front::connect(&bed.path(0)).ask(1, &[]), OFFERED_FEATURES);
}

#[test]
fn the_end_of_the_thread_ends_all_sessions() {
    let bed = Bed::new();
    let (_device, seen) = bed.listen(0);
    let mut front = Front::connect(&bed.path(0));
    assert_eq!(front.ask(1, &[]), OFFERED_FEATURES);
    drop(bed.thread);
    assert_eq!(seen.try_iter().last(), Some(Call::Disconnected(None)));
    front.expect_end();
}

fn accept(listener: &UnixListener) -> Front {
    rustix::event::poll(
        &mut [rustix::event::PollFd::new(
            listener,
            rustix::event::PollFlags::IN,
        )],
        Some(&PATIENCE.try_into().unwrap()),
    )
    .unwrap();
    listener.set_nonblocking(true).unwrap();
    let (stream, _) = listener.accept().expect("a connection comes in time");
    stream.set_nonblocking(false).unwrap();
    Front::new(stream)
}

#[test]
fn a_connecting_port_finds_a_front_end_that_comes_later_and_comes_back() {
    let bed = Bed::new();
    let (_device, seen) = bed.connect(0);
    for _ in 0..3 {
        let listener = UnixListener::bind(bed.path(0)).unwrap();
        let start = Instant::now();
        let mut front = accept(&listener);
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        wait_for(&seen, |call| *call == Call::Connected);
        for step in qemu_connects().into_iter().chain(qemu_starts(true, 0)) {
            front.run(&step);
        }
        drop((front, listener));
        wait_for(&seen, |call| *call == Call::Disconnected(None));
        std::fs::remove_file(bed.path(0)).unwrap();
    }
}

#[test]
fn a_full_backlog_does_not_stop_a_connecting_port() {
    let bed = Bed::new();
    let listener = UnixListener::bind(bed.path(0)).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    // With a backlog of 0 one connection waits; the next connect gets EAGAIN.
    let filler = UnixStream::connect(bed.path(0)).unwrap();
    let (_device, seen) = bed.connect(0);
    drop(accept(&listener));
    let mut front = accept(&listener);
    wait_for(&seen, |call| *call == Call::Connected);
    assert_eq!(front.ask(1, &[]), OFFERED_FEATURES);
    drop(filler);
}

#[test]
fn a_connecting_port_that_is_removed_connects_no_more() {
    let bed = Bed::new();
    let (device, _seen) = bed.connect(0);
    bed.thread.remove(port(0));
    assert_eq!(Arc::strong_count(&device), 1);
    assert!(device.queue_pairs() == 1);
}

#[test]
fn without_spare_fds_the_listener_rests_and_recovers() {
    const CHILD: &str = "RINGWAY_TEST_WITHOUT_SPARE_FDS";
    if std::env::var_os(CHILD).is_some() {
        return rest_without_spare_fds();
    }
    // In a process of its own: the limit holds for all of it.
    let (_, module) = module_path!().split_once("::").unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .arg("--exact")
        .arg(format!(
            "{module}::without_spare_fds_the_listener_rests_and_recovers"
        ))
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

fn rest_without_spare_fds() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let bed = Bed::new();
    let _port = bed.listen(0);
    let mut waiting = Front::connect(&bed.path(0));
    assert_eq!(waiting.ask(1, &[]), OFFERED_FEATURES);
    waiting.0.shutdown(std::net::Shutdown::Write).unwrap();
    waiting.expect_end();
    let limit = getrlimit(Resource::Nofile);
    let socket = UnixStream::connect(bed.path(0)).unwrap();
    drop(socket);
    let hold: Vec<_> = (0..2).map(|_| event()).collect();
    let none = Rlimit {
        current: Some(3),
        maximum: limit.maximum,
    };
    // A second client socket made before the limit falls, connected after it.
    let late = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    setrlimit(Resource::Nofile, none).unwrap();
    let address = rustix::net::SocketAddrUnix::new(bed.path(0)).unwrap();
    rustix::net::connect(&late, &address).unwrap();
    let mut late = Front::new(late.into());
    late.0
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let cpu = || rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let before = cpu();
    late.0.write_all(&wire(1, false, &[])).unwrap();
    assert!(
        late.0.read(&mut [0; HEADER_LEN + 8]).is_err(),
        "it can't be accepted yet"
    );
    let after = cpu();
    let nanos = (after.tv_sec - before.tv_sec) * 1_000_000_000 + after.tv_nsec - before.tv_nsec;
    assert!(nanos < 200_000_000, "busy for {nanos} ns of a second");
    drop(hold);
    setrlimit(Resource::Nofile, limit).unwrap();
    late.0.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(u64::from_ne_bytes(late.reply(1)), OFFERED_FEATURES);
}
