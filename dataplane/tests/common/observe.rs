//! What a test sees of its own process: open files, memory, and the log.

use std::fmt::{Debug, Write as _};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::eventually;

/// Held by tests that count what is the process's: under nextest each has a process of its own
/// anyway.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Open files of this process.
pub(crate) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Memory mappings of this process.
pub(crate) fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().count()
}

/// Resident bytes of this process.
pub(crate) fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Fds and memory as they were, to be compared later.
pub(crate) struct Footprint {
    fds: usize,
    mappings: usize,
    resident_bytes: u64,
}

impl Footprint {
    pub(crate) fn now() -> Self {
        Self {
            fds: open_fds(),
            mappings: mappings(),
            resident_bytes: resident_bytes(),
        }
    }

    /// Asserts that nothing has piled up since. Sessions end a moment after their sockets do, and
    /// allocators keep a little.
    pub(crate) fn assert_flat(&self) {
        self.assert_grown_below(8 << 20);
    }

    /// The same where so many bytes may be taken once and kept.
    pub(crate) fn assert_grown_below(&self, bytes: u64) {
        eventually("fds are closed", || open_fds() <= self.fds);
        eventually("memory is unmapped", || mappings() <= self.mappings + 8);
        let grown = resident_bytes().saturating_sub(self.resident_bytes);
        assert!(grown < bytes, "{grown} bytes more are resident");
    }
}

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Lines of the log, warnings and errors, that hold all of `parts`.
pub(crate) fn logged(parts: &[&str]) -> Vec<String> {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    let matching = lines
        .iter()
        .filter(|line| parts.iter().all(|p| line.contains(p)));
    matching.cloned().collect()
}

/// Keeps what is logged from now on.
pub(crate) fn capture_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Capture).unwrap());
}

struct Capture;

impl Subscriber for Capture {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(line.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Fields as `name=value ` in the order of the source.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, "{}={value:?} ", field.name());
    }
}
