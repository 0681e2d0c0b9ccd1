//! Translation of guest addresses.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;

use super::{GuestMemory, GuestSlice, offset_in_host};

/// The region that served a translation last, apart from the list of regions, so that the next look-up
/// follows no pointer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RegionHint<'m> {
    guest_addr: u64,
    size: u64,
    host: *mut u8,
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> RegionHint<'m> {
    /// No region: finds nothing.
    const NONE: Self = Self {
        guest_addr: 0,
        size: 0,
        host: std::ptr::null_mut(),
        memory: PhantomData,
    };

    /// The range, if it lies wholly in this region.
    #[inline(always)]
    pub(crate) fn find(&self, addr: u64, len: u32) -> Option<GuestSlice<'m>> {
        let offset = addr.wrapping_sub(self.guest_addr);
        // The second comparison can't underflow, as the first comes before it.
        if offset < self.size && u64::from(len) <= self.size - offset {
            let ptr = self.host.wrapping_add(offset_in_host(offset)?);
            // SAFETY: the whole range lies in the region, which the memory keeps mapped during 'm.
            return Some(unsafe { GuestSlice::new(ptr, len) });
        }
        None
    }
}

/// A guest's memory as one ring's owner sees it: translates, and remembers the region that served
/// last.
#[derive(Debug)]
pub(crate) struct MemoryView {
    memory: Arc<GuestMemory>,
    // Always a region of `memory`, so that its lifetime is that of a borrow of the view.
    hint: Cell<RegionHint<'static>>,
}

// SAFETY: the hint's pointer leads into a region of `memory`, which is Send.
unsafe impl Send for MemoryView {}

impl MemoryView {
    pub(crate) fn new(memory: Arc<GuestMemory>) -> Self {
        Self {
            memory,
            hint: Cell::new(RegionHint::NONE),
        }
    }

    /// Whether a region's file was cut off (see [`super::sigbus`]).
    pub(crate) fn is_broken(&self) -> bool {
        self.memory.is_broken()
    }

    /// The region that served last.
    #[inline(always)]
    pub(crate) fn hint(&self) -> RegionHint<'_> {
        self.hint.get()
    }

    /// The slices of the guest's range `addr..addr + len`, given to `piece` in order: several where
    /// the range crosses from one region into an adjoining one.
    ///
    /// Returns `None`, after any number of slices, if the range is not wholly guest memory or
    /// `piece` has no room (returns false).
    #[inline]
    pub(crate) fn translate<'m>(
        &'m self,
        addr: u64,
        len: u32,
        mut piece: impl FnMut(GuestSlice<'m>) -> bool,
    ) -> Option<()> {
        match self.hint().find(addr, len) {
            Some(slice) => piece(slice).then_some(()),
            None => self.translate_slow(addr, len, &mut piece),
        }
    }

    #[cold]
    fn translate_slow<'m>(
        &'m self,
        mut addr: u64,
        mut len: u32,
        piece: &mut dyn FnMut(GuestSlice<'m>) -> bool,
    ) -> Option<()> {
        loop {
            let region = self.memory.region_of(addr)?;
            let spec = region.spec;
            let room = spec.size - (addr - spec.guest_addr);
            let part = u32::try_from(room).map_or(len, |room| room.min(len));
            let hint = RegionHint {
                guest_addr: spec.guest_addr,
                size: spec.size,
                host: region.host,
                memory: PhantomData,
            };
            if !piece(hint.find(addr, part)?) {
                return None;
            }
            self.hint.set(hint);
            len -= part;
            if len == 0 {
                return Some(());
            }
            addr = addr.checked_add(u64::from(part))?;
        }
    }
}
