//! Who has cost a worker how much, and who has to wait for it: a pure value.
//!
//! Two accounts for each port, which outlive its sessions:
//! - *Shares.* A port is charged the time of each burst that is taken from it. One that is ahead of
//!   the port that had least is not polled until that one has caught up, so that all ports that
//!   want the worker have the same time of it, whatever their frames cost. It is start-time fair
//!   queueing: a port that was silent begins where the others are, and has saved nothing up.
//! - *Waste.* What a port costs and carries nothing, such as chains of empty descriptors or a search
//!   through buffers of one byte, is paid for with time in which the port is neither polled nor
//!   delivered to, [`WASTE_PRICE`] times as long. Whoever wastes next waits behind it: however many
//!   do, they have one in so many parts of the worker's time together.

use ringway_bridge::{MAX_PORTS, PortId};

/// How far ahead a port may be, in nanoseconds: a few bursts, so that ports that cost the same are
/// polled in turn.
const LEAD_NS: u64 = 20_000;

/// Most that a burst is charged as a share, in nanoseconds: several times what it takes, so that
/// nobody is charged for the time in which the kernel gave the core to somebody else.
const BURST_NS: u64 = 5_000;
/// What it may take more for a frame,
const FRAME_NS: u64 = 150;
/// and for one that is received or delivered by a system call.
const CALL_NS: u64 = 8_000;

/// What a burst of so many frames and bytes may be charged. So many frames were received, and so
/// many copies delivered, by system calls.
#[inline]
pub(super) fn max_charge_ns(frames: u64, bytes: u64, by_calls: u64) -> u64 {
    BURST_NS + FRAME_NS * frames + bytes / 8 + CALL_NS * by_calls
}

/// Nanoseconds without service for one that was wasted.
const WASTE_PRICE: u64 = 24;

/// Longest wait for wasted time, in nanoseconds, however many waste it.
const MAX_WAIT_NS: u64 = 100_000_000;

/// Nanoseconds without service for one in which memory kept the worker asleep,
const SLEEP_PRICE: u64 = 100;
/// and for one of work beyond what frames take, of which a destination was the cause.
const WORK_PRICE: u64 = 8;

/// Longest wait for time that the worker slept, in nanoseconds, however many have it sleep.
const MAX_SLEEP_WAIT_NS: u64 = 300_000_000_000;

/// What reading a descriptor costs, in nanoseconds: most are in no cache.
const DESCRIPTOR_NS: u64 = 10;

/// Descriptors that a frame is worth whatever its length: a guest that receives without
/// VIRTIO_NET_F_MRG_RXBUF offers chains of 19.
const DESCRIPTORS_PER_FRAME: u64 = 32;

/// Bytes that are worth one descriptor more.
const BYTES_PER_DESCRIPTOR: u64 = 64;

/// Nanoseconds wasted with so many descriptors read for this.
#[inline]
fn wasted_ns(walked: u32, frames: u64, bytes: u64) -> u64 {
    let worth = frames * DESCRIPTORS_PER_FRAME + bytes / BYTES_PER_DESCRIPTOR;
    u64::from(walked).saturating_sub(worth) * DESCRIPTOR_NS
}

/// What a nanosecond costs in which a frame is copied to all, in nanoseconds: nobody asked for it.
const FLOOD_PRICE: u64 = 16;

/// What a burst is charged that took so long and of whose frames so many copies went to all.
#[cold]
pub(super) fn with_price_of_floods(took_ns: u64, frames: u64, copies: u64) -> u64 {
    let flooded_ns = took_ns * copies / (copies + frames);
    took_ns + (FLOOD_PRICE - 1) * flooded_ns
}

#[derive(Clone, Copy, Debug, Default)]
struct Account {
    /// Time that the port has had, on the clock of shares.
    had_ns: u64,
    /// No service until then, on the worker's clock.
    waits_until_ns: u64,
}

/// The accounts of all ports with one worker.
#[derive(Debug)]
pub(super) struct Ledger {
    accounts: Box<[Account]>,
    /// What the port that had least had, of those that had frames in the turn before; it never goes
    /// back.
    least_ns: u64,
    /// The same of this turn so far.
    next_ns: u64,
    /// When all that was wasted will be paid for,
    paid_ns: u64,
    /// and all that the worker slept.
    slept_paid_ns: u64,
}

impl Ledger {
    pub(super) fn new() -> Self {
        Self {
            accounts: vec![Account::default(); MAX_PORTS].into(),
            least_ns: 0,
            next_ns: u64::MAX,
            paid_ns: 0,
            slept_paid_ns: 0,
        }
    }

    /// Forgets a port whose slot changes hands.
    pub(super) fn forget(&mut self, port: PortId) {
        self.accounts[port.index()] = Account::default();
    }

    /// Whether a port is to be polled now. One that is not stays in the reckoning.
    #[inline]
    pub(super) fn may_poll(&mut self, port: PortId, now_ns: u64) -> bool {
        let account = &self.accounts[port.index()];
        if now_ns < account.waits_until_ns {
            return false;
        }
        if account.had_ns <= self.least_ns + LEAD_NS {
            return true;
        }
        self.next_ns = self.next_ns.min(account.had_ns);
        false
    }

    /// Whether a port waits for what it wasted.
    #[inline]
    pub(super) fn waits(&self, port: PortId, now_ns: u64) -> bool {
        now_ns < self.accounts[port.index()].waits_until_ns
    }

    /// Charges a port for a burst of its frames.
    #[inline]
    pub(super) fn charge(&mut self, port: PortId, took_ns: u64) {
        let account = &mut self.accounts[port.index()];
        account.had_ns = account.had_ns.max(self.least_ns) + took_ns;
        self.next_ns = self.next_ns.min(account.had_ns);
    }

    /// Charges a port for descriptors that were read one by one for so many frames and bytes: for
    /// what is beyond their worth it has to wait.
    #[inline]
    pub(super) fn charge_walk(
        &mut self,
        port: PortId,
        walked: u32,
        (frames, bytes): (u64, u64),
        now_ns: u64,
    ) {
        let wasted_ns = wasted_ns(walked, frames, bytes);
        if wasted_ns > 0 {
            self.charge_waste(port, wasted_ns, now_ns);
        }
    }

    /// Has a port wait for what it wasted.
    #[cold]
    fn charge_waste(&mut self, port: PortId, wasted_ns: u64, now_ns: u64) {
        let until_ns = self.paid_ns.max(now_ns) + WASTE_PRICE * wasted_ns;
        self.paid_ns = until_ns.min(now_ns + MAX_WAIT_NS);
        self.accounts[port.index()].waits_until_ns = self.paid_ns;
    }

    /// Charges a destination for work beyond what frames for it take: it has to wait, since whoever sends
    /// to it has no part in that.
    pub(super) fn charge_destination(&mut self, port: PortId, ns: u64, now_ns: u64) {
        let account = &mut self.accounts[port.index()];
        let until_ns = now_ns + WORK_PRICE * ns;
        account.waits_until_ns = account.waits_until_ns.max(until_ns);
    }

    /// Has a port wait whose memory had the worker sleep, and returns for how long.
    pub(super) fn charge_sleep(&mut self, port: PortId, ns: u64, now_ns: u64) -> u64 {
        let until_ns = self.slept_paid_ns.max(now_ns) + ns.saturating_mul(SLEEP_PRICE);
        self.slept_paid_ns = until_ns.min(now_ns + MAX_SLEEP_WAIT_NS);
        let account = &mut self.accounts[port.index()];
        account.waits_until_ns = account.waits_until_ns.max(self.slept_paid_ns);
        self.slept_paid_ns - now_ns
    }

    /// Ends a turn.
    #[inline]
    pub(super) fn end_turn(&mut self) {
        if self.next_ns != u64::MAX {
            self.least_ns = self.least_ns.max(self.next_ns);
            self.next_ns = u64::MAX;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16) -> PortId {
        PortId::new(number).unwrap()
    }

    /// Time that each port has of `turns` turns, at these costs of a burst; those that cost nothing
    /// have no frames.
    fn run(ledger: &mut Ledger, costs: &[u64], turns: usize) -> Vec<u64> {
        let mut had = vec![0; costs.len()];
        for _ in 0..turns {
            for (at, cost) in costs.iter().enumerate() {
                let port = port(u16::try_from(at).unwrap());
                if *cost > 0 && ledger.may_poll(port, 0) {
                    ledger.charge(port, *cost);
                    had[at] += cost;
                }
            }
            ledger.end_turn();
        }
        had
    }

    #[test]
    fn ports_have_the_same_time_whatever_their_bursts_cost() {
        let costs = [2_000, 2_100, 64_000, 200_000];
        let had = run(&mut Ledger::new(), &costs, 100_000);
        let (least, most) = (had.iter().min().unwrap(), had.iter().max().unwrap());
        assert!(most - least <= LEAD_NS + 2 * 200_000, "{had:?}");
    }

    #[test]
    fn ports_that_cost_the_same_are_polled_in_each_turn() {
        let had = run(&mut Ledger::new(), &[3_000; 5], 1_000);
        assert_eq!(had, [3_000_000; 5]);
        // Alone, whatever it costs: a turn is lost for each that makes a port its own successor.
        let had = run(&mut Ledger::new(), &[0, 200_000], 1_000);
        assert!(had[1] >= 499 * 200_000, "{had:?}");
    }

    #[test]
    fn silence_saves_nothing_up() {
        let mut ledger = Ledger::new();
        run(&mut ledger, &[2_000, 0], 100_000);
        let had = run(&mut ledger, &[2_000, 2_000], 1_000);
        assert_eq!(had, [2_000_000; 2]);
    }

    #[test]
    fn who_floods_has_a_small_part_of_the_time_that_others_want() {
        let mut ledger = Ledger::new();
        let mut had = [0, 0];
        for _ in 0..100_000 {
            for (at, copies) in [(0, 64 * 63), (1, 0)] {
                let took_ns = if copies > 0 { 100_000 } else { 3_000 };
                if ledger.may_poll(port(at), 0) {
                    let charged_ns = with_price_of_floods(took_ns, 64, copies);
                    ledger.charge(port(at), charged_ns);
                    had[usize::from(at)] += took_ns;
                }
            }
            ledger.end_turn();
        }
        assert!(had[0] * 15 <= had[1] && had[0] * 17 >= had[1], "{had:?}");
    }

    // A thread that was preempted in a burst took no time of anybody's.
    #[test]
    fn a_burst_is_charged_no_more_than_it_can_have_taken() {
        assert!(max_charge_ns(64, 64 * 60, 0) < LEAD_NS);
        // 256 KiB are copied at 10 GB/s or more.
        assert!(max_charge_ns(4, 256 << 10, 0) > 26_000);
        // From a tap to 64 others.
        assert!(max_charge_ns(64, 64 * 60, 65 * 64) > 65 * 64 * 2_000);
    }

    /// The part of the time that wasters have who come back as soon as they may.
    fn wasted_part(wasters: u16, each_ns: u64) -> f64 {
        let mut ledger = Ledger::new();
        let (mut now_ns, mut wasted) = (0, 0);
        while now_ns < 1_000_000_000 {
            for waster in 0..wasters {
                if ledger.may_poll(port(waster), now_ns) {
                    now_ns += each_ns;
                    wasted += each_ns;
                    ledger.charge_waste(port(waster), each_ns, now_ns);
                }
            }
            now_ns += 1_000;
        }
        wasted as f64 / now_ns as f64
    }

    #[test]
    fn those_who_waste_have_a_small_part_of_the_time_together() {
        for wasters in [1, 4, 64] {
            let part = wasted_part(wasters, 20_000);
            let most = 1.1 / (WASTE_PRICE + 1) as f64;
            assert!(part <= most, "{wasters}: {part}");
            assert!(
                part >= 0.02,
                "{wasters}: they are served all the same: {part}"
            );
        }
    }

    #[test]
    fn a_destination_waits_for_several_times_the_work_that_it_caused() {
        let mut ledger = Ledger::new();
        ledger.charge_destination(port(1), 1_000, 7);
        ledger.charge_destination(port(1), 10, 8);
        assert!(ledger.waits(port(1), 7 + WORK_PRICE * 1_000 - 1));
        assert!(!ledger.waits(port(1), 7 + WORK_PRICE * 1_000));
    }

    #[test]
    fn those_whose_memory_has_the_worker_sleep_have_one_part_in_a_hundred_together() {
        let mut ledger = Ledger::new();
        let (mut now_ns, mut slept_ns, each_ns) = (1, 0, 400_000_000);
        while now_ns < 2 * MAX_SLEEP_WAIT_NS {
            for number in 0..4 {
                if !ledger.waits(port(number), now_ns) {
                    now_ns += each_ns;
                    slept_ns += each_ns;
                    let waits_ns = ledger.charge_sleep(port(number), each_ns, now_ns);
                    assert!(ledger.waits(port(number), now_ns + waits_ns - 1));
                }
            }
            now_ns += 1_000_000;
        }
        // All four begin at once.
        assert!(
            (slept_ns - 4 * each_ns) * SLEEP_PRICE <= now_ns,
            "{slept_ns} of {now_ns}"
        );
    }

    #[test]
    fn waste_is_what_is_read_beyond_what_frames_are_worth() {
        // Chains of 19 as Linux without mergeable buffers offers them; 64 KiB in pages.
        assert_eq!(wasted_ns(64 * 19, 64, 64 * 60), 0);
        assert_eq!(wasted_ns(17 * 4, 4, 4 * 65_000), 0);
        assert_eq!(wasted_ns(1024, 0, 0), 1024 * DESCRIPTOR_NS);
        assert_eq!(wasted_ns(1024, 1, 64), (1024 - 33) * DESCRIPTOR_NS);
        let mut ledger = Ledger::new();
        ledger.charge_waste(port(3), 1_000, 5);
        assert!(ledger.waits(port(3), 5 + WASTE_PRICE * 1_000 - 1));
        assert!(!ledger.waits(port(3), 5 + WASTE_PRICE * 1_000));
        assert!(!ledger.waits(port(2), 6));
        ledger.forget(port(3));
        assert!(ledger.may_poll(port(3), 6));
    }
}
