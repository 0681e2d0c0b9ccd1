//! How a switch starts.

use std::time::Duration;

use crate::GroupFwdMask;

/// Bounds of the idle ladder: spin, then pause, then sleep in epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleConfig {
    /// Poll a silent queue at full speed for this long; less if somebody else wants the core,
    /// unless it is [`Duration::MAX`], which means for ever.
    pub spin: Duration,
    /// Then poll with pauses for this long, then arm notifications and sleep.
    pub pause: Duration,
    /// Let a source wait this long for a destination that has no free buffers before its frames
    /// are dropped; counted from the last frame that the destination took.
    pub backpressure: Duration,
}

impl IdleConfig {
    /// Long enough to bridge the gaps of a TCP flow, short enough that a packet a millisecond
    /// costs a third of a core at most.
    pub const DEFAULT: Self = Self {
        spin: Duration::from_micros(50),
        pause: Duration::from_micros(250),
        backpressure: Duration::from_millis(10),
    };
}

impl Default for IdleConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Whether and how often queues move from busy workers to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalanceConfig {
    /// Queues move. If not, loads are measured all the same.
    pub is_on: bool,
    /// Loads are measured over this long, and a few queues move at the end of it if that relieves
    /// a busy worker.
    pub interval: Duration,
}

impl BalanceConfig {
    /// On; long enough to average over what TCP does, short enough that an operator sees it work.
    pub const DEFAULT: Self = Self {
        is_on: true,
        interval: Duration::from_secs(5),
    };
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// How a switch starts.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// One worker per CPU, pinned.
    pub worker_cpus: Vec<usize>,
    /// When workers go to sleep.
    pub idle: IdleConfig,
    /// When queues move between workers.
    pub balance: BalanceConfig,
    /// Entries that the forwarding database can hold.
    pub fdb_capacity: usize,
    /// Learned entries not seen for this long are forgotten (IEEE 802.1Q, 8.8.3: 300 s).
    pub fdb_ageing: Duration,
    /// A learned address that was seen within this time does not move to another port, to a tenth
    /// of a second; with zero it moves at once.
    pub fdb_move_hold: Duration,
    /// Which reserved group addresses are forwarded.
    pub group_fwd_mask: GroupFwdMask,
}

impl SwitchConfig {
    /// A station that stops using its address, or fails over, moves after a second; whoever uses
    /// it meanwhile gets nothing.
    pub const DEFAULT_FDB_MOVE_HOLD: Duration = Duration::from_secs(1);
}
