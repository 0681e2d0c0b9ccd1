//! The driver's side of a split virtqueue (virtio 1.3, 2.7).
//!
//! [`SplitArea`] is the ring's memory and writes whatever it is told to, as tests of hostile
//! guests need; [`SplitDriverRing`] keeps the rules.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::{DriverMemory, Window};
use super::queue::{
    AddError, Buffer, Calls, Chain, DESC_BYTES, DeviceFault, Layout, MAX_QUEUE_SIZE, RingOptions,
    RingPlace, RingSetupError, Used, passes_event, total_len,
};

/// The buffer continues at `next` (VIRTQ_DESC_F_NEXT).
pub const DESC_F_NEXT: u16 = 1;
/// The device writes the buffer (VIRTQ_DESC_F_WRITE).
pub const DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors (VIRTQ_DESC_F_INDIRECT).
pub const DESC_F_INDIRECT: u16 = 4;

/// In the available ring's flags: no call, please (VIRTQ_AVAIL_F_NO_INTERRUPT).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: no kick, please (VIRTQ_USED_F_NO_NOTIFY).
const USED_F_NO_NOTIFY: u16 = 1;

/// Offset of `idx` in the available and in the used ring.
const IDX: usize = 2;
/// Offset of the entries in the available and in the used ring.
const ENTRIES: usize = 4;
/// Bytes of an entry of the used ring.
const USED_ELEM_BYTES: usize = 8;

/// A descriptor of a split ring, as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SplitDesc {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`DESC_F_NEXT`], [`DESC_F_WRITE`], [`DESC_F_INDIRECT`].
    pub flags: u16,
    /// Index of the descriptor that follows.
    pub next: u16,
}

/// The memory of a split ring: raw access to each field, no rule enforced.
///
/// Indices are positions in the tables; the methods panic on one that is not below the size.
#[derive(Clone, Debug)]
pub struct SplitArea {
    size: u16,
    place: RingPlace,
    desc: Window,
    avail: Window,
    used: Window,
}

impl SplitArea {
    /// A zeroed ring of `size` entries.
    ///
    /// # Errors
    /// A size that is no power of two up to [`MAX_QUEUE_SIZE`], or memory that is full.
    pub fn new(memory: &Arc<DriverMemory>, size: u16) -> Result<Self, RingSetupError> {
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            let layout = Layout::Split;
            return Err(RingSetupError::Size { layout, size });
        }
        let entries = u64::from(size);
        // Areas that two sides write don't share cache lines; 2.7 asks for 16, 2 and 4 only.
        let (desc_len, avail_len, used_len) = (16 * entries, 6 + 2 * entries, 6 + 8 * entries);
        let desc = memory.alloc(desc_len, 128)?;
        let driver = memory.alloc(avail_len, 128)?;
        let device = memory.alloc(used_len.next_multiple_of(128), 128)?;
        Ok(Self {
            size,
            place: RingPlace {
                size,
                desc,
                driver,
                device,
                base: 0,
            },
            desc: memory.window(desc, desc_len)?,
            avail: memory.window(driver, avail_len)?,
            used: memory.window(device, used_len)?,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where it lies; the base is 0.
    pub fn place(&self) -> RingPlace {
        self.place
    }

    /// Writes a descriptor.
    pub fn write_desc(&self, index: u16, desc: SplitDesc) {
        write_desc(&self.desc, usize::from(index), desc);
    }

    /// Reads a descriptor.
    pub fn read_desc(&self, index: u16) -> SplitDesc {
        let at = usize::from(index) * DESC_BYTES;
        SplitDesc {
            addr: self.desc.load_u64(at, Ordering::Relaxed),
            len: self.desc.load_u32(at + 8, Ordering::Relaxed),
            flags: self.desc.load_u16(at + 12, Ordering::Relaxed),
            next: self.desc.load_u16(at + 14, Ordering::Relaxed),
        }
    }

    /// Writes an entry of the available ring.
    #[inline]
    pub fn set_avail_entry(&self, index: u16, head: u16) {
        assert!(index < self.size, "entry {index} of {}", self.size);
        self.avail
            .store_u16(ENTRIES + 2 * usize::from(index), head, Ordering::Relaxed);
    }

    /// The available index as the device sees it.
    pub fn avail_idx(&self) -> u16 {
        self.avail.load_u16(IDX, Ordering::Relaxed)
    }

    /// Publishes the available index. The release pairs with the device's acquire of it:
    /// descriptors and entries written before are seen by then.
    #[inline]
    pub fn set_avail_idx(&self, idx: u16) {
        self.avail.store_u16(IDX, idx, Ordering::Release);
    }

    /// Sets the available ring's flags.
    pub fn set_avail_flags(&self, flags: u16) {
        self.avail.store_u16(0, flags, Ordering::Relaxed);
    }

    /// Sets `used_event`, behind the available ring's entries.
    pub fn set_used_event(&self, event: u16) {
        let at = ENTRIES + 2 * usize::from(self.size);
        self.avail.store_u16(at, event, Ordering::Relaxed);
    }

    /// The used index. The acquire pairs with the device's release of it: used entries and
    /// buffers written before are seen afterwards.
    #[inline]
    pub fn used_idx(&self) -> u16 {
        self.used.load_u16(IDX, Ordering::Acquire)
    }

    /// The used ring's flags.
    #[inline]
    pub fn used_flags(&self) -> u16 {
        self.used.load_u16(0, Ordering::Relaxed)
    }

    /// Id and length of an entry of the used ring.
    #[inline]
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        assert!(index < self.size, "entry {index} of {}", self.size);
        let at = ENTRIES + USED_ELEM_BYTES * usize::from(index);
        // 4-byte aligned only, by 2.7.8.
        self.used.load_u32_pair(at, Ordering::Relaxed)
    }

    /// `avail_event`, behind the used ring's entries.
    #[inline]
    pub fn avail_event(&self) -> u16 {
        let at = ENTRIES + USED_ELEM_BYTES * usize::from(self.size);
        self.used.load_u16(at, Ordering::Relaxed)
    }

    /// True if the device wants a kick for moving the available index from `old` to `new`
    /// (2.7.10). The caller has published `new` and made a full fence.
    #[inline]
    pub(crate) fn wants_kick(&self, event_idx: bool, new: u16, old: u16) -> bool {
        if event_idx {
            passes_event(self.avail_event(), new, old)
        } else {
            self.used_flags() & USED_F_NO_NOTIFY == 0
        }
    }

    /// Asks for calls or none, given the used index up to which chains were reaped (2.7.7).
    pub(crate) fn request_calls(&self, event_idx: bool, calls: Calls, reaped: u16) {
        match (calls, event_idx) {
            (Calls::Never, false) => self.set_avail_flags(AVAIL_F_NO_INTERRUPT),
            // An event just behind the device is passed again after 65,536 chains only.
            (Calls::Never, true) => self.set_used_event(reaped.wrapping_sub(1)),
            (Calls::Next, false) => self.set_avail_flags(0),
            (Calls::Next, true) => self.set_used_event(reaped),
        }
    }
}

/// Writes a descriptor into a ring's table or an indirect one.
fn write_desc(table: &Window, index: usize, desc: SplitDesc) {
    let at = index * DESC_BYTES;
    table.store_u64(at, desc.addr, Ordering::Relaxed);
    table.store_u32(at + 8, desc.len, Ordering::Relaxed);
    table.store_u16(at + 12, desc.flags, Ordering::Relaxed);
    table.store_u16(at + 14, desc.next, Ordering::Relaxed);
}

/// The driver's side of a split ring. Nothing that the device can change is trusted: links and
/// lengths of chains are remembered in private memory.
#[derive(Debug)]
pub struct SplitDriverRing {
    area: SplitArea,
    options: RingOptions,
    /// One indirect table of `options.indirect` descriptors per descriptor of the ring.
    tables: Option<(u64, Window)>,
    /// Free descriptors, first freed first: with IN_ORDER this is ring order (2.7.9).
    free: VecDeque<u16>,
    /// By head.
    chains: Vec<Option<Chain>>,
    /// The descriptor behind each, while it is in a chain.
    links: Vec<u16>,
    /// Heads in the order of availability; kept for IN_ORDER only.
    order: VecDeque<u16>,
    in_flight: u16,
    next_avail: u16,
    published: u16,
    last_used: u16,
}

impl SplitDriverRing {
    /// An empty ring of `size` entries in `memory`.
    ///
    /// # Errors
    /// A size that is no power of two up to [`MAX_QUEUE_SIZE`], or memory that is full.
    pub fn new(
        memory: &Arc<DriverMemory>,
        size: u16,
        options: RingOptions,
    ) -> Result<Self, RingSetupError> {
        let area = SplitArea::new(memory, size)?;
        Ok(Self {
            tables: indirect_tables(memory, size, options)?,
            area,
            options,
            free: (0..size).collect(),
            chains: vec![None; usize::from(size)],
            links: vec![0; usize::from(size)],
            order: VecDeque::new(),
            in_flight: 0,
            next_avail: 0,
            published: 0,
            last_used: 0,
        })
    }

    /// The ring's memory, for tests that break rules.
    pub fn area(&self) -> &SplitArea {
        &self.area
    }

    /// Where it lies; the base is the index of the first chain that was not reaped.
    pub fn place(&self) -> RingPlace {
        RingPlace {
            base: u32::from(self.last_used),
            ..self.area.place()
        }
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        // At most `size` are in the queue.
        u16::try_from(self.free.len()).unwrap_or(u16::MAX)
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
        let buffers = readable.len() + writable.len();
        let (count, indirect) = self.options.shape(buffers, self.area.size)?;
        let descs = if indirect { 1 } else { count };
        if self.free.len() < usize::from(descs) {
            return Err(AddError::Full);
        }
        let flagged = readable
            .iter()
            .map(|buffer| (buffer, 0))
            .chain(writable.iter().map(|buffer| (buffer, DESC_F_WRITE)));
        let head = self.free[0];
        if let (true, Some((tables, window))) = (indirect, &self.tables) {
            let first = usize::from(head) * usize::from(self.options.indirect);
            for (i, (buffer, flags)) in (0..count).zip(flagged) {
                let more = if i + 1 < count { DESC_F_NEXT } else { 0 };
                let desc = SplitDesc {
                    addr: buffer.addr,
                    len: buffer.len,
                    flags: flags | more,
                    next: if i + 1 < count { i + 1 } else { 0 },
                };
                write_desc(window, first + usize::from(i), desc);
            }
            let desc = SplitDesc {
                addr: tables + (first * DESC_BYTES) as u64,
                len: u32::from(count) * 16,
                flags: DESC_F_INDIRECT,
                next: 0,
            };
            self.area.write_desc(head, desc);
            self.free.pop_front();
        } else {
            for (i, (buffer, flags)) in (0..count).zip(flagged) {
                let Some(index) = self.free.pop_front() else {
                    break;
                };
                let last = i + 1 == count;
                let next = if last { 0 } else { self.free[0] };
                self.links[usize::from(index)] = next;
                let desc = SplitDesc {
                    addr: buffer.addr,
                    len: buffer.len,
                    flags: flags | if last { 0 } else { DESC_F_NEXT },
                    next,
                };
                self.area.write_desc(index, desc);
            }
        }
        self.chains[usize::from(head)] = Some(Chain {
            token,
            descs,
            room: total_len(writable),
        });
        if self.options.in_order {
            self.order.push_back(head);
        }
        self.area
            .set_avail_entry(self.next_avail & (self.area.size - 1), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        Ok(())
    }

    /// See [`super::DriverRing::publish`].
    #[must_use = "a device that wants a kick may sleep for ever without it"]
    pub fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.next_avail);
        if old == self.next_avail {
            return false;
        }
        self.area.set_avail_idx(self.next_avail);
        // Pairs with the device's fence between asking for kicks and its last look at the
        // available index: one of the two sees the other's store.
        fence(Ordering::SeqCst);
        self.area
            .wants_kick(self.options.event_idx, self.next_avail, old)
    }

    /// See [`super::DriverRing::reap`].
    ///
    /// # Errors
    /// The device broke a rule; what it used before that is in `into`.
    pub fn reap(&mut self, into: &mut Vec<Used>) -> Result<usize, DeviceFault> {
        let before = into.len();
        let used_idx = self.area.used_idx();
        let used = used_idx.wrapping_sub(self.last_used);
        let available = self.in_flight;
        if used > available {
            return Err(DeviceFault::UsedIndex { used, available });
        }
        while self.last_used != used_idx {
            let index = self.last_used & (self.area.size - 1);
            let (id, len) = self.area.used_entry(index);
            if self.options.in_order {
                self.take_batch(id, len, used_idx, into)?;
            } else {
                let used = self.take(id)?.used(len)?;
                into.push(used);
            }
        }
        Ok(into.len() - before)
    }

    /// See [`super::DriverRing::set_calls`].
    pub fn set_calls(&mut self, calls: Calls) -> bool {
        self.area
            .request_calls(self.options.event_idx, calls, self.last_used);
        // Pairs with the device's fence between its store of the used index and its look at the
        // event: one of the two sees the other's store.
        fence(Ordering::SeqCst);
        self.area.used_idx() != self.last_used
    }

    /// Takes the chains of one used entry of an in-order device: all up to `id`. The device may
    /// leave out the entries of those before, which are used completely (2.7.9).
    fn take_batch(
        &mut self,
        id: u32,
        len: u32,
        used_idx: u16,
        into: &mut Vec<Used>,
    ) -> Result<(), DeviceFault> {
        let bound = usize::from(used_idx.wrapping_sub(self.last_used));
        let batch = self
            .order
            .iter()
            .take(bound)
            .position(|head| u32::from(*head) == id)
            .ok_or(DeviceFault::UsedId { id })?;
        for _ in 0..batch {
            let head = u32::from(self.order[0]);
            let chain = self.take(head)?;
            self.order.pop_front();
            into.push(chain.used(chain.room)?);
        }
        let chain = self.take(id)?;
        self.order.pop_front();
        into.push(chain.used(len)?);
        Ok(())
    }

    /// Frees the chain with this head.
    fn take(&mut self, id: u32) -> Result<Chain, DeviceFault> {
        let fault = DeviceFault::UsedId { id };
        let head = u16::try_from(id).map_err(|_| fault)?;
        let slot = self.chains.get_mut(usize::from(head)).ok_or(fault)?;
        let chain = slot.take().ok_or(fault)?;
        let mut index = head;
        for _ in 0..chain.descs {
            self.free.push_back(index);
            index = self.links[usize::from(index)];
        }
        self.in_flight -= 1;
        self.last_used = self.last_used.wrapping_add(1);
        Ok(chain)
    }
}

/// Room for one indirect table per descriptor, if the options ask for any.
pub(crate) fn indirect_tables(
    memory: &Arc<DriverMemory>,
    size: u16,
    options: RingOptions,
) -> Result<Option<(u64, Window)>, RingSetupError> {
    if options.indirect == 0 {
        return Ok(None);
    }
    let bytes = u64::from(size) * u64::from(options.indirect) * DESC_BYTES as u64;
    let addr = memory.alloc(bytes, 128)?;
    Ok(Some((addr, memory.window(addr, bytes)?)))
}
