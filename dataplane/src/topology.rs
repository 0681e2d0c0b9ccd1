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
    /// The topology with a port more. Its pairs go one after the other to the workers that have
    /// the fewest of its own, then the fewest of the same number: most guests use the first pairs
    /// only.
    pub(crate) fn with_port(&self, id: PortId, pairs: u16, workers: u16) -> Self {
        let count_workers = usize::from(workers);
        let mut total = vec![0_u32; count_workers];
        let mut same_number = vec![vec![0_u32; count_workers]; usize::from(pairs)];
        for placement in self.ports.values() {
            for (pair, worker) in placement.iter().enumerate() {
                let worker = usize::from(*worker);
                total[worker] += 1;
                if let Some(of_number) = same_number.get_mut(pair) {
                    of_number[worker] += 1;
                }
            }
        }
        let mut own = vec![0_u32; count_workers];
        let mut placement = Vec::with_capacity(usize::from(pairs));
        for of_number in &same_number {
            let rank = |worker: &u16| {
                let at = usize::from(*worker);
                (own[at], of_number[at], total[at])
            };
            let Some(worker) = (0..workers).min_by_key(rank) else {
                break;
            };
            own[usize::from(worker)] += 1;
            total[usize::from(worker)] += 1;
            placement.push(worker);
        }
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

    #[test]
    fn guests_that_use_their_first_pair_only_spread_too() {
        let id = |n| PortId::new(n).unwrap();
        let ports = (0..4).fold(Topology::default(), |all, n| all.with_port(id(n), 8, 2));
        let firsts = (0..4).map(|n| ports.placement(id(n))[0]);
        assert_eq!(firsts.collect::<Vec<_>>(), [0, 1, 0, 1]);
        assert_eq!(ports.placement(id(1)), [1, 0, 1, 0, 1, 0, 1, 0]);
    }
}
