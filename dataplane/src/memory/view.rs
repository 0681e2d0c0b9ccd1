//! Translation of guest addresses.

use std::cell::Cell;
use std::sync::Arc;

use super::{GuestMemory, GuestSlice, RegionHint};

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
            // SAFETY: the region is one of `memory`, which the hint and all that it finds is kept
            // with.
            let hint = unsafe { RegionHint::new(spec.guest_addr, spec.size, region.host) };
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
