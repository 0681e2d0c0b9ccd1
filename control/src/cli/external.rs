//! `ringway x …` runs `ringway-x …` from PATH.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use clap::CommandFactory;

use super::{Args, EXIT_USAGE, Failure, Stop};
use crate::suggest::nearest;

/// Becomes `ringway-x`; returns only if that can't be.
pub(super) fn run(words: &[OsString], socket: &Path) -> Result<(), Stop> {
    let Some((noun, rest)) = words.split_first() else {
        return Err(unknown(OsStr::new("")));
    };
    // With a slash it would not be looked for in PATH.
    if noun.as_encoded_bytes().contains(&b'/') {
        return Err(unknown(noun));
    }
    let mut program = OsString::from("ringway-");
    program.push(noun);
    let error = Command::new(&program)
        .args(rest)
        .env("RINGWAY_CONTROL", socket)
        .exec();
    match error.kind() {
        io::ErrorKind::NotFound => Err(unknown(noun)),
        _ => Err(Stop::Failed(Failure::new(
            EXIT_USAGE,
            "usage",
            format!("can't run {}: {error}", program.display()),
            "is it an executable file?",
        ))),
    }
}

fn unknown(noun: &OsStr) -> Stop {
    let noun = noun.to_string_lossy();
    let command = Args::command();
    let known = command.get_subcommands().filter(|c| !c.is_hide_set());
    let hint = match nearest(&noun, known.map(clap::Command::get_name)) {
        Some(known) => format!("did you mean `{known}`?"),
        None => "`ringway --help` lists the commands".into(),
    };
    let what = format!("unknown command `{noun}`, and no ringway-{noun} in PATH");
    Stop::Failed(Failure::new(EXIT_USAGE, "usage", what, hint))
}
