//! Device side of a split virtqueue (virtio 1.3, 2.7).
//!
//! ```text
//!   descriptor table   16 B x size       addr u64 | len u32 | flags u16 | next u16
//!   avail ring (driver writes)           flags u16 | idx u16 | ring u16 x size | used_event u16
//!   used ring (device writes)            flags u16 | idx u16 | ring (id u32, len u32) x size
//!                                        | avail_event u16
//! ```
//! The indices run freely modulo 65,536; an entry's place is the index modulo the size.
//! Descriptors are read once, into a local copy, which is checked and then used.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use ringway_bridge::MAX_BURST;

use crate::burst::{Burst, MAX_CHAIN};
use crate::memory::{GuestMemory, RegionHint, Segment};
use crate::net_header::vhost_features;
use crate::ring::RingFault;

const DESC_BYTES: usize = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// avail.flags: the driver wants no calls (2.7.7).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// used.flags: the device wants no kicks (2.7.10).
const USED_NO_NOTIFY: u16 = 1;

/// Bytes of each area of a ring of `size` and its alignment (2.7): descriptors, avail, used.
pub(crate) fn areas(size: u16) -> [(u64, u64); 3] {
    let size = u64::from(size);
    [(16 * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4)]
}

/// A descriptor, read once.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "fields of a packed struct")]
    fn from_bits(bits: u128) -> Self {
        let bits = u128::from_le(bits);
        Self {
            addr: bits as u64,
            len: (bits >> 64) as u32,
            flags: (bits >> 96) as u16,
            next: (bits >> 112) as u16,
        }
    }
}

/// A descriptor as one load; packed, since indirect tables may lie anywhere.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct DescriptorBits(u128);

/// A descriptor table: the ring's own, or an indirect one.
#[derive(Clone, Copy, Debug)]
struct Table {
    base: *const u8,
    len: u32,
}

impl Table {
    #[inline(always)]
    fn read(self, index: u16) -> Result<Descriptor, RingFault> {
        if u32::from(index) >= self.len {
            return Err(RingFault::DescriptorIndex {
                index,
                size: self.len,
            });
        }
        let at = self.base.wrapping_add(DESC_BYTES * usize::from(index));
        // SAFETY: the index is in the table, whose `len` descriptors are guest memory: that was
        // checked when the table was made. The type is packed, so any alignment will do.
        let bits = unsafe { at.cast::<DescriptorBits>().read_volatile() };
        Ok(Descriptor::from_bits(bits.0))
    }
}

/// Which way a chain's buffers go; also the word for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// The guest transmits: all its buffers are device-readable.
    FromGuest,
    /// The guest receives: all its buffers are device-writable.
    ToGuest,
}

/// Device side of one split ring. Its owner holds the queue's lock.
#[derive(Debug)]
pub(crate) struct SplitRing {
    desc: Table,
    avail: *mut u8,
    used: *mut u8,
    size: u16,
    /// Index of the next avail entry to take.
    next_avail: u16,
    /// Index of the next used entry to write; ahead of `used.idx` until published.
    next_used: u16,
    /// `used.idx` as the driver sees it.
    published: u16,
    /// A call was decided on since the ring started: `published` can be compared with used_event.
    call_known: bool,
    event_idx: bool,
    indirect: bool,
    header_bytes: u32,
    mergeable: bool,
    memory: Arc<GuestMemory>,
    hint: RegionHint,
}

// SAFETY: the pointers lead into `memory`, which the ring holds; whoever has `&mut` to the ring is
// its only user on our side, and the guest's accesses are met with atomics and volatile reads.
unsafe impl Send for SplitRing {}

/// Host addresses of the three areas, checked for size and alignment by the caller.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Areas {
    pub(crate) desc: *mut u8,
    pub(crate) avail: *mut u8,
    pub(crate) used: *mut u8,
}

impl SplitRing {
    /// A ring that goes on at avail index `next_avail`, and at the used index that is in memory.
    ///
    /// # Safety
    /// The areas are those of a ring of `size` entries, a power of two; they lie in `memory` and
    /// are aligned as [`areas`] says.
    pub(crate) unsafe fn new(
        size: u16,
        at: Areas,
        next_avail: u16,
        features: u64,
        memory: Arc<GuestMemory>,
    ) -> Self {
        debug_assert!(size.is_power_of_two());
        let has = |bit: u32| features & (1 << bit) != 0;
        let mergeable = has(vhost_features::MRG_RXBUF);
        // 5.1.6.1: legacy drivers without mergeable buffers use the header without num_buffers.
        let header_bytes = if mergeable || has(vhost_features::VERSION_1) {
            12
        } else {
            10
        };
        let mut ring = Self {
            desc: Table {
                base: at.desc,
                len: u32::from(size),
            },
            avail: at.avail,
            used: at.used,
            size,
            next_avail,
            next_used: 0,
            published: 0,
            call_known: false,
            event_idx: has(vhost_features::RING_EVENT_IDX),
            indirect: has(vhost_features::RING_INDIRECT_DESC),
            header_bytes,
            mergeable,
            memory,
            hint: RegionHint::none(),
        };
        ring.published = ring.used_u16(2).load(Ordering::Relaxed);
        ring.next_used = ring.published;
        ring
    }

    /// Puts the ring, with the same content, at other host addresses.
    ///
    /// # Safety
    /// As for [`SplitRing::new`].
    pub(crate) unsafe fn relocate(&mut self, at: Areas, memory: Arc<GuestMemory>) {
        self.desc.base = at.desc;
        self.avail = at.avail;
        self.used = at.used;
        self.memory = memory;
        self.hint = RegionHint::none();
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next avail entry, for GET_VRING_BASE.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Bytes of the header in front of each frame: 10 for legacy drivers, else 12.
    pub(crate) fn header_bytes(&self) -> u32 {
        self.header_bytes
    }

    /// Whether frames may be spread over several chains (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) fn mergeable(&self) -> bool {
        self.mergeable
    }

    /// Whether the memory behind the ring was cut off.
    pub(crate) fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    /// Takes up to `max` chains of a transmit ring into `burst`. A chain that breaks the rules
    /// ends the burst before it and is the error; the frames before it are good.
    ///
    /// # Errors
    /// The rule that the guest broke.
    #[inline]
    pub(crate) fn gather(&mut self, max: usize, burst: &mut Burst) -> Result<(), RingFault> {
        debug_assert!(max <= MAX_BURST && burst.len() == 0);
        let available = usize::from(self.available()?);
        for _ in 0..available.min(max) {
            let index = self.next_avail;
            if let Some((head, segment)) = self.single_buffer(index, Direction::FromGuest) {
                prefetch(segment.ptr);
                burst.add_single(head, segment);
            } else if !self.gather_chain(index, burst)? {
                break;
            }
            self.next_avail = index.wrapping_add(1);
        }
        Ok(())
    }

    /// Takes the chain at avail index `index`; false if the burst has no room for it.
    #[cold]
    fn gather_chain(&mut self, index: u16, burst: &mut Burst) -> Result<bool, RingFault> {
        let Some(mark) = burst.begin() else {
            return Ok(false);
        };
        let head = self.avail_entry(index)?;
        let walked = self.walk(head, Direction::FromGuest, |segment| {
            prefetch(segment.ptr);
            burst.push(mark, segment)
        });
        match walked {
            Ok(bytes) => burst.add(mark, head, bytes),
            Err(_) => burst.abandon(mark),
        }
        walked.map(|_| true)
    }

    /// The chain at avail index `index`, if it is the common case: one direct descriptor of the
    /// right direction, whose buffer lies in the region that served last. `None` says nothing
    /// about the chain, not even that it is good.
    #[inline(always)]
    pub(super) fn single_buffer(&self, index: u16, direction: Direction) -> Option<(u16, Segment)> {
        let head = self.avail_entry(index).ok()?;
        let desc = self.desc.read(head).ok()?;
        let wanted = match direction {
            Direction::FromGuest => 0,
            Direction::ToGuest => F_WRITE,
        };
        if desc.flags != wanted || desc.len == 0 {
            return None;
        }
        Some((head, self.hint.find(desc.addr, desc.len)?))
    }

    /// Gives back the last `count` chains that were taken and not completed: they will be taken,
    /// read and checked again.
    pub(crate) fn give_back(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_sub(count);
    }

    /// How many chains the guest has made available.
    ///
    /// # Errors
    /// More than the ring has entries.
    #[inline]
    pub(crate) fn available(&self) -> Result<u16, RingFault> {
        // Acquire: pairs with the driver's barrier before it writes avail.idx (2.7.13.3), so that
        // entries and descriptors up to the index are visible.
        let index = self.avail_u16(2).load(Ordering::Acquire);
        let ahead = u16::from_le(index).wrapping_sub(self.next_avail);
        if ahead > self.size {
            let (next, size) = (self.next_avail, self.size);
            return Err(RingFault::AvailIndex {
                index: u16::from_le(index),
                next,
                ahead,
                size,
            });
        }
        Ok(ahead)
    }

    /// The head of the chain at avail index `index`.
    #[inline]
    pub(super) fn avail_entry(&self, index: u16) -> Result<u16, RingFault> {
        let slot = usize::from(index & (self.size - 1));
        // Relaxed: ordered by the acquire load of the index.
        let head = u16::from_le(self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed));
        if head < self.size {
            Ok(head)
        } else {
            Err(RingFault::DescriptorIndex {
                index: head,
                size: u32::from(self.size),
            })
        }
    }

    /// Marks `count` chains of a receive ring as taken.
    #[inline]
    pub(super) fn advance(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_add(count);
    }

    /// Gives the pieces of the chain at `head` to `piece` and returns their length. At most
    /// [`MAX_CHAIN`] descriptors are followed, whatever the guest links.
    ///
    /// # Errors
    /// The rule that the chain breaks; pieces may have been given before.
    #[inline]
    pub(super) fn walk(
        &mut self,
        head: u16,
        direction: Direction,
        mut piece: impl FnMut(Segment) -> bool,
    ) -> Result<u32, RingFault> {
        let mut table = self.desc;
        let mut index = head;
        let mut is_indirect = false;
        let mut bytes: u32 = 0;
        for _ in 0..=MAX_CHAIN {
            let desc = table.read(index)?;
            if desc.flags & F_INDIRECT != 0 {
                if is_indirect {
                    return Err(RingFault::Indirect {
                        rule: "a table points to another table",
                    });
                }
                table = self.indirect_table(desc)?;
                is_indirect = true;
                index = 0;
                continue;
            }
            if (desc.flags & F_WRITE != 0) != (direction == Direction::ToGuest) {
                let ring = match direction {
                    Direction::FromGuest => "transmit",
                    Direction::ToGuest => "receive",
                };
                return Err(RingFault::Direction {
                    ring,
                    flags: desc.flags,
                });
            }
            if desc.len > 0 {
                let address = RingFault::Address {
                    addr: desc.addr,
                    len: desc.len,
                };
                let mut fits = true;
                let found = self
                    .memory
                    .translate(desc.addr, desc.len, &mut self.hint, |segment| {
                        fits = piece(segment);
                        fits
                    });
                if !fits {
                    return Err(RingFault::ChainTooLong { max: MAX_CHAIN });
                }
                found.ok_or(address)?;
                bytes = bytes.checked_add(desc.len).ok_or(address)?;
            } else if direction == Direction::ToGuest {
                // The search for room is bounded by the pieces that it finds.
                return Err(RingFault::EmptyBuffer);
            }
            if desc.flags & F_NEXT == 0 {
                return Ok(bytes);
            }
            index = desc.next;
        }
        Err(RingFault::ChainTooLong { max: MAX_CHAIN })
    }

    #[cold]
    fn indirect_table(&mut self, desc: Descriptor) -> Result<Table, RingFault> {
        let fault = |rule| Err(RingFault::Indirect { rule });
        if !self.indirect {
            return fault("VIRTIO_F_INDIRECT_DESC was not negotiated");
        }
        if desc.flags & F_NEXT != 0 {
            return fault("it has a next descriptor (virtio 1.3, 2.7.5.3.1)");
        }
        let len = desc.len / 16;
        if !desc.len.is_multiple_of(16) || len == 0 || len as usize > MAX_CHAIN {
            return fault("its table's length is no multiple of 16, zero or too large");
        }
        let mut whole = None;
        let found = self
            .memory
            .translate(desc.addr, desc.len, &mut self.hint, |segment| {
                whole = Some(segment);
                segment.len == desc.len
            });
        match (found, whole) {
            (Some(()), Some(segment)) => Ok(Table {
                base: segment.ptr,
                len,
            }),
            (None, None) => Err(RingFault::Address {
                addr: desc.addr,
                len: desc.len,
            }),
            _ => fault("its table crosses regions"),
        }
    }

    /// Writes a used entry; the driver sees it after [`SplitRing::publish`].
    #[inline]
    pub(crate) fn complete(&mut self, entry: u16, written_bytes: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let bits = u64::from(entry) | u64::from(written_bytes) << 32;
        let at = self.used.wrapping_add(4 + 8 * slot).cast::<u64>();
        // SAFETY: the slot is in the used ring, which lies in guest memory that we hold; entries
        // are aligned to 4 bytes only, hence unaligned.
        unsafe { at.write_unaligned(bits.to_le()) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the driver all completed entries, and returns whether it wants a call for them.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        // Release: pairs with the driver's read barrier after it reads used.idx (2.7.14), so that
        // entries and buffers are written before.
        self.used_u16(2).store(new.to_le(), Ordering::Release);
        self.published = new;
        // SeqCst: pairs with the driver's full barrier between its write of used_event or flags
        // and its read of used.idx (2.7.7.1, 2.7.10.1): one of the two sees the other.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            let flags = u16::from_le(self.avail_u16(0).load(Ordering::Relaxed));
            return flags & AVAIL_NO_INTERRUPT == 0;
        }
        let event_at = 4 + 2 * usize::from(self.size);
        let event = u16::from_le(self.avail_u16(event_at).load(Ordering::Relaxed));
        // Before the first call nothing is known of what the driver saw: call.
        let known = std::mem::replace(&mut self.call_known, true);
        !known || event_passed(event, new, old)
    }

    /// Tells the driver not to kick, while the ring is polled.
    pub(crate) fn disarm(&mut self) {
        // With EVENT_IDX the old avail_event is left behind as the index goes on: the driver
        // kicks once in 65,536 frames, which is harmless.
        if !self.event_idx {
            self.used_u16(0)
                .store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver for a kick and returns whether the ring is still empty, so that waiting for
    /// the kick can't miss a frame. A bad avail index counts as not empty: the next poll finds it.
    pub(crate) fn arm(&mut self) -> bool {
        if self.event_idx {
            let event_at = 4 + 8 * usize::from(self.size);
            self.used_u16(event_at)
                .store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // SeqCst: pairs with the driver's full barrier between its write of avail.idx and its read
        // of avail_event or flags (2.7.13.4.1): either it kicks or we see its frame.
        fence(Ordering::SeqCst);
        self.available() == Ok(0)
    }

    /// The u16 at `offset` of the avail area. Offsets are even and within the area.
    #[inline(always)]
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the area is guest memory that `self.memory` holds, aligned to 2 bytes, and
        // `offset` is even and within it; our side accesses it by atomics only.
        unsafe { AtomicU16::from_ptr(self.avail.wrapping_add(offset).cast()) }
    }

    /// The u16 at `offset` of the used area: flags, idx or avail_event.
    #[inline(always)]
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as for `avail_u16`; used entries, which are written without atomics, do not
        // overlap these fields.
        unsafe { AtomicU16::from_ptr(self.used.wrapping_add(offset).cast()) }
    }
}

/// Whether going from index `old` to `new` passed `event`: vring_need_event (2.7.10).
#[inline]
fn event_passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Brings the line at `ptr` towards the cache; a hint, valid for any address.
#[inline(always)]
pub(super) fn prefetch(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching has no effect that a program can see.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}
