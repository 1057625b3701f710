//! Next-token cross-entropy over the tokens that are learnt, and evaluation by it.

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::kernels::Scores;
use peft_models::{CausalLm, Layout};
use serde::{Deserialize, Serialize};

use crate::data::{Batch, Batches};
use crate::{Error, Result};

/// The learnt tokens of a batch.
pub(crate) struct Scored {
    /// `−log p(target)` of each, and the model's best guesses.
    pub scores: Scores,
    /// `[tokens]`
    targets: Tensor<1, Int>,
}

/// Scores a batch. The output head runs only where a target is learnt, so masked prompts and padding cost no logits.
pub(crate) fn score(model: &CausalLm, batch: &Batch, device: &Device) -> Scored {
    let plain = &device.clone().without_autodiff();
    let (rows, seq) = (batch.ids.len(), batch.ids.first().map_or(0, |row| row.len().saturating_sub(1)));
    let ids: Vec<i64> = batch.ids.iter().flat_map(|row| &row[..seq]).map(|id| i64::from(*id)).collect();
    let learnt = |row: usize| (0..seq).filter(move |t| batch.mask[row][t + 1]);
    let places: Vec<i64> = (0..rows).flat_map(|row| learnt(row).map(move |t| (row * seq + t) as i64)).collect();
    let targets: Vec<i64> =
        (0..rows).flat_map(|row| learnt(row).map(move |t| i64::from(batch.ids[row][t + 1]))).collect();
    let count = places.len();
    let ints = |values: Vec<i64>| Tensor::<1, Int>::from_data(TensorData::new(values, [count]), plain);
    let (places, targets) = (ints(places), ints(targets));

    let cut = |rows: &[Vec<u32>]| rows.iter().map(|row| row[..seq].to_vec()).collect::<Vec<_>>();
    let packed = batch.segments.as_deref().map(cut).zip(batch.positions.as_deref().map(cut));
    let layout = match &packed {
        Some((segments, positions)) => Layout::Packed { segments, positions },
        None => Layout::Rows,
    };
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [rows, seq]), plain);
    let hidden = model.hidden(ids, layout, None).flatten::<2>(0, 1).select(0, places); // [tokens, width]
    Scored { scores: model.scores(hidden, targets.clone()), targets }
}

/// What a held-out set says of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean of `−log p` over the learnt tokens, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Fraction of learnt tokens that the model ranks first.
    pub token_accuracy: f64,
    /// Learnt tokens.
    pub tokens: usize,
}

/// Evaluates `model` on one pass over `batches`.
///
/// # Errors
/// When the device fails.
pub fn evaluate(model: &CausalLm, batches: &Batches, device: &Device) -> Result<Evaluation> {
    let device = &device.clone().without_autodiff();
    let (mut sum, mut hits, mut tokens) = (0.0, 0, 0);
    for batch in batches.epoch() {
        let scored = score(model, &batch, device);
        let failed = |e| Error::Device { step: 0, message: format!("{e:?}") };
        sum += f64::from(scalar(scored.scores.losses.sum()).map_err(failed)?);
        let best = scored.scores.best.equal(scored.targets).int().sum();
        hits += best.try_into_data().map_err(failed)?.iter::<i64>().sum::<i64>();
        tokens += batch.trained();
    }
    let loss = sum / tokens.max(1) as f64;
    Ok(Evaluation { loss, perplexity: loss.exp(), token_accuracy: hits as f64 / tokens.max(1) as f64, tokens })
}

/// The one value of a tensor.
pub(crate) fn scalar(tensor: Tensor<1>) -> std::result::Result<f32, burn::tensor::ExecutionError> {
    Ok(tensor.try_into_data()?.iter::<f32>().next().unwrap_or(f32::NAN))
}
