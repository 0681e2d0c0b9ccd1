//! Why frames were not delivered: one list for the CLI and JSON.

use std::ops::{Index, IndexMut};

macro_rules! drop_reasons {
    ($($reason:ident = $name:literal: $sentence:literal;)*) => {
        /// Why a frame, or one flooded copy of it, was not delivered.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason {
            $(#[doc = $sentence] $reason,)*
        }

        impl DropReason {
            /// Every reason, in declaration order.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$reason),*];

            /// How many reasons there are.
            pub const COUNT: usize = [$($name),*].len();

            /// The reason's name in JSON and the CLI: snake_case, never changed.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$reason => $name,)*
                }
            }

            /// One sentence for an operator who meets the reason for the first time.
            pub const fn describe(self) -> &'static str {
                match self {
                    $(Self::$reason => $sentence,)*
                }
            }
        }
    };
}

drop_reasons! {
    Runt = "runt":
        "The frame is shorter than an Ethernet header, or than one with the VLAN tag that it begins.";
    TooLong = "too_long":
        "The frame exceeds the destination's MTU, or 64 KiB and headers.";
    BadSource = "bad_source":
        "The source address is a group address or all zeros.";
    LinkLocal = "link_local":
        "The destination is a reserved address (01:80:c2:00:00:00 to 0f) that the switch does not forward (`group_fwd_mask`).";
    VlanDenied = "vlan_denied":
        "The frame's VLAN is none of those that its port takes frames of, or is 4095.";
    SamePort = "same_port":
        "The destination is behind the port that the frame came from.";
    NoDestination = "no_destination":
        "There is no other port to send the frame to.";
    FloodLimit = "flood_limit":
        "The frame was to go to many ports, and its source floods more than its limit (`flood_limit`).";
    PortDown = "port_down":
        "The destination port has no guest, link or started queue.";
    RingFull = "ring_full":
        "The destination has no free receive buffers.";
    RingBusy = "ring_busy":
        "Another worker held the destination's receive queue.";
    BufferTooSmall = "buffer_too_small":
        "The guest's receive buffers can't hold the frame, which it did not ask to be split (no MRG_RXBUF).";
    OffloadUnsupported = "offload_unsupported":
        "The destination did not negotiate the segmentation that the frame needs, and its IP header tells another length than it has, or it has more than three VLAN tags.";
    TooManySegments = "too_many_segments":
        "The frame would have to be cut into more segments than the switch makes of one.";
    OffloadNotNegotiated = "offload_not_negotiated":
        "The frame asks for an offload that its source did not negotiate.";
    BadHeader = "bad_header":
        "The virtio-net header contradicts itself or the frame.";
    BadDescriptor = "bad_descriptor":
        "A descriptor chain breaks the rules or points outside the guest's memory.";
    QueueDisabled = "queue_disabled":
        "The source's transmit queue is started but disabled.";
    HostError = "host_error":
        "The host's kernel refused the frame (tap or NIC down, or its queue full).";
}

impl DropReason {
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
