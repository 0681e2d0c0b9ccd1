//! In place of `af_xdp/` where the cargo feature `af-xdp` is off: a port that can't be opened. No
//! value of these types exists, so that nothing but [`AfXdpPort::open`] is ever called.

use std::convert::Infallible;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use ringway_api::{AfXdpConfig, AfXdpInfo, QueueInfo, SwitchError};

use super::tap::receive::TapRx;
use super::{Job, LinkBase, Outcome, QueueCounters, Tools, Unavailable};
use crate::link::Attachment;
use crate::wire::Offloads;

/// Queues of an interface: none.
#[derive(Debug)]
pub(crate) struct AfXdpPort {
    pub(crate) link: Arc<LinkBase>,
    none: Infallible,
}

/// One queue of the interface: none.
#[derive(Debug)]
pub(crate) struct AfXdpQueue {
    pub(crate) rx: QueueCounters,
    pub(crate) tx: QueueCounters,
    none: Infallible,
}

impl AfXdpPort {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub(crate) fn open(_link: Arc<LinkBase>, config: &AfXdpConfig) -> Result<Self, SwitchError> {
        Err(SwitchError::AfXdp {
            ifname: config.ifname.clone(),
            reason: "this ringwayd was built without it".to_owned(),
            hint: "build ringwayd with the cargo feature af-xdp, which is on by default".to_owned(),
        })
    }

    /// None is waited for.
    pub(crate) fn wait_for(_link: Arc<LinkBase>, _config: &AfXdpConfig) -> Option<Self> {
        None
    }

    /// No interface makes it work.
    pub(crate) fn absence(_config: &AfXdpConfig) -> Option<SwitchError> {
        None
    }

    pub(crate) fn detached(&self) -> Self {
        match self.none {}
    }

    pub(crate) fn pairs(&self) -> u16 {
        match self.none {}
    }

    pub(crate) fn attachment(&self) -> Option<Attachment> {
        match self.none {}
    }

    pub(crate) fn channels(&self) -> Option<u16> {
        match self.none {}
    }

    pub(crate) fn sends(&self) -> Offloads {
        match self.none {}
    }

    pub(crate) fn mtu(&self) -> u16 {
        match self.none {}
    }

    pub(crate) fn merged(&self) -> u64 {
        match self.none {}
    }

    pub(crate) fn queue(&self, _pair: u16) -> &AfXdpQueue {
        match self.none {}
    }

    /// A queue of whatever kind: it is never made.
    pub(crate) fn rx(&self, _pair: u16) -> Result<TapRx<'_>, Unavailable> {
        match self.none {}
    }

    pub(crate) fn deliver(&self, _job: &Job<'_, '_>, _tools: &mut Tools) -> Outcome {
        match self.none {}
    }

    pub(crate) fn send_again(&self, _pair: u16) -> bool {
        match self.none {}
    }

    pub(crate) fn queue_info(&self, _pair: u16, _worker: u16) -> QueueInfo {
        match self.none {}
    }

    pub(crate) fn info(&self) -> Option<AfXdpInfo> {
        match self.none {}
    }
}

impl AfXdpQueue {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self.none {}
    }
}
