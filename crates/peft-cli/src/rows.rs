//! From a data file to samples that a given model can take.

use std::path::Path;

use peft_models::Pretrained;
use peft_train::data::{
    BatchOptions, Batches, EncodeOptions, EncodeReport, Row, Sample, encode, read_rows, substitute,
};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Most tokens of a sample, unless the user or the model says otherwise.
const MAX_LEN: usize = 512;

/// How a file becomes samples and batches; the same for training and evaluation.
#[derive(Clone, Debug)]
pub struct Reading<'a> {
    /// The model and its tokenizer.
    pub pretrained: &'a Pretrained,
    /// Most tokens of a sample.
    pub max_len: usize,
    /// Learn the prompts too.
    pub train_on_prompt: bool,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Several samples in one row.
    pub pack: bool,
    /// Of the order.
    pub seed: u64,
}

impl<'a> Reading<'a> {
    /// The usual way for this model; `max_len` as the user gave it.
    ///
    /// # Errors
    /// When the model does not take samples of that length.
    pub fn new(pretrained: &'a Pretrained, max_len: Option<usize>) -> Result<Self> {
        let longest = pretrained.model.max_tokens();
        let max_len = max_len.unwrap_or(MAX_LEN.min(longest));
        if max_len > longest {
            let what = format!("--max-len {max_len}: {} takes at most {longest} tokens", pretrained.files.name);
            return Err(Error::usage(what, format!("--max-len {longest}")));
        }
        Ok(Self { pretrained, max_len, train_on_prompt: false, batch_size: 8, pack: false, seed: 0 })
    }

    /// Tokenises rows that came from `path`.
    ///
    /// # Errors
    /// When the model has no tokenizer, a row cannot be rendered, no row has anything to learn, or the tokenizer is not this model's.
    pub fn samples(&self, rows: &[Row], path: &Path) -> Result<(Vec<Sample>, EncodeReport)> {
        let tokenizer = self.pretrained.tokenizer()?;
        let add_eos = !tokenizer.special().eos.is_empty();
        let options = EncodeOptions { max_len: self.max_len, add_eos, train_on_prompt: self.train_on_prompt };
        let (samples, report) = encode(rows, tokenizer, &options)?;
        let vocab_size = self.pretrained.model.config().vocab_size();
        if let Some(id) = samples.iter().flat_map(Sample::ids).find(|id| **id as usize >= vocab_size) {
            let what = format!(
                "{}: the tokenizer gives token {id}, the model has {vocab_size} tokens",
                self.pretrained.files.name
            );
            return Err(Error::refused(what, "take tokenizer.json and the weights from the same model"));
        }
        if samples.is_empty() {
            let what = format!("{}: no row has a token to learn ({report})", path.display());
            return Err(Error::refused(what, "raise --max-len if the prompts alone are longer, or give longer texts"));
        }
        Ok((samples, report))
    }

    /// Puts samples into batches.
    ///
    /// # Errors
    /// When the batch size is 0.
    pub fn batches(&self, samples: Vec<Sample>) -> Result<Batches> {
        let pad = self.pretrained.tokenizer()?.pad_id();
        let pack = self.pack.then_some(self.max_len);
        Ok(Batches::new(samples, BatchOptions { batch_size: self.batch_size, pack, seed: self.seed, pad })?)
    }
}

/// Reads a data file and replaces `{{name}}` by the value of each `name=value` in `set`.
///
/// # Errors
/// When the file cannot be read, or an entry of `set` is no assignment or replaces nothing.
pub fn read(path: &Path, set: &[String]) -> Result<Vec<Row>> {
    let mut rows = read_rows(path)?;
    for (name, value) in assignments("set", set)? {
        if substitute(&mut rows, &[(name, value)]) == 0 {
            let what = format!("--set {name}: {} has no {{{{{name}}}}}", path.display());
            return Err(Error::usage(what, "give the placeholder's name as it is written between the braces"));
        }
    }
    Ok(rows)
}

/// `name=value` pairs of the flag `--flag`.
///
/// # Errors
/// When one has no equals sign.
pub fn assignments<'a>(flag: &str, pairs: &'a [String]) -> Result<Vec<(&'a str, &'a str)>> {
    let split = |pair: &'a String| {
        let missing = || Error::usage(format!("--{flag} {pair}: expected name=value"), format!("--{flag} name=value"));
        pair.split_once('=').ok_or_else(missing)
    };
    pairs.iter().map(split).collect()
}

/// The report for a script.
pub fn report_json(report: &EncodeReport) -> Value {
    json!({
        "rows": report.rows,
        "samples": report.samples,
        "tokens": report.tokens,
        "learnt_tokens": report.trained,
        "rows_split": report.rows_split,
        "rows_truncated": report.rows_truncated,
        "tokens_dropped": report.tokens_dropped,
        "rows_skipped": report.rows_skipped,
        "answers_merged": report.answers_merged,
    })
}
