//! Forwarding in VLANs against a naive model, which takes one frame after the other, strips its tag
//! and gives it another.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proptest::prelude::*;
use ringway_bridge::{
    Arrivals, Bridge, BridgeConfig, Decisions, DropReason, FrameHead, FrameSet, MacAddr, Members,
    Native, PortId, PortVlans, Retag, Run, TagType, Tick, VlanId, Vlans,
};

const PORTS: u16 = 5;

/// How a port is told of its VLANs.
#[derive(Clone, Debug)]
enum Setting {
    Nothing,
    Access(u16),
    Tunnel(u16),
    Trunk(Vec<u16>, Native, TagType),
}

/// A frame: its addresses, and what follows them, with tags.
#[derive(Clone, Debug, PartialEq)]
struct Frame {
    dst: u64,
    src: u64,
    rest: Vec<u8>,
}

impl Setting {
    fn vlans(&self) -> PortVlans {
        match self {
            Self::Nothing => PortVlans::default(),
            Self::Access(number) => PortVlans::access(vlan(*number)),
            Self::Tunnel(number) => PortVlans::tunnel(vlan(*number)),
            Self::Trunk(members, native, tag_type) => {
                let members = members.iter().map(|number| vlan(*number)).collect();
                PortVlans::trunk(members, *native, *tag_type)
            }
        }
    }

    /// What a tag of the port begins with.
    fn tag(&self) -> Option<[u8; 2]> {
        match self {
            Self::Nothing | Self::Access(_) => Some([0x81, 0]),
            Self::Tunnel(_) => None,
            Self::Trunk(_, _, TagType::Customer) => Some([0x81, 0]),
            Self::Trunk(_, _, TagType::Service) => Some([0x88, 0xa8]),
        }
    }

    fn is_in(&self, number: u16) -> bool {
        match self {
            Self::Nothing => number < 4095,
            Self::Access(own) | Self::Tunnel(own) => number == *own,
            Self::Trunk(members, native, _) => {
                members.contains(&number) || own(*native) == Some(number)
            }
        }
    }

    /// VLAN, priority and what remains of a frame.
    fn take(&self, frame: &[u8]) -> Result<(u16, u8, Vec<u8>), DropReason> {
        let (mut number, mut priority, mut rest) = (0, 0, frame);
        let is_tagged = self.tag().is_some_and(|tag| frame.starts_with(&tag));
        if is_tagged {
            // The tag, and the EtherType behind it.
            if frame.len() < 6 {
                return Err(DropReason::Runt);
            }
            number = u16::from_be_bytes([frame[2] & 0xf, frame[3]]);
            priority = frame[2] >> 4;
            rest = &frame[4..];
        }
        if number > 0 {
            let is_access = matches!(self, Self::Access(_));
            let is_taken = !is_access && self.is_in(number);
            return if is_taken {
                Ok((number, priority, rest.to_vec()))
            } else {
                Err(DropReason::VlanDenied)
            };
        }
        match self {
            // Left alone, tag and all.
            Self::Nothing => Ok((0, 0, frame.to_vec())),
            Self::Access(own) | Self::Tunnel(own) => Ok((*own, priority, rest.to_vec())),
            Self::Trunk(_, native, _) => match own(*native) {
                Some(own) => Ok((own, priority, rest.to_vec())),
                None => Err(DropReason::VlanDenied),
            },
        }
    }

    fn give(&self, number: u16, priority: u8, rest: &[u8], was_tagged: bool) -> Vec<u8> {
        let is_untagged = match self {
            Self::Nothing => number == 0,
            Self::Access(_) | Self::Tunnel(_) => true,
            Self::Trunk(_, native, _) => *native == Native::Untagged(vlan(number)),
        };
        if is_untagged {
            return rest.to_vec();
        }
        let priority = if was_tagged { priority } else { 0 };
        let [high, low] = number.to_be_bytes();
        let tag = self.tag().unwrap();
        [&tag[..], &[priority << 4 | high, low], rest].concat()
    }
}

fn own(native: Native) -> Option<u16> {
    match native {
        Native::Dropped => None,
        Native::Untagged(vlan) | Native::Tagged(vlan) => Some(vlan.get()),
    }
}

fn vlan(number: u16) -> VlanId {
    VlanId::new(number).unwrap()
}

fn port(n: u16) -> PortId {
    PortId::new(n).unwrap()
}

/// Which ports get which frame, or why none does.
struct Model {
    settings: Vec<Setting>,
    learned: HashMap<(u16, u64), usize>,
}

impl Model {
    fn forward(
        &mut self,
        from: usize,
        frame: &Frame,
    ) -> Result<BTreeMap<usize, Vec<u8>>, DropReason> {
        let (number, priority, rest) = self.settings[from].take(&frame.rest)?;
        let src = MacAddr::from_u64(frame.src);
        if src.is_group() || frame.src == 0 {
            return Err(DropReason::BadSource);
        }
        self.learned.insert((number, frame.src), from);
        let known = self.learned.get(&(number, frame.dst)).copied();
        let is_known = known.is_some() && !MacAddr::from_u64(frame.dst).is_group();
        let mut to: Vec<_> = (0..self.settings.len())
            .filter(|to| self.settings[*to].is_in(number))
            .collect();
        if is_known {
            to.retain(|to| Some(*to) == known);
            if known == Some(from) {
                return Err(DropReason::SamePort);
            }
        }
        to.retain(|to| *to != from);
        if to.is_empty() {
            return Err(DropReason::NoDestination);
        }
        let was_tagged = rest.len() != frame.rest.len();
        let given = |to: usize| {
            let rest = self.settings[to].give(number, priority, &rest, was_tagged);
            (to, rest)
        };
        Ok(to.into_iter().map(given).collect())
    }
}

fn setting() -> impl Strategy<Value = Setting> {
    let number = || prop::sample::select(vec![10u16, 20, 4094]);
    let native = prop_oneof![
        Just(Native::Dropped),
        number().prop_map(|own| Native::Untagged(vlan(own))),
        number().prop_map(|own| Native::Tagged(vlan(own))),
    ];
    let tag = prop_oneof![3 => Just(TagType::Customer), 1 => Just(TagType::Service)];
    let members = prop::collection::vec(number(), 0..3);
    prop_oneof![
        1 => Just(Setting::Nothing),
        2 => number().prop_map(Setting::Access),
        1 => number().prop_map(Setting::Tunnel),
        3 => (members, native, tag).prop_map(|(list, native, tag)| Setting::Trunk(list, native, tag)),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    let station = || (1..5u64).prop_map(|n| 0x0200_0000_0000 | n);
    let dst = prop_oneof![5 => station(), 1 => Just(0xffff_ffff_ffff), 1 => Just(0x3333_0000_0001)];
    let src = prop_oneof![20 => station(), 1 => Just(0), 1 => Just(0x0100_0000_0001)];
    let number = prop::sample::select(vec![0u16, 10, 10, 20, 30, 4094, 4095]);
    let kind = prop::sample::select(vec![[0x81, 0], [0x81, 0], [0x88, 0xa8]]);
    let tag = (kind, number, 0..16u8).prop_map(|(kind, number, priority)| {
        let [high, low] = number.to_be_bytes();
        [kind[0], kind[1], priority << 4 | high, low]
    });
    let tags = prop::collection::vec(tag, 0..3);
    (dst, src, tags, any::<bool>(), 1..4usize).prop_map(|(dst, src, tags, is_cut, _)| {
        let mut rest = tags.concat();
        rest.extend([8, 0, 1, 2, 3]);
        if is_cut {
            rest.truncate(4);
        }
        Frame { dst, src, rest }
    })
}

/// The frames, successive ones with one head together, as a worker has them.
fn runs(frames: &[Frame]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        let head = FrameHead {
            dst: frame.dst,
            src: frame.src,
            ether_type: u16::from_be_bytes([frame.rest[0], frame.rest[1]]),
        };
        match runs.last_mut() {
            Some(run) if run.head == head => run.frames |= FrameSet::one(index),
            _ => runs.push(Run {
                head,
                frames: FrameSet::one(index),
            }),
        }
    }
    runs
}

fn retagged(rest: &[u8], retag: Retag) -> Vec<u8> {
    match retag {
        Retag::Keep => rest.to_vec(),
        Retag::Push(tag) => [&tag[..], rest].concat(),
        Retag::Pop => rest[4..].to_vec(),
        Retag::Replace(tag) => [&tag[..], &rest[4..]].concat(),
    }
}

proptest! {
    #[test]
    fn a_burst_goes_in_its_vlans_where_its_frames_would_go_one_by_one(
        settings in prop::collection::vec(setting(), usize::from(PORTS)),
        bursts in prop::collection::vec((0..PORTS, prop::collection::vec(frame(), 0..65)), 1..8),
        seed: u64,
    ) {
        let bridge = Bridge::new(BridgeConfig {
            fdb_capacity: 64,
            ageing_ticks: 10,
            move_hold_ticks: 0,
            seed,
            group_fwd_mask: BridgeConfig::BPDUS,
        });
        let mut members = Members::new();
        (0..PORTS).for_each(|n| _ = members.add(port(n)));
        let vlans = Vlans::new((0..).map(port).zip(settings.iter().map(|s| Arc::new(s.vlans()))));
        let mut model = Model { settings, learned: HashMap::new() };
        let mut out = Decisions::new();
        for (from, frames) in bursts {
            let fates: Vec<_> =
                frames.iter().map(|frame| model.forward(from.into(), frame)).collect();
            let runs = runs(&frames);
            let burst = Arrivals { in_port: port(from), runs: &runs };
            let tci = |index: usize| {
                let rest = &frames[index].rest;
                (rest.len() >= 6).then(|| u16::from_be_bytes([rest[2], rest[3]]))
            };
            bridge.forward_in_vlans((&members, &vlans), Tick(0), &burst, tci, &mut out);
            for (index, fate) in fates.iter().enumerate() {
                let dropped = out.drops().iter().filter(|(_, set)| set.contains(index));
                let dropped: Vec<_> = dropped.map(|(reason, _)| *reason).collect();
                prop_assert_eq!(&dropped, &fate.as_ref().err().copied().into_iter().collect::<Vec<_>>());
                let class = out.classes().iter().find(|(set, _)| set.contains(index));
                let sent = out.destinations().iter().filter(|(_, set)| set.contains(index));
                let sent: BTreeMap<_, _> = sent.map(|(to, _)| {
                    let retag = vlans.of(*to).retag(class.unwrap().1);
                    (to.index(), retagged(&frames[index].rest, retag))
                }).collect();
                prop_assert_eq!(sent.clone(), fate.clone().unwrap_or_default(), "{:?}", frames[index]);
                let is_flooded = out.flooded().contains(index);
                prop_assert!(is_flooded || sent.len() < 2);
            }
        }
    }
}
