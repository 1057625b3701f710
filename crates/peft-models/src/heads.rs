//! What an encoder is used for, and the layers that make it so.
//!
//! - one answer a text: BERT `classifier(tanh(pooler(h₀)))`, RoBERTa `out_proj(tanh(dense(h₀)))`, DistilBERT `classifier(relu(pre_classifier(h₀)))`
//! - one answer an image: ViT `classifier(h₀)`, DINOv2 `classifier([h₀, mean of patches])`
//! - one answer a token: `classifier(h)`; start and end of an answer: `qa_outputs(h)`
//!
//! `h` are the last hidden states, `h₀` that of the first token.

mod hub;

use std::path::Path;

use burn::module::{Initializer, Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};
use peft_core::kernels::{Nonlinearity, activate};
use peft_core::{Named, linear, rng_of};
use rand::RngExt;
use serde_json::{Map, Value, json};

use crate::config::{EncoderConfig, Family, Fields};
use crate::{Error, Result};

pub use self::hub::{HUB_HEAD_FILES, has_hub_head, rename_hub_head};

/// What an encoder is used for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// A vector that stands for a text or an image; there is no head.
    #[default]
    Embedding,
    /// An answer for a text, a pair of texts or an image as a whole.
    Classification {
        /// Names of the answers, or of the one number.
        labels: Vec<String>,
        /// What kind of answer.
        problem: Problem,
    },
    /// A label for each token.
    Tokens {
        /// Names of the labels.
        labels: Vec<String>,
    },
    /// Where an answer starts and ends in a text.
    Span,
}

/// What the logits of a classification mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// One of the labels: a softmax.
    SingleLabel,
    /// Any of the labels: a sigmoid each.
    MultiLabel,
    /// Numbers.
    Regression,
}

impl Problem {
    const NAMES: [(Self, &'static str); 3] = [
        (Self::SingleLabel, "single_label_classification"),
        (Self::MultiLabel, "multi_label_classification"),
        (Self::Regression, "regression"),
    ];
}

impl Task {
    /// Classification into these labels. As in `transformers`, a single one is the name of a number.
    pub fn classification<S: Into<String>>(labels: impl IntoIterator<Item = S>) -> Self {
        let labels: Vec<String> = labels.into_iter().map(Into::into).collect();
        let problem = if labels.len() == 1 { Problem::Regression } else { Problem::SingleLabel };
        Self::Classification { labels, problem }
    }

    /// The names of what comes out.
    pub fn labels(&self) -> &[String] {
        match self {
            Self::Classification { labels, .. } | Self::Tokens { labels } => labels,
            Self::Embedding | Self::Span => &[],
        }
    }

    /// Numbers that come out at a place: one a label, start and end of a span; `None` without a head.
    pub fn outputs(&self) -> Option<usize> {
        match self {
            Self::Embedding => None,
            Self::Span => Some(2),
            Self::Classification { labels, .. } | Self::Tokens { labels } => Some(labels.len()),
        }
    }

    /// Reads what a `config.json` says of the task; `path` is for messages. An architecture without a head that is known here, such as one for pretraining,
    /// is read as the encoder alone.
    ///
    /// # Errors
    /// When the labels or the kind of problem are malformed.
    pub fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let architecture = json.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
        let is = |suffix: &str| architecture.is_some_and(|name| name.ends_with(suffix));
        if is("ForQuestionAnswering") {
            return Ok(Self::Span);
        }
        if is("ForTokenClassification") {
            return Ok(Self::Tokens { labels: labels_of(json, path)? });
        }
        if !is("ForSequenceClassification") && !is("ForImageClassification") {
            return Ok(Self::Embedding);
        }
        let mut task = Self::classification(labels_of(json, path)?);
        if let (Self::Classification { problem, .. }, Some(given)) =
            (&mut task, json.get("problem_type").filter(|v| !v.is_null()))
        {
            let known = Problem::NAMES.iter().find(|(_, name)| given == name);
            let (found, _) = known.ok_or_else(|| {
                let names = Problem::NAMES.map(|(_, name)| name).join(", ");
                Error::format(path, format!("`problem_type`: expected one of {names}, found {given}"))
            })?;
            *problem = *found;
        }
        Ok(task)
    }

    /// Writes labels and problem as `transformers` reads them.
    pub(crate) fn describe(&self, fields: &mut Map<String, Value>) {
        for stale in ["id2label", "label2id", "num_labels", "problem_type"] {
            fields.remove(stale);
        }
        if !self.labels().is_empty() {
            let by_id = self.labels().iter().enumerate().map(|(id, label)| (id.to_string(), json!(label)));
            let by_label = self.labels().iter().enumerate().map(|(id, label)| (label.clone(), json!(id)));
            fields.insert("id2label".to_owned(), Value::Object(by_id.collect::<Map<_, _>>()));
            fields.insert("label2id".to_owned(), Value::Object(by_label.collect::<Map<_, _>>()));
        }
        if let Self::Classification { problem, .. } = self {
            let name = Problem::NAMES.iter().find(|(known, _)| known == problem).map(|(_, name)| *name);
            fields.insert("problem_type".to_owned(), json!(name));
        }
    }
}

/// The labels in the order of their ids; as many as `num_labels` without names, and two without any word of them.
fn labels_of(json: &Value, path: &Path) -> Result<Vec<String>> {
    let Some(named) = json.get("id2label").filter(|v| !v.is_null()) else {
        let count = Fields { json, path }.count_or("num_labels", 2)?;
        return Ok((0..count).map(|id| format!("LABEL_{id}")).collect());
    };
    let wrong = || {
        let what = format!("`id2label`: expected a label for each id from 0 on, found {named}");
        Error::format(path, what)
    };
    let named = named.as_object().filter(|labels| !labels.is_empty()).ok_or_else(wrong)?;
    let label = |id: usize| named.get(&id.to_string()).and_then(Value::as_str).map(str::to_owned).ok_or_else(wrong);
    (0..named.len()).map(label).collect()
}

/// The layers after an encoder.
#[derive(Module, Debug)]
pub(crate) struct Head {
    dense: Option<Named<Linear>>,
    output: Named<Linear>,
    #[module(skip)]
    reads: Reads,
}

/// What a head reads of the last hidden states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// What the heads of its family read.
    Own,
    /// The first token's state: AdapterHub's heads, on every family.
    First,
}

/// Names of the layers that a head may have.
pub(crate) const HEADS: [&str; 3] = ["classifier", "pre_classifier", "qa_outputs"];

impl Head {
    /// The head that the configuration asks for, with new weights; `None` for the encoder alone.
    pub(crate) fn new(config: &EncoderConfig, seed: u64, device: &Device) -> Option<Self> {
        let outputs = config.task.outputs()?;
        let hidden = config.hidden_size;
        let whole = matches!(config.task, Task::Classification { .. });
        let (dense, output) = layers(config);
        let d_in = if whole && config.family == Family::Dinov2 { 2 * hidden } else { hidden };
        let layer = |name: &'static str, d_in, d_out| Named::new(name, fresh_linear(name, d_in, d_out, seed, device));
        let dense = dense.map(|name| layer(name, hidden, hidden));
        Some(Self { dense, output: layer(output, d_in, outputs), reads: Reads::Own })
    }

    /// Whether it is `output(tanh(dense(h₀)))`, or `output(h₀)`, of the first token's state.
    pub(crate) fn reads_first(&self, family: Family) -> bool {
        self.reads == Reads::First || family == Family::Roberta
    }

    /// `[batch, places, d_in]` to `[batch, places, outputs]`
    pub(crate) fn forward(&self, x: Tensor<3>, family: Family) -> Tensor<3> {
        let x = match (&self.dense, family) {
            (None, _) => x,
            (Some(dense), Family::DistilBert) if self.reads == Reads::Own => {
                activate(linear(dense, x), Nonlinearity::Relu)
            }
            (Some(dense), _) => linear(dense, x).tanh(),
        };
        linear(&self.output, x)
    }
}

/// What the layers of the head are called that the configuration asks for, if it asks for one.
fn layers(config: &EncoderConfig) -> (Option<&'static str>, &'static str) {
    match (&config.task, config.family) {
        (Task::Span, _) => (None, "qa_outputs"),
        (Task::Classification { .. }, Family::Roberta) => (Some("classifier.dense"), "classifier.out_proj"),
        (Task::Classification { .. }, Family::DistilBert) => (Some("pre_classifier"), "classifier"),
        _ => (None, "classifier"),
    }
}

impl EncoderConfig {
    /// The modules that make up the head, for `modules_to_save`; none without a head.
    pub fn head_modules(&self) -> Vec<&'static str> {
        if self.task.outputs().is_none() {
            return Vec::new();
        }
        let (dense, output) = layers(self);
        let mut modules: Vec<_> = dense.into_iter().chain([output]).filter_map(|name| name.split('.').next()).collect();
        modules.dedup();
        modules
    }
}

/// A layer that is to be trained from the start: weights `N(0, 0.02²)` by seed and path, as adapters have them; bias zero.
pub(crate) fn fresh_linear(path: &str, d_in: usize, d_out: usize, seed: u64, device: &Device) -> Linear {
    let mut rng = rng_of(path, seed);
    let values = (0..d_in * d_out).map(|_| 0.02 * rng.sample::<f32, _>(rand_distr::StandardNormal)).collect::<Vec<_>>();
    let weight = Tensor::from_data(TensorData::new(values, [d_in, d_out]), device);
    let zeros = LinearConfig::new(d_in, d_out).with_initializer(Initializer::Zeros).init(device);
    Linear { weight: Param::from_tensor(weight), bias: zeros.bias }
}
