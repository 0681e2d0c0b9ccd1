//! A healthy guest whose neighbour takes its frames late or never, behind a host that sends to both.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ringway_control::api::DropReason;
use rustix::process::Signal;

use super::super::guest::{HOST_ADDRESS, NAMES, QemuGuest, address, mac};
use super::super::measure::{
    Figure, IP_AND_UDP_BYTES, Peer, SLACK, client_command, client_timeout, parse_tcp, start_server,
};
use super::super::network::{HOST_INTERFACE, LabNetwork};
use super::super::shape::NetworkShape;
use super::{Findings, ScenarioStage};
use crate::interrupt;
use crate::netns::NetNs;

/// The guests by their numbers.
const HEALTHY: usize = 0;
const NEIGHBOUR: usize = 1;

/// The port that nobody in the guest listens on (RFC 863).
const DISCARD: u16 = 9;

/// Datagrams to the neighbour in each [`FLOOD_PAUSE`]: more than it takes, and little enough that
/// whoever sends them has no core of its own.
const FLOOD_BURST: usize = 64;
const FLOOD_PAUSE: Duration = Duration::from_millis(1);

/// What becomes of the neighbour.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Frozen,
    /// It runs for a tenth of the time.
    Slow,
    /// It runs for half of the time.
    StopsAndGoes,
}

impl Fate {
    const ALL: [Fate; 3] = [Fate::Frozen, Fate::Slow, Fate::StopsAndGoes];

    fn name(self) -> &'static str {
        match self {
            Fate::Frozen => "frozen",
            Fate::Slow => "slow",
            Fate::StopsAndGoes => "stop-and-go",
        }
    }

    /// For how long it is stopped, and then runs, in milliseconds.
    fn rhythm(self) -> (u64, u64) {
        match self {
            Fate::Frozen => (50, 0),
            Fate::Slow => (9, 1),
            Fate::StopsAndGoes => (50, 50),
        }
    }
}

/// TCP from the host to guest a while it floods guest b, which is frozen, slow, or stops and goes: no
/// frame for guest a is dropped.
pub(super) fn neighbours(stage: &ScenarioStage<'_>) -> Result<Findings> {
    stage.each_shape("neighbours", one_shape)
}

fn one_shape(
    stage: &ScenarioStage<'_>,
    shape: NetworkShape,
    label: &str,
    findings: &mut Findings,
) -> Result<()> {
    let mut network = stage.guests(shape)?;
    // All know each other, and the switch all of them.
    for guest in [HEALTHY, NEIGHBOUR] {
        let command = format!("ping -c 1 -W 2 {HOST_ADDRESS}");
        network.guest(guest)?.run(&command, SLACK)?;
    }
    // A guest that is stopped answers no ARP.
    let (to, lladdr) = (address(NEIGHBOUR), mac(NEIGHBOUR));
    let link = ["lladdr", &lladdr, "dev", HOST_INTERFACE];
    let words = [&["neigh", "replace", &to, "nud", "permanent"][..], &link].concat();
    network.namespace.ip(&words)?;
    for fate in Fate::ALL {
        let name = format!("{label}-{}", fate.name());
        let before = Deliveries::of(&network)?;
        let (gbit_per_s, retransmits) = transfer(&mut network, fate, stage.plan.effort.seconds)?;
        let after = Deliveries::of(&network)?;
        let lost = after.ring_full[HEALTHY] - before.ring_full[HEALTHY];
        let refused = after.ring_full[NEIGHBOUR] - before.ring_full[NEIGHBOUR];
        let taken = after.frames[NEIGHBOUR] - before.frames[NEIGHBOUR];
        findings.note(
            &name,
            serde_json::json!({
                "gbit_per_s": gbit_per_s,
                "retransmits": retransmits,
                "ring_full": lost,
                "neighbour_frames": taken,
                "neighbour_ring_full": refused,
            }),
            format!(
                "{name}: {gbit_per_s:.2} Gbit/s, {retransmits} retransmits, ring_full {lost} (the \
                 neighbour took {taken} frames and lost {refused})"
            ),
        );
        findings.require(gbit_per_s > 0.0, || format!("{name}: no byte arrived"));
        findings.require(lost == 0, || {
            format!("{name}: {lost} frames for the healthy guest were dropped")
        });
        // Whoever stops for a moment only may have lost none either.
        let is_flooded = match fate {
            Fate::Frozen => refused > 0,
            Fate::Slow | Fate::StopsAndGoes => taken + refused > 0,
        };
        findings.require(is_flooded, || {
            format!("{name}: nothing was sent to the neighbour")
        });
    }
    Ok(())
}

/// What became of frames for each guest.
struct Deliveries {
    frames: [u64; 2],
    /// Dropped since it had no room.
    ring_full: [u64; 2],
}

impl Deliveries {
    fn of(network: &LabNetwork) -> Result<Self> {
        let (mut frames, mut ring_full) = ([0; 2], [0; 2]);
        for (at, name) in NAMES.iter().enumerate() {
            let counters = network.control()?.port(name)?.port.counters;
            frames[at] = counters.tx_frames;
            ring_full[at] = counters.tx_drops[DropReason::RingFull];
        }
        Ok(Self { frames, ring_full })
    }
}

/// TCP from the host to the healthy guest beside the flood; Gbit/s and retransmitted segments.
fn transfer(network: &mut LabNetwork, fate: Fate, seconds: u32) -> Result<(f64, u64)> {
    let _server = start_server(network, Peer::Host)?;
    let options = format!("-R -P {} -i 0", network.shape.queue_pairs);
    let command = client_command(Peer::Host, &options, seconds);
    let datagram_bytes = usize::from(network.shape.mtu_bytes - IP_AND_UDP_BYTES);
    let (namespace, [healthy, neighbour]) = network.guests()?;
    let is_over = AtomicBool::new(false);
    let answer = std::thread::scope(|scope| {
        let flood = scope.spawn(|| flood(namespace, datagram_bytes, &is_over));
        scope.spawn(|| torment(neighbour, fate, &is_over));
        let answer = healthy.try_run(&command, client_timeout(seconds));
        is_over.store(true, Ordering::Relaxed);
        match flood.join() {
            Ok(flooded) => flooded.and(answer),
            Err(_) => bail!("a thread of the bench panicked"),
        }
    })?;
    match parse_tcp(&answer.text)? {
        Figure::Tcp {
            bits_per_second,
            retransmits,
        } => Ok((bits_per_second / 1e9, retransmits)),
        other => bail!("{other:?} is no figure of TCP"),
    }
}

/// Sends to the neighbour until it is over.
fn flood(namespace: &NetNs, bytes: usize, is_over: &AtomicBool) -> Result<()> {
    namespace.enter()?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("binding the sender of the flood")?;
    socket.connect((address(NEIGHBOUR), DISCARD))?;
    let datagram = vec![0x5a; bytes];
    while !is_over.load(Ordering::Relaxed) {
        for _ in 0..FLOOD_BURST {
            // Refused if the guest says that nobody listens, or the tap's queue is full.
            let _ = socket.send(&datagram);
        }
        interrupt::sleep(FLOOD_PAUSE)?;
    }
    Ok(())
}

/// Stops a guest again and again until it is over, and has it run at last.
fn torment(guest: &QemuGuest, fate: Fate, is_over: &AtomicBool) {
    let (stopped_ms, runs_ms) = fate.rhythm();
    while !is_over.load(Ordering::Relaxed) {
        guest.signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(stopped_ms));
        if runs_ms > 0 {
            guest.signal(Signal::CONT);
            std::thread::sleep(Duration::from_millis(runs_ms));
        }
    }
    guest.signal(Signal::CONT);
}
