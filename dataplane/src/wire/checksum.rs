//! The Internet checksum (RFC 1071), over private bytes and over bytes on their way.

use crate::memory::{GuestSlice, fold, sum_of};

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
        self.note(bytes.len(), sum_of(bytes));
    }

    /// Adds a piece of the source.
    pub(crate) fn add_piece(&mut self, piece: GuestSlice<'_>) {
        self.note(piece.len() as usize, piece.sum());
    }

    /// Copies as much of a piece of the source as `to` has room for, adds that, and returns how
    /// much it was: each byte is read once.
    pub(crate) fn add_copied(&mut self, to: GuestSlice<'_>, piece: GuestSlice<'_>) -> u32 {
        let (bytes, sum) = to.copy_summed(piece);
        self.note(bytes as usize, sum);
        bytes
    }

    fn note(&mut self, bytes: usize, sum: u64) {
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
#[cfg(feature = "inline")]
pub fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum = Sum::default();
    sum.add(bytes);
    sum.finish()
}

/// Copies `from` to as many bytes at `to`, and returns their checksum: for benches.
#[cfg(feature = "inline")]
pub fn copy_and_checksum(to: &mut [u8], from: &mut [u8]) -> [u8; 2] {
    let mut sum = Sum::default();
    sum.add_copied(GuestSlice::of(to), GuestSlice::of(from));
    sum.finish()
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
            let mut bytes = if ones { vec![0xff; bytes.len()] } else { bytes };
            let mut at: Vec<_> = cuts.drain(..).map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let (mut added, mut read, mut copied) = (Sum::default(), Sum::default(), Sum::default());
            let mut target = vec![0xee; bytes.len() + 2];
            for ends in at.windows(2) {
                let part = &mut bytes[ends[0]..ends[1]];
                added.add(part);
                let piece = GuestSlice::of(part);
                read.add_piece(piece);
                // The target is longer than all pieces.
                copied.add_copied(GuestSlice::of(&mut target[1 + ends[0]..]), piece);
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
