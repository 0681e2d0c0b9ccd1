//! What a driver sees once a device has published, in all orders that memory allows: the device's
//! own code over loom's atomics.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

#[path = "../src/ring/publish.rs"]
mod publish;

use std::sync::atomic::Ordering;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU16, AtomicU64};
use publish::{Word, publish};

impl Word for AtomicU16 {
    type Bits = u16;

    fn store(&self, bits: u16, order: Ordering) {
        self.store(bits, order);
    }
}

impl Word for AtomicU64 {
    type Bits = u64;

    fn store(&self, bits: u64, order: Ordering) {
        self.store(bits, order);
    }
}

/// A word, and what a device writes before it publishes.
#[derive(Default)]
struct Shared<W> {
    word: W,
    entry: UnsafeCell<u64>,
    buffer: UnsafeCell<u64>,
}

// SAFETY: loom fails the test if the cells are accessed by two threads at once.
unsafe impl<W: Sync> Sync for Shared<W> {}

/// A device fills a buffer, writes its used entry and publishes; `seen` is whether the driver finds
/// the word so.
fn model<W, const USED: u16>(seen: impl Fn(&W) -> bool + Copy + Send + Sync + 'static)
where
    W: Word<Bits: From<u16>> + Default + Send + Sync + 'static,
{
    loom::model(move || {
        let shared: Arc<Shared<W>> = Arc::default();
        let of_device = Arc::clone(&shared);
        let device = loom::thread::spawn(move || {
            // SAFETY: the driver reads it once it sees the word only.
            of_device.buffer.with_mut(|buffer| unsafe { *buffer = 7 });
            // SAFETY: as above.
            of_device.entry.with_mut(|entry| unsafe { *entry = 9 });
            publish(&of_device.word, USED.into());
        });
        if seen(&shared.word) {
            // SAFETY: the device writes it before the word only.
            let entry = shared.entry.with(|entry| unsafe { *entry });
            // SAFETY: as above.
            let buffer = shared.buffer.with(|buffer| unsafe { *buffer });
            assert_eq!((buffer, entry), (7, 9));
        }
        device.join().unwrap();
    });
}

#[test]
fn whoever_sees_a_split_rings_used_index_sees_its_entries_and_buffers() {
    model::<AtomicU16, 1>(|index| index.load(Ordering::Acquire) == 1);
}

#[test]
fn whoever_sees_a_packed_rings_flags_sees_its_descriptors_and_buffers() {
    const FLAGS: u16 = 0x8080;
    model::<AtomicU64, FLAGS>(|word| word.load(Ordering::Acquire) == u64::from(FLAGS));
}
