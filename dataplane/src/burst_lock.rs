//! The lock of what a worker uses for one burst at a time: a ring, half of a NIC's queue.
//!
//! A worker tries it once per burst and never waits. Everybody else waits for it, announced, so
//! that a busy worker stands back instead of taking the lock again between two bursts. What a
//! waiter replaces is out of use once it holds the lock: the hand-over is the quiescent point after
//! which memory is unmapped and fds are closed.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Waits for the value of a mutex, and takes it also after a panic of a thread that held it: what
/// the dataplane keeps in one is whole at each step. Not for what workers do in each turn.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mutex that workers try and others announce.
#[derive(Debug, Default)]
pub(crate) struct BurstLock<T> {
    /// How many threads wait; workers stand back while there are any.
    waiting: AtomicU32,
    value: Mutex<T>,
}

impl<T> BurstLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            waiting: AtomicU32::new(0),
            value: Mutex::new(value),
        }
    }

    /// The value for one burst, or `None` if somebody else has it or waits for it.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        // Relaxed: it is a courtesy; the mutex orders what the value holds.
        if self.waiting.load(Ordering::Relaxed) != 0 {
            return None;
        }
        match self.value.try_lock() {
            Ok(guard) => Some(guard),
            // A panic in a worker ends the process; should one be caught, the value is still whole
            // at each step.
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The value, once the worker that has it is done with its burst. Not for workers.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = lock(&self.value);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_stands_back_while_somebody_waits() {
        let lock = BurstLock::new(0);
        let burst = lock.try_lock().unwrap();
        assert!(lock.try_lock().is_none(), "another worker has it");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| *lock.lock() = 1);
            while lock.waiting.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            // Whoever gets the mutex first: a worker does not try it while somebody waits.
            drop(burst);
            waiter.join().unwrap();
        });
        assert_eq!(lock.try_lock().map(|value| *value), Some(1));
        lock.waiting.store(1, Ordering::Relaxed);
        assert!(lock.try_lock().is_none(), "free, but announced");
    }
}
