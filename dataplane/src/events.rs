//! What happens in the switch, told to whoever listens.
//!
//! ```text
//!   session thread, watcher of interfaces, housekeeping, control
//!        | tell: nothing while nobody listens, else an event, made once
//!        v
//!   EventHub -- Arc<Event> --> queue of a listener -- bell --> its thread writes it, or does not
//! ```
//! Workers tell nothing: what they change and count is looked at by housekeeping. Whoever tells
//! never waits for a listener: a full queue loses the event, and counts it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use ringway_api::{Event, Occurrence, SwitchError};
use rustix::event::{EventfdFlags, eventfd};

use crate::burst_lock::lock;

/// Most listeners: a screen of each operator, and programs that act on events.
const MAX_LISTENERS: usize = 16;

/// Events that wait for a listener: more than a second's worth of the most that housekeeping tells.
/// They are shared, so a listener that reads nothing costs 128 KiB beside the events themselves.
const QUEUE_EVENTS: usize = 16_384;

/// Where events are told. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct EventHub(Arc<Hub>);

#[derive(Debug, Default)]
struct Hub {
    /// How many listen. A hint, so that telling costs one load while nobody does.
    listening: AtomicUsize,
    listeners: Mutex<Listeners>,
}

#[derive(Debug, Default)]
struct Listeners {
    /// Number of the last event.
    last: u64,
    all: Vec<Arc<Listener>>,
}

#[derive(Debug)]
struct Listener {
    queue: Mutex<Queue>,
    /// An eventfd that is readable while there is something.
    bell: OwnedFd,
}

impl EventHub {
    /// Whether anybody listens.
    pub(crate) fn is_heard(&self) -> bool {
        self.0.listening.load(Ordering::Relaxed) > 0
    }

    /// Tells what happened, if anybody listens.
    pub(crate) fn tell(&self, what: impl FnOnce() -> Occurrence) {
        if self.is_heard() {
            self.tell_after(0, what());
        }
    }

    /// Tells what happened, after as many `suppressed` events.
    pub(crate) fn tell_after(&self, suppressed: u64, what: Occurrence) {
        let mut listeners = lock(&self.0.listeners);
        listeners.last += 1;
        let event = Arc::new(Event {
            number: listeners.last,
            unix_seconds: unix_seconds(),
            suppressed,
            what,
        });
        for listener in &listeners.all {
            lock(&listener.queue).push(Arc::clone(&event), QUEUE_EVENTS);
            listener.ring();
        }
    }

    /// Hears all events from now on, but those that come while the queue is full.
    ///
    /// # Errors
    /// There are [`MAX_LISTENERS`] already, or the system has no eventfd left.
    pub(crate) fn listen(&self) -> Result<EventReader, SwitchError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = eventfd(0, flags).map_err(|error| SwitchError::System {
            what: "eventfd of a listener".into(),
            source: error.into(),
        })?;
        let mut listeners = lock(&self.0.listeners);
        if listeners.all.len() >= MAX_LISTENERS {
            return Err(SwitchError::TooManyStreams {
                what: "events",
                most: MAX_LISTENERS,
            });
        }
        let listener = Arc::new(Listener {
            queue: Mutex::default(),
            bell,
        });
        listeners.all.push(Arc::clone(&listener));
        let count = listeners.all.len();
        self.0.listening.store(count, Ordering::Relaxed);
        Ok(EventReader {
            hub: self.clone(),
            listener,
        })
    }
}

fn unix_seconds() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

impl Listener {
    fn ring(&self) {
        // Fails only if the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

/// Who listens; it does so until this is dropped.
#[derive(Debug)]
pub struct EventReader {
    hub: EventHub,
    listener: Arc<Listener>,
}

impl EventReader {
    /// An fd that is readable when there may be events, for a poll.
    ///
    /// # Errors
    /// The process has no fd left.
    pub fn bell(&self) -> io::Result<OwnedFd> {
        let bell: BorrowedFd<'_> = self.listener.bell.as_fd();
        bell.try_clone_to_owned()
    }

    /// Takes the first events that wait, at most `most`, and makes the bell unreadable until
    /// further ones come. Call it until it gives none.
    pub fn take(&self, most: usize) -> Vec<Arc<Event>> {
        // Before the look, or an event that comes between them would not be seen.
        let _ = rustix::io::read(&self.listener.bell, &mut [0; 8]);
        let mut queue = lock(&self.listener.queue);
        std::iter::from_fn(|| queue.pop()).take(most).collect()
    }
}

impl Drop for EventReader {
    fn drop(&mut self) {
        let mut listeners = lock(&self.hub.0.listeners);
        let is_other = |other: &Arc<Listener>| !Arc::ptr_eq(other, &self.listener);
        listeners.all.retain(is_other);
        let count = listeners.all.len();
        self.hub.0.listening.store(count, Ordering::Relaxed);
    }
}

/// Events that wait for a listener, in order.
#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Arc<Event>>,
    /// What got lost behind them.
    gap: Option<Event>,
}

impl Queue {
    /// Appends an event, unless there are `most`. Once one is lost, those that follow are too until
    /// there is room for the gap and one event behind it.
    fn push(&mut self, event: Arc<Event>, most: usize) {
        let room = most.saturating_sub(self.events.len());
        match self.gap.take() {
            None if room > 0 => self.events.push_back(event),
            Some(gap) if room > 1 => {
                self.events.push_back(Arc::new(gap));
                self.events.push_back(event);
            }
            gap => {
                let before = match gap.map(|gap| gap.what) {
                    Some(Occurrence::Gap { lost }) => lost,
                    _ => 0,
                };
                self.gap = Some(Event {
                    number: event.number,
                    unix_seconds: event.unix_seconds,
                    suppressed: 0,
                    what: Occurrence::Gap { lost: before + 1 },
                });
            }
        }
    }

    fn pop(&mut self) -> Option<Arc<Event>> {
        let next = self.events.pop_front();
        next.or_else(|| self.gap.take().map(Arc::new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: u64) -> Arc<Event> {
        Arc::new(Event {
            number,
            unix_seconds: 0.0,
            suppressed: 0,
            what: Occurrence::PortUp {
                port: "a".parse().unwrap(),
            },
        })
    }

    /// Numbers of events; of a gap with how many are lost.
    fn drain(queue: &mut Queue, most: usize) -> Vec<(u64, Option<u64>)> {
        let all = std::iter::from_fn(|| queue.pop()).take(most);
        all.map(|event| match event.what {
            Occurrence::Gap { lost } => (event.number, Some(lost)),
            _ => (event.number, None),
        })
        .collect()
    }

    #[test]
    fn a_gap_stands_where_events_are_missing_and_tells_how_many() {
        let mut queue = Queue::default();
        (1..=5).for_each(|number| queue.push(event(number), 3));
        assert_eq!(drain(&mut queue, 1), [(1, None)]);
        queue.push(event(6), 3); // there is room for one, not for a gap and one
        assert_eq!(drain(&mut queue, 1), [(2, None)]);
        queue.push(event(7), 3);
        let rest = drain(&mut queue, 9);
        assert_eq!(rest, [(3, None), (6, Some(3)), (7, None)]);
    }

    #[test]
    fn a_gap_is_told_though_nothing_happens_after_it() {
        let mut queue = Queue::default();
        (1..=3).for_each(|number| queue.push(event(number), 1));
        assert_eq!(drain(&mut queue, 9), [(1, None), (3, Some(2))]);
        queue.push(event(4), 1);
        assert_eq!(drain(&mut queue, 9), [(4, None)]);
    }

    #[test]
    fn who_listens_hears_all_and_nothing_is_made_for_nobody() {
        let hub = EventHub::default();
        hub.tell(|| panic!("nobody listens"));
        let reader = hub.listen().unwrap();
        let gap = || Occurrence::Gap { lost: 0 };
        (0..3).for_each(|_| hub.tell(gap));
        let numbers = |events: Vec<Arc<Event>>| -> Vec<_> {
            events.iter().map(|event| event.number).collect()
        };
        assert_eq!(numbers(reader.take(2)), [1, 2]);
        assert_eq!(numbers(reader.take(2)), [3]);
        drop(reader);
        hub.tell(|| panic!("nobody listens any more"));
    }

    #[test]
    fn so_many_listen_and_no_more() {
        let hub = EventHub::default();
        let readers: Vec<_> = (0..MAX_LISTENERS).map(|_| hub.listen().unwrap()).collect();
        assert!(matches!(
            hub.listen(),
            Err(SwitchError::TooManyStreams { .. })
        ));
        drop(readers);
        hub.listen().unwrap();
    }
}
