//! What operators are told of the forwarding database, and do to it.

use ringway_api::{FdbEntry, PortName, SwitchError, VlanTag};
use ringway_bridge::{MacAddr, Station, Tick, VlanId, VlanSet};

use super::Switch;
use super::port_table::{PortEntry, State};

impl Switch {
    /// The forwarding database, by address and VLAN.
    pub fn fdb(&self) -> Vec<FdbEntry> {
        let state = self.table.lock();
        let names = state.names();
        let now = Tick::after(self.epoch.elapsed());
        let mut entries = Vec::new();
        self.bridge
            .fdb()
            .for_each(|station, port, is_static, last_seen| {
                if let Some(name) = names.get(&port) {
                    let age_ticks = if is_static { 0 } else { now.since(last_seen) };
                    entries.push(FdbEntry {
                        mac: station.mac,
                        vlan: station.vlan.get(),
                        port: (*name).clone(),
                        is_static,
                        age_seconds: f64::from(age_ticks) / f64::from(Tick::PER_SECOND),
                    });
                }
            });
        entries.sort_by_key(|entry| (entry.mac, entry.vlan));
        entries
    }

    /// Adds a static entry, or makes a learned one static: in a VLAN, or that of the port's untagged
    /// frames.
    ///
    /// # Errors
    /// No such port, a group address, a VLAN that the port is not in, or the database is full.
    pub fn fdb_add(
        &self,
        mac: MacAddr,
        port: &PortName,
        vlan: Option<VlanTag>,
    ) -> Result<(), SwitchError> {
        let state = self.table.lock();
        let entry = state.find(port)?;
        let vlan = state.vlan_of(entry, vlan)?;
        let station = Station::new(mac, vlan);
        let id = entry.port.base().id;
        let added = self.bridge.fdb().add_static(station, id);
        added.map_err(|error| SwitchError::FdbRefused {
            mac,
            reason: error.to_string(),
        })
    }

    /// Deletes an entry, static or learned: that in a VLAN, or the only one of the address.
    ///
    /// # Errors
    /// There is no such entry, or there are several.
    pub fn fdb_del(&self, mac: MacAddr, vlan: Option<VlanTag>) -> Result<(), SwitchError> {
        let fdb = self.bridge.fdb();
        let vlan = match vlan {
            Some(vlan) => vlan.id(),
            None => {
                let mut vlans = VlanSet::EMPTY;
                fdb.for_each(|station, _, _, _| {
                    if station.mac == mac {
                        vlans.insert(station.vlan);
                    }
                });
                if vlans.len() > 1 {
                    let vlans = vlans.to_string();
                    return Err(SwitchError::SeveralVlans { mac, vlans });
                }
                vlans.iter().next().unwrap_or(VlanId::NONE)
            }
        };
        if fdb.remove(Station::new(mac, vlan)) {
            Ok(())
        } else {
            Err(SwitchError::NoSuchFdbEntry { mac })
        }
    }

    /// Forgets learned entries, of a port, in a VLAN and of an address if given, and returns how many.
    ///
    /// # Errors
    /// There is no such port.
    pub fn fdb_flush(
        &self,
        port: Option<&PortName>,
        vlan: Option<VlanTag>,
        mac: Option<MacAddr>,
    ) -> Result<usize, SwitchError> {
        let state = self.table.lock();
        let id = port.map(|name| state.find(name).map(|entry| entry.port.base().id));
        let id = id.transpose()?;
        let flushed = self.bridge.fdb().flush(|station, at| {
            id.is_none_or(|id| at == id)
                && vlan.is_none_or(|vlan| station.vlan == vlan.id())
                && mac.is_none_or(|mac| station.mac == mac)
        });
        Ok(flushed)
    }
}

impl State {
    /// The VLAN of a port that is meant: the one that is said, or that of its untagged frames.
    fn vlan_of(&self, entry: &PortEntry, said: Option<VlanTag>) -> Result<VlanId, SwitchError> {
        let (name, vlan) = (&entry.port.base().name, entry.config.vlan());
        let refuse = |reason: String, hint: String| Err(SwitchError::VlanOfPort { reason, hint });
        let own = vlan.vlans();
        match said {
            Some(said) if !self.has_vlans => refuse(
                format!("no port says which VLANs it is in, so that there is no VLAN {said}"),
                format!(
                    "leave --vlan out, or say so first, as `ringway port set {name} --tag {said}`"
                ),
            ),
            Some(said) if !own.contains(said.id()) => refuse(
                format!("port {name} is not in VLAN {said}"),
                format!("it is {vlan}; `ringway port set` changes that"),
            ),
            Some(said) => Ok(said.id()),
            None => match own.pvid() {
                Some(vlan) => Ok(vlan),
                None => refuse(
                    format!("port {name} has no VLAN of its own"),
                    format!("it is {vlan}: say by --vlan in which of them the address is"),
                ),
            },
        }
    }
}
