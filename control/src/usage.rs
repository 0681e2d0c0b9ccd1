//! clap's errors in the form of all our errors: one line that says what, one that says what to do.

use std::error::Error as _;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use ringway_api::BadValue;

/// Exit code of a command line that makes no sense.
pub(crate) const USAGE: u8 = 2;

/// Prints `error` (or the help that was asked for) and gives the exit code.
pub(crate) fn exit(program: &str, error: &clap::Error) -> ExitCode {
    if is_display(error) {
        // A closed pipe is no reason to fail.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let (what, hint) = explain(error);
    let _ = writeln!(io::stderr(), "{program}: error: {what}\n  hint: {hint}");
    ExitCode::from(USAGE)
}

/// Whether `error` is help or a version that was asked for.
pub(crate) fn is_display(error: &clap::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    )
}

/// What is wrong, and what to do.
pub(crate) fn explain(error: &clap::Error) -> (String, String) {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return (
            "a command is missing".into(),
            "--help lists the commands".into(),
        );
    }
    // Its first paragraph is what is wrong; what to do is in the error itself.
    let text = error.render().to_string();
    let lines = text.lines().take_while(|line| !line.is_empty());
    let what = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what).to_owned();
    (what, hint(error))
}

/// What to do: what the value itself says, a near miss, or the usage.
fn hint(error: &clap::Error) -> String {
    let bad = error.source().and_then(|source| source.downcast_ref());
    if let Some(BadValue { hint, .. }) = bad {
        return hint.clone();
    }
    let near = [
        ContextKind::SuggestedSubcommand,
        ContextKind::SuggestedArg,
        ContextKind::SuggestedValue,
    ];
    for suggestion in near.into_iter().filter_map(|kind| error.get(kind)) {
        match suggestion {
            ContextValue::String(word) => return format!("did you mean `{word}`?"),
            ContextValue::Strings(words) if !words.is_empty() => {
                return format!("did you mean `{}`?", words.join("` or `"));
            }
            _ => {}
        }
    }
    match error.get(ContextKind::Usage).map(ToString::to_string) {
        Some(usage) => usage.replacen("Usage:", "usage:", 1),
        None => "--help shows the usage".into(),
    }
}
