//! File descriptors that have run out: said with the limit, and with what helps.

use std::io;

use rustix::process::{Resource, getrlimit};

/// What is wrong and what to do about it, if `error` is that no further file can be opened.
pub fn out_of_fds(error: &io::Error) -> Option<(String, &'static str)> {
    match error.raw_os_error() {
        Some(libc::EMFILE) => {
            // ringwayd raises the soft limit to the hard one at its start.
            let limit = getrlimit(Resource::Nofile).current;
            let limit = limit.map_or("all".to_owned(), |limit| format!("all {limit}"));
            Some((
                format!("{limit} file descriptors that this process may have are in use"),
                "raise LimitNOFILE= of the unit (`ulimit -Hn` of a shell), or remove ports",
            ))
        }
        Some(libc::ENFILE) => Some((
            "the system has no room for another open file".to_owned(),
            "raise `sysctl fs.file-max`, or end other programs",
        )),
        _ => None,
    }
}

/// The error, with its remedy if there is one.
pub(crate) fn explain(error: &io::Error) -> String {
    match out_of_fds(error) {
        Some((what, hint)) => format!("{what}; {hint}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_there_are_no_fds_for_is_explained_by_the_limit() {
        let limit = getrlimit(Resource::Nofile).current.unwrap().to_string();
        let told = explain(&io::Error::from_raw_os_error(libc::EMFILE));
        assert!(
            told.contains(&limit) && told.contains("LimitNOFILE="),
            "{told}"
        );
        let told = explain(&io::Error::from_raw_os_error(libc::ENFILE));
        assert!(told.contains("fs.file-max"), "{told}");
        let other = io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(
            (out_of_fds(&other), explain(&other)),
            (None, other.to_string())
        );
    }
}
