//! Guest memory: regions mapped from the front-end's files, and the one way to reach into them.
//!
//! The contract, on which every `unsafe` block of the data path rests:
//! - A guest address becomes a [`GuestSlice`] only through [`MemoryView::translate`] and its hint
//!   (a ring's areas through [`GuestMemory::translate_user`]), which check the *whole* range
//!   against the regions and yield slices that each lie in one mapping.
//! - A slice borrows the view, so it can't outlive the mapping; a ring's areas are kept by the
//!   [`Arc<GuestMemory>`] beside them, which is replaced under the queue's lock.
//! - No Rust reference to the bytes of guest memory is ever formed, since the guest writes them at
//!   any time: raw copies, volatile reads, and atomics for the words of a ring.
//! - A file that shrinks under its mapping raises SIGBUS; [`sigbus`] replaces the page by private
//!   zeros and marks the region broken, and the port goes down.
#![allow(unsafe_code, reason = "it owns pointers into guest memory")]

mod allowance;
mod copy;
mod iovec;
mod kept;
mod pieces;
mod sigbus;
mod slice;
mod sum;
mod view;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vm_memory::{FileOffset, MmapRegion};

pub(crate) use iovec::IoVecs;
pub(crate) use kept::{Hold, Kept, List};
pub(crate) use pieces::{PieceRun, Pieces};
pub(crate) use sigbus::breaks;
pub(crate) use slice::{GuestSlice, HEAD_BYTES, HEAD_LEN, RegionHint};
pub(crate) use sum::{fold, sum_of};
pub(crate) use view::MemoryView;

/// Most regions of one guest, which GET_MAX_MEM_SLOTS tells: as many as libvhost-user takes, and
/// QEMU's DIMM slots (256) with room to spare.
pub(crate) const MAX_REGIONS: usize = 509;

/// Where a region lies, as SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// First guest physical address.
    pub(crate) guest_addr: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// First address in the front-end's own address space; ring addresses are given in it.
    pub(crate) user_addr: u64,
    /// Offset of the region in its file.
    pub(crate) mmap_offset: u64,
}

impl RegionSpec {
    /// Whether it can be a region at all.
    fn check(self) -> Result<(), MemoryError> {
        let bad = |reason| MemoryError::BadSpec { spec: self, reason };
        if self.size == 0 {
            return Err(bad("it is empty"));
        }
        for first in [self.guest_addr, self.user_addr, self.mmap_offset] {
            first
                .checked_add(self.size)
                .ok_or_else(|| bad("address and size wrap"))?;
        }
        Ok(())
    }
}

/// Makes sure, before any of them is mapped, that regions are ones and not more than a guest may have.
///
/// # Errors
/// Size zero, addresses that wrap, too much of all together, or too many while others have many.
pub(crate) fn check_regions(specs: impl Iterator<Item = RegionSpec>) -> Result<(), MemoryError> {
    let (mut bytes, mut count) = (0_u64, 0);
    for spec in specs {
        spec.check()?;
        bytes = bytes.saturating_add(spec.size);
        count += 1;
    }
    let most = allowance::regions_of_port(sigbus::mapped());
    // More than [`MAX_REGIONS`] is refused in any case.
    if count > most && count <= MAX_REGIONS {
        return Err(MemoryError::Crowded { count, most });
    }
    let limit = allowance::of_port(sysconf(libc::_SC_PHYS_PAGES) * sysconf(libc::_SC_PAGESIZE));
    if bytes > limit {
        let (gib, limit_gib) = (bytes >> 30, limit >> 30);
        return Err(MemoryError::TooMuch { gib, limit_gib });
    }
    Ok(())
}

/// A number that the system tells of itself, 0 if it doesn't.
fn sysconf(name: libc::c_int) -> u64 {
    // SAFETY: sysconf has no preconditions. (rustix asks the auxiliary vector, which valgrind
    // does not show to static readers.)
    let value = unsafe { libc::sysconf(name) };
    u64::try_from(value).unwrap_or(0)
}

/// Why guest memory was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum MemoryError {
    /// The specification contradicts itself, its file or another region.
    #[error("memory region {spec:x?}: {reason}")]
    BadSpec {
        /// The region.
        spec: RegionSpec,
        /// What is wrong.
        reason: &'static str,
    },
    /// More than a guest may have.
    #[error(
        "the guest's memory has {gib} GiB, more than the {limit_gib} GiB that a port may map on this host"
    )]
    TooMuch {
        /// GiB of all its regions.
        gib: u64,
        /// GiB that a port may map.
        limit_gib: u64,
    },
    /// The kernel refused the mapping.
    #[error("can't map memory region {spec:x?}: {reason}")]
    Map {
        /// The region.
        spec: RegionSpec,
        /// The kernel's answer.
        reason: String,
    },
    /// More than a port may have while all ports together have many.
    #[error(
        "{count} memory regions are more than {most}, as many as are left for a port beside others"
    )]
    Crowded {
        /// How many.
        count: usize,
        /// How many it may have now.
        most: usize,
    },
    /// More than [`MAX_REGIONS`].
    #[error("{count} memory regions are more than {MAX_REGIONS}")]
    TooMany {
        /// How many.
        count: usize,
    },
}

/// One mapped region; unmapped when the last owner drops it.
#[derive(Debug)]
pub(crate) struct Region {
    spec: RegionSpec,
    /// Host address of the region's first byte.
    host: *mut u8,
    // Fields drop in order: the guard forgets the address range before it is unmapped.
    guard: sigbus::Guard,
    _mapping: MmapRegion,
    _share: allowance::Share,
}

// SAFETY: `host` points into `_mapping`, which lives and dies with the region and is the same in
// every thread; access through it follows the module's contract.
unsafe impl Send for Region {}
// SAFETY: as above; the type gives out raw pointers only.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a region of the file behind `file`.
    ///
    /// # Errors
    /// Size zero, addresses that wrap, a file that is no shared memory or too short, no room for it among
    /// what all ports map, or mmap's refusal.
    pub(crate) fn map(spec: RegionSpec, file: OwnedFd) -> Result<Arc<Self>, MemoryError> {
        spec.check()?;
        let bad = |reason| MemoryError::BadSpec { spec, reason };
        // Before anything that could ask a file system, which might never answer.
        if !is_shared_memory(file.as_fd()) {
            return Err(bad(
                "its file is no shared memory (a memfd, or a file of tmpfs or hugetlbfs)",
            ));
        }
        let map_error = |reason: io::Error| MemoryError::Map {
            spec,
            reason: reason.to_string(),
        };
        let stat = rustix::fs::fstat(file.as_fd()).map_err(|e| map_error(e.into()))?;
        let file_size = u64::try_from(stat.st_size).unwrap_or(0);
        if spec.mmap_offset + spec.size > file_size {
            return Err(bad("it ends behind its file"));
        }
        // mmap wants an offset, and for hugetlbfs a length too, in whole pages of the file; regions
        // of guests with hugepages start anywhere (the hole below 1 MiB splits the first page).
        let page = page_size(&file, &stat).map_err(map_error)?;
        let lead = spec.mmap_offset % page;
        let length = (lead + spec.size)
            .checked_next_multiple_of(page)
            .and_then(|length| usize::try_from(length).ok())
            .ok_or_else(|| bad("it does not fit the address space"))?;
        let lead_bytes = usize::try_from(lead).map_err(|_| bad("its page is too large"))?;
        let share = allowance::MAPPED
            .take(u64::try_from(length).unwrap_or(u64::MAX))
            .ok_or_else(|| bad("all ports together may map 64 TiB"))?;
        let mapping = MmapRegion::build(
            Some(FileOffset::new(File::from(file), spec.mmap_offset - lead)),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|error| MemoryError::Map {
            spec,
            reason: error.to_string(),
        })?;
        let range = sigbus::Range {
            start: mapping.as_ptr().addr(),
            len: length,
            page: usize::try_from(page).map_err(|_| bad("its page is too large"))?,
        };
        let guard = sigbus::Guard::new(range).ok_or_else(|| bad("too many regions are mapped"))?;
        let host = mapping.as_ptr().wrapping_add(lead_bytes);
        Ok(Arc::new(Self {
            spec,
            host,
            guard,
            _mapping: mapping,
            _share: share,
        }))
    }

    /// Where it lies.
    pub(crate) fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// Its file was cut off under the mapping: what it holds now is not the guest's memory.
    pub(crate) fn is_broken(&self) -> bool {
        self.guard.is_broken()
    }
}

/// Whether a file is of tmpfs (as memfds are) or hugetlbfs: whether it has seals, which no others
/// have. To ask for them asks no file system.
pub(crate) fn is_shared_memory(file: BorrowedFd<'_>) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok()
}

/// The page size of a mapping of `file`: hugetlbfs tells its own as the block size.
fn page_size(file: &OwnedFd, stat: &rustix::fs::Stat) -> io::Result<u64> {
    const HUGETLBFS_MAGIC: i128 = 0x9584_58f6;
    let base = sysconf(libc::_SC_PAGESIZE).max(1);
    let is_huge = i128::from(rustix::fs::fstatfs(file.as_fd())?.f_type) == HUGETLBFS_MAGIC;
    let block = u64::try_from(stat.st_blksize).unwrap_or(base);
    Ok(if is_huge { block.max(base) } else { base })
}

/// A guest's memory: regions that do not overlap.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    /// Sorted by guest address.
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Memory of these regions, in any order.
    ///
    /// # Errors
    /// More than [`MAX_REGIONS`], or two that overlap in guest or front-end addresses.
    pub(crate) fn new(mut regions: Vec<Arc<Region>>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany {
                count: regions.len(),
            });
        }
        for address in [
            |spec: &RegionSpec| spec.user_addr,
            |spec: &RegionSpec| spec.guest_addr,
        ] {
            regions.sort_by_key(|region| address(&region.spec));
            for pair in regions.windows(2) {
                if let [low, high] = pair
                    && address(&low.spec) + low.spec.size > address(&high.spec)
                {
                    return Err(MemoryError::BadSpec {
                        spec: high.spec,
                        reason: "it overlaps another region",
                    });
                }
            }
        }
        Ok(Self { regions })
    }

    /// Its regions, by guest address.
    pub(crate) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Bytes of all regions.
    pub(crate) fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.spec.size).sum()
    }

    /// Whether a region's file was cut off (see [`sigbus`]).
    pub(crate) fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.is_broken())
    }

    /// The region in which a guest address lies.
    fn region_of(&self, addr: u64) -> Option<&Region> {
        let behind = self.regions.partition_point(|r| r.spec.guest_addr <= addr);
        let region = self.regions.get(behind.checked_sub(1)?)?;
        (addr - region.spec.guest_addr < region.spec.size).then_some(region)
    }

    /// The host address of the front-end's range `addr..addr + len`, if it lies in one region:
    /// how ring areas are given (SET_VRING_ADDR).
    pub(crate) fn translate_user(&self, addr: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|region| {
            let offset = addr.checked_sub(region.spec.user_addr)?;
            let room = region.spec.size.checked_sub(offset)?;
            if len > room {
                return None;
            }
            Some(region.host.wrapping_add(offset_in_host(offset)?))
        })
    }
}

/// An offset within a region as a host offset; regions are mapped, so it fits.
#[inline]
fn offset_in_host(offset: u64) -> Option<usize> {
    usize::try_from(offset).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const MIB: u64 = 1 << 20;

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }

    fn region(guest_addr: u64, size: u64) -> Arc<Region> {
        let spec = RegionSpec {
            guest_addr,
            size,
            user_addr: guest_addr + (1 << 40),
            mmap_offset: 0,
        };
        Region::map(spec, memfd(size)).unwrap()
    }

    fn of(regions: Vec<Arc<Region>>) -> Arc<GuestMemory> {
        Arc::new(GuestMemory::new(regions).unwrap())
    }

    fn pieces(memory: &Arc<GuestMemory>, addr: u64, len: u32) -> Option<Vec<u32>> {
        let mut lens = Vec::new();
        MemoryView::new(Arc::clone(memory)).translate(addr, len, |slice| {
            lens.push(slice.len());
            true
        })?;
        Some(lens)
    }

    // CVE-2018-1059: the whole range counts, not its first byte.
    #[test]
    fn a_range_that_leaves_its_region_is_refused() {
        let memory = of(vec![region(0, MIB), region(2 * MIB, MIB)]);
        assert_eq!(pieces(&memory, MIB - 1, 1), Some(vec![1]));
        assert_eq!(pieces(&memory, MIB - 1, 4096), None);
        assert_eq!(pieces(&memory, MIB, 1), None);
        assert_eq!(pieces(&memory, 3 * MIB - 4, 4), Some(vec![4]));
        assert_eq!(pieces(&memory, 3 * MIB - 4, 5), None);
        assert_eq!(pieces(&memory, u64::MAX, 2), None);
        assert_eq!(pieces(&memory, u64::MAX - 1, u32::MAX), None);
    }

    #[test]
    fn a_range_over_adjoining_regions_comes_in_pieces() {
        let memory = of(vec![region(MIB, MIB), region(0, MIB), region(2 * MIB, MIB)]);
        assert_eq!(pieces(&memory, MIB - 10, 30), Some(vec![10, 20]));
        let two_mib = u32::try_from(2 * MIB).unwrap();
        let one_mib = two_mib / 2;
        assert_eq!(
            pieces(&memory, MIB / 2, two_mib),
            Some(vec![one_mib / 2, one_mib, one_mib / 2])
        );
    }

    #[test]
    fn a_full_list_of_pieces_is_an_error_not_an_overrun() {
        let view = MemoryView::new(of(vec![region(0, MIB)]));
        assert!(view.translate(0, 1, |_| false).is_none());
    }

    #[test]
    fn ring_areas_lie_in_one_region() {
        let memory = GuestMemory::new(vec![region(0, MIB), region(MIB, MIB)]).unwrap();
        let user = 1 << 40;
        assert!(memory.translate_user(user, MIB).is_some());
        assert!(memory.translate_user(user + MIB - 8, 16).is_none());
        assert!(memory.translate_user(user - 1, 1).is_none());
        assert!(memory.translate_user(user + MIB, u64::MAX).is_none());
    }

    #[test]
    fn regions_that_overlap_wrap_or_end_behind_their_file_are_refused() {
        assert!(GuestMemory::new(vec![region(0, MIB), region(MIB - 1, MIB)]).is_err());
        let spec = RegionSpec {
            guest_addr: 0,
            size: MIB,
            user_addr: 0,
            mmap_offset: 0,
        };
        let map = |spec, bytes| Region::map(spec, memfd(bytes));
        assert!(map(RegionSpec { size: 0, ..spec }, MIB).is_err());
        assert!(
            map(
                RegionSpec {
                    guest_addr: u64::MAX - 5,
                    ..spec
                },
                MIB
            )
            .is_err()
        );
        assert!(
            map(
                RegionSpec {
                    user_addr: u64::MAX - 5,
                    ..spec
                },
                MIB
            )
            .is_err()
        );
        assert!(
            map(
                RegionSpec {
                    mmap_offset: u64::MAX - 5,
                    ..spec
                },
                MIB
            )
            .is_err()
        );
        assert!(map(spec, MIB - 1).is_err());
        assert!(
            map(
                RegionSpec {
                    mmap_offset: 4096,
                    ..spec
                },
                MIB
            )
            .is_err()
        );
        assert!(map(spec, MIB).is_ok());
    }

    #[test]
    fn an_offset_within_a_page_is_honoured() {
        let fd = memfd(2 * MIB);
        rustix::io::pwrite(&fd, b"here", 12345).unwrap();
        let spec = RegionSpec {
            guest_addr: 0,
            size: 4096,
            user_addr: 0,
            mmap_offset: 12345,
        };
        let region = Region::map(spec, fd).unwrap();
        let mut bytes = [0; 4];
        MemoryView::new(of(vec![region]))
            .translate(0, 4, |slice| slice.read(&mut bytes) == 4)
            .unwrap();
        assert_eq!(&bytes, b"here");
    }

    /// A megabyte of a file, at guest address 0.
    fn mapped(fd: OwnedFd) -> Arc<GuestMemory> {
        let spec = RegionSpec {
            guest_addr: 0,
            size: MIB,
            user_addr: 0,
            mmap_offset: 0,
        };
        of(vec![Region::map(spec, fd).unwrap()])
    }

    // CVE-2026-86561: a front-end that truncates its file breaks its own memory only.
    #[test]
    fn a_file_cut_off_under_its_mapping_breaks_the_region_not_the_process() {
        let fd = memfd(MIB);
        let keep = fd.try_clone().unwrap();
        let memory = mapped(fd);
        ftruncate(&keep, 0).unwrap();
        assert!(!memory.is_broken());
        let before = breaks();
        let mut value = [1];
        // A fault is repaired by the handler.
        MemoryView::new(Arc::clone(&memory))
            .translate(4096, 1, |slice| slice.read(&mut value) == 1)
            .unwrap();
        assert_eq!(value, [0]);
        assert!(memory.is_broken());
        assert!(breaks() > before);
    }

    /// What the file still holds stays the guest's.
    #[test]
    fn only_the_page_behind_the_files_end_is_replaced() {
        let fd = memfd(MIB);
        rustix::io::pwrite(&fd, b"kept", 0).unwrap();
        rustix::io::pwrite(&fd, b"lost", 4096).unwrap();
        let keep = fd.try_clone().unwrap();
        let memory = mapped(fd);
        let read = |addr| {
            let mut bytes = [1; 4];
            MemoryView::new(Arc::clone(&memory))
                .translate(addr, 4, |slice| slice.read(&mut bytes) == 4)
                .unwrap();
            bytes
        };
        ftruncate(&keep, 4096).unwrap();
        assert_eq!(read(4096), [0; 4]);
        assert!(memory.is_broken());
        assert_eq!(&read(0), b"kept");
        rustix::io::pwrite(&keep, b"new ", 0).unwrap();
        assert_eq!(&read(0), b"new ", "it is still the file's");
        ftruncate(&keep, MIB).unwrap();
        rustix::io::pwrite(&keep, b"back", 8192).unwrap();
        assert_eq!(read(4096), [0; 4]);
        assert_eq!(&read(8192), b"back");
    }

    /// Where the host has no huge page left, the first access raises SIGBUS as well, and no part of a
    /// huge page can be replaced.
    #[test]
    fn a_huge_page_is_replaced_whole() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let Ok(fd) = memfd_create("huge", flags) else {
            return; // A kernel without hugetlbfs.
        };
        ftruncate(&fd, 8 * MIB).unwrap();
        let keep = fd.try_clone().unwrap();
        let spec = RegionSpec {
            guest_addr: 0,
            size: 6 * MIB,
            user_addr: 0,
            mmap_offset: MIB,
        };
        let memory = of(vec![Region::map(spec, fd).unwrap()]);
        ftruncate(&keep, 0).unwrap();
        let mut value = [1];
        MemoryView::new(Arc::clone(&memory))
            .translate(3 * MIB + 4097, 1, |slice| slice.read(&mut value) == 1)
            .unwrap();
        assert_eq!(value, [0]);
        assert!(memory.is_broken());
    }
}
