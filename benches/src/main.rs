//! Ratios of time and peak memory, each side in a process of its own and in turns, so that peak memory is its own and load on the machine meets all.
//!
//! ```text
//! cargo run --release -p peft-benches -- step [--python PYTHON]
//! cargo run --release -p peft-benches -- mixtures
//! cargo run --release -p peft-benches -- decode [--python PYTHON]
//! cargo run --release -p peft-benches -- sweep [--python PYTHON] --out docs/cpu.svg
//! cargo run --release -p peft-benches -- operations [--backend ndarray]
//! cargo run --release -p peft-benches -- curves RUN… --out docs/bf16.svg
//! cargo run --release -p peft-benches -- tasks --peft target/release/peft --model data/minilm --data data/vader/film-polarity --out runs/tasks
//! cargo run --release -p peft-benches -- several --peft target/release/peft --model FILE.gguf --tasks data/identity/persona,… --out runs/several
//! ```

mod curves;
mod operations;
mod picture;
mod plain;
mod random;
mod runs;
mod several;
mod side;
mod sweep;
mod tasks;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::Device;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;

use side::Side;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Ratios of time and peak memory: ours, Burn's own, and with `--python` those of PyTorch.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// One training step of LoRA
    Step(Comparison),
    /// One training step of LoRA, and of mixtures of it
    Mixtures(Comparison),
    /// One token at a time
    Decode(Comparison),
    /// Throughput against threads and rank, memory and time a token against the length of the sequence, as a picture
    Sweep(sweep::Sweep),
    /// Each custom operation and its gradient, against the same of Burn's own operations
    Operations(operations::Operations),
    /// Loss curves of training runs side by side, as a picture
    Curves(curves::Curves),
    /// What methods reach on a task, and what they cost, as a table
    Tasks(tasks::Tasks),
    /// What one `LoRA` and mixtures reach on several tasks at once, as a table
    Several(several::Several),
    /// One side, for itself
    #[command(hide = true)]
    Side {
        #[arg(long, value_enum)]
        side: Side,
        #[command(flatten)]
        setup: Setup,
    },
}

#[derive(Args, Clone)]
struct Comparison {
    #[command(flatten)]
    setup: Setup,
    /// Times that each side is run; medians are reported
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A Python with torch, transformers, peft and bitsandbytes
    #[arg(long)]
    python: Option<PathBuf>,
    /// Only these sides
    #[arg(long, value_name = "SIDE", value_delimiter = ',')]
    sides: Vec<String>,
}

/// A Llama with tied embeddings: SmolLM2-135M, but for depth and vocabulary.
#[derive(Args, Clone)]
struct Setup {
    /// Steps, or tokens, that are timed
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Depth: 30 is SmolLM2-135M
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Vocabulary: 49152 is SmolLM2-135M
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// Width
    #[arg(long, default_value_t = 576)]
    hidden: usize,
    /// Heads of queries
    #[arg(long, default_value_t = 9)]
    heads: usize,
    /// Heads of keys and values
    #[arg(long, default_value_t = 3)]
    kv_heads: usize,
    /// Width of the feed-forward part
    #[arg(long, default_value_t = 1536)]
    intermediate: usize,
    /// Rows of a batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Batches of a step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Rank of the adapter on all seven projections
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Burn's backend
    #[arg(long, value_enum, default_value_t = Backend::Flex)]
    backend: Backend,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backend {
    Flex,
    Ndarray,
    #[cfg(feature = "vulkan")]
    Vulkan,
    #[cfg(feature = "cuda")]
    Cuda,
}

impl Backend {
    fn is_cuda(self) -> bool {
        value_name(self) == "cuda"
    }

    fn device(self) -> Device {
        match self {
            Self::Flex => Device::flex(),
            #[allow(deprecated, reason = "ndarray goes with Burn 0.23; until then it is a second opinion on the CPU")]
            Self::Ndarray => Device::ndarray(),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => Device::vulkan(burn::tensor::DeviceKind::DefaultDevice),
            #[cfg(feature = "cuda")]
            Self::Cuda => Device::cuda(0),
        }
    }
}

impl Setup {
    fn flags(&self) -> Vec<String> {
        let Self { steps, layers, vocab, hidden, heads, kv_heads, intermediate, .. } = self;
        let Self { batch, seq, accumulate, rank, threads, .. } = self;
        let flags = [
            ("steps", steps),
            ("layers", layers),
            ("vocab", vocab),
            ("hidden", hidden),
            ("heads", heads),
            ("kv-heads", kv_heads),
            ("intermediate", intermediate),
            ("batch", batch),
            ("seq", seq),
            ("accumulate", accumulate),
            ("rank", rank),
            ("threads", threads),
        ];
        flags.into_iter().flat_map(|(name, value)| [format!("--{name}"), value.to_string()]).collect()
    }
}

/// Who is measured.
#[derive(Clone, Copy)]
enum Runner<'a> {
    Ours(Side),
    /// `tools/bench_step.py` with these flags.
    Python {
        python: &'a Path,
        flags: &'a [&'a str],
    },
}

/// A side with its name.
type Named<'a> = (&'static str, Runner<'a>);

fn main() -> Outcome<()> {
    match Arguments::parse().what {
        What::Step(comparison) => {
            let ours = [Side::Lora, Side::LoraBf16, Side::Packed, Side::PackedBf16, Side::Plain, Side::ApplyLora];
            let bf16 = &["--dtype", "bfloat16"];
            let nf4 = &["--base", "nf4"];
            let peers: [(_, &[_]); 3] = [("torch+peft", &[]), ("torch+peft bf16", bf16), ("torch+bitsandbytes", nf4)];
            compare(&comparison, &ours, &peers)
        }
        What::Mixtures(comparison) => {
            compare(&comparison, &[Side::Lora, Side::TwoOf8, Side::TwoOf32, Side::AllOf8], &[])
        }
        What::Decode(comparison) => {
            let ours = [Side::Decode, Side::DecodeBf16, Side::DecodePacked];
            let packed: &[&str] = &["--decode", "--base", "nf4"];
            compare(&comparison, &ours, &[("torch", &["--decode"]), ("torch+bitsandbytes", packed)])
        }
        What::Sweep(sweep) => sweep.run(),
        What::Operations(operations) => operations.run(),
        What::Curves(curves) => curves.run(),
        What::Tasks(tasks) => tasks.run(),
        What::Several(several) => several.run(),
        What::Side { side, setup } => {
            // As in the program `peft`.
            peft_kernels::prepare_process();
            println!("{}", side.measure(&setup)?);
            Ok(())
        }
    }
}

/// Runs all sides in turns and prints medians and their ratios to the first.
fn compare(comparison: &Comparison, ours: &[Side], theirs: &[(&'static str, &[&str])]) -> Outcome<()> {
    let Comparison { setup, rounds, python, sides: wanted } = comparison;
    let mut sides: Vec<Named<'_>> = ours.iter().map(|side| (side.name(), Runner::Ours(*side))).collect();
    if let Some(python) = python {
        sides.extend(theirs.iter().map(|(name, flags)| (*name, Runner::Python { python, flags })));
    }
    if let Some(unknown) = wanted.iter().find(|wanted| !sides.iter().any(|(name, _)| name == wanted)) {
        let known: Vec<&str> = sides.iter().map(|(name, _)| *name).collect();
        return Err(format!("there is no side {unknown} here; there are: {}", known.join(", ")).into());
    }
    sides.retain(|(name, _)| wanted.is_empty() || wanted.iter().any(|side| side == name));
    let mut failed = Vec::new();
    let mut results: Vec<Vec<Value>> = vec![Vec::new(); sides.len()];
    for round in 1..=*rounds {
        for ((name, runner), results) in sides.iter().zip(&mut results) {
            // One that does not fit into memory must not cost the others.
            match runner.run(setup) {
                Ok(result) => {
                    eprintln!("round {round}, {name}: {result}");
                    results.push(result);
                }
                Err(error) => {
                    eprintln!("round {round}, {name}: {error}");
                    failed.push(*name);
                }
            }
        }
    }
    println!("{:24} {:>9} {:>7} {:>15} {:>7}", "side", "s", "ratio", "MiB above start", "ratio");
    let mut first = None;
    for ((name, _), results) in sides.iter().zip(&results) {
        let (t, m) = (median(results, "median_s"), median(results, "memory_mib"));
        let (time, memory) = *first.get_or_insert((t, m));
        println!("{name:24} {t:9.4} {:7.2} {m:15.0} {:7.2}", t / time, m / memory);
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("these failed, see above: {}", failed.join(", ")).into()) }
}

fn median(results: &[Value], key: &str) -> f64 {
    let mut values: Vec<f64> = results.iter().filter_map(|r| r[key].as_f64()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Runner<'_> {
    /// Measures in a process of its own: `median_s` and `memory_mib`.
    fn run(self, setup: &Setup) -> Outcome<Value> {
        let mut command = match self {
            Self::Ours(side) => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["side", "--side", side.name(), "--backend"]).arg(value_name(setup.backend));
                command.env("RAYON_NUM_THREADS", setup.threads.to_string());
                command
            }
            Self::Python { python, flags } => {
                let mut command = Command::new(python);
                command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/bench_step.py")).args(flags);
                command.args(["--device", if setup.backend.is_cuda() { "cuda" } else { "cpu" }]);
                command
            }
        };
        let output = command.args(setup.flags()).output()?;
        if !output.status.success() {
            return Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
        }
        let text = String::from_utf8(output.stdout)?;
        Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
    }
}

/// The word for a value on the command line.
fn value_name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
