//! What to compare, as the command line tells.

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::super::args::{FrameSize, LoadArgs};
use super::super::nic::{self, NicWay};
use super::super::switch::SwitchKind;
use crate::hint::hinted;

/// Who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LoadDriver {
    /// The synthetic guests of `ringway-bench run`
    Synth,
    /// DPDK's virtio driver in testpmd
    VirtioUser,
}

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FramePath {
    /// Between two guests, both ways
    GuestGuest,
    /// From a guest to an AF_XDP queue of a veth, at whose other end frames are counted and dropped
    GuestNic,
    /// From such a queue to a guest
    NicGuest,
}

impl FramePath {
    /// As on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::GuestGuest => "guest-guest",
            Self::GuestNic => "guest-nic",
            Self::NicGuest => "nic-guest",
        }
    }

    /// The way at the NIC, if there is one.
    pub(super) fn way(self) -> Option<NicWay> {
        match self {
            Self::GuestGuest => None,
            Self::GuestNic => Some(NicWay::ToNic),
            Self::NicGuest => Some(NicWay::FromNic),
        }
    }
}

/// Drive ringway and its peers with the same load, in turns.
#[derive(Clone, Debug, Args)]
pub(crate) struct CompareArgs {
    #[command(flatten)]
    pub(super) load: LoadArgs,
    /// Peers of ringway
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "testpmd,ovs-dpdk"
    )]
    pub(super) with: Vec<SwitchKind>,
    /// Ways that frames go, each measured by itself; those with a NIC need root, and compare with
    /// testpmd alone
    #[arg(
        long = "path",
        value_enum,
        value_name = "PATH",
        value_delimiter = ',',
        default_value = "guest-guest"
    )]
    pub(super) paths: Vec<FramePath>,
    /// Leave ringway out: the first peer stands in its place
    #[arg(long)]
    pub(super) peers_only: bool,
    /// Trials of each switch per frame size, in turns
    #[arg(long, value_name = "N", default_value_t = 9)]
    pub(super) pairs: u32,
    /// Seconds per trial
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub(super) duration: f64,
    /// Measure latency one way too, in open loop, each switch at the same rates: those of
    /// --latency-rates, and 10, 50 and 90 % of the slowest one's maximum; beside it, in the same
    /// rounds, that of the load without a switch
    #[arg(long)]
    pub(super) latency: bool,
    /// Frames per second at which latency is measured, all guests together; rates above 90 % of
    /// the slowest switch's maximum are left out
    #[arg(
        long,
        value_name = "PPS",
        value_delimiter = ',',
        default_value = "10000,100000,1000000"
    )]
    pub(super) latency_rates: Vec<f64>,
    /// Who sends and receives
    #[arg(long = "load", value_enum, default_value = "synth")]
    pub(super) driver: LoadDriver,
    /// Print one JSON object
    #[arg(short = 'j', long)]
    pub(super) json: bool,
}

impl CompareArgs {
    /// Whether there is a NIC on any path.
    pub(super) fn has_nic(&self) -> bool {
        self.paths.iter().any(|path| path.way().is_some())
    }

    /// Fails if this can't be measured.
    pub(super) fn check(&self) -> Result<()> {
        ensure!(
            self.duration > 0.0 && self.pairs > 0,
            "a comparison takes trials and time"
        );
        if self.latency {
            ensure!(
                self.driver == LoadDriver::Synth,
                "the virtio-user load can't measure latency"
            );
            self.load.check_stamps()?;
            ensure!(
                self.latency_rates.iter().all(|rate| *rate > 0.0),
                "--latency-rates are more than 0"
            );
        }
        if self.has_nic() {
            self.check_nic()?;
        }
        Ok(())
    }

    /// Fails if something is wanted that there is between guests only.
    fn check_nic(&self) -> Result<()> {
        let frames = self.load.frames.iter();
        let longest = frames.flat_map(|frame| frame.sizes()).max();
        let is_mixed = self.load.frames.contains(&FrameSize::Imix);
        let refusals = [
            (
                longest > Some(nic::MAX_FRAME),
                "frames for a NIC have at most 1514 bytes",
                "leave out longer ones from --frame",
            ),
            (
                is_mixed && self.paths.contains(&FramePath::NicGuest),
                "a NIC's far end makes frames of one size at a time",
                "leave out imix from --frame, or nic-guest from --path",
            ),
            (
                self.load.offloads(),
                "frames for a NIC are measured without offloads",
                "leave out --checksum and --tso",
            ),
            (
                self.load.queues > 1,
                "the NIC has one queue",
                "leave out --queues",
            ),
            (
                self.latency || self.load.verify,
                "latency and bytes are checked between guests only",
                "leave out --latency and --verify, or paths with a NIC",
            ),
            (
                self.driver != LoadDriver::Synth,
                "the virtio-user load sends between guests only",
                "leave out --load",
            ),
        ];
        match refusals.into_iter().find(|(is_wanted, ..)| *is_wanted) {
            Some((_, what, hint)) => Err(hinted(what, hint)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hint::hint_of;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        compare: CompareArgs,
    }

    fn parsed(line: &str) -> CompareArgs {
        let words = std::iter::once("compare").chain(line.split_whitespace());
        Cli::try_parse_from(words).unwrap().compare
    }

    #[test]
    fn paths_are_between_guests_unless_told() {
        assert_eq!(parsed("").paths, [FramePath::GuestGuest]);
        assert!(!parsed("").has_nic());
        let args = parsed("--path nic-guest,guest-guest");
        assert_eq!(args.paths, [FramePath::NicGuest, FramePath::GuestGuest]);
        assert!(args.has_nic());
        for path in FramePath::value_variants() {
            let named = parsed(&format!("--path {}", path.name()));
            assert_eq!(named.paths, [*path]);
        }
        assert!(Cli::try_parse_from(["compare", "--path", "nic"]).is_err());
    }

    #[test]
    fn what_there_is_between_guests_only_is_refused_with_a_hint() {
        let refusal = |line: &str| parsed(&format!("--path nic-guest {line}")).check_nic();
        for line in ["", "--frame 60,1514", "--layout packed --queue-size 1024"] {
            assert!(refusal(line).is_ok(), "{line}");
        }
        for line in [
            "--frame 1515",
            "--frame 64,imix",
            "--checksum",
            "--tso",
            "--queues 2",
            "--latency",
            "--verify",
            "--load virtio-user",
        ] {
            let error = refusal(line).unwrap_err();
            assert!(
                hint_of(&error).is_some_and(|hint| !hint.is_empty()),
                "{line}"
            );
            assert!(!error.to_string().contains('\n'), "{line}");
        }
        assert!(parsed("--path guest-nic --frame imix").check_nic().is_ok());
    }
}
