//! A linear layer, whose weight may be trained, or frozen and of another type than its input.
//!
//! - forward: `y = round(x)·W`
//! - gradient: `dx = round(dy)·Wᵀ`, and of a trained weight `dW = xᵀ·dy`
//! - source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.3 (products of 16 bits, sums of 32)
//!
//! With a weight in bfloat16 both factors have 16 bits, and sums, input and output stay in f32. On the CPU that is exact: products of two numbers of 16 bits
//! are numbers in f32. Other backends compute the product in the type of the weight and round it once more.
//!
//! Burn's own product leaves the threads of a CPU to the library, where one puts a factor in order for all; here each has columns of its own.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension};
use burn::tensor::{Shape, Tensor};

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{
    Host,
    product::{Threads, new_product},
};
use crate::record::{give, record};

/// Linear layers.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait LinearOps: Backend {
    /// `x·W` in the type of `x`.
    #[fusion(default)]
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::product::<Self>(x, weight)
    }

    /// `dW`
    #[fusion(default)]
    fn product_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::product_weight::<Self>(grad, x)
    }
}

/// `x·W` in the type of `x`, computed in that of the weight, which has no gradient when that is another.
///
/// # Shapes
/// `x`: `[rows, d_in]`; `weight`: `[d_in, d_out]`; result `[rows, d_out]`
///
/// # Panics
/// When the shapes do not fit, or the tensors live on a backend that this crate was not built for.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[0], "linear: width of the input");
    let weight = if weight.dtype() == x.dtype() { weight } else { weight.without_autodiff() };
    Tensor::from_dispatch(<Dispatch as LinearOps>::product(x.into_dispatch(), weight.into_dispatch()))
}

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Linear;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            /// For the gradient of a weight that is trained.
            x: Option<FloatTensor<B>>,
            /// For that of an input that has one.
            weight: Option<FloatTensor<B>>,
        }

        impl<B: LinearOps> Backward<B, 2> for Linear {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node, weight_node] = ops.parents.map(|node| node.map(|node| node.id));
                let grad = grads.consume::<B>(&ops.node);
                if let Some(x) = ops.state.x {
                    give::<B>(grads, weight_node, B::product_weight(grad.clone(), x));
                }
                if let Some(weight) = ops.state.weight {
                    give::<B>(grads, x_node, B::product(grad, B::float_swap_dims(weight, 0, 1)));
                }
            }
        }

        let (of_x, of_weight) = (x.is_tracked(), weight.is_tracked());
        let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
        record(Linear.prepare::<C>([x_node, weight_node]), |tracked| {
            let state = || State { x: of_weight.then(|| x.clone()), weight: of_x.then(|| weight.clone()) };
            let state = tracked.then(state);
            (B::product(x, weight), state)
        })
    }
}

on_backends!(LinearOps {
    fn product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>, by [x];
    fn product_weight(grad: FloatTensor<Self>, x: FloatTensor<Self>) -> FloatTensor<Self>, by [grad, x];
});

/// Bodies of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn product<B: Backend>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
        Float::<B>(x).times_frozen(Float(weight)).0
    }

    pub(super) fn product_weight<B: Backend>(grad: FloatTensor<B>, x: FloatTensor<B>) -> FloatTensor<B> {
        Float::<B>(x).swap(0, 1).matmul(Float(grad)).0
    }
}

/// The path on the CPU.
#[cfg(feature = "host")]
mod native {
    use super::*;

    pub(super) fn product<B: Host>(x: FloatTensor<B>, weight: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([x.shape()[0], weight.shape()[1]]);
        B::tensor(B::factor(&weight).applied_to(&B::matrix(&x)), shape)
    }

    pub(super) fn product_weight<B: Host>(grad: FloatTensor<B>, x: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([x.shape()[1], grad.shape()[1]]);
        B::tensor(new_product(&B::matrix(&x).transposed(), &B::matrix(&grad), 1.0, Threads::All), shape)
    }
}
