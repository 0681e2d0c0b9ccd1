//! Frames that wait for a destination which is full for the moment, so that their source goes on.
//!
//! ```text
//!   lot (source queue, destination):  head -> frame -> frame -> ... -> tail      oldest first
//!   frame:                            space -> space -> ...                      2 KiB each
//!   free spaces:                      space -> space -> ...
//! ```
//! A frame is parked by one more copy: a [`LotTx`] is a queue that takes every frame as it is. It
//! leaves as part of a burst in our own memory. What may be parked is bounded by spaces, so by
//! frames and bytes, and shared as a switch shares its buffer: nobody holds more than what is left.
//! A destination may take as many spaces as are free for all, and a source as many of these as the
//! destination may still take, so that there is always room for the frames of others. Lots are tried
//! in turn, so that nobody's frames wait behind those of a source that has more.

use std::cell::Cell;

use ringway_bridge::PortId;

use crate::burst::{Burst, Entry};
use crate::memory::GuestSlice;
use crate::offload::OutFrame;
use crate::port::{Limits, Refusal, TxQueue};
use crate::wire::Offloads;
use crate::wire::net_header::{HEADER_BYTES, MAX_FRAME_BYTES};

/// Bytes of a space: a frame of an ordinary MTU with its header.
const SPACE_BYTES: usize = 2048;

/// Spaces of a worker: 16 MiB, which it takes from the system when it parks for the first time.
const SPACES: usize = 8192;

/// Spaces that one frame takes at most.
const MAX_FRAME_SPACES: usize = (MAX_FRAME_BYTES + HEADER_BYTES).div_ceil(2048) as usize;

/// No space.
const NONE: u32 = u32::MAX;

/// After a try in vain a destination is tried again after so many nanoseconds, and after twice as
/// many each time, up to the most.
const RETRY_NS: u64 = 4_000;
const MAX_RETRY_NS: u64 = 128_000;

/// What is known of a space.
#[derive(Clone, Copy, Debug)]
struct Space {
    /// The next of the same frame, or of the free ones.
    next: u32,
    /// Of the first of a frame: the first of the lot's next frame,
    next_frame: u32,
    /// bytes of header and frame,
    bytes: u32,
    /// and since when it is there, in nanoseconds of the worker's clock.
    since_ns: u64,
}

/// The spaces of all lots.
#[derive(Debug)]
struct Spaces {
    bytes: Box<[u8]>,
    list: Box<[Space]>,
    free: u32,
    free_count: usize,
}

impl Spaces {
    fn new(count: usize) -> Self {
        let space = |next| Space {
            next,
            next_frame: NONE,
            bytes: 0,
            since_ns: 0,
        };
        let mut list: Vec<_> = (1..).take(count).map(space).collect();
        if let Some(last) = list.last_mut() {
            last.next = NONE;
        }
        Self {
            bytes: vec![0; count * SPACE_BYTES].into(),
            list: list.into(),
            free: 0,
            free_count: count,
        }
    }

    /// Takes so many spaces, which are free, for one frame; returns the first.
    fn take(&mut self, count: usize) -> u32 {
        let first = self.free;
        let mut last = first;
        for _ in 1..count {
            last = self.list[last as usize].next;
        }
        self.free = std::mem::replace(&mut self.list[last as usize].next, NONE);
        self.free_count -= count;
        first
    }

    /// Frees the spaces of a frame; returns how many.
    fn give_back(&mut self, first: u32) -> usize {
        let (mut last, mut count) = (first, 1);
        while self.list[last as usize].next != NONE {
            last = self.list[last as usize].next;
            count += 1;
        }
        self.list[last as usize].next = std::mem::replace(&mut self.free, first);
        self.free_count += count;
        count
    }

    /// The memory, and what is known of it.
    fn parts(&mut self) -> (&[Cell<u8>], &[Space]) {
        let cells = Cell::from_mut(&mut *self.bytes).as_slice_of_cells();
        (cells, &self.list)
    }
}

/// The memory of the frame whose first space is `first`.
fn memory_of<'a>(
    (cells, list): (&'a [Cell<u8>], &'a [Space]),
    first: u32,
    bytes: u32,
) -> impl Iterator<Item = GuestSlice<'a>> {
    let (mut at, mut left) = (first as usize, bytes as usize);
    std::iter::from_fn(move || {
        let space = list.get(at).filter(|_| left > 0)?;
        let from = at * SPACE_BYTES;
        let len = left.min(SPACE_BYTES);
        (at, left) = (space.next as usize, left - len);
        Some(GuestSlice::of_cells(&cells[from..from + len]))
    })
}

/// Frames of one source queue that wait for one destination.
#[derive(Debug)]
struct Lot {
    leaving: Leaving,
    head: u32,
    tail: u32,
    /// How many spaces they take.
    spaces: usize,
    /// When the destination is tried again, on the worker's clock,
    retry_ns: u64,
    /// and how long to wait after the next try in vain.
    delay_ns: u64,
}

impl Lot {
    /// Takes the first frame out and frees its spaces.
    fn pop(&mut self, spaces: &mut Spaces) {
        let next_frame = spaces.list[self.head as usize].next_frame;
        self.spaces -= spaces.give_back(self.head);
        self.head = next_frame;
    }
}

/// All that waits at one worker.
#[derive(Debug, Default)]
pub(super) struct Parking {
    spaces: Option<Spaces>,
    /// Those with frames, in the order in which they are tried.
    lots: Vec<Lot>,
}

/// Whose the frames of a lot are, and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaving {
    /// Whose they are, unless the port went.
    pub(super) from: Option<PortId>,
    pub(super) to: PortId,
    pub(super) source_queue: u16,
    /// How often the destination had been down by then.
    pub(super) outages: u64,
}

impl Parking {
    /// Whether nothing waits.
    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.lots.is_empty()
    }

    /// How many lots have frames.
    pub(super) fn lots(&self) -> usize {
        self.lots.len()
    }

    /// Whether frames wait for `to` that such a source queue's would have to compete with: those of
    /// queues of the same number; or its own only, which they must not overtake.
    #[inline]
    pub(super) fn has(&self, (to, source_queue): (PortId, u16), from: Option<PortId>) -> bool {
        let is_before = |lot: &Lot| {
            let Leaving { from: other, .. } = lot.leaving;
            lot.leaving.to == to
                && lot.leaving.source_queue == source_queue
                && (from.is_none() || from == other)
        };
        !self.is_empty() && self.lots.iter().any(is_before)
    }

    /// Where the frames of lot `at` go, if there is one.
    pub(super) fn leaving(&self, at: usize) -> Option<Leaving> {
        Some(self.lots.get(at)?.leaving)
    }

    /// The queue in which frames wait. [`Parking::rotate`] is due if none does afterwards.
    #[cold]
    pub(super) fn lot(&mut self, leaving: Leaving, now_ns: u64) -> LotTx<'_> {
        let at = self.lots.iter().position(|lot| lot.leaving == leaving);
        let at = at.unwrap_or_else(|| {
            self.lots.push(Lot {
                leaving,
                head: NONE,
                tail: NONE,
                spaces: 0,
                retry_ns: now_ns + RETRY_NS,
                delay_ns: RETRY_NS,
            });
            self.lots.len() - 1
        });
        let of_others = |(other, lot): (usize, &Lot)| {
            let is_one = other != at && lot.leaving.to == leaving.to;
            is_one.then_some(lot.spaces)
        };
        LotTx {
            others: self.lots.iter().enumerate().filter_map(of_others).sum(),
            lot: &mut self.lots[at],
            spaces: self.spaces.get_or_insert_with(|| Spaces::new(SPACES)),
            now_ns,
        }
    }

    /// Puts the first frames of lot `at` into the empty burst, if it is time to try their
    /// destination.
    pub(super) fn leave<'m>(
        &'m mut self,
        at: usize,
        now_ns: u64,
        burst: &mut Burst<'m>,
    ) -> Option<Leaving> {
        let lot = self.lots.get(at).filter(|lot| now_ns >= lot.retry_ns)?;
        let (cells, list) = self.spaces.as_mut()?.parts();
        let mut first = lot.head;
        while let (Some(space), Some(mark)) = (list.get(first as usize), burst.begin_chain()) {
            for part in memory_of((cells, list), first, space.bytes) {
                burst.push(mark, part);
            }
            burst.add(mark, Entry::single(0), space.bytes);
            first = space.next_frame;
        }
        (burst.len() > 0).then_some(lot.leaving)
    }

    /// Notes that the first `gone` frames of lot `at` left, and whether the next were refused.
    pub(super) fn left(&mut self, at: usize, gone: usize, is_full: bool, now_ns: u64) {
        let (Some(lot), Some(spaces)) = (self.lots.get_mut(at), &mut self.spaces) else {
            return;
        };
        (0..gone).for_each(|_| lot.pop(spaces));
        if gone > 0 {
            lot.delay_ns = RETRY_NS;
        }
        if is_full {
            lot.retry_ns = now_ns + lot.delay_ns;
            lot.delay_ns = (2 * lot.delay_ns).min(MAX_RETRY_NS);
        }
    }

    /// Forgets the first frame of lot `at` if it is there since `since_ns` or before, and tells
    /// whose it was.
    pub(super) fn expire(&mut self, at: usize, since_ns: u64) -> Option<Leaving> {
        let (lot, spaces) = (self.lots.get_mut(at)?, self.spaces.as_mut()?);
        let first = spaces.list.get(lot.head as usize)?;
        let leaving = (first.since_ns <= since_ns).then_some(lot.leaving)?;
        lot.pop(spaces);
        Some(leaving)
    }

    /// Has lots other than the first `tried` tried first from now on, and forgets those without
    /// frames.
    pub(super) fn rotate(&mut self, tried: usize) {
        let tried = tried.min(self.lots.len());
        self.lots.rotate_left(tried);
        self.lots.retain(|lot| lot.head != NONE);
    }

    /// Forgets the frames for a port that goes, and whose its own were.
    pub(super) fn remove(&mut self, port: PortId) {
        let Some(spaces) = &mut self.spaces else {
            return;
        };
        for lot in &mut self.lots {
            while lot.leaving.to == port && lot.head != NONE {
                lot.pop(spaces);
            }
            if lot.leaving.from == Some(port) {
                lot.leaving.from = None;
            }
        }
        self.rotate(0);
    }
}

/// A queue that takes frames as they are, for as long as there is room.
#[derive(Debug)]
pub(super) struct LotTx<'a> {
    lot: &'a mut Lot,
    spaces: &'a mut Spaces,
    /// What other lots of the destination hold.
    others: usize,
    now_ns: u64,
}

impl LotTx<'_> {
    /// Whether there is room for so many spaces more.
    fn fits(&self, needed: usize) -> bool {
        let held = self.lot.spaces;
        let room = self.spaces.free_count.saturating_sub(self.others + held);
        held + needed <= room
    }
}

impl TxQueue for LotTx<'_> {
    fn limits(&self) -> Limits {
        Limits {
            offloads: Offloads::ALL,
            max_bytes: u32::MAX,
        }
    }

    fn put(&mut self, frame: &mut OutFrame<'_>) -> Result<(), Refusal> {
        let bytes = frame.total_bytes();
        let needed = (bytes as usize).div_ceil(SPACE_BYTES);
        if needed > MAX_FRAME_SPACES || !self.fits(needed) {
            return Err(Refusal::Full);
        }
        let Self { lot, spaces, .. } = self;
        let first = spaces.take(needed);
        let mut parts = [GuestSlice::EMPTY; MAX_FRAME_SPACES];
        for (part, memory) in parts
            .iter_mut()
            .zip(memory_of(spaces.parts(), first, bytes))
        {
            *part = memory;
        }
        frame.write_to(0, 1, &parts[..needed]);
        let space = &mut spaces.list[first as usize];
        (space.bytes, space.since_ns) = (bytes, self.now_ns);
        space.next_frame = NONE;
        match spaces.list.get_mut(lot.tail as usize) {
            Some(tail) if lot.head != NONE => tail.next_frame = first,
            _ => lot.head = first,
        }
        lot.tail = first;
        lot.spaces += needed;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
