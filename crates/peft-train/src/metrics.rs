//! `metrics.jsonl`: one JSON object a line, for scripts and for the picture.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use peft_core::files::write_atomically;
use serde::{Deserialize, Serialize};

use crate::{Error, Evaluation, ExpertRecord, Result};

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// An optimizer step.
    Step(StepRecord),
    /// A pass over the held-out data.
    Eval(EvalRecord),
    /// What the routers of mixtures did.
    Experts(ExpertRecord),
}

/// An optimizer step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// From 1.
    pub step: usize,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean over what is learnt in the step, before the step.
    pub loss: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Of all gradients together, before clipping.
    pub grad_norm: f64,
    /// What it is a mean over: learnt tokens, or rows.
    #[serde(alias = "tokens")]
    pub count: usize,
    /// Wall time of this step.
    pub seconds: f64,
}

/// A pass over the held-out data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: usize,
    /// What it found.
    #[serde(flatten)]
    pub evaluation: Evaluation,
}

impl Record {
    fn step(&self) -> usize {
        match self {
            Self::Step(record) => record.step,
            Self::Eval(record) => record.step,
            Self::Experts(record) => record.step,
        }
    }
}

/// The open file.
pub(crate) struct Metrics {
    path: PathBuf,
    file: fs::File,
    pub records: Vec<Record>,
}

const NAME: &str = "metrics.jsonl";

impl Metrics {
    /// Opens the file for a run that has done `step` steps: lines beyond, from a run that was cut off, are dropped.
    pub(crate) fn open(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(NAME);
        let mut records = if step > 0 && path.exists() { read_metrics(&path)? } else { Vec::new() };
        records.retain(|record| record.step() <= step);
        let text = records.iter().map(|r| line(r, &path)).collect::<Result<String>>()?;
        write_atomically(dir, &[(NAME, text.as_bytes())])?;
        let file = fs::OpenOptions::new().append(true).open(&path).map_err(Error::io(&path))?;
        Ok(Self { path, file, records })
    }

    pub(crate) fn push(&mut self, record: Record) -> Result<()> {
        self.file.write_all(line(&record, &self.path)?.as_bytes()).map_err(Error::io(&self.path))?;
        self.records.push(record);
        Ok(())
    }
}

fn line(record: &Record, path: &Path) -> Result<String> {
    let json = serde_json::to_string(record).map_err(|e| Error::io(path)(e.into()))?;
    Ok(json + "\n")
}

/// Reads a metrics file.
///
/// # Errors
/// When the file cannot be read or a line is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let parse = |(at, line)| {
        serde_json::from_str(line).map_err(|e| Error::Data {
            path: path.to_owned(),
            place: crate::Place::Line(at + 1),
            what: format!("not a metrics record: {e}"),
        })
    };
    text.lines().enumerate().map(parse).collect()
}
