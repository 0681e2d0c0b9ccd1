//! How much of this process's address space guests may take. A file needs no memory behind it to be
//! mapped, and 128 TiB are all there is: with none left no guest starts, and no thread.

use std::sync::atomic::{AtomicU64, Ordering};

use super::MAX_REGIONS;
use super::sigbus::MAX_MAPPED;

const TIB: u64 = 1 << 40;

/// What all ports may map together: half of what a process has (47 bits), so that there is room for
/// all else.
pub(super) const ALL_PORTS: u64 = 64 * TIB;

/// What a guest may have on a host of so many bytes of RAM: twice as much, for those that are promised
/// more than there is; in any case 1 TiB, since what a guest may grow to (virtio-mem) is mapped from its
/// start, and 16 TiB at most.
pub(super) fn of_port(ram: u64) -> u64 {
    ram.saturating_mul(2).clamp(TIB, 16 * TIB)
}

/// Regions of an ordinary guest: memory below and above 4 GiB, ROMs, some DIMMs.
const FEW_REGIONS: usize = 8;

/// How many regions a port may have while all ports have so many: half of what there is for all is for
/// ports that have few, so that no 33 guests with all their slots keep the others from starting.
pub(super) fn regions_of_port(mapped: usize) -> usize {
    match mapped {
        0..HALF => MAX_REGIONS,
        HALF..MAX_MAPPED => FEW_REGIONS,
        _ => 0,
    }
}

const HALF: usize = MAX_MAPPED / 2;

/// Bytes that are mapped.
#[derive(Debug)]
pub(super) struct Mapped(AtomicU64);

/// Bytes of all ports.
pub(super) static MAPPED: Mapped = Mapped(AtomicU64::new(0));

/// Bytes that count as mapped until this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    bytes: u64,
    of: &'static Mapped,
}

impl Mapped {
    /// Counts a mapping, if all of them stay within [`ALL_PORTS`].
    pub(super) fn take(&'static self, bytes: u64) -> Option<Share> {
        let sum = |mapped: u64| mapped.checked_add(bytes).filter(|sum| *sum <= ALL_PORTS);
        // Relaxed: only the number counts.
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum);
        taken.ok().map(|_| Share { bytes, of: self })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_have_twice_the_hosts_memory_within_bounds() {
        assert_eq!(of_port(24 << 30), TIB);
        assert_eq!(of_port(TIB), 2 * TIB);
        assert_eq!(of_port(100 * TIB), 16 * TIB);
        assert_eq!(of_port(u64::MAX), 16 * TIB);
    }

    #[test]
    fn a_port_may_have_all_its_regions_while_there_is_room_and_few_later() {
        assert_eq!([0, 8_191].map(regions_of_port), [MAX_REGIONS; 2]);
        assert_eq!([8_192, 16_383].map(regions_of_port), [FEW_REGIONS; 2]);
        assert_eq!(regions_of_port(16_384), 0);
        // A thousand of QEMU's guests as they start.
        const { assert!(MAX_MAPPED - HALF >= 1000 * FEW_REGIONS) };
    }

    #[test]
    fn what_is_given_back_may_be_taken_again_and_what_is_refused_counts_for_nothing() {
        static OWN: Mapped = Mapped(AtomicU64::new(0));
        let most = OWN.take(ALL_PORTS - TIB).unwrap();
        let rest = OWN.take(TIB).unwrap();
        assert!(OWN.take(1).is_none());
        assert!(OWN.take(u64::MAX).is_none());
        drop(rest);
        assert!(OWN.take(TIB + 1).is_none());
        drop(most);
        assert!(OWN.take(ALL_PORTS).is_some());
    }
}
