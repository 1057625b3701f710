//! The linear layers of several experts as one layer with one weight.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use peft_kernels::{Groups, grouped_linear, grouped_packed};

use crate::Quantized;
use crate::activation::adapter;

/// Linear layers of several experts, whose rows each go through one of them. There is one way to call it, which is the activation seam: an adapter is computed on the rows of
/// each expert, and nothing dense is built.
///
/// The weight has the name of the layer in files, as the fused parameters of `transformers` 5 have: `mlp.experts.down_proj`.
///
/// ```
/// # use burn::{module::Param, tensor::{Device, Tensor}};
/// use peft_core::{GroupedLinear, kernels::Groups};
///
/// let device = Device::flex();
/// let layers = GroupedLinear::new(Param::from_tensor(Tensor::ones([3, 8, 4], &device)));
/// let groups = Groups::new(3, &[2, 0]); // the expert of each row
/// assert_eq!(layers.forward(Tensor::ones([2, 4], &device), &groups).dims(), [2, 8]);
/// ```
#[derive(Module, Debug)]
pub struct GroupedLinear {
    /// `[experts, d_out, d_in]`
    weight: Param<Tensor<3>>,
}

impl GroupedLinear {
    /// The layers of these weights, `[experts, d_out, d_in]`.
    pub fn new(weight: Param<Tensor<3>>) -> Self {
        Self { weight }
    }

    /// How many layers there are.
    pub fn experts(&self) -> usize {
        experts(&self.weight)
    }

    /// Each row of `x` through the layer of its expert.
    ///
    /// # Shapes
    /// `[rows, d_in]` to `[rows, d_out]`
    pub fn forward(&self, x: Tensor<2>, groups: &Groups) -> Tensor<2> {
        let base = GroupedBase { weight: &self.weight, groups };
        let Some(adapter) = adapter(quantized(&self.weight).map_or(&self.weight, Quantized::<3>::carrier)) else {
            return base.linear(x);
        };
        // Weights of another type than the input's count as frozen, which an adapted one is not.
        let adapted = |x: Tensor<2>| grouped_linear(x.clone(), self.weight.val().cast(x.dtype()), groups);
        adapter.and_then(|adapter| adapter.grouped(x.clone(), &base)).unwrap_or_else(|| adapted(x))
    }
}

fn quantized(weight: &Param<Tensor<3>>) -> Option<&Quantized<3>> {
    weight.reparameterization()
}

fn experts(weight: &Param<Tensor<3>>) -> usize {
    quantized(weight).map_or_else(|| weight.lazy_shape()[0], |quantized| quantized.experts().len())
}

/// The frozen layers of several experts under an adapter, dense or packed.
#[derive(Clone, Copy, Debug)]
pub struct GroupedBase<'a> {
    weight: &'a Param<Tensor<3>>,
    groups: &'a Groups,
}

impl GroupedBase<'_> {
    /// The layers without their adapter, `[rows, d_in]` to `[rows, d_out]`.
    pub fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        match quantized(self.weight) {
            Some(quantized) => grouped_packed(x, quantized.experts(), self.groups),
            None => grouped_linear(x, self.weight.base(), self.groups),
        }
    }

    /// Which expert each row goes through.
    pub fn groups(&self) -> &Groups {
        self.groups
    }

    /// How many experts there are.
    pub fn experts(&self) -> usize {
        experts(self.weight)
    }
}
