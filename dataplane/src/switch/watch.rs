//! What ports do, told to the log and to who listens to events: by housekeeping, since workers
//! don't format.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ringway_api::{Occurrence, SwitchError};
use ringway_bridge::{Bridge, DropReason, FdbTally, PortId};
use tracing::{info, warn};

use super::Switch;
use super::addresses::AddressWatch;
use super::port_table::{PortEntry, State};
use crate::burst_lock::lock;
use crate::events::{EventHub, EventReader};
use crate::port::{Port, PortBase};

/// How often is looked at what ports flood and teach.
const INTERVAL: Duration = Duration::from_secs(1);

/// What was told.
#[derive(Debug, Default)]
pub(super) struct Watch {
    looked: Option<Instant>,
    logged: Told,
    heard: Told,
    addresses: AddressWatch,
}

/// What was told of each port, with the generation of its slot.
#[derive(Debug, Default)]
struct Told(BTreeMap<PortId, (u32, Counts)>);

impl Told {
    /// What came since, and what there is now.
    fn news(&self, entry: &PortEntry) -> (Counts, Counts) {
        let port = entry.port.base();
        let told = self.0.get(&port.id);
        let told = told.filter(|(generation, _)| *generation == entry.generation);
        let now = Counts::of(port);
        (
            now.since(told.map_or(Counts::default(), |told| told.1)),
            now,
        )
    }

    fn note(&mut self, entry: &PortEntry, now: Counts) {
        let id = entry.port.base().id;
        self.0.insert(id, (entry.generation, now));
    }
}

/// What is told, since the port was added or since the line before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    fdb: FdbTally,
    floods: u64,
}

/// Tells what a guest's session does not: what lasts, and what a worker found.
fn tell_of_guest(port: &Port) {
    if let Port::VhostUser(guest) = port {
        guest.tell_state();
        guest.tell_fault();
    }
}

impl Counts {
    fn of(port: &PortBase) -> Self {
        Self {
            fdb: port.fdb_tally(),
            floods: port.rx_drops.of(DropReason::FloodLimit),
        }
    }

    fn since(self, told: Self) -> Self {
        let (now, before) = (self.fdb, told.fdb);
        Self {
            fdb: FdbTally {
                moves: now.moves.saturating_sub(before.moves),
                moves_refused: now.moves_refused.saturating_sub(before.moves_refused),
                evictions: now.evictions.saturating_sub(before.evictions),
                limit_hits: now.limit_hits.saturating_sub(before.limit_hits),
                refused_full: now.refused_full.saturating_sub(before.refused_full),
            },
            floods: self.floods.saturating_sub(told.floods),
        }
    }

    /// Tells what is more than it may be.
    fn tell(self, port: &PortBase, hub: &EventHub) {
        let port = || port.name.clone();
        let frames = self.fdb.moves_refused;
        if frames > 0 {
            hub.tell(|| Occurrence::SpoofAttempts {
                port: port(),
                frames,
            });
        }
        let (limit_hits, refused_full) = (self.fdb.limit_hits, self.fdb.refused_full);
        let evictions = self.fdb.evictions;
        if limit_hits + refused_full + evictions > 0 {
            hub.tell(|| Occurrence::AddressesRefused {
                port: port(),
                limit_hits,
                refused_full,
                evictions,
            });
        }
        let frames = self.floods;
        if frames > 0 {
            hub.tell(|| Occurrence::FloodsDropped {
                port: port(),
                frames,
            });
        }
    }

    /// Stations move where all is well.
    fn is_harmless(self) -> bool {
        let moves = self.fdb.moves;
        let fdb = FdbTally {
            moves,
            ..FdbTally::default()
        };
        self == Self { fdb, floods: 0 }
    }
}

impl Watch {
    /// Before somebody listens: what is so by now is nothing new.
    pub(super) fn begin(&mut self, state: &State, bridge: &Bridge, hub: &EventHub) {
        self.addresses.begin(state, bridge, hub);
        for entry in state.ports.values() {
            tell_of_guest(&entry.port);
            if !hub.is_heard() {
                self.heard.note(entry, Counts::of(entry.port.base()));
            }
        }
    }

    /// Tells what is new of all ports.
    pub(super) fn look(&mut self, state: &State, bridge: &Bridge, hub: &EventHub, now: Instant) {
        if hub.is_heard() {
            let ports = state.ports.values();
            ports.for_each(|entry| tell_of_guest(&entry.port));
        }
        self.addresses.look(state, bridge, hub, now);
        let is_early = |looked| now.saturating_duration_since(looked) < INTERVAL;
        if self.looked.is_some_and(is_early) {
            return;
        }
        self.looked = Some(now);
        for entry in state.ports.values() {
            let (new, counts) = self.logged.news(entry);
            // Of each port once in 10 s.
            if new != Counts::default() && log(entry.port.base(), new, now) {
                self.logged.note(entry, counts);
            }
            if hub.is_heard() {
                let (new, counts) = self.heard.news(entry);
                new.tell(entry.port.base(), hub);
                self.heard.note(entry, counts);
            }
        }
        self.forget(state);
    }

    /// Forgets ports that are gone.
    fn forget(&mut self, state: &State) {
        let ports = state.generations();
        for told in [&mut self.logged, &mut self.heard] {
            told.0.retain(|id, (generation, _)| {
                let port = ports.get(id);
                port.is_some_and(|(_, current)| current == generation)
            });
        }
    }
}

/// Logs a line, unless there was one lately.
fn log(port: &PortBase, new: Counts, now: Instant) -> bool {
    let Some(suppressed) = port.watch_log.pass(now) else {
        return false;
    };
    let Counts { fdb, floods } = new;
    let name = &port.name;
    if new.is_harmless() {
        info!(port = %name, moves = fdb.moves, suppressed, "stations moved here");
    } else {
        warn!(
            port = %name,
            moves = fdb.moves,
            moves_refused = fdb.moves_refused,
            evictions = fdb.evictions,
            limit_hits = fdb.limit_hits,
            refused_full = fdb.refused_full,
            floods_dropped = floods,
            suppressed,
            "the port floods, or teaches addresses, beyond what it may"
        );
    }
    true
}

impl Switch {
    /// What happens from now on, as events.
    ///
    /// # Errors
    /// As many listen as may.
    pub fn events(&self) -> Result<EventReader, SwitchError> {
        let state = self.table.lock();
        lock(&self.watch).begin(&state, &self.bridge, &self.events);
        self.events.listen()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_came_since_the_line_before() {
        let counts = |moves, evictions, floods| Counts {
            fdb: FdbTally {
                moves,
                evictions,
                ..FdbTally::default()
            },
            floods,
        };
        let new = counts(5, 2, 10).since(counts(3, 2, 10));
        assert_eq!(new, counts(2, 0, 0));
        assert!(new.is_harmless());
        assert!(!counts(2, 0, 1).is_harmless() && !counts(2, 1, 0).is_harmless());
    }
}
