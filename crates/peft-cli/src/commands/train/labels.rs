//! Training an encoder: labels and numbers for texts, words and pictures.

use std::path::PathBuf;
use std::process::ExitCode;

use burn::module::Module as _;
use peft_core::Peft;
use peft_models::config::EncoderConfig;
use peft_models::heads::Task;
use peft_models::{EncoderOptions, ModelFiles, PretrainedEncoder};
use peft_train::Labelling;
use peft_train::data::{
    BatchOptions, Batches, LabelReport, Labelled, LabelledRow, Reader, label, read_labelled, task_of,
};
use serde_json::json;

use super::{Job, Start, check_targets, refuse};
use crate::output::quoted;
use crate::settings::Settings;
use crate::{Result, methods};

pub(super) fn run(job: &Job<'_>, files: ModelFiles, config: &EncoderConfig) -> Result<ExitCode> {
    let settings = job.settings;
    let of_texts =
        [("pack", settings.pack), ("train-on-prompt", settings.train_on_prompt), ("set", !settings.set.is_empty())];
    refuse(&of_texts, "language models, and this is an encoder")?;
    let read = |files: &[PathBuf]| {
        Ok::<_, crate::Error>(files.iter().map(|file| read_labelled(file)).collect::<std::result::Result<Vec<_>, _>>()?)
    };
    let (rows, held_out) = (read(settings.data()?)?, read(&settings.eval_data)?);

    let task = wanted(settings, &files, config, &rows.concat())?;
    let method = methods::by_name(&settings.method)?.build(settings)?;
    let options = EncoderOptions {
        task: Some(task.clone()),
        packing: method.packing(settings.packing.packing()?),
        precision: settings.precision.into(),
        seed: settings.seed,
    };
    let mut pretrained = PretrainedEncoder::from_files(files, &options, job.device)?;
    check_targets(&pretrained.model, method.as_ref())?;
    let parameters = pretrained.model.trainable().total;
    let with_head = with_head(settings, &pretrained);
    let method = methods::by_name(&settings.method)?.build(&with_head)?;
    let model = method.attach(pretrained.model, &pretrained.files, settings.seed)?;
    // It shares all that is frozen, and may take shorter texts.
    pretrained.model = model.valid();
    let reader = Reader::new(&pretrained, settings.max_len)?;
    let PretrainedEncoder { files, .. } = pretrained;

    let (all, report) = labelled(&rows, &reader, &task)?;
    let given = if held_out.is_empty() { None } else { Some(labelled(&held_out, &reader, &task)?.0) };
    let (samples, held_out) = job.hold_out(all, given)?;
    let batches = |samples: Vec<Labelled>| {
        let options = BatchOptions { batch_size: settings.batch_size, pack: None, seed: settings.seed, pad: 0 };
        Batches::new(samples, options)
    };
    let json = json!({
        "rows": report.rows,
        "samples": report.rows - report.rows_skipped,
        "tokens": report.tokens,
        "rows_cut": report.rows_cut,
        "rows_skipped": report.rows_skipped,
        "labels": task.labels(),
    });
    job.go(Start {
        objective: Labelling::new(reader, task.clone(), settings.label_smoothing)?,
        trained: method.trained(&model, &files)?,
        model,
        batches: batches(samples)?,
        held_out: if held_out.is_empty() { None } else { Some(batches(held_out)?) },
        files: &files,
        parameters,
        report: (&format!("{report}; {}", described(&task)), json),
        next: next(settings, &files, config)?,
    })
}

/// What is learnt from all files, each row of the task of its file.
fn labelled(rows: &[Vec<LabelledRow>], reader: &Reader, task: &Task) -> Result<(Vec<Labelled>, LabelReport)> {
    let (mut all, mut reports) = (Vec::new(), LabelReport::default());
    for (number, rows) in rows.iter().enumerate() {
        let (labelled, report) = label(rows, reader, task)?;
        all.extend(labelled.into_iter().map(|row| Labelled { task: number, ..row }));
        reports += report;
    }
    Ok((all, reports))
}

/// The task: that of the model, where the checkpoint has a head for it and nothing else is asked for; or the one that the data describes.
fn wanted(settings: &Settings, files: &ModelFiles, config: &EncoderConfig, rows: &[LabelledRow]) -> Result<Task> {
    let found = task_of(rows, settings.task)?;
    let weights = files.origin.weights();
    let has_head = config.head_modules().iter().any(|head| {
        let is_head = |name: &str| name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.'));
        weights.tensors().iter().any(|info| is_head(&info.name))
    });
    let same = match (&found, &config.task) {
        (Task::Classification { problem: a, .. }, Task::Classification { problem: b, .. }) => a == b,
        (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
    };
    Ok(if has_head && same { config.task.clone() } else { found })
}

/// The settings with all that is new in the model among the modules to save: a head that is not trained says nothing.
fn with_head(settings: &Settings, pretrained: &PretrainedEncoder) -> Settings {
    let mut settings = settings.clone();
    let head = pretrained.model.config().head_modules().into_iter().map(str::to_owned);
    let fresh = pretrained.unmatched.fresh.iter().filter_map(|name| Some(name.rsplit_once('.')?.0.to_owned()));
    for name in head.chain(fresh) {
        let inside = |saved: &String| {
            name == *saved || name.strip_prefix(saved.as_str()).is_some_and(|rest| rest.starts_with('.'))
        };
        if !settings.modules_to_save.iter().any(inside) {
            settings.modules_to_save.push(name);
        }
    }
    settings
}

fn described(task: &Task) -> String {
    const SHOWN: usize = 12;
    let labels = task.labels();
    let more = if labels.len() > SHOWN { format!(", and {} more", labels.len() - SHOWN) } else { String::new() };
    format!("labels {}{more}", labels.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", "))
}

/// What can be done with the result.
fn next(settings: &Settings, files: &ModelFiles, config: &EncoderConfig) -> Result<Vec<String>> {
    let out = quoted(settings.out()?);
    let model = if methods::by_name(&settings.method)?.peft_type().is_none() {
        out
    } else {
        format!("{}{} --adapter {out}", quoted(&files.name), settings.packing.flags())
    };
    let input = if config.max_tokens().is_some() { "--text \"…\"" } else { "--image …" };
    Ok(vec![format!("peft predict --model {model} {input}"), format!("peft eval --model {model} --data …")])
}
