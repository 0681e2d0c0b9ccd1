//! What a load is like, as `run` and `compare` are told.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use ringway_control::config::CpuList;
use ringway_guest::Layout;
use serde::Serialize;

use super::frame::{MAX_FLOWS, MAX_FRAME, MAX_PLAIN, MIN_FRAME, MIN_STAMPED, Style};
use super::guest::GuestShape;
use super::huge::{HugePages, free_pages, pages_of_load};
use super::load::LoadConfig;
use super::switch::SwitchSetup;
use crate::hint::hinted;

/// IMIX: 7 small, 4 medium, 1 large.
const IMIX: [u32; 12] = [64, 64, 64, 64, 64, 64, 64, 576, 576, 576, 576, 1500];

/// What the load is like, for `run` and `compare`.
#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArgs {
    /// Frame sizes in L2 bytes without the FCS, each measured by itself; `imix` is a mix of 64,
    /// 576 and 1500; above 9018 bytes as TCP segments for offload
    #[arg(
        long = "frame",
        value_name = "BYTES",
        value_delimiter = ',',
        default_value = "64,512,1500"
    )]
    pub(crate) frames: Vec<FrameSize>,
    /// Layout of the guests' rings
    #[arg(long, value_enum, default_value = "split")]
    pub(crate) layout: LayoutArg,
    /// Without VIRTIO_NET_F_MRG_RXBUF
    #[arg(long)]
    no_mergeable: bool,
    /// Without VIRTIO_F_IN_ORDER, which is used where it is offered
    #[arg(long)]
    no_in_order: bool,
    /// With VIRTIO_RING_F_EVENT_IDX
    #[arg(long)]
    event_idx: bool,
    /// Give the virtio-net header a descriptor of its own
    #[arg(long)]
    chained: bool,
    /// Put the two descriptors of a chain into an indirect table; implies --chained
    #[arg(long)]
    indirect: bool,
    /// Leave checksums to the device (VIRTIO_NET_F_CSUM and GUEST_CSUM); larger frames do so anyway
    #[arg(long)]
    checksum: bool,
    /// Negotiate segmentation offload for small frames too
    #[arg(long)]
    tso: bool,
    /// Pages of 4 KiB instead of hugepages, for guests and DPDK
    #[arg(long)]
    no_huge: bool,
    /// Entries of each ring, a power of two; the default is QEMU's
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) queue_size: u16,
    /// Queue pairs of each guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) queues: u16,
    /// UDP flows of each guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    flows: u16,
    /// CPU of the load [default: the last but one that is allowed]
    #[arg(long, value_name = "CPU")]
    load_cpu: Option<usize>,
    /// CPU of the switch's forwarding thread [default: the last that is allowed]
    #[arg(long, value_name = "CPU")]
    switch_cpu: Option<usize>,
    /// Compare the bytes of what arrives: all in open loop, else those of 0.2 s after the
    /// measurement
    #[arg(long)]
    pub(crate) verify: bool,
}

#[derive(Clone, Copy, Debug, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LayoutArg {
    Split,
    Packed,
}

/// One size or the mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameSize {
    Fixed(u32),
    Imix,
}

impl std::str::FromStr for FrameSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "imix" {
            return Ok(Self::Imix);
        }
        match text.parse() {
            Ok(size) if (MIN_FRAME..=MAX_FRAME).contains(&size) => Ok(Self::Fixed(size)),
            _ => Err(format!(
                "a frame has {MIN_FRAME} to {MAX_FRAME} bytes, or is `imix`"
            )),
        }
    }
}

impl std::fmt::Display for FrameSize {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(size) => out.pad(&size.to_string()),
            Self::Imix => out.pad("imix"),
        }
    }
}

/// Frames for which switches are set up alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FrameClass {
    /// Within an MTU of 1,500.
    Standard,
    /// Within one of 9,000.
    Jumbo,
    /// For segmentation offload.
    Segmented,
}

impl FrameSize {
    /// How switches are set up for it.
    pub(crate) fn class(self) -> FrameClass {
        match self.sizes().iter().max() {
            Some(size) if *size > MAX_PLAIN => FrameClass::Segmented,
            Some(size) if *size > 1518 => FrameClass::Jumbo,
            _ => FrameClass::Standard,
        }
    }

    /// Sizes of successive frames.
    pub(crate) fn sizes(self) -> Vec<u32> {
        match self {
            Self::Fixed(size) => vec![size],
            Self::Imix => IMIX.to_vec(),
        }
    }
}

impl LoadArgs {
    /// True if offloads are wanted.
    pub(crate) fn offloads(&self) -> bool {
        self.checksum || self.tso
    }

    /// What a switch is started with for frames of this class.
    pub(crate) fn switch_setup(
        &self,
        class: FrameClass,
        (cpu, other_cpu): (usize, usize),
        ports: u16,
        nic: bool,
    ) -> SwitchSetup {
        SwitchSetup {
            cpu,
            other_cpu,
            ports,
            nic,
            queues: self.queues,
            class,
            tso: self.tso || class == FrameClass::Segmented,
            huge: !self.no_huge,
        }
    }

    /// Fails if frames of this size have no room for a sequence number.
    pub(crate) fn check_stamps(&self) -> Result<()> {
        let small = |size: &FrameSize| size.sizes().iter().any(|size| *size < MIN_STAMPED);
        ensure!(
            !self.frames.iter().any(small),
            "a frame with a sequence number has {MIN_STAMPED} bytes or more"
        );
        Ok(())
    }

    /// CPUs of switch and load.
    pub(crate) fn cpus(&self) -> Result<(usize, usize)> {
        let allowed = CpuList::allowed().context("can't tell which CPUs are allowed")?;
        let allowed = allowed.as_slice();
        let pick = |wanted: Option<usize>, taken: Option<usize>| {
            let free = |cpu: &usize| Some(*cpu) != taken;
            wanted.or_else(|| allowed.iter().copied().rev().find(free))
        };
        let (Some(switch), Some(load)) = (
            pick(self.switch_cpu, self.load_cpu),
            pick(self.load_cpu, self.switch_cpu.or(allowed.last().copied())),
        ) else {
            return Err(hinted(
                "one CPU only: switch and load need one each",
                "allow for a second one (taskset, cpuset, container limits)",
            ));
        };
        ensure!(switch != load, "switch and load can't share CPU {switch}");
        for cpu in [switch, load] {
            ensure!(
                allowed.contains(&cpu),
                "CPU {cpu} is not allowed to this process"
            );
        }
        Ok((switch, load))
    }

    /// The load for one size on these sockets.
    pub(crate) fn config(
        &self,
        size: FrameSize,
        sockets: &[PathBuf],
        place: LoadPlace,
    ) -> Result<LoadConfig> {
        ensure!(
            self.queue_size.is_power_of_two() && (4..=32_768).contains(&self.queue_size),
            "a queue has 4 to 32768 entries, a power of two"
        );
        ensure!(self.flows <= MAX_FLOWS, "at most {MAX_FLOWS} flows");
        ensure!(self.queues > 0, "at least one queue pair");
        Ok(LoadConfig {
            sockets: sockets.to_vec(),
            listen: place.listen,
            shape: GuestShape {
                layout: match self.layout {
                    LayoutArg::Split => Layout::Split,
                    LayoutArg::Packed => Layout::Packed,
                },
                mergeable: !self.no_mergeable,
                in_order: !self.no_in_order,
                event_idx: self.event_idx,
                chained: self.chained || self.indirect,
                indirect: self.indirect,
                tso: self.tso,
                checksum: self.checksum,
                queue_size: self.queue_size,
                queues: self.queues,
                huge: place.huge,
            },
            sizes: size.sizes(),
            style: Style {
                checksum: self.checksum,
                macs_rewritten: place.macs_rewritten,
            },
            flows: self.flows.max(1),
            verify: self.verify,
        })
    }

    /// Hugepages for programs that can't do without so many and, as far as there are any, for the
    /// guests of the largest load; whether the guests have them. Guests alone take what is free.
    pub(crate) fn huge_pages(
        &self,
        programs: u64,
        guests: u16,
    ) -> Result<(Option<HugePages>, bool)> {
        if self.no_huge {
            return Ok((None, false));
        }
        let mut most_bytes = 0;
        for size in &self.frames {
            let config = self.config(*size, &[], LoadPlace::default())?;
            most_bytes = most_bytes.max(config.memory_bytes(guests));
        }
        let of_guests = pages_of_load(most_bytes);
        if programs == 0 {
            return Ok((None, of_guests.is_some_and(|pages| free_pages() >= pages)));
        }
        let pages = HugePages::reserve(programs + of_guests.unwrap_or(0))?;
        Ok((Some(pages), of_guests.is_some()))
    }
}

/// What surrounds a load.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoadPlace {
    /// Guests have hugepages.
    pub(crate) huge: bool,
    /// The switch puts its own address in place of the sender's.
    pub(crate) macs_rewritten: bool,
    /// The switch connects to the guests.
    pub(crate) listen: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked_and_shown_as_they_are_written() {
        for good in ["60", "64", "65000", "65549", "imix"] {
            assert_eq!(good.parse::<FrameSize>().unwrap().to_string(), good);
        }
        for bad in ["59", "65550", "-1", "mix", ""] {
            assert!(bad.parse::<FrameSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_class_of_a_size_tells_how_switches_are_set_up() {
        let class = |text: &str| text.parse::<FrameSize>().unwrap().class();
        assert_eq!(class("imix"), FrameClass::Standard);
        assert_eq!(class("1518"), FrameClass::Standard);
        assert_eq!(class("1519"), FrameClass::Jumbo);
        assert_eq!(class("9018"), FrameClass::Jumbo);
        assert_eq!(class("9019"), FrameClass::Segmented);
    }
}
