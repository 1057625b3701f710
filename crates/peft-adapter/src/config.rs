//! The configuration of bottleneck adapters, in AdapterHub's words.

use std::collections::BTreeMap;

use peft_core::{Error, Result, Site, Targets, block_of, check_size};
use serde::{Deserialize, Serialize};

/// What AdapterHub's models, and those here, call the ends of a block's sub-layers.
pub const AFTER_ATTENTION: &str = "attention_adapters";
/// The same, after the feed-forward part.
pub const AFTER_FEED_FORWARD: &str = "output_adapters";

/// Configuration of bottleneck adapters; its fields are those of the object `config` in AdapterHub's `adapter_config.json`.
///
/// ```
/// use burn::{module::Module, nn::{Linear, LinearConfig}, tensor::{Device, Tensor}};
/// use peft_adapter::BottleneckConfig;
/// use peft_core::{Peft, SubLayer};
///
/// #[derive(Module, Debug)]
/// struct Block { mlp: Linear, output_adapters: SubLayer }
///
/// let device = Device::flex().autodiff();
/// let block = Block { mlp: LinearConfig::new(32, 32).init(&device), output_adapters: SubLayer::new(32, &device) };
/// let model = block.attach(&BottleneckConfig::pfeiffer(8.0))?;
/// assert_eq!(model.trainable().trainable, 2 * 32 * 4 + 4 + 32);
///
/// let x = Tensor::<3>::ones([1, 2, 32], &device);
/// let y = model.output_adapters.end(model.mlp.forward(x.clone()), x, None);
/// assert_eq!(y.dims(), [1, 2, 32]);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BottleneckConfig {
    /// Width of the model over width of the bottleneck.
    pub reduction_factor: ReductionFactor,
    /// Between the projections.
    pub non_linearity: NonLinearity,
    /// Whether the bottleneck sees the sub-layer's sum with its input, normed as the model norms it.
    pub original_ln_before: bool,
    /// Whether the model's own end of the sub-layer follows.
    pub original_ln_after: bool,
    /// A norm of the bottleneck's own, before it.
    pub ln_before: bool,
    /// And after it.
    pub ln_after: bool,
    /// Initial values.
    pub init_weights: InitWeights,
    /// Whether the bottleneck sees the sub-layer's input, and has no residual around it.
    pub is_parallel: bool,
    /// Factor of what the bottleneck adds.
    pub scaling: Scaling,
    /// Whether a learned number for each sequence, between zero and one, multiplies what the bottleneck adds.
    pub use_gating: bool,
    /// What the residual around the bottleneck is, where `original_ln_before`.
    pub residual_before_ln: Residual,
    /// Whether the residual is added before the norm of `ln_after`.
    pub adapter_residual_before_ln: bool,
    /// Probability that a value of what the bottleneck adds is dropped during training.
    pub dropout: f64,
    /// Whether the projections are sums of Kronecker products.
    pub phm_layer: bool,
    /// Number of products.
    pub phm_dim: usize,
    /// Rank of their second factors.
    pub phm_rank: usize,
    /// What sits behind the model's embeddings besides, whatever the targets are.
    pub inv_adapter: Option<InvAdapter>,
    /// Half the width of the model over what is between the projections there.
    pub inv_adapter_reduction_factor: f64,
    /// Blocks without a bottleneck, by number: Rücklé et al. 2021, arXiv:2010.11918 (AdapterDrop).
    pub leave_out: Vec<usize>,
    /// Which places.
    #[serde(flatten)]
    pub targets: Targets,
}

/// Width of the model over width of the bottleneck.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "reduction_factor: expected a number, or numbers by block")]
pub enum ReductionFactor {
    /// In every block.
    All(f64),
    /// By the number of the block; `default` for the others.
    ByBlock(BTreeMap<String, f64>),
}

/// What is between the projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NonLinearity {
    /// `max(x, 0)`
    #[serde(rename = "relu")]
    Relu,
    /// `x·Φ(x)`
    #[serde(rename = "gelu", alias = "gelu_orig")]
    Gelu,
    /// GELU by the hyperbolic tangent.
    #[serde(rename = "gelu_new")]
    GeluNew,
    /// `x·σ(x)`
    #[serde(rename = "swish", alias = "silu")]
    Swish,
    /// The hyperbolic tangent.
    #[serde(rename = "tanh")]
    Tanh,
    /// `σ(x)`
    #[serde(rename = "sigmoid")]
    Sigmoid,
    /// `max(x, x/100)`
    #[serde(rename = "leakyrelu")]
    LeakyRelu,
    /// Nothing.
    #[serde(rename = "linear")]
    Linear,
}

/// Initial values of the projections; biases are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitWeights {
    /// `N(0, 0.02²)`, as `BERT` starts: not the identity.
    Bert,
    /// `N(0, 0.01²)`, cut off at two deviations: near the identity.
    Houlsby,
    /// `U(±1/√width)` and zeros: the identity.
    MamAdapter,
}

/// An adapter behind a model's embeddings that can be turned round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvAdapter {
    /// Each half of the features moved by what the other one says: [`Nice`](crate::Nice).
    Nice,
}

/// Factor of what a bottleneck adds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// A number.
    Constant(f64),
    /// One that is learned, from 1.
    Learned,
    /// One for each feature, learned from 1.
    Channel,
}

/// What the residual around the bottleneck is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// The sub-layer's output: `true` in files.
    Output,
    /// Its sum with the input: `post_add`.
    Sum,
    /// That sum, normed: `false`.
    Normed,
}

impl Default for BottleneckConfig {
    fn default() -> Self {
        Self {
            reduction_factor: ReductionFactor::All(16.0),
            non_linearity: NonLinearity::Relu,
            original_ln_before: false,
            original_ln_after: true,
            ln_before: false,
            ln_after: false,
            init_weights: InitWeights::MamAdapter,
            is_parallel: false,
            scaling: Scaling::Constant(1.0),
            use_gating: false,
            residual_before_ln: Residual::Output,
            adapter_residual_before_ln: false,
            dropout: 0.0,
            phm_layer: false,
            phm_dim: 4,
            phm_rank: 1,
            inv_adapter: None,
            inv_adapter_reduction_factor: 2.0,
            leave_out: Vec::new(),
            targets: Targets::default(),
        }
    }
}

impl BottleneckConfig {
    /// Houlsby's: after attention and after feed-forward.
    pub fn houlsby(reduction_factor: f64) -> Self {
        Self {
            reduction_factor: ReductionFactor::All(reduction_factor),
            non_linearity: NonLinearity::Swish,
            targets: Targets::modules([AFTER_ATTENTION, AFTER_FEED_FORWARD]),
            ..Self::default()
        }
    }

    /// Pfeiffer's: after feed-forward alone, behind the model's norm.
    pub fn pfeiffer(reduction_factor: f64) -> Self {
        Self {
            reduction_factor: ReductionFactor::All(reduction_factor),
            original_ln_before: true,
            targets: Targets::modules([AFTER_FEED_FORWARD]),
            ..Self::default()
        }
    }

    /// He's: beside feed-forward, times four.
    pub fn parallel(reduction_factor: f64) -> Self {
        Self {
            reduction_factor: ReductionFactor::All(reduction_factor),
            is_parallel: true,
            scaling: Scaling::Constant(4.0),
            targets: Targets::modules([AFTER_FEED_FORWARD]),
            ..Self::default()
        }
    }

    /// Compacter: Houlsby's places, projections that are sums of Kronecker products.
    pub fn compacter(reduction_factor: f64) -> Self {
        Self { non_linearity: NonLinearity::Gelu, phm_layer: true, ..Self::houlsby(reduction_factor) }
    }

    /// Compacter++: the same in Pfeiffer's places.
    pub fn compacter_plus_plus(reduction_factor: f64) -> Self {
        Self { non_linearity: NonLinearity::Gelu, phm_layer: true, ..Self::pfeiffer(reduction_factor) }
    }

    /// The same with an invertible adapter behind the embeddings.
    #[must_use]
    pub fn with_inv_adapter(self, reduction_factor: f64) -> Self {
        Self { inv_adapter: Some(InvAdapter::Nice), inv_adapter_reduction_factor: reduction_factor, ..self }
    }

    /// The width of the bottleneck at that place: at least one.
    pub(crate) fn inner_width(&self, site: &Site) -> Result<usize> {
        let factor = match &self.reduction_factor {
            ReductionFactor::All(factor) => factor,
            ReductionFactor::ByBlock(factors) => {
                let own = block_of(&site.path).and_then(|block| factors.get(&block.to_string()));
                own.or_else(|| factors.get("default")).ok_or_else(|| {
                    Error::config("reduction_factor", format!("a value for {}, or a default", site.path), "neither")
                })?
            }
        };
        Ok(((site.d_out as f64 / factor) as usize).max(1))
    }

    pub(crate) fn check_values(&self) -> Result<()> {
        let factors: Vec<f64> = match &self.reduction_factor {
            ReductionFactor::All(factor) => vec![*factor],
            ReductionFactor::ByBlock(factors) => factors.values().copied().collect(),
        };
        let inv = ("inv_adapter_reduction_factor", self.inv_adapter_reduction_factor);
        for (field, factor) in factors.into_iter().map(|factor| ("reduction_factor", factor)).chain([inv]) {
            // A bottleneck sixteen times wider than the model is a mistake, and an allocation.
            if !(1.0 / 16.0..=1e6).contains(&factor) {
                return Err(Error::config(field, "a number between 1/16 and a million", factor));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::config("dropout", "a probability in 0..1", self.dropout));
        }
        match self.scaling {
            Scaling::Constant(scale) if !scale.is_finite() => {
                return Err(Error::config("scaling", "a finite number, \"learned\" or \"channel\"", scale));
            }
            _ => {}
        }
        if self.phm_layer {
            check_size("phm_dim", self.phm_dim)?;
            check_size("phm_rank", self.phm_rank)?;
        }
        Ok(())
    }
}

/// Serde for a type that files give as one kind of value or as a word.
macro_rules! as_json {
    ($type:ident, $field:literal, $expected:literal, $($variant:pat => $value:expr, $pattern:pat => $made:expr;)*) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                let value: serde_json::Value = match *self { $($variant => $value.into(),)* };
                value.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                let found = serde_json::Value::deserialize(deserializer)?;
                let wrong = || serde::de::Error::custom(format!("{}: expected {}, found {found}", $field, $expected));
                match (found.as_str(), found.as_bool(), found.as_f64()) {
                    $($pattern => Ok($made),)*
                    _ => Err(wrong()),
                }
            }
        }
    };
}

as_json!(Scaling, "scaling", "a number, \"learned\" or \"channel\"",
    Self::Learned => "learned", (Some("learned"), ..) => Self::Learned;
    Self::Channel => "channel", (Some("channel"), ..) => Self::Channel;
    Self::Constant(scale) => scale, (_, _, Some(scale)) => Self::Constant(scale);
);

as_json!(Residual, "residual_before_ln", "true, false or \"post_add\"",
    Self::Output => true, (_, Some(true), _) => Self::Output;
    Self::Normed => false, (_, Some(false), _) => Self::Normed;
    Self::Sum => "post_add", (Some("post_add"), ..) => Self::Sum;
);
