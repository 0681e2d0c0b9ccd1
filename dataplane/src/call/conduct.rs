//! Whether a port's calls cost what calls cost: a pure value, told how long each of them took.
//!
//! By the clock on the wall a call also takes long if its worker loses its core in the middle of
//! it, and that is nobody's fault. So a slow call only opens an examination: the next ones are
//! measured by what they took of the processor.

/// A call that takes as long or longer, by the clock on the wall, is suspicious: usual are one or
/// two microseconds, and some tens on a nested virtual machine.
pub(super) const SUSPICIOUS_NS: u64 = 100_000;

/// Calls that are examined after a suspicious one; that costs two microseconds each.
const EXAMINED: u32 = 200;

/// What each examined call may take of the processor; what is beyond that adds up.
const USUAL_NS: u64 = 50_000;

/// The most that one call adds: an interrupt or the host of a virtual machine may have had that
/// time.
const MOST_NS: u64 = 10_000_000;

/// Excess with which a port is guilty: three calls of 10 ms, or 20 of 1 ms.
const LIMIT_NS: u64 = 20_000_000;

/// The same for a port that was closed before: one call of 10 ms, or five of 1 ms.
const KNOWN_LIMIT_NS: u64 = 4_000_000;

/// What is known of a port's calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Conduct {
    /// Calls that are still to be examined.
    left: u32,
    /// Time of the processor beyond the usual, of those that were.
    excess_ns: u64,
    /// The port was closed before, and that is not forgotten: each call is examined.
    is_known: bool,
}

impl Conduct {
    /// Of a port that was closed for its calls before.
    pub(super) fn known() -> Self {
        Self {
            is_known: true,
            ..Self::default()
        }
    }

    /// Whether the next call is to be measured by time of the processor as well.
    pub(super) fn is_examined(self) -> bool {
        self.left > 0 || self.is_known
    }

    /// Notes a call that took so long by the clock on the wall and, if it was examined, so much of
    /// the processor. True if the port is guilty.
    pub(super) fn note(&mut self, wall_ns: u64, processor_ns: Option<u64>) -> bool {
        self.left = if wall_ns >= SUSPICIOUS_NS {
            EXAMINED
        } else {
            self.left.saturating_sub(1)
        };
        match processor_ns {
            Some(took_ns) => {
                let excess_ns = self.excess_ns + took_ns.min(MOST_NS);
                self.excess_ns = excess_ns.saturating_sub(USUAL_NS);
            }
            None if self.left == 0 => self.excess_ns = 0,
            None => {}
        }
        let limit_ns = if self.is_known {
            KNOWN_LIMIT_NS
        } else {
            LIMIT_NS
        };
        self.excess_ns > limit_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: u64 = 1_000;
    const MS: u64 = 1_000_000;

    /// Calls of one kind until the port is guilty; each is examined if the conduct says so.
    fn calls_until_guilty(mut conduct: Conduct, wall_ns: u64, processor_ns: u64) -> Option<u32> {
        (1..=100_000).find(|_| {
            let examined = conduct.is_examined().then_some(processor_ns);
            conduct.note(wall_ns, examined)
        })
    }

    #[test]
    fn slow_calls_are_guilt_after_a_few() {
        let fresh = Conduct::default();
        assert_eq!(calls_until_guilty(fresh, 12 * MS, 12 * MS), Some(4));
        assert_eq!(calls_until_guilty(fresh, MS, MS), Some(23));
        assert_eq!(calls_until_guilty(fresh, 150 * US, 150 * US), Some(202));
        assert_eq!(calls_until_guilty(fresh, 2 * US, 2 * US), None);
    }

    #[test]
    fn a_port_that_was_closed_before_is_guilty_sooner() {
        assert_eq!(
            calls_until_guilty(Conduct::known(), 12 * MS, 12 * MS),
            Some(1)
        );
        assert_eq!(calls_until_guilty(Conduct::known(), MS, MS), Some(5));
        assert_eq!(calls_until_guilty(Conduct::known(), 3 * US, 3 * US), None);
    }

    /// A worker that loses its core in each and every call: two cores with a load of 15.
    #[test]
    fn a_worker_that_loses_its_core_makes_no_port_guilty() {
        assert_eq!(calls_until_guilty(Conduct::default(), 4 * MS, 3 * US), None);
        assert_eq!(calls_until_guilty(Conduct::known(), 32 * MS, 3 * US), None);
        // On a nested virtual machine, calls themselves take long.
        assert_eq!(
            calls_until_guilty(Conduct::default(), 4 * MS, 40 * US),
            None
        );
    }

    /// Time that an interrupt or a hypervisor took is charged to the call in which it did.
    #[test]
    fn a_stolen_slice_now_and_then_makes_no_port_guilty() {
        let mut conduct = Conduct::default();
        for call in 0..100_000_u32 {
            let ns = if call % 250 == 0 { 100 * MS } else { 2 * US };
            let examined = conduct.is_examined().then_some(ns);
            assert!(!conduct.note(ns, examined), "call {call}");
        }
    }

    #[test]
    fn good_conduct_ends_the_examination_and_clears() {
        let mut conduct = Conduct::default();
        conduct.note(12 * MS, None);
        assert!(conduct.is_examined());
        conduct.note(12 * MS, Some(12 * MS));
        for _ in 0..=EXAMINED {
            let examined = conduct.is_examined().then_some(2 * US);
            conduct.note(2 * US, examined);
        }
        assert_eq!(conduct, Conduct::default());
    }
}
