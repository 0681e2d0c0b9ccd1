//! The command line of `ringway`.

mod settings;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};

pub(super) use self::settings::{AddKind, SetArgs};
use super::units::Rate;
use crate::api::{
    FdbAddParams, FdbDelParams, FdbFlushParams, FdbListParams, PortDelParams, PortName,
    PortShowParams, WorkerPinParams, WorkerUnpinParams,
};

/// How long the daemon may take to answer unless told.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Operate the ringway software switch
///
/// Talks to ringwayd through its control socket. A port is what a guest (vhost-user), the host
/// (tap) or a NIC (af-xdp) is plugged into; frames are switched between all ports by MAC address.
///
/// Rx and Tx are from the switch's point of view everywhere: what a guest transmits is our Rx, what
/// it receives is our Tx. Bytes are L2 bytes without FCS; k, M, G are powers of ten, KiB, MiB, GiB
/// powers of two.
#[derive(Debug, Parser)]
#[command(name = "ringway", version, max_term_width = 100, after_help = AFTER_HELP)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    /// The daemon's control socket
    #[arg(
        short,
        long,
        value_name = "PATH",
        global = true,
        help_heading = EVERYWHERE,
        env = "RINGWAY_CONTROL"
    )]
    #[arg(default_value = crate::config::DEFAULT_CONTROL)]
    pub socket: PathBuf,

    /// Print one JSON object (docs/control-api.schema.json), also for errors: {"error": …}
    #[arg(short, long, global = true, help_heading = EVERYWHERE)]
    pub json: bool,

    /// How long the daemon may take to answer
    #[arg(long, value_name = "SECONDS", global = true, help_heading = EVERYWHERE)]
    #[arg(default_value = "10", value_parser = timeout)]
    pub timeout: Duration,

    /// What to operate on
    #[command(subcommand)]
    pub noun: Noun,
}

/// Heading of the options that all commands have.
const EVERYWHERE: &str = "Options of all commands";

const AFTER_HELP: &str = "\
Examples:
  ringway port add vm1 vhost-user --listen /run/ringway/vm1.sock
  ringway port add host tap --ifname rw0
  ringway port add uplink af-xdp --ifname eth1
  ringway port list
  ringway measure --from vm1 --to vm2 -t 10

An unknown command x runs ringway-x from PATH, with RINGWAY_CONTROL set.

Exit codes:
  0  done
  1  refused by the daemon
  2  usage
  3  daemon not reachable
  4  no answer in time (--timeout)
  5  measured below --min";

/// What to operate on.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Add, delete and look at ports
    #[command(subcommand)]
    Port(PortVerb),
    /// The forwarding database: which MAC address is behind which port
    #[command(subcommand)]
    Fdb(FdbVerb),
    /// Show which ports are in which VLANs; `port add` and `port set` say so
    #[command(after_help = VLAN_HELP)]
    Vlan,
    /// The threads that forward frames
    #[command(subcommand)]
    Worker(WorkerVerb),
    /// Show which frames are dropped, on which way and why: those that are dropped now come first
    Drops(DropsArgs),
    /// Print all counters in the text format of Prometheus
    #[command(after_help = METRICS_HELP)]
    Metrics,
    /// Measure what flows between ports, in intervals, as iperf3 does
    Measure(MeasureArgs),
    /// Capture frames of ports, to be printed, written to a file or piped into Wireshark
    Capture(CaptureArgs),
    /// Print what happens in the switch, as it happens, until interrupted
    Monitor(MonitorArgs),
    /// Version, process and uptime of the daemon
    Info,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  ringway completions bash >/etc/bash_completion.d/ringway")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of ringway and ringwayd into a directory
    #[command(hide = true)]
    Man {
        /// The directory; it must exist
        directory: PathBuf,
    },
    /// A program `ringway-x` of PATH.
    #[command(external_subcommand)]
    External(Vec<OsString>),
}

/// What to do with ports.
#[derive(Debug, Subcommand)]
pub enum PortVerb {
    /// Add a port; it forwards as soon as its guest or interface is ready
    #[command(after_help = ADD_HELP)]
    Add {
        /// Name: 1 to 63 of A-Z a-z 0-9 . _ -, starting with a letter or digit
        name: PortName,
        /// What is behind the port
        #[command(subcommand)]
        kind: AddKind,
    },
    /// Delete a port: its socket, interface and guest memory are gone afterwards
    Del(PortDelParams),
    /// Change the VLANs that a port is in; its guest or interface stays plugged in
    #[command(after_help = SET_HELP)]
    Set(SetArgs),
    /// List the ports with their counters
    #[command(after_help = LIST_HELP)]
    List,
    /// Show one port with its queue pairs, features and drops by reason, and what is done to
    /// headers on the way to each other port
    #[command(after_help = SHOW_HELP)]
    Show(PortShowParams),
}

const ADD_HELP: &str = "\
Examples:
  ringway port add vm1 vhost-user --listen /run/ringway/vm1.sock --queues 2
  ringway port add vm3 vhost-user --listen /run/ringway/vm3.sock --group kvm --mode 0660
  ringway port add vm2 vhost-user --connect /run/qemu/vm2.sock
  ringway port add host tap --ifname rw0 --mtu 9000
  ringway port add uplink af-xdp --ifname eth1 --mode zero-copy
  ringway port add vm4 vhost-user --listen /run/ringway/vm4.sock --tag 10

VLANs are told as Open vSwitch has them. A port without such options is a trunk of all VLANs; its
untagged frames are in none. As long as no port has any, tags pass and separate nothing.";

const SET_HELP: &str = "\
What is given replaces all that was said of the port's VLANs. What was learned behind the port is
forgotten; static entries stay in their VLAN.

Examples:
  ringway port set vm1 --tag 10                          # access port of VLAN 10
  ringway port set uplink --trunks 10,20-30              # trunk; untagged frames are dropped
  ringway port set uplink --trunks 10,20 --tag 10 --vlan-mode native-untagged
  ringway port set uplink --trunks 100 --vlan-ethertype 802.1ad
  ringway port set vm2 --tag 100 --vlan-mode dot1q-tunnel
  ringway port set vm1 --no-vlan                         # trunk of all, as at first";

const VLAN_HELP: &str = "\
VLANs with the same ports are one line. Nothing is listed as long as no port says which VLANs it is
in: then tags pass as they are and separate nothing.

Columns:
  VLAN      0 is where untagged frames are of ports that say nothing
  TAGGED    ports that frames of the VLAN leave with its tag
  UNTAGGED  ports that they leave without";

const METRICS_HELP: &str = "\
`ringwayd --metrics` serves the same over HTTP, at 127.0.0.1:9479/metrics. Receive is what came from
a port (what its guest transmitted), transmit what went to it.";

const LIST_HELP: &str = "\
Columns:
  STATE      impaired: a guest is served in part only, or another program has the tap open too;
             `ringway port show` says what is in the way
  QUEUES     queue pairs: for vhost-user the most that the guest may use, - all of the NIC's
  MTU        L3 MTU as configured; - takes the front-end's or the interface's
  RX         frames and L2 bytes taken from the port: what its guest transmitted
  TX         frames and L2 bytes delivered to the port: what its guest received
  DROPS      frames from and for the port that were dropped; `ringway port show` tells why
  MACS       MAC addresses known behind the port
All counters are since the port was added.";

const SHOW_HELP: &str = "\
Offloads, and how often the switch did them:
  rx offloads  what frames from the port may ask for: a checksum to be completed (checksum), TCP or
               UDP over IPv4 or IPv6 to be segmented (tso4, tso6, uso4, uso6; ecn: TCP with a signal
               of congestion)
  tx offloads  what the port takes of these
  tx checksums frames to the port whose checksum the switch completed
  tx gso       frames to the port that the switch cut into segments
Header actions, the most that any frame of the port needs:
  pass       as it is: the destination takes all that the port may ask for
  complete_checksum, segment, segment_and_complete_checksum
             the switch does what the destination does not take; offloads that it does take pass
Rings of queues, by their entries:
  resumed    it goes on at its used index, since the front-end said 0 of a ring that had been used
Columns of queues are named as those of `ringway port list` and `ringway worker list`.";

/// What to do with the forwarding database.
#[derive(Debug, Subcommand)]
pub enum FdbVerb {
    /// List the entries
    #[command(after_help = FDB_LIST_HELP)]
    List(FdbListParams),
    /// Add a static entry, or make a learned one static: it neither ages nor moves
    Add(FdbAddParams),
    /// Delete an entry, static or learned
    Del(FdbDelParams),
    /// Forget learned entries; static ones stay
    Flush(FdbFlushParams),
}

const FDB_LIST_HELP: &str = "\
Columns:
  VLAN       0 is where untagged frames are of ports that say nothing of VLANs
  TYPE       static entries are configured: they neither age nor move
  LAST SEEN  since a frame from the address came";

/// What to do with workers.
#[derive(Debug, Subcommand)]
pub enum WorkerVerb {
    /// List the workers with the share of time they were busy
    #[command(after_help = WORKER_LIST_HELP)]
    List,
    /// Show one worker, or all, with the queues that it polls
    #[command(after_help = WORKER_SHOW_HELP)]
    Show {
        /// Its number [default: all]
        index: Option<u16>,
    },
    /// Have a worker poll a queue, whatever its load; no frame is lost
    #[command(after_help = PIN_HELP)]
    Pin(WorkerPinParams),
    /// Leave it to the daemon again which worker polls a queue
    Unpin(WorkerUnpinParams),
}

const WORKER_LIST_HELP: &str = "\
Columns:
  QUEUES     queue pairs that it polls
  ACTIVE     of these, how many are polled now; the others wake it
  NOW        busy share of the last interval over which loads were measured (5 s unless configured)
  BUSY       share of time in turns that moved frames, since the daemon started
  POLLING    share of time looking for frames in vain
  CONTENDED  bursts that found a ring in other hands: another worker's, or the session's
  SLEEPS     times it slept until it was woken";

const WORKER_SHOW_HELP: &str = "\
Lists the queue pairs that took frames or are pinned; -j lists all.

Columns:
  PACKETS    frames taken per second, in the last interval over which loads were measured
  BITRATE    L2 bits taken per second, in that interval
  SHARE      what it cost in that interval, as part of a core: estimated from frames and bytes";

const PIN_HELP: &str = "\
A pinned queue stays with its worker until it is unpinned or its port deleted; `pins` of the port in
the configuration file pins it from the start. Others move from busy workers to idle ones, unless
`rebalance = false` is configured.

Examples:
  ringway worker pin vm1 0 1       # queue 0 of port vm1 to worker 1
  ringway worker unpin vm1 0";

/// Whose drops to show.
#[derive(Debug, ClapArgs)]
#[command(after_help = DROPS_HELP)]
pub struct DropsArgs {
    /// Only what comes from this port or is for it
    #[arg(long, value_name = "PORT")]
    pub port: Option<PortName>,
    /// Over how long the rates are taken, 0.1 or more
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
}

const DROPS_HELP: &str = "\
Only reasons that occurred are listed, with a sentence for each below the table. A worker tells
1,024 pairs of ports apart; `ringway port show` counts those of further pairs too.

Columns:
  FROM, TO         where the frames came from and which port they were for; (none) are those
                   without a destination or that broke a rule
  REASON           why they were not delivered
  NOW              frames per second in the interval; - is none
  SINCE THE START  frames since both ports were added

Examples:
  ringway drops
  ringway drops --port vm1 -i 10 -j";

/// What to measure, and for how long.
#[derive(Debug, ClapArgs)]
#[command(after_help = MEASURE_HELP)]
pub struct MeasureArgs {
    /// Only what comes from this port
    #[arg(long, value_name = "PORT")]
    pub from: Option<PortName>,
    /// Only what goes to this port
    #[arg(long, value_name = "PORT")]
    pub to: Option<PortName>,
    /// How long; 0 until interrupted
    #[arg(short, long, value_name = "SECONDS", default_value = "10", value_parser = duration)]
    pub time: Duration,
    /// Length of the intervals, 0.1 or more
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// Exit with 5 if the sum of all pairs is below RATE on average
    #[arg(long, value_name = "RATE")]
    pub min: Option<Rate>,
}

const MEASURE_HELP: &str = "\
Prints a line for each pair of ports that moved frames in an interval, then the averages and how
busy the workers were. Interrupting it (Ctrl-C) prints the averages of what was measured.

RATE is a number, k, M, G or T (powers of ten), and a unit: bit/s or bps (also if none is given) for
L2 bits per second, pps for packets per second: 1.5G, 800Mbit/s, 2Mpps.

Columns:
  PAIR       where the frames came from and went to; (none) are frames without a destination
  INTERVAL   seconds since the start, by the daemon's monotonic clock
  BITRATE    L2 bits delivered per second, without FCS
  PACKETS    frames delivered per second, each flooded copy counted; a TSO frame counts once, and as
             many times as it has segments if the destination does not take it whole
  DROPS      frames that the destination could not take, by reason

Examples:
  ringway measure
  ringway measure --from vm1 --to vm2 -t 60 -i 10 -j
  ringway measure --to vm2 --min 1.5G && echo fast enough";

/// What to capture.
#[derive(Debug, ClapArgs)]
#[command(after_help = CAPTURE_HELP)]
pub struct CaptureArgs {
    /// The ports; what follows the last one is the filter
    #[arg(required = true, value_name = "PORT… [FILTER")]
    pub words: Vec<String>,
    /// Write a pcapng file, - to standard output, rather than print a line for each frame
    #[arg(short, long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// Most bytes to keep of each frame [default: all]
    #[arg(short = 'l', long, value_name = "BYTES")]
    pub snap_bytes: Option<u32>,
    /// The filter, if its first word is the name of a port
    #[arg(short, long, value_name = "FILTER")]
    pub filter: Option<String>,
}

const CAPTURE_HELP: &str = "\
Frames are captured on their way from a port into the switch (In) and out of it (Out), each port
being an interface of the file; a frame from one captured port to another is there twice. What is
not delivered is there with a comment that says why (dropped: REASON). On the way out, too, frames
are as their source sent them: up to 64 KiB long if they are to be segmented, without the
checksums that are left to others, with the VLAN tags of where they come from.

FILTER is that of tcpdump (pcap-filter(7)). Capturing holds up no frame: what the client does not
read in time is not copied, and counted: at the end, and in the file (Interface Statistics Block).
A frame that waited for a destination and was dropped for it is counted by `ringway drops` alone.
Ctrl-C ends it.

Examples:
  ringway capture vm1
  ringway capture vm1 vm2 -w trace.pcapng tcp port 80
  ringway capture uplink -w - | wireshark -k -i -
  ringway capture uplink -w - | tshark -i -";

/// How to print events.
#[derive(Clone, Copy, Debug, ClapArgs)]
#[command(after_help = MONITOR_HELP)]
pub struct MonitorArgs {
    /// Print when each event was noticed (UTC)
    #[arg(short, long)]
    pub timestamps: bool,
}

const MONITOR_HELP: &str = "\
Prints a line for each event: ports that are added, removed, up, impaired or down; front-ends that
come and go, and the features negotiated; addresses learned, moved and forgotten, within 0.1 s;
addresses refused, spoof attempts and floods dropped, counted for each port once a second; what was
refused to a front-end. Ctrl-C ends it, and so does a reader that goes.

Whoever reads too slowly for 16,384 events to wait finds a gap that tells how many are missing. 100
events in 10 s are told that one port's guest or front-end causes; more are counted (suppressed).
-j prints a JSON object a line (docs/control-api.schema.json, notifications), with time and number.

Examples:
  ringway monitor -t
  ringway monitor -j | jq 'select(.event == \"spoof_attempts\")'";

fn timeout(text: &str) -> Result<Duration, String> {
    match duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("give more than 0 seconds".into()),
        error => error,
    }
}

/// Shortest interval: counters are published in batches, so shorter ones show the batches.
const MIN_INTERVAL: Duration = Duration::from_millis(100);

fn interval(text: &str) -> Result<Duration, String> {
    match duration(text) {
        Ok(duration) if duration < MIN_INTERVAL => Err("give 0.1 seconds or more".into()),
        result => result,
    }
}

/// Longest time that can be asked for: ten years, far from the end of any clock.
const MAX_SECONDS: f64 = 3.2e8;

fn duration(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=MAX_SECONDS).contains(&seconds) => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err("give a number of seconds, as 10 or 0.5".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::api::{PortConfig, SocketSpec};

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn times_that_make_no_sense_are_refused() {
        for text in ["", "x", "-1", "nan", "inf", "1e300"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(interval("0.05").is_err() && interval("0").is_err());
        assert!(timeout("0").is_err());
        assert_eq!(timeout("10").unwrap(), DEFAULT_TIMEOUT);
    }

    #[test]
    fn relative_paths_become_absolute_before_they_are_sent() {
        let args = Args::parse_from(["ringway", "port", "add", "a", "vhost-user", "--listen", "s"]);
        let Noun::Port(PortVerb::Add { kind, .. }) = args.noun else {
            panic!("another noun");
        };
        let PortConfig::VhostUser(config) = kind.config().unwrap() else {
            panic!("another kind");
        };
        let SocketSpec::Listen(path) = config.socket else {
            panic!("another end");
        };
        assert!(path.as_path().is_absolute());
    }
}
