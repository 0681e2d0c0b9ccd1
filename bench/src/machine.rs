//! The machine and the revision that figures are from.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use crate::process::run_ok;

/// How long git may take to name a revision.
const GIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a measurement was taken.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// Model of its CPUs.
    pub(crate) cpu: String,
    /// CPUs that this process may use.
    pub(crate) cpus: usize,
    /// Release of its kernel.
    pub(crate) kernel: String,
    /// The commit that this program was built from, if it still lies in its checkout.
    pub(crate) revision: Option<String>,
}

impl Machine {
    /// This machine.
    pub(crate) fn here() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: cpu_model(&cpuinfo).to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel.trim().to_owned(),
            revision: revision(),
        }
    }
}

fn cpu_model(cpuinfo: &str) -> &str {
    cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown CPU", |(_, model)| model)
}

fn revision() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let mut git = Command::new("git");
    git.arg("-C")
        .arg(program.parent().unwrap_or(Path::new("/")))
        .args(["describe", "--always", "--dirty"]);
    let said = run_ok(&mut git, GIT_TIMEOUT).ok()?;
    Some(said.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cpus_model_is_told() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU: 3\nmodel\t\t: 1\nmodel name\t: B\n";
        assert_eq!(cpu_model(cpuinfo), "Some CPU: 3");
        assert_eq!(cpu_model(""), "unknown CPU");
    }
}
