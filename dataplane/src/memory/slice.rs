//! Guest memory as a type: a range that is valid for as long as its lifetime says, with all that
//! may be done to it.
//!
//! Whoever holds a [`GuestSlice`] holds a borrow of what keeps the range mapped: a guest's
//! [`super::GuestMemory`], a NIC queue's UMEM, a private buffer. The guest, or the kernel, may
//! write the range at any time, so no reference to its bytes is ever formed, and what is read is
//! any mix of old and new bytes.

use std::cell::Cell;
use std::marker::PhantomData;

use super::copy::copy;
use super::{offset_in_host, sum};

/// Bytes that [`GuestSlice::read_head`] reads and [`GuestSlice::put_plain`] takes from elsewhere.
pub(crate) const HEAD_LEN: usize = 32;

/// [`HEAD_LEN`] as a length of slices.
pub(crate) const HEAD_BYTES: u32 = 32;

/// Bytes of a cache line, on all processors that this is tuned for.
const LINE: u32 = 64;

/// Where a buffer's lines end that [`GuestSlice::prefetch_rest`] brings: beyond, the processor has
/// noticed.
const PREFETCH_END: u32 = 2048;

/// A range of memory, in one mapping, that others may write at the same time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestSlice<'m> {
    ptr: *mut u8,
    len: u32,
    memory: PhantomData<&'m ()>,
}

impl<'m> GuestSlice<'m> {
    /// Nothing, nowhere.
    pub(crate) const EMPTY: Self = Self {
        ptr: std::ptr::null_mut(),
        len: 0,
        memory: PhantomData,
    };

    /// The range at a host address.
    ///
    /// # Safety
    /// `len` bytes from `ptr` on are valid for reading and writing during `'m`, and no Rust
    /// reference to them is used meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn new(ptr: *mut u8, len: u32) -> Self {
        Self {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// A private buffer as if it were a guest's; of buffers beyond 4 GiB the beginning.
    #[inline]
    pub(crate) fn of(bytes: &'m mut [u8]) -> Self {
        Self {
            ptr: bytes.as_mut_ptr(),
            len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            memory: PhantomData,
        }
    }

    /// Private memory that several slices lie in, likewise.
    #[inline]
    pub(crate) fn of_cells(bytes: &'m [Cell<u8>]) -> Self {
        Self {
            ptr: bytes.as_ptr().cast_mut().cast(),
            len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            memory: PhantomData,
        }
    }

    /// Bytes.
    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        self.len
    }

    /// The first `bytes`, or all if there are fewer.
    #[inline(always)]
    pub(crate) fn first(self, bytes: u32) -> Self {
        Self {
            len: self.len.min(bytes),
            ..self
        }
    }

    /// What lies behind the first `bytes`: nothing if there are no more.
    #[inline(always)]
    pub(crate) fn skip(self, bytes: u32) -> Self {
        let bytes = bytes.min(self.len);
        Self {
            ptr: self.ptr.wrapping_add(bytes as usize),
            len: self.len - bytes,
            ..self
        }
    }

    /// Reads the first [`HEAD_LEN`] bytes as words in memory order, each byte once; `None` if there
    /// are fewer.
    #[inline(always)]
    pub(crate) fn read_head(self) -> Option<[u64; 4]> {
        // Packed, since buffers may lie anywhere.
        #[derive(Clone, Copy)]
        #[repr(C, packed)]
        struct Word(u64);
        if self.len < HEAD_BYTES {
            return None;
        }
        let from = self.ptr.cast::<Word>();
        Some([0, 1, 2, 3].map(|word| {
            // SAFETY: the range is valid and no shorter than four words.
            let word = unsafe { from.wrapping_add(word).read_volatile() };
            u64::from_le(word.0)
        }))
    }

    /// Reads the 16 bytes of descriptor `index` of a table by one load, in memory order from the
    /// lowest; `None` if the table ends before.
    #[inline(always)]
    pub(crate) fn read_descriptor(self, index: u16) -> Option<u128> {
        // Packed, since indirect tables may lie anywhere.
        #[derive(Clone, Copy)]
        #[repr(C, packed)]
        struct Bits(u128);
        if u32::from(index) >= self.len / 16 {
            return None;
        }
        let at = self.ptr.wrapping_add(16 * usize::from(index));
        // SAFETY: the descriptor lies in the range.
        let bits = unsafe { at.cast::<Bits>().read_volatile() };
        Some(u128::from_le(bits.0))
    }

    /// Reads as many bytes as both have, and returns how many.
    #[inline]
    pub(crate) fn read(self, to: &mut [u8]) -> u32 {
        let part = self.first(u32::try_from(to.len()).unwrap_or(u32::MAX));
        // SAFETY: `part` is valid, and no longer than `to`, which is ours.
        unsafe { copy(to.as_mut_ptr(), part.ptr, part.len as usize) };
        part.len
    }

    /// Writes as many bytes as both have, and returns how many.
    #[inline]
    pub(crate) fn write(self, from: &[u8]) -> u32 {
        let part = self.first(u32::try_from(from.len()).unwrap_or(u32::MAX));
        // SAFETY: `part` is valid, and no longer than `from`.
        unsafe { copy(part.ptr, from.as_ptr(), part.len as usize) };
        part.len
    }

    /// Copies as many bytes as both have from `from`, and returns how many.
    #[inline(always)]
    pub(crate) fn copy_from(self, from: GuestSlice<'_>) -> u32 {
        let bytes = self.len.min(from.len);
        // SAFETY: both are valid and no shorter.
        unsafe { copy(self.ptr, from.ptr, bytes as usize) };
        bytes
    }

    /// Writes `head` in place of the first bytes of `frame`, and copies its others behind. False,
    /// and nothing is done, if `frame` does not fit or is shorter than `head`.
    #[inline(always)]
    pub(crate) fn put_plain(self, head: &[u8; HEAD_LEN], frame: GuestSlice<'_>) -> bool {
        let Some(rest) = frame.len.checked_sub(HEAD_BYTES) else {
            return false;
        };
        if frame.len > self.len {
            return false;
        }
        // SAFETY: the range is valid for `frame.len` bytes, no fewer than the head has.
        unsafe { self.ptr.copy_from(head.as_ptr(), HEAD_LEN) };
        let (to, from) = (
            self.ptr.wrapping_add(HEAD_LEN),
            frame.ptr.wrapping_add(HEAD_LEN),
        );
        // SAFETY: both ranges are valid for `frame.len` bytes, of which these are the last.
        unsafe { copy(to, from, rest as usize) };
        true
    }

    /// The sum of its words, for [`sum::fold`].
    #[inline]
    pub(crate) fn sum(self) -> u64 {
        // SAFETY: the range is valid.
        unsafe { sum::sum(self.ptr, self.len as usize) }
    }

    /// Copies as many bytes as both have from `from`, and returns how many and their sum, for
    /// [`sum::fold`]: each byte is read once.
    #[inline]
    pub(crate) fn copy_summed(self, from: GuestSlice<'_>) -> (u32, u64) {
        let bytes = self.len.min(from.len);
        // SAFETY: both are valid and no shorter.
        let sum = unsafe { sum::copy_and_sum(self.ptr, from.ptr, bytes as usize) };
        (bytes, sum)
    }

    /// Brings the first two lines towards the cache, to be read. A hint.
    #[inline(always)]
    pub(crate) fn prefetch_to_read(self) {
        prefetch_to_read(self.ptr);
        prefetch_to_read(self.ptr.wrapping_add(LINE as usize));
    }

    /// Brings the first two lines towards the cache, to be written, handed over by whoever wrote
    /// them last. A hint.
    #[inline(always)]
    pub(crate) fn prefetch_to_write(self) {
        prefetch_to_write(self.ptr);
        prefetch_to_write(self.ptr.wrapping_add(LINE as usize));
    }

    /// Brings the lines that [`GuestSlice::prefetch_to_write`] left out, as far as its first
    /// `bytes`. A hint.
    #[inline(always)]
    pub(crate) fn prefetch_rest(self, bytes: u32) {
        let mut at = 2 * LINE;
        while at < bytes.min(PREFETCH_END) {
            prefetch_to_write(self.ptr.wrapping_add(at as usize));
            at += LINE;
        }
    }

    /// Where it begins, to hand it to the kernel or to tell places apart. Valid for `len` bytes
    /// during `'m`.
    #[inline(always)]
    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.ptr
    }
}

/// The region that served a translation last, apart from the list of regions, so that the next
/// look-up follows no pointer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegionHint<'m> {
    guest_addr: u64,
    size: u64,
    host: *mut u8,
    memory: PhantomData<&'m ()>,
}

impl<'m> RegionHint<'m> {
    /// No region: finds nothing.
    pub(super) const NONE: Self = Self {
        guest_addr: 0,
        size: 0,
        host: std::ptr::null_mut(),
        memory: PhantomData,
    };

    /// The region of `size` bytes at a guest address and a host address.
    ///
    /// # Safety
    /// It is mapped there, for reading and writing, during `'m`.
    pub(super) unsafe fn new(guest_addr: u64, size: u64, host: *mut u8) -> Self {
        Self {
            guest_addr,
            size,
            host,
            memory: PhantomData,
        }
    }

    /// The range, if it lies wholly in this region.
    #[inline(always)]
    pub(crate) fn find(&self, addr: u64, len: u32) -> Option<GuestSlice<'m>> {
        let offset = addr.wrapping_sub(self.guest_addr);
        // The second comparison can't underflow, as the first comes before it.
        if offset < self.size && u64::from(len) <= self.size - offset {
            let ptr = self.host.wrapping_add(offset_in_host(offset)?);
            // SAFETY: the whole range lies in the region, which is mapped during 'm.
            return Some(unsafe { GuestSlice::new(ptr, len) });
        }
        None
    }
}

#[inline(always)]
fn prefetch_to_read(line: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetching has no effect that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[inline(always)]
fn prefetch_to_write(line: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as for reading; processors without the instruction take it for one without effect.
    unsafe {
        std::arch::asm!(
            "prefetchw [{line}]",
            line = in(reg) line,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize) -> Vec<u8> {
        (0..=255).cycle().take(len).collect()
    }

    #[test]
    fn parts_never_leave_the_range() {
        let mut bytes = numbers(10);
        let whole = GuestSlice::of(&mut bytes);
        assert_eq!((whole.skip(4).len(), whole.skip(11).len()), (6, 0));
        assert_eq!((whole.first(4).len(), whole.first(11).len()), (4, 10));
        let mut read = [0xee; 4];
        assert_eq!(whole.skip(8).read(&mut read), 2);
        assert_eq!(read, [8, 9, 0xee, 0xee]);
        assert_eq!(whole.skip(9).write(&[1, 2]), 1);
        assert_eq!(bytes[9], 1);
    }

    #[test]
    fn a_plain_frame_is_put_whole_or_not_at_all() {
        for (frame_len, room) in [(31, 64), (60, 59), (60, 60), (64, 1500), (1514, 1514)] {
            let mut frame = numbers(frame_len);
            let mut target = vec![0xee; room + 1];
            let put = GuestSlice::of(&mut target[..room])
                .put_plain(&[7; HEAD_LEN], GuestSlice::of(&mut frame));
            assert_eq!(put, frame_len >= HEAD_LEN && frame_len <= room);
            if put {
                assert_eq!(target[..HEAD_LEN], [7; HEAD_LEN]);
                assert_eq!(target[HEAD_LEN..frame_len], frame[HEAD_LEN..]);
            }
            let untouched = if put { frame_len } else { 0 };
            assert!(target[untouched..].iter().all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn a_head_is_read_in_the_order_of_memory() {
        let mut bytes = numbers(33);
        let words = GuestSlice::of(&mut bytes).skip(1).read_head().unwrap();
        assert_eq!(words[0].to_le_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(words[3].to_le_bytes(), [25, 26, 27, 28, 29, 30, 31, 32]);
        assert_eq!(GuestSlice::of(&mut bytes).skip(2).read_head(), None);
    }
}
