//! Training on a model without a tokenizer: the loss falls, resuming is bit-identical, packing changes nothing.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use burn::module::Module;
use burn::tensor::Device;
use peft_core::{Targets, attach};
use peft_lora::LoraConfig;
use peft_models::{CausalLm, ModelSource, Pretrained};
use peft_train::data::{BatchOptions, Batches, Sample};
use peft_train::{AdapterOf, Error, NextToken, Objective as _, Outcome, Schedule, Summary, TrainConfig, train};

use crate::golden::testdata;

fn base() -> CausalLm {
    let source = ModelSource::Dir(testdata().join("models/llama"));
    Pretrained::load(&source, &Device::flex().autodiff()).unwrap().model
}

/// Sequences that a bigram rule makes, of different lengths, with an unlearnt prompt.
fn samples(count: usize) -> Vec<Sample> {
    let sample = |i: usize| {
        let ids: Vec<u32> =
            (0..5 + i % 7).scan(i as u32 % 90, |id, _| Some(std::mem::replace(id, (*id * 5 + 3) % 96))).collect();
        let mask = (0..ids.len()).map(|t| t >= 2).collect();
        Sample::new(ids, mask).unwrap()
    };
    (0..count).map(sample).collect()
}

fn batches(pack: Option<usize>) -> Batches {
    Batches::new(samples(40), BatchOptions { batch_size: 4, pack, seed: 3, pad: 0 }).unwrap()
}

fn lora() -> LoraConfig {
    LoraConfig::new(4, Targets::all_linear()).with_alpha(8.0).with_dropout(0.1)
}

fn settings() -> TrainConfig {
    TrainConfig {
        steps: 12,
        learning_rate: 1e-2,
        accumulate: 2,
        eval_every: 4,
        save_every: 4,
        ..TrainConfig::default()
    }
}

/// Burn's generator is one per process, and dropout draws from it: runs in parallel would take each other's numbers.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn run(dir: &Path, config: &TrainConfig, resume: bool, stop: bool) -> Result<Summary, Error> {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let model = attach(base(), &lora(), 1)?;
    let trained = AdapterOf::new(lora(), "llama");
    let device = Device::flex().autodiff();
    let held_out = batches(None);
    let stop = AtomicBool::new(stop);
    train(&NextToken, model, &trained, batches(None), Some(&held_out), config, dir, resume, &device, &stop)
        .map(|(_, summary)| summary)
}

#[test]
fn the_loss_falls_and_everything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let summary = run(dir.path(), &settings(), false, false).unwrap();
    let (before, after) = (summary.before.unwrap(), summary.after.unwrap());
    assert!(after.loss < 0.9 * before.loss, "{} {}", before.loss, after.loss);
    assert_eq!(summary.outcome, Outcome::Finished);
    for file in
        ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.svg", "best/adapter_config.json"]
    {
        assert!(dir.path().join(file).exists(), "{file}");
    }
    let checkpoints = std::fs::read_dir(dir.path()).unwrap();
    let checkpoints =
        checkpoints.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().starts_with("checkpoint-"));
    assert_eq!(checkpoints.count(), 2, "the two newest are kept");
}

#[test]
fn resuming_is_bit_identical() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    run(whole.path(), &settings(), false, false).unwrap();
    // The stop flag is set from the start: every run takes one step, saves and ends.
    for step in 1..12 {
        let summary = run(broken.path(), &settings(), step > 1, true).unwrap();
        assert_eq!((summary.outcome, summary.steps), (Outcome::Interrupted, step));
    }
    run(broken.path(), &settings(), true, false).unwrap();
    let read = |dir: &Path| std::fs::read(dir.join("checkpoint-12/adapter_model.safetensors")).unwrap();
    assert!(read(whole.path()) == read(broken.path()));
    let read = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(read(whole.path()) == read(broken.path()));
}

#[test]
fn packing_and_padding_do_not_change_the_loss() {
    let model = base().valid();
    let [padded, packed] =
        [None, Some(32)].map(|pack| NextToken.evaluate(&model, &batches(pack), &Device::flex()).unwrap());
    assert_eq!(padded.count, packed.count);
    assert!((padded.loss - packed.loss).abs() < 1e-5, "{} {}", padded.loss, packed.loss);
}

#[test]
fn divergence_names_the_step_and_keeps_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        learning_rate: 1e30,
        schedule: Schedule::Constant,
        warmup: 0.0,
        max_grad_norm: 0.0,
        save_every: 1,
        ..settings()
    };
    let error = run(dir.path(), &config, false, false).unwrap_err();
    assert!(matches!(error, Error::Diverged { step: 2.., .. }), "{error}");
    assert!(dir.path().join("checkpoint-1/state.json").exists());
}

#[test]
fn early_stop_keeps_the_best() {
    let dir = tempfile::tempdir().unwrap();
    // A rate so high that the held-out loss soon rises.
    let config = TrainConfig {
        steps: 60,
        learning_rate: 0.5,
        eval_every: 1,
        patience: 3,
        schedule: Schedule::Constant,
        ..settings()
    };
    let summary = run(dir.path(), &config, false, false).unwrap();
    assert_eq!(summary.outcome, Outcome::Stopped);
    assert!(summary.kept_step + 3 == summary.steps, "{summary:?}");
}

#[test]
fn settings_are_checked_by_name() {
    for (config, name) in [
        (TrainConfig { learning_rate: 0.0, ..settings() }, "learning_rate"),
        (TrainConfig { warmup: 1.5, ..settings() }, "warmup"),
        (TrainConfig { accumulate: 0, ..settings() }, "accumulate"),
        (TrainConfig { max_grad_norm: -1.0, ..settings() }, "max_grad_norm"),
        (TrainConfig { steps: 0, epochs: f64::NAN, ..settings() }, "epochs"),
    ] {
        let error = run(tempfile::tempdir().unwrap().path(), &config, false, false).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}
