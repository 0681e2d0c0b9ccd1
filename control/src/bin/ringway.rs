//! The operator's tool.

fn main() -> std::process::ExitCode {
    ringway_control::cli::main()
}
