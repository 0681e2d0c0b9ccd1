//! The daemon.

fn main() -> std::process::ExitCode {
    ringway_control::daemon::main()
}
