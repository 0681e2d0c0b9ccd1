//! Starting a whole device over a [`Frontend`], in QEMU's order.

use super::event::EventFd;
use super::features::VHOST_USER_F_PROTOCOL_FEATURES;
use super::frontend::{Frontend, FrontendError};
use super::memory::DriverMemory;
use super::queue::RingPlace;

/// Device status bits (virtio 1.3, 2.1): acknowledge, driver.
const STATUS_DRIVER: u8 = 3;
/// And features_ok, driver_ok.
const STATUS_RUNNING: u8 = 15;

/// A ring to start.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup<'a> {
    /// Where it lies and where the device begins.
    pub place: RingPlace,
    /// Driver to device.
    pub kick: &'a EventFd,
    /// Device to driver.
    pub call: &'a EventFd,
}

/// A device to start.
#[derive(Clone, Debug)]
pub struct DeviceStart<'a> {
    /// Virtio features to negotiate.
    pub features: u64,
    /// Told to the back-end if it can be told.
    pub mtu: Option<u16>,
    /// Memory that holds all rings and buffers.
    pub memory: &'a DriverMemory,
    /// All rings, receive and transmit of each pair in turn.
    pub rings: Vec<RingSetup<'a>>,
}

impl Frontend {
    /// MTU, status, features, memory, rings. `offered` is what
    /// [`Frontend::negotiate_protocol`] returned.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn start_device(
        &mut self,
        offered: u64,
        device: &DeviceStart<'_>,
    ) -> Result<(), FrontendError> {
        if let Some(mtu) = device.mtu {
            self.set_mtu(mtu)?;
        }
        self.set_status(STATUS_DRIVER)?;
        self.set_features(device.features | offered & VHOST_USER_F_PROTOCOL_FEATURES)?;
        self.share_memory(device.memory)?;
        self.start_rings(device.memory, &device.rings)?;
        self.set_status(STATUS_RUNNING)
    }

    /// Starts rings, numbered from 0, then enables all.
    ///
    /// # Errors
    /// The back-end closed the socket, or refused and said so.
    pub fn start_rings(
        &mut self,
        memory: &DriverMemory,
        rings: &[RingSetup<'_>],
    ) -> Result<(), FrontendError> {
        for (index, ring) in (0..).zip(rings) {
            let (kick, call) = (Some(ring.kick), Some(ring.call));
            self.start_ring(index, memory, ring.place, kick, call)?;
        }
        (0..)
            .zip(rings)
            .try_for_each(|(index, _)| self.enable_ring(index, true))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

    use super::*;
    use crate::{
        DriverRing, FrontendReply, Layout, RegionLayout, RingOptions, WANTED_PROTOCOL_FEATURES,
        encode,
    };

    const REPLY: u32 = 5;
    const NEED_REPLY: u32 = 8;

    /// Answers requests as a back-end with these protocol features, until the socket closes, and
    /// returns them.
    fn scripted_backend(
        socket: UnixStream,
        protocol: VhostUserProtocolFeatures,
    ) -> Vec<FrontendReply> {
        let backend = Frontend::new(socket);
        let mut seen = Vec::new();
        while let Ok(message) = backend.receive() {
            let number = match message.request {
                r if r == FrontendReq::GET_FEATURES as u32 => Some(u64::MAX),
                r if r == FrontendReq::GET_PROTOCOL_FEATURES as u32 => Some(protocol.bits()),
                r if r == FrontendReq::GET_QUEUE_NUM as u32 => Some(1),
                r if r == FrontendReq::GET_MAX_MEM_SLOTS as u32 => Some(8),
                r if r == FrontendReq::GET_VRING_BASE as u32 => Some(0x8007_8009 << 32 | 1),
                _ if message.flags & NEED_REPLY != 0 => Some(0),
                _ => None,
            };
            if let Some(number) = number {
                let reply = encode(message.request, REPLY, &number.to_ne_bytes());
                backend.send_raw(&reply, &[]).unwrap();
            }
            seen.push(message);
        }
        seen
    }

    fn session(protocol: VhostUserProtocolFeatures) -> Vec<FrontendReply> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let backend = thread::spawn(move || scripted_backend(theirs, protocol));
        let layout = |guest_addr| RegionLayout {
            guest_addr,
            size: 1 << 16,
            file_offset: 4096,
        };
        let memory = DriverMemory::new(&[layout(0), layout(1 << 32)], false).unwrap();
        let ring =
            |_| DriverRing::new(&memory, Layout::Packed, 16, RingOptions::default()).unwrap();
        let (rings, event): (Vec<DriverRing>, _) =
            ((0..2).map(ring).collect(), EventFd::new().unwrap());
        let mut frontend = Frontend::new(ours);
        let offered = frontend
            .negotiate_protocol(WANTED_PROTOCOL_FEATURES)
            .unwrap();
        assert_eq!(frontend.queue_pairs().unwrap(), 1);
        let start = |ring: &DriverRing| RingSetup {
            place: ring.place(),
            kick: &event,
            call: &event,
        };
        let device = DeviceStart {
            features: 1 << 32,
            mtu: Some(9000),
            memory: &memory,
            rings: rings.iter().map(start).collect(),
        };
        frontend.start_device(offered, &device).unwrap();
        assert_eq!(frontend.stop_ring(1).unwrap(), 0x8007_8009);
        drop(frontend);
        backend.join().unwrap()
    }

    fn bodies(seen: &[FrontendReply], request: FrontendReq) -> Vec<&[u8]> {
        let of_kind = |m: &&FrontendReply| m.request == request as u32;
        seen.iter().filter(of_kind).map(|m| &m.body[..]).collect()
    }

    #[test]
    fn requests_come_in_qemus_order_with_their_descriptors() {
        let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let seen = session(protocol);
        let requests: Vec<u32> = seen.iter().map(|m| m.request).collect();
        // GET/SET of features and protocol features, owner, queue pairs, features, memory, then
        // size, base, addresses, kick, call of both rings, both enabled, one stopped.
        let expected = [
            1, 15, 16, 3, 17, 2, 5, 8, 10, 9, 12, 13, 8, 10, 9, 12, 13, 18, 18, 11,
        ];
        assert_eq!(requests, expected);
        let with_fds: Vec<(u32, usize)> = seen
            .iter()
            .filter(|m| !m.fds.is_empty())
            .map(|m| (m.request, m.fds.len()))
            .collect();
        assert_eq!(with_fds, [(5, 2), (12, 1), (13, 1), (12, 1), (13, 1)]);
        let features = bodies(&seen, FrontendReq::SET_FEATURES);
        assert_eq!(features, [(1u64 << 32 | 1 << 30).to_ne_bytes()]);
    }

    #[test]
    fn a_packed_rings_base_keeps_both_halves() {
        let seen = session(VhostUserProtocolFeatures::empty());
        let bases = bodies(&seen, FrontendReq::SET_VRING_BASE);
        let of_second: [u8; 8] = bases[1].try_into().unwrap();
        assert_eq!(u64::from_ne_bytes(of_second), 0x8000_8000 << 32 | 1);
    }

    #[test]
    fn memory_slots_are_added_one_by_one_where_they_can_be() {
        let seen = session(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        assert!(bodies(&seen, FrontendReq::SET_MEM_TABLE).is_empty());
        let added = bodies(&seen, FrontendReq::ADD_MEM_REG);
        assert_eq!(added.len(), 2);
        assert_eq!(added[1][8..16], (1u64 << 32).to_ne_bytes());
        assert_eq!(added[1][32..], 4096u64.to_ne_bytes());
    }
}
