//! What keeps a router from sending all rows to few experts: losses that are added to that of the model.
//!
//! Over the rows of a batch, padding included, with `f` the part of the rows that go through an expert (where all go through all: that like it best) and `P` the mean of its probabilities:
//! - load: `experts · Σ fₑ·Pₑ` (Fedus et al. 2022, arXiv:2101.03961, section 2.2; with several open gates as `transformers` has it, where balance gives their number)
//! - z: the mean of `(log Σ exp z)²` (Zoph et al. 2022, arXiv:2202.08906, section 3.3)
//! - localised: `σ²(Z) / μ²(Z)`, `Z = I ⊙ Q`: `Q` the sum of an expert's gates over the tokens of a row of the batch, `I` `1 + δ` where the expert is of the group of the row's task and `1 − δ` where
//!   not (Dou et al. 2023, arXiv:2312.09979, section 3.3)

use burn::tensor::{Tensor, TensorData};
use peft_core::{Error, Result, tasks};
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
    /// How much experts of a row's own group count more than others, `δ`.
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
        if self.localised > 0.0 && (self.groups == 0 || !experts.is_multiple_of(self.groups)) {
            let expected = format!("groups of equal size of {experts} experts");
            return Err(Error::config("balance.groups", expected, self.groups));
        }
        Ok(())
    }

    /// The sum of the weighted losses, `[1]`; nothing where all weights are zero.
    pub(crate) fn loss(&self, routing: &Routing, load: &Tensor<1>, [batch, seq]: [usize; 2]) -> Option<Tensor<1>> {
        let weighted = |weight: f64, loss: &dyn Fn() -> Tensor<1>| (weight > 0.0).then(|| loss() * weight);
        let losses = [
            weighted(self.load, &|| load_loss(routing, load)),
            weighted(self.z, &|| z_loss(routing)),
            weighted(self.localised, &|| self.localised_loss(routing, [batch, seq])),
        ];
        losses.into_iter().flatten().reduce(|sum, loss| sum + loss)
    }

    fn localised_loss(&self, routing: &Routing, [batch, seq]: [usize; 2]) -> Tensor<1> {
        let [_, experts] = routing.gates.dims();
        let importance = routing.gates.clone().reshape([batch, seq, experts]).sum_dim(1).squeeze_dim::<2>(1);
        let (size, tasks) = (experts / self.groups, tasks(batch));
        let preferred = |at: usize| {
            let own = (at % experts) / size == tasks[at / experts] % self.groups;
            (if own { 1.0 + self.delta } else { 1.0 - self.delta }) as f32
        };
        let preferred: Vec<f32> = (0..batch * experts).map(preferred).collect();
        let preferred = TensorData::new(preferred, [batch, experts]);
        let z = importance.clone() * Tensor::<2>::from_data(preferred, (&importance.device(), importance.dtype()));
        let mean = z.clone().mean();
        (z - mean.clone().unsqueeze()).square().mean() / mean.square()
    }
}

/// The part of the rows that went through each expert, `[experts]`, of all that went through any, by [`Routing::chosen`].
pub(crate) fn load(chosen: &Tensor<2>) -> Tensor<1> {
    let [_, experts] = chosen.dims();
    let chosen = chosen.clone().detach().mean_dim(0); // [1, experts]
    let sum = chosen.clone().sum_dim(1);
    (chosen / sum).reshape([experts])
}

/// Mean entropy of the probabilities, `[1]`.
pub(crate) fn entropy(probabilities: &Tensor<2>) -> Tensor<1> {
    let p = probabilities.clone().detach();
    -(p.clone() * p.clamp_min(1e-9).log()).sum_dim(1).mean()
}

fn load_loss(routing: &Routing, load: &Tensor<1>) -> Tensor<1> {
    let [_, experts] = routing.probabilities.dims();
    let chosen = routing.chosen.clone().detach().sum_dim(1).mean(); // how many a row goes through
    let mean = routing.probabilities.clone().mean_dim(0).reshape([experts]);
    (mean * load.clone()).sum() * chosen * experts as f64
}

fn z_loss(routing: &Routing) -> Tensor<1> {
    let largest = routing.logits.clone().detach().max_dim(1);
    let log_sum = (routing.logits.clone() - largest.clone()).exp().sum_dim(1).log() + largest;
    log_sum.square().mean()
}
