//! Generating text: greedy, or sampled by temperature, top-k and top-p.

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::for_text;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::attention::{KvCache, Layout};
use crate::{CausalLm, Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 takes the most likely token.
    pub temperature: f64,
    /// Only that many of the most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the smallest set of most likely tokens whose probability reaches this; 1 for all. Holtzman et al. 2020, arXiv:1904.09751.
    pub top_p: f64,
    /// Of the random generator.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Continues `prompt` by up to `max_new_tokens`, calling `on_token` with each; stops after a token of `stop` or when `on_token` says so.
///
/// Gives the new tokens, a stop token included. Inside of [`for_modalities`](peft_core::for_modalities) the batch is the prompt.
///
/// # Errors
/// When the prompt is empty, longer than the model allows, holds a token that the model does not have, or the device fails.
pub fn generate(
    model: &CausalLm,
    prompt: &[u32],
    max_new_tokens: usize,
    sampling: Sampling,
    stop: &[u32],
    device: &Device,
    mut on_token: impl FnMut(u32) -> bool,
) -> Result<Vec<u32>> {
    let config = model.config();
    let refuse = |what: String| Err(Error::Tokenizer(what));
    if prompt.is_empty() {
        return refuse("the prompt has no token; give some text".to_owned());
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= config.vocab_size()) {
        return refuse(format!("token {id} is out of range: the model has {} tokens", config.vocab_size()));
    }
    let room = model.max_tokens();
    if prompt.len() >= room {
        return refuse(format!("the prompt has {} tokens, the model takes {room}", prompt.len()));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut cache = KvCache::default();
    let mut input = prompt.to_vec();
    let mut output = Vec::new();
    for _ in 0..max_new_tokens.min(room - prompt.len()) {
        let logits = if cache.is_empty() {
            last_logits(model, &input, &mut cache, device)
        } else {
            // What the model says is text, whatever the prompt holds besides.
            for_text(|| last_logits(model, &input, &mut cache, device))
        }?;
        let next = choose(&logits, sampling, &mut rng);
        output.push(next);
        if !on_token(next) || stop.contains(&next) {
            break;
        }
        input = vec![next];
    }
    Ok(output)
}

fn last_logits(model: &CausalLm, ids: &[u32], cache: &mut KvCache, device: &Device) -> Result<Vec<f32>> {
    let seq = ids.len();
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, seq]), device);
    let hidden = model.hidden(ids, Layout::Rows, Some(cache));
    let last = hidden.narrow(1, seq - 1, 1).flatten(0, 1); // [1, width]
    let data = model.head(last).try_into_data().map_err(|e| Error::Tokenizer(format!("the device failed: {e:?}")))?;
    Ok(data.iter::<f32>().collect())
}

fn choose(logits: &[f32], sampling: Sampling, rng: &mut ChaCha8Rng) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |id: &u32| logits[*id as usize];
    if sampling.temperature <= 0.0 {
        // The first of equals, as in PyTorch's argmax.
        return order.into_iter().reduce(|best, id| if logit(&id) > logit(&best) { id } else { best }).unwrap_or(0);
    }
    order.sort_by(|a, b| logit(b).total_cmp(&logit(a)));
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let highest = order.first().map_or(0.0, logit);
    let mut weights: Vec<f64> =
        order.iter().map(|id| (f64::from(logit(id) - highest) / sampling.temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut reached = 0.0;
    let kept = weights
        .iter()
        .take_while(|w| {
            let before = reached;
            reached += **w / total;
            before < sampling.top_p
        })
        .count();
    weights.truncate(kept.max(1));
    let mut at = rng.random::<f64>() * weights.iter().sum::<f64>();
    let found = weights.iter().position(|w| {
        at -= w;
        at < 0.0
    });
    order[found.unwrap_or(weights.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(sampling: Sampling) -> Vec<f64> {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = vec![0.0; 4];
        for _ in 0..20_000 {
            counts[choose(&logits, sampling, &mut rng) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let expected: Vec<f64> = [0.0_f64, 1.0, 2.0, 3.0].iter().map(|l| (l / 2.0).exp()).collect();
        let total: f64 = expected.iter().sum();
        for (found, expected) in sample(Sampling { temperature: 2.0, ..Sampling::default() }).iter().zip(&expected) {
            assert!((found - expected / total).abs() < 0.015, "{found} {expected}");
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let top_k = sample(Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() });
        assert!(top_k[0] == 0.0 && top_k[1] == 0.0 && top_k[2] > 0.2);
        // softmax([0,1,2,3]) = 0.032, 0.087, 0.237, 0.644: 0.7 needs the best two, 0.6 the best one.
        let top_p = sample(Sampling { temperature: 1.0, top_p: 0.7, ..Sampling::default() });
        assert!(top_p[1] == 0.0 && top_p[2] > 0.2);
        assert!(sample(Sampling { temperature: 1.0, top_p: 0.6, ..Sampling::default() })[3] > 0.999);
    }

    #[test]
    fn zero_temperature_is_greedy() {
        assert!(sample(Sampling::default())[3] > 0.999);
    }
}
