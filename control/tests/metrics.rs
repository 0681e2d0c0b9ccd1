//! Metrics of a real `ringwayd`, judged by promtool.
#![expect(clippy::unwrap_used, reason = "helpers of tests may fail the test")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Place, Running};
use ringway_control::api::{MetricsShow, NoParams, PortList};
use ringway_guest::Guest;
use ringway_testbed::{DEADLINE, eventually};
use rustix::process::Signal;

const PORTS: &str = "[ports.vm1]\nkind = \"vhost-user\"\nlisten = \"{dir}/vm1.sock\"\n\
                     [ports.vm2]\nkind = \"vhost-user\"\nlisten = \"{dir}/vm2.sock\"\n";

/// A daemon that serves metrics, and where.
fn start(place: &Place, args: &[&str]) -> (Running, SocketAddr) {
    let directory = place.path("").display().to_string();
    let config = place.config(&PORTS.replace("{dir}/", &directory));
    let config = config.display().to_string();
    let all = [args, &["--config", &config]].concat();
    let mut running = place.start(&all);
    let mut log = BufReader::new(running.child.stderr.take().unwrap());
    let address = loop {
        let mut line = String::new();
        assert!(log.read_line(&mut line).unwrap() > 0, "metrics are served");
        if let Some((_, address)) = line.split_once("metrics are served address=") {
            break address.trim().parse().unwrap();
        }
    };
    running.child.stderr = Some(log.into_inner());
    (running, address)
}

/// What an HTTP server answers: head and body.
fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn scrape(address: SocketAddr) -> String {
    let (head, body) = ask(address, "GET /metrics");
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    body
}

/// The value of a series.
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    let line = line.unwrap_or_else(|| panic!("no {series} in\n{text}"));
    line.trim().parse().unwrap()
}

/// Names of what the text tells, by its TYPE lines.
fn families(text: &str) -> BTreeSet<String> {
    let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    kinds
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect()
}

fn promtool(args: &[&str], input: &str) -> Output {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let program = cache.or_else(home).unwrap().join("ringway/promtool");
    let mut child = Command::new(&program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}; run `make packages`", program.display()));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

fn dist(name: &str) -> PathBuf {
    let control = Path::new(env!("CARGO_MANIFEST_DIR"));
    control.join("../dist/prometheus").join(name)
}

#[test]
fn what_is_scraped_is_what_the_switch_counts_and_promtool_has_no_complaint() {
    let place = Place::new();
    let (running, address) = start(&place, &["--metrics=127.0.0.1:0"]);
    let connect = |port: &str| {
        let path = place.path(&format!("{port}.sock"));
        Guest::builder().connect(&path).unwrap()
    };
    let (mut one, mut two) = (connect("vm1"), connect("vm2"));
    let frame = |to: u8, from: u8| {
        let addresses = [2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
        [&addresses[..], &[0; 46]].concat()
    };
    let mut runt = frame(1, 2);
    runt.truncate(13);
    two.send_frame(&frame(1, 2)).unwrap();
    for _ in 0..10 {
        one.send_frame(&frame(2, 1)).unwrap();
    }
    two.send_frame(&runt).unwrap();
    let frames = "ringway_pair_frames_total{from=\"vm1\",to=\"vm2\"}";
    eventually("all frames are counted", || {
        while two.try_recv(0).unwrap().is_some() {}
        while one.try_recv(0).unwrap().is_some() {}
        let text = scrape(address);
        text.contains(frames) && value(&text, frames) >= 10.0 && text.contains("reason=\"runt\"")
    });
    let text = scrape(address);
    let listed = running.client().call::<PortList>(&NoParams {}).unwrap();
    for port in &listed.ports {
        let of = |name: &str| value(&text, &format!("{name}{{port=\"{}\"}}", port.name));
        let counters = &port.counters;
        assert_eq!(
            of("ringway_port_receive_frames_total"),
            counters.rx_frames as f64
        );
        assert_eq!(
            of("ringway_port_receive_bytes_total"),
            counters.rx_bytes as f64
        );
        assert_eq!(
            of("ringway_port_transmit_frames_total"),
            counters.tx_frames as f64
        );
        assert_eq!(of("ringway_port_fdb_entries"), f64::from(port.fdb_entries));
        let up = format!("ringway_port_state{{port=\"{}\",state=\"up\"}}", port.name);
        assert_eq!(value(&text, &up), 1.0);
    }
    let runts =
        "ringway_port_dropped_frames_total{port=\"vm2\",direction=\"receive\",reason=\"runt\"}";
    assert_eq!(value(&text, runts), 1.0);
    let queue = "ringway_queue_receive_frames_total{port=\"vm1\",queue=\"0\"}";
    assert_eq!(value(&text, queue), 10.0);
    assert!(value(&text, "ringway_worker_frames_total{worker=\"0\"}") >= 11.0);
    let judged = promtool(&["check", "metrics"], &text);
    assert!(judged.status.success(), "{judged:?}");
    assert_eq!(
        (&*judged.stdout, &*judged.stderr),
        (&b""[..], &b""[..]),
        "{judged:?}"
    );
    // The tool prints the same.
    let shown = running.client().call::<MetricsShow>(&NoParams {}).unwrap();
    assert_eq!(families(&shown.text), families(&text));
    running.stop(Signal::TERM);
}

#[test]
fn clients_that_ask_for_something_else_or_for_nothing_keep_nobody_from_scraping() {
    let place = Place::new();
    let (running, address) = start(&place, &["--metrics=[::1]:0"]);
    assert!(address.is_ipv6());
    let idle: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    for (request, status) in [
        ("GET /", "200 OK"),
        ("HEAD /metrics", "200 OK"),
        ("GET /metrics/../etc/passwd", "404 Not Found"),
        ("POST /metrics", "405 Method Not Allowed"),
        ("GARBAGE", "400 Bad Request"),
    ] {
        let (head, _) = ask(address, request);
        assert!(head.contains(status), "{request}: {head}");
    }
    assert!(families(&scrape(address)).contains("ringway_build_info"));
    drop(idle);
    running.stop(Signal::TERM);
}

#[test]
fn an_address_that_is_taken_or_none_is_refused_with_a_hint() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let refused = place.run(&[&format!("--metrics={address}")]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{text}");
    assert!(
        text.contains(&format!("can't serve metrics at {address}")),
        "{text}"
    );
    assert!(text.contains("hint: give another address"), "{text}");
    assert!(!place.path("control.sock").exists());
    let refused = place.run(&["--metrics=localhost"]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert!(
        text.contains("no address with a port, as 127.0.0.1:9479"),
        "{text}"
    );
    let config = place.config("[metrics]\nlisten = \"9479\"\n");
    let refused = place.run(&["--config", &config.display().to_string(), "--check"]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(text.contains("ringway.toml:2: metrics.listen"), "{text}");
}

/// The words of a text that begin as metrics do.
fn named_metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let named = words.filter(|word| word.starts_with("ringway_"));
    named.map(ToOwned::to_owned).collect()
}

#[test]
fn the_dashboard_and_the_alerts_ask_for_metrics_that_there_are() {
    let place = Place::new();
    let (running, address) = start(&place, &["--metrics=127.0.0.1:0"]);
    let mut known = families(&scrape(address));
    // Without a drop there is none.
    known.insert("ringway_port_dropped_frames_total".to_owned());
    running.stop(Signal::TERM);
    for file in ["alerts.yml", "dashboard.json"] {
        let text = std::fs::read_to_string(dist(file)).unwrap();
        let named = named_metrics(&text);
        assert!(named.len() >= 4, "{file}: {named:?}");
        let unknown: Vec<_> = named.difference(&known).collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
    let alerts = dist("alerts.yml").display().to_string();
    let judged = promtool(&["check", "rules", &alerts], "");
    assert!(judged.status.success(), "{judged:?}");
    let dashboard = std::fs::read_to_string(dist("dashboard.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(
        panels
            .iter()
            .all(|panel| panel["targets"][0]["expr"].is_string())
    );
}
