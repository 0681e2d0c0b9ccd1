//! How much a guest's ring may give in one turn: frames of 64 KiB for segmentation offload are
//! taken a few at a time, so that they don't keep the sources behind them waiting.

/// Most frames taken from a source queue in one turn, as many as a burst holds: they share the cost
/// of locks, indices and calls.
const MOST: usize = ringway_bridge::MAX_BURST;

/// Frames that may be taken however long they are.
const LEAST: usize = 4;

/// L2 bytes per turn that are aimed at: a full burst of 4 KiB frames, some 20 microseconds of
/// copying.
const BYTES: u64 = 256 << 10;

/// What a source may take in its next turn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    frames: usize,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { frames: MOST }
    }
}

impl Allowance {
    /// Frames that may be taken.
    pub(super) fn frames(self) -> usize {
        self.frames
    }

    /// Notes what was taken. It shrinks at once and grows by doubling, so that short frames in
    /// between don't earn a long burst.
    #[inline]
    pub(super) fn note(&mut self, frames: usize, bytes: u64) {
        let is_within = bytes <= BYTES;
        if is_within && self.frames == MOST {
            return;
        }
        let mean = bytes / frames.max(1) as u64;
        let fitting = usize::try_from(BYTES / mean.max(1)).unwrap_or(MOST);
        self.frames = fitting.min(2 * self.frames).clamp(LEAST, MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_frames_come_in_full_bursts_and_long_ones_by_the_byte() {
        let mut allowance = Allowance::default();
        allowance.note(64, 64 * 1514);
        assert_eq!(allowance.frames(), 64);
        allowance.note(64, 64 * 65_000);
        assert_eq!(allowance.frames(), 4);
        allowance.note(4, 4 * 65_000);
        assert_eq!(allowance.frames(), 4);
        allowance.note(4, 4 * 9014);
        assert_eq!(allowance.frames(), 8);
        for _ in 0..9 {
            allowance.note(allowance.frames(), allowance.frames() as u64 * 9014);
        }
        assert_eq!(allowance.frames(), 29);
    }

    // Bursts of short frames are no way to earn a burst of long ones.
    #[test]
    fn a_source_that_alternates_gets_at_most_twice_the_bytes() {
        let mut allowance = Allowance::default();
        allowance.note(64, 64 * 65_000);
        let mut bytes = 0;
        for turn in 0..100 {
            let length = if turn % 2 == 0 { 60 } else { 65_000 };
            let taken = allowance.frames() as u64 * length;
            bytes += taken;
            allowance.note(allowance.frames(), taken);
        }
        assert!(bytes <= 100 * 2 * BYTES, "{bytes}");
    }

    #[test]
    fn nothing_taken_changes_nothing_for_the_worse() {
        let mut allowance = Allowance::default();
        allowance.note(0, 0);
        assert_eq!(allowance.frames(), 64);
    }
}
