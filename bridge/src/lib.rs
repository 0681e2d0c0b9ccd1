//! The pure half of ringway: decides where frames go, and does no I/O.
//!
//! ```text
//!  first bytes --FrameHead::parse--> runs --Bridge::forward--> Decisions
//!                                              |        ^         destinations (port, frames)
//!                                        learn |        | look up drops (reason, frames)
//!                                              v        |
//!                                             Fdb (shared by all workers)
//! ```
//!
//! There is no clock (time is a [`Tick`] argument), no socket, and no allocation after
//! construction: a worker calls [`Bridge::forward`] once per burst.
#![forbid(unsafe_code)]

mod drop_reason;
mod fdb;
mod flood;
mod forward;
mod frame;
mod frame_set;
mod types;
mod vlan;

pub use drop_reason::{DropCounts, DropReason};
pub use fdb::{Fdb, FdbConfig, FdbError, FdbTally, Learned, MAX_FDB_CAPACITY};
pub use forward::{Arrivals, Bridge, BridgeConfig, Decisions, Members, Run};
pub use frame::{FrameHead, Headers, L4Protocol, MAX_EXTENSION_HEADERS, MAX_VLAN_TAGS};
pub use frame_set::FrameSet;
pub use types::{MAX_BURST, MAX_PORTS, MacAddr, NoSuchSlot, ParseMacError, PortId, Station, Tick};
pub use vlan::{Class, Native, PortVlans, Retag, TAG_BYTES, TagType, VlanId, VlanSet, Vlans};
