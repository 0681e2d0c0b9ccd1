//! Random bytes over TCP, hashed where they are sent and where they arrive.
//!
//! TCP takes damaged bytes for whole ones if they were damaged before a switch completed the
//! checksum, or if a virtio-net header says that nobody needs to look.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::guest::{HOST_ADDRESS, QemuGuest, address};
use super::measure::{Figure, SLACK};
use super::network::LabNetwork;
use crate::interrupt;
use crate::process::{Origin, find};

/// Length of a transfer, in MiB.
const MIB: usize = 100;

const PORT: u16 = 5202;

/// How long making, sending or hashing may take: each takes seconds on emulated guests.
const TIMEOUT: Duration = Duration::from_secs(90);

/// How long the host's end waits before deadline and Ctrl-C are looked at.
const SLICE: Duration = Duration::from_millis(50);

/// Who sends to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TransferWay {
    GuestToGuest,
    GuestToHost,
    HostToGuest,
}

/// One transfer; an error unless what arrived is what was sent.
pub(crate) fn transfer(network: &mut LabNetwork, way: TransferWay) -> Result<Figure> {
    let (sent, received, took) = match way {
        TransferWay::GuestToGuest => guest_to_guest(network)?,
        TransferWay::GuestToHost => guest_to_host(network)?,
        TransferWay::HostToGuest => host_to_guest(network)?,
    };
    compare(&sent, &received)?;
    Ok(Figure::Bytes {
        bits_per_second: 8.0 * received.bytes as f64 / took.as_secs_f64(),
        bytes: received.bytes,
        sha512: received.sha512,
    })
}

fn guest_to_guest(network: &mut LabNetwork) -> Result<(Digest, Digest, Duration)> {
    let sent = make(network.guest(0)?)?;
    listen(network.guest(1)?)?;
    let started = Instant::now();
    send(network.guest(0)?, &address(1))?;
    let (received, ended) = received(network.guest(1)?)?;
    Ok((sent, received, ended - started))
}

fn guest_to_host(network: &mut LabNetwork) -> Result<(Digest, Digest, Duration)> {
    let sent = make(network.guest(0)?)?;
    let listener = network
        .namespace
        .on_thread(|| TcpListener::bind((HOST_ADDRESS, PORT)).context("listening on the host"))?;
    let started = Instant::now();
    send(network.guest(0)?, HOST_ADDRESS)?;
    let bytes = read_all(&listener)?;
    let took = started.elapsed();
    Ok((sent, Digest::of(&bytes)?, took))
}

fn host_to_guest(network: &mut LabNetwork) -> Result<(Digest, Digest, Duration)> {
    let mut bytes = vec![0; MIB << 20];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let sent = Digest::of(&bytes)?;
    listen(network.guest(0)?)?;
    let to: SocketAddr = format!("{}:{PORT}", address(0)).parse()?;
    let started = Instant::now();
    let stream = network
        .namespace
        .on_thread(|| TcpStream::connect_timeout(&to, SLACK).context("connecting to the guest"))?;
    write_all(stream, &bytes)?;
    let (received, ended) = received(network.guest(0)?)?;
    Ok((sent, received, ended - started))
}

fn make(guest: &mut QemuGuest) -> Result<Digest> {
    guest.run(&format!("bytes make {MIB}"), TIMEOUT)?;
    Digest::parse(&guest.run("bytes digest sent", TIMEOUT)?)
}

fn listen(guest: &mut QemuGuest) -> Result<()> {
    guest.run(&format!("bytes listen {PORT}"), SLACK).map(drop)
}

fn send(guest: &mut QemuGuest, to: &str) -> Result<()> {
    guest
        .run(&format!("bytes send {to} {PORT}"), SLACK)
        .map(drop)
}

/// What a guest received, and when it had all.
fn received(guest: &mut QemuGuest) -> Result<(Digest, Instant)> {
    guest.run("bytes wait", TIMEOUT + SLACK)?;
    let ended = Instant::now();
    let digest = Digest::parse(&guest.run("bytes digest received", TIMEOUT)?)?;
    Ok((digest, ended))
}

/// All that one connection brings to the host.
fn read_all(listener: &TcpListener) -> Result<Vec<u8>> {
    let deadline = Instant::now() + TIMEOUT;
    listener.set_nonblocking(true)?;
    let mut stream = loop {
        match patiently(listener.accept(), deadline)? {
            Some((stream, _)) => break stream,
            None => interrupt::sleep(Duration::from_millis(5))?,
        }
    };
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SLICE))?;
    let mut bytes = Vec::with_capacity(MIB << 20);
    let mut chunk = vec![0; 1 << 16];
    // More than that is wrong in any case.
    while bytes.len() <= MIB << 20 {
        match patiently(stream.read(&mut chunk), deadline)? {
            Some(0) => break,
            Some(length) => bytes.extend_from_slice(&chunk[..length]),
            None => {}
        }
    }
    Ok(bytes)
}

fn write_all(mut stream: TcpStream, mut bytes: &[u8]) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    stream.set_write_timeout(Some(SLICE))?;
    while !bytes.is_empty() {
        if let Some(length) = patiently(stream.write(bytes), deadline)? {
            bytes = &bytes[length..];
        }
    }
    Ok(stream.shutdown(Shutdown::Write)?)
}

/// None if nothing happened yet; an error after the deadline.
fn patiently<T>(outcome: io::Result<T>, deadline: Instant) -> Result<Option<T>> {
    interrupt::check()?;
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            ensure!(Instant::now() < deadline, "the transfer hangs");
            Ok(None)
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error).context("the host's end of the transfer"),
    }
}

/// Number of bytes and their hash, as either end tells them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Digest {
    bytes: u64,
    sha512: String,
}

impl Digest {
    fn of(bytes: &[u8]) -> Result<Digest> {
        let mut child = Command::new(find("sha512sum", Origin::LabPackages)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut stdin = child.stdin.take().context("sha512sum has no input")?;
        stdin.write_all(bytes)?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        Digest::parse(&format!("{} {said}", bytes.len()))
    }

    /// Reads `NUMBER HASH -`, as `bytes digest` and sha512sum print it.
    fn parse(text: &str) -> Result<Digest> {
        let mut words = text.split_whitespace();
        let (bytes, sha512) = (words.next(), words.next());
        match (bytes.and_then(|bytes| bytes.parse().ok()), sha512) {
            (Some(bytes), Some(sha512)) if sha512.len() == 128 => Ok(Digest {
                bytes,
                sha512: sha512.to_owned(),
            }),
            _ => bail!("`{}` is no number and hash", text.trim()),
        }
    }
}

fn compare(sent: &Digest, received: &Digest) -> Result<()> {
    ensure!(
        sent.bytes == (MIB as u64) << 20,
        "{} bytes were made instead of {MIB} MiB",
        sent.bytes
    );
    ensure!(
        sent == received,
        "what arrived is not what was sent: {} bytes with hash {:.16} became {} with {:.16}",
        sent.bytes,
        sent.sha512,
        received.bytes,
        received.sha512
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_tell_the_same_of_the_same_bytes() {
        let hash = "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                    2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f";
        let here = Digest::of(b"abc").expect("sha512sum runs");
        let there = Digest::parse(&format!("3 {hash}  -\n")).expect("as a guest prints it");
        assert_eq!(here, there);
        for text in ["", "3", "3 abc", "x "] {
            assert!(Digest::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn other_bytes_and_too_few_are_failures() {
        let digest = |bytes, hash: &str| Digest {
            bytes,
            sha512: hash.to_owned(),
        };
        let all = (MIB as u64) << 20;
        assert!(compare(&digest(all, "x"), &digest(all, "x")).is_ok());
        assert!(compare(&digest(all, "x"), &digest(all, "y")).is_err());
        assert!(compare(&digest(all, "x"), &digest(all - 1, "x")).is_err());
        assert!(compare(&digest(0, "x"), &digest(0, "x")).is_err());
    }
}
