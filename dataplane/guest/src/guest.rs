//! A guest for tests: a front-end with queue pairs whose receive buffers are posted.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::builder::GuestBuilder;
use super::event::{EventFd, wait_any};
use super::features::names;
use super::frontend::{Frontend, FrontendError};
use super::memory::{DriverMemory, DriverMemoryError};
use super::pair::{GuestRxQueue, GuestTxQueue};
use super::queue::{AddError, DeviceFault, DriverRing, RingSetupError};
use super::session::RingSetup;

/// Bytes of the header in front of every frame (virtio 1.3, 5.1.6, with num_buffers).
pub const NET_HEADER_BYTES: usize = 12;

/// Longest indirect table that a guest uses: a 64 KiB frame in 2 KiB buffers and its header.
const INDIRECT_BUFFERS: u16 = 40;

/// How long [`Guest::send`] waits for room before it gives up.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

/// Why a guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The session failed.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// Memory is short.
    #[error(transparent)]
    Memory(#[from] DriverMemoryError),
    /// A ring can't be made.
    #[error(transparent)]
    Ring(#[from] RingSetupError),
    /// A frame can't be sent.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The device broke a rule.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// An eventfd or the socket is unusable.
    #[error("waiting for the device: {0}")]
    Wait(#[from] io::Error),
    /// The back-end doesn't offer what the guest needs.
    #[error("the back-end does not offer {}", names(*missing))]
    NotOffered {
        /// The features that are missing.
        missing: u64,
    },
    /// The back-end has fewer queue pairs.
    #[error("the back-end has {offered} queue pairs, not {wanted}")]
    QueuePairs {
        /// What it offers.
        offered: u64,
        /// What the guest wants.
        wanted: u16,
    },
    /// A frame arrived that is shorter than its header, or in more buffers than there are.
    #[error("a frame arrived in {buffers} buffers, the first with {len} bytes")]
    BadReceive {
        /// num_buffers of its header.
        buffers: u16,
        /// Bytes of the first buffer.
        len: u32,
    },
    /// The device took no frame for seconds.
    #[error("no room in the transmit ring of queue pair {pair} for {waited:?}")]
    Stuck {
        /// The queue pair.
        pair: u16,
        /// How long.
        waited: Duration,
    },
}

/// A frame that the guest received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivedFrame {
    /// Queue pair on which it came.
    pub pair: u16,
    /// The virtio-net header.
    pub header: [u8; NET_HEADER_BYTES],
    /// The frame without it.
    pub frame: Vec<u8>,
}

impl ReceivedFrame {
    /// num_buffers of the header.
    pub fn num_buffers(&self) -> u16 {
        u16::from_le_bytes([self.header[10], self.header[11]])
    }
}

/// A guest that is connected to a back-end.
#[derive(Debug)]
pub struct Guest {
    frontend: Frontend,
    features: u64,
    memory: Arc<DriverMemory>,
    receive: Vec<GuestRxQueue>,
    transmit: Vec<GuestTxQueue>,
}

impl Guest {
    /// A guest of one queue pair of 256 entries, with mergeable buffers of 2 KiB, indirect tables
    /// and events by index.
    pub fn builder() -> GuestBuilder {
        GuestBuilder::default()
    }

    /// Starts all queues on a session in which nothing was said yet.
    pub(crate) fn start(frontend: Frontend, config: GuestBuilder) -> Result<Self, GuestError> {
        let negotiated = config.negotiate(frontend)?;
        let options = negotiated.ring_options(INDIRECT_BUFFERS);
        // Buffer, descriptors and indirect table of each entry.
        let entry_bytes = u64::from(config.buffer_size) + 32 + u64::from(options.indirect) * 16;
        let ring_bytes = u64::from(config.queue_size) * entry_bytes + 4096;
        let memory = config.memory(2 * ring_bytes)?;
        let ring = || DriverRing::new(&memory, config.layout, config.queue_size, options);
        let mut receive = Vec::new();
        let mut transmit = Vec::new();
        for pair in 0..config.queue_pairs {
            receive.push(GuestRxQueue::new(&memory, ring()?, pair, &config)?);
            transmit.push(GuestTxQueue::new(&memory, ring()?, &config)?);
        }
        let features = negotiated.features;
        let frontend = negotiated.start(&memory, ring_starts(&receive, &transmit))?;
        Ok(Self {
            frontend,
            features,
            memory,
            receive,
            transmit,
        })
    }

    /// Virtio features in effect.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Queue pairs.
    pub fn queue_pairs(&self) -> u16 {
        // As many as the builder was told.
        u16::try_from(self.receive.len()).unwrap_or(u16::MAX)
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<DriverMemory> {
        &self.memory
    }

    /// The session, for requests of the test's own.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The receive ring of a queue pair and its kick and call, for tests that break rules.
    ///
    /// # Panics
    /// There is no such pair.
    pub fn receive_queue(&mut self, pair: u16) -> &mut GuestRxQueue {
        &mut self.receive[usize::from(pair)]
    }

    /// The transmit ring of a queue pair and its kick and call, for tests that break rules.
    ///
    /// # Panics
    /// There is no such pair.
    pub fn transmit_queue(&mut self, pair: u16) -> &mut GuestTxQueue {
        &mut self.transmit[usize::from(pair)]
    }

    /// Sends a frame on the first queue pair, behind a header of zeros.
    ///
    /// # Errors
    /// The ring had no room for seconds, or can never hold the frame.
    pub fn send_frame(&mut self, frame: &[u8]) -> Result<(), GuestError> {
        let mut with_header = vec![0; NET_HEADER_BYTES];
        with_header.extend(frame);
        self.send(&with_header)
    }

    /// Sends a virtio-net header and the frame behind it on the first queue pair.
    ///
    /// # Errors
    /// The ring had no room for seconds, or can never hold the frame.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), GuestError> {
        self.send_on(0, frame)
    }

    /// As [`Guest::send`], on any queue pair.
    ///
    /// # Errors
    /// The ring had no room for seconds, or can never hold the frame.
    ///
    /// # Panics
    /// There is no such pair.
    pub fn send_on(&mut self, pair: u16, frame: &[u8]) -> Result<(), GuestError> {
        let start = Instant::now();
        let queue = &mut self.transmit[usize::from(pair)];
        while queue.send_burst(&[frame])? == 0 {
            let left = SEND_PATIENCE.saturating_sub(start.elapsed());
            if left.is_zero() || !queue.wait_used(left)? {
                let waited = SEND_PATIENCE;
                return Err(GuestError::Stuck { pair, waited });
            }
        }
        Ok(())
    }

    /// Sends as many of these (each with its header) as there is room for, published at once, and
    /// returns how many.
    ///
    /// # Errors
    /// The ring can never hold one of them.
    ///
    /// # Panics
    /// There is no such pair.
    pub fn send_burst<F: AsRef<[u8]>>(
        &mut self,
        pair: u16,
        frames: &[F],
    ) -> Result<usize, GuestError> {
        self.transmit[usize::from(pair)].send_burst(frames)
    }

    /// Waits until the device has used all frames that were sent; false after `timeout`.
    ///
    /// # Errors
    /// The device broke a rule.
    pub fn flush(&mut self, timeout: Duration) -> Result<bool, GuestError> {
        let deadline = Instant::now() + timeout;
        for queue in &mut self.transmit {
            loop {
                queue.reap()?;
                if queue.ring().in_flight() == 0 {
                    break;
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() || !queue.wait_used(left)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The next frame on any queue pair; `None` after `timeout`.
    ///
    /// # Errors
    /// The device broke a rule.
    pub fn recv(&mut self, timeout: Duration) -> Result<Option<ReceivedFrame>, GuestError> {
        let deadline = Instant::now() + timeout;
        loop {
            let mut used_meanwhile = false;
            for queue in &mut self.receive {
                if let Some(received) = queue.try_recv()? {
                    return Ok(Some(received));
                }
                used_meanwhile |= queue.arm()?;
            }
            if used_meanwhile {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let calls: Vec<&EventFd> = self.receive.iter().map(GuestRxQueue::call).collect();
            if left.is_zero() || wait_any(&calls, left)?.is_none() {
                // A call may be lost only by a fault of the device's: that is for tests to see.
                return Ok(None);
            }
        }
    }

    /// The next frame of one queue pair if there is one.
    ///
    /// # Errors
    /// The device broke a rule.
    ///
    /// # Panics
    /// There is no such pair.
    pub fn try_recv(&mut self, pair: u16) -> Result<Option<ReceivedFrame>, GuestError> {
        self.receive[usize::from(pair)].try_recv()
    }

    /// Stops all rings and returns their bases, receive and transmit of each pair in turn.
    ///
    /// # Errors
    /// The back-end closed the socket or answered nonsense.
    pub fn stop(&mut self) -> Result<Vec<u32>, GuestError> {
        let rings = u32::from(self.queue_pairs()) * 2;
        let bases = (0..rings)
            .map(|index| self.frontend.stop_ring(index))
            .collect::<Result<_, _>>()?;
        for queue in &mut self.receive {
            queue.reap()?;
        }
        for queue in &mut self.transmit {
            queue.reap()?;
        }
        Ok(bases)
    }

    /// Starts all rings, where the driver's account says that the device stands.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn resume(&mut self) -> Result<(), GuestError> {
        let rings = ring_starts(&self.receive, &self.transmit);
        self.frontend.start_rings(&self.memory, &rings)?;
        Ok(())
    }
}

/// Receive and transmit ring of each pair in turn, where the driver's account stands.
fn ring_starts<'a>(
    receive: &'a [GuestRxQueue],
    transmit: &'a [GuestTxQueue],
) -> Vec<RingSetup<'a>> {
    receive
        .iter()
        .zip(transmit)
        .flat_map(|(rx, tx)| [rx.start(), tx.start()])
        .collect()
}
