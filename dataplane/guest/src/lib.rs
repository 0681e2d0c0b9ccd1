//! The driver's side of virtio-net: a vhost-user front-end with memory and rings of its own.
//!
//! It stands in for QEMU and a guest in tests, benches and the load generator, and drives any
//! back-end. It shares nothing with the device's side, not even the numbers of feature bits: a
//! misreading of the specification then shows as a failing test instead of agreeing with itself.
//!
//! ```text
//! Guest ── Ring (SplitRing | PackedRing)     chains of any shape, rules kept
//!   │   ── Lane                              fixed buffers, bursts at full rate
//!   │         └─ SplitArea | PackedArea      raw fields, rules may be broken
//!   │                └─ Window ─ DriverMemory (memfd regions)
//!   └── Frontend ── socket ── back-end
//! ```
//! A [`FrameSource`] stands at the other end of a NIC instead; its XDP program is loaded by the same
//! few calls (`ringway-xdp`) as a NIC port's.

mod event;
pub mod features;
#[cfg_attr(not(feature = "af-xdp"), path = "no_frame_source.rs")]
mod frame_source;
mod frontend;
mod guest;
mod lane;
mod memory;
mod packed;
mod pair;
mod queue;
mod session;
mod split;

pub use event::{EventFd, wait_any};
pub use frame_source::FrameSource;
pub use frontend::{
    Frontend, FrontendError, HEADER_BYTES, MAX_FDS, MAX_REPLY_BYTES, Reply,
    WANTED_PROTOCOL_FEATURES, encode,
};
pub use guest::{Guest, GuestConfig, GuestError, NET_HEADER_BYTES, Received};
pub use lane::{Direction, Lane, LaneShape, RingArea, UsedSlot};
pub use memory::{
    DriverMemory, DriverMemoryError, HUGE_PAGE_BYTES, RegionLayout, RegionView, Window,
};
pub use packed::{DESC_F_AVAIL, DESC_F_USED, PackedArea, PackedDesc, PackedRing, Position};
pub use pair::{RxQueue, TxQueue};
pub use queue::{
    AddError, Calls, DESC_BYTES, DeviceFault, Layout, MAX_QUEUE_SIZE, Ring, RingOptions, RingPlace,
    RingSetupError, Segment, Used,
};
pub use session::{DeviceStart, RingStart};
pub use split::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, SplitArea, SplitDesc, SplitRing};

#[cfg(test)]
mod tests;
