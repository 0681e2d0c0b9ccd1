//! Counters that workers write and anybody reads.

use std::sync::atomic::{AtomicU64, Ordering};

use ringway_api::Drops;
use ringway_bridge::DropReason;

use super::queue::{Account, Outcome};

/// A count. Relaxed throughout: counters order nothing.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds, by the only thread that writes (a queue's owner under its lock): no locked operation.
    #[inline]
    pub(crate) fn add_owned(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// Adds, by any of several threads.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Replaces the value.
    #[inline]
    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value.
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One direction of one queue pair. On cache lines of its own, since each queue has its own writer.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct QueueCounters {
    pub(crate) frames: Counter,
    pub(crate) bytes: Counter,
    pub(crate) calls: Counter,
    pub(crate) contended: Counter,
}

impl QueueCounters {
    /// Counts what was delivered, by the only thread that writes.
    #[inline]
    pub(crate) fn count_owned(&self, outcome: &Outcome, account: &Account) {
        self.frames.add_owned(outcome.frames(account));
        self.bytes.add_owned(outcome.sent_bytes);
    }

    /// Counts what was delivered, by any of several threads.
    #[inline]
    pub(crate) fn count(&self, outcome: &Outcome, account: &Account) {
        self.frames.add(outcome.frames(account));
        self.bytes.add(outcome.sent_bytes);
    }
}

/// What was done to frames for a port, by any of several workers.
#[derive(Debug, Default)]
pub(crate) struct OffloadCounters {
    /// Frames whose checksum was completed.
    pub(crate) csum_completed: Counter,
    /// Frames that were segmented,
    pub(crate) gso_frames: Counter,
    /// and segments that they became.
    pub(crate) gso_segments: Counter,
}

/// A count per reason.
#[derive(Debug, Default)]
pub(crate) struct DropCounters([Counter; DropReason::ALL.len()]);

impl DropCounters {
    #[cold]
    pub(crate) fn add(&self, reason: DropReason, n: u64) {
        self.0[reason.index()].add(n);
    }

    /// Frames dropped for `reason`.
    pub(crate) fn of(&self, reason: DropReason) -> u64 {
        self.0[reason.index()].get()
    }

    pub(crate) fn read(&self) -> Drops {
        let counts = DropReason::ALL.map(|reason| (reason, self.0[reason.index()].get()));
        counts.into_iter().collect()
    }

    pub(crate) fn clear(&self) {
        for counter in &self.0 {
            counter.set(0);
        }
    }
}
