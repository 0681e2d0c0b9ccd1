//! One side dies or starts again; the other goes on.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use ringway_control::api::PortState;

use super::super::guest::address;
use super::super::measure::{Peer, SLACK, client_command, start_server};
use super::super::network::LabNetwork;
use super::{Findings, ScenarioStage, holds_within, traffic_passes};
use crate::interrupt;
use crate::stats::median;

/// How often the daemon is killed.
const KILLS: u32 = 10;

/// Promise: from SIGKILL until a ping between the guests is answered again.
const MAX_OUTAGE: Duration = Duration::from_secs(2);

/// How long to wait for it before giving up.
const GIVE_UP: Duration = Duration::from_secs(10);

/// Calm between two kills.
const CALM: Duration = Duration::from_millis(700);

/// How long the daemon may take to see that a front-end is gone.
const NOTICE: Duration = Duration::from_secs(2);

/// Kills ringwayd under load and starts it again with the same ports.
pub(super) fn daemon_kill(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut network = stage.guests(stage.shape()?)?;
    traffic_passes(&mut network, &mut findings, "before")?;
    start_load(&mut network)?;
    let mut outages_ms = Vec::new();
    for number in 1..=KILLS {
        interrupt::sleep(CALM)?;
        match kill_and_wait(&mut network)? {
            Some(outage) => {
                stage
                    .progress
                    .say(&format!("daemon-kill {number}: {} ms", outage.as_millis()));
                findings.require(outage < MAX_OUTAGE, || {
                    format!("kill {number}: no answer for {} ms", outage.as_millis())
                });
                outages_ms.push(outage.as_secs_f64() * 1e3);
            }
            None => bail!(
                "kill {number}: no ping was answered for {} s",
                GIVE_UP.as_secs()
            ),
        }
    }
    let survived = network.guest(0)?.try_run("pidof iperf3", SLACK)?.status == 0;
    findings.require(survived, || "the TCP connection did not survive".to_owned());
    network
        .guest(0)?
        .try_run("killall -9 iperf3 ping; sleep 0.2", SLACK)?;
    traffic_passes(&mut network, &mut findings, "after")?;
    let slowest = outages_ms.iter().copied().fold(0.0, f64::max);
    findings
        .figures
        .insert("outages_ms".to_owned(), outages_ms.clone().into());
    let middle = median(&outages_ms);
    findings.note(
        "outage_median_ms",
        middle,
        format!("{KILLS} kills, traffic back after {middle:.0} ms median, {slowest:.0} ms at most"),
    );
    Ok(findings)
}

/// Twenty pings a second and a TCP stream from a to b, for as long as the scenario takes.
fn start_load(network: &mut LabNetwork) -> Result<()> {
    let _ = start_server(network, Peer::Guest)?;
    let client = client_command(Peer::Guest, "-i 0 -b 200M", 600);
    let to = address(1);
    let command =
        format!("{client} >/tmp/client 2>&1 & ping -i 0.05 {to} >/tmp/pings 2>&1 & sleep 1");
    network.guest(0)?.run(&command, SLACK)?;
    Ok(())
}

/// Time from SIGKILL to the next answered ping.
fn kill_and_wait(network: &mut LabNetwork) -> Result<Option<Duration>> {
    let killed = Instant::now();
    network.kill_daemon();
    let before = last_answer(network)?;
    network.start_daemon()?;
    while killed.elapsed() < GIVE_UP {
        if last_answer(network)? > before {
            return Ok(Some(killed.elapsed()));
        }
        interrupt::sleep(Duration::from_millis(10))?;
    }
    Ok(None)
}

/// Sequence number of the last answered ping.
fn last_answer(network: &mut LabNetwork) -> Result<Option<u64>> {
    let answer = network.guest(0)?.try_run("tail -n 3 /tmp/pings", SLACK)?;
    Ok(last_sequence(&answer.text))
}

fn last_sequence(text: &str) -> Option<u64> {
    text.lines()
        .filter(|line| line.contains(" time="))
        .filter_map(|line| {
            line.split("seq=")
                .nth(1)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .next_back()
}

/// Kills the QEMU of guest b: what it held must be given back; then boots it again.
pub(super) fn guest_kill(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut network = stage.switch(stage.shape()?)?;
    network.start_guest(0)?;
    network.wait_guest(0)?;
    let files_before = network.daemon()?.open_files()?;
    network.start_guest(1)?;
    network.wait_guest(1)?;
    traffic_passes(&mut network, &mut findings, "before")?;
    let mapped = network.control()?.port("b")?.mapped_bytes;
    findings.require(mapped > 0, || format!("mapped_bytes is {mapped} while up"));
    let files_up = network.daemon()?.open_files()?;

    network.guest(1)?.kill();
    let daemon = network.daemon()?;
    let killed = Instant::now();
    let mut seen = String::new();
    let given_back = holds_within(NOTICE, || {
        let shown = daemon.control.port("b")?;
        let (state, mapped) = (shown.port.state, shown.mapped_bytes);
        let files = daemon.open_files()?;
        seen = format!(
            "state {}, mapped_bytes {mapped}, {files} files",
            state.as_str()
        );
        Ok(state == PortState::Down && mapped == 0 && files == files_before)
    })?;
    let took = killed.elapsed();
    findings.require(given_back, || {
        format!("after the kill: {seen}, {files_before} files before the guest")
    });
    findings.note(
        "noticed_ms",
        took.as_secs_f64() * 1e3,
        format!(
            "after the kill {seen} within {} ms ({files_before} files before, {files_up} while up)",
            took.as_millis()
        ),
    );

    network.start_guest(1)?;
    network.wait_guest(1)?;
    traffic_passes(&mut network, &mut findings, "after booting again")?;
    findings
        .words
        .push("booted again, traffic passes".to_owned());
    Ok(findings)
}

/// The three ways in which a driver starts anew.
pub(super) fn reboot(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let mut network = stage.guests(stage.shape()?)?;
    traffic_passes(&mut network, &mut findings, "before")?;
    for index in [0, 1] {
        network.guest(index)?.rebind_driver()?;
        traffic_passes(&mut network, &mut findings, "after unbind and bind")?;
        network.guest(index)?.reboot()?;
        traffic_passes(&mut network, &mut findings, "after reboot -f")?;
        network.guest(index)?.reset()?;
        traffic_passes(&mut network, &mut findings, "after system_reset")?;
    }
    let words = "ping and TCP pass after unbind and bind, reboot -f and system_reset of each guest";
    findings.words.push(words.to_owned());
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_count_as_sequence() {
        let text = "64 bytes from 10.77.0.2: seq=41 ttl=64 time=0.6 ms\n\
                    ping: sendto: Network is unreachable seq=50\n";
        assert_eq!(last_sequence(text), Some(41));
        assert_eq!(last_sequence(""), None);
    }
}
