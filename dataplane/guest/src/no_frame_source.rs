//! In place of `frame_source.rs` where AF_XDP is left out: there is no frame source.

use std::convert::Infallible;
use std::io;

/// Sends copies of one frame out of an interface; here there is none.
#[derive(Debug)]
pub struct FrameSource(Infallible);

impl FrameSource {
    /// Refuses.
    ///
    /// # Errors
    /// Always: this build has no AF_XDP (`Unsupported`).
    pub fn new(_interface: u32, _frame: Vec<u8>) -> io::Result<Self> {
        let reason = "built without the cargo feature af-xdp";
        Err(io::Error::new(io::ErrorKind::Unsupported, reason))
    }

    /// Is never called.
    ///
    /// # Errors
    /// None.
    pub fn send(&self, _count: u32) -> io::Result<()> {
        match self.0 {}
    }
}
