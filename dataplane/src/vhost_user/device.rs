//! What a vhost-user session drives: the port's rings.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringway_bridge::MacAddr;

use crate::memory::GuestMemory;
use crate::wire::{Features, ProtocolFeatures};

/// Addresses of a ring's three areas, in the front-end's address space (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    /// Descriptor table (split) or descriptor ring (packed).
    pub(crate) desc: u64,
    /// Available ring (split) or driver event suppression (packed).
    pub(crate) avail: u64,
    /// Used ring (split) or device event suppression (packed).
    pub(crate) used: u64,
}

/// All that a ring needs to start.
#[derive(Debug)]
pub(crate) struct RingStart {
    /// Entries: 1 to 32768, a power of two for split rings (virtio 1.3, 2.7.1).
    pub(crate) size: u16,
    /// Where it lies.
    pub(crate) addresses: RingAddresses,
    /// What SET_VRING_BASE told: for split rings the next avail index in the low 16 bits, for
    /// packed rings avail index and wrap counter in the low, used in the high 16 bits.
    pub(crate) base: u32,
    /// Kicks arrive here; `None` means that the ring must be polled.
    pub(crate) kick: Option<OwnedFd>,
    /// Calls go here; `None` means that the driver polls.
    pub(crate) call: Option<OwnedFd>,
    /// Virtio features in effect (SET_FEATURES).
    pub(crate) features: Features,
    /// Whether frames pass; a started but disabled transmit ring is drained and discarded.
    pub(crate) enabled: bool,
}

/// Why a ring could not start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RingError {
    /// An area of the ring is not in one region of guest memory, or misaligned.
    #[error("the {area} of ring {index} at {address:#x} is not {rule}")]
    Address {
        index: u16,
        area: &'static str,
        address: u64,
        rule: &'static str,
    },
    /// A size that no ring can have.
    #[error("ring {index} can't have {size} entries")]
    Size { index: u16, size: u16 },
    /// A base beyond the ring's size.
    #[error("ring {index} can't go on at {base:#x}")]
    Base { index: u16, base: u32 },
    /// The file behind the guest's memory was cut off.
    #[error("ring {index} can't start: the guest's memory file was cut off")]
    Broken { index: u16 },
    /// The kick or call fd can't be used.
    #[error("the {which} fd of ring {index} is unusable: {source}")]
    Fd {
        index: u16,
        which: &'static str,
        source: std::io::Error,
    },
}

/// A vhost-user device's data path, as the session's state machine sees it. Rings are numbered as
/// in the protocol: guest receive 2n, guest transmit 2n + 1.
///
/// The methods take `&self`: workers use the rings at the same time, and each call returns only
/// once no worker uses what it replaced.
pub(crate) trait Device: Send + Sync {
    /// Most queue pairs.
    fn queue_pairs(&self) -> u16;

    /// A front-end connected.
    fn connected(&self);

    /// The session ended, for this reason if it was an error; all rings are stopped already and
    /// memory is empty.
    fn disconnected(&self, reason: Option<String>);

    /// Virtio and protocol features in effect, for display.
    fn set_features(&self, features: Features, protocol_features: ProtocolFeatures);

    /// Replaces the guest memory; started rings go on in the new one.
    ///
    /// # Errors
    /// A started ring does not lie in the new memory; it is stopped, the others go on.
    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), RingError>;

    /// Starts a ring that is stopped.
    ///
    /// # Errors
    /// Addresses, size or fds that can't be used; the ring stays stopped.
    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), RingError>;

    /// Stops a ring and returns its base in the form of [`RingStart::base`], or `None` if it was
    /// not started.
    fn stop_ring(&self, index: u16) -> Option<u32>;

    /// Enables or disables a started ring.
    fn set_ring_enabled(&self, index: u16, enabled: bool);

    /// Replaces the call fd of a started ring.
    ///
    /// # Errors
    /// It is no eventfd.
    fn set_ring_call(&self, index: u16, call: Option<OwnedFd>) -> Result<(), RingError>;

    /// The guest's MTU (NET_SET_MTU).
    fn set_mtu(&self, mtu: u16);

    /// Announce this address from the port with a RARP broadcast (SEND_RARP).
    fn announce(&self, mac: MacAddr);
}
