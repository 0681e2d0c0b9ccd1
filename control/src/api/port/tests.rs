use super::*;

fn vhost_user(listen: &str) -> PortSettings {
    PortSettings {
        listen: Some(listen.into()),
        ..PortSettings::new(KindName::VhostUser)
    }
}

#[test]
fn settings_survive_the_way_to_the_dataplane_and_back() {
    let vm = PortSettings {
        queues: Some(2),
        mtu: Some(9000),
        fdb_limit: Some(4),
        pins: [("0".into(), 1), ("1".into(), 0)].into(),
        ..vhost_user("/run/vm1.sock")
    };
    let tap = PortSettings {
        ifname: Some("rw0".into()),
        queues: Some(1),
        persist: Some(true),
        offload: Some(false),
        ..PortSettings::new(KindName::Tap)
    };
    let nic = PortSettings {
        ifname: Some("eth1".into()),
        queues: Some(4),
        mode: Some(ModeName::ZeroCopy),
        umem_frames: Some(1024),
        busy_poll_us: Some(20),
        gro: Some(false),
        ..PortSettings::new(KindName::AfXdp)
    };
    for settings in [vm, tap, nic] {
        let config = settings.to_config().unwrap();
        assert_eq!(PortSettings::from(&config), settings);
    }
}

#[test]
fn queues_default_to_eight_for_guests_one_for_a_tap_and_all_of_a_nic() {
    let vm = vhost_user("/vm1").to_config().unwrap();
    assert_eq!(PortSettings::from(&vm).queues, Some(8));
    let mut tap = PortSettings::new(KindName::Tap);
    tap.ifname = Some("rw0".into());
    let config = tap.to_config().unwrap();
    let settings = PortSettings::from(&config);
    assert_eq!((settings.queues, settings.offload), (Some(1), Some(true)));
    tap.kind = KindName::AfXdp;
    let nic = PortSettings::from(&tap.to_config().unwrap());
    assert_eq!((nic.queues, nic.mode), (None, Some(ModeName::Auto)));
    assert_eq!((nic.umem_frames, nic.busy_poll_us), (Some(4096), None));
    assert_eq!(nic.gro, Some(true));
}

#[test]
fn bad_settings_are_refused_by_field() {
    let vm = || vhost_user("/vm1");
    let tap = |ifname: &str| PortSettings {
        ifname: Some(ifname.into()),
        ..PortSettings::new(KindName::Tap)
    };
    let nic = || PortSettings {
        ifname: Some("eth1".into()),
        ..PortSettings::new(KindName::AfXdp)
    };
    let cases = [
        (PortSettings::new(KindName::VhostUser), "listen"),
        (vhost_user("relative.sock"), "listen"),
        (vhost_user("/a\0b"), "listen"),
        (vhost_user(&format!("/{}", "x".repeat(107))), "listen"),
        (
            PortSettings {
                offload: Some(false),
                ..vm()
            },
            "offload",
        ),
        (
            PortSettings {
                connect: Some("/b".into()),
                ..vm()
            },
            "connect",
        ),
        (
            PortSettings {
                ifname: Some("rw0".into()),
                ..vm()
            },
            "ifname",
        ),
        (
            PortSettings {
                queues: Some(0),
                ..vm()
            },
            "queues",
        ),
        (
            PortSettings {
                queues: Some(65),
                ..vm()
            },
            "queues",
        ),
        (
            PortSettings {
                mtu: Some(67),
                ..vm()
            },
            "mtu",
        ),
        (
            PortSettings {
                fdb_limit: Some(0),
                ..vm()
            },
            "fdb_limit",
        ),
        (
            PortSettings {
                pins: [("8".into(), 0)].into(),
                ..vm()
            },
            "pins",
        ),
        (
            PortSettings {
                pins: [("+1".into(), 0)].into(),
                ..vm()
            },
            "pins",
        ),
        (
            PortSettings {
                mode: Some(ModeName::Copy),
                ..tap("rw0")
            },
            "mode",
        ),
        (
            PortSettings {
                persist: Some(true),
                ..nic()
            },
            "persist",
        ),
        (
            PortSettings {
                gro: Some(true),
                ..tap("rw0")
            },
            "gro",
        ),
        (
            PortSettings {
                umem_frames: Some(1000),
                ..nic()
            },
            "umem_frames",
        ),
        (
            PortSettings {
                busy_poll_us: Some(0),
                ..nic()
            },
            "busy_poll_us",
        ),
        (
            PortSettings {
                queues: Some(0),
                ..nic()
            },
            "queues",
        ),
        (PortSettings::new(KindName::AfXdp), "ifname"),
        (PortSettings::new(KindName::Tap), "ifname"),
        (tap(""), "ifname"),
        (tap("sixteen_bytes_xx"), "ifname"),
        (tap("a/b"), "ifname"),
        (tap("a b"), "ifname"),
        (tap("rw%d"), "ifname"),
        (tap(".."), "ifname"),
    ];
    for (settings, field) in cases {
        let error = settings.to_config().expect_err(field);
        assert_eq!(error.field, field, "{settings:?}");
        assert!(!error.hint.is_empty());
    }
    assert!(
        vhost_user(&format!("/{}", "x".repeat(106)))
            .to_config()
            .is_ok()
    );
}
