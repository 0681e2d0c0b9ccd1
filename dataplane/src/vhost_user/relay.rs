//! Pipes and sockets where eventfds are usual: a thread of the session's own serves them.
//!
//! ```text
//!   call:  worker --our eventfd--> [ relay ] --write--> pipe or socket
//!   kick:  pipe or socket --read--> [ relay ] --our eventfd--> worker
//! ```
//! User-mode Linux gives pipes, as its interrupts come by SIGIO, which an eventfd does not send. But
//! whoever reads a pipe or writes to it takes a lock of its file, which the front-end may hold for as
//! long as it likes (it reads into a page that does not come), O_NONBLOCK or not. So neither a worker
//! nor the session thread ever touches such a file: they get an eventfd of ours in its place, and a
//! relay that hangs hangs alone, as does whoever closes the files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use vhost::vhost_user::message::FrontendReq;

use super::foreign::{Closing, Foreign, Stream};
use super::message::CodecError;

/// Files that wait for the relay to take them over. It is asleep or at work for microseconds, unless
/// it hangs.
const MAX_WAITING: usize = 16;

/// Read of a kick's file at once, to leave it empty: it is full of kicks that say the same.
const DRAINED_BYTES: usize = 4096;

/// Rests between two kicks by pipe or socket: what comes meanwhile is one kick. A front-end that
/// kicks without end so costs a twentieth of a core.
const KICK_PAUSE: Duration = Duration::from_micros(50);

/// A round that took longer is followed by a rest of four times as long,
const LONG: Duration = Duration::from_micros(100);
/// but no longer than this.
const MAX_REST: Duration = Duration::from_millis(100);

/// Bytes of one call, as of an eventfd: its readers take eight at a time.
const CALL: [u8; 8] = 1_u64.to_ne_bytes();

/// Why a pipe or socket can't be what it came for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// No kick, call or channel for errors or requests.
    Request,
    /// It can't be read, or not written to.
    Direction,
    /// The relay does not take it.
    Relay,
}

impl Unfit {
    pub(super) fn of(self, request: u32) -> CodecError {
        match self {
            Self::Request => CodecError::ForeignFile { request },
            Self::Direction => CodecError::Direction { request },
            Self::Relay => CodecError::Unserved { request },
        }
    }
}

/// What a file is for: the request that it came with, and the ring.
type Purpose = (u32, u64);

/// A file in the relay's care, with the eventfd that stands for it.
#[derive(Debug)]
struct Bell {
    purpose: Purpose,
    ours: OwnedFd,
    theirs: Stream,
    is_kick: bool,
}

/// A session's pipes and sockets. Dropping it has them closed by the relay.
#[derive(Debug)]
pub(super) struct Relays {
    closing: Closing,
    /// Started with the first file that needs it.
    relay: Option<Relay>,
    /// Kept open and never used: those of SET_VRING_ERR and SET_BACKEND_REQ_FD.
    kept: Vec<(Purpose, Foreign)>,
}

impl Relays {
    pub(super) fn new(closing: Closing) -> Self {
        Self {
            closing,
            relay: None,
            kept: Vec::new(),
        }
    }

    /// Takes the file of a request, whose body names the ring, and returns the eventfd that stands
    /// for it.
    ///
    /// # Errors
    /// The request takes no such file, or this one is unfit.
    pub(super) fn take(
        &mut self,
        request: u32,
        body: &[u8],
        file: Foreign,
    ) -> Result<OwnedFd, Unfit> {
        let known = FrontendReq::try_from(request);
        let index = body
            .first_chunk()
            .map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let purpose = (request, index);
        if !file.is_stream() {
            return Err(Unfit::Request);
        }
        let is_kick = match known {
            Ok(FrontendReq::SET_VRING_KICK) => true,
            Ok(FrontendReq::SET_VRING_CALL) => false,
            Ok(FrontendReq::SET_VRING_ERR | FrontendReq::SET_BACKEND_REQ_FD) => {
                self.kept.retain(|(of, _)| *of != purpose);
                self.kept.push((purpose, file));
                return event().map_err(|_| Unfit::Relay);
            }
            _ => return Err(Unfit::Request),
        };
        let theirs = file.into_stream().map_err(|_| Unfit::Request)?;
        if !theirs.serves(is_kick) {
            return Err(Unfit::Direction);
        }
        let (given, ours) = two_of_one().map_err(|_| Unfit::Relay)?;
        let relay = match &mut self.relay {
            Some(relay) => relay,
            none => none.insert(Relay::start(&self.closing).map_err(|_| Unfit::Relay)?),
        };
        let bell = Bell {
            purpose,
            ours,
            theirs,
            is_kick,
        };
        relay.serve(bell).map(|()| given)
    }
}

/// The thread, as the session knows it.
#[derive(Debug)]
struct Relay {
    bells: Sender<Bell>,
    shared: Arc<Shared>,
    closing: Closing,
}

#[derive(Debug)]
struct Shared {
    wake: OwnedFd,
    is_over: AtomicBool,
}

impl Relay {
    fn start(closing: &Closing) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            wake: event()?,
            is_over: AtomicBool::new(false),
        });
        let (bells, inbox) = bounded(MAX_WAITING);
        let (own, count) = (Arc::clone(&shared), closing.clone());
        std::thread::Builder::new()
            .name("ringway-relay".to_owned())
            .spawn(move || {
                run(&own, &inbox);
                // Files in the inbox, too, are closed here.
                drop(inbox);
                count.end();
            })?;
        Ok(Self {
            bells,
            shared,
            closing: closing.clone(),
        })
    }

    /// Serves a file, in place of what served the same purpose.
    fn serve(&self, bell: Bell) -> Result<(), Unfit> {
        let sent = self.bells.try_send(bell).map_err(|_| Unfit::Relay);
        self.shared.ring();
        sent
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.closing.begin();
        self.shared.is_over.store(true, Ordering::Relaxed);
        self.shared.ring();
    }
}

impl Shared {
    fn ring(&self) {
        // Fails if the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.wake, &CALL);
    }
}

/// Serves files until the session is over.
fn run(shared: &Shared, inbox: &Receiver<Bell>) {
    let mut bells: Vec<Bell> = Vec::new();
    loop {
        // Emptied before the inbox is, so that a file after this wakes the thread again.
        let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
        if shared.is_over.load(Ordering::Relaxed) {
            return;
        }
        for bell in inbox.try_iter() {
            bells.retain(|old| old.purpose != bell.purpose);
            bells.push(bell);
        }
        let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
        fds.extend(
            bells
                .iter()
                .map(|bell| PollFd::from_borrowed_fd(bell.waits_for(), PollFlags::IN)),
        );
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "a relay can't wait; its guest's notifications end");
                return;
            }
        }
        let is_ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let start = Instant::now();
        let mut has_kicked = false;
        let mut is_ready = is_ready.into_iter();
        bells.retain(|bell| {
            let is_ready = is_ready.next().unwrap_or(false);
            has_kicked |= is_ready && bell.is_kick;
            !is_ready || bell.pass_on()
        });
        rest(start.elapsed(), has_kicked);
    }
}

fn rest(took: Duration, has_kicked: bool) {
    let rest = if took > LONG {
        (4 * took).min(MAX_REST)
    } else if has_kicked {
        KICK_PAUSE
    } else {
        return;
    };
    std::thread::sleep(rest);
}

impl Bell {
    fn waits_for(&self) -> BorrowedFd<'_> {
        if self.is_kick {
            self.theirs.as_fd()
        } else {
            self.ours.as_fd()
        }
    }

    /// Passes on what came, and returns whether more may come.
    fn pass_on(&self) -> bool {
        if self.is_kick {
            match rustix::io::read(self.theirs.as_fd(), &mut [0; DRAINED_BYTES]) {
                // Whoever could kick is gone.
                Ok(0) => return false,
                Ok(_) => {
                    let _ = rustix::io::write(&self.ours, &CALL);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return false,
            }
            return true;
        }
        let _ = rustix::io::read(&self.ours, &mut [0; 8]);
        // What is full holds a call that is pending.
        let sent = match &self.theirs {
            Stream::Pipe(pipe) => rustix::io::write(pipe, &CALL),
            Stream::Socket(socket) => {
                rustix::net::send(socket, &CALL, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
        };
        !matches!(sent, Err(error) if error != Errno::AGAIN && error != Errno::INTR)
    }
}

impl Stream {
    /// Whether it can be read, or written to; it does not block from now on, as far as that goes.
    fn serves(&self, is_kick: bool) -> bool {
        let Ok(flags) = rustix::fs::fcntl_getfl(self.as_fd()) else {
            return false;
        };
        let unfit = if is_kick {
            OFlags::WRONLY
        } else {
            OFlags::RDONLY
        };
        flags & OFlags::ACCMODE != unfit
            && rustix::fs::fcntl_setfl(self.as_fd(), flags | OFlags::NONBLOCK).is_ok()
    }
}

fn event() -> std::io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// One eventfd, twice.
fn two_of_one() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let event = event()?;
    Ok((event.try_clone()?, event))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::event::Timespec;
    use rustix::io::{read, write};
    use rustix::pipe::pipe;

    use super::*;
    use crate::vhost_user::test_device::PATIENCE;

    const KICK: u32 = FrontendReq::SET_VRING_KICK as u32;
    const CALL_FD: u32 = FrontendReq::SET_VRING_CALL as u32;

    struct Bed {
        closing: Closing,
        relays: Relays,
    }

    impl Bed {
        fn new() -> Self {
            let closing = Closing::default();
            let relays = Relays::new(closing.clone());
            Self { closing, relays }
        }

        fn take(&mut self, request: u32, ring: u64, file: OwnedFd) -> Result<OwnedFd, Unfit> {
            let file = Foreign::new(file, &self.closing);
            self.relays.take(request, &ring.to_ne_bytes(), file)
        }
    }

    /// Waits until there is something to read, or the other end is gone.
    fn wait_for(fd: &impl AsFd) {
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        let patience = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "it comes");
    }

    fn count(event: &OwnedFd) -> u64 {
        wait_for(event);
        let mut bytes = [0; 8];
        assert_eq!(read(event, &mut bytes), Ok(8));
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn calls_arrive_in_pipes_and_sockets_eight_bytes_each() {
        let mut bed = Bed::new();
        let (reader, writer) = pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ends: [(OwnedFd, OwnedFd); 2] = [(reader, writer), (theirs.into(), ours.into())];
        for (ring, (far, near)) in (0..).zip(ends) {
            let call = bed.take(CALL_FD, ring, near).unwrap();
            for _ in 0..3 {
                write(&call, &CALL).unwrap();
                wait_for(&far);
                let mut bytes = [0; 64];
                assert_eq!(read(&far, &mut bytes), Ok(8));
                assert_eq!(bytes[..8], CALL);
            }
        }
    }

    #[test]
    fn kicks_come_from_pipes_and_sockets_and_leave_them_empty() {
        let mut bed = Bed::new();
        let (reader, writer) = pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ends: [(OwnedFd, OwnedFd); 2] = [(writer, reader), (theirs.into(), ours.into())];
        for (ring, (far, near)) in (0..).zip(ends) {
            let near_too = near.try_clone().unwrap();
            let kick = bed.take(KICK, ring, near).unwrap();
            for len in [8, 1, 4096] {
                write(&far, &vec![1; len]).unwrap();
                assert!(count(&kick) > 0);
                // More kicks than the file has room for get through, if it is emptied.
                let mut left = 1 << 20;
                while left > 0 {
                    wait_for_room(&far);
                    left -= write(&far, &[1; 4096]).unwrap().min(left);
                }
                assert!(count(&kick) > 0);
            }
            drop(near_too);
        }
    }

    fn wait_for_room(fd: &OwnedFd) {
        let mut fds = [PollFd::new(fd, PollFlags::OUT)];
        let patience = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "it is emptied");
    }

    /// What is full says that a call is pending; the front-end that makes it block hangs alone.
    #[test]
    fn a_full_pipe_is_a_pending_call_whether_it_blocks_or_not() {
        for blocks in [false, true] {
            let mut bed = Bed::new();
            let (reader, writer) = pipe().unwrap();
            let same = writer.try_clone().unwrap();
            let call = bed.take(CALL_FD, 0, writer).unwrap();
            while write(&same, &[0; 4096]).is_ok() {}
            if blocks {
                let flags = rustix::fs::fcntl_getfl(&same).unwrap();
                rustix::fs::fcntl_setfl(&same, flags - OFlags::NONBLOCK).unwrap();
            }
            drop(same);
            for _ in 0..1000 {
                write(&call, &CALL).unwrap();
            }
            let mut reader = std::fs::File::from(reader);
            let mut bytes = vec![0; 1 << 20];
            assert!(reader.read(&mut bytes).unwrap() >= 4096);
            write(&call, &CALL).unwrap();
            // The call that was pending, or that one.
            loop {
                wait_for(&reader);
                let len = reader.read(&mut bytes).unwrap();
                if bytes[..len].contains(&1) {
                    break;
                }
            }
            drop(bed.relays);
            assert_eq!(
                reader.read_to_end(&mut bytes).unwrap() % 8,
                0,
                "it was closed"
            );
            while bed.closing.is_busy() {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_file_that_comes_again_replaces_the_one_before() {
        let mut bed = Bed::new();
        for request in [CALL_FD, FrontendReq::SET_VRING_ERR as u32] {
            let (first, one) = UnixStream::pair().unwrap();
            let (_second, other) = UnixStream::pair().unwrap();
            let call = bed.take(request, 0, one.into()).unwrap();
            let _call = bed.take(request, 0, other.into()).unwrap();
            write(&call, &CALL).unwrap();
            let end = Read::read_to_end(&mut &first, &mut Vec::new());
            assert_eq!(end.unwrap(), 0, "it was closed, and nothing sent");
        }
    }

    #[test]
    fn files_that_can_not_ring_are_refused() {
        let mut bed = Bed::new();
        let (reader, writer) = pipe().unwrap();
        assert_eq!(bed.take(KICK, 0, writer).unwrap_err(), Unfit::Direction);
        assert_eq!(bed.take(CALL_FD, 0, reader).unwrap_err(), Unfit::Direction);
        for request in [KICK, FrontendReq::SET_VRING_ERR as u32] {
            let status = std::fs::File::open("/proc/self/status").unwrap();
            let refused = bed.take(request, 0, status.into());
            assert_eq!(refused.unwrap_err(), Unfit::Request);
        }
        let (socket, _peer) = UnixStream::pair().unwrap();
        let memory = FrontendReq::SET_MEM_TABLE as u32;
        assert_eq!(
            bed.take(memory, 0, socket.into()).unwrap_err(),
            Unfit::Request
        );
    }

    /// Kicks without end are passed on as few: the relay rests between them.
    #[test]
    fn a_kick_s_end_of_file_ends_its_watch() {
        let mut bed = Bed::new();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let kick = bed.take(KICK, 0, theirs.into()).unwrap();
        ours.write_all(&CALL).unwrap();
        assert!(count(&kick) > 0);
        drop(ours);
        // Others are served on, by a relay that would spin otherwise.
        let (reader, writer) = pipe().unwrap();
        let call = bed.take(CALL_FD, 1, writer).unwrap();
        write(&call, &CALL).unwrap();
        wait_for(&reader);
        assert_eq!(
            read(&kick, &mut [0; 8]),
            Err(Errno::AGAIN),
            "no kick at the end"
        );
    }
}
