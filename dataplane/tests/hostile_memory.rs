//! Front-ends whose memory lies, goes away or shrinks, and whose fds are of the wrong kind: classes
//! of CVE-2018-1059, CVE-2020-10722, CVE-2026-86563, CVE-2026-86567, CVE-2026-86561 and
//! CVE-2019-14818.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::hostile::{BAD, MAIN, MAIN_END, PEER, RX, RawConfig, Stage, TX, plain};
use common::observe::Footprint;
use common::{DEADLINE, eventually, frame, name, receive};
use ringway_api::PortState;
use ringway_guest::{EventFd, Guest, GuestBuilder, RegionView};
use ringway_testbed::StopOnDrop;
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::FrontendReq;

/// Station of a further guest that keeps the rules but comes and goes.
const CHURN: u8 = 7;

/// Guest address, size, user address, offset in the file.
type RegionWords = [u64; 4];

fn memfd(bytes: u64) -> OwnedFd {
    let fd = memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, bytes).unwrap();
    fd
}

fn table_body(regions: &[RegionWords]) -> Vec<u8> {
    let mut body = u32::try_from(regions.len()).unwrap().to_ne_bytes().to_vec();
    body.extend([0; 4]);
    body.extend(regions.iter().flatten().flat_map(|word| word.to_ne_bytes()));
    body
}

/// What a table of two regions in files of 64 KiB may say wrong, and what is said about it.
fn bad_tables() -> Vec<(&'static str, RegionWords)> {
    const KIB: u64 = 1024;
    let user = 1 << 40;
    // The first region is 32 KiB at guest address 0 and user address `user`.
    vec![
        ("overlaps", [32 * KIB - 1, 32 * KIB, user + (1 << 30), 0]),
        ("overlaps", [0, 32 * KIB, user + (1 << 30), 0]),
        ("overlaps", [1 << 30, 32 * KIB, user + 32 * KIB - 1, 0]),
        ("overlaps", [1 << 30, 64 * KIB, user - 64 * KIB + 1, 0]),
        ("overlaps", [0, 32 * KIB, user, 0]),
        ("empty", [1 << 30, 0, user + (1 << 30), 0]),
        ("wrap", [u64::MAX - 4095, 8 * KIB, user + (1 << 30), 0]),
        ("wrap", [u64::MAX, 1, user + (1 << 30), 0]),
        ("wrap", [1 << 30, 8 * KIB, u64::MAX - 4095, 0]),
        (
            "wrap",
            [1 << 30, 8 * KIB, user + (1 << 30), u64::MAX - 4095],
        ),
        ("wrap", [1 << 30, u64::MAX, user + (1 << 30), 4096]),
        (
            "behind its file",
            [1 << 30, 64 * KIB + 1, user + (1 << 30), 0],
        ),
        (
            "behind its file",
            [1 << 30, 4 * KIB, user + (1 << 30), 61 * KIB],
        ),
        ("behind its file", [1 << 30, 1, user + (1 << 30), 64 * KIB]),
        (
            "behind its file",
            [1 << 30, 4 * KIB, user + (1 << 30), 1 << 62],
        ),
        ("may map", [1 << 30, 1 << 62, user + (1 << 30), 0]),
    ]
}

const GOOD_REGION: RegionWords = [0, 32 << 10, 1 << 40, 0];

/// Sends a request that must end the session for a reason that holds `why`, and comes back.
fn expect_end(
    stage: &mut Stage,
    request: FrontendReq,
    body: &[u8],
    fds: &[BorrowedFd<'_>],
    why: &str,
) {
    let answer = stage.bad.frontend.request(request, body, fds);
    assert!(answer.is_err(), "{why}: {body:x?}");
    eventually("the session ends", || {
        stage.detail().port.state == PortState::Down
    });
    let error = || stage.detail().last_error.unwrap_or_default();
    eventually("the reason is told", || error().contains(why));
    stage.reconnect();
}

/// CVE-2020-10722, CVE-2026-86563: tables that overlap, wrap or end behind their files.
#[test]
fn cve_2020_10722_memory_that_contradicts_itself_ends_the_session_only() {
    let mut stage = Stage::new();
    let file = memfd(64 << 10);
    let mut footprint = None;
    for _ in 0..3 {
        for (why, bad) in bad_tables() {
            for regions in [[GOOD_REGION, bad], [bad, GOOD_REGION]] {
                let fds = [file.as_fd(); 2];
                let table = table_body(&regions);
                expect_end(&mut stage, FrontendReq::SET_MEM_TABLE, &table, &fds, why);
            }
            // The same through ADD_MEM_REG, in a session whose memory is as above.
            let frontend = &mut stage.bad.frontend;
            let table = table_body(&[GOOD_REGION]);
            frontend
                .request(FrontendReq::SET_MEM_TABLE, &table, &[file.as_fd()])
                .unwrap();
            let body = region_body(bad);
            expect_end(
                &mut stage,
                FrontendReq::ADD_MEM_REG,
                &body,
                &[file.as_fd()],
                why,
            );
        }
        stage.assert_works();
        footprint.get_or_insert_with(Footprint::now);
    }
    footprint.unwrap().assert_flat();
    stage.finish();
}

fn region_body(region: RegionWords) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(region.iter().flat_map(|word| word.to_ne_bytes()));
    body
}

/// Files that are no memory, or not to be written.
#[test]
fn memory_files_of_the_wrong_kind_end_the_session_only() {
    let mut stage = Stage::new();
    let real = memfd(64 << 10);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&real));
    let open = |path: &str| rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let foreign = "neither an eventfd nor shared memory";
    let files = [
        ("can't map", open(&path)),
        ("its file is no shared memory", event),
        (foreign, open("/")),
        (foreign, open("/dev/zero")),
        (foreign, open("/proc/self/mem")),
        (foreign, pipe),
        ("behind its file", memfd(0)),
        ("behind its file", memfd((32 << 10) - 1)),
    ];
    let footprint = Footprint::now();
    for (why, file) in &files {
        let body = table_body(&[GOOD_REGION]);
        expect_end(
            &mut stage,
            FrontendReq::SET_MEM_TABLE,
            &body,
            &[file.as_fd()],
            why,
        );
        stage.assert_works();
    }
    footprint.assert_flat();
    stage.finish();
}

/// More regions than slots, and regions that are taken back but were never given.
#[test]
fn too_many_regions_and_unknown_ones_end_the_session_only() {
    let mut stage = Stage::new();
    let file = memfd(4096);
    let region = |i: u64| [i << 20, 4096, (1 << 40) + (i << 20), 0];
    expect_end(
        &mut stage,
        FrontendReq::REM_MEM_REG,
        &region_body(region(1)),
        &[],
        "to remove",
    );
    // Three regions are there already.
    for i in 0..506 {
        let body = region_body(region(i));
        let frontend = &mut stage.bad.frontend;
        frontend
            .request(FrontendReq::ADD_MEM_REG, &body, &[file.as_fd()])
            .unwrap();
    }
    assert_eq!(stage.detail().memory_regions, 509);
    stage.assert_works();
    let body = region_body(region(600));
    expect_end(
        &mut stage,
        FrontendReq::ADD_MEM_REG,
        &body,
        &[file.as_fd()],
        "more than 509",
    );
    stage.assert_works();
    stage.finish();
}

/// Files with holes need no memory to be mapped, but address space, of which there are 128 TiB.
#[test]
fn a_guest_can_not_take_the_address_space_of_all() {
    let mut stage = Stage::new();
    // 1 TiB, or twice the host's RAM.
    let limit = (2 * ram_bytes()).max(1 << 40);
    let size = limit / 8;
    let file = memfd(size);
    let region = |i: u64| [(1 << 45) + i * size, size, (1 << 45) + i * size, 0];
    // The guest has 2 MiB of its own.
    for i in 0..7 {
        let frontend = &mut stage.bad.frontend;
        frontend
            .request(
                FrontendReq::ADD_MEM_REG,
                &region_body(region(i)),
                &[file.as_fd()],
            )
            .unwrap();
    }
    stage.assert_works();
    let (body, fds) = (region_body(region(7)), [file.as_fd()]);
    expect_end(&mut stage, FrontendReq::ADD_MEM_REG, &body, &fds, "may map");
    let table: Vec<_> = (0..8).map(region).chain([GOOD_REGION]).collect();
    let (body, fds) = (table_body(&table[1..]), [file.as_fd(); 8]);
    let frontend = &mut stage.bad.frontend;
    frontend
        .request(FrontendReq::SET_MEM_TABLE, &body, &fds)
        .unwrap();
    let mut more = table[..8].to_vec();
    more[7][1] += 4096;
    let body = table_body(&more);
    ftruncate(&file, size + 4096).unwrap();
    expect_end(
        &mut stage,
        FrontendReq::SET_MEM_TABLE,
        &body,
        &fds,
        "may map",
    );
    stage.assert_works();
    stage.finish();
}

/// Bytes of the host's memory.
fn ram_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib = text.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// Memory is no kick or call fd: it is refused, the session goes on and nothing piles up
/// (CVE-2019-14818). Files of other kinds end the session (`foreign_files.rs`).
#[test]
fn kick_and_call_fds_that_are_no_eventfds_are_refused() {
    let mut stage = Stage::new();
    let memory = memfd(4096);
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    let wrong = [memory.as_fd(), file.as_fd()];
    let mut footprint = None;
    for _ in 0..20 {
        for ring in [TX, RX] {
            let index = u64::from(ring).to_ne_bytes();
            let good_call = EventFd::new().unwrap();
            for fd in wrong {
                let frontend = &mut stage.bad.frontend;
                let call = frontend.request(FrontendReq::SET_VRING_CALL, &index, &[fd]);
                assert!(call.is_err(), "a call fd of another kind is refused");
                assert!(stage.is_started(ring), "the ring goes on with its old one");
                let frontend = &mut stage.bad.frontend;
                frontend
                    .set_vring_fd(FrontendReq::SET_VRING_CALL, ring, Some(&good_call))
                    .unwrap();
                let kick = frontend.request(FrontendReq::SET_VRING_KICK, &index, &[fd]);
                assert!(kick.is_err(), "a kick fd of another kind is refused");
                assert!(!stage.is_started(ring));
                stage.recover(ring);
            }
        }
        footprint.get_or_insert_with(Footprint::now);
    }
    footprint.unwrap().assert_flat();
    assert_eq!(stage.detail().connections, 1);
    stage.finish();
}

/// Has a call fd block whoever writes to it, as its front-end can: it shares the file.
fn make_block(call: &EventFd) {
    let flags = rustix::fs::fcntl_getfl(call).unwrap();
    rustix::fs::fcntl_setfl(call, flags - OFlags::NONBLOCK).unwrap();
    let _ = call.take();
    rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
}

/// The front-end shares the call fd's file, so it can clear O_NONBLOCK after it was set and fill
/// the counter: the next call blocks the worker for a tick, and the port is closed, for longer each
/// time that its front-end comes back and does it again.
#[test]
fn a_call_fd_that_is_made_to_block_and_filled_holds_up_nobody() {
    let mut stage = Stage::new();
    for time in 0..4 {
        if time > 0 {
            stage.reconnect();
        }
        make_block(&stage.bad.tx.call);
        let addr = stage.bad.put(0, &plain(&frame(PEER, BAD, 60, 1)));
        stage.bad.tx.write_chain(0, &[(addr, 72)]);
        stage.bad.tx.offer(&[0]);
        assert_eq!(receive(&mut stage.peer).frame.len(), 60);
        let closed = format!("port closed for {}ms: a call to it blocks", 100 << time);
        eventually("the port is closed", || {
            let detail = stage.detail();
            detail.port.state == PortState::Down && detail.last_error == Some(closed.clone())
        });
        assert!(stage.detail().closed_for_ms.unwrap() <= 100 << time);
    }
    stage.let_innocents_run(1000);
    eventually("the port opens", || stage.detail().closed_for_ms.is_none());
    stage.reconnect();
    stage.assert_works();
    stage.finish();
}

/// A guest that keeps the rules, on a port of its own.
fn churn_guest(stage: &Stage, config: GuestBuilder) -> Guest {
    let guest = stage.lab.guest("churn", config);
    stage.lab.pin("churn", CHURN);
    guest
}

fn burst(to: u8, from: u8, round: u64, count: u64) -> Vec<Vec<u8>> {
    (0..count)
        .map(|i| {
            plain(&frame(
                to,
                from,
                60 + 20 * usize::try_from(i).unwrap(),
                round * count + i,
            ))
        })
        .collect()
}

/// CVE-2026-86567: SET_MEM_TABLE while frames move both ways. Each table is another mapping of the
/// same memory, the one before goes at once, and no frame is lost.
#[test]
fn cve_2026_86567_memory_is_replaced_under_traffic_without_losing_a_frame() {
    const ROUNDS: u64 = 5000;
    let mut stage = Stage::new();
    let mut guest = churn_guest(&stage, Guest::builder());
    let memory = std::sync::Arc::clone(guest.memory());
    let mut footprint = None;
    for round in 0..ROUNDS {
        let (there, back) = (burst(PEER, CHURN, round, 8), burst(CHURN, PEER, round, 8));
        guest.send_burst(0, &there).unwrap();
        stage.peer.send_burst(0, &back).unwrap();
        guest.frontend().set_mem_table(&memory).unwrap();
        for (sent, back) in there.iter().zip(&back) {
            assert_eq!(receive(&mut stage.peer).frame, sent[12..], "round {round}");
            assert_eq!(receive(&mut guest).frame, back[12..], "round {round}");
        }
        if round == ROUNDS / 10 {
            footprint = Some(Footprint::now());
        }
    }
    footprint.unwrap().assert_flat();
    stage
        .lab
        .assert_conserved(&["left", "right", "peer", "churn"], 0);
    stage.finish_flooded();
}

/// CVE-2026-86567: REM_MEM_REG takes the rings away in the middle of traffic, ADD_MEM_REG brings
/// them back, and they go on where they stood.
#[test]
fn cve_2026_86567_rings_whose_memory_goes_and_comes_lose_no_frame_of_their_guest() {
    const ROUNDS: u64 = 3000;
    let mut stage = Stage::new();
    let mut guest = churn_guest(&stage, Guest::builder());
    let memory = std::sync::Arc::clone(guest.memory());
    let region: RegionView<'_> = memory.regions().next().unwrap();
    let mut footprint = None;
    for round in 0..ROUNDS {
        let (there, back) = (burst(PEER, CHURN, round, 8), burst(CHURN, PEER, round, 4));
        guest.send_burst(0, &there).unwrap();
        guest.frontend().remove_region(region).unwrap();
        guest.frontend().add_region(region).unwrap();
        stage.peer.send_burst(0, &back).unwrap();
        for sent in &there {
            assert_eq!(receive(&mut stage.peer).frame, sent[12..], "round {round}");
        }
        for sent in &back {
            assert_eq!(receive(&mut guest).frame, sent[12..], "round {round}");
        }
        if round == ROUNDS / 10 {
            footprint = Some(Footprint::now());
        }
    }
    footprint.unwrap().assert_flat();
    stage.finish_flooded();
}

/// CVE-2026-86567: REM_MEM_REG of the buffers alone, while the rings that name them run. Either the
/// frames are out before, or the ring stops at a buffer that is no memory any more.
#[test]
fn cve_2026_86567_buffers_whose_memory_goes_stop_their_ring_only() {
    const ROUNDS: u64 = 500;
    let mut stage = Stage::new();
    let memory = std::sync::Arc::clone(&stage.bad.memory);
    let above = memory.regions().nth(1).unwrap();
    let sent = frame(PEER, BAD, 60, 1);
    let at = MAIN_END + common::hostile::GAP;
    memory.write(at, &plain(&sent)).unwrap();
    let size = stage.bad.tx.area.size();
    let heads: Vec<u16> = (0..size).collect();
    let (mut stops, mut received) = (0, 0_u64);
    let mut footprint = None;
    for round in 0..ROUNDS {
        for head in &heads {
            stage.bad.tx.write_chain(*head, &[(at, 72)]);
        }
        stage.bad.tx.offer(&heads);
        stage.bad.frontend.remove_region(above).unwrap();
        eventually("the ring stops or is done", || {
            !stage.is_started(TX) || stage.bad.tx.area.used_idx() == stage.bad.tx.next
        });
        stops += u64::from(!stage.is_started(TX));
        stage.bad.frontend.add_region(above).unwrap();
        stage.bad.restart_ring(TX);
        while let Some(next) = stage.peer.try_recv(0).unwrap() {
            assert_eq!(next.frame, sent);
            received += 1;
        }
        if round == ROUNDS / 10 {
            footprint = Some(Footprint::now());
        }
    }
    footprint.unwrap().assert_flat();
    assert!(
        received > 0,
        "no frame at all in {ROUNDS} rounds, {stops} stops"
    );
    memory.write(at, &[0xc5; 72]).unwrap();
    stage.assert_works();
    stage.finish();
}

/// CVE-2026-86567: guests that connect, send, and vanish at once, under traffic towards them.
#[test]
fn cve_2026_86567_guests_connect_and_vanish_under_traffic_and_leave_nothing() {
    const ROUNDS: u64 = 2000;
    let mut stage = Stage::new();
    let path = stage.lab.add_port("churn");
    stage.lab.pin("churn", CHURN);
    let config = Guest::builder().queue_size(16);
    let mut footprint = None;
    let there = burst(PEER, CHURN, 0, 8);
    let back = burst(CHURN, PEER, 0, 8);
    let mut received = 0_u64;
    for round in 0..ROUNDS {
        let mut guest = config.clone().connect(&path).unwrap();
        guest.send_burst(0, &there).unwrap();
        stage.peer.send_burst(0, &back).unwrap();
        if round % 4 == 0 {
            assert!(guest.flush(DEADLINE).unwrap());
        }
        drop(guest);
        while stage.peer.try_recv(0).unwrap().is_some() {
            received += 1;
        }
        if round == ROUNDS / 10 {
            footprint = Some(Footprint::now());
        }
    }
    assert!(stage.peer.flush(DEADLINE).unwrap());
    assert!(received >= ROUNDS / 4 * 8 - 8, "{received}");
    eventually("the port is empty", || {
        let port = stage.lab.switch.port(&name("churn")).unwrap();
        port.mapped_bytes == 0 && port.port.state == PortState::Down
    });
    footprint.unwrap().assert_flat();
    let mut guest = config.connect(&path).unwrap();
    while stage.peer.try_recv(0).unwrap().is_some() {}
    guest.send_burst(0, &there).unwrap();
    assert_eq!(receive(&mut stage.peer).frame, there[0][12..]);
    stage
        .lab
        .assert_conserved(&["left", "right", "peer", "churn"], 0);
    stage.finish_flooded();
}

/// A stage whose sources do not wait for a guest without buffers.
fn impatient() -> Stage {
    Stage::with(RawConfig::default(), Guest::builder(), |switch| {
        switch.idle.backpressure = Duration::from_millis(1);
    })
}

/// What is left of the main region's file: nothing, or the rings without the buffers.
const CUTS: [u64; 2] = [0, 4096 + (64 << 10)];

/// CVE-2026-86561: the file behind the guest's memory is cut off while frames move both ways. That
/// port fails and says why, and works again with fresh memory.
#[test]
fn cve_2026_86561_memory_that_is_cut_off_under_traffic_fails_its_port_only() {
    const ROUNDS: usize = 30;
    let mut stage = impatient();
    let mut footprint = None;
    for round in 0..ROUNDS {
        let message = plain(&frame(PEER, BAD, 1500, 1));
        let len = u32::try_from(message.len()).unwrap();
        let size = stage.bad.tx.area.size();
        let heads: Vec<u16> = (0..size).collect();
        for head in &heads {
            let at = u64::from(*head) * 2048;
            let addr = stage.bad.put(at, &message);
            stage.bad.tx.write_chain(*head, &[(addr, len)]);
            stage
                .bad
                .rx
                .write_chain(*head, &[(addr + (512 << 10), 2048)]);
        }
        stage.bad.rx.offer(&heads);
        stage.bad.tx.offer(&heads);
        cut_off(&stage, CUTS[round % CUTS.len()]);
        // From here on this process must not touch the guest's memory either.
        eventually("the port fails", || {
            stage.peer.send_frame(&frame(BAD, PEER, 500, 1)).unwrap();
            while stage.peer.try_recv(0).unwrap().is_some() {}
            stage.detail().port.state == PortState::Down
        });
        let error = stage.detail().last_error.unwrap();
        assert!(error.contains("its memory file was cut off"), "{error}");
        // The rings can't be started in what is left.
        let base = stage.bad.frontend.stop_ring(TX).unwrap();
        assert!(stage.bad.start_ring(TX, base).is_err());
        assert_eq!(stage.detail().port.state, PortState::Down);
        stage.reconnect();
        assert!(stage.peer.flush(DEADLINE).unwrap());
        while stage.peer.try_recv(0).unwrap().is_some() {}
        stage.assert_works();
        if round == ROUNDS / 5 {
            footprint = Some(Footprint::now());
        }
    }
    footprint.unwrap().assert_flat();
    stage.finish_flooded();
}

/// The file of the main region, for another thread.
fn file_of_main(stage: &Stage) -> OwnedFd {
    let region = stage.bad.memory.regions().next().unwrap();
    region.file.try_clone_to_owned().unwrap()
}

fn cut_off(stage: &Stage, bytes: u64) {
    let region = stage.bad.memory.regions().next().unwrap();
    assert_eq!(region.layout.guest_addr, MAIN);
    ftruncate(region.file, bytes).unwrap();
}

/// CVE-2026-86561: a file that shrinks and grows back, over and over, under traffic. What is lost
/// is lost, but nothing else is touched.
#[test]
fn cve_2026_86561_memory_that_shrinks_and_grows_under_traffic_fails_its_port_only() {
    let mut stage = impatient();
    for _ in 0..20 {
        let message = plain(&frame(PEER, BAD, 60, 1));
        let addr = stage.bad.put(0, &message);
        stage.bad.tx.write_chain(0, &[(addr, 72)]);
        let whole = File::from(file_of_main(&stage));
        let bytes = whole.metadata().unwrap().len();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let guard = StopOnDrop(&stop);
            let until = &stop;
            scope.spawn(move || {
                while !until.load(Ordering::Relaxed) {
                    ftruncate(&whole, 0).unwrap();
                    ftruncate(&whole, bytes).unwrap();
                }
            });
            eventually("the rings stop", || {
                stage.peer.send_frame(&frame(BAD, PEER, 60, 1)).unwrap();
                stage.bad.tx.kick.signal().unwrap();
                let port = stage.lab.switch.port(&name(&stage.port)).unwrap();
                port.last_error.is_some()
            });
            drop(guard);
        });
        stage.reconnect();
        assert!(stage.peer.flush(DEADLINE).unwrap());
        while stage.peer.try_recv(0).unwrap().is_some() {}
        stage.assert_works();
    }
    stage.finish_flooded();
}

/// Rings that come to rest in a region that is gone leave both innocents and peers alone; the ring
/// that is restarted too early is refused and may be started again (RX as well).
#[test]
fn a_ring_without_memory_waits_and_starts_when_it_comes() {
    let mut stage = Stage::new();
    let memory = std::sync::Arc::clone(&stage.bad.memory);
    let main = memory.regions().next().unwrap();
    for _ in 0..50 {
        stage.bad.frontend.remove_region(main).unwrap();
        for ring in [RX, TX] {
            assert!(!stage.is_started(ring));
        }
        stage.poke();
        assert!(stage.peer.flush(DEADLINE).unwrap());
        stage.bad.frontend.add_region(main).unwrap();
        stage.assert_works();
    }
    stage.finish();
}
