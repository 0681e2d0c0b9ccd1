//! End to end: two QEMU guests and the host through the real daemon.
//!
//! Needs root, QEMU and what else `bench/install-packages.sh` installs, and the daemon and its
//! tool built by the same command (`cargo nextest run --workspace`). Whatever is missing fails the
//! test with the lab's own line: a skipped test would look like a passed one.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{alone, program};
use serde_json::Value;

/// Runs the lab; one run takes about 30 s on two cores. The lab bounds each of its steps, and the
/// tests wait for each other: four guests at once would be too slow for those bounds.
fn lab(arguments: &[&str]) -> Output {
    let _alone = alone();
    Command::new(env!("CARGO_BIN_EXE_ringway-bench"))
        .arg("lab")
        .args(arguments)
        .output()
        .expect("ringway-bench starts")
}

/// Runs the lab with the daemon and the tool of this workspace.
fn lab_with_ringway(arguments: &[&str]) -> Output {
    let [ringwayd, ringway] = ["ringwayd", "ringway"].map(program);
    let (ringwayd, ringway) = (ringwayd.to_string_lossy(), ringway.to_string_lossy());
    let programs = ["--ringwayd", &*ringwayd, "--ringway", &*ringway];
    lab(&[arguments, &programs].concat())
}

fn report(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the lab failed:\n{stderr}");
    serde_json::from_slice(&output.stdout).expect("the lab prints one JSON object")
}

#[test]
fn guests_and_host_talk_through_ringwayd() {
    let output = lab_with_ringway(&["--quick", "--json", "--tests", "ping,tcp"]);
    let report = report(&output);
    let samples = report["samples"].as_array().expect("samples");
    assert_eq!(samples.len(), 6, "two pings, TCP in four directions");
    for sample in samples {
        assert_eq!(sample["switch"], "ringway", "{sample}");
        assert!(sample.get("error").is_none(), "{sample}");
        match sample["kind"].as_str() {
            Some("ping") => assert!(sample["received"].as_u64() > Some(0), "{sample}"),
            Some("tcp") => assert!(sample["bits_per_second"].as_f64() > Some(0.0), "{sample}"),
            other => panic!("unexpected kind {other:?}: {sample}"),
        }
    }
    assert_eq!(leftovers(), Vec::<String>::new(), "namespaces are removed");
}

/// A guest with every offload, one with none, the host behind AF_XDP: all bytes arrive as they were
/// sent, and each frame that the host receives is right.
#[test]
fn bytes_past_af_xdp_and_offloads_are_unchanged() {
    let output = lab_with_ringway(&[
        "--scenario",
        "af-xdp",
        "--mtu",
        "1500",
        "--offloads",
        "all/none",
        "--json",
    ]);
    let scenario = &report(&output)["scenarios"][0];
    assert_eq!(scenario["passed"], true, "{scenario}");
    let figures = &scenario["figures"]["q2-mtu1500-af-xdp-all+none"];
    for test in ["BytesAB", "BytesAHost", "BytesHostA"] {
        assert_eq!(figures[test]["bytes"], 100 << 20, "{test}: {figures}");
    }
    let captured = &figures["TcpAHost_captured"];
    assert_eq!(captured["longest_bytes"], 1514, "{captured}");
    assert!(figures["b_tx_gso_frames"].as_u64() > Some(0), "{figures}");
}

/// A guest loses no frame since another is frozen, slow, or stops and goes, though the host sends to
/// both by one queue.
#[test]
fn a_healthy_guest_loses_no_frame_beside_one_that_takes_none() {
    let output = lab_with_ringway(&["--scenario", "neighbours", "--quick", "--json"]);
    let scenario = &report(&output)["scenarios"][0];
    assert_eq!(scenario["passed"], true, "{scenario}");
    for fate in ["frozen", "slow", "stop-and-go"] {
        let figures = &scenario["figures"][format!("q1-mtu1500-tap-all-{fate}")];
        assert_eq!(figures["ring_full"], 0, "{fate}: {figures}");
        assert!(figures["gbit_per_s"].as_f64() > Some(0.0), "{figures}");
    }
    let frozen = &scenario["figures"]["q1-mtu1500-tap-all-frozen"];
    assert!(frozen["neighbour_ring_full"].as_u64() > Some(0), "{frozen}");
}

/// As libvirt runs QEMU: not as root, on a socket of its group.
#[test]
fn qemu_of_another_user_talks_through_a_socket_that_only_its_group_may_open() {
    let output = lab_with_ringway(&["--scenario", "access", "--quick", "--json"]);
    let scenario = &report(&output)["scenarios"][0];
    assert_eq!(scenario["passed"], true, "{scenario}");
}

/// QEMU starts such a guest only if its back-end offers VIRTIO_F_ACCESS_PLATFORM and a channel for
/// IOTLB messages.
#[test]
fn guests_whose_nics_have_iommu_platform_on_talk() {
    let output = lab_with_ringway(&["--scenario", "platform", "--quick", "--json"]);
    let scenario = &report(&output)["scenarios"][0];
    assert_eq!(scenario["passed"], true, "{scenario}");
}

/// The reference works by itself: what fails above and passes here is ringwayd's.
#[test]
fn guests_talk_through_the_linux_bridge() {
    let output = lab(&[
        "--baseline-only",
        "--quick",
        "--json",
        "--tests",
        "ping,tcp-guests",
    ]);
    let report = report(&output);
    assert_eq!(report["samples"].as_array().map(Vec::len), Some(3));
    assert!(report["machine"]["accel"].is_string());
}

#[test]
fn a_daemon_that_does_not_exist_is_one_line_and_a_hint() {
    let output = lab(&["--quick", "--ringwayd", "/nonexistent/ringwayd"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("error: /nonexistent/ringwayd does not exist"),
        "{stderr}"
    );
    assert!(stderr.contains("hint: build the workspace"), "{stderr}");
}

/// `make demo` finds the program wherever cargo puts it: it names no folder itself. What is built and
/// installed before is left out.
#[test]
fn the_demo_runs_what_cargo_built_whatever_the_target_folder() {
    let folder = tempfile::tempdir().expect("a directory");
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new("make")
        .args(["--dry-run", "CARGO=cargo", "demo"])
        .current_dir(top)
        .env("CARGO_TARGET_DIR", folder.path())
        .output()
        .expect("make starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    let runs: Vec<&str> = said.lines().filter(|line| line.contains(" lab ")).collect();
    let [run] = runs[..] else {
        panic!("one line runs the lab:\n{said}");
    };
    let mut words = run.split_whitespace();
    assert_eq!(
        [words.next(), words.next()],
        [Some("cargo"), Some("run")],
        "{run}"
    );
    assert!(
        run.contains(" --release ") && run.contains(" --bin ringway-bench "),
        "{run}"
    );
}

/// Namespaces of labs that no longer run.
fn leftovers() -> Vec<String> {
    let names = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("ringway-lab-"))
        .filter(|name| {
            let pid = name.split('-').nth(2).unwrap_or_default();
            !Path::new("/proc").join(pid).exists()
        })
        .collect()
}
