//! `ringway-bench`: the lab.
#![forbid(unsafe_code)]

mod daemon;
mod hint;
mod interrupt;
mod lab;
mod machine;
mod netns;
mod process;
mod stats;
mod synth;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures ringway, on real guests and with synthetic ones, next to what it replaces.
#[derive(Debug, Parser)]
#[command(name = "ringway-bench", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Tool,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// Boot two QEMU guests and a host tap on ringwayd and run ping and iperf3 between them
    Lab(Box<lab::LabArgs>),
    /// Drive a switch with synthetic guests and measure it
    Run(Box<synth::RunArgs>),
    /// Drive ringway and its peers with the same load, in turns, and print the ratios
    Compare(Box<synth::CompareArgs>),
}

/// As a shell reports a program that SIGINT ended.
const EXIT_INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Tool::Lab(args) => lab::run(*args),
        Tool::Run(args) => synth::run(&args),
        Tool::Compare(args) => synth::compare(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(_) if interrupt::requested() => {
            eprintln!("interrupted");
            ExitCode::from(EXIT_INTERRUPTED)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            if let Some(hint) = hint::hint_of(&error) {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
