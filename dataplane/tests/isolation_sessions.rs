//! Front-ends that ask for something all the time: what their sessions cost is not at the others' cost.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::Lab;
use common::hostile::{RX, RawConfig, RawGuest, StopOnDrop, TX};
use common::innocents::{self, Innocents};
use ringway_guest::{Frontend, FrontendError, Guest, encode};
use vhost::vhost_user::message::FrontendReq;

/// Version 1, and no reply wanted.
const NO_REPLY: u32 = 1;

/// Runs `attack` on a thread of its own, again and again, while the innocents are measured beside it,
/// and `step` on theirs.
fn endure(
    lab: &Lab,
    least: f64,
    what: &str,
    mut attack: impl FnMut() + Send,
    mut step: impl FnMut(),
) {
    let mut innocents = Innocents::new(lab);
    let (stop, steps) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                if std::mem::replace(&mut seen, steps.load(Ordering::Relaxed)) == seen {
                    std::thread::yield_now();
                } else {
                    attack();
                }
            }
        });
        innocents.endure(least, what, || {
            steps.fetch_add(1, Ordering::Relaxed);
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
