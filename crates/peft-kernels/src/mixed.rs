//! A linear layer whose frozen weight is of another type than its input.
//!
//! - forward: `y = round(x)·W`
//! - gradient: `dx = round(dy)·Wᵀ`; the weight has none
//! - source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.3 (products of 16 bits, sums of 32)
//!
//! With a weight in bfloat16 both factors have 16 bits, and sums, input and output stay in f32. On the CPU that is exact: products of two numbers of 16 bits
//! are numbers in f32. Other backends compute the product in the type of the weight and round it once more.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension};
use burn::tensor::{Shape, Tensor};

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::Host;
use crate::record::{give, record};

/// Products with a frozen matrix.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait MixedOps: Backend {
    /// `x·W` in the type of `x`.
    #[fusion(default)]
    fn mixed_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::mixed_linear::<Self>(x, weight)
    }
}

/// `x·W` in the type of `x`, computed in that of the weight, which has no gradient.
///
/// # Shapes
/// `x`: `[rows, d_in]`; `weight`: `[d_in, d_out]`; result `[rows, d_out]`
///
/// # Panics
/// When the shapes do not fit, or the tensors live on a backend that this crate was not built for.
pub fn mixed_linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "mixed linear: width of the input");
    let weight = weight.without_autodiff().into_dispatch();
    Tensor::from_dispatch(<Dispatch as MixedOps>::mixed_linear(x.into_dispatch(), weight))
}

impl<B: MixedOps, C: CheckpointStrategy> MixedOps for Autodiff<B, C> {
    fn mixed_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Linear;

        impl<B: MixedOps> Backward<B, 1> for Linear {
            type State = FloatTensor<B>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node] = ops.parents;
                let grad = grads.consume::<B>(&ops.node);
                let weight = B::float_swap_dims(ops.state, 0, 1);
                give::<B>(grads, x_node.map(|node| node.id), B::mixed_linear(grad, weight));
            }
        }

        let ((x, x_node), weight) = (x.into_parts(), weight.into_primitive());
        record(Linear.prepare::<C>([x_node]), |tracked| (B::mixed_linear(x, weight.clone()), tracked.then_some(weight)))
    }
}

on_backends!(MixedOps {
    fn mixed_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>, by [x];
});

/// Body of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn mixed_linear<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
        Float::<B>(x).times_frozen(Float(weight)).0
    }
}

/// The path on the CPU.
#[cfg(feature = "host")]
mod native {
    use super::*;

    pub(super) fn mixed_linear<B: Host>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([x.shape()[0], weight.shape()[1]]);
        B::tensor(B::factor(&weight).applied_to(&B::matrix(&x)), shape)
    }
}
