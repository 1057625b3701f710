//! `peft predict`: the label of a text, of its words, or of a picture, and how probable it is.

use burn::tensor::activation::{sigmoid, softmax};
use peft_models::heads::{Problem, Task};
use serde_json::{Value, json};

use crate::content::ContentArgs;
use crate::model::{Loaded, ModelArgs};
use crate::output::table;
use crate::{Context, Error, Result, device};

/// Arguments of `peft predict`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  peft predict --model ENCODER --adapter my-adapter --text \"A film to remember.\"
  peft predict --model ENCODER --adapter my-adapter --text \"It rains.\" --text-pair \"It is wet.\"
  peft predict --model VIT --adapter my-adapter --image picture.png --top 3

A model that labels tokens labels each word of the text, words being apart by blanks.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    content: ContentArgs,
    /// Labels to print, the most probable first
    #[arg(long, default_value_t = 5, value_name = "N")]
    top: usize,
}

/// Runs the command.
///
/// # Errors
/// When the model or the adapter cannot be loaded, has no labels, or cannot read what it is given.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let device = device::open(&context.device)?;
    let pretrained = match args.model.load(&device)? {
        Loaded::Encoder(pretrained) => pretrained,
        Loaded::Decoder(_) => {
            let what = format!("{}: a language model has no labels", args.model.model);
            return Err(Error::usage(what, "peft generate continues texts and answers messages"));
        }
    };
    let task = &pretrained.model.config().task;
    let labels = task.labels();
    if labels.is_empty() {
        let what = format!("{}: this model has no head for labels", args.model.model);
        return Err(Error::usage(what, "--adapter of one that was trained on it; peft logits prints the raw output"));
    }
    let each = matches!(task, Task::Tokens { .. });
    let (reader, prepared) = args.content.prepare(&pretrained, each)?;
    let input = reader.input([&prepared], &device)?;
    pretrained.model.check(&input)?;
    let logits = args.model.for_task(|| pretrained.model.forward(&input)).flatten::<2>(0, 1); // [places, outputs]
    let found = match task {
        Task::Classification { problem: Problem::Regression, .. } => logits,
        Task::Classification { problem: Problem::MultiLabel, .. } => sigmoid(logits),
        _ => softmax(logits, 1),
    };
    let failed = |e| Error::refused(format!("--device {}: the device failed: {e:?}", context.device), "--device cpu");
    let found: Vec<f32> = found.try_into_data().map_err(failed)?.iter::<f32>().collect();
    let mut answers = found.chunks(labels.len()).map(|row| Answer::new(labels, row));
    if each {
        return words(args, &prepared.words, &answers.collect::<Vec<_>>(), context);
    }
    let Some(answer) = answers.next() else { return Ok(()) };
    if matches!(task, Task::Classification { problem: Problem::Regression, .. }) {
        let value = |(label, value): &(String, f32)| format!("{label} {value:.4}");
        context.output.line(answer.0.iter().map(value).collect::<Vec<_>>().join(", "))?;
    } else {
        let row = |(label, part): &(String, f32)| vec![label.clone(), format!("{:.1} %", 100.0 * part)];
        context.output.line(table(&answer.0.iter().take(args.top.max(1)).map(row).collect::<Vec<_>>()))?;
    }
    context.output.json(&answer.json())
}

/// Labels and what was found for each, the largest first.
struct Answer(Vec<(String, f32)>);

impl Answer {
    fn new(labels: &[String], found: &[f32]) -> Self {
        let mut pairs: Vec<(String, f32)> = labels.iter().cloned().zip(found.iter().copied()).collect();
        pairs.sort_by(|a, b| b.1.total_cmp(&a.1));
        Self(pairs)
    }

    fn json(&self) -> Value {
        let all: serde_json::Map<String, Value> =
            self.0.iter().map(|(label, value)| (label.clone(), json!(value))).collect();
        let best = self.0.first();
        json!({ "label": best.map(|best| &best.0), "value": best.map(|best| best.1), "all": all })
    }
}

/// The answer for the first token of each word.
fn words(args: &Args, of: &[Option<usize>], answers: &[Answer], context: &Context) -> Result<()> {
    let words: Vec<&str> = args.content.text.as_deref().unwrap_or_default().split_whitespace().collect();
    let first = |word: usize| of.iter().position(|found| *found == Some(word));
    let found: Vec<(&str, &Answer)> =
        words.iter().enumerate().filter_map(|(at, word)| Some((*word, answers.get(first(at)?)?))).collect();
    let row = |(word, answer): &(&str, &Answer)| {
        let (label, part) = answer.0.first().map_or(("", 0.0), |best| (best.0.as_str(), best.1));
        vec![(*word).to_owned(), label.to_owned(), format!("{:.1} %", 100.0 * part)]
    };
    context.output.line(table(&found.iter().map(row).collect::<Vec<_>>()))?;
    let json = |(word, answer): &(&str, &Answer)| json!({ "word": word, "answer": answer.json() });
    context.output.json(&json!({ "words": found.iter().map(json).collect::<Vec<_>>() }))
}
