//! Whose the file of a listening socket is and who may open it: settled between bind and listen, so
//! that nobody meets it with other rights. Before listen whoever connects is refused (unix(7)).

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::unistd::{Group, User};
use ringway_api::{AccountName, BadValue, SocketAccess, SocketMode};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};

/// A [`SocketAccess`] in the system's numbers.
#[derive(Clone, Debug)]
pub struct SocketFile {
    owner: Option<(AccountName, Uid)>,
    group: Option<(AccountName, Gid)>,
    mode: SocketMode,
}

/// For its owner and its group, which are the process's.
impl Default for SocketFile {
    fn default() -> Self {
        Self {
            owner: None,
            group: None,
            mode: SocketMode::OWNER_AND_GROUP,
        }
    }
}

impl SocketFile {
    /// Looks the names up, which may take as long as the system's name service does.
    ///
    /// # Errors
    /// There is no such user or group.
    pub fn of(access: &SocketAccess) -> Result<Self, BadValue> {
        let user = |name: &str| Ok(User::from_name(name)?.map(|user| user.uid.as_raw()));
        let group = |name: &str| Ok(Group::from_name(name)?.map(|group| group.gid.as_raw()));
        let owner = access.owner.as_ref().map(|name| number("user", name, user));
        let group = access
            .group
            .as_ref()
            .map(|name| number("group", name, group));
        Ok(Self {
            owner: owner
                .transpose()?
                .map(|(name, uid)| (name, Uid::from_raw(uid))),
            group: group
                .transpose()?
                .map(|(name, gid)| (name, Gid::from_raw(gid))),
            mode: access.mode.unwrap_or(SocketMode::OWNER_AND_GROUP),
        })
    }

    /// Gives the file at `path`, to which a socket was just bound, its owner, group and mode.
    /// Returns it, held open so that no other file can get its inode number.
    ///
    /// # Errors
    /// The file is no longer the one that was made, and is left alone; or this process may not give
    /// it away, and removes it.
    pub fn settle(&self, path: &Path) -> Result<OwnedFd, BadValue> {
        let system = |error: &io::Error| BadValue {
            reason: format!("its socket can't be given its rights: {error}"),
            hint: "use a directory that ringwayd alone may write to".into(),
        };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty());
        let file = file.map_err(|error| system(&error.into()))?;
        let stat = rustix::fs::fstat(&file).map_err(|error| system(&error.into()))?;
        // Whoever may write to the directory may have put another's file there meanwhile.
        let is_socket = FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
        let is_ours = Uid::from_raw(stat.st_uid) == rustix::process::geteuid();
        if !is_socket || !is_ours || stat.st_nlink != 1 {
            return Err(system(&io::Error::other("another file is there")));
        }
        // By way of the fd: fchmod(2) takes none of a file that is not opened to be read.
        let by_fd = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mode = Permissions::from_mode(self.mode.bits().into());
        let settled = fs::set_permissions(by_fd, mode).map_err(|error| system(&error));
        // Last, since it takes a capability to change the mode of what is another's.
        match settled.and_then(|()| self.give(&file)) {
            Ok(()) => Ok(file),
            Err(bad) => {
                let _ = fs::remove_file(path);
                Err(bad)
            }
        }
    }

    /// Makes a directory in which those may make sockets who may open this one, if there is none.
    ///
    /// # Errors
    /// What is there is no directory, or anybody may write to it; or there can be none.
    pub fn make_directory(&self, path: &Path) -> Result<(), BadValue> {
        let system = |error: &io::Error| BadValue {
            reason: format!("{} can't be had: {error}", path.display()),
            hint: "name a directory whose parent exists and that ringwayd may make or use".into(),
        };
        match fs::symlink_metadata(path) {
            Ok(there) if !there.is_dir() => {
                return Err(system(&io::Error::other("it is no directory")));
            }
            Ok(there) if there.permissions().mode() & 0o002 != 0 => {
                return Err(BadValue {
                    reason: format!("anybody may write to {}", path.display()),
                    hint: format!(
                        "whoever makes a socket there has a port of the switch: chmod o-w {}",
                        path.display()
                    ),
                });
            }
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system(&error)),
        }
        fs::create_dir(path).map_err(|error| system(&error))?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty());
        let directory = directory.map_err(|error| system(&error.into()))?;
        // Whoever may connect may look for sockets, and make one.
        let write = u32::from(self.mode.bits()) & 0o220;
        let mode = Mode::from_raw_mode(write << 1 | write | write >> 1);
        let settled = rustix::fs::fchmod(&directory, mode).map_err(|error| system(&error.into()));
        settled.and_then(|()| self.give(&directory))
    }

    fn give(&self, file: &OwnedFd) -> Result<(), BadValue> {
        let (owner, group) = (self.owner.as_ref(), self.group.as_ref());
        if owner.is_none() && group.is_none() {
            return Ok(());
        }
        let (uid, gid) = (owner.map(|(_, uid)| *uid), group.map(|(_, gid)| *gid));
        let given = rustix::fs::chownat(file, "", uid, gid, AtFlags::EMPTY_PATH);
        given.map_err(|error| {
            let named =
                |what: &str, name: Option<&AccountName>| name.map(|name| format!("{what} {name}"));
            let to = [
                named("user", owner.map(|(name, _)| name)),
                named("group", group.map(|(name, _)| name)),
            ];
            let to = to.into_iter().flatten().collect::<Vec<_>>().join(" and ");
            BadValue {
                reason: format!("its socket can't be given to {to}: {error}"),
                hint: "run ringwayd as root or with CAP_CHOWN; without it may only give a socket \
                       to a group that it is in"
                    .into(),
            }
        })
    }
}

fn number(
    what: &str,
    name: &AccountName,
    find: impl FnOnce(&str) -> nix::Result<Option<u32>>,
) -> Result<(AccountName, u32), BadValue> {
    if let Some(number) = name.number() {
        return Ok((name.clone(), number));
    }
    let hint = format!(
        "name one that `getent {}` lists, or give its number",
        match what {
            "user" => "passwd",
            _ => "group",
        }
    );
    match find(name.as_str()) {
        Ok(Some(number)) => Ok((name.clone(), number)),
        Ok(None) => Err(BadValue {
            reason: format!("there is no {what} {name}"),
            hint,
        }),
        Err(error) => Err(BadValue {
            reason: format!("the system can't say who {what} {name} is: {error}"),
            hint,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn access(owner: Option<&str>, group: Option<&str>, mode: Option<&str>) -> SocketAccess {
        SocketAccess {
            owner: owner.map(|name| name.parse().unwrap()),
            group: group.map(|name| name.parse().unwrap()),
            mode: mode.map(|mode| mode.parse().unwrap()),
        }
    }

    #[test]
    fn a_socket_is_for_owner_and_group_unless_told() {
        let folder = tempfile::tempdir().unwrap();
        for (at, (mode, bits)) in [(None, 0o660), (Some("0600"), 0o600), (Some("666"), 0o666)]
            .into_iter()
            .enumerate()
        {
            let path = folder.path().join(at.to_string());
            let _socket = UnixListener::bind(&path).unwrap();
            let file = SocketFile::of(&access(None, None, mode)).unwrap();
            file.settle(&path).unwrap();
            let there = fs::symlink_metadata(&path).unwrap();
            assert_eq!(there.mode() & 0o7777, bits);
            assert_eq!(there.uid(), rustix::process::geteuid().as_raw());
        }
    }

    #[test]
    fn who_does_not_exist_is_named() {
        let error = SocketFile::of(&access(Some("no-such"), None, None)).unwrap_err();
        assert_eq!(error.reason, "there is no user no-such");
        assert!(error.hint.contains("getent passwd"), "{}", error.hint);
        let error = SocketFile::of(&access(None, Some("no-such"), None)).unwrap_err();
        assert_eq!(error.reason, "there is no group no-such");
        assert!(error.hint.contains("getent group"), "{}", error.hint);
    }

    #[test]
    fn a_file_that_took_the_sockets_place_is_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let socket = folder.path().join("socket");
        let _socket = UnixListener::bind(&socket).unwrap();
        fs::hard_link(&socket, folder.path().join("twin")).unwrap();
        let all = SocketFile::of(&access(None, None, Some("0777"))).unwrap();
        for path in [&file, &link, &socket] {
            let error = all.settle(path).unwrap_err();
            assert!(error.reason.contains("another file is there"), "{error}");
        }
        let mode = |path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&file), 0o600);
        assert_ne!(mode(&socket), 0o777);
    }

    mod as_root {
        use super::*;

        #[test]
        fn a_socket_is_given_to_user_and_group_by_name_or_number() {
            let folder = tempfile::tempdir().unwrap();
            let daemon = User::from_name("daemon").unwrap().unwrap();
            let group = Group::from_name("daemon").unwrap().unwrap();
            let (uid, gid) = (daemon.uid.as_raw(), group.gid.as_raw());
            for (at, (owner, group, expected)) in [
                (Some("daemon"), None, (uid, 0)),
                (None, Some("daemon"), (0, gid)),
                (Some("64055"), Some("64056"), (64_055, 64_056)),
            ]
            .into_iter()
            .enumerate()
            {
                let path = folder.path().join(at.to_string());
                let _socket = UnixListener::bind(&path).unwrap();
                let file = SocketFile::of(&access(owner, group, Some("0600"))).unwrap();
                file.settle(&path).unwrap();
                let there = fs::symlink_metadata(&path).unwrap();
                assert_eq!((there.uid(), there.gid()), expected);
                assert_eq!(there.mode() & 0o777, 0o600);
            }
        }
    }
}
