//! A guest for tests: a front-end with queue pairs whose receive buffers are posted.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::event::{EventFd, wait_any};
use super::features::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use super::frontend::{Frontend, FrontendError, WANTED_PROTOCOL_FEATURES};
use super::memory::{DriverMemory, DriverMemoryError, HUGE_PAGE_BYTES, RegionLayout};
use super::pair::{RxQueue, TxQueue};
use super::queue::{AddError, DeviceFault, Layout, Ring, RingOptions, RingSetupError};
use super::session::{DeviceStart, RingStart};

/// Bytes of the header in front of every frame (virtio 1.3, 5.1.6, with num_buffers).
pub const NET_HEADER_BYTES: usize = 12;

/// Longest indirect table that a guest uses: a 64 KiB frame in 2 KiB buffers and its header.
const INDIRECT_BUFFERS: u16 = 40;

/// How long [`Guest::send`] waits for room before it gives up.
const SEND_PATIENCE: Duration = Duration::from_secs(5);

/// What a guest is like. The features that it implies are required of the back-end.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Features besides those that the other fields imply.
    pub features: u64,
    /// Layout of the rings.
    pub layout: Layout,
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub mergeable: bool,
    /// VIRTIO_RING_F_INDIRECT_DESC, and chains of several buffers use it.
    pub indirect: bool,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Bytes of one buffer, header included where it is in front of the frame.
    pub buffer_size: u32,
    /// The header has a descriptor of its own, on both rings.
    pub chained: bool,
    /// Memory from hugepages.
    pub huge: bool,
    /// Regions over which memory is spread; the second and later ones start inside their files.
    pub regions: u16,
    /// Told to the back-end by NET_SET_MTU.
    pub mtu: Option<u16>,
    /// Protocol features to ask for.
    pub protocol_features: VhostUserProtocolFeatures,
    /// How long the back-end may take to answer a request.
    pub reply_timeout: Duration,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            queue_size: 256,
            features: 0,
            layout: Layout::Split,
            mergeable: true,
            indirect: true,
            event_idx: true,
            in_order: false,
            buffer_size: 2048,
            chained: false,
            huge: false,
            regions: 1,
            mtu: None,
            protocol_features: WANTED_PROTOCOL_FEATURES,
            reply_timeout: Duration::from_secs(5),
        }
    }
}

impl GuestConfig {
    /// All features that this guest negotiates.
    pub fn required_features(&self) -> u64 {
        let implied = [
            (self.layout == Layout::Packed, VIRTIO_F_RING_PACKED),
            (self.mergeable, VIRTIO_NET_F_MRG_RXBUF),
            (self.indirect, VIRTIO_RING_F_INDIRECT_DESC),
            (self.event_idx, VIRTIO_RING_F_EVENT_IDX),
            (self.in_order, VIRTIO_F_IN_ORDER),
            (self.queue_pairs > 1, VIRTIO_NET_F_MQ),
        ];
        implied
            .iter()
            .filter(|(wanted, _)| *wanted)
            .fold(self.features | VIRTIO_F_VERSION_1, |sum, (_, bit)| {
                sum | bit
            })
    }

    fn ring_options(&self) -> RingOptions {
        RingOptions {
            event_idx: self.event_idx,
            in_order: self.in_order,
            indirect: if self.indirect { INDIRECT_BUFFERS } else { 0 },
        }
    }

    /// Memory that holds all rings and buffers, spread over the regions.
    fn memory(&self) -> Result<Arc<DriverMemory>, DriverMemoryError> {
        let entries = u64::from(self.queue_size);
        let indirect = u64::from(self.ring_options().indirect) * 16;
        let per_ring = entries * (u64::from(self.buffer_size) + 32 + indirect) + 4096;
        let page = if self.huge { HUGE_PAGE_BYTES } else { 4096 };
        let regions = u64::from(self.regions.max(1));
        // Areas don't straddle regions: one ring's worth of slack in each.
        let total = per_ring * 2 * u64::from(self.queue_pairs);
        let size = (total / regions + per_ring).next_multiple_of(page);
        let layouts: Vec<RegionLayout> = (0..regions)
            .map(|i| RegionLayout {
                // Regions with gaps, the second on above 4 GiB as on a PC.
                guest_addr: (i << 32) + i * size,
                size,
                file_offset: i * page,
            })
            .collect();
        DriverMemory::new(&layouts, self.huge)
    }
}

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
    /// The back-end doesn't offer what the configuration needs.
    #[error("the back-end offers features {offered:#x}, {missing:#x} are missing")]
    NotOffered {
        /// What it offers.
        offered: u64,
        /// What is missing.
        missing: u64,
    },
    /// The back-end has fewer queue pairs.
    #[error("the back-end has {offered} queue pairs, not {wanted}")]
    QueuePairs {
        /// What it offers.
        offered: u64,
        /// What the configuration wants.
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
pub struct Received {
    /// Queue pair on which it came.
    pub pair: u16,
    /// The virtio-net header.
    pub header: [u8; NET_HEADER_BYTES],
    /// The frame without it.
    pub frame: Vec<u8>,
}

impl Received {
    /// num_buffers of the header.
    pub fn num_buffers(&self) -> u16 {
        u16::from_le_bytes([self.header[10], self.header[11]])
    }
}

/// A guest that is connected to a back-end.
#[derive(Debug)]
pub struct Guest {
    frontend: Frontend,
    config: GuestConfig,
    memory: Arc<DriverMemory>,
    receive: Vec<RxQueue>,
    transmit: Vec<TxQueue>,
}

impl Guest {
    /// Connects to a back-end that listens at `path` and starts all queues.
    ///
    /// # Errors
    /// No back-end, or one that lacks what `config` needs.
    pub fn connect(path: &Path, config: GuestConfig) -> Result<Self, GuestError> {
        Self::start(Frontend::connect(path)?, config)
    }

    /// Waits for a back-end that connects and starts all queues.
    ///
    /// # Errors
    /// A back-end that lacks what `config` needs.
    pub fn accept(listener: &UnixListener, config: GuestConfig) -> Result<Self, GuestError> {
        Self::start(Frontend::accept(listener)?, config)
    }

    /// Starts all queues on a session in which nothing was said yet.
    ///
    /// # Errors
    /// A back-end that lacks what `config` needs.
    pub fn start(frontend: Frontend, config: GuestConfig) -> Result<Self, GuestError> {
        let memory = config.memory()?;
        let ring = || {
            Ring::new(
                &memory,
                config.layout,
                config.queue_size,
                config.ring_options(),
            )
        };
        let mut receive = Vec::new();
        let mut transmit = Vec::new();
        for pair in 0..config.queue_pairs {
            receive.push(RxQueue::new(&memory, ring()?, pair, &config)?);
            transmit.push(TxQueue::new(&memory, ring()?, &config)?);
        }
        let mut guest = Self {
            frontend,
            config,
            memory,
            receive,
            transmit,
        };
        guest.set_up()?;
        Ok(guest)
    }

    /// Goes on with another session, as QEMU does when a back-end comes back: rings stay as they
    /// are and the new back-end starts at the first chain that the old one did not use.
    ///
    /// # Errors
    /// A back-end that lacks what the guest needs.
    pub fn reconnect(&mut self, frontend: Frontend) -> Result<(), GuestError> {
        for queue in &mut self.receive {
            queue.reap()?;
        }
        for queue in &mut self.transmit {
            queue.reap()?;
        }
        self.frontend = frontend;
        self.set_up()
    }

    /// Virtio features in effect.
    pub fn features(&self) -> u64 {
        self.config.required_features()
    }

    /// The configuration that it was started with.
    pub fn config(&self) -> &GuestConfig {
        &self.config
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
    pub fn receive_queue(&mut self, pair: u16) -> &mut RxQueue {
        &mut self.receive[usize::from(pair)]
    }

    /// The transmit ring of a queue pair and its kick and call, for tests that break rules.
    ///
    /// # Panics
    /// There is no such pair.
    pub fn transmit_queue(&mut self, pair: u16) -> &mut TxQueue {
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
    pub fn recv(&mut self, timeout: Duration) -> Result<Option<Received>, GuestError> {
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
            let calls: Vec<&EventFd> = self.receive.iter().map(RxQueue::call).collect();
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
    pub fn try_recv(&mut self, pair: u16) -> Result<Option<Received>, GuestError> {
        self.receive[usize::from(pair)].try_recv()
    }

    /// Stops all rings and returns their bases, receive and transmit of each pair in turn.
    ///
    /// # Errors
    /// The back-end closed the socket or answered nonsense.
    pub fn stop(&mut self) -> Result<Vec<u32>, GuestError> {
        let rings = u32::from(self.config.queue_pairs) * 2;
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

    /// Handshake, memory, rings.
    fn set_up(&mut self) -> Result<(), GuestError> {
        let wanted = self.config.queue_pairs;
        let frontend = &mut self.frontend;
        frontend.set_reply_timeout(self.config.reply_timeout)?;
        let offered = frontend.negotiate_protocol(self.config.protocol_features)?;
        let required = self.config.required_features();
        let missing = required & !offered;
        if missing != 0 {
            return Err(GuestError::NotOffered { offered, missing });
        }
        let pairs = frontend.queue_pairs()?;
        if pairs < u64::from(wanted) {
            let offered = pairs;
            return Err(GuestError::QueuePairs { offered, wanted });
        }
        let device = DeviceStart {
            features: required,
            mtu: self.config.mtu,
            memory: &self.memory,
            rings: ring_starts(&self.receive, &self.transmit),
        };
        frontend.start_device(offered, &device)?;
        Ok(())
    }
}

/// Receive and transmit ring of each pair in turn, where the driver's account stands.
fn ring_starts<'a>(receive: &'a [RxQueue], transmit: &'a [TxQueue]) -> Vec<RingStart<'a>> {
    receive
        .iter()
        .zip(transmit)
        .flat_map(|(rx, tx)| [rx.start(), tx.start()])
        .collect()
}
