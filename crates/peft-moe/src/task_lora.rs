//! A mixture by task, for one task: one `LoRA`.
//!
//! - formula: `Σₑ gₑ·s·Aₑ·Bₑ = s·[A₁ … Aₙ]·[g₁·B₁; …; gₙ·Bₙ]`, `g = softmax(e·W / temperature)` of the task's embedding `e`
//! - source: Liu et al. 2023, arXiv:2310.18339

use std::collections::{BTreeMap, BTreeSet};

use peft_core::files::Values;
use peft_core::{AdapterFile, Error, Method as _, Result};
use peft_lora::LoraConfig;

use crate::{MixtureConfig, RouterConfig};

/// What the file has of a mixture by task, behind the path of a layer.
const ROUTER: &str = "router.weight";
const EMBEDDINGS: &str = "router.task_embeddings";
const A: &str = "experts.lora_A.weight";
const B: &str = "experts.lora_B.weight";

/// What a mixture by task is for one task: one `LoRA`, whose rank is that of all experts together, and which merges as any other.
///
/// # Errors
/// When the configuration makes no sense, the router looks at its input, experts are shared or have biases or numbers by layer, there is no such task, or a tensor is missing or of another shape.
pub fn task_lora(file: &AdapterFile<MixtureConfig<LoraConfig>>, task: usize) -> Result<AdapterFile<LoraConfig>> {
    let method = &file.method;
    method.check()?;
    let alike = method.num_shared == 0 && method.experts_per_layer.is_empty();
    let (RouterConfig::Task { num_tasks, embedding_dim }, true) = (&method.router, alike) else {
        let expected = "a router by task, with the same experts in all layers and none that is shared";
        return Err(Error::config("router", expected, format!("{:?}", method.router)));
    };
    if task >= *num_tasks {
        return Err(Error::config("task", format!("one below {num_tasks}"), task));
    }
    if let Some(key) = file.tensors.keys().find(|key| key.ends_with("lora_B.bias")) {
        return Err(Error::config("lora_bias", "false", key));
    }
    let (lora, experts, mut tensors) = (joined(method), method.num_experts, file.tensors.clone());
    let path_of = |key: &String| {
        let path = [ROUTER, A].into_iter().find_map(|end| key.strip_suffix(end)?.strip_suffix('.'))?;
        Some(path.to_owned())
    };
    for path in file.tensors.keys().filter_map(path_of).collect::<BTreeSet<_>>() {
        let rank = lora.rank_of(&path)?;
        let mut take = |key: &str, shape| take(&mut tensors, &format!("{path}.{key}"), shape);
        let weight = take(ROUTER, [Some(experts), Some(*embedding_dim)])?;
        let embeddings = take(EMBEDDINGS, [Some(*num_tasks), Some(*embedding_dim)])?;
        let (down, mut up) = (take(A, [Some(rank), None])?, take(B, [None, Some(rank)])?);
        let gates = gates(&weight, &embeddings.values[task * embedding_dim..][..*embedding_dim], method.temperature);
        let own = rank / experts;
        up.values.iter_mut().enumerate().for_each(|(at, value)| *value *= gates[at / own % experts]);
        tensors.insert(format!("{path}.lora_A.weight"), down);
        tensors.insert(format!("{path}.lora_B.weight"), up);
    }
    let (base_model, task_type) = (file.base_model.clone(), file.task_type.clone());
    Ok(AdapterFile { method: lora, base_model, task_type, base_fingerprint: file.base_fingerprint.clone(), tensors })
}

/// The `LoRA` of all experts together, with the scale that each has.
fn joined(method: &MixtureConfig<LoraConfig>) -> LoraConfig {
    let (expert, experts) = (&method.expert, method.num_experts);
    // What the scale has below it becomes larger by as much.
    let factor = if expert.use_rslora { (experts as f64).sqrt() } else { experts as f64 };
    let (rank, alpha) = (expert.rank * experts, expert.alpha * factor);
    let mut lora = LoraConfig { rank, alpha, targets: method.targets.clone(), ..expert.clone() };
    lora.rank_pattern.values_mut().for_each(|rank| *rank *= experts);
    lora.alpha_pattern.values_mut().for_each(|alpha| *alpha *= factor);
    lora
}

/// Takes a matrix of that shape out of the tensors, as long as it likes where no length is given.
fn take(tensors: &mut BTreeMap<String, Values>, key: &str, shape: [Option<usize>; 2]) -> Result<Values> {
    let Values { shape: found, values } =
        tensors.remove(key).ok_or_else(|| Error::config(key, "a tensor of the file", "none"))?;
    let fits = |(found, expected): (&usize, Option<usize>)| expected.is_none_or(|expected| *found == expected);
    let count = found.iter().try_fold(1_usize, |count, length| count.checked_mul(*length));
    if found.len() == shape.len() && found.iter().zip(shape).all(fits) && count == Some(values.len()) {
        return Ok(Values { shape: found, values });
    }
    let expected = shape.map(|length| length.map_or_else(|| "any".to_owned(), |length| length.to_string()));
    let found = format!("{} values of shape {found:?}", values.len());
    Err(Error::config(key, format!("a matrix of shape [{}]", expected.join(", ")), found))
}

/// How far a task opens the gate of each expert; `weight` is `[experts, embedding_dim]`.
fn gates(weight: &Values, embedding: &[f32], temperature: f64) -> Vec<f32> {
    let logit = |row: &[f32]| {
        let product = row.iter().zip(embedding).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        product / temperature
    };
    let logits: Vec<f64> = weight.values.chunks(embedding.len()).map(logit).collect();
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.into_iter().map(|logit| (logit - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| (power / sum) as f32).collect()
}
