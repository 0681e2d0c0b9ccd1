//! The pure half of ringway: decides where frames go, and does no I/O.
#![forbid(unsafe_code)]

mod drop_reason;
mod types;

pub use drop_reason::{DropCounts, DropReason};
pub use types::{MAX_BURST, MAX_PORTS, MacAddr, ParseMacError, PortId, Tick};
