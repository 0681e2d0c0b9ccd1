//! The forwarding database: which port a MAC address was last seen behind, in each VLAN. What workers
//! ask and tell it is here; what an operator and housekeeping do to it is in `fdb/admin.rs`.

mod admin;
mod behind;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

use crate::{MAX_PORTS, MacAddr, PortId, Station, Tick, VlanId};
use behind::Behind;
pub use behind::FdbTally;
pub(crate) use table::Probe;
use table::{Entry, Slot, Table};

/// Most entries that a database can be made for: half a gigabyte of buckets.
pub const MAX_FDB_CAPACITY: usize = 1 << 24;

/// Fewest buckets (4 KiB): a tiny database has so much room that no bucket overflows.
const MIN_BUCKETS: usize = 64;

/// Buckets that are searched for an entry that makes room: a kibibyte, some 32 entries. A port that
/// has a quarter of all is missed once in 10,000 times, and the next search goes on behind it.
const EVICTION_BUCKETS: usize = 16;

/// What a database is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdbConfig {
    /// Most entries, learned and static; clamped to 1..=[`MAX_FDB_CAPACITY`]. Takes 32 bytes each.
    pub capacity: usize,
    /// A learned entry is forgotten when it was not seen for more than so many ticks; from 2^31 on
    /// it never is.
    pub ageing_ticks: u32,
    /// A learned address that was seen within so many ticks does not move to another port; with 0
    /// it moves at once.
    pub move_hold_ticks: u32,
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
    /// The address was in use behind another port a moment ago; nothing changed.
    Held {
        /// That port.
        at: PortId,
    },
    /// The port has as many learned addresses as it may; nothing changed.
    LimitReached,
    /// The database is full, and the port has its share of it, or nobody was found who has more;
    /// nothing changed.
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
/// An address that was seen within the last [`move_hold_ticks`](FdbConfig::move_hold_ticks) stays
/// where it is, whoever else uses it, unless it is [announced](Self::announce) or configured.
///
/// A full database gives a port that has less than its fair share (room for learned entries, by the
/// number of ports that have any) the place of an entry whose port has more, chosen among those in
/// the next few buckets: bounded work, done for no port that has its share.
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
    move_hold_ticks: u32,
    /// By port.
    behind: Box<[Behind]>,
    shared: Shared,
}

/// What writers change, apart from the fields that every look-up reads.
///
/// All but the flag are written under the mutex, or count what an atomic operation told, and are
/// read without it as hints, so Relaxed is enough.
#[repr(align(128))]
struct Shared {
    writer: Mutex<()>,
    /// Entries in the table, those that don't count any more included.
    len: AtomicUsize,
    /// Of these, static ones.
    statics: AtomicUsize,
    /// Ports that have learned entries.
    holders: AtomicUsize,
    /// The bucket at which the search for an entry that makes room goes on.
    hand: AtomicUsize,
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
            move_hold_ticks: config.move_hold_ticks,
            behind: ports.map(Behind::new).collect(),
            shared: Shared {
                writer: Mutex::new(()),
                len: AtomicUsize::new(0),
                statics: AtomicUsize::new(0),
                holders: AtomicUsize::new(0),
                hand: AtomicUsize::new(0),
                is_sweep_due: AtomicBool::new(false),
            },
        }
    }

    /// The port that a station is behind; `None` if unknown or not seen for longer than the ageing.
    #[inline]
    pub fn lookup(&self, station: impl Into<Station>, now: Tick) -> Option<PortId> {
        self.lookup_probe(self.probe_of(station.into()), now)
    }

    /// Notes that a station was seen behind `port` at `now`. Never blocks.
    ///
    /// An expired entry that was not swept yet is an entry: it counts, is refreshed, and moves.
    #[inline]
    pub fn learn(&self, station: impl Into<Station>, port: PortId, now: Tick) -> Learned {
        let station = station.into();
        match check_unicast(station.mac) {
            Ok(()) => self.learn_probe(self.probe_of(station), port, now),
            Err(_) => Learned::NotUnicast,
        }
    }

    /// Notes that a station is behind `port` from `now` on, whatever port used it a moment ago: what
    /// whoever runs the station told, not a frame. Never blocks.
    pub fn announce(&self, station: impl Into<Station>, port: PortId, now: Tick) -> Learned {
        let station = station.into();
        match check_unicast(station.mac) {
            Ok(()) => self.learn_within(self.probe_of(station), port, now, 0),
            Err(_) => Learned::NotUnicast,
        }
    }

    /// Hashes a MAC (low 48 bits), in no VLAN, for the functions below.
    #[inline]
    pub(crate) fn probe(&self, mac: u64) -> Probe {
        self.table.probe(mac)
    }

    /// The same for a MAC in a VLAN.
    #[inline]
    pub(crate) fn probe_in(&self, vlan: VlanId, mac: u64) -> Probe {
        self.table.probe_in(vlan, mac)
    }

    #[inline]
    fn probe_of(&self, station: Station) -> Probe {
        self.probe_in(station.vlan, station.mac.to_u64())
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
        self.learn_within(probe, port, now, self.move_hold_ticks)
    }

    #[inline(always)]
    fn learn_within(&self, probe: Probe, port: PortId, now: Tick, hold: u32) -> Learned {
        let tag = self.behind(port).tag();
        let found = self.table.find(probe);
        if let Some((slot, entry)) = found
            && let Some(learned) = learn_known(slot, entry, tag, port, now)
        {
            return learned;
        }
        let learned = self.learn_change(probe, port, now, hold, found.map(|(_, entry)| entry));
        self.behind(port).note(learned);
        learned
    }

    /// Learns a new address or moves a known one.
    #[cold]
    fn learn_change(
        &self,
        probe: Probe,
        port: PortId,
        now: Tick,
        hold: u32,
        known: Option<Entry>,
    ) -> Learned {
        let refusal = |known| self.refusal(port, now, hold, known);
        // Before the lock, or a guest that invents addresses would keep the others from it.
        if let Some(refused) = refusal(known) {
            return refused;
        }
        let Some(writer) = self.try_lock() else {
            return Learned::Busy;
        };
        let tag = self.behind(port).tag();
        let found = self.table.find(probe);
        let known = found.and_then(|(slot, entry)| learn_known(slot, entry, tag, port, now));
        if let Some(learned) = known {
            return learned; // another worker was faster
        }
        if let Some(refused) = refusal(found.map(|(_, entry)| entry)) {
            return refused;
        }
        let entry = Entry::learned(tag, now);
        // First, so that a flush doesn't take the port for one without entries.
        if !self.count_in(entry) {
            return Learned::Busy;
        }
        match found {
            Some((slot, old)) => {
                let counted = !self.is_flushed(old);
                writer.replace(slot, old, entry);
                if counted {
                    Learned::Moved { from: old.port() }
                } else {
                    Learned::New
                }
            }
            None if writer.has_room(|writer| writer.make_room(port, now))
                && writer.insert(probe, entry) =>
            {
                Learned::New
            }
            None => {
                self.count_out(entry);
                Learned::Full
            }
        }
    }

    /// Why an address that has the entry `known`, not of `port`, is not learned behind `port`.
    fn refusal(&self, port: PortId, now: Tick, hold: u32, known: Option<Entry>) -> Option<Learned> {
        let behind = self.behind(port);
        let is_full = || self.len() >= self.capacity && behind.count() >= self.fair_share(port);
        match known {
            Some(old)
                if old.port() != port && now.age_of(old.seen()) < hold && !self.is_flushed(old) =>
            {
                Some(Learned::Held { at: old.port() })
            }
            _ if behind.is_at_limit() => Some(Learned::LimitReached),
            None if is_full() => Some(Learned::Full),
            _ => None,
        }
    }

    /// Learned entries that `port` may have in any case: room for such, by the number of ports that
    /// have any, this one among them.
    fn fair_share(&self, port: PortId) -> u32 {
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let room = self.capacity.saturating_sub(read(&self.shared.statics));
        let holders = read(&self.shared.holders) + usize::from(self.count(port) == 0);
        u32::try_from(room / holders.max(1)).unwrap_or(u32::MAX)
    }

    /// Counts a learned entry that is about to be stored; false if it would not count.
    fn count_in(&self, entry: Entry) -> bool {
        let before = self.behind(entry.port()).count_in(entry);
        if before == Some(0) {
            self.shared.holders.fetch_add(1, Ordering::Relaxed);
        }
        before.is_some()
    }

    fn count_out(&self, entry: Entry) {
        if self.behind(entry.port()).count_out(entry) == Some(1) {
            self.shared.holders.fetch_sub(1, Ordering::Relaxed);
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
    /// Stores an entry, which is counted in already if it is a learned one.
    fn insert(&self, probe: Probe, entry: Entry) -> bool {
        // An entry that was flushed stays where it is, or a sweep that lets go of the lock might
        // miss it.
        let may_move = |other| !self.fdb.is_flushed(other);
        let stored =
            self.fdb.len() < self.fdb.capacity && self.fdb.table.insert(probe, entry, may_move);
        if stored {
            let shared = &self.fdb.shared;
            shared.len.fetch_add(1, Ordering::Relaxed);
            let statics = usize::from(entry.is_static());
            shared.statics.fetch_add(statics, Ordering::Relaxed);
        }
        stored
    }

    /// Stores an entry in place of another; it is counted in already if it is a learned one.
    fn replace(&self, slot: Slot<'_>, old: Entry, new: Entry) {
        slot.replace(new);
        let statics = usize::from(new.is_static());
        self.fdb
            .shared
            .statics
            .fetch_add(statics, Ordering::Relaxed);
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
        if entry.is_static() {
            self.fdb.shared.statics.fetch_sub(1, Ordering::Relaxed);
        } else {
            self.fdb.count_out(entry);
        }
    }

    /// Whether a further entry fits, if need be once `make_room` was called.
    fn has_room(&self, make_room: impl FnOnce(&Self) -> bool) -> bool {
        self.fdb.len() < self.fdb.capacity || make_room(self)
    }

    /// Makes room for an entry of `port`, whose count it is in, at the cost of whoever has more
    /// than the fair share; false if there is none such in the next few buckets.
    fn make_room(&self, port: PortId, now: Tick) -> bool {
        self.evict(self.fdb.fair_share(port), now)
    }

    /// Removes an entry in the next [`EVICTION_BUCKETS`] buckets: one that no longer counts, or one
    /// of the port with most entries, if those are more than `share`.
    fn evict(&self, share: u32, now: Tick) -> bool {
        let Fdb { table, shared, .. } = self.fdb;
        let end = table.bucket_count();
        let start = shared.hand.load(Ordering::Relaxed);
        let next = (start + EVICTION_BUCKETS) % end;
        shared.hand.store(next, Ordering::Relaxed);
        let ageing = self.fdb.ageing_ticks;
        let is_over = |entry: Entry| self.fdb.is_flushed(entry) || entry.is_expired(now, ageing);
        let mut victim = None;
        let mut most = share;
        for bucket in (start..start + EVICTION_BUCKETS.min(end)).map(|bucket| bucket % end) {
            for slot in table.slots(bucket) {
                let Some(entry) = slot.entry().filter(|entry| !entry.is_static()) else {
                    continue;
                };
                if is_over(entry) {
                    if self.vacate(slot, is_over) {
                        return true;
                    }
                    continue;
                }
                let count = self.fdb.count(entry.port());
                if count > most {
                    most = count;
                    victim = Some((slot, entry.port()));
                }
            }
        }
        victim.is_some_and(|(slot, port)| {
            self.fdb.behind(port).note_eviction();
            self.vacate(slot, |_| true)
        })
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
