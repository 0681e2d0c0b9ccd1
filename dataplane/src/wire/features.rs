//! Feature bits of virtio-net and vhost-user: those that this back-end knows, which are those that
//! it offers. Their names are the specifications', so that what is shown needs no table.

use bitflags::bitflags;
use virtio_bindings::{virtio_config as config, virtio_net as net};

bitflags! {
    /// Virtio features (virtio 1.3, 5.1.3 and 6), and the two bits that vhost-user adds.
    ///
    /// QEMU masks away from the guest whatever is in its list of features for vhost-user-net
    /// back-ends and not in ours; of that list we lack what the data path can't do (UFO, RSS, and
    /// NOTIFY_ON_EMPTY and GSO of drivers older than virtio 1.0). STATUS, CTRL_VQ and
    /// the CTRL_* that the front-end serves by itself are outside of the list of QEMU 10, but in
    /// that of older versions, which would mask them too. A front-end without a device model, which
    /// passes to its guest what we offer, is offered less (`vhost_user/offer.rs`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        const VIRTIO_NET_F_CSUM = 1 << net::VIRTIO_NET_F_CSUM;
        const VIRTIO_NET_F_GUEST_CSUM = 1 << net::VIRTIO_NET_F_GUEST_CSUM;
        const VIRTIO_NET_F_MTU = 1 << net::VIRTIO_NET_F_MTU;
        const VIRTIO_NET_F_GUEST_TSO4 = 1 << net::VIRTIO_NET_F_GUEST_TSO4;
        const VIRTIO_NET_F_GUEST_TSO6 = 1 << net::VIRTIO_NET_F_GUEST_TSO6;
        const VIRTIO_NET_F_GUEST_ECN = 1 << net::VIRTIO_NET_F_GUEST_ECN;
        const VIRTIO_NET_F_HOST_TSO4 = 1 << net::VIRTIO_NET_F_HOST_TSO4;
        const VIRTIO_NET_F_HOST_TSO6 = 1 << net::VIRTIO_NET_F_HOST_TSO6;
        const VIRTIO_NET_F_HOST_ECN = 1 << net::VIRTIO_NET_F_HOST_ECN;
        const VIRTIO_NET_F_MRG_RXBUF = 1 << net::VIRTIO_NET_F_MRG_RXBUF;
        const VIRTIO_NET_F_STATUS = 1 << net::VIRTIO_NET_F_STATUS;
        const VIRTIO_NET_F_CTRL_VQ = 1 << net::VIRTIO_NET_F_CTRL_VQ;
        const VIRTIO_NET_F_CTRL_RX = 1 << net::VIRTIO_NET_F_CTRL_RX;
        const VIRTIO_NET_F_CTRL_VLAN = 1 << net::VIRTIO_NET_F_CTRL_VLAN;
        const VIRTIO_NET_F_CTRL_RX_EXTRA = 1 << net::VIRTIO_NET_F_CTRL_RX_EXTRA;
        const VIRTIO_NET_F_GUEST_ANNOUNCE = 1 << net::VIRTIO_NET_F_GUEST_ANNOUNCE;
        const VIRTIO_NET_F_MQ = 1 << net::VIRTIO_NET_F_MQ;
        const VIRTIO_NET_F_CTRL_MAC_ADDR = 1 << net::VIRTIO_NET_F_CTRL_MAC_ADDR;
        const VIRTIO_F_ANY_LAYOUT = 1 << config::VIRTIO_F_ANY_LAYOUT;
        const VIRTIO_F_INDIRECT_DESC = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
        const VIRTIO_F_EVENT_IDX = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
        const VHOST_USER_F_PROTOCOL_FEATURES = 1 << 30;
        const VIRTIO_F_VERSION_1 = 1 << config::VIRTIO_F_VERSION_1;
        const VIRTIO_F_ACCESS_PLATFORM = 1 << config::VIRTIO_F_ACCESS_PLATFORM;
        const VIRTIO_F_RING_PACKED = 1 << config::VIRTIO_F_RING_PACKED;
        const VIRTIO_F_IN_ORDER = 1 << config::VIRTIO_F_IN_ORDER;
        const VIRTIO_NET_F_GUEST_USO4 = 1 << net::VIRTIO_NET_F_GUEST_USO4;
        const VIRTIO_NET_F_GUEST_USO6 = 1 << net::VIRTIO_NET_F_GUEST_USO6;
        const VIRTIO_NET_F_HOST_USO = 1 << net::VIRTIO_NET_F_HOST_USO;
    }

    /// Protocol features (QEMU's docs/interop/vhost-user.rst, "Protocol features").
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct ProtocolFeatures: u64 {
        const VHOST_USER_PROTOCOL_F_MQ = 1 << 0;
        const VHOST_USER_PROTOCOL_F_RARP = 1 << 2;
        const VHOST_USER_PROTOCOL_F_REPLY_ACK = 1 << 3;
        const VHOST_USER_PROTOCOL_F_MTU = 1 << 4;
        const VHOST_USER_PROTOCOL_F_BACKEND_REQ = 1 << 5;
        const VHOST_USER_PROTOCOL_F_CONFIG = 1 << 9;
        const VHOST_USER_PROTOCOL_F_RESET_DEVICE = 1 << 13;
        const VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS = 1 << 15;
        const VHOST_USER_PROTOCOL_F_STATUS = 1 << 16;
    }
}

impl Features {
    /// What needs a control queue, which a front-end's own device model serves and we don't.
    pub(crate) const OF_CONTROL_QUEUE: Self = Self::VIRTIO_NET_F_CTRL_VQ
        .union(Self::VIRTIO_NET_F_CTRL_RX)
        .union(Self::VIRTIO_NET_F_CTRL_VLAN)
        .union(Self::VIRTIO_NET_F_CTRL_RX_EXTRA)
        .union(Self::VIRTIO_NET_F_GUEST_ANNOUNCE)
        .union(Self::VIRTIO_NET_F_MQ)
        .union(Self::VIRTIO_NET_F_CTRL_MAC_ADDR);

    /// With which a guest takes frames to be segmented, or whose checksum is open.
    pub(crate) const OF_RECEIVE_OFFLOADS: Self = Self::VIRTIO_NET_F_GUEST_CSUM
        .union(Self::VIRTIO_NET_F_GUEST_TSO4)
        .union(Self::VIRTIO_NET_F_GUEST_TSO6)
        .union(Self::VIRTIO_NET_F_GUEST_ECN)
        .union(Self::VIRTIO_NET_F_GUEST_USO4)
        .union(Self::VIRTIO_NET_F_GUEST_USO6);

    /// Names of the bits that are set, in their order.
    pub(crate) fn names(self) -> Vec<&'static str> {
        self.iter_names().map(|(name, _)| name).collect()
    }
}

impl ProtocolFeatures {
    /// Names of the bits that are set, in their order.
    pub(crate) fn names(self) -> Vec<&'static str> {
        self.iter_names().map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_named_in_order() {
        let features = Features::from_bits_retain(1 << 32 | 1 << 15);
        assert_eq!(
            features.names(),
            ["VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_F_VERSION_1"]
        );
        let protocol = ProtocolFeatures::from_bits_retain(1);
        assert_eq!(protocol.names(), ["VHOST_USER_PROTOCOL_F_MQ"]);
    }
}
