//! Offloads that never mismatch: what a frame needs and its destination does not take is done here.
//!
//! ```text
//!   source frame                      out frames, one or more
//!   +----------+------------------+   +---------+ private: virtio-net header, and the frame's
//!   | snapshot | its buffers      |-> | head    | headers or snapshot
//!   +----------+------------------+   +---------+
//!                                     | body    | so many bytes of the source's buffers
//!                                     +---------+
//!                                     | pending | the checksum that is to be completed, if any
//!                                     +---------+
//! ```
//! The head has the tag that the destination's VLANs ask for, in place of the source's.
//! Any destination can take an [`OutFrame`]: one that copies has it written into its buffers
//! ([`OutFrame::write_to`], which sums what it copies), one that gathers gets its parts
//! ([`OutFrame::gather`]).
//!
//! No byte decides anything here that is still in guest memory: headers are those of the snapshot.
//! A source that rewrites its payload meanwhile spoils the checksum of its own frame, and nothing
//! else.

mod gro;
mod gso;
mod out_frame;
mod retag;
#[cfg(test)]
mod tests;

use crate::wire::Offloads;

pub(crate) use gro::{GroFrame, is_checksum_right};
pub(crate) use out_frame::{GsoScratch, OutFrame, OutFrames};
pub(crate) use retag::Retags;

/// Most segments that one frame becomes: 64 KiB with segments of 128 bytes. Smaller ones, which no
/// MTU in use has, would make a worker build headers at the expense of others.
pub(crate) const MAX_GSO_SEGMENTS: u32 = 512;

/// What is done to a frame's headers on its way, by the offloads that its destination lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing.
    Pass,
    /// The checksum is completed.
    Complete,
    /// The frame is segmented; the segments' checksums stay partial.
    Segment,
    /// The frame is segmented, and the segments' checksums are completed.
    SegmentAndComplete,
}

impl Action {
    /// By [`Offloads`] that are needed and not taken: one look-up for a frame, or for all frames of
    /// a source towards a destination.
    const BY_MISSING: [Self; 64] = {
        let mut table = [Self::Pass; 64];
        let mut missing = 1;
        while missing < table.len() {
            table[missing] = match missing & 1 {
                0 => Self::Segment,
                _ if missing == 1 => Self::Complete,
                _ => Self::SegmentAndComplete,
            };
            missing += 1;
        }
        table
    };

    /// What is to be done for a destination that takes `taken` to a frame that needs `needed`; or
    /// the most that is to be done to the frames of a source that may send `needed`.
    #[inline]
    pub(crate) fn between(needed: Offloads, taken: Offloads) -> Self {
        Self::BY_MISSING[usize::from(needed.without(taken).bits()) % 64]
    }

    /// Its name for people.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Complete => "complete_checksum",
            Self::Segment => "segment",
            Self::SegmentAndComplete => "segment_and_complete_checksum",
        }
    }
}
