//! QEMU as a user of its own, on sockets that its group may open and nobody else.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::super::guest::{Account, NAMES, QEMU};
use super::super::image::Image;
use super::super::network::{Base, LabNetwork, LabSwitch};
use super::{Findings, ScenarioStage, traffic_passes};
use crate::process::{Origin, find, run};

/// As Debian's libvirt has it, whose number is nobody's where libvirt is not installed.
const QEMU_ACCOUNT: Account = Account {
    user: 64_055,
    group: 64_055,
};

/// Neither that user nor of its group.
const STRANGER: Account = Account {
    user: 64_056,
    group: 64_056,
};

/// QEMU tells at once that it can't connect.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn access(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let base = base_of(&stage.base)?;
    let mut network = LabNetwork::new(LabSwitch::Ringway, stage.shape()?, &base)?;
    for name in NAMES {
        let socket = network.port_socket(name);
        let there = fs::symlink_metadata(&socket)?;
        let found = (there.uid(), there.gid(), there.mode() & 0o777);
        findings.require(found == (0, QEMU_ACCOUNT.group, 0o660), || {
            format!("user, group and mode of {name}.sock are {found:?}")
        });
        findings.require(is_refused(&socket)?, || {
            format!("a stranger may open {name}.sock")
        });
    }
    network.boot()?;
    traffic_passes(&mut network, &mut findings, "as QEMU's own user")?;
    findings.words.push(format!(
        "QEMU as user {}, sockets 0660 of its group, refused to others",
        QEMU_ACCOUNT.user
    ));
    Ok(findings)
}

/// The lab's, with what QEMU reads in a place where that user may read it.
fn base_of(lab: &Base) -> Result<Base> {
    fs::create_dir_all(&lab.folder)?;
    // The lab's own folder is root's alone, and the cache is in root's home.
    for folder in lab.folder.ancestors().take(2) {
        fs::set_permissions(folder, Permissions::from_mode(0o711))?;
    }
    let copy = |file: &Path| -> Result<_> {
        let name = file.file_name().context("the image is a file")?;
        let copy = lab.folder.join(name);
        fs::copy(file, &copy)?;
        fs::set_permissions(&copy, Permissions::from_mode(0o644))?;
        Ok(copy)
    };
    Ok(Base {
        image: Image {
            kernel: copy(&lab.image.kernel)?,
            initramfs: copy(&lab.image.initramfs)?,
            ..lab.image.clone()
        },
        account: Some(QEMU_ACCOUNT),
        ..lab.clone()
    })
}

/// Whether QEMU as somebody else is refused the socket, and says that it is.
fn is_refused(socket: &Path) -> Result<bool> {
    let mut command = Command::new(find(QEMU, Origin::LabPackages)?);
    command.args(["-M", "none", "-display", "none", "-nodefaults", "-chardev"]);
    command.arg(format!("socket,id=c,path={}", socket.display()));
    let output = run(&mut STRANGER.runs(&command), REFUSAL_TIMEOUT)?;
    Ok(!output.status.success() && output.stderr.contains("Permission denied"))
}
