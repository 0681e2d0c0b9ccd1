//! Device side of virtqueues: split rings now; packed rings will stand beside them.

mod rx_chain;
mod split;

pub(crate) use rx_chain::RxScratch;
pub(crate) use split::{Areas, SplitRing, areas};

/// How a guest broke the rules of its ring; the ring stops for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RingFault {
    /// More entries made available than the ring has (virtio 1.3, 2.7.13.3.1).
    #[error("avail index {index} is {ahead} ahead of {next} in a ring of {size}")]
    AvailIndex {
        index: u16,
        next: u16,
        ahead: u16,
        size: u16,
    },
    /// An entry of the avail ring or a next field is no descriptor (2.7.5).
    #[error("descriptor {index} does not exist in a table of {size}")]
    DescriptorIndex { index: u16, size: u32 },
    /// A buffer does not lie in guest memory.
    #[error("buffer {addr:#x} of {len} bytes is not in guest memory")]
    Address { addr: u64, len: u32 },
    /// A receive buffer of length 0. QEMU breaks the device for it, so no driver posts one.
    #[error("a receive buffer has no bytes")]
    EmptyBuffer,
    /// Readable where writable is due or the reverse (2.7.4.2).
    #[error("a {ring} buffer has descriptor flags {flags:#x}")]
    Direction { ring: &'static str, flags: u16 },
    /// A chain longer than any the driver may make (2.7.5.1), or a loop.
    #[error("a chain has more than {max} descriptors")]
    ChainTooLong { max: usize },
    /// An indirect descriptor that was not negotiated, nested or malformed (2.7.5.3).
    #[error("indirect descriptor: {rule}")]
    Indirect { rule: &'static str },
}

#[cfg(test)]
mod tests;
