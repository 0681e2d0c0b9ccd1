//! A directory whose sockets are ports: `NAME.sock`, or `PROFILE/NAME.sock`, made by a QEMU that
//! listens there (libvirt: `mode='server'`), is a port as long as it is there and somebody listens.
//!
//! A thread looks at the whole directory whenever the kernel says that something in it has changed
//! (inotify(7)); what is to be done is decided by `plan.rs`.

mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io::{self, PipeWriter, pipe};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringway_api::{PortConfig, PortName, SocketPath, SocketSpec, VhostUserConfig};
use ringway_dataplane::LogLimit;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;

use self::plan::{Changed, FileId, Found, Plan, Plugged, is_candidate, plan};
use crate::daemon::Service;
use crate::thread::OwnedThread;

/// How a profile's ports are, but for their sockets.
pub type Profiles = BTreeMap<String, VhostUserConfig>;

/// The profile of sockets that are in the directory itself, if it is configured.
const DEFAULT_PROFILE: &str = "default";

/// A socket at which nobody has listened for so long is dead: its VMM was killed.
const DEAD_AFTER: Duration = Duration::from_secs(10);

/// How often what tells nothing by itself is looked at: sockets without a listener, ports that could
/// not be made, a directory that is gone.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// So long nothing more may come before the directory is looked at, so that 200 sockets at once are
/// looked at a few times.
const SETTLE: Duration = Duration::from_millis(5);

/// Lines in 10 s that tell what came and went: as many as a host has guests.
const LOG_LINES: u32 = 1000;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watcher {
    _thread: OwnedThread<PipeWriter>,
}

impl Watcher {
    /// Makes ports of the sockets in `directory`, which exists.
    ///
    /// # Errors
    /// It can't be watched, or there can be no thread.
    pub fn start(directory: &Path, profiles: Profiles, service: Arc<Service>) -> io::Result<Self> {
        let (stopped, stop) = pipe()?;
        let mut auto = Auto {
            directory: directory.to_owned(),
            profiles,
            service,
            watches: watch(directory)?,
            plugged: BTreeMap::new(),
            dead: BTreeMap::new(),
            told: BTreeSet::new(),
            log: LogLimit::new(LOG_LINES),
        };
        let run = move || auto.run(&OwnedFd::from(stopped));
        Ok(Self {
            _thread: OwnedThread::start("ringway-auto", stop, run)?,
        })
    }
}

struct Auto {
    directory: PathBuf,
    profiles: Profiles,
    service: Arc<Service>,
    watches: OwnedFd,
    plugged: BTreeMap<PortName, Plugged>,
    dead: BTreeMap<FileId, Changed>,
    /// What was refused, and is told once.
    told: BTreeSet<(PathBuf, String)>,
    log: LogLimit,
}

impl Auto {
    fn run(&mut self, stopped: &OwnedFd) {
        loop {
            let is_waiting = self.look();
            let timeout = is_waiting.then_some(LOOK_AGAIN);
            if !self.wait(stopped, timeout) {
                return;
            }
        }
    }

    /// Waits for a change, or for the timeout; false if it is to end.
    fn wait(&self, stopped: &OwnedFd, timeout: Option<Duration>) -> bool {
        let time = |time: Duration| Timespec::try_from(time).ok();
        let mut timeout = timeout.and_then(time);
        loop {
            let mut fds = [
                PollFd::new(stopped, PollFlags::IN),
                PollFd::new(&self.watches, PollFlags::IN),
            ];
            let ready = poll(&mut fds, timeout.as_ref());
            let [stop, changed] = fds.map(|fd| !fd.revents().is_empty());
            match ready {
                Err(Errno::INTR) => {}
                Err(_) | Ok(0) => return true,
                Ok(_) if stop => return false,
                Ok(_) => {
                    debug_assert!(changed);
                    drain(&self.watches);
                    timeout = time(SETTLE);
                }
            }
        }
    }

    /// Looks at the directory and does what follows. True if something is to be looked at again though
    /// nothing changes.
    fn look(&mut self) -> bool {
        let found = match find(&self.directory, &self.watches) {
            Ok(found) => found,
            Err(error) => {
                let reason =
                    format!("can't be looked at: {error}; its ports wait until it is there");
                self.refuse(PathBuf::new(), reason);
                return true;
            }
        };
        self.bury(&found);
        let profiles = self.profiles.keys().cloned().collect();
        let Plan {
            unplug,
            plug,
            refused,
        } = plan(found, &self.plugged, &self.dead, &profiles);
        for name in unplug {
            self.unplug(&name);
        }
        let before = std::mem::take(&mut self.told);
        for (place, reason) in refused {
            self.refuse_unless(&before, place, reason);
        }
        let mut has_failed = false;
        for (name, profile, port) in plug {
            let place = port.place.clone();
            if let Err(reason) = self.plug(name, profile, port) {
                has_failed = true;
                self.refuse_unless(&before, place, reason);
            }
        }
        has_failed || !self.plugged.is_empty()
    }

    /// Finds out which sockets are dead, and forgets those that are gone.
    fn bury(&mut self, found: &[Found]) {
        let files = found
            .iter()
            .filter_map(|found| Some((found.file?, found.changed)));
        let files: BTreeMap<_, _> = files.collect();
        self.dead
            .retain(|file, changed| files.get(file) == Some(changed));
        for (name, port) in &self.plugged {
            let refused = self.service.refused_for(name);
            let is_dead = refused.is_some_and(|time| time >= DEAD_AFTER);
            if let Some(changed) = files.get(&port.file).filter(|_| is_dead) {
                self.dead.insert(port.file, *changed);
            }
        }
    }

    fn plug(
        &mut self,
        name: PortName,
        profile: Option<String>,
        port: Plugged,
    ) -> Result<(), String> {
        let profile = profile.as_deref().unwrap_or(DEFAULT_PROFILE);
        let path = self.directory.join(&port.place);
        let path = path.to_string_lossy().parse::<SocketPath>();
        let path = path.map_err(|bad| format!("{bad}; {}", bad.hint))?;
        let socket = SocketSpec::Connect(path);
        let config = match self.profiles.get(profile) {
            Some(profile) => VhostUserConfig {
                socket,
                ..profile.clone()
            },
            None => VhostUserConfig::new(socket),
        };
        let added = self
            .service
            .add_port(name.clone(), PortConfig::VhostUser(config));
        added.map_err(|error| format!("{error}; {}", error.hint()))?;
        self.plugged.insert(name, port);
        Ok(())
    }

    fn unplug(&mut self, name: &PortName) {
        let Some(port) = self.plugged.remove(name) else {
            return;
        };
        // Unless an operator removed it.
        let was_there = self.service.remove_port(name);
        let is_dead = self.dead.contains_key(&port.file);
        if let Some(suppressed) = self.log.pass(Instant::now()) {
            let reason = if is_dead {
                "nobody listens at its socket"
            } else {
                "its socket is gone"
            };
            tracing::info!(port = %name, was_there, suppressed, "port unplugged: {reason}");
        }
    }

    fn refuse(&mut self, place: PathBuf, reason: String) {
        let before = self.told.clone();
        self.refuse_unless(&before, place, reason);
    }

    /// Tells that there is no port for a file, unless that was told before.
    fn refuse_unless(
        &mut self,
        before: &BTreeSet<(PathBuf, String)>,
        place: PathBuf,
        reason: String,
    ) {
        let refused = (place, reason);
        if !before.contains(&refused)
            && let Some(suppressed) = self.log.pass(Instant::now())
        {
            let (place, reason) = &refused;
            let path = self.directory.join(place);
            tracing::warn!(?path, suppressed, "no port: {reason}");
        }
        self.told.insert(refused);
    }
}

/// Events of the directory; those in it are added when they are found. A file that is renamed, or whose rights change, is
/// looked at too: libvirt changes a socket's owner when QEMU has made it.
fn watch(directory: &Path) -> io::Result<OwnedFd> {
    let watches = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watches, directory, events())?;
    Ok(watches)
}

fn events() -> inotify::WatchFlags {
    use inotify::WatchFlags as Event;
    Event::CREATE
        | Event::DELETE
        | Event::MOVED_FROM
        | Event::MOVED_TO
        | Event::ATTRIB
        | Event::DELETE_SELF
        | Event::MOVE_SELF
        | Event::ONLYDIR
}

/// Takes all events; what they say is looked for.
fn drain(watches: &OwnedFd) {
    let mut buffer = [0; 4096];
    while rustix::io::read(watches.as_fd(), &mut buffer).is_ok_and(|n| n > 0) {}
}

/// What is in the directory, and in those in it, which are watched from now on. Symbolic links are not
/// followed.
fn find(directory: &Path, watches: &OwnedFd) -> io::Result<Vec<Found>> {
    // The one of this name may be another one by now.
    inotify::add_watch(watches, directory, events())?;
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let place = PathBuf::from(entry.file_name());
        // What is gone by now was never there.
        let Ok(metadata) = entry.path().symlink_metadata() else {
            continue;
        };
        if !metadata.is_dir() {
            found.extend(candidate(place, &metadata));
            continue;
        }
        // Before it is read, so that nothing comes in between.
        let _ = inotify::add_watch(watches, entry.path(), events());
        for inner in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            if let Ok(metadata) = inner.path().symlink_metadata() {
                found.extend(candidate(place.join(inner.file_name()), &metadata));
            }
        }
    }
    Ok(found)
}

fn candidate(place: PathBuf, metadata: &Metadata) -> Option<Found> {
    let file = metadata.file_type().is_socket().then(|| FileId {
        device: metadata.dev(),
        inode: metadata.ino(),
    });
    let changed = (metadata.ctime(), metadata.ctime_nsec());
    is_candidate(&place).then_some(Found {
        place,
        file,
        changed,
    })
}
