//! Ports that come and go beside a TCP connection.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::super::measure::{Peer, SLACK, client_command, parse_report, start_server};
use super::super::network::LabNetwork;
use super::super::shape::NetworkShape;
use super::{Findings, ScenarioStage};
use crate::interrupt;

/// Length of each of the two iperf3 runs, if not told to be longer.
const MIN_SECONDS: u32 = 5;

/// Name of the port that comes and goes, and of its tap.
const PORT: &str = "churn";
const TAP: &str = "rwchurn";

/// TCP between the guests, undisturbed and with a third port added and deleted all the time, for
/// every shape.
pub(super) fn churn(stage: &ScenarioStage<'_>) -> Result<Findings> {
    stage.each_shape("churn", one_shape)
}

fn one_shape(
    stage: &ScenarioStage<'_>,
    shape: NetworkShape,
    label: &str,
    findings: &mut Findings,
) -> Result<()> {
    let seconds = stage.plan.effort.seconds.max(MIN_SECONDS);
    let mut network = stage.guests(shape)?;
    let calm = transfer(&mut network, seconds, |_, _| Ok(()))?;
    let mut cycles = 0;
    let stirred = transfer(&mut network, seconds, |network, number| {
        cycle(network, number)?;
        cycles = number + 1;
        Ok(())
    })?;
    let share = stirred.gbit_per_s / calm.gbit_per_s;
    findings.note(
        label,
        serde_json::json!({
            "cycles": cycles,
            "undisturbed_gbit_per_s": calm.gbit_per_s,
            "disturbed_gbit_per_s": stirred.gbit_per_s,
            "slowest_second_gbit_per_s": stirred.slowest_gbit_per_s,
        }),
        format!(
            "{label}: {cycles} add/del cycles, {:.2} Gbit/s ({:.0} % of {:.2} undisturbed), \
             slowest second {:.2}",
            stirred.gbit_per_s,
            100.0 * share,
            calm.gbit_per_s,
            stirred.slowest_gbit_per_s,
        ),
    );
    findings.require(cycles > 1, || format!("{label}: only {cycles} cycles"));
    findings.require(stirred.slowest_gbit_per_s > 0.0, || {
        format!("{label}: a second without any byte")
    });
    Ok(())
}

/// Adds and deletes one port: a tap, or a vhost-user socket, in turns.
fn cycle(network: &LabNetwork, number: u32) -> Result<()> {
    let control = network.control()?;
    let socket = network.port_socket(PORT);
    let socket = socket.to_string_lossy();
    let kind = match number % 2 {
        0 => ["tap", "--ifname", TAP],
        _ => ["vhost-user", "--listen", &*socket],
    };
    control.ringway(&[&["port", "add", PORT][..], &kind].concat())?;
    if number.is_multiple_of(2) {
        network.namespace.ip(&["link", "set", TAP, "up"])?;
    }
    control.ringway(&["port", "del", PORT])?;
    Ok(())
}

struct Transfer {
    gbit_per_s: f64,
    slowest_gbit_per_s: f64,
}

/// Runs iperf3 in the guests' background and `beside` again and again until it ended.
fn transfer(
    network: &mut LabNetwork,
    seconds: u32,
    mut beside: impl FnMut(&LabNetwork, u32) -> Result<()>,
) -> Result<Transfer> {
    let _server = start_server(network, Peer::Guest)?;
    let options = format!("-P {} -i 1", network.shape.queue_pairs);
    let client = client_command(Peer::Guest, &options, seconds);
    let command = format!("rm -f /tmp/done; ({client} >/tmp/client 2>&1; touch /tmp/done) &");
    network.guest(0)?.run(&command, SLACK)?;
    let started = Instant::now();
    let deadline = started + Duration::from_secs(u64::from(seconds)) + SLACK;
    // Asking the guest costs it time, so it is asked only when the run must be over.
    let earliest = started + Duration::from_secs(u64::from(seconds));
    let mut number = 0;
    loop {
        let asked = Instant::now();
        if asked < earliest {
            beside(network, number)?;
            number += 1;
        } else if network
            .guest(0)?
            .try_run("test -f /tmp/done", SLACK)?
            .status
            == 0
        {
            break;
        } else if asked >= deadline {
            bail!("the TCP connection between the guests hangs");
        }
        interrupt::sleep(Duration::from_millis(5))?;
    }
    let text = network.guest(0)?.run("cat /tmp/client", SLACK)?;
    rates(&text)
}

/// The rate of the whole run and of its slowest second. What is left of the last second is too
/// short to count.
fn rates(text: &str) -> Result<Transfer> {
    let report = parse_report(text)?;
    let whole = report
        .pointer("/end/sum_received/bits_per_second")
        .and_then(Value::as_f64)
        .context("iperf3's report has no received rate")?;
    let slowest = report
        .get("intervals")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(|interval| interval.get("sum"))
        .filter(|sum| {
            sum.get("seconds")
                .and_then(Value::as_f64)
                .is_some_and(|s| s > 0.5)
        })
        .filter_map(|sum| sum.get("bits_per_second").and_then(Value::as_f64))
        .fold(f64::INFINITY, f64::min);
    if !slowest.is_finite() {
        bail!("iperf3's report has no intervals");
    }
    Ok(Transfer {
        gbit_per_s: whole / 1e9,
        slowest_gbit_per_s: slowest / 1e9,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_whole_second_counts() {
        let text = r#"{"intervals":[
            {"sum":{"seconds":1.0,"bits_per_second":2e9}},
            {"sum":{"seconds":1.0,"bits_per_second":1e9}},
            {"sum":{"seconds":0.01,"bits_per_second":0}}],
            "end":{"sum_received":{"bits_per_second":1.5e9}}}"#;
        let transfer = rates(text).expect("a whole report");
        assert!((transfer.slowest_gbit_per_s - 1.0).abs() < 1e-9);
        assert!((transfer.gbit_per_s - 1.5).abs() < 1e-9);
    }
}
