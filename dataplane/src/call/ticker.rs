//! A signal that comes every few milliseconds while a thread makes calls, and ends the system call
//! that it finds the thread waiting in.
//!
//! The thread's own timer does it, so that it comes also if no other thread gets a core. A call that
//! blocks is so found in a tick at the latest, and many that block for a moment in one tick of
//! blocking altogether. The timer is set once and goes on by itself; two ticks after the last call
//! its handler turns it off.
#![allow(unsafe_code, reason = "signals and timers")]

use std::cell::OnceCell;
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence};

/// How long a call may block a worker. A tick costs some 10 us on a virtual machine, so this is a
/// fourth of a percent of a core that makes calls.
const TICK_NS: libc::c_long = 4_000_000;

/// What the thread and its signal handler tell each other. Relaxed throughout: both are one thread.
struct Shared {
    is_armed: AtomicBool,
    /// Calls are being made: the timer must go on.
    is_calling: AtomicBool,
    /// Calls were made since the last tick.
    was_calling: AtomicBool,
}

thread_local! {
    // Neither of them has a destructor, so that the handler may read them at any time.
    static SHARED: Shared = const {
        Shared {
            is_armed: AtomicBool::new(false),
            is_calling: AtomicBool::new(false),
            was_calling: AtomicBool::new(false),
        }
    };
    static TIMER_ID: std::cell::Cell<libc::timer_t> = const { std::cell::Cell::new(std::ptr::null_mut()) };
    static TIMER: OnceCell<Timer> = const { OnceCell::new() };
}

/// A thread's timer, deleted with it.
struct Timer(libc::timer_t);

/// While this lives, the thread is interrupted wherever it waits for longer than a tick.
pub(super) struct Ticking(());

/// Has the calling thread interrupted from now on.
///
/// # Errors
/// There can be no timer.
#[inline]
pub(super) fn start() -> io::Result<Ticking> {
    SHARED.with(|shared| {
        shared.is_calling.store(true, Ordering::Relaxed);
        // The handler must see that before it is asked whether the timer is set.
        compiler_fence(Ordering::SeqCst);
        shared.was_calling.store(true, Ordering::Relaxed);
        let ticking = Ticking(());
        if !shared.is_armed.load(Ordering::Relaxed) {
            arm(shared)?;
        }
        Ok(ticking)
    })
}

impl Drop for Ticking {
    #[inline]
    fn drop(&mut self) {
        SHARED.with(|shared| shared.is_calling.store(false, Ordering::Relaxed));
    }
}

/// Makes the calling thread's timer, so that [`start`] can't fail in it any more.
///
/// # Errors
/// There can be no timer.
pub(super) fn prepare() -> io::Result<()> {
    TIMER.with(|timer| {
        if timer.get().is_none() {
            let made = Timer::new()?;
            TIMER_ID.with(|id| id.set(made.0));
            let _ = timer.set(made);
        }
        Ok(())
    })
}

#[cold]
fn arm(shared: &Shared) -> io::Result<()> {
    prepare()?;
    // Before the timer is set: a tick of the time before must not take it for turned off.
    shared.is_armed.store(true, Ordering::Relaxed);
    TIMER_ID.with(|id| set(id.get(), TICK_NS))
}

/// Sets or, with 0, stops a timer. May be called in a signal handler.
fn set(timer: libc::timer_t, period_ns: libc::c_long) -> io::Result<()> {
    let period = libc::timespec {
        tv_sec: 0,
        tv_nsec: period_ns,
    };
    let setting = libc::itimerspec {
        it_interval: period,
        it_value: period,
    };
    // SAFETY: the timer is the calling thread's own and exists as long as the thread's `TIMER`;
    // should it be gone, the call fails.
    let result = unsafe { libc::timer_settime(timer, 0, &raw const setting, std::ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A signal that nobody else uses: the libraries' own begin at SIGRTMIN.
fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 5
}

impl Timer {
    fn new() -> io::Result<Self> {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        // SAFETY: gettid has no preconditions.
        let thread = unsafe { libc::gettid() };
        // SAFETY: an all-zero sigevent is a valid one.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal_number();
        event.sigev_notify_thread_id = thread;
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers are to values that live until the call returns.
        let made =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        if made == 0 {
            Ok(Self(timer))
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // No tick that is still to come may set the timer.
        SHARED.with(|shared| shared.is_armed.store(false, Ordering::Relaxed));
        // SAFETY: the timer exists, and nobody uses it afterwards: only its thread ever did.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// A tick: it is the interruption that counts. Touches nothing but its thread's flags, and turns
/// the timer off when it is of no more use.
extern "C" fn tick(_: libc::c_int) {
    SHARED.with(|shared| {
        let is_used = shared.is_calling.load(Ordering::Relaxed)
            || shared.was_calling.swap(false, Ordering::Relaxed);
        if !is_used && shared.is_armed.swap(false, Ordering::Relaxed) {
            // Can't fail: the timer exists.
            let _ = TIMER_ID.with(|id| set(id.get(), 0));
        }
    });
}

/// Without SA_RESTART, so that system calls end.
fn install() {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let entry: extern "C" fn(libc::c_int) = tick;
    action.sa_sigaction = entry as libc::sighandler_t;
    // SAFETY: `action` is complete, and its handler is safe in a signal: it reads and writes
    // thread-local atomics without destructors and calls timer_settime.
    let set = unsafe { libc::sigaction(signal_number(), &raw const action, std::ptr::null_mut()) };
    assert_eq!(set, 0, "handler: {}", io::Error::last_os_error());
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn a_write_that_blocks_is_interrupted_and_the_timer_goes_off_after_it() {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..3 {
            let ticking = start().unwrap();
            let written = rustix::io::write(&fd, &1_u64.to_ne_bytes());
            assert_eq!(written, Err(rustix::io::Errno::INTR));
            drop(ticking);
            // Would spin for ever if the handler never turned it off.
            while SHARED.with(|shared| shared.is_armed.load(Ordering::Relaxed)) {
                std::hint::spin_loop();
            }
        }
    }
}
