//! Slow work that no worker should do: forgetting addresses that were not seen for long.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{self as channel, RecvTimeoutError, Sender};
use ringway_bridge::{Bridge, Tick};

/// How often the database is swept. Expired entries are not used even before: the sweep only makes
/// room and keeps the ports' counts true.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// How often what was flushed is swept, so that the ports' counts are true soon after.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// A thread that does something at regular times; ends when dropped.
#[derive(Debug)]
pub(crate) struct Periodic {
    /// Dropped to end the thread.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Periodic {
    /// Starts a thread of this name that does `work` whenever `interval` is over.
    ///
    /// # Errors
    /// There can be no further thread.
    pub(crate) fn start(
        name: &str,
        interval: Duration,
        mut work: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = channel::bounded(0);
        let run = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                work();
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Periodic {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic was told where it happened.
            let _ = thread.join();
        }
    }
}

/// Starts the housekeeping thread. `epoch` is the zero of the bridge's ticks; `look_at_ports` is
/// called at each interval.
///
/// # Errors
/// There can be no further thread.
pub(crate) fn start(
    bridge: Arc<Bridge>,
    epoch: Instant,
    mut look_at_ports: impl FnMut() + Send + 'static,
) -> io::Result<Periodic> {
    let mut swept = Instant::now();
    Periodic::start("ringway-house", LOOK_INTERVAL, move || {
        look_at_ports();
        bridge.fdb().sweep_flushed();
        if swept.elapsed() >= SWEEP_INTERVAL {
            swept = Instant::now();
            bridge.fdb().age(Tick::after(epoch.elapsed()));
        }
    })
}
