//! Which ports are in which VLANs: what workers are told of it, and what operators are.

use std::collections::BTreeMap;
use std::sync::Arc;

use ringway_api::{PortInfo, PortName, SwitchError, VlanConfig, VlanInfo};
use ringway_bridge::{PortVlans, VlanId, VlanSet, Vlans};

use super::Switch;
use super::port_table::{PortTable, State};
use crate::worker::Command;

impl Switch {
    /// Has a port be in these VLANs from now on; what was learned behind it is forgotten. Its frames
    /// that are on their way pass as before.
    ///
    /// # Errors
    /// There is no such port.
    pub fn set_vlan(&self, name: &PortName, vlan: VlanConfig) -> Result<PortInfo, SwitchError> {
        let mut state = self.table.lock();
        state.find(name)?;
        if let Some(entry) = state.ports.get_mut(name)
            && *entry.config.vlan() != vlan
        {
            *entry.config.vlan_mut() = vlan;
            let id = entry.port.base().id;
            self.table.publish_vlans(&mut state);
            self.bridge.fdb().flush_port(id);
        }
        self.port_info(&state, name)
    }

    /// Which ports are in which VLAN: VLANs with the same ports together, by number. Nothing if no
    /// port says which it is in.
    pub fn vlans(&self) -> Vec<VlanInfo> {
        let state = self.table.lock();
        if !state.says_vlans() {
            return Vec::new();
        }
        let ports = state.ports.iter();
        let ports: Vec<_> = ports
            .map(|(name, entry)| (name, entry.config.vlan().vlans()))
            .collect();
        let mut alike: BTreeMap<[Vec<PortName>; 2], VlanSet> = BTreeMap::new();
        for vlan in (0..=VlanId::MAX.get()).filter_map(VlanId::new) {
            let names = |is_untagged: bool| {
                let wanted = |(_, port): &&(_, PortVlans)| {
                    port.contains(vlan) && port.is_untagged(vlan) == is_untagged
                };
                let ports = ports.iter().filter(wanted);
                ports.map(|(name, _)| (*name).clone()).collect::<Vec<_>>()
            };
            let [tagged, untagged] = [false, true].map(names);
            if !(tagged.is_empty() && untagged.is_empty()) {
                let vlans = alike.entry([tagged, untagged]);
                vlans.or_insert(VlanSet::EMPTY).insert(vlan);
            }
        }
        let mut alike: Vec<_> = alike.into_iter().collect();
        alike.sort_by_key(|(_, vlans)| vlans.iter().next());
        let told = alike
            .into_iter()
            .map(|([tagged, untagged], vlans)| VlanInfo {
                vlans: vlans.to_string(),
                tagged,
                untagged,
            });
        told.collect()
    }
}

impl State {
    /// Whether a port says which VLANs it is in: then all others are in all of them.
    fn says_vlans(&self) -> bool {
        let mut ports = self.ports.values();
        ports.any(|entry| !entry.config.vlan().is_default())
    }

    fn vlans(&self) -> Option<Arc<Vlans>> {
        if !self.says_vlans() {
            return None;
        }
        let all = Arc::new(PortVlans::default());
        let ports = self.ports.values().map(|entry| {
            let vlan = entry.config.vlan();
            let vlans = if vlan.is_default() {
                Arc::clone(&all)
            } else {
                Arc::new(vlan.vlans())
            };
            (entry.port.base().id, vlans)
        });
        Some(Arc::new(Vlans::new(ports)))
    }
}

impl PortTable {
    /// Tells all workers which ports are in which VLANs, if ports say so or did.
    pub(super) fn publish_vlans(&self, state: &mut State) {
        let vlans = state.vlans();
        if vlans.is_some() || state.has_vlans {
            state.has_vlans = vlans.is_some();
            self.tell_all(|_, done| Command::SetVlans {
                vlans: vlans.clone(),
                done,
            });
        }
    }
}
