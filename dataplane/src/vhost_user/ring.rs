//! What a session knows of one ring.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::device::{RingAddresses, RingStart};
use crate::memory::Region;
use crate::ring::Layout;
use crate::wire::Features;

/// A ring's configuration and state. An fd that comes again replaces the one before, which is
/// closed by that, so a ring never holds more than three.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// SET_VRING_NUM.
    pub(super) size: Option<u16>,
    /// SET_VRING_ADDR.
    pub(super) addresses: Option<RingAddresses>,
    /// SET_VRING_BASE, or where the ring was when it stopped.
    pub(super) base: Option<u32>,
    /// SET_VRING_ENABLE.
    pub(super) enabled: bool,
    /// The device runs it.
    pub(super) started: bool,
    /// SET_VRING_CALL; kept for restarts.
    pub(super) call: Option<OwnedFd>,
    /// SET_VRING_ERR. Kept open, never written: to write to an fd of unknown kind may block.
    pub(super) err: Option<OwnedFd>,
    /// SET_VRING_KICK has come since the ring was stopped, with an fd or without.
    kick: Option<Option<OwnedFd>>,
}

impl Ring {
    /// SET_VRING_KICK: the ring may start.
    pub(super) fn arm(&mut self, kick: Option<OwnedFd>) {
        self.kick = Some(kick);
    }

    /// Where the ring starts: a front-end that does not tell means a fresh one.
    pub(super) fn base(&self, features: Features) -> u32 {
        self.base.unwrap_or(Layout::of(features).first_base())
    }

    /// The ring may not start before the next [`Ring::arm`].
    pub(super) fn disarm(&mut self) {
        self.kick = None;
    }

    /// Forgets all but the channels for calls and errors.
    pub(super) fn reset(&mut self) {
        *self = Self {
            call: self.call.take(),
            err: self.err.take(),
            ..Self::default()
        };
    }

    /// Whether size and addresses are known and all three areas lie in `regions`. Alignment and
    /// the event fields at the areas' ends are the device's to check.
    pub(super) fn lies_in(&self, regions: &[Arc<Region>], features: Features) -> bool {
        let (Some(size), Some(at)) = (self.size, self.addresses) else {
            return false;
        };
        let size = u64::from(size);
        // virtio 1.3, 2.7 and 2.8.
        let (avail_len, used_len) = match Layout::of(features) {
            Layout::Split => (4 + 2 * size, 4 + 8 * size),
            Layout::Packed => (4, 4),
        };
        let areas = [
            (at.desc, 16 * size),
            (at.avail, avail_len),
            (at.used, used_len),
        ];
        areas.iter().all(|&(start, len)| {
            regions.iter().any(|region| {
                let spec = region.spec();
                start
                    .checked_sub(spec.user_addr)
                    .and_then(|offset| offset.checked_add(len))
                    .is_some_and(|end| end <= spec.size)
            })
        })
    }

    /// What the device needs to start the ring, or `None` if something is missing still.
    pub(super) fn to_start(
        &self,
        features: Features,
        enabled_anyway: bool,
    ) -> io::Result<Option<RingStart>> {
        let (Some(size), Some(addresses), Some(kick)) = (self.size, self.addresses, &self.kick)
        else {
            return Ok(None);
        };
        let duplicate = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Some(RingStart {
            size,
            addresses,
            base: self.base(features),
            kick: duplicate(kick)?,
            call: duplicate(&self.call)?,
            features,
            enabled: self.enabled || enabled_anyway,
        }))
    }
}
