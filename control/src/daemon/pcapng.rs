//! A capture as a pcapng file (draft-ietf-opsawg-pcapng): an interface for each port, which way
//! each frame went, its queue, and as a comment why it went no further.

use std::borrow::Cow;
use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::PcapNgBlock;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness};
use ringway_dataplane::{CaptureReader, CapturedFrame, Direction};

/// Bytes made of frames at once, beside the last one.
const CHUNK: usize = 256 << 10;

/// Direction bits of epb_flags.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// if_tsresol: nanoseconds.
const NANOSECONDS: u8 = 9;

/// A file that is being written.
pub(super) struct CaptureFile {
    reader: CaptureReader,
    writer: PcapNgWriter<Vec<u8>>,
    /// Frames written of each port.
    written: Vec<u64>,
}

impl CaptureFile {
    /// A file with its heads.
    pub(super) fn new(reader: CaptureReader) -> Self {
        let program = concat!("ringway ", env!("CARGO_PKG_VERSION"));
        let section = SectionHeaderBlock {
            endianness: Endianness::Little,
            options: vec![SectionHeaderOption::UserApplication(program.into())],
            ..SectionHeaderBlock::default()
        };
        // A vector takes all that is written to it.
        let writer = PcapNgWriter::with_section_header(Vec::new(), section);
        let mut file = Self {
            written: vec![0; reader.ports().len()],
            writer: writer.expect("a vector takes a section header"),
            reader,
        };
        let ports: Vec<_> = file
            .reader
            .ports()
            .iter()
            .map(ToString::to_string)
            .collect();
        for name in ports {
            file.put(InterfaceDescriptionBlock {
                linktype: DataLink::ETHERNET,
                snaplen: 0,
                options: vec![
                    InterfaceDescriptionOption::IfName(name.into()),
                    InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
                ],
            });
        }
        file
    }

    /// Appends what waits to `out`, a chunk at a time.
    pub(super) fn take(&mut self, out: &mut Vec<u8>) {
        while self.writer.get_ref().len() < CHUNK
            && let Some(frame) = self.reader.next_frame()
        {
            self.put_frame(&frame);
        }
        out.append(self.writer.get_mut());
    }

    /// Captures no more, and appends what is left and how much of each port got lost.
    pub(super) fn end(&mut self, out: &mut Vec<u8>) {
        self.reader.stop();
        while let Some(frame) = self.reader.next_frame() {
            self.put_frame(&frame);
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = since.map_or(0, |since| since.as_nanos());
        let lost = self.reader.lost();
        let counts: Vec<_> = lost.into_iter().zip(self.written.clone()).collect();
        for (interface_id, (lost, written)) in (0..).zip(counts) {
            self.put(InterfaceStatisticsBlock {
                interface_id,
                // The upper half comes first, which the crate leaves to its callers.
                timestamp: u64::try_from(now).unwrap_or(u64::MAX).rotate_left(32),
                options: vec![
                    InterfaceStatisticsOption::IsbIfRecv(written + lost),
                    InterfaceStatisticsOption::IsbIfDrop(lost),
                ],
            });
        }
        out.append(self.writer.get_mut());
    }

    fn put_frame(&mut self, frame: &CapturedFrame) {
        let flags = match frame.direction {
            Direction::In => INBOUND,
            Direction::Out => OUTBOUND,
        };
        let mut options = vec![EnhancedPacketOption::Flags(flags)];
        if let Some(queue) = frame.queue {
            // The crate has no epb_queue.
            let comment = format!("queue {queue}");
            options.push(EnhancedPacketOption::Comment(comment.into()));
        }
        if let Some(reason) = frame.dropped {
            let comment = format!("dropped: {}", reason.as_str());
            options.push(EnhancedPacketOption::Comment(comment.into()));
        }
        if let Some(written) = self.written.get_mut(usize::from(frame.interface)) {
            *written += 1;
        }
        self.put(EnhancedPacketBlock {
            interface_id: frame.interface.into(),
            timestamp: Duration::from_nanos(frame.unix_ns),
            original_len: frame.wire_bytes,
            data: Cow::Borrowed(&frame.bytes),
            options,
        });
    }

    fn put<'a>(&mut self, block: impl PcapNgBlock<'a>) {
        let written = self.writer.write_pcapng_block(block);
        if let Err(error) = written.map_err(io::Error::other) {
            tracing::error!(%error, "a block of a capture can't be written");
        }
    }
}
