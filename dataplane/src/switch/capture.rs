//! Captures: taps in all workers, as long as their reader lives.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringway_api::{PortName, SwitchError};

use super::Switch;
use super::port_table::PortTable;
use crate::capture::{self, CaptureRings, CapturedFrame, Ends, Filter};

/// Most captures at a time: each has 4 MiB for each worker.
const MAX_CAPTURES: usize = 8;

/// Captures that run.
#[derive(Debug, Default)]
pub(super) struct Captures {
    /// Number of the last one.
    last: u64,
    running: BTreeSet<u64>,
}

impl Switch {
    /// Captures frames of these ports from now on, the first `snap_bytes` of each that the filter
    /// wants.
    ///
    /// # Errors
    /// There is no such port, the filter does not compile, or as many capture as may.
    pub fn capture(
        &self,
        ports: &[PortName],
        snap_bytes: u32,
        filter: Option<&str>,
    ) -> Result<CaptureReader, SwitchError> {
        CaptureReader::start(&self.table, ports, snap_bytes, filter)
    }
}

/// What is captured; it is until this is dropped or stopped.
#[derive(Debug)]
pub struct CaptureReader {
    table: Arc<PortTable>,
    id: u64,
    ports: Vec<PortName>,
    rings: CaptureRings,
    is_stopped: bool,
}

impl CaptureReader {
    pub(super) fn start(
        table: &Arc<PortTable>,
        ports: &[PortName],
        snap_bytes: u32,
        filter: Option<&str>,
    ) -> Result<Self, SwitchError> {
        let compiled = |_| filter.map(compile).transpose();
        let filters = table.workers.iter().map(compiled);
        let filters = filters.collect::<Result<Vec<_>, _>>()?;
        let mut state = table.lock();
        let (mut names, mut ids) = (Vec::new(), Vec::new());
        for name in ports {
            let id = state.find(name)?.port.base().id;
            // A port named twice is one interface.
            if !ids.contains(&id) {
                names.push(name.clone());
                ids.push(id);
            }
        }
        let captures = &mut state.captures;
        if captures.running.len() >= MAX_CAPTURES {
            return Err(SwitchError::TooManyStreams {
                what: "captured frames",
                most: MAX_CAPTURES,
            });
        }
        captures.last += 1;
        let id = captures.last;
        captures.running.insert(id);
        let Ends { taps, rings } = capture::make(id, &ids, snap_bytes, filters);
        table.add_taps(taps);
        drop(state);
        Ok(Self {
            table: Arc::clone(table),
            id,
            ports: names,
            rings,
            is_stopped: false,
        })
    }

    /// The ports: a frame's `interface` is the place of its port here.
    pub fn ports(&self) -> &[PortName] {
        &self.ports
    }

    /// An fd that is readable every few milliseconds.
    ///
    /// # Errors
    /// The process has no fd left.
    pub fn clock(&self) -> io::Result<OwnedFd> {
        capture::clock()
    }

    /// The next frame that waits, if there is one.
    pub fn next_frame(&mut self) -> Option<CapturedFrame> {
        self.rings.next()
    }

    /// Copies lost since the capture began, by the place of their port.
    pub fn lost(&self) -> Vec<u64> {
        self.rings.lost()
    }

    /// Captures no further frame; those that wait can still be had.
    pub fn stop(&mut self) {
        if !std::mem::replace(&mut self.is_stopped, true) {
            let mut state = self.table.lock();
            self.table.remove_taps(self.id);
            state.captures.running.remove(&self.id);
        }
    }
}

impl Drop for CaptureReader {
    fn drop(&mut self) {
        self.stop();
    }
}

fn compile(expression: &str) -> Result<Filter, SwitchError> {
    Filter::compile(expression).map_err(|reason| SwitchError::Filter {
        filter: expression.to_owned(),
        reason,
    })
}
