//! A measurement as text lines, like iperf3's.

use std::fmt::{self, Write};

use super::rates::{Flow, Interval};
use crate::cli::{print, units};

/// Lines appear one by one, so their columns are as wide as this from the start.
const PAIR_WIDTH: usize = 24;

/// The column headings.
pub(crate) fn heading(out: &mut dyn Write) -> fmt::Result {
    writeln!(
        out,
        "{:<PAIR_WIDTH$}  {:<17}  {:>12}  {:>9}  DROPS",
        "PAIR", "INTERVAL", "BITRATE", "PACKETS"
    )
}

/// A line for each pair, their sum if there are several, and drops that belong to no pair.
pub(crate) fn interval(out: &mut dyn Write, interval: &Interval) -> fmt::Result {
    for stream in &interval.streams {
        line(
            out,
            &format!("{} -> {}", stream.from, stream.to),
            &stream.flow,
        )?;
    }
    match interval.streams.len() {
        0 => line(out, "(nothing delivered)", &interval.sum)?,
        1 => {}
        _ => line(out, "sum", &interval.sum)?,
    }
    for source in &interval.source_drops {
        let pair = format!("{} -> (none)", source.from);
        let when = when(&interval.sum);
        let drops = print::drops(&source.drops);
        writeln!(
            out,
            "{pair:<PAIR_WIDTH$}  {when}  {:>12}  {:>9}  {drops}",
            "", ""
        )?;
    }
    Ok(())
}

/// The averages and the workers.
pub(crate) fn summary(out: &mut dyn Write, end: &Interval) -> fmt::Result {
    writeln!(
        out,
        "- - - - - - - - - - - - - - - - average - - - - - - - - - - - - - - - -"
    )?;
    interval(out, end)?;
    for worker in &end.workers {
        writeln!(
            out,
            "worker {} (CPU {}): {:.1} % busy, {:.1} % polling, {:.1} % asleep",
            worker.index,
            worker.cpu,
            worker.busy_percent,
            worker.polling_percent,
            worker.asleep_percent
        )?;
    }
    Ok(())
}

fn line(out: &mut dyn Write, pair: &str, flow: &Flow) -> fmt::Result {
    writeln!(
        out,
        "{pair:<PAIR_WIDTH$}  {}  {:>12}  {:>9}  {}",
        when(flow),
        units::bit_rate(flow.bits_per_second),
        units::packet_rate(flow.packets_per_second),
        print::drops(&flow.drops)
    )
}

fn when(flow: &Flow) -> String {
    format!("{:<17}", format!("{:.2}-{:.2} s", flow.start, flow.end))
}
