//! Guests whose NICs are told to use the platform's addresses, where no IOMMU translates them.

use std::time::Duration;

use anyhow::{Context, Result};

use super::super::guest::NAMES;
use super::super::network::{Base, LabNetwork, LabSwitch};
use super::{Findings, ScenarioStage, traffic_passes};

/// VIRTIO_F_ACCESS_PLATFORM (virtio 1.3, 6).
const ACCESS_PLATFORM: usize = 33;

/// A look at a file of the guest's.
const SLACK: Duration = Duration::from_secs(10);

pub(super) fn platform(stage: &ScenarioStage<'_>) -> Result<Findings> {
    let mut findings = Findings::default();
    let base = Base {
        iommu_platform: true,
        ..stage.base.clone()
    };
    let mut network = LabNetwork::new(LabSwitch::Ringway, stage.shape()?, &base)?;
    network.boot()?;
    for (index, name) in NAMES.iter().enumerate() {
        // A digit for each bit that was negotiated, from bit 0 on.
        let features = network
            .guest(index)?
            .run("cat /sys/class/net/eth0/device/features", SLACK)?;
        let bit = features.trim().chars().nth(ACCESS_PLATFORM);
        let bit = bit.context("the guest told no features")?;
        findings.require(bit == '1', || {
            format!("the driver of {name} did not take ACCESS_PLATFORM")
        });
    }
    traffic_passes(&mut network, &mut findings, "with iommu_platform=on")?;
    findings
        .words
        .push("guests took ACCESS_PLATFORM".to_owned());
    Ok(findings)
}
