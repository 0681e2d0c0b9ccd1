//! What ports flood and teach beyond what they may, told to the log: by housekeeping, since workers
//! don't format.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ringway_bridge::{DropReason, FdbTally, PortId};
use tracing::{info, warn};

use super::port_table::State;
use crate::port::PortBase;

/// How often ports are looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// What was told of each port.
#[derive(Debug, Default)]
pub(super) struct Watch {
    looked: Option<Instant>,
    /// By port, with the generation of its slot.
    told: BTreeMap<PortId, (u32, Counts)>,
}

/// What is told, since the port was added or since the line before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    fdb: FdbTally,
    floods: u64,
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
    /// Tells of the ports of which there is something new, of each once in 10 s.
    pub(super) fn look(&mut self, state: &State, now: Instant) {
        let is_early = |looked| now.saturating_duration_since(looked) < INTERVAL;
        if self.looked.is_some_and(is_early) {
            return;
        }
        self.looked = Some(now);
        let ports = state.ports.values();
        let is_there = |id: &PortId, generation: u32| {
            let entry = state.ports.values().find(|e| e.port.base().id == *id);
            entry.is_some_and(|entry| entry.generation == generation)
        };
        self.told
            .retain(|id, (generation, _)| is_there(id, *generation));
        for entry in ports {
            let port = entry.port.base();
            let counts = Counts::of(port);
            let told = self
                .told
                .get(&port.id)
                .map_or(Counts::default(), |told| told.1);
            let new = counts.since(told);
            if new != Counts::default() && tell(port, new, now) {
                self.told.insert(port.id, (entry.generation, counts));
            }
        }
    }
}

/// Logs a line, unless there was one lately.
fn tell(port: &PortBase, new: Counts, now: Instant) -> bool {
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
