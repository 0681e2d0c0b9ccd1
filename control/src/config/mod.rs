//! The daemon's configuration file: TOML, every key known, every error with its line.
//!
//! ```
//! let text = "[ports.vm1]\nkind = \"vhost-user\"\nlisten = \"/run/ringway/vm1.sock\"\n";
//! let config = ringway_control::config::Config::parse(text).unwrap();
//! assert_eq!(config.ports.len(), 1);
//! ```

mod cpus;
mod file;
mod profiles;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ringway_api::{
    BalanceConfig, GroupFwdMask, IdleConfig, PortConfig, PortName, SocketAccess, SwitchConfig,
};
use serde::Deserialize;

use crate::auto::Profiles;

pub use cpus::{CpuList, CpuListError};
pub use file::listen_address;
pub use ringway_dataplane::pin_to_cpu;

/// Where the control socket is when nothing else is said.
pub const DEFAULT_CONTROL: &str = "/run/ringway/control.sock";

/// Learned entries are forgotten after this long (IEEE 802.1Q, 8.8.3).
pub const DEFAULT_FDB_AGEING: Duration = Duration::from_secs(300);

/// Entries of the forwarding database: a few hundred KiB.
pub const DEFAULT_FDB_CAPACITY: usize = 16_384;

/// Most entries that a forwarding database may be configured for: a listing of them is 128 MiB of
/// JSON.
pub const MAX_FDB_CAPACITY: usize = 1 << 20;

/// When workers go to sleep unless told.
pub const DEFAULT_IDLE: IdleConfig = IdleConfig::DEFAULT;

/// When queues move between workers unless told.
pub const DEFAULT_BALANCE: BalanceConfig = BalanceConfig::DEFAULT;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A configuration that passed all checks that have no side effects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Path of the control socket, if the file names one.
    pub control: Option<PathBuf>,
    /// Who may open the control socket, as far as the file says.
    pub control_access: SocketAccess,
    /// Who may open the sockets of vhost-user ports that don't say, as far as the file says.
    pub socket_access: SocketAccess,
    /// Worker CPUs, if the file names them.
    pub worker_cpus: Option<CpuList>,
    /// Log format, if the file names one.
    pub log_format: Option<LogFormat>,
    /// Where metrics are served over HTTP, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Directory whose sockets become ports, if the file names one.
    pub auto: Option<PathBuf>,
    /// How the ports of these sockets are.
    pub profiles: Profiles,
    /// Learned entries are forgotten after this long.
    pub fdb_ageing: Duration,
    /// Entries of the forwarding database.
    pub fdb_capacity: usize,
    /// Addresses in use move to no other port for this long.
    pub fdb_move_hold: Duration,
    /// Which reserved group addresses are forwarded.
    pub group_fwd_mask: GroupFwdMask,
    /// When workers go to sleep.
    pub idle: IdleConfig,
    /// When queues move between workers.
    pub balance: BalanceConfig,
    /// Ports, in the order of the file.
    pub ports: Vec<(PortName, PortConfig)>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            control: None,
            control_access: SocketAccess::default(),
            socket_access: SocketAccess::default(),
            worker_cpus: None,
            log_format: None,
            metrics: None,
            auto: None,
            profiles: Profiles::new(),
            fdb_ageing: DEFAULT_FDB_AGEING,
            fdb_capacity: DEFAULT_FDB_CAPACITY,
            fdb_move_hold: SwitchConfig::DEFAULT_FDB_MOVE_HOLD,
            group_fwd_mask: GroupFwdMask::DEFAULT,
            idle: DEFAULT_IDLE,
            balance: DEFAULT_BALANCE,
            ports: Vec::new(),
        }
    }
}

impl Config {
    /// Reads `text`.
    ///
    /// # Errors
    /// No TOML, an unknown key, or a value that can't be.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        file::parse(text)
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// The file can't be read, or [`Config::parse`] refuses it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let with_file = |error: ConfigError| ConfigError {
            file: Some(path.to_owned()),
            ..error
        };
        let unreadable = |error: std::io::Error| {
            with_file(ConfigError {
                file: None,
                line: None,
                what: format!("can't be read: {error}"),
                hint: "name a readable file with --config".into(),
            })
        };
        let bytes = std::fs::read(path).map_err(unreadable)?;
        let text = String::from_utf8(bytes)
            .map_err(|error| unreadable(std::io::Error::other(error.utf8_error())))?;
        Self::parse(&text).map_err(with_file)
    }
}

/// What is wrong with a configuration, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, if it is one.
    pub file: Option<PathBuf>,
    /// The line, from 1.
    pub line: Option<usize>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(out, "{}:{line}: ", file.display())?,
            (Some(file), None) => write!(out, "{}: ", file.display())?,
            (None, Some(line)) => write!(out, "line {line}: ")?,
            (None, None) => {}
        }
        out.write_str(&self.what)
    }
}

impl std::error::Error for ConfigError {}
