//! Calls: writes to eventfds that a front-end shares.
//!
//! The fd is checked to be an eventfd and made non-blocking, but its file is the front-end's too:
//! it can clear O_NONBLOCK and fill the counter, and then a write blocks for as long as it likes.
//! There is no write to an eventfd that can't block, so each is watched:
//! [`interrupt_stuck_calls`] runs a few times a second, and a write that lasts from one run to the
//! next is interrupted by a signal.
//! The ring loses its place in the switch for it.
#![allow(unsafe_code, reason = "signals")]

use std::cell::OnceCell;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, Weak};

use rustix::io::Errno;

use crate::burst_lock::lock;

/// One thread that makes calls.
#[derive(Debug)]
struct Watch {
    thread: libc::pid_t,
    /// Counted up before a write and after it: odd while it lasts.
    calls: AtomicU64,
}

/// The watches of all threads that ever made a call and live, and the count at the last run.
static WATCHES: Mutex<Vec<(Weak<Watch>, u64)>> = Mutex::new(Vec::new());

thread_local! {
    static OWN: OnceCell<Arc<Watch>> = const { OnceCell::new() };
}

/// The write blocked until it was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocked;

/// Signals an eventfd.
///
/// # Errors
/// It blocked; whoever holds its other end did that on purpose.
#[inline]
pub(crate) fn signal(eventfd: impl AsFd) -> Result<(), Blocked> {
    OWN.with(|own| {
        let calls = &own.get_or_init(register).calls;
        // Relaxed: `interrupt_stuck_calls` compares counts that are a tenth of a second old.
        let before = calls.load(Ordering::Relaxed);
        calls.store(before + 1, Ordering::Relaxed);
        let written = rustix::io::write(eventfd, &1_u64.to_ne_bytes());
        calls.store(before + 2, Ordering::Relaxed);
        match written {
            Err(Errno::INTR) => Err(Blocked),
            // A full counter that does not block (EAGAIN) is a call that is pending anyway.
            _ => Ok(()),
        }
    })
}

/// Interrupts the writes that have lasted since the last time. To be called a few times a second.
pub(crate) fn interrupt_stuck_calls() {
    let mut watches = lock(&WATCHES);
    watches.retain_mut(|(watch, last)| {
        let Some(watch) = watch.upgrade() else {
            return false;
        };
        let calls = watch.calls.load(Ordering::Relaxed);
        if calls % 2 == 1 && calls == *last {
            interrupt(watch.thread);
        }
        *last = calls;
        true
    });
}

#[cold]
fn register() -> Arc<Watch> {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    // SAFETY: gettid has no preconditions.
    let thread = unsafe { libc::gettid() };
    let watch = Arc::new(Watch {
        thread,
        calls: AtomicU64::new(0),
    });
    let mut watches = lock(&WATCHES);
    watches.push((Arc::downgrade(&watch), 0));
    watch
}

/// A signal that nobody else uses: the libraries' own begin at SIGRTMIN.
fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

fn interrupt(thread: libc::pid_t) {
    // SAFETY: getpid has no preconditions.
    let process = unsafe { libc::getpid() };
    // SAFETY: tgkill takes numbers only; should the thread be gone, it fails.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal_number()) };
}

extern "C" fn ignore(_: libc::c_int) {}

/// Gives the signal a handler that does nothing: it is the system call that must end.
fn install() {
    // SAFETY: an all-zero sigaction is a valid one; without SA_RESTART, so that writes end.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let entry: extern "C" fn(libc::c_int) = ignore;
    action.sa_sigaction = entry as libc::sighandler_t;
    // SAFETY: `action` is complete and its handler does nothing.
    let set = unsafe { libc::sigaction(signal_number(), &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0, "handler: {}", std::io::Error::last_os_error());
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_write_that_blocks_is_interrupted() {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || done.send(signal(&fd)).unwrap());
        let ended = (0..1000).find_map(|_| {
            interrupt_stuck_calls();
            ended.recv_timeout(Duration::from_millis(20)).ok()
        });
        assert_eq!(ended, Some(Err(Blocked)));
    }

    #[test]
    fn a_write_that_does_not_block_succeeds_and_so_does_one_to_a_full_counter() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        assert_eq!(signal(&fd), Ok(()));
        rustix::io::write(&fd, &(u64::MAX - 2).to_ne_bytes()).unwrap();
        assert_eq!(signal(&fd), Ok(()));
    }
}
