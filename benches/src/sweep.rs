//! How time and memory grow, as a picture.

use std::path::PathBuf;

use clap::Args;
use plotters::chart::SeriesLabelPosition;

use crate::picture::{Chart, Line, draw};
use crate::side::Side;
use crate::{Outcome, Runner, Setup};

#[derive(Args)]
pub(crate) struct Sweep {
    #[command(flatten)]
    setup: Setup,
    /// A Python with torch, transformers and peft
    #[arg(long)]
    python: Option<PathBuf>,
    /// Where the picture goes
    #[arg(long, value_name = "FILE.svg")]
    out: PathBuf,
}

/// What is varied, what is drawn over it, and how a result becomes that.
struct Question {
    title: &'static str,
    of: &'static str,
    values: &'static [usize],
    vary: fn(&Setup, usize) -> Setup,
    /// From the setup, the seconds of a step, and MiB.
    answer: fn(&Setup, f64, f64) -> f64,
}

const QUESTIONS: [Question; 4] = [
    Question {
        title: "Tokens a second against threads",
        of: "threads",
        values: &[1, 2],
        vary: |setup, threads| Setup { threads, ..setup.clone() },
        answer: |setup, seconds, _| tokens(setup) / seconds,
    },
    Question {
        title: "Tokens a second against rank",
        of: "rank",
        values: &[4, 16, 64, 256],
        vary: |setup, rank| Setup { rank, ..setup.clone() },
        answer: |setup, seconds, _| tokens(setup) / seconds,
    },
    Question {
        title: "Milliseconds a token against the length of the sequence",
        of: "tokens of one row",
        values: LENGTHS,
        vary: one_row,
        answer: |setup, seconds, _| 1e3 * seconds / tokens(setup),
    },
    Question {
        title: "MiB above the start against the length of the sequence",
        of: "tokens of one row",
        values: LENGTHS,
        vary: one_row,
        answer: |_, _, mib| mib,
    },
];

const LENGTHS: &[usize] = &[256, 512, 1024, 2048];

fn one_row(setup: &Setup, seq: usize) -> Setup {
    Setup { batch: 1, seq, ..setup.clone() }
}

fn tokens(setup: &Setup) -> f64 {
    (setup.batch * setup.seq) as f64
}

impl Sweep {
    pub(crate) fn run(&self) -> Outcome<()> {
        let mut sides = vec![("lora", Runner::Ours(Side::Lora)), ("apply-lora", Runner::Ours(Side::ApplyLora))];
        if let Some(python) = &self.python {
            sides.push(("torch+peft", Runner::Python { python, flags: &[] }));
        }
        let mut charts = Vec::new();
        // The two about the length ask of the same runs.
        let mut known: Vec<(&str, String, f64, f64)> = Vec::new();
        for question in &QUESTIONS {
            let mut lines: Vec<Line> = sides.iter().map(|(name, _)| Line::new(name)).collect();
            for value in question.values {
                let setup = (question.vary)(&self.setup, *value);
                let key = setup.flags().join(" ");
                for ((name, runner), line) in sides.iter().zip(&mut lines) {
                    if !known.iter().any(|(side, of, ..)| side == name && *of == key) {
                        let result = runner.run(&setup)?;
                        let number = |key: &str| result[key].as_f64().unwrap_or(f64::NAN);
                        known.push((name, key.clone(), number("median_s"), number("memory_mib")));
                    }
                    let found = known.iter().find(|(side, of, ..)| side == name && *of == key);
                    let (.., seconds, mib) = found.ok_or("a side that was not run")?;
                    let answer = (question.answer)(&setup, *seconds, *mib);
                    println!("{}: {} {value}: {name} {answer:.2}", question.title, question.of);
                    line.points.push((*value as f64, answer));
                }
            }
            let legend = SeriesLabelPosition::MiddleRight;
            charts.push(Chart { title: question.title, of: question.of, lines, legend });
        }
        draw(&self.out, &charts)
    }
}
