//! The driver's side of a packed virtqueue (virtio 1.3, 2.8).
//!
//! [`PackedArea`] is the ring's memory and writes whatever it is told to, as tests of hostile
//! guests need; [`PackedDriverRing`] keeps the rules.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::{DriverMemory, Window};
use super::queue::{
    AddError, Buffer, Calls, Chain, DESC_BYTES, DeviceFault, Layout, MAX_QUEUE_SIZE, RingOptions,
    RingPlace, RingSetupError, Used, passes_event, total_len,
};
use super::split::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, indirect_tables};

/// Equal to the driver's wrap counter in an available descriptor (VIRTQ_DESC_F_AVAIL).
pub const DESC_F_AVAIL: u16 = 1 << 7;
/// The inverse of it in an available descriptor, equal in a used one (VIRTQ_DESC_F_USED).
pub const DESC_F_USED: u16 = 1 << 15;

/// Event suppression: notify always (RING_EVENT_FLAGS_ENABLE).
const EVENT_ENABLE: u16 = 0;
/// Event suppression: never notify (RING_EVENT_FLAGS_DISABLE).
const EVENT_DISABLE: u16 = 1;
/// Event suppression: notify at a descriptor (RING_EVENT_FLAGS_DESC).
const EVENT_DESC: u16 = 2;

/// A descriptor of a packed ring, as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedDesc {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Buffer id.
    pub id: u16,
    /// [`DESC_F_NEXT`], [`DESC_F_WRITE`], [`DESC_F_INDIRECT`], [`DESC_F_AVAIL`],
    /// [`DESC_F_USED`].
    pub flags: u16,
}

impl PackedDesc {
    /// All but the address, as one word in memory order.
    fn tail(self) -> u64 {
        u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48
    }
}

/// A position in a packed ring with the wrap counter that holds there (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Index of the descriptor.
    pub slot: u16,
    /// The ring wrap counter.
    pub wrap: bool,
}

impl Position {
    /// Where both sides start.
    pub const START: Self = Self {
        slot: 0,
        wrap: true,
    };

    /// The position `count` descriptors on, in a ring of `size`; `count` is at most `size`.
    #[inline]
    pub fn advance(self, count: u16, size: u16) -> Self {
        // Sizes are at most 32,768, so the sum fits.
        let slot = self.slot + count;
        if slot >= size {
            Self {
                slot: slot - size,
                wrap: !self.wrap,
            }
        } else {
            Self { slot, ..self }
        }
    }

    /// Flags of a descriptor that becomes available here.
    #[inline]
    pub fn available_flags(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }

    /// True if these flags say that the device has used the descriptor here.
    #[inline]
    pub fn is_used(self, flags: u16) -> bool {
        let used = flags & DESC_F_USED != 0;
        used == self.wrap && used == (flags & DESC_F_AVAIL != 0)
    }

    /// Slot and wrap counter in 16 bits, as event suppression structures and vring bases hold
    /// them.
    pub fn off_wrap(self) -> u16 {
        self.slot | u16::from(self.wrap) << 15
    }
}

/// The memory of a packed ring: raw access to each field, no rule enforced. The methods panic on
/// a slot that is not below the size.
#[derive(Clone, Debug)]
pub struct PackedArea {
    place: RingPlace,
    desc: Window,
    driver: Window,
    device: Window,
}

impl PackedArea {
    /// A zeroed ring of `size` entries.
    ///
    /// # Errors
    /// A size of 0 or more than [`MAX_QUEUE_SIZE`], or memory that is full.
    pub fn new(memory: &Arc<DriverMemory>, size: u16) -> Result<Self, RingSetupError> {
        if size == 0 || size > MAX_QUEUE_SIZE {
            let layout = Layout::Packed;
            return Err(RingSetupError::Size { layout, size });
        }
        let len = 16 * u64::from(size);
        let (desc, driver, device) = (
            memory.alloc(len, 128)?,
            memory.alloc(4, 128)?,
            memory.alloc(128, 128)?,
        );
        let base = u32::from(Position::START.off_wrap());
        Ok(Self {
            place: RingPlace {
                size,
                desc,
                driver,
                device,
                base: base | base << 16,
            },
            desc: memory.window(desc, len)?,
            driver: memory.window(driver, 4)?,
            device: memory.window(device, 4)?,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.place.size
    }

    /// Where it lies; the base is that of a fresh ring.
    pub fn place(&self) -> RingPlace {
        self.place
    }

    /// Writes a descriptor, flags last. The release pairs with the device's acquire of the
    /// flags: what was written before is seen by then.
    #[inline]
    pub fn write_desc(&self, slot: u16, desc: PackedDesc) {
        self.write_desc_at(usize::from(slot), desc);
    }

    /// As [`PackedArea::write_desc`].
    #[inline]
    pub(crate) fn write_desc_at(&self, slot: usize, desc: PackedDesc) {
        self.desc
            .store_u64_pair(slot * DESC_BYTES, desc.addr, desc.tail());
    }

    /// Reads a descriptor, flags first. The acquire pairs with the device's release of them.
    #[inline]
    pub fn read_desc(&self, slot: u16) -> PackedDesc {
        PackedDesc {
            addr: self
                .desc
                .load_u64(usize::from(slot) * DESC_BYTES, Ordering::Relaxed),
            ..self.read_tail(slot)
        }
    }

    /// Reads all of a descriptor but the address.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the fields are cut out of one word"
    )]
    pub(crate) fn read_tail(&self, slot: u16) -> PackedDesc {
        let at = usize::from(slot) * DESC_BYTES + 8;
        let tail = self.desc.load_u64(at, Ordering::Acquire);
        PackedDesc {
            addr: 0,
            len: tail as u32,
            id: (tail >> 32) as u16,
            flags: (tail >> 48) as u16,
        }
    }

    /// Writes the flags of a descriptor alone, with release.
    pub fn set_flags(&self, slot: u16, flags: u16) {
        let at = usize::from(slot) * DESC_BYTES + 14;
        self.desc.store_u16(at, flags, Ordering::Release);
    }

    /// Writes the driver's event suppression structure: when the driver wants calls (2.8.14).
    pub fn set_driver_event(&self, off_wrap: u16, flags: u16) {
        self.driver.store_u16(0, off_wrap, Ordering::Relaxed);
        // Pairs with the device's acquire of the flags: the offset is seen by then.
        self.driver.store_u16(2, flags, Ordering::Release);
    }

    /// Offset with wrap counter, and flags, of the device's event suppression structure.
    #[inline]
    pub fn device_event(&self) -> (u16, u16) {
        // Pairs with the device's release of the flags: the offset is no older.
        let flags = self.device.load_u16(2, Ordering::Acquire);
        (self.device.load_u16(0, Ordering::Relaxed), flags)
    }

    /// True if the device wants a kick for `added` descriptors that end before `next`. The caller
    /// has published them and made a full fence.
    #[inline]
    pub(crate) fn wants_kick(&self, next: Position, added: u16) -> bool {
        let (off_wrap, flags) = self.device_event();
        match flags & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC => {
                let mut event = off_wrap & 0x7fff;
                if (off_wrap >> 15 != 0) != next.wrap {
                    event = event.wrapping_sub(self.size());
                }
                passes_event(event, next.slot, next.slot.wrapping_sub(added))
            }
            _ => true,
        }
    }

    /// Asks for calls or none, given the next position to reap.
    pub(crate) fn request_calls(&self, event_idx: bool, calls: Calls, next: Position) {
        let flags = match (calls, event_idx) {
            (Calls::Never, _) => EVENT_DISABLE,
            (Calls::Next, false) => EVENT_ENABLE,
            (Calls::Next, true) => EVENT_DESC,
        };
        self.set_driver_event(next.off_wrap(), flags);
    }
}

/// The driver's side of a packed ring. Nothing that the device can change is trusted.
#[derive(Debug)]
pub struct PackedDriverRing {
    area: PackedArea,
    options: RingOptions,
    /// One indirect table of `options.indirect` descriptors per buffer id.
    tables: Option<(u64, Window)>,
    /// Buffer ids that no chain has, first freed first.
    ids: VecDeque<u16>,
    /// By buffer id.
    chains: Vec<Option<Chain>>,
    /// Ids in the order of availability; kept for IN_ORDER only.
    order: VecDeque<u16>,
    in_flight: u16,
    free: u16,
    next_avail: Position,
    /// The first chain added since the last publish: its slot and flags are held back.
    held: Option<(u16, u16)>,
    /// Descriptors added since the last publish.
    added: u16,
    next_used: Position,
}

impl PackedDriverRing {
    /// An empty ring of `size` entries in `memory`.
    ///
    /// # Errors
    /// A size of 0 or more than [`MAX_QUEUE_SIZE`], or memory that is full.
    pub fn new(
        memory: &Arc<DriverMemory>,
        size: u16,
        options: RingOptions,
    ) -> Result<Self, RingSetupError> {
        let area = PackedArea::new(memory, size)?;
        Ok(Self {
            tables: indirect_tables(memory, size, options)?,
            area,
            options,
            ids: (0..size).collect(),
            chains: vec![None; usize::from(size)],
            order: VecDeque::new(),
            in_flight: 0,
            free: size,
            next_avail: Position::START,
            held: None,
            added: 0,
            next_used: Position::START,
        })
    }

    /// The ring's memory, for tests that break rules.
    pub fn area(&self) -> &PackedArea {
        &self.area
    }

    /// Where it lies; both halves of the base are the first position that was not reaped.
    pub fn place(&self) -> RingPlace {
        let base = u32::from(self.next_used.off_wrap());
        RingPlace {
            base: base | base << 16,
            ..self.area.place()
        }
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains that were added and not reaped.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// See [`super::DriverRing::add`].
    ///
    /// # Errors
    /// The ring is full, or can never hold such a chain.
    pub fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        token: u32,
    ) -> Result<(), AddError> {
        let size = self.area.size();
        let buffers = readable.len() + writable.len();
        let (count, indirect) = self.options.shape(buffers, size)?;
        let descs = if indirect { 1 } else { count };
        if self.free < descs {
            return Err(AddError::Full);
        }
        // There are as many ids as descriptors, and each chain has one at least.
        let id = self.ids.pop_front().ok_or(AddError::Full)?;
        let flagged = readable
            .iter()
            .map(|buffer| (buffer, 0))
            .chain(writable.iter().map(|buffer| (buffer, DESC_F_WRITE)));
        if let (true, Some((tables, window))) = (indirect, &self.tables) {
            let first = usize::from(id) * usize::from(self.options.indirect) * DESC_BYTES;
            for (i, (buffer, flags)) in flagged.enumerate() {
                let desc = PackedDesc {
                    addr: buffer.addr,
                    len: buffer.len,
                    id: 0,
                    flags,
                };
                let at = first + i * DESC_BYTES;
                window.store_u64(at, desc.addr, Ordering::Relaxed);
                window.store_u64(at + 8, desc.tail(), Ordering::Relaxed);
            }
            let table = Buffer {
                addr: tables + first as u64,
                len: u32::from(count) * 16,
            };
            self.put(table, id, DESC_F_INDIRECT);
        } else {
            for (i, (buffer, flags)) in (1..).zip(flagged) {
                let more = if i < count { DESC_F_NEXT } else { 0 };
                self.put(*buffer, id, flags | more);
            }
        }
        self.chains[usize::from(id)] = Some(Chain {
            token,
            descs,
            room: total_len(writable),
        });
        if self.options.in_order {
            self.order.push_back(id);
        }
        self.in_flight += 1;
        Ok(())
    }

    /// See [`super::DriverRing::publish`].
    #[must_use = "a device that wants a kick may sleep for ever without it"]
    pub fn publish(&mut self) -> bool {
        let Some((slot, flags)) = self.held.take() else {
            return false;
        };
        self.area.set_flags(slot, flags);
        // Pairs with the device's fence between asking for kicks and its last look at the ring:
        // one of the two sees the other's store.
        fence(Ordering::SeqCst);
        let added = std::mem::take(&mut self.added);
        self.area.wants_kick(self.next_avail, added)
    }

    /// See [`super::DriverRing::reap`].
    ///
    /// # Errors
    /// The device broke a rule; what it used before that is in `into`.
    pub fn reap(&mut self, into: &mut Vec<Used>) -> Result<usize, DeviceFault> {
        let before = into.len();
        while self.in_flight > 0 {
            let desc = self.area.read_tail(self.next_used.slot);
            if !self.next_used.is_used(desc.flags) {
                break;
            }
            // Without a writable buffer the length is reserved (2.8.7): nothing was written.
            let len = |chain: &Chain| if chain.room == 0 { 0 } else { desc.len };
            if self.options.in_order {
                let fault = DeviceFault::UsedId {
                    id: u32::from(desc.id),
                };
                let batch = self.order.iter().position(|id| *id == desc.id);
                for _ in 0..batch.ok_or(fault)? {
                    let chain = self.take(self.order[0])?;
                    self.order.pop_front();
                    into.push(chain.used(chain.room)?);
                }
                self.order.pop_front();
            }
            let chain = self.take(desc.id)?;
            into.push(chain.used(len(&chain))?);
        }
        Ok(into.len() - before)
    }

    /// See [`super::DriverRing::set_calls`].
    pub fn set_calls(&mut self, calls: Calls) -> bool {
        self.area
            .request_calls(self.options.event_idx, calls, self.next_used);
        // Pairs with the device's fence between its write of a used descriptor and its look at
        // the event: one of the two sees the other's store.
        fence(Ordering::SeqCst);
        let flags = self.area.read_tail(self.next_used.slot).flags;
        self.in_flight > 0 && self.next_used.is_used(flags)
    }

    /// Writes the next descriptor; flags of the first since the last publish are held back, so
    /// that the device stops in front of it.
    fn put(&mut self, buffer: Buffer, id: u16, flags: u16) {
        let Position { slot, .. } = self.next_avail;
        let flags = flags | self.next_avail.available_flags();
        let mut desc = PackedDesc {
            addr: buffer.addr,
            len: buffer.len,
            id,
            flags,
        };
        if self.held.is_none() {
            self.held = Some((slot, flags));
            // Both bits unlike the device's wrap counter: not available, whatever was here.
            desc.flags = if self.next_avail.wrap {
                0
            } else {
                DESC_F_AVAIL | DESC_F_USED
            };
        }
        self.area.write_desc(slot, desc);
        self.next_avail = self.next_avail.advance(1, self.area.size());
        self.free -= 1;
        self.added += 1;
    }

    fn take(&mut self, id: u16) -> Result<Chain, DeviceFault> {
        let fault = DeviceFault::UsedId { id: u32::from(id) };
        let slot = self.chains.get_mut(usize::from(id)).ok_or(fault)?;
        let chain = slot.take().ok_or(fault)?;
        self.ids.push_back(id);
        self.free += chain.descs;
        self.in_flight -= 1;
        self.next_used = self.next_used.advance(chain.descs, self.area.size());
        Ok(chain)
    }
}
