//! What arrives at an interface of the host: tcpdump captures it and judges each checksum; lengths
//! are read from the capture itself.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::netns::NetNs;
use crate::process::{Origin, Process, find, run_ok};

const TCPDUMP: &str = "tcpdump";

/// How long tcpdump may take until it captures.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to read a capture.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Frames of a capture: 180 MB if all are jumbo frames.
const MAX_FRAMES: u32 = 20_000;

/// The kernel's buffer: what does not fit is not captured, and so not checked.
const BUFFER_KIB: &str = "32768";

/// A capture that runs.
pub(crate) struct Capture {
    process: Process,
    file: PathBuf,
}

impl Capture {
    /// Starts to capture what comes in at `interface`, up to [`MAX_FRAMES`] whole frames. Only
    /// what comes in: frames that the host sends may have their checksums open. To be called from
    /// the main thread.
    pub(crate) fn start(namespace: &NetNs, interface: &str, folder: &Path) -> Result<Capture> {
        let file = folder.join(format!("{interface}.pcap"));
        let log = folder.join(format!("{interface}-tcpdump.log"));
        let _ = std::fs::remove_file(&log);
        let mut command = Command::new(find(TCPDUMP, Origin::LabPackages)?);
        command
            .args(["-i", interface, "-Q", "in", "-s", "0", "-B", BUFFER_KIB])
            .args(["-c", &MAX_FRAMES.to_string(), "-Z", "root", "-w"])
            .arg(&file);
        let mut process = Process::spawn(TCPDUMP, &command, Some(namespace), &log)?;
        process.wait_for("did not capture", START_TIMEOUT, |process| {
            process.said().contains("listening on").then_some(())
        })?;
        Ok(Capture { process, file })
    }

    /// Ends the capture and looks at each of its frames.
    pub(crate) fn check(mut self) -> Result<CaptureCheck> {
        self.process.stop();
        let lengths = lengths(BufReader::new(File::open(&self.file)?))
            .with_context(|| format!("reading {}", self.file.display()))?;
        let mut command = Command::new(find(TCPDUMP, Origin::LabPackages)?);
        command.args(["-nn", "-t", "-vvv", "-r"]).arg(&self.file);
        let said = run_ok(&mut command, READ_TIMEOUT)?;
        let _ = std::fs::remove_file(&self.file);
        Ok(CaptureCheck {
            frames: lengths.len(),
            longest_bytes: lengths.into_iter().max().unwrap_or(0),
            checksums: Checksums::of(&said),
        })
    }
}

/// What all frames of a capture have in common.
#[derive(Debug, Serialize)]
pub(crate) struct CaptureCheck {
    pub(crate) frames: usize,
    /// L2, without FCS.
    pub(crate) longest_bytes: u32,
    #[serde(flatten)]
    pub(crate) checksums: Checksums,
}

/// What tcpdump says of the checksums.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Checksums {
    /// TCP and UDP packets.
    pub(crate) packets: usize,
    /// Those of them whose TCP or UDP checksum is right.
    pub(crate) right: usize,
    /// Of any kind, with the first of them.
    pub(crate) wrong: usize,
    pub(crate) first_wrong: Option<String>,
}

impl Checksums {
    /// Reads `tcpdump -vvv`: a line for the IP header, an indented one for what is in it.
    fn of(text: &str) -> Checksums {
        const WRONG: [&str; 4] = ["incorrect ->", "bad cksum", "bad udp cksum", "wrong icmp"];
        let mut checksums = Checksums::default();
        for line in text.lines() {
            let has = |words: &[&str]| words.iter().any(|word| line.contains(word));
            checksums.packets += usize::from(has(&["proto TCP (6)", "proto UDP (17)"]));
            checksums.right += usize::from(has(&["(correct)", "[udp sum ok]"]));
            if has(&WRONG) {
                checksums.wrong += 1;
                checksums
                    .first_wrong
                    .get_or_insert_with(|| line.trim().to_owned());
            }
        }
        checksums
    }
}

/// First word of a capture as tcpdump writes it, in the machine's byte order; times in
/// microseconds.
const MAGIC: u32 = 0xa1b2_c3d4;

/// Lengths of the frames of a pcap file, all of which must be there whole.
fn lengths(mut file: impl Read) -> Result<Vec<u32>> {
    let mut header = [0; 24];
    file.read_exact(&mut header)?;
    ensure!(
        word(&header, 0) == MAGIC,
        "this is no capture of this machine"
    );
    let mut lengths = Vec::new();
    let mut record = [0; 16];
    let mut frame = Vec::new();
    loop {
        match file.read_exact(&mut record) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(lengths),
            Err(error) => return Err(error.into()),
        }
        let (captured, length) = (word(&record, 8), word(&record, 12));
        ensure!(
            captured == length,
            "a frame of {length} bytes was cut short"
        );
        frame.resize(length as usize, 0);
        file.read_exact(&mut frame)?;
        lengths.push(length);
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word: [u8; 4] = std::array::from_fn(|index| bytes[at + index]);
    u32::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_counted_as_tcpdump_prints_them() {
        let text = "\
IP (tos 0x0, ttl 64, id 1, offset 0, flags [DF], proto TCP (6), length 1500)
    10.77.0.1.40002 > 10.77.0.254.5201: Flags [.], cksum 0x1c8a (correct), seq 1:1449, ack 1
IP (tos 0x0, ttl 64, id 2, offset 0, flags [DF], proto TCP (6), length 60, bad cksum 1 (->9a7b)!)
    10.77.0.1.40002 > 10.77.0.254.5201: Flags [S], cksum 0x16a4 (incorrect -> 0x8d1b), seq 0
IP (tos 0x0, ttl 64, id 3, offset 0, flags [DF], proto UDP (17), length 1500)
    10.77.0.1.50332 > 10.77.0.254.5201: [udp sum ok] UDP, length 1472
IP (tos 0x0, ttl 64, id 4, offset 0, flags [DF], proto UDP (17), length 1500)
    10.77.0.1.50332 > 10.77.0.254.5201: [bad udp cksum 0x16a4 -> 0x5f0e!] UDP, length 1472
IP (tos 0x0, ttl 64, id 5, offset 0, flags [DF], proto UDP (17), length 1500)
    10.77.0.1.50332 > 10.77.0.254.5201: [no cksum] UDP, length 1472
ARP, Ethernet (len 6), IPv4 (len 4), Reply 10.77.0.1 is-at 52:54:00:77:00:01, length 28
";
        let checksums = Checksums::of(text);
        assert_eq!((checksums.packets, checksums.right), (5, 2));
        assert_eq!(checksums.wrong, 3);
        let first = checksums.first_wrong.expect("the IP header");
        assert!(first.ends_with("bad cksum 1 (->9a7b)!)"), "{first}");
    }

    fn capture(frames: &[(u32, u32)]) -> Vec<u8> {
        let mut file = MAGIC.to_ne_bytes().to_vec();
        file.resize(24, 0);
        for (captured, length) in frames {
            file.extend([0; 8]);
            file.extend(captured.to_ne_bytes());
            file.extend(length.to_ne_bytes());
            file.resize(file.len() + *captured as usize, 0xff);
        }
        file
    }

    #[test]
    fn lengths_are_those_of_the_frames() {
        let file = capture(&[(60, 60), (9014, 9014)]);
        assert_eq!(lengths(&*file).expect("a capture"), [60, 9014]);
        assert!(lengths(&*capture(&[(60, 1514)])).is_err(), "cut short");
        assert!(lengths(&file[..file.len() - 1]).is_err(), "half a frame");
        assert!(lengths(&file[1..]).is_err(), "another format");
    }
}
