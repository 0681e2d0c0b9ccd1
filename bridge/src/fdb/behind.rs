//! What the database keeps of each port: how much was learned behind it, and since when it counts.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::table::{Entry, PORT, TAG, TAG_SHIFT};
use crate::PortId;

/// The limit of a port that has none.
const UNLIMITED: u32 = u32::MAX;

/// Flushes that are told apart: an entry has four bits for them.
const EPOCHS: u64 = 16;

const COUNT: u64 = 0xffff_ffff;
const EPOCH_ONE: u64 = 1 << (TAG_SHIFT + PORT.count_ones());
const OWED_SHIFT: u32 = 48;
const OWED_ONE: u64 = 1 << OWED_SHIFT;

/// A port's share of the database. On a cache line of its own: each look-up of an address behind
/// the port reads it.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Behind {
    /// See [`State`]. Relaxed throughout: one word says all, and orders nothing else.
    state: AtomicU64,
    limit: AtomicU32,
}

/// ```text
///  owed 16 | epoch 4 | port 12 | learned entries of the epoch 32
/// ```
/// An entry counts if its tag (epoch and port) is this one, so that a flush is one addition. *Owed*
/// counts flushes whose entries were not swept out of the table yet. After 15 of them the epoch
/// after this one may be an old entry's: nothing is learned until the sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State(u64);

impl State {
    fn new(port: PortId) -> Self {
        Self(u64::from(port.get()) << TAG_SHIFT)
    }

    fn owed(self) -> u64 {
        self.0 >> OWED_SHIFT
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes the 32 bits of the count"
    )]
    fn count(self) -> u32 {
        self.0 as u32
    }

    fn is_spent(self) -> bool {
        self.owed() >= EPOCHS - 1
    }

    /// A new epoch, which has no entries; `None` if this one has none either.
    fn flushed(self) -> Option<Self> {
        if self.count() == 0 {
            return None;
        }
        let epoch = self.0.wrapping_add(EPOCH_ONE) & TAG & !(PORT << TAG_SHIFT);
        let port = self.0 & PORT << TAG_SHIFT;
        Some(Self((self.owed() + 1) << OWED_SHIFT | epoch | port))
    }

    /// After a sweep that began when `swept` flushes were owed.
    fn settled(self, swept: u64) -> Self {
        Self(self.0 - swept.min(self.owed()) * OWED_ONE)
    }
}

impl Behind {
    pub(super) fn new(port: PortId) -> Self {
        Self {
            state: AtomicU64::new(State::new(port).0),
            limit: AtomicU32::new(UNLIMITED),
        }
    }

    fn state(&self) -> State {
        State(self.state.load(Ordering::Relaxed))
    }

    /// The tag of entries that are learned now.
    #[inline]
    pub(super) fn tag(&self) -> u64 {
        self.state.load(Ordering::Relaxed) & TAG
    }

    /// Learned entries that count.
    pub(super) fn count(&self) -> u32 {
        self.state().count()
    }

    pub(super) fn set_limit(&self, limit: Option<u32>) {
        let limit = limit.unwrap_or(UNLIMITED);
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub(super) fn is_at_limit(&self) -> bool {
        self.count() >= self.limit.load(Ordering::Relaxed)
    }

    /// Counts a learned entry that is about to be stored; false if it would not count, since the
    /// port was flushed since the entry was made, or too often since the last sweep.
    pub(super) fn count_in(&self, entry: Entry) -> bool {
        self.update(|state| {
            let counts = state.0 & TAG == entry.tag() && !state.is_spent();
            counts.then_some(State(state.0 + 1))
        })
    }

    /// Counts a learned entry out; one that a flush did already is not counted again.
    pub(super) fn count_out(&self, entry: Entry) {
        self.update(|state| {
            (state.0 & TAG == entry.tag() && state.0 & COUNT != 0).then(|| State(state.0 - 1))
        });
    }

    /// Has no entry count that was learned up to now; false if there is none.
    pub(super) fn flush(&self) -> bool {
        self.update(State::flushed)
    }

    /// Flushes whose entries may still be in the table.
    pub(super) fn owed(&self) -> u64 {
        self.state().owed()
    }

    /// Takes note of a sweep that began when `swept` flushes were owed.
    pub(super) fn settle(&self, swept: u64) {
        self.update(|state| Some(state.settled(swept)));
    }

    fn update(&self, change: impl Fn(State) -> Option<State>) -> bool {
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.state
            .fetch_update(set, fetch, |state| change(State(state)).map(|next| next.0))
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tick;

    fn entry(behind: &Behind) -> Entry {
        Entry::learned(behind.tag(), Tick(7))
    }

    #[test]
    fn a_flush_counts_out_what_was_learned_once() {
        let behind = Behind::new(PortId::new(4095).unwrap());
        let old = entry(&behind);
        assert!(!behind.flush(), "nothing was learned");
        assert!(behind.count_in(old) && behind.count_in(old));
        assert!(behind.flush());
        assert_eq!((behind.count(), behind.owed()), (0, 1));
        assert!(!behind.count_in(old), "it is of before");
        assert!(behind.count_in(entry(&behind)));
        behind.count_out(old);
        assert_eq!(behind.count(), 1);
    }

    #[test]
    fn an_epoch_does_not_come_again_before_a_sweep() {
        let behind = Behind::new(PortId::new(5).unwrap());
        let mut seen = Vec::new();
        while behind.count_in(entry(&behind)) {
            assert!(!seen.contains(&behind.tag()));
            seen.push(behind.tag());
            assert!(behind.flush());
        }
        assert_eq!((seen.len(), behind.owed()), (15, 15));
        assert!(!behind.flush(), "nothing is learned any more");
        behind.settle(15);
        assert!(behind.count_in(entry(&behind)));
        assert!(!seen.contains(&behind.tag()));
        assert_eq!(entry(&behind).port().get(), 5);
    }

    #[test]
    fn flushes_during_a_sweep_are_owed_to_the_next() {
        let behind = Behind::new(PortId::new(0).unwrap());
        let flush = || assert!(behind.count_in(entry(&behind)) && behind.flush());
        flush();
        let swept = behind.owed();
        flush();
        behind.settle(swept);
        assert_eq!(behind.owed(), 1);
    }
}
