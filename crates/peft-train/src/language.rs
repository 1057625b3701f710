//! Language modelling: cross-entropy of the next token, over the tokens that are learnt.

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::for_tasks;
use peft_core::kernels::Scores;
use peft_models::{CausalLm, Layout};

use crate::data::{Batch, Batches, Sample};
use crate::objective::{failed, scalar};
use crate::{Evaluation, Objective, Result};

/// The next token, where the data says that it is to be learnt.
#[derive(Clone, Copy, Debug, Default)]
pub struct NextToken;

impl Objective for NextToken {
    type Model = CausalLm;
    type Example = Sample;

    fn count(&self, batch: &Batch) -> usize {
        batch.trained()
    }

    fn loss(&self, model: &CausalLm, batch: &Batch, device: &Device) -> Result<Tensor<1>> {
        Ok(score(model, batch, device).scores.losses.sum())
    }

    fn evaluate(&self, model: &CausalLm, batches: &Batches, device: &Device) -> Result<Evaluation> {
        let device = &device.clone().without_autodiff();
        let (mut sum, mut hits, mut tokens) = (0.0, 0, 0);
        for batch in batches.epoch() {
            let scored = score(model, &batch, device);
            sum += f64::from(scalar(scored.scores.losses.sum()).map_err(failed)?);
            let best = scored.scores.best.equal(scored.targets).int().sum();
            hits += best.try_into_data().map_err(failed)?.iter::<i64>().sum::<i64>();
            tokens += batch.trained();
        }
        let count = tokens.max(1) as f64;
        let measures = [("perplexity", (sum / count).exp()), ("token_accuracy", hits as f64 / count)];
        Ok(Evaluation::new(sum, tokens, measures))
    }
}

/// The learnt tokens of a batch.
struct Scored {
    /// `−log p(target)` of each, and the model's best guesses.
    scores: Scores,
    /// `[tokens]`
    targets: Tensor<1, Int>,
}

/// Scores a batch. The output head runs only where a target is learnt, so masked prompts and padding cost no logits.
fn score(model: &CausalLm, batch: &Batch, device: &Device) -> Scored {
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
    let scores = for_tasks(&batch.tasks, || {
        let hidden = model.hidden(ids, layout, None).flatten::<2>(0, 1).select(0, places); // [tokens, width]
        model.scores(hidden, targets.clone())
    });
    Scored { scores, targets }
}
