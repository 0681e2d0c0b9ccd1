//! What a handler of SIGBUS sees of a slot that changes hands, in all orders that memory allows: its own
//! code over loom's atomics. One that takes the start of one region and the length of another replaces
//! memory that is neither's.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

#[path = "../src/memory/sigbus/range.rs"]
mod range;

use std::sync::atomic::Ordering;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, fence};
use range::{Range, SharedRange, Word};

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

/// The range of a region by its number, no word of which is another's.
fn region(number: usize) -> Range {
    Range {
        start: 0x1000 * number,
        len: 0x10_0000 * number,
        page: 0x10 << number,
    }
}

#[test]
fn a_slot_that_changes_hands_is_read_whole_or_not_at_all() {
    loom::model(|| {
        let Range { start, len, page } = region(1);
        let slot = Arc::new(SharedRange {
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(start),
            len: AtomicUsize::new(len),
            page: AtomicUsize::new(page),
        });
        let of_writer = Arc::clone(&slot);
        let writer = loom::thread::spawn(move || of_writer.write(region(2)));
        if let Some(read) = slot.read() {
            assert!([1, 2].map(region).contains(&read), "{read:x?}");
        }
        writer.join().unwrap();
        assert_eq!(slot.read(), Some(region(2)));
    });
}

/// As when a region goes and another takes its slot.
#[test]
fn a_range_is_not_taken_for_one_of_before() {
    loom::model(|| {
        let slot = Arc::new(SharedRange {
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(Range::EMPTY.start),
            len: AtomicUsize::new(Range::EMPTY.len),
            page: AtomicUsize::new(Range::EMPTY.page),
        });
        let of_writer = Arc::clone(&slot);
        let writer = loom::thread::spawn(move || {
            of_writer.write(region(1));
            of_writer.write(region(2));
        });
        if let Some(read) = slot.read() {
            let whole = [Range::EMPTY, region(1), region(2)];
            assert!(whole.contains(&read), "{read:x?}");
        }
        writer.join().unwrap();
    });
}
