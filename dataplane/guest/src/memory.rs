//! The driver's own memory: files mapped shared, carved into regions at chosen guest addresses.
//!
//! All access goes through [`Window`], a checked range of one region: copies and relaxed or
//! ordered atomics, never a reference to the bytes, because the device on the other side of the
//! mapping reads and writes them at any time.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a page of hugetlbfs (x86-64 and aarch64 with 4 KiB base pages).
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Where one region lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Offset of the region in its file (the back-end's `mmap_offset`); a multiple of the page
    /// size.
    pub file_offset: u64,
}

/// Why driver memory could not be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverMemoryError {
    /// No hugepage is free, or memory is short.
    #[error("can't map {size} bytes of {kind} for region {guest_addr:#x}")]
    Map {
        /// First guest physical address of the region.
        guest_addr: u64,
        /// Bytes wanted.
        size: u64,
        /// Kind of pages.
        kind: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A region of no bytes, or one that wraps or overlaps another.
    #[error("region {layout:x?}: {reason}")]
    Layout {
        /// The region.
        layout: RegionLayout,
        /// What is wrong.
        reason: &'static str,
    },
    /// All regions are full.
    #[error("no region has {len} bytes left")]
    Exhausted {
        /// Bytes wanted.
        len: u64,
    },
    /// The range isn't inside one region.
    #[error("{len} bytes at {addr:#x} are not inside one region")]
    Range {
        /// First guest physical address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

/// One mapped region.
struct Mapping {
    layout: RegionLayout,
    base: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to this value alone and lives until it is dropped; all access
// through it is by copies and atomics, which any thread may make.
unsafe impl Send for Mapping {}
// SAFETY: as above; shared access is the purpose of the mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(layout: RegionLayout, huge: bool) -> Result<Self, DriverMemoryError> {
        let kind = if huge {
            "2 MiB hugepages"
        } else {
            "shared memory"
        };
        let fail = |source: io::Error| DriverMemoryError::Map {
            guest_addr: layout.guest_addr,
            size: layout.size,
            kind,
            source,
        };
        let bad = |reason| DriverMemoryError::Layout { layout, reason };
        let len = usize::try_from(layout.size).map_err(|_| bad("is too large"))?;
        let end = layout
            .file_offset
            .checked_add(layout.size)
            .ok_or_else(|| bad("wraps in its file"))?;
        let flags = if huge {
            MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB
        } else {
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING
        };
        let file = memfd_create("ringway-driver", flags).map_err(|e| fail(e.into()))?;
        ftruncate(&file, end).map_err(|e| fail(e.into()))?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no memory
        // that anyone else owns.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &file,
                layout.file_offset,
            )
        }
        .map_err(|e| fail(e.into()))?;
        let base = NonNull::new(base.cast()).ok_or_else(|| bad("was mapped at address 0"))?;
        Ok(Self {
            layout,
            base,
            len,
            file,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `new`; every Window keeps the
        // memory alive by its Arc, so none is left.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A region as SET_MEM_TABLE and ADD_MEM_REG describe it, with its file.
#[derive(Clone, Copy, Debug)]
pub struct RegionView<'a> {
    /// Where it lies.
    pub layout: RegionLayout,
    /// Its first address in this process; ring addresses are given to back-ends in these terms.
    pub user_addr: u64,
    /// The file behind it.
    pub file: BorrowedFd<'a>,
}

/// Memory of a driver: regions that don't overlap, each with a file of its own, and the
/// allocator over them.
pub struct DriverMemory {
    regions: Vec<Mapping>,
    /// Bytes handed out of each region.
    allocated: Mutex<Vec<u64>>,
}

impl fmt::Debug for DriverMemory {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_list()
            .entries(self.regions.iter().map(|r| r.layout))
            .finish()
    }
}

impl DriverMemory {
    /// Memory of these regions, zeroed.
    ///
    /// # Errors
    /// A region is empty, wraps or overlaps another, or the kernel refuses it (no hugepages).
    pub fn new(layouts: &[RegionLayout], huge: bool) -> Result<Arc<Self>, DriverMemoryError> {
        for (i, layout) in layouts.iter().enumerate() {
            let bad = |reason| DriverMemoryError::Layout {
                layout: *layout,
                reason,
            };
            let end = layout
                .guest_addr
                .checked_add(layout.size)
                .ok_or_else(|| bad("wraps"))?;
            let overlaps = |other: &RegionLayout| {
                layout.guest_addr < other.guest_addr + other.size && other.guest_addr < end
            };
            if layout.size == 0 {
                return Err(bad("has no bytes"));
            }
            if layouts[..i].iter().any(overlaps) {
                return Err(bad("overlaps another"));
            }
        }
        let regions: Vec<Mapping> = layouts
            .iter()
            .map(|layout| Mapping::new(*layout, huge))
            .collect::<Result<_, _>>()?;
        let allocated = Mutex::new(vec![0; regions.len()]);
        Ok(Arc::new(Self { regions, allocated }))
    }

    /// One region of at least `size` bytes at guest address 0x1_0000_0000.
    ///
    /// # Errors
    /// As for [`DriverMemory::new`].
    pub fn single(size: u64, huge: bool) -> Result<Arc<Self>, DriverMemoryError> {
        let page = if huge { HUGE_PAGE_BYTES } else { 4096 };
        let layout = RegionLayout {
            guest_addr: 1 << 32,
            size: size.next_multiple_of(page),
            file_offset: 0,
        };
        Self::new(&[layout], huge)
    }

    /// The regions, in the order given.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = RegionView<'_>> {
        self.regions.iter().map(|region| RegionView {
            layout: region.layout,
            user_addr: region.base.addr().get() as u64,
            file: region.file.as_fd(),
        })
    }

    /// Takes `len` bytes aligned to `align` (a power of two) from the first region that has them,
    /// and returns their guest address. Nothing is ever given back.
    ///
    /// # Errors
    /// No region has that much left.
    pub fn alloc(&self, len: u64, align: u64) -> Result<u64, DriverMemoryError> {
        (0..self.regions.len())
            .find_map(|region| self.alloc_in(region, len, align).ok())
            .ok_or(DriverMemoryError::Exhausted { len })
    }

    /// As [`DriverMemory::alloc`], from the region of this number.
    ///
    /// # Errors
    /// The region does not exist or has not that much left.
    pub fn alloc_in(&self, region: usize, len: u64, align: u64) -> Result<u64, DriverMemoryError> {
        let full = DriverMemoryError::Exhausted { len };
        let Some(mapping) = self.regions.get(region) else {
            return Err(full);
        };
        let mut allocated = self
            .allocated
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let start = (mapping.layout.guest_addr + allocated[region]).next_multiple_of(align);
        let end = (start - mapping.layout.guest_addr).checked_add(len);
        match end {
            Some(end) if end <= mapping.layout.size => {
                allocated[region] = end;
                Ok(start)
            }
            _ => Err(full),
        }
    }

    /// The range as a window for access.
    ///
    /// # Errors
    /// It isn't inside one region.
    pub fn window(self: &Arc<Self>, addr: u64, len: u64) -> Result<Window, DriverMemoryError> {
        let range = DriverMemoryError::Range { addr, len };
        let (region, offset) = self.locate(addr, len).ok_or(range)?;
        // SAFETY: `locate` checked that offset..offset + len lies in the mapping.
        let base = unsafe { self.regions[region].base.add(offset) };
        Ok(Window {
            base,
            len: usize::try_from(len).map_err(|_| DriverMemoryError::Range { addr, len })?,
            _memory: Arc::clone(self),
        })
    }

    /// The address in this process of a guest address; what SET_VRING_ADDR wants.
    ///
    /// # Errors
    /// It is in no region.
    pub fn user_addr(&self, addr: u64) -> Result<u64, DriverMemoryError> {
        let (region, offset) = self
            .locate(addr, 1)
            .ok_or(DriverMemoryError::Range { addr, len: 1 })?;
        Ok((self.regions[region].base.addr().get() + offset) as u64)
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// The range isn't inside one region.
    pub fn write(self: &Arc<Self>, addr: u64, bytes: &[u8]) -> Result<(), DriverMemoryError> {
        self.window(addr, bytes.len() as u64)?.write(0, bytes);
        Ok(())
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// The range isn't inside one region.
    pub fn read(self: &Arc<Self>, addr: u64, bytes: &mut [u8]) -> Result<(), DriverMemoryError> {
        self.window(addr, bytes.len() as u64)?.read(0, bytes);
        Ok(())
    }

    /// Region and offset in it of a range that lies inside one region.
    fn locate(&self, addr: u64, len: u64) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(i, region)| {
            let offset = addr.checked_sub(region.layout.guest_addr)?;
            let end = offset.checked_add(len)?;
            (end <= region.layout.size && offset < region.layout.size)
                .then_some(())
                .and_then(|()| Some((i, usize::try_from(offset).ok()?)))
        })
    }
}

/// A checked range of driver memory that the device sees too.
///
/// The methods panic on an offset outside the window or a misaligned atomic: offsets are the
/// driver's own arithmetic, never the device's word.
#[derive(Clone)]
pub struct Window {
    base: NonNull<u8>,
    len: usize,
    _memory: Arc<DriverMemory>,
}

// SAFETY: the window keeps its mapping alive by the Arc; access is by copies and atomics.
unsafe impl Send for Window {}

impl fmt::Debug for Window {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Window({:p}, {} bytes)", self.base, self.len)
    }
}

impl Window {
    /// Bytes of the window.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a window of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes in at an offset.
    ///
    /// # Panics
    /// They reach past the end.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is private memory, so they can't overlap.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out from an offset.
    ///
    /// # Panics
    /// They reach past the end.
    #[inline]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.at(offset, bytes.len());
        // SAFETY: `at` checked the range; `bytes` is private memory, so they can't overlap.
        unsafe { ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies `len` bytes out of another window, or of another place in this one.
    ///
    /// # Panics
    /// They reach past the end of either.
    #[inline]
    pub fn copy_from(&self, offset: usize, source: &Window, source_offset: usize, len: usize) {
        let to = self.at(offset, len);
        let from = source.at(source_offset, len);
        // SAFETY: `at` checked both ranges; `copy` takes ranges that overlap.
        unsafe { ptr::copy(from, to, len) };
    }

    /// Loads a little-endian word.
    ///
    /// # Panics
    /// The offset is misaligned or reaches past the end.
    #[inline]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let at = self.at_aligned(offset, 2).cast::<u16>();
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU16::from_ptr(at) };
        u16::from_le(word.load(order))
    }

    /// Loads two little-endian double words that follow each other, with one check.
    ///
    /// # Panics
    /// The offset is misaligned or they reach past the end.
    #[inline]
    pub fn load_u32_pair(&self, offset: usize, order: Ordering) -> (u32, u32) {
        let at = self.at(offset, 8).cast::<u32>();
        if !at.is_aligned() {
            misaligned(offset);
        }
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let first = unsafe { AtomicU32::from_ptr(at) };
        // SAFETY: `at` was checked for 8 bytes.
        let behind = unsafe { at.add(1) };
        // SAFETY: as for the first.
        let second = unsafe { AtomicU32::from_ptr(behind) };
        (
            u32::from_le(first.load(order)),
            u32::from_le(second.load(order)),
        )
    }

    /// Stores a little-endian word.
    ///
    /// # Panics
    /// The offset is misaligned or reaches past the end.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        let at = self.at_aligned(offset, 2).cast::<u16>();
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU16::from_ptr(at) };
        word.store(value.to_le(), order);
    }

    /// Loads a little-endian double word.
    ///
    /// # Panics
    /// The offset is misaligned or reaches past the end.
    #[inline]
    pub fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        let at = self.at_aligned(offset, 4).cast::<u32>();
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU32::from_ptr(at) };
        u32::from_le(word.load(order))
    }

    /// Stores a little-endian double word.
    ///
    /// # Panics
    /// The offset is misaligned or reaches past the end.
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        let at = self.at_aligned(offset, 4).cast::<u32>();
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU32::from_ptr(at) };
        word.store(value.to_le(), order);
    }

    /// Loads a little-endian quad word.
    ///
    /// # Panics
    /// The offset is misaligned or reaches past the end.
    #[inline]
    pub fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        let at = self.at_aligned(offset, 8).cast::<u64>();
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU64::from_ptr(at) };
        u64::from_le(word.load(order))
    }

    /// Stores a little-endian quad word.
    ///
    /// # Panics
    /// The offset is misaligned or reaches past the end.
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        let at = self.at_aligned(offset, 8).cast::<u64>();
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU64::from_ptr(at) };
        word.store(value.to_le(), order);
    }

    /// Stores two little-endian quad words that follow each other, with one check: the first
    /// relaxed, the second with release.
    ///
    /// # Panics
    /// The offset is misaligned or they reach past the end.
    #[inline]
    pub fn store_u64_pair(&self, offset: usize, first: u64, second: u64) {
        let at = self.at(offset, 16).cast::<u64>();
        if !at.is_aligned() {
            misaligned(offset);
        }
        // SAFETY: aligned, in the mapping for the window's life, accessed by atomics only.
        let word = unsafe { AtomicU64::from_ptr(at) };
        word.store(first.to_le(), Ordering::Relaxed);
        // SAFETY: `at` was checked for 16 bytes.
        let behind = unsafe { at.add(1) };
        // SAFETY: as for the first.
        let word = unsafe { AtomicU64::from_ptr(behind) };
        word.store(second.to_le(), Ordering::Release);
    }

    #[inline]
    fn at_aligned(&self, offset: usize, size: usize) -> *mut u8 {
        let at = self.at(offset, size);
        if !at.addr().is_multiple_of(size) {
            misaligned(offset);
        }
        at
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        if len > self.len || offset > self.len - len {
            outside(offset, len, self.len);
        }
        // SAFETY: just checked against the window, which lies in one mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

/// Kept out of line: with its message in line, the check would keep the access out of it.
#[cold]
#[inline(never)]
fn outside(offset: usize, len: usize, window: usize) -> ! {
    panic!("{len} bytes at {offset} are outside a window of {window}")
}

#[cold]
#[inline(never)]
fn misaligned(offset: usize) -> ! {
    panic!("misaligned access at offset {offset}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn layout(guest_addr: u64, size: u64) -> RegionLayout {
        RegionLayout {
            guest_addr,
            size,
            file_offset: 0,
        }
    }

    #[test]
    fn what_is_written_at_a_guest_address_is_read_there_and_in_the_file() {
        let with_offset = RegionLayout {
            file_offset: 2 * PAGE,
            ..layout(0x8000_0000, PAGE)
        };
        let memory = DriverMemory::new(&[layout(0, PAGE), with_offset], false).unwrap();
        memory.write(0x8000_0010, b"ring").unwrap();
        let mut back = [0; 4];
        memory.read(0x8000_0010, &mut back).unwrap();
        assert_eq!(&back, b"ring");

        let region = memory.regions().nth(1).unwrap();
        let mut in_file = [0; 4];
        rustix::io::pread(region.file, &mut in_file, 2 * PAGE + 0x10).unwrap();
        assert_eq!(&in_file, b"ring");
        assert_eq!(
            memory.user_addr(0x8000_0010).unwrap(),
            region.user_addr + 0x10
        );
    }

    #[test]
    fn bytes_are_copied_between_windows_and_within_one() {
        let memory = DriverMemory::single(PAGE, false).unwrap();
        let window = |addr, len| memory.window((1u64 << 32) + addr, len).unwrap();
        let (from, to) = (window(0, 8), window(64, 8));
        from.write(0, b"abcdefgh");
        to.copy_from(1, &from, 2, 5);
        to.copy_from(2, &to, 1, 5);
        let mut back = [0; 8];
        to.read(0, &mut back);
        assert_eq!(&back, b"\0ccdefg\0");
    }

    #[test]
    fn ranges_that_leave_their_region_are_refused() {
        let memory = DriverMemory::new(&[layout(0, PAGE), layout(2 * PAGE, PAGE)], false).unwrap();
        assert!(memory.window(PAGE - 1, 1).is_ok());
        assert!(memory.window(PAGE - 1, 2).is_err());
        assert!(memory.window(PAGE, 0).is_err());
        assert!(memory.window(PAGE + 1, 1).is_err());
        assert!(memory.window(u64::MAX, 2).is_err());
    }

    #[test]
    fn regions_that_overlap_wrap_or_are_empty_are_refused() {
        assert!(DriverMemory::new(&[layout(0, 2 * PAGE), layout(PAGE, PAGE)], false).is_err());
        assert!(DriverMemory::new(&[layout(u64::MAX - 1, PAGE)], false).is_err());
        assert!(DriverMemory::new(&[layout(0, 0)], false).is_err());
    }

    #[test]
    fn allocations_are_aligned_disjoint_and_bounded() {
        let memory =
            DriverMemory::new(&[layout(0x1000, PAGE), layout(0x9000, PAGE)], false).unwrap();
        assert_eq!(memory.alloc(3, 1).unwrap(), 0x1000);
        assert_eq!(memory.alloc(8, 16).unwrap(), 0x1010);
        assert_eq!(memory.alloc(PAGE, 16).unwrap(), 0x9000);
        assert!(memory.alloc(PAGE, 16).is_err());
        assert_eq!(memory.alloc_in(0, 1, 1).unwrap(), 0x1018);
        assert!(memory.alloc_in(1, 1, 1).is_err());
    }

    #[test]
    #[should_panic(expected = "outside a window")]
    fn a_window_does_not_reach_past_its_end() {
        let memory = DriverMemory::single(PAGE, false).unwrap();
        let window = memory.window(1 << 32, 16).unwrap();
        window.store_u16(16, 1, Ordering::Relaxed);
    }
}
