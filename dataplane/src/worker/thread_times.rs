//! What the kernel knows of the calling thread's time.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::clock;

/// Time that a thread had, and time that it was ready and had no core; what is left it slept. Page
/// faults that it had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) processor_ns: u64,
    pub(super) waited_ns: u64,
    pub(super) faults: u64,
}

impl Times {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            processor_ns: self.processor_ns.saturating_sub(before.processor_ns),
            waited_ns: self.waited_ns.saturating_sub(before.waited_ns),
            faults: self.faults.saturating_sub(before.faults),
        }
    }
}

/// Reads the times of the thread that watches.
#[derive(Debug, Default)]
pub(super) struct ThreadTimes {
    schedstat: Option<File>,
}

impl ThreadTimes {
    /// Begins to watch the calling thread.
    pub(super) fn watch(&mut self) {
        self.schedstat = File::open("/proc/thread-self/schedstat").ok();
    }

    /// All of it, by three system calls; `None` where the kernel does not tell, or nobody watches.
    #[cold]
    pub(super) fn read(&self) -> Option<Times> {
        Some(Times {
            waited_ns: self.waited_ns()?,
            processor_ns: clock::thread_ns(),
            faults: clock::thread_faults(),
        })
    }

    /// For how long the thread was ready and had no core.
    #[cold]
    pub(super) fn waited_ns(&self) -> Option<u64> {
        let mut text = [0; 64];
        let bytes = self.schedstat.as_ref()?.read_at(&mut text, 0).ok()?;
        // On the CPU, ready without one, and slices: all in nanoseconds but the last.
        let text = std::str::from_utf8(&text[..bytes]).ok()?;
        text.split_ascii_whitespace().nth(1)?.parse().ok()
    }
}
