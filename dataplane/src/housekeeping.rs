//! Slow work that no worker should do: forgetting addresses that were not seen for long, and
//! interrupting calls by which a front-end holds up a worker.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{self as channel, RecvTimeoutError, Sender};
use ringway_bridge::{Bridge, Tick};

use crate::port::interrupt_stuck_calls;

/// How often the database is swept. Expired entries are not used even before: the sweep only makes
/// room and keeps the ports' counts true.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// How often stuck calls are looked for. A front-end can hold up a worker for two of these, once;
/// looking costs 10 wake-ups a second.
const CALL_INTERVAL: Duration = Duration::from_millis(100);

/// The thread; ends when dropped.
#[derive(Debug)]
pub(crate) struct Housekeeping {
    /// Dropped to end the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Housekeeping {
    /// Starts the thread. `epoch` is the zero of the bridge's ticks.
    ///
    /// # Errors
    /// There can be no further thread.
    pub(crate) fn start(bridge: Arc<Bridge>, epoch: Instant) -> io::Result<Self> {
        let (stop, stopped) = channel::bounded(0);
        let run = move || {
            let mut swept = Instant::now();
            while stopped.recv_timeout(CALL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                interrupt_stuck_calls();
                if swept.elapsed() >= SWEEP_INTERVAL {
                    swept = Instant::now();
                    bridge.fdb().age(Tick::after(epoch.elapsed()));
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("ringway-house".into())
            .spawn(run)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Housekeeping {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It can't panic, and there is nothing to do if it did.
            let _ = thread.join();
        }
    }
}
