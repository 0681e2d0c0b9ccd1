//! DPDK's virtio driver as a second, foreign load: frames circulate between two of its ports
//! through the switch, addressed for a learning one.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ringway_dataplane::driver::Layout;

use super::load::{LoadConfig, allowed_cpus};

/// Bursts of 32 frames that start the circulation.
const BURSTS: u32 = 16;
/// From its start until frames circulate steadily.
const SETTLE: Duration = Duration::from_millis(2500);
/// How long it may take to end.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// One trial: frames per second that both ports receive.
pub(crate) fn trial(config: &LoadConfig, cpu: usize, duration: Duration) -> Result<f64> {
    let ([a, b], [size]) = (&config.sockets[..], &config.sizes[..]) else {
        bail!("the virtio-user load drives two ports with frames of one size");
    };
    let other = allowed_cpus()?.into_iter().find(|other| *other != cpu);
    let other = other.context("DPDK needs a second CPU for its prompt")?;
    let (mac_a, mac_b) = ("52:54:00:00:00:01", "52:54:00:00:00:02");
    let shape = config.shape;
    let options = format!(
        "queues=1,queue_size={},packed_vq={},mrg_rxbuf={},in_order={}",
        shape.queue_size,
        u8::from(shape.layout == Layout::Packed),
        u8::from(shape.mergeable),
        u8::from(shape.in_order)
    );
    let mut command = Command::new("dpdk-testpmd");
    command
        .args([
            "-l",
            &format!("{other},{cpu}"),
            "--main-lcore",
            &other.to_string(),
        ])
        .args([
            "--no-pci",
            "--in-memory",
            "--single-file-segments",
            "-m",
            "512",
        ])
        .args(["--file-prefix", &format!("rv{}", std::process::id())]);
    for (port, (socket, mac)) in [(a, mac_a), (b, mac_b)].iter().enumerate() {
        let socket = socket.display();
        command.arg("--vdev").arg(format!(
            "net_virtio_user{port},path={socket},mac={mac},{options}"
        ));
    }
    let entries = shape.queue_size.to_string();
    command
        .args(["--", "-i", "--forward-mode=mac", "--nb-cores=1"])
        .arg(format!("--eth-peer=0,{mac_b}"))
        .arg(format!("--eth-peer=1,{mac_a}"))
        .args(["--txd", &entries, "--rxd", &entries])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0);
    let mut child = command.spawn().context("can't start dpdk-testpmd")?;
    let outcome = converse(&mut child, *size, duration);
    if outcome.is_err() {
        // It may have ended by itself.
        let _ = child.kill();
    }
    end(&mut child)?;
    let said = outcome?;
    let rates: Vec<f64> = said
        .lines()
        .filter_map(|line| {
            line.split_once("Rx-pps:")?
                .1
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .collect();
    // The first pair of lines starts the clock, the second tells the rate since then.
    ensure!(
        rates.len() == 4,
        "the virtio-user load told {} rates, not 4",
        rates.len()
    );
    let sum = rates[2] + rates[3];
    ensure!(sum > 0.0, "no frame came back to the virtio-user load");
    Ok(sum)
}

/// Talks to its prompt and returns all that it said.
fn converse(child: &mut Child, size: u32, duration: Duration) -> Result<String> {
    let mut input = child.stdin.take().context("testpmd has no prompt")?;
    let mut output = child.stdout.take().context("testpmd is mute")?;
    let listener = thread::spawn(move || {
        let mut said = Vec::new();
        output.read_to_end(&mut said).map(|_| said)
    });
    thread::sleep(SETTLE);
    writeln!(input, "set txpkts {size}\nstart tx_first {BURSTS}")?;
    thread::sleep(duration);
    writeln!(input, "show port stats all")?;
    thread::sleep(duration);
    writeln!(input, "show port stats all\nstop\nquit")?;
    drop(input);
    let said = listener
        .join()
        .map_err(|_| anyhow::anyhow!("testpmd can't be read"))??;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

fn end(child: &mut Child) -> Result<()> {
    let deadline = Instant::now() + END_PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
