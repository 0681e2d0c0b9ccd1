//! The kernel's clocks in nanoseconds, as cheaply as they can be read: a worker does it for each
//! burst. What the kernel counts of a thread.
#![allow(unsafe_code, reason = "the kernel writes the time")]

use std::time::Instant;

fn read_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a value that lives until the call returns.
    // JUSTIFICATION: rustix looks for the vDSO by itself, which crashes under valgrind
    // (`make guard`), and `Instant` takes three times as long to become nanoseconds.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    let [seconds, ns] = [time.tv_sec, time.tv_nsec].map(i64::cast_unsigned);
    seconds.wrapping_mul(1_000_000_000).wrapping_add(ns)
}

/// Time of the processor that the calling thread had.
pub(crate) fn thread_ns() -> u64 {
    read_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Page faults of the calling thread.
pub(crate) fn thread_faults() -> u64 {
    // SAFETY: all of its fields are numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a value that lives until the call returns.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_minflt.cast_unsigned() + usage.ru_majflt.cast_unsigned()
}

/// A clock that goes on, also while nobody looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// Its zero, on the clock of [`Instant`].
    zero_ns: u64,
}

impl Clock {
    /// The clock whose zero is `epoch`.
    pub(crate) fn since(epoch: Instant) -> Self {
        let passed_ns = u64::try_from(epoch.elapsed().as_nanos()).unwrap_or(0);
        let now_ns = read_ns(libc::CLOCK_MONOTONIC);
        Self {
            zero_ns: now_ns.wrapping_sub(passed_ns),
        }
    }

    #[inline]
    pub(crate) fn now_ns(self) -> u64 {
        read_ns(libc::CLOCK_MONOTONIC).wrapping_sub(self.zero_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_clock_tells_the_time_since_its_zero() {
        let epoch = Instant::now().checked_sub(Duration::from_secs(7)).unwrap();
        let clock = Clock::since(epoch);
        let before = epoch.elapsed().as_nanos();
        let now_ns = u128::from(clock.now_ns());
        // Its zero was read after, so it may be late by what that took.
        assert!(now_ns + 50_000_000 > before && now_ns <= epoch.elapsed().as_nanos() + 1);
        assert!(u128::from(clock.now_ns()) >= now_ns);
    }

    #[test]
    fn a_thread_has_page_faults_as_it_touches_pages() {
        let before = thread_faults();
        let pages = 1_000;
        let mut fresh = vec![0_u8; pages * 4096];
        for page in 0..pages {
            std::hint::black_box(&mut fresh)[page * 4096] = 1;
        }
        // Some may be large.
        assert!(thread_faults() > before);
    }

    #[test]
    fn a_thread_has_time_as_it_runs() {
        let start = thread_ns();
        while thread_ns() < start + 1_000_000 {}
    }
}
