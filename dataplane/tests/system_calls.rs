//! Forwarding in steady state makes no system call but the calls that guests ask for, and one for
//! each burst to a NIC. NIC ports need root and iproute2.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;
mod testbeds;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Once;
use std::time::{Duration, Instant};

use common::endpoint::CSUM;
use common::{DEADLINE, frame, mac};
use ringway_guest::{Calls, Layout};
use ringway_testbed::{BROADCAST, BURST, Shape, Testbed, station};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use tempfile::TempDir;
use testbeds::{STATION, bed_with_nic, for_segments};

const BURSTS: u32 = 1000;
const FRAMES: u64 = BURST as u64;

/// More than any test makes of one system call, even if there is one for each frame: the thread
/// waits in a loop for something that can't happen.
const HANGS: u32 = 200_000;

/// How long the worker does not look for events of queues that sleep.
const EVENT_INTERVAL: Duration = Duration::from_micros(50);

/// System calls by number.
type Counts = BTreeMap<i64, u32>;

thread_local! {
    static TRAPPED: [Cell<u32>; 512] = const { [const { Cell::new(0) }; 512] };
}

/// As the length of an address that there is not, it tells the filter that a call was counted.
const COUNTED: u32 = 77;

/// Where the first arguments of a system call are.
const ARGUMENTS: [usize; 4] = [
    libc::REG_RDI as usize,
    libc::REG_RSI as usize,
    libc::REG_RDX as usize,
    libc::REG_R10 as usize,
];

/// Counts a system call, and has it return 0 without being made; but has the kernel send what it is
/// to send.
extern "C" fn count(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: SA_SIGINFO: the third argument is the interrupted thread's context, and ours to
    // change.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let [fd, buffer, bytes, flags] = ARGUMENTS.map(|register| registers[register]);
    let result = &mut registers[libc::REG_RAX as usize];
    // The kernel leaves the number where the result goes.
    let number = std::mem::take(result);
    if number == libc::SYS_sendto {
        // SAFETY: what was asked for, without an address.
        *result = unsafe { libc::syscall(number, fd, buffer, bytes, flags, 0, COUNTED) };
        if *result < 0 {
            let error = std::io::Error::last_os_error().raw_os_error();
            *result = -i64::from(error.unwrap_or(libc::EIO));
        }
    }
    let number = usize::try_from(number).unwrap_or(usize::MAX);
    TRAPPED.with(|counts| {
        let count = &counts[number.min(counts.len() - 1)];
        count.set(count.get() + 1);
        if count.get() == HANGS {
            give_up();
        }
    });
}

/// Ends the process, with what can be said in a signal handler.
fn give_up() {
    let why = b"too many system calls, or a panic in a thread that can't make any\n";
    // SAFETY: the pointer is valid for so many bytes.
    unsafe { libc::write(libc::STDERR_FILENO, why.as_ptr().cast(), why.len()) };
    // SAFETY: it runs no destructors.
    unsafe { libc::_exit(1) };
}

/// From now on this thread's system calls are counted and not made. It can only end.
fn trap() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid one.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let entry: extern "C" fn(_, _, _) = count;
        action.sa_sigaction = entry as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: `action` is complete, and its handler touches cells of its own thread only.
        let set = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
        assert_eq!(set, 0, "handler: {}", std::io::Error::last_os_error());
    });
    // The timer that watches over calls would have them counted too.
    // SAFETY: an all-zero set is a valid one.
    let mut ticks: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a valid set.
    unsafe { libc::sigaddset(&raw mut ticks, libc::SIGRTMIN() + 5) };
    // SAFETY: the pointer is to a valid set, and nothing is to be written back.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const ticks, std::ptr::null_mut()) };
    let to_stderr = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, 2).unwrap();
    let counted = u64::from(COUNTED);
    let counted =
        SeccompCondition::new(5, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, counted).unwrap();
    let allowed = [
        // Wherever the kernel allows it, the clock is read without a system call.
        (libc::SYS_clock_gettime, vec![]),
        // The handler's return, and what it does if all is lost.
        (libc::SYS_rt_sigreturn, vec![]),
        (
            libc::SYS_write,
            vec![SeccompRule::new(vec![to_stderr]).unwrap()],
        ),
        (
            libc::SYS_sendto,
            vec![SeccompRule::new(vec![counted]).unwrap()],
        ),
        (libc::SYS_exit_group, vec![]),
        // The thread's end.
        (libc::SYS_exit, vec![]),
    ];
    let (others, these) = (SeccompAction::Trap, SeccompAction::Allow);
    let filter = SeccompFilter::new(allowed.into(), others, these, TargetArch::x86_64);
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}

/// The system calls of `action`, and what it returned. It must not panic: a thread whose memory
/// can't grow could not tell.
fn system_calls<T: Send + 'static>(
    shape: Shape,
    prepare: fn(&mut Testbed),
    action: impl FnOnce(&mut Testbed) -> T + Send + 'static,
) -> (Counts, T) {
    let prepared = move || {
        let mut bed = Testbed::new(shape);
        prepare(&mut bed);
        bed.burst();
        bed
    };
    system_calls_on(prepared, action)
}

/// The same on a bed that was made otherwise.
fn system_calls_on<T: Send + 'static>(
    prepared: impl FnOnce() -> Testbed + Send + 'static,
    action: impl FnOnce(&mut Testbed) -> T + Send + 'static,
) -> (Counts, T) {
    let counted = move || {
        let mut bed = prepared();
        trap();
        let result = action(&mut bed);
        let counts = TRAPPED.with(|counts| counts.each_ref().map(Cell::get));
        // Nor can it be taken down without system calls.
        std::mem::forget(bed);
        (counts, result)
    };
    let (counts, result) = std::thread::spawn(counted).join().unwrap();
    let made = (0..).zip(counts).filter(|(_, count)| *count > 0);
    (made.collect(), result)
}

fn bursts(bed: &mut Testbed, count: u32) -> u64 {
    (0..count).map(|_| bed.burst()).sum()
}

/// Asserts that bursts of which nobody wants to be told fill `buffers` each and make no system
/// call.
fn assert_none(shape: Shape, prepare: fn(&mut Testbed), buffers: u64) {
    for layout in [Layout::Split, Layout::Packed] {
        let shape = Shape { layout, ..shape };
        let (calls, received) = system_calls(shape, prepare, |bed| bursts(bed, BURSTS));
        assert_eq!(calls, Counts::new(), "{layout:?}");
        assert_eq!(received, u64::from(BURSTS) * buffers, "{layout:?}");
    }
}

/// Asserts that `count` bursts, `before` each of which the guests do something, call `expected`
/// times.
fn assert_calls(event_idx: bool, count: u32, before: fn(&mut Testbed, u32), expected: u32) {
    for layout in [Layout::Split, Layout::Packed] {
        let shape = Shape {
            event_idx,
            ..Shape::plain(layout, 64)
        };
        let run = move |bed: &mut Testbed| -> u64 {
            let burst = |index| {
                before(bed, index);
                bed.burst()
            };
            (0..count).map(burst).sum()
        };
        // A thread's first call makes its timer.
        let first_call = |bed: &mut Testbed| {
            bed.guests[1].rx.ring.set_calls(Calls::Next);
            bed.burst();
            bed.guests[1].rx.ring.set_calls(Calls::Never);
        };
        let (calls, received) = system_calls(shape, first_call, run);
        assert_eq!(
            calls,
            Counts::from([(libc::SYS_write, expected)]),
            "{layout:?}"
        );
        assert_eq!(received, u64::from(count) * FRAMES, "{layout:?}");
    }
}

#[test]
fn frames_between_polled_rings_make_no_system_call() {
    for bytes in [64, 1500] {
        assert_none(Shape::plain(Layout::Split, bytes), |_| {}, FRAMES);
    }
}

#[test]
fn frames_in_chains_and_mergeable_buffers_make_no_system_call() {
    let shape = Shape {
        buffer_bytes: 256,
        receive_size: 512,
        chained: true,
        ..Shape::plain(Layout::Split, 1500)
    };
    // 1,512 bytes take six buffers.
    assert_none(shape, |_| {}, 6 * FRAMES);
}

#[test]
fn floods_and_drops_make_no_system_call() {
    let shape = Shape {
        guests: 4,
        ..Shape::plain(Layout::Split, 64)
    };
    let flood = |bed: &mut Testbed| bed.guests[0].address(BROADCAST, station(0));
    assert_none(shape, flood, 3 * FRAMES);
    let own_port = |bed: &mut Testbed| bed.guests[0].address(station(0), station(0));
    assert_none(shape, own_port, 0);
}

#[test]
fn a_burst_makes_one_call_for_each_ring_that_wants_it() {
    for event_idx in [false, true] {
        let receiver = |bed: &mut Testbed, _| {
            bed.guests[1].rx.ring.set_calls(Calls::Next);
        };
        assert_calls(event_idx, BURSTS, receiver, BURSTS);
        let both = |bed: &mut Testbed, _| {
            bed.guests[0].tx.ring.set_calls(Calls::Next);
            bed.guests[1].rx.ring.set_calls(Calls::Next);
        };
        assert_calls(event_idx, BURSTS, both, 2 * BURSTS);
    }
}

#[test]
fn event_idx_saves_the_calls_that_nobody_waits_for() {
    // As many bursts as a packed ring takes until it is at the same place again.
    let count = 8;
    let once = |bed: &mut Testbed, index| {
        if index == 0 {
            bed.guests[1].rx.ring.set_calls(Calls::Next);
        }
    };
    assert_calls(true, count, once, 1);
    // Without EVENT_IDX the driver has to say when it has enough.
    assert_calls(false, count, once, count);
}

#[test]
fn events_of_other_queues_are_looked_for_at_intervals() {
    let with_a_silent_port = |bed: &mut Testbed| {
        let folder = TempDir::new().unwrap();
        let name = "silent".parse().unwrap();
        bed.switch
            .add_port(name, &folder.path().join("silent"))
            .unwrap();
    };
    let (calls, elapsed) =
        system_calls(Shape::plain(Layout::Split, 64), with_a_silent_port, |bed| {
            let start = Instant::now();
            while start.elapsed() < 20 * EVENT_INTERVAL {
                bed.burst();
            }
            start.elapsed()
        });
    let looks: u32 = calls.values().sum();
    let most = elapsed.as_nanos() / EVENT_INTERVAL.as_nanos() + 1;
    assert!(
        (1..=most).contains(&looks.into()),
        "{calls:?} in {elapsed:?}"
    );
    let epoll = [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
    ];
    assert!(
        calls.keys().all(|number| epoll.contains(number)),
        "{calls:?}"
    );
}

#[test]
fn segments_make_no_system_call() {
    for (segments, takes) in [(4, 0), (4, CSUM), (1, 0)] {
        for layout in [Layout::Split, Layout::Packed] {
            let (shape, message) = for_segments(segments, station(1), takes);
            let prepared = move || {
                let mut bed = Testbed::new(Shape { layout, ..shape });
                bed.guests[0].write(&message);
                bed.burst();
                bed
            };
            let (calls, received) = system_calls_on(prepared, |bed| bursts(bed, BURSTS));
            assert_eq!(calls, Counts::new(), "{layout:?}");
            let expected = u64::from(BURSTS) * FRAMES * u64::from(segments);
            assert_eq!(received, expected, "{layout:?}");
        }
    }
}

/// What needs root, which `--profile user` leaves out.
mod as_root {
    use super::*;

    #[test]
    fn a_burst_to_a_nic_makes_one_system_call() {
        /// Descriptors that a kernel before 6.17 sends in one call.
        const KERNEL_BATCH: u32 = 32;
        for segments in [1, 4] {
            let (shape, message) = for_segments(segments, mac(STATION), 0);
            let prepared = move || {
                let (bed, _) = bed_with_nic(shape);
                bed.guests[0].write(&message);
                bed
            };
            // No more than there are chunks.
            let count = 16 / u32::from(segments);
            let (calls, sent) = system_calls_on(prepared, move |bed| {
                let burst = |_| {
                    bed.guests[0].tx.ring.push(BURST);
                    bed.switch.turn();
                    bed.guests[0].tx.ring.reclaim().unwrap_or(0)
                };
                (0..count).map(burst).map(u32::from).sum::<u32>()
            });
            assert_eq!(sent, count * u32::from(BURST));
            assert_eq!(calls.len(), 1, "{calls:?}");
            let most = sent * u32::from(segments) / KERNEL_BATCH;
            assert!(
                (count..=most).contains(&calls[&libc::SYS_sendto]),
                "{calls:?}"
            );
        }
    }

    #[test]
    fn frames_from_a_nic_make_no_system_call() {
        const COUNT: u64 = 16 * FRAMES;
        let prepared = || {
            let (bed, far) = bed_with_nic(Shape::plain(Layout::Split, 64));
            for seed in 0..COUNT {
                far.send(&frame(2, STATION, 60, seed));
            }
            bed
        };
        let (calls, received) = system_calls_on(prepared, |bed| {
            let start = Instant::now();
            let mut received = 0;
            while received < COUNT && start.elapsed() < DEADLINE {
                bed.switch.turn();
                received += bed.receive();
            }
            received
        });
        assert_eq!((calls, received), (Counts::new(), COUNT));
    }
}
