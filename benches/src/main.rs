//! Time and peak memory of one LoRA step: the activation seam against Burn's own `apply_lora`, and against PyTorch + PEFT.
//!
//! ```text
//! cargo run --release -p peft-benches -- [--steps 10] [--python PYTHON]
//! ```
//! Llama with hidden 576, 6 layers, 9/3 heads, MLP 1536, vocabulary 8192, tied; rank 8 on all seven projections; batch 4 x 128, f32.
//! Each side runs in a process of its own, in turns, so that peak memory is its own and load on the machine meets both.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use burn::module::{Lora, Module, ParamGroup};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::{Peft, Targets};
use peft_lora::LoraConfig;
use peft_models::config::{LlamaConfig, ModelConfig, Rope, RopeScaling};
use peft_models::{CausalLm, Layout};
use serde_json::{Value, json};

const PROJECTIONS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const BATCH: usize = 4;
const SEQ: usize = 128;
const VOCAB: usize = 8192;
const ROUNDS: usize = 3;

/// Runs one side in a process of its own.
type Side = Box<dyn Fn() -> Result<Value, Box<dyn Error>>>;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)).cloned();
    let steps = option("--steps").map_or(Ok(10), |s| s.parse())?;
    if let Some(side) = option("--side") {
        println!("{}", measure(&side, steps)?);
        return Ok(());
    }
    let mut sides: Vec<(&str, Side)> = Vec::new();
    for side in ["activation", "apply_lora"] {
        let exe = std::env::current_exe()?;
        let run = move || child(Command::new(&exe).args(["--side", side, "--steps", &steps.to_string()]));
        sides.push((side, Box::new(run)));
    }
    if let Some(python) = option("--python") {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/bench_step.py");
        let run = move || child(Command::new(&python).arg(&script).args(["--steps", &steps.to_string()]));
        sides.push(("torch+peft", Box::new(run)));
    }
    let mut results: Vec<Vec<Value>> = vec![Vec::new(); sides.len()];
    for round in 1..=ROUNDS {
        for ((name, run), results) in sides.iter().zip(&mut results) {
            let result = run()?;
            eprintln!("round {round}, {name}: {result}");
            results.push(result);
        }
    }
    println!("{:12} {:>9} {:>7} {:>14} {:>7}", "side", "s/step", "ratio", "MiB above start", "ratio");
    let median = |results: &[Value], key: &str| {
        let mut values: Vec<f64> = results.iter().filter_map(|r| r[key].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let (time, memory) = (median(&results[0], "median_s"), median(&results[0], "rss_growth_mb"));
    for ((name, _), results) in sides.iter().zip(&results) {
        let (t, m) = (median(results, "median_s"), median(results, "rss_growth_mb"));
        println!("{name:12} {t:9.3} {:7.2} {m:14.0} {:7.2}", t / time, m / memory);
    }
    Ok(())
}

fn child(command: &mut Command) -> Result<Value, Box<dyn Error>> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
}

/// Median seconds of a step, and the peak of resident memory above the start.
fn measure(side: &str, steps: usize) -> Result<Value, Box<dyn Error>> {
    let before = resident("VmRSS")?;
    let device = Device::flex().autodiff();
    let base = CausalLm::new(&ModelConfig::Llama(config()), &device);
    let mut model = match side {
        "activation" => base.attach(&LoraConfig::new(8, Targets::modules(PROJECTIONS)).with_alpha(16.0))?,
        "apply_lora" => {
            let group = ParamGroup::from_regex(r"_proj\.weight$").map_err(|e| format!("{e:?}"))?;
            base.apply_lora(Lora::new(8, 16.0).set_param_group(group))
        }
        other => return Err(format!("no side {other}").into()),
    };
    let mut optim = AdamWConfig::new().init();
    let tokens: Vec<i64> = (0..BATCH * (SEQ + 1)).map(|i| (i * 2_654_435_761 % VOCAB) as i64).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [BATCH, SEQ + 1]), &Device::flex());
    let (ids, targets) = (tokens.clone().narrow(1, 0, SEQ), tokens.narrow(1, 1, SEQ).reshape([BATCH * SEQ, 1]));
    let mut seconds = Vec::new();
    for _ in 0..steps + 2 {
        let started = Instant::now();
        let logits = model.head(model.hidden(ids.clone(), Layout::Rows, None).flatten(0, 1));
        let shifted = logits.clone() - logits.detach().max_dim(1);
        let loss = (shifted.clone().exp().sum_dim(1).log() - shifted.gather(1, targets.clone())).mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optim.step(1e-4, model, grads);
        seconds.push(started.elapsed().as_secs_f64());
    }
    let mut timed = seconds.split_off(2);
    timed.sort_by(f64::total_cmp);
    Ok(json!({ "median_s": timed[timed.len() / 2], "rss_growth_mb": resident("VmHWM")? - before }))
}

fn config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: VOCAB,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 6,
        num_attention_heads: 9,
        num_key_value_heads: 3,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::Default },
        max_position_embeddings: 2048,
        tie_word_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: vec![None; 6],
    }
}

/// A field of `/proc/self/status` in MiB.
fn resident(field: &str) -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with(field)).ok_or("no such field")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no value")?.parse()?;
    Ok(kib / 1024.0)
}
