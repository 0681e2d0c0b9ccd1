//! The announcement of a guest that has moved here.

use ringway_bridge::MacAddr;

/// The broadcast that tells switches where a guest is now: a reverse ARP request (RFC 903) for
/// `mac`, padded to the least length of an Ethernet frame without FCS.
pub(crate) fn rarp(mac: MacAddr) -> Box<[u8]> {
    const ETHERTYPE_RARP: [u8; 2] = [0x80, 0x35];
    const REQUEST_REVERSE: u8 = 3;
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&MacAddr::BROADCAST.0);
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&ETHERTYPE_RARP);
    // Hardware type Ethernet, protocol IPv4, address lengths 6 and 4.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, REQUEST_REVERSE]);
    for _ in ["sender", "target"] {
        frame.extend_from_slice(&mac.0);
        frame.extend_from_slice(&[0; 4]);
    }
    frame.resize(60, 0);
    frame.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_is_a_reverse_arp_broadcast() {
        let frame = rarp(MacAddr([0x52, 0x54, 0, 0, 0, 9]));
        assert_eq!(frame.len(), 60);
        let (ethernet, packet) = etherparse::Ethernet2Header::from_slice(&frame).unwrap();
        assert_eq!(ethernet.destination, [0xff; 6]);
        assert_eq!(ethernet.source, [0x52, 0x54, 0, 0, 0, 9]);
        assert_eq!(ethernet.ether_type.0, 0x8035);
        // RFC 903: the packet of ARP with operation 3, both hardware addresses our own.
        assert_eq!(&packet[..8], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(packet[8..14], ethernet.source);
        assert_eq!(packet[18..24], ethernet.source);
    }
}
