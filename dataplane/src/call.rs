//! Calls: writes to eventfds that a front-end shares.
//!
//! ```text
//!   publish, under a ring's lock --owe--> this thread's list --make_owed, no lock held--> eventfd
//! ```
//! The fd is checked to be an eventfd and made non-blocking, but its file is the front-end's too: it
//! can clear O_NONBLOCK and fill the counter, and a write blocks; or have thousands wait for the
//! file, and a write wakes them all. No write to an eventfd is safe from that (RWF_NOWAIT is refused,
//! eventfd(2)), so each is timed and a thread that blocks is interrupted (`ticker.rs`). A port whose
//! calls block or are slow (`conduct.rs`) is closed, for longer each time, whoever its front-end is.

mod conduct;
mod ticker;

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use self::conduct::{Conduct, SUSPICIOUS_NS};
use crate::backoff::{Backoff, Growth};
use crate::burst_lock::lock;
use crate::clock;

/// For how long a port is closed. What it cost is forgotten after as long a time as it was closed at
/// most.
const CLOSED: Growth = Growth {
    base: Duration::from_millis(100),
    max: Duration::from_secs(60),
    healthy: Duration::from_secs(60),
};

/// Calls that a thread owes before its list grows.
const OWED: usize = 64;

thread_local! {
    static LIST: RefCell<Vec<Arc<Call>>> = const { RefCell::new(Vec::new()) };
}

/// Where a ring's calls go.
#[derive(Debug)]
pub(crate) struct Call {
    fd: Arc<OwnedFd>,
    callee: Arc<Callee>,
}

/// A port, as far as its calls go. It outlives sessions and rings.
#[derive(Debug)]
pub(crate) struct Callee {
    /// Time that workers spent in its calls.
    spent_ns: AtomicU64,
    /// It is to be closed: no call is made any more.
    is_condemned: AtomicBool,
    /// There is more to do for a call than to see that it was fast.
    is_watched: AtomicBool,
    record: Mutex<Record>,
    /// Written to when there is a verdict.
    alarm: OnceLock<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Record {
    conduct: Conduct,
    backoff: Backoff,
    verdict: Option<Verdict>,
    /// When the port may be used again, if it was ever closed.
    opens: Option<Instant>,
}

/// A port is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) why: &'static str,
    /// For how long no front-end may use it.
    pub(crate) closed_for: Duration,
}

impl Default for Callee {
    fn default() -> Self {
        Self {
            spent_ns: AtomicU64::new(0),
            is_condemned: AtomicBool::new(false),
            is_watched: AtomicBool::new(false),
            record: Mutex::new(Record {
                conduct: Conduct::default(),
                backoff: Backoff::new(CLOSED),
                verdict: None,
                opens: None,
            }),
            alarm: OnceLock::new(),
        }
    }
}

impl Callee {
    /// Time that workers spent in its calls, in nanoseconds.
    pub(crate) fn spent_ns(&self) -> u64 {
        self.spent_ns.load(Ordering::Relaxed)
    }

    /// Has this eventfd written to whenever there is a verdict.
    pub(crate) fn set_alarm(&self, alarm: Arc<OwnedFd>) {
        // One session thread serves a port for as long as it exists.
        let _ = self.alarm.set(alarm);
    }

    /// The verdict that waits, once.
    pub(crate) fn take_verdict(&self) -> Option<Verdict> {
        lock(&self.record).verdict.take()
    }

    /// How long the port stays closed at `now`, if it is.
    pub(crate) fn closed_for(&self, now: Instant) -> Option<Duration> {
        let opens = lock(&self.record).opens?;
        let left = opens.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// A front-end has come: calls are made again, and if one had the port closed lately they are
    /// watched from the first on.
    pub(crate) fn begin(&self, now: Instant) {
        let mut record = lock(&self.record);
        let is_known = record
            .opens
            .is_some_and(|opens| now.saturating_duration_since(opens) < CLOSED.healthy);
        record.conduct = if is_known {
            Conduct::known()
        } else {
            Conduct::default()
        };
        record.verdict = None;
        self.is_watched.store(is_known, Ordering::Relaxed);
        self.is_condemned.store(false, Ordering::Relaxed);
    }

    /// Notes a call that is not plainly a good one.
    #[cold]
    fn judge(&self, wall_ns: u64, processor_ns: Option<u64>, now: Instant) {
        // Never waits: a call that is not noted is not the last one.
        let Ok(mut record) = self.record.try_lock() else {
            return;
        };
        let is_guilty = record.conduct.note(wall_ns, processor_ns);
        let is_watched = record.conduct.is_examined();
        self.is_watched.store(is_watched, Ordering::Relaxed);
        if is_guilty {
            self.condemn(&mut record, "calls to it are slow", now);
        }
    }

    #[cold]
    fn blocked(&self, now: Instant) {
        self.condemn(&mut lock(&self.record), "a call to it blocks", now);
    }

    fn condemn(&self, record: &mut Record, why: &'static str, now: Instant) {
        if self.is_condemned.swap(true, Ordering::Relaxed) {
            return;
        }
        let closed_for = record.backoff.fail(now);
        record.opens = Some(now + closed_for);
        record.verdict = Some(Verdict { why, closed_for });
        if let Some(alarm) = self.alarm.get() {
            // Our own: it fails if its counter is full, and then it is readable anyway.
            let _ = rustix::io::write(alarm, &1_u64.to_ne_bytes());
        }
    }
}

impl Call {
    pub(crate) fn new(fd: Arc<OwnedFd>, callee: Arc<Callee>) -> Arc<Self> {
        Arc::new(Self { fd, callee })
    }

    /// Makes the call, and returns when it was over.
    #[inline]
    fn make(&self, start: Instant) -> Instant {
        let callee = &*self.callee;
        if callee.is_condemned.load(Ordering::Relaxed) {
            return start;
        }
        let is_watched = callee.is_watched.load(Ordering::Relaxed);
        let processor_ns = is_watched.then(clock::thread_ns);
        let written = rustix::io::write(self.fd.as_fd(), &1_u64.to_ne_bytes());
        let end = Instant::now();
        let took = end.saturating_duration_since(start);
        let wall_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        callee.spent_ns.fetch_add(wall_ns, Ordering::Relaxed);
        // A full counter that does not block (EAGAIN) is a call that is pending anyway.
        if written == Err(Errno::INTR) {
            callee.blocked(end);
        } else if is_watched || wall_ns >= SUSPICIOUS_NS {
            let took_ns = processor_ns.map(|before| clock::thread_ns().saturating_sub(before));
            callee.judge(wall_ns, took_ns, end);
        }
        end
    }
}

/// Makes sure that the calling thread can make calls.
///
/// # Errors
/// It can have no timer that interrupts those that block.
pub(crate) fn prepare() -> std::io::Result<()> {
    ticker::prepare()
}

/// Has the calling thread make a call as soon as it holds no lock: see [`make_owed`].
#[inline]
pub(crate) fn owe(call: &Arc<Call>) {
    LIST.with_borrow_mut(|list| {
        if list.capacity() == 0 {
            list.reserve(OWED);
        }
        list.push(Arc::clone(call));
    });
}

/// Makes the calls that the calling thread owes. Not for whoever holds a ring's lock.
#[inline]
pub(crate) fn make_owed() {
    LIST.with_borrow_mut(|list| {
        if !list.is_empty() {
            make_all(list);
        }
    });
}

#[cold]
fn make_all(list: &mut Vec<Arc<Call>>) {
    match ticker::start() {
        Ok(ticking) => {
            let mut now = Instant::now();
            for call in list.drain(..) {
                now = call.make(now);
            }
            drop(ticking);
        }
        Err(error) => {
            // A worker makes sure of its timer before it starts.
            tracing::error!(%error, "no timer, so no calls");
            list.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, epoll, eventfd};
    use rustix::io::{read, write};

    fn call(flags: EventfdFlags) -> Arc<Call> {
        let fd = Arc::new(eventfd(0, flags).unwrap());
        Call::new(fd, Arc::default())
    }

    fn make(call: &Arc<Call>) {
        owe(call);
        make_owed();
    }

    fn count(call: &Call) -> u64 {
        let mut count = [0; 8];
        read(&call.fd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    }

    #[test]
    fn what_is_owed_is_made_once_and_not_before() {
        let call = call(EventfdFlags::NONBLOCK);
        owe(&call);
        assert_eq!(count(&call), 0);
        make_owed();
        make_owed();
        assert_eq!(count(&call), 1);
        assert!(call.callee.spent_ns() > 0);
        assert_eq!(call.callee.take_verdict(), None);
    }

    #[test]
    fn a_full_counter_that_does_not_block_is_no_fault() {
        let call = call(EventfdFlags::NONBLOCK);
        write(&call.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        make(&call);
        assert_eq!(call.callee.take_verdict(), None);
    }

    #[test]
    fn a_call_that_blocks_closes_the_port_for_longer_each_time() {
        let call = call(EventfdFlags::empty());
        write(&call.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let alarm = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        call.callee.set_alarm(Arc::clone(&alarm));
        for doubled in 0..3 {
            make(&call);
            // Neither blocks again nor is judged again.
            make(&call);
            let verdict = call.callee.take_verdict().unwrap();
            assert_eq!(verdict.why, "a call to it blocks");
            assert_eq!(verdict.closed_for, CLOSED.base * 2_u32.pow(doubled));
            assert_eq!(call.callee.take_verdict(), None);
            let mut rung = [0; 8];
            read(&alarm, &mut rung).unwrap();
            assert_eq!(u64::from_ne_bytes(rung), 1);
            let closed = call.callee.closed_for(Instant::now());
            assert!(closed.unwrap() <= verdict.closed_for);
            call.callee.begin(Instant::now());
        }
    }

    /// Each write wakes all that wait. The first slow call is no proof.
    #[test]
    fn a_file_that_thousands_wait_for_closes_the_port_after_a_few_calls() {
        let call = call(EventfdFlags::NONBLOCK);
        let waiting: Vec<_> = (0..4000)
            .map_while(|_| {
                let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
                let data = epoll::EventData::new_u64(0);
                epoll::add(&epoll, &call.fd, data, epoll::EventFlags::IN).ok()?;
                Some(epoll)
            })
            .collect();
        let calls = (1..10_000).find(|_| {
            make(&call);
            call.callee.take_verdict().is_some()
        });
        let Some(calls) = calls else {
            panic!("{} wait, and nobody minds", waiting.len());
        };
        assert!(calls > 2, "{calls}");
        let before = call.callee.spent_ns();
        make(&call);
        assert_eq!(call.callee.spent_ns(), before, "no call is made any more");
    }
}
