//! The thread that measures loads, and moves queues from busy workers to others.
//!
//! Not the housekeeping thread: that one frees workers that a front-end holds up, and a move waits
//! for its workers.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use ringway_api::{BalanceConfig, PortName};
use tracing::{info, warn};

use super::load::QueueCount;
use super::port_table::{PortTable, State};
use crate::housekeeping::Periodic;
use crate::placement::{QueueId, QueueLoad, rebalance};

/// A queue that was moved stays for so many intervals: traffic that comes and goes moves it at most
/// once in that time.
const HOLD: u32 = 12;

/// Starts the thread. `epoch` is the zero of the workers' times.
pub(super) fn start(
    table: Arc<PortTable>,
    config: BalanceConfig,
    epoch: Instant,
) -> io::Result<Periodic> {
    let mut held = BTreeMap::new();
    Periodic::start("ringway-balance", config.interval, move || {
        let mut state = table.lock();
        measure(&table, &mut state, epoch);
        if config.is_on {
            move_queues(&table, &mut state, &mut held);
        }
    })
}

/// Ends an interval of the loads.
fn measure(table: &PortTable, state: &mut State, epoch: Instant) {
    let busy = table.workers.iter().map(|worker| worker.busy());
    let State {
        ports,
        topology,
        load,
        ..
    } = state;
    let counts = ports.values().flat_map(|entry| {
        let id = entry.port.base().id;
        (0..)
            .zip(topology.placement(id))
            .map(move |(pair, worker)| {
                let (frames, bytes) = entry.port.received(pair);
                QueueCount {
                    queue: QueueId { port: id, pair },
                    worker: *worker,
                    generation: entry.generation,
                    frames,
                    bytes,
                }
            })
    });
    load.measure(epoch.elapsed(), busy.collect(), counts);
}

/// Moves what is worth it; `held` are the queues that were moved lately, with the intervals for
/// which they stay.
fn move_queues(table: &PortTable, state: &mut State, held: &mut BTreeMap<QueueId, u32>) {
    held.retain(|_, left| {
        *left -= 1;
        *left > 0
    });
    for step in rebalance(&queue_loads(state, held), table.worker_count()) {
        let QueueId { port, pair } = step.queue;
        let name = state
            .entry_of(port)
            .map(|entry| entry.port.base().name.clone());
        let name = name.as_ref().map_or("?", PortName::as_str);
        let desired = state.topology.with_pair_at(port, pair, step.to);
        match table.change_topology(state, &desired) {
            Ok(()) => {
                info!(port = %name, queue = pair, from = step.from, to = step.to, "queue moved");
            }
            Err(error) => {
                warn!(port = %name, queue = pair, to = step.to, "can't move a queue: {error}");
            }
        }
        held.insert(step.queue, HOLD);
    }
}

/// The queues that took frames in the last interval.
fn queue_loads(state: &State, held: &BTreeMap<QueueId, u32>) -> Vec<QueueLoad> {
    let entries = state.ports.values();
    let loads = entries.flat_map(|entry| {
        let port = entry.port.base().id;
        (0..)
            .zip(state.topology.placement(port))
            .filter_map(move |(pair, worker)| {
                let queue = QueueId { port, pair };
                let rate = state.load.queues.get(&queue)?;
                Some(QueueLoad {
                    queue,
                    worker: *worker,
                    load: rate.load,
                    is_fixed: entry.config.pins().contains_key(&pair) || held.contains_key(&queue),
                })
            })
    });
    loads.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::Switch;
    use crate::switch::load::QueueRate;
    use ringway_api::{
        GroupFwdMask, IdleConfig, PortConfig, QueuePairs, SocketSpec, SwitchConfig, VhostUserConfig,
    };
    use std::time::Duration;

    fn name(port: u16) -> PortName {
        format!("p{port}").parse().unwrap()
    }

    /// Two workers and four ports of one queue each, which the workers have in turn.
    fn four_ports(folder: &std::path::Path) -> Switch {
        let cores = core_affinity::get_core_ids().unwrap();
        let switch = Switch::start(SwitchConfig {
            worker_cpus: cores[..2].iter().map(|core| core.id).collect(),
            idle: IdleConfig::DEFAULT,
            balance: BalanceConfig {
                is_on: false,
                interval: Duration::from_secs(3600),
            },
            fdb_capacity: 16,
            fdb_ageing: Duration::from_secs(300),
            fdb_move_hold: SwitchConfig::DEFAULT_FDB_MOVE_HOLD,
            group_fwd_mask: GroupFwdMask::DEFAULT,
        })
        .unwrap();
        for port in 0..4 {
            let path = folder.join(name(port).as_str());
            let socket = SocketSpec::Listen(path.as_path().try_into().unwrap());
            let config = PortConfig::VhostUser(VhostUserConfig {
                queues: QueuePairs::ONE,
                ..VhostUserConfig::new(socket)
            });
            switch.add_port(name(port), config).unwrap();
        }
        switch
    }

    /// A step after an interval in which the queues had these loads; who polls what afterwards.
    fn step(switch: &Switch, loads: [u32; 4], held: &mut BTreeMap<QueueId, u32>) -> [u16; 4] {
        let mut state = switch.table.lock();
        let port = |number: u16| state.ports[&name(number)].port.base().id;
        let rates = (0..).zip(loads).map(|(number, load)| {
            let queue = QueueId {
                port: port(number),
                pair: 0,
            };
            let rate = QueueRate {
                load,
                ..QueueRate::default()
            };
            (queue, rate)
        });
        state.load.queues = rates.collect();
        move_queues(&switch.table, &mut state, held);
        drop(state);
        [0, 1, 2, 3].map(|port| switch.port(&name(port)).unwrap().queues[0].worker)
    }

    #[test]
    fn queues_leave_a_busy_worker_but_pinned_ones_and_those_just_moved_stay() {
        let folder = tempfile::TempDir::new().unwrap();
        let switch = four_ports(folder.path());
        let mut held = BTreeMap::new();
        assert_eq!(step(&switch, [0; 4], &mut held), [0, 1, 0, 1]);
        switch.pin_queue(&name(0), 0, 0).unwrap();
        let busy = [500, 10, 450, 10];
        assert_eq!(
            step(&switch, busy, &mut held),
            [0, 1, 1, 1],
            "the third moves"
        );
        assert_eq!(
            step(&switch, busy, &mut held),
            [0, 1, 1, 1],
            "and nothing more"
        );
        // The third would be first choice again, but was moved just now.
        assert_eq!(step(&switch, [0, 300, 400, 200], &mut held), [0, 0, 1, 1]);
        for _ in 0..HOLD {
            step(&switch, [0; 4], &mut held);
        }
        assert!(held.is_empty());
        switch.unpin_queue(&name(0), 0).unwrap();
        assert_eq!(step(&switch, [500, 450, 0, 0], &mut held), [1, 0, 1, 1]);
    }
}
