//! Whether a guest is served, and what is in the way if not: for operators. Nothing of it is on the way
//! of a frame.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringway_api::{Occurrence, PortState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tracing::warn;

use super::{VhostPort, VhostQueue};
use crate::burst_lock::lock;
use crate::wake::Binding;

/// So many kicks in a row come and the ring shows nothing, before that is told: a kick may come late.
const KICKS_IN_VAIN: u32 = 4;

/// The same for a ring that showed nothing since it started: no frame was taken before its kick came.
/// With VIRTIO_F_EVENT_IDX a driver that sees nothing of ours kicks once, for avail_event is 0 to it
/// (virtio 1.3, 2.7.10), and then not for 65,535 frames.
const FIRST_KICKS_IN_VAIN: u32 = 1;

/// What became of the kicks of a transmit ring since it started. Its worker writes, others read.
#[derive(Debug, Default)]
pub(super) struct Kicks {
    in_vain: AtomicU32,
    /// Frames that had ever been taken at the last kick,
    frames: AtomicU64,
    /// and when the ring started.
    frames_at_start: AtomicU64,
    /// The next kick is one of before: its frames were taken then, or lost with their driver's ring.
    is_echo: AtomicBool,
}

impl Kicks {
    /// The ring starts, when so many frames had ever been taken.
    pub(super) fn begin(&self, frames: u64) {
        self.in_vain.store(0, Ordering::Relaxed);
        self.frames.store(frames, Ordering::Relaxed);
        self.frames_at_start.store(frames, Ordering::Relaxed);
        self.is_echo.store(false, Ordering::Relaxed);
    }

    /// The next kick to be noted is one of before.
    fn expect_echo(&self) {
        self.is_echo.store(true, Ordering::Relaxed);
    }

    /// A kick came when so many frames had ever been taken; of a ring that is polled it says nothing.
    fn note(&self, frames: u64, is_polled: bool) {
        if self.is_echo.swap(false, Ordering::Relaxed) || is_polled {
            return;
        }
        let in_vain = if frames == self.frames.load(Ordering::Relaxed) {
            self.in_vain.load(Ordering::Relaxed).saturating_add(1)
        } else {
            0
        };
        self.frames.store(frames, Ordering::Relaxed);
        self.in_vain.store(in_vain, Ordering::Relaxed);
    }

    /// Whether kicks come, and no frame since before them.
    fn are_in_vain(&self, frames: u64) -> bool {
        let least = if frames == self.frames_at_start.load(Ordering::Relaxed) {
            FIRST_KICKS_IN_VAIN
        } else {
            KICKS_IN_VAIN
        };
        self.in_vain.load(Ordering::Relaxed) >= least
            && frames == self.frames.load(Ordering::Relaxed)
    }
}

/// A worker slept for so long in the guest's memory, and serves it again then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asleep {
    slept: Duration,
    until: Instant,
}

impl Asleep {
    fn text(self, now: Instant) -> String {
        let left = self.until.saturating_duration_since(now);
        format!(
            "a worker slept for {} ms in this guest's memory, which is swapped out or taken away by its \
             front-end: it is not served for {} s",
            self.slept.as_millis(),
            left.as_secs() + 1,
        )
    }
}

/// The front-end's socket can't be connected to.
#[derive(Clone, Debug)]
pub(super) struct Unreachable {
    error: Errno,
    /// Since when it is this error.
    since: Instant,
    reason: String,
}

/// How far a queue pair is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    None,
    Both,
    /// The guest gets frames only.
    Receives,
    /// Frames are taken from the guest only.
    Transmits,
    /// Both rings go, and the guest kicks, but nothing is in its transmit ring.
    Silent,
}

impl VhostPort {
    /// Has a pair's worker told of kicks. The fd is never read, so one that was ever written to is an
    /// event as soon as it is watched: QEMU, and virtio_user whose back-end comes back, start rings
    /// with the fds that they had before.
    ///
    /// # Errors
    /// The fd can't be polled.
    pub(super) fn watch_kick(
        &self,
        pair: u16,
        binding: &Binding,
        kick: &OwnedFd,
    ) -> std::io::Result<()> {
        let mut fds = [PollFd::new(kick, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec::default()))? > 0 {
            self.kicks[usize::from(pair)].expect_echo();
        }
        binding.watch(kick.as_fd())
    }

    /// Notes a kick for a pair's transmit ring.
    pub(crate) fn note_kick(&self, pair: u16, is_polled: bool) {
        let frames = self.transmit_queue(pair).counters.frames.get();
        self.kicks[usize::from(pair)].note(frames, is_polled);
    }

    /// Notes that a worker slept in the guest's memory and does not serve it for some time.
    #[cold]
    pub(crate) fn note_sleep(&self, slept: Duration, waits: Duration) {
        let now = Instant::now();
        let until = now + waits;
        let asleep = Asleep { slept, until };
        if let Some(suppressed) = self.fault_log.pass(now) {
            warn!(port = %self.base.name, suppressed, "{}", asleep.text(now));
        }
        *lock(&self.asleep) = Some(asleep);
    }

    /// The sleep for which the guest is not served at `now`.
    fn asleep(&self, now: Instant) -> Option<Asleep> {
        lock(&self.asleep).filter(|asleep| now < asleep.until)
    }

    /// Notes that a try to connect to the front-end's socket failed.
    pub(super) fn note_unreachable(&self, path: &Path, error: Errno, now: Instant) {
        let mut unreachable = lock(&self.unreachable);
        if unreachable.as_ref().is_some_and(|was| was.error == error) {
            return;
        }
        *unreachable = Some(Unreachable {
            error,
            since: now,
            reason: format!("can't connect to {}: {error}", path.display()),
        });
    }

    /// For how long nobody has listened at the front-end's socket, whose file is there.
    pub(crate) fn refused_for(&self, now: Instant) -> Option<Duration> {
        let unreachable = lock(&self.unreachable);
        let refused = unreachable
            .as_ref()
            .filter(|was| was.error == Errno::CONNREFUSED)?;
        Some(now.saturating_duration_since(refused.since))
    }

    fn service(&self, pair: u16) -> Service {
        let passes =
            |queue: &VhostQueue| queue.is_started() && queue.is_enabled.load(Ordering::Relaxed);
        let transmit = self.transmit_queue(pair);
        match (passes(self.queue(2 * pair)), passes(transmit)) {
            (false, false) => Service::None,
            (true, false) => Service::Receives,
            (false, true) => Service::Transmits,
            (true, true) => {
                let frames = transmit.counters.frames.get();
                match self.kicks[usize::from(pair)].are_in_vain(frames) {
                    true => Service::Silent,
                    false => Service::Both,
                }
            }
        }
    }

    pub(crate) fn state(&self) -> PortState {
        let pairs = (0..self.pairs()).map(|pair| self.service(pair));
        let state = pairs.fold(PortState::Down, |state, service| match service {
            Service::None => state,
            Service::Both if state == PortState::Down => PortState::Up,
            Service::Both => state,
            Service::Receives | Service::Transmits | Service::Silent => PortState::Impaired,
        });
        match self.asleep(Instant::now()) {
            Some(_) if state == PortState::Up => PortState::Impaired,
            _ => state,
        }
    }

    /// Tells a state that is another than was told last.
    pub(crate) fn tell_state(&self) {
        self.tell_state_if(|_| true);
    }

    /// The same, but for a guest that is served in part: its rings are started and stopped one by
    /// one.
    pub(super) fn tell_whole_state(&self) {
        self.tell_state_if(|state| state != PortState::Impaired);
    }

    fn tell_state_if(&self, is_told: impl FnOnce(PortState) -> bool) {
        let mut told = lock(&self.told);
        let state = self.state();
        if state == *told || !is_told(state) {
            return;
        }
        *told = state;
        let reason = match state {
            PortState::Up => None,
            PortState::Impaired => self.obstacle(),
            PortState::Down => self.last_error(),
        };
        self.base.tell_state(state, reason);
    }

    /// Tells why a worker stopped a ring, unless that was told.
    pub(crate) fn tell_fault(&self) {
        let mut error = lock(&self.last_error);
        if let Some(error) = error.as_mut().filter(|error| !error.is_told) {
            error.is_told = true;
            let reason = error.reason.clone();
            self.base
                .tell(|port| Occurrence::PortError { port, reason });
        }
    }

    /// What keeps the guest from being served, as far as its memory and its rings tell.
    pub(crate) fn obstacle(&self) -> Option<String> {
        let now = Instant::now();
        if let Some(asleep) = self.asleep(now) {
            return Some(asleep.text(now));
        }
        if let Some(unreachable) = &*lock(&self.unreachable) {
            return Some(unreachable.reason.clone());
        }
        (0..self.pairs()).find_map(|pair| {
            let (ring, what) = match self.service(pair) {
                Service::None | Service::Both => return None,
                Service::Receives => (2 * pair + 1, "no frame is taken from the guest by"),
                Service::Transmits => (2 * pair, "the guest gets no frame by"),
                Service::Silent => {
                    return Some(format!(
                        "the guest kicks queue pair {pair}, whose transmit ring shows nothing: is its \
                         memory shared (QEMU: share=on)?"
                    ));
                }
            };
            let how = match self.queue(ring).is_started() {
                true => "disabled",
                false => "not started",
            };
            Some(format!(
                "{what} queue pair {pair}, whose ring {ring} is {how}: its driver or front-end has to \
                 start it"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kicks_are_in_vain_if_several_in_a_row_brought_no_frame() {
        let kicks = Kicks::default();
        let kick = |times: u32, frames| (0..times).for_each(|_| kicks.note(frames, false));
        kicks.begin(7);
        assert!(!kicks.are_in_vain(7));
        kick(FIRST_KICKS_IN_VAIN, 7);
        assert!(kicks.are_in_vain(7));
        assert!(!kicks.are_in_vain(8), "one came since");
        kick(1, 9);
        kick(KICKS_IN_VAIN - 1, 9);
        assert!(!kicks.are_in_vain(9));
        kick(1, 9);
        assert!(kicks.are_in_vain(9));
        kicks.begin(9);
        assert!(!kicks.are_in_vain(9));
        for is_polled in [false, true] {
            kicks.expect_echo();
            kicks.note(9, is_polled);
            kicks.note(9, true);
            assert!(!kicks.are_in_vain(9), "they say nothing");
        }
        kick(1, 9);
        assert!(kicks.are_in_vain(9));
    }
}
