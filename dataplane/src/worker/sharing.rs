//! Whether a worker has its core to itself.
//!
//! Polling an empty queue is free on a core of one's own, and on a shared one it takes the time
//! that a guest's vCPU needs to fill the queue. The kernel tells: a thread that is switched out
//! although it wants to run has company.

/// How often the kernel is asked while the worker is awake: one system call of 0.2 µs each time.
const INTERVAL_NS: u64 = 10_000_000;

/// Involuntary switches within one interval that are company: a lone worker is preempted by kernel
/// threads and timers less than once in it, one that shares its core about once in 3 ms.
const COMPANY: i64 = 2;

/// How long a core counts as shared after that; then the worker polls for an interval to find out
/// again, which is 1 % of the time.
const MEMORY_NS: u64 = 1_000_000_000;

/// Watches the calling thread.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    asked_ns: u64,
    switches: i64,
    shared_until_ns: u64,
}

impl Sharing {
    /// Whether somebody else wants this core, as far as is known at `now_ns`.
    #[inline]
    pub(super) fn is_shared(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.asked_ns) >= INTERVAL_NS {
            self.ask(now_ns);
        }
        now_ns < self.shared_until_ns
    }

    #[cold]
    fn ask(&mut self, now_ns: u64) {
        let switches = involuntary_switches();
        // Switches count only if they came within about an interval.
        let elapsed_ns = now_ns.saturating_sub(self.asked_ns);
        if switches - self.switches >= COMPANY && elapsed_ns < 4 * INTERVAL_NS {
            self.shared_until_ns = now_ns + MEMORY_NS;
        }
        self.asked_ns = now_ns;
        self.switches = switches;
    }
}

/// How often the calling thread lost its core against its will.
fn involuntary_switches() -> i64 {
    // SAFETY: an all-zero rusage is a valid one.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid for a rusage.
    let result = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    if result == 0 { usage.ru_nivcsw } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_shared_for_a_while_after_the_thread_was_pushed_off_it() {
        let mut sharing = Sharing {
            asked_ns: 1,
            switches: involuntary_switches() - 2,
            shared_until_ns: 0,
        };
        assert!(!sharing.is_shared(INTERVAL_NS), "not asked yet");
        assert!(sharing.is_shared(INTERVAL_NS + 1));
        assert!(sharing.is_shared(MEMORY_NS));
        sharing.switches = i64::MAX;
        assert!(!sharing.is_shared(2 * MEMORY_NS));
    }

    #[test]
    fn switches_over_a_long_time_say_nothing() {
        let mut sharing = Sharing {
            asked_ns: 0,
            switches: -10,
            shared_until_ns: 0,
        };
        assert!(!sharing.is_shared(4 * INTERVAL_NS));
    }
}
