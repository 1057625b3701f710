//! Everything the workspace automates: `cargo xtask <command>`.
//!
//! Each command is one file. Commands that install something work through the ordinary clients (`apt-get`, `pip`, `npm`) and check every
//! download against a pinned hash where the publisher keeps old versions.

mod archive;
mod ci;
mod corrected;
mod error;
mod fashion;
mod fetch;
mod lines;
mod new_method;
mod process;
mod questions;
mod setup;
mod test_backends;
mod vader;
mod vit;
mod workspace;

use clap::{Parser, Subcommand};
use error::Result;
use std::process::ExitCode;

/// The arguments of `cargo xtask`.
#[derive(Parser)]
#[command(name = "cargo xtask", about = "Everything the workspace automates", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// One command, one file.
#[derive(Subcommand)]
enum Command {
    /// Run the test command: format, sizes, lints, documentation, tests, backends, examples, CUDA compile check
    Ci(ci::Arguments),
    /// Download pinned models and data sets into `data/`
    Fetch(fetch::Arguments),
    /// Count the lines of code of each crate and compare them with the budgets
    Lines(lines::Arguments),
    /// Write a new method's file, in the house style, with its test
    NewMethod(new_method::Arguments),
    /// Install what a backend needs on this machine: software Vulkan, software WebGPU or the LLVM SDK
    Setup(setup::Arguments),
    /// Run the conformance checks, one process per backend, and print the table of deviations
    TestBackends(test_backends::Arguments),
}

fn run(command: &Command) -> Result<()> {
    let root = workspace::root();
    std::env::set_current_dir(&root).map_err(|source| error::Error::io("enter", &root, source))?;
    match command {
        Command::Ci(arguments) => ci::run(arguments),
        Command::Fetch(arguments) => fetch::run(arguments),
        Command::Lines(arguments) => lines::run(arguments),
        Command::NewMethod(arguments) => new_method::run(arguments),
        Command::Setup(arguments) => setup::run(arguments),
        Command::TestBackends(arguments) => test_backends::run(arguments),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
