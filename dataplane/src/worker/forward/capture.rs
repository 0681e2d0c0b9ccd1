//! What of a delivery is copied to who captures frames.

use ringway_bridge::{DropReason, FrameSet, PortId};

use crate::capture::{Direction, Passing, Taps};
use crate::port::{Account, Job, Outcome};

/// Frames that a destination took, and those that it can not take; those that are to wait have
/// their turn later. Before the account is emptied.
#[cold]
pub(super) fn departures(
    taps: &mut Taps,
    to: PortId,
    job: &Job<'_, '_>,
    outcome: &Outcome,
    account: &Account,
) {
    taps.copy(job.burst, departing(to, outcome.sent, None));
    let lost = job.frames - outcome.sent - outcome.refused;
    // Of several reasons in a burst, which the account does not tell apart by frame, the first.
    let reason = account.drops.nonzero().next();
    taps.copy(job.burst, departing(to, lost, reason.map(|(why, _)| why)));
}

/// Frames that had no room, and are not to wait.
#[cold]
pub(super) fn dropped(
    taps: &mut Taps,
    to: PortId,
    job: &Job<'_, '_>,
    (reason, frames): (DropReason, FrameSet),
) {
    taps.copy(job.burst, departing(to, frames, Some(reason)));
}

fn departing(port: PortId, frames: FrameSet, dropped: Option<DropReason>) -> Passing {
    Passing {
        port,
        direction: Direction::Out,
        queue: None,
        frames,
        dropped,
    }
}
