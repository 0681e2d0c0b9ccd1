//! A guest of the load: a front-end whose buffers stay where they are.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringway_guest::features::{
    TSO, VIRTIO_F_IN_ORDER, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_HOST_TSO4,
};
use ringway_guest::{
    FixedPair, FixedQueue, FixedSlots, Frontend, Guest, GuestBuilder, GuestError, Layout, UsedSlot,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::by_hand::HandRing;
use super::error::LoadError;
use super::frame::{MAX_PLAIN, Template};
use crate::interrupt;

/// Slots made available or taken back at once; peers use bursts of 32.
pub(crate) const BURST: usize = 64;
/// Fewer slots than this wait for company, unless nothing else is going on.
const WORTH_A_PUSH: u16 = 32;

/// Bytes of a mergeable receive buffer.
const MERGE_BUFFER: u32 = 2048;

/// How long a back-end may take to answer a request.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks whether the run is to end.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// How the guests of a load drive their rings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GuestShape {
    pub(crate) layout: Layout,
    pub(crate) mergeable: bool,
    pub(crate) in_order: bool,
    pub(crate) event_idx: bool,
    /// The virtio-net header has a buffer of its own.
    pub(crate) chained: bool,
    /// The two buffers of a chain lie in an indirect table.
    pub(crate) indirect: bool,
    /// Segmentation offload, also if no frame needs it.
    pub(crate) tso: bool,
    /// Checksum offload.
    pub(crate) checksum: bool,
    pub(crate) queue_size: u16,
    pub(crate) queues: u16,
    pub(crate) huge: bool,
}

impl GuestShape {
    /// A guest that needs what the shape tells, and takes what else is useful and offered.
    fn builder(self, segmented: bool) -> GuestBuilder {
        const CHECKSUM: u64 = VIRTIO_NET_F_CSUM | VIRTIO_NET_F_GUEST_CSUM;
        let (needed, useful) = match (segmented || self.tso, self.checksum) {
            (true, _) => (
                CHECKSUM | VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_GUEST_TSO4,
                TSO,
            ),
            (false, true) => (CHECKSUM, 0),
            (false, false) => (0, 0),
        };
        let in_order = if self.in_order { VIRTIO_F_IN_ORDER } else { 0 };
        Guest::builder()
            .layout(self.layout)
            .mergeable(self.mergeable)
            .event_idx(self.event_idx)
            .indirect(self.indirect)
            .queue_pairs(self.queues)
            .features(needed)
            .optional(useful | in_order)
            .huge(self.huge)
            .reply_timeout(REPLY_TIMEOUT)
    }

    /// Chains that a ring holds.
    pub(crate) fn slots(self) -> u16 {
        let entries_of_chain = if self.chained && !self.indirect { 2 } else { 1 };
        self.queue_size / entries_of_chain
    }

    /// What the slots of the receive rings and of the transmit rings look like.
    fn fixed_slots(self, frames: &[Template]) -> [FixedSlots; 2] {
        let slots = |lens| FixedSlots {
            entries: self.queue_size,
            lens,
            header_apart: self.chained,
        };
        [
            slots(vec![receive_buffer(self.mergeable, frames)]),
            slots(frames.iter().map(Template::len).collect()),
        ]
    }

    /// Bytes of memory that a guest needs.
    pub(crate) fn memory_bytes(self, frames: &[Template]) -> u64 {
        let pair: u64 = self
            .fixed_slots(frames)
            .iter()
            .map(FixedSlots::ring_bytes)
            .sum();
        pair * u64::from(self.queues)
    }
}

/// What a queue pair did in one turn.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PairTurn {
    /// Frames whose last buffer arrived.
    pub(crate) received: u64,
    /// Bytes that arrived, virtio-net headers included.
    pub(crate) bytes: u64,
    /// Frames made available.
    pub(crate) sent: u64,
}

impl std::ops::AddAssign for PairTurn {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.received += other.received;
        self.bytes += other.bytes;
        self.sent += other.sent;
    }
}

/// A queue pair of a load's guest.
#[derive(Debug)]
pub(crate) struct LoadPair {
    pub(crate) tx: FixedQueue,
    pub(crate) rx: FixedQueue,
    /// Bytes of a receive buffer.
    rx_len: u32,
    /// What arrived of a frame whose last buffer did not.
    partial: Vec<u8>,
    /// The beginning of the frame that is arriving was not looked at.
    headless: bool,
}

impl LoadPair {
    fn new(FixedPair { rx, tx }: FixedPair, rx_len: u32, frames: &[Template], flows: u16) -> Self {
        for (slot, template) in (0..tx.ring.slots()).zip(frames.iter().cycle()) {
            let frame = template.for_flow(slot % flows.max(1));
            tx.buffers.write(slot, 0, &frame);
        }
        Self {
            tx,
            rx,
            rx_len,
            partial: Vec::new(),
            headless: false,
        }
    }

    /// Gives received buffers back, if there are enough or `all`.
    #[inline]
    pub(crate) fn recycle(&mut self, all: bool) -> Result<(), LoadError> {
        if all || self.rx.ring.free() >= WORTH_A_PUSH {
            self.rx.offer(u16::MAX)?;
        }
        Ok(())
    }

    /// Takes what arrived, gives the buffers back and refills the transmit ring; frames are not
    /// looked at.
    #[inline]
    pub(crate) fn turn(&mut self) -> Result<PairTurn, LoadError> {
        let taken = self.take()?;
        Ok(PairTurn {
            sent: self.refill()?,
            ..taken
        })
    }

    /// Takes what arrived and gives the buffers back; frames are not looked at.
    #[inline]
    pub(crate) fn take(&mut self) -> Result<PairTurn, LoadError> {
        let mut turn = PairTurn::default();
        let mut used = [UsedSlot::default(); BURST];
        let count = self.rx.ring.harvest(&mut used)?;
        for slot in &used[..count] {
            turn.bytes += u64::from(slot.len);
            turn.received += u64::from(slot.len < self.rx_len);
        }
        if let Some(last) = used[..count].last() {
            self.headless = last.len >= self.rx_len;
        }
        self.recycle(count == 0)?;
        Ok(turn)
    }

    /// Refills the transmit ring. Returns how many frames were offered.
    #[inline]
    pub(crate) fn refill(&mut self) -> Result<u64, LoadError> {
        let reclaimed = self.tx.ring.reclaim()?;
        if self.tx.ring.free() >= WORTH_A_PUSH || reclaimed == 0 {
            return Ok(self.tx.offer(u16::MAX)?.into());
        }
        Ok(0)
    }

    /// Takes frames that arrived and shows the beginning of each, header in front, at most
    /// `head.len()` bytes. `each` gets zeros where the first buffer ends before that.
    pub(crate) fn peek(
        &mut self,
        head: &mut [u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<PairTurn, LoadError> {
        let mut turn = PairTurn::default();
        let mut used = [UsedSlot::default(); BURST];
        let count = self.rx.ring.harvest(&mut used)?;
        let mut inside = self.headless || !self.partial.is_empty();
        for slot in &used[..count] {
            if !inside {
                let len = (slot.len as usize).min(head.len());
                self.rx.buffers.read(slot.slot, 0, &mut head[..len]);
                head[len..].fill(0);
                each(head);
            }
            inside = slot.len >= self.rx_len;
            turn.received += u64::from(!inside);
            turn.bytes += u64::from(slot.len);
        }
        self.partial.clear();
        self.headless = inside;
        self.recycle(count == 0)?;
        Ok(turn)
    }

    /// Takes frames that arrived, header in front of each, joined from their buffers.
    pub(crate) fn receive(&mut self, mut each: impl FnMut(&[u8])) -> Result<usize, LoadError> {
        let mut used = [UsedSlot::default(); BURST];
        let count = self.rx.ring.harvest(&mut used)?;
        let mut frames = 0;
        if self.headless {
            self.partial.clear();
        }
        for slot in &used[..count] {
            let start = self.partial.len();
            self.partial.resize(start + slot.len as usize, 0);
            self.rx
                .buffers
                .read(slot.slot, 0, &mut self.partial[start..]);
            if slot.len < self.rx_len {
                if !std::mem::take(&mut self.headless) {
                    each(&self.partial);
                }
                self.partial.clear();
                frames += 1;
            }
        }
        self.recycle(count == 0)?;
        Ok(frames)
    }
}

/// Bytes of a receive buffer for frames of this size.
pub(crate) fn receive_buffer_bytes(shape: GuestShape, frame: u32) -> u32 {
    if shape.mergeable {
        MERGE_BUFFER
    } else {
        frame + 64
    }
}

/// Bytes of a receive buffer such that the last buffer of every frame is not full: that tells
/// frames apart without a look at their headers.
fn receive_buffer(mergeable: bool, frames: &[Template]) -> u32 {
    if !mergeable {
        return frames.iter().map(Template::len).max().unwrap_or(0) + 64;
    }
    let full = |size: u32| frames.iter().any(|frame| frame.len() % size == 0);
    (0..)
        .map(|step| MERGE_BUFFER - 4 * step)
        .find(|size| !full(*size))
        .unwrap_or(MERGE_BUFFER)
}

/// A socket at which a guest waits for its back-end; its file goes with it.
#[derive(Debug)]
pub(crate) struct GuestListener {
    socket: UnixListener,
    path: PathBuf,
}

impl GuestListener {
    /// Listens in place of whoever did before.
    pub(crate) fn bind(path: &Path) -> Result<Self, LoadError> {
        let _ = std::fs::remove_file(path);
        let socket = UnixListener::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
        })
    }

    /// Waits for the back-end.
    pub(crate) fn accept(&self) -> Result<Frontend, LoadError> {
        let deadline = Instant::now() + REPLY_TIMEOUT;
        while Instant::now() < deadline {
            match self.socket.accept() {
                Ok((socket, _)) => {
                    socket.set_nonblocking(false)?;
                    return Ok(Frontend::new(socket));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
                    interrupt::check()?;
                    // A signal ends it early, which the next look finds.
                    let _ = poll(&mut fds, Some(&LOOK));
                }
                Err(e) => return Err(e.into()),
            }
        }
        Err(LoadError::NotConnected(REPLY_TIMEOUT))
    }
}

impl Drop for GuestListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A guest of the load.
#[derive(Debug)]
pub(crate) struct LoadGuest {
    frontend: Frontend,
    pub(crate) pairs: Vec<LoadPair>,
    pub(crate) in_order: bool,
}

impl LoadGuest {
    /// Starts all queues of a session in which nothing was said yet, with these frames ready to be
    /// sent.
    pub(crate) fn start(
        frontend: Frontend,
        shape: GuestShape,
        frames: &[Template],
        flows: u16,
    ) -> Result<Self, LoadError> {
        let segmented = frames.iter().any(|frame| frame.len() > MAX_PLAIN + 12);
        let slots = shape.fixed_slots(frames);
        let rx_len = slots[0].lens[0];
        let guest = shape.builder(segmented).start_fixed(frontend, &slots)?;
        let pair = |pair| LoadPair::new(pair, rx_len, frames, flows);
        Ok(Self {
            frontend: guest.frontend,
            in_order: guest.features & VIRTIO_F_IN_ORDER != 0,
            pairs: guest.pairs.into_iter().map(pair).collect(),
        })
    }

    /// A guest without a back-end, and the devices' sides of its receive and transmit rings, by
    /// queue pair. Frames and buffers are in one piece.
    pub(crate) fn without_switch(
        shape: GuestShape,
        frames: &[Template],
        flows: u16,
    ) -> Result<(Self, Vec<[HandRing; 2]>, UnixStream), LoadError> {
        let shape = GuestShape {
            chained: false,
            indirect: false,
            ..shape
        };
        let segmented = frames.iter().any(|frame| frame.len() > MAX_PLAIN + 12);
        let slots = shape.fixed_slots(frames);
        let rx_len = slots[0].lens[0];
        let rings = shape.builder(segmented).fixed_rings(&slots)?;
        let side = |queue: &FixedQueue| {
            HandRing::new(&rings.memory, shape.layout, queue.ring.place()).map_err(GuestError::from)
        };
        let sides = rings.pairs.iter();
        let sides: Vec<_> = sides
            .map(|pair| Ok([side(&pair.rx)?, side(&pair.tx)?]))
            .collect::<Result<_, GuestError>>()?;
        let (socket, other_end) = UnixStream::pair()?;
        let pair = |pair| LoadPair::new(pair, rx_len, frames, flows);
        let guest = Self {
            frontend: Frontend::new(socket),
            in_order: shape.in_order,
            pairs: rings.pairs.into_iter().map(pair).collect(),
        };
        Ok((guest, sides, other_end))
    }

    /// Fails once the back-end has gone.
    pub(crate) fn check_alive(&self) -> Result<(), LoadError> {
        let mut fds = [PollFd::new(self.frontend.socket(), PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec::default())).map_err(io::Error::from)?;
        if fds[0].revents().is_empty() {
            Ok(())
        } else {
            Err(LoadError::Closed)
        }
    }
}

#[cfg(test)]
mod tests {
    use ringway_guest::features::{
        VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF,
    };

    use super::super::frame::{Route, Style, guest_mac};
    use super::*;

    #[test]
    fn the_last_receive_buffer_of_a_frame_is_never_full() {
        let route = Route {
            from: guest_mac(0),
            to: guest_mac(1),
        };
        let style = Style::default();
        for size in (60..9000).step_by(4) {
            let frames = [
                Template::new(route, size, style),
                Template::new(route, 65_000, style),
            ];
            for mergeable in [true, false] {
                let buffer = receive_buffer(mergeable, &frames);
                assert!(frames.iter().all(|frame| frame.len() % buffer != 0));
            }
        }
    }

    #[test]
    fn features_that_are_needed_and_not_offered_are_named() {
        let shape = GuestShape {
            layout: Layout::Packed,
            mergeable: true,
            in_order: true,
            event_idx: false,
            chained: false,
            indirect: false,
            tso: false,
            checksum: false,
            queue_size: 256,
            queues: 1,
            huge: false,
        };
        let choose = |offered, tso| shape.builder(tso).choose_features(offered);
        let offered = VIRTIO_F_VERSION_1 | VIRTIO_NET_F_MRG_RXBUF;
        let error = choose(offered, false).unwrap_err().to_string();
        assert!(
            error.ends_with("does not offer VIRTIO_F_RING_PACKED"),
            "{error}"
        );
        let offered = offered | VIRTIO_F_RING_PACKED;
        assert_eq!(choose(offered, false).unwrap(), offered);
        let error = choose(offered, true).unwrap_err().to_string();
        assert!(error.contains("VIRTIO_NET_F_HOST_TSO4"), "{error}");
        let all = offered | TSO;
        assert_eq!(choose(all, true).unwrap(), all);
    }
}
