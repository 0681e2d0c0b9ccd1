//! What ringwayd costs while nothing happens, and how fast it wakes.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::super::guest::{HOST_ADDRESS, address};
use super::super::measure::{Figure, ping};
use super::super::network::LabNetwork;
use super::{Findings, ScenarioStage, traffic_passes};
use crate::interrupt;
use crate::netns::NetNs;
use crate::stats::median;

/// Guests still settle for a moment after their shells are up.
const SETTLE: Duration = Duration::from_secs(2);

/// How long the CPU time is watched.
const WATCH: Duration = Duration::from_secs(10);

/// Promise: CPU of a silent ringwayd, in percent of one core.
const MAX_CPU_PERCENT: f64 = 1.0;

/// Promise: median time of the first frame after idle.
const MAX_FIRST_FRAME_MS: f64 = 1.0;

/// Promise: resident memory besides guest memory.
const MAX_RSS_BYTES: u64 = 64 << 20;

/// Frames into an idle switch, and the idle time before each.
const PROBES: u32 = 30;
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// Address of the second tap, in a namespace of its own.
const PROBE_ADDRESS: &str = "10.77.0.253";
const PROBE_PORT: &str = "probe";
const PROBE_TAP: &str = "rwprobe";

/// CPU of two silent guests' switch, then single frames into it.
pub(super) fn idle(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut network = stage.guests(stage.shape()?)?;
    // Traffic first: idle after work is what counts, not idle that never began.
    traffic_passes(&mut network, &mut findings, "before")?;
    interrupt::sleep(SETTLE)?;

    stage.progress.say("idle: watching ringwayd's CPU for 10 s");
    let (cpu, started) = (network.daemon()?.cpu_seconds()?, Instant::now());
    interrupt::sleep(WATCH)?;
    let used = network.daemon()?.cpu_seconds()? - cpu;
    let percent = 100.0 * used / started.elapsed().as_secs_f64();
    findings.note(
        "cpu_percent",
        percent,
        format!("ringwayd {percent:.2} % of a core over 10 s"),
    );
    findings.require(percent < MAX_CPU_PERCENT, || {
        format!("ringwayd uses {percent:.2} % of a core, {MAX_CPU_PERCENT} % is allowed")
    });

    stage
        .progress
        .say("idle: single frames into the idle switch");
    let Figure::Ping {
        median_rtt_ms,
        max_rtt_ms,
        ..
    } = ping(&mut network, &address(1), 20, 0.3)?
    else {
        unreachable!("ping gives a ping's figure")
    };
    findings.note(
        "guest_ping_after_idle_median_ms",
        median_rtt_ms,
        format!("guest-guest ping after 0.3 s idle {median_rtt_ms:.2} ms (max {max_rtt_ms:.2})"),
    );
    let times = first_frames(&network)?;
    let slowest = times.iter().copied().fold(0.0, f64::max);
    let middle = median(&times);
    findings.note(
        "first_frame_median_ms",
        middle,
        format!(
            "host to tap, first frame after 0.25 s idle {middle:.3} ms median of {PROBES} \
             (max {slowest:.2})"
        ),
    );
    findings.require(middle <= MAX_FIRST_FRAME_MS, || {
        format!("first frame after idle takes {middle:.3} ms, {MAX_FIRST_FRAME_MS} is allowed")
    });
    Ok(findings)
}

/// Milliseconds from a send on the host's interface to the arrival at a second tap. Guests have no
/// part in it, so that this is the time of ringwayd and of the host's own stack.
fn first_frames(network: &LabNetwork) -> Result<Vec<f64>> {
    let control = network.control()?;
    let far = NetNs::create("probe")?;
    let mtu = network.shape.mtu_bytes.to_string();
    control.ringway(&[
        "port", "add", PROBE_PORT, "tap", "--ifname", PROBE_TAP, "--queues", "1", "--mtu", &mtu,
    ])?;
    network
        .namespace
        .ip(&["link", "set", PROBE_TAP, "netns", far.name()])?;
    far.ip(&[
        "addr",
        "add",
        &format!("{PROBE_ADDRESS}/24"),
        "dev",
        PROBE_TAP,
    ])?;
    far.ip(&["link", "set", PROBE_TAP, "up"])?;
    let times = send_probes(network, &far);
    control.ringway(&["port", "del", PROBE_PORT])?;
    times
}

fn send_probes(network: &LabNetwork, far: &NetNs) -> Result<Vec<f64>> {
    let receiver = far.on_thread(|| {
        UdpSocket::bind((PROBE_ADDRESS, 0)).context("binding the probe's receiver")
    })?;
    let sender = network
        .namespace
        .on_thread(|| UdpSocket::bind((HOST_ADDRESS, 0)).context("binding the probe's sender"))?;
    receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
    sender.connect(receiver.local_addr()?)?;
    let mut times = Vec::new();
    for number in 0..=PROBES {
        interrupt::sleep(PROBE_INTERVAL)?;
        let sent = Instant::now();
        sender.send(&number.to_be_bytes())?;
        receiver
            .recv(&mut [0; 16])
            .context("a frame from the host to a tap was lost")?;
        let elapsed = sent.elapsed();
        // The first one waited for ARP.
        if number > 0 {
            times.push(elapsed.as_secs_f64() * 1e3);
        }
    }
    Ok(times)
}

/// Memory of the daemon with two guests and the host, after traffic.
pub(super) fn rss(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut network = stage.guests(stage.shape()?)?;
    traffic_passes(&mut network, &mut findings, "before")?;
    let daemon = network.daemon()?;
    let own = daemon.memory_bytes("RssAnon")? + daemon.memory_bytes("RssFile")?;
    let shared = daemon.memory_bytes("RssShmem")?;
    let mib = |bytes: u64| bytes >> 20;
    findings.note(
        "rss_bytes",
        own,
        format!("{} KiB resident besides guest memory", own >> 10),
    );
    findings.note(
        "shared_bytes",
        shared,
        format!("{} MiB of guest memory", mib(shared)),
    );
    findings.require(own < MAX_RSS_BYTES, || {
        format!("{} MiB resident, {} allowed", mib(own), mib(MAX_RSS_BYTES))
    });
    Ok(findings)
}
