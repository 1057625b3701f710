//! What keeps a router from sending all rows to few experts: losses that are added to that of the model.
//!
//! Over the rows of a batch, but for [padding](peft_core::for_mask) that the model is told of, with `f` the part of the rows that go through an expert (where all go through all: that like it best) and `P` the mean of its probabilities:
//! - load: `experts · Σ fₑ·Pₑ` (Fedus et al. 2022, arXiv:2101.03961, section 2.2; with several open gates as `transformers` has it, where balance gives their number)
//! - z: the mean of `(log Σ exp z)²` (Zoph et al. 2022, arXiv:2202.08906, section 3.3)
//! - localised: `σ²(Z) / (μ²(Z) + 1e-10)`, `Z = I ⊙ Q`: `Q` the sum of an expert's gates over the tokens of a row of the batch, `I` `1 + δ` where the expert is of the group of the row's task and `1 − δ` where
//!   not (Dou et al. 2023, arXiv:2312.09979, section 3.3); of `n` numbers the variance divides by `n − 1`, as in the authors' library

use burn::tensor::{DType, Tensor, TensorData};
use peft_core::{Error, Result, mask, tasks};
use serde::{Deserialize, Serialize};

use crate::Routing;

/// Losses of a mixture and their weights; a weight of zero leaves one out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Balance {
    /// Weight of the load-balancing loss.
    pub load: f64,
    /// Weight of the router z-loss.
    pub z: f64,
    /// Weight of the localised constraint, `β`.
    pub localised: f64,
    /// How much experts of a row's own group count more than others, `δ`, from 0 to 1.
    pub delta: f64,
    /// Groups of experts of equal size, one for each task.
    pub groups: usize,
}

impl Balance {
    pub(crate) fn check(&self, experts: usize) -> Result<()> {
        for (field, weight) in [("load", self.load), ("z", self.z), ("localised", self.localised)] {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(Error::config(format!("balance.{field}"), "a weight of 0 or more", weight));
            }
        }
        if !(0.0..=1.0).contains(&self.delta) {
            return Err(Error::config("balance.delta", "a number in 0..=1", self.delta));
        }
        if self.localised > 0.0 && (self.groups == 0 || !experts.is_multiple_of(self.groups)) {
            let expected = format!("groups of equal size of {experts} experts");
            return Err(Error::config("balance.groups", expected, self.groups));
        }
        Ok(())
    }

    /// The sum of the weighted losses, `[1]`; nothing where all weights are zero.
    pub(crate) fn loss(&self, routing: &Routing, load: &Tensor<1>, rows: &Rows) -> Option<Tensor<1>> {
        let weighted = |weight: f64, loss: &dyn Fn() -> Tensor<1>| (weight > 0.0).then(|| loss() * weight);
        let losses = [
            weighted(self.load, &|| load_loss(routing, load, rows)),
            weighted(self.z, &|| z_loss(routing, rows)),
            weighted(self.localised, &|| self.localised_loss(routing, rows)),
        ];
        losses.into_iter().flatten().reduce(|sum, loss| sum + loss)
    }

    fn localised_loss(&self, routing: &Routing, rows: &Rows) -> Tensor<1> {
        let ([batch, seq], [_, experts]) = (rows.leading, routing.gates.dims());
        let gates = rows.real_of(routing.gates.clone());
        let importance = gates.reshape([batch, seq, experts]).sum_dim(1).squeeze_dim::<2>(1);
        let (size, tasks) = (experts / self.groups, tasks(batch));
        let preferred = |at: usize| {
            let own = (at % experts) / size == tasks[at / experts] % self.groups;
            (if own { 1.0 + self.delta } else { 1.0 - self.delta }) as f32
        };
        let preferred: Vec<f32> = (0..batch * experts).map(preferred).collect();
        let preferred = TensorData::new(preferred, [batch, experts]);
        let z = importance.clone() * Tensor::<2>::from_data(preferred, (&importance.device(), importance.dtype()));
        let mean = z.clone().mean();
        // A number alone does not vary.
        let others = (batch * experts).max(2) - 1;
        (z - mean.clone().unsqueeze()).square().sum() / others as f64 / (mean.square() + NOTHING)
    }
}

/// Keeps a mean of nothing from a division by zero.
const NOTHING: f64 = 1e-10;

/// The rows of a batch.
pub(crate) struct Rows {
    /// Batch and tokens.
    leading: [usize; 2],
    /// `[rows, 1]`: 0 for padding, and 1 for all else.
    real: Option<Tensor<2>>,
}

impl Rows {
    /// Those of a batch of that many rows and tokens, for numbers of that type.
    pub(crate) fn of([batch, seq]: [usize; 2], dtype: DType) -> Self {
        let real = mask([batch, seq]).map(|mask| mask.float().cast(dtype).reshape([batch * seq, 1]));
        Self { leading: [batch, seq], real }
    }

    /// `x` `[rows, n]`, and zero for padding.
    fn real_of(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.real {
            Some(real) => x * real.clone(),
            None => x,
        }
    }

    /// The mean of `x` `[rows, n]`, `[n]`.
    fn mean(&self, x: Tensor<2>) -> Tensor<1> {
        let [_, n] = x.dims();
        let Some(real) = &self.real else { return x.mean_dim(0).reshape([n]) };
        // Of padding alone it is zero.
        (self.real_of(x).sum_dim(0) / real.clone().sum_dim(0).clamp_min(1.0)).reshape([n])
    }
}

/// The part of the rows that went through each expert, `[experts]`, of all that went through any, by [`Routing::chosen`].
pub(crate) fn load(chosen: &Tensor<2>, rows: &Rows) -> Tensor<1> {
    let chosen = rows.mean(chosen.clone().detach());
    let sum = chosen.clone().sum();
    chosen / sum
}

/// Mean entropy of the probabilities, `[1]`.
pub(crate) fn entropy(probabilities: &Tensor<2>, rows: &Rows) -> Tensor<1> {
    let p = probabilities.clone().detach();
    -rows.mean((p.clone() * p.clamp_min(1e-9).log()).sum_dim(1))
}

fn load_loss(routing: &Routing, load: &Tensor<1>, rows: &Rows) -> Tensor<1> {
    let [_, experts] = routing.probabilities.dims();
    let chosen = rows.mean(routing.chosen.clone().detach().sum_dim(1)); // how many a row goes through
    (rows.mean(routing.probabilities.clone()) * load.clone()).sum() * chosen * experts as f64
}

fn z_loss(routing: &Routing, rows: &Rows) -> Tensor<1> {
    let largest = routing.logits.clone().detach().max_dim(1);
    let log_sum = (routing.logits.clone() - largest.clone()).exp().sum_dim(1).log() + largest;
    rows.mean(log_sum.square())
}
