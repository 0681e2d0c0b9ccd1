//! What the daemon tells by itself, as lines of a connection.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringway_api::{ApiError, Event, SwitchError};
use ringway_dataplane::{CaptureReader, EventReader};
use serde::Serialize;

use super::pcapng::CaptureFile;
use crate::rpc::Stream;

/// Events written at once: some 10 KiB.
const EVENTS: usize = 64;

/// A notification (JSON-RPC 2.0, 4.1).
#[derive(Serialize)]
struct Notification<'a> {
    jsonrpc: &'static str,
    method: &'static str,
    params: &'a Event,
}

/// All events that a reader hears.
pub(super) fn events(reader: EventReader) -> Result<Stream, ApiError> {
    let bell = reader.bell().map_err(no_fd)?;
    Ok(Stream::new(bell, move |out| {
        for event in reader.take(EVENTS) {
            let notification = Notification {
                jsonrpc: "2.0",
                method: "event",
                params: &event,
            };
            match serde_json::to_writer(&mut *out, &notification) {
                Ok(()) => out.push(b'\n'),
                // Names and numbers always serialise, and a vector takes all.
                Err(error) => tracing::error!(%error, "an event can't be written"),
            }
        }
        true
    }))
}

/// A capture as a pcapng file.
pub(super) fn capture(reader: CaptureReader) -> Result<Stream, ApiError> {
    let clock = reader.clock().map_err(no_fd)?;
    let bell = clock.try_clone().map_err(no_fd)?;
    let file = Arc::new(Mutex::new(CaptureFile::new(reader)));
    let at_end = Arc::clone(&file);
    let take = move |out: &mut Vec<u8>| {
        // How often it rang does not matter.
        let _ = rustix::io::read(&clock, &mut [0; 8]);
        lock(&file).take(out);
        true
    };
    Ok(Stream::new(bell, take).with_end(move |out| lock(&at_end).end(out)))
}

fn lock(file: &Mutex<CaptureFile>) -> MutexGuard<'_, CaptureFile> {
    file.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_fd(source: io::Error) -> ApiError {
    let what = "a stream".to_owned();
    SwitchError::System { what, source }.into()
}
