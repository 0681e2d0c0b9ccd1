//! Testbeds for tests that count: with frames to segment, and with an AF_XDP port.
#![allow(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

use ringway_api::XdpMode;
use ringway_guest::Layout;

use crate::common::endpoint::ALL;
use crate::common::host::{Raw, quiet_namespace, veth};
use crate::common::packet::{Packet, pattern};
use crate::common::{eventually, frame, name, nic_config};
use ringway_testbed::{Shape, Testbed, station};

/// The shape of a testbed for a frame of so many segments from the first guest to station `to`,
/// whose receivers negotiated `takes`; and the frame with its header.
pub(crate) fn for_segments(segments: u16, to: [u8; 6], takes: u64) -> (Shape, Vec<u8>) {
    const GSO_SIZE: u16 = 500;
    let packet = Packet {
        stations: [station(0), to],
        ..Packet::new(true, false, pattern(usize::from(segments * GSO_SIZE)))
    };
    let frame = packet.open();
    let shape = Shape {
        receive_size: 512,
        offloads: [ALL, takes],
        ..Shape::plain(Layout::Split, u32::try_from(frame.len()).unwrap())
    };
    let gso_size = if segments > 1 { GSO_SIZE } else { 0 };
    (shape, [packet.header(gso_size), frame].concat())
}

/// The station behind the port; those of guests count from 1.
pub(crate) const STATION: u8 = 100;

/// A testbed with a port of one end of a veth pair, in a fresh namespace; a raw socket has the
/// other, and the switch knows of it.
pub(crate) fn bed_with_nic(shape: Shape) -> (Testbed, Raw) {
    quiet_namespace();
    veth(1, 1500);
    let mut bed = Testbed::new(shape);
    let config = nic_config(|nic| nic.mode = XdpMode::Copy);
    bed.switch.add_af_xdp_port(name("nic"), &config).unwrap();
    let far = Raw::open("far0");
    far.send(&frame(0xff, STATION, 60, 0));
    let others = bed.guests.len() as u64 - 1;
    let mut received = 0;
    eventually("the hello arrives", || {
        bed.switch.turn();
        received += bed.receive();
        received == others
    });
    (bed, far)
}
