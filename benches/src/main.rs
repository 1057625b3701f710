//! Ratios of time and peak memory, each side in a process of its own and in turns, so that peak memory is its own and load on the machine meets all.
//!
//! ```text
//! cargo run --release -p peft-benches -- [step|decode] [--steps 10] [--python PYTHON]
//! ```
//! `step`: one LoRA step; the activation seam over weights in f32, over NF4 with double quantisation, and Burn's own `apply_lora`; with Python also
//! PyTorch + PEFT and PyTorch + bitsandbytes. `decode`: one token at a time, over f32 and over NF4.
//!
//! Llama with hidden 576, 6 layers, 9/3 heads, MLP 1536, vocabulary 8192, tied; rank 8 on all seven projections; batch 4 x 128, f32.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use burn::module::{Lora, Module, ParamGroup};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::{Peft, Targets};
use peft_lora::LoraConfig;
use peft_models::config::ModelConfig;
use peft_models::export::{Dtype, save_model};
use peft_models::load::Packing;
use peft_models::{CausalLm, Layout, ModelSource, Pretrained, Sampling, generate};
use peft_quant::Quantization;
use serde_json::{Value, json};

const PROJECTIONS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
const BATCH: usize = 4;
const SEQ: usize = 128;
const VOCAB: usize = 8192;
const ROUNDS: usize = 3;

/// Sides of each comparison: ours by name, and what `tools/bench_step.py` is told for those of Python.
const COMPARISONS: [(&str, &[&str], &[PythonSide]); 2] = [
    (
        "step",
        &["activation", "packed", "apply_lora"],
        &[("torch+peft", &[]), ("torch+bitsandbytes", &["--base", "nf4"])],
    ),
    (
        "decode",
        &["decode", "decode-packed"],
        &[("torch", &["--decode"]), ("torch+bitsandbytes", &["--decode", "--base", "nf4"])],
    ),
];

/// A side of Python: its name, and what the script is told.
type PythonSide = (&'static str, &'static [&'static str]);

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)).cloned();
    let steps = option("--steps").map_or(Ok(10), |s| s.parse())?;
    if let (Some(side), Some(model)) = (option("--side"), option("--model")) {
        println!("{}", measure(&side, Path::new(&model), steps)?);
        return Ok(());
    }
    let wanted = args.first().filter(|word| !word.starts_with('-')).map_or("step", String::as_str);
    let comparison = COMPARISONS.iter().find(|(name, ..)| *name == wanted);
    let (_, ours, theirs) = comparison.ok_or_else(|| format!("{wanted}: one of step, decode"))?;
    let model = tempfile::tempdir()?;
    write_model(model.path())?;
    let exe = std::env::current_exe()?;
    let run = |side: &str| {
        let mut command = Command::new(&exe);
        command.args(["--side", side, "--steps", &steps.to_string(), "--model"]).arg(model.path());
        command
    };
    let mut sides: Vec<(&str, Command)> = ours.iter().map(|side| (*side, run(side))).collect();
    if let Some(python) = option("--python") {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/bench_step.py");
        for (name, extra) in *theirs {
            let mut command = Command::new(&python);
            command.arg(&script).args(["--steps", &steps.to_string()]).args(*extra);
            sides.push((name, command));
        }
    }
    let mut results: Vec<Vec<Value>> = vec![Vec::new(); sides.len()];
    for round in 1..=ROUNDS {
        for ((name, command), results) in sides.iter_mut().zip(&mut results) {
            let result = child(command)?;
            eprintln!("round {round}, {name}: {result}");
            results.push(result);
        }
    }
    report(sides.iter().map(|(name, _)| *name).zip(&results));
    Ok(())
}

/// Medians over the rounds, and their ratios to the first side.
fn report<'a>(sides: impl Iterator<Item = (&'a str, &'a Vec<Value>)>) {
    println!("{:18} {:>9} {:>7} {:>15} {:>7}", "side", "s", "ratio", "MiB above start", "ratio");
    let median = |results: &[Value], key: &str| {
        let mut values: Vec<f64> = results.iter().filter_map(|r| r[key].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let mut first = None;
    for (name, results) in sides {
        let (t, m) = (median(results, "median_s"), median(results, "rss_growth_mb"));
        let (time, memory) = *first.get_or_insert((t, m));
        println!("{name:18} {t:9.4} {:7.2} {m:15.0} {:7.2}", t / time, m / memory);
    }
}

fn child(command: &mut Command) -> Outcome<Value> {
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
}

/// The model with random weights, as a Hugging Face directory: every side reads it, so that loading is part of its memory.
fn write_model(dir: &Path) -> Outcome<()> {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": true,
        "hidden_act": "silu",
    });
    let model = CausalLm::new(&ModelConfig::from_json(&config, dir)?, &Device::flex());
    Ok(save_model(&model, &config, None, Dtype::F32, dir)?)
}

/// Median seconds of a step or a token, and the peak of resident memory above the start.
fn measure(side: &str, dir: &Path, steps: usize) -> Outcome<Value> {
    let before = resident("VmRSS")?;
    let packed = side.ends_with("packed");
    let packing = if packed { Packing::Quantize(Quantization::default()) } else { Packing::Dense };
    let decoding = side.starts_with("decode");
    let device = if decoding { Device::flex() } else { Device::flex().autodiff() };
    let base = Pretrained::load_with(&ModelSource::Dir(dir.to_owned()), &packing, &device)?.model;
    let mut seconds = match side {
        _ if decoding => decode(&base, steps, &device)?,
        "apply_lora" => {
            let group = ParamGroup::from_regex(r"_proj\.weight$").map_err(|e| format!("{e:?}"))?;
            train(base.apply_lora(Lora::new(8, 16.0).set_param_group(group)), steps)
        }
        _ => train(base.attach(&LoraConfig::new(8, Targets::modules(PROJECTIONS)).with_alpha(16.0))?, steps),
    };
    seconds.sort_by(f64::total_cmp);
    Ok(json!({ "median_s": seconds[seconds.len() / 2], "rss_growth_mb": resident("VmHWM")? - before }))
}

/// Seconds of each step, the first two left out.
fn train(mut model: CausalLm, steps: usize) -> Vec<f64> {
    let mut optim = AdamWConfig::new().init();
    let tokens: Vec<i64> = (0..BATCH * (SEQ + 1)).map(|i| (i * 2_654_435_761 % VOCAB) as i64).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [BATCH, SEQ + 1]), &Device::flex());
    let (ids, targets) = (tokens.clone().narrow(1, 0, SEQ), tokens.narrow(1, 1, SEQ).reshape([BATCH * SEQ]));
    let mut seconds = Vec::new();
    for _ in 0..steps + 2 {
        let started = Instant::now();
        let loss =
            model.scores(model.hidden(ids.clone(), Layout::Rows, None).flatten(0, 1), targets.clone()).losses.mean();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optim.step(1e-4, model, grads);
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.split_off(2)
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

/// A field of `/proc/self/status` in MiB.
fn resident(field: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with(field)).ok_or("no such field")?;
    let kib: f64 = line.split_whitespace().nth(1).ok_or("no value")?.parse()?;
    Ok(kib / 1024.0)
}
