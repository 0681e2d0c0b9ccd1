//! Synthetic guests: a load for any vhost-user back-end, and comparisons with peers.
//!
//! One thread, pinned to a core of its own, plays both guests of each pair. It polls, keeps its
//! buffers where they are and touches a frame only when asked to, so that it costs far less than
//! what it measures; it tells how much of its time it was busy, so that a result that it limits
//! itself is seen.

mod args;
mod by_hand;
mod compare;
mod error;
mod frame;
mod guest;
mod huge;
mod load;
mod memcpy;
mod meter;
mod nic;
mod open_loop;
mod rate;
mod report;
mod run;
mod switch;
mod virtio_user;

pub(crate) use compare::{CompareArgs, compare};
pub(crate) use error::LoadError;
pub(crate) use run::{RunArgs, run};
