//! The forwarding database: which port a MAC address was last seen behind. What workers ask and
//! tell it is here; what an operator and housekeeping do to it is in `fdb/admin.rs`.

mod admin;
mod behind;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

use crate::{MAX_PORTS, MacAddr, PortId, Tick};
use behind::Behind;
pub(crate) use table::Probe;
use table::{Entry, Slot, Table};

/// Most entries that a database can be made for: half a gigabyte of buckets.
pub const MAX_FDB_CAPACITY: usize = 1 << 24;

/// Fewest buckets (4 KiB): a tiny database has so much room that no bucket overflows.
const MIN_BUCKETS: usize = 64;

/// What a database is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdbConfig {
    /// Most entries, learned and static; clamped to 1..=[`MAX_FDB_CAPACITY`]. Takes 32 bytes each.
    pub capacity: usize,
    /// A learned entry is forgotten when it was not seen for more than so many ticks; from 2^31 on
    /// it never is.
    pub ageing_ticks: u32,
    /// Secret of the hash, to be drawn at random: keeps guests from choosing colliding addresses.
    pub seed: u64,
}

/// What [`Fdb::learn`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// The address was unknown and is now known.
    New,
    /// The address was known behind the port, and is now known to be in use.
    Refreshed,
    /// The address was learned behind another port and moved here.
    Moved {
        /// The port that it left.
        from: PortId,
    },
    /// The address is pinned to another port; nothing changed.
    Static,
    /// The port has as many learned addresses as it may; nothing changed.
    LimitReached,
    /// The database is full; nothing changed.
    Full,
    /// Another thread was writing; nothing changed, and the next frame will do it.
    Busy,
    /// Group addresses and zero can't be learned; nothing changed.
    NotUnicast,
}

/// Why a static entry was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdbError {
    /// The address has the group bit.
    #[error("{mac} is a group address: an entry needs the address of one station")]
    GroupAddress {
        /// The address.
        mac: MacAddr,
    },
    /// The address is `00:00:00:00:00:00`.
    #[error("00:00:00:00:00:00 is no station's address")]
    ZeroAddress,
    /// There is no room.
    #[error("the forwarding database is full: it holds {len} entries and was made for {capacity}")]
    Full {
        /// Entries that it holds.
        len: usize,
        /// Entries that it was made for.
        capacity: usize,
    },
}

/// The forwarding database, one for all workers, shared by reference.
///
/// Look-ups, and learning what is known already, take no lock and, within one tick, store nothing.
/// What changes the set of entries takes a mutex: workers only try it, control threads wait for it.
/// The ordering of every access is explained at the protocol of a slot (`fdb/table.rs`).
///
/// A port that goes down is [flushed](Self::flush_port) by one atomic addition: its entries have the
/// epoch in which they were learned, and count only if that is still its port's. They are swept out
/// later.
///
/// A look-up that races with a change may miss an entry (the frame is flooded), and never finds
/// another address's port. Ports in entries are not checked to exist: remove a port from the
/// workers first and then [`purge`](Self::purge_port) it.
pub struct Fdb {
    table: Table,
    capacity: usize,
    ageing_ticks: u32,
    /// By port.
    behind: Box<[Behind]>,
    shared: Shared,
}

/// What writers change, apart from the fields that every look-up reads.
///
/// The length is written under the mutex and read without it as a hint, so Relaxed is enough: the
/// mutex orders the writers, and the exact answer is taken with it held.
#[repr(align(128))]
struct Shared {
    writer: Mutex<()>,
    /// Entries in the table, those that don't count any more included.
    len: AtomicUsize,
    /// A port was flushed since the last sweep.
    is_sweep_due: AtomicBool,
}

impl Fdb {
    /// An empty database: allocates all that it will ever use.
    pub fn new(config: FdbConfig) -> Self {
        let capacity = config.capacity.clamp(1, MAX_FDB_CAPACITY);
        // Four slots a bucket, half of them for entries.
        let buckets = capacity.div_ceil(2).max(MIN_BUCKETS);
        Self::with_buckets(config, capacity, u32::try_from(buckets).unwrap_or(u32::MAX))
    }

    fn with_buckets(config: FdbConfig, capacity: usize, buckets: u32) -> Self {
        let ports = (0..).map_while(PortId::new);
        debug_assert_eq!(ports.clone().count(), MAX_PORTS);
        Self {
            table: Table::new(buckets, config.seed),
            capacity,
            ageing_ticks: config.ageing_ticks,
            behind: ports.map(Behind::new).collect(),
            shared: Shared {
                writer: Mutex::new(()),
                len: AtomicUsize::new(0),
                is_sweep_due: AtomicBool::new(false),
            },
        }
    }

    /// The port that `mac` is behind; `None` if unknown or not seen for longer than the ageing.
    #[inline]
    pub fn lookup(&self, mac: MacAddr, now: Tick) -> Option<PortId> {
        self.lookup_probe(self.probe(mac.to_u64()), now)
    }

    /// Notes that `mac` was seen behind `port` at `now`. Never blocks.
    ///
    /// An expired entry that was not swept yet is an entry: it counts, is refreshed, and moves.
    #[inline]
    pub fn learn(&self, mac: MacAddr, port: PortId, now: Tick) -> Learned {
        match check_unicast(mac) {
            Ok(()) => self.learn_probe(self.probe(mac.to_u64()), port, now),
            Err(_) => Learned::NotUnicast,
        }
    }

    /// Hashes a MAC (low 48 bits) for the functions below.
    #[inline]
    pub(crate) fn probe(&self, mac: u64) -> Probe {
        self.table.probe(mac)
    }

    /// Starts the cache miss of a look-up that follows; the result means nothing.
    #[inline]
    pub(crate) fn touch(&self, probe: Probe) -> u64 {
        self.table.touch(probe)
    }

    #[inline]
    pub(crate) fn lookup_probe(&self, probe: Probe, now: Tick) -> Option<PortId> {
        let (_, entry) = self.table.find(probe)?;
        let counts = !self.is_flushed(entry) && !entry.is_expired(now, self.ageing_ticks);
        counts.then(|| entry.port())
    }

    /// Whether a learned entry's port was flushed since; static ones stay.
    #[inline]
    fn is_flushed(&self, entry: Entry) -> bool {
        entry.tag() != self.behind(entry.port()).tag() && !entry.is_static()
    }

    #[inline]
    fn behind(&self, port: PortId) -> &Behind {
        &self.behind[port.index()]
    }

    /// [`learn`](Self::learn) for an address that is known to be a station's.
    #[inline]
    pub(crate) fn learn_probe(&self, probe: Probe, port: PortId, now: Tick) -> Learned {
        let tag = self.behind(port).tag();
        let found = self.table.find(probe);
        if let Some((slot, entry)) = found
            && let Some(learned) = learn_known(slot, entry, tag, port, now)
        {
            return learned;
        }
        self.learn_change(probe, port, now, found.is_some())
    }

    /// Learns a new address or moves a known one.
    #[cold]
    fn learn_change(&self, probe: Probe, port: PortId, now: Tick, known: bool) -> Learned {
        let behind = self.behind(port);
        // Before the lock, or a guest that invents addresses would keep the others from it.
        if behind.is_at_limit() {
            return Learned::LimitReached;
        }
        if !known && self.len() >= self.capacity {
            return Learned::Full;
        }
        let Some(writer) = self.try_lock() else {
            return Learned::Busy;
        };
        let tag = behind.tag();
        let found = self.table.find(probe);
        let known = found.and_then(|(slot, entry)| learn_known(slot, entry, tag, port, now));
        if let Some(learned) = known {
            return learned; // another worker was faster
        }
        if behind.is_at_limit() {
            return Learned::LimitReached;
        }
        let entry = Entry::learned(tag, now);
        // First, so that a flush doesn't take the port for one without entries.
        if !behind.count_in(entry) {
            return Learned::Busy;
        }
        match found {
            Some((slot, old)) => {
                writer.replace(slot, old, entry);
                if self.is_flushed(old) {
                    Learned::New
                } else {
                    Learned::Moved { from: old.port() }
                }
            }
            None if writer.insert(probe, entry) => Learned::New,
            None => {
                behind.count_out(entry);
                Learned::Full
            }
        }
    }

    /// For control threads: waits. A poisoned lock is taken: every step leaves the table
    /// consistent.
    fn lock(&self) -> Writer<'_> {
        let guard = self
            .shared
            .writer
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        Writer {
            fdb: self,
            _guard: guard,
        }
    }

    /// For workers: doesn't wait.
    fn try_lock(&self) -> Option<Writer<'_>> {
        let guard = match self.shared.writer.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Writer {
            fdb: self,
            _guard: guard,
        })
    }
}

impl fmt::Debug for Fdb {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Fdb")
            .field("len", &self.len())
            .field("capacity", &self.capacity)
            .field("ageing_ticks", &self.ageing_ticks)
            .finish_non_exhaustive()
    }
}

/// The right to change the set of entries; keeps the counters in step.
struct Writer<'a> {
    fdb: &'a Fdb,
    _guard: MutexGuard<'a, ()>,
}

impl Writer<'_> {
    /// Stores an entry that is counted in already.
    fn insert(&self, probe: Probe, entry: Entry) -> bool {
        // An entry that was flushed stays where it is, or a sweep that lets go of the lock might
        // miss it.
        let may_move = |other| !self.fdb.is_flushed(other);
        let stored =
            self.fdb.len() < self.fdb.capacity && self.fdb.table.insert(probe, entry, may_move);
        if stored {
            self.fdb.shared.len.fetch_add(1, Ordering::Relaxed);
        }
        stored
    }

    /// Stores an entry that is counted in already, in place of another.
    fn replace(&self, slot: Slot<'_>, old: Entry, new: Entry) {
        slot.replace(new);
        self.count_out(old);
    }

    fn vacate(&self, slot: Slot<'_>, condemned: impl Fn(Entry) -> bool) -> bool {
        let removed = slot.vacate(condemned);
        if let Some(entry) = removed {
            self.fdb.shared.len.fetch_sub(1, Ordering::Relaxed);
            self.count_out(entry);
        }
        removed.is_some()
    }

    fn count_out(&self, entry: Entry) {
        if !entry.is_static() {
            self.fdb.behind(entry.port()).count_out(entry);
        }
    }
}

/// Learns an address that has an entry behind the `port` of `tag`, unless it has to move.
#[inline]
fn learn_known(slot: Slot<'_>, entry: Entry, tag: u64, port: PortId, now: Tick) -> Option<Learned> {
    if entry.tag() != tag {
        let is_here = entry.port() == port;
        return entry.is_static().then_some(if is_here {
            Learned::Refreshed
        } else {
            Learned::Static
        });
    }
    // A tick from this worker's future stays.
    let is_current = entry.is_static() || now.age_of(entry.seen()) == 0;
    if is_current || slot.refresh(entry, now) {
        Some(Learned::Refreshed)
    } else {
        Some(Learned::Busy)
    }
}

fn check_unicast(mac: MacAddr) -> Result<(), FdbError> {
    if mac.is_group() {
        Err(FdbError::GroupAddress { mac })
    } else if mac.to_u64() == 0 {
        Err(FdbError::ZeroAddress)
    } else {
        Ok(())
    }
}
