//! A bound on what floods cost a worker: a bucket of copies for each source.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::{FrameSet, MAX_PORTS, PortId, Tick};

/// A frame may in any case be flooded to as many ports as there are.
const LEAST_DEPTH: u64 = MAX_PORTS as u64;

/// A bucket holds a quarter of a second's copies: what a station asks for at once while it is
/// unknown, or a rack that boots, and some ten milliseconds of a worker at the default limit.
const DEPTHS_PER_SECOND: u64 = 4;

/// The limit of each port, in copies per second and worker; 0 for none.
#[derive(Debug)]
pub(crate) struct FloodLimits(Box<[AtomicU32]>);

impl FloodLimits {
    /// No port has one.
    pub(crate) fn new() -> Self {
        Self((0..MAX_PORTS).map(|_| AtomicU32::new(0)).collect())
    }

    /// Relaxed: a number, which orders nothing.
    pub(crate) fn set(&self, port: PortId, copies_per_second: u32) {
        self.0[port.index()].store(copies_per_second, Ordering::Relaxed);
    }

    fn get(&self, port: PortId) -> u32 {
        self.0[port.index()].load(Ordering::Relaxed)
    }
}

/// What each source may still flood, as one worker counts it.
#[derive(Debug)]
pub(crate) struct FloodBuckets(Box<[Bucket]>);

impl FloodBuckets {
    /// All are full.
    pub(crate) fn new() -> Self {
        Self(vec![Bucket::FULL; MAX_PORTS].into_boxed_slice())
    }

    /// The first of `frames` from `port` that may be flooded to `copies` ports each at `now`; they
    /// are charged.
    #[inline]
    pub(crate) fn take(
        &mut self,
        limits: &FloodLimits,
        port: PortId,
        copies: usize,
        frames: FrameSet,
        now: Tick,
    ) -> FrameSet {
        let limit = limits.get(port);
        // The first copy costs no more than a frame that is not flooded.
        let charged = copies.saturating_sub(1) as u64;
        if limit == 0 || charged == 0 {
            return frames;
        }
        let granted = self.0[port.index()].take(limit, charged, frames.len(), now);
        frames.first_of(granted)
    }

    /// Charges a source for so many copies more than it was when they were taken.
    pub(crate) fn charge(&mut self, port: PortId, copies: u64) {
        let bucket = &mut self.0[port.index()];
        let tenths = copies * u64::from(Tick::PER_SECOND);
        bucket.tenths = bucket.tenths.saturating_sub(tenths);
    }
}

/// A token bucket of copies, filled once a tick.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// In tenths of a copy (parts of [`Tick::PER_SECOND`]), so that no limit is too low to be
    /// divided.
    tenths: u64,
    filled: Tick,
}

impl Bucket {
    /// More than any depth.
    const FULL: Self = Self {
        tenths: u64::MAX,
        filled: Tick(0),
    };

    /// How many of `frames` fit that cost `charged` copies each, which are taken.
    fn take(&mut self, limit: u32, charged: u64, frames: u32, now: Tick) -> u32 {
        self.fill(limit.into(), now);
        let cost = charged * u64::from(Tick::PER_SECOND);
        let granted = (self.tenths / cost).min(frames.into());
        self.tenths -= granted * cost;
        u32::try_from(granted).unwrap_or(frames)
    }

    fn fill(&mut self, limit: u64, now: Tick) {
        let ticks = now.age_of(self.filled);
        if ticks > 0 {
            self.filled = now;
        }
        let depth = (limit / DEPTHS_PER_SECOND).max(LEAST_DEPTH) * u64::from(Tick::PER_SECOND);
        let filled = self.tenths.saturating_add(limit * u64::from(ticks));
        self.tenths = filled.min(depth);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u32 = 1_000_000;

    fn second(second: u32) -> Tick {
        Tick(second * Tick::PER_SECOND)
    }

    /// Frames that pass of a source that offers `frames` of `charged` copies in each tick of a
    /// second.
    fn pass(bucket: &mut Bucket, limit: u32, charged: u64, frames: u32, from: Tick) -> u32 {
        (0..Tick::PER_SECOND)
            .map(|tick| bucket.take(limit, charged, frames, Tick(from.0 + tick)))
            .sum()
    }

    #[test]
    fn a_flooder_gets_its_limit_and_at_first_a_quarter_more() {
        let mut bucket = Bucket::FULL;
        let passed = pass(&mut bucket, LIMIT, 62, 100_000, second(1));
        assert!((18_500..=20_200).contains(&passed), "{passed}");
        let passed = pass(&mut bucket, LIMIT, 62, 100_000, second(2));
        assert!((16_100..=16_200).contains(&passed), "{passed}");
    }

    #[test]
    fn a_source_below_its_limit_loses_nothing_though_it_comes_in_bursts() {
        let mut bucket = Bucket::FULL;
        for start in 1..10 {
            assert_eq!(bucket.take(LIMIT, 62, 4000, second(start)), 4000);
        }
        // 10,000 frames/s to 64 ports: five multicast streams of 20 Mbit/s.
        for start in 10..20 {
            assert_eq!(pass(&mut bucket, LIMIT, 62, 1000, second(start)), 10_000);
        }
        // A million frames/s of a station that is not known, to two other ports.
        for start in 20..30 {
            assert_eq!(pass(&mut bucket, LIMIT, 1, 100_000, second(start)), LIMIT);
        }
    }

    #[test]
    fn a_frame_to_all_ports_passes_at_the_lowest_limit() {
        let mut bucket = Bucket::FULL;
        let all = MAX_PORTS as u64 - 2;
        assert_eq!(bucket.take(1, all, 2, second(1)), 1);
        assert_eq!(bucket.take(1, all, 1, second(2)), 0);
        assert_eq!(bucket.take(1, all, 1, second(2 + 4096)), 1);
    }

    #[test]
    fn time_may_wrap_and_go_back() {
        let most = LIMIT / 4;
        // Whatever the first tick is, the bucket is full then.
        let mut bucket = Bucket::FULL;
        bucket.take(LIMIT, 1, 0, Tick(u32::MAX / 2));
        bucket.take(LIMIT, 1, 0, Tick(u32::MAX - 5));
        assert_eq!(bucket.take(LIMIT, 1, u32::MAX, Tick(u32::MAX)), most);
        assert_eq!(bucket.take(LIMIT, 1, u32::MAX, Tick(u32::MAX - 1)), 0);
        assert_eq!(bucket.take(LIMIT, 1, u32::MAX, Tick(0)), LIMIT / 10);
    }

    #[test]
    fn one_copy_costs_nothing_and_the_first_frames_of_a_burst_pass() {
        let (limits, mut buckets) = (FloodLimits::new(), FloodBuckets::new());
        let port = PortId::new(7).unwrap();
        let frames = FrameSet::from_bits(0b1011_0100);
        limits.set(port, 1);
        let mut take = |copies| buckets.take(&limits, port, copies, frames, second(1));
        (0..10_000).for_each(|_| assert_eq!(take(1), frames));
        assert_eq!(take(2049), FrameSet::from_bits(0b0001_0100));
        assert_eq!(take(2), FrameSet::EMPTY);
        limits.set(port, 0);
        buckets.charge(port, 1_000_000);
        let unlimited = buckets.take(&limits, port, 4095, frames, second(1));
        assert_eq!(unlimited, frames);
    }

    /// Copies to a tap cost as much as many to guests.
    #[test]
    fn copies_that_cost_more_are_charged_more() {
        let (limits, mut buckets) = (FloodLimits::new(), FloodBuckets::new());
        let (port, all) = (PortId::new(7).unwrap(), FrameSet::from_bits(u64::MAX));
        limits.set(port, LIMIT);
        let mut passed = 0;
        for turn in 0..100_000 {
            let frames = buckets.take(&limits, port, 3, all, Tick(10 + turn / 10_000));
            buckets.charge(port, u64::from(frames.len()) * 3 * 31);
            passed += frames.len();
        }
        // 95 copies a frame: a quarter of a second's at first, and nine tenths of a second.
        assert!((12_100..13_000).contains(&passed), "{passed}");
    }
}
