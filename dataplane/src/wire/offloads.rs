//! Offloads: what is left to others of a frame's checksum and segmentation.

use super::Features;

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
    /// No offload, but the right to say of a frame that its checksum was found right, which a
    /// destination then believes. Only the host's kernel has it.
    pub(crate) const VOUCHES: Self = Self(64);

    /// Their names for people, in the order of their bits.
    const NAMES: [&'static str; 6] = ["checksum", "tso4", "tso6", "ecn", "uso4", "uso6"];

    /// What a guest with these negotiated features may ask of us when it transmits.
    pub(crate) fn from_guest(features: Features) -> Self {
        Self::select(
            features,
            [
                Features::VIRTIO_NET_F_CSUM,
                Features::VIRTIO_NET_F_HOST_TSO4,
                Features::VIRTIO_NET_F_HOST_TSO6,
                Features::VIRTIO_NET_F_HOST_ECN,
                Features::VIRTIO_NET_F_HOST_USO,
                Features::VIRTIO_NET_F_HOST_USO,
            ],
        )
    }

    /// What a guest with these negotiated features takes when it receives.
    pub(crate) fn to_guest(features: Features) -> Self {
        Self::select(
            features,
            [
                Features::VIRTIO_NET_F_GUEST_CSUM,
                Features::VIRTIO_NET_F_GUEST_TSO4,
                Features::VIRTIO_NET_F_GUEST_TSO6,
                Features::VIRTIO_NET_F_GUEST_ECN,
                Features::VIRTIO_NET_F_GUEST_USO4,
                Features::VIRTIO_NET_F_GUEST_USO6,
            ],
        )
    }

    /// The offloads whose features are negotiated; none without checksums, on which all others rest
    /// (virtio 1.3, 5.1.3.1).
    fn select(negotiated: Features, features: [Features; 6]) -> Self {
        let set = (0..).zip(features).fold(0, |all, (at, feature)| {
            all | u8::from(negotiated.contains(feature)) << at
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

    /// The set as a number below 64.
    #[inline]
    pub(crate) const fn bits(self) -> u8 {
        self.0
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
