//! The forwarding database against a naive map.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use proptest::prelude::*;
use ringway_bridge::{Fdb, FdbConfig, Learned, MacAddr, PortId, Station, Tick, VlanId};

const CAPACITY: usize = 6;
const HOLD: u32 = 5;

#[derive(Clone, Debug)]
enum Step {
    Learn(Station, PortId),
    Announce(Station, PortId),
    AddStatic(Station, PortId),
    Remove(Station),
    /// Of a port, of a VLAN, of an address.
    Flush(Option<PortId>, Option<VlanId>, Option<MacAddr>),
    FlushPort(PortId),
    SweepFlushed,
    Purge(PortId),
    Age,
    Wait(u32),
    SetLimit(PortId, Option<u32>),
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    port: PortId,
    is_static: bool,
    seen: u32,
    /// It only takes room.
    is_flushed: bool,
}

struct Model {
    entries: HashMap<Station, Entry>,
    limits: HashMap<PortId, u32>,
    /// Flushes of a port since the last sweep.
    owed: HashMap<PortId, u32>,
    ageing: u32,
    now: u32,
}

impl Model {
    fn lookup(&self, mac: Station) -> Option<PortId> {
        let is_fresh =
            |e: &&Entry| e.is_static || !e.is_flushed && self.now - e.seen <= self.ageing;
        self.entries.get(&mac).filter(is_fresh).map(|e| e.port)
    }

    fn count(&self, port: PortId) -> u32 {
        let learned = |e: &&Entry| e.port == port && !e.is_static && !e.is_flushed;
        u32::try_from(self.entries.values().filter(learned).count()).unwrap()
    }

    /// Learned entries that a port may have in any case.
    fn share(&self, port: PortId) -> u32 {
        let statics = self.entries.values().filter(|e| e.is_static).count();
        let holders = ports().filter(|other| *other == port || self.count(*other) > 0);
        u32::try_from((CAPACITY - statics) / holders.count()).unwrap()
    }

    /// Whether an entry may make room for one of a port with less than `share`.
    fn may_make_room(&self, entry: &Entry, share: u32) -> bool {
        let is_expired = self.now - entry.seen > self.ageing;
        !entry.is_static && (is_expired || self.count(entry.port) > share)
    }

    /// `evicted` made room, if any.
    fn learn(
        &mut self,
        mac: Station,
        port: PortId,
        hold: u32,
        evicted: Option<Station>,
    ) -> Learned {
        let entry = Entry {
            port,
            is_static: false,
            seen: self.now,
            is_flushed: false,
        };
        let old = self.entries.get(&mac).copied();
        match old {
            Some(old) if old.port == port && old.is_static => return Learned::Refreshed,
            Some(old) if old.is_static => return Learned::Static,
            Some(old) if old.port == port && !old.is_flushed => {
                self.entries.insert(mac, entry);
                return Learned::Refreshed;
            }
            _ => {}
        }
        if let Some(old) = old
            && old.port != port
            && !old.is_flushed
            && self.now - old.seen < hold
        {
            return Learned::Held { at: old.port };
        }
        if self
            .limits
            .get(&port)
            .is_some_and(|limit| self.count(port) >= *limit)
        {
            return Learned::LimitReached;
        }
        let is_full = old.is_none() && self.entries.len() == CAPACITY;
        let share = self.share(port);
        if is_full && self.count(port) >= share {
            return Learned::Full;
        }
        if self.owed.get(&port).is_some_and(|owed| *owed == 15) {
            return Learned::Busy;
        }
        if is_full {
            let Some(evicted) = evicted else {
                return Learned::Full; // nobody was found
            };
            assert!(self.may_make_room(&self.entries[&evicted], share));
            self.entries.remove(&evicted);
        }
        self.entries.insert(mac, entry);
        match old {
            Some(old) if !old.is_flushed => Learned::Moved { from: old.port },
            _ => Learned::New,
        }
    }

    fn add_static(&mut self, mac: Station, port: PortId, evicted: Option<Station>) -> bool {
        if let Some(evicted) = evicted {
            let entry = self.entries.remove(&evicted);
            assert!(entry.is_some_and(|entry| !entry.is_static));
        } else if self.entries.len() == CAPACITY {
            let is_learned = |entry: &Entry| !entry.is_static;
            let known = self.entries.contains_key(&mac);
            assert!(known || !self.entries.values().any(is_learned));
        }
        let fits = self.entries.contains_key(&mac) || self.entries.len() < CAPACITY;
        if fits {
            self.entries.insert(
                mac,
                Entry {
                    port,
                    is_static: true,
                    seen: 0,
                    is_flushed: false,
                },
            );
        }
        fits
    }

    fn flush_port(&mut self, port: PortId) -> bool {
        let has_flushed = self.count(port) > 0;
        if has_flushed {
            *self.owed.entry(port).or_default() += 1;
        }
        let learned = |e: &&mut Entry| e.port == port && !e.is_static;
        for entry in self.entries.values_mut().filter(learned) {
            entry.is_flushed = true;
        }
        has_flushed
    }

    fn is_full(&self) -> bool {
        self.entries.len() == CAPACITY
    }

    /// The entry that is gone from `fdb`, if any.
    fn evicted(&self, fdb: &Fdb) -> Option<Station> {
        let left = entries_of(fdb);
        let mut gone = self.entries.keys().filter(|mac| !left.contains_key(mac));
        let evicted = gone.next().copied();
        assert_eq!(gone.next(), None);
        evicted
    }

    fn remove_if(&mut self, condemned: impl Fn(&Entry) -> bool) -> usize {
        let before = self.entries.len();
        self.entries.retain(|_, entry| !condemned(entry));
        before - self.entries.len()
    }
}

fn entries_of(fdb: &Fdb) -> HashMap<Station, Entry> {
    let mut entries = HashMap::new();
    fdb.for_each(|mac, port, is_static, seen| {
        let (seen, is_flushed) = (seen.0, false);
        let entry = Entry {
            port,
            is_static,
            seen,
            is_flushed,
        };
        entries.insert(mac, entry);
    });
    entries
}

/// Five addresses, each in two VLANs.
fn macs() -> impl Iterator<Item = Station> {
    let vlans = [0, 4094].into_iter().filter_map(VlanId::new);
    vlans.flat_map(|vlan| (1..=5).map(move |n| Station::new(MacAddr([2, 0, 0, 0, 0, n]), vlan)))
}

fn ports() -> impl Iterator<Item = PortId> {
    [0, 1, 77, 4095].into_iter().filter_map(PortId::new)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let mac = || prop::sample::select(macs().collect::<Vec<_>>());
    let port = || prop::sample::select(ports().collect::<Vec<_>>());
    let step = prop_oneof![
        12 => (mac(), port()).prop_map(|(mac, port)| Step::Learn(mac, port)),
        1 => (mac(), port()).prop_map(|(mac, port)| Step::Announce(mac, port)),
        2 => (mac(), port()).prop_map(|(mac, port)| Step::AddStatic(mac, port)),
        1 => mac().prop_map(Step::Remove),
        1 => (prop::option::of(port()), prop::option::of(mac()), prop::option::of(mac())).prop_map(
            |(port, vlan, mac)| Step::Flush(port, vlan.map(|of| of.vlan), mac.map(|of| of.mac)),
        ),
        2 => port().prop_map(Step::FlushPort),
        1 => Just(Step::SweepFlushed),
        1 => port().prop_map(Step::Purge),
        1 => Just(Step::Age),
        3 => (0..20u32).prop_map(Step::Wait),
        1 => (port(), prop::option::of(0..4u32)).prop_map(|(p, limit)| Step::SetLimit(p, limit)),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #[test]
    fn the_database_behaves_like_a_map(steps in steps(), ageing in 0..40u32, seed: u64) {
        let fdb = Fdb::new(FdbConfig {
            capacity: CAPACITY,
            ageing_ticks: ageing,
            move_hold_ticks: HOLD,
            seed,
        });
        let (entries, limits, owed) = Default::default();
        let mut model = Model { entries, limits, owed, ageing, now: 5 };
        for step in steps {
            let now = Tick(model.now);
            if model.is_full() {
                // Or nobody could tell which of the flushed ones made room.
                model.owed.clear();
                prop_assert_eq!(fdb.sweep_flushed(), model.remove_if(|e| e.is_flushed));
            }
            match step.clone() {
                Step::Learn(mac, port) => {
                    let learned = fdb.learn(mac, port, now);
                    let evicted = model.is_full().then(|| model.evicted(&fdb)).flatten();
                    prop_assert_eq!(learned, model.learn(mac, port, HOLD, evicted));
                }
                Step::Announce(mac, port) => {
                    let learned = fdb.announce(mac, port, now);
                    let evicted = model.is_full().then(|| model.evicted(&fdb)).flatten();
                    prop_assert_eq!(learned, model.learn(mac, port, 0, evicted));
                }
                Step::AddStatic(mac, port) => {
                    let stored = fdb.add_static(mac, port).is_ok();
                    let evicted = model.is_full().then(|| model.evicted(&fdb)).flatten();
                    prop_assert_eq!(stored, model.add_static(mac, port, evicted));
                }
                Step::Remove(mac) => {
                    let is_there = model.entries.get(&mac).is_some_and(|e| !e.is_flushed);
                    if is_there {
                        model.entries.remove(&mac);
                    }
                    prop_assert_eq!(fdb.remove(mac), is_there);
                }
                Step::Flush(port, vlan, mac) => {
                    let wanted = |station: Station, at: PortId| {
                        port.is_none_or(|port| at == port)
                            && vlan.is_none_or(|vlan| station.vlan == vlan)
                            && mac.is_none_or(|mac| station.mac == mac)
                    };
                    let before = model.entries.len();
                    model.entries.retain(|station, e| {
                        e.is_static || e.is_flushed || !wanted(*station, e.port)
                    });
                    prop_assert_eq!(fdb.flush(wanted), before - model.entries.len());
                }
                Step::FlushPort(port) => {
                    prop_assert_eq!(fdb.flush_port(port), model.flush_port(port));
                }
                Step::SweepFlushed => {
                    model.owed.clear();
                    prop_assert_eq!(fdb.sweep_flushed(), model.remove_if(|e| e.is_flushed));
                }
                Step::Purge(port) => {
                    prop_assert_eq!(fdb.purge_port(port), model.remove_if(|e| e.port == port));
                }
                Step::Age => {
                    let (now, ageing) = (model.now, model.ageing);
                    let removed = model.remove_if(|e| !e.is_static && now - e.seen > ageing);
                    prop_assert_eq!(fdb.age(Tick(now)), removed);
                }
                Step::Wait(ticks) => model.now += ticks,
                Step::SetLimit(port, limit) => {
                    fdb.set_limit(port, limit);
                    model.limits.remove(&port);
                    model.limits.extend(limit.map(|limit| (port, limit)));
                }
            }
            let now = Tick(model.now);
            for mac in macs() {
                prop_assert_eq!(fdb.lookup(mac, now), model.lookup(mac), "{:?} {:?}", &step, mac);
            }
            for port in ports() {
                prop_assert_eq!(fdb.count(port), model.count(port), "{:?} {:?}", &step, port);
            }
            prop_assert_eq!(fdb.len(), model.entries.len());
            let counted = model.entries.iter().filter(|(_, e)| !e.is_flushed);
            prop_assert_eq!(entries_of(&fdb), counted.map(|(mac, e)| (*mac, *e)).collect());
        }
    }
}
