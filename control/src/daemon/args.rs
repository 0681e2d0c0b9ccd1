//! The command line of `ringwayd`.

use std::path::PathBuf;

use clap::Parser;

use crate::config::{Config, CpuList, LogFormat};

/// A software switch for virtual machines: vhost-user ports for guests, tap ports for the host,
/// AF_XDP ports for NICs
///
/// Runs in the foreground until SIGTERM or SIGINT, then removes its ports and sockets. The tool
/// `ringway` talks to it through the control socket.
#[derive(Debug, Parser)]
#[command(name = "ringwayd", version, max_term_width = 100, after_long_help = AFTER_HELP)]
pub struct Args {
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Control socket, mode 0660 [default: /run/ringway/control.sock]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// CPUs for workers, one pinned thread each, as 1,2-3 [default: the highest CPU allowed]
    #[arg(long, value_name = "LIST")]
    pub worker_cpus: Option<CpuList>,

    /// How log lines on standard error look [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Check the configuration without starting anything, and exit
    #[arg(long)]
    pub check: bool,
}

const AFTER_HELP: &str = "\
Examples:
  ringwayd --worker-cpus 2-3
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
        if let Some(cpus) = &self.worker_cpus {
            config.worker_cpus = Some(cpus.clone());
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
        assert_eq!(config.worker_cpus.unwrap().as_slice(), [1, 2, 3]);
        assert_eq!(config.log_format, Some(LogFormat::Text));
    }

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
