//! `ringway capture`: frames of ports, as a pcapng file or a line each.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, UNIX_EPOCH};

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use pcap_file::PcapError;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::blocks::interface_statistics::InterfaceStatisticsOption;
use pcap_file::pcapng::{Block, PcapNgParser};
use ringway_bridge::MacAddr;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::args::CaptureArgs;
use super::interrupt::Interrupt;
use super::{EXIT_REFUSED, EXIT_USAGE, Failure, Stop};
use crate::api::{CaptureStart, CaptureStartParams, NoParams, PortList, PortName};
use crate::rpc::Client;

/// How long the daemon may take to send what is left.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Direction bits of epb_flags.
const DIRECTION: u32 = 3;
const INBOUND: u32 = 1;

/// Captures until a signal comes, or nobody takes the frames any more.
pub(super) fn run(mut client: Client, args: &CaptureArgs) -> Result<(), Stop> {
    let interrupt = Interrupt::new()?;
    let (ports, filter) = words(&mut client, args)?;
    // What can't be written is refused before anything is captured.
    let mut sink = Sink::open(args)?;
    let params = CaptureStartParams {
        ports,
        snap_bytes: args.snap_bytes,
        filter,
    };
    let (stream, first) = client.bytes::<CaptureStart>(&params)?;
    let outcome = carry(&stream, first, &interrupt, &mut sink);
    let _ = writeln!(
        io::stderr(),
        "{} frames captured, {} lost since they were not read in time",
        sink.frames,
        sink.lost
    );
    outcome
}

/// The ports, which come first, and the filter.
fn words(client: &mut Client, args: &CaptureArgs) -> Result<(Vec<PortName>, Option<String>), Stop> {
    let known = client.call::<PortList>(&NoParams {})?.ports;
    let is_port = |word: &&String| known.iter().any(|port| port.name.to_string() == **word);
    let count = args.words.iter().take_while(is_port).count();
    let (ports, rest) = args.words.split_at(count);
    let refuse =
        |what: String, hint: &str| Err(Stop::Failed(Failure::new(EXIT_USAGE, "usage", what, hint)));
    if ports.is_empty() {
        let first = args.words.first().map_or("", String::as_str);
        let what = format!("there is no port {first}");
        let hint = "`ringway port list` shows the ports";
        let failure = Failure::new(EXIT_REFUSED, "no_such_port", what, hint);
        return Err(Stop::Failed(failure));
    }
    let filter = match (&args.filter, rest) {
        (None, []) => None,
        (Some(filter), []) => Some(filter.clone()),
        (None, words) => Some(words.join(" ")),
        (Some(_), [word, ..]) => {
            let what = format!("{word} is no port, and there is a filter (--filter) already");
            return refuse(what, "name ports only before --filter");
        }
    };
    let names = ports.iter().filter_map(|port| port.parse().ok());
    Ok((names.collect(), filter))
}

/// Passes on what comes, block by block.
fn carry(
    stream: &UnixStream,
    first: Vec<u8>,
    interrupt: &Interrupt,
    sink: &mut Sink,
) -> Result<(), Stop> {
    let local = |error: io::Error| Stop::local(&error);
    let mut bytes = first;
    let mut ends_at = None;
    loop {
        sink.take(&mut bytes)?;
        if !wait(stream, interrupt, ends_at)? {
            match ends_at {
                None => {
                    // The daemon sends what is left, and how much got lost.
                    stream.shutdown(Shutdown::Write).map_err(local)?;
                    ends_at = Some(Instant::now() + END_TIMEOUT);
                    continue;
                }
                Some(_) => return Ok(()),
            }
        }
        let mut chunk = [0; 64 << 10];
        let mut reader = stream;
        match reader.read(&mut chunk) {
            Ok(0) if ends_at.is_some() => return Ok(()),
            Ok(0) => {
                let hint = "see the daemon's log";
                let what = "the daemon ended the capture";
                return Err(Stop::Failed(Failure::new(
                    EXIT_REFUSED,
                    "ended",
                    what,
                    hint,
                )));
            }
            Ok(n) => bytes.extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(local(error)),
        }
    }
}

/// Waits for bytes; false if a signal came, or it is time to end.
fn wait(
    stream: &UnixStream,
    interrupt: &Interrupt,
    ends_at: Option<Instant>,
) -> Result<bool, Stop> {
    let stdout = io::stdout();
    loop {
        let mut fds = vec![
            PollFd::new(stream, PollFlags::IN),
            // Of a pipe, an error says that its reader is gone.
            PollFd::new(&stdout, PollFlags::empty()),
        ];
        let mut timeout = None;
        if let Some(at) = ends_at {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            timeout = Timespec::try_from(left).ok();
        } else {
            fds.push(PollFd::new(interrupt.pipe(), PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Stop::local(&error.into())),
        }
        let came: Vec<_> = fds.iter().map(PollFd::revents).collect();
        match &*came {
            [_, reader, ..] if reader.contains(PollFlags::ERR) => return Err(Stop::Unread),
            [_, _, signal] if !signal.is_empty() => return Ok(false),
            [bytes, ..] if !bytes.is_empty() => return Ok(true),
            _ => {}
        }
    }
}

/// Where blocks go.
struct Sink {
    /// Lines go to standard output if there is no file.
    file: Option<Box<dyn Write>>,
    parser: Option<PcapNgParser>,
    frames: u64,
    lost: u64,
}

impl Sink {
    fn open(args: &CaptureArgs) -> Result<Self, Stop> {
        let file: Option<Box<dyn Write>> = match &args.write {
            None => None,
            Some(path) if path.as_os_str() == "-" => Some(Box::new(io::stdout())),
            Some(path) => {
                let file = File::create(path).map_err(|error| {
                    let what = format!("can't write {}: {error}", path.display());
                    let hint = "choose another file with -w, or - for standard output";
                    Stop::Failed(Failure::new(EXIT_REFUSED, "local", what, hint))
                })?;
                Some(Box::new(file))
            }
        };
        Ok(Self {
            file,
            parser: None,
            frames: 0,
            lost: 0,
        })
    }

    /// Takes the blocks that are whole.
    fn take(&mut self, bytes: &mut Vec<u8>) -> Result<(), Stop> {
        let garbled = |error: PcapError| {
            let what = format!("the daemon sent no pcapng: {error}");
            let hint = "is this the control socket of ringwayd, and of this version?";
            Stop::Failed(Failure::new(EXIT_REFUSED, "garbled", what, hint))
        };
        let mut rest = &**bytes;
        let mut text = String::new();
        loop {
            let next = match &mut self.parser {
                None => PcapNgParser::new(rest).map(|(left, parser)| {
                    self.parser = Some(parser);
                    left
                }),
                Some(parser) => match parser.next_block(rest) {
                    Ok((left, block)) => {
                        note(&block, &mut self.frames, &mut self.lost);
                        if let (None, Block::EnhancedPacket(frame)) = (&self.file, block) {
                            line(&mut text, &frame, parser)?;
                        }
                        Ok(left)
                    }
                    Err(error) => Err(error),
                },
            };
            match next {
                Ok(left) => rest = left,
                Err(PcapError::IncompleteBuffer) => break,
                Err(error) => return Err(garbled(error)),
            }
        }
        let whole = bytes.len() - rest.len();
        let done = match &mut self.file {
            Some(file) => file
                .write_all(bytes.get(..whole).unwrap_or_default())
                .and_then(|()| file.flush()),
            None => io::stdout().write_all(text.as_bytes()),
        };
        bytes.drain(..whole);
        done.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Stop::Unread,
            _ => Stop::local(&error),
        })
    }
}

fn note(block: &Block<'_>, frames: &mut u64, lost: &mut u64) {
    match block {
        Block::EnhancedPacket(_) => *frames += 1,
        Block::InterfaceStatistics(statistics) => {
            for option in &statistics.options {
                if let InterfaceStatisticsOption::IsbIfDrop(copies) = option {
                    *lost += copies;
                }
            }
        }
        _ => {}
    }
}

/// Writes a frame as a line: when, where, which way, and what it is.
fn line(
    out: &mut String,
    frame: &EnhancedPacketBlock<'_>,
    parser: &PcapNgParser,
) -> std::fmt::Result {
    let interface = usize::try_from(frame.interface_id).unwrap_or(usize::MAX);
    let options = parser.interfaces().get(interface).map(|i| &i.options);
    let name = options
        .into_iter()
        .flatten()
        .find_map(|option| match option {
            InterfaceDescriptionOption::IfName(name) => Some(&**name),
            _ => None,
        });
    let (mut way, mut dropped) = ("Out", String::new());
    for option in &frame.options {
        match option {
            EnhancedPacketOption::Flags(flags) if flags & DIRECTION == INBOUND => way = "In",
            EnhancedPacketOption::Comment(comment) if comment.starts_with("dropped: ") => {
                dropped = format!(" ({comment})");
            }
            _ => {}
        }
    }
    let time = humantime::format_rfc3339_micros(UNIX_EPOCH + frame.timestamp);
    write!(out, "{time} {} {way:<3} ", name.unwrap_or("?"))?;
    describe(out, &frame.data)?;
    writeln!(out, ", length {}{dropped}", frame.original_len)
}

/// Says what a frame is, as far as its first bytes tell.
fn describe(out: &mut String, bytes: &[u8]) -> std::fmt::Result {
    let Some([d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]) = bytes.first_chunk() else {
        return write!(out, "{} bytes of no Ethernet frame", bytes.len());
    };
    let source = MacAddr([*s0, *s1, *s2, *s3, *s4, *s5]);
    let destination = MacAddr([*d0, *d1, *d2, *d3, *d4, *d5]);
    write!(out, "{source} > {destination}")?;
    let Ok(packet) = LaxSlicedPacket::from_ethernet(bytes) else {
        return Ok(());
    };
    for vlan in packet.vlan_ids() {
        write!(out, ", vlan {}", vlan.value())?;
    }
    let ports = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => Some(("TCP", tcp.source_port(), tcp.destination_port())),
        Some(TransportSlice::Udp(udp)) => Some(("UDP", udp.source_port(), udp.destination_port())),
        _ => None,
    };
    let addresses = match &packet.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            let (from, to) = (header.source_addr(), header.destination_addr());
            Some((from.to_string(), to.to_string()))
        }
        Some(LaxNetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let (from, to) = (header.source_addr(), header.destination_addr());
            Some((from.to_string(), to.to_string()))
        }
        Some(LaxNetSlice::Arp(_)) => return write!(out, ", ARP"),
        None => None,
    };
    match (addresses, ports) {
        (Some((from, to)), Some((protocol, source, destination))) => {
            write!(out, ", {protocol} {from}.{source} > {to}.{destination}")
        }
        (Some((from, to)), None) => write!(out, ", IP {from} > {to}"),
        (None, _) => match bytes.get(12..14) {
            Some([high, low]) => write!(out, ", ethertype 0x{high:02x}{low:02x}"),
            _ => Ok(()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_as_far_as_their_first_bytes_go() {
        let builder = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .single_vlan(7_u16.try_into().unwrap())
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .udp(53, 1053);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[0; 4]).unwrap();
        let told = |bytes: &[u8]| {
            let mut text = String::new();
            describe(&mut text, bytes).unwrap();
            text
        };
        let macs = "02:02:02:02:02:02 > 04:04:04:04:04:04";
        assert_eq!(
            told(&bytes),
            format!("{macs}, vlan 7, UDP 10.0.0.1.53 > 10.0.0.2.1053")
        );
        for end in 0..bytes.len() {
            told(&bytes[..end]);
        }
        bytes.truncate(13);
        assert_eq!(told(&bytes), macs);
        bytes[12..].fill(0x88);
        bytes.push(0xb5);
        assert_eq!(told(&bytes), format!("{macs}, ethertype 0x88b5"));
        assert_eq!(told(&[]), "0 bytes of no Ethernet frame");
    }
}
