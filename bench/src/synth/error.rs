//! Why a load failed.

use std::io;
use std::time::Duration;

use ringway_guest::{DeviceFault, FrontendError, GuestError};

use crate::interrupt::Interrupted;

/// Why a guest of the load failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LoadError {
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("the back-end broke a rule")]
    Device(#[from] DeviceFault),
    #[error("an eventfd or socket is unusable")]
    Io(#[from] io::Error),
    #[error("the back-end did not connect within {0:?}")]
    NotConnected(Duration),
    #[error("the back-end closed the connection")]
    Closed,
    #[error("no frame came through the switch in {0:?}")]
    NoTraffic(Duration),
    #[error("guest {0} received nothing while others did")]
    OneWay(usize),
    #[error("the switch is still flooding: {0} frames came to the wrong guest")]
    Flooded(u64),
    #[error("frames arrive without the header that says how to segment them")]
    Unsegmented,
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    #[error("{0} frames arrived that were not sent or were changed on the way")]
    Corrupt(u64),
}

impl LoadError {
    /// What to do about it.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Frontend(FrontendError::Connect { .. }) => {
                "start the switch first: the load connects to its sockets"
            }
            Self::Guest(GuestError::NotOffered { .. }) => {
                "leave out what needs it (--layout split, --no-mergeable, frames up to 9018 bytes), \
                 or have the back-end offer it"
            }
            Self::Guest(GuestError::QueuePairs { .. }) => {
                "give the back-end's port more queues, or lower --queues"
            }
            Self::Frontend(_) | Self::Guest(GuestError::Frontend(_)) | Self::Closed => {
                "the back-end's log may tell why"
            }
            Self::NoTraffic(_) | Self::OneWay(_) => {
                "is the switch forwarding between these two sockets, at this frame size?"
            }
            Self::Guest(GuestError::Memory(_)) => {
                "somebody else may have taken the memory: --no-huge takes other pages"
            }
            Self::Unsegmented => "the switch can't forward frames for segmentation in this set-up",
            _ => return None,
        })
    }

    /// True if another try ends the same way.
    pub(crate) fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Guest(
                GuestError::NotOffered { .. }
                    | GuestError::QueuePairs { .. }
                    | GuestError::Memory(_)
                    | GuestError::Ring(_)
            ) | Self::Unsegmented
                | Self::Interrupted(_)
        )
    }
}
