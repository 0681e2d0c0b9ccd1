//! Sets of frames of one burst.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Sub, SubAssign};

use crate::MAX_BURST;

/// A set of frames of a burst: one bit for each of its [`MAX_BURST`] places.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct FrameSet(u64);

impl FrameSet {
    /// No frame.
    pub const EMPTY: Self = Self(0);

    /// A frame in each place.
    pub const ALL: Self = Self(u64::MAX);

    /// The frames whose bits are set.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// One bit for each frame.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The frame at `index`, which is below [`MAX_BURST`].
    #[inline(always)]
    pub const fn one(index: usize) -> Self {
        Self(1 << (index % MAX_BURST))
    }

    /// The frames at `from` and behind.
    #[inline]
    pub const fn from_index(from: usize) -> Self {
        if from < MAX_BURST {
            Self(u64::MAX << from)
        } else {
            Self::EMPTY
        }
    }

    /// The frames from `from` on, before `to`.
    #[inline]
    pub const fn range(from: usize, to: usize) -> Self {
        Self(Self::from_index(from).0 & !Self::from_index(to).0)
    }

    /// Whether there is none.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    #[inline(always)]
    pub const fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether the frame at `index` is among them.
    #[inline(always)]
    pub const fn contains(self, index: usize) -> bool {
        index < MAX_BURST && self.0 >> index & 1 != 0
    }

    /// The index of the first.
    #[inline(always)]
    pub const fn first(self) -> Option<usize> {
        if self.0 == 0 {
            None
        } else {
            Some(self.0.trailing_zeros() as usize)
        }
    }

    /// The index of the first, or [`MAX_BURST`], which no frame has, if there is none.
    #[inline(always)]
    pub const fn first_index(self) -> usize {
        self.0.trailing_zeros() as usize
    }

    /// All but the first.
    #[inline(always)]
    #[must_use]
    pub const fn without_first(self) -> Self {
        Self(self.0 & self.0.wrapping_sub(1))
    }

    /// Those before the first that `kind` has not.
    #[inline(always)]
    #[must_use]
    pub const fn leading(self, kind: Self) -> Self {
        let other = self.0 & !kind.0;
        Self(self.0 & (other & other.wrapping_neg()).wrapping_sub(1))
    }

    /// The first `count` of them.
    #[must_use]
    pub fn first_of(self, count: u32) -> Self {
        if count >= self.len() {
            return self;
        }
        let mut others = self;
        (0..count).for_each(|_| others = others.without_first());
        self - others
    }

    /// The frames of a burst of `len` that are at its end, each frame behind them among them too.
    #[must_use]
    pub const fn suffix(self, len: usize) -> Self {
        if self.0 == 0 || len == 0 {
            return Self::EMPTY;
        }
        let count = (self.0 << (MAX_BURST - len)).leading_ones() as usize;
        Self(Self::from_index(len - count).0 & self.0)
    }

    /// Their indices, in order.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = usize> {
        let mut left = self;
        std::iter::from_fn(move || {
            let index = left.first()?;
            left = left.without_first();
            Some(index)
        })
    }
}

impl BitOr for FrameSet {
    type Output = Self;

    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for FrameSet {
    #[inline(always)]
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for FrameSet {
    type Output = Self;

    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Sub for FrameSet {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl SubAssign for FrameSet {
    #[inline(always)]
    fn sub_assign(&mut self, other: Self) {
        self.0 &= !other.0;
    }
}

impl FromIterator<usize> for FrameSet {
    fn from_iter<T: IntoIterator<Item = usize>>(indices: T) -> Self {
        let all = indices.into_iter().map(Self::one);
        all.fold(Self::EMPTY, |set, one| set | one)
    }
}

impl fmt::Debug for FrameSet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(indices: &[usize]) -> FrameSet {
        indices.iter().copied().collect()
    }

    #[test]
    fn frames_are_visited_in_order() {
        assert_eq!(FrameSet::EMPTY.iter().count(), 0);
        let all: Vec<_> = FrameSet::from_bits(1 << 63 | 0b1001).iter().collect();
        assert_eq!(all, [0, 3, 63]);
        assert_eq!(FrameSet::ALL.len(), 64);
    }

    #[test]
    fn the_leading_frames_of_a_kind_end_before_the_first_of_another() {
        let plain = set(&[0, 1, 2, 5, 6]);
        assert_eq!(set(&[1, 2, 5, 6]).leading(plain), set(&[1, 2, 5, 6]));
        assert_eq!(set(&[0, 2, 3, 5]).leading(plain), set(&[0, 2]));
        assert_eq!(set(&[4, 5]).leading(plain), FrameSet::EMPTY);
        assert_eq!(FrameSet::ALL.leading(FrameSet::ALL), FrameSet::ALL);
        assert_eq!(FrameSet::EMPTY.leading(plain), FrameSet::EMPTY);
    }

    #[test]
    fn only_the_end_of_a_burst_is_its_suffix() {
        assert_eq!(FrameSet::EMPTY.suffix(8), FrameSet::EMPTY);
        assert_eq!(set(&[5, 6, 7]).suffix(8), set(&[5, 6, 7]));
        assert_eq!(set(&[0, 2, 5, 6, 7]).suffix(8), set(&[5, 6, 7]));
        assert_eq!(set(&[0, 2, 5, 6]).suffix(8), FrameSet::EMPTY);
        assert_eq!(FrameSet::ALL.suffix(64), FrameSet::ALL);
        assert_eq!(set(&[0]).suffix(1), set(&[0]));
    }
}
