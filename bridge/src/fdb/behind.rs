//! What the database keeps of each port: how much was learned behind it, and since when it counts;
//! and what it refused.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::Learned;
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
    moves: AtomicU64,
    moves_refused: AtomicU64,
    evictions: AtomicU64,
    limit_hits: AtomicU64,
    refused_full: AtomicU64,
}

const _: () = assert!(size_of::<Behind>() == 64);

/// What the database did and refused of a port since it was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FdbTally {
    /// Addresses that moved to the port.
    pub moves: u64,
    /// Frames whose source was in use behind another port a moment ago, so that it did not move: a
    /// spoof, a loop, or a station that moved too fast.
    pub moves_refused: u64,
    /// Entries that made room for ports with fewer.
    pub evictions: u64,
    /// Frames whose source was not learned since the port has as many addresses as it may.
    pub limit_hits: u64,
    /// Frames whose source was not learned since the database is full and the port has its share.
    pub refused_full: u64,
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
            moves: AtomicU64::new(0),
            moves_refused: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            limit_hits: AtomicU64::new(0),
            refused_full: AtomicU64::new(0),
        }
    }

    /// Counts what an attempt to learn behind the port led to.
    pub(super) fn note(&self, learned: Learned) {
        let counter = match learned {
            Learned::Moved { .. } => &self.moves,
            Learned::Held { .. } => &self.moves_refused,
            Learned::LimitReached => &self.limit_hits,
            Learned::Full => &self.refused_full,
            _ => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an entry that made room.
    pub(super) fn note_eviction(&self) {
        self.evictions.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn tally(&self) -> FdbTally {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FdbTally {
            moves: read(&self.moves),
            moves_refused: read(&self.moves_refused),
            evictions: read(&self.evictions),
            limit_hits: read(&self.limit_hits),
            refused_full: read(&self.refused_full),
        }
    }

    /// Begins to count anew.
    pub(super) fn clear_tally(&self) {
        let counters = [
            &self.moves,
            &self.moves_refused,
            &self.evictions,
            &self.limit_hits,
            &self.refused_full,
        ];
        for counter in counters {
            counter.store(0, Ordering::Relaxed);
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

    /// Counts a learned entry that is about to be stored, and returns how many there were before;
    /// `None` if it would not count, since the port was flushed since the entry was made, or too
    /// often since the last sweep.
    pub(super) fn count_in(&self, entry: Entry) -> Option<u32> {
        self.update(|state| {
            let counts = state.0 & TAG == entry.tag() && !state.is_spent();
            counts.then_some(State(state.0 + 1))
        })
    }

    /// Counts a learned entry out, and returns how many there were before; `None` if a flush did
    /// that already.
    pub(super) fn count_out(&self, entry: Entry) -> Option<u32> {
        self.update(|state| {
            (state.0 & TAG == entry.tag() && state.0 & COUNT != 0).then(|| State(state.0 - 1))
        })
    }

    /// Has no entry count that was learned up to now, and returns how many there were; `None` if
    /// there was none.
    pub(super) fn flush(&self) -> Option<u32> {
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

    /// Changes the state if there is something to change; the count before.
    fn update(&self, change: impl Fn(State) -> Option<State>) -> Option<u32> {
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.state
            .fetch_update(set, fetch, |state| change(State(state)).map(|next| next.0))
            .ok()
            .map(|before| State(before).count())
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
        assert_eq!(behind.flush(), None, "nothing was learned");
        assert_eq!([old; 2].map(|old| behind.count_in(old)), [Some(0), Some(1)]);
        assert_eq!(behind.flush(), Some(2));
        assert_eq!((behind.count(), behind.owed()), (0, 1));
        assert_eq!(behind.count_in(old), None, "it is of before");
        assert_eq!(behind.count_in(entry(&behind)), Some(0));
        assert_eq!(behind.count_out(old), None);
        assert_eq!(behind.count(), 1);
    }

    #[test]
    fn an_epoch_does_not_come_again_before_a_sweep() {
        let behind = Behind::new(PortId::new(5).unwrap());
        let mut seen = Vec::new();
        while behind.count_in(entry(&behind)).is_some() {
            assert!(!seen.contains(&behind.tag()));
            seen.push(behind.tag());
            assert_eq!(behind.flush(), Some(1));
        }
        assert_eq!((seen.len(), behind.owed()), (15, 15));
        assert_eq!(behind.flush(), None, "nothing is learned any more");
        behind.settle(15);
        assert_eq!(behind.count_in(entry(&behind)), Some(0));
        assert!(!seen.contains(&behind.tag()));
        assert_eq!(entry(&behind).port().get(), 5);
    }

    #[test]
    fn flushes_during_a_sweep_are_owed_to_the_next() {
        let behind = Behind::new(PortId::new(0).unwrap());
        let flush = || {
            behind.count_in(entry(&behind));
            assert_eq!(behind.flush(), Some(1));
        };
        flush();
        let swept = behind.owed();
        flush();
        behind.settle(swept);
        assert_eq!(behind.owed(), 1);
    }
}
