//! Offloads that never mismatch: what a frame needs and its destination does not take is done here.
//!
//! ```text
//!   source frame                      parcels, one or more
//!   +----------+------------------+   +------+ private: virtio-net header, and the frame's headers
//!   | snapshot | rest, in pieces  |-> | head | or snapshot
//!   +----------+------------------+   +------+---+
//!                                     | body     | so many bytes of the source's pieces
//!                                     +----------+
//!                                     | open     | the checksum that is to be completed, if any
//!                                     +----------+
//! ```
//! Any destination can take a [`Parcel`]: one that copies has it written into its buffers
//! ([`Parcel::write_to`], which sums what it copies), one that gathers gets its pieces
//! ([`Parcel::seal`]).
//!
//! No byte decides anything here that is still in guest memory: headers are those of the snapshot.
//! A source that rewrites its payload meanwhile spoils the checksum of its own frame, and nothing
//! else.

mod checksum;
mod fields;
mod gso;
mod parcel;
mod pieces;
mod pseudo_header;
#[cfg(test)]
mod tests;
mod train;

use crate::net_header::vhost_features;

pub use checksum::{copy_and_checksum, internet_checksum};
pub(crate) use parcel::{Parcel, Parcels, Tally, Workbench};
pub(crate) use pieces::Pieces;
pub(crate) use pseudo_header::find_open_checksum;
pub(crate) use train::{Train, is_checksum_right};

/// Most frames that one frame is cut into: 64 KiB with segments of 128 bytes. Smaller ones, which no
/// MTU in use has, would make a worker build headers for others' money.
pub(crate) const MAX_PARCELS: u32 = 512;

/// A set of offloads: what a frame needs, or what a side may send or take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offloads(u8);

impl Offloads {
    pub(crate) const NONE: Self = Self(0);
    /// A partial checksum to complete.
    pub(crate) const CSUM: Self = Self(1);
    /// TCP over IPv4 to segment.
    pub(crate) const TSO4: Self = Self(2);
    /// TCP over IPv6 to segment.
    pub(crate) const TSO6: Self = Self(4);
    /// Segmentation of TCP with ECN.
    pub(crate) const ECN: Self = Self(8);
    /// UDP over IPv4 to segment.
    pub(crate) const USO4: Self = Self(16);
    /// UDP over IPv6 to segment.
    pub(crate) const USO6: Self = Self(32);
    pub(crate) const ALL: Self = Self(63);

    /// Their names for people, in the order of their bits.
    const NAMES: [&'static str; 6] = ["checksum", "tso4", "tso6", "ecn", "uso4", "uso6"];

    /// What a guest with these negotiated features may ask of us when it transmits.
    pub(crate) fn from_guest(features: u64) -> Self {
        use vhost_features::{CSUM, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_USO};
        Self::select(
            features,
            [CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_USO, HOST_USO],
        )
    }

    /// What a guest with these negotiated features takes when it receives.
    pub(crate) fn to_guest(features: u64) -> Self {
        use vhost_features::{
            GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6,
        };
        Self::select(
            features,
            [
                GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_USO4, GUEST_USO6,
            ],
        )
    }

    /// The offloads whose feature bits are set; none without checksums, on which all others rest
    /// (virtio 1.3, 5.1.3.1).
    fn select(features: u64, bits: [u32; 6]) -> Self {
        let set = (0..).zip(bits).fold(0, |all, (at, bit)| {
            all | u8::from(features & (1 << bit) != 0) << at
        });
        let set = Self(set);
        if Self::CSUM.within(set) {
            set
        } else {
            Self::NONE
        }
    }

    /// Whether all of `self` is in `offered`.
    #[inline]
    pub(crate) fn within(self, offered: Self) -> bool {
        self.0 & !offered.0 == 0
    }

    /// Both.
    #[inline]
    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that `other` lacks.
    #[inline]
    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Those that both have.
    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Their names.
    pub(crate) fn names(self) -> Vec<&'static str> {
        let has = |at: &usize| self.0 >> at & 1 != 0;
        (0..Self::NAMES.len())
            .filter(has)
            .map(|at| Self::NAMES[at])
            .collect()
    }
}

/// What is done to a frame's headers on its way, by the offloads that its destination lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing.
    Pass,
    /// The checksum is completed.
    Complete,
    /// The frame is cut into segments, whose checksums stay partial.
    Segment,
    /// The frame is cut into segments, whose checksums are completed.
    SegmentAndComplete,
}

impl Action {
    /// By [`Offloads`] that are needed and not taken: one look-up for a frame, or for all frames of
    /// a source towards a destination.
    const BY_MISSING: [Self; 64] = {
        let mut table = [Self::Pass; 64];
        let mut missing = 1;
        while missing < table.len() {
            table[missing] = match missing & 1 {
                0 => Self::Segment,
                _ if missing == 1 => Self::Complete,
                _ => Self::SegmentAndComplete,
            };
            missing += 1;
        }
        table
    };

    /// What is to be done for a destination that takes `taken` to a frame that needs `needed`; or
    /// the most that is to be done to the frames of a source that may send `needed`.
    #[inline]
    pub(crate) fn between(needed: Offloads, taken: Offloads) -> Self {
        Self::BY_MISSING[usize::from(needed.without(taken).0) % 64]
    }

    /// Its name for people.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Complete => "complete_checksum",
            Self::Segment => "segment",
            Self::SegmentAndComplete => "segment_and_complete_checksum",
        }
    }
}
