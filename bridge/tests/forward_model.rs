//! Forwarding of bursts against a naive model that takes one frame after the other.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use proptest::prelude::*;
use ringway_bridge::{
    Arrivals, Bridge, BridgeConfig, Decisions, DropReason, FrameHead, FrameSet, MacAddr, Members,
    PortId, Run, Tick,
};

const AGEING: u32 = 10;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    To(PortId),
    Flooded,
    Dropped(DropReason),
}

/// Learned addresses: the port and when it was last seen.
#[derive(Default)]
struct Model(HashMap<u64, (PortId, u32)>);

impl Model {
    fn forward(&mut self, members: &[PortId], now: u32, from: PortId, head: &FrameHead) -> Fate {
        let (src, dst) = (MacAddr::from_u64(head.src), MacAddr::from_u64(head.dst));
        if src.is_group() || head.src == 0 {
            return Fate::Dropped(DropReason::BadSource);
        }
        if dst.is_link_local() && dst.0[5] != 0 {
            return Fate::Dropped(DropReason::LinkLocal);
        }
        self.0.insert(head.src, (from, now));
        let known = self
            .0
            .get(&head.dst)
            .filter(|(_, seen)| now - seen <= AGEING);
        match known {
            Some((port, _)) if *port == from => Fate::Dropped(DropReason::SamePort),
            Some((port, _)) if members.contains(port) => Fate::To(*port),
            _ if members.iter().any(|port| *port != from) => Fate::Flooded,
            _ => Fate::Dropped(DropReason::NoDestination),
        }
    }
}

fn port(n: u16) -> PortId {
    PortId::new(n).unwrap()
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => (1..6u64).prop_map(|n| 0x0200_0000_0000 | n),
        1 => Just(MacAddr::BROADCAST.to_u64()),
        1 => Just(0x3333_0000_0001),
        1 => Just(0x0180_c200_000e),
        1 => Just(0x0180_c200_0000),
        1 => Just(0),
    ]
}

/// Heads in runs, as traffic comes.
fn heads() -> impl Strategy<Value = Vec<FrameHead>> {
    let run = (address(), address(), 1..4usize).prop_map(|(src, dst, n)| {
        vec![
            FrameHead {
                dst,
                src,
                ether_type: 0x0800,
            };
            n
        ]
    });
    prop::collection::vec(run, 0..40).prop_map(|runs| {
        let mut heads = runs.concat();
        heads.truncate(64);
        heads
    })
}

/// The valid frames of a burst, successive ones with one head together.
fn runs(heads: &[FrameHead], valid: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (i, head) in heads.iter().enumerate() {
        match runs.last_mut() {
            _ if valid >> i & 1 == 0 => {}
            Some(run) if run.head == *head => run.frames |= FrameSet::one(i),
            _ => runs.push(Run {
                head: *head,
                frames: FrameSet::one(i),
            }),
        }
    }
    runs
}

fn bridge(seed: u64) -> Bridge {
    Bridge::new(BridgeConfig {
        fdb_capacity: 64,
        ageing_ticks: AGEING,
        move_hold_ticks: 0,
        seed,
        group_fwd_mask: BridgeConfig::BPDUS,
    })
}

proptest! {
    #[test]
    fn a_burst_goes_where_its_frames_would_go_one_by_one(
        member_ports in prop::collection::hash_set(0..5u16, 0..5),
        bursts in prop::collection::vec((0..5u16, heads(), any::<u64>(), 0..15u32), 1..8),
        seed: u64,
    ) {
        let bridge = bridge(seed);
        let mut members = Members::new();
        let member_ports: Vec<_> = member_ports.into_iter().map(port).collect();
        for port in &member_ports {
            members.add(*port);
        }
        let mut model = Model::default();
        let mut out = Decisions::new();
        let mut now = 0;
        for (in_port, heads, valid, wait) in bursts {
            now += wait;
            let valid = if valid % 3 == 0 { valid } else { u64::MAX };
            let in_port = port(in_port);
            let fates: Vec<_> = heads
                .iter()
                .enumerate()
                .filter(|(i, _)| valid >> i & 1 != 0)
                .map(|(i, head)| (i, model.forward(&member_ports, now, in_port, head)))
                .collect();
            let burst = Arrivals { in_port, runs: &runs(&heads, valid) };
            bridge.forward(&members, Tick(now), &burst, &mut out);

            let with = |wanted: Fate| {
                fates.iter().filter(|(_, fate)| *fate == wanted).map(|(i, _)| *i).collect::<FrameSet>()
            };
            prop_assert_eq!(out.flooded(), with(Fate::Flooded));
            for reason in DropReason::ALL {
                let dropped = out.drops().iter().find(|(r, _)| *r == reason);
                let dropped = dropped.map_or(FrameSet::EMPTY, |d| d.1);
                prop_assert_eq!(dropped, with(Fate::Dropped(reason)), "{:?}", reason);
            }
            for port in (0..5).map(port) {
                let sent = out.destinations().iter().find(|(p, _)| *p == port);
                let sent = sent.map_or(FrameSet::EMPTY, |d| d.1);
                let is_flooded_to = port != in_port && member_ports.contains(&port);
                let flooded = if is_flooded_to { with(Fate::Flooded) } else { FrameSet::EMPTY };
                prop_assert_eq!(sent, with(Fate::To(port)) | flooded, "{:?}", port);
            }
            check_conservation(&out, fates.iter().map(|(i, _)| *i).collect())?;

                        let order: Vec<_> = out.destinations().iter().map(|(_, frames)| frames.first()).collect();
            prop_assert!(order.is_sorted(), "order of first appearance: {:?}", order);
            let order: Vec<_> = out.drops().iter().map(|(_, frames)| frames.first()).collect();
            prop_assert!(order.is_sorted(), "order of first appearance: {:?}", order);
        }
    }
}

/// Every frame is delivered once, flooded or dropped once; every list has an element once.
fn check_conservation(out: &Decisions, frames: FrameSet) -> Result<(), TestCaseError> {
    let mut accounted = out.flooded();
    let unicast = out
        .destinations()
        .iter()
        .map(|(_, sent)| *sent - out.flooded());
    for set in unicast.chain(out.drops().iter().map(|(_, dropped)| *dropped)) {
        prop_assert!((accounted & set).is_empty(), "accounted twice");
        accounted |= set;
    }
    prop_assert_eq!(accounted, frames);
    for (i, (port, sent)) in out.destinations().iter().enumerate() {
        prop_assert!(!sent.is_empty());
        prop_assert!(
            out.destinations()[..i]
                .iter()
                .all(|(other, _)| other != port)
        );
    }
    Ok(())
}

#[test]
fn a_full_burst_uses_all_64_bits() {
    let bridge = bridge(1);
    let mut members = Members::new();
    members.add(port(1));
    members.add(port(2));
    let head = FrameHead {
        dst: 0xffff_ffff_ffff,
        src: 2,
        ether_type: 0x0806,
    };
    let mut out = Decisions::new();
    let burst = Arrivals {
        in_port: port(1),
        runs: &runs(&[head; 64], u64::MAX),
    };
    bridge.forward(&members, Tick(0), &burst, &mut out);
    assert_eq!(out.destinations(), [(port(2), FrameSet::ALL)]);
    assert_eq!((out.flooded(), bridge.fdb().len()), (FrameSet::ALL, 1));
}

#[test]
fn a_limit_keeps_a_source_from_being_learned_but_not_its_frames_from_going() {
    let bridge = bridge(1);
    bridge.fdb().set_limit(port(1), Some(0));
    let mut members = Members::new();
    members.add(port(2));
    let head = FrameHead {
        dst: 4,
        src: 2,
        ether_type: 0x0800,
    };
    let mut out = Decisions::new();
    let burst = Arrivals {
        in_port: port(1),
        runs: &runs(&[head; 3], 0b101),
    };
    bridge.forward(&members, Tick(0), &burst, &mut out);
    assert_eq!(out.destinations(), [(port(2), FrameSet::from_bits(0b101))]);
    assert!(bridge.fdb().is_empty());
}

#[test]
fn members_join_and_leave_once() {
    let mut members = Members::new();
    assert!(members.add(port(4095)) && members.add(port(0)) && !members.add(port(0)));
    assert_eq!(members.iter().collect::<Vec<_>>(), [port(4095), port(0)]);
    assert!(members.contains(port(4095)) && !members.contains(port(1)));
    assert!(members.remove(port(4095)) && !members.remove(port(4095)));
    assert_eq!((members.len(), members.is_empty()), (1, false));
}

#[test]
fn what_a_source_floods_beyond_its_limit_is_dropped_and_what_others_flood_is_not() {
    let bridge = bridge(1);
    let mut members = Members::new();
    (0..64).for_each(|n| _ = members.add(port(n)));
    let head = |dst, src| FrameHead {
        dst,
        src,
        ether_type: 0x0800,
    };
    let (station, other) = (0x0200_0000_0001, 0x0200_0000_0002);
    let mut out = Decisions::new();
    let mut forward = |from, head, now| {
        let burst = Arrivals {
            in_port: port(from),
            runs: &runs(&[head; 64], u64::MAX),
        };
        bridge.forward(&members, Tick(now), &burst, &mut out);
        let to_one = out.destinations().first().map_or(FrameSet::EMPTY, |d| d.1);
        assert_eq!(to_one | dropped(&out), FrameSet::ALL);
        out.flooded().len()
    };
    bridge.set_flood_limit(port(1), Some(1_000_000));
    let broadcast = head(MacAddr::BROADCAST.to_u64(), station);
    let mut flooded = 0;
    for now in 0..100 {
        for _ in 0..100 {
            flooded += forward(1, broadcast, now);
            assert_eq!(forward(2, head(0xffff_ffff_ffff, other), now), 64);
        }
    }
    // 10 s of the limit, and what the bucket held: frames of 62 copies that count.
    assert!((161_000..=165_500).contains(&flooded), "{flooded}");
    // Frames to a station that is known cost the same source nothing.
    forward(1, head(other, station), 99);
    assert_eq!(out.destinations(), [(port(2), FrameSet::ALL)]);
}

fn dropped(out: &Decisions) -> FrameSet {
    let all = out.drops().iter().map(|(_, frames)| *frames);
    all.fold(FrameSet::EMPTY, |all, frames| all | frames)
}
