//! The settings of a run.

use serde::{Deserialize, Serialize};

use crate::data::{Batches, Example};
use crate::{Error, Result, Schedule};

/// Settings of a run. The defaults suit a small adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps; 0 for as many as `epochs` need.
    pub steps: usize,
    /// Passes over the data, when `steps` is 0.
    pub epochs: f64,
    /// Batches whose gradients make one step; the mean is over all that they teach.
    pub accumulate: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Fraction of the steps during which the rate rises.
    pub warmup: f64,
    /// What follows.
    pub schedule: Schedule,
    /// Decoupled weight decay on everything trained.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm, all together; 0 for no bound.
    pub max_grad_norm: f64,
    /// LoRA+: factor on the learning rate of the fields that the method calls [fast](peft_core::Method::FAST).
    pub lora_plus: f64,
    /// Steps between evaluations on the held-out data; 0 for only the first and the last.
    pub eval_every: usize,
    /// Steps between checkpoints; 0 for only the last.
    pub save_every: usize,
    /// Checkpoints to keep.
    pub keep: usize,
    /// Stop after this many evaluations without a better one; 0 for never.
    pub patience: usize,
    /// Of dropout.
    pub seed: u64,
    /// Draw a progress bar on standard error.
    pub progress: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 0,
            epochs: 3.0,
            accumulate: 1,
            learning_rate: 2e-4,
            warmup: 0.03,
            schedule: Schedule::Linear,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            lora_plus: 1.0,
            eval_every: 0,
            save_every: 0,
            keep: 2,
            patience: 0,
            seed: 0,
            progress: false,
        }
    }
}

impl TrainConfig {
    /// Refuses values that make no sense, naming the setting.
    ///
    /// # Errors
    /// [`Error::Setting`].
    pub fn check(&self) -> Result<()> {
        let positive = |name, value: f64| {
            let good = value.is_finite() && value > 0.0;
            if good { Ok(()) } else { Err(Error::setting(name, format!("is {value}; expected a positive number"))) }
        };
        positive("learning_rate", self.learning_rate)?;
        positive("lora_plus", self.lora_plus)?;
        if self.steps == 0 {
            positive("epochs", self.epochs)?;
        }
        for (name, value) in [("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::setting(name, format!("is {value}; expected 0 or a positive number")));
            }
        }
        if !(0.0..=1.0).contains(&self.warmup) {
            return Err(Error::setting("warmup", format!("is {}; expected a fraction in 0..=1", self.warmup)));
        }
        if self.accumulate == 0 {
            return Err(Error::setting("accumulate", "is 0; expected at least 1"));
        }
        Ok(())
    }

    pub(crate) fn total_steps<E: Example>(&self, batches: &Batches<E>) -> usize {
        let per_epoch = batches.per_epoch() as f64 / self.accumulate as f64;
        if self.steps > 0 { self.steps } else { (self.epochs * per_epoch).ceil().max(1.0) as usize }
    }
}
