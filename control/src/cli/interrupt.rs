//! Commands that end by Ctrl-C rather than break off.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::Stop;

/// SIGINT and SIGTERM, as something to wait for.
pub(super) struct Interrupt {
    pipe: UnixStream,
}

impl Interrupt {
    pub(super) fn new() -> Result<Self, Stop> {
        let make = || -> io::Result<UnixStream> {
            let (pipe, writer) = UnixStream::pair()?;
            signal_hook::low_level::pipe::register(SIGINT, writer.try_clone()?)?;
            signal_hook::low_level::pipe::register(SIGTERM, writer)?;
            Ok(pipe)
        };
        let pipe = make().map_err(|error| Stop::local(&error))?;
        Ok(Self { pipe })
    }

    /// Readable once a signal came.
    pub(super) fn pipe(&self) -> &UnixStream {
        &self.pipe
    }

    /// Waits until `due`; true if a signal came first.
    pub(super) fn wait_until(&self, due: Instant) -> Result<bool, Stop> {
        loop {
            let left = due.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left.min(Duration::from_secs(3600)))
                .map_err(|error| Stop::local(&io::Error::other(error)))?;
            let mut fds = [PollFd::new(&self.pipe, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) if Instant::now() >= due => return Ok(false),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(Stop::local(&error.into())),
            }
        }
    }
}
