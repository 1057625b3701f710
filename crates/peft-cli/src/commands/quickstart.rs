//! `peft quickstart`: everything once, on the model inside this program: sample, train, evaluate, sample, save.

use std::path::PathBuf;

use burn::module::Module;
use burn::tensor::Device;
use peft_core::{Peft, Targets, attach};
use peft_lora::LoraConfig;
use peft_models::{ModelSource, Pretrained, Sampling, generate};
use peft_train::data::{Row, split};
use peft_train::{AdapterOf, NextToken, Schedule, Stop, TrainConfig, train};
use serde_json::json;

use crate::output::{before_after, quoted, thousands};
use crate::rows::{Reading, report_json};
use crate::{Context, Result, device};

/// Arguments of `peft quickstart`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  peft quickstart\n\nNeeds no network, no data and no GPU; takes about a minute.")]
pub struct Args {
    /// Where the adapter and the picture of the loss go
    #[arg(long, default_value = "peft-quickstart", value_name = "DIR")]
    out: PathBuf,
    /// Optimizer steps
    #[arg(long, default_value_t = 60, value_name = "N")]
    steps: usize,
}

/// See `quickstart/README.md`.
const TEXT: &str = include_str!("../../quickstart/moby-dick.txt");
const PROMPT: &str = "I looked at the";
const RANK: usize = 8;
const SEED: u64 = 1;

/// Runs the command.
///
/// # Errors
/// When the device fails or the result cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let out = context.output;
    let device = device::open(&context.device)?;
    let mut pretrained = Pretrained::load(&ModelSource::Tiny, &device.clone().autodiff())?;
    let base = pretrained.model.clone();
    let parameters = base.trainable().total;
    out.field("model", format_args!("tiny: {} parameters, on {}", thousands(parameters), context.device))?;
    pretrained.model = base.valid();
    let before = sample(&pretrained, &device)?;
    out.line(format_args!("\nbefore    {PROMPT}{before}\n"))?;

    let reading = Reading { batch_size: 8, pack: true, seed: SEED, ..Reading::new(&pretrained, Some(128))? };
    let (samples, report) = reading.samples(&[Row::Text { text: TEXT.to_owned() }], "moby-dick.txt".as_ref())?;
    let (samples, held_out) = split(samples, 0.1, SEED)?;
    let (batches, held_out) = (reading.batches(samples)?, reading.batches(held_out)?);

    let lora = LoraConfig::new(RANK, Targets::all_linear()).with_alpha(2.0 * RANK as f64);
    let model = attach(base, &lora, SEED)?;
    out.field("adapter", format_args!("LoRA of rank {RANK} on every linear layer: {}", model.trainable()))?;
    out.field("data", format_args!("Moby-Dick, chapters 1 to 12: {} tokens", thousands(report.tokens)))?;
    let trained = AdapterOf::new(lora, pretrained.files.name.clone());
    let config = TrainConfig {
        steps: args.steps,
        learning_rate: 2e-3,
        schedule: Schedule::Cosine,
        seed: SEED,
        progress: !out.json,
        ..TrainConfig::default()
    };
    let stop = Stop::new(false);
    let autodiff = device.clone().autodiff();
    let (model, summary) =
        train(&NextToken, model, &trained, batches, Some(&held_out), &config, &args.out, false, &autodiff, &stop)?;
    out.field("trained", format_args!("{} steps in {:.0} s", summary.steps, summary.seconds))?;
    if let (Some(before), Some(after)) = (&summary.before, &summary.after) {
        out.field("held out", before_after(before, after))?;
    }
    pretrained.model = model.valid();
    let after = sample(&pretrained, &device)?;
    out.line(format_args!("\nafter     {PROMPT}{after}\n"))?;

    let dir = quoted(&args.out);
    out.field(
        "files",
        format_args!("{dir}: adapter_model.safetensors and adapter_config.json (Hugging Face PEFT's layout), loss.svg"),
    )?;
    out.field(
        "next",
        format_args!("peft generate --model tiny --adapter {dir} --prompt \"The whale\" --temperature 0.7"),
    )?;
    out.field("", format_args!("peft merge --model tiny --adapter {dir} --out merged"))?;
    out.field("", "peft train --model MODEL --data data.json --targets all-linear --out my-adapter")?;
    out.json(&json!({ "summary": summary, "data": report_json(&report), "sample_before": before, "sample_after": after, "out": args.out }))
}

/// What the model makes of the prompt; the same on every run.
fn sample(pretrained: &Pretrained, device: &Device) -> Result<String> {
    let tokenizer = pretrained.tokenizer()?;
    let prompt = tokenizer.encode(PROMPT, true)?;
    let sampling = Sampling { temperature: 0.7, top_k: 40, seed: SEED, ..Sampling::default() };
    let tokens = generate(&pretrained.model, &prompt, 60, sampling, &tokenizer.special().eos, device, |_| true)?;
    Ok(tokenizer.decode(&tokens, true)?.split_whitespace().fold(String::new(), |text, word| text + " " + word))
}
