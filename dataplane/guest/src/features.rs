//! Feature bits (virtio 1.3, 5.1.3 and 6; vhost-user), written down once more than the back-end has
//! them, from the specification: a wrong number on either side makes tests fail.

/// Device completes checksums of frames from the driver.
pub const VIRTIO_NET_F_CSUM: u64 = 1;
/// Driver takes frames with partial checksums.
pub const VIRTIO_NET_F_GUEST_CSUM: u64 = 1 << 1;
/// The device tells the MTU.
pub const VIRTIO_NET_F_MTU: u64 = 1 << 3;
/// Driver takes TCP over IPv4 frames that want segmentation.
pub const VIRTIO_NET_F_GUEST_TSO4: u64 = 1 << 7;
/// Driver takes TCP over IPv6 frames that want segmentation.
pub const VIRTIO_NET_F_GUEST_TSO6: u64 = 1 << 8;
/// Driver takes such frames with ECN.
pub const VIRTIO_NET_F_GUEST_ECN: u64 = 1 << 9;
/// Driver takes UDP frames that want fragmentation.
pub const VIRTIO_NET_F_GUEST_UFO: u64 = 1 << 10;
/// Device takes TCP over IPv4 frames that want segmentation.
pub const VIRTIO_NET_F_HOST_TSO4: u64 = 1 << 11;
/// Device takes TCP over IPv6 frames that want segmentation.
pub const VIRTIO_NET_F_HOST_TSO6: u64 = 1 << 12;
/// Device takes such frames with ECN.
pub const VIRTIO_NET_F_HOST_ECN: u64 = 1 << 13;
/// Driver merges receive buffers.
pub const VIRTIO_NET_F_MRG_RXBUF: u64 = 1 << 15;
/// There is a control queue.
pub const VIRTIO_NET_F_CTRL_VQ: u64 = 1 << 17;
/// The driver can announce itself.
pub const VIRTIO_NET_F_GUEST_ANNOUNCE: u64 = 1 << 21;
/// Several queue pairs.
pub const VIRTIO_NET_F_MQ: u64 = 1 << 22;
/// Dirty pages are logged (vhost).
pub const VHOST_F_LOG_ALL: u64 = 1 << 26;
/// Chains may lie in indirect tables.
pub const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
/// Events by index.
pub const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
/// There are vhost-user protocol features.
pub const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Virtio 1.0 or later.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// Packed rings.
pub const VIRTIO_F_RING_PACKED: u64 = 1 << 34;
/// Buffers are used in the order in which they were made available.
pub const VIRTIO_F_IN_ORDER: u64 = 1 << 35;
/// Driver takes UDP over IPv4 frames that want segmentation.
pub const VIRTIO_NET_F_GUEST_USO4: u64 = 1 << 54;
/// Driver takes UDP over IPv6 frames that want segmentation.
pub const VIRTIO_NET_F_GUEST_USO6: u64 = 1 << 55;
/// Device takes UDP frames that want segmentation.
pub const VIRTIO_NET_F_HOST_USO: u64 = 1 << 56;

/// UDP frames that want segmentation, both ways; with [`TSO`] or at least its checksums.
pub const USO: u64 = VIRTIO_NET_F_GUEST_USO4 | VIRTIO_NET_F_GUEST_USO6 | VIRTIO_NET_F_HOST_USO;

/// All that a driver needs for 64 KiB TCP frames both ways, checksums left open.
pub const TSO: u64 = VIRTIO_NET_F_CSUM
    | VIRTIO_NET_F_GUEST_CSUM
    | VIRTIO_NET_F_GUEST_TSO4
    | VIRTIO_NET_F_GUEST_TSO6
    | VIRTIO_NET_F_HOST_TSO4
    | VIRTIO_NET_F_HOST_TSO6;
