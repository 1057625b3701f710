//! What is measured on our side.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use burn::module::{Lora, Module, ParamGroup};
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use peft_core::{Peft, Targets, with_auxiliary};
use peft_lora::LoraConfig;
use peft_models::config::ModelConfig;
use peft_models::load::{Packing, Precision, load_weights};
use peft_models::{CausalLm, Layout, Sampling, generate};
use peft_moe::{Balance, MixtureConfig, RouterConfig};
use peft_quant::Quantization;
use peft_train::{Optimization, Rates};
use serde_json::{Value, json};

use crate::plain::PlainLlama;
use crate::random::RandomWeights;
use crate::{Backend, Outcome, Setup};

pub(crate) const PROJECTIONS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Side {
    /// LoRA through the activation seam
    Lora,
    /// The same over frozen matrices in bfloat16
    LoraBf16,
    /// The same over NF4 with double quantisation
    Packed,
    /// The same with products in bfloat16
    PackedBf16,
    /// The same model and update of Burn's own operations
    Plain,
    /// The same model under Burn's `apply_lora`
    ApplyLora,
    /// Two of eight adapters for each token
    TwoOf8,
    /// Two of thirty-two
    TwoOf32,
    /// All of eight
    AllOf8,
    /// A token at a time over f32
    Decode,
    /// A token at a time over frozen matrices in bfloat16
    DecodeBf16,
    /// A token at a time over NF4
    DecodePacked,
}

impl Side {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::LoraBf16 => "lora-bf16",
            Self::Packed => "packed",
            Self::PackedBf16 => "packed-bf16",
            Self::Plain => "plain",
            Self::ApplyLora => "apply-lora",
            Self::TwoOf8 => "two-of8",
            Self::TwoOf32 => "two-of32",
            Self::AllOf8 => "all-of8",
            Self::Decode => "decode",
            Self::DecodeBf16 => "decode-bf16",
            Self::DecodePacked => "decode-packed",
        }
    }

    /// Median seconds of a step or a token, and the peak of memory above the start: resident memory, or that of the GPU.
    pub(crate) fn measure(self, setup: &Setup) -> Outcome<Value> {
        let before = memory(setup.backend, "VmRSS")?;
        let device = setup.backend.device();
        let train = device.clone().autodiff();
        let precision = match self {
            Self::LoraBf16 | Self::PackedBf16 | Self::DecodeBf16 => Precision::Bf16,
            _ => Precision::F32,
        };
        let load = |packing: &Packing, device: &Device| -> Outcome<CausalLm> {
            let model = CausalLm::new(&config(setup)?, device);
            let weights = RandomWeights::of(&model);
            Ok(load_weights(model, &weights, packing, precision, |_| false)?)
        };
        let nf4 = Packing::Quantize(Quantization::default());
        let adapted = |base: CausalLm| -> Outcome<CausalLm> {
            let config = LoraConfig::new(setup.rank, Targets::modules(PROJECTIONS));
            Ok(base.attach(&config.with_alpha(2.0 * setup.rank as f64))?)
        };
        let mixed = |experts: usize, router: RouterConfig| -> Outcome<CausalLm> {
            let expert = LoraConfig::new(setup.rank, Targets::modules(PROJECTIONS)).with_alpha(2.0 * setup.rank as f64);
            let balance = Balance { load: 0.01, ..Balance::default() };
            let mixture = MixtureConfig::new(expert, experts, router).with_balance(balance);
            Ok(load(&Packing::Dense, &train)?.attach(&mixture)?)
        };
        let two = RouterConfig::TopK { k: 2 };
        let mut seconds = match self {
            Self::TwoOf8 => steps(mixed(8, two)?, setup, balanced, ours())?,
            Self::TwoOf32 => steps(mixed(32, two)?, setup, balanced, ours())?,
            Self::AllOf8 => steps(mixed(8, RouterConfig::Soft)?, setup, balanced, ours())?,
            Self::Lora | Self::LoraBf16 => steps(adapted(load(&Packing::Dense, &train)?)?, setup, loss, ours())?,
            Self::Packed | Self::PackedBf16 => steps(adapted(load(&nf4, &train)?)?, setup, loss, ours())?,
            Self::Plain => {
                let model = PlainLlama::new(setup, Some(setup.rank), &train);
                steps(model, setup, PlainLlama::loss, burns())?
            }
            Self::ApplyLora => {
                let group = ParamGroup::from_regex(r"_proj\.base\.weight$").map_err(|e| format!("{e:?}"))?;
                let lora = Lora::new(setup.rank, 2.0 * setup.rank as f64).set_param_group(group);
                let model = PlainLlama::new(setup, None, &train).apply_lora(lora);
                steps(model, setup, PlainLlama::loss, burns())?
            }
            Self::Decode | Self::DecodeBf16 => decode(&load(&Packing::Dense, &device)?, setup.steps, &device)?,
            Self::DecodePacked => decode(&load(&nf4, &device)?, setup.steps, &device)?,
        };
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        Ok(json!({ "median_s": median, "memory_mib": memory(setup.backend, "VmHWM")? - before }))
    }
}

fn config(setup: &Setup) -> Outcome<ModelConfig> {
    let Setup { layers, vocab, hidden, heads, kv_heads, intermediate, .. } = setup;
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": true, "hidden_act": "silu",
    });
    Ok(ModelConfig::from_json(&config, Path::new("random"))?)
}

fn loss(model: &CausalLm, ids: Tensor<2, Int>, targets: Tensor<1, Int>) -> Tensor<1> {
    model.scores(model.hidden(ids, Layout::Rows, None).flatten(0, 1), targets).losses.mean()
}

/// With what the routers add.
fn balanced(model: &CausalLm, ids: Tensor<2, Int>, targets: Tensor<1, Int>) -> Tensor<1> {
    let (loss, said) = with_auxiliary(|| loss(model, ids, targets));
    said.into_iter().filter_map(|each| each.loss).fold(loss, |sum, loss| sum + loss)
}

const LEARNING_RATE: f64 = 1e-4;

/// AdamW as `peft train` has it.
fn ours<M: Module>() -> impl FnMut(M, GradientsParams) -> M {
    let mut optimization = Optimization::new(1e-4);
    move |model, grads| optimization.step(model, grads, Rates::new(LEARNING_RATE), 1.0)
}

/// AdamW as Burn has it.
fn burns<M: Module>() -> impl FnMut(M, GradientsParams) -> M {
    let mut optim = AdamWConfig::new().init();
    move |model, grads| optim.step(LEARNING_RATE, model, grads)
}

/// Seconds of each step of `accumulate` batches, the first two left out.
fn steps<M: Module>(
    mut model: M,
    setup: &Setup,
    loss: impl Fn(&M, Tensor<2, Int>, Tensor<1, Int>) -> Tensor<1>,
    mut update: impl FnMut(M, GradientsParams) -> M,
) -> Outcome<Vec<f64>> {
    let Setup { batch, seq, vocab, steps, accumulate, .. } = *setup;
    let device = model.devices().into_iter().next().unwrap_or_else(Device::flex).without_autodiff();
    let tokens: Vec<i64> = (0..batch * (seq + 1)).map(|i| (i * 2_654_435_761 % vocab) as i64).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [batch, seq + 1]), &device);
    let (ids, targets) = (tokens.clone().narrow(1, 0, seq), tokens.narrow(1, 1, seq).reshape([batch * seq]));
    let mut seconds = Vec::new();
    for _ in 0..steps + 2 {
        let started = Instant::now();
        let mut sum = GradientsAccumulator::new();
        for _ in 0..accumulate {
            let loss = loss(&model, ids.clone(), targets.clone());
            sum.accumulate(&model, GradientsParams::from_grads(loss.backward(), &model));
        }
        model = update(model, sum.grads());
        // Waits for what the device has still to do.
        device.sync()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(seconds.split_off(2))
}

/// Seconds of each of `steps` tokens after a prompt of 16 and two more.
fn decode(model: &CausalLm, steps: usize, device: &Device) -> Outcome<Vec<f64>> {
    let prompt: Vec<u32> = (1..=16).collect();
    let (mut seconds, mut started) = (Vec::new(), Instant::now());
    generate(model, &prompt, steps + 2, Sampling::default(), &[], device, |_| {
        seconds.push(started.elapsed().as_secs_f64());
        started = Instant::now();
        true
    })?;
    Ok(seconds.split_off(2))
}

/// What is in use, in MiB: of the GPU all, of which its allocator gives nothing back; else a field of `/proc/self/status`.
fn memory(backend: Backend, field: &str) -> Outcome<f64> {
    if !backend.is_cuda() {
        return resident(field);
    }
    let query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"];
    let output = Command::new("nvidia-smi").args(query).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// A field of `/proc/self/status` in MiB.
fn resident(field: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with(field)).ok_or("no such field")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no value")?.parse()?;
    Ok(kib / 1024.0)
}
