//! Checks on whole models.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::{Peft, Targets, load_adapter};
use peft_lora::LoraConfig;
use peft_models::config::InputConfig;
use peft_models::encoder::{Input, Text};
use peft_models::{CausalLm, KvCache, Layout, ModelSource, Pretrained, PretrainedEncoder};
use peft_prompt::{PrefixTuningConfig, PromptTuningConfig};
use peft_testkit::{Failure, Finding, Golden, Outcome, difference, read};
use peft_train::data::{BatchOptions, Batches, Sample};
use peft_train::{AdapterOf, NextToken, Record, Stop, TrainConfig, read_metrics, train};

/// Largest difference of a logit, and of a loss after optimizer steps.
const BOUND: f64 = 1e-4;

type ModelCheck = Box<dyn Fn(&Device) -> Outcome>;

/// The checks by name.
pub(crate) fn checks() -> Vec<(String, ModelCheck)> {
    const MODELS: [&str; 8] = [
        "models/llama",
        "models/qwen2",
        "models/qwen3",
        "models/gpt2",
        "models/mistral_sliding",
        "models/llama3_rope",
        "bnb/llama_nf4",
        "bnb/gpt2_nf4",
    ];
    const ADAPTERS: [(&str, &str); 4] =
        [("llama", "plain"), ("llama", "rslora"), ("llama", "embedding"), ("gpt2", "plain")];
    let mut checks: Vec<(String, ModelCheck)> = Vec::new();
    for name in MODELS {
        let short = name.trim_start_matches("models/").replace('/', " ");
        checks.push((format!("golden {short}"), Box::new(move |device| golden_model(name, device))));
    }
    for (base, name) in ADAPTERS {
        checks.push((format!("golden lora {base} {name}"), Box::new(move |device| golden_adapter(base, name, device))));
    }
    for (base, name) in [("llama", "prompt_tuning"), ("qwen2", "prefix_tuning"), ("gpt2", "prefix_tuning")] {
        checks.push((format!("prompts {base} {name}"), Box::new(move |device| prompts(base, name, device))));
    }
    for name in ["bert_seqcls", "roberta_tokcls", "distilbert_qa", "vit_imgcls", "dinov2_imgcls"] {
        checks.push((format!("encoder {name}"), Box::new(move |device| encoder(name, device))));
    }
    checks.push(("training".to_owned(), Box::new(training)));
    checks
}

fn testdata(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata").join(path)
}

fn model(name: &str, device: &Device) -> Result<CausalLm, Failure> {
    Ok(Pretrained::load(&ModelSource::Dir(testdata(name)), device)?.model)
}

/// Logits of `model` against those in `dir`.
fn golden(model: &CausalLm, dir: &Path, device: &Device) -> Outcome {
    let golden = Golden::read(&dir.join("logits.safetensors"))?;
    let ids = Tensor::<2, Int>::from_data(TensorData::new(golden.tokens, [golden.batch, golden.seq]), device);
    Ok(Finding::Measured { deviation: difference(&read(model.forward(ids))?, &golden.logits), bound: BOUND })
}

/// Logits are those of `transformers`, and of bitsandbytes where the model is packed.
fn golden_model(name: &str, device: &Device) -> Outcome {
    golden(&model(name, device)?, &testdata(name), device)
}

/// Logits with an adapter are those of Hugging Face PEFT.
fn golden_adapter(base: &str, name: &str, device: &Device) -> Outcome {
    let dir = testdata("lora").join(base).join(name);
    let (model, _) = load_adapter::<_, LoraConfig>(model(&format!("models/{base}"), device)?, &dir)?;
    golden(&model, &dir, device)
}

/// Logits behind a prompt of PEFT, token by token and at once, are those on Burn's default CPU backend.
fn prompts(base: &str, name: &str, device: &Device) -> Outcome {
    let (found, expected) = (prompted(base, name, device)?, prompted(base, name, &Device::flex())?);
    Ok(Finding::Measured { deviation: difference(&found, &expected), bound: BOUND })
}

fn prompted(base: &str, name: &str, device: &Device) -> Result<Vec<f64>, Failure> {
    let (model, dir) = (model(&format!("models/{base}"), device)?, testdata("prompts").join(base).join(name));
    let model = match name {
        "prefix_tuning" => load_adapter::<_, PrefixTuningConfig>(model, &dir)?.0,
        _ => load_adapter::<_, PromptTuningConfig>(model, &dir)?.0,
    };
    let ids = |ids: &[i64]| Tensor::<2, Int>::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), device);
    let mut values = read(model.forward(ids(&[3, 1, 8, 4])))?;
    let mut cache = KvCache::default();
    for part in [&[3, 1][..], &[8], &[4]] {
        values.extend(read(model.hidden(ids(part), Layout::Rows, Some(&mut cache)))?);
    }
    Ok(values)
}

/// Logits of an encoder, of texts with padding or of pictures, are those on Burn's default CPU backend.
fn encoder(name: &str, device: &Device) -> Outcome {
    let (found, expected) = (encoder_logits(name, device)?, encoder_logits(name, &Device::flex())?);
    Ok(Finding::Measured { deviation: difference(&found, &expected), bound: BOUND })
}

fn encoder_logits(name: &str, device: &Device) -> Result<Vec<f64>, Failure> {
    const SEQ: usize = 8;
    let source = ModelSource::Dir(testdata("encoders").join(name));
    let model = PretrainedEncoder::load(&source, device)?.model;
    let input = match model.config().input {
        InputConfig::Text { .. } => {
            let rows = |values: Vec<i64>| Tensor::from_data(TensorData::new(values, [2, SEQ]), device);
            let padding = |at: usize| at >= SEQ && at % SEQ < 3;
            let ids = (0..2 * SEQ).map(|at| if padding(at) { 1 } else { 5 + 7 * at as i64 % 90 });
            let mask = (0..2 * SEQ).map(|at| i64::from(!padding(at)));
            Input::Text(Text { ids: rows(ids.collect()), mask: Some(rows(mask.collect())), types: None })
        }
        InputConfig::Image { image_size: side, num_channels, .. } => {
            let values = (0..num_channels * side * side).map(|at| (0.1 * at as f64).sin() as f32).collect::<Vec<_>>();
            Input::Pixels(Tensor::from_data(TensorData::new(values, [1, num_channels, side, side]), device))
        }
    };
    let logits = model.forward(&input);
    let [_, places, _] = logits.dims();
    // What stands at padded places means nothing; the last places of both rows are real.
    read(logits.narrow(1, if places == SEQ { 3 } else { 0 }, if places == SEQ { SEQ - 3 } else { places }))
}

/// The losses of three optimizer steps are those on Burn's default CPU backend.
fn training(device: &Device) -> Outcome {
    let (found, expected) = (losses(device)?, losses(&Device::flex())?);
    Ok(Finding::Measured { deviation: difference(&found, &expected), bound: BOUND })
}

fn losses(device: &Device) -> Result<Vec<f64>, Failure> {
    let device = device.clone().autodiff();
    let method = LoraConfig::new(4, Targets::modules(["q_proj", "v_proj"])).with_alpha(8.0);
    let model = model("models/llama", &device)?.attach(&method)?;
    let golden = Golden::read(&testdata("models/llama/logits.safetensors"))?;
    let ids = golden.tokens.into_iter().map(u32::try_from).collect::<Result<Vec<_>, _>>()?;
    let sample = |row: &[u32]| Sample::new(row.to_vec(), vec![true; row.len()]);
    let samples = ids.chunks(golden.seq.max(1)).map(sample).collect::<Result<_, _>>()?;
    let batches = Batches::new(samples, BatchOptions { batch_size: golden.batch, pack: None, seed: 0, pad: 0 })?;
    let config = TrainConfig { steps: 3, learning_rate: 1e-2, ..TrainConfig::default() };
    let trained = AdapterOf::new(method, "llama");
    let dir = tempfile::tempdir()?;
    train(&NextToken, model, &trained, batches, None, &config, dir.path(), false, &device, &Stop::new(false))?;
    let loss = |record| match record {
        Record::Step(step) => Some(step.loss),
        Record::Eval(_) | Record::Experts(_) => None,
    };
    let losses: Vec<f64> = read_metrics(&dir.path().join("metrics.jsonl"))?.into_iter().filter_map(loss).collect();
    if losses.len() == config.steps {
        Ok(losses)
    } else {
        Err(format!("expected 3 steps, found {}", losses.len()).into())
    }
}
