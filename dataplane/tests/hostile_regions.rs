//! Guests with as many regions of memory as they may have: others start all the same.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::{AsFd, OwnedFd};

use common::hostile::{RawConfig, RawGuest};
use common::{Lab, eventually, frame, name, receive};
use ringway_guest::{FrontendError, Guest};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::FrontendReq;

/// Half of the regions that all ports may have, which is what some may have many of.
const HALF: usize = 8_192;
/// Regions of a guest at most (GET_MAX_MEM_SLOTS).
const MOST: usize = 509;

/// Maps a page of `file` at the end of what the guest has, by ADD_MEM_REG.
fn add_region(guest: &mut RawGuest, number: usize, file: &OwnedFd) -> Result<(), FrontendError> {
    let at = (1 << 45) + (u64::try_from(number).unwrap() << 20);
    let words = [0, at, 4096, at, 0];
    let body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let fds = [file.as_fd()];
    let asked = guest
        .frontend
        .request(FrontendReq::ADD_MEM_REG, &body, &fds);
    asked.map(drop)
}

#[test]
fn guests_that_take_all_regions_they_may_have_keep_nobody_from_starting() {
    let lab = Lab::start();
    let file = memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 4096).unwrap();
    let regions = |port: &str| {
        let detail = lab.switch.port(&name(port)).unwrap();
        usize::try_from(detail.memory_regions).unwrap()
    };
    let (mut hogs, mut left) = (Vec::new(), HALF);
    while left > 0 {
        let port = format!("hog{}", hogs.len());
        let mut hog = RawGuest::connect(&lab.add_port(&port), RawConfig::default());
        // It has some for its rings.
        let more = left.min(MOST) - regions(&port);
        for number in 0..more {
            add_region(&mut hog, number, &file).unwrap();
        }
        left -= regions(&port);
        hogs.push(hog);
    }
    let path = lab.add_port("late");
    let mut late = RawGuest::connect(&path, RawConfig::default());
    let added = (0..MOST).take_while(|number| add_region(&mut late, *number, &file).is_ok());
    assert!(added.count() < 8, "there are few for each from now on");
    eventually("the reason is told", || {
        let detail = lab.switch.port(&name("late")).unwrap();
        detail
            .last_error
            .is_some_and(|error| error.contains("beside others"))
    });
    let [mut a, mut b] = ["a", "b"].map(|port| lab.guest(port, Guest::builder().regions(3)));
    let sent = frame(0xff, 1, 64, 1);
    a.send_frame(&sent).unwrap();
    while receive(&mut b).frame != sent {}
}
