//! What the tests of hostile guests share: a guest that writes its rings by hand, an honest peer
//! of it, and a second, innocent pair of ports that must not notice.

use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringway_api::{PortDetail, SwitchConfig};
use ringway_bridge::{DropReason, MacAddr};
use ringway_guest::features::{
    VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC,
};
use ringway_guest::{
    DESC_F_NEXT, DESC_F_WRITE, DriverMemory, EventFd, Frontend, FrontendError, Guest, GuestBuilder,
    RegionLayout, RegionView, RingPlace, SplitArea, SplitDesc,
};
use vhost::vhost_user::message::FrontendReq;

use super::observe::{alone, capture_log, logged};
use super::{DEADLINE, Lab, eventually, frame, mac, name, receive};

/// Lines in 10 s that tell why rings of a port were stopped; more are left out.
const FAULT_LINES: u64 = 100;

/// Stations.
pub(crate) const LEFT: u8 = 1;
pub(crate) const RIGHT: u8 = 2;
pub(crate) const PEER: u8 = 8;
pub(crate) const BAD: u8 = 9;

/// The guest's receive ring and its transmit ring, as the protocol numbers them.
pub(crate) const RX: u32 = 0;
pub(crate) const TX: u32 = 1;

/// Where the bad guest's memory lies. Between it and the guards is a page that is no memory.
pub(crate) const MAIN: u64 = 1 << 32;
pub(crate) const MAIN_BYTES: u64 = 2 << 20;
pub(crate) const MAIN_END: u64 = MAIN + MAIN_BYTES;
pub(crate) const GAP: u64 = 4096;
pub(crate) const GUARD_BYTES: u64 = 64 << 10;
/// Bytes of [`RawGuest::buffers`].
pub(crate) const BUFFER_BYTES: u64 = 1 << 20;
/// Fills the guards: it neither changes nor reaches another guest.
const CANARY: u8 = 0xc5;

/// Longest time in which the innocent pair may make no progress: a scheduler's hiccup on a busy
/// machine, and far less than what a worker loses in a loop over a hostile ring.
const LONGEST_STALL: Duration = Duration::from_secs(3);

/// A ring written by hand.
#[derive(Debug)]
pub(crate) struct RawRing {
    pub(crate) index: u32,
    pub(crate) area: SplitArea,
    pub(crate) kick: Arc<EventFd>,
    pub(crate) call: EventFd,
    /// The next avail index.
    pub(crate) next: u16,
}

impl RawRing {
    fn new(memory: &Arc<DriverMemory>, index: u32, size: u16) -> Self {
        Self {
            index,
            area: SplitArea::new(memory, size).unwrap(),
            kick: Arc::new(EventFd::new().unwrap()),
            call: EventFd::new().unwrap(),
            next: 0,
        }
    }

    /// What this ring's buffers must say of their direction.
    pub(crate) fn direction(&self) -> u16 {
        if self.index == RX { DESC_F_WRITE } else { 0 }
    }

    /// Writes a chain of these buffers into the descriptors from `first` on.
    pub(crate) fn write_chain(&self, first: u16, buffers: &[(u64, u32)]) {
        for (index, desc) in (first..).zip(chain(first, buffers, self.direction())) {
            self.area.write_desc(index, desc);
        }
    }

    /// Makes heads available.
    pub(crate) fn offer(&mut self, heads: &[u16]) {
        for head in heads {
            let slot = self.next & (self.area.size() - 1);
            self.area.set_avail_entry(slot, *head);
            self.next = self.next.wrapping_add(1);
        }
        self.publish();
    }

    /// Shows the index, and kicks.
    pub(crate) fn publish(&self) {
        self.area.set_avail_idx(self.next);
        self.kick.signal().unwrap();
    }

    /// Makes as much available as the rules allow, whatever was used since: with entries that were
    /// written once, a ring that never runs dry and costs its driver nothing.
    pub(crate) fn recycle(&self) {
        let area = &self.area;
        area.set_avail_idx(area.used_idx().wrapping_add(area.size()));
        if area.used_flags() == 0 {
            self.kick.signal().unwrap();
        }
    }

    /// Has all entries name these heads in turn.
    pub(crate) fn name_heads(&self, heads: &[u16]) {
        for (slot, head) in (0..self.area.size()).zip(heads.iter().cycle()) {
            self.area.set_avail_entry(slot, *head);
        }
    }

    /// Waits until all that was offered is used.
    pub(crate) fn wait_used(&self) {
        eventually("the device uses all chains", || {
            self.area.used_idx() == self.next
        });
    }

    /// As [`RawRing::wait_used`], while the peer throws away what it receives.
    pub(crate) fn wait_used_discarding(&self, peer: &mut Guest) {
        eventually("the device uses all chains", || {
            while peer.try_recv(0).unwrap().is_some() {}
            self.area.used_idx() == self.next
        });
        while peer.try_recv(0).unwrap().is_some() {}
    }

    /// Where it lies, from a base on.
    pub(crate) fn place(&self, base: u32) -> RingPlace {
        RingPlace {
            base,
            ..self.area.place()
        }
    }
}

/// Descriptors of one chain that starts at index `first` of its table.
pub(crate) fn chain(first: u16, buffers: &[(u64, u32)], direction: u16) -> Vec<SplitDesc> {
    let last = buffers.len() - 1;
    let link = |(i, (addr, len)): (usize, &(u64, u32))| SplitDesc {
        addr: *addr,
        len: *len,
        flags: direction | if i < last { DESC_F_NEXT } else { 0 },
        next: if i < last {
            first + u16::try_from(i).unwrap() + 1
        } else {
            0
        },
    };
    buffers.iter().enumerate().map(link).collect()
}

/// The bytes of a table of descriptors.
pub(crate) fn table_bytes(descs: &[SplitDesc]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for desc in descs {
        bytes.extend(desc.addr.to_le_bytes());
        bytes.extend(desc.len.to_le_bytes());
        bytes.extend(desc.flags.to_le_bytes());
        bytes.extend(desc.next.to_le_bytes());
    }
    bytes
}

/// What a raw guest is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawConfig {
    pub(crate) features: u64,
    pub(crate) queue_size: u16,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            features: VIRTIO_F_VERSION_1 | VIRTIO_RING_F_INDIRECT_DESC,
            queue_size: 256,
        }
    }
}

/// A guest that keeps no rule unless told to.
#[derive(Debug)]
pub(crate) struct RawGuest {
    pub(crate) frontend: Frontend,
    pub(crate) memory: Arc<DriverMemory>,
    pub(crate) rx: RawRing,
    pub(crate) tx: RawRing,
    /// Guest address of [`BUFFER_BYTES`] bytes for buffers and indirect tables.
    pub(crate) buffers: u64,
    pub(crate) config: RawConfig,
}

impl RawGuest {
    /// Connects and starts both rings, empty.
    pub(crate) fn connect(path: &Path, config: RawConfig) -> Self {
        let layout = |guest_addr, size| RegionLayout {
            guest_addr,
            size,
            // So that neighbours in the file are not part of the region.
            file_offset: 4096,
        };
        let memory = DriverMemory::new(
            &[
                layout(MAIN, MAIN_BYTES),
                layout(MAIN_END + GAP, GUARD_BYTES),
                layout(MAIN - GAP - GUARD_BYTES, GUARD_BYTES),
            ],
            false,
        )
        .unwrap();
        for guard in guards() {
            let canary = vec![CANARY; usize::try_from(GUARD_BYTES).unwrap()];
            memory.write(guard, &canary).unwrap();
        }
        let negotiated = Guest::builder()
            .bare()
            .features(config.features)
            .reply_timeout(DEADLINE)
            .negotiate(Frontend::connect(path).unwrap())
            .unwrap();
        let mut guest = Self {
            frontend: negotiated.frontend,
            rx: RawRing::new(&memory, RX, config.queue_size),
            tx: RawRing::new(&memory, TX, config.queue_size),
            buffers: memory.alloc_in(0, BUFFER_BYTES, 4096).unwrap(),
            memory,
            config,
        };
        guest.start().unwrap();
        guest
    }

    fn start(&mut self) -> Result<(), FrontendError> {
        self.frontend
            .set_features(self.config.features | VHOST_USER_F_PROTOCOL_FEATURES)?;
        self.share_memory()?;
        self.start_ring(RX, 0)?;
        self.start_ring(TX, 0)?;
        self.frontend.enable_ring(RX, true)?;
        self.frontend.enable_ring(TX, true)
    }

    /// Shares memory so that the switch's mappings of the guards are likely to be the neighbours
    /// of the main region's: the kernel places one below the other.
    fn share_memory(&mut self) -> Result<(), FrontendError> {
        let regions: Vec<RegionView<'_>> = self.memory.regions().collect();
        [1, 0, 2]
            .into_iter()
            .try_for_each(|at: usize| self.frontend.add_region(regions[at]))
    }

    pub(crate) fn ring(&mut self, index: u32) -> &mut RawRing {
        if index == RX {
            &mut self.rx
        } else {
            &mut self.tx
        }
    }

    /// Starts a ring at an index.
    pub(crate) fn start_ring(&mut self, index: u32, base: u32) -> Result<(), FrontendError> {
        let ring = if index == RX { &self.rx } else { &self.tx };
        let (kick, call) = (Some(&*ring.kick), Some(&ring.call));
        self.frontend
            .start_ring(index, &self.memory, ring.place(base), kick, call)
    }

    /// Stops a ring, empties it, and starts it where the device stood.
    pub(crate) fn restart_ring(&mut self, index: u32) {
        let base = self.frontend.stop_ring(index).unwrap();
        let ring = self.ring(index);
        ring.next = u16::try_from(base).unwrap();
        ring.area.set_avail_idx(ring.next);
        self.start_ring(index, base).unwrap();
    }

    /// Copies bytes to an offset in the buffers and returns their guest address.
    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) -> u64 {
        self.memory.write(self.buffers + offset, bytes).unwrap();
        self.buffers + offset
    }

    pub(crate) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(addr, &mut bytes).unwrap();
        bytes
    }

    /// Asserts that nothing was written behind or before the main region.
    pub(crate) fn assert_guards_intact(&self) {
        for guard in guards() {
            let bytes = self.bytes(guard, usize::try_from(GUARD_BYTES).unwrap());
            assert!(bytes.iter().all(|b| *b == CANARY), "guard {guard:#x}");
        }
    }
}

/// Guest addresses of the guards.
fn guards() -> [u64; 2] {
    [MAIN_END + GAP, MAIN - GAP - GUARD_BYTES]
}

/// A header of zeros and a frame.
pub(crate) fn plain(frame: &[u8]) -> Vec<u8> {
    [&[0; 12], frame].concat()
}

/// Whether a frame brought bytes of a guard.
pub(crate) fn leaks_canary(frame: &[u8]) -> bool {
    frame
        .windows(16)
        .any(|window| window.iter().all(|b| *b == CANARY))
}

/// A switch under attack: port `bad…` of a raw guest, its honest peer, and the innocent pair.
pub(crate) struct Stage {
    pub(crate) bad: RawGuest,
    pub(crate) peer: Guest,
    pub(crate) port: String,
    pub(crate) path: PathBuf,
    innocents: Option<Innocents>,
    /// Times that each ring was stopped for a fault.
    faults: [u64; 2],
    seed: u64,
    pub(crate) lab: Lab,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    pub(crate) fn new() -> Self {
        Self::with(RawConfig::default(), Guest::builder(), |_| {})
    }

    pub(crate) fn with(
        bad: RawConfig,
        peer: GuestBuilder,
        change: impl FnOnce(&mut SwitchConfig),
    ) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let alone = alone();
        capture_log();
        let lab = Lab::with_config(change);
        // A name of its own, since the log is the process's.
        let port = format!("bad{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let innocents = Innocents::start(&lab);
        let peer = lab.guest("peer", peer);
        lab.pin("peer", PEER);
        let path = lab.add_port(&port);
        lab.pin(&port, BAD);
        let bad = RawGuest::connect(&path, bad);
        Self {
            bad,
            peer,
            port,
            path,
            innocents: Some(innocents),
            faults: [0; 2],
            seed: 0,
            lab,
            _alone: alone,
        }
    }

    pub(crate) fn detail(&self) -> PortDetail {
        self.lab.switch.port(&name(&self.port)).unwrap()
    }

    pub(crate) fn is_started(&self, ring: u32) -> bool {
        let queue = &self.detail().queues[0];
        if ring == RX {
            queue.tx_started
        } else {
            queue.rx_started
        }
    }

    /// A frame for the bad guest, so that the switch looks at its receive ring.
    pub(crate) fn poke(&mut self) {
        self.seed += 1;
        self.peer
            .send_frame(&frame(BAD, PEER, 64, self.seed))
            .unwrap();
    }

    /// Waits until a ring is stopped for this reason; it must be counted and logged once.
    pub(crate) fn expect_stopped(&mut self, ring: u32, why: &str) {
        eventually("the bad ring stops", || !self.is_started(ring));
        let error = self.detail().last_error.unwrap();
        assert!(
            error.contains(&format!("ring {ring} stopped")) && error.contains(why),
            "{error:?} is not {why:?}"
        );
        self.faults[ring as usize] += 1;
        let [rx_faults, tx_faults] = self.faults;
        self.lab.eventually_dropped(
            &self.port,
            |c| c.tx_drops[DropReason::BadDescriptor],
            rx_faults,
        );
        self.lab.eventually_dropped(
            &self.port,
            |c| c.rx_drops[DropReason::BadDescriptor],
            tx_faults,
        );
        let logged = logged(&[&format!("port={} ", self.port), "ring stopped"]);
        let (lines, faults) = (logged.len() as u64, rx_faults + tx_faults);
        assert!(
            (faults.min(FAULT_LINES)..=faults).contains(&lines),
            "each of {faults} is logged once, within the limit: {logged:?}"
        );
    }

    /// Offers chains on a ring, expects it to stop, and brings it back.
    pub(crate) fn expect_fault(&mut self, ring: u32, heads: &[u16], why: &str) {
        self.bad.ring(ring).offer(heads);
        if ring == RX {
            self.poke();
        }
        self.expect_stopped(ring, why);
        self.recover(ring);
    }

    /// Restarts a ring and asserts that both rings work.
    pub(crate) fn recover(&mut self, ring: u32) {
        self.bad.restart_ring(ring);
        self.assert_works();
    }

    /// Waits until what the peer has sent arrived or is dropped: the switch keeps what the bad guest
    /// has no room for.
    fn settle(&self) {
        eventually("nothing waits for the bad guest", || {
            let [from, to] = ["peer", &self.port].map(|port| self.lab.counters(port));
            to.tx_frames + to.tx_drops.total() + from.rx_drops.total() >= from.rx_frames
        });
    }

    /// A frame each way.
    pub(crate) fn assert_works(&mut self) {
        self.settle();
        self.seed += 1;
        let there = frame(PEER, BAD, 100, self.seed);
        let addr = self.bad.put(0, &plain(&there));
        self.bad.tx.write_chain(0, &[(addr, 112)]);
        self.bad.tx.offer(&[0]);
        assert_eq!(receive(&mut self.peer).frame, there);
        self.bad.tx.wait_used();
        self.seed += 1;
        let back = frame(BAD, PEER, 100, self.seed);
        let buffer = self.bad.put(4096, &[0xa5; 2048]);
        let at = self.bad.rx.next & (self.bad.rx.area.size() - 1);
        self.bad.rx.write_chain(0, &[(buffer, 2048)]);
        self.bad.rx.offer(&[0]);
        self.peer.send_frame(&back).unwrap();
        self.bad.rx.wait_used();
        assert_eq!(self.bad.rx.area.used_entry(at), (0, 112));
        let received = self.bad.bytes(buffer, 2048);
        assert_eq!(received[12..112], back);
        assert!(received[112..].iter().all(|b| *b == 0xa5), "tail touched");
    }

    /// Connects the bad guest again, with fresh memory.
    pub(crate) fn reconnect(&mut self) {
        // There is one front-end at a time. The socket may be closed already.
        let _ = self.bad.frontend.socket().shutdown(Shutdown::Both);
        self.bad = RawGuest::connect(&self.path, self.bad.config);
    }

    /// Asserts that nobody else noticed, and that every frame is accounted for.
    pub(crate) fn finish(mut self) {
        self.bad.assert_guards_intact();
        self.let_innocents_run(4 * WINDOW);
        self.innocents.take().unwrap().finish(&self.lab);
        let copies = 0;
        self.lab
            .assert_conserved(&["left", "right", "peer", &self.port], copies);
        for port in ["left", "right"] {
            let counters = self.lab.counters(port);
            assert_eq!(counters.rx_drops.total(), 0, "{port}");
            assert_eq!(counters.tx_drops.total(), 0, "{port}");
        }
    }

    /// As [`Stage::finish`] where the bad guest's frames may have been flooded to all.
    pub(crate) fn finish_flooded(mut self) {
        self.bad.assert_guards_intact();
        self.let_innocents_run(4 * WINDOW);
        self.innocents.take().unwrap().finish(&self.lab);
    }

    /// Frames that the innocent pair has exchanged so far.
    pub(crate) fn innocent_frames(&self) -> u64 {
        self.innocents
            .as_ref()
            .map_or(0, |i| i.frames.load(Ordering::Relaxed))
    }

    /// Waits until the innocent pair has exchanged so many more frames.
    pub(crate) fn let_innocents_run(&self, frames: u64) {
        let goal = self.innocent_frames() + frames;
        eventually("the innocent pair goes on", || {
            self.innocent_frames() >= goal
        });
    }
}

impl Lab {
    /// Tells the bridge where a station is, so that nothing for it is flooded.
    pub(crate) fn pin(&self, port: &str, station: u8) {
        self.switch
            .fdb_add(MacAddr(mac(station)), &name(port), None)
            .unwrap();
    }
}

/// Frames in flight each way.
const WINDOW: u64 = 16;

/// Two guests that exchange frames for as long as the test runs, and lose none.
pub(crate) struct Innocents {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    thread: JoinHandle<Duration>,
}

impl Innocents {
    pub(crate) fn start(lab: &Lab) -> Self {
        let mut guests = [LEFT, RIGHT].map(|station| {
            let port = if station == LEFT { "left" } else { "right" };
            let guest = lab.guest(port, Guest::builder());
            lab.pin(port, station);
            guest
        });
        let (stop, frames) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let (until, count) = (Arc::clone(&stop), Arc::clone(&frames));
        let thread = std::thread::spawn(move || exchange(&mut guests, &until, &count));
        Self {
            stop,
            frames,
            thread,
        }
    }

    /// Ends the traffic; panics if a frame was lost, changed or overtaken.
    pub(crate) fn finish(self, lab: &Lab) {
        self.stop.store(true, Ordering::Relaxed);
        let stall = self.thread.join().expect("the innocent pair lost a frame");
        assert!(stall < LONGEST_STALL, "traffic stood still for {stall:?}");
        for port in ["left", "right"] {
            // Its guest is on its way out: rings stop one after the other.
            eventually("no error is left", || {
                let port = lab.switch.port(&name(port)).unwrap();
                port.last_error.is_none()
            });
        }
    }
}

/// Bursts both ways until told to stop; returns the longest time that one round took.
fn exchange(guests: &mut [Guest; 2], stop: &AtomicBool, frames: &AtomicU64) -> Duration {
    let stations = [(LEFT, RIGHT), (RIGHT, LEFT)];
    let lengths = |i: u64| 60 + usize::try_from(i * 97).unwrap();
    let mut bursts: [Vec<Vec<u8>>; 2] = stations.map(|(from, to)| {
        (0..WINDOW)
            .map(|i| plain(&frame(to, from, lengths(i), i)))
            .collect()
    });
    let mut round = 0_u64;
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        for (guest, burst) in guests.iter_mut().zip(&mut bursts) {
            for (i, message) in (0..).zip(burst.iter_mut()) {
                message[26..34].copy_from_slice(&(round * WINDOW + i).to_be_bytes());
            }
            assert_eq!(guest.send_burst(0, burst).unwrap() as u64, WINDOW);
        }
        for ((guest, burst), (from, _)) in guests.iter_mut().rev().zip(&bursts).zip(stations) {
            for sent in burst {
                let received = next_from(guest, from);
                assert!(received == sent[12..], "round {round}: a frame differs");
            }
            frames.fetch_add(WINDOW, Ordering::Relaxed);
        }
        longest = longest.max(start.elapsed());
        round += 1;
    }
    longest
}

/// The next frame from a station; what a hostile guest had flooded is passed over.
fn next_from(guest: &mut Guest, station: u8) -> Vec<u8> {
    loop {
        let received = receive(guest).frame;
        assert!(!leaks_canary(&received), "memory of another guest");
        if received[6..12] == mac(station) {
            return received;
        }
    }
}

/// SET_VRING_ADDR with any addresses, in the front-end's terms.
pub(crate) fn set_addresses(
    frontend: &mut Frontend,
    ring: u32,
    [desc, avail, used]: [u64; 3],
) -> Result<(), FrontendError> {
    let mut body = ring.to_ne_bytes().to_vec();
    body.extend([0; 4]);
    for word in [desc, used, avail, 0] {
        body.extend(word.to_ne_bytes());
    }
    frontend.request(FrontendReq::SET_VRING_ADDR, &body, &[])
}
