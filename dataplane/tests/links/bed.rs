//! A port of each kind with an interface behind it, what it has to tell, and the innocents beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use ringway_api::{PortConfig, PortDetail, PortState, XdpMode};
use ringway_dataplane::Switch;
use ringway_guest::Guest;

use super::common::host::{Raw, ip, quiet_namespace, veth};
use super::common::{Lab, af_xdp, eventually, frame, mac, name, receive, tap};

/// Stations of frames: the innocent pair's, the guest's, and the one behind the interface.
pub(crate) const LEFT: u8 = 1;
pub(crate) const RIGHT: u8 = 2;
pub(crate) const GUEST: u8 = 3;
pub(crate) const HOST: u8 = 4;

/// What stands behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tap(u16),
    Nic(XdpMode),
}

pub(crate) const KINDS: [Kind; 4] = [
    Kind::Tap(1),
    Kind::Tap(2),
    Kind::Nic(XdpMode::Copy),
    Kind::Nic(XdpMode::Skb),
];

impl Kind {
    pub(crate) fn is_nic(self) -> bool {
        matches!(self, Self::Nic(_))
    }

    pub(crate) fn ifname(self) -> &'static str {
        if self.is_nic() { "xdp0" } else { "rw0" }
    }

    /// Where frames are exchanged with the port.
    pub(crate) fn far(self) -> &'static str {
        if self.is_nic() { "far0" } else { "rw0" }
    }

    pub(crate) fn config(self) -> PortConfig {
        match self {
            Self::Tap(queues) => tap("rw0", queues, true),
            Self::Nic(mode) => af_xdp(|nic| nic.mode = mode),
        }
    }

    /// Makes the interface, as an operator does.
    pub(crate) fn make(self) {
        match self {
            Self::Tap(queues) => {
                let many = if queues > 1 { " multi_queue" } else { "" };
                ip(&format!("tuntap add rw0 mode tap{many}"));
            }
            Self::Nic(_) => veth(2, 1500),
        }
    }
}

/// Looks of the watcher after which what a port tells has to be true: one may have begun before the
/// change. It looks as soon as the kernel tells of something, and otherwise every 50 ms
/// (`link/tests.rs`). Counted rather than timed, for a machine that has other things to do keeps the
/// watcher waiting as it does everybody.
const LOOKS: u64 = 2;

/// Attempts to open an interface after which it has to be open: one may have begun while it was not
/// fit. They are half a second apart at most (`link/tests.rs`).
const ATTEMPTS: u64 = 2;

/// A switch with the port `port` of the interface, a guest at `vm`, and two innocents.
pub(crate) struct Bed {
    pub(crate) lab: Lab,
    kind: Kind,
    pub(crate) guest: Guest,
    seed: u64,
    innocents: Innocents,
}

impl Bed {
    pub(crate) fn new(kind: Kind) -> Self {
        quiet_namespace();
        if kind.is_nic() {
            kind.make();
        }
        let bed = Self::with_interface(kind);
        bed.is_up();
        bed
    }

    /// The same with an interface as it is, or with none.
    pub(crate) fn with_interface(kind: Kind) -> Self {
        let lab = Lab::start();
        let innocents = Innocents::start(&lab);
        let guest = lab.guest("vm", Guest::builder());
        let added = lab.switch.add_or_await_port(name("port"), kind.config());
        added.unwrap();
        Self {
            lab,
            kind,
            guest,
            seed: 0,
            innocents,
        }
    }

    pub(crate) fn detail(&self) -> PortDetail {
        self.lab.switch.port(&name("port")).unwrap()
    }

    /// How often the interface was to be opened.
    pub(crate) fn attempts(&self) -> u64 {
        self.lab.switch.looks_at(&name("port")).unwrap().1
    }

    /// The change is made: what is told of it is true in time.
    pub(crate) fn tells(&self, state: PortState, mtu: Option<u16>, error: Option<&str>) {
        tells(&self.lab.switch, state, mtu, error);
    }

    /// The interface, which stayed open, is well again: the port too, in time.
    pub(crate) fn is_up(&self) {
        let interface = self.kind.ifname();
        eventually("the kernel has it run", || runs(&ip_show(interface)));
        self.tells(PortState::Up, Some(1500), None);
    }

    /// What kept the interface from being opened is over: it is opened in time.
    pub(crate) fn comes_back(&self) {
        self.comes_back_with(1500);
    }

    pub(crate) fn comes_back_with(&self, mtu: u16) {
        let mut before = self.attempts();
        eventually("the port is up", || {
            let detail = self.detail();
            let error = detail.last_error.as_deref();
            if error.is_some_and(|error| error.contains("bound to another AF_XDP socket")) {
                // Ours of before: the kernel lets go of its queue in a work item behind whoever takes
                // down network namespaces, which takes seconds on a busy machine.
                before = self.attempts();
            }
            (detail.port.state, detail.mtu, error) == (PortState::Up, Some(mtu), None)
        });
        let attempts = self.attempts() - before;
        assert!(attempts <= ATTEMPTS, "after {attempts} attempts");
    }

    /// Nothing of the interface is open any more.
    pub(crate) fn lets_go(&self) {
        eventually("it is closed", || self.detail().queues.is_empty());
    }

    /// A port that is up loses no frame, not even the first, either way.
    pub(crate) fn passes(&mut self) {
        self.passes_at(self.kind.far());
    }

    pub(crate) fn passes_at(&mut self, far: &str) {
        // A kernel whose interface just came up has no queue for what is sent by it.
        eventually("the far end runs", || runs(&ip_show(far)));
        let far = Raw::open(far);
        let seed = self.seed;
        self.seed += 2;
        let (there, back) = (
            frame(GUEST, HOST, 100, seed),
            frame(HOST, GUEST, 100, seed + 1),
        );
        far.send(&there);
        while receive(&mut self.guest).frame != there {}
        eventually("the host is known", || self.knows_host());
        self.guest.send_frame(&back).unwrap();
        while far.receive() != back {}
    }

    /// Whether the station behind the interface is known.
    fn knows_host(&self) -> bool {
        let host = mac(HOST);
        let known = self.lab.switch.fdb();
        known.iter().any(|entry| entry.mac.0 == host)
    }

    /// Frames that were on their way when the port went down may be learned from for a moment.
    pub(crate) fn forgets_host(&self) {
        eventually("the host is forgotten", || !self.knows_host());
    }

    /// The end of each case.
    pub(crate) fn end(self) {
        let carried = self.innocents.end();
        assert!(carried > 0, "the innocents stood still");
        let drops = |port| self.lab.counters(port).tx_drops.total();
        assert_eq!((drops("left"), drops("right")), (0, 0));
        self.lab.switch.remove_port(&name("port")).unwrap();
    }
}

/// The interface behind the port `port` has changed: within [`LOOKS`] the port tells this, on one line,
/// with nothing of the remedy missing.
pub(crate) fn tells(switch: &Switch, state: PortState, mtu: Option<u16>, error: Option<&str>) {
    let port = name("port");
    let looks = || switch.looks_at(&port).unwrap().0;
    let start = looks();
    let mut wrong = None;
    eventually(&format!("{state:?} {mtu:?} {error:?}"), || {
        // Before what is told: after so many looks that has to be right.
        let seen = looks() - start;
        let detail = switch.port(&port).unwrap();
        let found = (detail.port.state, detail.mtu, detail.last_error);
        let is_error_right = match (error, &found.2) {
            (None, None) => true,
            (Some(part), Some(text)) => text.contains(part) && !text.contains('\n'),
            _ => false,
        };
        let is_right = (found.0, found.1) == (state, mtu) && is_error_right;
        if !is_right && seen >= LOOKS {
            wrong = Some((seen, found));
        }
        is_right || wrong.is_some()
    });
    assert_eq!(
        wrong, None,
        "not {state:?} {mtu:?} {error:?} after so many looks"
    );
    // What it lists is the same.
    let listed = switch.ports();
    let listed = listed.iter().find(|listed| listed.name == port);
    assert_eq!(listed.unwrap().state, state);
}

/// What iproute2 shows of an interface of this thread's namespace.
fn ip_show(interface: &str) -> String {
    ip(&format!("-o link show {interface}"))
}

/// Whether iproute2 shows an interface that is up and has a carrier.
pub(crate) fn runs(shown: &str) -> bool {
    let flags = shown.split(['<', '>']).nth(1).unwrap();
    let has = |flag| flags.split(',').any(|other| other == flag);
    has("UP") && !has("NO-CARRIER")
}

/// Two guests that send one frame at a time to and fro.
struct Innocents {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Innocents {
    fn start(lab: &Lab) -> Self {
        let mut left = lab.guest("left", Guest::builder());
        let mut right = lab.guest("right", Guest::builder());
        let is_over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&is_over);
        let run = move || {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let sent = frame(RIGHT, LEFT, 100, count);
                left.send_frame(&sent).unwrap();
                // What is flooded comes here too.
                while receive(&mut right).frame != sent {}
                let sent = frame(LEFT, RIGHT, 100, count);
                right.send_frame(&sent).unwrap();
                while receive(&mut left).frame != sent {}
                count += 1;
            }
            count
        };
        Self {
            is_over,
            thread: std::thread::spawn(run),
        }
    }

    /// How often a frame went there and another one back; a frame that is lost fails the test.
    fn end(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().expect("an innocent lost a frame")
    }
}
