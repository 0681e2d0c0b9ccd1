//! Guests that change what they have shared while it is read, and guests whose rings are noise.
//! Classes of CVE-2020-14375, CVE-2026-86562 and CVE-2026-93683.
#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

mod common;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::hostile::{
    BAD, MAIN, MAIN_END, PEER, RX, RawConfig, RawGuest, Stage, TX, leaks_canary, plain, table_bytes,
};
use common::observe::Footprint;
use common::{eventually, frame};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use ringway_guest::features::{TSO, VIRTIO_NET_F_MRG_RXBUF};
use ringway_guest::{DESC_F_INDIRECT, DESC_F_NEXT, Guest, SplitArea, SplitDesc, Window};
use ringway_testbed::StopOnDrop;

/// How long the guest flips bits.
const RACE: Duration = Duration::from_secs(2);

/// What the descriptors of a ring may name: buffers of 2 KiB, then a table of 4 descriptors per
/// head, then room for what overruns them.
const BUFFERS: u64 = 128;
const TABLES: u64 = BUFFERS * 2048;
const TABLE_BYTES: u64 = 64;
const SHARE: u64 = TABLES + 256 * TABLE_BYTES + 8192;

/// What is behind the shares of both rings is never named.
const UNNAMED: u64 = 2 * SHARE;

/// Fills what is never named; the same as in the guards, so that [`leaks_canary`] sees it.
const CANARY: u8 = 0xc5;

/// A small generator: quality is no matter, speed is.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let at = self.below(from.len() as u64);
        from[usize::try_from(at).unwrap()]
    }
}

/// What one thread flips: a ring, and the buffers and tables behind it.
struct Flipper {
    area: SplitArea,
    buffers: u64,
    window: Window,
    direction: u16,
    noise: Noise,
}

impl Flipper {
    /// A sound chain of one or two buffers that starts at `head`.
    fn sound(&mut self, head: u16) -> SplitDesc {
        SplitDesc {
            addr: self.buffers + self.noise.below(BUFFERS) * 2048,
            len: self.noise.pick(&[72, 200, 1514, 2048]),
            flags: self.direction,
            next: head,
        }
    }

    /// Any descriptor that does not name what is never to be named.
    fn hostile(&mut self) -> SplitDesc {
        let noise = &mut self.noise;
        let good = self.buffers + noise.below(BUFFERS) * 2048;
        let edge = [
            MAIN_END - 1,
            MAIN_END,
            0,
            MAIN - 1,
            u64::MAX - 3,
            u64::MAX,
            good,
            good,
        ];
        SplitDesc {
            addr: noise.pick(&edge),
            len: noise.pick(&[0, 2, 12, 72, 8192, u32::MAX]),
            flags: self.direction ^ noise.pick(&[0, 1, 1, 2, 3, 4, 5, 7]),
            next: noise.pick(&[0, 1, 255, 256, 0xffff]),
        }
    }

    /// All descriptors name an indirect table or a buffer, all tables two buffers.
    fn reset(&mut self) {
        for head in 0..256 {
            self.reset_table(head);
            self.reset_desc(head);
        }
    }

    fn reset_desc(&mut self, head: u16) {
        let desc = if head.is_multiple_of(4) {
            SplitDesc {
                addr: self.buffers + TABLES + u64::from(head) * TABLE_BYTES,
                len: 32,
                flags: DESC_F_INDIRECT,
                next: 0,
            }
        } else {
            self.sound(head)
        };
        self.area.write_desc(head, desc);
        self.area.set_avail_entry(head, head);
    }

    fn reset_table(&mut self, head: u16) {
        let (first, second) = (self.sound(1), self.sound(0));
        let first = SplitDesc {
            flags: first.flags | DESC_F_NEXT,
            ..first
        };
        self.write_table(head, 0, &[first, second]);
    }

    fn write_table(&self, head: u16, entry: u64, descs: &[SplitDesc]) {
        let at = TABLES + u64::from(head) * TABLE_BYTES + 16 * entry;
        self.window
            .write(usize::try_from(at).unwrap(), &table_bytes(descs));
    }

    /// Lengths change as fast as they can be written, but stay sound: whoever reads one twice has
    /// two different ones sooner or later.
    fn change_lengths(&mut self) {
        for head in 0..256 {
            let desc = self.area.read_desc(head);
            if desc.flags == self.direction {
                let len = if desc.len == 72 { 1514 } else { 72 };
                self.area.write_desc(head, SplitDesc { len, ..desc });
            }
        }
    }

    /// Something is bad for a moment, and sound again.
    fn flip(&mut self) {
        let head = u16::try_from(self.noise.below(256)).unwrap();
        let hostile = self.hostile();
        match self.noise.below(30) {
            0 => {
                let entry = self.noise.pick(&[0, 255, 256, 0xffff]);
                self.area.set_avail_entry(head, entry);
            }
            1 => {
                let entry = self.noise.below(2);
                self.write_table(head, entry, &[hostile]);
            }
            2 => {
                let len = self.noise.pick(&[0, 8, 16, 48, 64, u32::MAX]);
                let desc = self.area.read_desc(head);
                self.area.write_desc(head, SplitDesc { len, ..desc });
            }
            3 => self.area.write_desc(head, hostile),
            _ => {
                // The header of some frame, field by field, and it stays so.
                let at = self.noise.below(BUFFERS) * 2048 + self.noise.below(12);
                let byte = self
                    .noise
                    .pick(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 4, 34, 54, 255]);
                self.window.write(usize::try_from(at).unwrap(), &[byte]);
                return;
            }
        }
        std::hint::spin_loop();
        self.reset_table(head);
        self.reset_desc(head);
    }
}

fn flipper(bad: &RawGuest, ring: u32) -> Flipper {
    let raw = if ring == RX { &bad.rx } else { &bad.tx };
    Flipper {
        area: raw.area.clone(),
        buffers: bad.buffers + SHARE * u64::from(ring),
        window: bad
            .memory
            .window(bad.buffers + SHARE * u64::from(ring), SHARE)
            .unwrap(),
        direction: raw.direction(),
        noise: Noise(0x9e37_79b9_7f4a_7c15 + u64::from(ring)),
    }
}

/// CVE-2020-14375, CVE-2026-86562, CVE-2026-93683: descriptors, indirect tables, avail entries and
/// net headers change while bursts read them.
#[test]
fn cve_2020_14375_what_is_changed_while_it_is_read_reaches_nothing_outside() {
    let config = RawConfig {
        features: RawConfig::default().features | TSO | VIRTIO_NET_F_MRG_RXBUF,
        ..RawConfig::default()
    };
    let peer = Guest::builder().features(TSO);
    let mut stage = Stage::with(config, peer, |switch| {
        switch.idle.backpressure = Duration::from_micros(100);
    });
    let message = plain(&frame(PEER, BAD, 2036, 1));
    for buffer in 0..BUFFERS {
        stage
            .bad
            .put(SHARE * u64::from(TX) + buffer * 2048, &message);
    }
    let unnamed = usize::try_from(common::hostile::BUFFER_BYTES - UNNAMED).unwrap();
    stage.bad.put(UNNAMED, &vec![CANARY; unnamed]);
    let stop = AtomicBool::new(false);
    let flips = AtomicU64::new(0);
    let (mut received, mut restarts) = (0_u64, [0_u64; 2]);
    let (until, count) = (&stop, &flips);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        let mut flippers = [flipper(&stage.bad, TX), flipper(&stage.bad, RX)];
        flippers.iter_mut().for_each(Flipper::reset);
        scope.spawn(move || {
            while !until.load(Ordering::Relaxed) {
                for flipper in &mut flippers {
                    flipper.change_lengths();
                    (0..8).for_each(|_| flipper.flip());
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let burst: Vec<_> = (0..16)
            .map(|i| plain(&frame(BAD, PEER, 60 + i * 90, 1)))
            .collect();
        let start = Instant::now();
        while start.elapsed() < RACE {
            for ring in [RX, TX] {
                let raw = stage.bad.ring(ring);
                let size = raw.area.size();
                raw.next = raw.area.used_idx().wrapping_add(size);
                raw.publish();
            }
            stage.peer.send_burst(0, &burst).unwrap();
            while let Some(frame) = stage.peer.try_recv(0).unwrap() {
                assert!(
                    !leaks_canary(&frame.frame),
                    "memory that no descriptor named"
                );
                received += 1;
            }
            for ring in [RX, TX] {
                if !stage.is_started(ring) {
                    stage.bad.restart_ring(ring);
                    restarts[ring as usize] += 1;
                }
            }
        }
    });
    assert!(flips.into_inner() > 1000);
    let sent = stage.lab.counters(&stage.port).tx_frames;
    let was_a_race = received.min(sent) > 1000 && restarts.iter().all(|count| *count > 0);
    assert!(
        was_a_race,
        "{received} from it, {sent} to it, {restarts:?} restarts"
    );
    let rest = stage.bad.bytes(stage.bad.buffers + UNNAMED, unnamed);
    assert!(
        rest.iter().all(|b| *b == CANARY),
        "written where no descriptor points"
    );
    for ring in [RX, TX] {
        stage.bad.restart_ring(ring);
    }
    assert!(stage.peer.flush(common::DEADLINE).unwrap());
    while stage.peer.try_recv(0).unwrap().is_some() {}
    stage.assert_works();
    stage.finish_flooded();
}

/// CVE-2026-93683: lengths that change under the switch's hands and are sound at every moment. Each
/// chain is one frame of one of the two lengths, and its bytes are those of its own buffer.
#[test]
fn cve_2026_93683_a_length_that_changes_while_it_is_read_is_read_once() {
    let mut stage = Stage::new();
    let frames: Vec<_> = (0..BUFFERS).map(|i| frame(PEER, BAD, 2036, i)).collect();
    for (i, bytes) in (0..).zip(&frames) {
        let index = u16::try_from(i).unwrap();
        let addr = stage.bad.put(i * 2048, &plain(bytes));
        for head in [index, index + 128] {
            stage.bad.tx.write_chain(head, &[(addr, 72)]);
            stage.bad.tx.area.set_avail_entry(head, head);
        }
    }
    let mut flipper = flipper(&stage.bad, TX);
    let stop = AtomicBool::new(false);
    let until = &stop;
    let mut received = [0_u64; 2];
    std::thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(move || {
            while !until.load(Ordering::Relaxed) {
                flipper.change_lengths();
            }
        });
        let start = Instant::now();
        while start.elapsed() < RACE / 2 {
            let raw = &mut stage.bad.tx;
            raw.next = raw.area.used_idx().wrapping_add(raw.area.size());
            raw.publish();
            while let Some(next) = stage.peer.try_recv(0).unwrap() {
                let buffer = usize::from(next.frame[21]);
                let is_long = next.frame.len() > 60;
                assert!(matches!(next.frame.len(), 60 | 1502));
                assert!(frames[buffer].starts_with(&next.frame), "buffer {buffer}");
                received[usize::from(is_long)] += 1;
            }
        }
    });
    assert!(received.iter().all(|count| *count > 100), "{received:?}");
    stage.bad.tx.wait_used_discarding(&mut stage.peer);
    stage.assert_works();
    stage.finish();
}

/// Noise for both rings.
#[derive(Clone, Debug)]
struct Tables {
    descs: [Vec<SplitDesc>; 2],
    heads: [Vec<u16>; 2],
    indirect: Vec<SplitDesc>,
    bytes: Vec<u8>,
}

/// Any bits at all, or such as come further: addresses in memory, short lengths, links in the
/// table, few flags.
fn any_desc() -> impl Strategy<Value = SplitDesc> {
    let any_bits = (any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>());
    let addr = prop_oneof![
        8 => (0..common::hostile::BUFFER_BYTES).prop_map(|at| MAIN + (1 << 16) + at),
        1 => (0..1_u64 << 16).prop_map(|at| MAIN + at),
        1 => (0..128_u64).prop_map(|at| MAIN_END - at),
    ];
    let likely = (addr, 0..4096_u32, 0..8_u16, 0..40_u16);
    prop_oneof![1 => any_bits, 6 => likely].prop_map(|(addr, len, flags, next)| SplitDesc {
        addr,
        len,
        flags,
        next,
    })
}

fn any_tables() -> impl Strategy<Value = Tables> {
    let descs = || prop::collection::vec(any_desc(), 32);
    let heads = || prop::collection::vec(prop_oneof![8 => 0..32_u16, 1 => any::<u16>()], 1..32);
    (
        [descs(), descs()],
        [heads(), heads()],
        prop::collection::vec(any_desc(), 64),
        prop::collection::vec(any::<u8>(), 4096),
    )
        .prop_map(|(descs, heads, indirect, bytes)| Tables {
            descs,
            heads,
            indirect,
            bytes,
        })
}

/// Whatever the bits: the switch goes on, the guest's neighbours are left alone, nothing piles up.
#[test]
fn random_rings_neither_crash_nor_leak() {
    let config = RawConfig {
        queue_size: 32,
        features: RawConfig::default().features | TSO | VIRTIO_NET_F_MRG_RXBUF,
    };
    let stage = Stage::with(config, Guest::builder(), |switch| {
        switch.idle.backpressure = Duration::from_micros(100);
    });
    let stage = RefCell::new(stage);
    let footprint = RefCell::new(None);
    let cases = RefCell::new(0);
    let mut runner = TestRunner::new(Config {
        cases: 400,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&any_tables(), |tables| {
            run_tables(&mut stage.borrow_mut(), &tables);
            *cases.borrow_mut() += 1;
            if *cases.borrow() == 40 {
                *footprint.borrow_mut() = Some(at_rest(&mut stage.borrow_mut()));
            }
            Ok(())
        })
        .unwrap();
    let mut stage = stage.into_inner();
    at_rest(&mut stage);
    footprint.into_inner().unwrap().assert_flat();
    stage.finish_flooded();
}

/// What is in use when both rings of a fresh session run: rings that are stopped hold fewer fds.
fn at_rest(stage: &mut Stage) -> Footprint {
    stage.reconnect();
    while stage.peer.try_recv(0).unwrap().is_some() {}
    stage.assert_works();
    Footprint::now()
}

fn run_tables(stage: &mut Stage, tables: &Tables) {
    stage.reconnect();
    let memory = Arc::clone(&stage.bad.memory);
    memory.write(MAIN + (1 << 16), &tables.bytes).unwrap();
    memory
        .write(MAIN + (1 << 17), &table_bytes(&tables.indirect))
        .unwrap();
    let frames = frame(PEER, BAD, 1500, 1).repeat(64);
    memory.write(MAIN + (1 << 18), &frames).unwrap();
    for (ring, (descs, heads)) in [RX, TX]
        .into_iter()
        .zip(tables.descs.iter().zip(&tables.heads))
    {
        for (index, desc) in (0..).zip(descs) {
            stage.bad.ring(ring).area.write_desc(index, *desc);
        }
        stage.bad.ring(ring).offer(heads);
    }
    // All that was offered for transmission is used, or the ring is stopped.
    eventually("the transmit ring is done", || {
        while stage.peer.try_recv(0).unwrap().is_some() {}
        let is_done = stage.bad.tx.area.used_idx() == stage.bad.tx.next;
        is_done || !stage.is_started(TX)
    });
    let burst: Vec<_> = (0..16)
        .map(|i| plain(&frame(BAD, PEER, 60 + i * 90, 1)))
        .collect();
    stage.peer.send_burst(0, &burst).unwrap();
    assert!(stage.peer.flush(common::DEADLINE).unwrap());
    stage.bad.assert_guards_intact();
}
