//! `peft quantize`: a model's own files with packed weights.

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use peft_models::ModelSource;
use peft_models::quantize::save_packed;
use peft_models::weights::Weights;
use serde_json::json;

use crate::model::{check_new_model, copy_generation_config};
use crate::output::{bytes, quoted};
use crate::packing::{PackingArgs, Type};
use crate::{Context, Result, device};

/// Arguments of `peft quantize`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft quantize --model MODEL --out model-nf4
  peft quantize --model MODEL --out model-int8 --type int8
  peft train --model model-nf4 --data data.json --targets all-linear --out my-adapter

nf4 and fp4 give the files of bitsandbytes, byte for byte: `transformers` loads them. The other types are this program's own.")]
pub struct Args {
    /// Hugging Face directory, .gguf file, hub id (owner/name), or `tiny`, the model inside this program
    #[arg(long)]
    model: String,
    /// Where the packed model goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What the numbers stand for
    #[arg(long = "type", value_enum, default_value = "nf4")]
    kind: Type,
    /// Values that share a scale
    #[arg(long, default_value_t = 64, value_name = "N")]
    block: usize,
    /// Keep the scales in 32 bits instead of packing them too
    #[arg(long)]
    no_double_quant: bool,
    /// Modules that stay as they are
    #[arg(long, value_delimiter = ',', default_value = "lm_head", value_name = "NAMES")]
    skip: Vec<String>,
    /// Another type for some modules, as NAME=TYPE; may be repeated
    #[arg(long, value_name = "NAME=TYPE")]
    pattern: Vec<String>,
    /// Replace a model that is there already
    #[arg(long)]
    overwrite: bool,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be read or packed, or the result cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    check_new_model(&args.out, args.overwrite, &[args.model.as_ref()])?;
    let packing = PackingArgs {
        quantize: Some(args.kind),
        quantize_block: args.block,
        no_double_quant: args.no_double_quant,
        quantize_skip: args.skip.clone(),
        quantize_pattern: args.pattern.clone(),
        unpack: false,
    };
    let quantization = packing.quantization(args.kind)?;
    let device = device::open(&context.device)?;
    let files = args.model.parse::<ModelSource>()?.open()?;
    let weights: &dyn Weights = files.origin.weights();
    let before: u64 = weights.tensors().iter().map(|info| info.bytes).sum();
    let bar = if context.output.json { ProgressBar::hidden() } else { ProgressBar::new(before) };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes}  {eta}") {
        bar.set_style(style);
    }
    let summary = save_packed(&files, &quantization, &args.out, &device, |info| bar.inc(info.bytes))?;
    bar.finish_and_clear();
    copy_generation_config(weights.path(), &args.out)?;
    let after = (summary.bytes + summary.other_bytes) as u64;
    let bits = 8.0 * summary.bytes as f64 / summary.values.max(1) as f64;
    let screen = context.output;
    screen.field(
        "packed",
        format_args!("{} layers as {}: {bits:.3} bits a value", summary.weights, quantization.format),
    )?;
    screen.field("size", format_args!("{} instead of {}", bytes(after), bytes(before)))?;
    screen.field(
        "next",
        format_args!("peft train --model {} --data … --targets all-linear --out …", quoted(&args.out)),
    )?;
    screen.json(
        &json!({ "out": args.out, "bytes_before": before, "bytes": after, "bits_per_value": bits, "packed": summary }),
    )
}
