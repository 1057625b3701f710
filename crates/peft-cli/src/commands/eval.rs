//! `peft eval`: loss, perplexity and token accuracy on a data file.

use std::path::PathBuf;

use peft_train::evaluate;
use serde_json::json;

use crate::model::ModelArgs;
use crate::output::{evaluation, quoted};
use crate::rows::{self, Reading};
use crate::{Context, Result, device};

/// Arguments of `peft eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  peft eval --model MODEL --adapter my-adapter --data held-out.jsonl\n\n\
                        Leave --adapter out to measure the model itself.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// .json, .jsonl or .txt, in the formats of `peft train`
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Replace {{NAME}} in the data, as NAME=VALUE; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Most tokens of a sample [default: 512, or what the model takes]
    #[arg(long, value_name = "N")]
    max_len: Option<usize>,
    /// Rows of a batch
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch_size: usize,
    /// Measure on the prompts too, not only on the answers
    #[arg(long)]
    train_on_prompt: bool,
}

/// Runs the command.
///
/// # Errors
/// When the model, the adapter or the data cannot be read, or the device fails.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let device = device::open(&context.device)?;
    let rows = rows::read(&args.data, &args.set)?;
    let pretrained = args.model.load(&device)?;
    let train_on_prompt = args.train_on_prompt;
    let reading = Reading { batch_size: args.batch_size, train_on_prompt, ..Reading::new(&pretrained, args.max_len)? };
    let (samples, report) = reading.samples(&rows, &args.data)?;
    let result = evaluate(&pretrained.model, &reading.batches(samples)?, &device)?;
    context.output.field("data", format_args!("{}: {report}", quoted(&args.data)))?;
    context.output.field("result", format_args!("{} on {} tokens", evaluation(&result), result.tokens))?;
    context.output.json(&json!({
        "loss": result.loss,
        "perplexity": result.perplexity,
        "token_accuracy": result.token_accuracy,
        "tokens": result.tokens,
        "data": rows::report_json(&report),
    }))
}
