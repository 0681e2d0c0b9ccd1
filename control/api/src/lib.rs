//! The types of ringway's control API: what is configured, what is told, what is refused.
//!
//! The dataplane takes and returns them, so that a setting or a counter is declared once.
#![forbid(unsafe_code)]

mod config;
mod error;

pub use config::{
    AfXdpConfig, BalanceConfig, IdleConfig, MAX_PORT_NAME, MAX_QUEUE_PAIRS, PortConfig, PortKind,
    PortName, PortNameError, QueuePairs, SocketSpec, SwitchConfig, UmemFrames, XdpMode,
};
pub use error::SwitchError;
