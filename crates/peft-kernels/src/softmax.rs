//! The softmax over the largest of each row, as routers want it; over all of it where none is left out.
//!
//! - forward: `yᵢ = exp zᵢ / Σ exp zⱼ` over the `k` largest of a row, the first of equals before the others, and zero for all else
//! - gradient: `dz = y ⊙ (dy − Σ y·dy)`
//! - source: Shazeer et al. 2017, arXiv:1701.06538, equations 3 and 5

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension, get_or_init_device_settings};
use burn::tensor::{Scalar, Shape, Tensor};

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{
    Host, fill,
    lanes::{exp, max, sum, vectorized},
};
use crate::record::{give, record};

/// A softmax with a gradient that keeps nothing but the output.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait SoftmaxOps: Backend {
    /// `y`, of `z` `[rows, width]`
    #[fusion(default)]
    fn top_softmax(z: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        plain::top_softmax::<Self>(z, k)
    }

    /// `dz`
    #[fusion(default)]
    fn top_softmax_backward(grad: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        plain::top_softmax_backward::<Self>(grad, y)
    }
}

/// `exp zᵢ / Σ exp zⱼ` over the `k` largest of each row, and zero for all else.
///
/// # Shapes
/// `z`: `[rows, width]`; result as `z`
///
/// # Panics
/// When `k` is zero or more than the width, or the tensor lives on a backend that this crate was not built for.
pub fn top_softmax(z: Tensor<2>, k: usize) -> Tensor<2> {
    let [_, width] = z.dims();
    assert!((1..=width).contains(&k), "the softmax over the {k} largest of {width}");
    Tensor::from_dispatch(<Dispatch as SoftmaxOps>::top_softmax(z.into_dispatch(), k))
}

impl<B: SoftmaxOps, C: CheckpointStrategy> SoftmaxOps for Autodiff<B, C> {
    fn top_softmax(z: FloatTensor<Self>, k: usize) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct TopSoftmax;

        impl<B: SoftmaxOps> Backward<B, 1> for TopSoftmax {
            type State = FloatTensor<B>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let ([node], y) = (ops.parents, ops.state);
                let grad = grads.consume::<B>(&ops.node);
                give::<B>(grads, node.map(|node| node.id), B::top_softmax_backward(grad, y));
            }
        }

        let (z, node) = z.into_parts();
        record(TopSoftmax.prepare::<C>([node]), |tracked| {
            let y = B::top_softmax(z, k);
            (y.clone(), tracked.then_some(y))
        })
    }
}

on_backends!(SoftmaxOps {
    fn top_softmax(z: FloatTensor<Self>, k: usize) -> FloatTensor<Self>, by [z];
    fn top_softmax_backward(grad: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>, by [grad, y];
});

/// Bodies of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn top_softmax<B: Backend>(z: FloatTensor<B>, k: usize) -> FloatTensor<B> {
        let [rows, width] = [z.shape()[0], z.shape()[1]];
        let z = Float::<B>(z);
        let e = (z.clone() - z.clone().max(1)).exp();
        if k == width {
            return (e.clone() / e.sum(1)).0;
        }
        let device = z.0.device();
        let settings = get_or_init_device_settings::<B>(&device);
        let (bools, ints) = (settings.bool_dtype, settings.int_dtype);
        let shape = Shape::new([rows, width]);
        let numbers = B::int_reshape(B::int_arange(0..width as i64, &device, ints), Shape::new([1, width]));
        let numbers = B::int_expand(numbers, shape.clone());
        // What is taken is below everything, so that it is not the largest again.
        let left = (0..k).fold(z, |left, _| {
            let largest = B::int_expand(B::float_argmax(left.0.clone(), 1, ints), shape.clone());
            left.fill(B::int_equal(numbers.clone(), largest, bools), f32::NEG_INFINITY)
        });
        let shut = B::bool_not(B::float_equal_elem(left.0, Scalar::from(f32::NEG_INFINITY), bools));
        let e = e.fill(shut, 0.0);
        (e.clone() / e.sum(1)).0
    }

    pub(super) fn top_softmax_backward<B: Backend>(grad: FloatTensor<B>, y: FloatTensor<B>) -> FloatTensor<B> {
        let (grad, y) = (Float::<B>(grad), Float(y));
        let along = (grad.clone() * y.clone()).sum(1);
        ((grad - along) * y).0
    }
}

/// The path on the CPU: a row at a time.
#[cfg(feature = "host")]
mod native {
    use super::*;

    pub(super) fn top_softmax<B: Host>(z: FloatTensor<B>, k: usize) -> FloatTensor<B> {
        let (shape, z) = (z.shape(), B::values(&z));
        let width = shape[1];
        let mut out = vec![0.0; z.len()];
        fill(&mut out, width, |at, out| {
            let mut left = Vec::new();
            for (z, y) in z[at].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                let highest = max(z);
                if k == width {
                    vectorized!(y.iter_mut().zip(z).for_each(|(y, z)| *y = exp(*z - highest)));
                } else {
                    z.clone_into(&mut left);
                    (0..k).for_each(|_| {
                        // `>` keeps the first of equals.
                        let largest = (1..width).fold(0, |best, i| if left[i] > left[best] { i } else { best });
                        y[largest] = exp(z[largest] - highest);
                        left[largest] = f32::NEG_INFINITY;
                    });
                }
                let total: f32 = y.iter().sum();
                y.iter_mut().for_each(|y| *y /= total);
            }
        });
        B::tensor(out, shape)
    }

    pub(super) fn top_softmax_backward<B: Host>(grad: FloatTensor<B>, y: FloatTensor<B>) -> FloatTensor<B> {
        let (shape, y) = (y.shape(), B::values(&y));
        let width = shape[1];
        let mut out = B::into_values(grad);
        fill(&mut out, width, |at, out| {
            vectorized! {
                for (y, grad) in y[at].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                    let along = sum([grad, y], |[grad, y]| grad * y);
                    grad.iter_mut().zip(y).for_each(|(grad, y)| *grad = (*grad - along) * y);
                }
            };
        });
        B::tensor(out, shape)
    }
}
