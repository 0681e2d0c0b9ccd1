//! What a vhost-user session drives: the port's rings.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use ringway_bridge::MacAddr;
use rustix::io::Errno;

use crate::call::Verdict;
use crate::memory::GuestMemory;
use crate::ring::{PlaceError, PlacedAreas};
use crate::wire::{Features, ProtocolFeatures};

/// All that a ring needs to start.
#[derive(Debug)]
pub(crate) struct RingStart {
    /// Where it lies, in the memory that was set last, and its size.
    pub(crate) placed: PlacedAreas,
    /// What SET_VRING_BASE told: for split rings the next avail index in the low 16 bits, for
    /// packed rings avail index and wrap counter in the low, used in the high 16 bits.
    pub(crate) base: u32,
    /// Kicks arrive here; `None` means that the ring must be polled.
    pub(crate) kick: Option<Arc<OwnedFd>>,
    /// Calls go here; `None` means that the driver polls.
    pub(crate) call: Option<Arc<OwnedFd>>,
    /// Virtio features in effect (SET_FEATURES).
    pub(crate) features: Features,
    /// Whether frames pass; a started but disabled transmit ring is drained and discarded.
    pub(crate) enabled: bool,
}

/// Why a ring could not start, go on or be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RingError {
    /// It does not lie in guest memory as a ring has to.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A base beyond the ring's size.
    #[error("it can't go on at {base:#x}")]
    Base { base: u32 },
    /// The file behind the guest's memory was cut off.
    #[error("the guest's memory file was cut off")]
    Broken,
    /// The kick or call fd can't be used.
    #[error("its {which} fd is unusable: {source}")]
    Fd {
        which: &'static str,
        source: std::io::Error,
    },
    /// What must not change while the ring is started.
    #[error("the {what} of a started ring can't change")]
    Running { what: &'static str },
}

/// A vhost-user device's data path, as the session's state machine sees it. Rings are numbered as
/// in the protocol: guest receive 2n, guest transmit 2n + 1.
///
/// The methods take `&self`: workers use the rings at the same time, and each call returns only
/// once no worker uses what it replaced.
pub(crate) trait Device: Send + Sync {
    /// Most queue pairs.
    fn queue_pairs(&self) -> u16;

    /// Virtio features of its data path.
    fn features(&self) -> Features;

    /// The MTU in effect, if anybody told one.
    fn mtu(&self) -> Option<u16>;

    /// A front-end connected.
    fn connected(&self);

    /// A try to connect to the front-end's socket at `path` failed.
    fn unreachable(&self, _path: &Path, _error: Errno) {}

    /// The session ended, for this reason if it was an error; all rings are stopped already and
    /// memory is empty.
    fn disconnected(&self, reason: Option<String>);

    /// Has this eventfd written to whenever there is a verdict to take.
    fn set_alarm(&self, _alarm: Arc<OwnedFd>) {}

    /// That the session is to end and none may begin for a while, if it is: told once.
    fn take_verdict(&self) -> Option<Verdict> {
        None
    }

    /// Something was refused that the session survives: a ring, or a request. For display.
    fn refused(&self, ring: Option<u16>, reason: String);

    /// No front-end can be let in, or connected to, for a reason that is ours: told until one is.
    fn barred(&self, _reason: String) {}

    /// Virtio and protocol features in effect, for display.
    fn set_features(&self, features: Features, protocol_features: ProtocolFeatures);

    /// Replaces the guest memory. Started rings go on in the new one, but for those that are in the
    /// answer with the reason: they stopped.
    fn set_memory(&self, memory: Arc<GuestMemory>) -> Vec<(u16, RingError)>;

    /// Starts a ring that is stopped.
    ///
    /// # Errors
    /// A base or fds that can't be used, or memory that was cut off; the ring stays stopped.
    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), RingError>;

    /// Stops a ring and returns where it stood, in the form of [`RingStart::base`]: now, or when the
    /// device stopped it by itself. `None` if it was not started.
    fn stop_ring(&self, index: u16) -> Option<u32>;

    /// Enables or disables a started ring.
    fn set_ring_enabled(&self, index: u16, enabled: bool);

    /// Replaces the call fd of a started ring.
    ///
    /// # Errors
    /// It is no eventfd, which leaves the ring with the one before.
    fn set_ring_call(&self, index: u16, call: Option<Arc<OwnedFd>>) -> Result<(), RingError>;

    /// The guest's MTU (NET_SET_MTU).
    fn set_mtu(&self, mtu: u16);

    /// Announce this address from the port with a RARP broadcast (SEND_RARP), if it was not just now.
    fn announce(&self, mac: MacAddr);
}
