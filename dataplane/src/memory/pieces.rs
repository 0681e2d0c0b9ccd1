//! Walks along lists of guest slices.

use super::GuestSlice;

/// A place in a list of slices, from which bytes are taken in order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pieces<'a> {
    current: GuestSlice<'a>,
    more: &'a [GuestSlice<'a>],
}

impl<'a> Pieces<'a> {
    /// One slice.
    pub(crate) fn one(slice: GuestSlice<'a>) -> Self {
        Self {
            current: slice,
            more: &[],
        }
    }

    /// Several in order.
    pub(crate) fn new(slices: &'a [GuestSlice<'a>]) -> Self {
        Self {
            current: GuestSlice::EMPTY,
            more: slices,
        }
    }

    /// The next bytes, `most` of them or fewer; none only if there are no more.
    #[inline]
    pub(crate) fn take(&mut self, most: u32) -> GuestSlice<'a> {
        while self.current.len() == 0 {
            let Some((first, more)) = self.more.split_first() else {
                return GuestSlice::EMPTY;
            };
            (self.current, self.more) = (*first, more);
        }
        let part = self.current.first(most);
        self.current = self.current.skip(part.len());
        part
    }

    /// Passes over so many bytes.
    pub(crate) fn skip(mut self, mut bytes: u32) -> Self {
        while bytes > 0 {
            let part = self.take(bytes);
            if part.len() == 0 {
                break;
            }
            bytes -= part.len();
        }
        self
    }

    /// Writes private bytes as far as there is room, and returns how many.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> usize {
        let mut left = bytes;
        while !left.is_empty() {
            let part = self.take(u32::try_from(left.len()).unwrap_or(u32::MAX));
            if part.len() == 0 {
                break;
            }
            left = &left[part.write(left) as usize..];
        }
        bytes.len() - left.len()
    }

    /// Reads as many bytes as both have, and returns how many.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> usize {
        let mut done = 0;
        while done < to.len() {
            let left = &mut to[done..];
            let part = self.take(u32::try_from(left.len()).unwrap_or(u32::MAX));
            if part.len() == 0 {
                break;
            }
            done += part.read(left) as usize;
        }
        done
    }
}

/// So many bytes of slices, one part after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PieceRun<'a> {
    pieces: Pieces<'a>,
    left: u32,
}

impl<'a> PieceRun<'a> {
    /// The next `bytes` of `pieces`.
    pub(crate) fn new(pieces: Pieces<'a>, bytes: u32) -> Self {
        Self {
            pieces,
            left: bytes,
        }
    }

    /// How many bytes there are.
    #[inline]
    pub(crate) fn bytes(&self) -> u32 {
        self.left
    }

    /// The first `bytes` of it, and the others.
    pub(crate) fn split_at(self, bytes: u32) -> (Self, Self) {
        let bytes = bytes.min(self.left);
        let back = Self::new(self.pieces.skip(bytes), self.left - bytes);
        (Self::new(self.pieces, bytes), back)
    }

    /// Gives it part by part to `copy`, each with room for it in `target`, as far as there is room.
    /// The buffer behind the one that is being filled is on its way into the cache meanwhile.
    #[inline(always)]
    pub(crate) fn copy_to(
        mut self,
        target: &mut Pieces<'_>,
        mut copy: impl FnMut(GuestSlice<'_>, GuestSlice<'_>),
    ) {
        while let Some(mut from) = self.next() {
            while from.len() > 0 {
                let begins = target.current.len() == 0;
                let to = target.take(from.len());
                if to.len() == 0 {
                    return;
                }
                if let (true, Some(next)) = (begins, target.more.first()) {
                    next.prefetch_rest(next.len().min(self.left + from.len()));
                }
                copy(to, from);
                from = from.skip(to.len());
            }
        }
    }
}

impl<'a> Iterator for PieceRun<'a> {
    type Item = GuestSlice<'a>;

    #[inline]
    fn next(&mut self) -> Option<GuestSlice<'a>> {
        if self.left == 0 {
            return None;
        }
        let part = self.pieces.take(self.left);
        self.left -= part.len();
        (part.len() > 0).then_some(part)
    }
}
