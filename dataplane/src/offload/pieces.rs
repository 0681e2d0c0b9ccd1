//! Lists of pieces of memory, and walks along them.

use crate::copy::copy;
use crate::memory::Segment;
use crate::ring::prefetch_more;
use crate::wire::checksum::Sum;

/// A place in a list of pieces, from which bytes are taken in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces<'a> {
    current: Segment,
    next: Segment,
    more: &'a [Segment],
}

impl<'a> Pieces<'a> {
    /// One piece, then more.
    pub(crate) fn new(first: Segment, more: &'a [Segment]) -> Self {
        Self {
            current: Segment::EMPTY,
            next: first,
            more,
        }
    }

    /// The same with a piece in front.
    pub(crate) fn behind(self, front: Segment) -> Self {
        debug_assert!(self.current.len == 0, "nothing was taken yet");
        Self {
            current: front,
            ..self
        }
    }

    /// The next `bytes` of them.
    pub(super) fn run(self, bytes: u32) -> Run<'a> {
        Run {
            pieces: self,
            left: bytes,
        }
    }

    /// The next bytes, `most` of them or fewer; none only if there are no more.
    #[inline]
    pub(crate) fn take(&mut self, most: u32) -> Segment {
        while self.current.len == 0 {
            self.current = std::mem::replace(&mut self.next, Segment::EMPTY);
            if self.current.len == 0 {
                let Some((first, more)) = self.more.split_first() else {
                    return Segment::EMPTY;
                };
                (self.current, self.more) = (*first, more);
            }
        }
        let part = Segment {
            len: self.current.len.min(most),
            ..self.current
        };
        self.current = self.current.skip(part.len);
        part
    }

    /// The piece behind the one that is being taken.
    #[inline]
    fn upcoming(&self) -> Option<Segment> {
        match self.next {
            Segment { len: 0, .. } => self.more.first().copied(),
            next => Some(next),
        }
    }

    /// Passes over so many bytes.
    pub(crate) fn advance(&mut self, mut bytes: u32) {
        while bytes > 0 {
            let part = self.take(bytes);
            if part.len == 0 {
                return;
            }
            bytes -= part.len;
        }
    }
}

/// So many bytes of pieces, one piece after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'a> {
    pieces: Pieces<'a>,
    left: u32,
}

impl Iterator for Run<'_> {
    type Item = Segment;

    #[inline]
    fn next(&mut self) -> Option<Segment> {
        if self.left == 0 {
            return None;
        }
        let part = self.pieces.take(self.left);
        self.left -= part.len;
        (part.len > 0).then_some(part)
    }
}

impl Run<'_> {
    /// How many are left.
    #[inline]
    pub(super) fn bytes(&self) -> u32 {
        self.left
    }

    /// Copies into `target` as far as there is room.
    pub(super) fn copy_to(mut self, target: &mut Pieces<'_>) {
        while let Some(mut from) = self.next() {
            while from.len > 0 {
                let is_fresh = target.current.len == 0;
                let to = target.take(from.len);
                if to.len == 0 {
                    return;
                }
                if let (true, Some(after)) = (is_fresh, target.upcoming()) {
                    prefetch_more(after.ptr, after.len.min(self.left + from.len));
                }
                // SAFETY: both pieces are valid for as many bytes and lie in different mappings, or
                // one is private.
                unsafe { copy(to.ptr, from.ptr, to.len as usize) };
                from = from.skip(to.len);
            }
        }
    }

    /// The same, and adds all but the first `plain` bytes to the sum.
    pub(super) fn copy_and_sum(self, target: &mut Pieces<'_>, mut sum: Sum, mut plain: u32) -> Sum {
        for mut from in self {
            while from.len > 0 {
                let to = target.take(from.len);
                if to.len == 0 {
                    return sum;
                }
                let before = plain.min(to.len);
                plain -= before;
                // SAFETY: both pieces are valid for no less, and lie in different mappings, or one is
                // private.
                unsafe { copy(to.ptr, from.ptr, before as usize) };
                let part = Segment {
                    len: to.len - before,
                    ..from.skip(before)
                };
                // SAFETY: likewise, for what is left of `to.len`.
                unsafe { sum.add_copied(to.ptr.wrapping_add(before as usize), part) };
                from = from.skip(to.len);
            }
        }
        sum
    }
}
