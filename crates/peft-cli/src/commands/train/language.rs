//! Training a language model: the next token of texts and answers.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::module::Module;
use peft_core::Peft;
use peft_models::{ModelFiles, Pretrained};
use peft_train::NextToken;
use peft_train::data::{EncodeReport, Row, Sample};

use super::{Job, Start, check_targets, refuse};
use crate::model::{self, FrozenType};
use crate::output::quoted;
use crate::rows::{self, Reading, report_json};
use crate::settings::{Init, Settings};
use crate::{Error, Result, methods};

pub(super) fn run(job: &Job<'_>, files: ModelFiles) -> Result<ExitCode> {
    let settings = job.settings;
    let labels = [("task", settings.task.is_some()), ("label-smoothing", settings.label_smoothing != 0.0)];
    refuse(&labels, "encoders, and this is a language model")?;
    let method = methods::by_name(&settings.method)?.build(settings)?;
    if settings.pack && method.reads_ahead() {
        let what = format!("--pack: with {} a row is of one sequence", settings.method);
        return Err(Error::usage(what, "leave it out"));
    }
    let read = |files: &[PathBuf]| files.iter().map(|path| rows::read(path, &settings.set)).collect::<Result<Vec<_>>>();
    let (rows, held_out) = (read(settings.data()?)?, read(&settings.eval_data)?);

    let packing = method.packing(settings.packing.packing()?);
    let mut pretrained = Pretrained::from_files(files, &packing, settings.precision.into(), job.device)?;
    check_targets(&pretrained.model, method.as_ref())?;
    let parameters = pretrained.model.trainable().total;
    let model = match method.targets() {
        Some(targets) => model::for_targets(pretrained.model, targets)?,
        None => pretrained.model,
    };
    let adapted = method.attach(model, &pretrained.files, settings.seed)?;
    // It shares all that is frozen. What was loaded goes: it may be dense where this is packed.
    pretrained.model = adapted.valid();
    let reading = Reading {
        train_on_prompt: settings.train_on_prompt,
        batch_size: settings.batch_size,
        pack: settings.pack,
        seed: settings.seed,
        ..Reading::new(&pretrained, settings.max_len)?
    };
    let (all, report) = samples(&reading, &rows, settings.data()?)?;
    let given = if held_out.is_empty() { None } else { Some(samples(&reading, &held_out, &settings.eval_data)?.0) };
    let (samples, held_out) = job.hold_out(all, given)?;
    job.go(Start {
        objective: NextToken,
        trained: method.trained(&adapted, &pretrained.files)?,
        model: adapted,
        batches: reading.batches(samples)?,
        held_out: if held_out.is_empty() { None } else { Some(reading.batches(held_out)?) },
        files: &pretrained.files,
        parameters,
        report: (&report, report_json(&report)),
        next: next(settings, &pretrained, &rows)?,
    })
}

/// The samples of all files, each of the task of its file.
fn samples(reading: &Reading<'_>, rows: &[Vec<Row>], files: &[PathBuf]) -> Result<(Vec<Sample>, EncodeReport)> {
    let (mut all, mut reports) = (Vec::new(), EncodeReport::default());
    for (task, (rows, path)) in rows.iter().zip(files).enumerate() {
        let (samples, report) = reading.samples(rows, path)?;
        all.extend(samples.into_iter().map(|sample| sample.of_task(task)));
        reports += report;
    }
    Ok((all, reports))
}

/// What can be done with the result.
fn next(settings: &Settings, pretrained: &Pretrained, rows: &[Vec<Row>]) -> Result<Vec<String>> {
    let out = quoted(settings.out()?);
    // The model learns to answer, rather than to continue.
    let chat = rows.iter().flatten().any(|row| matches!(row, Row::Chat { .. } | Row::Instruction { .. }));
    let prompt = if chat && pretrained.tokenizer()?.chat_template().is_some() { "--chat" } else { "--prompt" };
    let method = methods::by_name(&settings.method)?;
    if method.peft_type().is_none() {
        return Ok(vec![format!("peft generate --model {out} {prompt} \"…\"")]);
    }
    let bf16 = if settings.precision == FrozenType::Bf16 { " --precision bf16" } else { "" };
    let model = quoted(&pretrained.files.name) + &settings.packing.flags();
    // What belongs to the packed weights cannot be merged into others.
    let into = if settings.init == Init::Loftq { " --into unpacked" } else { "" };
    let mut next = vec![format!("peft generate --model {model}{bf16} --adapter {out} {prompt} \"…\"")];
    if method.merges {
        next.push(format!("peft merge --model {model}{into} --adapter {out} --out merged"));
    }
    Ok(next)
}
