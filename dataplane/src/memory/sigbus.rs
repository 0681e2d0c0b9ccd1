//! What happens when a front-end truncates the file behind its guest's memory: the next access
//! raises SIGBUS. The handler replaces the whole region by private zero pages, so that the access
//! goes on harmlessly, and marks it broken; workers see [`breaks`] change and stop the port.

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most regions mapped at a time by all ports: 1,000 guests of QEMU with 4 regions, some of them
/// with many. The table is untouched memory until it is used.
const MAX_MAPPED: usize = 16_384;

struct MappedRange {
    /// First address, 0 for a free slot. Written last when a slot is taken.
    start: AtomicUsize,
    len: AtomicUsize,
    broken: AtomicBool,
}

static SLOTS: [MappedRange; MAX_MAPPED] = [const {
    MappedRange {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    }
}; MAX_MAPPED];

/// Slots from here on have never been used.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);

static BREAKS: AtomicU64 = AtomicU64::new(0);

/// How many regions were broken so far: a change tells a worker to look at its queues.
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

/// Marks a slot that is taken but not yet described; no mapping starts there.
const RESERVED: usize = usize::MAX;

impl Guard {
    /// Guards `start..start + len`; `None` if [`MAX_MAPPED`] regions are guarded already.
    pub(super) fn new(start: usize, len: usize) -> Option<Self> {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let take = |slot: &MappedRange| {
            slot.start
                .compare_exchange(0, RESERVED, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        };
        let index = SLOTS.iter().position(take)?;
        let slot = &SLOTS[index];
        slot.len.store(len, Ordering::Relaxed);
        slot.broken.store(false, Ordering::Relaxed);
        HIGH_WATER.fetch_max(index + 1, Ordering::Relaxed);
        // Release: pairs with the handler's acquire load of `start`.
        slot.start.store(start, Ordering::Release);
        Some(Self { slot: index })
    }

    pub(super) fn is_broken(&self) -> bool {
        SLOTS[self.slot].broken.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Release: pairs with `new`'s acquire exchange, which hands the slot on.
        SLOTS[self.slot].start.store(0, Ordering::Release);
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
    if !address.is_some_and(replace_region_at) {
        // Not ours: die of it as if there were no handler, when the instruction is run again.
        // SAFETY: SIG_DFL is a valid action, and signal() is async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
}

/// Puts zero pages in place of the guarded region around `address`, if there is one.
fn replace_region_at(address: usize) -> bool {
    let used = HIGH_WATER.load(Ordering::Relaxed).min(MAX_MAPPED);
    for slot in &SLOTS[..used] {
        // Acquire: pairs with the release store in `Guard::new`, so `len` belongs to it.
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        if start == 0 || start == RESERVED || address.wrapping_sub(start) >= len {
            continue;
        }
        // SAFETY: the range is a live mapping of ours (the faulting thread uses it, so its region
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
        if mapped == libc::MAP_FAILED {
            return false;
        }
        slot.broken.store(true, Ordering::Relaxed);
        BREAKS.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    false
}
