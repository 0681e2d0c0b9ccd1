//! A NIC in place of the second guest: the switch has one end of a veth pair, and at the other end
//! the kernel makes frames, or drops and counts them.
//!
//! ```text
//!   to the NIC     guest -> switch -> nic0 -> far0 -> dropped: they are for somebody else
//!   from the NIC   XDP program -> far0 -> nic0 -> switch -> guest
//! ```
//! One thread is guest and far end, by turns. What the kernel does for a frame, it does on the
//! switch's core on the way to the NIC, and on the load's on the way from it.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ringway_guest::{FrameSource, NET_HEADER_BYTES};

use super::error::LoadError;
use super::frame::Template;
use super::guest::{BURST, LoadGuest, PairTurn};
use super::load::{FIRST_FRAME, LoadConfig, STALL};
use super::meter::{MaxResult, Meter};
use crate::interrupt;
use crate::netns::NetNs;

/// The switch's end.
pub(crate) const IFNAME: &str = "nic0";
const FAR: &str = "far0";

/// Largest frame: an MTU of 1,500.
pub(crate) const MAX_FRAME: u32 = 1514;

/// How often the far end's count is read, which costs some microseconds.
const LOOK: Duration = Duration::from_millis(2);

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NicWay {
    /// From the guest.
    ToNic,
    /// To the guest.
    FromNic,
}

/// A veth pair in a namespace of its own; gone when dropped.
#[derive(Debug)]
pub(crate) struct VethPair {
    namespace: NetNs,
    /// Index of the far end.
    far: u32,
}

impl VethPair {
    /// Makes one for the switch of this name.
    pub(crate) fn create(switch: &str) -> Result<Self> {
        let namespace = NetNs::create(switch)?;
        let far = namespace.add_veth(IFNAME, FAR, &[])?;
        for ifname in [IFNAME, FAR] {
            namespace.ip(&["link", "set", ifname, "up"])?;
        }
        Ok(Self { namespace, far })
    }

    /// Where the NIC is.
    pub(crate) fn namespace(&self) -> &NetNs {
        &self.namespace
    }

    /// Moves the calling thread beside the NIC.
    pub(crate) fn enter(&self) -> Result<()> {
        self.namespace.enter()
    }
}

/// A guest and a far end that are connected.
pub(crate) struct NicLoad {
    guest: LoadGuest,
    way: NicWay,
    templates: Vec<Template>,
    /// Frames that are made by one call, which takes the time of a hundred: as many as find room in
    /// the guest's ring while it is being refilled.
    call: u32,
    source: FrameSource,
}

impl NicLoad {
    /// Connects the guest and waits until frames go both ways. To be called beside the NIC.
    pub(crate) fn connect(config: &LoadConfig, veth: &VethPair, way: NicWay) -> Result<Self> {
        let to_guest = config.templates(1).swap_remove(0);
        let frame = to_guest.for_flow(0)[NET_HEADER_BYTES..].to_vec();
        let refused = "the kernel refused the XDP program that makes frames";
        let mut load = Self {
            guest: config.guests()?.swap_remove(0),
            way,
            call: u32::from(config.shape.slots() / 2),
            templates: config.templates(0),
            source: FrameSource::new(veth.far, frame).context(refused)?,
        };
        load.teach(&to_guest)?;
        Ok(load)
    }

    /// Sends frames from both ends until one came through each way.
    fn teach(&mut self, to_guest: &Template) -> Result<()> {
        let start = Instant::now();
        let before = arrived()?;
        let (mut heard, mut next) = (false, Duration::ZERO);
        while !heard || arrived()? == before {
            ensure!(
                start.elapsed() <= FIRST_FRAME,
                LoadError::NoTraffic(FIRST_FRAME)
            );
            let pair = &mut self.guest.pairs[0];
            if start.elapsed() >= next {
                interrupt::check()?;
                next += Duration::from_millis(5);
                pair.tx.ring.reclaim()?;
                pair.tx.offer(1)?;
                self.source.send(1).context("making frames")?;
            }
            pair.receive(|frame| heard |= to_guest.matches(frame))?;
        }
        Ok(())
    }

    /// Sends at full rate, unmeasured, until the switch forwards steadily.
    pub(crate) fn warm_up(&mut self, warm_up: Duration) -> Result<()> {
        let start = Instant::now();
        while self.full_rate(warm_up)?.longest_gap > STALL.min(warm_up / 2) {
            ensure!(start.elapsed() <= FIRST_FRAME, LoadError::NoTraffic(STALL));
        }
        Ok(())
    }

    /// Sends as fast as frames are taken, for `duration`.
    pub(crate) fn run_max(&mut self, duration: Duration) -> Result<MaxResult> {
        let result = self.full_rate(duration)?;
        ensure!(
            result.longest_gap <= STALL,
            LoadError::NoTraffic(result.longest_gap)
        );
        Ok(result)
    }

    fn full_rate(&mut self, duration: Duration) -> Result<MaxResult> {
        let mut meter = Meter::start(duration);
        let (mut counted, mut next) = (arrived()?, LOOK);
        while !meter.is_over() {
            let mut turn = match self.way {
                NicWay::ToNic => self.offer()?,
                NicWay::FromNic => self.make_and_take()?,
            };
            if self.way == NicWay::ToNic && meter.elapsed() >= next {
                next = meter.elapsed() + LOOK;
                let now = arrived()?;
                turn.received = now.saturating_sub(counted);
                turn.bytes = self.bytes_of(turn.received);
                counted = now;
            }
            meter.note(turn, turn.sent);
            if meter.is_time_to_check() {
                interrupt::check()?;
                self.guest.check_alive()?;
            }
        }
        Ok(meter.end())
    }

    /// Has the guest offer frames.
    fn offer(&mut self) -> Result<PairTurn> {
        Ok(PairTurn {
            sent: self.guest.pairs[0].refill()?,
            ..PairTurn::default()
        })
    }

    /// Makes frames, and has the guest take what arrived meanwhile.
    fn make_and_take(&mut self) -> Result<PairTurn> {
        self.source.send(self.call).context("making frames")?;
        let mut sum = PairTurn {
            sent: self.call.into(),
            ..PairTurn::default()
        };
        loop {
            let turn = self.guest.pairs[0].take()?;
            sum += turn;
            if turn.received < BURST as u64 {
                return Ok(sum);
            }
        }
    }

    /// L2 bytes of so many frames and a header for each.
    fn bytes_of(&self, frames: u64) -> u64 {
        let all: u64 = self.templates.iter().map(|t| u64::from(t.len())).sum();
        frames * all / self.templates.len() as u64
    }
}

/// Frames that arrived at the far end in the thread's namespace so far.
fn arrived() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    packets_of(&text, FAR).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, text))
}

/// Received packets of an interface by /proc/net/dev.
fn packets_of(text: &str, ifname: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| {
        let (name, rest) = line.split_once(':')?;
        (name.trim() == ifname).then_some(rest)
    })?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_of_the_interface_that_is_meant() {
        let text = "Inter-|   Receive                            |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes\n\
                    far01:     100       1    0    0    0     0          0         0    0\n  \
                    far0: 6400     100    0    0    0     0          0         0   12    0\n";
        assert_eq!(packets_of(text, "far0"), Some(100));
        assert_eq!(packets_of(text, "far01"), Some(1));
        assert_eq!(packets_of(text, "nic0"), None);
    }
}
