//! Which worker polls which queue pair, and how to get from one such topology to another.

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
    /// A pair passes from one worker to another.
    Move {
        id: PortId,
        pair: u16,
        from: u16,
        to: u16,
    },
}

impl Topology {
    /// The topology with a port more. Its pairs go one after the other to the workers that have
    /// the fewest of its own, then the fewest of the same number (most guests use the first pairs
    /// only), then the fewest of all. `pins` (pair, worker) overrule that.
    pub(crate) fn with_port(
        &self,
        id: PortId,
        pairs: u16,
        workers: u16,
        pins: &BTreeMap<u16, u16>,
    ) -> Self {
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
        for (pair, of_number) in (0..).zip(&same_number) {
            let rank = |worker: &u16| {
                let at = usize::from(*worker);
                (own[at], of_number[at], total[at])
            };
            let pinned = pins.get(&pair).copied().filter(|worker| *worker < workers);
            let Some(worker) = pinned.or_else(|| (0..workers).min_by_key(rank)) else {
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

    /// The topology with a pair polled by another worker; the same if there is no such pair.
    pub(crate) fn with_pair_at(&self, id: PortId, pair: u16, worker: u16) -> Self {
        let mut next = self.clone();
        let placement = next.ports.get_mut(&id);
        if let Some(at) = placement.and_then(|at| at.get_mut(usize::from(pair))) {
            *at = worker;
        }
        next
    }

    /// Takes a step. One that does not fit (a port that is there already, or not) is a fault of the
    /// caller's, and replaces what is there.
    pub(crate) fn apply(&mut self, action: &Action) {
        match action {
            Action::Remove(id) => {
                let old = self.ports.remove(id);
                debug_assert!(old.is_some(), "removed what is not there");
            }
            Action::Add(id, placement) => {
                let old = self.ports.insert(*id, placement.clone());
                debug_assert!(old.is_none(), "added what is there");
            }
            Action::Move { id, pair, from, to } => {
                let old = self.placement(*id).get(usize::from(*pair));
                debug_assert_eq!(old, Some(from), "moved from where it is not");
                *self = self.with_pair_at(*id, *pair, *to);
            }
        }
    }

    /// All pairs with their workers, by port.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (PortId, u16, u16)> + '_ {
        self.ports
            .iter()
            .flat_map(|(id, at)| (0..).zip(at).map(|(pair, worker)| (*id, pair, *worker)))
    }

    /// Who polls the pairs of a port.
    pub(crate) fn placement(&self, id: PortId) -> &[u16] {
        self.ports.get(&id).map_or(&[], Vec::as_slice)
    }
}

/// The steps from `running` to `desired`: a port whose number of pairs changes is removed before it
/// is added; of one that keeps it, those pairs move that change hands.
pub(crate) fn diff(running: &Topology, desired: &Topology) -> Vec<Action> {
    let has_same = |of: &Topology, id: &PortId, at: &[u16]| {
        of.ports
            .get(id)
            .is_some_and(|other| other.len() == at.len())
    };
    let gone = running.ports.iter();
    let gone = gone.filter(|(id, at)| !has_same(desired, id, at));
    let new = desired.ports.iter();
    let new = new.filter(|(id, at)| !has_same(running, id, at));
    let kept = running.ports.iter().filter_map(|(id, at)| {
        let next = desired.ports.get(id)?;
        (next.len() == at.len()).then_some((*id, at, next))
    });
    let moves = kept.flat_map(|(id, at, next)| {
        let pairs = (0..).zip(at.iter().zip(next));
        pairs
            .filter(|(_, (from, to))| from != to)
            .map(move |(pair, (from, to))| Action::Move {
                id,
                pair,
                from: *from,
                to: *to,
            })
    });
    let removals = gone.map(|(id, _)| Action::Remove(*id));
    removals
        .chain(moves)
        .chain(new.map(|(id, at)| Action::Add(*id, at.clone())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NO_PINS: BTreeMap<u16, u16> = BTreeMap::new();

    fn apply(topology: &Topology, actions: &[Action]) -> Topology {
        let mut next = topology.clone();
        for action in actions {
            next.apply(action);
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
                let touches = |action: &&Action| match action {
                    Action::Remove(other) | Action::Add(other, _) => other == id,
                    Action::Move { id: other, .. } => other == id,
                };
                let touched: Vec<_> = actions.iter().filter(touches).collect();
                let next = desired.ports.get(id);
                if next == Some(placement) {
                    prop_assert!(touched.is_empty(), "an unchanged port was touched");
                } else if next.is_some_and(|next| next.len() == placement.len()) {
                    let only_moves = touched.iter().all(|a| matches!(a, Action::Move { .. }));
                    prop_assert!(only_moves, "a port was taken out to move a pair");
                }
            }
        }
    }

    #[test]
    fn queue_pairs_spread_over_the_workers() {
        let id = |n| PortId::new(n).unwrap();
        let topology = Topology::default()
            .with_port(id(0), 3, 2, &NO_PINS)
            .with_port(id(1), 1, 2, &NO_PINS);
        assert_eq!(topology.placement(id(0)), [0, 1, 0]);
        assert_eq!(topology.placement(id(1)), [1]);
    }

    #[test]
    fn guests_that_use_their_first_pair_only_spread_too() {
        let id = |n| PortId::new(n).unwrap();
        let add = |all: Topology, n| all.with_port(id(n), 8, 2, &NO_PINS);
        let ports = (0..4).fold(Topology::default(), add);
        let firsts = (0..4).map(|n| ports.placement(id(n))[0]);
        assert_eq!(firsts.collect::<Vec<_>>(), [0, 1, 0, 1]);
        assert_eq!(ports.placement(id(1)), [1, 0, 1, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn pinned_pairs_start_where_they_are_pinned() {
        let id = PortId::new(0).unwrap();
        let pins = BTreeMap::from([(0, 1), (2, 1), (3, 9)]);
        let topology = Topology::default().with_port(id, 4, 2, &pins);
        assert_eq!(topology.placement(id), [1, 0, 1, 0]);
    }
}
