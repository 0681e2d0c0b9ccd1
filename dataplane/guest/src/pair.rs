//! The two queues of a [`super::Guest`]'s queue pair.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::buffers::BufferPool;
use super::builder::GuestBuilder;
use super::event::EventFd;
use super::guest::{GuestError, NET_HEADER_BYTES, ReceivedFrame};
use super::memory::DriverMemory;
use super::queue::{AddError, Calls, DriverRing, Used};
use super::session::RingSetup;

/// A receive queue whose buffers are posted.
#[derive(Debug)]
pub struct GuestRxQueue {
    ring: DriverRing,
    kick: EventFd,
    call: EventFd,
    buffers: BufferPool,
    pair: u16,
    mergeable: bool,
    chained: bool,
    /// Used buffers that were not made into frames yet.
    pending: VecDeque<Used>,
    used: Vec<Used>,
}

impl GuestRxQueue {
    pub(super) fn new(
        memory: &Arc<DriverMemory>,
        ring: DriverRing,
        pair: u16,
        config: &GuestBuilder,
    ) -> Result<Self, GuestError> {
        let direct_chain = config.chained && !config.indirect;
        let count = config.queue_size / if direct_chain { 2 } else { 1 };
        let mut queue = Self {
            ring,
            kick: EventFd::new()?,
            call: EventFd::new()?,
            buffers: BufferPool::new(memory, count, config.buffer_size)?,
            pair,
            mergeable: config.mergeable,
            chained: config.chained,
            pending: VecDeque::new(),
            used: Vec::new(),
        };
        for buffer in 0..count {
            queue.post(buffer)?;
        }
        // Nobody listens yet; the back-end looks at each ring once when it starts.
        let _ = queue.ring.publish();
        Ok(queue)
    }

    /// Its ring.
    pub fn ring(&self) -> &DriverRing {
        &self.ring
    }

    /// Its ring, for tests that break rules.
    pub fn ring_mut(&mut self) -> &mut DriverRing {
        &mut self.ring
    }

    /// Driver to device.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Device to driver.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Its ring and events as a session starts them.
    pub(super) fn start(&self) -> RingSetup<'_> {
        RingSetup {
            place: self.ring.place(),
            kick: &self.kick,
            call: &self.call,
        }
    }

    /// Takes what the device has used, without making frames of it.
    pub(super) fn reap(&mut self) -> Result<(), GuestError> {
        let outcome = self.ring.reap(&mut self.used);
        self.pending.extend(self.used.drain(..));
        outcome?;
        Ok(())
    }

    /// Wants a call for the next buffer. True if one is used already.
    pub(super) fn arm(&mut self) -> io::Result<bool> {
        self.call.take()?;
        Ok(self.ring.set_calls(Calls::Next))
    }

    /// The next frame if there is one; its buffers are posted again.
    pub(super) fn try_recv(&mut self) -> Result<Option<ReceivedFrame>, GuestError> {
        self.reap()?;
        let Some(first) = self.pending.front().copied() else {
            return Ok(None);
        };
        let mut header = [0; NET_HEADER_BYTES];
        let bad = |buffers| GuestError::BadReceive {
            buffers,
            len: first.len,
        };
        if (first.len as usize) < NET_HEADER_BYTES {
            return Err(bad(1));
        }
        self.buffers.read(token_buffer(first), 0, &mut header);
        let count = if self.mergeable {
            u16::from_le_bytes([header[10], header[11]])
        } else {
            1
        };
        if count == 0 || usize::from(count) > self.buffers.count() {
            return Err(bad(count));
        }
        if self.pending.len() < usize::from(count) {
            // The rest of the frame is on its way.
            return Ok(None);
        }
        let parts: Vec<Used> = self.pending.drain(..usize::from(count)).collect();
        let mut frame = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            let skip = if i == 0 { NET_HEADER_BYTES } else { 0 };
            let start = frame.len();
            frame.resize(start + part.len as usize - skip, 0);
            self.buffers
                .read(token_buffer(*part), skip, &mut frame[start..]);
        }
        for part in parts {
            self.post(token_buffer(part))?;
        }
        if self.ring.publish() {
            self.kick.signal()?;
        }
        Ok(Some(ReceivedFrame {
            pair: self.pair,
            header,
            frame,
        }))
    }

    fn post(&mut self, buffer: u16) -> Result<(), AddError> {
        let len = self.buffers.stride();
        let room = self.buffers.describe(buffer, len, self.chained);
        self.ring.add(&[], &room, u32::from(buffer))
    }
}

/// A transmit queue and its buffers.
#[derive(Debug)]
pub struct GuestTxQueue {
    ring: DriverRing,
    kick: EventFd,
    call: EventFd,
    buffers: BufferPool,
    chained: bool,
    free: Vec<u16>,
    /// Buffers of the frame that starts in this one, while it is in flight.
    frames: Vec<Vec<u16>>,
    used: Vec<Used>,
}

impl GuestTxQueue {
    pub(super) fn new(
        memory: &Arc<DriverMemory>,
        ring: DriverRing,
        config: &GuestBuilder,
    ) -> Result<Self, GuestError> {
        let count = config.queue_size;
        Ok(Self {
            ring,
            kick: EventFd::new()?,
            call: EventFd::new()?,
            buffers: BufferPool::new(memory, count, config.buffer_size)?,
            chained: config.chained,
            free: (0..count).rev().collect(),
            frames: vec![Vec::new(); usize::from(count)],
            used: Vec::new(),
        })
    }

    /// Its ring.
    pub fn ring(&self) -> &DriverRing {
        &self.ring
    }

    /// Its ring, for tests that break rules.
    pub fn ring_mut(&mut self) -> &mut DriverRing {
        &mut self.ring
    }

    /// Driver to device.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Device to driver.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Its ring and events as a session starts them.
    pub(super) fn start(&self) -> RingSetup<'_> {
        RingSetup {
            place: self.ring.place(),
            kick: &self.kick,
            call: &self.call,
        }
    }

    /// Frees the buffers of what the device has used.
    pub(super) fn reap(&mut self) -> Result<(), GuestError> {
        let outcome = self.ring.reap(&mut self.used);
        for used in self.used.drain(..) {
            let frame = &mut self.frames[usize::from(token_buffer(used))];
            self.free.append(frame);
        }
        outcome?;
        Ok(())
    }

    /// Waits until something more is used; false after `timeout`.
    pub(super) fn wait_used(&mut self, timeout: Duration) -> Result<bool, GuestError> {
        self.call.take()?;
        Ok(self.ring.set_calls(Calls::Next) || self.call.wait(timeout)?)
    }

    pub(super) fn send_burst<F: AsRef<[u8]>>(&mut self, frames: &[F]) -> Result<usize, GuestError> {
        self.reap()?;
        let mut sent = 0;
        for frame in frames {
            if !self.put(frame.as_ref())? {
                break;
            }
            sent += 1;
        }
        if self.ring.publish() {
            self.kick.signal()?;
        }
        Ok(sent)
    }

    /// Adds one frame; false if there is no room for it now.
    fn put(&mut self, frame: &[u8]) -> Result<bool, GuestError> {
        let size = self.buffers.stride() as usize;
        let needed = frame.len().div_ceil(size).max(1);
        if needed > self.frames.len() {
            return Err(GuestError::Add(AddError::Shape {
                buffers: needed,
                size: self.ring.place().size,
            }));
        }
        if needed > self.free.len() {
            return Ok(false);
        }
        let taken = self.free.split_off(self.free.len() - needed);
        let mut chain = Vec::with_capacity(needed + 1);
        for (i, (buffer, part)) in taken.iter().zip(frame.chunks(size)).enumerate() {
            self.buffers.write(*buffer, 0, part);
            // A buffer's size is a u32.
            let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
            chain.extend(self.buffers.describe(*buffer, len, self.chained && i == 0));
        }
        let first = taken[0];
        match self.ring.add(&chain, &[], u32::from(first)) {
            Ok(()) => {
                self.frames[usize::from(first)] = taken;
                Ok(true)
            }
            Err(AddError::Full) => {
                self.free.extend(taken);
                Ok(false)
            }
            Err(e) => {
                self.free.extend(taken);
                Err(e.into())
            }
        }
    }
}

/// Tokens are buffer numbers.
fn token_buffer(used: Used) -> u16 {
    u16::try_from(used.token).unwrap_or(u16::MAX)
}
