//! The feed-forward part of a block: `down(silu(gate(x)) · up(x))`, or [experts](crate::experts) that each are one.

use burn::module::{Initializer, Module};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use peft_core::kernels::{Nonlinearity, gated};
use peft_core::{FeedForward as Whole, Gated, Named, linear};

use crate::config::LlamaConfig;
use crate::experts::{Routed, SparseMlp};

/// The feed-forward part of one block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a block; a box would not be a Burn module")]
pub(crate) enum FeedForward {
    Dense(LlamaMlp),
    Sparse(SparseMlp),
}

/// A dense one, Llama's.
#[derive(Module, Debug)]
pub(crate) struct LlamaMlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    whole: Named<Whole>,
}

/// Weights as they are before training.
pub(crate) const INITIALIZER: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

/// A linear layer with random weights, allocated only when first used.
pub(crate) fn proj(d_in: usize, d_out: usize, bias: bool, device: &Device) -> Linear {
    LinearConfig::new(d_in, d_out).with_bias(bias).with_initializer(INITIALIZER).init(device)
}

impl FeedForward {
    /// That of block `layer`.
    pub(crate) fn new(config: &LlamaConfig, layer: usize, device: &Device) -> Self {
        match &config.experts {
            Some(experts) if experts.sparse[layer] => Self::Sparse(SparseMlp::new(config, experts, layer, device)),
            _ => Self::Dense(LlamaMlp::new(config.hidden_size, config.intermediate_size, config.mlp_bias, device)),
        }
    }

    /// `[batch, seq, hidden_size]` to the same; and what the router did, where there is one.
    pub(crate) fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Option<Routed>) {
        match self {
            Self::Dense(mlp) => (mlp.forward(x), None),
            Self::Sparse(mlp) => {
                let (y, routed) = mlp.forward(x);
                (y, Some(routed))
            }
        }
    }
}

impl LlamaMlp {
    pub(crate) fn new(hidden: usize, inner: usize, bias: bool, device: &Device) -> Self {
        Self {
            gate_proj: proj(hidden, inner, bias, device),
            up_proj: proj(hidden, inner, bias, device),
            down_proj: proj(inner, hidden, bias, device),
            whole: Whole::new(hidden, inner, device),
        }
    }

    pub(crate) fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let parts = Gated {
            gate: &|x| linear(&self.gate_proj, x),
            up: &|x| linear(&self.up_proj, x),
            inner: &|gate, up| gated(gate, up, Nonlinearity::Silu),
            down: &|inner| linear(&self.down_proj, inner),
        };
        self.whole.forward(x, &parts)
    }
}
