//! An AF_XDP port next to a bare loop over xsk-rs, on a veth pair at 64 bytes, interleaved:
//!
//! ```text
//!   receive    live frames of the kernel -> far0 -> xdp0 -> socket -> dropped
//!   transmit   socket (fed by a guest, or by nobody) -> xdp0 -> far0, where nobody listens
//! ```
//! and with busy polling and huge pages next to without. Prints the medians of both, and the median
//! of the ratios with the lowest and the highest. Run by hand as root:
//! `cargo bench -p ringway-dataplane --bench af_xdp -- [PAIRS [SECONDS [CASE]]]`.
#![allow(clippy::unwrap_used, missing_docs, reason = "a program run by hand")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use ringway_api::{
    AfXdpConfig, BalanceConfig, BusyPoll, GroupFwdMask, IdleConfig, PortConfig, PortName,
    QueuePairs, SocketSpec, SwitchConfig, UmemFrames, VhostUserConfig, XdpMode,
};
use ringway_dataplane::Switch;
use ringway_guest::{FrameSource, Guest};
use ringway_testbed::host;
use xsk_rs::config::{BindFlags, SocketConfig, UmemConfig, XdpFlags};
use xsk_rs::{FillQueue, RxQueue, Socket, Umem};

/// L2 bytes without FCS of a 64-byte frame.
const FRAME_BYTES: usize = 60;

/// Frames of each UMEM, half of them each way, on both sides of the comparison.
const UMEM_FRAMES: u32 = 4096;

/// What `--busy-poll` is given.
const BUSY_POLL_US: u32 = 50;

/// Huge pages of 2 MiB that the UMEM takes.
const HUGE_PAGES: u64 = UMEM_FRAMES as u64 * 2048 / (2 << 20);

/// Whether ports that don't get huge pages are a mistake.
static WANTS_HUGE: AtomicBool = AtomicBool::new(false);

/// Frames that both sides handle at a time.
const BURST: usize = 64;

fn main() {
    // As criterion has it: each once, to see that it runs.
    let is_test = std::env::args().any(|text| text == "--test");
    if is_test && !host::is_root() {
        println!("af_xdp: SKIPPED, it needs root");
        return;
    }
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|text| !text.starts_with("--"));
    let mut number = |default: u64| {
        arguments
            .next()
            .map_or(default, |text| text.parse().unwrap())
    };
    let (pairs, time) = (
        number(if is_test { 1 } else { 9 }),
        Duration::from_secs(number(1)),
    );
    let only = arguments.next();
    type Trial = fn(Duration) -> f64;
    type Side = (&'static str, Trial);
    let cases: [(&str, Side, Side); 5] = [
        (
            "receive",
            ("ringway", |time| receive_by_switch(time, None)),
            ("bare", receive_bare),
        ),
        (
            "transmit",
            ("ringway", transmit_by_switch),
            ("bare", transmit_bare),
        ),
        (
            "busy-poll",
            ("with", |time| {
                receive_by_switch(time, BusyPoll::new(BUSY_POLL_US))
            }),
            ("without", |time| receive_by_switch(time, None)),
        ),
        (
            "huge-receive",
            ("with", |time| {
                with_huge_pages(|| receive_by_switch(time, None))
            }),
            ("without", |time| receive_by_switch(time, None)),
        ),
        (
            "huge-transmit",
            ("with", |time| with_huge_pages(|| transmit_by_switch(time))),
            ("without", transmit_by_switch),
        ),
    ];
    println!("64 bytes, Mpps: {pairs} interleaved pairs of {time:?}");
    for (name, (first_name, first), (second_name, second)) in cases {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let mut rates: [Vec<f64>; 3] = Default::default();
        for _ in 0..pairs {
            let (a, b) = (first(time), second(time));
            for (rates, rate) in rates.iter_mut().zip([a, b, a / b]) {
                rates.push(rate);
            }
        }
        for rates in &mut rates {
            rates.sort_by(f64::total_cmp);
        }
        let median = |rates: &[f64]| rates[rates.len() / 2];
        let [firsts, seconds, ratios] = &rates;
        println!(
            "{name:<13} {first_name} {:.2}  {second_name} {:.2}  ratio {:.2} ({:.2} to {:.2})",
            median(firsts) / 1e6,
            median(seconds) / 1e6,
            median(ratios),
            ratios[0],
            ratios[ratios.len() - 1],
        );
    }
}

/// The first CPU for whoever loads, the last for whoever is measured.
fn pin(is_measured: bool) -> usize {
    static CPUS: OnceLock<Vec<CoreId>> = OnceLock::new();
    // Asked once: a thread that is pinned is told its own CPU only, and so are its children.
    let cpus = CPUS.get_or_init(|| core_affinity::get_core_ids().unwrap());
    let cpu = cpus[if is_measured { cpus.len() - 1 } else { 0 }];
    core_affinity::set_for_current(cpu);
    cpu.id
}

/// A fresh namespace with a veth pair, whose far end is returned.
fn veth() -> u32 {
    host::fresh_namespace();
    host::veth(1, 1500);
    host::index_of("far0")
}

fn frame() -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
    frame
}

/// Sends frames out of an interface until told to stop.
fn generate(interface: u32, stop: &AtomicBool) {
    pin(false);
    let source = FrameSource::new(interface, frame().to_vec()).unwrap();
    while !stop.load(Ordering::Relaxed) {
        source.send(1 << 16).unwrap();
    }
}

/// Frames per second that `count` tells, while frames arrive at xdp0.
fn under_load(far: u32, time: Duration, measure: impl FnOnce(Duration) -> f64) -> f64 {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    // It inherits the namespace.
    let thread = std::thread::spawn(move || generate(far, &stopped));
    let rate = measure(time);
    stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    rate
}

fn rate_of(count: impl Fn() -> u64, time: Duration) -> f64 {
    let before = count();
    let start = Instant::now();
    std::thread::sleep(time);
    let (after, took) = (count(), start.elapsed());
    (after - before) as f64 / took.as_secs_f64()
}

/// Has the kernel keep as many more huge pages free as a UMEM takes, for the time of a trial.
fn with_huge_pages(trial: impl FnOnce() -> f64) -> f64 {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let read = || -> u64 {
        std::fs::read_to_string(POOL)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let before = read();
    std::fs::write(POOL, (before + HUGE_PAGES).to_string()).unwrap();
    assert_eq!(read(), before + HUGE_PAGES, "too few huge pages");
    WANTS_HUGE.store(true, Ordering::Relaxed);
    let rate = trial();
    WANTS_HUGE.store(false, Ordering::Relaxed);
    std::fs::write(POOL, before.to_string()).unwrap();
    rate
}

fn switch(busy_poll: Option<BusyPoll>) -> (Switch, PortName) {
    let switch = Switch::start(SwitchConfig {
        worker_cpus: vec![pin(true)],
        // As the bare loops do.
        idle: IdleConfig {
            spin: Duration::MAX,
            pause: Duration::ZERO,
            ..IdleConfig::default()
        },
        balance: BalanceConfig::default(),
        fdb_capacity: 1024,
        fdb_ageing: Duration::from_secs(300),
        fdb_move_hold: SwitchConfig::DEFAULT_FDB_MOVE_HOLD,
        group_fwd_mask: GroupFwdMask::DEFAULT,
    })
    .unwrap();
    let nic: PortName = "nic".parse().unwrap();
    let config = PortConfig::AfXdp(AfXdpConfig {
        mode: XdpMode::Copy,
        umem_frames: UmemFrames::new(UMEM_FRAMES).unwrap(),
        busy_poll_us: busy_poll,
        ..AfXdpConfig::new("xdp0".parse().unwrap())
    });
    switch.add_port(nic.clone(), config).unwrap();
    let info = switch.port(&nic).unwrap().af_xdp.unwrap();
    assert!(info.huge_pages || !WANTS_HUGE.load(Ordering::Relaxed));
    (switch, nic)
}

fn receive_by_switch(time: Duration, busy_poll: Option<BusyPoll>) -> f64 {
    let far = veth();
    let (switch, nic) = switch(busy_poll);
    let frames = || switch.port(&nic).unwrap().port.counters.rx_frames;
    under_load(far, time, |time| rate_of(frames, time))
}

fn transmit_by_switch(time: Duration) -> f64 {
    veth();
    let (switch, nic) = switch(None);
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("vm.sock");
    let socket = SocketSpec::Listen(path.as_path().try_into().unwrap());
    let config = PortConfig::VhostUser(VhostUserConfig {
        queues: QueuePairs::ONE,
        ..VhostUserConfig::new(socket)
    });
    switch.add_port("vm".parse().unwrap(), config).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let load = std::thread::spawn(move || {
        pin(false);
        let config = Guest::builder().queue_size(1024);
        let mut guest = config.connect(&path).unwrap();
        let mut one = vec![0; 12];
        one.extend(frame());
        let burst = vec![one; BURST];
        while !stopped.load(Ordering::Relaxed) {
            if guest.send_burst(0, &burst).unwrap() == 0 {
                std::hint::spin_loop();
            }
        }
    });
    let frames = || switch.port(&nic).unwrap().port.counters.tx_frames;
    let rate = rate_of(frames, time);
    stop.store(true, Ordering::Relaxed);
    load.join().unwrap();
    rate
}

/// A socket as xsk-rs makes it, with libxdp's own program; the second half of the frames is to
/// send.
fn bare() -> (
    xsk_rs::TxQueue,
    RxQueue,
    FillQueue,
    xsk_rs::CompQueue,
    Umem,
    Vec<xsk_rs::FrameDesc>,
) {
    pin(true);
    let half = (UMEM_FRAMES / 2).try_into().unwrap();
    let umem_config = UmemConfig::builder()
        .frame_size(2048.try_into().unwrap())
        .fill_queue_size(half)
        .comp_queue_size(half)
        .build()
        .unwrap();
    let count = UMEM_FRAMES.try_into().unwrap();
    let (umem, descs) = Umem::new(umem_config, count, false).unwrap();
    let config = SocketConfig::builder()
        .rx_queue_size(half)
        .tx_queue_size(half)
        .xdp_flags(XdpFlags::XDP_FLAGS_DRV_MODE)
        .bind_flags(BindFlags::XDP_USE_NEED_WAKEUP | BindFlags::XDP_COPY)
        .build();
    // SAFETY: the UMEM is used for one socket only.
    let socket = unsafe { Socket::new(config, &umem, &"xdp0".parse().unwrap(), 0) };
    let (tx, rx, rings) = socket.unwrap();
    let (fill, completions) = rings.unwrap();
    (tx, rx, fill, completions, umem, descs)
}

fn receive_bare(time: Duration) -> f64 {
    let far = veth();
    let (_tx, mut rx, mut fill, _completions, _umem, descs) = bare();
    let half = descs.len() / 2;
    // SAFETY: the frames are this UMEM's and free.
    unsafe { fill.produce(&descs[..half]) };
    under_load(far, time, move |time| {
        let mut batch = vec![descs[0]; BURST];
        let mut frames = 0;
        let start = Instant::now();
        while start.elapsed() < time {
            // SAFETY: the frames are this UMEM's.
            let count = unsafe { rx.consume(&mut batch) };
            // SAFETY: likewise, and free again.
            unsafe { fill.produce(&batch[..count]) };
            frames += count;
        }
        frames as f64 / start.elapsed().as_secs_f64()
    })
}

fn transmit_bare(time: Duration) -> f64 {
    use std::io::Write;
    veth();
    let (mut tx, _rx, _fill, mut completions, umem, mut descs) = bare();
    // Two CPUs may be one core: the other one is as busy as with a guest.
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let other = std::thread::spawn(move || {
        pin(false);
        let mut copies = [frame(); BURST];
        while !stopped.load(Ordering::Relaxed) {
            copies.rotate_left(1);
            std::hint::black_box(&mut copies);
        }
    });
    let mut free = descs.split_off(descs.len() / 2);
    let mut done = vec![free[0]; BURST];
    let mut frames = 0;
    let start = Instant::now();
    while start.elapsed() < time {
        // SAFETY: the frames are this UMEM's.
        let count = unsafe { completions.consume(&mut done) };
        free.extend_from_slice(&done[..count]);
        frames += count;
        if free.len() < BURST {
            tx.wakeup().unwrap();
            continue;
        }
        let mut batch = free.split_off(free.len() - BURST);
        for desc in &mut batch {
            // SAFETY: the frame is this UMEM's and free.
            let mut data = unsafe { umem.data_mut(desc) };
            data.cursor().set_pos(0);
            data.cursor().write_all(&frame()).unwrap();
        }
        // SAFETY: likewise; as many entries as frames.
        unsafe { tx.produce_and_wakeup(&batch) }.unwrap();
    }
    let rate = frames as f64 / start.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    other.join().unwrap();
    rate
}
