//! AdamW, in one pass over a parameter, its gradient and its moments.
//!
//! - `m = β₁·m + (1 − β₁)·g`, `v = β₂·v + (1 − β₂)·g²`
//! - `w = (1 − η·λ)·w − η·(m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)`
//! - source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend as _, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{Host, PIECE, lanes::vectorized};

/// What is the same for all parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// `β₁`
    pub beta_1: f64,
    /// `β₂`
    pub beta_2: f64,
    /// `ε`
    pub epsilon: f64,
    /// `λ`
    pub weight_decay: f64,
}

/// One step of one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// What is the same for all.
    pub adamw: AdamW,
    /// `η`
    pub learning_rate: f64,
    /// Factor of the gradient: that of clipping.
    pub factor: f64,
    /// `t`, from one.
    pub time: usize,
}

impl AdamWStep {
    /// `√(1 − β₂ᵗ)` and `η·√(1 − β₂ᵗ) / (1 − β₁ᵗ)`: with both, moments need no correction each.
    fn corrections(&self) -> (f64, f64) {
        let power = |beta: f64| 1.0 - beta.powf(self.time as f64);
        let root = power(self.adamw.beta_2).sqrt();
        (root, self.learning_rate * root / power(self.adamw.beta_1))
    }
}

/// The optimizer's step.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait AdamWOps: Backend {
    /// The parameter, `m` and `v` after the step; all of the same shape.
    #[fusion(default)]
    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain::adamw::<Self>(value, grad, first, second, step)
    }
}

/// The parameter and its moments after a step, in their places where nobody else has them.
///
/// # Panics
/// When the lengths differ, or the tensors live on a backend that this crate was not built for.
pub fn adamw(
    value: Tensor<1>,
    grad: Tensor<1>,
    (first, second): (Tensor<1>, Tensor<1>),
    step: AdamWStep,
) -> (Tensor<1>, (Tensor<1>, Tensor<1>)) {
    let dims = value.dims();
    assert!(
        grad.dims() == dims && first.dims() == dims && second.dims() == dims,
        "AdamW: {dims:?} values, gradient {:?}, moments {:?} and {:?}",
        grad.dims(),
        first.dims(),
        second.dims()
    );
    let (value, grad) = (value.into_dispatch(), grad.into_dispatch());
    let (first, second) = (first.into_dispatch(), second.into_dispatch());
    let (value, first, second) = <Dispatch as AdamWOps>::adamw(value, grad, first, second, step);
    (Tensor::from_dispatch(value), (Tensor::from_dispatch(first), Tensor::from_dispatch(second)))
}

impl<B: AdamWOps, C: CheckpointStrategy> AdamWOps for Autodiff<B, C> {
    /// A step has no gradient.
    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let inner = |tensor: FloatTensor<Self>| tensor.into_primitive();
        let (value, first, second) = B::adamw(inner(value), inner(grad), inner(first), inner(second), step);
        (Self::from_inner(value), Self::from_inner(first), Self::from_inner(second))
    }
}

on_backends!(AdamWOps {
    fn adamw(
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>), by [value, grad, first, second];
});

/// Body of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn adamw<B: Backend>(
        value: FloatTensor<B>,
        grad: FloatTensor<B>,
        first: FloatTensor<B>,
        second: FloatTensor<B>,
        step: AdamWStep,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let AdamW { beta_1, beta_2, epsilon, weight_decay } = step.adamw;
        let (root, rate) = step.corrections();
        let grad = Float::<B>(grad) * step.factor;
        let first = Float(first) * beta_1 + grad.clone() * (1.0 - beta_1);
        let second = Float(second) * beta_2 + grad.square() * (1.0 - beta_2);
        let delta = first.clone() / (second.clone().root() + epsilon * root) * rate;
        let value = Float(value) * (1.0 - step.learning_rate * weight_decay) - delta;
        (value.0, first.0, second.0)
    }
}

/// The path on the CPU: one pass, in place.
#[cfg(feature = "host")]
mod native {
    use burn::backend::TensorMetadata as _;
    use rayon::prelude::*;

    use super::*;

    pub(super) fn adamw<B: Host>(
        value: FloatTensor<B>,
        grad: FloatTensor<B>,
        first: FloatTensor<B>,
        second: FloatTensor<B>,
        step: AdamWStep,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let (shape, grad) = (value.shape(), B::values(&grad));
        let (mut value, mut first, mut second) = (B::into_values(value), B::into_values(first), B::into_values(second));
        let AdamW { beta_1, beta_2, epsilon, weight_decay } = step.adamw;
        let (root, rate) = step.corrections();
        let (kept, rate, epsilon) =
            ((1.0 - step.learning_rate * weight_decay) as f32, rate as f32, (epsilon * root) as f32);
        let (beta_1, beta_2, factor) = (beta_1 as f32, beta_2 as f32, step.factor as f32);
        let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
        let pieces = value.par_chunks_mut(PIECE).zip(grad.par_chunks(PIECE)).zip(moments);
        pieces.for_each(|((value, grad), (first, second))| {
            vectorized! {
                for (((w, g), m), v) in value.iter_mut().zip(grad).zip(first).zip(second) {
                    let g = g * factor;
                    *m = *m * beta_1 + g * (1.0 - beta_1);
                    *v = *v * beta_2 + g * g * (1.0 - beta_2);
                    *w = *w * kept - rate * *m / (v.sqrt() + epsilon);
                }
            }
        });
        (B::tensor(value, shape.clone()), B::tensor(first, shape.clone()), B::tensor(second, shape))
    }
}
