//! Taking a burst of frames from a guest's transmit ring.

use ringway_bridge::MAX_BURST;

use super::chain::prefetch;
use super::{DeviceRing, Direction, RingFault};
use crate::burst::Burst;
use crate::isa::for_this_cpu;

for_this_cpu! {
    /// Takes up to `max` chains into `burst`. A chain that breaks the rules ends the burst before
    /// it and is the error; the frames before it are good.
    ///
    /// # Errors
    /// The rule that the guest broke.
    pub(super) fn gather<R: DeviceRing>(
        ring: &mut R,
        max: usize,
        burst: &mut Burst,
    ) -> Result<(), RingFault> = gather_burst;
}

#[inline(always)]
fn gather_burst<R: DeviceRing>(
    ring: &mut R,
    max: usize,
    burst: &mut Burst,
) -> Result<(), RingFault> {
    debug_assert!(max <= MAX_BURST && burst.len() == 0);
    let available = ring.available()?;
    // How many chains may be taken: each further descriptor of one is a chain less.
    let mut most = usize::from(available);
    let mut taken = 0;
    while taken < most.min(max) {
        let spare = burst.spare();
        let wanted = (most.min(max) - taken).min(spare.len());
        let singles = ring.singles(Direction::FromGuest, &mut spare[..wanted]);
        burst.added(singles);
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_BURST")]
        ring.take(singles as u16);
        taken += singles;
        if singles < wanted {
            let Some(slots) = gather_chain(ring, most - taken, burst)? else {
                break;
            };
            most -= usize::from(slots) - 1;
            taken += 1;
        }
    }
    Ok(())
}

/// Takes the next chain, of at most `limit` descriptors of the ring, and returns of how many it
/// is; `None` if there is no chain or no room for it in the burst.
#[cold]
fn gather_chain<R: DeviceRing>(
    ring: &mut R,
    limit: usize,
    burst: &mut Burst,
) -> Result<Option<u16>, RingFault> {
    let Some(mark) = burst.begin() else {
        return Ok(None);
    };
    let found = ring.chain(ring.place(), limit, Direction::FromGuest, |segment| {
        prefetch(segment, Direction::FromGuest);
        burst.push(mark, segment)
    });
    match found {
        Ok(Some((entry, bytes))) => {
            burst.add(mark, entry, bytes);
            ring.take(entry.slots);
            Ok(Some(entry.slots))
        }
        Ok(None) => Ok(None),
        Err(fault) => {
            burst.abandon(mark);
            Err(fault)
        }
    }
}
