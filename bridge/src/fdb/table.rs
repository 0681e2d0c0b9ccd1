//! The hash table below the [`Fdb`](super::Fdb): buckets of one cache line, read without a lock.
//!
//! ```text
//!  bucket (64 bytes)   key 0 | key 1 | key 2 | key 3 | value 0 | value 1 | value 2 | value 3
//!  key    (0: vacant)  occupied 1 | 0 3 | VLAN 12 | MAC 48
//!  value               valid 1 | static 1 | generation 14 | epoch 4 | port 12 | tick 32
//! ```
//!
//! A key lives in one of eight slots: four in each of its two candidate buckets.
//!
//! # Protocol of a slot
//! Writers hold the database's mutex; readers hold nothing. An *era* of a slot is the time from one
//! insertion to the next, and every insertion raises the value's generation.
//!
//! | writer | steps |
//! |---|---|
//! | [`Slot::occupy`] | W1 value := valid, next generation (Release); W2 key := K (Release) |
//! | [`Slot::vacate`] | W3 value := not valid (compare-and-swap); W4 key := 0 (Release) |
//! | [`Slot::replace`] | W5 value := other port or flags, same generation (Release) |
//! | [`Slot::refresh`], without the mutex | W6 value.tick := now (compare-and-swap) |
//!
//! A reader ([`Slot::read`]) loads the value (R1, Acquire), the key (R2, Acquire) and the value
//! again (R3, Relaxed), and believes them if R2 is its key and R1 and R3 are valid and of one
//! generation, say era f's. Then R2 read the key of era f too:
//! - R2 pairs with W2: the era of the key is no later than that of R3, because W1 precedes W2.
//! - R1 pairs with W1 (or W5, which follows it under the mutex; W6 is a read-modify-write and so
//!   continues their release sequences): the W4 that ended era f-1 happens before W1 of era f, so
//!   R2 can't read a key from before era f.
//!
//! So no re-use of the slot lends one MAC another's port, unless the generation wraps (16,384
//! re-uses of one slot) between R1 and R3. The scan that finds the slot is a hint (Relaxed).
//!
//! W6 compares the whole value, generation included: a refresh that comes after a move, a removal
//! or a re-use fails, and resurrects nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{MAX_PORTS, MacAddr, PortId, Station, Tick, VlanId};

const SLOTS: usize = 4;
const OCCUPIED: u64 = 1 << 63;
const MAC_BITS: u32 = 48;
const MAC: u64 = (1 << MAC_BITS) - 1;

const VALID: u64 = 1 << 63;
const STATIC: u64 = 1 << 62;
const GENERATION_ONE: u64 = 1 << 48;
const GENERATION: u64 = 0x3fff << 48;
const TICK: u64 = 0xffff_ffff;

/// A port, at the low end of a tag.
pub(super) const PORT: u64 = MAX_PORTS as u64 - 1;
pub(super) const TAG_SHIFT: u32 = 32;
/// What an entry is compared with its port by: the port and its epoch.
pub(super) const TAG: u64 = 0xffff << TAG_SHIFT;

/// What a slot says of its key: the port, whether it is static, and when it was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    /// A learned entry of the port and epoch in `tag`.
    pub(super) fn learned(tag: u64, seen: Tick) -> Self {
        Self(VALID | tag & TAG | u64::from(seen.0))
    }

    /// An entry that is configured.
    pub(super) fn fixed(port: PortId) -> Self {
        Self(VALID | STATIC | u64::from(port.get()) << TAG_SHIFT)
    }

    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes the 16 bits of the tag, of which the port are some"
    )]
    pub(super) fn port(self) -> PortId {
        PortId::from_bits((self.0 >> TAG_SHIFT) as u16)
    }

    /// Its port and epoch.
    #[inline]
    pub(super) fn tag(self) -> u64 {
        self.0 & TAG
    }

    #[inline]
    pub(super) fn is_static(self) -> bool {
        self.0 & STATIC != 0
    }

    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "takes the 32 bits of the tick"
    )]
    pub(super) fn seen(self) -> Tick {
        Tick(self.0 as u32)
    }

    /// Whether a learned entry is older than `ageing`; static ones never are.
    #[inline]
    pub(super) fn is_expired(self, now: Tick, ageing: u32) -> bool {
        now.age_of(self.seen()) > ageing && !self.is_static()
    }

    fn is_valid(self) -> bool {
        self.0 & VALID != 0
    }

    fn seen_at(self, now: Tick) -> Self {
        Self(self.0 & !TICK | u64::from(now.0))
    }

    fn with_generation_of(self, other: u64) -> Self {
        Self(self.0 & !GENERATION | other & GENERATION)
    }
}

/// A key with its two candidate buckets.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Probe {
    key: u64,
    buckets: [u32; 2],
}

impl Probe {
    /// A probe that is never looked up, for group addresses.
    #[inline]
    pub(crate) fn unhashed(mac: u64) -> Self {
        Self {
            key: mac & MAC | OCCUPIED,
            buckets: [0; 2],
        }
    }

    /// What tells stations apart: the address with its VLAN.
    #[inline]
    pub(crate) fn key(self) -> u64 {
        self.key
    }

    /// The address in the low 48 bits.
    #[inline]
    pub(crate) fn mac(self) -> u64 {
        self.key & MAC
    }
}

/// Four entries: exactly one cache line, so that a look-up misses the cache once, at most twice.
#[derive(Default)]
#[repr(align(64))]
struct Bucket {
    keys: [AtomicU64; SLOTS],
    values: [AtomicU64; SLOTS],
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// The place of one entry.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    key: &'a AtomicU64,
    value: &'a AtomicU64,
}

impl Slot<'_> {
    #[cfg(test)]
    pub(super) fn value(&self) -> &AtomicU64 {
        self.value
    }

    /// Whose entry it is, if there is one; the caller holds the mutex.
    pub(super) fn station(self) -> Option<Station> {
        let key = self.key.load(Ordering::Relaxed);
        (key != 0).then(|| station_of(key))
    }

    /// Whatever the slot holds; the caller holds the mutex.
    pub(super) fn entry(self) -> Option<Entry> {
        let entry = Entry(self.value.load(Ordering::Relaxed));
        entry.is_valid().then_some(entry)
    }

    /// The entry if the slot holds `key`. Steps R1 to R3 of the [protocol](self).
    #[inline]
    fn read(self, key: u64) -> Option<Entry> {
        self.finish_read(self.start_read(), key)
    }

    #[inline]
    pub(super) fn start_read(self) -> u64 {
        self.value.load(Ordering::Acquire) // R1, pairs with W1 and W5
    }

    #[inline]
    pub(super) fn finish_read(self, first: u64, key: u64) -> Option<Entry> {
        if self.key.load(Ordering::Acquire) != key {
            return None; // R2, pairs with W2
        }
        let entry = self.value.load(Ordering::Relaxed); // R3, ordered by R2
        let same_era = (first ^ entry) & GENERATION == 0;
        (first & entry & VALID != 0 && same_era).then_some(Entry(entry))
    }

    /// Notes that the station was seen at `now`; false if the slot no longer holds `entry` of that
    /// port. A concurrent refresh counts as ours. Step W6.
    #[inline]
    pub(super) fn refresh(self, entry: Entry, now: Tick) -> bool {
        let fresh = entry.seen_at(now).0;
        // Relaxed: only the tick changes, and a read-modify-write keeps W1's release sequence.
        match self
            .value
            .compare_exchange(entry.0, fresh, Ordering::Relaxed, Ordering::Relaxed)
        {
            Ok(_) => true,
            Err(actual) => (actual ^ entry.0) & !TICK == 0,
        }
    }

    /// Replaces the entry of the same key; the caller holds the mutex. A refresh that was about to
    /// happen fails, one that happened is overwritten. Step W5.
    pub(super) fn replace(self, entry: Entry) {
        let generation = self.value.load(Ordering::Relaxed);
        let entry = entry.with_generation_of(generation);
        self.value.store(entry.0, Ordering::Release); // W5, pairs with R1
    }

    /// Fills a vacant slot; the caller holds the mutex. Steps W1 and W2.
    fn occupy(self, key: u64, entry: Entry) {
        let generation = self
            .value
            .load(Ordering::Relaxed)
            .wrapping_add(GENERATION_ONE);
        let entry = entry.with_generation_of(generation);
        self.value.store(entry.0, Ordering::Release); // W1, pairs with R1
        self.key.store(key, Ordering::Release); // W2, pairs with R2
    }

    /// Empties the slot if `condemned` says so of its entry, which it returns; the caller holds the
    /// mutex. An entry refreshed meanwhile is judged again. Steps W3 and W4.
    pub(super) fn vacate(self, condemned: impl Fn(Entry) -> bool) -> Option<Entry> {
        let mut entry = Entry(self.value.load(Ordering::Relaxed));
        while entry.is_valid() && condemned(entry) {
            let vacant = entry.0 & GENERATION;
            // Relaxed: what a reader may not miss is ordered by W4 and the next W1.
            match self
                .value
                .compare_exchange(entry.0, vacant, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => {
                    self.key.store(0, Ordering::Release); // W4, precedes the next W1
                    return Some(entry);
                }
                Err(actual) => entry = Entry(actual),
            }
        }
        None
    }
}

/// The buckets and the seed of their hash.
pub(super) struct Table {
    buckets: Box<[Bucket]>,
    /// `buckets.len()`: below 2^32, for the range reduction.
    bucket_count: u32,
    seed: [u64; 3],
}

impl Table {
    pub(super) fn new(bucket_count: u32, seed: u64) -> Self {
        let bucket_count = bucket_count.max(2);
        Self {
            buckets: (0..bucket_count).map(|_| Bucket::default()).collect(),
            bucket_count,
            // Odd multipliers: no bit of the key is multiplied away.
            seed: [
                split_mix(seed),
                split_mix(!seed) | 1,
                split_mix(split_mix(seed)) | 1,
            ],
        }
    }

    pub(super) fn bucket_count(&self) -> usize {
        self.buckets.len()
    }

    /// Hashes a MAC with secrets, so that a guest can't choose addresses that meet in a bucket.
    /// Touches no bucket.
    ///
    /// Two wide multiplications: after one, the candidate buckets of consecutive addresses go in
    /// step, and a database that is 9/10 full of them had no room for the next.
    #[inline]
    pub(super) fn probe(&self, mac: u64) -> Probe {
        self.probe_key(mac & MAC | OCCUPIED)
    }

    /// The same for an address in a VLAN.
    #[inline]
    pub(super) fn probe_in(&self, vlan: VlanId, mac: u64) -> Probe {
        self.probe_key(u64::from(vlan.get()) << MAC_BITS | mac & MAC | OCCUPIED)
    }

    #[inline]
    fn probe_key(&self, key: u64) -> Probe {
        let hash = fold(fold(key ^ self.seed[0], self.seed[1]), self.seed[2]);
        let range = u64::from(self.bucket_count);
        let first = (((hash >> 32) * range) >> 32) as u32;
        let second = (((hash & 0xffff_ffff) * range) >> 32) as u32;
        // Two different buckets always: where they meet, the other is the neighbour.
        let second = if second != first {
            second
        } else if first == 0 {
            1
        } else {
            first - 1
        };
        Probe {
            key,
            buckets: [first, second],
        }
    }

    /// Starts the cache miss of a look-up that follows; the result means nothing.
    #[inline]
    pub(super) fn touch(&self, probe: Probe) -> u64 {
        self.buckets[probe.buckets[0] as usize].keys[0].load(Ordering::Relaxed)
    }

    /// The key's slot and entry. A displacement from the second bucket to the first during the
    /// look-up can hide an entry; under the mutex the answer is exact.
    #[inline(always)]
    pub(super) fn find(&self, probe: Probe) -> Option<(Slot<'_>, Entry)> {
        for bucket in probe.buckets {
            let bucket = &self.buckets[bucket as usize];
            // All four without a branch: which slot it is can't be predicted.
            let hits = bucket.keys.iter().enumerate().fold(0, |hits, (i, key)| {
                hits | usize::from(key.load(Ordering::Relaxed) == probe.key) << i
            });
            if hits != 0 {
                let i = hits.trailing_zeros() as usize % SLOTS;
                let slot = Slot {
                    key: &bucket.keys[i],
                    value: &bucket.values[i],
                };
                if let Some(entry) = slot.read(probe.key) {
                    return Some((slot, entry));
                }
            }
        }
        None
    }

    /// Stores an entry whose key is absent; false if there is no room. The caller holds the mutex.
    ///
    /// Goes to the first candidate bucket that has room, so that at half load 19 look-ups of 20
    /// need no second one; where both are full, to the place of an entry that can move to its other
    /// bucket. At half load that one step fails about never. Entries that `may_move` denies stay
    /// where they are.
    pub(super) fn insert(
        &self,
        probe: Probe,
        entry: Entry,
        may_move: impl Fn(Entry) -> bool,
    ) -> bool {
        let slot = self
            .vacancy(probe.buckets)
            .or_else(|| self.displace(probe.buckets, may_move));
        if let Some(slot) = slot {
            slot.occupy(probe.key, entry);
        }
        slot.is_some()
    }

    /// The slots of a bucket. Panics from `bucket_count` on.
    pub(super) fn slots(&self, bucket: usize) -> impl Iterator<Item = Slot<'_>> {
        let Bucket { keys, values } = &self.buckets[bucket];
        keys.iter()
            .zip(values)
            .map(|(key, value)| Slot { key, value })
    }

    /// Every entry with whose it is, each consistent in itself.
    pub(super) fn for_each(&self, mut visit: impl FnMut(Station, Entry)) {
        for slot in (0..self.bucket_count()).flat_map(|bucket| self.slots(bucket)) {
            let key = slot.key.load(Ordering::Relaxed);
            if let Some(entry) = (key != 0).then(|| slot.read(key)).flatten() {
                visit(station_of(key), entry);
            }
        }
    }

    fn vacancy(&self, buckets: [u32; 2]) -> Option<Slot<'_>> {
        let mut slots = buckets
            .into_iter()
            .flat_map(|bucket| self.slots(bucket as usize));
        slots.find(|slot| slot.key.load(Ordering::Relaxed) == 0)
    }

    /// Frees a slot of two full buckets. The entry is in both places for a moment and never in
    /// none, so that [`find`](Self::find) misses it only if it looks at the places in the wrong
    /// order.
    fn displace(&self, buckets: [u32; 2], may_move: impl Fn(Entry) -> bool) -> Option<Slot<'_>> {
        for slot in buckets
            .into_iter()
            .flat_map(|bucket| self.slots(bucket as usize))
        {
            let key = slot.key.load(Ordering::Relaxed);
            let Some(to) = self.vacancy(self.probe_key(key).buckets) else {
                continue;
            };
            let copy = Entry(slot.value.load(Ordering::Relaxed));
            if !may_move(copy) {
                continue;
            }
            to.occupy(key, copy);
            if let Some(last) = slot.vacate(|_| true)
                && last.seen() != copy.seen()
            {
                to.replace(last); // a refresh came in between
            }
            return Some(slot);
        }
        None
    }
}

fn station_of(key: u64) -> Station {
    let vlan = VlanId::from_bits((key >> MAC_BITS) as u16);
    Station::new(MacAddr::from_u64(key), vlan)
}

/// The halves of the wide product, folded into one.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "takes the halves apart")]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// One output of SplitMix64: spreads a seed over all bits.
fn split_mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
