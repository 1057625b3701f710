//! `peft eval`: a model measured on a data file: loss, perplexity and token accuracy of a language model; what labels are found right by an encoder.

use std::path::PathBuf;

use burn::tensor::Device;
use peft_core::files::write_atomically;
use peft_models::{Pretrained, PretrainedEncoder};
use peft_train::data::{BatchOptions, Batches, Labelled, Reader, label, read_labelled};
use peft_train::measures::Tally;
use peft_train::{Labelling, NextToken, Objective as _, confusion_matrix};
use serde_json::{Value, json};

use crate::model::{Loaded, ModelArgs};
use crate::output::{quoted, table};
use crate::rows::{self, Reading};
use crate::{Context, Error, Result, device};

/// Arguments of `peft eval`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft eval --model MODEL --adapter my-adapter --data held-out.jsonl
  peft eval --model ENCODER --adapter my-classifier --data test.csv --confusion confusion.svg

Leave --adapter out to measure the model itself.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// In the formats of `peft train`
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
    /// Draw what was taken for what, where an encoder finds one label of several
    #[arg(long, value_name = "FILE.svg")]
    confusion: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// When the model, the adapter or the data cannot be read, or the device fails.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let device = device::open(&context.device)?;
    match args.model.load(&device)? {
        Loaded::Decoder(pretrained) => language(args, &pretrained, &device, context),
        Loaded::Encoder(pretrained) => labels(args, &pretrained, &device, context),
    }
}

fn language(args: &Args, pretrained: &Pretrained, device: &Device, context: &Context) -> Result<()> {
    let rows = rows::read(&args.data, &args.set)?;
    let train_on_prompt = args.train_on_prompt;
    let reading = Reading { batch_size: args.batch_size, train_on_prompt, ..Reading::new(pretrained, args.max_len)? };
    let (samples, report) = reading.samples(&rows, &args.data)?;
    let samples = samples.into_iter().map(|sample| sample.of_task(args.model.task())).collect();
    let result = NextToken.evaluate(&pretrained.model, &reading.batches(samples)?, device)?;
    context.output.field("data", format_args!("{}: {report}", quoted(&args.data)))?;
    context.output.field("result", format_args!("{result} on {} tokens", result.count))?;
    let mut json = json!({ "loss": result.loss, "tokens": result.count, "data": rows::report_json(&report) });
    for (name, value) in result.measures {
        json[name] = value.into();
    }
    context.output.json(&json)
}

fn labels(args: &Args, pretrained: &PretrainedEncoder, device: &Device, context: &Context) -> Result<()> {
    let rows = read_labelled(&args.data)?;
    let reader = Reader::new(pretrained, args.max_len)?;
    let task = &pretrained.model.config().task;
    let objective = Labelling::new(reader, task.clone(), 0.0)?;
    let (labelled, read) = label(&rows, &objective.reader, task)?;
    let labelled = labelled.into_iter().map(|row| Labelled { task: args.model.task(), ..row }).collect();
    let options = BatchOptions { batch_size: args.batch_size, pack: None, seed: 0, pad: 0 };
    let report = objective.report(&pretrained.model, &Batches::new(labelled, options)?, device)?;
    if let Some(path) = &args.confusion {
        let Some(confusion) = &report.confusion else {
            let what = "--confusion: this model does not find one label of several";
            return Err(Error::usage(what, "leave it out"));
        };
        let (dir, name) = (path.parent().filter(|dir| !dir.as_os_str().is_empty()), path.file_name());
        let name = name.and_then(|name| name.to_str()).unwrap_or("confusion.svg");
        write_atomically(dir.unwrap_or(".".as_ref()), &[(name, confusion_matrix(confusion)?.as_bytes())])?;
    }
    let screen = context.output;
    screen.field("data", format_args!("{}: {read}", quoted(&args.data)))?;
    screen.field("result", &report.evaluation)?;
    if !report.labels.is_empty() {
        let titles = ["  label", "precision", "recall", "F1", "true"].map(str::to_owned).to_vec();
        let row = |(label, tally): &(String, Tally)| {
            let numbers = [tally.precision(), tally.recall(), tally.f1()].map(|value| format!("{value:.4}"));
            [vec![format!("  {label}")], numbers.to_vec(), vec![tally.support.to_string()]].concat()
        };
        let rows: Vec<Vec<String>> = std::iter::once(titles).chain(report.labels.iter().map(row)).collect();
        screen.line(table(&rows))?;
    }
    let by_label = |(label, tally): &(String, Tally)| {
        let (precision, recall, f1) = (tally.precision(), tally.recall(), tally.f1());
        json!({ "label": label, "precision": precision, "recall": recall, "f1": f1, "support": tally.support })
    };
    let mut json = serde_json::to_value(&report.evaluation).unwrap_or_default();
    json["rows"] = read.rows.into();
    json["labels"] = report.labels.iter().map(by_label).collect::<Vec<Value>>().into();
    json["confusion"] = report.confusion.map_or(Value::Null, |confusion| json!(confusion.counts()));
    screen.json(&json)
}
