//! The driver's side of virtio-net: a vhost-user front-end with memory and rings of its own.
//!
//! It stands in for QEMU and a guest in tests, benches and the load generator, and drives any
//! back-end. It shares nothing with the device's side, not even the numbers of feature bits: a
//! misreading of the specification then shows as a failing test instead of agreeing with itself.
//!
//! ```text
//! GuestBuilder ── Guest ── DriverRing        chains of any shape, rules kept
//!   │        └── FixedGuest ── Preposted      fixed buffers, bursts at full rate
//!   │                 └─ SplitArea | PackedArea      raw fields, rules may be broken
//!   │                         └─ Window ─ DriverMemory (memfd regions)
//!   └── Frontend ── socket ── back-end
//! ```
//! A [`FrameSource`] stands at the other end of a NIC instead; its XDP program is loaded by the
//! same few calls (`ringway-xdp`) as a NIC port's.

mod buffers;
mod builder;
mod event;
pub mod features;
mod fixed;
#[cfg_attr(not(feature = "af-xdp"), path = "no_frame_source.rs")]
mod frame_source;
mod frontend;
mod guest;
mod memory;
mod packed;
mod pair;
mod preposted;
mod queue;
mod session;
mod split;

pub use buffers::BufferPool;
pub use builder::{GuestBuilder, Negotiated};
pub use event::{EventFd, wait_any};
pub use fixed::{FixedGuest, FixedPair, FixedQueue, FixedRings, FixedSlots};
pub use frame_source::FrameSource;
pub use frontend::{
    Frontend, FrontendError, FrontendReply, HEADER_BYTES, MAX_FDS, MAX_REPLY_BYTES,
    WANTED_PROTOCOL_FEATURES, encode,
};
pub use guest::{Guest, GuestError, NET_HEADER_BYTES, ReceivedFrame};
pub use memory::{
    DriverMemory, DriverMemoryError, HUGE_PAGE_BYTES, RegionLayout, RegionView, Window,
};
pub use packed::{DESC_F_AVAIL, DESC_F_USED, PackedArea, PackedDesc, PackedDriverRing, Position};
pub use pair::{GuestRxQueue, GuestTxQueue};
pub use preposted::{BufferSide, Preposted, PrepostedShape, UsedSlot};
pub use queue::{
    AddError, Buffer, Calls, DESC_BYTES, DeviceFault, DriverRing, Layout, MAX_QUEUE_SIZE,
    RingOptions, RingPlace, RingSetupError, Used,
};
pub use session::{DeviceStart, RingSetup};
pub use split::{
    DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, SplitArea, SplitDesc, SplitDriverRing,
};

#[cfg(test)]
mod tests;
