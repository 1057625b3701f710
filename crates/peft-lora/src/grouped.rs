//! LoRA on the linear layers of several experts: PEFT's on a parameter with an axis of experts.
//!
//! - formula: `yᵣ = xᵣ·Wₑᵀ + s·(xᵣ·Aₑᵀ)·Bₑᵀ` for the expert `e` of row `r`; `Aₑ: [rank, d_in]`, `Bₑ: [d_out, rank]`
//! - trained: `experts · rank · (d_in + d_out)` values a weight
//! - at init: as on one layer
//!
//! Both products go by groups of rows, so they cost what the rows cost, and an expert without rows nothing.

use burn::tensor::Tensor;
use peft_core::kernels::grouped_linear;
use peft_core::{Error, FileTensor, GroupedBase, Result, Site};

use crate::{LoraAdapter, LoraConfig};

/// `A` by expert and rank, `B` by rank and expert.
pub(crate) const TENSORS: [FileTensor; 2] = [
    FileTensor { field: "a", key: "lora_A.weight", transposed: false },
    FileTensor { field: "b", key: "lora_B.weight", transposed: true },
];

/// The shapes of `A` and `B` in a layer, or in those of several experts.
pub(crate) fn shapes(site: &Site, rank: usize) -> ([usize; 2], [usize; 2]) {
    match site.experts {
        Some(experts) => ([experts * rank, site.d_in], [experts * site.d_out, rank]),
        None => ([site.d_in, rank], [rank, site.d_out]),
    }
}

/// Refuses what PEFT refuses beside `target_parameters`, of whatever layer these are.
pub(crate) fn check(config: &LoraConfig) -> Result<()> {
    let given =
        [("lora_dropout", config.dropout > 0.0), ("lora_bias", config.lora_bias), ("use_gating", config.use_gating)];
    match given.into_iter().find(|(_, given)| *given && !config.targets.parameter_names().is_empty()) {
        Some((field, _)) => Err(Error::config(field, "none beside target_parameters, for PEFT has none there", "one")),
        None => Ok(()),
    }
}

impl LoraAdapter {
    /// `A` `[experts, rank, d_in]` and `B` `[experts, d_out, rank]`.
    fn of_experts(&self, experts: usize) -> (Tensor<3>, Tensor<3>) {
        let ([ranks, d_in], [rows, rank]) = (self.a.dims(), self.b.dims());
        let b = self.b.val().reshape([experts, rows / experts, rank]);
        (self.a.val().reshape([experts, ranks / experts, d_in]), b)
    }

    /// `s·B·A` of each expert, `[experts, d_out, d_in]`.
    pub(crate) fn deltas(&self, experts: usize) -> Tensor<3> {
        let (a, b) = self.of_experts(experts);
        (b * self.scale).matmul(a)
    }

    /// The adapted layers on `x`, `[rows, d_in]` to `[rows, d_out]`.
    pub(crate) fn on_experts(&self, x: Tensor<2>, base: &GroupedBase<'_>) -> Tensor<2> {
        let (a, b) = self.of_experts(base.experts());
        let inner = grouped_linear(x.clone().cast(a.dtype()), a, base.groups()); // [rows, rank]
        let added = grouped_linear(inner * self.scale, b, base.groups());
        let y = base.linear(x);
        let dtype = y.dtype();
        y + added.cast(dtype)
    }
}
