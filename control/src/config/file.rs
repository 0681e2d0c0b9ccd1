//! From TOML to a checked [`Config`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use ringway_api::{
    AccountName, BadValue, BalanceConfig, GroupFwdMask, IdleConfig, PortConfig, PortKind, PortName,
    SocketAccess, SocketMode, SocketPath, SocketSpec, SwitchConfig,
};
use ringway_bridge::MAX_PORTS;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Error as TomlError, ValueDeserializer};

use super::{
    Config, ConfigError, CpuList, DEFAULT_BALANCE, DEFAULT_FDB_AGEING, DEFAULT_FDB_CAPACITY,
    DEFAULT_IDLE, LogFormat, MAX_FDB_CAPACITY,
};
use crate::auto::Profiles;
use crate::metrics::DEFAULT_LISTEN;
use crate::suggest::Unknown;

/// Longest ageing time (IEEE 802.1Q, table 8-6).
const MAX_AGEING_SECONDS: u64 = 1_000_000;

/// Longest time for which addresses in use move to no other port: a minute.
const MAX_MOVE_HOLD_MS: u64 = 60_000;

/// Longest step of the idle ladder: beyond a second the worker never sleeps in practice.
const MAX_IDLE_US: u64 = 1_000_000;

/// Longest interval over which loads are measured: beyond an hour nothing follows the traffic.
const MAX_REBALANCE_SECONDS: u64 = 3600;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    daemon: DaemonSection,
    sockets: SocketsSection,
    metrics: MetricsSection,
    auto: AutoSection,
    bridge: BridgeSection,
    fdb: FdbSection,
    idle: IdleSection,
    workers: WorkersSection,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DaemonSection {
    control: Option<SocketPath>,
    control_owner: Option<AccountName>,
    control_group: Option<AccountName>,
    control_mode: Option<SocketMode>,
    worker_cpus: Option<String>,
    log_format: Option<LogFormat>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SocketsSection {
    owner: Option<AccountName>,
    group: Option<AccountName>,
    mode: Option<SocketMode>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MetricsSection {
    listen: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AutoSection {
    directory: Option<SocketPath>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BridgeSection {
    group_fwd_mask: GroupFwdMask,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FdbSection {
    ageing_seconds: Option<u64>,
    capacity: Option<usize>,
    move_hold_ms: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct IdleSection {
    spin_us: Option<u64>,
    pause_us: Option<u64>,
    backpressure_us: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WorkersSection {
    rebalance: Option<bool>,
    rebalance_seconds: Option<u64>,
}

/// Parses `text`, which is read twice: for the values, and for where they are.
pub(super) fn parse(text: &str) -> Result<Config, ConfigError> {
    let empty = DeTable::new();
    let no_places = Places { text, root: &empty };
    let layout = DeTable::parse(text).map_err(|error| no_places.refused(&error, None))?;
    let root = layout.get_ref();
    let places = Places { text, root };
    let mut values = layout.clone();
    let ports = values.get_mut().remove("ports");
    let profiles = values.get_mut().remove("profiles");
    let file = File::deserialize(values.into_deserializer());
    let file = file.map_err(|error| places.refused(&error, None))?;
    let profiles = super::profiles::check(profiles, &places)?;
    check(file, ports, profiles, &places)
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or_default();
    before.iter().filter(|b| **b == b'\n').count() + 1
}

/// Where things are in the text.
pub(super) struct Places<'a> {
    text: &'a str,
    root: &'a DeTable<'a>,
}

impl Places<'_> {
    /// What serde or the parser refuses, somewhere from `start` on if the error does not tell.
    pub(super) fn refused(&self, error: &TomlError, start: Option<usize>) -> ConfigError {
        let start = error.span().map(|span| span.start).or(start);
        let message = error.message();
        let (what, hint) = if let Some(bad) = BadValue::from_serde(message) {
            let path = start.map_or_else(Vec::new, |start| path_to(self.root, start));
            (format!("{}: {}", path.join("."), bad.reason), bad.hint)
        } else if let Some(unknown) = Unknown::read(message) {
            (unknown.what(), unknown.hint())
        } else {
            let what = message.lines().collect::<Vec<_>>().join("; ");
            let hint = "correct the line; dist/ringway.toml shows every key";
            (what, hint.into())
        };
        ConfigError {
            file: None,
            line: start.map(|start| line_of(self.text, start)),
            what,
            hint,
        }
    }

    /// An error at `path`, or at its deepest part that the text has.
    pub(super) fn error(
        &self,
        path: &[&str],
        what: String,
        hint: impl Into<String>,
    ) -> ConfigError {
        let start = self.start(path);
        ConfigError {
            file: None,
            line: start.map(|start| line_of(self.text, start)),
            what: format!("{}: {what}", path.join(".")),
            hint: hint.into(),
        }
    }

    fn start(&self, path: &[&str]) -> Option<usize> {
        let mut table = Some(self.root);
        let mut start = None;
        for part in path {
            let found = table.and_then(|table| table.get_key_value(*part));
            let Some((key, value)) = found else { break };
            start = Some(key.span().start);
            table = match value.get_ref() {
                DeValue::Table(table) => Some(table),
                _ => None,
            };
        }
        start
    }
}

/// The keys that lead to what is at `offset` of the text.
fn path_to<'a>(table: &'a DeTable<'_>, offset: usize) -> Vec<&'a str> {
    for (key, value) in table {
        let below = value.get_ref().as_table();
        let mut path = below.map_or_else(Vec::new, |table| path_to(table, offset));
        if !path.is_empty() || key.span().contains(&offset) || value.span().contains(&offset) {
            path.insert(0, key.get_ref());
            return path;
        }
    }
    Vec::new()
}

fn check(
    file: File,
    ports: Option<Spanned<DeValue<'_>>>,
    profiles: Profiles,
    places: &Places<'_>,
) -> Result<Config, ConfigError> {
    let control = file.daemon.control.as_ref().map(SocketPath::as_path);
    let ports = check_ports(ports, control, places)?;
    Ok(Config {
        worker_cpus: check_cpus(file.daemon.worker_cpus.as_deref(), places)?,
        control: control.map(Path::to_owned),
        control_access: SocketAccess {
            owner: file.daemon.control_owner,
            group: file.daemon.control_group,
            mode: file.daemon.control_mode,
        },
        socket_access: SocketAccess {
            owner: file.sockets.owner,
            group: file.sockets.group,
            mode: file.sockets.mode,
        },
        log_format: file.daemon.log_format,
        auto: file.auto.directory.map(|path| path.as_path().to_owned()),
        profiles,
        metrics: check_metrics(file.metrics.listen.as_deref(), places)?,
        fdb_ageing: check_ageing(&file.fdb, places)?,
        fdb_capacity: check_capacity(&file.fdb, places)?,
        fdb_move_hold: check_move_hold(&file.fdb, places)?,
        group_fwd_mask: file.bridge.group_fwd_mask,
        balance: check_balance(&file.workers, places)?,
        idle: IdleConfig {
            spin: check_idle("spin_us", file.idle.spin_us, DEFAULT_IDLE.spin, places)?,
            pause: check_idle("pause_us", file.idle.pause_us, DEFAULT_IDLE.pause, places)?,
            backpressure: check_idle(
                "backpressure_us",
                file.idle.backpressure_us,
                DEFAULT_IDLE.backpressure,
                places,
            )?,
        },
        ports,
    })
}

fn check_cpus(text: Option<&str>, places: &Places<'_>) -> Result<Option<CpuList>, ConfigError> {
    let bad = |error: super::CpuListError| {
        let hint = "name CPUs as in \"1,2-3\", each once";
        places.error(&["daemon", "worker_cpus"], error.to_string(), hint)
    };
    text.map(|text| text.parse().map_err(bad)).transpose()
}

fn check_metrics(
    text: Option<&str>,
    places: &Places<'_>,
) -> Result<Option<SocketAddr>, ConfigError> {
    let bad = |what: String| {
        let hint = "name one address and a port, or leave the section out";
        places.error(&["metrics", "listen"], what, hint)
    };
    text.map(|text| listen_address(text).map_err(bad))
        .transpose()
}

/// Where metrics are to be served, as it is written.
///
/// # Errors
/// It is no address with a port.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no address with a port, as {DEFAULT_LISTEN}"))
}

fn check_ageing(fdb: &FdbSection, places: &Places<'_>) -> Result<Duration, ConfigError> {
    match fdb.ageing_seconds {
        None => Ok(DEFAULT_FDB_AGEING),
        Some(seconds @ 1..=MAX_AGEING_SECONDS) => Ok(Duration::from_secs(seconds)),
        Some(seconds) => Err(places.error(
            &["fdb", "ageing_seconds"],
            format!("{seconds} is out of range"),
            format!("give 1 to {MAX_AGEING_SECONDS} seconds"),
        )),
    }
}

fn check_capacity(fdb: &FdbSection, places: &Places<'_>) -> Result<usize, ConfigError> {
    match fdb.capacity {
        None => Ok(DEFAULT_FDB_CAPACITY),
        Some(capacity @ 1..=MAX_FDB_CAPACITY) => Ok(capacity),
        Some(capacity) => Err(places.error(
            &["fdb", "capacity"],
            format!("{capacity} is out of range"),
            format!("give 1 to {MAX_FDB_CAPACITY} entries"),
        )),
    }
}

fn check_move_hold(fdb: &FdbSection, places: &Places<'_>) -> Result<Duration, ConfigError> {
    match fdb.move_hold_ms {
        None => Ok(SwitchConfig::DEFAULT_FDB_MOVE_HOLD),
        Some(ms @ 0..=MAX_MOVE_HOLD_MS) => Ok(Duration::from_millis(ms)),
        Some(ms) => Err(places.error(
            &["fdb", "move_hold_ms"],
            format!("{ms} is out of range"),
            format!("give 0 to {MAX_MOVE_HOLD_MS} milliseconds"),
        )),
    }
}

fn check_idle(
    key: &str,
    given: Option<u64>,
    default: Duration,
    places: &Places<'_>,
) -> Result<Duration, ConfigError> {
    match given {
        None => Ok(default),
        Some(us @ 0..=MAX_IDLE_US) => Ok(Duration::from_micros(us)),
        Some(us) => Err(places.error(
            &["idle", key],
            format!("{us} is out of range"),
            format!("give 0 to {MAX_IDLE_US} microseconds"),
        )),
    }
}

fn check_balance(
    workers: &WorkersSection,
    places: &Places<'_>,
) -> Result<BalanceConfig, ConfigError> {
    let interval = match workers.rebalance_seconds {
        None => DEFAULT_BALANCE.interval,
        Some(seconds @ 1..=MAX_REBALANCE_SECONDS) => Duration::from_secs(seconds),
        Some(seconds) => {
            return Err(places.error(
                &["workers", "rebalance_seconds"],
                format!("{seconds} is out of range"),
                format!("give 1 to {MAX_REBALANCE_SECONDS} seconds"),
            ));
        }
    };
    Ok(BalanceConfig {
        is_on: workers.rebalance.unwrap_or(DEFAULT_BALANCE.is_on),
        interval,
    })
}

fn check_ports(
    ports: Option<Spanned<DeValue<'_>>>,
    control: Option<&Path>,
    places: &Places<'_>,
) -> Result<Vec<(PortName, PortConfig)>, ConfigError> {
    let tables = match ports.map(Spanned::into_inner) {
        None => DeTable::new(),
        Some(DeValue::Table(tables)) => tables,
        Some(_) => {
            let hint = "give each port a table, as [ports.vm1]";
            return Err(places.error(&["ports"], "this is no table".into(), hint));
        }
    };
    if tables.len() > MAX_PORTS {
        let what = format!("{} ports", tables.len());
        let hint = format!("a switch has {MAX_PORTS} at most");
        return Err(places.error(&["ports"], what, hint));
    }
    let mut ports = Vec::new();
    for (name, settings) in tables {
        let key = name.get_ref();
        let bad = |path: &[&str], bad: BadValue| places.error(path, bad.reason, bad.hint);
        let name: PortName = key.parse().map_err(|error| bad(&["ports", key], error))?;
        let start = Some(settings.span().start);
        let config = read_port(settings).map_err(|error| places.refused(&error, start))?;
        let checked = config.check_pins();
        checked.map_err(|error| bad(&["ports", key, "pins"], error))?;
        ports.push((name, config));
    }
    ports.sort_by_key(|(name, _)| places.start(&["ports", name.as_str()]));
    check_shared(&ports, control, places)?;
    Ok(ports)
}

/// The kind first, then its fields: serde's own way to read tagged enums loses where they are.
fn read_port(settings: Spanned<DeValue<'_>>) -> Result<PortConfig, TomlError> {
    let span = settings.span();
    let mut settings = settings.into_inner();
    let kind = match &mut settings {
        DeValue::Table(fields) => fields.remove("kind"),
        _ => None,
    };
    let Some(kind) = kind else {
        // With the place of the settings.
        let settings = Spanned::new(span, settings);
        return PortConfig::deserialize(ValueDeserializer::from(settings));
    };
    let kind = PortKind::deserialize(kind.into_deserializer())?;
    PortConfig::of_kind(kind, ValueDeserializer::from(Spanned::new(span, settings)))
}

/// Two ports can't have one socket or one interface.
fn check_shared(
    ports: &[(PortName, PortConfig)],
    control: Option<&Path>,
    places: &Places<'_>,
) -> Result<(), ConfigError> {
    let mut seen: BTreeMap<(&str, &Path), &str> = BTreeMap::new();
    if let Some(control) = control {
        seen.insert(("listen", control), "the control socket");
    }
    for (name, config) in ports {
        let (field, what) = match config {
            PortConfig::VhostUser(guest) => match &guest.socket {
                SocketSpec::Listen(path) => ("listen", path.as_path()),
                SocketSpec::Connect(path) => ("connect", path.as_path()),
            },
            PortConfig::Tap(tap) => ("ifname", Path::new(tap.ifname.as_str())),
            PortConfig::AfXdp(nic) => ("ifname", Path::new(nic.ifname.as_str())),
        };
        if let Some(other) = seen.insert((field, what), name.as_str()) {
            return Err(places.error(
                &["ports", name.as_str(), field],
                format!("{} belongs to {other} already", what.display()),
                "give each port its own",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
[daemon]
control = "/run/ringway/control.sock"
worker_cpus = "1,2-3"
log_format = "json"

[fdb]
ageing_seconds = 60
capacity = 1024
move_hold_ms = 0

[bridge]
group_fwd_mask = 0x4001

[idle]
spin_us = 10
pause_us = 0

[workers]
rebalance = false
rebalance_seconds = 30

[ports.vm2]
kind = "vhost-user"
listen = "/run/ringway/vm2.sock"
queues = 2
pins = { 0 = 1, 1 = 0 }
mtu = 1500

[ports.host]
kind = "tap"
ifname = "rw0"
persist = false
offload = false

[ports.nic]
kind = "af-xdp"
ifname = "eth1"
mode = "zero-copy"
umem_frames = 1024
busy_poll_us = 20
gro = false
"#;

    fn refused(text: &str) -> ConfigError {
        Config::parse(text).expect_err(text)
    }

    #[test]
    fn every_key_is_read_and_ports_keep_the_order_of_the_file() {
        let config = Config::parse(FULL).unwrap();
        assert_eq!(config.worker_cpus.unwrap().as_slice(), [1, 2, 3]);
        assert_eq!(config.log_format, Some(LogFormat::Json));
        assert_eq!(config.fdb_ageing, Duration::from_secs(60));
        assert_eq!(config.fdb_capacity, 1024);
        assert_eq!(config.fdb_move_hold, Duration::ZERO);
        assert_eq!(config.group_fwd_mask.get(), 0x4001);
        assert_eq!(config.idle.spin, Duration::from_micros(10));
        assert_eq!(config.idle.pause, Duration::ZERO);
        let names: Vec<_> = config.ports.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["vm2", "host", "nic"]);
        assert_eq!(config.ports[0].1.mtu(), ringway_api::Mtu::new(1500));
        assert_eq!(*config.ports[0].1.pins(), [(0, 1), (1, 0)].into());
        let interval = Duration::from_secs(30);
        let is_on = false;
        assert_eq!(config.balance, BalanceConfig { is_on, interval });
    }

    #[test]
    fn an_empty_file_is_all_defaults() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_told_with_its_line_and_the_key_that_it_is_like() {
        let error = refused("[ports.vm1]\nkind = \"vhost-user\"\nquees = 2\nlisten = \"/a\"\n");
        assert_eq!(error.to_string(), "line 3: unknown key `quees`");
        assert_eq!(error.hint, "did you mean `queues`?");
        let error = refused("\n\n[deamon]\n");
        assert_eq!(error.to_string(), "line 3: unknown key `deamon`");
        assert_eq!(error.hint, "did you mean `daemon`?");
        let error = refused("[idle]\nspin_ms = 1\n");
        assert_eq!(error.line, Some(2));
        assert_eq!(error.hint, "did you mean `spin_us`?");
    }

    #[test]
    fn errors_name_their_line() {
        let cases = [
            ("[daemon\n", 1),
            ("[fdb]\ncapacity = \"many\"\n", 2),
            ("[fdb]\ncapacity = 0\n", 2),
            ("[fdb]\ncapacity = -1\n", 2),
            ("[fdb]\n\nageing_seconds = 0\n", 3),
            ("[fdb]\nmove_hold_ms = 60001\n", 2),
            ("[idle]\nspin_us = 1000001\n", 2),
            ("[workers]\nrebalance_seconds = 0\n", 2),
            ("[workers]\nrebalance = \"yes\"\n", 2),
            (
                "[ports.t]\nkind = \"tap\"\nifname = \"rw0\"\npins = { x = 0 }\n",
                4,
            ),
            (
                "[ports.t]\nkind = \"tap\"\nifname = \"rw0\"\npins = { 1 = 0 }\n",
                4,
            ),
            ("[daemon]\nworker_cpus = \"3-1\"\n", 2),
            ("[daemon]\nlog_format = \"xml\"\n", 2),
            ("[daemon]\ncontrol = \"control.sock\"\n", 2),
            ("[fdb]\n[fdb]\n", 2),
            ("[fdb]\ncapacity = 1\ncapacity = 2\n", 3),
            ("[ports.vm1]\nkind = \"bridge\"\n", 2),
            ("\n[ports.vm1]\nkind = \"vhost-user\"\n", 2),
            ("[ports.t]\nkind = \"tap\"\nifname = \"a/b\"\n", 3),
            (
                "[ports.t]\nkind = \"tap\"\nifname = \"rw0\"\nqueues = 65\n",
                4,
            ),
            (
                "[ports.t]\nkind = \"tap\"\nifname = \"rw0\"\nmtu = 70000\n",
                4,
            ),
            (
                "[ports.n]\nkind = \"af-xdp\"\nifname = \"eth1\"\nmode = \"fast\"\n",
                4,
            ),
            (
                "[ports.n]\nkind = \"af-xdp\"\nifname = \"eth1\"\numem_frames = 100\n",
                4,
            ),
            ("[ports.\"a/b\"]\nkind = \"tap\"\nifname = \"rw0\"\n", 1),
            ("[ports.\"\"]\nkind = \"tap\"\nifname = \"rw0\"\n", 1),
        ];
        for (text, line) in cases {
            let error = refused(text);
            assert_eq!(error.line, Some(line), "{text:?}: {error}");
            assert!(
                !error.hint.is_empty() && !error.what.contains('\n'),
                "{error:?}"
            );
        }
    }

    #[test]
    fn two_ports_can_not_share_a_socket_or_an_interface() {
        let vm = |name: &str| format!("[ports.{name}]\nkind = \"vhost-user\"\nlisten = \"/a\"\n");
        let error = refused(&(vm("vm1") + &vm("vm2")));
        assert_eq!(
            error.to_string(),
            "line 6: ports.vm2.listen: /a belongs to vm1 already"
        );
        let error = refused(&("[daemon]\ncontrol = \"/a\"\n".to_owned() + &vm("vm1")));
        assert!(error.what.contains("control socket"), "{error}");
    }

    #[test]
    fn the_sample_file_is_valid_and_shows_the_defaults() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/ringway.toml");
        let config = Config::load(&path).unwrap();
        assert_eq!(config.control, Some(super::super::DEFAULT_CONTROL.into()));
        let defaults = Config::default();
        assert_eq!(config.idle, defaults.idle);
        assert_eq!(config.balance, defaults.balance);
        assert_eq!(config.fdb_ageing, defaults.fdb_ageing);
        assert_eq!(config.fdb_capacity, defaults.fdb_capacity);
        assert_eq!(config.fdb_move_hold, defaults.fdb_move_hold);
        assert_eq!(config.group_fwd_mask, defaults.group_fwd_mask);
    }
}
