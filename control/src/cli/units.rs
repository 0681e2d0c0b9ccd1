//! Numbers for people: three significant digits and a unit; and rates as people write them.

use std::fmt;
use std::str::FromStr;

const PREFIXES: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];

/// `value` with three significant digits, and its prefix apart.
fn scale(value: f64, step: f64) -> (String, usize) {
    let mut value = value;
    let mut prefix = 0;
    // 999.5 would be printed as 1000.
    while value >= step - 0.5 && prefix + 1 < PREFIXES.len() {
        value /= step;
        prefix += 1;
    }
    let digits = match value {
        _ if prefix == 0 => usize::from(value.fract() != 0.0 && value < 100.0),
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    (format!("{value:.digits$}"), prefix)
}

fn si(value: f64, unit: &str) -> String {
    let (number, prefix) = scale(value, 1000.0);
    format!("{number} {}{unit}", PREFIXES[prefix])
}

/// A count: whole up to 99,999, then `123k`, `12.3M`.
pub(super) fn count(n: u64) -> String {
    if n < 100_000 {
        return n.to_string();
    }
    let (number, prefix) = scale(n as f64, 1000.0);
    format!("{number}{}", PREFIXES[prefix])
}

/// Bytes in powers of ten: `1.23 GB`.
pub(super) fn bytes(n: u64) -> String {
    si(n as f64, "B")
}

/// Bytes in powers of two: `512 MiB`.
pub(super) fn binary_bytes(n: u64) -> String {
    let (number, prefix) = scale(n as f64, 1024.0);
    match PREFIXES[prefix] {
        "" => format!("{number} B"),
        "k" => format!("{number} KiB"),
        prefix => format!("{number} {prefix}iB"),
    }
}

/// Bits per second: `9.41 Gbit/s`.
pub(super) fn bit_rate(bits_per_second: f64) -> String {
    si(bits_per_second, "bit/s")
}

/// Packets per second: `1.49 Mpps`.
pub(super) fn packet_rate(packets_per_second: f64) -> String {
    si(packets_per_second, "pps")
}

/// A span of time: `850 ms`, `12.3 s`, `2 h 05 min`.
pub(super) fn span(seconds: f64) -> String {
    match seconds {
        s if s < 0.9995 => format!("{:.0} ms", s * 1e3),
        s if s < 99.95 => format!("{s:.1} s"),
        s => {
            let minutes = (s / 60.0).floor();
            let (days, hours) = ((minutes / 1440.0).floor(), (minutes / 60.0).floor() % 24.0);
            let minutes = minutes % 60.0;
            match (days, hours) {
                (d, h) if d > 0.0 => format!("{d} d {h:02} h"),
                (_, h) if h > 0.0 => format!("{h} h {minutes:02} min"),
                _ => format!("{minutes} min {:02.0} s", (s % 60.0).floor()),
            }
        }
    }
}

/// A least rate, as in `--min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// L2 bits per second.
    BitsPerSecond(f64),
    /// Packets per second.
    PacketsPerSecond(f64),
}

impl fmt::Display for Rate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&match self {
            Self::BitsPerSecond(rate) => bit_rate(*rate),
            Self::PacketsPerSecond(rate) => packet_rate(*rate),
        })
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "give a rate as 1.5G, 800Mbit/s or 2Mpps".to_owned();
        let (number, packets) = match text.strip_suffix("pps") {
            Some(number) => (number, true),
            None => {
                let number = text.strip_suffix("bit/s").or(text.strip_suffix("bps"));
                (number.unwrap_or(text), false)
            }
        };
        let number = number.trim_end();
        let (number, factor) = match number.as_bytes().last() {
            Some(b'k' | b'K') => (&number[..number.len() - 1], 1e3),
            Some(b'M') => (&number[..number.len() - 1], 1e6),
            Some(b'G') => (&number[..number.len() - 1], 1e9),
            Some(b'T') => (&number[..number.len() - 1], 1e12),
            _ => (number, 1.0),
        };
        let number = number.trim_end();
        if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(bad());
        }
        let rate = number.parse::<f64>().map_err(|_| bad())? * factor;
        Ok(if packets {
            Self::PacketsPerSecond(rate)
        } else {
            Self::BitsPerSecond(rate)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_significant_digits() {
        let rates = [
            (0.0, "0 bit/s"),
            (999.0, "999 bit/s"),
            (999.7, "1.00 kbit/s"),
            (1000.0, "1.00 kbit/s"),
            (9_994.0, "9.99 kbit/s"),
            (99_960.0, "100 kbit/s"),
            (999_600.0, "1.00 Mbit/s"),
            (9.41e9, "9.41 Gbit/s"),
        ];
        for (rate, text) in rates {
            assert_eq!(bit_rate(rate), text);
        }
        assert_eq!(count(99_999), "99999");
        assert_eq!(count(100_000), "100k");
        assert_eq!(count(u64::MAX), "18.4E");
        assert_eq!(bytes(1), "1 B");
        assert_eq!(bytes(1_234_567), "1.23 MB");
        assert_eq!(binary_bytes(512 << 20), "512 MiB");
        assert_eq!(binary_bytes(1536), "1.50 KiB");
    }

    #[test]
    fn spans_are_readable() {
        assert_eq!(span(0.85), "850 ms");
        assert_eq!(span(12.34), "12.3 s");
        assert_eq!(span(125.0), "2 min 05 s");
        assert_eq!(span(7_500.0), "2 h 05 min");
        assert_eq!(span(100_000.0), "1 d 03 h");
    }

    #[test]
    fn rates_are_read_as_people_write_them() {
        use Rate::{BitsPerSecond, PacketsPerSecond};
        for (text, rate) in [
            ("1.5G", BitsPerSecond(1.5e9)),
            ("800Mbit/s", BitsPerSecond(8e8)),
            ("1.5 Gbps", BitsPerSecond(1.5e9)),
            ("0", BitsPerSecond(0.0)),
            ("2Mpps", PacketsPerSecond(2e6)),
            ("100 kpps", PacketsPerSecond(1e5)),
            ("5pps", PacketsPerSecond(5.0)),
        ] {
            assert_eq!(text.parse(), Ok(rate), "{text}");
        }
        for text in [
            "", "G", "-1G", "1e9", "fast", "1.5X", "inf", "1GG", "pps", "1..5", "é",
        ] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }
}
