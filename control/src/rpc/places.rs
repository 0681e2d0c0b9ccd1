//! Who may have a connection: a pure table of the places of a server, told what time it is.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{KEPT_CONNECTIONS, MAX_CONNECTIONS};

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// It has not finished a request since then.
    Idle(Instant),
    /// Its request runs, or it is written the answer.
    Busy,
    /// Its place was given to another: it is on its way out.
    Leaving,
}

/// The clients that have a place, each with a handle by which to close its connection.
#[derive(Debug)]
pub(super) struct Places<H> {
    clients: BTreeMap<u64, (H, Activity)>,
    next: u64,
}

/// What becomes of a client that connects.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// It has this place.
    Admitted(u64),
    /// It has the first of these places, and the client in the second one has to go.
    Instead { place: u64, leaves: u64 },
    /// All places that it may have are taken.
    Full,
}

impl<H> Default for Places<H> {
    fn default() -> Self {
        Self {
            clients: BTreeMap::new(),
            next: 0,
        }
    }
}

impl<H> Places<H> {
    /// Gives a place to a client that has connected at `now`. An operator may have any of them, and
    /// if all are taken, that of the client which has been idle for longest; others may have those
    /// that are not kept for operators.
    pub(super) fn enter(&mut self, handle: H, is_operator: bool, now: Instant) -> Entry {
        let kept = if is_operator { 0 } else { KEPT_CONNECTIONS };
        let leaves = if self.taken() < MAX_CONNECTIONS - kept {
            None
        } else if let Some(place) = self.longest_idle().filter(|_| is_operator) {
            self.set(place, Activity::Leaving);
            Some(place)
        } else {
            return Entry::Full;
        };
        let place = self.next;
        self.next += 1;
        self.clients.insert(place, (handle, Activity::Idle(now)));
        match leaves {
            Some(leaves) => Entry::Instead { place, leaves },
            None => Entry::Admitted(place),
        }
    }

    /// A client's request is complete and runs, unless false: its place was given to another.
    pub(super) fn begin(&mut self, place: u64) -> bool {
        self.set(place, Activity::Busy)
    }

    /// A client has had its answer; false if its place was given to another.
    pub(super) fn answered(&mut self, place: u64, now: Instant) -> bool {
        self.set(place, Activity::Idle(now))
    }

    /// The connection is closed.
    pub(super) fn leave(&mut self, place: u64) {
        self.clients.remove(&place);
    }

    /// The handle of a client.
    pub(super) fn handle(&self, place: u64) -> Option<&H> {
        self.clients.get(&place).map(|(handle, _)| handle)
    }

    /// The handles of all clients, of those too that are on their way out.
    pub(super) fn handles(&self) -> impl Iterator<Item = &H> {
        self.clients.values().map(|(handle, _)| handle)
    }

    /// Whether no connection is left.
    pub(super) fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }

    /// Places that are taken.
    pub(super) fn taken(&self) -> usize {
        let stays = |(_, activity): &&(H, Activity)| *activity != Activity::Leaving;
        self.clients.values().filter(stays).count()
    }

    fn set(&mut self, place: u64, to: Activity) -> bool {
        match self.clients.get_mut(&place) {
            Some((_, activity)) if *activity != Activity::Leaving => {
                *activity = to;
                true
            }
            _ => false,
        }
    }

    fn longest_idle(&self) -> Option<u64> {
        let idle = |(place, (_, activity)): (&u64, &(H, Activity))| match activity {
            Activity::Idle(since) => Some((*since, *place)),
            Activity::Busy | Activity::Leaving => None,
        };
        let longest = self.clients.iter().filter_map(idle).min();
        longest.map(|(_, place)| place)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const OPERATOR: bool = true;
    const OTHER: bool = false;

    fn filled(count: usize, now: Instant) -> Places<()> {
        let mut places = Places::default();
        for place in 0..count as u64 {
            assert_eq!(
                places.enter((), OPERATOR, now),
                Entry::Admitted(place),
                "there is room for {count}"
            );
        }
        places
    }

    #[test]
    fn the_last_places_are_for_operators() {
        let now = Instant::now();
        let mut places = filled(MAX_CONNECTIONS - KEPT_CONNECTIONS - 1, now);
        assert!(matches!(places.enter((), OTHER, now), Entry::Admitted(_)));
        assert_eq!(places.enter((), OTHER, now), Entry::Full);
        for _ in 0..KEPT_CONNECTIONS {
            assert!(matches!(
                places.enter((), OPERATOR, now),
                Entry::Admitted(_)
            ));
        }
        assert_eq!(places.taken(), MAX_CONNECTIONS);
    }

    #[test]
    fn an_operator_has_the_place_of_the_client_that_was_idle_for_longest() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut places = filled(MAX_CONNECTIONS, start);
        // All but two have had an answer since; one of these two waits for its answer.
        for place in 0..MAX_CONNECTIONS as u64 {
            assert!(places.begin(place));
            if place != 5 && place != 9 {
                assert!(places.answered(place, later));
            }
        }
        assert!(places.answered(9, start));
        let entry = places.enter((), OPERATOR, later);
        let place = MAX_CONNECTIONS as u64;
        assert_eq!(entry, Entry::Instead { place, leaves: 9 });
        assert_eq!(places.taken(), MAX_CONNECTIONS);
        assert!(!places.begin(9), "its request comes too late");
        assert!(!places.answered(9, later));
        places.leave(9);
        assert_eq!(places.taken(), MAX_CONNECTIONS);
        assert!(places.begin(5), "whose request runs, stays");
    }

    #[test]
    fn nobody_leaves_amid_a_request_or_for_one_who_is_no_operator() {
        let now = Instant::now();
        let mut places = filled(MAX_CONNECTIONS, now);
        assert_eq!(places.enter((), OTHER, now), Entry::Full);
        for place in 0..MAX_CONNECTIONS as u64 {
            assert!(places.begin(place));
        }
        assert_eq!(places.enter((), OPERATOR, now), Entry::Full);
        places.leave(0);
        assert!(matches!(
            places.enter((), OPERATOR, now),
            Entry::Admitted(_)
        ));
    }
}
