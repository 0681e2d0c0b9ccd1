//! The vhost-user back-end: codec and state machine without sockets, and a thin socket shell.

mod device;

pub(crate) use device::{Device, RingAddresses, RingError, RingStart};
