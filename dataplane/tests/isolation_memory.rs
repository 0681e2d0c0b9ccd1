//! Memory that has to be found first, or that its owner takes away again and again: whoever touches it
//! waits for the kernel, and the worker's other ports must not.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::{AsFd, OwnedFd};

use common::hostile::{BAD, PEER, RawConfig, RawGuest, RawRing, plain};
use common::innocents::{self, Innocents};
use common::{Lab, eventually, frame, name};
use ringway_api::PortState;
use ringway_guest::{RegionLayout, RegionView};
use ringway_testbed::beside;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};

const PAGE: u64 = 4096;

/// Where the memory lies that comes and goes.
const AT: u64 = 1 << 40;

/// A region of a guest's memory of which no page is there.
struct Sparse {
    file: OwnedFd,
    bytes: u64,
}

impl Sparse {
    fn new(guest: &mut RawGuest, bytes: u64) -> Self {
        let file = memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        let layout = RegionLayout {
            guest_addr: AT,
            size: bytes,
            file_offset: 0,
        };
        let region = RegionView {
            layout,
            user_addr: AT,
            file: file.as_fd(),
        };
        guest.frontend.add_region(region).unwrap();
        Self { file, bytes }
    }

    /// Takes all pages away.
    fn punch(&self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, 0, self.bytes).unwrap();
    }

    /// Has all pages there.
    fn fill(&self) {
        fallocate(&self.file, FallocateFlags::empty(), 0, self.bytes).unwrap();
    }

    /// Address of the `number`th page, the first behind the last.
    fn page(&self, number: u64) -> u64 {
        AT + number * PAGE % self.bytes
    }
}

fn attacker(lab: &Lab, port: &str) -> RawGuest {
    RawGuest::connect(&lab.add_port(port), RawConfig::default())
}

/// Measures the innocents while `attack` runs again and again, and these rings never run dry.
fn endure(innocents: &mut Innocents, what: &str, attack: impl FnMut() + Send, rings: &[&RawRing]) {
    beside(attack, |go_on| {
        innocents.endure(0.5, what, || {
            go_on();
            rings.iter().for_each(|ring| ring.recycle());
        });
    });
}

/// Has all entries of the transmit ring name a frame whose payload lies in a page of its own.
fn transmit(guest: &RawGuest, sparse: &Sparse, head: &[u8], pages: u16) {
    let addr = guest.put(0, head);
    for at in 0..pages {
        let len = u32::try_from(head.len()).unwrap();
        let payload = (sparse.page(u64::from(at)), 46);
        guest.tx.write_chain(2 * at, &[(addr, len), payload]);
    }
    let heads: Vec<u16> = (0..pages).map(|at| 2 * at).collect();
    guest.tx.name_heads(&heads);
}

#[test]
fn frames_in_pages_that_were_never_touched_leave_others_their_rate() {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let mut bad = attacker(&lab, "bad");
    let sparse = Sparse::new(&mut bad, 128 * PAGE);
    let peer = attacker(&lab, "peer");
    lab.pin("peer", PEER);
    peer.rx.write_chain(0, &[(peer.buffers, 2048)]);
    peer.rx.name_heads(&[0]);
    let head = plain(&frame(PEER, BAD, 60, 1))[..26].to_vec();
    transmit(&bad, &sparse, &head, 128);
    let what = "transmit buffers in untouched pages";
    endure(
        &mut innocents,
        what,
        || sparse.punch(),
        &[&bad.tx, &peer.rx],
    );
}

#[test]
fn receive_buffers_in_pages_that_were_never_touched_leave_others_their_rate() {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let mut bad = attacker(&lab, "bad");
    lab.pin("bad", BAD);
    let sparse = Sparse::new(&mut bad, 256 * PAGE);
    for at in 0..256 {
        let page = sparse.page(u64::from(at));
        bad.rx.write_chain(at, &[(page, 2048)]);
    }
    bad.rx.name_heads(&(0..256).collect::<Vec<u16>>());
    let accomplice = attacker(&lab, "accomplice");
    let message = plain(&frame(BAD, PEER, 64, 1));
    let addr = accomplice.put(0, &message);
    accomplice
        .tx
        .write_chain(0, &[(addr, u32::try_from(message.len()).unwrap())]);
    accomplice.tx.name_heads(&[0]);
    let what = "receive buffers in untouched pages";
    let rings = [&bad.rx, &accomplice.tx];
    endure(&mut innocents, what, || sparse.punch(), &rings);
}

#[test]
fn a_guest_in_whose_memory_a_worker_sleeps_says_so() {
    let lab = innocents::lab();
    let mut bad = attacker(&lab, "bad");
    let sparse = Sparse::new(&mut bad, 1 << 30);
    let head = plain(&frame(PEER, BAD, 60, 1))[..26].to_vec();
    transmit(&bad, &sparse, &head, 128);
    let detail = || lab.switch.port(&name("bad")).unwrap();
    assert_eq!(detail().port.state, PortState::Up);
    let is_told = || {
        let detail = detail();
        let error = detail.last_error.unwrap_or_default();
        detail.port.state == PortState::Impaired && error.contains("a worker slept")
    };
    let tx = &bad.tx;
    beside(
        || {
            sparse.fill();
            sparse.punch();
        },
        |go_on| {
            eventually("a worker slept", || {
                go_on();
                tx.recycle();
                is_told()
            });
        },
    );
}

#[test]
fn memory_that_is_taken_away_in_large_pieces_leaves_others_their_rate() {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let mut bad = attacker(&lab, "bad");
    let sparse = Sparse::new(&mut bad, 1 << 30);
    let head = plain(&frame(PEER, BAD, 60, 1))[..26].to_vec();
    transmit(&bad, &sparse, &head, 128);
    let come_and_go = || {
        sparse.fill();
        sparse.punch();
    };
    endure(
        &mut innocents,
        "a GiB that comes and goes",
        come_and_go,
        &[&bad.tx],
    );
}
