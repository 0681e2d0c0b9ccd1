//! One ring's life, as its front-end makes it: the only place that says what state a ring is in.
//!
//! ```text
//!          kick               size, addresses, memory
//!   Idle ---------> Waiting --------------------------> Running
//!    ^                ^ |                                 | |
//!    |                | |    its memory goes, refused in  | |
//!    |                +-|--- other memory, other kick or -+ |
//!    |                  |    addresses                      |
//!    +------------------+---------- GET_VRING_BASE, reset --+
//! ```
//! Whether a ring is *enabled* is apart from that and may change in any state ("Ring states" in
//! QEMU's docs/interop/vhost-user.rst).
//!
//! A ring is Running from [`Device::start_ring`] to [`Device::stop_ring`]. Should the device stop it
//! in between, because its guest broke a rule or its memory file was cut off, it
//! keeps where the ring stood: the answer to `stop_ring` is the one way in which that is told.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::device::{Device, RingError, RingStart};
use crate::memory::GuestMemory;
use crate::ring::{PlaceError, RingAddresses, RingLayout};
use crate::wire::Features;

/// What all rings of a session rest on.
pub(super) struct Footing<D> {
    pub(super) device: Arc<D>,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) features: Features,
}

/// Whether a ring could be changed as a message asks.
type Changed = Result<(), RingError>;

/// SET_VRING_KICK's fd, or that the ring is to be polled.
type Kick = Option<Arc<OwnedFd>>;

#[derive(Debug, Default)]
enum RingState {
    /// It may not start before the next SET_VRING_KICK.
    #[default]
    Idle,
    /// It starts as soon as size and addresses are known and lie in memory.
    Waiting(Kick),
    /// The device has it, in the layout that was negotiated when it started.
    Running(Kick, RingLayout),
}

/// A ring: what the front-end told, and its state. An fd that comes again replaces the one before,
/// which is closed by that, so a ring never holds more than three.
#[derive(Debug, Default)]
pub(super) struct Vring {
    index: u16,
    state: RingState,
    /// SET_VRING_NUM.
    size: Option<u16>,
    /// SET_VRING_ADDR.
    addresses: Option<RingAddresses>,
    /// SET_VRING_BASE, or where the ring was when it stopped.
    base: Option<u32>,
    /// SET_VRING_ENABLE.
    enabled: bool,
    /// SET_VRING_CALL; kept for restarts.
    call: Option<Arc<OwnedFd>>,
    /// SET_VRING_ERR. Kept open, never written: to write to an fd of unknown kind may block.
    err: Option<OwnedFd>,
}

impl Vring {
    pub(super) fn new(index: u16) -> Self {
        Self {
            index,
            ..Self::default()
        }
    }

    /// SET_VRING_NUM, with a size that the layout allows.
    pub(super) fn set_size(&mut self, on: &Footing<impl Device>, size: u16) -> Changed {
        if self.is_running() && self.size != Some(size) {
            return Err(RingError::Running { what: "size" });
        }
        self.size = Some(size);
        self.start_if_ready(on)
    }

    /// SET_VRING_ADDR. A running ring goes on at other addresses, but not for the same ones, which
    /// come with the log flag when QEMU migrates.
    pub(super) fn set_addresses(
        &mut self,
        on: &Footing<impl Device>,
        addresses: RingAddresses,
    ) -> Changed {
        if self.addresses.replace(addresses) == Some(addresses) {
            return Ok(());
        }
        self.suspend(on);
        self.start_if_ready(on)
    }

    /// SET_VRING_BASE.
    pub(super) fn set_base(&mut self, base: u32) -> Changed {
        if self.is_running() {
            return Err(RingError::Running { what: "base" });
        }
        self.base = Some(base);
        Ok(())
    }

    /// SET_VRING_KICK: the ring starts, as soon as all else is there.
    pub(super) fn kick(&mut self, on: &Footing<impl Device>, fd: Option<OwnedFd>) -> Changed {
        self.suspend(on);
        self.state = RingState::Waiting(fd.map(Arc::new));
        self.start_if_ready(on)
    }

    /// SET_VRING_CALL.
    pub(super) fn set_call(&mut self, on: &Footing<impl Device>, fd: Option<OwnedFd>) -> Changed {
        self.call = fd.map(Arc::new);
        if self.is_running() {
            on.device.set_ring_call(self.index, self.call.clone())?;
        }
        Ok(())
    }

    /// SET_VRING_ERR.
    pub(super) fn set_err(&mut self, fd: Option<OwnedFd>) {
        self.err = fd;
    }

    /// SET_VRING_ENABLE. QEMU sends it before SET_FEATURES, so it can't wait for the negotiation.
    pub(super) fn set_enabled(&mut self, on: &Footing<impl Device>, enabled: bool) {
        self.enabled = enabled;
        if self.is_running() {
            on.device.set_ring_enabled(self.index, self.lets_pass(on));
        }
    }

    /// GET_VRING_BASE and resets: stops the ring until its next SET_VRING_KICK and returns where it
    /// stood. A front-end that told no base means a fresh ring.
    pub(super) fn stop(&mut self, on: &Footing<impl Device>) -> u32 {
        self.suspend(on);
        self.state = RingState::Idle;
        self.base_or_first(on)
    }

    /// RESET_DEVICE, for a ring that is stopped: forgets all but the channels for calls and errors,
    /// which the front-end does not send again.
    pub(super) fn reset(&mut self) {
        *self = Self {
            index: self.index,
            call: self.call.take(),
            err: self.err.take(),
            ..Self::default()
        };
    }

    /// Stops a running ring that does not lie in the memory that is to come; it waits for it.
    pub(super) fn leave_memory(&mut self, on: &Footing<impl Device>) {
        if let (RingState::Running(_, layout), Some(size), Some(addresses)) =
            (&self.state, self.size, self.addresses)
            && layout.place(size, addresses, &on.memory).is_err()
        {
            self.suspend(on);
        }
    }

    /// Starts a ring that waits, if nothing is missing any more.
    ///
    /// # Errors
    /// The ring can't be as it is, or the device can't take it: it waits for better.
    pub(super) fn start_if_ready(&mut self, on: &Footing<impl Device>) -> Changed {
        let layout = RingLayout::of(on.features);
        let (base, enabled) = (self.base_or_first(on), self.lets_pass(on));
        let (Some(size), Some(addresses), RingState::Waiting(kick)) =
            (self.size, self.addresses, &mut self.state)
        else {
            return Ok(());
        };
        let placed = match layout.place(size, addresses, &on.memory) {
            Ok(placed) => placed,
            // Its memory is still to come, or to come again.
            Err(PlaceError::Absent { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let start = RingStart {
            placed,
            base,
            kick: kick.clone(),
            call: self.call.clone(),
            features: on.features,
            enabled,
        };
        on.device.start_ring(self.index, start)?;
        self.state = RingState::Running(kick.take(), layout);
        Ok(())
    }

    /// Stops a running ring, which keeps where it stood and waits.
    pub(super) fn suspend(&mut self, on: &Footing<impl Device>) {
        if let RingState::Running(kick, _) = &mut self.state {
            self.state = RingState::Waiting(kick.take());
            self.base = on.device.stop_ring(self.index).or(self.base);
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.state, RingState::Running(..))
    }

    fn base_or_first(&self, on: &Footing<impl Device>) -> u32 {
        self.base
            .unwrap_or(RingLayout::of(on.features).first_base())
    }

    /// "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the
    /// enabled state."
    fn lets_pass(&self, on: &Footing<impl Device>) -> bool {
        self.enabled
            || !on
                .features
                .contains(Features::VHOST_USER_F_PROTOCOL_FEATURES)
    }
}

#[cfg(test)]
mod tests;
