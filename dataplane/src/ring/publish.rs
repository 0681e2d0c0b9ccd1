//! How a device shows its driver what it has used: one store, after all that it is to see.
//!
//! `tests/publication.rs` runs this file over loom's atomics, so it names no atomic of its own.

use std::sync::atomic::Ordering;

/// A word that a device writes and its driver reads.
pub(crate) trait Word {
    /// What it holds.
    type Bits;

    /// Stores these bits in one piece.
    fn store(&self, bits: Self::Bits, order: Ordering);
}

/// Shows `bits`: the used index of a split ring (virtio 1.3, 2.7.14), the flags of the first
/// descriptor of a burst in a packed one (2.8.21).
#[inline(always)]
pub(crate) fn publish<W: Word>(word: &W, bits: W::Bits) {
    // Release: pairs with the driver's read barrier after it reads the word, so that used entries
    // and buffers are written before.
    word.store(bits, Ordering::Release);
}
