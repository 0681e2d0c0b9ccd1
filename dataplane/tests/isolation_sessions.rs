//! Front-ends that ask for something all the time, and events that are slow to signal: what their
//! sessions cost is not at the others' cost.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::hostile::{BAD, PEER, RX, RawConfig, RawGuest, TX, plain};
use common::innocents::{self, Innocents};
use common::{Lab, frame};
use ringway_guest::{EventFd, Frontend, FrontendError, Guest, encode};
use ringway_testbed::beside;
use rustix::event::epoll;
use rustix::fs::OFlags;
use vhost::vhost_user::message::FrontendReq;

/// Version 1, and no reply wanted.
const NO_REPLY: u32 = 1;

/// Runs `attack` on a thread of its own, again and again, while the innocents are measured beside it,
/// and `step` on theirs.
fn endure(lab: &Lab, least: f64, what: &str, attack: impl FnMut() + Send, mut step: impl FnMut()) {
    let mut innocents = Innocents::new(lab);
    beside(attack, |go_on| {
        innocents.endure(least, what, || {
            go_on();
            step();
        });
    });
}

/// Connects as soon as the switch lets it.
fn connect(path: &Path) -> Result<RawGuest, FrontendError> {
    // The handshake by hand first, since helpers of tests fail where they are refused.
    let mut frontend = Frontend::connect(path)?;
    frontend.get_u64(FrontendReq::GET_FEATURES)?;
    drop(frontend);
    Ok(RawGuest::connect(path, RawConfig::default()))
}

#[test]
fn rings_that_are_kicked_anew_without_end_leave_others_their_rate() {
    let lab = innocents::lab();
    let bad = RawGuest::connect(&lab.add_port("bad"), RawConfig::default());
    let kick = Arc::clone(&bad.tx.kick);
    let message = encode(
        FrontendReq::SET_VRING_KICK as u32,
        NO_REPLY,
        &u64::from(TX).to_ne_bytes(),
    );
    let frontend = &bad.frontend;
    endure(
        &lab,
        0.9,
        "SET_VRING_KICK without end",
        || {
            // It may end the session.
            let _ = frontend.send_raw(&message, &[kick.as_fd()]);
        },
        || {},
    );
}

#[test]
fn rings_that_are_enabled_and_disabled_without_end_leave_others_their_rate() {
    let lab = innocents::lab();
    let bad = RawGuest::connect(&lab.add_port("bad"), RawConfig::default());
    let messages: Vec<u8> = (0..64_u32)
        .flat_map(|i| {
            let body = [RX.to_ne_bytes(), (i % 2).to_ne_bytes()].concat();
            encode(FrontendReq::SET_VRING_ENABLE as u32, NO_REPLY, &body)
        })
        .collect();
    endure(
        &lab,
        0.9,
        "SET_VRING_ENABLE without end",
        || {
            let _ = bad.frontend.send_raw(&messages, &[]);
        },
        || {},
    );
}

#[test]
fn announcements_without_end_leave_others_their_rate() {
    let lab = innocents::lab();
    let bad = RawGuest::connect(&lab.add_port("bad"), RawConfig::default());
    let messages: Vec<u8> = (0..64_u8)
        .flat_map(|i| {
            let body = [0x52, 0x54, 0, 0, 1, i, 0, 0];
            encode(FrontendReq::SEND_RARP as u32, NO_REPLY, &body)
        })
        .collect();
    endure(
        &lab,
        0.9,
        "SEND_RARP without end",
        || {
            let _ = bad.frontend.send_raw(&messages, &[]);
        },
        || {},
    );
}

#[test]
fn guests_that_come_and_go_without_end_leave_others_their_rate() {
    let lab = innocents::lab();
    let path = lab.add_port("bad");
    endure(
        &lab,
        0.5,
        "reconnects without end",
        || {
            let _ = Guest::builder().connect(&path);
        },
        || {},
    );
}

#[test]
fn memory_that_comes_and_goes_without_end_leaves_others_their_rate() {
    let lab = innocents::lab();
    let path = lab.add_port("bad");
    let mut bad = RawGuest::connect(&path, RawConfig::default());
    endure(
        &lab,
        0.5,
        "ADD_MEM_REG and REM_MEM_REG without end",
        || {
            let memory = Arc::clone(&bad.memory);
            let above = memory.regions().nth(1).unwrap();
            let asked = bad.frontend.remove_region(above);
            if asked.and_then(|()| bad.frontend.add_region(above)).is_err()
                && let Ok(again) = connect(&path)
            {
                bad = again;
            }
        },
        || {},
    );
}

/// Makes writes to an eventfd block.
fn block(call: &EventFd) {
    let flags = rustix::fs::fcntl_getfl(call).unwrap();
    call.take().unwrap();
    // While it takes no more than this, the write does not block.
    let _ = rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes());
    rustix::fs::fcntl_setfl(call, flags - OFlags::NONBLOCK).unwrap();
}

/// Lets whoever blocks in a write go on at last.
fn unblock(call: &EventFd) {
    let flags = rustix::fs::fcntl_getfl(call).unwrap();
    rustix::fs::fcntl_setfl(call, flags | OFlags::NONBLOCK).unwrap();
    call.take().unwrap();
}

/// A guest whose transmit ring never runs dry, and which wants a call for each burst.
fn caller(path: &Path) -> Result<RawGuest, FrontendError> {
    let guest = connect(path)?;
    let addr = guest.put(0, &plain(&frame(PEER, BAD, 60, 1)));
    guest.tx.write_chain(0, &[(addr, 72)]);
    guest.tx.name_heads(&[0]);
    guest.rx.name_heads(&[0]);
    Ok(guest)
}

#[test]
fn a_call_that_blocks_and_is_set_again_and_again_leaves_others_their_rate() {
    let lab = innocents::lab();
    let path = lab.add_port("bad");
    let mut bad = caller(&path).unwrap();
    let mut last = EventFd::new().unwrap();
    endure(
        &lab,
        0.5,
        "call fds that block",
        || {
            let call = EventFd::new().unwrap();
            if start_again(&mut bad, &call).is_err() {
                if let Ok(again) = caller(&path) {
                    bad = again;
                }
                return;
            }
            // Whoever sets a call fd is called once, by the session.
            let start = Instant::now();
            while call.take().unwrap() == 0 && start.elapsed() < Duration::from_millis(100) {}
            block(&call);
            bad.tx.recycle();
            bad.tx.kick.signal().unwrap();
            unblock(&std::mem::replace(&mut last, call));
        },
        || {},
    );
    unblock(&last);
}

/// Starts the transmit ring where it stood, with another call fd.
fn start_again(bad: &mut RawGuest, call: &EventFd) -> Result<(), FrontendError> {
    let base = bad.frontend.stop_ring(TX)?;
    let (place, kick) = (bad.tx.place(base), Arc::clone(&bad.tx.kick));
    let memory = &bad.memory;
    bad.frontend
        .start_ring(TX, memory, place, Some(&kick), Some(call))?;
    bad.frontend.enable_ring(TX, true)
}

/// Whoever signals an eventfd wakes all that wait for it.
#[test]
fn a_call_with_thousands_of_waiters_leaves_others_their_rate() {
    const WAITERS: usize = 4000;
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let lab = innocents::lab();
    let path = lab.add_port("bad");
    let mut bad = caller(&path).unwrap();
    let call = EventFd::new().unwrap();
    let waiters: Vec<OwnedFd> = (0..WAITERS)
        .map(|_| {
            let waiter = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&waiter, &call, epoll::EventData::new_u64(0), flags).unwrap();
            waiter
        })
        .collect();
    bad.frontend
        .set_vring_fd(FrontendReq::SET_VRING_CALL, TX, Some(&call))
        .unwrap();
    let tx = &bad.tx;
    endure(
        &lab,
        0.9,
        "a call with 4,000 waiters",
        || {
            std::thread::park_timeout(Duration::from_millis(1));
        },
        || tx.recycle(),
    );
    drop(waiters);
}
