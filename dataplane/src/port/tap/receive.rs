//! The receive side of a tap: one read a frame, into memory of the switch's own.

use std::os::fd::BorrowedFd;
use std::sync::MutexGuard;

use ringway_bridge::MAX_BURST;
use rustix::io::Errno;
use tracing::warn;

use super::TapPort;
use crate::burst::Burst;
use crate::memory::GuestSlice;
use crate::port::{Gathered, QueueCounters, RxQueue, Unavailable};
use crate::wire::Offloads;
use crate::wire::net_header::{HEADER_BYTES, MAX_FRAME_BYTES};

/// Bytes of a read buffer: the longest frame and its header.
const BUFFER_BYTES: usize = (HEADER_BYTES + MAX_FRAME_BYTES) as usize;

/// Frames read in one turn: enough to fill a burst for guests, few enough that 64 KiB each stay
/// below 1 MiB a queue.
const READS_PER_TURN: usize = 16;

/// Reads one queue of a tap. A frame that could not be delivered yet stays in its buffer and is
/// taken again.
#[derive(Debug)]
pub(super) struct TapReader {
    /// [`READS_PER_TURN`] buffers; their pages are touched as frames fill them.
    buffers: Vec<u8>,
    lens: [u32; READS_PER_TURN],
    /// Frames that were read and are still to be taken.
    kept: std::ops::Range<usize>,
}

impl TapReader {
    pub(super) fn new() -> Self {
        const { assert!(READS_PER_TURN <= MAX_BURST) };
        Self {
            buffers: vec![0; READS_PER_TURN * BUFFER_BYTES],
            lens: [0; READS_PER_TURN],
            kept: 0..0,
        }
    }

    /// Takes the frames that were kept, or reads new ones until there is none.
    ///
    /// # Errors
    /// The interface is gone (EBADFD) or broken; being down (EIO) counts as silence.
    fn gather<'m>(&'m mut self, fd: BorrowedFd<'_>, burst: &mut Burst<'m>) -> Result<(), Errno> {
        if self.kept.is_empty() {
            self.kept = 0..0;
            for slot in 0..READS_PER_TURN {
                let from = slot * BUFFER_BYTES;
                let buffer = &mut self.buffers[from..from + BUFFER_BYTES];
                match rustix::io::read(fd, buffer) {
                    Ok(bytes) => self.lens[slot] = u32::try_from(bytes).unwrap_or(0),
                    Err(Errno::AGAIN | Errno::IO | Errno::INTR) => break,
                    Err(error) if self.kept.is_empty() => return Err(error),
                    Err(_) => break,
                }
                self.kept.end = slot + 1;
            }
        }
        let slots = self.buffers.chunks_exact_mut(BUFFER_BYTES).zip(self.lens);
        for (buffer, len) in slots.take(self.kept.end).skip(self.kept.start) {
            if !burst.push_whole(GuestSlice::of(buffer).first(len)) {
                break;
            }
            self.kept.start += 1;
        }
        Ok(())
    }

    /// Keeps the last `count` frames of the last burst for the next.
    fn give_back(&mut self, count: usize) {
        self.kept.start -= count;
    }
}

/// A queue of a tap, in a worker's hands for one burst.
#[derive(Debug)]
pub(crate) struct TapRx<'a> {
    port: &'a TapPort,
    pair: u16,
    reader: MutexGuard<'a, TapReader>,
}

impl TapPort {
    /// A queue for one burst.
    ///
    /// # Errors
    /// It is in other hands.
    #[inline]
    pub(crate) fn rx(&self, pair: u16) -> Result<TapRx<'_>, Unavailable> {
        let reader = self.readers[usize::from(pair)].try_lock();
        let reader = reader.ok_or(Unavailable::Busy)?;
        Ok(TapRx {
            port: self,
            pair,
            reader,
        })
    }
}

impl RxQueue for TapRx<'_> {
    type Completion<'m>
        = ()
    where
        Self: 'm;

    fn counters(&self) -> &QueueCounters {
        self.port.queue_counters(self.pair).0
    }

    /// A burst has as many frames as there are buffers, whatever the limit.
    fn gather<'m>(
        &'m mut self,
        _: usize,
        burst: &mut Burst<'m>,
        _: impl Fn(&[u8]) -> Offloads,
    ) -> Gathered<()> {
        match self.reader.gather(self.port.fd(self.pair), burst) {
            Ok(()) if burst.len() == 0 => Gathered::Nothing,
            Ok(()) => Gathered::Frames {
                header_bytes: HEADER_BYTES,
                allowed: self.port.offloads().with(Offloads::VOUCHES),
                is_enabled: true,
                completion: (),
            },
            Err(error) => {
                let (port, queue) = (&self.port.link.base.name, self.pair);
                warn!(%port, queue, "tap queue failed: {error}");
                Gathered::Stopped
            }
        }
    }

    fn finish(&mut self, _taken: usize, kept: usize) {
        self.reader.give_back(kept);
    }

    /// The fd is always watched, and the last read found nothing: the next frame is an event.
    fn arm(&mut self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::burst::BurstStorage;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::os::fd::AsFd;

    // A pipe of packets stands for the tap: one write is one read.
    #[test]
    fn frames_that_are_given_back_come_again_before_others_are_read() {
        let (tap, host) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::DIRECT).unwrap();
        let send = |number: u8| {
            let bytes = [[0; 12].as_slice(), &[number; 60]].concat();
            assert_eq!(rustix::io::write(&host, &bytes).unwrap(), 72);
        };
        let mut reader = TapReader::new();
        let mut storage = BurstStorage::new();
        let mut gather = |reader: &mut TapReader| {
            let mut burst = storage.begin();
            reader.gather(tap.as_fd(), &mut burst).unwrap();
            burst.take_snapshots(HEADER_BYTES, Offloads::NONE);
            let number = |index| burst.snapshot(index)[HEADER_BYTES as usize];
            (0..burst.len()).map(number).collect::<Vec<_>>()
        };
        assert!(gather(&mut reader).is_empty());
        (0..16).for_each(send);
        let first: Vec<_> = (0..16).collect();
        assert_eq!(gather(&mut reader), first);
        (16..20).for_each(send);
        reader.give_back(2);
        assert_eq!(gather(&mut reader), [14, 15]);
        reader.give_back(1);
        assert_eq!(gather(&mut reader), [15]);
        reader.give_back(0);
        assert_eq!(gather(&mut reader), [16, 17, 18, 19]);
        assert!(gather(&mut reader).is_empty());
    }

    #[test]
    fn an_interface_that_is_gone_is_told_apart_from_one_that_is_silent() {
        let (_, host) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let (mut reader, mut storage) = (TapReader::new(), BurstStorage::new());
        let mut burst = storage.begin();
        // The writing end can't be read.
        assert_eq!(reader.gather(host.as_fd(), &mut burst), Err(Errno::BADF));
        assert_eq!(burst.len(), 0);
    }
}
