//! Why frames were not delivered: one list for the CLI, JSON and metrics.

use std::ops::{Index, IndexMut};

/// Why a frame, or one flooded copy of it, was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum DropReason {
    /// The frame is shorter than an Ethernet header.
    Runt,
    /// The frame exceeds the destination's MTU, or 64 KiB and headers.
    TooLong,
    /// The source address is a group address or all zeros.
    BadSource,
    /// The destination is a reserved address (01:80:c2:00:00:00 to 0f) that bridges do not forward.
    LinkLocal,
    /// The destination was learned behind the port that the frame came from.
    SamePort,
    /// There is no other port to send the frame to.
    NoDestination,
    /// The destination port has no guest, link or started queue.
    PortDown,
    /// The destination has no free receive buffers.
    RingFull,
    /// Another worker held the destination's receive queue.
    RingBusy,
    /// The guest's receive buffers can't hold the frame, which it did not ask to be split (no MRG_RXBUF).
    BufferTooSmall,
    /// The destination did not negotiate the segmentation that the frame needs, and its IP header
    /// tells another length than it has.
    OffloadUnsupported,
    /// The frame would have to be cut into more segments than the switch makes of one.
    TooManySegments,
    /// The frame asks for an offload that its source did not negotiate.
    OffloadNotNegotiated,
    /// The virtio-net header contradicts itself or the frame.
    BadHeader,
    /// A descriptor chain breaks the rules or points outside the guest's memory.
    BadDescriptor,
    /// The source's transmit queue is started but disabled.
    QueueDisabled,
    /// The host's kernel refused the frame (tap or NIC down, or its queue full).
    HostError,
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = 17;

    /// Every reason, in declaration order.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Runt,
        Self::TooLong,
        Self::BadSource,
        Self::LinkLocal,
        Self::SamePort,
        Self::NoDestination,
        Self::PortDown,
        Self::RingFull,
        Self::RingBusy,
        Self::BufferTooSmall,
        Self::OffloadUnsupported,
        Self::TooManySegments,
        Self::OffloadNotNegotiated,
        Self::BadHeader,
        Self::BadDescriptor,
        Self::QueueDisabled,
        Self::HostError,
    ];

    /// The reason's name in JSON, metrics and the CLI: snake_case, never changed.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Runt => "runt",
            Self::TooLong => "too_long",
            Self::BadSource => "bad_source",
            Self::LinkLocal => "link_local",
            Self::SamePort => "same_port",
            Self::NoDestination => "no_destination",
            Self::PortDown => "port_down",
            Self::RingFull => "ring_full",
            Self::RingBusy => "ring_busy",
            Self::BufferTooSmall => "buffer_too_small",
            Self::OffloadUnsupported => "offload_unsupported",
            Self::TooManySegments => "too_many_segments",
            Self::OffloadNotNegotiated => "offload_not_negotiated",
            Self::BadHeader => "bad_header",
            Self::BadDescriptor => "bad_descriptor",
            Self::QueueDisabled => "queue_disabled",
            Self::HostError => "host_error",
        }
    }

    /// One sentence for an operator who meets the reason for the first time.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Runt => "The frame is shorter than an Ethernet header.",
            Self::TooLong => "The frame exceeds the destination's MTU, or 64 KiB and headers.",
            Self::BadSource => "The source address is a group address or all zeros.",
            Self::LinkLocal => {
                "The destination is a reserved address (01:80:c2:00:00:00 to 0f) that bridges do not forward."
            }
            Self::SamePort => {
                "The destination was learned behind the port that the frame came from."
            }
            Self::NoDestination => "There is no other port to send the frame to.",
            Self::PortDown => "The destination port has no guest, link or started queue.",
            Self::RingFull => "The destination has no free receive buffers.",
            Self::RingBusy => "Another worker held the destination's receive queue.",
            Self::BufferTooSmall => {
                "The guest's receive buffers can't hold the frame, which it did not ask to be split (no MRG_RXBUF)."
            }
            Self::OffloadUnsupported => {
                "The destination did not negotiate the segmentation that the frame needs, and its IP header tells another length than it has."
            }
            Self::TooManySegments => {
                "The frame would have to be cut into more segments than the switch makes of one."
            }
            Self::OffloadNotNegotiated => {
                "The frame asks for an offload that its source did not negotiate."
            }
            Self::BadHeader => "The virtio-net header contradicts itself or the frame.",
            Self::BadDescriptor => {
                "A descriptor chain breaks the rules or points outside the guest's memory."
            }
            Self::QueueDisabled => "The source's transmit queue is started but disabled.",
            Self::HostError => {
                "The host's kernel refused the frame (tap or NIC down, or its queue full)."
            }
        }
    }

    /// The reason as an index into per-reason tables.
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// A count for each [`DropReason`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropCounts([u64; DropReason::ALL.len()]);

impl DropCounts {
    /// The sum over all reasons.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The reasons with a count that is not zero.
    pub fn nonzero(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .into_iter()
            .map(|reason| (reason, self[reason]))
            .filter(|(_, n)| *n > 0)
    }
}

impl Index<DropReason> for DropCounts {
    type Output = u64;

    fn index(&self, reason: DropReason) -> &u64 {
        &self.0[reason.index()]
    }
}

impl IndexMut<DropReason> for DropCounts {
    fn index_mut(&mut self, reason: DropReason) -> &mut u64 {
        &mut self.0[reason.index()]
    }
}
