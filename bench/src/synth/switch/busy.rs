//! How busy a switch is, by its own account: poll-mode threads take all of their core whether they
//! have work or not, so the kernel can't tell.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ringway_control::api::{NoParams, WorkerList};

use crate::interrupt;

use super::{RunningSwitch, SwitchKind};

/// A turn of a poll-mode thread, also if it loses its core in it.
const TURN: Duration = Duration::from_millis(20);
/// What no share of time is, but for clocks that are read one after the other.
const MOST: f64 = 1.05;

/// Where a switch's account stood when the measurement began.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BusySince {
    Ringway(BusyTime),
    Testpmd(Instant),
    Ovs,
}

/// Time or cycles with work, and all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BusyTime {
    busy: f64,
    total: f64,
}

impl RunningSwitch {
    /// Begins to account. testpmd is slower by about a percent while it does.
    pub(crate) fn begin_account(&mut self) -> Result<BusySince> {
        Ok(match self.kind {
            SwitchKind::Ringway => BusySince::Ringway(self.ask_ringway()?),
            SwitchKind::Testpmd | SwitchKind::TestpmdMac => {
                let process = &mut self.processes[0];
                process.tell("set record-core-cycles on")?;
                // The turn that is under way has no start and would count since the machine's.
                interrupt::sleep(TURN)?;
                process.tell("clear fwd stats all")?;
                BusySince::Testpmd(Instant::now())
            }
            SwitchKind::OvsDpdk | SwitchKind::OvsDpdkFlow => {
                self.appctl(&["dpif-netdev/pmd-stats-clear"])?;
                BusySince::Ovs
            }
        })
    }

    /// The share of time since then in which it had work; `None` if it doesn't tell.
    pub(crate) fn end_account(&mut self, since: BusySince) -> Result<Option<f64>> {
        Ok(match since {
            BusySince::Ringway(before) => {
                let now = self.ask_ringway()?;
                let total = now.total - before.total;
                (total > 0.0).then(|| (now.busy - before.busy) / total)
            }
            BusySince::Testpmd(start) => {
                let process = &mut self.processes[0];
                let seconds = start.elapsed().as_secs_f64();
                let said = process.tell("show fwd stats all")?;
                process.tell("set record-core-cycles off")?;
                testpmd_busy_seconds(&said)
                    .map(|busy| busy / seconds)
                    .filter(|share| *share < MOST)
                    .map(|share| share.min(1.0))
            }
            BusySince::Ovs => {
                let said = self.appctl(&["dpif-netdev/pmd-stats-show"])?;
                ovs_shares(&said).map(|shares| shares.busy / shares.total)
            }
        })
    }

    /// The time of all workers together.
    fn ask_ringway(&self) -> Result<BusyTime> {
        let control = self.control.as_ref().context("there is no ringwayd")?;
        let mut sum = BusyTime {
            busy: 0.0,
            total: 0.0,
        };
        for worker in control.call::<WorkerList>(&NoParams {})?.workers {
            sum.busy += worker.busy_ns as f64;
            sum.total += (worker.busy_ns + worker.polling_ns + worker.asleep_ns) as f64;
        }
        Ok(sum)
    }
}

/// Of testpmd's forward statistics, which count the cycles of bursts that held frames:
/// `CPU cycles/packet=30.1 (total cycles=3010 / total TX packets=100) at 2800 MHz Clock`.
pub(crate) fn testpmd_busy_seconds(said: &str) -> Option<f64> {
    let line = said
        .lines()
        .rfind(|line| line.contains("CPU cycles/packet"))?;
    let number = |behind: &str| -> Option<f64> {
        let digits = line.split_once(behind)?.1.trim_start();
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        digits[..end].parse().ok()
    };
    Some(number("total cycles=")? / (number(" at ")? * 1e6))
}

/// Of `dpif-netdev/pmd-stats-show`, all threads together.
fn ovs_shares(said: &str) -> Option<BusyTime> {
    let sum = |key: &str| -> f64 {
        said.lines()
            .filter_map(|line| line.trim().strip_prefix(key))
            .filter_map(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
            .sum()
    };
    let (busy, idle) = (sum("processing cycles:"), sum("idle cycles:"));
    (busy + idle > 0.0).then_some(BusyTime {
        busy,
        total: busy + idle,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_peers_print_of_their_account_is_read() {
        let testpmd = "  CPU cycles/packet=30.10 (total cycles=2800000 / total TX packets=100) \
                       at 2800 MHz Clock\n";
        assert_eq!(testpmd_busy_seconds(testpmd), Some(0.001));
        let ovs = "pmd thread numa_id 0 core_id 1:\n  idle cycles: 300 (30.00%)\n  \
                   processing cycles: 700 (70.00%)\nmain thread:\n  packets received: 0\n";
        let shares = ovs_shares(ovs).unwrap();
        assert_eq!((shares.busy, shares.total), (700.0, 1000.0));
    }

    #[test]
    fn an_account_that_is_not_there_is_none() {
        assert_eq!(testpmd_busy_seconds("testpmd>"), None);
        assert_eq!(ovs_shares("main thread:"), None);
    }
}
