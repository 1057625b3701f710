//! Custom operations, each with a body that runs on every backend, a path for the CPU, a kernel for GPUs where it pays, a gradient that keeps
//! inputs and little else, and one test that holds all of them against double precision.
//!
//! - [`low_rank_linear`]: a linear layer with its low-rank update.
//! - [`low_rank_experts`]: the updates of several experts, each for the rows that go through it.
//! - [`grouped_linear`]: the linear layers of several experts, each for its rows.
//! - [`linear`]: a linear layer; over a frozen weight in bfloat16 with sums in f32.
//! - [`PackedMatrix`]: a weight of about four bits a value, and the product with it. Only packed tensors outlive an operation.
//! - [`attention`], [`rope`], [`rms_norm`], [`layer_norm`], [`gated`], [`activate`]: what is between the linear layers of a transformer.
//! - [`top_softmax`]: what opens the gates of routers.
//! - [`linear_cross_entropy`]: the output head and its loss, without all logits.
//! - [`adamw`]: the optimizer's step.
//! - [`prepare_process`]: what a program that trains on a CPU does first.
//! - [`marker_module`]: fields that say something to visitors.

#![cfg_attr(
    feature = "ndarray",
    allow(deprecated, reason = "ndarray goes with Burn 0.23; until then it is a second opinion on the CPU")
)]

mod activate;
mod adamw;
mod attention;
mod backends;
mod cross_entropy;
#[cfg(feature = "cube")]
mod cube;
mod experts;
mod formula;
mod grouped;
#[cfg(feature = "host")]
mod host;
mod linear;
mod low_rank;
mod marker;
mod norm;
mod packed;
mod record;
mod rope;
mod softmax;

pub use activate::{ActivateOps, Nonlinearity, activate, gated};
pub use adamw::{AdamW, AdamWOps, AdamWStep, adamw};
pub use attention::{AttentionOps, Segments, Sight, attention};
pub use cross_entropy::{CrossEntropyOps, Scores, cross_entropy, linear_cross_entropy};
pub use experts::{ExpertOps, low_rank_experts};
pub use grouped::{GroupedOps, Groups, Side, grouped_linear, grouped_packed};
#[cfg(feature = "host")]
pub use host::prepare_process;
pub use linear::{LinearOps, linear};
pub use low_rank::{LowRankOps, Weight, WeightPrimitive, low_rank_linear};
pub use norm::{Norm, NormOps, layer_norm, rms_norm};
pub use packed::{BlockScales, PackedData, PackedLayout, PackedMatrix, PackedOps, Primitive, ScaleKind};
pub use rope::{RopeOps, Turn, rope};
pub use softmax::{SoftmaxOps, top_softmax};
