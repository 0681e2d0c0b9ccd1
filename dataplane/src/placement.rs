//! Which queues to move between workers, from what they cost lately: a pure function.
//!
//! ```text
//!   worker 0  ######## a0 ######## | #### b0 #### | ## c0 ##      0.95 of a core
//!   worker 1  #### d0 ####                                        0.25
//!                 move b0: the heavier of the two then has 0.70, and 0.25 are gained
//! ```

use std::collections::BTreeMap;

use ringway_bridge::PortId;

/// Below this load of its busiest worker a switch is left alone, in thousandths of a core: the
/// worker has time to spare, and each further one that is awake costs.
pub(crate) const HOT: u32 = 700;

/// A move has to relieve the busier of the two workers by so much, in thousandths of a core: what
/// loads are measured to is a few hundredths, and each move disturbs the queue for some
/// microseconds.
pub(crate) const GAIN: u32 = 100;

/// Moves of one step: the next step sees what they did.
pub(crate) const MAX_MOVES: usize = 4;

/// A queue pair of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct QueueId {
    pub(crate) port: PortId,
    pub(crate) pair: u16,
}

/// A queue with what it costs the worker that polls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueLoad {
    pub(crate) queue: QueueId,
    pub(crate) worker: u16,
    /// Thousandths of a core.
    pub(crate) load: u32,
    /// Pinned, or moved a short while ago: it stays.
    pub(crate) is_fixed: bool,
}

/// A queue that is to change hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) queue: QueueId,
    pub(crate) from: u16,
    pub(crate) to: u16,
}

/// The moves, at most [`MAX_MOVES`], that relieve the busiest worker, best first. Never makes the
/// busiest one busier, and returns none if there is nothing worth it: so the same loads, once the
/// moves are made, give no more.
pub(crate) fn rebalance(queues: &[QueueLoad], workers: u16) -> Vec<Move> {
    let mut queues = queues.to_vec();
    let mut moves = Vec::new();
    while moves.len() < MAX_MOVES {
        let Some((at, to)) = best_move(&queues, workers) else {
            break;
        };
        let queue = &mut queues[at];
        moves.push(Move {
            queue: queue.queue,
            from: queue.worker,
            to,
        });
        queue.worker = to;
        // Twice in one step would be once too often.
        queue.is_fixed = true;
    }
    moves
}

/// The queue of the busiest worker whose move to the idlest leaves the busier of the two with the
/// least, and that worker.
fn best_move(queues: &[QueueLoad], workers: u16) -> Option<(usize, u16)> {
    let loads = worker_loads(queues, workers);
    let (busiest, high) = loads.iter().max_by_key(|(_, load)| **load)?;
    let (idlest, low) = loads.iter().min_by_key(|(_, load)| **load)?;
    if *high < HOT {
        return None;
    }
    let movable = queues.iter().enumerate();
    let movable = movable.filter(|(_, queue)| queue.worker == *busiest && !queue.is_fixed);
    let after = |queue: &QueueLoad| (high - queue.load).max(low + queue.load);
    let (at, best) = movable.min_by_key(|(_, queue)| (after(queue), queue.queue))?;
    (after(best) + GAIN <= *high).then_some((at, *idlest))
}

/// The load of each worker; those without queues too.
fn worker_loads(queues: &[QueueLoad], workers: u16) -> BTreeMap<u16, u32> {
    let mut loads: BTreeMap<u16, u32> = (0..workers).map(|worker| (worker, 0)).collect();
    for queue in queues {
        if let Some(load) = loads.get_mut(&queue.worker) {
            *load = load.saturating_add(queue.load);
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn queue(number: u16, worker: u16, load: u32) -> QueueLoad {
        let port = PortId::new(number).unwrap();
        QueueLoad {
            queue: QueueId { port, pair: 0 },
            worker,
            load,
            is_fixed: false,
        }
    }

    fn apply(queues: &mut [QueueLoad], moves: &[Move]) {
        for step in moves {
            let moved = queues.iter_mut().find(|queue| queue.queue == step.queue);
            let moved = moved.unwrap();
            assert_eq!(moved.worker, step.from);
            moved.worker = step.to;
        }
    }

    fn maximum(queues: &[QueueLoad], workers: u16) -> u32 {
        worker_loads(queues, workers)
            .values()
            .copied()
            .max()
            .unwrap()
    }

    #[test]
    fn a_worker_with_too_much_gives_to_one_that_has_time() {
        let mut queues = [queue(0, 0, 450), queue(1, 0, 450), queue(2, 1, 50)];
        let moves = rebalance(&queues, 2);
        assert_eq!(moves.len(), 1);
        apply(&mut queues, &moves);
        assert_eq!(maximum(&queues, 2), 500);
    }

    #[test]
    fn what_would_gain_nothing_or_little_stays() {
        // One queue that fills its worker is as well off elsewhere.
        assert_eq!(rebalance(&[queue(0, 0, 1000)], 2), []);
        // Nobody is short of time.
        assert_eq!(rebalance(&[queue(0, 0, 300), queue(1, 0, 300)], 2), []);
        // A difference within what can be measured.
        let even = [queue(0, 0, 700), queue(1, 0, 90), queue(2, 1, 600)];
        assert_eq!(rebalance(&even, 2), []);
    }

    #[test]
    fn a_step_moves_a_few_queues_and_the_next_ones_more() {
        let mut queues: Vec<_> = (0..10).map(|number| queue(number, 0, 100)).collect();
        let mut steps = 0;
        loop {
            let moves = rebalance(&queues, 4);
            assert!(moves.len() <= MAX_MOVES);
            if moves.is_empty() {
                break;
            }
            apply(&mut queues, &moves);
            steps += 1;
        }
        assert!(maximum(&queues, 4) < HOT && steps <= 2, "{queues:?}");
    }

    prop_compose! {
        fn loads(workers: u16)(
            queues in proptest::collection::vec((0..workers, 0_u32..1000, any::<bool>()), 0..24)
        ) -> Vec<QueueLoad> {
            let with_number = (0..).zip(queues);
            with_number.map(|(number, (worker, load, is_fixed))| QueueLoad {
                is_fixed,
                ..queue(number, worker, load)
            }).collect()
        }
    }

    proptest! {
        #[test]
        fn moves_spare_fixed_queues_and_never_raise_the_maximum(
            (workers, queues) in (1_u16..5).prop_flat_map(|n| (Just(n), loads(n)))
        ) {
            let moves = rebalance(&queues, workers);
            prop_assert!(moves.len() <= MAX_MOVES);
            let mut last = maximum(&queues, workers);
            let mut next = queues.clone();
            for step in &moves {
                let fixed = queues.iter().any(|q| q.queue == step.queue && q.is_fixed);
                prop_assert!(!fixed, "moved {step:?}");
                prop_assert!(step.to < workers && step.to != step.from);
                apply(&mut next, std::slice::from_ref(step));
                let now = maximum(&next, workers);
                prop_assert!(now <= last, "from {last} to {now}");
                last = now;
            }
        }

        #[test]
        fn once_balanced_nothing_moves_any_more(
            (workers, mut queues) in (1_u16..5).prop_flat_map(|n| (Just(n), loads(n)))
        ) {
            // Each move relieves the busiest by GAIN, or its equal, so steps end.
            for _ in 0..100 {
                let moves = rebalance(&queues, workers);
                if moves.is_empty() {
                    prop_assert_eq!(rebalance(&queues, workers), vec![]);
                    return Ok(());
                }
                let is_last = moves.len() < MAX_MOVES;
                apply(&mut queues, &moves);
                if is_last {
                    // What was moved counts as fixed within its step only.
                    for queue in &mut queues {
                        queue.is_fixed |= moves.iter().any(|step| step.queue == queue.queue);
                    }
                    prop_assert_eq!(rebalance(&queues, workers), vec![]);
                }
            }
            prop_assert!(false, "no end of moves");
        }
    }
}
