//! Loss curves of training runs side by side.

use std::path::{Path, PathBuf};

use clap::Args;
use plotters::chart::SeriesLabelPosition;
use serde_json::Value;

use crate::Outcome;
use crate::picture::{Chart, Line, draw};

#[derive(Args)]
pub(crate) struct Curves {
    /// Folders that `peft train` wrote
    #[arg(required = true, value_name = "DIR")]
    runs: Vec<PathBuf>,
    /// Where the picture goes
    #[arg(long, value_name = "FILE.svg")]
    out: PathBuf,
}

impl Curves {
    pub(crate) fn run(&self) -> Outcome<()> {
        let lines = |kind: &str| self.runs.iter().map(|run| losses(run, kind)).collect::<Outcome<Vec<_>>>();
        let chart =
            |title, lines| Chart { title, of: "optimizer step", lines, legend: SeriesLabelPosition::UpperRight };
        let charts = [
            chart("Loss of each batch (nats a token)", lines("step")?),
            chart("Held-out loss (nats a token)", lines("eval")?),
        ];
        draw(&self.out, &charts)
    }
}

/// The losses of a kind that `metrics.jsonl` holds.
fn losses(run: &Path, kind: &str) -> Outcome<Line> {
    let mut line = Line::new(&run.file_name().unwrap_or_default().to_string_lossy());
    for text in std::fs::read_to_string(run.join("metrics.jsonl"))?.lines() {
        let record: Value = serde_json::from_str(text)?;
        if let (true, Some(step), Some(loss)) =
            (record["kind"] == kind, record["step"].as_f64(), record["loss"].as_f64())
        {
            line.points.push((step, loss));
        }
    }
    Ok(line)
}
