//! What a front-end's requests cost everybody, and how much of that a port may cause: a token bucket
//! in nanoseconds of the session thread, which all ports share. A pure value.
//!
//! Each request costs the time that it took, but no less than its list price, which stands for what
//! it costs the workers besides: locks of queues, wake-ups, pages that lose their mapping. Over
//! budget the port's own front-end waits: its socket is not read, and it is not let in again, until
//! the debt is paid. The budget is the port's, so to reconnect gains nothing.
//!
//! A guest with 64 queue pairs starts or stops its rings for some 30 ms; 509 slots of memory come for
//! some 50 ms.

use std::time::{Duration, Instant};

use ringway_bridge::MacAddr;

use super::message::Request;

/// A front-end that connects: a session, a log line, rings that stop when it goes.
pub(super) const CONNECTION: Duration = Duration::from_millis(1);

/// What starts or stops a ring, or replaces memory under all of a port's rings.
const CHANGE: Duration = Duration::from_micros(100);

/// Anything else.
const QUESTION: Duration = Duration::from_micros(5);

/// What a port may cost at once after a quiet time: ten reboots of a guest with 64 queue pairs.
const BURST: Duration = Duration::from_millis(500);

/// A port may cost one part in so many of the time, in the long run.
const SHARE: u32 = 4;

/// Smaller debts are let grow, so that the thread wakes up rarely for each.
const LEAST_PAUSE: Duration = Duration::from_millis(5);

/// The list price of a request.
pub(super) fn of_request(request: &Request) -> Duration {
    match request {
        Request::SetVringKick(_)
        | Request::SetVringAddr { .. }
        | Request::SetVringEnable { .. }
        | Request::GetVringBase { .. }
        | Request::SetMemTable(_)
        | Request::AddMemReg(..)
        | Request::RemMemReg(_)
        | Request::SendRarp(_)
        | Request::ResetDevice
        | Request::SetStatus(_) => CHANGE,
        _ => QUESTION,
    }
}

/// What a port has left.
#[derive(Clone, Debug, Default)]
pub(super) struct Budget {
    /// When all that was bought is paid for.
    paid_at: Option<Instant>,
}

impl Budget {
    /// Takes a price at `now`.
    pub(super) fn charge(&mut self, now: Instant, price: Duration) {
        let from = self.paid_at.map_or(now, |paid_at| paid_at.max(now));
        self.paid_at = Some(from + SHARE * price);
    }

    /// How long to wait at `now` before more is taken, if at all.
    pub(super) fn owed(&self, now: Instant) -> Option<Duration> {
        let debt = self.paid_at?.saturating_duration_since(now);
        debt.checked_sub(SHARE * BURST)
            .filter(|owed| *owed >= LEAST_PAUSE)
    }
}

/// How often an address may be announced from a port: each announcement is a broadcast to all.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(1);

/// Addresses that a port may announce in that time; a guest has one.
const ANNOUNCED: usize = 8;

/// The addresses that a port announced lately (SEND_RARP).
#[derive(Debug, Default)]
pub(crate) struct Announcements([Option<(MacAddr, Instant)>; ANNOUNCED]);

impl Announcements {
    /// Whether an address may be announced at `now`.
    pub(crate) fn allow(&mut self, mac: MacAddr, now: Instant) -> bool {
        let is_over = |at| now.saturating_duration_since(at) >= ANNOUNCE_EVERY;
        let places = &mut self.0;
        let own = places
            .iter()
            .position(|p| p.is_some_and(|(of, _)| of == mac));
        let place = own.or_else(|| {
            places
                .iter()
                .position(|p| p.is_none_or(|(_, at)| is_over(at)))
        });
        let Some(place) = place.map(|at| &mut places[at]) else {
            return false;
        };
        let allowed = place.is_none_or(|(_, at)| is_over(at));
        if allowed {
            *place = Some((mac, now));
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::super::message::VringFd;
    use super::*;
    use crate::memory::RegionSpec;
    use crate::ring::RingAddresses;

    #[test]
    fn an_address_is_announced_once_a_second_and_few_of_them() {
        let mut announcements = Announcements::default();
        let start = Instant::now();
        let mac = |n| MacAddr([2, 0, 0, 0, 0, n]);
        for n in 0..8 {
            assert!(announcements.allow(mac(n), start));
            assert!(!announcements.allow(mac(n), start + ANNOUNCE_EVERY / 2));
        }
        assert!(!announcements.allow(mac(8), start + ANNOUNCE_EVERY / 2));
        assert!(announcements.allow(mac(3), start + ANNOUNCE_EVERY));
        assert!(announcements.allow(mac(8), start + ANNOUNCE_EVERY));
        assert!(!announcements.allow(mac(3), start + ANNOUNCE_EVERY));
    }

    #[test]
    fn what_workers_notice_costs_more_than_a_question() {
        let fd = || VringFd { index: 0, fd: None };
        let memory = RegionSpec {
            guest_addr: 0,
            size: 4096,
            user_addr: 0,
            mmap_offset: 0,
        };
        let addresses = RingAddresses {
            desc: 0,
            avail: 0,
            used: 0,
        };
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let changes = [
            Request::SetVringKick(fd()),
            Request::SetVringAddr {
                index: 0,
                addresses,
            },
            Request::SetVringEnable {
                index: 0,
                enable: true,
            },
            Request::GetVringBase { index: 0 },
            Request::SetMemTable(Vec::new()),
            Request::AddMemReg(memory, file()),
            Request::RemMemReg(memory),
            Request::SendRarp(MacAddr([2; 6])),
            Request::ResetDevice,
            Request::SetStatus(0),
        ];
        for change in &changes {
            assert_eq!(of_request(change), CHANGE, "{change:?}");
        }
        let questions = [
            Request::GetFeatures,
            Request::GetStatus,
            Request::SetVringCall(fd()),
        ];
        for question in &questions {
            assert!(of_request(question) < CHANGE / 10, "{question:?}");
        }
    }

    #[test]
    fn after_a_quiet_time_a_burst_costs_no_wait() {
        let mut budget = Budget::default();
        let now = Instant::now();
        for _ in 0..BURST.as_micros() / CHANGE.as_micros() {
            assert_eq!(budget.owed(now), None);
            budget.charge(now, CHANGE);
        }
        assert_eq!(budget.owed(now), None);
        budget.charge(now, 2 * LEAST_PAUSE / SHARE);
        assert_eq!(budget.owed(now), Some(2 * LEAST_PAUSE));
        let later = now + Duration::from_secs(3600);
        assert_eq!(budget.owed(later), None);
        budget.charge(later, BURST);
        assert_eq!(budget.owed(later), None, "a burst, and no more is saved");
        budget.charge(later, BURST);
        assert_eq!(budget.owed(later), Some(SHARE * BURST));
    }

    #[test]
    fn in_the_long_run_a_port_gets_its_share() {
        let mut budget = Budget::default();
        let start = Instant::now();
        let (mut now, mut bought) = (start, Duration::ZERO);
        while now < start + Duration::from_secs(100) {
            now += budget.owed(now).unwrap_or(CHANGE);
            budget.charge(now, CHANGE);
            bought += CHANGE;
        }
        let share = (now - start) / SHARE + BURST + LEAST_PAUSE;
        assert!(bought <= share, "{bought:?} of {share:?}");
        assert!(bought > share * 9 / 10, "{bought:?} of {share:?}");
    }
}
