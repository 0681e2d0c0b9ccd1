//! What an operator and housekeeping do to the forwarding database.

use std::sync::atomic::Ordering;

use super::table::{Entry, Slot};
use super::{EVICTION_BUCKETS, Fdb, FdbError, FdbTally, Writer, check_unicast};
use crate::{PortId, Station, Tick};

/// Buckets swept between two releases of the lock: 64 KiB, some ten microseconds during which
/// workers learn no new address.
const SWEEP_BUCKETS: usize = 1024;

impl Fdb {
    /// Pins a station to `port`: it neither moves nor ages. Takes over an entry of it, learned or
    /// static. Limits of ports don't apply, and if need be a learned entry makes room.
    ///
    /// # Errors
    /// The address is none of a station, or the database is full of static entries.
    pub fn add_static(&self, station: impl Into<Station>, port: PortId) -> Result<(), FdbError> {
        let station = station.into();
        check_unicast(station.mac)?;
        let probe = self.probe_of(station);
        let entry = Entry::fixed(port);
        let writer = self.lock();
        let stored = match self.table.find(probe) {
            Some((slot, old)) => {
                writer.replace(slot, old, entry);
                true
            }
            None => writer.has_room(Writer::make_room_for_static) && writer.insert(probe, entry),
        };
        if stored {
            Ok(())
        } else {
            Err(FdbError::Full {
                len: self.len(),
                capacity: self.capacity,
            })
        }
    }

    /// Removes the entry of a station, learned or static; whether there was one.
    pub fn remove(&self, station: impl Into<Station>) -> bool {
        let probe = self.probe_of(station.into());
        let writer = self.lock();
        self.table
            .find(probe)
            .is_some_and(|(slot, entry)| !self.is_flushed(entry) && writer.vacate(slot, |_| true))
    }

    /// Removes the learned entries that are `wanted`; how many.
    pub fn flush(&self, wanted: impl Fn(Station, PortId) -> bool) -> usize {
        let all = 0..self.table.bucket_count();
        self.lock().sweep(all, |station, entry| {
            !entry.is_static() && !self.is_flushed(entry) && wanted(station, entry.port())
        })
    }

    /// Forgets what was learned behind `port`, at once and by one atomic operation; whether anything
    /// was. For a port that goes down: a station that turns up elsewhere is found by the next frame
    /// to it, since that is flooded. Static entries stay.
    ///
    /// May be called by any thread, from within a burst too. The entries take room until
    /// [`sweep_flushed`](Self::sweep_flushed). After 15 flushes without it the port learns nothing
    /// more.
    pub fn flush_port(&self, port: PortId) -> bool {
        let has_flushed = self.behind(port).flush().is_some();
        if has_flushed {
            self.shared.holders.fetch_sub(1, Ordering::Relaxed);
            // Pairs with the swap of sweep_flushed, which so sees what is owed.
            self.shared.is_sweep_due.store(true, Ordering::Release);
        }
        has_flushed
    }

    /// Takes the entries out of the table that [`flush_port`](Self::flush_port) forgot; how many.
    /// Costs nothing if it was not called. For one thread at a time.
    ///
    /// Lets go of the lock now and then: such entries don't move within the table.
    pub fn sweep_flushed(&self) -> usize {
        // Pairs with the store of flush_port.
        if !self.shared.is_sweep_due.swap(false, Ordering::Acquire) {
            return 0;
        }
        let owed: Vec<_> = self.behind.iter().map(|behind| behind.owed()).collect();
        let swept = self.sweep_in_steps(|_, entry| self.is_flushed(entry));
        for (behind, owed) in self.behind.iter().zip(owed).filter(|(_, owed)| *owed > 0) {
            behind.settle(owed);
        }
        swept
    }

    /// Removes all entries of `port`, static ones too, and begins its tally anew; how many. For ports
    /// that go away: by then no
    /// worker may learn behind the port.
    pub fn purge_port(&self, port: PortId) -> usize {
        let all = 0..self.table.bucket_count();
        self.behind(port).clear_tally();
        self.lock().sweep(all, |_, entry| entry.port() == port)
    }

    /// Removes the entries that expired by `now`; how many. To be called every few seconds:
    /// look-ups ignore what expired, but it takes room, and counts against its port's limit, until
    /// it is swept.
    ///
    /// Lets go of the lock now and then; an entry that moves within the table meanwhile is left to
    /// the next sweep.
    pub fn age(&self, now: Tick) -> usize {
        let ageing = self.ageing_ticks;
        self.sweep_in_steps(|_, entry| entry.is_expired(now, ageing))
    }

    fn sweep_in_steps(&self, condemned: impl Fn(Station, Entry) -> bool) -> usize {
        let end = self.table.bucket_count();
        (0..end)
            .step_by(SWEEP_BUCKETS)
            .map(|start| {
                let step = start..end.min(start + SWEEP_BUCKETS);
                self.lock().sweep(step, &condemned)
            })
            .sum()
    }

    /// Bounds the learned entries of `port`; `None` lifts the bound. What is above a new bound
    /// stays until it ages.
    pub fn set_limit(&self, port: PortId, limit: Option<u32>) {
        self.behind(port).set_limit(limit);
    }

    /// Learned entries of `port`, including expired ones that were not swept yet.
    pub fn count(&self, port: PortId) -> u32 {
        self.behind(port).count()
    }

    /// What was done and refused of `port` since it was added.
    pub fn tally(&self, port: PortId) -> FdbTally {
        self.behind(port).tally()
    }

    /// All entries, static ones and those included that expired or were flushed and not swept yet.
    pub fn len(&self) -> usize {
        self.shared.len.load(Ordering::Relaxed)
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most entries.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Calls `visit(station, port, is_static, last_seen)` for every entry that was not flushed,
    /// expired ones included; static ones were seen at tick 0. Takes no lock: entries that change
    /// meanwhile may be visited twice or not at all.
    pub fn for_each(&self, mut visit: impl FnMut(Station, PortId, bool, Tick)) {
        self.table.for_each(|station, entry| {
            if !self.is_flushed(entry) {
                visit(station, entry.port(), entry.is_static(), entry.seen());
            }
        });
    }
}

impl Writer<'_> {
    /// Removes a learned entry, of the port that has most of those that come along; false if there
    /// is none.
    fn make_room_for_static(&self) -> bool {
        // Any learned entry may go, so it does not matter which are expired.
        let searches = self.fdb.table.bucket_count().div_ceil(EVICTION_BUCKETS);
        (0..searches).any(|_| self.evict(0, Tick::default()))
    }

    fn sweep(
        &self,
        buckets: std::ops::Range<usize>,
        condemned: impl Fn(Station, Entry) -> bool,
    ) -> usize {
        let is_removed = |slot: &Slot<'_>| {
            slot.station()
                .is_some_and(|station| self.vacate(*slot, |entry| condemned(station, entry)))
        };
        buckets
            .flat_map(|bucket| self.fdb.table.slots(bucket))
            .filter(is_removed)
            .count()
    }
}
