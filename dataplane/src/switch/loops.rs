//! Loops: looks for them in regular intervals, tells, and keeps ports blocked that are to be.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ringway_api::{OnLoop, PortName};
use tracing::{info, warn};

use super::port_table::{PortTable, State};
use crate::burst_lock::lock;
use crate::port::Port;

/// How long it is counted what a port is refused.
const INTERVAL: Duration = Duration::from_secs(1);

/// When ports were looked at.
#[derive(Debug, Default)]
pub(super) struct Loops {
    counted: Option<Instant>,
}

impl Loops {
    /// Looks at all ports: at what was refused of them, and whether workers have those that they should.
    pub(super) fn look(&mut self, table: &PortTable, state: &mut State, now: Instant) {
        let is_early = |counted| now.saturating_duration_since(counted) < INTERVAL;
        let is_interval = !self.counted.is_some_and(is_early);
        if is_interval {
            self.counted = Some(now);
        }
        for (name, port, is_blocked) in changes(state, is_interval, now) {
            if is_blocked {
                table.unwatch(state, &port);
                table.remove_from_workers(state, port.base().id);
                port.base().forget_stations();
            } else {
                info!(port = %name, "the port is no longer blocked");
                unblock(table, state, &port);
            }
        }
    }
}

/// Ports that are to be blocked from now on, or no longer.
fn changes(state: &State, is_interval: bool, now: Instant) -> Vec<(PortName, Arc<Port>, bool)> {
    let mut changes = Vec::new();
    for (name, entry) in &state.ports {
        let base = entry.port.base();
        let mut guard = lock(&base.loop_guard);
        if is_interval {
            let refused = base.fdb_tally().moves_refused;
            let on_loop = entry.config.on_loop();
            if guard.look(refused, on_loop, now)
                && (on_loop == OnLoop::Block || base.watch_log.pass(now).is_some())
                && let Some(alarm) = guard.alarm(now)
            {
                warn!(port = %name, "{alarm}");
            }
        }
        if !guard.was_blocked() || entry.port.queue_pairs() == 0 {
            continue;
        }
        let (is_blocked, is_served) = (
            guard.is_blocked(now),
            !state.topology.placement(base.id).is_empty(),
        );
        if is_blocked == is_served {
            changes.push((name.clone(), Arc::clone(&entry.port), is_blocked));
        }
    }
    changes
}

fn unblock(table: &PortTable, state: &mut State, port: &Port) {
    let id = port.base().id;
    let Some(config) = state.entry_of(id).map(|entry| entry.config.clone()) else {
        return;
    };
    let (pairs, workers) = (port.queue_pairs(), table.worker_count());
    let desired = state.topology.with_port(id, pairs, workers, config.pins());
    let served = table.change_topology(state, &desired);
    if let Err(error) = served.and_then(|()| table.watch(state, port)) {
        // It is tried again in the next look.
        warn!(port = %port.base().name, %error, "can't wait for its queues");
        table.remove_from_workers(state, id);
    }
}

/// What is to be told of a loop behind a port.
pub(super) fn alarm(port: &Port) -> Option<String> {
    lock(&port.base().loop_guard).alarm(Instant::now())
}
