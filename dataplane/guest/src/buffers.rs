//! Equal buffers in one piece of a guest's memory.

use std::sync::Arc;

use super::memory::{DriverMemory, DriverMemoryError, Window};
use super::queue::Buffer;

/// [`super::NET_HEADER_BYTES`] as the length of a descriptor.
const HEADER_LEN: u32 = 12;

/// Buffers that lie one behind the other.
#[derive(Debug)]
pub struct BufferPool {
    addr: u64,
    stride: u32,
    window: Window,
}

impl BufferPool {
    pub(crate) fn new(
        memory: &Arc<DriverMemory>,
        count: u16,
        stride: u32,
    ) -> Result<Self, DriverMemoryError> {
        let bytes = u64::from(count) * u64::from(stride);
        let addr = memory.alloc(bytes, 64)?;
        let window = memory.window(addr, bytes)?;
        Ok(Self {
            addr,
            stride,
            window,
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.window.len() / self.stride as usize
    }

    /// Bytes from one to the next.
    pub(crate) fn stride(&self) -> u32 {
        self.stride
    }

    /// Copies bytes into a buffer.
    #[inline]
    pub fn write(&self, buffer: u16, offset: usize, bytes: &[u8]) {
        self.window.write(self.offset(buffer) + offset, bytes);
    }

    /// Copies bytes out of a buffer.
    #[inline]
    pub fn read(&self, buffer: u16, offset: usize, bytes: &mut [u8]) {
        self.window.read(self.offset(buffer) + offset, bytes);
    }

    /// The first `len` bytes of a buffer as descriptors: one, or two with the header apart.
    pub(crate) fn describe(&self, buffer: u16, len: u32, header_apart: bool) -> Vec<Buffer> {
        let addr = self.addr + u64::from(buffer) * u64::from(self.stride);
        if !header_apart || len <= HEADER_LEN {
            return vec![Buffer { addr, len }];
        }
        let header = Buffer {
            addr,
            len: HEADER_LEN,
        };
        let rest = Buffer {
            addr: addr + u64::from(HEADER_LEN),
            len: len - HEADER_LEN,
        };
        vec![header, rest]
    }

    #[inline]
    fn offset(&self, buffer: u16) -> usize {
        usize::from(buffer) * self.stride as usize
    }
}
