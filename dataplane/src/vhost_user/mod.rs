//! The vhost-user back-end: codec and state machine without sockets, and a thin socket shell.
//!
//! ```text
//! socket --bytes, fds--> message --Request--> session --> Device
//!    ^                      ^                    |
//!    +-------- Reply -------+--------------------+        server: one thread for all of them
//! ```

mod device;
mod endpoint;
mod foreign;
mod link;
mod message;
mod offer;
mod price;
mod reactor;
mod relay;
mod server;
mod session;
mod socket;
#[cfg(test)]
mod test_device;
mod vring;

pub(crate) use device::{Device, RingError, RingStart};
pub(crate) use endpoint::Endpoint;
pub(crate) use foreign::is_eventfd;
pub(crate) use price::Announcements;
pub(crate) use server::SessionThread;
