//! File descriptors that are kept for clients who come when there are no others: who wants to know why
//! nothing works any more has to get in.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use ringway_dataplane::out_of_fds;

/// One for a client's connection, one for the handle by which that is closed, and one for what its
/// request opens for a moment.
const KEPT: usize = 3;

/// Descriptors that are open for nothing but their numbers.
#[derive(Debug, Default)]
pub(super) struct Reserve(Vec<OwnedFd>);

impl Reserve {
    /// Keeps what there is to keep, as duplicates of `any`.
    pub(super) fn fill(&mut self, any: BorrowedFd<'_>) {
        while self.0.len() < KEPT {
            match any.try_clone_to_owned() {
                Ok(fd) => self.0.push(fd),
                // It is filled again before the next client.
                Err(_) => return,
            }
        }
    }

    /// What `open` opens, in the place of the reserve if there are no other descriptors.
    pub(super) fn open<T>(&mut self, open: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match open() {
            Err(error) if out_of_fds(&error).is_some() && !self.0.is_empty() => {
                self.0.clear();
                open()
            }
            opened => opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::os::fd::AsFd;

    use rustix::io::Errno;

    use super::*;

    #[test]
    fn it_is_given_up_once_and_only_for_want_of_descriptors() {
        let stdin = io::stdin();
        let mut reserve = Reserve::default();
        reserve.fill(stdin.as_fd());
        assert_eq!(reserve.0.len(), KEPT);
        let tries = Cell::new(0);
        let fail = |reserve: &mut Reserve, error: Errno| {
            tries.set(0);
            let opened = reserve.open(|| {
                tries.set(tries.get() + 1);
                Err::<(), _>(error.into())
            });
            assert!(opened.is_err());
            (tries.get(), reserve.0.len())
        };
        assert_eq!(fail(&mut reserve, Errno::CONNABORTED), (1, KEPT));
        assert_eq!(fail(&mut reserve, Errno::MFILE), (2, 0));
        assert_eq!(
            fail(&mut reserve, Errno::MFILE),
            (1, 0),
            "nothing is left to give up"
        );
        reserve.fill(stdin.as_fd());
        assert_eq!(reserve.0.len(), KEPT);
    }
}
