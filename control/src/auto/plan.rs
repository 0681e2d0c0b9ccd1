//! From the sockets that are found in the directory to what is to be done: a pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ringway_api::PortName;

/// A file, whatever its name: another one at the same path is another one here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileId {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// When a file last changed, its rights and owner too.
pub(super) type Changed = (i64, i64);

/// What is in the directory, or in one of a profile, and ends in `.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// `NAME.sock` or `PROFILE/NAME.sock`, of which neither part need be a name.
    pub(super) place: PathBuf,
    /// None if it is no socket.
    pub(super) file: Option<FileId>,
    pub(super) changed: Changed,
}

/// A port that was made for a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plugged {
    pub(super) place: PathBuf,
    pub(super) file: FileId,
}

/// What is to be done, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Ports whose sockets are gone.
    pub(super) unplug: Vec<PortName>,
    /// Ports to be made, with their profiles.
    pub(super) plug: Vec<(PortName, Option<String>, Plugged)>,
    /// What no port is made for, and why.
    pub(super) refused: Vec<(PathBuf, String)>,
}

/// The ending of what is looked at. Others make files there too: QEMU's pid, a lock.
const ENDING: &str = "sock";

/// Whether a file is looked at.
pub(super) fn is_candidate(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == ENDING)
}

/// Decides. `dead` are sockets at which nobody has listened for long, as they were then: the number of a
/// file that is gone may be that of a new one.
pub(super) fn plan(
    mut found: Vec<Found>,
    plugged: &BTreeMap<PortName, Plugged>,
    dead: &BTreeMap<FileId, Changed>,
    profiles: &BTreeSet<String>,
) -> Plan {
    let mut plan = Plan::default();
    let is_there = |port: &Plugged| {
        let same = |found: &Found| found.place == port.place && found.file == Some(port.file);
        found.iter().any(same) && !dead.contains_key(&port.file)
    };
    let mut kept = BTreeMap::new();
    for (name, port) in plugged {
        if is_there(port) {
            kept.insert(name.clone(), port.place.clone());
        } else {
            plan.unplug.push(name.clone());
        }
    }
    // Of two for one name the same one wins each time.
    found.sort_by(|a, b| a.place.cmp(&b.place));
    for found in found {
        let Found {
            place,
            file,
            changed,
        } = found;
        let (name, profile) = match read(&place, profiles) {
            Ok(read) => read,
            Err(reason) => {
                plan.refused.push((place, reason));
                continue;
            }
        };
        let Some(file) = file else {
            plan.refused.push((place, "it is no socket".to_owned()));
            continue;
        };
        if dead.get(&file) == Some(&changed) {
            continue;
        }
        match kept.get(&name) {
            Some(other) if *other == place => {}
            Some(other) => {
                let reason = format!("{} is port {name} already", other.display());
                plan.refused.push((place, reason));
            }
            None => {
                kept.insert(name.clone(), place.clone());
                plan.plug.push((name, profile, Plugged { place, file }));
            }
        }
    }
    plan
}

/// Name and profile of a place.
fn read(place: &Path, profiles: &BTreeSet<String>) -> Result<(PortName, Option<String>), String> {
    let stem = place.file_stem().unwrap_or_default().to_string_lossy();
    let name = stem.parse::<PortName>();
    let name = name.map_err(|bad| format!("{bad}; {}", bad.hint))?;
    let profile = match place.parent().map(Path::to_string_lossy) {
        None => None,
        Some(parent) if parent.is_empty() => None,
        Some(parent) => Some(parent.into_owned()),
    };
    match profile {
        Some(profile) if !profiles.contains(&profile) => {
            let known: Vec<_> = profiles.iter().map(String::as_str).collect();
            let known = match &*known {
                [] => "none is configured".to_owned(),
                known => format!("there are {}", known.join(", ")),
            };
            Err(format!("there is no profile {profile:?}; {known}"))
        }
        profile => Ok((name, profile)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(inode: u64) -> FileId {
        FileId { device: 1, inode }
    }

    fn found(place: &str, inode: u64) -> Found {
        Found {
            place: place.into(),
            file: Some(id(inode)),
            changed: (1, 0),
        }
    }

    fn port(place: &str, inode: u64) -> Plugged {
        Plugged {
            place: place.into(),
            file: id(inode),
        }
    }

    fn name(text: &str) -> PortName {
        text.parse().unwrap()
    }

    fn decide(found: &[Found], plugged: &[(&str, Plugged)], dead: &[u64]) -> Plan {
        let plugged = plugged.iter().cloned();
        plan(
            found.to_vec(),
            &plugged.map(|(n, port)| (name(n), port)).collect(),
            &dead.iter().map(|inode| (id(*inode), (1, 0))).collect(),
            &["web", "db"].map(str::to_owned).into(),
        )
    }

    #[test]
    fn a_socket_that_appears_is_plugged_once_and_unplugged_when_it_is_gone() {
        let vm1 = [found("vm1.sock", 7)];
        let plan = decide(&vm1, &[], &[]);
        assert_eq!(plan.plug, [(name("vm1"), None, port("vm1.sock", 7))]);
        let known = [("vm1", port("vm1.sock", 7))];
        assert_eq!(decide(&vm1, &known, &[]), Plan::default());
        assert_eq!(decide(&[], &known, &[]).unplug, [name("vm1")]);
    }

    #[test]
    fn another_socket_in_its_place_is_another_port() {
        let known = [("vm1", port("vm1.sock", 7))];
        let plan = decide(&[found("vm1.sock", 8)], &known, &[]);
        assert_eq!(plan.unplug, [name("vm1")]);
        assert_eq!(plan.plug, [(name("vm1"), None, port("vm1.sock", 8))]);
    }

    #[test]
    fn a_dead_socket_is_no_port_until_another_one_is_there() {
        let known = [("vm1", port("vm1.sock", 7))];
        let plan = decide(&[found("vm1.sock", 7)], &known, &[7]);
        assert_eq!((plan.unplug, plan.plug), (vec![name("vm1")], vec![]));
        assert_eq!(decide(&[found("vm1.sock", 7)], &[], &[7]), Plan::default());
        assert_eq!(decide(&[found("vm1.sock", 8)], &[], &[7]).plug.len(), 1);
        let mut reused = found("vm1.sock", 7);
        reused.changed = (2, 0);
        assert_eq!(decide(&[reused], &[], &[7]).plug.len(), 1);
    }

    #[test]
    fn a_socket_whose_rights_change_stays_plugged() {
        let mut vm1 = found("vm1.sock", 7);
        vm1.changed = (2, 0);
        let known = [("vm1", port("vm1.sock", 7))];
        assert_eq!(decide(&[vm1], &known, &[]), Plan::default());
    }

    #[test]
    fn a_folder_is_a_profile() {
        let plan = decide(&[found("web/vm1.sock", 1)], &[], &[]);
        let profile = Some("web".to_owned());
        assert_eq!(plan.plug, [(name("vm1"), profile, port("web/vm1.sock", 1))]);
        let plan = decide(&[found("wep/vm1.sock", 1)], &[], &[]);
        let [(place, reason)] = &*plan.refused else {
            panic!("{plan:?}")
        };
        assert_eq!(place, Path::new("wep/vm1.sock"));
        assert_eq!(reason, "there is no profile \"wep\"; there are db, web");
    }

    #[test]
    fn of_two_for_one_name_the_first_stays() {
        let two = [found("web/vm1.sock", 2), found("db/vm1.sock", 1)];
        let plan = decide(&two, &[], &[]);
        assert_eq!(plan.plug[0].2, port("db/vm1.sock", 1));
        assert_eq!(plan.refused[0].0, Path::new("web/vm1.sock"));
        // Whoever was first, not whoever comes first.
        let plan = decide(&two, &[("vm1", port("web/vm1.sock", 2))], &[]);
        assert!(plan.plug.is_empty() && plan.unplug.is_empty());
        assert_eq!(plan.refused[0].0, Path::new("db/vm1.sock"));
    }

    #[test]
    fn what_is_no_name_or_no_socket_is_refused_alone() {
        let regular = Found {
            place: "vm2.sock".into(),
            file: None,
            changed: (1, 0),
        };
        let names = ["-rf.sock", "a b.sock", "..sock", "\u{1b}[2J.sock"];
        let mut all: Vec<_> = names.iter().zip(1..).map(|(n, i)| found(n, i)).collect();
        all.extend([regular, found("vm1.sock", 9)]);
        let plan = decide(&all, &[], &[]);
        assert_eq!(plan.refused.len(), 5, "{plan:?}");
        assert!(
            plan.refused
                .iter()
                .all(|(_, reason)| !reason.contains('\u{1b}'))
        );
        assert_eq!(plan.plug.len(), 1);
        assert!(is_candidate(Path::new("a.sock")) && !is_candidate(Path::new("a.pid")));
    }
}
