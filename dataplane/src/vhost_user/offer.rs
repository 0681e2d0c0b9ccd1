//! Which features a front-end is offered.
//!
//! QEMU's device model serves control queue and configuration space by itself, and masks away from
//! its guest what we don't offer. User-mode Linux has no device model: its guest gets what we offer
//! and asks us for the rest. The two differ in what they send first: QEMU asks for features and
//! negotiates protocol features before SET_OWNER, and then asks for features again; others (user-mode
//! Linux, DPDK, rust-vmm's) begin with SET_OWNER and ask once. So
//!
//! - who began with SET_OWNER is offered CONFIG, of which QEMU would warn, and the MTU only if there is
//!   one to tell;
//! - QEMU alone is offered ACCESS_PLATFORM, without which it does not start a guest whose NIC has
//!   `iommu_platform=on`, and which takes BACKEND_REQ (it sends a socket for IOTLB messages, on which
//!   nothing is said). Where there is no IOMMU in front of the NIC, guest addresses are physical ones,
//!   and QEMU does not pass the bit on; where there is, it does, and that is refused.
//! - of a port with one queue pair it is not offered what takes a control queue, nor MQ: user-mode
//!   Linux reads GET_QUEUE_NUM as a number of rings, others as one of pairs. More queue pairs are
//!   nothing to a guest without control queue, but DPDK and Cloud Hypervisor serve it, and take from
//!   our offer that they may have several queues.

use super::device::Device;
use crate::wire::{Features, ProtocolFeatures};

/// What is known of a front-end when it asks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Offer {
    /// SET_OWNER came before any protocol feature was negotiated.
    pub(super) owned_first: bool,
}

impl Offer {
    /// The answer to GET_FEATURES.
    pub(super) fn features(self, device: &impl Device) -> Features {
        let mut features = device.features();
        if self.owned_first {
            features -= Features::VIRTIO_F_ACCESS_PLATFORM;
            if device.queue_pairs() == 1 {
                features -= Features::OF_CONTROL_QUEUE;
            }
            if device.mtu().is_none() {
                features -= Features::VIRTIO_NET_F_MTU;
            }
        }
        features
    }

    /// The answer to GET_PROTOCOL_FEATURES.
    pub(super) fn protocol_features(self, device: &impl Device) -> ProtocolFeatures {
        if !self.owned_first {
            ProtocolFeatures::all() - ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIG
        } else if device.queue_pairs() == 1 {
            ProtocolFeatures::all() - ProtocolFeatures::VHOST_USER_PROTOCOL_F_MQ
        } else {
            ProtocolFeatures::all()
        }
    }
}
