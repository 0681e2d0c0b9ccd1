//! Which worker polls which queue pair, and how to get from one such arrangement to another.

use std::collections::BTreeMap;

use ringway_bridge::PortId;

/// Where each port's queue pairs are polled: `placement[pair]` is a worker's index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    ports: BTreeMap<PortId, Vec<u16>>,
}

/// A step from one topology to another. Ports that no step names are not touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// The port leaves all workers.
    Remove(PortId),
    /// The port joins all workers, which poll its pairs as listed.
    Add(PortId, Vec<u16>),
}

impl Topology {
    /// The topology with a port more, its pairs placed one after the other on the workers with the
    /// fewest.
    pub(crate) fn with_port(&self, id: PortId, pairs: u16, workers: u16) -> Self {
        let mut load = vec![0_u32; usize::from(workers)];
        for worker in self.ports.values().flatten() {
            if let Some(load) = load.get_mut(usize::from(*worker)) {
                *load += 1;
            }
        }
        let mut place = || {
            let (worker, load) = (0..workers).zip(&mut load).min_by_key(|(_, load)| **load)?;
            *load += 1;
            Some(worker)
        };
        let placement = (0..pairs).filter_map(|_| place()).collect();
        let mut next = self.clone();
        next.ports.insert(id, placement);
        next
    }

    /// The topology without a port.
    pub(crate) fn without_port(&self, id: PortId) -> Self {
        let mut next = self.clone();
        next.ports.remove(&id);
        next
    }

    /// Who polls the pairs of a port.
    pub(crate) fn placement(&self, id: PortId) -> &[u16] {
        self.ports.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The lowest slot that no port has.
    pub(crate) fn free_id(&self) -> Option<PortId> {
        (0..u16::MAX)
            .map_while(PortId::new)
            .find(|id| !self.ports.contains_key(id))
    }
}

/// The steps from `running` to `desired`: ports that change are removed before they are added.
pub(crate) fn diff(running: &Topology, desired: &Topology) -> Vec<Action> {
    let gone = running
        .ports
        .iter()
        .filter(|(id, at)| desired.ports.get(id) != Some(*at));
    let new = desired
        .ports
        .iter()
        .filter(|(id, at)| running.ports.get(id) != Some(*at));
    let removals = gone.map(|(id, _)| Action::Remove(*id));
    removals
        .chain(new.map(|(id, at)| Action::Add(*id, at.clone())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn apply(topology: &Topology, actions: &[Action]) -> Topology {
        let mut next = topology.clone();
        for action in actions {
            match action {
                Action::Remove(id) => {
                    assert!(next.ports.remove(id).is_some(), "removed what is not there");
                }
                Action::Add(id, placement) => {
                    let old = next.ports.insert(*id, placement.clone());
                    assert!(old.is_none(), "added what is there");
                }
            }
        }
        next
    }

    fn topologies() -> impl Strategy<Value = Topology> {
        let port = (0_u16..8).prop_map(|id| PortId::new(id).unwrap());
        let placement = proptest::collection::vec(0_u16..3, 1..3);
        proptest::collection::btree_map(port, placement, 0..6).prop_map(|ports| Topology { ports })
    }

    proptest! {
        #[test]
        fn applying_the_difference_leads_to_the_desired_topology(
            running in topologies(),
            desired in topologies(),
        ) {
            let actions = diff(&running, &desired);
            prop_assert_eq!(apply(&running, &actions), desired.clone());
            for (id, placement) in &running.ports {
                if desired.ports.get(id) == Some(placement) {
                    let touched = actions.iter().any(|action| match action {
                        Action::Remove(other) | Action::Add(other, _) => other == id,
                    });
                    prop_assert!(!touched, "an unchanged port was touched");
                }
            }
        }
    }

    #[test]
    fn queue_pairs_spread_over_the_workers() {
        let id = |n| PortId::new(n).unwrap();
        let topology = Topology::default()
            .with_port(id(0), 3, 2)
            .with_port(id(1), 1, 2);
        assert_eq!(topology.placement(id(0)), [0, 1, 0]);
        assert_eq!(topology.placement(id(1)), [1]);
        assert_eq!(topology.free_id(), Some(id(2)));
        assert_eq!(topology.without_port(id(0)).free_id(), Some(id(0)));
    }
}
