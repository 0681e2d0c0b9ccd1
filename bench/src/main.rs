//! `ringway-bench`: the lab.

mod synth;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures ringway, next to what it replaces.
#[derive(Debug, Parser)]
#[command(name = "ringway-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Drive a switch with synthetic guests and measure it
    Run(Box<synth::RunArgs>),
    /// Drive ringway and its peers with the same load, in turns, and print the ratios
    Compare(Box<synth::CompareArgs>),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => synth::run(&args),
        Command::Compare(args) => synth::compare(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = synth::hint_of(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
