//! Names of feature bits, for people.

use crate::wire::Offloads;

/// virtio feature bits by their names in virtio 1.3, 5.1.3 and 6; bit 30 is vhost-user's own.
const VIRTIO: &[(u32, &str)] = &[
    (0, "VIRTIO_NET_F_CSUM"),
    (1, "VIRTIO_NET_F_GUEST_CSUM"),
    (2, "VIRTIO_NET_F_CTRL_GUEST_OFFLOADS"),
    (3, "VIRTIO_NET_F_MTU"),
    (5, "VIRTIO_NET_F_MAC"),
    (6, "VIRTIO_NET_F_GSO"),
    (7, "VIRTIO_NET_F_GUEST_TSO4"),
    (8, "VIRTIO_NET_F_GUEST_TSO6"),
    (9, "VIRTIO_NET_F_GUEST_ECN"),
    (10, "VIRTIO_NET_F_GUEST_UFO"),
    (11, "VIRTIO_NET_F_HOST_TSO4"),
    (12, "VIRTIO_NET_F_HOST_TSO6"),
    (13, "VIRTIO_NET_F_HOST_ECN"),
    (14, "VIRTIO_NET_F_HOST_UFO"),
    (15, "VIRTIO_NET_F_MRG_RXBUF"),
    (16, "VIRTIO_NET_F_STATUS"),
    (17, "VIRTIO_NET_F_CTRL_VQ"),
    (18, "VIRTIO_NET_F_CTRL_RX"),
    (19, "VIRTIO_NET_F_CTRL_VLAN"),
    (20, "VIRTIO_NET_F_CTRL_RX_EXTRA"),
    (21, "VIRTIO_NET_F_GUEST_ANNOUNCE"),
    (22, "VIRTIO_NET_F_MQ"),
    (23, "VIRTIO_NET_F_CTRL_MAC_ADDR"),
    (24, "VIRTIO_F_NOTIFY_ON_EMPTY"),
    (26, "VHOST_F_LOG_ALL"),
    (27, "VIRTIO_F_ANY_LAYOUT"),
    (28, "VIRTIO_F_INDIRECT_DESC"),
    (29, "VIRTIO_F_EVENT_IDX"),
    (30, "VHOST_USER_F_PROTOCOL_FEATURES"),
    (32, "VIRTIO_F_VERSION_1"),
    (33, "VIRTIO_F_ACCESS_PLATFORM"),
    (34, "VIRTIO_F_RING_PACKED"),
    (35, "VIRTIO_F_IN_ORDER"),
    (40, "VIRTIO_F_RING_RESET"),
    (54, "VIRTIO_NET_F_GUEST_USO4"),
    (55, "VIRTIO_NET_F_GUEST_USO6"),
    (56, "VIRTIO_NET_F_HOST_USO"),
];

/// Protocol feature bits by their names in QEMU's docs/interop/vhost-user.rst.
const PROTOCOL: &[(u32, &str)] = &[
    (0, "VHOST_USER_PROTOCOL_F_MQ"),
    (1, "VHOST_USER_PROTOCOL_F_LOG_SHMFD"),
    (2, "VHOST_USER_PROTOCOL_F_RARP"),
    (3, "VHOST_USER_PROTOCOL_F_REPLY_ACK"),
    (4, "VHOST_USER_PROTOCOL_F_MTU"),
    (13, "VHOST_USER_PROTOCOL_F_RESET_DEVICE"),
    (15, "VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS"),
    (16, "VHOST_USER_PROTOCOL_F_STATUS"),
];

/// What taps have by the names of linux/if_tun.h, in the order of the bits of [`Offloads`].
const TAP: [(&str, Offloads); 6] = [
    ("TUN_F_CSUM", Offloads::CSUM),
    ("TUN_F_TSO4", Offloads::TSO4),
    ("TUN_F_TSO6", Offloads::TSO6),
    ("TUN_F_TSO_ECN", Offloads::ECN),
    ("TUN_F_USO4", Offloads::USO4),
    ("TUN_F_USO6", Offloads::USO6),
];

/// Names of what a tap with these offloads has.
pub(crate) fn tap_names(offloads: Offloads) -> Vec<&'static str> {
    let set = TAP.iter().filter(|(_, offload)| offload.within(offloads));
    std::iter::once("IFF_VNET_HDR")
        .chain(set.map(|(name, _)| *name))
        .collect()
}

/// Names of the virtio features in `bits`.
pub(crate) fn virtio_names(bits: u64) -> Vec<&'static str> {
    names(bits, VIRTIO)
}

/// Names of the vhost-user protocol features in `bits`.
pub(crate) fn protocol_names(bits: u64) -> Vec<&'static str> {
    names(bits, PROTOCOL)
}

fn names(bits: u64, table: &[(u32, &'static str)]) -> Vec<&'static str> {
    table
        .iter()
        .filter(|(bit, _)| bits & (1 << bit) != 0)
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_named_in_order() {
        assert_eq!(
            virtio_names(1 << 32 | 1 << 15),
            ["VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_F_VERSION_1"]
        );
        assert_eq!(protocol_names(1), ["VHOST_USER_PROTOCOL_F_MQ"]);
    }
}
