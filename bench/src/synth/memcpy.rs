//! A plain copy loop over as much memory as the buffers of a load's rings: what no switch that
//! copies can outrun.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use ringway_guest::{DriverMemory, Window};

use super::guest::receive_buffer_bytes;
use super::load::LoadConfig;

/// Frames shorter than this are not bound by copying.
pub(crate) const SMALLEST: u32 = 9000;
/// Copies between two looks at the clock.
const BURST: usize = 32;

/// Buffers of one direction: a transmit ring's and a receive ring's.
#[derive(Debug)]
struct CopyWay {
    from: Window,
    to: Window,
    at_from: usize,
    at_to: usize,
}

impl CopyWay {
    fn new(memory: &Arc<DriverMemory>, from: u64, to: u64) -> Result<Self> {
        let window = |bytes: u64| -> Result<Window> {
            let addr = memory.alloc(bytes, 4096)?;
            let window = memory.window(addr, bytes)?;
            // Pages that nobody wrote to yet would cost a fault each.
            let page = [1; 4096];
            for at in (0..window.len()).step_by(page.len()) {
                window.write(at, &page[..page.len().min(window.len() - at)]);
            }
            Ok(window)
        };
        Ok(Self {
            from: window(from)?,
            to: window(to)?,
            at_from: 0,
            at_to: 0,
        })
    }

    fn copy(&mut self, len: usize) {
        self.to.copy_from(self.at_to, &self.from, self.at_from, len);
        let next = |at: usize, of: &Window| {
            if at + 2 * len <= of.len() {
                at + len
            } else {
                0
            }
        };
        self.at_from = next(self.at_from, &self.from);
        self.at_to = next(self.at_to, &self.to);
    }
}

/// Copies frames of the load's size for `duration`, both ways, and returns frames per second.
pub(crate) fn trial(config: &LoadConfig, duration: Duration) -> Result<f64> {
    let frame = config.sizes[0];
    let len = frame as usize;
    let slots = u64::from(config.shape.slots());
    let sent = slots * u64::from(frame);
    let received = slots * u64::from(receive_buffer_bytes(config.shape, frame));
    let received = received.max(u64::from(frame));
    let memory = DriverMemory::single(2 * (sent + received + 8192), config.shape.huge)?;
    let mut ways = [
        CopyWay::new(&memory, sent, received)?,
        CopyWay::new(&memory, sent, received)?,
    ];
    let start = Instant::now();
    let mut copied = 0u64;
    while start.elapsed() < duration {
        for way in &mut ways {
            (0..BURST).for_each(|_| way.copy(len));
        }
        copied += 2 * BURST as u64;
    }
    Ok(copied as f64 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_go_round_in_both_buffers() {
        let memory = DriverMemory::single(1 << 16, false).unwrap();
        let mut way = CopyWay::new(&memory, 300, 200).unwrap();
        way.from.write(200, &[7; 100]);
        let mut back = [0; 200];
        (0..3).for_each(|_| way.copy(100));
        way.to.read(0, &mut back);
        assert_eq!(back[..100], [7; 100]);
        assert_eq!(back[100..], [1; 100]);
        assert_eq!((way.at_from, way.at_to), (0, 100));
    }
}
