//! A network namespace of the host's side: what the bench makes lives in it and goes with it.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::hint::{hinted, with_hint};
use crate::process::{Origin, ProcessError, behind, find, run_ok};

/// Names of the namespaces: the prefix, the bench's pid, a tag.
const PREFIX: &str = "ringway-lab-";

/// Where iproute2 keeps its names.
const NAMES: &str = "/run/netns";

/// Bound on each `ip` command and the like.
const IP_TIMEOUT: Duration = Duration::from_secs(10);

/// A named namespace, removed when dropped.
#[derive(Debug)]
pub(crate) struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes an empty namespace with only its loopback up and IPv6 off: router solicitations and
    /// duplicate address detection would be noise in the measurements.
    pub(crate) fn create(tag: &str) -> Result<NetNs> {
        let name = format!("{PREFIX}{}-{tag}", std::process::id());
        run_ok(ip()?.args(["netns", "add", &name]), IP_TIMEOUT).map_err(|error| {
            let what = with_hint(&error.into());
            hinted(what, "the lab needs root: run it with sudo")
        })?;
        let namespace = NetNs { name };
        namespace.ip(&["link", "set", "lo", "up"])?;
        let quiet = "for f in all default; do \
                     [ ! -w /proc/sys/net/ipv6/conf/$f/disable_ipv6 ] || \
                     echo 1 >/proc/sys/net/ipv6/conf/$f/disable_ipv6; done";
        let mut shell = Command::new("sh");
        shell.args(["-c", quiet]);
        run_ok(&mut namespace.inside(&shell)?, IP_TIMEOUT)?;
        Ok(namespace)
    }

    /// Removes what labs left behind that were killed before they could.
    pub(crate) fn remove_stale() {
        let Ok(entries) = std::fs::read_dir(NAMES) else {
            return;
        };
        for name in entries.flatten().map(|entry| entry.file_name()) {
            let name = name.to_string_lossy().into_owned();
            if owner_of(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                drop(NetNs { name });
            }
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Path by which a thread can enter.
    fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    /// `ip ARGUMENTS…` inside; gives what it prints.
    pub(crate) fn ip(&self, arguments: &[&str]) -> Result<String, ProcessError> {
        run_ok(ip()?.args(["-n", &self.name]).args(arguments), IP_TIMEOUT)
    }

    /// Makes a veth pair inside, each end with these options of `ip link add`, and gives the index
    /// of the far end.
    pub(crate) fn add_veth(&self, near: &str, far: &str, options: &[&str]) -> Result<u32> {
        let near_words = [&["link", "add", near][..], options].concat();
        let far_words = [&["type", "veth", "peer", "name", far][..], options].concat();
        self.ip(&[near_words, far_words].concat())?;
        let said = self.ip(&["-o", "link", "show", far])?;
        let index = said.split(':').next().and_then(|index| index.parse().ok());
        index.with_context(|| format!("`ip link show` says {said:?}"))
    }

    /// The same command inside. The pid stays the program's: `ip netns exec` execs.
    pub(crate) fn inside(&self, command: &Command) -> Result<Command, ProcessError> {
        let ip = find("ip", Origin::LabPackages)?;
        Ok(behind(ip, &["netns", "exec", &self.name], command))
    }

    /// Moves the calling thread inside.
    pub(crate) fn enter(&self) -> Result<()> {
        let path = self.path();
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let kind = Some(LinkNameSpaceType::Network);
        Ok(move_into_link_name_space(file.as_fd(), kind)?)
    }

    /// Lets `action` run on a thread inside this namespace.
    pub(crate) fn on_thread<T: Send>(
        &self,
        action: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                self.enter()?;
                action()
            });
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread of the bench panicked"))?
        })
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        // Not by `process::run`, which gives up after Ctrl-C.
        if let Ok(mut command) = ip() {
            let _ = command
                .args(["netns", "del", &self.name])
                .stderr(Stdio::null())
                .process_group(0)
                .status();
        }
    }
}

fn ip() -> Result<Command, ProcessError> {
    Ok(Command::new(find("ip", Origin::LabPackages)?))
}

/// The pid in the name of a lab's namespace.
fn owner_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_the_lab_have_an_owner() {
        assert_eq!(owner_of("ringway-lab-412-ringway"), Some(412));
        assert_eq!(owner_of("ringway-lab-"), None);
        assert_eq!(owner_of("someone-else"), None);
    }
}
