//! Sources that want more than a destination takes, turn by turn on an inline switch.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::frame;
use ringway_dataplane::InlineSwitch;
use ringway_guest::Guest;
use tempfile::TempDir;

/// Frames that a worker takes from a queue in a turn.
const BURST: u16 = 32;

/// A switch with guests that have queues of these sizes and whose stations, from 1, it knows.
fn guests(folder: &TempDir, sizes: &[u16]) -> (InlineSwitch, Vec<Guest>) {
    let mut switch = InlineSwitch::new(1024).unwrap();
    let mut guests: Vec<_> = (1..)
        .zip(sizes)
        .map(|(station, size): (u8, _)| {
            let name = format!("p{station}");
            let path = folder.path().join(&name);
            switch.add_port(name.parse().unwrap(), &path).unwrap();
            let config = Guest::builder().queue_size(*size);
            let mut guest = config.connect(&path).unwrap();
            // The answer to a request says that those before it are carried out.
            guest.frontend().queue_pairs().unwrap();
            guest
        })
        .collect();
    for station in 1..=guests.len() {
        let own = u8::try_from(station).unwrap();
        let hello = frame(0xff, own, 64, 0);
        guests[station - 1].send_frame(&hello).unwrap();
        switch.turn();
        for (at, guest) in guests.iter_mut().enumerate() {
            let heard = guest.try_recv(0).unwrap();
            assert_eq!(heard.is_some(), at != station - 1, "hello of {station}");
        }
    }
    (switch, guests)
}

/// `count` frames from one station to another, with headers; `next` numbers them.
fn burst(to: u8, from: u8, count: u16, next: u64) -> Vec<Vec<u8>> {
    let numbers = (next..).take(count.into());
    let frames = numbers.map(|number| [vec![0; 12], frame(to, from, 64, number)].concat());
    frames.collect()
}

/// Sources keep their rings full; returns what each has delivered in how many turns, and checks
/// that nothing is lost or overtaken.
fn share(sources: u8, room: u16, drained: usize, turns: u64) -> Vec<u64> {
    let folder = TempDir::new().unwrap();
    let destination = sources + 1;
    let mut sizes = vec![128; sources.into()];
    // The destination, and a pair of stations that have nothing to do with it.
    sizes.extend([room, 128, 128]);
    let (mut switch, mut guests) = guests(&folder, &sizes);
    let mut sent = vec![0_u64; sources.into()];
    let mut arrived = sent.clone();
    let (third, fourth) = (destination + 1, destination + 2);
    for turn in 0..turns {
        for source in 0..sources {
            let at = usize::from(source);
            let frames = burst(destination, source + 1, 64, sent[at]);
            sent[at] += guests[at].send_burst(0, &frames).unwrap() as u64;
        }
        let others = burst(fourth, third, BURST, turn * u64::from(BURST));
        let at = usize::from(third) - 1;
        assert_eq!(guests[at].send_burst(0, &others).unwrap(), others.len());
        // Shares are of time: whoever is ahead, be it that the kernel took the core away meanwhile, is
        // passed over as long as others have frames.
        for _ in 0..4 {
            switch.turn();
        }
        for _ in 0..drained {
            let received = guests[usize::from(destination) - 1].try_recv(0).unwrap();
            let Some(received) = received else { break };
            let from = usize::from(received.frame[11]) - 1;
            let number = u64::from_be_bytes(received.frame[14..22].try_into().unwrap());
            assert_eq!(number, arrived[from], "of station {}", from + 1);
            arrived[from] += 1;
        }
        for other in &others {
            let received = guests[usize::from(fourth) - 1].try_recv(0).unwrap();
            let received = received.expect("the third pair is not disturbed");
            assert_eq!(received.frame, other[12..]);
        }
    }
    arrived
}

#[test]
fn sources_share_a_full_destination_within_a_tenth_and_others_are_not_disturbed() {
    for (sources, room, drained) in [
        (2, 32, 32),
        (2, 64, 20),
        (2, 64, 40),
        (3, 32, 32),
        (5, 64, 7),
    ] {
        let turns = 600;
        let arrived = share(sources, room, drained, turns);
        let total: u64 = arrived.iter().sum();
        let what = format!("{arrived:?} of {sources} sources, {drained} a turn");
        // What is taken out is what gets in.
        assert!(total + 64 >= turns * drained as u64, "{what}");
        let even = total as f64 / f64::from(sources);
        let is_fair = |count: &u64| (*count as f64 / even - 1.0).abs() < 0.1;
        assert!(arrived.iter().all(is_fair), "{what}");
    }
}

/// A port that goes down and comes back may have another guest: it gets nothing of before.
#[test]
fn what_waits_for_a_port_is_gone_once_the_port_was_down() {
    const ROOM: u16 = 8;
    let folder = TempDir::new().unwrap();
    let (mut switch, mut guests) = guests(&folder, &[128, ROOM, 128]);
    let frames: Vec<_> = (0..32)
        .flat_map(|number| [burst(2, 1, 1, number), burst(3, 1, 1, number)].concat())
        .collect();
    assert_eq!(guests[0].send_burst(0, &frames).unwrap(), frames.len());
    switch.turn();
    let mut taken = 0;
    while guests[1].try_recv(0).unwrap().is_some() {
        taken += 1;
    }
    assert!((1..=ROOM).contains(&taken), "{taken}");
    guests[1].stop().unwrap();
    guests[1].resume().unwrap();
    // The answer to a request says that those before it are carried out.
    guests[1].frontend().queue_pairs().unwrap();
    // What waits is tried again after some microseconds.
    let start = std::time::Instant::now();
    while start.elapsed().as_millis() < 5 {
        switch.turn();
    }
    assert_eq!(guests[1].try_recv(0).unwrap(), None);
    // What is sent now arrives.
    let next = burst(2, 1, 1, 99);
    guests[0].send_burst(0, &next).unwrap();
    switch.turn();
    let received = guests[1].try_recv(0).unwrap().unwrap();
    assert_eq!(received.frame, next[0][12..]);
}

/// Bytes are what a burst of long frames costs: they are taken a few at a time.
#[test]
fn a_burst_of_long_frames_is_a_short_one() {
    const BYTES: usize = 30_000;
    const MOST_BYTES: u64 = 256 << 10;
    let folder = TempDir::new().unwrap();
    let mut switch = InlineSwitch::new(16).unwrap();
    let path = folder.path().join("a");
    switch.add_port("a".parse().unwrap(), &path).unwrap();
    let mut guest = Guest::builder().buffer_size(32_768).connect(&path).unwrap();
    guest.frontend().queue_pairs().unwrap();
    // To nobody: all that counts is how many are taken.
    let frames: Vec<_> = (0..128)
        .map(|number| [vec![0; 12], frame(2, 1, BYTES, number)].concat())
        .collect();
    assert_eq!(guest.send_burst(0, &frames).unwrap(), frames.len());
    let mut taken = Vec::new();
    while switch.frames() < frames.len() as u64 {
        let before = switch.frames();
        switch.turn();
        taken.push(switch.frames() - before);
    }
    let [first, rest @ ..] = taken.as_slice() else {
        panic!("nothing was taken")
    };
    // How long frames are is not known before the first ones.
    assert_eq!(*first, 64);
    let fitting = MOST_BYTES / BYTES as u64;
    assert!(rest.iter().all(|count| *count <= fitting), "{taken:?}");
}
