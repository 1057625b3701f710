//! Training a language model: the next token of texts and answers.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::module::Module;
use peft_core::Peft;
use peft_models::{ModelFiles, Pretrained};
use peft_train::NextToken;
use peft_train::data::Row;

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
        let what = format!("--pack: {} stands in front of one sequence a row", settings.method);
        return Err(Error::usage(what, "leave it out"));
    }
    let rows = rows::read(settings.data()?, &settings.set)?;
    let held_out = settings.eval_data.as_ref().map(|path| rows::read(path, &settings.set)).transpose()?;

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
    let (all, report) = reading.samples(&rows, settings.data()?)?;
    let given = held_out.as_ref().zip(settings.eval_data.as_ref());
    let read = |(rows, path): (&Vec<Row>, &PathBuf)| -> Result<_> { Ok(reading.samples(rows, path)?.0) };
    let given = given.map(read).transpose()?;
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

/// What can be done with the result.
fn next(settings: &Settings, pretrained: &Pretrained, rows: &[Row]) -> Result<Vec<String>> {
    let out = quoted(settings.out()?);
    // The model learns to answer, rather than to continue.
    let chat = rows.iter().any(|row| matches!(row, Row::Chat { .. } | Row::Instruction { .. }));
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
