//! An AF_XDP port: queues of a NIC or veth, one socket each, past the kernel's network stack.
//!
//! ```text
//!                 XDP program                 worker
//!   NIC queue n ---redirect---> receive ring ---------> burst ---> guests (the one copy)
//!        ^       +- pass -> kernel  fill ring <-- chunks back
//!        |
//!        +----------------- transmit ring <-- one copy into a chunk, one call per burst
//!                            completion ring --> free chunks
//! ```
//! In copy mode the transmit ring is that of a socket of its own, which shares the others (ADR 9).
//! Each queue has a UMEM of its own, so that queues share nothing. Its receiving half is used by
//! the worker that polls the queue, its transmitting half by all that send to it; each half has a
//! [`BurstLock`], tried once per burst.
#![allow(unsafe_code, reason = "rings and memory that the kernel shares")]

mod features;
mod interface;
mod open;
mod program;
mod receive;
mod transmit;
mod umem;

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, MutexGuard};

pub(crate) use transmit::Transmitter;

use ringway_api::{AfXdpConfig, AfXdpInfo, AfXdpQueueInfo, QueueInfo, XdpMode};

use self::interface::Interface;
use self::program::Program;
use self::receive::Receiver;
use super::counters::Counter;
use super::vhost::choose_receiver;
use super::{LinkBase, QueueCounters};
use crate::burst_lock::BurstLock;
use crate::link::Attachment;
use crate::wire::Offloads;

/// Longest L3 MTU: what common NICs carry in several buffers.
pub(crate) const MAX_MTU: u32 = 9000;

/// One queue of the interface.
#[derive(Debug)]
pub(crate) struct AfXdpQueue {
    /// The receiving socket, which both halves keep open.
    fd: RawFd,
    /// Entries of each of its four rings.
    ring_size: u32,
    receiver: BurstLock<Receiver>,
    transmitter: BurstLock<Transmitter>,
    pub(crate) rx: QueueCounters,
    pub(crate) tx: QueueCounters,
    /// Received frames that travel on as part of the one before.
    pub(crate) merged: Counter,
}

/// Queues of an interface; without any, one that is waited for.
#[derive(Debug)]
pub(crate) struct AfXdpPort {
    pub(crate) link: Arc<LinkBase>,
    // Dropped in this order: no frame is redirected any more when the sockets are closed.
    hold: Option<Hold>,
    queues: Box<[AfXdpQueue]>,
    mode: XdpMode,
    has_several_chunks: bool,
    /// What frames from the interface may ask for.
    sends: Offloads,
    umem_bytes: u64,
    is_huge: bool,
    /// The MTU that frames to the interface are held to.
    mtu: u16,
}

/// What holds an interface.
#[derive(Debug)]
struct Hold {
    program: Program,
    interface: Interface,
    /// Has the NIC receive frames for all addresses as long as it is open.
    _receives_all: OwnedFd,
    /// What it was opened with.
    attachment: Attachment,
}

impl AfXdpPort {
    /// The port of an interface that is waited for, if it is one to be waited for.
    pub(crate) fn wait_for(link: Arc<LinkBase>, config: &AfXdpConfig) -> Option<Self> {
        Self::absence(config).map(|_| Self::waiting(link))
    }

    /// The same port with nothing open.
    pub(crate) fn detached(&self) -> Self {
        Self::waiting(Arc::clone(&self.link))
    }

    fn waiting(link: Arc<LinkBase>) -> Self {
        Self {
            link,
            hold: None,
            queues: Box::default(),
            mode: XdpMode::Auto,
            has_several_chunks: false,
            sends: Offloads::NONE,
            umem_bytes: 0,
            is_huge: false,
            mtu: 0,
        }
    }

    /// What is open.
    pub(crate) fn attachment(&self) -> Option<Attachment> {
        self.hold.as_ref().map(|hold| hold.attachment.clone())
    }

    /// Queues that the interface has now, if it tells.
    pub(crate) fn channels(&self) -> Option<u16> {
        self.hold.as_ref()?.interface.channels()
    }

    pub(crate) fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// What frames from the interface may ask for.
    pub(crate) fn sends(&self) -> Offloads {
        self.sends
    }

    /// The MTU that frames to the interface are held to.
    pub(crate) fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Received frames that travelled on as part of the one before.
    pub(crate) fn merged(&self) -> u64 {
        self.queues.iter().map(|queue| queue.merged.get()).sum()
    }

    pub(crate) fn queue(&self, pair: u16) -> &AfXdpQueue {
        &self.queues[usize::from(pair)]
    }

    /// The queue for frames of a source's queue, so that a flow stays in one. `owned` has a bit for
    /// each queue that the worker polls which asks.
    #[inline]
    pub(crate) fn transmit_queue(&self, source_queue: u16, owned: u64) -> u16 {
        let all = u64::MAX >> (64 - u32::from(self.pairs()).clamp(1, 64));
        let chosen = choose_receiver(all, owned, source_queue);
        chosen
            .and_then(|pair| u16::try_from(pair).ok())
            .unwrap_or(0)
    }

    pub(crate) fn queue_info(&self, pair: u16, worker: u16) -> QueueInfo {
        let queue = self.queue(pair);
        let ring_size = u16::try_from(queue.ring_size).unwrap_or(u16::MAX);
        QueueInfo {
            index: pair,
            rx_started: true,
            tx_started: true,
            enabled: true,
            rx_size: ring_size,
            tx_size: ring_size,
            worker,
            rx_frames: queue.rx.frames.get(),
            tx_frames: queue.tx.frames.get(),
            calls: 0,
            contended: queue.rx.contended.get() + queue.tx.contended.get(),
            rx_resumed: false,
            tx_resumed: false,
            tolerated: 0,
        }
    }

    /// All that only a port of this kind has, while its interface is open.
    pub(crate) fn info(&self) -> Option<AfXdpInfo> {
        let hold = self.hold.as_ref()?;
        Some(AfXdpInfo {
            mode: self.mode,
            program_id: hold.program.id(),
            multi_buffer: self.has_several_chunks,
            umem_bytes: self.umem_bytes,
            huge_pages: self.is_huge,
            queues: (0..)
                .zip(&self.queues)
                .map(|(index, queue)| queue.info(index))
                .collect(),
        })
    }
}

impl AfXdpQueue {
    /// The receiving socket's fd, to wait for frames.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: both halves keep the socket open and live as long as the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }

    /// The transmitting half for one burst, or `None` if somebody else has it.
    #[inline]
    pub(crate) fn try_transmitter(&self) -> Option<MutexGuard<'_, Transmitter>> {
        self.transmitter.try_lock()
    }

    fn info(&self, index: u16) -> AfXdpQueueInfo {
        let mut receiver = self.receiver.lock();
        let (fill_level, rx_level) = receiver.levels(self.ring_size);
        let received = receiver.statistics();
        drop(receiver);
        let mut transmitter = self.transmitter.lock();
        let (tx_level, tx_pending) = transmitter.levels();
        let sent = transmitter.statistics();
        drop(transmitter);
        let count = |read: fn(&xsk_rs::socket::XdpStatistics) -> u64| {
            received.as_ref().map(read).unwrap_or_default()
        };
        AfXdpQueueInfo {
            index,
            ring_size: self.ring_size,
            fill_level,
            rx_level,
            tx_level,
            tx_pending,
            rx_ring_full: count(|s| s.rx_ring_full()),
            rx_fill_empty: count(|s| s.rx_fill_ring_empty_descs()),
            rx_dropped: count(|s| s.rx_dropped()),
            rx_invalid: count(|s| s.rx_invalid_descs()),
            tx_invalid: sent.map_or(0, |s| s.tx_invalid_descs()),
        }
    }
}

impl AfXdpQueue {
    fn new(receiver: Receiver, transmitter: Transmitter, fd: RawFd, ring_size: u32) -> Self {
        Self {
            fd,
            ring_size,
            receiver: BurstLock::new(receiver),
            transmitter: BurstLock::new(transmitter),
            rx: QueueCounters::default(),
            tx: QueueCounters::default(),
            merged: Counter::default(),
        }
    }
}
