//! The ones' complement sum (RFC 1071) of memory that others may write, alone or while it is
//! copied.
//!
//! Words of 32 bits in the machine's own order are added in lanes that the compiler turns into
//! vectors, and [`fold`]ed at the end: the sum does not depend on the order of bytes until it is
//! written (RFC 1071, 2).

use super::copy::copy;
use crate::isa::for_this_cpu;

/// Words of a block: two vectors of four, which keeps the adders busy.
const WORDS: usize = 8;

const BLOCK: usize = 8 * WORDS;

type Block = [u64; WORDS];

/// The sum of `len` bytes, to be folded.
///
/// # Safety
/// They are valid for reading.
pub(super) unsafe fn sum(from: *const u8, len: usize) -> u64 {
    sum_range(from, len)
}

/// Copies `len` bytes and returns their sum, to be folded.
///
/// # Safety
/// `from` is valid for reading and `to` for writing as many.
pub(super) unsafe fn copy_and_sum(to: *mut u8, from: *const u8, len: usize) -> u64 {
    copy_range(to, from, len)
}

/// The sum of private bytes, to be folded.
pub(crate) fn sum_of(bytes: &[u8]) -> u64 {
    sum_range(bytes.as_ptr(), bytes.len())
}

/// Folds a sum of words to 16 bits.
pub(crate) fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    #[expect(clippy::cast_possible_truncation, reason = "folded")]
    let sum = sum as u16;
    sum
}

for_this_cpu! {
    /// The sum of a range that the caller knows to be valid.
    fn sum_range(from: *const u8, len: usize) -> u64 = sum_blocks;
}

for_this_cpu! {
    /// Copies a range, both sides of which the caller knows to be valid, and returns its sum.
    fn copy_range(to: *mut u8, from: *const u8, len: usize) -> u64 = copy_blocks;
}

#[inline(always)]
fn sum_blocks(from: *const u8, len: usize) -> u64 {
    each_block(from, len, |_, _, _| {})
}

#[inline(always)]
fn copy_blocks(to: *mut u8, from: *const u8, len: usize) -> u64 {
    each_block(from, len, |at, block, bytes| {
        // SAFETY: `at + bytes` is no more than `len`, for which there is room; the block is private
        // and no shorter.
        unsafe { copy(to.wrapping_add(at), block.as_ptr().cast(), bytes) };
    })
}

/// Reads a range block by block into registers, shows each with its offset and length, and returns
/// the sum of all.
#[inline(always)]
fn each_block(from: *const u8, len: usize, mut show: impl FnMut(usize, &Block, usize)) -> u64 {
    let (mut low, mut high) = ([0; WORDS], [0; WORDS]);
    let mut at = 0;
    while len - at >= BLOCK {
        let from = from.wrapping_add(at).cast::<Block>();
        // SAFETY: a whole block lies within the range.
        let block = unsafe { from.read_unaligned() };
        show(at, &block, BLOCK);
        add_block(&mut low, &mut high, &block);
        at += BLOCK;
    }
    if at < len {
        let mut block = [0; WORDS];
        let to = block.as_mut_ptr().cast::<u8>();
        // SAFETY: so many bytes lie within the range, and within the block.
        unsafe { to.copy_from_nonoverlapping(from.wrapping_add(at), len - at) };
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
