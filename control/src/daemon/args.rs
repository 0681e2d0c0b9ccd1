//! The command line of `ringwayd`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use ringway_api::{AccountName, SocketAccess, SocketMode, SocketPath};

use crate::config::{Config, CpuList, LogFormat, listen_address};

/// A software switch for virtual machines: vhost-user ports for guests, tap ports for the host,
/// AF_XDP ports for NICs
///
/// Runs in the foreground until SIGTERM or SIGINT, then removes its ports and sockets; SIGHUP changes
/// nothing. The tool
/// `ringway` talks to it through the control socket.
#[derive(Debug, Parser)]
#[command(name = "ringwayd", version, max_term_width = 100, after_long_help = AFTER_HELP)]
pub struct Args {
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Control socket [default: /run/ringway/control.sock]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// User, by name or number, whose the control socket is [default: the daemon's]
    #[arg(long, value_name = "USER", help_heading = ACCESS)]
    pub control_owner: Option<AccountName>,

    /// Group of the control socket [default: the daemon's]
    #[arg(long, value_name = "GROUP", help_heading = ACCESS)]
    pub control_group: Option<AccountName>,

    /// Permissions of the control socket, in octal [default: 0660]
    #[arg(long, value_name = "MODE", help_heading = ACCESS)]
    pub control_mode: Option<SocketMode>,

    /// User whose the sockets of vhost-user ports are that don't say another [default: the daemon's]
    #[arg(long, value_name = "USER", help_heading = ACCESS)]
    pub socket_owner: Option<AccountName>,

    /// Group of these sockets: that of QEMU's user, as kvm [default: the daemon's]
    #[arg(long, value_name = "GROUP", help_heading = ACCESS)]
    pub socket_group: Option<AccountName>,

    /// Permissions of these sockets, in octal [default: 0660]
    #[arg(long, value_name = "MODE", help_heading = ACCESS)]
    pub socket_mode: Option<SocketMode>,

    /// CPUs for workers, one pinned thread each, as 1,2-3 [default: the highest CPU allowed]
    #[arg(long, value_name = "LIST")]
    pub worker_cpus: Option<CpuList>,

    /// Make a port of each socket NAME.sock, or PROFILE/NAME.sock, that a QEMU makes in this directory
    /// (server=on; libvirt: mode='server'), as long as it is there
    #[arg(long, value_name = "DIRECTORY")]
    pub auto: Option<SocketPath>,

    /// Serve metrics for Prometheus over HTTP there [default without ADDRESS: 127.0.0.1:9479]
    #[arg(long, value_name = "ADDRESS:PORT", num_args = 0..=1, require_equals = true,
          default_missing_value = "127.0.0.1:9479", value_parser = listen_address)]
    pub metrics: Option<SocketAddr>,

    /// How log lines on standard error look [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Check the configuration without starting anything, and exit; tells which interfaces are waited
    /// for
    #[arg(long)]
    pub check: bool,

    /// Refuse to start while the interface of an af-xdp port is missing or down, rather than have the
    /// port wait for it
    #[arg(long)]
    pub strict: bool,
}

/// Heading of the options that tell who may open sockets.
const ACCESS: &str = "Who may open sockets";

const AFTER_HELP: &str = "\
Examples:
  ringwayd --worker-cpus 2-3
  ringwayd --socket-group kvm --control-group adm
  ringwayd --auto /run/ringway/auto --socket-group kvm
  ringwayd --metrics                      # curl http://127.0.0.1:9479/metrics
  ringwayd --config /etc/ringway/ringway.toml --check
  RUST_LOG=ringway_dataplane=debug ringwayd

Environment:
  RUST_LOG       what is logged, as in info,ringway_control=debug [default: info]
  NOTIFY_SOCKET  where READY=1 and STOPPING=1 go (systemd, Type=notify)
  WATCHDOG_USEC  feed the watchdog (WATCHDOG=1) while all workers go on (systemd, WatchdogSec=)

Exit codes:
  0  stopped by a signal, or --check found no fault
  1  refused: bad configuration, a path or CPU that can't be used, a port that can't be added
  2  usage";

impl Args {
    /// Puts what was given on the command line in place of what the file says.
    pub fn override_config(&self, config: &mut Config) {
        if let Some(control) = &self.control {
            config.control = Some(control.clone());
        }
        let given = SocketAccess {
            owner: self.control_owner.clone(),
            group: self.control_group.clone(),
            mode: self.control_mode,
        };
        config.control_access = given.or(&config.control_access);
        let given = SocketAccess {
            owner: self.socket_owner.clone(),
            group: self.socket_group.clone(),
            mode: self.socket_mode,
        };
        config.socket_access = given.or(&config.socket_access);
        if let Some(cpus) = &self.worker_cpus {
            config.worker_cpus = Some(cpus.clone());
        }
        if let Some(auto) = &self.auto {
            config.auto = Some(auto.as_path().to_owned());
        }
        if self.metrics.is_some() {
            config.metrics = self.metrics;
        }
        if let Some(format) = self.log_format {
            config.log_format = Some(format);
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn flags_win_over_the_file() {
        let text = "[daemon]\ncontrol = \"/a\"\nworker_cpus = \"0\"\nlog_format = \"json\"\n";
        let mut config = Config::parse(text).unwrap();
        Args::parse_from(["ringwayd", "--control", "/b"]).override_config(&mut config);
        assert_eq!(config.control, Some("/b".into()));
        assert_eq!(config.log_format, Some(LogFormat::Json));
        Args::parse_from(["ringwayd", "--worker-cpus", "1,2-3", "--log-format", "text"])
            .override_config(&mut config);
        assert_eq!(config.worker_cpus.as_ref().unwrap().as_slice(), [1, 2, 3]);
        assert_eq!(config.log_format, Some(LogFormat::Text));
        let text =
            "[daemon]\ncontrol_group = \"adm\"\n[sockets]\nowner = \"root\"\ngroup = \"kvm\"\n";
        let mut config = Config::parse(text).unwrap();
        let words = [
            "ringwayd",
            "--socket-group",
            "qemu",
            "--socket-mode",
            "666",
            "--control-mode",
            "600",
        ];
        Args::parse_from(words).override_config(&mut config);
        let access = |owner: &str, group: &str, mode: &str| SocketAccess {
            owner: owner.parse().ok(),
            group: group.parse().ok(),
            mode: mode.parse().ok(),
        };
        assert_eq!(config.socket_access, access("root", "qemu", "0666"));
        assert_eq!(config.control_access, access("", "adm", "0600"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
