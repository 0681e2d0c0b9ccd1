//! The load: pairs of guests on one thread, each guest sending to its partner.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ringway_guest::Frontend;

use super::by_hand::HandRing;
use super::error::LoadError;
use super::frame::{Route, Stamp, Style, Template, guest_mac};
use super::guest::{GuestListener, GuestShape, LoadGuest, PairTurn};
use super::meter::{MaxResult, Meter};
use crate::interrupt;

/// How long the first frame may take: a switch learns, a back-end starts its queues.
pub(crate) const FIRST_FRAME: Duration = Duration::from_secs(5);
/// A switch that passes nothing for so long has stalled; it may still be setting itself up in the
/// warm-up, which is repeated for as long as [`FIRST_FRAME`].
pub(crate) const STALL: Duration = Duration::from_millis(250);
/// How long frames on their way may stay unseen before they count as lost.
pub(crate) const SETTLE: Duration = Duration::from_millis(50);

/// Bytes of a frame and the header in front of it that tell route and stamp, with TCP's header
/// between.
pub(crate) const HEAD: usize = 12 + 14 + 20 + 20 + Stamp::BYTES;

/// What the load is made of.
#[derive(Clone, Debug)]
pub(crate) struct LoadConfig {
    /// Sockets of the switch, two per pair of guests.
    pub(crate) sockets: Vec<PathBuf>,
    /// The guests listen there and the switch connects.
    pub(crate) listen: bool,
    pub(crate) shape: GuestShape,
    /// Sizes of the frames, taken in turn.
    pub(crate) sizes: Vec<u32>,
    pub(crate) style: Style,
    pub(crate) flows: u16,
    /// Compare every byte that arrives.
    pub(crate) verify: bool,
}

impl LoadConfig {
    /// Frames that this guest sends, one template per size.
    pub(crate) fn templates(&self, guest: u16) -> Vec<Template> {
        let route = Route {
            from: guest_mac(guest),
            to: guest_mac(guest ^ 1),
        };
        self.sizes
            .iter()
            .map(|size| Template::new(route, *size, self.style))
            .collect()
    }

    /// A session for each guest.
    fn frontends(&self) -> Result<Vec<Frontend>, LoadError> {
        if !self.listen {
            let connect = |path: &PathBuf| Ok(Frontend::connect(path)?);
            return self.sockets.iter().map(connect).collect();
        }
        let listeners: Vec<GuestListener> = self
            .sockets
            .iter()
            .map(|path| GuestListener::bind(path))
            .collect::<Result<_, _>>()?;
        listeners.iter().map(GuestListener::accept).collect()
    }

    /// All guests, their queues started.
    pub(crate) fn guests(&self) -> Result<Vec<LoadGuest>, LoadError> {
        let start = |(guest, frontend)| {
            LoadGuest::start(frontend, self.shape, &self.templates(guest), self.flows)
        };
        (0..).zip(self.frontends()?).map(start).collect()
    }

    /// Bytes of memory that all guests need together.
    pub(crate) fn memory_bytes(&self, guests: u16) -> u64 {
        self.shape.memory_bytes(&self.templates(0)) * u64::from(guests)
    }
}

/// Guests that are connected; 2n and 2n + 1 are partners.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) guests: Vec<LoadGuest>,
    /// Frames that each guest sends, one template per size.
    pub(crate) templates: Vec<Vec<Template>>,
    /// Runs with stamped frames so far.
    pub(crate) runs: u8,
    verify: bool,
    /// In place of a switch.
    by_hand: Option<ByHand>,
}

/// The devices' sides of all guests' rings, by guest and queue pair: receive and transmit.
#[derive(Debug)]
struct ByHand {
    rings: Vec<Vec<[HandRing; 2]>>,
    /// What makes sessions look alive.
    _sockets: Vec<UnixStream>,
}

impl Load {
    /// Connects all guests and waits until each one's frames arrive.
    pub(crate) fn connect(config: &LoadConfig) -> Result<Self, LoadError> {
        let count = u16::try_from(config.sockets.len()).unwrap_or(u16::MAX);
        let templates: Vec<_> = (0..count).map(|guest| config.templates(guest)).collect();
        let mut load = Self {
            guests: config.guests()?,
            templates,
            runs: 0,
            verify: config.verify,
            by_hand: None,
        };
        load.teach()?;
        Ok(load)
    }

    /// Guests whose frames are moved by hand, on the same thread.
    pub(crate) fn without_switch(config: &LoadConfig) -> Result<Self, LoadError> {
        let count = u16::try_from(config.sockets.len()).unwrap_or(u16::MAX);
        let templates: Vec<_> = (0..count).map(|guest| config.templates(guest)).collect();
        let (mut guests, mut rings, mut sockets) = (Vec::new(), Vec::new(), Vec::new());
        for frames in &templates {
            let (guest, sides, socket) =
                LoadGuest::without_switch(config.shape, frames, config.flows)?;
            guests.push(guest);
            rings.push(sides);
            sockets.push(socket);
        }
        let by_hand = ByHand {
            rings,
            _sockets: sockets,
        };
        Ok(Self {
            guests,
            templates,
            runs: 0,
            verify: config.verify,
            by_hand: Some(by_hand),
        })
    }

    /// Moves what a guest sent to its partner, where there is no switch to do it.
    #[inline]
    pub(crate) fn move_by_hand(&mut self, guest: usize) {
        let Some(ByHand { rings, .. }) = &mut self.by_hand else {
            return;
        };
        let Ok([from, to]) = rings.get_disjoint_mut([guest, guest ^ 1]) else {
            return;
        };
        for ([_, tx], [rx, _]) in from.iter_mut().zip(to) {
            tx.move_to(rx);
        }
    }

    /// Sends frames from each guest until each has heard its partner: the switch knows all then.
    fn teach(&mut self) -> Result<(), LoadError> {
        let start = Instant::now();
        let mut heard = vec![false; self.guests.len()];
        let mut unsegmented = false;
        let mut next = Duration::ZERO;
        while heard.contains(&false) {
            if start.elapsed() > FIRST_FRAME {
                self.check_alive()?;
                return Err(if unsegmented {
                    LoadError::Unsegmented
                } else {
                    LoadError::NoTraffic(FIRST_FRAME)
                });
            }
            if start.elapsed() >= next {
                interrupt::check()?;
                // A few at a time: unknown destinations are flooded.
                next += Duration::from_millis(5);
                for pair in self.guests.iter_mut().flat_map(|guest| &mut guest.pairs) {
                    pair.tx.ring.reclaim()?;
                    pair.tx.offer(4)?;
                }
            }
            for (i, guest) in self.guests.iter_mut().enumerate() {
                let expected = &self.templates[i ^ 1];
                for pair in &mut guest.pairs {
                    pair.receive(|frame| {
                        let whole = |t: &Template| t.matches(frame) && t.keeps_segmentation(frame);
                        heard[i] |= expected.iter().any(whole);
                        unsegmented |= expected.iter().any(|t| t.came_unsegmented(frame));
                    })?;
                }
            }
        }
        self.drain(SETTLE)
    }

    /// Receives and forgets until nothing came for `quiet`.
    pub(crate) fn drain(&mut self, quiet: Duration) -> Result<(), LoadError> {
        let mut last = Instant::now();
        while last.elapsed() < quiet {
            for pair in self.guests.iter_mut().flat_map(|guest| &mut guest.pairs) {
                pair.tx.ring.reclaim()?;
                if pair.receive(|_| ())? > 0 {
                    last = Instant::now();
                }
            }
        }
        self.check_alive()
    }

    /// Fails once the switch has gone, or when the run is to end.
    pub(crate) fn check_alive(&self) -> Result<(), LoadError> {
        interrupt::check()?;
        self.guests.iter().try_for_each(LoadGuest::check_alive)
    }

    /// Sends at full rate, unmeasured, until the switch forwards steadily.
    pub(crate) fn warm_up(&mut self, warm_up: Duration) -> Result<(), LoadError> {
        let start = Instant::now();
        while self.full_rate(warm_up)?.longest_gap > STALL.min(warm_up / 2) {
            if start.elapsed() > FIRST_FRAME {
                return Err(LoadError::NoTraffic(STALL));
            }
        }
        Ok(())
    }

    /// Sends as fast as frames are taken, both ways, for `duration`. A switch that stalls, leaves
    /// a guest out or floods is no slow one: it broke the run.
    pub(crate) fn run_max(&mut self, duration: Duration) -> Result<MaxResult, LoadError> {
        let result = self.full_rate(duration)?;
        if result.longest_gap > STALL {
            return Err(LoadError::NoTraffic(result.longest_gap));
        }
        if let Some(guest) = result.silent_guest {
            return Err(LoadError::OneWay(guest));
        }
        if result.foreign > 0 {
            return Err(LoadError::Flooded(result.foreign));
        }
        if self.verify {
            self.check_frames()?;
        }
        Ok(result)
    }

    fn full_rate(&mut self, duration: Duration) -> Result<MaxResult, LoadError> {
        let mut meter = Meter::start(duration);
        let mut received_by = vec![0; self.guests.len()];
        while !meter.is_over() {
            let mut sum = PairTurn::default();
            for (guest, received_by) in self.guests.iter_mut().zip(&mut received_by) {
                for pair in &mut guest.pairs {
                    let turn = pair.turn()?;
                    sum += turn;
                    *received_by += turn.received;
                }
            }
            meter.note(sum, sum.received);
            if meter.is_time_to_check() {
                self.check_alive()?;
                self.check_routes(&mut meter.result)?;
            }
        }
        let silent_guest = received_by.iter().position(|received| *received == 0);
        Ok(MaxResult {
            silent_guest,
            ..meter.end()
        })
    }

    /// Looks at the addresses of what comes next at each queue: a sample, so that it costs nothing.
    fn check_routes(&mut self, result: &mut MaxResult) -> Result<(), LoadError> {
        let mut head = [0; HEAD];
        for (i, guest) in self.guests.iter_mut().enumerate() {
            let expected = &self.templates[i ^ 1][0];
            for pair in &mut guest.pairs {
                let foreign = &mut result.foreign;
                let turn = pair.peek(&mut head, |head| {
                    *foreign += u64::from(!expected.is_on_route(head));
                })?;
                result.received += turn.received;
                result.bytes += turn.bytes;
            }
        }
        Ok(())
    }

    /// Compares what arrives with what was sent, for a while at full rate.
    fn check_frames(&mut self) -> Result<(), LoadError> {
        let end = Instant::now() + Duration::from_millis(200);
        let mut corrupt = 0;
        while Instant::now() < end {
            for (i, guest) in self.guests.iter_mut().enumerate() {
                let expected = &self.templates[i ^ 1];
                for pair in &mut guest.pairs {
                    pair.tx.ring.reclaim()?;
                    pair.tx.offer(32)?;
                    pair.receive(|frame| {
                        let whole = |t: &Template| t.matches(frame) && t.keeps_segmentation(frame);
                        corrupt += u64::from(!expected.iter().any(whole));
                    })?;
                }
            }
        }
        if corrupt > 0 {
            return Err(LoadError::Corrupt(corrupt));
        }
        Ok(())
    }
}
