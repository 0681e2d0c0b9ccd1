//! How a virtqueue is laid out, and where one lies in a guest's memory.

use std::sync::Arc;

use crate::memory::GuestMemory;
use crate::wire::Features;

/// How a virtqueue is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingLayout {
    /// Descriptor table, avail ring, used ring (virtio 1.3, 2.7).
    Split,
    /// One descriptor ring and two event suppression structures (2.8).
    Packed,
}

/// Addresses of a ring's three areas, in the front-end's address space (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    /// Descriptor table (split) or descriptor ring (packed).
    pub(crate) desc: u64,
    /// Available ring (split) or driver event suppression (packed).
    pub(crate) avail: u64,
    /// Used ring (split) or device event suppression (packed).
    pub(crate) used: u64,
}

/// Why a ring can't lie where the front-end wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PlaceError {
    /// A size that no ring of this layout can have.
    #[error("it can't have {size} entries")]
    Size { size: u16 },
    /// An area that is not wholly in one region of memory.
    #[error("its {area} at {address:#x} is not inside one region of guest memory")]
    Absent { area: &'static str, address: u64 },
    /// An area that is in memory but for its event field, the last of its fields.
    #[error("its {area} at {address:#x} has no room for the event field")]
    NoEventField { area: &'static str, address: u64 },
    /// An area whose address is no multiple of what the layout demands.
    #[error("its {area} at {address:#x} is not aligned as virtio 1.3, 2.7 and 2.8.10.1 demand")]
    Misaligned { area: &'static str, address: u64 },
}

/// Host addresses of a ring's three areas.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Areas {
    /// Descriptor table or ring.
    pub(crate) desc: *mut u8,
    /// Avail ring, or driver event suppression.
    pub(crate) driver: *mut u8,
    /// Used ring, or device event suppression.
    pub(crate) device: *mut u8,
}

// SAFETY: the pointers are used by whoever has the ring that they are of, and the guest's accesses
// are met with atomics and volatile reads.
unsafe impl Send for Areas {}

/// Areas that were found to lie in a guest's memory, aligned and long enough for a ring of this
/// layout and size. [`RingLayout::place`] alone makes them.
#[derive(Debug)]
pub(crate) struct PlacedAreas {
    pub(super) layout: RingLayout,
    pub(super) size: u16,
    pub(super) addresses: RingAddresses,
    pub(super) at: Areas,
    pub(super) memory: Arc<GuestMemory>,
}

impl PlacedAreas {
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn addresses(&self) -> RingAddresses {
        self.addresses
    }
}

impl RingLayout {
    /// The layout that goes with these features.
    pub(crate) fn of(features: Features) -> Self {
        if features.contains(Features::VIRTIO_F_RING_PACKED) {
            Self::Packed
        } else {
            Self::Split
        }
    }

    /// Whether a ring can have so many entries (2.7, 2.8.10.1).
    pub(crate) fn allows(self, size: u16) -> bool {
        let most = 32_768;
        match self {
            Self::Split => size.is_power_of_two() && size <= most,
            Self::Packed => (1..=most).contains(&size),
        }
    }

    /// Where a ring of `size` entries lies in `memory`.
    ///
    /// # Errors
    /// The first rule that size or addresses break.
    pub(crate) fn place(
        self,
        size: u16,
        addresses: RingAddresses,
        memory: &Arc<GuestMemory>,
    ) -> Result<PlacedAreas, PlaceError> {
        if !self.allows(size) {
            return Err(PlaceError::Size { size });
        }
        let find = |area, address, (bytes, event_bytes, align): (u64, u64, usize)| {
            let entries = memory.translate_user(address, bytes);
            let host = entries.ok_or(PlaceError::Absent { area, address })?;
            if memory
                .translate_user(address, bytes + event_bytes)
                .is_none()
            {
                return Err(PlaceError::NoEventField { area, address });
            }
            if host.addr().is_multiple_of(align) {
                Ok(host)
            } else {
                Err(PlaceError::Misaligned { area, address })
            }
        };
        let [desc, driver, device] = self.areas(size);
        let at = Areas {
            desc: find("descriptor area", addresses.desc, desc)?,
            driver: find("driver area", addresses.avail, driver)?,
            device: find("device area", addresses.used, device)?,
        };
        Ok(PlacedAreas {
            layout: self,
            size,
            addresses,
            at,
            memory: Arc::clone(memory),
        })
    }

    /// Bytes of each area of a ring of `size`, of the event field behind them, and the alignment:
    /// descriptors, driver's, device's. The event field is there even if EVENT_IDX was not
    /// negotiated (2.7.6, 2.7.8).
    fn areas(self, size: u16) -> [(u64, u64, usize); 3] {
        let size = u64::from(size);
        match self {
            Self::Split => [
                (16 * size, 0, 16),
                (4 + 2 * size, 2, 2),
                (4 + 8 * size, 2, 4),
            ],
            Self::Packed => [(16 * size, 0, 16), (4, 0, 4), (4, 0, 4)],
        }
    }

    /// Where a fresh ring begins, in the form of SET_VRING_BASE.
    pub(crate) fn first_base(self) -> u32 {
        match self {
            Self::Split => 0,
            Self::Packed => 0x8000_8000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Region, RegionSpec};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    const USER: u64 = 1 << 40;
    const BYTES: u64 = 0x1_0000;

    /// Two regions that do not adjoin in the front-end's addresses.
    fn memory() -> Arc<GuestMemory> {
        let region = |slot: u64| {
            let file = memfd_create("layout-test", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, BYTES).unwrap();
            let spec = RegionSpec {
                guest_addr: slot * BYTES,
                size: BYTES,
                user_addr: USER + 2 * slot * BYTES,
                mmap_offset: 0,
            };
            Region::map(spec, file).unwrap()
        };
        Arc::new(GuestMemory::new(vec![region(0), region(1)]).unwrap())
    }

    /// Each area may end with its region, and not two bytes later.
    #[test]
    fn an_area_is_in_one_region_to_its_last_byte() {
        let memory = memory();
        let end = USER + BYTES;
        for (layout, lens) in [
            (RingLayout::Split, [16 * 64, 6 + 2 * 64, 6 + 8 * 64]),
            (RingLayout::Packed, [16 * 64, 4, 4]),
        ] {
            for (area, len) in lens.into_iter().enumerate() {
                let place = |address| {
                    let mut at = [USER; 3];
                    at[area] = address;
                    let [desc, avail, used] = at;
                    let addresses = RingAddresses { desc, avail, used };
                    layout.place(64, addresses, &memory).map(|_| ())
                };
                let fits = place(end - len);
                // A used ring can't end with its region and be aligned.
                let is_misaligned = matches!(fits, Err(PlaceError::Misaligned { .. }));
                assert!(fits.is_ok() || len == 6 + 8 * 64 && is_misaligned);
                let beyond = place(end - len + 2);
                let lacks_event = matches!(beyond, Err(PlaceError::NoEventField { .. }));
                assert_eq!(lacks_event, layout == RingLayout::Split && area > 0);
                assert!(lacks_event || matches!(beyond, Err(PlaceError::Absent { .. })));
                assert!(matches!(place(end), Err(PlaceError::Absent { .. })));
            }
        }
    }

    #[test]
    fn an_area_is_aligned() {
        let memory = memory();
        for (area, align) in [16, 2, 4].into_iter().enumerate() {
            let mut at = [USER; 3];
            at[area] += align / 2;
            let [desc, avail, used] = at;
            let addresses = RingAddresses { desc, avail, used };
            let error = RingLayout::Split.place(64, addresses, &memory).unwrap_err();
            assert!(matches!(error, PlaceError::Misaligned { .. }), "{error}");
        }
    }

    #[test]
    fn a_split_ring_has_a_power_of_two_of_entries_and_a_packed_one_any_number() {
        let memory = memory();
        let (desc, avail, used) = (USER, USER + BYTES / 4, USER + BYTES / 2);
        let place = |layout: RingLayout, size| {
            let placed = layout.place(size, RingAddresses { desc, avail, used }, &memory);
            placed.map(|placed| placed.size)
        };
        for size in [0, 3, 32769] {
            assert_eq!(
                place(RingLayout::Split, size),
                Err(PlaceError::Size { size })
            );
        }
        assert_eq!(place(RingLayout::Split, 4), Ok(4));
        assert_eq!(place(RingLayout::Packed, 3), Ok(3));
        assert!(matches!(
            place(RingLayout::Packed, 0),
            Err(PlaceError::Size { size: 0 })
        ));
    }
}
