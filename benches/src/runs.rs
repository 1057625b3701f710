//! Runs of the program, each a process of its own, and what tables of them have in common.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use crate::Outcome;

/// A method's name here, with the settings of `peft train` for it.
pub(crate) type Recipe = (&'static str, &'static [&'static str]);

#[derive(Args)]
pub(crate) struct Runs {
    /// The program
    #[arg(long, value_name = "FILE")]
    pub(crate) peft: PathBuf,
    /// The model, as `peft train --model` has it
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Where the runs go; those that are there already are not repeated
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Where to train, as `peft --device` has it
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Methods to run [default: the usual ones]
    #[arg(long, value_delimiter = ',')]
    methods: Vec<String>,
    /// Runs of each, with the seeds from 1
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Only the runs with this seed, and no table
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

impl Runs {
    /// The methods that are asked for, of the usual and of others; the usual ones where none is.
    pub(crate) fn chosen<'a>(&self, usual: &'a [Recipe], others: &'a [Recipe]) -> Outcome<Vec<&'a Recipe>> {
        if self.methods.is_empty() {
            return Ok(usual.iter().collect());
        }
        let all = || usual.iter().chain(others);
        if let Some(unknown) = self.methods.iter().find(|method| !all().any(|(name, _)| name == method)) {
            let known: Vec<&str> = all().map(|(name, _)| *name).collect();
            return Err(format!("there is no method {unknown} here; there are: {}", known.join(", ")).into());
        }
        Ok(all().filter(|(name, _)| self.methods.iter().any(|method| method == name)).collect())
    }

    /// One run for each seed.
    pub(crate) fn each<T>(&self, run: impl FnMut(u64) -> Outcome<T>) -> Outcome<Vec<T>> {
        (1..=self.seeds).map(run).collect()
    }

    /// The program on the device; the model is still to be given.
    pub(crate) fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.peft);
        command.args([verb, "--json", "--device", &self.device]);
        command
    }
}

/// The JSON object that a command prints, and the largest memory that it was seen to hold, in MiB.
pub(crate) fn watch(mut command: Command) -> Outcome<(Value, f64)> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    // The kernel keeps the peak itself, so that looking now and then misses only what the last moment adds.
    let (status, mut peak) = (format!("/proc/{}/status", child.id()), 0.0_f64);
    while child.try_wait()?.is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let kib =
            text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB")?.trim().parse().ok());
        peak = peak.max(kib.unwrap_or(0.0));
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status).into());
    }
    Ok((serde_json::from_slice(&output.stdout)?, peak / 1024.0))
}

/// Mean and standard deviation of a sample.
pub(crate) fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    (mean, (squares / (count - 1.0).max(1.0)).sqrt())
}
