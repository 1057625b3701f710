//! Normalisation of rows.
//!
//! - RMSNorm: `y = x / √(mean(x²) + ε) · γ`
//! - LayerNorm: `y = (x − mean(x)) / √(var(x) + ε) · γ + β`
//! - source: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450
//!
//! The gradient computes the statistics again from `x`; a scale or a bias that is frozen costs nothing.

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
    Host, fill,
    lanes::{sum, vectorized},
};
use crate::record::{give, record};

/// What is normed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Whether the mean is taken away first: LayerNorm. Else RMSNorm.
    pub centred: bool,
    /// Added to the mean square before the root.
    pub epsilon: f64,
}

/// Norms with a gradient of their own, over the last dimension.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait NormOps: Backend {
    /// `norm(x)·γ` of `[rows, width]`, without the bias.
    #[fusion(default)]
    fn norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        plain::norm::<Self>(x, gamma, norm)
    }

    /// The gradient of `x`: with `x̂ = norm(x)` and `g = dy·γ`, `(g − x̂·mean(g·x̂) [− mean(g)]) / σ`.
    #[fusion(default)]
    fn norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        norm: Norm,
    ) -> FloatTensor<Self> {
        plain::norm_backward::<Self>(grad, x, gamma, norm)
    }
}

/// `x / √(mean(x²) + ε) · γ` over the last dimension.
///
/// # Shapes
/// `x`: `[..., width]`; `gamma`: `[width]`
///
/// # Panics
/// When the widths differ, or the tensors live on a backend that this crate was not built for.
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, epsilon: f64) -> Tensor<D> {
    apply(x, gamma, Norm { centred: false, epsilon })
}

/// `(x − mean(x)) / √(var(x) + ε) · γ + β` over the last dimension.
///
/// # Shapes
/// `x`: `[..., width]`; `gamma`, `beta`: `[width]`
///
/// # Panics
/// When the widths differ, or the tensors live on a backend that this crate was not built for.
pub fn layer_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, beta: Option<Tensor<1>>, epsilon: f64) -> Tensor<D> {
    let y = apply(x, gamma, Norm { centred: true, epsilon });
    match beta {
        Some(beta) => y + beta.unsqueeze(),
        None => y,
    }
}

fn apply<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, norm: Norm) -> Tensor<D> {
    let (dims, [width]) = (x.dims(), gamma.dims());
    assert_eq!(dims[D - 1], width, "norm: width of the input and of the scale");
    let rows = dims[..D - 1].iter().product();
    let x = x.reshape([rows, width]);
    Tensor::<2>::from_dispatch(<Dispatch as NormOps>::norm(x.into_dispatch(), gamma.into_dispatch(), norm))
        .reshape(dims)
}

impl<B: NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Normed;

        impl<B: NormOps> Backward<B, 2> for Normed {
            type State = (FloatTensor<B>, FloatTensor<B>, Norm);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let ([x_node, gamma_node], (x, gamma, norm)) = (ops.parents, ops.state);
                let grad = grads.consume::<B>(&ops.node);
                if let Some(node) = gamma_node {
                    // Σ dy·x̂, where x̂ is the norm with a scale of one.
                    let ones = B::float_ones(gamma.shape(), &gamma.device(), gamma.dtype().into());
                    let normed = Float::<B>(B::norm(x.clone(), ones, norm));
                    let width = gamma.shape()[0];
                    grads.register::<B>(node.id, (normed * Float(grad.clone())).sum(0).reshape([width]).0);
                }
                if x_node.is_some() {
                    give::<B>(grads, x_node.map(|node| node.id), B::norm_backward(grad, x, gamma, norm));
                }
            }
        }

        let ((x, x_node), (gamma, gamma_node)) = (x.into_parts(), gamma.into_parts());
        record(Normed.prepare::<C>([x_node, gamma_node]), |tracked| {
            let state = tracked.then(|| (x.clone(), gamma.clone(), norm));
            (B::norm(x, gamma, norm), state)
        })
    }
}

on_backends!(NormOps {
    fn norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self>, by [x, gamma];
    fn norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        norm: Norm,
    ) -> FloatTensor<Self>, by [grad, x, gamma];
});

/// Bodies of Burn's operations, in f32 at least.
mod plain {
    use burn::tensor::DType;

    use super::*;

    pub(super) fn norm<B: Backend>(x: FloatTensor<B>, gamma: FloatTensor<B>, norm: Norm) -> FloatTensor<B> {
        let dtype = x.dtype();
        let (normed, _) = normed::<B>(x, norm);
        (normed * row(gamma)).cast(dtype).0
    }

    pub(super) fn norm_backward<B: Backend>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        gamma: FloatTensor<B>,
        norm: Norm,
    ) -> FloatTensor<B> {
        let dtype = x.dtype();
        let (normed, inverse) = normed::<B>(x, norm);
        let grad = precise(Float(grad)) * row(gamma);
        let along = (grad.clone() * normed.clone()).mean(1);
        let mut inner = grad.clone() - normed * along;
        if norm.centred {
            inner = inner - grad.mean(1);
        }
        (inner * inverse).cast(dtype).0
    }

    /// The normed rows, and `1/σ` of each.
    fn normed<B: Backend>(x: FloatTensor<B>, norm: Norm) -> (Float<B>, Float<B>) {
        let mut x = precise(Float::<B>(x));
        if norm.centred {
            x = x.clone() - x.mean(1);
        }
        let inverse = (x.clone().square().mean(1) + norm.epsilon).inverse_root();
        (x * inverse.clone(), inverse)
    }

    fn row<B: Backend>(gamma: FloatTensor<B>) -> Float<B> {
        let width = gamma.shape()[0];
        precise(Float(B::float_reshape(gamma, Shape::new([1, width]))))
    }

    fn precise<B: Backend>(x: Float<B>) -> Float<B> {
        if x.dtype() == DType::F64 { x } else { x.cast(DType::F32) }
    }
}

/// The path on the CPU: a row at a time, while it is in the first cache.
#[cfg(feature = "host")]
mod native {
    use super::*;

    pub(super) fn norm<B: Host>(x: FloatTensor<B>, gamma: FloatTensor<B>, norm: Norm) -> FloatTensor<B> {
        let (shape, x, gamma) = (x.shape(), B::values(&x), B::values(&gamma));
        let width = gamma.len();
        let mut out = vec![0.0; x.len()];
        fill(&mut out, width, |at, out| {
            vectorized! {
                for (x, out) in x[at].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                    let (mean, inverse) = statistics(x, norm);
                    for ((out, x), gamma) in out.iter_mut().zip(x).zip(&*gamma) {
                        *out = (x - mean) * inverse * gamma;
                    }
                }
            };
        });
        B::tensor(out, shape)
    }

    pub(super) fn norm_backward<B: Host>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        gamma: FloatTensor<B>,
        norm: Norm,
    ) -> FloatTensor<B> {
        let (shape, x, gamma) = (x.shape(), B::values(&x), B::values(&gamma));
        let width = gamma.len();
        let mut out = B::into_values(grad);
        fill(&mut out, width, |at, out| {
            vectorized! {
                for (x, grad) in x[at].chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                    let (mean, inverse) = statistics(x, norm);
                    let along = sum([grad, x, &gamma], |[grad, x, gamma]| grad * gamma * (x - mean)) * inverse / width as f32;
                    let level = if norm.centred { sum([grad, &gamma], |[grad, gamma]| grad * gamma) / width as f32 } else { 0.0 };
                    for ((grad, x), gamma) in grad.iter_mut().zip(x).zip(&*gamma) {
                        *grad = (*grad * gamma - level - (x - mean) * inverse * along) * inverse;
                    }
                }
            };
        });
        B::tensor(out, shape)
    }

    /// The mean, zero unless it is taken away, and `1/σ`.
    #[inline(always)]
    fn statistics(x: &[f32], norm: Norm) -> (f32, f32) {
        let width = x.len() as f32;
        let mean = if norm.centred { sum([x], |[x]| x) / width } else { 0.0 };
        let square = sum([x], |[x]| (x - mean) * (x - mean)) / width;
        (mean, 1.0 / (square + norm.epsilon as f32).sqrt())
    }
}
