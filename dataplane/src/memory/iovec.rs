//! Slices and private bytes as the kernel takes them together.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::GuestSlice;

/// Most parts of one call (UIO_MAXIOV).
const MAX_PARTS: usize = 1024;

/// Parts of a message that are written in one call, in order.
pub(crate) struct IoVecs<'a> {
    parts: [MaybeUninit<libc::iovec>; MAX_PARTS],
    /// So many of them are written.
    count: usize,
    /// There were more.
    is_too_long: bool,
    memory: PhantomData<&'a ()>,
}

impl<'a> IoVecs<'a> {
    pub(crate) fn new() -> Self {
        Self {
            parts: [const { MaybeUninit::uninit() }; MAX_PARTS],
            count: 0,
            is_too_long: false,
            memory: PhantomData,
        }
    }

    /// Appends a slice.
    pub(crate) fn push(&mut self, slice: GuestSlice<'a>) {
        self.add(slice.as_ptr(), slice.len() as usize);
    }

    /// Appends private bytes.
    pub(crate) fn push_private(&mut self, bytes: &'a [u8]) {
        self.add(bytes.as_ptr().cast_mut(), bytes.len());
    }

    fn add(&mut self, base: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        match self.parts.get_mut(self.count) {
            Some(part) => {
                part.write(libc::iovec {
                    iov_base: base.cast(),
                    iov_len: len,
                });
                self.count += 1;
            }
            None => self.is_too_long = true,
        }
    }

    /// Writes all parts to `fd` by one call, and returns how many bytes the kernel took.
    ///
    /// # Errors
    /// The kernel's answer; `EINVAL` for more parts than it takes.
    pub(crate) fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = i32::try_from(self.count).map_err(io::Error::other)?;
        if self.is_too_long {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the first `count` parts are written, and valid for reading during 'a.
        let written = unsafe { libc::writev(fd.as_raw_fd(), self.parts.as_ptr().cast(), count) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn parts_arrive_in_order_and_too_many_are_refused() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut guest = *b"from a guest";
        let mut parts = IoVecs::new();
        parts.push_private(b"ours, ");
        parts.push(GuestSlice::of(&mut guest));
        parts.push_private(b"");
        assert_eq!(parts.write_to(writer.as_fd()).unwrap(), 18);
        let mut read = [0; 18];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"ours, from a guest");
        let mut parts = IoVecs::new();
        for _ in 0..=MAX_PARTS {
            parts.push_private(b"x");
        }
        assert!(parts.write_to(writer.as_fd()).is_err());
    }
}
