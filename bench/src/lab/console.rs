//! The command channel to a guest: a virtio serial port, a line per command.
//!
//! ```text
//! guest -> host   @@ringway ready@@
//! host -> guest   7 ip link show
//! guest -> host   @@ringway begin 7@@
//!                 … output of the command, then a line feed of the protocol's own …
//!                 @@ringway end 7 0@@
//! ```
//!
//! Commands have numbers, so that the late answer of one whose deadline passed is told from the
//! answer to the next.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::interrupt;
use anyhow::{Context, Result, bail};

/// How long one read waits before deadlines and Ctrl-C are looked at.
const READ_SLICE: Duration = Duration::from_millis(50);

/// A limit on what a command may print: far above any iperf3 report, low enough to stop a loop.
const MAX_OUTPUT_BYTES: usize = 4 << 20;

/// What a command printed, and its exit status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CommandAnswer {
    /// Standard output and standard error, as they came.
    pub(crate) text: String,
    /// Exit status of the shell.
    pub(crate) status: i32,
}

/// The host's side of the channel.
pub(crate) struct Console {
    stream: UnixStream,
    decoder: Decoder,
    next_id: u32,
    log: File,
}

impl Console {
    /// On a connection to the socket of the port in QEMU.
    pub(crate) fn new(stream: UnixStream, log: File) -> Result<Console> {
        stream.set_read_timeout(Some(READ_SLICE))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Console {
            stream,
            decoder: Decoder::default(),
            next_id: 1,
            log,
        })
    }

    /// One bounded step of waiting for the guest's shell, after a boot or a reboot: whether it
    /// reads commands now.
    pub(crate) fn poll_ready(&mut self) -> Result<bool> {
        self.fill()?;
        while let Some(event) = self.decoder.next_event() {
            if event == ConsoleEvent::Ready {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends a command without waiting for its answer: for one that ends the guest's session.
    pub(crate) fn send(&mut self, command: &str) -> Result<u32> {
        debug_assert!(!command.contains('\n'), "the channel is line based");
        let id = self.next_id;
        self.next_id += 1;
        writeln!(self.log, "host> {command}")?;
        self.stream
            .write_all(format!("{id} {command}\n").as_bytes())
            .context("writing to the guest's command port")?;
        Ok(id)
    }

    /// Runs a command by the guest's `sh -c` and waits for its end.
    pub(crate) fn run(&mut self, command: &str, timeout: Duration) -> Result<CommandAnswer> {
        let deadline = Instant::now() + timeout;
        let id = self.send(command)?;
        loop {
            match self.next_event(deadline) {
                Ok(ConsoleEvent::Answer {
                    id: answered,
                    answer,
                }) if answered == id => return Ok(answer),
                Ok(ConsoleEvent::Ready) => bail!("the guest rebooted during `{command}`"),
                Ok(ConsoleEvent::Answer { .. }) => {}
                Err(error) => return Err(error.context(format!("guest command `{command}`"))),
            }
        }
    }

    fn next_event(&mut self, deadline: Instant) -> Result<ConsoleEvent> {
        loop {
            if let Some(event) = self.decoder.next_event() {
                return Ok(event);
            }
            if Instant::now() >= deadline {
                bail!("no answer on the guest's command port in time");
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> Result<()> {
        interrupt::check()?;
        let mut chunk = [0; 4096];
        match self.stream.read(&mut chunk) {
            Ok(0) => bail!("the guest's command port was closed: QEMU ended"),
            Ok(length) => {
                self.log.write_all(&chunk[..length])?;
                self.decoder.push(&chunk[..length])
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error).context("reading the guest's command port"),
        }
    }
}

/// Something the guest said.
#[derive(Debug, PartialEq, Eq)]
enum ConsoleEvent {
    /// The shell loop started.
    Ready,
    /// A command ended.
    Answer { id: u32, answer: CommandAnswer },
}

/// The protocol without I/O.
#[derive(Default)]
struct Decoder {
    buffer: Vec<u8>,
    /// The command whose output is being read, and the output so far.
    open: Option<(u32, Vec<u8>)>,
}

impl Decoder {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        let open = self.open.as_ref().map_or(0, |(_, output)| output.len());
        if self.buffer.len() + open > MAX_OUTPUT_BYTES {
            bail!("a guest command printed more than {MAX_OUTPUT_BYTES} bytes");
        }
        Ok(())
    }

    fn next_event(&mut self) -> Option<ConsoleEvent> {
        while let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.buffer.drain(..=end).collect();
            if let Some(event) = self.line(&line) {
                return Some(event);
            }
        }
        None
    }

    fn line(&mut self, line: &[u8]) -> Option<ConsoleEvent> {
        match Marker::parse(line) {
            Some(Marker::Ready) => {
                self.open = None;
                Some(ConsoleEvent::Ready)
            }
            Some(Marker::Begin(id)) => {
                self.open = Some((id, Vec::new()));
                None
            }
            Some(Marker::End(id, status)) => {
                let (open, mut output) = self.open.take()?;
                if open != id {
                    return None;
                }
                output.pop(); // the protocol's own line feed
                let text = String::from_utf8_lossy(&output).into_owned();
                Some(ConsoleEvent::Answer {
                    id,
                    answer: CommandAnswer { text, status },
                })
            }
            None => {
                if let Some((_, output)) = &mut self.open {
                    output.extend_from_slice(line);
                }
                None
            }
        }
    }
}

enum Marker {
    Ready,
    Begin(u32),
    End(u32, i32),
}

impl Marker {
    fn parse(line: &[u8]) -> Option<Marker> {
        let line = std::str::from_utf8(line)
            .ok()?
            .trim_end_matches(['\r', '\n']);
        let body = line.strip_prefix("@@ringway ")?.strip_suffix("@@")?;
        let mut words = body.split(' ');
        let marker = match (words.next()?, words.next(), words.next()) {
            ("ready", None, None) => Marker::Ready,
            ("begin", Some(id), None) => Marker::Begin(id.parse().ok()?),
            ("end", Some(id), Some(status)) => Marker::End(id.parse().ok()?, status.parse().ok()?),
            _ => return None,
        };
        Some(marker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(input: &[u8], chunk: usize) -> Vec<ConsoleEvent> {
        let mut decoder = Decoder::default();
        let mut events = Vec::new();
        for part in input.chunks(chunk) {
            decoder.push(part).expect("below the limit");
            while let Some(event) = decoder.next_event() {
                events.push(event);
            }
        }
        events
    }

    fn answer(id: u32, text: &str, status: i32) -> ConsoleEvent {
        ConsoleEvent::Answer {
            id,
            answer: CommandAnswer {
                text: text.into(),
                status,
            },
        }
    }

    #[test]
    fn output_and_status_survive_any_split() {
        let input = b"boot noise\n@@ringway ready@@\n@@ringway begin 1@@\none\ntwo\n\n\
                      @@ringway end 1 0@@\n@@ringway begin 2@@\n\n@@ringway end 2 127@@\n";
        for chunk in [1, 2, 3, 7, 1000] {
            let events = decode(input, chunk);
            assert_eq!(
                events,
                [
                    ConsoleEvent::Ready,
                    answer(1, "one\ntwo\n", 0),
                    answer(2, "", 127)
                ]
            );
        }
    }

    #[test]
    fn output_without_a_last_line_feed_keeps_its_last_byte() {
        let input = b"@@ringway begin 3@@\nno newline\n@@ringway end 3 1@@\n";
        assert_eq!(decode(input, 5), [answer(3, "no newline", 1)]);
    }

    #[test]
    fn an_end_without_its_begin_is_dropped() {
        let input = b"@@ringway end 3 1@@\n@@ringway begin 4@@\n\n@@ringway end 4 0@@\n";
        assert_eq!(decode(input, 9), [answer(4, "", 0)]);
    }

    #[test]
    fn a_reboot_discards_the_open_command() {
        let input = b"@@ringway begin 3@@\nhalf\n@@ringway ready@@\n";
        assert_eq!(decode(input, 4), [ConsoleEvent::Ready]);
    }

    #[test]
    fn endless_output_is_refused() {
        let mut decoder = Decoder::default();
        decoder.push(b"@@ringway begin 1@@\n").expect("short");
        assert!(decoder.push(&vec![b'x'; MAX_OUTPUT_BYTES]).is_err());
    }
}
