//! What methods reach on a task, and what they cost: `peft train` and `peft eval` for each method and seed, each run a process of its own.
//!
//! ```text
//! cargo xtask fetch minilm vader
//! cargo build --release -p peft-cli
//! cargo run --release -p peft-benches -- tasks --peft target/release/peft --model data/minilm --data data/vader/film-polarity --out runs/tasks
//! ```
//! `--data` is the beginning of three names: `…-train.csv`, `…-valid.csv` and `…-test.csv`, or `…-train-images-idx3-ubyte` and so on for pictures
//! (`cargo xtask fetch vit fashion-mnist`, `--model data/vit --data data/fashion-mnist/small`). The model that is tested is the best on the second.
//!
//! Where it is a file, a part of it is held out, and the table has the best that was reached on that: of a language model
//! (`cargo xtask fetch smollm2 identity`, `--model data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data data/identity/identity.json --measure loss`).

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use serde_json::Value;

use crate::Outcome;
use crate::runs::{Recipe, Runs, mean_and_deviation, watch};

#[derive(Args)]
pub(crate) struct Tasks {
    #[command(flatten)]
    runs: Runs,
    /// The beginning of the names of the data
    #[arg(long, value_name = "PREFIX")]
    data: PathBuf,
    /// What prompts start from that start from a text
    #[arg(long, default_value = "")]
    prompt_text: String,
    /// Replace {{NAME}} in the data, as NAME=VALUE; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Passes over the data
    #[arg(long, default_value_t = 2.0)]
    epochs: f64,
    /// Rows of a batch
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Most tokens of a text
    #[arg(long, default_value_t = 64)]
    max_len: usize,
    /// Steps, instead of passes
    #[arg(long)]
    steps: Option<usize>,
    /// Steps between evaluations
    #[arg(long, default_value_t = 200)]
    eval_every: usize,
    /// What is compared, by its name in `peft eval --json`
    #[arg(long, default_value = "accuracy")]
    measure: String,
}

const QUERY_VALUE: &str = "query,value,q_proj,v_proj";
const FEEDFORWARD: &str = "output.dense,fc2";
const IA3: &str = "key,value,output.dense,k_proj,v_proj,fc2";
const LINEAR: &str = "query,key,value,dense,q_proj,k_proj,v_proj,o_proj,fc1,fc2";
const NORMS: &str = "LayerNorm,layernorm,layernorm_before,layernorm_after,norm1,norm2";

/// A method with the settings that are usual for it, on the names of BERT and of vision models; a name that a model does not have adapts nothing.
const METHODS: [Recipe; 10] = [
    ("full", &["--method", "full", "--lr", "5e-5"]),
    ("head", &["--method", "head", "--lr", "1e-2"]),
    ("lora", &["--method", "lora", "--targets", QUERY_VALUE, "--rank", "8", "--alpha", "16", "--lr", "2e-3"]),
    ("ia3", &["--method", "ia3", "--targets", IA3, "--feedforward", FEEDFORWARD, "--lr", "1e-2"]),
    ("ssf", &["--method", "ssf", "--targets", LINEAR, "--targets", NORMS, "--lr", "2e-3"]),
    ("bitfit", &["--method", "bitfit", "--targets", LINEAR, "--lr", "2e-3"]),
    ("ln-tuning", &["--method", "ln-tuning", "--targets", NORMS, "--lr", "5e-3"]),
    ("houlsby", &["--method", "houlsby", "--lr", "2e-3"]),
    ("pfeiffer", &["--method", "pfeiffer", "--lr", "2e-3"]),
    ("parallel", &["--method", "parallel", "--lr", "2e-3"]),
];

/// What stands for the text that is given.
const TEXT: &str = "TEXT";

/// Methods of prompts, with their own learning rates: from random tokens of the model, from random values, from a text.
const PROMPTS: [Recipe; 8] = [
    ("prompt", &["--method", "prompt"]),
    ("prompt-random", &["--method", "prompt", "--init", "random"]),
    ("prompt-text", &["--method", "prompt", "--prompt-text", TEXT]),
    ("p-tuning", &["--method", "p-tuning"]),
    ("p-tuning-lstm", &["--method", "p-tuning", "--encoder", "lstm"]),
    ("prefix", &["--method", "prefix"]),
    ("prefix-random", &["--method", "prefix", "--init", "random"]),
    ("prefix-text", &["--method", "prefix", "--prompt-text", TEXT]),
];

/// What a run reached.
struct Reached {
    measure: f64,
    /// Before training, on what is evaluated on: with a head or a prompt as it starts.
    before: f64,
    trained: f64,
    seconds: f64,
    mib: f64,
}

impl Tasks {
    pub(crate) fn run(&self) -> Outcome<()> {
        let wanted = self.runs.chosen(&METHODS, &PROMPTS)?;
        if let Some(seed) = self.runs.seed {
            return wanted.into_iter().try_for_each(|(name, flags)| self.one(name, flags, seed).map(drop));
        }
        println!("| method | {} | before training | trained parameters | time | peak memory |", self.measure);
        println!("|---|---|---|---|---|---|");
        for (name, flags) in wanted {
            let runs = self.runs.each(|seed| self.one(name, flags, seed))?;
            let (mean, deviation) = spread(&runs, |run| run.measure);
            let [before, trained, seconds, mib] = [
                |run: &Reached| run.before,
                |run: &Reached| run.trained,
                |run: &Reached| run.seconds,
                |run: &Reached| run.mib,
            ]
            .map(|of| spread(&runs, of).0);
            println!(
                "| {name} | {mean:.4} ± {deviation:.4} | {before:.4} | {trained:.0} | {seconds:.0} s | {mib:.0} MiB |"
            );
        }
        Ok(())
    }

    /// One run, or what it wrote down when it was done before.
    fn one(&self, name: &str, flags: &[&str], seed: u64) -> Outcome<Reached> {
        let out = self.runs.out.join(format!("{name}-{seed}"));
        let note = out.join("reached.json");
        if !note.is_file() {
            let train = self.train(flags, seed, &out);
            let (result, mib) = watch(train)?;
            if self.data.is_file() {
                let reached = serde_json::json!({ "train": result, "test": result["after"], "mib": mib });
                std::fs::write(&note, format!("{reached:#}\n"))?;
                return self.read(&note);
            }
            let mut eval = self.runs.command("eval");
            if out.join("adapter_config.json").is_file() {
                eval.arg("--model").arg(&self.runs.model).arg("--adapter").arg(&out);
            } else {
                eval.arg("--model").arg(&out);
            }
            eval.args(["--max-len", &self.max_len.to_string(), "--data"]).arg(self.part("test"));
            let (tested, _) = watch(eval)?;
            let reached = serde_json::json!({ "train": result, "test": tested, "mib": mib });
            std::fs::write(&note, format!("{reached:#}\n"))?;
        }
        self.read(&note)
    }

    fn read(&self, note: &Path) -> Outcome<Reached> {
        let reached: Value = serde_json::from_str(&std::fs::read_to_string(note)?)?;
        let missing = |what: &str| format!("{}: no {what}", note.display());
        let number = |value: &Value, what: &str| value.as_f64().ok_or_else(|| missing(what));
        Ok(Reached {
            measure: number(&reached["test"][&self.measure], &self.measure)?,
            before: number(&reached["train"]["before"][&self.measure], &self.measure)?,
            trained: number(&reached["train"]["parameters"]["trainable"], "trainable")?,
            seconds: number(&reached["train"]["seconds"], "seconds")?,
            mib: number(&reached["mib"], "mib")?,
        })
    }

    fn train(&self, flags: &[&str], seed: u64, out: &Path) -> Command {
        let mut command = self.runs.command("train");
        command.args(["--overwrite", "--model"]).arg(&self.runs.model).arg("--out").arg(out);
        if self.data.is_file() {
            command.arg("--data").arg(&self.data).args(["--eval-fraction", "0.2"]);
        } else {
            command.arg("--data").arg(self.part("train")).arg("--eval-data").arg(self.part("valid"));
        }
        command.args(self.set.iter().flat_map(|set| ["--set", set]));
        command.args(self.steps.iter().flat_map(|steps| ["--steps".to_owned(), steps.to_string()]));
        let numbers = [
            ("--epochs", self.epochs.to_string()),
            ("--batch-size", self.batch_size.to_string()),
            ("--max-len", self.max_len.to_string()),
            ("--eval-every", self.eval_every.to_string()),
            ("--seed", seed.to_string()),
        ];
        command.args(numbers.iter().flat_map(|(flag, value)| [*flag, value.as_str()]));
        command.args(flags.iter().map(|flag| if *flag == TEXT { self.prompt_text.as_str() } else { flag }));
        command
    }

    /// A part of the data: pictures where there are some, or texts.
    fn part(&self, part: &str) -> PathBuf {
        let ending_in = |end: &str| {
            let mut path = self.data.clone().into_os_string();
            path.push(format!("-{part}{end}"));
            PathBuf::from(path)
        };
        let pictures = ending_in("-images-idx3-ubyte");
        if pictures.is_file() { pictures } else { ending_in(".csv") }
    }
}

fn spread(runs: &[Reached], of: impl Fn(&Reached) -> f64) -> (f64, f64) {
    mean_and_deviation(&runs.iter().map(of).collect::<Vec<_>>())
}
