//! Forwarding in a switch with VLANs: a frame is in one, learned there, and goes to its members only.

use super::{Arrivals, Bridge, Decisions, Known, Lists, Members, Probed, Run};
use crate::fdb::Probe;
use crate::frame::is_group;
use crate::{DropReason, FrameSet, MAX_BURST, PortId, PortVlans, Tick, VlanId, Vlans};

impl Bridge {
    /// [`Bridge::forward`] in VLANs: frames that their port does not take in the VLAN that they are
    /// in are dropped as [`DropReason::VlanDenied`] and not learned, addresses are learned and looked
    /// up in each VLAN apart, and destinations are members of the VLAN.
    ///
    /// `tci(i)` is the control information of the tag that frame i begins with, behind its addresses
    /// and the tag's EtherType, or `None` if the frame ends before what follows the tag. It is asked
    /// for frames with the EtherType of such tags only.
    ///
    /// [`Decisions::classes`] has the VLAN of each frame, by which [`PortVlans::retag`] tells what a
    /// destination is to be given.
    pub fn forward_in_vlans(
        &self,
        (members, vlans): (&Members, &Vlans),
        now: Tick,
        burst: &Arrivals<'_>,
        tci: impl Fn(usize) -> Option<u16>,
        out: &mut Decisions,
    ) {
        out.clear();
        out.classes.clear();
        let from = vlans.of(burst.in_port);
        for run in &burst.runs[..burst.runs.len().min(MAX_BURST)] {
            self.classify(from, run, &tci, out);
        }
        let Decisions {
            probed,
            floods,
            result,
            classes,
            flood,
        } = out;
        let mut may_flood =
            |copies, frames| floods.take(&self.flood_limits, burst.in_port, copies, frames, now);
        let mut previous = Known::NOTHING;
        let mut listed = None;
        for (run, (frames, class)) in probed.iter().zip(classes.iter()) {
            let (frames, vlan) = (*frames, class.vlan);
            match self.decide(run, burst.in_port, now, &mut previous) {
                Ok(Some(port)) if members.contains(port) => {
                    // Of an entry that is configured, or of a port that was in the VLAN.
                    if vlans.of(port).contains(vlan) {
                        result.deliver(port, frames);
                    } else {
                        result.drop(DropReason::NoDestination, frames);
                    }
                }
                Ok(_) => {
                    if listed.replace(vlan) != Some(vlan) {
                        let ports = vlans.ports_of(vlan);
                        let others =
                            ports.filter(|port| *port != burst.in_port && members.contains(*port));
                        flood.clear();
                        flood.extend(others);
                    }
                    result.flood_to(flood, frames, &mut may_flood);
                }
                Err(reason) => result.drop(reason, frames),
            }
        }
        result.finish();
    }

    /// Puts the frames of a run into VLANs: each that has the same tag as the one before into a run
    /// with it.
    fn classify(
        &self,
        from: &PortVlans,
        run: &Run,
        tci: impl Fn(usize) -> Option<u16>,
        out: &mut Decisions,
    ) {
        if !from.reads(run.head.ether_type) {
            return self.admit(from, run, run.frames, None, out);
        }
        let mut left = run.frames;
        while let Some(first) = left.first() {
            let tag = tci(first);
            let others = left.iter().find(|index| tci(*index) != tag);
            let others = others.map_or(FrameSet::EMPTY, FrameSet::from_index);
            match tag {
                Some(tci) => self.admit(from, run, left - others, Some(tci), out),
                None => out.result.drop(DropReason::Runt, left - others),
            }
            left = left & others;
        }
    }

    fn admit(
        &self,
        from: &PortVlans,
        run: &Run,
        frames: FrameSet,
        tci: Option<u16>,
        out: &mut Decisions,
    ) {
        match from.admit(tci) {
            Ok(class) => {
                out.classes.push((frames, class));
                out.probed.push(self.probe_run(run, frames, class.vlan));
            }
            Err(reason) => out.result.drop(reason, frames),
        }
    }

    fn probe_run(&self, run: &Run, frames: FrameSet, vlan: VlanId) -> Probed {
        let dst = if is_group(run.head.dst) {
            Probe::unhashed(run.head.dst)
        } else {
            self.fdb.probe_in(vlan, run.head.dst)
        };
        let src = self.fdb.probe_in(vlan, run.head.src);
        std::hint::black_box(self.fdb.touch(src) ^ self.fdb.touch(dst));
        Probed { src, dst, frames }
    }
}

impl Lists {
    /// Floods frames to `ports`.
    fn flood_to(
        &mut self,
        ports: &[PortId],
        frames: FrameSet,
        may_flood: &mut impl FnMut(usize, FrameSet) -> FrameSet,
    ) {
        if ports.is_empty() {
            return self.drop(DropReason::NoDestination, frames);
        }
        let flooded = may_flood(ports.len(), frames);
        if flooded != frames {
            self.drop(DropReason::FloodLimit, frames - flooded);
        }
        if flooded.is_empty() {
            return;
        }
        self.flooded_in_vlans |= flooded;
        for port in ports {
            self.deliver(*port, flooded);
        }
    }
}
