//! Which stations were learned, moved and forgotten, told by looking at the forwarding database: it
//! is the workers that learn, and they tell nobody.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use ringway_api::{Occurrence, PortName};
use ringway_bridge::{Bridge, PortId, Station, VlanId};

use super::port_table::State;
use crate::events::EventHub;

/// Stations of which something is told in one look; the others have their turn in the next ones.
/// Ten looks fill no listener's queue.
const TOLD_IN_A_LOOK: usize = 1024;

/// A look of some length is followed by so many times as long without one: it takes 1 part in 20 of
/// a core, however large the database is.
const REST: u32 = 19;

/// An entry that is being moved within the database may be missed by a look, never by two.
const MISSES: u64 = 2;

/// What listeners know of the forwarding database.
#[derive(Debug, Default)]
pub(super) struct AddressWatch {
    /// `None` while nobody listens.
    known: Option<Known>,
}

#[derive(Debug, Default)]
struct Known {
    stations: HashMap<Station, Place>,
    looks: u64,
    /// When the next look may be.
    next: Option<Instant>,
}

/// Where a station is.
#[derive(Clone, Copy, Debug)]
struct Place {
    port: PortId,
    /// Of the port's slot, so that a port is not taken for the one that was there before.
    generation: u32,
    /// The last look that found it there.
    look: u64,
}

/// A port's name and the generation of its slot.
type Ports<'a> = BTreeMap<PortId, (&'a PortName, u32)>;

impl AddressWatch {
    /// Takes what is known now for known to a listener that comes; others are told what is new.
    pub(super) fn begin(&mut self, state: &State, bridge: &Bridge, hub: &EventHub) {
        if self.known.is_some() && hub.is_heard() {
            return;
        }
        let mut known = Known::default();
        known.look(&state.generations(), bridge, usize::MAX, &mut |_| {});
        self.known = Some(known);
    }

    /// Tells what is new, if anybody listens and it is time for a look.
    pub(super) fn look(&mut self, state: &State, bridge: &Bridge, hub: &EventHub, now: Instant) {
        if !hub.is_heard() {
            self.known = None;
            return;
        }
        let known = self.known.get_or_insert_default();
        if known.next.is_some_and(|next| now < next) {
            return;
        }
        let ports = state.generations();
        known.look(&ports, bridge, TOLD_IN_A_LOOK, &mut |what| {
            hub.tell(|| what);
        });
        let end = Instant::now();
        let took: Duration = end.saturating_duration_since(now);
        known.next = Some(end + took * REST);
    }
}

impl Known {
    fn look(
        &mut self,
        ports: &Ports<'_>,
        bridge: &Bridge,
        most: usize,
        tell: &mut dyn FnMut(Occurrence),
    ) {
        self.looks += 1;
        let is_there = |place: &Place| {
            let port = ports.get(&place.port);
            port.is_some_and(|(_, generation)| *generation == place.generation)
        };
        // A port that went took its stations with it.
        self.stations.retain(|_, place| is_there(place));
        let mut left = most;
        bridge.fdb().for_each(|station, port, _, _| {
            if let Some((name, generation)) = ports.get(&port) {
                self.see((station, port, *generation), name, ports, &mut left, tell);
            }
        });
        self.forget(ports, tell);
    }

    /// Notes an entry, unless it is news and no more are to be told now.
    fn see(
        &mut self,
        (station, port, generation): (Station, PortId, u32),
        name: &PortName,
        ports: &Ports<'_>,
        left: &mut usize,
        tell: &mut dyn FnMut(Occurrence),
    ) {
        let look = self.looks;
        let from = match self.stations.get_mut(&station) {
            Some(place) if place.port == port => {
                place.look = look;
                return;
            }
            Some(place) => {
                place.look = look;
                ports.get(&place.port)
            }
            None => None,
        };
        if *left == 0 {
            return;
        }
        *left -= 1;
        let place = Place {
            port,
            generation,
            look,
        };
        self.stations.insert(station, place);
        let Station { mac, vlan } = station;
        let vlan = (vlan != VlanId::NONE).then_some(vlan.get());
        let port = name.clone();
        tell(match from {
            Some((from, _)) => Occurrence::AddressMoved {
                port,
                mac,
                vlan,
                from: (*from).clone(),
            },
            None => Occurrence::AddressLearned { port, mac, vlan },
        });
    }

    fn forget(&mut self, ports: &Ports<'_>, tell: &mut dyn FnMut(Occurrence)) {
        let mut forgotten = BTreeMap::<PortId, u64>::new();
        let looks = self.looks;
        self.stations.retain(|_, place| {
            let stays = looks - place.look < MISSES;
            if !stays {
                *forgotten.entry(place.port).or_default() += 1;
            }
            stays
        });
        for (port, addresses) in forgotten {
            if let Some((name, _)) = ports.get(&port) {
                let port = (*name).clone();
                tell(Occurrence::AddressesForgotten { port, addresses });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringway_bridge::{BridgeConfig, MacAddr, Tick};

    struct Bed {
        bridge: Bridge,
        names: [PortName; 2],
        known: Known,
    }

    impl Bed {
        fn new() -> Self {
            Self {
                bridge: Bridge::new(BridgeConfig {
                    fdb_capacity: 16_384,
                    ageing_ticks: u32::MAX,
                    move_hold_ticks: 0,
                    seed: 1,
                    group_fwd_mask: 0,
                }),
                names: ["a", "b"].map(|name| name.parse().unwrap()),
                known: Known::default(),
            }
        }

        fn learn(&self, station: u16, port: u16) {
            self.learn_in(VlanId::NONE, station, port);
        }

        fn learn_in(&self, vlan: VlanId, station: u16, port: u16) {
            let [high, low] = station.to_be_bytes();
            let mac = MacAddr([2, 0, 0, 0, high, low]);
            let port = PortId::new(port).unwrap();
            let station = Station::new(mac, vlan);
            self.bridge.fdb().learn(station, port, Tick(0));
        }

        fn look(&mut self, most: usize, generation: u32) -> Vec<Occurrence> {
            let ids = (0..).map_while(PortId::new);
            let names = self.names.iter().map(|name| (name, generation));
            let ports = ids.zip(names).collect();
            let mut told = Vec::new();
            let tell = &mut |what| told.push(what);
            self.known.look(&ports, &self.bridge, most, tell);
            told
        }
    }

    #[test]
    fn stations_are_learned_move_and_are_forgotten() {
        let mut bed = Bed::new();
        bed.learn(1, 0);
        let [a, b] = bed.names.clone();
        let mac = MacAddr([2, 0, 0, 0, 0, 1]);
        let learned = Occurrence::AddressLearned {
            port: a.clone(),
            mac,
            vlan: None,
        };
        assert_eq!(bed.look(9, 0), [learned]);
        assert_eq!(bed.look(9, 0), []);
        bed.learn(1, 1);
        let port = b.clone();
        let moved = Occurrence::AddressMoved {
            port,
            mac,
            vlan: None,
            from: a,
        };
        assert_eq!(bed.look(9, 0), [moved]);
        bed.bridge.fdb().flush(|_, _| true);
        assert_eq!(bed.look(9, 0), [], "one look may have missed it");
        let forgotten = Occurrence::AddressesForgotten {
            port: b,
            addresses: 1,
        };
        assert_eq!(bed.look(9, 0), [forgotten]);
    }

    #[test]
    fn an_address_in_another_vlan_is_another_station() {
        let mut bed = Bed::new();
        bed.learn(1, 0);
        assert_eq!(bed.look(9, 0).len(), 1);
        bed.learn_in(VlanId::new(7).unwrap(), 1, 1);
        let told = bed.look(9, 0);
        assert!(
            matches!(&*told, [Occurrence::AddressLearned { vlan: Some(7), .. }]),
            "{told:?}"
        );
    }

    #[test]
    fn what_one_look_does_not_tell_the_next_ones_do() {
        let mut bed = Bed::new();
        (1..=25).for_each(|station| bed.learn(station, 0));
        let counts = [10, 10, 5, 0].map(|count| (count, bed.look(10, 0).len()));
        assert!(counts.iter().all(|(want, told)| want == told), "{counts:?}");
    }

    #[test]
    fn a_port_in_the_slot_of_another_learns_anew() {
        let mut bed = Bed::new();
        bed.learn(1, 0);
        assert_eq!(bed.look(9, 0).len(), 1);
        let told = bed.look(9, 1);
        assert!(
            matches!(&*told, [Occurrence::AddressLearned { .. }]),
            "{told:?}"
        );
    }
}
