//! Forwarding of bursts: from frame heads to one set of frames per destination. What VLANs change of
//! it is in `forward/vlans.rs`.

mod vlans;

use crate::fdb::{FdbConfig, Probe};
use crate::flood::{FloodBuckets, FloodLimits};
use crate::frame::{is_group, is_link_local, is_station};
use crate::{
    Class, DropReason, Fdb, FrameHead, FrameSet, Learned, MAX_BURST, MAX_PORTS, PortId, Tick,
};

/// What a bridge is made from: that of its forwarding database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BridgeConfig {
    /// See [`FdbConfig::capacity`].
    pub fdb_capacity: usize,
    /// See [`FdbConfig::ageing_ticks`].
    pub ageing_ticks: u32,
    /// See [`FdbConfig::move_hold_ticks`].
    pub move_hold_ticks: u32,
    /// See [`FdbConfig::seed`].
    pub seed: u64,
    /// Bit n has frames to the reserved address 01-80-C2-00-00-0n (IEEE 802.1Q, table 8-1)
    /// forwarded as those to any other group, as `group_fwd_mask` of a Linux bridge does. The others
    /// are dropped.
    pub group_fwd_mask: u16,
}

impl BridgeConfig {
    /// BPDUs (01-80-C2-00-00-00) alone: what runs no spanning tree protocol of its own has to let
    /// those of others pass, or they would not see the loop that it closes.
    pub const BPDUS: u16 = 1;
}

/// A learning bridge, one for all workers, shared by reference.
#[derive(Debug)]
pub struct Bridge {
    fdb: Fdb,
    flood_limits: FloodLimits,
    /// See [`BridgeConfig::group_fwd_mask`].
    group_fwd_mask: u16,
}

/// Frames that a port delivered together.
#[derive(Clone, Copy, Debug)]
pub struct Arrivals<'a> {
    /// The port that the frames came from.
    pub in_port: PortId,
    /// The frames, in their order, successive ones with one head together. At most [`MAX_BURST`].
    pub runs: &'a [Run],
}

/// Successive frames of a burst with one head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// What they begin with.
    pub head: FrameHead,
    /// Bit i is frame i of the burst, and bit i of all results. Frames in no run, runts for
    /// example, are in no result.
    pub frames: FrameSet,
}

impl Bridge {
    /// A bridge that knows no address.
    pub fn new(config: BridgeConfig) -> Self {
        let BridgeConfig {
            fdb_capacity: capacity,
            ageing_ticks,
            move_hold_ticks,
            seed,
            group_fwd_mask,
        } = config;
        Self {
            fdb: Fdb::new(FdbConfig {
                capacity,
                ageing_ticks,
                move_hold_ticks,
                seed,
            }),
            flood_limits: FloodLimits::new(),
            group_fwd_mask,
        }
    }

    /// The forwarding database.
    pub fn fdb(&self) -> &Fdb {
        &self.fdb
    }

    /// Bounds what is flooded of a port's frames: to so many copies in a second by each worker, of
    /// which the first of each frame does not count, since it costs no more than a frame that is
    /// not flooded. `None` lifts the bound; a port has none at first.
    ///
    /// Each worker has a bucket for each source, so that a port whose queues are polled by several
    /// takes its part of each worker's time and no more.
    pub fn set_flood_limit(&self, port: PortId, copies_per_second: Option<u32>) {
        self.flood_limits.set(port, copies_per_second.unwrap_or(0));
    }

    /// Learns the sources of a burst and decides where each frame goes; replaces what is in `out`.
    ///
    /// The result is that of one frame after the other. Each valid frame ends up
    /// - in the set of one destination, or
    /// - in [`Decisions::flooded`] and the sets of all members but `burst.in_port`, or
    /// - in the set of one drop.
    ///
    /// Destinations are members, and never `burst.in_port`. The source of a dropped
    /// [`DropReason::LinkLocal`] frame is not learned. What exceeds the source's limit of copies
    /// ([`set_flood_limit`](Self::set_flood_limit)) is dropped, the last frames of the burst first.
    pub fn forward(&self, members: &Members, now: Tick, burst: &Arrivals<'_>, out: &mut Decisions) {
        out.clear();
        self.probe_all(burst.runs, &mut out.probed);
        let Decisions {
            probed,
            floods,
            result,
            ..
        } = out;
        let mut may_flood =
            |copies, frames| floods.take(&self.flood_limits, burst.in_port, copies, frames, now);
        let mut previous = Known::NOTHING;
        for run in probed.iter() {
            match self.decide(run, burst.in_port, now, &mut previous) {
                Ok(Some(port)) if members.contains(port) => result.deliver(port, run.frames),
                Ok(_) => result.flood(members, burst.in_port, run.frames, &mut may_flood),
                Err(reason) => result.drop(reason, run.frames),
            }
        }
        result.finish();
    }

    /// Hashes the addresses of all runs, and has their buckets on the way into the cache before the
    /// first look-up waits for one.
    #[inline]
    fn probe_all(&self, runs: &[Run], probed: &mut Vec<Probed>) {
        debug_assert!(runs.len() <= MAX_BURST, "more runs than frames");
        let mut touched = 0;
        let mut last = Probed {
            src: Probe::unhashed(0),
            dst: Probe::unhashed(0),
            frames: FrameSet::EMPTY,
        };
        for run in &runs[..runs.len().min(MAX_BURST)] {
            let head = &run.head;
            if head.src != last.src.mac() {
                last.src = self.fdb.probe(head.src);
                touched ^= self.fdb.touch(last.src);
            }
            if is_group(head.dst) {
                last.dst = Probe::unhashed(head.dst);
            } else if head.dst != last.dst.mac() {
                last.dst = self.fdb.probe(head.dst);
                touched ^= self.fdb.touch(last.dst);
            }
            last.frames = run.frames;
            probed.push(last);
        }
        std::hint::black_box(touched);
    }

    /// Where the frames of a run go: a port, or all (`None`).
    #[inline]
    fn decide(
        &self,
        run: &Probed,
        in_port: PortId,
        now: Tick,
        previous: &mut Known,
    ) -> Result<Option<PortId>, DropReason> {
        let dst_mac = run.dst.mac();
        if !is_station(run.src.mac()) {
            return Err(DropReason::BadSource);
        }
        if is_link_local(dst_mac) && self.group_fwd_mask >> (dst_mac & 0xf) & 1 == 0 {
            return Err(DropReason::LinkLocal);
        }
        let (src, dst) = (run.src.key(), run.dst.key());
        if src != previous.src {
            previous.src = src;
            let result = self.fdb.learn_probe(run.src, in_port, now);
            // Its look-up may have changed, also by the refresh of an expired entry.
            if result != Learned::Refreshed || src == previous.dst {
                previous.dst = u64::MAX;
            }
        }
        if is_group(dst_mac) {
            return Ok(None);
        }
        if dst != previous.dst {
            previous.dst = dst;
            previous.port = self.fdb.lookup_probe(run.dst, now);
        }
        match previous.port {
            Some(port) if port == in_port => Err(DropReason::SamePort),
            port => Ok(port),
        }
    }
}

/// A run with its addresses hashed.
#[derive(Clone, Copy, Debug)]
struct Probed {
    src: Probe,
    /// Not hashed for a group.
    dst: Probe,
    frames: FrameSet,
}

/// What the run before found out, by the keys of its addresses.
struct Known {
    src: u64,
    dst: u64,
    port: Option<PortId>,
}

impl Known {
    /// No key is `u64::MAX`.
    const NOTHING: Self = Self {
        src: u64::MAX,
        dst: u64::MAX,
        port: None,
    };
}

/// The ports that take part in forwarding, in the order of joining.
#[derive(Debug)]
pub struct Members {
    bitmap: Box<[u64]>,
    list: Vec<PortId>,
}

impl Members {
    /// No ports; room for [`MAX_PORTS`].
    pub fn new() -> Self {
        Self {
            bitmap: vec![0; MAX_PORTS.div_ceil(64)].into_boxed_slice(),
            list: Vec::with_capacity(MAX_PORTS),
        }
    }

    /// Adds a port; false if it is there already.
    pub fn add(&mut self, port: PortId) -> bool {
        let is_new = !self.contains(port);
        if is_new {
            self.bitmap[port.index() / 64] |= 1 << (port.index() % 64);
            self.list.push(port);
        }
        is_new
    }

    /// Removes a port; false if it is not there.
    pub fn remove(&mut self, port: PortId) -> bool {
        let was_there = self.contains(port);
        if was_there {
            self.bitmap[port.index() / 64] &= !(1 << (port.index() % 64));
            self.list.retain(|member| *member != port);
        }
        was_there
    }

    /// Whether a port is there.
    #[inline]
    pub fn contains(&self, port: PortId) -> bool {
        self.bitmap[port.index() / 64] >> (port.index() % 64) & 1 != 0
    }

    /// The ports, in the order of joining.
    pub fn iter(&self) -> impl Iterator<Item = PortId> + '_ {
        self.list.iter().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

impl Default for Members {
    fn default() -> Self {
        Self::new()
    }
}

/// What became of a burst, and what each source may still flood; of one worker, to be used again and
/// again.
#[derive(Debug)]
pub struct Decisions {
    probed: Vec<Probed>,
    floods: FloodBuckets,
    result: Lists,
    /// In a switch with VLANs: the VLAN of each run, and the frames of it.
    classes: Vec<(FrameSet, Class)>,
    /// The ports that a VLAN's floods go to.
    flood: Vec<PortId>,
}

/// Sets of frames. Between bursts all of `by_port` are empty.
#[derive(Debug)]
struct Lists {
    /// By port: the frames that go to it alone.
    by_port: Box<[FrameSet]>,
    destinations: Vec<(PortId, FrameSet)>,
    drops: Vec<(DropReason, FrameSet)>,
    flooded: FrameSet,
    /// Frames that go to all other members of their VLANs, and in `by_port` of these.
    flooded_in_vlans: FrameSet,
}

impl Decisions {
    /// Scratch for bursts of up to [`MAX_BURST`] frames to up to [`MAX_PORTS`] ports: about 160
    /// KiB, of which a burst touches 24 bytes for each port that it goes to.
    pub fn new() -> Self {
        Self {
            probed: Vec::with_capacity(MAX_BURST),
            floods: FloodBuckets::new(),
            result: Lists {
                by_port: vec![FrameSet::EMPTY; MAX_PORTS].into_boxed_slice(),
                destinations: Vec::with_capacity(MAX_PORTS),
                drops: Vec::with_capacity(DropReason::ALL.len()),
                flooded: FrameSet::EMPTY,
                flooded_in_vlans: FrameSet::EMPTY,
            },
            classes: Vec::with_capacity(MAX_BURST),
            flood: Vec::with_capacity(MAX_PORTS),
        }
    }

    /// The ports that frames go to and the frames of each (never none), in the order of first
    /// appearance.
    pub fn destinations(&self) -> &[(PortId, FrameSet)] {
        &self.result.destinations
    }

    /// The reasons for which frames are dropped and the frames of each (never none), in the order
    /// of first appearance.
    pub fn drops(&self) -> &[(DropReason, FrameSet)] {
        &self.result.drops
    }

    /// The frames that go to all members, of their VLAN if there are VLANs, but the one that they
    /// came from.
    pub fn flooded(&self) -> FrameSet {
        self.result.flooded | self.result.flooded_in_vlans
    }

    /// The VLANs of the frames that are in one, and the frames of each, in their order; of the last
    /// burst that was [forwarded in VLANs](Bridge::forward_in_vlans).
    pub fn classes(&self) -> &[(FrameSet, Class)] {
        &self.classes
    }

    /// Charges a source for what it flooded as if that had been so many copies more: some ports take
    /// frames at a higher cost than others.
    pub fn charge_flood(&mut self, source: PortId, copies: u64) {
        self.floods.charge(source, copies);
    }

    /// Forgets the last burst.
    pub fn clear(&mut self) {
        self.probed.clear();
        self.result.destinations.clear();
        self.result.drops.clear();
        self.result.flooded = FrameSet::EMPTY;
        self.result.flooded_in_vlans = FrameSet::EMPTY;
    }
}

impl Default for Decisions {
    fn default() -> Self {
        Self::new()
    }
}

impl Lists {
    #[inline]
    fn deliver(&mut self, port: PortId, frames: FrameSet) {
        let listed = &mut self.by_port[port.index()];
        // Once a frame is flooded, every member is listed.
        if listed.is_empty() && self.flooded.is_empty() {
            self.destinations.push((port, FrameSet::EMPTY));
        }
        *listed |= frames;
    }

    /// Lists the members on the first flooded frame of the burst; their sets get the flooded frames
    /// in the end, since all that is listed then is flooded to.
    fn flood(
        &mut self,
        members: &Members,
        in_port: PortId,
        frames: FrameSet,
        may_flood: &mut impl FnMut(usize, FrameSet) -> FrameSet,
    ) {
        let copies = members.len() - usize::from(members.contains(in_port));
        if copies == 0 {
            return self.drop(DropReason::NoDestination, frames);
        }
        let flooded = may_flood(copies, frames);
        if flooded != frames {
            self.drop(DropReason::FloodLimit, frames - flooded);
        }
        if flooded.is_empty() {
            return;
        }
        let frames = flooded;
        if self.flooded.is_empty() {
            for port in members.iter().filter(|port| *port != in_port) {
                if self.by_port[port.index()].is_empty() {
                    self.destinations.push((port, FrameSet::EMPTY));
                }
            }
        }
        self.flooded |= frames;
    }

    fn drop(&mut self, reason: DropReason, frames: FrameSet) {
        match self.drops.iter_mut().find(|(listed, _)| *listed == reason) {
            Some((_, listed)) => *listed |= frames,
            None => self.drops.push((reason, frames)),
        }
    }

    #[inline]
    fn finish(&mut self) {
        for (port, frames) in &mut self.destinations {
            *frames = std::mem::take(&mut self.by_port[port.index()]) | self.flooded;
        }
    }
}
