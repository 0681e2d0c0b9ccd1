//! Rings that cost and carry little: guests that forward at full rate beside them keep their rate.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use common::hostile::{BAD, GAP, MAIN_END, PEER, RawConfig, RawGuest, chain, plain, table_bytes};
use common::innocents::{self, Innocents};
use common::{Lab, frame};
use ringway_guest::features::{
    VIRTIO_F_VERSION_1, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{DESC_F_INDIRECT, DESC_F_WRITE, SplitDesc};

/// Buffers of the longest chain.
const LONGEST: u16 = 1024;

/// Rings as long as the longest chain.
const CONFIG: RawConfig = RawConfig {
    features: VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC | VIRTIO_NET_F_MRG_RXBUF,
    queue_size: LONGEST,
};

fn attacker(lab: &Lab, port: &str) -> RawGuest {
    RawGuest::connect(&lab.add_port(port), CONFIG)
}

/// Where a chain's descriptors lie.
#[derive(Clone, Copy, Debug)]
enum Place {
    Ring,
    Table,
}

/// Has all entries of the transmit ring name one chain of these buffers.
fn transmit(guest: &RawGuest, place: Place, buffers: &[(u64, u32)]) {
    match place {
        Place::Ring => guest.tx.write_chain(0, buffers),
        Place::Table => guest.tx.area.write_desc(0, table(guest, buffers, 0)),
    }
    guest.tx.name_heads(&[0]);
}

/// The descriptor of a table of these buffers, written behind the first half of the guest's.
fn table(guest: &RawGuest, buffers: &[(u64, u32)], direction: u16) -> SplitDesc {
    let bytes = table_bytes(&chain(0, buffers, direction));
    SplitDesc {
        addr: guest.put(1 << 19, &bytes),
        len: u32::try_from(bytes.len()).unwrap(),
        flags: DESC_F_INDIRECT,
        next: 0,
    }
}

/// Chains of as many empty buffers as can be, again and again.
fn empty_chains(place: Place, ports: usize) {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let guests: Vec<_> = (0..ports)
        .map(|port| attacker(&lab, &format!("bad{port}")))
        .collect();
    for guest in &guests {
        transmit(guest, place, &[(guest.buffers, 0); LONGEST as usize]);
    }
    let what = format!("empty chains in a {place:?} on {ports} ports");
    innocents.endure(0.9, &what, || {
        guests.iter().for_each(|guest| guest.tx.recycle());
    });
}

#[test]
fn empty_chains_in_a_ring_leave_others_their_rate() {
    empty_chains(Place::Ring, 1);
}

#[test]
fn empty_chains_in_tables_leave_others_their_rate() {
    empty_chains(Place::Table, 1);
}

#[test]
fn empty_chains_on_several_ports_leave_others_their_rate() {
    empty_chains(Place::Table, 4);
}

/// What receive buffers of a byte are like.
#[derive(Clone, Copy, Debug)]
enum Crumbs {
    /// Each has an entry of the ring.
    Ring,
    /// As many as can be are in a table.
    Table,
    /// As before, each in another region than the one before.
    TwoRegions,
}

/// Receive buffers of a byte, and an accomplice whose ring never runs dry of frames of so many bytes,
/// for them or for all: it has a port's share, one in four, and the buffers little of theirs.
fn crumbs(kind: Crumbs, to: u8, bytes: usize) {
    let lab = innocents::lab();
    let mut innocents = Innocents::new(&lab);
    let bad = attacker(&lab, "bad");
    lab.pin("bad", BAD);
    let other_region = MAIN_END + GAP;
    let buffers: Vec<_> = (0..LONGEST)
        .map(|i| match kind {
            Crumbs::TwoRegions if i % 2 == 1 => (other_region, 1),
            _ => (bad.buffers, 1),
        })
        .collect();
    let crumbs = match kind {
        Crumbs::Ring => SplitDesc {
            addr: bad.buffers,
            len: 1,
            flags: DESC_F_WRITE,
            next: 0,
        },
        Crumbs::Table | Crumbs::TwoRegions => table(&bad, &buffers, DESC_F_WRITE),
    };
    bad.rx.area.write_desc(0, crumbs);
    bad.rx.name_heads(&[0]);
    let accomplice = attacker(&lab, "accomplice");
    let message = plain(&frame(to, PEER, bytes, 1));
    let addr = accomplice.put(0, &message);
    let len = u32::try_from(message.len()).unwrap();
    transmit(&accomplice, Place::Ring, &[(addr, len)]);
    let what = format!("receive buffers of a byte, {kind:?}: frames of {bytes} B to {to:#x}");
    innocents.endure(0.5, &what, || {
        bad.rx.recycle();
        accomplice.tx.recycle();
    });
}

#[test]
fn receive_buffers_of_a_byte_leave_others_their_rate() {
    crumbs(Crumbs::Ring, BAD, 64);
}

#[test]
fn receive_tables_of_bytes_leave_others_their_rate() {
    crumbs(Crumbs::Table, BAD, 64);
}

#[test]
fn long_frames_into_receive_buffers_of_a_byte_leave_others_their_rate() {
    crumbs(Crumbs::Ring, BAD, 1400);
}

#[test]
fn receive_tables_of_bytes_in_two_regions_leave_others_their_rate() {
    crumbs(Crumbs::TwoRegions, BAD, 1400);
}

#[test]
fn broadcasts_into_receive_tables_of_bytes_leave_others_their_rate() {
    crumbs(Crumbs::TwoRegions, 0xff, 1400);
}
