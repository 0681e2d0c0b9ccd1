//! What a guest is like: its options, the features that they imply, and the handshake.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::features::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use super::fixed::{FixedGuest, FixedRings, FixedSlots};
use super::frontend::{Frontend, FrontendError, WANTED_PROTOCOL_FEATURES};
use super::guest::{Guest, GuestError};
use super::memory::{DriverMemory, DriverMemoryError, HUGE_PAGE_BYTES, RegionLayout};
use super::queue::{Layout, RingOptions};
use super::session::{DeviceStart, RingSetup};

macro_rules! options {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $default:expr;)+) => {
        /// What a guest is like. Features that its options imply are required of the back-end.
        #[derive(Clone, Debug)]
        pub struct GuestBuilder {
            $($(#[$doc])* pub(crate) $name: $type,)+
        }

        impl Default for GuestBuilder {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }

        impl GuestBuilder {
            $($(#[$doc])*
            #[must_use]
            pub fn $name(mut self, $name: $type) -> Self {
                self.$name = $name;
                self
            })+
        }
    };
}

options! {
    /// Queue pairs.
    queue_pairs: u16 = 1;
    /// Entries of each ring; a fixed guest's slots tell theirs.
    queue_size: u16 = 256;
    /// Features besides those that the other options imply, such as offloads.
    features: u64 = 0;
    /// Features that are negotiated if the back-end offers them.
    optional: u64 = 0;
    /// Layout of the rings.
    layout: Layout = Layout::Split;
    /// VIRTIO_NET_F_MRG_RXBUF.
    mergeable: bool = true;
    /// VIRTIO_RING_F_INDIRECT_DESC, and chains of several buffers use it.
    indirect: bool = true;
    /// VIRTIO_RING_F_EVENT_IDX.
    event_idx: bool = true;
    /// VIRTIO_F_IN_ORDER.
    in_order: bool = false;
    /// Bytes of one buffer, header included where it is in front of the frame; a fixed guest's
    /// slots tell theirs.
    buffer_size: u32 = 2048;
    /// The header has a descriptor of its own, on both rings; a fixed guest's slots tell it of
    /// theirs.
    chained: bool = false;
    /// Memory from hugepages.
    huge: bool = false;
    /// Regions over which memory is spread; the second and later ones start inside their files.
    regions: u16 = 1;
    /// Told to the back-end by NET_SET_MTU.
    mtu: Option<u16> = None;
    /// Protocol features to ask for.
    protocol_features: VhostUserProtocolFeatures = WANTED_PROTOCOL_FEATURES;
    /// How long the back-end may take to answer a request.
    reply_timeout: Duration = Duration::from_secs(5);
}

impl GuestBuilder {
    /// Without any feature that is no option's of its own.
    #[must_use]
    pub fn bare(self) -> Self {
        self.mergeable(false).indirect(false).event_idx(false)
    }

    /// All features that the back-end has to offer.
    fn required_features(&self) -> u64 {
        let implied = [
            (self.layout == Layout::Packed, VIRTIO_F_RING_PACKED),
            (self.mergeable, VIRTIO_NET_F_MRG_RXBUF),
            (self.indirect, VIRTIO_RING_F_INDIRECT_DESC),
            (self.event_idx, VIRTIO_RING_F_EVENT_IDX),
            (self.in_order, VIRTIO_F_IN_ORDER),
            (self.queue_pairs > 1, VIRTIO_NET_F_MQ),
        ];
        let wanted = implied.iter().filter(|(wanted, _)| *wanted);
        wanted.fold(self.features | VIRTIO_F_VERSION_1, |all, (_, bit)| {
            all | bit
        })
    }

    /// What to negotiate of what is offered: all that is required, and the optional that there is.
    ///
    /// # Errors
    /// Something that is required is not offered.
    pub fn choose_features(&self, offered: u64) -> Result<u64, GuestError> {
        let required = self.required_features();
        match required & !offered {
            0 => Ok(required | offered & self.optional),
            missing => Err(GuestError::NotOffered { missing }),
        }
    }

    /// Connects to a back-end that listens at `path` and starts all queues, for chains of any
    /// shape.
    ///
    /// # Errors
    /// No back-end, or one that lacks what the guest needs.
    pub fn connect(self, path: &Path) -> Result<Guest, GuestError> {
        self.on(Frontend::connect(path)?)
    }

    /// The same on a session in which nothing was said yet.
    ///
    /// # Errors
    /// A back-end that lacks what the guest needs.
    pub fn on(self, frontend: Frontend) -> Result<Guest, GuestError> {
        Guest::start(frontend, self)
    }

    /// Starts all queues on a session in which nothing was said yet, for buffers that stay where
    /// they are: those of the receive rings and those of the transmit rings.
    ///
    /// # Errors
    /// A back-end that lacks what the guest needs.
    pub fn start_fixed(
        &self,
        frontend: Frontend,
        slots: &[FixedSlots; 2],
    ) -> Result<FixedGuest, GuestError> {
        FixedGuest::start(frontend, self, slots)
    }

    /// The rings of a fixed guest without a back-end, as with all features that it could have: for
    /// whoever plays the device, too.
    ///
    /// # Errors
    /// A size that rings can't have, or memory that is short.
    pub fn fixed_rings(&self, slots: &[FixedSlots; 2]) -> Result<FixedRings, GuestError> {
        FixedRings::new(self, self.required_features() | self.optional, slots)
    }

    /// The handshake up to the features. Memory and rings are the caller's to make.
    ///
    /// # Errors
    /// A back-end that lacks what the guest needs.
    pub fn negotiate(&self, mut frontend: Frontend) -> Result<Negotiated, GuestError> {
        frontend.set_reply_timeout(self.reply_timeout)?;
        let offered = frontend.negotiate_protocol(self.protocol_features)?;
        let features = self.choose_features(offered)?;
        let (pairs, wanted) = (frontend.queue_pairs()?, self.queue_pairs);
        if pairs < u64::from(wanted) {
            let offered = pairs;
            return Err(GuestError::QueuePairs { offered, wanted });
        }
        Ok(Negotiated {
            frontend,
            offered,
            features,
            mtu: self.mtu,
        })
    }

    /// Memory for all queue pairs, whose rings and buffers take so much each, spread over the
    /// regions.
    pub(crate) fn memory(&self, pair_bytes: u64) -> Result<Arc<DriverMemory>, DriverMemoryError> {
        let page = if self.huge { HUGE_PAGE_BYTES } else { 4096 };
        let regions = u64::from(self.regions.max(1));
        // Areas don't straddle regions: if there are several, each has room for what would.
        let slack = if regions > 1 { pair_bytes } else { 0 };
        let total = u64::from(self.queue_pairs) * pair_bytes;
        let size = (total / regions + slack).next_multiple_of(page);
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

/// A session whose features are agreed on.
#[derive(Debug)]
pub struct Negotiated {
    /// The session.
    pub frontend: Frontend,
    /// What the back-end offers.
    pub offered: u64,
    /// What is in effect.
    pub features: u64,
    mtu: Option<u16>,
}

impl Negotiated {
    /// How rings are driven whose chains have at most so many buffers.
    pub fn ring_options(&self, buffers: u16) -> RingOptions {
        ring_options(self.features, buffers)
    }

    /// Shares memory and starts the rings, receive and transmit of each pair in turn.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn start(
        mut self,
        memory: &DriverMemory,
        rings: Vec<RingSetup<'_>>,
    ) -> Result<Frontend, FrontendError> {
        let device = DeviceStart {
            features: self.features,
            mtu: self.mtu,
            memory,
            rings,
        };
        self.frontend.start_device(self.offered, &device)?;
        Ok(self.frontend)
    }
}

/// How rings are driven with these features whose chains have at most so many buffers.
pub(crate) fn ring_options(features: u64, buffers: u16) -> RingOptions {
    let has = |feature| features & feature != 0;
    RingOptions {
        event_idx: has(VIRTIO_RING_F_EVENT_IDX),
        in_order: has(VIRTIO_F_IN_ORDER),
        indirect: if has(VIRTIO_RING_F_INDIRECT_DESC) {
            buffers
        } else {
            0
        },
    }
}
