//! What queues and workers did lately: differences of their counters over an interval.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::placement::QueueId;

/// What a frame costs besides its bytes, as bytes that are copied in the same time: gathering,
/// decision and publishing take about as long as copying so many.
const FRAME_BYTES: u64 = 1024;

/// Counters of a queue since its port was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueCount {
    pub(super) queue: QueueId,
    /// The worker that polls it.
    pub(super) worker: u16,
    /// Tells a port from the one that had its slot before.
    pub(super) generation: u32,
    pub(super) frames: u64,
    pub(super) bytes: u64,
}

/// What a queue took in the last interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct QueueRate {
    pub(super) frames: u64,
    pub(super) bytes: u64,
    /// Its part of its worker's busy time, in thousandths of a core.
    pub(super) load: u32,
}

/// The last interval.
#[derive(Debug, Default)]
pub(super) struct LoadMeter {
    /// Its length; zero if there was none yet.
    pub(super) interval: Duration,
    /// Each worker's busy time, in thousandths of a core.
    pub(super) workers: Vec<u32>,
    /// The queues that took frames.
    pub(super) queues: BTreeMap<QueueId, QueueRate>,
    ended: Duration,
    busy: Vec<Duration>,
    counts: BTreeMap<QueueId, QueueCount>,
}

impl LoadMeter {
    /// Ends an interval `now`, since the switch started. `busy` is each worker's busy time so far,
    /// `counts` the counters of all queues.
    pub(super) fn measure(
        &mut self,
        now: Duration,
        busy: Vec<Duration>,
        counts: impl Iterator<Item = QueueCount>,
    ) {
        self.interval = now.saturating_sub(self.ended);
        let interval_ns = self.interval.as_nanos().max(1);
        let share = |(worker, busy): (usize, &Duration)| {
            let before = self.busy.get(worker).copied().unwrap_or_default();
            let busy_ns = busy.saturating_sub(before).as_nanos();
            u32::try_from((busy_ns * 1000 / interval_ns).min(1000)).unwrap_or(1000)
        };
        self.workers = busy.iter().enumerate().map(share).collect();
        // Queues that never had a frame need no memory.
        let next: BTreeMap<_, _> = counts
            .filter(|count| count.frames > 0)
            .map(|count| (count.queue, count))
            .collect();
        let mut work: BTreeMap<u16, u128> = BTreeMap::new();
        let mut rates = BTreeMap::new();
        for (queue, count) in &next {
            let before = self.counts.get(queue);
            let before = before.filter(|before| before.generation == count.generation);
            let (frames, bytes) = before.map_or((0, 0), |before| (before.frames, before.bytes));
            let rate = QueueRate {
                frames: count.frames.saturating_sub(frames),
                bytes: count.bytes.saturating_sub(bytes),
                load: 0,
            };
            if rate.frames > 0 {
                *work.entry(count.worker).or_default() += rate.work();
                rates.insert(*queue, rate);
            }
        }
        for (queue, rate) in &mut rates {
            let worker = next[queue].worker;
            let busy = self.workers.get(usize::from(worker)).copied();
            let all = work.get(&worker).copied().unwrap_or(1).max(1);
            let load = u128::from(busy.unwrap_or(0)) * rate.work() / all;
            rate.load = u32::try_from(load).unwrap_or(u32::MAX);
        }
        self.queues = rates;
        self.counts = next;
        self.busy = busy;
        self.ended = now;
    }
}

impl QueueRate {
    fn work(&self) -> u128 {
        u128::from(self.frames) * u128::from(FRAME_BYTES) + u128::from(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringway_bridge::PortId;

    fn count(port: u16, worker: u16, frames: u64, frame_bytes: u64) -> QueueCount {
        let port = PortId::new(port).unwrap();
        QueueCount {
            queue: QueueId { port, pair: 0 },
            worker,
            generation: 0,
            frames,
            bytes: frames * frame_bytes,
        }
    }

    fn loads(load: &LoadMeter) -> Vec<(u16, u32)> {
        let loads = load.queues.iter();
        loads
            .map(|(queue, rate)| (queue.port.get(), rate.load))
            .collect()
    }

    #[test]
    fn a_worker_s_busy_time_is_divided_by_what_its_queues_took() {
        let second = Duration::from_secs(1);
        let mut load = LoadMeter::default();
        let start = [count(0, 0, 1000, 64), count(3, 0, 0, 0)];
        load.measure(second, vec![second; 2], start.into_iter());
        let next = [
            count(0, 0, 1000, 64),
            count(1, 0, 300, 1024),
            count(2, 0, 300, 0),
            count(3, 0, 0, 0),
            count(4, 1, 5, 60),
        ];
        let busy = vec![second + second * 9 / 10, second + second / 10];
        load.measure(2 * second, busy, next.into_iter());
        assert_eq!(
            (load.interval, &load.workers[..]),
            (second, &[900, 100][..])
        );
        assert_eq!(loads(&load), [(1, 600), (2, 300), (4, 100)]);
        assert_eq!(
            load.queues.values().next().map(|rate| rate.bytes),
            Some(300 * 1024)
        );
    }

    #[test]
    fn a_port_s_slot_in_other_hands_starts_from_zero() {
        let second = Duration::from_secs(1);
        let mut load = LoadMeter::default();
        load.measure(second, vec![second], [count(0, 0, 1000, 64)].into_iter());
        let successor = QueueCount {
            generation: 1,
            ..count(0, 0, 1200, 64)
        };
        load.measure(2 * second, vec![2 * second], [successor].into_iter());
        let frames: Vec<_> = load.queues.values().map(|rate| rate.frames).collect();
        assert_eq!(frames, [1200]);
    }
}
