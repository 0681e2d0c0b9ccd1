//! Tags that come and go on the way to a destination: in the worker's copy of a frame's first bytes,
//! which is what is delivered. Nothing of the frame is copied for it that would not be.

use ringway_bridge::{Class, DropReason, FrameSet, MAX_BURST, PortVlans, Retag, TAG_BYTES};

use crate::wire::net_header::{self, HEADER_LEN};

/// Where the first tag is: behind the header and both addresses.
const TAG_AT: usize = HEADER_LEN + 12;

/// What becomes of the tags of a burst's frames on the way to one destination.
#[derive(Debug)]
pub(crate) struct Retags {
    frames: FrameSet,
    by_frame: [Retag; MAX_BURST],
}

impl Retags {
    /// All tags stay.
    pub(crate) fn new() -> Self {
        Self {
            frames: FrameSet::EMPTY,
            by_frame: [Retag::Keep; MAX_BURST],
        }
    }

    /// Decides on `frames`, which are for a destination of these VLANs and in those of `classes`.
    pub(crate) fn decide(
        &mut self,
        to: &PortVlans,
        frames: FrameSet,
        classes: &[(FrameSet, Class)],
    ) {
        self.frames = FrameSet::EMPTY;
        for (those, class) in classes {
            let those = *those & frames;
            let retag = to.retag(*class);
            if retag != Retag::Keep {
                self.frames |= those;
                those.iter().for_each(|index| self.by_frame[index] = retag);
            }
        }
    }

    /// The frames whose tag changes.
    #[inline(always)]
    pub(crate) fn frames(&self) -> FrameSet {
        self.frames
    }

    /// What becomes of the tag of frame `index`.
    pub(crate) fn of(&self, index: usize) -> Retag {
        if self.frames.contains(index) {
            self.by_frame[index]
        } else {
            Retag::Keep
        }
    }
}

/// Bytes by which a frame becomes longer.
pub(super) const fn growth(retag: Retag) -> i16 {
    const TAG: i16 = 4;
    const { assert!(TAG as usize == TAG_BYTES) };
    match retag {
        Retag::Keep | Retag::Replace(_) => 0,
        Retag::Push(_) => TAG,
        Retag::Pop => -TAG,
    }
}

/// Writes a snapshot, a header and a frame's first bytes, with another tag: and with a header that
/// tells where things are then.
///
/// # Errors
/// [`DropReason::BadHeader`]: the header tells of a checksum that begins within the tag.
pub(super) fn write_retagged<const N: usize, const M: usize>(
    to: &mut [u8; N],
    snapshot: &[u8; M],
    retag: Retag,
) -> Result<(), DropReason> {
    const { assert!(N >= M + TAG_BYTES && M > TAG_AT + TAG_BYTES) };
    let (front, rest) = snapshot.split_at(TAG_AT);
    let (tag, behind) = match retag {
        Retag::Keep => (&[][..], rest),
        Retag::Pop => (&[][..], &rest[TAG_BYTES..]),
        Retag::Push(ref tag) => (&tag[..], rest),
        Retag::Replace(ref tag) => (&tag[..], &rest[TAG_BYTES..]),
    };
    to[..TAG_AT].copy_from_slice(front);
    to[TAG_AT..TAG_AT + tag.len()].copy_from_slice(tag);
    to[TAG_AT + tag.len()..][..behind.len()].copy_from_slice(behind);
    if net_header::shift(to, growth(retag)) {
        Ok(())
    } else {
        Err(DropReason::BadHeader)
    }
}
