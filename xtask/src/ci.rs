//! `cargo xtask ci`: the test command. Every step is cheaper than the one after it, and the first failure ends the run.

use crate::error::{Error, Result};
use crate::test_backends::{self, Backend};
use crate::workspace::{CHECKED, Metadata};
use crate::{lines, process, setup};
use clap::Args;
use std::process::Command;
use std::time::{Duration, Instant};

/// The arguments of `ci`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Run only these steps, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Leave these steps out, separated by commas
    #[arg(long, value_delimiter = ',')]
    skip: Vec<String>,
}

/// One step of the test command.
struct Step {
    name: &'static str,
    about: &'static str,
    run: fn() -> Result<()>,
}

/// The steps, cheapest first.
const STEPS: &[Step] = &[
    Step { name: "fmt", about: "the format of every file", run: fmt },
    Step { name: "lines", about: "the budgets of files, methods and functions", run: sizes },
    Step { name: "clippy", about: "lints, warnings denied, with CUDA where its SDK can be had", run: clippy },
    Step { name: "doc", about: "documentation, warnings denied", run: doc },
    Step { name: "test", about: "unit and integration tests", run: test },
    Step { name: "doctest", about: "the examples in the documentation", run: doctest },
    Step { name: "backends", about: "conformance on every backend that this machine can run", run: backends },
    Step { name: "examples", about: "the example programs, run", run: examples },
];

/// Every build of the test command: the incremental cache only costs time and space where nothing is built a second time.
const BUILD: [(&str, &str); 1] = [("CARGO_INCREMENTAL", "0")];

/// How long conformance may take on one backend.
const BACKEND_LIMIT: Duration = Duration::from_mins(30);

/// How long one example may take.
const EXAMPLE_LIMIT: Duration = Duration::from_mins(10);

/// Runs `ci`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let steps = chosen(arguments)?;
    let begun = Instant::now();
    let mut summary = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let elapsed = clock(begun.elapsed());
        println!("\n=== [{}/{}] {}: {} (at {elapsed})", number + 1, steps.len(), step.name, step.about);
        let step_begun = Instant::now();
        let result = (step.run)();
        let word = if result.is_ok() { "passed" } else { "FAILED" };
        summary.push(format!("{:10} {:>8}  {word}", step.name, clock(step_begun.elapsed())));
        if let Err(error) = result {
            print_summary(&summary, begun);
            let again = format!("rerun this step alone with `cargo xtask ci --only {}`", step.name);
            return Err(Error::Failed(format!("step {} failed: {error}\n{again}", step.name)));
        }
    }
    print_summary(&summary, begun);
    Ok(())
}

/// The steps that the arguments leave, in their order.
fn chosen(arguments: &Arguments) -> Result<Vec<&'static Step>> {
    for name in arguments.only.iter().chain(&arguments.skip) {
        if !STEPS.iter().any(|step| step.name == name) {
            let known = STEPS.iter().map(|step| step.name).collect::<Vec<_>>().join(", ");
            return Err(Error::Unknown { kind: "step", name: name.clone(), known });
        }
    }
    let named = |names: &[String], step: &Step| names.iter().any(|name| name == step.name);
    let wanted =
        |step: &&Step| (arguments.only.is_empty() || named(&arguments.only, step)) && !named(&arguments.skip, step);
    Ok(STEPS.iter().filter(wanted).collect())
}

fn print_summary(summary: &[String], begun: Instant) {
    println!("\n=== summary");
    for line in summary {
        println!("{line}");
    }
    println!("{:10} {:>8}", "total", clock(begun.elapsed()));
}

/// Minutes and seconds.
fn clock(time: Duration) -> String {
    format!("{}:{:04.1}", time.as_secs() / 60, time.as_secs_f64() % 60.0)
}

/// A Cargo command, shown before it runs.
fn cargo(words: &[&str], environment: &[(&'static str, String)]) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(words).envs(BUILD).envs(environment.iter().map(|(name, value)| (name, value)));
    println!("$ {}", process::spelled(&command));
    process::run(&mut command)
}

/// Installs a component of the Rust toolchain that a minimal installation lacks.
fn need_component(subcommand: &str, component: &str) -> Result<()> {
    if process::succeeds(Command::new("cargo").args([subcommand, "--version"])) {
        return Ok(());
    }
    process::run(Command::new("rustup").args(["component", "add", component]))
}

fn fmt() -> Result<()> {
    need_component("fmt", "rustfmt")?;
    cargo(&["fmt", "--all", "--check"], &[])
}

fn sizes() -> Result<()> {
    lines::run(&lines::Arguments { check: true })
}

fn clippy() -> Result<()> {
    need_component("clippy", "clippy")?;
    cargo(&["clippy", "--workspace", "--all-targets", "--features", &checked_features(), "--", "-D", "warnings"], &[])
}

fn doc() -> Result<()> {
    // Libraries only: the binary `peft` and the library `peft` would write the same files.
    let features = checked_features();
    let words = ["doc", "--workspace", "--lib", "--no-deps", "--features", &features];
    cargo(&words, &[("RUSTDOCFLAGS", "-D warnings".to_owned())])
}

/// What is type-checked: CUDA as well. No GPU is needed for that, but Burn's build scripts want the LLVM SDK.
fn checked_features() -> String {
    match setup::llvm() {
        Ok(_) => format!("{CHECKED},peft-cli/cuda"),
        Err(error) => {
            println!("CUDA is not checked, there is no LLVM SDK: {error}");
            CHECKED.to_owned()
        }
    }
}

fn test() -> Result<()> {
    if process::succeeds(Command::new("cargo").args(["nextest", "--version"])) {
        return cargo(&["nextest", "run", "--workspace"], &[]);
    }
    cargo(&["test", "--workspace", "--lib", "--bins", "--tests"], &[])
}

fn doctest() -> Result<()> {
    cargo(&["test", "--workspace", "--doc"], &[])
}

fn backends() -> Result<()> {
    // Software Vulkan comes from Debian; on another system it is named as skipped.
    let everywhere = [Backend::Flex, Backend::Ndarray];
    let all = [&everywhere[..], &[Backend::Vulkan]].concat();
    test_backends::test(&all, &everywhere, false, BACKEND_LIMIT, &BUILD)
}

fn examples() -> Result<()> {
    cargo(&["build", "--workspace", "--examples"], &[])?;
    let metadata = Metadata::read()?;
    for example in metadata.examples() {
        if let Some(reason) = example.not_run {
            println!("--- {} is compiled only: {reason}", example.name);
            continue;
        }
        println!("--- {}", example.name);
        let mut command = Command::new(metadata.target_directory.join("debug/examples").join(&example.name));
        let watched = process::watch(&mut command, EXAMPLE_LIMIT, |line| println!("{line}"))?;
        if !watched.status.is_some_and(|status| status.success()) {
            let end = watched
                .status
                .map_or_else(|| format!("ran over {} s", EXAMPLE_LIMIT.as_secs()), |status| status.to_string());
            return Err(Error::Failed(format!("example {} failed ({end}):\n{}", example.name, watched.stderr)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[&str], skip: &[&str]) -> Result<Vec<&'static str>> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let steps = chosen(&Arguments { only: owned(only), skip: owned(skip) })?;
        Ok(steps.into_iter().map(|step| step.name).collect())
    }

    #[test]
    fn steps_are_chosen_in_their_order() {
        assert_eq!(names(&[], &[]).unwrap().len(), STEPS.len());
        assert_eq!(names(&["clippy", "fmt"], &[]).unwrap(), ["fmt", "clippy"]);
        assert!(!names(&[], &["doc"]).unwrap().contains(&"doc"));
    }

    #[test]
    fn an_unknown_step_is_an_error() {
        let message = names(&["clipy"], &[]).unwrap_err().to_string();
        assert!(message.contains("`clipy`") && message.contains("fmt, lines, clippy"), "{message}");
    }

    #[test]
    fn a_time_is_minutes_and_seconds() {
        assert_eq!(clock(Duration::from_millis(75_250)), "1:15.2");
        assert_eq!(clock(Duration::from_millis(5_000)), "0:05.0");
    }
}
