//! A range of addresses that changes hands while a handler of signals reads it: a sequence lock, whose
//! reader never waits.
//!
//! `tests/sigbus_range.rs` runs this file over loom's atomics, so it names no atomic of its own.

use std::sync::atomic::Ordering;

/// A number that threads share.
pub(crate) trait Word {
    /// Reads it.
    fn load(&self, order: Ordering) -> usize;

    /// Writes it.
    fn store(&self, value: usize, order: Ordering);

    /// A fence between accesses of such numbers.
    fn fence(order: Ordering);
}

/// Whole pages of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// First address.
    pub(crate) start: usize,
    /// Bytes.
    pub(crate) len: usize,
    /// Bytes of a page, of which `start` and `len` are multiples.
    pub(crate) page: usize,
}

impl Range {
    /// That of nothing.
    pub(crate) const EMPTY: Self = Self {
        start: 0,
        len: 0,
        page: 1,
    };
}

/// A range that readers see whole or not at all. One thread at a time may write it.
pub(crate) struct SharedRange<W> {
    /// Odd while the range is being written.
    pub(crate) sequence: W,
    pub(crate) start: W,
    pub(crate) len: W,
    pub(crate) page: W,
}

impl<W: Word> SharedRange<W> {
    /// Replaces the range.
    pub(crate) fn write(&self, range: Range) {
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence
            .store(before.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the fence in `read`: who sees a word of the new range sees the odd sequence.
        W::fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.len.store(range.len, Ordering::Relaxed);
        self.page.store(range.page, Ordering::Relaxed);
        // Release: pairs with the acquire load in `read`, so that the words are the range's.
        self.sequence
            .store(before.wrapping_add(2), Ordering::Release);
    }

    /// The range; `None` while it is being written. Never waits: the thread that a signal interrupts
    /// may be the writer, and whose access faults has had its range written long before.
    pub(crate) fn read(&self) -> Option<Range> {
        // Acquire: pairs with the last store of `write`.
        let before = self.sequence.load(Ordering::Acquire);
        let range = Range {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
        };
        // Pairs with the fence in `write`.
        W::fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2)).then_some(range)
    }
}
