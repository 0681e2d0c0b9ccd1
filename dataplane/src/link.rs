//! What becomes of a port whose interface changes: a state machine without I/O and clock.
//!
//! ```text
//!             the interface is there, and fit          what was opened is gone, or changed
//!   Waiting -----------------------------> Busy      Attached ------------------> Busy
//!      ^              Attach                | |          ^          Detach         |
//!      |                                    | +----------+                         |
//!      +---- failed ------------------------+  attached                            |
//!      +---------------------------------------------------------- detached -------+
//! ```
//! It is told what the interface is like whenever that may have changed, however often, and not what
//! happened: so events that are lost, doubled or overtaken do no harm. What it says in return is the
//! port's status, and what is to be done.

use std::fmt;
use std::time::{Duration, Instant};

use ringway_api::PortState;

/// The first pause between two attempts to open an interface, and the longest: each attempt takes
/// memory and gives it back, and what others hold is to be had within a second of its release.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// An interface that stayed open for so long is opened at once when it is back; one that comes and
/// goes without end is tried with the pauses above.
const STEADY: Duration = Duration::from_secs(1);

/// How often ports are looked at of which something may change that the kernel tells nobody: the XDP
/// program and the queues of a NIC, who else has a tap open, a tap in another namespace. Twice as
/// often as their state has to be true, for two or three system calls a port.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// An interface's name: whatever bytes the kernel lets through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct LinkName(Vec<u8>);

impl LinkName {
    /// From bytes that a NUL may end.
    pub(crate) fn from_kernel(bytes: &[u8]) -> Self {
        let end = bytes.iter().position(|byte| *byte == 0);
        Self(bytes[..end.unwrap_or(bytes.len())].to_vec())
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<&str> for LinkName {
    fn from(name: &str) -> Self {
        Self(name.as_bytes().to_vec())
    }
}

/// On one line, whatever is in it.
impl fmt::Display for LinkName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0.escape_ascii())
    }
}

/// What the kernel tells of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) index: u32,
    pub(crate) name: LinkName,
    /// It is told of the interface itself, not of its part in a bridge.
    pub(crate) is_whole: bool,
    /// It is set up.
    pub(crate) is_up: bool,
    /// It is set up and has a carrier.
    pub(crate) is_running: bool,
    pub(crate) mtu: u32,
    /// How many want it to receive frames for all addresses.
    pub(crate) promiscuity: u32,
    /// The XDP program that is attached to it.
    pub(crate) program: Option<u32>,
    /// Queues of a tap for several that are open.
    pub(crate) tap_queues: Option<u32>,
}

/// What there is in place of a port's interface now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    /// Nothing.
    Missing,
    /// The interface, with the queues that its driver has now, if that was asked.
    Here(Seen, Option<u16>),
    /// The tap that is open, in another namespace: `None` if that can't be asked.
    Elsewhere(Option<Seen>),
}

/// What a port has opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// The interface's number when it was opened.
    pub(crate) index: u32,
    /// Its name then.
    pub(crate) name: LinkName,
    pub(crate) what: Opened,
}

/// The same, by kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Queues of a tap, which stay what they are wherever the interface goes.
    Tap { queues: u16 },
    /// Sockets of a NIC's queues.
    Nic {
        /// The XDP program that feeds them.
        program: u32,
        /// What the memory for frames was laid out for.
        mtu: u32,
        /// Queues that the interface had.
        channels: u16,
    },
}

/// What a port of an interface tells of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LinkStatus {
    pub(crate) state: PortState,
    /// The interface's MTU.
    pub(crate) mtu: Option<u16>,
    /// Why it is down, or what is to be known of it, with the remedy: one line.
    pub(crate) error: Option<String>,
}

impl LinkStatus {
    /// Of a port that nobody has looked at yet.
    pub(crate) const NEW: Self = Self {
        state: PortState::Down,
        mtu: None,
        error: None,
    };

    fn down(mtu: Option<u32>, error: String) -> Self {
        Self {
            state: PortState::Down,
            mtu: mtu.map(as_mtu),
            error: Some(error),
        }
    }
}

fn as_mtu(mtu: u32) -> u16 {
    u16::try_from(mtu).unwrap_or(u16::MAX)
}

/// Something to be done that takes time; its end is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Open the interface: ends in [`Link::attached`] or [`Link::failed`].
    Attach,
    /// Close what is open: ends in [`Link::detached`].
    Detach,
}

/// What follows from a look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// The port was down: who was behind it may be elsewhere.
    pub(crate) flush: bool,
    pub(crate) order: Option<Order>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Busy,
    Attached(Attachment),
}

/// When the ports are to be looked at of which something may change that the kernel tells nobody.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounds {
    last: Instant,
}

impl Rounds {
    pub(crate) fn new(now: Instant) -> Self {
        Self { last: now }
    }

    /// When they are to be looked at next.
    pub(crate) fn next(&self) -> Instant {
        self.last + LOOK_INTERVAL
    }

    /// Whether it is time now; then they are looked at.
    pub(crate) fn begin(&mut self, now: Instant) -> bool {
        let is_time = now >= self.next();
        if is_time {
            self.last = now;
        }
        is_time
    }
}

/// Which interfaces a port takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkKind {
    Tap,
    Nic,
}

/// The interface of one port.
#[derive(Debug)]
pub(crate) struct Link {
    kind: LinkKind,
    /// The name by which the port was configured.
    ifname: LinkName,
    phase: Phase,
    status: LinkStatus,
    pause: Duration,
    /// When an attempt may be made.
    attach_at: Option<Instant>,
    attached_at: Option<Instant>,
    /// The interface is fit, and to be opened at `attach_at`.
    is_due: bool,
    /// What the kernel tells nobody of may change.
    is_polled: bool,
}

impl Link {
    /// Of a port that has opened its interface, or waits for it.
    pub(crate) fn new(
        kind: LinkKind,
        ifname: &str,
        attachment: Option<Attachment>,
        now: Instant,
    ) -> Self {
        Self {
            kind,
            ifname: ifname.into(),
            attached_at: attachment.as_ref().map(|_| now),
            phase: attachment.map_or(Phase::Waiting, Phase::Attached),
            status: LinkStatus::NEW,
            pause: FIRST_PAUSE,
            attach_at: None,
            is_due: false,
            is_polled: false,
        }
    }

    pub(crate) fn ifname(&self) -> &LinkName {
        &self.ifname
    }

    pub(crate) fn status(&self) -> &LinkStatus {
        &self.status
    }

    /// What is open.
    pub(crate) fn attachment(&self) -> Option<&Attachment> {
        match &self.phase {
            Phase::Attached(attachment) => Some(attachment),
            Phase::Waiting | Phase::Busy => None,
        }
    }

    /// Whether something of it may change that the kernel tells nobody.
    pub(crate) fn is_polled(&self) -> bool {
        self.is_polled
    }

    /// When it is to be looked at though nothing was heard of it.
    pub(crate) fn look_at(&self) -> Option<Instant> {
        self.attach_at.filter(|_| self.is_due)
    }

    /// Takes what there is now. `was_gone`: it was heard that what is open was deleted or moved to
    /// another namespace; `was_down`: that it was down meanwhile.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        sight: &Sight,
        was_gone: bool,
        was_down: bool,
    ) -> Verdict {
        self.is_polled = match sight {
            Sight::Missing => false,
            Sight::Here(seen, _) => self.kind == LinkKind::Nic || seen.tap_queues.is_some(),
            Sight::Elsewhere(_) => true,
        };
        self.is_due = false;
        let before = self.status.state;
        let order = match &self.phase {
            Phase::Busy => {
                self.note(sight);
                None
            }
            Phase::Waiting => self.look_for_one(now, sight),
            Phase::Attached(attachment) => {
                let (status, has_to_go) = self.judge(attachment, sight, was_gone);
                self.status = status;
                has_to_go.then(|| {
                    self.leave(now);
                    Order::Detach
                })
            }
        };
        let goes_down = before != PortState::Down && self.status.state == PortState::Down;
        Verdict {
            flush: goes_down || was_down || order == Some(Order::Detach),
            order,
        }
    }

    /// What was opened is in use.
    pub(crate) fn attached(&mut self, now: Instant, attachment: Attachment) {
        self.phase = Phase::Attached(attachment);
        self.attached_at = Some(now);
    }

    /// The interface could not be opened, for this reason.
    pub(crate) fn failed(&mut self, now: Instant, reason: String) {
        self.phase = Phase::Waiting;
        self.status = LinkStatus::down(self.status.mtu.map(u32::from), reason);
        self.attach_at = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// What was open is closed.
    pub(crate) fn detached(&mut self) {
        self.phase = Phase::Waiting;
    }

    fn leave(&mut self, now: Instant) {
        self.phase = Phase::Busy;
        let held = self.attached_at.take();
        let was_steady = held.is_some_and(|since| now.saturating_duration_since(since) >= STEADY);
        if was_steady {
            self.pause = FIRST_PAUSE;
            self.attach_at = None;
        } else {
            self.attach_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Of a port whose interface is being opened or closed: what is true of it whoever has it open.
    fn note(&mut self, sight: &Sight) {
        self.status = match sight {
            Sight::Here(seen, _) if self.kind == LinkKind::Nic && !seen.is_up => {
                LinkStatus::down(Some(seen.mtu), is_down(&seen.name))
            }
            Sight::Here(seen, _) | Sight::Elsewhere(Some(seen)) => LinkStatus {
                mtu: Some(as_mtu(seen.mtu)),
                ..self.status.clone()
            },
            Sight::Missing | Sight::Elsewhere(None) => LinkStatus::down(None, self.is_missing()),
        };
    }

    /// Of a port that has nothing open.
    fn look_for_one(&mut self, now: Instant, sight: &Sight) -> Option<Order> {
        let Sight::Here(seen, _) = sight else {
            self.status = LinkStatus::down(None, self.is_missing());
            return None;
        };
        if let Some(reason) = self.unfit(seen) {
            self.status = LinkStatus::down(Some(seen.mtu), reason);
            return None;
        }
        self.status.mtu = Some(as_mtu(seen.mtu));
        self.is_due = true;
        if self.attach_at.is_some_and(|at| now < at) {
            return None;
        }
        self.is_due = false;
        self.phase = Phase::Busy;
        Some(Order::Attach)
    }

    fn is_missing(&self) -> String {
        let name = &self.ifname;
        let made = match self.kind {
            LinkKind::Tap => format!("`ip tuntap add {name} mode tap` makes one"),
            LinkKind::Nic => "see `ip link`".to_owned(),
        };
        format!(
            "there is no interface {name}: deleted, not made yet, or in another network namespace; it \
             is taken as soon as it is there ({made})"
        )
    }

    /// Why an interface need not even be tried.
    fn unfit(&self, seen: &Seen) -> Option<String> {
        match (self.kind, seen.program) {
            // A tap is set up when it is opened.
            (LinkKind::Tap, _) => None,
            (LinkKind::Nic, _) if !seen.is_up => Some(is_down(&seen.name)),
            (LinkKind::Nic, Some(id)) => Some(has_program(&seen.name, id)),
            (LinkKind::Nic, None) => None,
        }
    }

    /// Of a port that has opened an interface: its status, and whether that has to be closed.
    fn judge(&self, open: &Attachment, sight: &Sight, was_gone: bool) -> (LinkStatus, bool) {
        let name = &self.ifname;
        let goes = |mtu, error| (LinkStatus::down(mtu, error), true);
        match (&open.what, sight) {
            (_, Sight::Missing) | (Opened::Nic { .. }, Sight::Elsewhere(_)) => {
                goes(None, self.is_missing())
            }
            (Opened::Nic { .. }, Sight::Here(seen, _)) if was_gone => {
                goes(Some(seen.mtu), format!("{name} was gone for a moment"))
            }
            (
                Opened::Nic {
                    program,
                    mtu,
                    channels,
                },
                Sight::Here(seen, now),
            ) => {
                let mtu_now = Some(seen.mtu);
                match seen.program {
                    Some(id) if id == *program => {}
                    Some(id) => return goes(mtu_now, has_program(&seen.name, id)),
                    None => {
                        let error = format!("the XDP program of {name} was taken off");
                        return goes(mtu_now, error);
                    }
                }
                if seen.mtu != *mtu {
                    return goes(
                        mtu_now,
                        format!("the MTU of {name} was {mtu}, is {}", seen.mtu),
                    );
                }
                if now.is_some_and(|now| now != *channels) {
                    return goes(mtu_now, format!("{name} has another number of queues"));
                }
                if seen.promiscuity == 0 {
                    let error = format!("{name} receives no frames for other addresses any more");
                    return goes(mtu_now, error);
                }
                (self.running(open, seen, ""), false)
            }
            (Opened::Tap { queues }, Sight::Here(seen, _)) => {
                let mut status = self.running(open, seen, "");
                let others = seen
                    .tap_queues
                    .unwrap_or(0)
                    .saturating_sub((*queues).into());
                // Some frames go to the others, whatever else there is to be told.
                if others > 0 && status.state == PortState::Up {
                    status.state = PortState::Impaired;
                    status.error = Some(others_have_it(&seen.name, others));
                }
                (status, false)
            }
            (Opened::Tap { .. }, Sight::Elsewhere(Some(seen))) => {
                let place = " in its network namespace";
                (self.running(open, seen, place), false)
            }
            // Whoever may not look into its namespace has an fd that works all the same.
            (Opened::Tap { .. }, Sight::Elsewhere(None)) => {
                let status = LinkStatus {
                    state: PortState::Up,
                    ..LinkStatus::NEW
                };
                (status, false)
            }
        }
    }

    /// The status of what is open and fit; `place` says where a command is to be given.
    fn running(&self, open: &Attachment, seen: &Seen, place: &str) -> LinkStatus {
        let name = &seen.name;
        if !seen.is_up {
            return LinkStatus::down(Some(seen.mtu), is_down_at(name, place));
        }
        if !seen.is_running {
            let remedy = match self.kind {
                LinkKind::Tap => format!("`ip link set {name} carrier on`{place} gives it one"),
                LinkKind::Nic => "set up, or plug in, what is at its other end".to_owned(),
            };
            let error = format!("{name} has no carrier; {remedy}");
            return LinkStatus::down(Some(seen.mtu), error);
        }
        let is_renamed = *name != open.name && place.is_empty();
        let error = is_renamed.then(|| {
            let old = &self.ifname;
            format!(
                "{old} is called {name} now and works on, but no restart would find it; rename it \
                 back, or add the port anew with its new name"
            )
        });
        LinkStatus {
            state: PortState::Up,
            mtu: Some(as_mtu(seen.mtu)),
            error,
        }
    }
}

fn is_down(name: &LinkName) -> String {
    is_down_at(name, "")
}

fn is_down_at(name: &LinkName, place: &str) -> String {
    format!("{name} is down; `ip link set {name} up`{place} sets it up")
}

fn has_program(name: &LinkName, id: u32) -> String {
    format!(
        "{name} has an XDP program of somebody else's, with id {id}; `bpftool prog show id {id}` \
         tells whose: end that, or `ip link set {name} xdp off`"
    )
}

fn others_have_it(name: &LinkName, queues: u32) -> String {
    format!(
        "another program has {queues} queues of {name} open and takes frames of this port; end it \
         (`grep -lw {name} /proc/[0-9]*/fdinfo/*` finds it), or use another interface"
    )
}

#[cfg(test)]
mod tests;
