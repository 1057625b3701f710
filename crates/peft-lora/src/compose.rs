//! `LoRA` as a part of compositions: the end of a linear layer is its place, and its update what it adds.

use burn::tensor::Tensor;
use peft_core::kernels::low_rank_experts;
use peft_core::{Composable, End, LayerKind, Part};

use crate::{LoraAdapter, LoraConfig};

impl Composable for LoraConfig {
    const COMPOSITION: &'static str = "LORA_COMPOSITION";
    const MIXTURE: &'static str = "LORA_MIXTURE";
    const PLACES: &'static [LayerKind] = &[LayerKind::Linear, LayerKind::Conv1D];
}

impl Part for LoraAdapter {
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

    /// All of them in one operation.
    fn mixed(experts: &[Self], seen: Tensor<3>, gates: Tensor<2>) -> Tensor<3> {
        let [batch, seq, d_in] = seen.dims();
        let all = |of: fn(&Self) -> Tensor<2>, dim| Tensor::cat(experts.iter().map(of).collect(), dim);
        let (a, b) = (all(|expert| expert.a.val(), 1), all(|expert| expert.b.val(), 0));
        let (gates, scale) = (gates.cast(a.dtype()), experts[0].scale);
        let x = experts[0].dropout.forward(seen).reshape([batch * seq, d_in]).cast(a.dtype());
        let y = low_rank_experts(x, a, b, gates.clone(), scale); // [batch · seq, d_out]
        let biases: Vec<_> = experts.iter().filter_map(|expert| Some(expert.bias.as_ref()?.val())).collect();
        let y = if biases.is_empty() { y } else { y + gates.matmul(Tensor::stack(biases, 0)) * scale };
        let d_out = y.dims()[1];
        y.reshape([batch, seq, d_out])
    }
}
