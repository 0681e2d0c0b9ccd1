//! The settings of a port on the command line.

use clap::{Args as ClapArgs, Subcommand};

use crate::api::{
    AccountName, AfXdpConfig, BadValue, BusyPoll, FdbLimit, FloodLimit, IfName, Mtu, OnLoop,
    PortConfig, PortName, PortSetParams, QueuePairs, SocketAccess, SocketMode, SocketPath,
    SocketSpec, TapConfig, UmemFrames, VhostUserConfig, VlanConfig, VlanEthertype, VlanMode,
    VlanNumbers, VlanTag, XdpMode,
};

/// What is behind a new port.
#[derive(Debug, Subcommand)]
pub enum AddKind {
    /// A guest, through a vhost-user socket
    #[command(group(clap::ArgGroup::new("path").required(true).args(["listen", "connect"])))]
    VhostUser {
        /// Wait at this path for the front-end (QEMU is the client)
        #[arg(long, value_name = "PATH", value_parser = socket_path)]
        listen: Option<SocketPath>,
        /// Connect to this path, again and again (QEMU is the server)
        #[arg(long, value_name = "PATH", value_parser = socket_path)]
        connect: Option<SocketPath>,
        /// User, by name or number, whose the socket is [default: as ringwayd has it]
        #[arg(long, value_name = "USER", conflicts_with = "connect")]
        owner: Option<AccountName>,
        /// Group of the socket: that of QEMU's user [default: as ringwayd has it]
        #[arg(long, value_name = "GROUP", conflicts_with = "connect")]
        group: Option<AccountName>,
        /// Permissions of the socket, in octal [default: as ringwayd has it, or 0660]
        #[arg(long, value_name = "MODE", conflicts_with = "connect")]
        mode: Option<SocketMode>,
        /// Most queue pairs that the guest may use, 1 to 64 [default: 8]
        #[arg(long, value_name = "N")]
        queues: Option<QueuePairs>,
        /// Give the guest only whole frames with their checksums. For one that switches its receive
        /// offloads off at run time, as with an XDP program: QEMU does not tell
        #[arg(long)]
        no_guest_offloads: bool,
        /// Offer the guest no packed rings. For a front-end that has no such setting of its own, as
        /// user-mode Linux; QEMU's NICs have split rings unless told packed=on
        #[arg(long)]
        no_packed: bool,
        #[command(flatten)]
        common: AddCommon,
    },
    /// A tap interface of the host; needs root
    Tap {
        /// Interface name; created if there is none
        #[arg(long, value_name = "IF")]
        ifname: IfName,
        /// Queue pairs to open, 1 to 64 [default: 1]
        #[arg(long, value_name = "N")]
        queues: Option<QueuePairs>,
        /// Leave the interface in place when the port goes
        #[arg(long)]
        persist: bool,
        /// Exchange only whole frames with their checksums with the interface: no checksums left to
        /// others, no segmentation. Slower; for what is behind the interface and can't take them
        #[arg(long)]
        no_offload: bool,
        #[command(flatten)]
        common: AddCommon,
    },
    /// Queues of a NIC or veth, past the host's network stack (AF_XDP); needs root
    #[command(after_help = AF_XDP_HELP)]
    AfXdp {
        /// Interface name; it exists and is up
        #[arg(long, value_name = "IF")]
        ifname: IfName,
        /// Queues to take, from the first on, 1 to 64 [default: all that the interface has]
        #[arg(long, value_name = "N")]
        queues: Option<QueuePairs>,
        /// How frames are exchanged with the kernel [default: auto]
        #[arg(long)]
        mode: Option<XdpMode>,
        /// Frames of memory for each queue, half of them each way: a power of two, 128 to 65536
        /// [default: 4096]
        #[arg(long, value_name = "N")]
        umem_frames: Option<UmemFrames>,
        /// Have the kernel poll the NIC for so long, 1 to 1000, rather than wait for interrupts
        #[arg(long, value_name = "MICROSECONDS")]
        busy_poll_us: Option<BusyPoll>,
        /// Leave TCP segments as they come, rather than join them for ports that take such frames
        #[arg(long)]
        no_gro: bool,
        #[command(flatten)]
        common: AddCommon,
    },
}

const AF_XDP_HELP: &str = "\
All frames that arrive in the queues taken go to the switch; those of other queues go to the host as
before. The port attaches an XDP program of its own, which goes with the port or the daemon, however
it ends; an interface that has a program already is refused. A frame of memory takes 2 KiB, or 4 KiB
if the MTU is above 1770; up to 9000 is carried if the driver takes frames in several buffers.

Examples:
  ringway port add uplink af-xdp --ifname eth1
  ringway port add uplink af-xdp --ifname eth1 --queues 2 --mode zero-copy --busy-poll-us 20";

/// Which VLANs a port is in.
#[derive(Clone, Debug, ClapArgs)]
#[command(next_help_heading = "VLANs")]
pub struct VlanArgs {
    /// VLAN of an access port, or a trunk's native VLAN, or a tunnel's service VLAN, 1 to 4094
    #[arg(long, value_name = "VLAN")]
    pub tag: Option<VlanTag>,
    /// VLANs of a trunk, as 10,20-30 [default: all]
    #[arg(long, value_name = "VLANS")]
    pub trunks: Option<VlanNumbers>,
    /// How the port tells its VLANs [default: access with a tag alone, else trunk]
    #[arg(long, value_name = "MODE")]
    pub vlan_mode: Option<VlanMode>,
    /// Which tags a trunk has [default: 802.1q]
    #[arg(long, value_name = "TYPE")]
    pub vlan_ethertype: Option<VlanEthertype>,
}

impl VlanArgs {
    fn config(&self) -> Result<VlanConfig, BadValue> {
        let ethertype = self.vlan_ethertype.unwrap_or_default();
        VlanConfig::new(self.vlan_mode, self.tag, self.trunks.clone(), ethertype)
    }
}

/// What to change of a port.
#[derive(Debug, ClapArgs)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(true)
    .args(["tag", "trunks", "vlan_mode", "vlan_ethertype", "no_vlan"])))]
pub struct SetArgs {
    /// The port
    pub name: PortName,
    #[command(flatten)]
    pub vlan: VlanArgs,
    /// Be a trunk of all VLANs, whose untagged frames are in none
    #[arg(long, conflicts_with_all = ["tag", "trunks", "vlan_mode", "vlan_ethertype"])]
    #[arg(help_heading = "VLANs")]
    pub no_vlan: bool,
}

impl SetArgs {
    /// The method's parameters.
    ///
    /// # Errors
    /// The VLANs contradict each other.
    pub fn params(&self) -> Result<PortSetParams, BadValue> {
        Ok(PortSetParams {
            name: self.name.clone(),
            vlan: Some(self.vlan.config()?),
        })
    }
}

/// Settings of all kinds of port.
#[derive(Clone, Debug, ClapArgs)]
pub struct AddCommon {
    /// L3 MTU in bytes, 68 to 65521 [default: the front-end's or the interface's]
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<Mtu>,
    /// Most MAC addresses learned behind the port [default: 4096]
    #[arg(long, value_name = "N")]
    pub fdb_limit: Option<FdbLimit>,
    /// Most copies per second that floods of its frames make, 0 for no limit [default: 1000000]
    #[arg(long, value_name = "N")]
    pub flood_limit: Option<FloodLimit>,
    /// What happens where many of its frames have addresses in use behind other ports [default: alarm]
    #[arg(long, value_name = "WHAT")]
    pub on_loop: Option<OnLoop>,
    #[command(flatten)]
    pub vlan: VlanArgs,
}

impl AddKind {
    /// The port's configuration: what was not said is as it is when nothing is said.
    ///
    /// # Errors
    /// The VLANs contradict each other.
    pub fn config(&self) -> Result<PortConfig, BadValue> {
        Ok(match self {
            Self::VhostUser {
                listen,
                connect,
                owner,
                group,
                mode,
                queues,
                no_guest_offloads,
                no_packed,
                common,
            } => {
                let listen = listen.clone().map(SocketSpec::Listen);
                let socket = listen.or_else(|| connect.clone().map(SocketSpec::Connect));
                // The group makes clap refuse a command line with neither.
                let default = VhostUserConfig::new(socket.expect("a path is given"));
                PortConfig::VhostUser(VhostUserConfig {
                    access: SocketAccess {
                        owner: owner.clone(),
                        group: group.clone(),
                        mode: *mode,
                    },
                    queues: queues.unwrap_or(default.queues),
                    guest_offloads: !no_guest_offloads,
                    packed: !no_packed,
                    mtu: common.mtu,
                    fdb_limit: common.fdb_limit.unwrap_or_default(),
                    flood_limit: common.flood_limit.unwrap_or_default(),
                    on_loop: common.on_loop.unwrap_or_default(),
                    vlan: common.vlan.config()?,
                    ..default
                })
            }
            Self::Tap {
                ifname,
                queues,
                persist,
                no_offload,
                common,
            } => {
                let default = TapConfig::new(ifname.clone());
                PortConfig::Tap(TapConfig {
                    queues: queues.unwrap_or(default.queues),
                    mtu: common.mtu,
                    persist: *persist,
                    offload: !no_offload,
                    fdb_limit: common.fdb_limit.unwrap_or_default(),
                    flood_limit: common.flood_limit.unwrap_or_default(),
                    on_loop: common.on_loop.unwrap_or_default(),
                    vlan: common.vlan.config()?,
                    ..default
                })
            }
            Self::AfXdp {
                ifname,
                queues,
                mode,
                umem_frames,
                busy_poll_us,
                no_gro,
                common,
            } => {
                let default = AfXdpConfig::new(ifname.clone());
                PortConfig::AfXdp(AfXdpConfig {
                    queues: *queues,
                    mtu: common.mtu,
                    mode: mode.unwrap_or(default.mode),
                    umem_frames: umem_frames.unwrap_or(default.umem_frames),
                    busy_poll_us: *busy_poll_us,
                    gro: !no_gro,
                    fdb_limit: common.fdb_limit.unwrap_or_default(),
                    flood_limit: common.flood_limit.unwrap_or_default(),
                    on_loop: common.on_loop.unwrap_or_default(),
                    vlan: common.vlan.config()?,
                    ..default
                })
            }
        })
    }
}

/// A path made absolute: the daemon has another working directory.
fn socket_path(text: &str) -> Result<SocketPath, BadValue> {
    match std::path::absolute(text) {
        Ok(path) => SocketPath::try_from(&*path),
        Err(_) => text.parse(),
    }
}
