use crossbeam_channel::Receiver;
use ringway_bridge::MacAddr;

use super::*;
use crate::ring::RingAddresses;
use crate::vhost_user::test_device::{
    Call, REGION_SIZE, TestDevice, USER_BASE, event, memfd, open_memfds, region,
};

const PROTOCOL_FEATURES: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;
const OFFERED_FEATURES: u64 = Features::all().bits();
/// To QEMU.
const OFFERED_PROTOCOL_FEATURES: u64 =
    ProtocolFeatures::all().bits() & !ProtocolFeatures::VHOST_USER_PROTOCOL_F_CONFIG.bits();

struct Fixture {
    device: Arc<TestDevice>,
    seen: Receiver<Call>,
    session: Session<TestDevice>,
}

impl Fixture {
    /// A session with all features negotiated and one region of memory.
    fn new() -> Self {
        let mut fixture = Self::fresh();
        fixture.ok(Request::SetProtocolFeatures(OFFERED_PROTOCOL_FEATURES));
        fixture.ok(Request::SetFeatures(VERSION_1 | PROTOCOL_FEATURES));
        fixture.ok(table(&[0]));
        fixture.calls();
        fixture
    }

    fn fresh() -> Self {
        let (device, seen) = TestDevice::new(2);
        let session = Session::new(Arc::clone(&device), LogLimit::default());
        Self {
            device,
            seen,
            session,
        }
    }

    fn ok(&mut self, request: Request) -> Option<ReplyBody> {
        self.session.handle(request, false).unwrap()
    }

    /// The reply to a request that asks for one.
    fn acked(&mut self, request: Request) -> ReplyBody {
        let reply = self.session.handle(request, true).unwrap();
        reply.unwrap()
    }

    fn err(&mut self, request: Request) -> SessionError {
        self.session.handle(request, false).unwrap_err()
    }

    /// What the session did, but for what it told.
    fn calls(&self) -> Vec<Call> {
        let calls = self.seen.try_iter();
        calls
            .filter(|call| !matches!(call, Call::Refused(..)))
            .collect()
    }

    /// What was refused, with the ring that it is of.
    fn refusals(&self) -> Vec<(Option<u16>, String)> {
        let calls = self.seen.try_iter();
        calls
            .filter_map(|call| match call {
                Call::Refused(ring, reason) => Some((ring, reason)),
                _ => None,
            })
            .collect()
    }

    /// Size, base and addresses, so that only the kick is missing.
    fn configure(&mut self, index: u32) {
        self.ok(Request::SetVringNum { index, num: 256 });
        self.ok(Request::SetVringBase { index, base: 0 });
        self.ok(addresses(index, USER_BASE));
    }

    fn start(&mut self, index: u32) {
        self.configure(index);
        self.ok(kick(index));
        assert!(self.device.is_started(u16::try_from(index).unwrap()));
        self.calls();
    }
}

fn table(slots: &[u64]) -> Request {
    let entry = |&slot: &u64| (region(slot), memfd("guest", REGION_SIZE));
    Request::SetMemTable(slots.iter().map(entry).collect())
}

fn addresses(index: u32, at: u64) -> Request {
    let addresses = RingAddresses {
        desc: at,
        avail: at + 0x1000,
        used: at + 0x2000,
    };
    Request::SetVringAddr { index, addresses }
}

fn kick(index: u32) -> Request {
    let fd = Some(event());
    Request::SetVringKick(VringFd { index, fd })
}

fn call(index: u32) -> Request {
    let fd = Some(event());
    Request::SetVringCall(VringFd { index, fd })
}

fn started(index: u16, base: u32) -> Call {
    Call::Start {
        index,
        size: 256,
        base,
        features: VERSION_1 | PROTOCOL_FEATURES,
        enabled: false,
        kick: true,
        call: false,
    }
}

const fn u64_reply(value: u64) -> ReplyBody {
    ReplyBody::U64(value)
}

#[test]
fn a_ring_starts_with_its_kick_and_stops_with_get_vring_base() {
    let mut fixture = Fixture::new();
    fixture.configure(1);
    assert_eq!(fixture.calls(), []);
    fixture.ok(kick(1));
    assert_eq!(fixture.calls(), [started(1, 0)]);
    fixture.device.advance(1, 77);
    let reply = fixture.ok(Request::GetVringBase { index: 1 });
    assert_eq!(reply, Some(ReplyBody::VringState { index: 1, num: 77 }));
    assert_eq!(fixture.calls(), [Call::Stop(1)]);
    // Nothing but another kick starts it again.
    fixture.configure(1);
    fixture.ok(table(&[0]));
    assert_eq!(fixture.calls(), [Call::Memory(1)]);
    fixture.ok(kick(1));
    assert_eq!(fixture.calls(), [started(1, 0)]);
}

#[test]
fn a_ring_that_never_started_keeps_its_base() {
    let mut fixture = Fixture::new();
    fixture.ok(Request::SetVringBase { index: 3, base: 9 });
    for _ in 0..2 {
        let reply = fixture.ok(Request::GetVringBase { index: 3 });
        assert_eq!(reply, Some(ReplyBody::VringState { index: 3, num: 9 }));
    }
    assert_eq!(fixture.calls(), []);
}

#[test]
fn a_ring_kicked_too_early_starts_as_soon_as_it_is_complete() {
    let mut fixture = Fixture::fresh();
    fixture.ok(Request::SetFeatures(VERSION_1 | PROTOCOL_FEATURES));
    fixture.ok(kick(0));
    fixture.ok(Request::SetVringNum { index: 0, num: 256 });
    fixture.ok(addresses(0, USER_BASE));
    assert!(!fixture.device.is_started(0));
    fixture.ok(table(&[1]));
    assert!(!fixture.device.is_started(0), "not in this memory");
    fixture.ok(table(&[0, 1]));
    assert!(fixture.device.is_started(0));
}

#[test]
fn rings_start_enabled_only_without_protocol_features() {
    let enabled = |features, enable: Option<bool>| {
        let mut fixture = Fixture::fresh();
        if let Some(enable) = enable {
            // As QEMU does: before SET_FEATURES.
            fixture.ok(Request::SetVringEnable { index: 0, enable });
        }
        fixture.ok(Request::SetFeatures(features));
        fixture.ok(table(&[0]));
        fixture.configure(0);
        fixture.ok(kick(0));
        match fixture.calls().pop() {
            Some(Call::Start { enabled, .. }) => enabled,
            other => panic!("{other:?}"),
        }
    };
    assert!(enabled(VERSION_1, None));
    assert!(!enabled(VERSION_1 | PROTOCOL_FEATURES, None));
    assert!(enabled(VERSION_1 | PROTOCOL_FEATURES, Some(true)));
    assert!(!enabled(VERSION_1 | PROTOCOL_FEATURES, Some(false)));
}

#[test]
fn enabling_reaches_a_started_ring_at_once() {
    let mut fixture = Fixture::new();
    let enable = |index, enable| Request::SetVringEnable { index, enable };
    fixture.ok(enable(0, true));
    assert_eq!(fixture.calls(), []);
    fixture.start(1);
    fixture.ok(enable(1, true));
    fixture.ok(enable(1, false));
    assert_eq!(
        fixture.calls(),
        [Call::Enable(1, true), Call::Enable(1, false)]
    );
}

#[test]
fn another_kick_or_address_restarts_a_ring_at_its_index() {
    let mut fixture = Fixture::new();
    fixture.start(0);
    fixture.device.advance(0, 500);
    fixture.ok(kick(0));
    assert_eq!(fixture.calls(), [Call::Stop(0), started(0, 500)]);
    // The same addresses come with the log flag when QEMU migrates: nothing happens.
    fixture.ok(addresses(0, USER_BASE));
    assert_eq!(fixture.calls(), []);
    fixture.ok(addresses(0, USER_BASE + 0x4000));
    assert_eq!(fixture.calls(), [Call::Stop(0), started(0, 500)]);
}

#[test]
fn a_call_fd_reaches_a_started_ring_at_once() {
    let mut fixture = Fixture::new();
    fixture.ok(call(0));
    assert_eq!(fixture.calls(), []);
    fixture.start(0);
    fixture.ok(call(0));
    let fd = None;
    fixture.ok(Request::SetVringCall(VringFd { index: 0, fd }));
    assert_eq!(
        fixture.calls(),
        [Call::Interrupt(0, true), Call::Interrupt(0, false)]
    );
}

#[test]
fn size_and_base_of_a_started_ring_do_not_change() {
    let mut fixture = Fixture::new();
    fixture.start(0);
    let num = |num| Request::SetVringNum { index: 0, num };
    assert_eq!(fixture.acked(num(256)), u64_reply(0));
    assert_eq!(fixture.acked(num(512)), u64_reply(1));
    let base = Request::SetVringBase { index: 0, base: 1 };
    assert_eq!(fixture.acked(base), u64_reply(1));
    assert_eq!(fixture.calls(), []);
}

#[test]
fn ring_sizes_other_than_powers_of_two_end_the_session() {
    for num in [0, 3, 255, 32769, 0xffff, 0x1_0000, 0x1_0100, u32::MAX] {
        let mut fixture = Fixture::new();
        let error = fixture.err(Request::SetVringNum { index: 0, num });
        assert!(matches!(error, SessionError::RingSize { .. }), "{num}");
    }
    let mut fixture = Fixture::new();
    for shift in 0..=15 {
        let num = 1 << shift;
        fixture.ok(Request::SetVringNum { index: 0, num });
    }
}

/// CVE-2020-10723, CVE-2021-3839, CVE-2026-86565: an index is checked before it is truncated.
#[test]
fn ring_indices_are_checked_in_full_width() {
    for index in [4, 0x100, 0x1_0000, 0x1_0001, 0x8000_0000, u32::MAX] {
        let requests = [
            Request::SetVringNum { index, num: 256 },
            addresses(index, USER_BASE),
            Request::SetVringBase { index, base: 0 },
            Request::GetVringBase { index },
            Request::SetVringEnable {
                index,
                enable: true,
            },
            kick(index),
            call(index),
            Request::SetVringErr(VringFd { index, fd: None }),
        ];
        for request in requests {
            let id = format!("{request:?}");
            let mut fixture = Fixture::new();
            let error = fixture.err(request);
            assert!(
                matches!(error, SessionError::NoSuchRing { .. }),
                "{id} {index}"
            );
            assert_eq!(fixture.calls(), [], "{id} {index}");
        }
    }
}

#[test]
fn features_that_were_not_offered_end_the_session() {
    for bit in (0..64).filter(|bit| OFFERED_FEATURES & 1 << bit == 0) {
        let error = Fixture::fresh().err(Request::SetFeatures(1 << bit));
        assert!(matches!(error, SessionError::FeaturesNotOffered { .. }));
    }
    for bit in (0..64).filter(|bit| ProtocolFeatures::all().bits() & 1 << bit == 0) {
        let error = Fixture::fresh().err(Request::SetProtocolFeatures(1 << bit));
        assert!(matches!(error, SessionError::FeaturesNotOffered { .. }));
    }
    let mut fixture = Fixture::fresh();
    let offered = fixture.ok(Request::GetFeatures);
    assert_eq!(offered, Some(u64_reply(OFFERED_FEATURES)));
    assert_eq!(OFFERED_FEATURES >> 26 & 1, 0, "no dirty log yet");
    assert_eq!(OFFERED_FEATURES >> 34 & 1, 1, "packed rings");
}

#[test]
fn new_features_apply_to_rings_that_start_later() {
    let mut fixture = Fixture::new();
    fixture.start(0);
    fixture.ok(Request::SetFeatures(VERSION_1 | PROTOCOL_FEATURES | 1));
    let protocol = OFFERED_PROTOCOL_FEATURES;
    let features = VERSION_1 | PROTOCOL_FEATURES | 1;
    assert_eq!(fixture.calls(), [Call::Features(features, protocol)]);
    fixture.configure(1);
    fixture.ok(kick(1));
    assert!(matches!(fixture.calls()[..], [Call::Start { features: f, .. }] if f == features));
}

#[test]
fn memory_slots_come_and_go() {
    let mut fixture = Fixture::fresh();
    fixture.ok(Request::SetProtocolFeatures(OFFERED_PROTOCOL_FEATURES));
    let add = |slot| Request::AddMemReg(region(slot), memfd("guest", REGION_SIZE));
    assert_eq!(fixture.ok(Request::GetMaxMemSlots), Some(u64_reply(509)));
    fixture.ok(add(0));
    fixture.ok(add(1));
    let offset_is_ignored = RegionSpec {
        mmap_offset: 1,
        ..region(0)
    };
    fixture.ok(Request::RemMemReg(offset_is_ignored));
    fixture.calls();
    let error = fixture.err(Request::RemMemReg(region(0)));
    assert!(matches!(error, SessionError::NoSuchRegion { .. }));
    let other_size = RegionSpec {
        size: REGION_SIZE / 2,
        ..region(1)
    };
    assert!(
        fixture
            .session
            .handle(Request::RemMemReg(other_size), true)
            .is_err()
    );
    for slot in 2..510 {
        fixture.ok(add(slot));
    }
    assert!(matches!(
        fixture.err(add(600)),
        SessionError::TooManyRegions
    ));
}

#[test]
fn a_ring_waits_while_its_memory_is_away() {
    let mut fixture = Fixture::new();
    fixture.ok(Request::AddMemReg(region(1), memfd("guest", REGION_SIZE)));
    fixture.start(0);
    fixture.configure(1);
    fixture.ok(addresses(1, USER_BASE + REGION_SIZE));
    fixture.ok(kick(1));
    fixture.calls();
    fixture.device.advance(0, 33);
    fixture.ok(Request::RemMemReg(region(0)));
    assert_eq!(fixture.calls(), [Call::Stop(0), Call::Memory(1)]);
    fixture.ok(Request::AddMemReg(region(0), memfd("guest", REGION_SIZE)));
    assert_eq!(fixture.calls(), [Call::Memory(2), started(0, 33)]);
}

#[test]
fn each_ring_that_the_device_refuses_in_new_memory_waits_for_the_next() {
    let mut fixture = Fixture::new();
    for index in 0..3 {
        fixture.start(index);
    }
    fixture.device.advance(0, 40);
    fixture.device.advance(2, 42);
    fixture.device.refuse_in_next_memory(&[0, 2]);
    fixture.ok(table(&[0]));
    assert_eq!(
        fixture.calls(),
        [Call::Memory(1), Call::Stop(0), Call::Stop(2)]
    );
    fixture.ok(table(&[0]));
    assert_eq!(
        fixture.calls(),
        [Call::Memory(1), started(0, 40), started(2, 42)]
    );
}

#[test]
fn a_ring_across_two_regions_or_past_the_end_does_not_start() {
    for at in [
        USER_BASE - 1,
        USER_BASE + REGION_SIZE - 0x800,
        USER_BASE + 2 * REGION_SIZE - 0x2000,
        u64::MAX - 0x1000,
        0,
    ] {
        let mut fixture = Fixture::new();
        fixture.ok(table(&[0, 1]));
        fixture.ok(Request::SetVringNum { index: 0, num: 256 });
        let addresses = RingAddresses {
            desc: at,
            avail: USER_BASE,
            used: USER_BASE,
        };
        // 16 x 256 bytes of descriptors begin at `at`.
        let fits = at == USER_BASE + 2 * REGION_SIZE - 0x2000;
        fixture.ok(Request::SetVringAddr {
            index: 0,
            addresses,
        });
        fixture.ok(kick(0));
        assert_eq!(fixture.device.is_started(0), fits, "{at:#x}");
    }
}

#[test]
fn a_ring_that_can_not_start_leaves_the_session_and_may_be_kicked_again() {
    let mut fixture = Fixture::new();
    fixture.configure(0);
    fixture.device.fail_next_start();
    assert_eq!(fixture.acked(kick(0)), u64_reply(1));
    assert!(!fixture.device.is_started(0));
    assert_eq!(fixture.acked(kick(0)), u64_reply(0));
    assert!(fixture.device.is_started(0));
}

#[test]
fn a_reset_stops_rings_and_keeps_memory_and_session() {
    for request in [Request::ResetDevice, Request::SetStatus(0)] {
        let mut fixture = Fixture::new();
        fixture.ok(call(0));
        fixture.ok(Request::SetStatus(7));
        assert_eq!(fixture.ok(Request::GetStatus), Some(u64_reply(7)));
        fixture.start(0);
        fixture.ok(request);
        assert!(!fixture.device.is_started(0));
        assert_eq!(fixture.ok(Request::GetStatus), Some(u64_reply(0)));
        fixture.ok(Request::SetFeatures(VERSION_1 | PROTOCOL_FEATURES));
        fixture.configure(0);
        assert!(!fixture.device.is_started(0));
        fixture.calls();
        fixture.ok(kick(0));
        let calls = fixture.calls();
        assert!(
            matches!(calls[..], [Call::Start { call: true, .. }]),
            "{calls:?}"
        );
    }
}

#[test]
fn reset_owner_is_ignored() {
    let mut fixture = Fixture::new();
    fixture.start(0);
    assert_eq!(fixture.acked(Request::ResetOwner), u64_reply(0));
    assert!(fixture.device.is_started(0));
}

#[test]
fn replies_come_on_request_only_and_only_if_negotiated() {
    let mut fixture = Fixture::fresh();
    assert_eq!(
        fixture.session.handle(Request::SetOwner, true).unwrap(),
        None
    );
    assert!(fixture.session.failure(2, true).is_none());
    let ack = fixture.acked(Request::SetProtocolFeatures(OFFERED_PROTOCOL_FEATURES));
    assert_eq!(
        ack,
        u64_reply(0),
        "the reply feature is in effect from this message on"
    );
    assert_eq!(fixture.ok(Request::SetOwner), None);
    assert_eq!(fixture.acked(Request::SetOwner), u64_reply(0));
    // Requests with a reply of their own have just that.
    assert_eq!(fixture.acked(Request::GetQueueNum), u64_reply(2));
    assert!(fixture.session.failure(2, false).is_none());
    assert_eq!(fixture.session.failure(2, true), Some(u64_reply(1)));
    for own_reply in [1, 11, 15, 17, 24, 36, 40] {
        assert!(fixture.session.failure(own_reply, true).is_none());
    }
}

#[test]
fn unknown_requests_are_refused_ignored_or_end_the_session() {
    let expect_reply = [22, 26, 28, 30, 31, 41, 42, 43, 44];
    for id in [0, 23, 32, 33, 35, 45, 1000, u32::MAX]
        .into_iter()
        .chain(expect_reply)
    {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.acked(Request::Unknown(id)), u64_reply(1), "{id}");
        let silent = fixture.session.handle(Request::Unknown(id), false);
        if expect_reply.contains(&id) {
            assert!(matches!(silent, Err(SessionError::NoReply { .. })), "{id}");
        } else {
            assert_eq!(silent.unwrap(), None, "{id}");
        }
    }
}

#[test]
fn requests_of_features_that_are_not_negotiated_end_the_session() {
    let requests = [
        Request::GetMaxMemSlots,
        Request::AddMemReg(region(0), memfd("guest", REGION_SIZE)),
        Request::RemMemReg(region(0)),
        Request::SetStatus(1),
        Request::GetStatus,
    ];
    for request in requests {
        let error = Fixture::fresh().err(request);
        assert!(matches!(error, SessionError::NotNegotiated { .. }));
    }
}

#[test]
fn the_dirty_log_is_refused_while_it_is_not_offered() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ok(Request::SetLogBase), None);
    assert_eq!(fixture.acked(Request::SetLogBase), u64_reply(1));
    assert_eq!(fixture.acked(Request::SetLogFd), u64_reply(0));
}

#[test]
fn announcements_take_their_protocol_feature() {
    let mut fixture = Fixture::new();
    let others = OFFERED_PROTOCOL_FEATURES & !(1 << 2);
    fixture.ok(Request::SetProtocolFeatures(others));
    let announce = Request::SendRarp(MacAddr([0x52, 0x54, 0, 1, 2, 3]));
    let error = fixture.session.handle(announce, false).unwrap_err();
    assert!(matches!(error, SessionError::NotNegotiated { request: 19 }));
}

#[test]
fn mtu_and_announcements_reach_the_device() {
    let mut fixture = Fixture::new();
    let mac = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
    assert_eq!(fixture.acked(Request::NetSetMtu(1500)), u64_reply(0));
    assert_eq!(fixture.acked(Request::SendRarp(mac)), u64_reply(0));
    assert_eq!(fixture.calls(), [Call::Mtu(1500), Call::Announce(mac)]);
    for mtu in [0, 67, 0x1_0000, 0x1_0000_05dc] {
        assert_eq!(fixture.acked(Request::NetSetMtu(mtu)), u64_reply(1));
    }
    assert_eq!(fixture.calls(), []);
}

#[test]
fn the_end_of_a_session_leaves_nothing() {
    let mut fixture = Fixture::new();
    fixture.start(0);
    fixture.start(1);
    fixture.session.close(Some("reason".into()));
    fixture.session.close(None);
    let reason = Some("reason".into());
    let expected = [
        Call::Stop(0),
        Call::Stop(1),
        Call::Memory(0),
        Call::Disconnected(reason),
    ];
    assert_eq!(fixture.calls(), expected);
    drop(fixture.session);
    assert!(fixture.seen.try_recv().is_err());
}

/// CVE-2019-14818, CVE-2022-0669, CVE-2020-10726: fds that come again replace those before.
#[test]
fn fds_that_come_again_do_not_pile_up() {
    let mut fixture = Fixture::new();
    fixture.configure(0);
    let mut most = 0;
    for round in 0..10_000 {
        let fd = |index| VringFd {
            index,
            fd: Some(memfd("session-leak", 0)),
        };
        fixture.ok(Request::SetVringCall(fd(round % 4)));
        fixture.ok(Request::SetVringErr(fd(round % 4)));
        if round % 100 == 0 {
            fixture.ok(Request::SetVringKick(fd(0)));
            fixture.device.advance(0, round);
            most = most.max(open_memfds("session-leak"));
        }
    }
    // Per ring three, and what the started one has of its own.
    assert!(most <= 4 * 3 + 2, "{most}");
    drop(fixture.session);
    assert_eq!(open_memfds("session-leak"), 0);
}

/// QEMU asks for features before SET_OWNER, and serves control queue and configuration by itself.
#[test]
fn qemu_is_offered_all_of_a_device_and_no_configuration_space() {
    let mut fixture = Fixture::fresh();
    for _ in 0..2 {
        let offered = fixture.ok(Request::GetFeatures);
        assert_eq!(offered, Some(u64_reply(OFFERED_FEATURES)));
        let offered = fixture.ok(Request::GetProtocolFeatures);
        assert_eq!(offered, Some(u64_reply(OFFERED_PROTOCOL_FEATURES)));
        fixture.ok(Request::SetProtocolFeatures(OFFERED_PROTOCOL_FEATURES));
        fixture.ok(Request::SetOwner);
    }
}

/// QEMU passes the bit on only where an IOMMU is in front of the NIC, and sends a channel for its
/// messages to whoever offers it.
#[test]
fn a_guest_behind_an_iommu_is_refused_with_a_hint() {
    let mut fixture = Fixture::fresh();
    fixture.ok(Request::GetFeatures);
    fixture.ok(Request::SetProtocolFeatures(OFFERED_PROTOCOL_FEATURES));
    assert_eq!(OFFERED_FEATURES >> 33 & 1, 1);
    fixture.ok(Request::SetBackendReqFd);
    fixture.ok(Request::SetFeatures(VERSION_1 | PROTOCOL_FEATURES));
    let features = Request::SetFeatures(VERSION_1 | PROTOCOL_FEATURES | 1 << 33);
    let error = fixture.err(features);
    assert!(matches!(error, SessionError::Iommu), "{error}");
    assert!(error.to_string().contains("intel-iommu"), "{error}");
}

/// User-mode Linux begins with SET_OWNER, and its guest gets what is offered.
#[test]
fn who_passes_features_through_is_offered_what_is_served() {
    for (pairs, control) in [(1, false), (2, true)] {
        let (device, seen) = TestDevice::new(pairs);
        let session = Session::new(Arc::clone(&device), LogLimit::default());
        let mut fixture = Fixture {
            device,
            seen,
            session,
        };
        fixture.ok(Request::SetOwner);
        let Some(ReplyBody::U64(offered)) = fixture.ok(Request::GetFeatures) else {
            panic!("features are a number");
        };
        let offered = Features::from_bits(offered).unwrap();
        assert!(!offered.contains(Features::VIRTIO_F_ACCESS_PLATFORM));
        let of_control = offered & Features::OF_CONTROL_QUEUE;
        assert_eq!(of_control.is_empty(), !control, "{of_control:?}");
        assert!(!offered.contains(Features::VIRTIO_NET_F_MTU), "nobody told");
        assert!(offered.contains(Features::VIRTIO_NET_F_STATUS));
        // Who reads GET_QUEUE_NUM as a number of rings would find one.
        let all = ProtocolFeatures::all().bits() & !u64::from(!control);
        assert_eq!(
            fixture.ok(Request::GetProtocolFeatures),
            Some(u64_reply(all))
        );
        fixture.ok(Request::SetProtocolFeatures(all));
        let features = Request::SetFeatures(offered.bits());
        if control {
            assert!(matches!(fixture.err(features), SessionError::ControlQueue));
            continue;
        }
        fixture.ok(features);
        fixture.ok(Request::SetBackendReqFd);
        fixture.ok(Request::SetConfig);
        let space = NetConfig {
            max_queue_pairs: 1,
            mtu: 0,
        };
        let (offset, size) = (0, 10);
        assert!(offered.contains(Features::VIRTIO_F_RING_PACKED));
        for (said, meant) in [(0, 0x8000_8000), (0x8005_8003, 0x8005_8003)] {
            fixture.ok(Request::SetVringBase {
                index: 0,
                base: said,
            });
            let at = fixture.ok(Request::GetVringBase { index: 0 });
            let num = meant;
            assert_eq!(at, Some(ReplyBody::VringState { index: 0, num }));
        }
        let told = fixture.ok(Request::GetConfig { offset, size });
        let config = ReplyBody::Config {
            offset,
            size,
            space,
        };
        assert_eq!(told, Some(config));
    }
}

#[test]
fn what_was_refused_is_told_of_its_ring() {
    let mut fixture = Fixture::new();
    fixture.start(1);
    fixture.acked(Request::SetVringBase { index: 1, base: 7 });
    fixture.acked(Request::NetSetMtu(67));
    let refusals = fixture.refusals();
    let [(Some(1), of_ring), (None, of_all)] = &refusals[..] else {
        panic!("{refusals:?}");
    };
    assert_eq!(
        of_ring,
        "ring 1 refused: the base of a started ring can't change"
    );
    assert!(
        of_all.contains("the MTU is not one of 68 to 65535"),
        "{of_all}"
    );
}
