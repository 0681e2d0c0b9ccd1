//! Whether a worker has its core to itself.
//!
//! Polling an empty queue is free on a core of one's own, and on a shared one it takes the time
//! that a guest's vCPU needs to fill the queue. The kernel tells: a thread that was ready to run and
//! did not for much of the time has company.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// How often the kernel is asked while the worker is awake: one system call of 1 µs each time.
const INTERVAL_NS: u64 = 20_000_000;

/// The part of an interval that a worker waited for its core if it has company. Whoever is there to
/// stay takes about half; kernel threads, timers and short-lived processes take one slice, up to
/// 4 ms (a tick at 250 Hz), and are gone.
const COMPANY: u64 = 3;

/// How long a core counts as shared after that; then the worker polls for an interval to find out
/// again, which is 2 % of the time.
const MEMORY_NS: u64 = 1_000_000_000;

/// Watches the calling thread.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    asked_ns: u64,
    waited_ns: u64,
    shared_until_ns: u64,
    /// The thread's times.
    stat: Option<File>,
}

impl Sharing {
    /// Begins to watch the calling thread.
    pub(super) fn watch(&mut self) {
        self.stat = File::open("/proc/thread-self/schedstat").ok();
    }

    /// Whether somebody else wants this core, as far as is known at `now_ns`.
    #[inline]
    pub(super) fn is_shared(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.asked_ns) >= INTERVAL_NS {
            let waited_ns = self.read_waited_ns();
            self.note(now_ns, waited_ns);
        }
        now_ns < self.shared_until_ns
    }

    #[cold]
    fn note(&mut self, now_ns: u64, waited_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.asked_ns);
        let lost_ns = waited_ns.saturating_sub(self.waited_ns);
        // A worker that slept meanwhile waited for nothing most of the time.
        if elapsed_ns < 4 * INTERVAL_NS && lost_ns >= elapsed_ns / COMPANY {
            self.shared_until_ns = now_ns + MEMORY_NS;
        }
        self.asked_ns = now_ns;
        self.waited_ns = waited_ns;
    }

    /// For how long the calling thread was ready and had no core; 0 where the kernel does not tell.
    #[cold]
    fn read_waited_ns(&self) -> u64 {
        let mut text = [0; 64];
        let read = self.stat.as_ref().map(|stat| stat.read_at(&mut text, 0));
        // On the CPU, ready without one, and slices: all in nanoseconds but the last.
        let Some(Ok(bytes)) = read else { return 0 };
        let text = std::str::from_utf8(&text[..bytes]).unwrap_or_default();
        let waited = text.split_ascii_whitespace().nth(1);
        waited.and_then(|ns| ns.parse().ok()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START_NS: u64 = 100 * INTERVAL_NS;

    fn sharing() -> Sharing {
        Sharing {
            asked_ns: START_NS,
            ..Sharing::default()
        }
    }

    #[test]
    fn a_core_is_shared_for_a_while_after_the_thread_waited_for_it() {
        let mut sharing = sharing();
        sharing.note(START_NS + INTERVAL_NS, INTERVAL_NS / 2);
        let until = START_NS + INTERVAL_NS + MEMORY_NS;
        assert!(until > sharing.asked_ns && sharing.shared_until_ns == until);
        assert!(sharing.is_shared(START_NS + INTERVAL_NS + 1));
        // Nothing more was lost.
        sharing.note(until, INTERVAL_NS / 2);
        assert!(!sharing.is_shared(until));
    }

    #[test]
    fn a_slice_that_a_passer_by_took_is_no_company() {
        let mut sharing = sharing();
        sharing.note(START_NS + INTERVAL_NS, 4_500_000);
        assert!(!sharing.is_shared(START_NS + INTERVAL_NS + 1));
    }

    #[test]
    fn waiting_over_a_long_time_says_nothing() {
        let mut sharing = sharing();
        sharing.note(START_NS + 4 * INTERVAL_NS, 2 * INTERVAL_NS);
        assert!(!sharing.is_shared(START_NS + 4 * INTERVAL_NS));
    }

    // Two threads that spin on one core: each waits for about half of the time.
    #[test]
    fn the_kernel_tells_of_company() {
        let core = core_affinity::get_core_ids().unwrap()[0];
        let spin = move |sharing: &mut Sharing, done: &dyn Fn(&Sharing) -> bool| {
            assert!(core_affinity::set_for_current(core));
            sharing.watch();
            let start = std::time::Instant::now();
            while !done(sharing) && start.elapsed().as_secs() < 20 {
                let now_ns = u64::try_from(start.elapsed().as_nanos()).unwrap();
                sharing.is_shared(START_NS + now_ns);
            }
        };
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let over = |_: &Sharing| is_over.load(std::sync::atomic::Ordering::Relaxed);
                spin(&mut sharing(), &over);
            });
            let mut sharing = sharing();
            spin(&mut sharing, &|sharing| sharing.shared_until_ns > 0);
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(sharing.shared_until_ns > 0, "{sharing:?}");
        });
    }
}
