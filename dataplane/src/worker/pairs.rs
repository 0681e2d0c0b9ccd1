//! Counters of ordered pairs of ports: who sends how much to whom.

use std::sync::atomic::{AtomicU32, Ordering};

use ringway_api::Drops;
use ringway_bridge::{DropReason, PortId};

use crate::port::{Counter, DropCounters};

/// Pairs that a worker can tell apart, a power of two; traffic of further pairs is not attributed
/// (the ports' own counters are complete all the same). 160 KiB a worker.
const MAX_PAIRS: usize = 1024;

/// Slots that a look-up goes through: where all of them are other pairs', this one is not told apart.
const MAX_STEPS: usize = 16;

const EMPTY: u32 = 0;
/// A slot whose ports went; it is used again, and look-ups go on past it.
const REMOVED: u32 = u32::MAX;

/// One pair's counters.
#[derive(Debug, Default)]
pub(crate) struct Pair {
    /// [`EMPTY`], [`REMOVED`] or [`key`].
    key: AtomicU32,
    pub(crate) frames: Counter,
    pub(crate) bytes: Counter,
    pub(crate) drops: DropCounters,
}

/// A hash table with open addressing that its worker writes and anybody reads.
#[derive(Debug)]
pub(crate) struct PairTable {
    slots: Box<[Pair]>,
}

/// A snapshot of one pair.
#[derive(Clone, Debug)]
pub(crate) struct PairSnapshot {
    pub(crate) from: PortId,
    pub(crate) to: PortId,
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    pub(crate) drops: Drops,
}

/// The pair as a number that is neither [`EMPTY`] nor [`REMOVED`]: ports are below 4,096.
fn key(from: PortId, to: PortId) -> u32 {
    (u32::from(from.get()) << 16 | u32::from(to.get())) + 1
}

fn ports(key: u32) -> Option<(PortId, PortId)> {
    let pair = key.checked_sub(1)?;
    #[expect(clippy::cast_possible_truncation, reason = "the halves of the key")]
    let (from, to) = ((pair >> 16) as u16, pair as u16);
    Some((PortId::new(from)?, PortId::new(to)?))
}

impl PairTable {
    pub(crate) fn new() -> Self {
        Self {
            slots: (0..MAX_PAIRS).map(|_| Pair::default()).collect(),
        }
    }

    /// The counters of a pair, new if need be; `None` if there is no room. For the worker only.
    #[inline(always)]
    pub(crate) fn get(&self, from: PortId, to: PortId) -> Option<&Pair> {
        let key = key(from, to);
        let home = key.wrapping_mul(0x9e37_79b1) as usize >> 16;
        let mut vacant = None;
        for step in 0..MAX_STEPS {
            let slot = &self.slots[(home + step) % MAX_PAIRS];
            match slot.key.load(Ordering::Relaxed) {
                found if found == key => return Some(slot),
                EMPTY => {
                    let slot = vacant.unwrap_or(slot);
                    // Release: pairs with the reader's acquire; the counters are zero by then.
                    slot.key.store(key, Ordering::Release);
                    return Some(slot);
                }
                REMOVED => {
                    vacant.get_or_insert(slot);
                }
                _ => {}
            }
        }
        let slot = vacant?;
        slot.key.store(key, Ordering::Release);
        Some(slot)
    }

    /// Forgets the pairs of a port that goes. For the worker only.
    pub(crate) fn forget(&self, port: PortId) {
        for slot in &self.slots {
            let pair = ports(slot.key.load(Ordering::Relaxed));
            if pair.is_some_and(|(from, to)| from == port || to == port) {
                slot.key.store(REMOVED, Ordering::Release);
                slot.frames.set(0);
                slot.bytes.set(0);
                slot.drops.clear();
            }
        }
    }

    /// All pairs that were ever used.
    pub(crate) fn snapshot(&self) -> impl Iterator<Item = PairSnapshot> + '_ {
        self.slots.iter().filter_map(|slot| {
            // Acquire: pairs with the release store in `get`.
            let (from, to) = ports(slot.key.load(Ordering::Acquire))?;
            Some(PairSnapshot {
                from,
                to,
                frames: slot.frames.get(),
                bytes: slot.bytes.get(),
                drops: slot.drops.read(),
            })
        })
    }
}

impl Pair {
    /// Counts frames that were not delivered.
    #[cold]
    pub(crate) fn drop(&self, reason: DropReason, frames: u64) {
        self.drops.add(reason, frames);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(id: u16) -> PortId {
        PortId::new(id).unwrap()
    }

    #[test]
    fn pairs_keep_their_counts_apart_and_order_matters() {
        let table = PairTable::new();
        table.get(port(1), port(2)).unwrap().frames.add_owned(3);
        table.get(port(2), port(1)).unwrap().frames.add_owned(5);
        table.get(port(1), port(2)).unwrap().frames.add_owned(4);
        let mut all: Vec<_> = table
            .snapshot()
            .map(|p| (p.from.get(), p.to.get(), p.frames))
            .collect();
        all.sort_unstable();
        assert_eq!(all, [(1, 2, 7), (2, 1, 5)]);
    }

    #[test]
    fn a_full_table_refuses_new_pairs_and_serves_them_once_ports_go() {
        let table = PairTable::new();
        // Far more than there are slots.
        let told_apart: Vec<_> = (0..4095)
            .filter(|to| {
                let pair = table.get(port(4095), port(*to));
                pair.inspect(|pair| pair.frames.add_owned(1)).is_some()
            })
            .collect();
        assert!(
            (900..=1024).contains(&told_apart.len()),
            "{}",
            told_apart.len()
        );
        assert_eq!(table.snapshot().count(), told_apart.len());
        for to in &told_apart {
            assert_eq!(table.get(port(4095), port(*to)).unwrap().frames.get(), 1);
        }
        let refused = (0..4095).find(|to| !told_apart.contains(to)).unwrap();
        assert!(table.get(port(4095), port(refused)).is_none());
        table.forget(port(4095));
        assert_eq!(table.snapshot().count(), 0);
        let fresh = table.get(port(4095), port(refused)).unwrap();
        assert_eq!(fresh.frames.get(), 0);
    }
}
