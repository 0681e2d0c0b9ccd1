use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

mod hostile;

use super::*;
use crate::socket_file::SocketFile;
use crate::vhost_user::message::HEADER_LEN;
use crate::wire::{Features, ProtocolFeatures};

const OFFERED_FEATURES: u64 = Features::all().bits();
/// To QEMU.
const OFFERED_PROTOCOL_FEATURES: u64 =
    ProtocolFeatures::all().bits() & !ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIG.bits();
use crate::vhost_user::test_device::{
    Call, PATIENCE, REGION_SIZE, TestDevice, USER_BASE, body32, body64, event, memfd, open_memfds,
    region, region_fields, send_with_fds, wait_for, wire,
};

const FEATURES: u64 = 1 << 32 | 1 << 30;

/// A session thread with a directory for sockets.
struct Bed {
    dir: TempDir,
    thread: SessionThread<TestDevice>,
}

impl Bed {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            thread: SessionThread::start().unwrap(),
        }
    }

    fn path(&self, number: u16) -> PathBuf {
        self.dir.path().join(number.to_string())
    }

    fn listen(&self, number: u16) -> (Arc<TestDevice>, Receiver<Call>) {
        let (device, seen) = TestDevice::new(1);
        let endpoint = Endpoint::listen(&self.path(number), &SocketFile::default()).unwrap();
        self.thread
            .add(port(number), endpoint, Arc::clone(&device))
            .unwrap();
        (device, seen)
    }

    fn connect(&self, number: u16) -> (Arc<TestDevice>, Receiver<Call>) {
        let (device, seen) = TestDevice::new(1);
        let endpoint = Endpoint::connect(&self.path(number)).unwrap();
        self.thread
            .add(port(number), endpoint, Arc::clone(&device))
            .unwrap();
        (device, seen)
    }
}

fn port(number: u16) -> PortId {
    PortId::new(number).unwrap()
}

/// A front-end's end of the socket.
struct Front(UnixStream);

impl Front {
    fn connect(path: &Path) -> Self {
        Self::new(UnixStream::connect(path).unwrap())
    }

    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    fn reply(&mut self, request: u32) -> [u8; 8] {
        let mut bytes = [0; HEADER_LEN + 8];
        self.0.read_exact(&mut bytes).unwrap();
        assert_eq!(
            bytes[..12],
            body32(&[request, 0b101, 8]),
            "header of the reply"
        );
        bytes[12..].try_into().unwrap()
    }

    fn ask(&mut self, request: u32, body: &[u8]) -> u64 {
        self.0.write_all(&wire(request, false, body)).unwrap();
        u64::from_ne_bytes(self.reply(request))
    }

    /// Waits for the end of the connection; replies that come first are passed over.
    fn expect_end(&mut self) {
        let mut chunk = [0; 4096];
        loop {
            match self.0.read(&mut chunk) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
                Err(error) => panic!("the connection does not end: {error}"),
            }
        }
    }

    fn run(&mut self, step: &Step) {
        let fds: Vec<_> = (0..step.fds).map(|_| memfd("guest", REGION_SIZE)).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send_with_fds(
            &self.0,
            &wire(step.request, step.need_reply, &step.body),
            &borrowed,
        );
        if let Some(expected) = &step.reply {
            assert_eq!(
                self.reply(step.request).as_slice(),
                expected,
                "request {}",
                step.request
            );
        }
    }
}

/// A message of a script.
struct Step {
    request: u32,
    need_reply: bool,
    body: Vec<u8>,
    fds: usize,
    reply: Option<Vec<u8>>,
}

fn tell(request: u32, body: Vec<u8>) -> Step {
    Step {
        request,
        need_reply: false,
        body,
        fds: 0,
        reply: None,
    }
}

fn tell_fd(request: u32, body: Vec<u8>) -> Step {
    Step {
        fds: 1,
        ..tell(request, body)
    }
}

fn ask(request: u32, body: Vec<u8>, reply: Vec<u8>) -> Step {
    Step {
        reply: Some(reply),
        ..tell(request, body)
    }
}

fn acked(step: Step) -> Step {
    Step {
        need_reply: true,
        reply: Some(body64(&[0])),
        ..step
    }
}

/// What QEMU 10 sends when it has connected, with one queue pair.
fn qemu_connects() -> Vec<Step> {
    let mut steps = vec![
        ask(1, vec![], body64(&[OFFERED_FEATURES])),
        ask(15, vec![], body64(&[OFFERED_PROTOCOL_FEATURES])),
        tell(16, body64(&[OFFERED_PROTOCOL_FEATURES])),
        ask(17, vec![], body64(&[1])),
        ask(36, vec![], body64(&[509])),
        tell(3, vec![]),
        ask(1, vec![], body64(&[OFFERED_FEATURES])),
    ];
    for ring in 0..2 {
        steps.push(tell_fd(13, body64(&[ring])));
        steps.push(tell_fd(14, body64(&[ring])));
    }
    for ring in 0..2 {
        steps.push(acked(tell(18, body32(&[ring, 1]))));
    }
    steps
}

/// What QEMU 10 sends when the guest's driver is ready.
fn qemu_starts(add_memory: bool, base: u32) -> Vec<Step> {
    let mut steps = Vec::new();
    for ring in 0..2 {
        steps.push(acked(tell(18, body32(&[ring, 1]))));
    }
    steps.push(tell(2, body64(&[FEATURES])));
    steps.push(ask(40, vec![], body64(&[0])));
    steps.push(tell(39, body64(&[8])));
    if add_memory {
        for slot in 0..2 {
            let body = [body64(&[0]), body64(&region_fields(region(slot)))].concat();
            steps.push(acked(tell_fd(37, body)));
        }
    }
    for ring in 0..2 {
        let at = USER_BASE + u64::from(ring) * REGION_SIZE;
        let addresses = body64(&[at, at + 0x8000, at + 0x4000, 0]);
        steps.push(tell(8, body32(&[ring, 256])));
        steps.push(tell(10, body32(&[ring, base])));
        steps.push(tell(9, [body32(&[ring, 0]), addresses].concat()));
        steps.push(tell_fd(12, body64(&[ring.into()])));
        steps.push(tell_fd(13, body64(&[ring.into()])));
    }
    steps.push(ask(40, vec![], body64(&[8])));
    steps.push(tell(39, body64(&[15])));
    steps
}

/// What QEMU 10 sends when the guest resets the device.
fn qemu_stops(base: u32) -> Vec<Step> {
    vec![
        ask(11, body32(&[0, 0]), body32(&[0, base])),
        ask(11, body32(&[1, 0]), body32(&[1, base])),
        tell(39, body64(&[0])),
    ]
}

fn start_of(ring: u16, start: u32) -> impl Fn(&Call) -> bool {
    move |call| matches!(call, Call::Start { index, base, enabled: true, size: 256, .. } if *index == ring && *base == start)
}

#[test]
fn the_messages_of_qemu_start_stop_and_restart_the_rings() {
    let bed = Bed::new();
    let (device, seen) = bed.listen(0);
    let mut qemu = Front::connect(&bed.path(0));
    for step in qemu_connects() {
        qemu.run(&step);
    }
    for (boot, base) in [(0, 0), (1, 0), (2, 0)] {
        for step in qemu_starts(boot == 0, base) {
            qemu.run(&step);
        }
        wait_for(&seen, start_of(0, 0));
        wait_for(&seen, start_of(1, 0));
        device.advance(0, 1000 + boot);
        device.advance(1, 1000 + boot);
        for step in qemu_stops(1000 + boot) {
            qemu.run(&step);
        }
        if boot == 1 {
            qemu.run(&tell(34, vec![]));
        }
    }
    drop(qemu);
    assert_eq!(
        wait_for(&seen, |call| matches!(call, Call::Disconnected(_))),
        Call::Disconnected(None)
    );
}

#[test]
fn a_front_end_may_vanish_after_every_message() {
    let bed = Bed::new();
    let (_device, seen) = bed.listen(0);
    let script = || {
        qemu_connects()
            .into_iter()
            .chain(qemu_starts(true, 0))
            .chain(qemu_stops(0))
    };
    for len in 0..=script().count() {
        let mut qemu = Front::connect(&bed.path(0));
        for step in script().take(len) {
            qemu.run(&step);
        }
        drop(qemu);
        let end = wait_for(&seen, |call| matches!(call, Call::Disconnected(_)));
        assert_eq!(end, Call::Disconnected(None), "after {len} messages");
    }
}

#[test]
fn the_vhost_crates_front_end_gets_its_rings_started() {
    let bed = Bed::new();
    let (device, seen) = bed.listen(0);
    // Rings per device, not pairs: `get_queue_num` would overwrite it.
    let mut front = Frontend::connect(bed.path(0), 2).unwrap();
    front.set_owner().unwrap();
    // Of a port with one queue pair, whose MTU nobody told; the last is for QEMU.
    let none = Features::OF_CONTROL_QUEUE
        | Features::VIRTIO_NET_F_MTU
        | Features::VIRTIO_F_ACCESS_PLATFORM;
    let offered = OFFERED_FEATURES & !none.bits();
    assert_eq!(front.get_features().unwrap(), offered);
    let protocol = front.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
    front.set_protocol_features(protocol).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front.set_features(FEATURES).unwrap();
    assert_eq!(front.get_max_mem_slots().unwrap(), 509);
    let file = memfd("guest", REGION_SIZE);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: REGION_SIZE,
        userspace_addr: USER_BASE,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    front.set_mem_table(&[region]).unwrap();
    for ring in 0..2 {
        let config = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: USER_BASE,
            avail_ring_addr: USER_BASE + 0x4000,
            used_ring_addr: USER_BASE + 0x8000,
            log_addr: None,
        };
        front.set_vring_num(ring, 256).unwrap();
        front.set_vring_base(ring, 7).unwrap();
        front.set_vring_addr(ring, &config).unwrap();
        front.set_vring_enable(ring, true).unwrap();
        with_event(|fd| front.set_vring_kick(ring, fd)).unwrap();
        with_event(|fd| front.set_vring_call(ring, fd)).unwrap();
    }
    wait_for(&seen, start_of(0, 7));
    wait_for(&seen, start_of(1, 7));
    device.advance(1, 1234);
    assert_eq!(front.get_vring_base(1).unwrap(), 1234);
    front.reset_device().unwrap();
    assert!(!device.is_started(0));
    assert!(front.set_vring_num(0, 3).is_err());
}

/// Sends an eventfd of the type that the crate wants but does not re-export; inference names it.
#[allow(unsafe_code, reason = "the type has no other way to be made")]
fn with_event<E: FromRawFd, R>(send: impl Fn(&E) -> R) -> R {
    // SAFETY: the fd has just been given up by its owner.
    let fd = unsafe { E::from_raw_fd(event().into_raw_fd()) };
    send(&fd)
}
