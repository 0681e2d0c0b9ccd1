//! One measurement each: ping, an iperf3 run or hashed bytes between two of the three hosts.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

use super::bytes::{self, TransferWay};
use super::guest::{HOST_ADDRESS, address};
use super::network::LabNetwork;
use crate::netns::NetNs;
use crate::process::{Origin, Process, ProcessError, find};
use crate::stats::median;

/// iperf3's port, and as /proc/net/tcp writes it.
const PORT: u16 = 5201;

/// What a command in a guest may take besides the time it is told to.
pub(crate) const SLACK: Duration = Duration::from_secs(15);

/// How long an iperf3 server may take until it listens.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// Headers of a datagram, which the MTU counts.
pub(crate) const IP_AND_UDP_BYTES: u16 = 28;

/// Pings per measurement, a tenth of a second apart.
const PINGS: u32 = 15;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Test {
    PingAB,
    PingAHost,
    TcpAB,
    TcpBA,
    TcpAHost,
    TcpHostA,
    UdpAB,
    UdpAHost,
    UdpHostA,
    BytesAB,
    BytesAHost,
    BytesHostA,
}

/// Groups of tests, as the operator names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TestGroup {
    /// Round trips: guest to guest, guest to host
    Ping,
    /// iperf3 TCP: guest to guest and guest to host, both ways
    Tcp,
    /// iperf3 TCP between the guests, one way
    TcpGuests,
    /// iperf3 UDP, 64-byte datagrams, guest to guest
    Udp,
    /// iperf3 UDP, datagrams as long as the MTU, guest and host, both ways
    UdpHost,
    /// 100 MiB of random bytes over TCP, guest to guest and guest to host both ways; fails if their
    /// hash is another where they arrive
    Bytes,
}

impl TestGroup {
    pub(crate) fn tests(self) -> &'static [Test] {
        match self {
            TestGroup::Ping => &[Test::PingAB, Test::PingAHost],
            TestGroup::Tcp => &[Test::TcpAB, Test::TcpBA, Test::TcpAHost, Test::TcpHostA],
            TestGroup::TcpGuests => &[Test::TcpAB],
            TestGroup::Udp => &[Test::UdpAB],
            TestGroup::UdpHost => &[Test::UdpAHost, Test::UdpHostA],
            TestGroup::Bytes => &[Test::BytesAB, Test::BytesAHost, Test::BytesHostA],
        }
    }
}

impl Test {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Test::PingAB => "ping guest-guest",
            Test::PingAHost => "ping guest-host",
            Test::TcpAB => "TCP guest a -> b",
            Test::TcpBA => "TCP guest b -> a",
            Test::TcpAHost => "TCP guest -> host",
            Test::TcpHostA => "TCP host -> guest",
            Test::UdpAB => "UDP 64 B guest a -> b",
            Test::UdpAHost => "UDP guest -> host",
            Test::UdpHostA => "UDP host -> guest",
            Test::BytesAB => "bytes guest a -> b",
            Test::BytesAHost => "bytes guest -> host",
            Test::BytesHostA => "bytes host -> guest",
        }
    }

    /// The unit of the figure that tables and ratios show.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Test::PingAB | Test::PingAHost => "ms",
            Test::UdpAB | Test::UdpAHost | Test::UdpHostA => "kpps",
            _ => "Gbit/s",
        }
    }
}

/// Length and rates of the runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Length of an iperf3 run.
    pub(crate) seconds: u32,
    /// Offered rate of the UDP tests, Mbit/s of payload.
    pub(crate) udp_mbit_per_s: u32,
}

/// What a measurement gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Figure {
    Ping {
        median_rtt_ms: f64,
        max_rtt_ms: f64,
        sent: u32,
        received: u32,
    },
    Tcp {
        bits_per_second: f64,
        retransmits: u64,
    },
    Udp {
        received_pps: f64,
        lost_percent: f64,
        received_bits_per_second: f64,
    },
    /// The hash is the same at both ends.
    Bytes {
        bits_per_second: f64,
        bytes: u64,
        sha512: String,
    },
}

impl Figure {
    /// The figure that tables show, in [`Test::unit`].
    pub(crate) fn headline(&self) -> f64 {
        match self {
            Figure::Ping { median_rtt_ms, .. } => *median_rtt_ms,
            Figure::Tcp {
                bits_per_second, ..
            }
            | Figure::Bytes {
                bits_per_second, ..
            } => bits_per_second / 1e9,
            Figure::Udp { received_pps, .. } => received_pps / 1e3,
        }
    }

    /// What else is worth a word.
    pub(crate) fn remark(&self) -> String {
        match self {
            Figure::Ping {
                max_rtt_ms,
                sent,
                received,
                ..
            } => {
                format!("{received}/{sent} answered, max {max_rtt_ms:.2} ms")
            }
            Figure::Tcp { retransmits, .. } => format!("{retransmits} retransmits"),
            Figure::Udp { lost_percent, .. } => format!("{lost_percent:.1} % lost"),
            Figure::Bytes { bytes, .. } => format!("{} MiB, same hash", bytes >> 20),
        }
    }

    /// Whether frames passed: an answered ping, bytes received.
    pub(crate) fn passed(&self) -> bool {
        match self {
            Figure::Ping { received, .. } => *received > 0,
            _ => self.headline() > 0.0,
        }
    }
}

/// Runs one test.
pub(crate) fn measure(network: &mut LabNetwork, test: Test, effort: Effort) -> Result<Figure> {
    let outcome = match test {
        Test::PingAB => ping(network, &address(1), PINGS, 0.1),
        Test::PingAHost => ping(network, HOST_ADDRESS, PINGS, 0.1),
        Test::TcpAB => tcp(network, Peer::Guest, false, effort),
        Test::TcpBA => tcp(network, Peer::Guest, true, effort),
        Test::TcpAHost => tcp(network, Peer::Host, false, effort),
        Test::TcpHostA => tcp(network, Peer::Host, true, effort),
        Test::UdpAB => udp_small(network, effort),
        Test::UdpAHost => udp_long(network, false, effort),
        Test::UdpHostA => udp_long(network, true, effort),
        Test::BytesAB => bytes::transfer(network, TransferWay::GuestToGuest),
        Test::BytesAHost => bytes::transfer(network, TransferWay::GuestToHost),
        Test::BytesHostA => bytes::transfer(network, TransferWay::HostToGuest),
    };
    let switch = network.switch.name();
    outcome.with_context(|| format!("{} on {switch}", test.name()))
}

/// Pings from guest a; the first one, which waits for ARP, is sent before and not counted.
pub(crate) fn ping(
    network: &mut LabNetwork,
    to: &str,
    count: u32,
    interval: f64,
) -> Result<Figure> {
    let limit = Duration::from_secs_f64(f64::from(count) * interval) + SLACK;
    let command =
        format!("ping -c 1 -W 2 {to} >/dev/null; ping -c {count} -i {interval} -W 2 {to}");
    let answer = network.guest(0)?.try_run(&command, limit)?;
    let round_trips = parse_ping(&answer.text);
    if round_trips.is_empty() {
        bail!("no ping from guest a to {to} was answered");
    }
    let received = u32::try_from(round_trips.len()).unwrap_or(u32::MAX);
    Ok(Figure::Ping {
        max_rtt_ms: round_trips.iter().copied().fold(0.0, f64::max),
        median_rtt_ms: median(&round_trips),
        sent: count,
        received,
    })
}

/// Who answers guest a.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// Guest b.
    Guest,
    /// The host.
    Host,
}

impl Peer {
    pub(crate) fn address(self) -> String {
        match self {
            Peer::Guest => address(1),
            Peer::Host => HOST_ADDRESS.to_owned(),
        }
    }
}

fn tcp(network: &mut LabNetwork, peer: Peer, reverse: bool, effort: Effort) -> Result<Figure> {
    let streams = network.shape.queue_pairs;
    let mut options = format!("-P {streams} -i 0");
    if reverse {
        options.push_str(" -R");
    }
    let text = iperf3(network, peer, &options, effort.seconds)?;
    parse_tcp(&text)
}

/// Between the guests, 64 bytes a datagram.
fn udp_small(network: &mut LabNetwork, effort: Effort) -> Result<Figure> {
    let options = format!("-u -l 64 -b {}M -i 0", effort.udp_mbit_per_s);
    let text = iperf3(network, Peer::Guest, &options, effort.seconds)?;
    parse_udp(&text, 64)
}

/// With the host, a datagram as long as the MTU allows, a stream for each queue pair.
fn udp_long(network: &mut LabNetwork, reverse: bool, effort: Effort) -> Result<Figure> {
    let payload_bytes = network.shape.mtu_bytes - IP_AND_UDP_BYTES;
    let streams = u32::from(network.shape.queue_pairs);
    let kbit_per_s = effort.udp_mbit_per_s * 1000 / streams;
    let mut options = format!("-u -l {payload_bytes} -b {kbit_per_s}K -P {streams} -i 0");
    if reverse {
        options.push_str(" -R");
    }
    let text = iperf3(network, Peer::Host, &options, effort.seconds)?;
    parse_udp(&text, payload_bytes)
}

/// Runs iperf3 on guest a against a fresh server on `peer`; gives its JSON.
fn iperf3(network: &mut LabNetwork, peer: Peer, options: &str, seconds: u32) -> Result<String> {
    let _server = start_server(network, peer)?;
    let command = client_command(peer, options, seconds);
    let answer = network
        .guest(0)?
        .try_run(&command, client_timeout(seconds))?;
    Ok(answer.text)
}

/// The client's command line in guest a.
pub(crate) fn client_command(peer: Peer, options: &str, seconds: u32) -> String {
    format!(
        "iperf3 -J -c {} -t {seconds} --connect-timeout 3000 {options}",
        peer.address()
    )
}

/// How long a client may take.
pub(crate) fn client_timeout(seconds: u32) -> Duration {
    Duration::from_secs(u64::from(seconds)) + SLACK
}

/// Starts an iperf3 server for one run and waits until it listens. The one on the host ends with
/// what this gives; the one in the guest ends with its run or before the next.
pub(crate) fn start_server(network: &mut LabNetwork, peer: Peer) -> Result<Option<Process>> {
    let address = peer.address();
    if peer == Peer::Guest {
        let command = format!(
            "killall -q -9 iperf3; iperf3 -s -1 -B {address} >/tmp/server 2>&1 & \
             n=100; until netstat -ltn | grep -q :{PORT}; do usleep 30000; \
             n=$((n-1)); [ $n -gt 0 ] || exit 1; done"
        );
        network.guest(1)?.run(&command, LISTEN_TIMEOUT + SLACK)?;
        return Ok(None);
    }
    Ok(Some(start_host_server(&network.namespace)?))
}

/// Starts an iperf3 server for one run at the host's address and waits until it listens.
pub(crate) fn start_host_server(namespace: &NetNs) -> Result<Process, ProcessError> {
    let mut command = Command::new(find("iperf3", Origin::LabPackages)?);
    command.args(["-s", "-1", "-B", HOST_ADDRESS]);
    let name = "the iperf3 server on the host";
    let mut server = Process::spawn(name, &command, Some(namespace), Path::new("/dev/null"))?;
    let sockets = format!("/proc/{}/net/tcp", server.pid());
    server.wait_for("did not listen", LISTEN_TIMEOUT, |_| {
        let table = std::fs::read_to_string(&sockets).ok()?;
        is_listening(&table, PORT).then_some(())
    })?;
    Ok(server)
}

/// Whether a table of /proc/net/tcp has a listener (state 0A) on the port.
fn is_listening(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next(), fields.nth(1));
        local.is_some_and(|local| local.ends_with(&suffix)) && state == Some("0A")
    })
}

/// Round trips in milliseconds from busybox's or iputils' ping.
pub(crate) fn parse_ping(text: &str) -> Vec<f64> {
    text.lines()
        .filter_map(|line| {
            line.split("time=")
                .nth(1)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .collect()
}

/// iperf3's report, or what it says went wrong.
pub(crate) fn parse_report(text: &str) -> Result<Value> {
    let start = text.find('{').context("iperf3 printed no JSON")?;
    let report: Value =
        serde_json::from_str(text[start..].trim()).context("reading iperf3's JSON")?;
    if let Some(error) = report.get("error").and_then(Value::as_str) {
        bail!("iperf3: {error}");
    }
    Ok(report)
}

pub(crate) fn parse_tcp(text: &str) -> Result<Figure> {
    let report = parse_report(text)?;
    let number = |path: &str| report.pointer(path).and_then(Value::as_f64);
    let bits_per_second = number("/end/sum_received/bits_per_second")
        .context("iperf3's report has no received rate")?;
    let retransmits = report
        .pointer("/end/sum_sent/retransmits")
        .and_then(Value::as_u64)
        .unwrap_or(0);
    Ok(Figure::Tcp {
        bits_per_second,
        retransmits,
    })
}

fn parse_udp(text: &str, payload_bytes: u16) -> Result<Figure> {
    let report = parse_report(text)?;
    // iperf3 3.13 and later tell what was received apart from what was sent.
    let sum = report
        .pointer("/end/sum_received")
        .or_else(|| report.pointer("/end/sum"))
        .context("iperf3's report has no sum")?;
    let number = |name: &str| {
        sum.get(name)
            .and_then(Value::as_f64)
            .with_context(|| format!("iperf3's sum lacks {name}"))
    };
    let (packets, lost) = (number("packets")?, number("lost_packets")?);
    let seconds = number("seconds")?.max(f64::MIN_POSITIVE);
    let received = (packets - lost).max(0.0) / seconds;
    Ok(Figure::Udp {
        received_pps: received,
        lost_percent: if packets > 0.0 {
            100.0 * lost / packets
        } else {
            100.0
        },
        received_bits_per_second: received * f64::from(payload_bytes) * 8.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_lines_of_busybox_give_round_trips() {
        let text = "PING 10.77.0.2 (10.77.0.2): 56 data bytes\n\
                    64 bytes from 10.77.0.2: seq=0 ttl=64 time=1.251 ms\n\
                    64 bytes from 10.77.0.2: seq=1 ttl=64 time=0.430 ms\n\n\
                    --- 10.77.0.2 ping statistics ---\n";
        assert_eq!(parse_ping(text), [1.251, 0.430]);
    }

    #[test]
    fn tcp_report_gives_the_received_rate() {
        let text = r#"{"end":{"sum_sent":{"bits_per_second":2e9,"retransmits":3},
                       "sum_received":{"bits_per_second":1.9e9}}}"#;
        let figure = parse_tcp(text).expect("a whole report");
        assert_eq!(
            figure,
            Figure::Tcp {
                bits_per_second: 1.9e9,
                retransmits: 3
            }
        );
        assert!((figure.headline() - 1.9).abs() < 1e-9);
    }

    #[test]
    fn udp_report_counts_what_arrived() {
        let text = r#"{"end":{"sum":{"seconds":2.0,"packets":1000,"lost_packets":100,
                       "lost_percent":10.0}}}"#;
        let figure = parse_udp(text, 64).expect("a whole report");
        let Figure::Udp {
            received_pps,
            lost_percent,
            ..
        } = figure
        else {
            panic!("{figure:?}")
        };
        assert!((received_pps - 450.0).abs() < 1e-9);
        assert!((lost_percent - 10.0).abs() < 1e-9);
    }

    #[test]
    fn an_error_of_iperf3_is_passed_on() {
        let error = parse_tcp("{\"error\":\"unable to connect\"}").expect_err("an error report");
        assert!(error.to_string().contains("unable to connect"));
        assert!(parse_tcp("sh: iperf3: not found").is_err());
    }

    #[test]
    fn listeners_are_told_from_connections() {
        let table = "  sl  local_address rem_address   st\n   \
                     0: 0A4D00FE:1451 00000000:0000 0A 0\n";
        assert!(is_listening(table, 5201));
        assert!(!is_listening(table, 5202));
        assert!(!is_listening(&table.replace(" 0A ", " 01 "), 5201));
    }
}
