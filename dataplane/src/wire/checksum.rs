//! The Internet checksum (RFC 1071), over private bytes and over bytes on their way.
//!
//! Sums are taken of 32-bit words in the machine's own order, in lanes that the compiler turns into
//! vectors, and folded at the end: the ones' complement sum does not depend on the order of bytes
//! until it is written (RFC 1071, 2).

use crate::copy::copy;
use crate::isa::for_this_cpu;
use crate::memory::Segment;

/// Words of a block: two vectors of four, which keeps the adders busy.
const WORDS: usize = 8;

const BLOCK: usize = 8 * WORDS;

type Block = [u64; WORDS];

/// A sum that grows piece by piece, of any lengths.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    total: u64,
    /// An odd number of bytes is in it: the next byte is the low half of a word.
    is_odd: bool,
}

impl Sum {
    /// Adds bytes of our own.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let piece = Segment {
            ptr: bytes.as_ptr().cast_mut(),
            len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
        };
        self.note(piece.len, sum_piece(piece));
    }

    /// Adds a piece of the source.
    ///
    /// # Safety
    /// It is valid for its length.
    pub(crate) unsafe fn add_piece(&mut self, piece: Segment) {
        self.note(piece.len, sum_piece(piece));
    }

    /// Copies a piece of the source to `to`, and adds it: each byte is read once.
    ///
    /// # Safety
    /// It is valid for its length and `to` for writing as many bytes, and they do not overlap.
    pub(crate) unsafe fn add_copied(&mut self, to: *mut u8, piece: Segment) {
        self.note(piece.len, copy_piece(to, piece));
    }

    fn note(&mut self, bytes: u32, sum: u64) {
        let mut sum = u64::from(fold(sum));
        if self.is_odd {
            // Each byte is in the other half of its word.
            sum = sum << 8 & 0xff00 | sum >> 8;
        }
        self.total += sum;
        self.is_odd ^= !bytes.is_multiple_of(2);
    }

    /// The checksum as it goes into a header: never 0, which UDP takes for none; 0xffff is the same
    /// number to whoever verifies (RFC 768).
    pub(crate) fn finish(self) -> [u8; 2] {
        match !fold(self.total) {
            0 => [0xff; 2],
            checksum => checksum.to_ne_bytes(),
        }
    }

    /// The checksum where 0 means nothing special: IPv4's.
    pub(crate) fn finish_plain(self) -> [u8; 2] {
        (!fold(self.total)).to_ne_bytes()
    }
}

/// The Internet checksum of `bytes`, never 0: for benches.
#[doc(hidden)]
pub fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = Sum::default();
    sum.add(bytes);
    sum.finish()
}

/// Copies `from` to as many bytes at `to`, and returns their checksum: for benches.
#[doc(hidden)]
pub fn copy_and_checksum(to: &mut [u8], from: &[u8]) -> [u8; 2] {
    let len = to.len().min(from.len());
    let piece = Segment {
        ptr: from.as_ptr().cast_mut(),
        len: u32::try_from(len).unwrap_or(u32::MAX),
    };
    let mut sum = Sum::default();
    // SAFETY: both are slices, no shorter, and distinct.
    unsafe { sum.add_copied(to.as_mut_ptr(), piece) };
    sum.finish()
}

/// Folds a sum of words to 16 bits.
fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    #[expect(clippy::cast_possible_truncation, reason = "folded")]
    let sum = sum as u16;
    sum
}

for_this_cpu! {
    /// The sum of a piece, which the caller knows to be valid.
    fn sum_piece(piece: Segment) -> u64 = sum_blocks;
}

for_this_cpu! {
    /// Copies a piece, which the caller knows to be valid, to where the caller knows that there is
    /// room, and returns its sum.
    fn copy_piece(to: *mut u8, piece: Segment) -> u64 = copy_blocks;
}

#[inline(always)]
fn sum_blocks(piece: Segment) -> u64 {
    each_block(piece, |_, _, _| {})
}

#[inline(always)]
fn copy_blocks(to: *mut u8, piece: Segment) -> u64 {
    each_block(piece, |at, block, bytes| {
        // SAFETY: `at + bytes` is within the piece, for which there is room; the block is private
        // and no shorter.
        unsafe { copy(to.wrapping_add(at), block.as_ptr().cast(), bytes) };
    })
}

/// Reads a piece block by block into registers, shows each with its offset and length, and returns
/// the sum of all.
#[inline(always)]
fn each_block(piece: Segment, mut show: impl FnMut(usize, &Block, usize)) -> u64 {
    let len = piece.len as usize;
    let (mut low, mut high) = ([0; WORDS], [0; WORDS]);
    let mut at = 0;
    while len - at >= BLOCK {
        let from = piece.ptr.wrapping_add(at).cast::<Block>();
        // SAFETY: a whole block lies within the piece.
        let block = unsafe { from.read_unaligned() };
        show(at, &block, BLOCK);
        add_block(&mut low, &mut high, &block);
        at += BLOCK;
    }
    if at < len {
        let mut block = [0; WORDS];
        let from = piece.ptr.wrapping_add(at);
        // SAFETY: so many bytes lie within the piece, and within the block.
        unsafe {
            block
                .as_mut_ptr()
                .cast::<u8>()
                .copy_from_nonoverlapping(from, len - at);
        };
        show(at, &block, len - at);
        add_block(&mut low, &mut high, &block);
    }
    low.iter().chain(&high).sum()
}

/// Adds the halves of each word to lanes that are wide enough for all carries.
#[inline(always)]
fn add_block(low: &mut Block, high: &mut Block, block: &Block) {
    for word in 0..WORDS {
        low[word] += block[word] & 0xffff_ffff;
        high[word] += block[word] >> 32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, 4.1, as slow as it is written there.
    fn plainly(bytes: &[u8]) -> u16 {
        let word =
            |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
        let mut sum: u64 = bytes.chunks(2).map(|pair| u64::from(word(pair))).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn the_sum_of_rfc_1071_is_right() {
        let mut sum = Sum::default();
        sum.add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.finish(), (!0xddf2_u16).to_be_bytes());
    }

    #[test]
    fn a_checksum_of_zero_is_sent_as_all_ones() {
        let mut sum = Sum::default();
        sum.add(&[0xff, 0xff]);
        assert_eq!((sum.finish(), sum.finish_plain()), ([0xff; 2], [0; 2]));
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_pieces_have_the_plain_sum_and_arrive_whole(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            mut cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..6),
            ones: bool,
        ) {
            let bytes = if ones { vec![0xff; bytes.len()] } else { bytes };
            let mut at: Vec<_> = cuts.drain(..).map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let (mut added, mut read, mut copied) = (Sum::default(), Sum::default(), Sum::default());
            let mut target = vec![0xee; bytes.len() + 2];
            for ends in at.windows(2) {
                let part = &bytes[ends[0]..ends[1]];
                added.add(part);
                let piece = Segment {
                    ptr: part.as_ptr().cast_mut(),
                    len: u32::try_from(part.len()).unwrap(),
                };
                // SAFETY: the piece is a slice.
                unsafe { read.add_piece(piece) };
                let to = target.as_mut_ptr().wrapping_add(1 + ends[0]);
                // SAFETY: the target is longer than all pieces, and distinct.
                unsafe { copied.add_copied(to, piece) };
            }
            let expected = plainly(&bytes).to_be_bytes();
            for sum in [added, read, copied] {
                prop_assert_eq!(sum.finish_plain(), expected);
            }
            prop_assert_eq!(&target[1..=bytes.len()], &bytes[..]);
            prop_assert_eq!((target[0], target[bytes.len() + 1]), (0xee, 0xee));
        }
    }
}
