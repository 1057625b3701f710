//! A GGUF file's metadata as a Hugging Face `config.json`.

use serde_json::{Map, Value, json};

use super::Gguf;
use super::names::Architecture;
use crate::weights::Weights;
use crate::{Error, Result};

/// The `config.json` that the model's Hugging Face repository would have.
pub(super) fn config(gguf: &Gguf) -> Result<Value> {
    let mut config = match gguf.architecture {
        Architecture::Gpt2 => gpt2(gguf)?,
        _ => llama_family(gguf)?,
    };
    let special = gguf.special_tokens()?;
    for (name, id) in [("bos", special.bos), ("eos", special.eos), ("pad", special.pad)] {
        if let Some(id) = id {
            config.insert(format!("{name}_token_id"), id.into());
        }
    }
    config.insert("tie_word_embeddings".into(), gguf.find("lm_head.weight").is_none().into());
    Ok(Value::Object(config))
}

fn gpt2(gguf: &Gguf) -> Result<Map<String, Value>> {
    let context = required(gguf, "context_length")?;
    Ok(object(json!({
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": required(gguf, "embedding_length")?,
        "n_inner": required(gguf, "feed_forward_length")?,
        "n_layer": required(gguf, "block_count")?,
        "n_head": gguf.heads.query,
        "n_positions": context,
        "n_ctx": context,
        "vocab_size": vocab_size(gguf, "transformer.wte.weight")?,
        "layer_norm_epsilon": required_float(gguf, "attention.layer_norm_epsilon")?,
        "activation_function": "gelu_new",
    })))
}

fn llama_family(gguf: &Gguf) -> Result<Map<String, Value>> {
    let class = match gguf.architecture {
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Llama | Architecture::Gpt2 => "LlamaForCausalLM",
    };
    let hidden = required(gguf, "embedding_length")?;
    let head_dim = match uint(gguf, "attention.key_length")? {
        Some(head_dim) => head_dim,
        None => hidden / gguf.heads.query as u64,
    };
    for parameter in ["rope.dimension_count", "attention.value_length"] {
        if let Some(found) = uint(gguf, parameter)?.filter(|&found| found != head_dim) {
            return Err(Error::Unsupported {
                what: format!("{}: {parameter} {found} with {head_dim} values a head", gguf.path().display()),
                hint: "use a model whose heads have one size and are rotated whole".into(),
            });
        }
    }
    let theta = gguf.metadata.float(&gguf.architecture.key("rope.freq_base"))?.unwrap_or(10_000.0);
    let mut config = object(json!({
        "model_type": gguf.architecture.name(),
        "architectures": [class],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": required(gguf, "feed_forward_length")?,
        "num_hidden_layers": required(gguf, "block_count")?,
        "num_attention_heads": gguf.heads.query,
        "num_key_value_heads": gguf.heads.key,
        "head_dim": head_dim,
        "rms_norm_eps": required_float(gguf, "attention.layer_norm_rms_epsilon")?,
        "rope_theta": theta,
        "max_position_embeddings": required(gguf, "context_length")?,
        "vocab_size": vocab_size(gguf, "model.embed_tokens.weight")?,
    }));
    // Qwen2 always has biases on q, k and v, and no such keys.
    if gguf.architecture != Architecture::Qwen2 {
        let has = |module: &str| gguf.find(&format!("model.layers.0.{module}.bias")).is_some();
        config.insert("attention_bias".into(), has("self_attn.q_proj").into());
        config.insert("mlp_bias".into(), has("mlp.gate_proj").into());
    }
    if let Some(window) = uint(gguf, "attention.sliding_window")?.filter(|&window| window > 0) {
        config.insert("sliding_window".into(), window.into());
    }
    if let Some(scaling) = rope_scaling(gguf, theta, head_dim)? {
        config.insert("rope_scaling".into(), scaling);
    }
    Ok(config)
}

/// `rope_scaling`, from the metadata or, for Llama 3.1 and later, from the factors stored as a tensor.
fn rope_scaling(gguf: &Gguf, theta: f64, head_dim: u64) -> Result<Option<Value>> {
    let key = |parameter| gguf.architecture.key(parameter);
    if let Some(factors) = gguf.rope_factors()? {
        return llama3_scaling(gguf, &factors, theta, head_dim);
    }
    let kind = gguf.metadata.string(&key("rope.scaling.type"))?;
    let factor = match gguf.metadata.float(&key("rope.scaling.factor"))? {
        Some(factor) => Some(factor),
        // Before scaling types existed, linear was the only one.
        None => gguf.metadata.float(&key("rope.scale_linear"))?,
    };
    let (kind, factor) = match (kind, factor) {
        (Some("none"), _) | (_, None) => return Ok(None),
        (kind, Some(factor)) => (kind.unwrap_or("linear"), factor),
    };
    let mut scaling = object(json!({ "rope_type": kind, "factor": factor }));
    if let Some(original) = uint(gguf, "rope.scaling.original_context_length")? {
        scaling.insert("original_max_position_embeddings".into(), original.into());
    }
    Ok(Some(Value::Object(scaling)))
}

/// The published Llama 3 parameters that give these divisors of the rotation frequencies.
///
/// With `λ` the wavelength of a frequency and `c` = 8192 the context the model was pretrained with, the divisor is 1
/// for `λ < c/4`, the factor for `λ > c`, and `1 / ((1-t)/factor + t)`, `t = (c/λ - 1) / (4 - 1)`, between. The file
/// holds only the result, so the factor is its maximum and the rest is checked.
fn llama3_scaling(gguf: &Gguf, divisors: &[f32], theta: f64, head_dim: u64) -> Result<Option<Value>> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const CONTEXT: f64 = 8192.0;
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let fits = divisors.iter().enumerate().all(|(i, &divisor)| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        let t = ((CONTEXT / wavelength - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        let expected = 1.0 / ((1.0 - t) / factor + t);
        (f64::from(divisor) / expected - 1.0).abs() < 1e-3
    });
    match fits && divisors.len() as u64 * 2 == head_dim {
        true if factor == 1.0 => Ok(None),
        true => Ok(Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": CONTEXT as u64,
        }))),
        false => Err(Error::Unsupported {
            what: format!("{}: the rotation factors in `rope_freqs.weight`", gguf.path().display()),
            hint: "only those of Llama 3 are known; use the model's Hugging Face directory instead".into(),
        }),
    }
}

/// The rows of the embedding, which the tokenizer may not exceed.
fn vocab_size(gguf: &Gguf, embedding: &str) -> Result<usize> {
    let missing = || Error::format(gguf.path(), "the tensor `token_embd.weight` is missing");
    let rows = gguf.find(embedding).ok_or_else(missing)?.shape[0];
    match gguf.metadata.strings("tokenizer.ggml.tokens")? {
        Some(tokens) if tokens.len() > rows => {
            Err(Error::format(gguf.path(), format!("it has {} tokens, but embeddings for {rows} only", tokens.len())))
        }
        _ => Ok(rows),
    }
}

fn uint(gguf: &Gguf, parameter: &str) -> Result<Option<u64>> {
    gguf.metadata.uint(&gguf.architecture.key(parameter))
}

fn required(gguf: &Gguf, parameter: &str) -> Result<u64> {
    let key = gguf.architecture.key(parameter);
    gguf.metadata.required(&key, gguf.metadata.uint(&key)?)
}

fn required_float(gguf: &Gguf, parameter: &str) -> Result<f64> {
    let key = gguf.architecture.key(parameter);
    gguf.metadata.required(&key, gguf.metadata.float(&key)?)
}

fn object(value: Value) -> Map<String, Value> {
    if let Value::Object(map) = value { map } else { Map::new() }
}
