//! What people read: tables and blocks, written into any writer.

use std::fmt::{self, Write};

use super::table::Table;
use super::units;
use crate::api::{
    AccountName, AfXdpConfig, AfXdpInfo, DaemonReport, Drops, FdbListResult, HeaderAction,
    PolledQueue, PortConfig, PortCounters, PortDetail, PortInfo, PortListResult, PortName,
    QueueInfo, SocketAccess, SocketMode, SocketSpec, VlanListResult, WorkerDetail, WorkerInfo,
    WorkerListResult,
};

/// What stands for nothing.
const NONE: &str = "-";

/// `ringway port list`.
pub(super) fn ports(out: &mut dyn Write, list: &PortListResult) -> fmt::Result {
    if list.ports.is_empty() {
        return writeln!(out, "no ports; `ringway port add` adds one");
    }
    let mut table = Table::new(
        "NAME|KIND|STATE|>QUEUES|>MTU|>RX FRAMES|>RX BYTES|\
         >TX FRAMES|>TX BYTES|>DROPS|>MACS",
    );
    for port in &list.ports {
        let counters = &port.counters;
        let drops = counters
            .rx_drops
            .total()
            .saturating_add(counters.tx_drops.total());
        table.row([
            port.name.to_string(),
            port.config.kind().as_str().into(),
            port.state.as_str().into(),
            optional(port.config.queues()),
            optional(port.config.mtu()),
            units::count(counters.rx_frames),
            units::bytes(counters.rx_bytes),
            units::count(counters.tx_frames),
            units::bytes(counters.tx_bytes),
            units::count(drops),
            port.fdb_entries.to_string(),
        ]);
    }
    table.write(out)
}

/// `ringway port show`.
pub(super) fn port(out: &mut dyn Write, show: &PortDetail) -> fmt::Result {
    let port = &show.port;
    writeln!(out, "port {}", port.name)?;
    where_it_is(out, port)?;
    let state = match show.closed_for_ms {
        Some(ms) => format!("{}, closed for {ms} ms more", port.state.as_str()),
        None => port.state.as_str().to_owned(),
    };
    field(out, "state", &state)?;
    let started = show.queues.iter().filter(|q| q.rx_started || q.tx_started);
    let pairs = match port.config.queues() {
        Some(most) => format!("{} started of {most}", started.count()),
        None => format!("{}, all of the interface's", started.count()),
    };
    field(out, "queue pairs", &pairs)?;
    if !port.config.pins().is_empty() {
        let pins = port.config.pins().iter();
        let pins: Vec<_> = pins
            .map(|(queue, worker)| format!("{queue} to worker {worker}"))
            .collect();
        field(out, "pinned", &pins.join(", "))?;
    }
    field(out, "mtu", &optional(show.mtu))?;
    field(out, "vlans", &port.config.vlan().to_string())?;
    let limit = port.config.fdb_limit();
    let limit = format!("{} of {limit} at most", port.fdb_entries);
    field(out, "mac addresses", &limit)?;
    let flood_limit = match port.config.flood_limit().bound() {
        Some(copies) => format!("{} copies/s", units::count(copies.into())),
        None => "none".to_owned(),
    };
    field(out, "flood limit", &flood_limit)?;
    field(out, "on loop", port.config.on_loop().as_str())?;
    if matches!(port.config, PortConfig::VhostUser(_)) {
        field(out, "connections", &show.connections.to_string())?;
        let call_ms = show.call_ns as f64 / 1e6;
        field(out, "calls took", &format!("{call_ms:.1} ms"))?;
        let mapped = units::binary_bytes(show.mapped_bytes);
        field(
            out,
            "guest memory",
            &format!("{mapped} in {} regions", show.memory_regions),
        )?;
    }
    if let (PortConfig::AfXdp(config), Some(xdp)) = (&port.config, &show.af_xdp) {
        af_xdp(out, config, xdp)?;
        gro(out, config, &port.counters)?;
    }
    field(out, "features", &show.features.join(" "))?;
    field(out, "protocol", &show.protocol_features.join(" "))?;
    field(out, "rx offloads", &show.rx_offloads.join(" "))?;
    field(out, "tx offloads", &show.tx_offloads.join(" "))?;
    field(
        out,
        "last error",
        show.last_error.as_deref().unwrap_or_default(),
    )?;
    traffic(out, &port.counters)?;
    queues(out, &show.queues)?;
    actions(out, &show.actions)?;
    show.af_xdp.as_ref().map_or(Ok(()), |xdp| rings(out, xdp))
}

/// Header actions, a line for all destinations of one kind.
fn actions(out: &mut dyn Write, actions: &[HeaderAction]) -> fmt::Result {
    let mut kinds: Vec<(&HeaderAction, Vec<&str>)> = Vec::new();
    for action in actions {
        let alike = |known: &&mut (&HeaderAction, Vec<&str>)| {
            (&known.0.action, &known.0.done) == (&action.action, &action.done)
        };
        match kinds.iter_mut().find(alike) {
            Some((_, names)) => names.push(action.to.as_str()),
            None => kinds.push((action, vec![action.to.as_str()])),
        }
    }
    if kinds.is_empty() {
        return Ok(());
    }
    let mut table = Table::new("HEADER ACTION|DONE HERE|TOWARDS");
    for (action, names) in kinds {
        let done = match action.done.join(" ") {
            none if none.is_empty() => NONE.to_owned(),
            done => done,
        };
        table.row([action.action.clone(), done, names.join(" ")]);
    }
    writeln!(out)?;
    table.write(out)
}

fn af_xdp(out: &mut dyn Write, config: &AfXdpConfig, xdp: &AfXdpInfo) -> fmt::Result {
    let note = match config.mode {
        mode if mode == xdp.mode => String::new(),
        mode => format!(" ({})", mode.as_str()),
    };
    field(out, "mode", &format!("{}{note}", xdp.mode.as_str()))?;
    field(out, "xdp program", &format!("id {}", xdp.program_id))?;
    let buffers = if xdp.multi_buffer { "several" } else { "one" };
    field(out, "buffers a frame", buffers)?;
    let pages = if xdp.huge_pages { " in huge pages" } else { "" };
    let memory = units::binary_bytes(xdp.umem_bytes);
    field(out, "frame memory", &format!("{memory}{pages}"))?;
    match config.busy_poll_us {
        Some(us) => field(out, "busy poll", &format!("{us} us")),
        None => Ok(()),
    }
}

fn gro(out: &mut dyn Write, config: &AfXdpConfig, counters: &PortCounters) -> fmt::Result {
    let merged = units::count(counters.rx_gro_merged);
    let text = match config.gro {
        true => format!("{merged} TCP segments joined to the frame before"),
        false => "off".to_owned(),
    };
    field(out, "gro", &text)
}

/// The rings between an AF_XDP port and the kernel, and what the kernel lost.
fn rings(out: &mut dyn Write, xdp: &AfXdpInfo) -> fmt::Result {
    let mut table = Table::new(
        ">QUEUE|>FILL|>RX|>TX|>TX PENDING|>RX FULL|\
         >FILL EMPTY|>RX DROPPED|>INVALID",
    );
    for queue in &xdp.queues {
        let level = |level: u32| format!("{level}/{}", queue.ring_size);
        table.row([
            queue.index.to_string(),
            level(queue.fill_level),
            level(queue.rx_level),
            level(queue.tx_level),
            level(queue.tx_pending),
            units::count(queue.rx_ring_full),
            units::count(queue.rx_fill_empty),
            units::count(queue.rx_dropped),
            units::count(queue.rx_invalid.saturating_add(queue.tx_invalid)),
        ]);
    }
    writeln!(out)?;
    table.write(out)
}

/// Who may open a port's socket, as chmod(1) and chown(1) take it: `0660 root:kvm`.
fn access(access: &SocketAccess) -> String {
    let mode = access.mode.unwrap_or(SocketMode::OWNER_AND_GROUP);
    let name =
        |name: &Option<AccountName>| name.as_ref().map_or("", AccountName::as_str).to_owned();
    let (owner, group) = (name(&access.owner), name(&access.group));
    match (owner.is_empty(), group.is_empty()) {
        (true, true) => mode.to_string(),
        (false, true) => format!("{mode} {owner}"),
        (_, false) => format!("{mode} {owner}:{group}"),
    }
}

fn where_it_is(out: &mut dyn Write, port: &PortInfo) -> fmt::Result {
    field(out, "kind", port.config.kind().as_str())?;
    match &port.config {
        PortConfig::VhostUser(guest) => match &guest.socket {
            SocketSpec::Listen(path) => {
                field(out, "listen", path.as_str())?;
                field(out, "access", &access(&guest.access))
            }
            SocketSpec::Connect(path) => field(out, "connect", path.as_str()),
        },
        PortConfig::Tap(tap) => {
            let note = match (tap.persist, tap.offload) {
                (false, true) => "",
                (true, true) => " (persistent)",
                (false, false) => " (no offload)",
                (true, false) => " (persistent, no offload)",
            };
            field(out, "interface", &format!("{}{note}", tap.ifname))
        }
        PortConfig::AfXdp(nic) => field(out, "interface", nic.ifname.as_str()),
    }
}

fn traffic(out: &mut dyn Write, counters: &PortCounters) -> fmt::Result {
    let flow = |frames, bytes| format!("{} frames, {}", units::count(frames), units::bytes(bytes));
    field(
        out,
        "rx (from it)",
        &flow(counters.rx_frames, counters.rx_bytes),
    )?;
    field(
        out,
        "tx (to it)",
        &flow(counters.tx_frames, counters.tx_bytes),
    )?;
    learning(out, counters)?;
    field(out, "rx drops", &drops(&counters.rx_drops))?;
    field(out, "tx drops", &drops(&counters.tx_drops))?;
    let checksums = units::count(counters.tx_csum_completed);
    field(out, "tx checksums", &format!("{checksums} completed"))?;
    let gso = format!(
        "{} frames cut into {} segments",
        units::count(counters.tx_gso_frames),
        units::count(counters.tx_gso_segments)
    );
    field(out, "tx gso", &gso)
}

/// What the forwarding database did and refused, as far as anything was.
fn learning(out: &mut dyn Write, counters: &PortCounters) -> fmt::Result {
    let told = [
        (counters.fdb_moves, "moved here"),
        (counters.fdb_moves_refused, "refused to move here"),
        (counters.fdb_evictions, "evicted"),
        (counters.fdb_limit_hits, "over the limit"),
        (counters.fdb_refused_full, "refused by a full database"),
    ];
    let told: Vec<_> = told
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{} {what}", units::count(count)))
        .collect();
    field(out, "learning", &told.join(", "))
}

fn queues(out: &mut dyn Write, queues: &[QueueInfo]) -> fmt::Result {
    if queues.is_empty() {
        return Ok(());
    }
    let mut table = Table::new(
        ">QUEUE|ENABLED|>RX RING|>TX RING|>WORKER|\
         >RX FRAMES|>TX FRAMES|>CALLS|>CONTENDED",
    );
    let ring = |started: bool, size: u16, resumed: bool| match (started, size) {
        (false, _) => "stopped".to_owned(),
        (true, 0) => "started".to_owned(),
        (true, size) if resumed => format!("{size} resumed"),
        (true, size) => size.to_string(),
    };
    for queue in queues {
        table.row([
            queue.index.to_string(),
            if queue.enabled { "yes" } else { "no" }.into(),
            ring(queue.rx_started, queue.rx_size, queue.rx_resumed),
            ring(queue.tx_started, queue.tx_size, queue.tx_resumed),
            queue.worker.to_string(),
            units::count(queue.rx_frames),
            units::count(queue.tx_frames),
            units::count(queue.calls),
            units::count(queue.contended),
        ]);
    }
    writeln!(out)?;
    table.write(out)
}

/// `ringway vlan`.
pub(super) fn vlans(out: &mut dyn Write, list: &VlanListResult) -> fmt::Result {
    if list.vlans.is_empty() {
        return writeln!(
            out,
            "no port says which VLANs it is in; `ringway port set` does"
        );
    }
    let mut table = Table::new("VLAN|TAGGED|UNTAGGED");
    let names = |ports: &[PortName]| {
        let names: Vec<_> = ports.iter().map(PortName::as_str).collect();
        if names.is_empty() {
            NONE.to_owned()
        } else {
            names.join(" ")
        }
    };
    for row in &list.vlans {
        table.row([row.vlans.clone(), names(&row.tagged), names(&row.untagged)]);
    }
    table.write(out)
}

/// `ringway fdb list`.
pub(super) fn fdb(out: &mut dyn Write, list: &FdbListResult) -> fmt::Result {
    let mut table = Table::new("MAC|>VLAN|PORT|TYPE|>LAST SEEN");
    for entry in &list.entries {
        let (kind, age) = if entry.is_static {
            ("static", NONE.to_owned())
        } else {
            ("learned", units::span(entry.age_seconds))
        };
        table.row([
            entry.mac.to_string(),
            entry.vlan.to_string(),
            entry.port.to_string(),
            kind.into(),
            age,
        ]);
    }
    table.write(out)
}

/// `ringway worker list`.
pub(super) fn workers(out: &mut dyn Write, list: &WorkerListResult) -> fmt::Result {
    let mut table = Table::new(
        ">WORKER|>CPU|>QUEUES|>ACTIVE|>NOW|>BUSY|>POLLING|\
         >ASLEEP|>FRAMES|>CONTENDED|>SLEEPS",
    );
    for worker in &list.workers {
        let [busy, polling, asleep] = shares(worker);
        table.row([
            worker.index.to_string(),
            worker.cpu.to_string(),
            worker.queues.to_string(),
            worker.active_queues.to_string(),
            percent(worker.recent_busy_share),
            busy,
            polling,
            asleep,
            units::count(worker.frames),
            units::count(worker.contended),
            units::count(worker.sleeps),
        ]);
    }
    table.write(out)
}

/// `ringway worker show`.
pub(super) fn worker(out: &mut dyn Write, show: &WorkerDetail) -> fmt::Result {
    let worker = &show.worker;
    writeln!(out, "worker {}", worker.index)?;
    field(out, "cpu", &worker.cpu.to_string())?;
    let queues = format!("{} of {} active", worker.active_queues, worker.queues);
    field(out, "source queues", &queues)?;
    let [busy, polling, asleep] = shares(worker);
    field(out, "busy", &busy)?;
    field(out, "polling", &polling)?;
    field(out, "asleep", &asleep)?;
    field(out, "turns", &units::count(worker.turns))?;
    field(out, "bursts", &units::count(worker.bursts))?;
    field(out, "frames", &units::count(worker.frames))?;
    let mean = worker.frames as f64 / worker.bursts.max(1) as f64;
    field(out, "frames a burst", &format!("{mean:.1}"))?;
    field(out, "contended", &units::count(worker.contended))?;
    field(out, "sleeps", &units::count(worker.sleeps))?;
    let span = units::span(show.interval_seconds);
    let recent = format!("{} of the last {span}", percent(worker.recent_busy_share));
    field(out, "busy now", &recent)?;
    polled_queues(out, &show.queues)
}

fn polled_queues(out: &mut dyn Write, queues: &[PolledQueue]) -> fmt::Result {
    let is_shown = |queue: &&PolledQueue| queue.rx_frames > 0 || queue.is_pinned;
    let mut shown = queues.iter().filter(is_shown).peekable();
    if shown.peek().is_none() {
        return Ok(());
    }
    let mut table = Table::new("PORT|>QUEUE|PINNED|>PACKETS|>BITRATE|>SHARE|>RX FRAMES|>RX BYTES");
    for queue in shown {
        table.row([
            queue.port.to_string(),
            queue.queue.to_string(),
            if queue.is_pinned { "yes" } else { "no" }.into(),
            units::packet_rate(queue.frames_per_second),
            units::bit_rate(queue.bits_per_second),
            percent(queue.recent_busy_share),
            units::count(queue.rx_frames),
            units::bytes(queue.rx_bytes),
        ]);
    }
    writeln!(out)?;
    table.write(out)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Busy, polling, asleep as parts of their sum.
fn shares(worker: &WorkerInfo) -> [String; 3] {
    let times = [worker.busy_ns, worker.polling_ns, worker.asleep_ns];
    let total: f64 = times.iter().map(|ns| *ns as f64).sum();
    times.map(|ns| {
        if total > 0.0 {
            percent(ns as f64 / total)
        } else {
            NONE.to_owned()
        }
    })
}

/// `ringway info`.
pub(super) fn info(out: &mut dyn Write, info: &DaemonReport) -> fmt::Result {
    writeln!(out, "ringwayd {}", info.version)?;
    field(out, "pid", &info.pid.to_string())?;
    field(out, "uptime", &units::span(info.uptime_seconds))
}

/// `ring_full 12, runt 1`, the most frequent first.
pub(super) fn drops(drops: &Drops) -> String {
    let mut sorted: Vec<_> = drops.0.iter().filter(|(_, n)| **n > 0).collect();
    sorted.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    let texts: Vec<_> = sorted
        .iter()
        .map(|(reason, n)| format!("{reason} {}", units::count(**n)))
        .collect();
    if texts.is_empty() {
        "0".into()
    } else {
        texts.join(", ")
    }
}

fn field(out: &mut dyn Write, name: &str, value: &str) -> fmt::Result {
    let value = if value.is_empty() { NONE } else { value };
    writeln!(out, "  {name:<16}{value}")
}

fn optional(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| NONE.to_owned(), |value| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_open_a_socket_is_told_as_chmod_and_chown_take_it() {
        let told = |owner: &str, group: &str, mode: &str| {
            access(&SocketAccess {
                owner: owner.parse().ok(),
                group: group.parse().ok(),
                mode: mode.parse().ok(),
            })
        };
        assert_eq!(told("", "", ""), "0660");
        assert_eq!(told("", "kvm", ""), "0660 :kvm");
        assert_eq!(told("root", "", "600"), "0600 root");
        assert_eq!(told("root", "kvm", "0666"), "0666 root:kvm");
    }
}
