//! The VLANs of all ports, as one value that workers share and nobody changes.

use std::sync::Arc;

use super::{PortVlans, VlanId};
use crate::{MAX_PORTS, PortId};

/// A port of more VLANs than this is looked at for each flood, rather than listed in each of its
/// VLANs: so the lists take 2 MiB at most.
const MAX_LISTED: usize = 256;

/// VLANs, 0 among them.
const VLANS: usize = VlanId::MAX.0 as usize + 1;

/// A port that is in no VLAN.
static NOWHERE: PortVlans = PortVlans::nowhere();

/// Which ports are in which VLAN.
#[derive(Debug)]
pub struct Vlans {
    ports: Box<[Option<Arc<PortVlans>>]>,
    /// Ports of many VLANs.
    wide: Box<[PortId]>,
    /// The other ports, those of VLAN n from `starts[n]` to `starts[n + 1]`.
    listed: Box<[PortId]>,
    starts: Box<[u32]>,
}

impl Vlans {
    /// These ports; others are in no VLAN.
    pub fn new(ports: impl IntoIterator<Item = (PortId, Arc<PortVlans>)>) -> Self {
        let mut by_slot = vec![None; MAX_PORTS].into_boxed_slice();
        let mut wide = Vec::new();
        let mut lists = vec![Vec::new(); VLANS];
        for (port, vlans) in ports {
            if vlans.members().len() > MAX_LISTED {
                wide.push(port);
            } else {
                for vlan in vlans.members().iter() {
                    lists[usize::from(vlan.get())].push(port);
                }
            }
            by_slot[port.index()] = Some(vlans);
        }
        let mut starts = vec![0];
        let mut end = 0;
        for list in &lists {
            end += u32::try_from(list.len()).unwrap_or(u32::MAX);
            starts.push(end);
        }
        Self {
            ports: by_slot,
            wide: wide.into(),
            listed: lists.concat().into(),
            starts: starts.into(),
        }
    }

    /// Those of a port.
    #[inline]
    pub fn of(&self, port: PortId) -> &PortVlans {
        self.ports[port.index()].as_deref().unwrap_or(&NOWHERE)
    }

    /// The ports of a VLAN.
    pub fn ports_of(&self, vlan: VlanId) -> impl Iterator<Item = PortId> + '_ {
        let at = usize::from(vlan.get());
        let listed = self.starts[at] as usize..self.starts[at + 1] as usize;
        let wide = self.wide.iter().copied();
        wide.filter(move |port| self.of(*port).contains(vlan))
            .chain(self.listed[listed].iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Native, TagType, VlanSet};

    #[test]
    fn each_vlan_has_the_ports_that_are_in_it() {
        let vlan = |number| VlanId::new(number).unwrap();
        let port = |slot| PortId::new(slot).unwrap();
        let trunk = |members| PortVlans::trunk(members, Native::Dropped, TagType::Customer);
        let some = [1, 10, 4094].map(vlan).into_iter().collect();
        let vlans = Vlans::new([
            (port(0), Arc::new(PortVlans::access(vlan(10)))),
            (port(7), Arc::new(PortVlans::default())),
            (port(4095), Arc::new(trunk(some))),
            (port(8), Arc::new(trunk(VlanSet::all()))),
        ]);
        let ports_of = |number: u16| {
            let mut ports: Vec<_> = vlans.ports_of(vlan(number)).map(PortId::get).collect();
            ports.sort_unstable();
            ports
        };
        assert_eq!(ports_of(0), [7]);
        assert_eq!(ports_of(1), [7, 8, 4095]);
        assert_eq!(ports_of(10), [0, 7, 8, 4095]);
        assert_eq!(ports_of(11), [7, 8]);
        assert_eq!(ports_of(4094), [7, 8, 4095]);
        assert!(vlans.of(port(1)).members().is_empty());
    }
}
