//! Feature bits (virtio 1.3, 5.1.3 and 6; vhost-user), written down once more than the back-end has
//! them, from the specification: a wrong number on either side makes tests fail.

macro_rules! features {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)+) => {
        $($(#[$doc])* pub const $name: u64 = 1 << $bit;)+
        const NAMES: &[(u64, &str)] = &[$(($name, stringify!($name))),+];
    };
}

features! {
    /// Device completes checksums of frames from the driver.
    VIRTIO_NET_F_CSUM = 0;
    /// Driver takes frames with partial checksums.
    VIRTIO_NET_F_GUEST_CSUM = 1;
    /// The device tells the MTU.
    VIRTIO_NET_F_MTU = 3;
    /// Driver takes TCP over IPv4 frames that want segmentation.
    VIRTIO_NET_F_GUEST_TSO4 = 7;
    /// Driver takes TCP over IPv6 frames that want segmentation.
    VIRTIO_NET_F_GUEST_TSO6 = 8;
    /// Driver takes such frames with ECN.
    VIRTIO_NET_F_GUEST_ECN = 9;
    /// Driver takes UDP frames that want fragmentation.
    VIRTIO_NET_F_GUEST_UFO = 10;
    /// Device takes TCP over IPv4 frames that want segmentation.
    VIRTIO_NET_F_HOST_TSO4 = 11;
    /// Device takes TCP over IPv6 frames that want segmentation.
    VIRTIO_NET_F_HOST_TSO6 = 12;
    /// Device takes such frames with ECN.
    VIRTIO_NET_F_HOST_ECN = 13;
    /// Driver merges receive buffers.
    VIRTIO_NET_F_MRG_RXBUF = 15;
    /// There is a control queue.
    VIRTIO_NET_F_CTRL_VQ = 17;
    /// The driver can announce itself.
    VIRTIO_NET_F_GUEST_ANNOUNCE = 21;
    /// Several queue pairs.
    VIRTIO_NET_F_MQ = 22;
    /// Dirty pages are logged (vhost).
    VHOST_F_LOG_ALL = 26;
    /// Chains may lie in indirect tables.
    VIRTIO_RING_F_INDIRECT_DESC = 28;
    /// Events by index.
    VIRTIO_RING_F_EVENT_IDX = 29;
    /// There are vhost-user protocol features.
    VHOST_USER_F_PROTOCOL_FEATURES = 30;
    /// Virtio 1.0 or later.
    VIRTIO_F_VERSION_1 = 32;
    /// Packed rings.
    VIRTIO_F_RING_PACKED = 34;
    /// Buffers are used in the order in which they were made available.
    VIRTIO_F_IN_ORDER = 35;
    /// Driver takes UDP over IPv4 frames that want segmentation.
    VIRTIO_NET_F_GUEST_USO4 = 54;
    /// Driver takes UDP over IPv6 frames that want segmentation.
    VIRTIO_NET_F_GUEST_USO6 = 55;
    /// Device takes UDP frames that want segmentation.
    VIRTIO_NET_F_HOST_USO = 56;
}

/// UDP frames that want segmentation, both ways; with [`TSO`] or at least its checksums.
pub const USO: u64 = VIRTIO_NET_F_GUEST_USO4 | VIRTIO_NET_F_GUEST_USO6 | VIRTIO_NET_F_HOST_USO;

/// All that a driver needs for 64 KiB TCP frames both ways, checksums left open.
pub const TSO: u64 = VIRTIO_NET_F_CSUM
    | VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_HOST_TSO4
    | VIRTIO_NET_F_HOST_TSO6;

/// The names of these features, for messages.
pub fn names(features: u64) -> String {
    let named = NAMES.iter().filter(|(bit, _)| features & bit != 0);
    let mut names: Vec<String> = named.clone().map(|(_, name)| (*name).to_owned()).collect();
    let rest = named.fold(features, |rest, (bit, _)| rest & !bit);
    if rest != 0 {
        names.push(format!("{rest:#x}"));
    }
    names.join(", ")
}
