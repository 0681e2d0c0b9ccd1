//! `ringway monitor`: events, as they come.

use std::fmt::{self, Write};
use std::io;
use std::time::{Duration, UNIX_EPOCH};

use rustix::event::{PollFd, PollFlags, poll};

use super::args::MonitorArgs;
use super::interrupt::Interrupt;
use super::{Stop, emit};
use crate::api::{Event, MonitorStart, NoParams, Occurrence};
use crate::rpc::{Client, Notifications};

/// Prints events until a signal comes, or nobody reads them any more.
pub(super) fn run(client: Client, args: &MonitorArgs, as_json: bool) -> Result<(), Stop> {
    let interrupt = Interrupt::new()?;
    let mut events = client.stream::<MonitorStart>(&NoParams {})?;
    while wait(&events, &interrupt)? {
        let mut text = String::new();
        loop {
            let event: Event = events.receive()?;
            if as_json {
                let line = serde_json::to_string(&event);
                text.push_str(&line.map_err(|error| Stop::local(&error.into()))?);
                text.push('\n');
            } else {
                line(&mut text, &event, args.timestamps)?;
            }
            if !events.is_here() {
                break;
            }
        }
        emit(&text)?;
    }
    Ok(())
}

/// Waits for an event; false if a signal came first.
fn wait(events: &Notifications, interrupt: &Interrupt) -> Result<bool, Stop> {
    let stdout = io::stdout();
    loop {
        if events.is_here() {
            return Ok(true);
        }
        let mut fds = [
            PollFd::new(events.socket(), PollFlags::IN),
            PollFd::new(interrupt.pipe(), PollFlags::IN),
            // Of a pipe, an error says that its reader is gone.
            PollFd::new(&stdout, PollFlags::empty()),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Stop::local(&error.into())),
        }
        let [socket, signal, reader] = fds.map(|fd| fd.revents());
        if !signal.is_empty() {
            return Ok(false);
        }
        if reader.contains(PollFlags::ERR) {
            return Err(Stop::Unread);
        }
        if !socket.is_empty() {
            return Ok(true);
        }
    }
}

/// Writes an event as a line.
fn line(out: &mut dyn Write, event: &Event, has_time: bool) -> fmt::Result {
    if has_time {
        let since = Duration::try_from_secs_f64(event.unix_seconds).unwrap_or_default();
        let time = humantime::format_rfc3339_micros(UNIX_EPOCH + since);
        write!(out, "{time} ")?;
    }
    what(out, &event.what)?;
    match event.suppressed {
        0 => writeln!(out),
        more => writeln!(out, " ({more} events of the port were left out before)"),
    }
}

fn what(out: &mut dyn Write, what: &Occurrence) -> fmt::Result {
    use Occurrence as O;
    let because = |reason: &Option<String>| match reason {
        Some(reason) => format!(": {reason}"),
        None => String::new(),
    };
    match what {
        O::PortAdded { port, kind } => write!(out, "{port} added ({})", kind.as_str()),
        O::PortRemoved { port } => write!(out, "{port} removed"),
        O::PortUp { port } => write!(out, "{port} up"),
        O::PortImpaired { port, reason } => write!(out, "{port} impaired: {reason}"),
        O::PortDown { port, reason } => write!(out, "{port} down{}", because(reason)),
        O::PortError { port, reason } => write!(out, "{port} error: {reason}"),
        O::FrontEndConnected { port } => write!(out, "{port} front-end connected"),
        O::FrontEndDisconnected { port, reason } => {
            write!(out, "{port} front-end disconnected{}", because(reason))
        }
        O::FeaturesNegotiated {
            port,
            features,
            protocol_features,
        } => {
            let names: Vec<_> = features.iter().chain(protocol_features).collect();
            write!(out, "{port} features negotiated:")?;
            names.iter().try_for_each(|name| write!(out, " {name}"))
        }
        O::AddressLearned { port, mac, vlan } => {
            write!(out, "{port} learned {mac}{}", in_vlan(*vlan))
        }
        O::AddressMoved {
            port,
            mac,
            vlan,
            from,
        } => write!(out, "{port} has {mac}{} now, from {from}", in_vlan(*vlan)),
        O::AddressesForgotten { port, addresses } => {
            write!(out, "{port} forgot {addresses} addresses")
        }
        O::AddressesRefused {
            port,
            limit_hits,
            refused_full,
            evictions,
        } => write!(
            out,
            "{port} teaches more addresses than it may: {limit_hits} frames over its limit, \
             {refused_full} into a full database, {evictions} addresses made room for others"
        ),
        O::SpoofAttempts { port, frames } => {
            write!(
                out,
                "{port} sent {frames} frames from addresses in use elsewhere"
            )
        }
        O::FloodsDropped { port, frames } => {
            write!(
                out,
                "{port} flooded more than it may: {frames} frames dropped"
            )
        }
        O::Gap { lost } => write!(out, "{lost} events are missing here: they came too fast"),
    }
}

fn in_vlan(vlan: Option<u16>) -> String {
    vlan.map_or_else(String::new, |vlan| format!(" in VLAN {vlan}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_a_line_each_with_the_time_if_it_is_wanted() {
        let event = |suppressed, what| Event {
            number: 7,
            unix_seconds: 1_000_000_000.25,
            suppressed,
            what,
        };
        let port = || "vm1".parse().unwrap();
        let reason = Some("the interface is gone".to_owned());
        let down = event(
            3,
            Occurrence::PortDown {
                port: port(),
                reason,
            },
        );
        let mut text = String::new();
        line(&mut text, &down, true).unwrap();
        line(
            &mut text,
            &event(0, Occurrence::PortUp { port: port() }),
            false,
        )
        .unwrap();
        assert_eq!(
            text,
            "2001-09-09T01:46:40.250000Z vm1 down: the interface is gone (3 events of the port \
             were left out before)\nvm1 up\n"
        );
    }
}
