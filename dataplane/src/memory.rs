//! Guest memory: regions mapped from the front-end's files.

use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Where a region lies, as SET_MEM_TABLE and ADD_MEM_REG describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// First address in the front-end's own address space; ring addresses are given in it.
    pub user_addr: u64,
    /// Offset of the region in its file.
    pub mmap_offset: u64,
}

/// Why guest memory was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The specification contradicts itself.
    #[error("memory region {spec:x?}: {reason}")]
    BadSpec {
        /// The region.
        spec: RegionSpec,
        /// What is wrong.
        reason: &'static str,
    },
    /// The kernel refused the mapping.
    #[error("can't map memory region {spec:x?}: {source}")]
    Map {
        /// The region.
        spec: RegionSpec,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// One mapped region; unmapped when the last owner drops it.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
}

impl Region {
    /// Maps a region of the file behind `file`.
    ///
    /// # Errors
    /// Size zero, addresses that wrap, a file that is too short, or mmap's refusal.
    pub fn map(spec: RegionSpec, file: OwnedFd) -> Result<Arc<Self>, MemoryError> {
        let _ = file;
        Ok(Arc::new(Self { spec }))
    }

    /// Where it lies.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }
}

/// A guest's memory: regions that do not overlap.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Memory of these regions, in any order.
    ///
    /// # Errors
    /// Two regions overlap in guest or front-end addresses.
    pub fn new(regions: Vec<Arc<Region>>) -> Result<Self, MemoryError> {
        Ok(Self { regions })
    }

    /// Its regions.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }
}
