//! Several tasks at once: one `LoRA` against mixtures of about as many parameters, by the loss on what each task held out.
//!
//! ```text
//! cargo xtask fetch smollm2 identity chatterbot vader
//! cargo build --release -p peft-cli
//! cargo run --release -p peft-benches -- several --peft target/release/peft --model data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out runs/several \
//!   --tasks data/identity/persona,data/chatterbot/trivia,data/vader/film-words,data/vader/product-stars
//! ```
//! A task is the beginning of two names: `…-train.jsonl` and `…-test.jsonl`.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use serde_json::Value;

use crate::Outcome;
use crate::runs::{Recipe, Runs, mean_and_deviation, watch};

#[derive(Args)]
pub(crate) struct Several {
    #[command(flatten)]
    runs: Runs,
    /// The beginnings of the names of the tasks' data
    #[arg(long, value_delimiter = ',', required = true)]
    tasks: Vec<PathBuf>,
    /// Steps of a run
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Rows of a batch
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Most tokens of a row
    #[arg(long, default_value_t = 128)]
    max_len: usize,
    /// Learning rate of all methods
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
}

const ALL: &str = "all-linear";
/// Of attention alone: the rest of `MixLoRA` is around feed-forward parts.
const ATTENTION: &str = "q_proj,k_proj,v_proj,o_proj";

/// Methods of about as many parameters: on SmolLM2-135M 5.0 to 5.5 million.
const METHODS: [Recipe; 6] = [
    ("lora", &["--method", "lora", "--targets", ALL, "--rank", "18", "--alpha", "36"]),
    ("molora", &["--method", "molora", "--targets", ALL, "--num-experts", "4", "--rank", "4", "--alpha", "8"]),
    (
        "molora-top-2",
        &[
            "--method",
            "molora",
            "--targets",
            ALL,
            "--num-experts",
            "4",
            "--rank",
            "4",
            "--alpha",
            "8",
            "--top-k",
            "2",
            "--balance",
            "0.01",
        ],
    ),
    ("loramoe", &["--method", "loramoe", "--targets", ALL, "--num-experts", "4", "--rank", "4", "--alpha", "8"]),
    ("moelora", &["--method", "moelora", "--targets", ALL, "--num-experts", "4", "--rank", "4", "--alpha", "8"]),
    ("mixlora", &["--method", "mixlora", "--targets", ATTENTION, "--num-experts", "4", "--rank", "6", "--alpha", "12"]),
];

/// How many of the experts a token goes through.
fn active(method: &str) -> &'static str {
    match method {
        "lora" => "",
        "molora-top-2" | "mixlora" => "2 of 4",
        _ => "4 of 4",
    }
}

/// What a run reached: the loss of each task, and what it cost.
struct Reached {
    losses: Vec<f64>,
    trained: f64,
    seconds: f64,
}

impl Several {
    pub(crate) fn run(&self) -> Outcome<()> {
        let wanted = self.runs.chosen(&METHODS, &[])?;
        if let Some(seed) = self.runs.seed {
            return wanted.into_iter().try_for_each(|(name, flags)| self.one(name, flags, seed).map(drop));
        }
        let name = |task: &PathBuf| task.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let tasks: Vec<String> = self.tasks.iter().map(name).collect();
        println!(
            "| method | {} | mean | trained parameters | active experts | time, of the first |",
            tasks.join(" | ")
        );
        println!("|---|{}---|---|---|---|", "---|".repeat(tasks.len()));
        let mut first = None;
        for (name, flags) in wanted {
            let runs = self.runs.each(|seed| self.one(name, flags, seed))?;
            let cell = |of: &dyn Fn(&Reached) -> f64| {
                let (mean, deviation) = mean_and_deviation(&runs.iter().map(of).collect::<Vec<_>>());
                format!("{mean:.4} ± {deviation:.4}")
            };
            let by_task: Vec<String> = (0..tasks.len()).map(|task| cell(&|run| run.losses[task])).collect();
            let mean = cell(&|run| run.losses.iter().sum::<f64>() / run.losses.len() as f64);
            let (trained, _) = mean_and_deviation(&runs.iter().map(|run| run.trained).collect::<Vec<_>>());
            let (seconds, _) = mean_and_deviation(&runs.iter().map(|run| run.seconds).collect::<Vec<_>>());
            let ratio = seconds / *first.get_or_insert(seconds);
            println!("| {name} | {} | {mean} | {trained:.0} | {} | {ratio:.2} |", by_task.join(" | "), active(name));
        }
        Ok(())
    }

    /// One run, or what it wrote down when it was done before.
    fn one(&self, name: &str, flags: &[&str], seed: u64) -> Outcome<Reached> {
        let out = self.runs.out.join(format!("{name}-{seed}"));
        let note = out.join("reached.json");
        if !note.is_file() {
            let (train, _) = watch(self.train(flags, seed, &out))?;
            let losses = (0..self.tasks.len())
                .map(|task| Ok(watch(self.eval(name, task, &out))?.0))
                .collect::<Outcome<Vec<_>>>()?;
            std::fs::write(&note, format!("{:#}\n", serde_json::json!({ "train": train, "test": losses })))?;
        }
        let reached: Value = serde_json::from_str(&std::fs::read_to_string(&note)?)?;
        let number =
            |value: &Value, what: &str| value.as_f64().ok_or_else(|| format!("{}: no {what}", note.display()).into());
        let losses = reached["test"].as_array().into_iter().flatten();
        Ok(Reached {
            losses: losses.map(|task| number(&task["loss"], "loss")).collect::<Outcome<_>>()?,
            trained: number(&reached["train"]["parameters"]["trainable"], "trainable")?,
            seconds: number(&reached["train"]["seconds"], "seconds")?,
        })
    }

    fn train(&self, flags: &[&str], seed: u64, out: &Path) -> Command {
        let mut command = self.command("train");
        command.args(["--overwrite", "--out"]).arg(out).args(flags);
        for task in 0..self.tasks.len() {
            command.arg("--data").arg(self.part(task, "train"));
        }
        let numbers = [
            ("--steps", self.steps.to_string()),
            ("--batch-size", self.batch_size.to_string()),
            ("--seed", seed.to_string()),
            ("--lr", self.lr.to_string()),
        ];
        command.args(numbers.iter().flat_map(|(flag, value)| [*flag, value.as_str()]));
        command
    }

    fn eval(&self, name: &str, task: usize, out: &Path) -> Command {
        let mut command = self.command("eval");
        command.arg("--adapter").arg(out).arg("--data").arg(self.part(task, "test"));
        if name == "moelora" {
            command.args(["--task-id", &task.to_string()]);
        }
        command
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = self.runs.command(verb);
        command.args(["--max-len", &self.max_len.to_string(), "--model"]).arg(&self.runs.model);
        command
    }

    fn part(&self, task: usize, part: &str) -> PathBuf {
        let mut path = self.tasks[task].clone().into_os_string();
        path.push(format!("-{part}.jsonl"));
        path.into()
    }
}
