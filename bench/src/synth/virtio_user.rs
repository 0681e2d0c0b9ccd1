//! DPDK's virtio driver as a second, foreign load: frames circulate between two of its ports
//! through the switch, addressed for a learning one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ringway_guest::Layout;
use tempfile::TempDir;

use super::frame::MAX_PLAIN;
use super::load::LoadConfig;
use super::switch::{testpmd, testpmd_busy_seconds};
use crate::interrupt;
use crate::process::Process;

/// How long its start may take: it zeroes its hugepages first.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Frames circulate for this long before they are counted.
const WARM_UP: Duration = Duration::from_millis(500);
/// How long the frames that are on their way at the end may take to arrive.
const SETTLE: Duration = Duration::from_millis(50);
/// Frames of a burst of testpmd's.
const BURST: u32 = 32;
/// Room for a frame in testpmd's usual packet buffer, and what lies in front of it.
const USUAL_ROOM: u32 = 2048;
const HEADROOM: u32 = 128;
/// Packet buffers besides those in rings.
const SPARE_BUFFERS: u32 = 4096;
const MACS: [&str; 2] = ["52:54:00:00:00:01", "52:54:00:00:00:02"];

/// What a trial measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Circulation {
    /// Frames per second that both ports receive.
    pub(crate) frames_per_second: f64,
    /// Share of time in which testpmd moved frames.
    pub(crate) busy_share: Option<f64>,
    /// Share of time that others kept testpmd off its CPU.
    pub(crate) disturbed_share: f64,
    /// Share of the circulating frames that were lost.
    pub(crate) lost_share: f64,
    /// Packet buffers in its pool: a driver whose frames are completed early goes through all of
    /// them, and the more there are, the less of it the caches hold.
    pub(crate) buffers: u32,
}

/// One trial, with testpmd forwarding on `cpu` and its prompt on `main_cpu`.
pub(crate) fn trial(
    config: &LoadConfig,
    cpu: usize,
    main_cpu: usize,
    duration: Duration,
) -> Result<Circulation> {
    let [size] = config.sizes[..] else {
        bail!("the virtio-user load drives two ports with frames of one size");
    };
    ensure!(
        size <= MAX_PLAIN,
        "the virtio-user load sends frames of up to {MAX_PLAIN} bytes"
    );
    let dir = TempDir::with_prefix("ringway-bench-")?;
    let command = command(config, size, cpu, main_cpu)?;
    let log = dir.path().join("log");
    let mut load = Process::spawn("the virtio-user load", &command, None, &log)?;
    load.wait_for_prompt(START_PATIENCE)?;
    measure(&mut load, config, size, duration)
}

fn command(
    config: &LoadConfig,
    size: u32,
    cpu: usize,
    main_cpu: usize,
) -> Result<std::process::Command> {
    let [a, b] = &config.sockets[..] else {
        bail!("the virtio-user load drives two ports");
    };
    let shape = config.shape;
    ensure!(shape.queues == 1, "the virtio-user load has one queue pair");
    let options = format!(
        "queues=1,queue_size={},packed_vq={},mrg_rxbuf={},in_order={}",
        shape.queue_size,
        u8::from(shape.layout == Layout::Packed),
        u8::from(shape.mergeable),
        u8::from(shape.in_order)
    );
    let mut command = testpmd(main_cpu, cpu, shape.huge)?;
    for (port, (socket, mac)) in [a, b].iter().zip(MACS).enumerate() {
        let socket = socket.display();
        command.arg("--vdev").arg(format!(
            "net_virtio_user{port},path={socket},mac={mac},{options}"
        ));
    }
    let entries = shape.queue_size.to_string();
    let room = size.next_multiple_of(64).max(USUAL_ROOM) + HEADROOM;
    let buffers = pool_buffers(shape.queue_size);
    command
        .args(["--", "-i", "--forward-mode=mac", "--nb-cores=1"])
        // Else a start throws away what lies in the rings, which is to be counted.
        .args(["--no-flush-rx", "--disable-link-check"])
        .arg(format!("--eth-peer=0,{}", MACS[1]))
        .arg(format!("--eth-peer=1,{}", MACS[0]))
        .arg(format!("--mbuf-size={room}"))
        .arg(format!("--total-num-mbufs={buffers}"))
        .args(["--txd", &entries, "--rxd", &entries]);
    Ok(command)
}

/// Packet buffers for the four rings, and some to spare.
fn pool_buffers(queue_size: u16) -> u32 {
    4 * u32::from(queue_size) + SPARE_BUFFERS
}

/// Talks to its prompt.
fn measure(
    load: &mut Process,
    config: &LoadConfig,
    size: u32,
    duration: Duration,
) -> Result<Circulation> {
    // Half of what the smaller ring holds, so that none is ever full; in peers' buffers of 2 KiB.
    let per_frame = (size + 12).div_ceil(USUAL_ROOM);
    let bursts = (u32::from(config.shape.queue_size) / 2 / BURST / per_frame).max(1);
    for command in [
        "set record-core-cycles on".to_owned(),
        format!("set txpkts {size}"),
        format!("start tx_first {bursts}"),
    ] {
        let answer = load.tell(&command)?;
        ensure!(
            !answer.contains("rror") && !answer.contains("too large"),
            "the virtio-user load refused `{command}`"
        );
    }
    interrupt::sleep(WARM_UP)?;
    load.tell("clear fwd stats all")?;
    // The first look starts its clock, the second tells the rate since then.
    load.tell("show port stats all")?;
    let (start, waited) = (Instant::now(), load.waited_for_cpu());
    interrupt::sleep(duration)?;
    let said = load.tell("show port stats all")?;
    let seconds = start.elapsed().as_secs_f64();
    let waited = load.waited_for_cpu().saturating_sub(waited);
    let rates: Vec<f64> = numbers_after(&said, "Rx-pps:");
    ensure!(
        rates.len() == 2,
        "the virtio-user load told {} rates, not 2",
        rates.len()
    );
    let frames_per_second: f64 = rates.iter().sum();
    ensure!(
        frames_per_second > 0.0,
        "no frame came back to the virtio-user load"
    );
    let busy = testpmd_busy_seconds(&load.tell("show fwd stats all")?);
    let started = f64::from(2 * bursts * BURST);
    let lost_share = 1.0 - remaining(load)? / started;
    // What is left is too little to keep a switch busy: a rate of it would be one of latency.
    ensure!(
        lost_share < 0.5,
        "{:.0} % of the circulating frames were lost",
        100.0 * lost_share
    );
    Ok(Circulation {
        frames_per_second,
        busy_share: busy.map(|busy| busy / seconds),
        disturbed_share: waited.as_secs_f64() / seconds,
        lost_share: lost_share.max(0.0),
        buffers: pool_buffers(config.shape.queue_size),
    })
}

/// Stops the circulation and counts the frames that still arrive.
fn remaining(load: &mut Process) -> Result<f64> {
    for command in ["stop", "set fwd rxonly", "start"] {
        load.tell(command)?;
    }
    interrupt::sleep(SETTLE)?;
    let said = load.tell("stop")?;
    numbers_after(&said, "RX-total:")
        .last()
        .copied()
        .context("the virtio-user load told no sum")
}

/// The numbers that follow `key`, in order.
fn numbers_after(said: &str, key: &str) -> Vec<f64> {
    said.split(key)
        .skip(1)
        .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn testpmds_rates_are_read() {
        let said = "  Throughput (since last show)\n  Rx-pps:      1200          Rx-bps:  3\n\
                      Rx-pps: 7  Rx-bps: 0\ntestpmd> ";
        assert_eq!(numbers_after(said, "Rx-pps:"), [1200.0, 7.0]);
        assert!(numbers_after("testpmd> ", "Rx-pps:").is_empty());
    }
}
