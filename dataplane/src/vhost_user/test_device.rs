//! A device that writes down what a session does to it, and a front-end's end of a socket.

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use ringway_bridge::MacAddr;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::device::{Device, RingError, RingStart};
use super::message::HEADER_LEN;
use crate::memory::{GuestMemory, RegionSpec};
use crate::wire::{Features, ProtocolFeatures};

/// Longest wait for something that must happen.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Fds of this process that are memfds of this name; a name of its own keeps each test's count
/// apart from tests that run at the same time.
pub(super) fn open_memfds(name: &str) -> usize {
    let link = format!("/memfd:{name} (deleted)");
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.as_os_str() == link.as_str())
        .count()
}

/// What a session did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Connected,
    Disconnected(Option<String>),
    Features(u64, u64),
    /// Number of regions.
    Memory(usize),
    Start {
        index: u16,
        size: u16,
        base: u32,
        features: u64,
        enabled: bool,
        kick: bool,
        call: bool,
    },
    Stop(u16),
    Enable(u16, bool),
    Interrupt(u16, bool),
    Mtu(u16),
    Announce(MacAddr),
    Refused(Option<u16>, String),
}

/// A device without rings.
pub(super) struct TestDevice {
    pairs: u16,
    calls: Sender<Call>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Rings that are started, and where they are.
    started: HashMap<u16, u32>,
    memory: Arc<GuestMemory>,
    /// The next start of any ring fails.
    fail_start: bool,
    /// Rings that do not go on in the next memory.
    refused: Vec<u16>,
    /// Where rings were that the device stopped by itself.
    stopped_at: HashMap<u16, u32>,
}

impl State {
    fn fail(&mut self, index: u16) {
        let base = self.started.remove(&index).unwrap();
        self.stopped_at.insert(index, base);
    }
}

impl TestDevice {
    pub(super) fn new(pairs: u16) -> (Arc<Self>, Receiver<Call>) {
        let (calls, seen) = unbounded();
        let state = Mutex::default();
        let device = Self {
            pairs,
            calls,
            state,
        };
        (Arc::new(device), seen)
    }

    /// Pretends that a started ring has moved on.
    pub(super) fn advance(&self, index: u16, base: u32) {
        let mut state = self.state.lock().unwrap();
        *state.started.get_mut(&index).unwrap() = base;
    }

    pub(super) fn fail_next_start(&self) {
        self.state.lock().unwrap().fail_start = true;
    }

    /// Some started rings do not go on in the next memory.
    pub(super) fn refuse_in_next_memory(&self, rings: &[u16]) {
        self.state.lock().unwrap().refused = rings.to_vec();
    }

    /// The device stops a started ring by itself, as a worker does that finds its guest at fault.
    pub(super) fn fail_ring(&self, index: u16) {
        self.state.lock().unwrap().fail(index);
    }

    pub(super) fn is_started(&self, index: u16) -> bool {
        self.state.lock().unwrap().started.contains_key(&index)
    }

    fn note(&self, call: Call) {
        let _ = self.calls.send(call);
    }
}

impl Device for TestDevice {
    fn queue_pairs(&self) -> u16 {
        self.pairs
    }

    fn features(&self) -> Features {
        Features::all()
    }

    fn mtu(&self) -> Option<u16> {
        None
    }

    fn refused(&self, ring: Option<u16>, reason: String) {
        self.note(Call::Refused(ring, reason));
    }

    fn connected(&self) {
        self.note(Call::Connected);
    }

    fn disconnected(&self, reason: Option<String>) {
        let state = self.state.lock().unwrap();
        assert!(state.started.is_empty(), "rings are stopped before");
        assert!(state.memory.regions().is_empty(), "memory is empty before");
        self.note(Call::Disconnected(reason));
    }

    fn set_features(&self, features: Features, protocol_features: ProtocolFeatures) {
        self.note(Call::Features(features.bits(), protocol_features.bits()));
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Vec<(u16, RingError)> {
        self.note(Call::Memory(memory.regions().len()));
        let mut state = self.state.lock().unwrap();
        state.memory = memory;
        let refused = std::mem::take(&mut state.refused);
        refused.iter().for_each(|index| state.fail(*index));
        refused
            .into_iter()
            .map(|index| (index, RingError::Broken))
            .collect()
    }

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), RingError> {
        let mut state = self.state.lock().unwrap();
        assert!(!state.started.contains_key(&index), "started twice");
        self.note(Call::Start {
            index,
            size: start.placed.size(),
            base: start.base,
            features: start.features.bits(),
            enabled: start.enabled,
            kick: start.kick.is_some(),
            call: start.call.is_some(),
        });
        if std::mem::take(&mut state.fail_start) {
            return Err(RingError::Broken);
        }
        state.started.insert(index, start.base);
        Ok(())
    }

    fn stop_ring(&self, index: u16) -> Option<u32> {
        self.note(Call::Stop(index));
        let mut state = self.state.lock().unwrap();
        let base = state.started.remove(&index);
        base.or(state.stopped_at.remove(&index))
    }

    fn set_ring_enabled(&self, index: u16, enabled: bool) {
        assert!(self.is_started(index));
        self.note(Call::Enable(index, enabled));
    }

    fn set_ring_call(&self, index: u16, call: Option<Arc<OwnedFd>>) -> Result<(), RingError> {
        self.note(Call::Interrupt(index, call.is_some()));
        assert!(self.is_started(index));
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) {
        self.note(Call::Mtu(mtu));
    }

    fn announce(&self, mac: MacAddr) {
        self.note(Call::Announce(mac));
    }
}

/// Waits until the device has seen `wanted`; what comes before it is passed over.
pub(super) fn wait_for(seen: &Receiver<Call>, wanted: impl Fn(&Call) -> bool) -> Call {
    loop {
        let call = seen.recv_timeout(PATIENCE).expect("the call comes");
        if wanted(&call) {
            return call;
        }
    }
}

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// A file of `size` bytes.
pub(super) fn memfd(name: &str, size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    file
}

/// A region of 64 KiB: the `slot`th of a guest, at a distance in the front-end's addresses.
pub(super) fn region(slot: u64) -> RegionSpec {
    RegionSpec {
        guest_addr: slot * REGION_SIZE,
        size: REGION_SIZE,
        user_addr: USER_BASE + slot * REGION_SIZE,
        mmap_offset: 0,
    }
}

pub(super) const REGION_SIZE: u64 = 0x1_0000;
pub(super) const USER_BASE: u64 = 0x7f00_0000_0000;

/// A request as a front-end sends it.
pub(super) fn wire(request: u32, need_reply: bool, body: &[u8]) -> Vec<u8> {
    let flags = 1_u32 | u32::from(need_reply) << 3;
    let size = u32::try_from(body.len()).unwrap();
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
    for field in [request, flags, size] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// Native-endian u32s and u64s in a row.
pub(super) fn body32(fields: &[u32]) -> Vec<u8> {
    fields
        .iter()
        .flat_map(|field| field.to_ne_bytes())
        .collect()
}

pub(super) fn body64(fields: &[u64]) -> Vec<u8> {
    fields
        .iter()
        .flat_map(|field| field.to_ne_bytes())
        .collect()
}

pub(super) fn region_fields(spec: RegionSpec) -> [u64; 4] {
    [spec.guest_addr, spec.size, spec.user_addr, spec.mmap_offset]
}

/// Sends bytes with fds, at most 16.
pub(super) fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(
        socket.as_fd(),
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    assert_eq!(sent, Ok(bytes.len()));
}
