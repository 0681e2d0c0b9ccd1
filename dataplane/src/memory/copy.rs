//! Copies between memories that others may write at the same time.
//!
//! Both sides are raw pointers: the guest may write its buffer while it is read, so what arrives is
//! any mix of old and new bytes, and no reference to it ever exists. Each routine reads before it
//! writes or moves bytes in order, so ranges that overlap are no more than such a mix, too.

/// Copies `len` bytes, inline for the sizes of headers and small frames.
///
/// # Safety
/// `src` is valid for reading and `dst` for writing `len` bytes.
#[inline(always)]
pub(crate) unsafe fn copy(dst: *mut u8, src: *const u8, len: usize) {
    match len {
        // SAFETY: 64 bytes from each end lie within `len`; the caller vouches for the ranges.
        64..=128 => unsafe { ends::<64>(dst, src, len) },
        // SAFETY: likewise with 32 bytes.
        32..64 => unsafe { ends::<32>(dst, src, len) },
        // SAFETY: the caller vouches for the ranges.
        4096.. => unsafe { move_string(dst, src, len) },
        // SAFETY: the caller vouches for the ranges.
        _ => unsafe { dst.copy_from(src, len) },
    }
}

/// Copies by the processor's own routine, which takes whole lines of the destination without
/// reading them first.
///
/// # Safety
/// As for [`copy`].
#[inline(always)]
unsafe fn move_string(dst: *mut u8, src: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller vouches for the ranges; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rdi") dst => _,
            inout("rsi") src => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller vouches for the ranges.
    unsafe {
        dst.copy_from(src, len);
    };
}

/// Copies `len` bytes, `N..=2N` of them, as two blocks of `N` that meet or overlap.
///
/// # Safety
/// As for [`copy`], and `N <= len <= 2 * N`.
#[inline(always)]
unsafe fn ends<const N: usize>(dst: *mut u8, src: *const u8, len: usize) {
    let tail = len.wrapping_sub(N);
    // SAFETY: the first N of `len` bytes lie in both ranges.
    unsafe { dst.copy_from(src, N) };
    let (dst, src) = (dst.wrapping_add(tail), src.wrapping_add(tail));
    // SAFETY: the last N of `len` bytes lie in both ranges.
    unsafe { dst.copy_from(src, N) };
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_length_is_copied_whole_and_not_a_byte_more() {
        let source: Vec<u8> = (0..=255).cycle().take(5000).collect();
        for len in (0..300).chain([511, 512, 1372, 4096]) {
            let mut target = vec![0xee; 5002];
            // SAFETY: 4,096 bytes from index 1 lie within both vectors.
            unsafe { super::copy(target.as_mut_ptr().wrapping_add(1), source.as_ptr(), len) };
            assert_eq!(&target[1..=len], &source[..len]);
            assert_eq!(target[0], 0xee);
            assert!(target[len + 1..].iter().all(|b| *b == 0xee), "length {len}");
        }
    }
}
