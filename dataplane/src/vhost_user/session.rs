//! One front-end's session as a state machine without sockets: requests in, replies and calls of
//! the [`Device`] out.
//!
//! What becomes of a ring is told in `vring.rs`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use vhost::vhost_user::message::FrontendReq;

use super::device::{Device, RingError};
use super::message::{NetConfig, ReplyBody, Request, VringFd};
use super::offer::Offer;
use super::vring::{Footing, Vring};
use crate::log_limit::LogLimit;
use crate::memory::{GuestMemory, MAX_REGIONS, MemoryError, Region, RegionSpec, check_regions};
use crate::ring::RingLayout;
use crate::wire::{Features, ProtocolFeatures};

/// Least MTU that NET_SET_MTU may tell (virtio 1.3, 5.1.4.1).
const MIN_MTU: u16 = 68;

/// Replies of REPLY_ACK.
const ACK: u64 = 0;
const NACK: u64 = 1;

/// Why a session can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SessionError {
    /// SET_FEATURES or SET_PROTOCOL_FEATURES with bits that were not offered.
    #[error("the front-end took {kind} {bits:#x} that were not offered")]
    FeaturesNotOffered { kind: &'static str, bits: u64 },
    /// A guest that drives a control queue itself, which nobody serves.
    #[error(
        "the guest gets a control queue (VIRTIO_NET_F_CTRL_VQ) that its front-end does not serve; give \
         the port one queue pair (`--queues 1`), and it is not offered"
    )]
    ControlQueue,
    /// VIRTIO_F_ACCESS_PLATFORM, with which addresses are those of an IOMMU (virtio 1.3, 6.1; "IOMMU
    /// support" in vhost-user.rst), which nobody translates here.
    #[error(
        "the guest's NIC is behind a virtual IOMMU (VIRTIO_F_ACCESS_PLATFORM), which is not supported: \
         take it from the guest (QEMU: no `-device intel-iommu` and the like, or the NIC on a bus with \
         `bypass_iommu=on`)"
    )]
    Iommu,
    /// A ring that the device does not have.
    #[error("there is no ring {index}, only {count}")]
    NoSuchRing { index: u32, count: usize },
    /// SET_VRING_NUM with a size that no ring can have (virtio 1.3, 2.7, 2.8.10.1).
    #[error("ring {index} can't have {size} entries: not 1 to 32768, or split and no power of two")]
    RingSize { index: u32, size: u32 },
    /// A request whose reply we can't give.
    #[error("request {request} needs a reply, but {rule}")]
    NoReply { request: u32, rule: &'static str },
    /// A request without the protocol feature that it belongs to.
    #[error("request {request} came without its protocol feature")]
    NotNegotiated { request: u32 },
    /// More regions than slots.
    #[error("the front-end has more than {MAX_REGIONS} memory regions")]
    TooManyRegions,
    /// REM_MEM_REG of a region that was never added.
    #[error("there is no memory region {spec:x?} to remove")]
    NoSuchRegion { spec: RegionSpec },
    /// Memory that can't be mapped, or regions that overlap.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// How a request ended that does not end the session.
enum Answer {
    Done,
    /// Not done; the front-end learns it if it asks (REPLY_ACK).
    Refused,
    Reply(ReplyBody),
}

/// A front-end's session. Dropping it is [`Session::close`].
pub(crate) struct Session<D: Device> {
    /// Device, memory and virtio features in effect.
    footing: Footing<D>,
    protocol_features: ProtocolFeatures,
    /// The front-end has begun to negotiate.
    negotiated: bool,
    offer: Offer,
    status: u8,
    rings: Vec<Vring>,
    open: bool,
    log: LogLimit,
}

impl<D: Device> Session<D> {
    /// A session of a front-end that has just connected; `log` bounds what it can have logged.
    pub(crate) fn new(device: Arc<D>, log: LogLimit) -> Self {
        // A port has at most 64 queue pairs.
        let rings = 2 * device.queue_pairs();
        device.connected();
        Self {
            footing: Footing {
                device,
                memory: Arc::default(),
                features: Features::empty(),
            },
            protocol_features: ProtocolFeatures::empty(),
            negotiated: false,
            offer: Offer::default(),
            status: 0,
            rings: (0..rings).map(Vring::new).collect(),
            open: true,
            log,
        }
    }

    /// Whether the front-end has done more than to connect.
    pub(crate) fn negotiated(&self) -> bool {
        self.negotiated
    }

    /// Carries out a request; `need_reply` is the header's flag. Returns what to send back, if
    /// anything.
    ///
    /// # Errors
    /// The request breaks the protocol: send [`Session::failure`], then end the session.
    pub(crate) fn handle(
        &mut self,
        request: Request,
        need_reply: bool,
    ) -> Result<Option<ReplyBody>, SessionError> {
        if let Request::Unknown(request) = request
            && !self.wants_ack(need_reply)
            && Request::unknown_expects_reply(request)
        {
            let rule = "it is not supported here";
            return Err(SessionError::NoReply { request, rule });
        }
        Ok(match self.apply(request)? {
            Answer::Reply(body) => Some(body),
            // Asked only now: SET_PROTOCOL_FEATURES itself may have negotiated REPLY_ACK.
            Answer::Done if self.wants_ack(need_reply) => Some(ReplyBody::U64(ACK)),
            Answer::Refused if self.wants_ack(need_reply) => Some(ReplyBody::U64(NACK)),
            Answer::Done | Answer::Refused => None,
        })
    }

    /// The reply to a request that ended the session, if the front-end waits for one.
    pub(crate) fn failure(&self, request: u32, need_reply: bool) -> Option<ReplyBody> {
        let own_reply = matches!(
            FrontendReq::try_from(request),
            Ok(FrontendReq::GET_FEATURES
                | FrontendReq::GET_PROTOCOL_FEATURES
                | FrontendReq::GET_QUEUE_NUM
                | FrontendReq::GET_VRING_BASE
                | FrontendReq::GET_MAX_MEM_SLOTS
                | FrontendReq::GET_CONFIG
                | FrontendReq::GET_STATUS)
        );
        (self.wants_ack(need_reply) && !own_reply).then_some(ReplyBody::U64(NACK))
    }

    /// Ends the session, with a reason if it was an error: stops all rings, empties the memory and
    /// closes all fds. Only the first call does anything.
    pub(crate) fn close(&mut self, reason: Option<String>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        self.stop_all();
        self.rings.clear();
        self.footing.memory = Arc::default();
        // No ring is started, so none can fail in the empty memory.
        self.device().set_memory(Arc::clone(&self.footing.memory));
        self.device().disconnected(reason);
    }

    fn apply(&mut self, request: Request) -> Result<Answer, SessionError> {
        match request {
            Request::GetFeatures => {
                let offered = self.offer.features(self.device());
                return Ok(Answer::Reply(ReplyBody::U64(offered.bits())));
            }
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetOwner => {
                self.negotiated = true;
                self.offer.owned_first |= self.protocol_features.is_empty();
            }
            // Deprecated: "either ignore this message, or use it to disable all rings".
            Request::ResetOwner => {}
            Request::SetMemTable(table) => self.set_mem_table(table)?,
            Request::SetLogBase => return Ok(self.refuse("a dirty log was not offered")),
            // Optional even for those who log: an eventfd to tell that the log has changed.
            Request::SetLogFd => {}
            Request::SetVringNum { index, num } => return self.set_vring_num(index, num),
            Request::SetVringAddr { index, addresses } => {
                return self.change_ring(index, |ring, on| ring.set_addresses(on, addresses));
            }
            Request::SetVringBase { index, base } => {
                let base = self.base_meant(base);
                return self.change_ring(index, |ring, _| ring.set_base(base));
            }
            Request::GetVringBase { index } => {
                let at = self.ring_index(index)?;
                let num = self.rings[at].stop(&self.footing);
                return Ok(Answer::Reply(ReplyBody::VringState { index, num }));
            }
            Request::SetVringKick(VringFd { index, fd }) => {
                return self.change_ring(index, |ring, on| ring.kick(on, fd));
            }
            Request::SetVringCall(VringFd { index, fd }) => {
                return self.change_ring(index, |ring, on| ring.set_call(on, fd));
            }
            Request::SetVringErr(VringFd { index, fd }) => {
                let at = self.ring_index(index)?;
                self.rings[at].set_err(fd);
            }
            Request::GetProtocolFeatures => {
                let offered = self.offer.protocol_features(self.device());
                return Ok(Answer::Reply(ReplyBody::U64(offered.bits())));
            }
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features)?,
            // In pairs, as all front-ends of network devices read it.
            Request::GetQueueNum => {
                let pairs = self.device().queue_pairs().into();
                return Ok(Answer::Reply(ReplyBody::U64(pairs)));
            }
            Request::SetVringEnable { index, enable } => {
                let at = self.ring_index(index)?;
                self.rings[at].set_enabled(&self.footing, enable);
            }
            Request::SendRarp(mac) => {
                self.require(
                    ProtocolFeatures::VHOST_USER_PROTOCOL_F_RARP,
                    FrontendReq::SEND_RARP,
                )?;
                self.device().announce(mac);
            }
            Request::NetSetMtu(mtu) => match u16::try_from(mtu) {
                Ok(mtu) if mtu >= MIN_MTU => self.device().set_mtu(mtu),
                _ => return Ok(self.refuse("the MTU is not one of 68 to 65535")),
            },
            Request::ResetDevice => self.reset_device(),
            Request::GetMaxMemSlots => {
                self.require(
                    ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
                    FrontendReq::GET_MAX_MEM_SLOTS,
                )?;
                return Ok(Answer::Reply(ReplyBody::U64(MAX_REGIONS as u64)));
            }
            Request::AddMemReg(spec, file) => self.add_mem_reg(spec, file)?,
            Request::RemMemReg(spec) => self.rem_mem_reg(spec)?,
            Request::SetStatus(status) => {
                self.require(
                    ProtocolFeatures::VHOST_USER_PROTOCOL_F_STATUS,
                    FrontendReq::SET_STATUS,
                )?;
                self.status = status;
                if status == 0 {
                    self.stop_all();
                }
            }
            Request::GetStatus => {
                self.require(
                    ProtocolFeatures::VHOST_USER_PROTOCOL_F_STATUS,
                    FrontendReq::GET_STATUS,
                )?;
                return Ok(Answer::Reply(ReplyBody::U64(self.status.into())));
            }
            Request::SetBackendReqFd => self.require(
                ProtocolFeatures::VHOST_USER_PROTOCOL_F_BACKEND_REQ,
                FrontendReq::SET_BACKEND_REQ_FD,
            )?,
            Request::GetConfig { offset, size } => {
                self.require(
                    ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIG,
                    FrontendReq::GET_CONFIG,
                )?;
                let space = NetConfig {
                    max_queue_pairs: self.device().queue_pairs(),
                    mtu: self.device().mtu().unwrap_or(0),
                };
                return Ok(Answer::Reply(ReplyBody::Config {
                    offset,
                    size,
                    space,
                }));
            }
            Request::SetConfig => self.require(
                ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIG,
                FrontendReq::SET_CONFIG,
            )?,
            Request::Unknown(id) => {
                if let Some(suppressed) = self.log.pass(Instant::now()) {
                    tracing::warn!(request = id, suppressed, "unknown request ignored");
                }
                return Ok(Answer::Refused);
            }
        }
        Ok(Answer::Done)
    }

    fn set_features(&mut self, features: u64) -> Result<(), SessionError> {
        let features = Features::from_bits(features).ok_or_else(|| {
            let bits = features & !Features::all().bits();
            let kind = "features";
            SessionError::FeaturesNotOffered { kind, bits }
        })?;
        if self.passes_through() && features.contains(Features::VIRTIO_NET_F_CTRL_VQ) {
            return Err(SessionError::ControlQueue);
        }
        if features.contains(Features::VIRTIO_F_ACCESS_PLATFORM) {
            return Err(SessionError::Iommu);
        }
        self.negotiated = true;
        self.footing.features = features;
        self.show_features();
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), SessionError> {
        let features = ProtocolFeatures::from_bits(features).ok_or_else(|| {
            let bits = features & !ProtocolFeatures::all().bits();
            let kind = "protocol features";
            SessionError::FeaturesNotOffered { kind, bits }
        })?;
        self.negotiated = true;
        self.protocol_features = features;
        self.show_features();
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<Answer, SessionError> {
        self.ring_index(index)?;
        let layout = RingLayout::of(self.footing.features);
        let valid = u16::try_from(size).ok().filter(|n| layout.allows(*n));
        let size = valid.ok_or(SessionError::RingSize { index, size })?;
        self.change_ring(index, |ring, on| ring.set_size(on, size))
    }

    /// Changes a ring as a request asks, which is refused if the ring can't be that way.
    fn change_ring(
        &mut self,
        index: u32,
        change: impl FnOnce(&mut Vring, &Footing<D>) -> Result<(), RingError>,
    ) -> Result<Answer, SessionError> {
        let at = self.ring_index(index)?;
        match change(&mut self.rings[at], &self.footing) {
            Ok(()) => Ok(Answer::Done),
            Err(error) => Ok(self.ring_failed(at, &error)),
        }
    }

    /// "Disable all rings and reset all internal device state", while memory and protocol features
    /// stay: the front-end does not send them again.
    fn reset_device(&mut self) {
        self.stop_all();
        self.status = 0;
        self.footing.features &= Features::VHOST_USER_F_PROTOCOL_FEATURES;
        self.rings.iter_mut().for_each(Vring::reset);
        self.show_features();
    }

    fn set_mem_table(&mut self, table: Vec<(RegionSpec, OwnedFd)>) -> Result<(), SessionError> {
        check_regions(table.iter().map(|(spec, _)| *spec))?;
        let regions = table
            .into_iter()
            .map(|(spec, file)| Region::map(spec, file))
            .collect::<Result<_, _>>()?;
        self.change_memory(regions)
    }

    fn add_mem_reg(&mut self, spec: RegionSpec, file: OwnedFd) -> Result<(), SessionError> {
        self.require(
            ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
            FrontendReq::ADD_MEM_REG,
        )?;
        if self.regions().len() >= MAX_REGIONS {
            return Err(SessionError::TooManyRegions);
        }
        let mut regions = self.regions().to_vec();
        check_regions(regions.iter().map(|region| region.spec()).chain([spec]))?;
        regions.push(Region::map(spec, file)?);
        self.change_memory(regions)
    }

    /// A region "is identified by its guest address, user address and size".
    fn rem_mem_reg(&mut self, spec: RegionSpec) -> Result<(), SessionError> {
        self.require(
            ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
            FrontendReq::REM_MEM_REG,
        )?;
        let identity = |spec: RegionSpec| (spec.guest_addr, spec.user_addr, spec.size);
        let at = self
            .regions()
            .iter()
            .position(|region| identity(region.spec()) == identity(spec))
            .ok_or(SessionError::NoSuchRegion { spec })?;
        let mut regions = self.regions().to_vec();
        regions.remove(at);
        self.change_memory(regions)
    }

    /// Rings that do not lie in the new memory stop first and wait; rings that waited for it
    /// start. QEMU removes and adds again a region that changes, so a ring may be without memory
    /// in between.
    fn change_memory(&mut self, regions: Vec<Arc<Region>>) -> Result<(), SessionError> {
        let memory = Arc::new(GuestMemory::new(regions)?);
        self.footing.memory = Arc::clone(&memory);
        for ring in &mut self.rings {
            ring.leave_memory(&self.footing);
        }
        let refused = self.device().set_memory(memory);
        for (index, error) in &refused {
            let at = usize::from(*index);
            self.rings[at].suspend(&self.footing);
            self.ring_failed(at, error);
        }
        for at in 0..self.rings.len() {
            // What was just refused need not be tried again.
            if refused.iter().all(|(index, _)| usize::from(*index) != at)
                && let Err(error) = self.rings[at].start_if_ready(&self.footing)
            {
                self.ring_failed(at, &error);
            }
        }
        Ok(())
    }

    /// Whether the front-end asks us for the configuration space, so has no device model that serves
    /// it, or the control queue.
    fn passes_through(&self) -> bool {
        self.protocol_features
            .contains(ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIG)
    }

    /// User-mode Linux says 0 of each fresh ring, and all its rings are fresh; a packed one begins
    /// with its wrap counters set (virtio 1.3, 2.8.1).
    fn base_meant(&self, base: u32) -> u32 {
        match base {
            0 if self.passes_through() => RingLayout::of(self.footing.features).first_base(),
            base => base,
        }
    }

    /// Stops all rings until their next SET_VRING_KICK.
    fn stop_all(&mut self) {
        for ring in &mut self.rings {
            ring.stop(&self.footing);
        }
    }

    fn device(&self) -> &D {
        &self.footing.device
    }

    fn regions(&self) -> &[Arc<Region>] {
        self.footing.memory.regions()
    }

    fn show_features(&self) {
        self.device()
            .set_features(self.footing.features, self.protocol_features);
    }

    /// Checks a ring's index in the width in which it came.
    fn ring_index(&self, index: u32) -> Result<usize, SessionError> {
        let count = self.rings.len();
        usize::try_from(index)
            .ok()
            .filter(|at| *at < count)
            .ok_or(SessionError::NoSuchRing { index, count })
    }

    fn wants_ack(&self, need_reply: bool) -> bool {
        need_reply
            && self
                .protocol_features
                .contains(ProtocolFeatures::VHOST_USER_PROTOCOL_F_REPLY_ACK)
    }

    fn require(&self, feature: ProtocolFeatures, request: FrontendReq) -> Result<(), SessionError> {
        if self.protocol_features.contains(feature) {
            Ok(())
        } else {
            let request = request.into();
            Err(SessionError::NotNegotiated { request })
        }
    }

    fn refuse(&self, reason: &str) -> Answer {
        self.device().refused(None, reason.to_owned());
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            tracing::warn!(reason, suppressed, "request refused");
        }
        Answer::Refused
    }

    fn ring_failed(&self, ring: usize, error: &RingError) -> Answer {
        let index = u16::try_from(ring).ok();
        self.device()
            .refused(index, format!("ring {ring} refused: {error}"));
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            tracing::warn!(ring, %error, suppressed, "ring refused");
        }
        Answer::Refused
    }
}

impl<D: Device> Drop for Session<D> {
    fn drop(&mut self) {
        self.close(None);
    }
}

#[cfg(test)]
mod tests;
