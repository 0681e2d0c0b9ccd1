//! CPU contention: whether a worker has its core to itself.
//!
//! Polling an empty queue is free on a core of one's own, and on a shared one it takes the time
//! that a guest's vCPU needs to fill the queue. The kernel tells: a thread that was ready to run
//! and did not for much of the time shares its core.

use super::thread_times::ThreadTimes;

/// How often the kernel is asked while the worker is awake: one system call of 1 µs each time.
const INTERVAL_NS: u64 = 20_000_000;

/// A core is contended if the worker waited for it for this part of an interval: one in so many.
/// Whoever is there to stay takes about half; kernel threads, timers and short-lived processes take
/// one slice, up to 4 ms (a tick at 250 Hz), and are gone.
const PART: u64 = 3;

/// How long a core counts as contended after that; then the worker polls for an interval to find
/// out again, which is 2 % of the time.
const MEMORY_NS: u64 = 1_000_000_000;

/// Watches the calling thread.
#[derive(Debug, Default)]
pub(super) struct Contention {
    asked_ns: u64,
    waited_ns: u64,
    contended_until_ns: u64,
    thread: ThreadTimes,
}

impl Contention {
    /// Begins to watch the calling thread.
    pub(super) fn watch(&mut self) {
        self.thread.watch();
    }

    /// Whether somebody else wants this core, as far as is known at `now_ns`.
    #[inline]
    pub(super) fn is_contended(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.asked_ns) >= INTERVAL_NS {
            let waited_ns = self.thread.waited_ns().unwrap_or(0);
            self.note(now_ns, waited_ns);
        }
        now_ns < self.contended_until_ns
    }

    #[cold]
    fn note(&mut self, now_ns: u64, waited_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.asked_ns);
        let lost_ns = waited_ns.saturating_sub(self.waited_ns);
        // A worker that slept meanwhile waited for nothing most of the time.
        if elapsed_ns < 4 * INTERVAL_NS && lost_ns >= elapsed_ns / PART {
            self.contended_until_ns = now_ns + MEMORY_NS;
        }
        self.asked_ns = now_ns;
        self.waited_ns = waited_ns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START_NS: u64 = 100 * INTERVAL_NS;

    fn contention() -> Contention {
        Contention {
            asked_ns: START_NS,
            ..Contention::default()
        }
    }

    #[test]
    fn a_core_is_contended_for_a_while_after_the_thread_waited_for_it() {
        let mut contention = contention();
        contention.note(START_NS + INTERVAL_NS, INTERVAL_NS / 2);
        let until = START_NS + INTERVAL_NS + MEMORY_NS;
        assert!(until > contention.asked_ns && contention.contended_until_ns == until);
        assert!(contention.is_contended(START_NS + INTERVAL_NS + 1));
        // Nothing more was lost.
        contention.note(until, INTERVAL_NS / 2);
        assert!(!contention.is_contended(until));
    }

    #[test]
    fn a_slice_that_a_passer_by_took_is_no_contention() {
        let mut contention = contention();
        contention.note(START_NS + INTERVAL_NS, 4_500_000);
        assert!(!contention.is_contended(START_NS + INTERVAL_NS + 1));
    }

    #[test]
    fn waiting_over_a_long_time_says_nothing() {
        let mut contention = contention();
        contention.note(START_NS + 4 * INTERVAL_NS, 2 * INTERVAL_NS);
        assert!(!contention.is_contended(START_NS + 4 * INTERVAL_NS));
    }

    // Two threads that spin on one core: each waits for about half of the time.
    #[test]
    fn the_kernel_tells_of_contention() {
        let core = core_affinity::get_core_ids().unwrap()[0];
        let spin = move |contention: &mut Contention, done: &dyn Fn(&Contention) -> bool| {
            assert!(core_affinity::set_for_current(core));
            contention.watch();
            let start = std::time::Instant::now();
            while !done(contention) && start.elapsed().as_secs() < 20 {
                let now_ns = u64::try_from(start.elapsed().as_nanos()).unwrap();
                contention.is_contended(START_NS + now_ns);
            }
        };
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let over = |_: &Contention| is_over.load(std::sync::atomic::Ordering::Relaxed);
                spin(&mut contention(), &over);
            });
            let mut contention = contention();
            spin(&mut contention, &|contention| {
                contention.contended_until_ns > 0
            });
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(contention.contended_until_ns > 0, "{contention:?}");
        });
    }
}
