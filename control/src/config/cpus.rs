//! Lists of CPUs, as in `1,2-3`.

use std::fmt;
use std::str::FromStr;

/// One more than the greatest CPU number that the affinity masks of libc can name.
const CPU_END: usize = 1024;

/// CPUs in the order given, each once, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

/// A text that is no list of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no list of CPUs: {reason}")]
pub struct CpuListError {
    text: String,
    reason: String,
}

impl CpuList {
    /// The CPUs.
    pub fn as_slice(&self) -> &[usize] {
        &self.0
    }

    /// All CPUs that this process may run on.
    ///
    /// # Errors
    /// The kernel refuses to tell, as it does beyond 1,024 CPUs.
    pub fn allowed() -> std::io::Result<Self> {
        let cpus = ringway_dataplane::allowed_cpus();
        if cpus.is_empty() {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self(cpus))
    }

    /// The highest-numbered CPU of the list: CPU 0 usually has the interrupts.
    pub fn highest(&self) -> Option<usize> {
        self.0.iter().copied().max()
    }

    /// The CPUs of this list that are not in `allowed`.
    pub fn outside(&self, allowed: &Self) -> Vec<usize> {
        let outside = self.0.iter().filter(|cpu| !allowed.0.contains(cpu));
        outside.copied().collect()
    }
}

impl From<usize> for CpuList {
    fn from(cpu: usize) -> Self {
        Self(vec![cpu])
    }
}

impl From<CpuList> for Vec<usize> {
    fn from(list: CpuList) -> Self {
        list.0
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let mut cpus = Vec::new();
        for item in text.split(',') {
            let (first, last) = parse_range(item).map_err(|reason| bad(text, reason))?;
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(bad(text, format!("CPU {cpu} is named twice")));
                }
                cpus.push(cpu);
            }
        }
        Ok(Self(cpus))
    }
}

fn bad(text: &str, reason: String) -> CpuListError {
    // A huge text would hide the reason.
    let text = text.chars().take(64).collect();
    CpuListError { text, reason }
}

fn parse_range(item: &str) -> Result<(usize, usize), String> {
    let (first, last) = match item.split_once('-') {
        Some((first, last)) => (parse_cpu(first)?, parse_cpu(last)?),
        None => {
            let cpu = parse_cpu(item)?;
            (cpu, cpu)
        }
    };
    if first > last {
        return Err(format!("the range {first}-{last} runs backwards"));
    }
    Ok((first, last))
}

fn parse_cpu(text: &str) -> Result<usize, String> {
    if text.is_empty() {
        return Err("a number is missing".into());
    }
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!(
            "{:?} is no number",
            text.chars().take(20).collect::<String>()
        ));
    }
    text.parse()
        .ok()
        .filter(|cpu| *cpu < CPU_END)
        .ok_or_else(|| format!("CPU numbers end at {}", CPU_END - 1))
}

impl fmt::Display for CpuList {
    /// Ranges as short as they get, in the order given.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_slice();
        let mut separator = "";
        while let [first, ..] = rest {
            let run = rest
                .iter()
                .zip(*first..)
                .take_while(|(a, b)| **a == *b)
                .count();
            let (now, later) = rest.split_at(run);
            match now {
                [_, .., last] => write!(out, "{separator}{first}-{last}")?,
                _ => write!(out, "{separator}{first}")?,
            }
            separator = ",";
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_of_numbers_and_ranges_are_read_in_order() {
        for (text, cpus) in [
            ("0", vec![0]),
            ("1,2-3", vec![1, 2, 3]),
            ("7,0-1", vec![7, 0, 1]),
            ("5-5", vec![5]),
            ("1023", vec![1023]),
        ] {
            assert_eq!(text.parse::<CpuList>().unwrap().as_slice(), cpus, "{text}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "missing"),
            (",", "missing"),
            ("1,", "missing"),
            ("-1", "missing"),
            ("1-", "missing"),
            ("1-2-3", "no number"),
            ("a", "no number"),
            ("+1", "no number"),
            ("1, 2", "no number"),
            ("0x1", "no number"),
            ("3-1", "backwards"),
            ("1,1", "twice"),
            ("0-3,2", "twice"),
            ("1024", "end at 1023"),
            ("0-4294967295", "end at 1023"),
            ("0-99999999999999999999999999", "end at 1023"),
        ] {
            let error = text.parse::<CpuList>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn the_process_may_run_somewhere_and_the_default_is_the_highest() {
        let allowed = CpuList::allowed().unwrap();
        let highest = allowed.highest().unwrap();
        assert!(allowed.outside(&allowed).is_empty());
        assert_eq!(highest, *allowed.as_slice().iter().max().unwrap());
    }

    proptest! {
        #[test]
        fn display_reads_back(cpus in proptest::collection::btree_set(0usize..64, 1..20)) {
            let list = CpuList(cpus.into_iter().collect());
            prop_assert_eq!(list.to_string().parse::<CpuList>().unwrap(), list);
        }

        #[test]
        fn no_text_panics(text in "[0-9,-]{0,30}") {
            let _ = text.parse::<CpuList>();
        }
    }
}
