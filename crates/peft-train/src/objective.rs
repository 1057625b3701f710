//! What a run minimises, and what held-out data says of a model.

use std::fmt;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::data::{Batches, Example};
use crate::{Error, Result};

/// What a model is trained for: all that the loop has to know of it.
pub trait Objective {
    /// What is trained.
    type Model: Module;
    /// What it learns from.
    type Example: Example;

    /// In how many places of a batch the model's answer counts: what its loss is a mean over.
    fn count(&self, batch: &BatchOf<Self>) -> usize;

    /// The sum of the losses of these places, `[1]`.
    ///
    /// # Errors
    /// When a part of the batch cannot be read.
    fn loss(&self, model: &Self::Model, batch: &BatchOf<Self>, device: &Device) -> Result<Tensor<1>>;

    /// What one pass over `batches` says of `model`.
    ///
    /// # Errors
    /// When a part of a batch cannot be read or the device fails.
    fn evaluate(&self, model: &Self::Model, batches: &Batches<Self::Example>, device: &Device) -> Result<Evaluation>;

    /// What is worth a look besides the loss: SVG pictures by file name.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    fn pictures(
        &self,
        model: &Self::Model,
        batches: &Batches<Self::Example>,
        device: &Device,
    ) -> Result<Vec<(&'static str, String)>> {
        let _ = (model, batches, device);
        Ok(Vec::new())
    }
}

/// The batches of an objective.
pub type BatchOf<O> = <<O as Objective>::Example as Example>::Batch;

/// What a held-out set says of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean loss; the lower, the better. In nats where an answer is one of several.
    pub loss: f64,
    /// What it is a mean over.
    #[serde(alias = "tokens")]
    pub count: usize,
    /// What else was measured, by name; fractions are in 0..=1.
    #[serde(flatten)]
    pub measures: IndexMap<String, f64>,
}

impl Evaluation {
    /// A mean of a sum of losses, and what else was measured.
    pub(crate) fn new<'a>(sum: f64, count: usize, measures: impl IntoIterator<Item = (&'a str, f64)>) -> Self {
        let measures = measures.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { loss: sum / count.max(1) as f64, count, measures }
    }

    /// The loss and the measures, each with its value as a person reads it.
    pub fn readable(&self) -> impl Iterator<Item = (String, String)> {
        let measures = self.measures.iter().map(|(name, value)| {
            let value = match name.as_str() {
                "perplexity" => format!("{value:.2}"),
                name if name.ends_with("accuracy") => format!("{:.1} %", 100.0 * value),
                _ => format!("{value:.4}"),
            };
            (name.replace('_', " "), value)
        });
        std::iter::once(("loss".to_owned(), format!("{:.4}", self.loss))).chain(measures)
    }
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.readable().map(|(name, value)| format!("{name} {value}")).collect();
        f.write_str(&parts.join(", "))
    }
}

/// The one value of a tensor.
pub(crate) fn scalar(tensor: Tensor<1>) -> std::result::Result<f32, burn::tensor::ExecutionError> {
    Ok(tensor.try_into_data()?.iter::<f32>().next().unwrap_or(f32::NAN))
}

/// For `map_err` outside of a step.
pub(crate) fn failed(error: burn::tensor::ExecutionError) -> Error {
    Error::Device { step: 0, message: format!("{error:?}") }
}

#[cfg(test)]
mod tests {
    use super::Evaluation;

    #[test]
    fn earlier_records_are_read_and_values_are_readable() {
        let earlier = r#"{"loss":0.5,"perplexity":1.6487,"token_accuracy":0.25,"tokens":8}"#;
        let evaluation: Evaluation = serde_json::from_str(earlier).unwrap();
        assert_eq!(evaluation.to_string(), "loss 0.5000, perplexity 1.65, token accuracy 25.0 %");
        assert_eq!(evaluation, Evaluation::new(4.0, 8, [("perplexity", 1.6487), ("token_accuracy", 0.25)]));
        let json = serde_json::to_string(&evaluation).unwrap();
        assert_eq!(json, r#"{"loss":0.5,"count":8,"perplexity":1.6487,"token_accuracy":0.25}"#);
    }
}
