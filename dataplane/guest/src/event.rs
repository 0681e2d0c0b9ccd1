//! Eventfds for kicks and calls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// An eventfd: signals add up until they are taken.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one with no signal pending.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Adds one signal. A counter that is full stays so: it is readable already.
    ///
    /// # Errors
    /// The descriptor is unusable.
    pub fn signal(&self) -> io::Result<()> {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes all signals and returns how many there were.
    ///
    /// # Errors
    /// The descriptor is unusable.
    pub fn take(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Waits until a signal is pending, without taking it; false after `timeout`.
    ///
    /// # Errors
    /// The descriptor is unusable, or a signal interrupted the wait.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        Ok(wait_any(&[self], timeout)?.is_some())
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of these has a signal pending and returns its position; `None` after
/// `timeout`.
///
/// # Errors
/// A descriptor is unusable, or a signal interrupted the wait.
pub fn wait_any(events: &[&EventFd], timeout: Duration) -> io::Result<Option<usize>> {
    let mut fds: Vec<PollFd<'_>> = events
        .iter()
        .map(|event| PollFd::new(*event, PollFlags::IN))
        .collect();
    let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
    poll(&mut fds, Some(&timeout))?;
    Ok(fds
        .iter()
        .position(|fd| fd.revents().contains(PollFlags::IN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_add_up_and_are_taken_once() {
        let event = EventFd::new().unwrap();
        assert!(!event.wait(Duration::ZERO).unwrap());
        event.signal().unwrap();
        event.signal().unwrap();
        assert!(event.wait(Duration::ZERO).unwrap());
        assert_eq!(event.take().unwrap(), 2);
        assert_eq!(event.take().unwrap(), 0);
        let other = EventFd::new().unwrap();
        other.signal().unwrap();
        assert_eq!(
            wait_any(&[&event, &other], Duration::ZERO).unwrap(),
            Some(1)
        );
    }
}
