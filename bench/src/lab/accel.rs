//! Whether guests run on KVM or on QEMU's own translator (TCG).
//!
//! That `/dev/kvm` exists says little: some nested KVMs hang a distribution's kernel. So one guest
//! without a NIC is booted on KVM, and the answer is kept until the machine boots again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use super::guest::{GuestNic, GuestSpec, QemuGuest};
use super::image::{Image, write_whole};
use super::shape::OffloadSet;
use crate::hint::with_hint;

/// How long a guest on KVM may take to its shell; where KVM works it takes one to two seconds.
const PROBE_TIMEOUT: Duration = Duration::from_secs(12);

/// The file of the answer; it had another name while its reasons were wrong.
const VERDICT: &str = "kvm-probe";

/// What the operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AccelChoice {
    /// KVM if a guest boots on it, else TCG
    Auto,
    /// KVM, or an error
    Kvm,
    /// QEMU's translator
    Tcg,
}

/// What guests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Accel {
    Kvm,
    Tcg,
}

impl Accel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Accel::Kvm => "KVM",
            Accel::Tcg => "TCG",
        }
    }

    pub(crate) fn qemu_arguments(self) -> [&'static str; 4] {
        match self {
            Accel::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Accel::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }

    /// How long a boot may take; several times what it takes on two busy cores.
    pub(crate) fn boot_timeout(self) -> Duration {
        match self {
            Accel::Kvm => Duration::from_secs(30),
            Accel::Tcg => Duration::from_secs(90),
        }
    }
}

/// Decides, by a trial boot where there is no answer from an earlier one.
pub(crate) fn choose(
    choice: AccelChoice,
    image: &Image,
    cache: &Path,
    folder: &Path,
    say: impl Fn(&str),
) -> Result<(Accel, String)> {
    if choice == AccelChoice::Tcg {
        return Ok((Accel::Tcg, "asked for".to_owned()));
    }
    let verdict = match remembered(cache) {
        Some(verdict) => verdict,
        None => {
            say("trying whether a guest boots on KVM (once per boot of this machine)");
            let verdict = probe(image, folder)?;
            remember(cache, &verdict)?;
            verdict
        }
    };
    match verdict {
        Ok(()) => Ok((Accel::Kvm, "a guest boots on it".to_owned())),
        Err(reason) if choice == AccelChoice::Kvm => bail!("KVM does not work here: {reason}"),
        Err(reason) => Ok((Accel::Tcg, reason)),
    }
}

/// `Ok` if KVM works, else why not.
type Verdict = Result<(), String>;

fn probe(image: &Image, folder: &Path) -> Result<Verdict> {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(Err("no usable /dev/kvm".to_owned()));
    }
    let folder = folder.join("kvm-probe");
    std::fs::create_dir_all(&folder)?;
    let spec = GuestSpec {
        index: 0,
        queue_pairs: 1,
        mtu: 1500,
        offloads: OffloadSet::All,
        nic: GuestNic::None,
        accel: Accel::Kvm,
        account: None,
        iommu_platform: false,
    };
    let deadline = Instant::now() + PROBE_TIMEOUT;
    let booted = QemuGuest::start(&spec, image, &folder, None)
        .and_then(|mut guest| guest.wait_ready_until(deadline));
    crate::interrupt::check()?;
    Ok(booted.map_err(|error| format!("a guest did not boot on KVM: {}", with_hint(&error))))
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn remembered(cache: &Path) -> Option<Verdict> {
    let text = std::fs::read_to_string(cache.join(VERDICT)).ok()?;
    let mut lines = text.lines();
    if lines.next()? != boot_id() {
        return None;
    }
    match lines.next()? {
        "works" => Some(Ok(())),
        reason => Some(Err(reason.to_owned())),
    }
}

fn remember(cache: &Path, verdict: &Verdict) -> Result<()> {
    let word = match verdict {
        Ok(()) => "works".to_owned(),
        Err(reason) => reason.replace('\n', " "),
    };
    let text = format!("{}\n{word}\n", boot_id());
    write_whole(cache, &cache.join(VERDICT), text.as_bytes())
}
