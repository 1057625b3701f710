//! The command line `peft`: fine-tune, evaluate, run, merge and look into language models, encoders and their adapters.
//!
//! Each command is one file in [`commands`]; the methods that it offers by name are one table, [`methods::METHODS`].

pub mod commands;
pub mod content;
pub mod device;
mod error;
pub mod interrupt;
pub mod methods;
pub mod model;
pub mod output;
pub mod packing;
pub mod rows;
pub mod settings;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser, Subcommand};
pub use error::{Error, Result};
use output::Output;

/// The arguments of the program.
#[derive(Debug, Parser)]
#[command(name = "peft", version, about = "Fine-tune language models and encoders with small adapters, on any device, without Python", after_help = EXAMPLES)]
pub struct Arguments {
    /// Where to compute: cpu, ndarray, cubecl-cpu, vulkan, wgpu, metal or cuda, with an optional :index
    #[arg(long, global = true, default_value = "cpu", help_heading = "Everywhere")]
    pub device: String,
    /// Print one JSON object instead of lines
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,
    /// Say more on standard error; twice for even more
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Everywhere")]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Begin here:
  peft quickstart
  peft train --model MODEL --data data.json --targets all-linear --out my-adapter
  peft generate --model MODEL --adapter my-adapter --prompt \"Once upon a time\"";

/// One command, one file.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// See all of it work: tune the small model in this program, without network, in a minute
    Quickstart(commands::quickstart::Args),
    /// Train an adapter
    Train(Box<commands::train::Args>),
    /// Measure a model, with or without an adapter, on a data file
    Eval(commands::eval::Args),
    /// Label a text, its words or a picture with an encoder
    Predict(commands::predict::Args),
    /// Continue a text or answer a message
    Generate(commands::generate::Args),
    /// Fold an adapter into its model and write a Hugging Face directory
    Merge(commands::merge::Args),
    /// Write a model with packed weights, of about 4 or 8 bits a value
    Quantize(commands::quantize::Args),
    /// Add several LoRA adapters of one model up into one
    Combine(commands::combine::Args),
    /// Write an adapter in the other layout: AdapterHub's, or PEFT's
    Convert(commands::convert::Args),
    /// Show what a model or an adapter is made of
    Inspect(commands::inspect::Args),
    /// List the methods that can be trained
    Methods,
    /// Print the logits of token ids, a text or a picture as JSON, for parity checks and bug reports
    Logits(commands::logits::Args),
}

/// What every command is told.
#[derive(Clone, Debug)]
pub struct Context {
    /// `--device`.
    pub device: String,
    /// Who reads.
    pub output: Output,
}

/// Runs the program with these arguments, the first being its name.
///
/// # Errors
/// What the command refuses. A command line that cannot be parsed ends the process with an explanation, as does `--help`.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<ExitCode> {
    let matches = Arguments::command().get_matches_from(arguments);
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if arguments.verbose > 0 {
        let level = if arguments.verbose == 1 { tracing::Level::INFO } else { tracing::Level::DEBUG };
        tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    }
    let context = Context { device: arguments.device, output: Output { json: arguments.json } };
    let done = |()| ExitCode::SUCCESS;
    match arguments.command {
        Command::Quickstart(args) => commands::quickstart::run(&args, &context).map(done),
        Command::Train(args) => {
            // Which flags were given, as opposed to defaulted, decides what a configuration file may set.
            let given = matches.subcommand_matches("train").unwrap_or(&matches);
            commands::train::run(*args, given, &context)
        }
        Command::Eval(args) => commands::eval::run(&args, &context).map(done),
        Command::Predict(args) => commands::predict::run(&args, &context).map(done),
        Command::Generate(args) => commands::generate::run(&args, &context).map(done),
        Command::Merge(args) => commands::merge::run(&args, &context).map(done),
        Command::Quantize(args) => commands::quantize::run(&args, &context).map(done),
        Command::Combine(args) => commands::combine::run(&args, &context).map(done),
        Command::Convert(args) => commands::convert::run(&args, &context).map(done),
        Command::Inspect(args) => commands::inspect::run(&args, &context).map(done),
        Command::Methods => commands::methods::run(&context).map(done),
        Command::Logits(args) => commands::logits::run(&args, &context).map(done),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
