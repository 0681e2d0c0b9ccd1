//! clap's errors in the form of all our errors: one line that says what, one that says what to do.

use std::process::ExitCode;

use clap::error::ErrorKind;

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
    eprintln!("{program}: error: {what}\n  hint: {hint}");
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
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n");
    let first = paragraphs.next().unwrap_or_default();
    let what: Vec<_> = first.lines().map(str::trim).collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what).to_owned();
    let mut hint = String::from("--help shows the usage");
    for line in paragraphs.flat_map(str::lines).map(str::trim) {
        if let Some(tip) = line.strip_prefix("tip: ") {
            return (what, tip.to_owned());
        }
        if let Some(usage) = line.strip_prefix("Usage: ") {
            hint = format!("usage: {usage}");
        }
    }
    (what, hint)
}
