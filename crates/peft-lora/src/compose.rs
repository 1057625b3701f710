//! `LoRA` as a part of compositions: the end of a linear layer is its place, and its update what it adds.

use burn::tensor::Tensor;
use peft_core::{Composable, End, Error, LayerKind, Part, Result};

use crate::{LoraAdapter, LoraConfig, LoraExperts};

impl Composable for LoraConfig {
    const COMPOSITION: &'static str = "LORA_COMPOSITION";
    const MIXTURE: &'static str = "LORA_MIXTURE";
    const PLACES: &'static [LayerKind] = &[LayerKind::Linear, LayerKind::Conv1D];

    fn check_expert(&self) -> Result<()> {
        if self.use_gating {
            return Err(Error::config("use_gating", "false in an expert: the router opens gates", true));
        }
        Ok(())
    }
}

impl Part for LoraAdapter {
    type Experts = LoraExperts;

    fn sees(&self, end: &End<'_>) -> (Tensor<3>, Tensor<3>) {
        (end.input.clone(), end.output.clone())
    }

    fn through(&self, seen: Tensor<3>, residual: Tensor<3>) -> Tensor<3> {
        let dtype = residual.dtype();
        residual + self.added(self.dropout.forward(seen.clone()), seen).cast(dtype)
    }

    fn update(&self, seen: Tensor<3>) -> Tensor<3> {
        self.added(seen.clone(), seen)
    }
}
