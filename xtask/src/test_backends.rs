//! `cargo xtask test-backends`: the conformance checks, one process per backend, and the table of their deviations.
//!
//! The program `conformance` of the package `peft-tests` runs every check on one device and prints one JSON object per line:
//! `{"check":"merge","status":"ok","deviation":1e-7,"bound":1e-5,"note":""}`, where the status is `ok`, `fail` or `skip`. It exits with 0
//! when no check failed, with 3 when the device cannot be had, and then its last line on standard error says why.
//! A process per backend keeps a driver that crashes from taking the others with it.

use crate::error::{Error, Result};
use crate::workspace::{Metadata, root};
use crate::{corrected, process, setup};
use clap::{Args, ValueEnum};
use serde::Deserialize;
use std::process::Command;
use std::time::{Duration, Instant};

/// The arguments of `test-backends`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The backends to run, separated by commas
    #[arg(long = "backend", value_enum, value_delimiter = ',', default_values = ["flex", "ndarray", "vulkan", "wgpu"])]
    backends: Vec<Backend>,
    /// Run without fusing operations into kernels
    #[arg(long)]
    no_fusion: bool,
    /// Fail where a backend is skipped or does not finish in time
    #[arg(long)]
    require: bool,
    /// Minutes that one backend may take
    #[arg(long, default_value_t = 25)]
    minutes: u64,
}

/// A backend of Burn, by the name that `conformance --device` knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Backend {
    /// Burn's default on the CPU
    Flex,
    /// The older CPU backend
    Ndarray,
    /// Vulkan with SPIR-V; in software where there is no GPU
    Vulkan,
    /// WebGPU with WGSL; in software where there is no GPU
    Wgpu,
    /// The kernel compiler on the CPU; needs the LLVM SDK
    Cpu,
    /// CUDA; needs the LLVM SDK to build and a GPU to run
    Cuda,
}

/// The exit code with which `conformance` says that the device cannot be had.
const NO_DEVICE: i32 = 3;

/// How wide the table's column of a backend is.
const COLUMN: usize = 12;

impl Backend {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// The feature that builds it, where that is no default.
    fn feature(self) -> Option<&'static str> {
        match self {
            Self::Flex | Self::Ndarray => None,
            Self::Vulkan => Some("peft-cli/vulkan"),
            Self::Wgpu => Some("peft-cli/wgpu"),
            Self::Cpu => Some("peft-cli/cpu"),
            Self::Cuda => Some("peft-cli/cuda"),
        }
    }

    /// What makes it run in software; nothing where it runs as it is.
    fn software(self) -> Result<setup::Environment> {
        match self {
            Self::Vulkan => setup::vulkan_environment(),
            Self::Wgpu => setup::wgpu_environment(),
            Self::Flex | Self::Ndarray | Self::Cpu | Self::Cuda => Ok(Vec::new()),
        }
    }
}

/// One line that `conformance` prints.
#[derive(Deserialize, Clone, Debug)]
struct Check {
    check: String,
    status: Status,
    /// The largest deviation from the reference; absent where a check measures none, null where it is not finite.
    #[serde(default)]
    deviation: Option<f64>,
    #[serde(default)]
    bound: Option<f64>,
    #[serde(default)]
    note: String,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Fail,
    Skip,
}

impl Check {
    fn cell(&self) -> String {
        let deviation = || self.deviation.map_or_else(|| "-".to_owned(), |deviation| format!("{deviation:.1e}"));
        match self.status {
            Status::Ok => self.deviation.map_or_else(|| "ok".to_owned(), |_| deviation()),
            Status::Fail => format!("FAIL {}", deviation()),
            Status::Skip => "skip".to_owned(),
        }
    }

    fn describe(&self) -> String {
        let number = |value: Option<f64>| value.map_or_else(|| "none".to_owned(), |value| format!("{value:.3e}"));
        format!("deviation {}, bound {}; {}", number(self.deviation), number(self.bound), self.note)
    }
}

/// What came of one backend.
struct Run {
    backend: Backend,
    checks: Vec<Check>,
    end: End,
    took: Duration,
}

/// How a backend's process ended.
#[derive(PartialEq, Eq, Debug)]
enum End {
    /// It ran every check.
    Complete,
    /// It could not run, or not to the end in time: a gap, not a wrong result.
    Skipped(String),
    /// It crashed, or printed what is no check.
    Broken(String),
}

/// Runs `test-backends`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let required = if arguments.require { arguments.backends.as_slice() } else { &[] };
    let limit = Duration::from_secs(60 * arguments.minutes);
    test(&arguments.backends, required, arguments.no_fusion, limit, &[])
}

/// Builds `conformance` and runs it on every backend; an error if a check failed or a required backend was skipped.
/// `build_environment` is set for the build.
pub(crate) fn test(
    backends: &[Backend],
    required: &[Backend],
    no_fusion: bool,
    limit: Duration,
    build_environment: &[(&str, &str)],
) -> Result<()> {
    let program = Metadata::read()?.target_directory.join("debug/conformance");
    let mut runs = Vec::new();
    for backends in programs(backends) {
        let software: Vec<_> = backends.iter().map(|backend| backend.software()).collect();
        // Nothing is built for a backend that this machine cannot run.
        if software.iter().any(Result::is_ok) {
            build(backends, software.iter().flatten().any(|environment| !environment.is_empty()), build_environment)?;
        }
        for (&backend, software) in backends.iter().zip(software) {
            eprintln!("running conformance on {}", backend.name());
            let run = run_backend(Command::new(&program), backend, software, no_fusion, limit)?;
            eprintln!("  {} checks in {:.1} s", run.checks.len(), run.took.as_secs_f64());
            runs.push(run);
        }
    }
    print!("{}", table(&runs));
    let problems: Vec<_> = runs.iter().flat_map(|run| problems(run, required.contains(&run.backend))).collect();
    if problems.is_empty() { Ok(()) } else { Err(Error::Failed(problems.join("\n       "))) }
}

/// The backends by program: each that is no default has its own, for they change each other. Where Vulkan is compiled in, for instance,
/// Burn's WebGPU device takes SPIR-V as well.
fn programs(backends: &[Backend]) -> impl Iterator<Item = &[Backend]> {
    backends.chunk_by(|one, next| one.feature().is_none() && next.feature().is_none())
}

/// Builds the program for these backends. In software the choice among kernels is left to Burn's rules, since trying each takes minutes
/// there, and the CPU backend is only the reference, better compiled than computed fast.
fn build(backends: &[Backend], software: bool, environment: &[(&str, &str)]) -> Result<()> {
    let features = backends.iter().filter_map(|backend| backend.feature());
    if backends.iter().any(|backend| matches!(backend, Backend::Cpu | Backend::Cuda)) {
        setup::llvm()?;
    }
    // The whole workspace is named so that features are resolved as in every other build; only this binary is compiled.
    let mut command = Command::new("cargo");
    command.args(["build", "--workspace", "--bin", "conformance"]).envs(environment.iter().copied());
    command.env("CARGO_TARGET_DIR", Metadata::read()?.target_directory);
    let (manifest, features): (_, Vec<_>) = if software {
        command.args(["--no-default-features", "--config", "profile.dev.package.burn-flex.opt-level=0"]);
        (corrected::workspace()?, ["peft-cli/flex"].into_iter().chain(features).collect())
    } else {
        (root().join("Cargo.toml"), features.collect())
    };
    process::run(command.arg("--manifest-path").arg(manifest).args(["--features", &features.join(",")]))
}

fn run_backend(
    mut command: Command,
    backend: Backend,
    software: Result<setup::Environment>,
    no_fusion: bool,
    limit: Duration,
) -> Result<Run> {
    let begun = Instant::now();
    let environment = match software {
        Ok(environment) => environment,
        Err(error) => {
            return Ok(Run {
                backend,
                checks: Vec::new(),
                end: End::Skipped(error.to_string()),
                took: begun.elapsed(),
            });
        }
    };
    command.args(["--device", &backend.name(), "--json"]).envs(environment);
    if no_fusion {
        command.env("BURN_FUSION_MAX_EXPLORATIONS", "0");
    }
    let (mut checks, mut malformed) = (Vec::<Check>::new(), None);
    let watched = process::watch(&mut command, limit, |line| match serde_json::from_str(line) {
        Ok(check) => checks.push(check),
        Err(error) if !line.trim().is_empty() => malformed = Some(format!("`{line}` is not a check: {error}")),
        Err(_) => {}
    })?;
    let end = malformed.map_or_else(|| end_of(&watched, &checks, limit), End::Broken);
    Ok(Run { backend, checks, end, took: begun.elapsed() })
}

fn end_of(watched: &process::Watched, checks: &[Check], limit: Duration) -> End {
    let after =
        checks.last().map_or_else(|| "before the first check".to_owned(), |last| format!("after `{}`", last.check));
    let failed = checks.iter().any(|check| check.status == Status::Fail);
    match watched.status.map(|status| (status, status.code())) {
        None => End::Skipped(format!("did not finish in {} s, stopped {after}", limit.as_secs())),
        Some((_, Some(NO_DEVICE))) => End::Skipped(watched.last_words().to_owned()),
        Some((_, Some(0))) if checks.is_empty() => End::Broken("it ran no check".to_owned()),
        Some((_, Some(0))) => End::Complete,
        // The failing checks are the reason for this exit code.
        Some((_, Some(1))) if failed => End::Complete,
        Some((status, _)) => End::Broken(format!("ended with {status} {after}: {}", watched.last_words())),
    }
}

/// One line per check, one column per backend, and below it the reason of every gap.
fn table(runs: &[Run]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for check in runs.iter().flat_map(|run| &run.checks) {
        if !names.contains(&check.check.as_str()) {
            names.push(&check.check);
        }
    }
    let width = names.iter().map(|name| name.len()).max().unwrap_or(0).max("check".len());
    let row = |name: &str, cells: Vec<String>| {
        let cells: String = cells.into_iter().map(|cell| format!("  {cell:>COLUMN$}")).collect();
        format!("{name:width$}{cells}\n")
    };
    let mut out = row("check", runs.iter().map(|run| run.backend.name()).collect());
    for name in names {
        out += &row(name, runs.iter().map(|run| cell(run, name)).collect());
    }
    for Run { backend, checks, end, .. } in runs {
        match end {
            End::Complete => {}
            End::Skipped(reason) => out += &format!("skipped {}: {reason}\n", backend.name()),
            End::Broken(reason) => out += &format!("BROKEN {}: {reason}\n", backend.name()),
        }
        for check in checks.iter().filter(|check| check.status == Status::Skip) {
            out += &format!("skipped {} on {}: {}\n", check.check, backend.name(), check.note);
        }
    }
    out
}

/// What a backend says about a check: the worst of the lines with that name.
fn cell(run: &Run, name: &str) -> String {
    let lines = run.checks.iter().filter(|check| check.check == name);
    let worst = lines.max_by(|a, b| {
        let rank = |check: &Check| (check.status == Status::Fail, check.status == Status::Ok);
        let deviation = |check: &Check| check.deviation.unwrap_or(0.0);
        rank(a).cmp(&rank(b)).then(deviation(a).total_cmp(&deviation(b)))
    });
    worst.map_or_else(|| "-".to_owned(), Check::cell)
}

/// Why a backend fails the command: its failing checks, a crash, and, where it is required, a gap.
fn problems(run: &Run, required: bool) -> Vec<String> {
    let name = run.backend.name();
    let failing = run.checks.iter().filter(|check| check.status == Status::Fail);
    let mut all: Vec<_> =
        failing.map(|check| format!("{} fails on {name}: {}", check.check, check.describe())).collect();
    match &run.end {
        End::Complete => {}
        End::Broken(reason) => all.push(format!("conformance broke on {name}: {reason}")),
        End::Skipped(reason) if required => all.push(format!("{name} is required and was skipped: {reason}")),
        End::Skipped(_) => {}
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a shell script, which ignores its arguments, in the place of `conformance`.
    fn run_script(script: &str, limit: Duration) -> Run {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        run_backend(command, Backend::Flex, Ok(Vec::new()), false, limit).unwrap()
    }

    const MINUTE: Duration = Duration::from_secs(60);
    const GOOD: &str = r#"echo '{"check":"merge","status":"ok","deviation":1.25e-7,"bound":1e-5,"note":""}'"#;
    const BAD: &str = r#"echo '{"check":"seams","status":"fail","deviation":null,"bound":1e-5,"note":"NaN"}'"#;

    #[test]
    fn only_defaults_share_a_program() {
        use Backend::{Flex, Ndarray, Vulkan, Wgpu};
        let found: Vec<_> = programs(&[Flex, Ndarray, Vulkan, Wgpu]).collect();
        assert_eq!(found, [&[Flex, Ndarray][..], &[Vulkan], &[Wgpu]]);
    }

    #[test]
    fn a_good_run_has_no_problems() {
        let run = run_script(GOOD, MINUTE);
        assert_eq!(run.end, End::Complete);
        assert!(problems(&run, true).is_empty());
        let table = table(&[run]);
        assert!(table.lines().any(|line| line.starts_with("merge") && line.ends_with(" 1.2e-7")), "{table}");
    }

    #[test]
    fn a_failing_check_is_marked_and_named() {
        let run = run_script(&format!("{GOOD}; {BAD}; exit 1"), MINUTE);
        assert_eq!(run.end, End::Complete);
        assert_eq!(problems(&run, false), ["seams fails on flex: deviation none, bound 1.000e-5; NaN"]);
        assert!(table(&[run]).contains("FAIL -"));
    }

    #[test]
    fn no_device_is_a_gap_with_its_reason() {
        let run = run_script("echo noise >&2; echo 'no adapter found' >&2; exit 3", MINUTE);
        assert_eq!(run.end, End::Skipped("no adapter found".to_owned()));
        assert!(problems(&run, false).is_empty());
        assert_eq!(problems(&run, true).len(), 1);
    }

    #[test]
    fn a_crash_is_broken_and_names_the_last_check() {
        let run = run_script(&format!("{GOOD}; kill -SEGV $$"), MINUTE);
        let [problem] = problems(&run, false).try_into().unwrap();
        assert!(problem.contains("signal: 11") && problem.contains("after `merge`"), "{problem}");
    }

    #[test]
    fn no_check_and_other_output_are_broken() {
        assert!(matches!(run_script("exit 0", MINUTE).end, End::Broken(_)));
        assert!(matches!(run_script("echo hello", MINUTE).end, End::Broken(reason) if reason.contains("hello")));
    }

    #[test]
    fn a_run_out_of_time_is_a_gap_but_keeps_its_failures() {
        let run = run_script(&format!("{BAD}; exec sleep 30"), Duration::from_millis(500));
        assert!(matches!(&run.end, End::Skipped(reason) if reason.contains("after `seams`")));
        assert_eq!(problems(&run, false).len(), 1);
    }

    #[test]
    fn the_worst_line_of_a_check_is_shown() {
        let second = GOOD.replace("1.25e-7", "3e-6");
        assert!(table(&[run_script(&format!("{second}; {GOOD}"), MINUTE)]).contains("3.0e-6"));
    }
}
