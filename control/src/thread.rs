//! A thread that is told to end, and waited for, when its owner goes.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Ends with this value: `S` is dropped, which tells the thread, and the thread is joined.
#[derive(Debug)]
pub(crate) struct OwnedThread<S> {
    stop: Option<S>,
    thread: Option<JoinHandle<()>>,
}

impl<S> OwnedThread<S> {
    /// Starts a thread of this name, which ends once `stop` is dropped.
    ///
    /// # Errors
    /// There can be no further thread.
    pub(crate) fn start(
        name: &str,
        stop: S,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let thread = Builder::new().name(name.into()).spawn(run)?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl<S> Drop for OwnedThread<S> {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic was told where it happened.
            let _ = thread.join();
        }
    }
}
