//! Call fds that cost whoever writes to them.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use common::hostile::{BAD, RawConfig, RawGuest, plain};
use common::innocents::{self, Innocents};
use common::{Lab, frame, name};
use rustix::event::epoll;
use rustix::fs::OFlags;

/// A front-end that sends one frame after the other to nobody, whose call fds do harm; it comes back
/// as soon as it may.
struct Caller {
    path: PathBuf,
    harm: fn(&RawGuest) -> Vec<OwnedFd>,
    connected: Option<(RawGuest, Vec<OwnedFd>)>,
    steps: u32,
}

/// Steps until the port is asked how it is.
const ASK_EVERY: u32 = 1000;

impl Caller {
    fn new(lab: &Lab, harm: fn(&RawGuest) -> Vec<OwnedFd>) -> Self {
        Self {
            path: lab.add_port("caller"),
            harm,
            connected: None,
            steps: 0,
        }
    }

    fn step(&mut self, lab: &Lab) {
        self.steps += 1;
        if self.steps.is_multiple_of(ASK_EVERY) {
            let detail = lab.switch.port(&name("caller")).unwrap();
            if detail.closed_for_ms.is_some() {
                self.connected = None;
            } else if self.connected.is_none() {
                self.connect();
            }
        }
        let Some((guest, _)) = &mut self.connected else {
            return;
        };
        if guest.tx.area.used_idx() == guest.tx.next {
            guest.tx.offer(&[0]);
        }
    }

    fn connect(&mut self) {
        let guest = RawGuest::connect(&self.path, RawConfig::default());
        let addr = guest.put(0, &plain(&frame(BAD, BAD, 60, 1)));
        guest.tx.write_chain(0, &[(addr, 72)]);
        let harm = (self.harm)(&guest);
        self.connected = Some((guest, harm));
    }
}

fn block(guest: &RawGuest) -> Vec<OwnedFd> {
    let call = &guest.tx.call;
    let flags = rustix::fs::fcntl_getfl(call).unwrap();
    rustix::fs::fcntl_setfl(call, flags - OFlags::NONBLOCK).unwrap();
    let _ = call.take();
    rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    Vec::new()
}

fn have_thousands_wait(guest: &RawGuest) -> Vec<OwnedFd> {
    let wait = |_| {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(0);
        epoll::add(&epoll, &guest.tx.call, data, epoll::EventFlags::IN).unwrap();
        epoll
    };
    (0..4000).map(wait).collect()
}

fn endure(harm: fn(&RawGuest) -> Vec<OwnedFd>, what: &str) {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let mut caller = Caller::new(&lab, harm);
    innocents.endure(0.5, what, || caller.step(&lab));
    let detail = lab.switch.port(&name("caller")).unwrap();
    assert!(
        detail.closed_for_ms.is_some() || detail.connections > 1,
        "{detail:?}"
    );
}

#[test]
fn call_fds_that_block_again_and_again_cost_nobody_else() {
    endure(block, "a blocking call fd");
}

#[test]
fn call_fds_that_thousands_wait_for_cost_nobody_else() {
    endure(have_thousands_wait, "4,000 waiters on a call fd");
}
