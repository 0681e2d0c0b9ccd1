//! Delivery of frames of any kind, as one parcel or as several.
//!
//! A frame that is cut is delivered from its beginning, as far as there is room: it counts as
//! delivered if its first segment was, and each segment behind the last that was delivered is a drop
//! of its own. Before that, it waits for room for all of its segments as other frames wait for theirs.

use ringway_bridge::DropReason;

use super::forward::{Limits, Tools};
use crate::burst::Burst;
use crate::offload::{Parcel, Parcels, Tally, Workbench};
use crate::port::{TapPort, Transmitter};
use crate::ring::{Deliver, RingFault};
use crate::wire::Offloads;
use crate::wire::net_header::HEADER_BYTES;

/// How a frame fared.
pub(super) struct Delivery {
    /// L2 bytes that were delivered, or why it was not; nothing if it is the ring's fault.
    pub(super) sent: Option<Result<u64, DropReason>>,
    /// The rule that the destination broke.
    pub(super) fault: Option<RingFault>,
}

impl Delivery {
    fn refused(reason: DropReason) -> Self {
        Self {
            sent: Some(Err(reason)),
            fault: None,
        }
    }

    fn failed(fault: RingFault) -> Self {
        Self {
            sent: None,
            fault: Some(fault),
        }
    }
}

/// Delivers frame `index` of a burst into a guest's ring.
#[cold]
pub(super) fn deliver_any<R: Deliver>(
    ring: &mut R,
    (burst, index): (&Burst, usize),
    limits: Limits,
    available: &mut u16,
    Tools { scratch, bench }: &mut Tools,
) -> Delivery {
    let mut tally = bench.tally;
    let mut parcels = match bench.parcels(burst, index, limits.offloads, limits.max_bytes) {
        Ok(parcels) => parcels,
        Err(reason) => return Delivery::refused(reason),
    };
    if parcels.count() > 1 && limits.haste >> index & 1 == 0 {
        let (count, bytes) = (parcels.count(), parcels.longest_bytes());
        match ring.should_wait_for(count, bytes, *available, scratch) {
            Ok(false) => {}
            Ok(true) => return Delivery::refused(DropReason::RingFull),
            Err(fault) => return Delivery::failed(fault),
        }
    }
    let mut fault = None;
    let sent = each(&mut parcels, &mut tally, |parcel| {
        match ring.deliver(parcel, available, scratch) {
            Ok(delivered) => delivered,
            Err(error) => {
                fault = Some(error);
                Err(DropReason::BadDescriptor)
            }
        }
    });
    bench.tally = tally;
    Delivery {
        sent: Some(sent),
        fault,
    }
}

/// Gives frame `index` of a burst to a tap; returns its L2 bytes.
pub(super) fn write_parcels(
    port: &TapPort,
    queue: u16,
    (burst, index): (&Burst, usize),
    max_bytes: u32,
    bench: &mut Workbench,
) -> Result<u64, DropReason> {
    let mut tally = bench.tally;
    let mut parcels = bench.parcels(burst, index, port.offloads(), max_bytes)?;
    let sent = each(&mut parcels, &mut tally, |parcel| {
        port.deliver(queue, parcel)
    });
    bench.tally = tally;
    sent
}

/// Puts frame `index` of a burst into chunks of an AF_XDP queue; returns its L2 bytes. One that is cut
/// waits for room for all of its segments, unless it `is_hasty` or they need more than half of the
/// chunks.
#[cold]
pub(super) fn put_parcels(
    transmitter: &mut Transmitter,
    (burst, index): (&Burst, usize),
    max_bytes: u32,
    is_hasty: bool,
    bench: &mut Workbench,
) -> Result<u64, DropReason> {
    let mut tally = bench.tally;
    // The wire has no virtio-net header to leave anything undone in.
    let mut parcels = bench.parcels(burst, index, Offloads::NONE, max_bytes)?;
    let (count, bytes) = (parcels.count(), parcels.longest_bytes() - HEADER_BYTES);
    if count > 1 && !is_hasty && transmitter.should_wait_for(count, bytes) {
        return Err(DropReason::RingFull);
    }
    let sent = each(&mut parcels, &mut tally, |parcel| {
        if transmitter.put(parcel) {
            Ok(())
        } else {
            Err(DropReason::RingFull)
        }
    });
    bench.tally = tally;
    sent
}

/// Delivers parcels until one is refused, and notes what became of them. Returns their L2 bytes, or
/// why not even the first was delivered.
fn each(
    parcels: &mut Parcels<'_>,
    tally: &mut Tally,
    mut deliver: impl FnMut(&mut Parcel<'_, '_>) -> Result<(), DropReason>,
) -> Result<u64, DropReason> {
    let (mut sent, mut bytes) = (0, 0);
    let mut refused = None;
    while let Some(mut parcel) = parcels.next() {
        match deliver(&mut parcel) {
            Ok(()) => {
                sent += 1;
                bytes += u64::from(parcel.l2_bytes());
            }
            Err(reason) if sent == 0 => return Err(reason),
            Err(reason) => {
                refused = Some(reason);
                break;
            }
        }
    }
    if parcels.count() > 1 {
        tally.note_cut(parcels.count(), parcels.count() - sent, refused);
    } else if parcels.completes() {
        tally.completed += 1;
    }
    Ok(bytes)
}
