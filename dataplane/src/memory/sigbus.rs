//! What happens when a front-end truncates the file behind its guest's memory: the next access
//! raises SIGBUS. The handler replaces the page of the file that it hit by private zeros, so that the
//! access goes on harmlessly, and marks the region broken; workers see [`breaks`] change and stop the
//! port. Not the whole region, since the kernel's time for that would be the worker's; but a burst may
//! hit many pages before the port is stopped, so each further fault replaces twice as much.
//!
//! A slot is read while it may be given up and taken again for another region, so it is a sequence
//! lock: its range is of one region if the sequence is even and the same before and after.

mod range;

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

pub(super) use self::range::Range;
use self::range::{SharedRange, Word};

/// Most regions mapped at a time by all ports: 1,000 guests of QEMU with 4 regions, some of them
/// with many. The table is untouched memory until it is used.
pub(super) const MAX_MAPPED: usize = 16_384;

impl Range {
    fn holds(&self, address: usize) -> bool {
        address.wrapping_sub(self.start) < self.len
    }

    /// What to replace around an address that the range holds, after so many faults in it: start and
    /// bytes, in whole pages.
    fn chunk_of(&self, address: usize, faults: usize) -> (usize, usize) {
        let pages = 1_usize << faults.min(30);
        let chunk = self.page.saturating_mul(pages).min(self.len);
        let offset = address - self.start;
        let start = offset - offset % chunk;
        (self.start + start, chunk.min(self.len - start))
    }
}

impl Word for AtomicUsize {
    fn load(&self, order: Ordering) -> usize {
        self.load(order)
    }

    fn store(&self, value: usize, order: Ordering) {
        self.store(value, order);
    }

    fn fence(order: Ordering) {
        fence(order);
    }
}

/// What is guarded. Writers take turns by [`Slot::taken`].
struct Slot {
    /// A region has this slot.
    taken: AtomicBool,
    range: SharedRange<AtomicUsize>,
    /// Faults in it: more than none, and it is broken.
    faults: AtomicUsize,
}

impl Slot {
    const fn free() -> Self {
        let Range { start, len, page } = Range::EMPTY;
        Self {
            taken: AtomicBool::new(false),
            range: SharedRange {
                sequence: AtomicUsize::new(0),
                start: AtomicUsize::new(start),
                len: AtomicUsize::new(len),
                page: AtomicUsize::new(page),
            },
            faults: AtomicUsize::new(0),
        }
    }

    fn try_take(&self) -> bool {
        // Acquire: pairs with `give_up`, whose writes come first.
        self.taken
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    fn give_up(&self) {
        self.range.write(Range::EMPTY);
        // Release: pairs with `try_take`.
        self.taken.store(false, Ordering::Release);
    }
}

static SLOTS: [Slot; MAX_MAPPED] = [const { Slot::free() }; MAX_MAPPED];

/// Slots that are taken.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// Slots from here on have never been used.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);

static BREAKS: AtomicU64 = AtomicU64::new(0);

/// How many regions are mapped.
pub(super) fn mapped() -> usize {
    TAKEN.load(Ordering::Relaxed)
}

/// How often a region was broken so far: a change tells a worker to look at its queues.
#[inline]
pub(crate) fn breaks() -> u64 {
    // Relaxed: the flag of the region itself is read under the queue's lock later.
    BREAKS.load(Ordering::Relaxed)
}

/// Guards one mapping from before its first access until it is unmapped.
#[derive(Debug)]
pub(super) struct Guard {
    slot: usize,
}

impl Guard {
    /// Guards a mapping; `None` if [`MAX_MAPPED`] regions are guarded already.
    pub(super) fn new(range: Range) -> Option<Self> {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let index = SLOTS.iter().position(Slot::try_take)?;
        let slot = &SLOTS[index];
        slot.faults.store(0, Ordering::Relaxed);
        HIGH_WATER.fetch_max(index + 1, Ordering::Relaxed);
        slot.range.write(range);
        TAKEN.fetch_add(1, Ordering::Relaxed);
        Some(Self { slot: index })
    }

    pub(super) fn is_broken(&self) -> bool {
        SLOTS[self.slot].faults.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        SLOTS[self.slot].give_up();
        TAKEN.fetch_sub(1, Ordering::Relaxed);
    }
}

fn install() {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let entry: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = handler;
    action.sa_sigaction = entry as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: `action` is complete, and the handler is async-signal-safe: it uses atomics in
    // static memory, mmap and, to give up, signal.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "SIGBUS handler: {}", io::Error::last_os_error());
}

extern "C" fn handler(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let info = unsafe { info.as_ref() };
    // SAFETY: for SIGBUS the address is the member that is set.
    let address = info.map(|info| unsafe { info.si_addr() }.addr());
    if !address.is_some_and(replace_around) {
        // Not ours: die of it as if there were no handler, when the instruction is run again.
        // SAFETY: SIG_DFL is a valid action, and signal() is async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// Puts zeros in place of what is around `address`, if a region that is guarded holds it.
fn replace_around(address: usize) -> bool {
    let used = HIGH_WATER.load(Ordering::Relaxed).min(MAX_MAPPED);
    for slot in &SLOTS[..used] {
        let Some(range) = slot.range.read().filter(|range| range.holds(address)) else {
            continue;
        };
        let faults = slot.faults.fetch_add(1, Ordering::Relaxed);
        let (start, len) = range.chunk_of(address, faults);
        // Each chunk takes two mappings of the 65,530 that a process may have by default; where they
        // have run out, the whole region goes, which gives its own back.
        if !map_zeros(start, len) && !map_zeros(range.start, range.len) {
            return false;
        }
        BREAKS.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}

/// Maps zeros in place of what is there; to be called for whole pages of a region in use.
fn map_zeros(start: usize, len: usize) -> bool {
    // SAFETY: the range lies in a live mapping of ours (the faulting thread uses it, so its region
    // is held), nothing else lies in it, and no reference points into it.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(start),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_fault_replaces_its_page_and_each_further_one_twice_as_much() {
        let range = Range {
            start: 0x20_0000,
            len: 0xe0_0000,
            page: 0x20_0000,
        };
        assert!(range.holds(0x20_0000) && range.holds(0xff_ffff));
        assert!(!range.holds(0x1f_ffff) && !range.holds(0x100_0000));
        assert_eq!(range.chunk_of(0x20_0000, 0), (0x20_0000, 0x20_0000));
        assert_eq!(range.chunk_of(0x5f_ffff, 0), (0x40_0000, 0x20_0000));
        assert_eq!(range.chunk_of(0xff_ffff, 0), (0xe0_0000, 0x20_0000));
        assert_eq!(range.chunk_of(0x5f_ffff, 1), (0x20_0000, 0x40_0000));
        assert_eq!(range.chunk_of(0xff_ffff, 1), (0xe0_0000, 0x20_0000));
        assert_eq!(range.chunk_of(0xff_ffff, 2), (0xa0_0000, 0x60_0000));
        for faults in [3, 30, 1000] {
            assert_eq!(range.chunk_of(0xff_ffff, faults), (0x20_0000, 0xe0_0000));
        }
    }
}
