//! Pointwise nonlinearities, alone and as the gate of another tensor.
//!
//! - forward: `y = f(x)`; gated `y = f(gate)·up`
//! - `f`: SiLU `x·σ(x)`; GELU `x·Φ(x)`; its approximation `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`; ReLU
//! - source: Shazeer 2020, arXiv:2002.05202 (gates); Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU)
//!
//! The gradient computes `f` and its derivative again from the inputs; nothing else is kept.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, SQRT_2};

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension};
use burn::tensor::Tensor;

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{
    Host, fill, fill_both,
    lanes::{erf, exp, sigmoid, vectorized},
};
use crate::record::{give, record};

/// A pointwise nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Nonlinearity {
    /// `x·σ(x)`
    Silu,
    /// `x·Φ(x)`
    Gelu,
    /// GELU by the hyperbolic tangent: `gelu_new` of `transformers`.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
}

/// `√(2/π)`
const ROOT: f64 = FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
const CUBIC: f64 = 0.044_715;

/// Nonlinearities with a gradient of their own.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait ActivateOps: Backend {
    /// `f(x)`
    #[fusion(default)]
    fn activate(x: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self> {
        plain::activate::<Self>(x, f)
    }

    /// `dy·f'(x)`
    #[fusion(default)]
    fn activate_backward(grad: FloatTensor<Self>, x: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self> {
        plain::activate_backward::<Self>(grad, x, f)
    }

    /// `f(gate)·up`
    #[fusion(default)]
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self> {
        plain::gated::<Self>(gate, up, f)
    }

    /// The gradients of gate and up: `dy·up·f'(gate)`, `dy·f(gate)`.
    #[fusion(default)]
    fn gated_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        f: Nonlinearity,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        plain::gated_backward::<Self>(grad, gate, up, f)
    }
}

/// `f(x)` with a gradient that keeps `x` alone.
///
/// # Panics
/// When `x` lives on a backend that this crate was not built for.
pub fn activate<const D: usize>(x: Tensor<D>, f: Nonlinearity) -> Tensor<D> {
    Tensor::from_dispatch(<Dispatch as ActivateOps>::activate(x.into_dispatch(), f))
}

/// `f(gate)·up`, as in SwiGLU and GeGLU, with a gradient that keeps the inputs alone.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft_kernels::{Nonlinearity, gated};
///
/// let gate = Tensor::<1>::from_floats([0.0, 2.0], &Device::flex());
/// let up = Tensor::<1>::from_floats([5.0, 3.0], &Device::flex());
/// let y = gated(gate, up, Nonlinearity::Silu).into_data().try_to_vec::<f32>()?;
/// assert!(y[0] == 0.0 && (y[1] - 5.2848).abs() < 1e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Panics
/// When the shapes differ, or the tensors live on a backend that this crate was not built for.
pub fn gated<const D: usize>(gate: Tensor<D>, up: Tensor<D>, f: Nonlinearity) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "gated: shapes of the gate and of what it opens");
    Tensor::from_dispatch(<Dispatch as ActivateOps>::gated(gate.into_dispatch(), up.into_dispatch(), f))
}

impl<B: ActivateOps, C: CheckpointStrategy> ActivateOps for Autodiff<B, C> {
    fn activate(x: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Activate;

        impl<B: ActivateOps> Backward<B, 1> for Activate {
            type State = (FloatTensor<B>, Nonlinearity);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let ([x_node], (x, f)) = (ops.parents, ops.state);
                let grad = grads.consume::<B>(&ops.node);
                give::<B>(grads, x_node.map(|node| node.id), B::activate_backward(grad, x, f));
            }
        }

        let (x, node) = x.into_parts();
        record(Activate.prepare::<C>([node]), |tracked| {
            let state = tracked.then(|| (x.clone(), f));
            (B::activate(x, f), state)
        })
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Gated;

        impl<B: ActivateOps> Backward<B, 2> for Gated {
            type State = (FloatTensor<B>, FloatTensor<B>, Nonlinearity);

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let ([gate_node, up_node], (gate, up, f)) = (ops.parents, ops.state);
                let grad = grads.consume::<B>(&ops.node);
                let (gate, up) = B::gated_backward(grad, gate, up, f);
                give::<B>(grads, gate_node.map(|node| node.id), gate);
                give::<B>(grads, up_node.map(|node| node.id), up);
            }
        }

        let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
        record(Gated.prepare::<C>([gate_node, up_node]), |tracked| {
            let state = tracked.then(|| (gate.clone(), up.clone(), f));
            (B::gated(gate, up, f), state)
        })
    }
}

on_backends!(ActivateOps {
    fn activate(x: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self>, by [x];
    fn activate_backward(grad: FloatTensor<Self>, x: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self>, by [grad, x];
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, f: Nonlinearity) -> FloatTensor<Self>, by [gate, up];
    fn gated_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        f: Nonlinearity,
    ) -> (FloatTensor<Self>, FloatTensor<Self>), by [grad, gate, up];
});

/// Bodies of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn activate<B: Backend>(x: FloatTensor<B>, f: Nonlinearity) -> FloatTensor<B> {
        value::<B>(Float(x), f).0
    }

    pub(super) fn activate_backward<B: Backend>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        f: Nonlinearity,
    ) -> FloatTensor<B> {
        (slope::<B>(Float(x), f) * Float(grad)).0
    }

    pub(super) fn gated<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>, f: Nonlinearity) -> FloatTensor<B> {
        (value::<B>(Float(gate), f) * Float(up)).0
    }

    pub(super) fn gated_backward<B: Backend>(
        grad: FloatTensor<B>,
        gate: FloatTensor<B>,
        up: FloatTensor<B>,
        f: Nonlinearity,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let (grad, gate) = (Float::<B>(grad), Float(gate));
        ((slope(gate.clone(), f) * Float(up) * grad.clone()).0, (value(gate, f) * grad).0)
    }

    fn value<B: Backend>(x: Float<B>, f: Nonlinearity) -> Float<B> {
        match f {
            Nonlinearity::Silu => x.clone() * x.sigmoid(),
            Nonlinearity::Gelu => x.clone() * phi(x),
            Nonlinearity::GeluTanh => x.clone() * half_tanh(x),
            Nonlinearity::Relu => Float(B::relu(x.0)),
        }
    }

    fn slope<B: Backend>(x: Float<B>, f: Nonlinearity) -> Float<B> {
        match f {
            Nonlinearity::Silu => {
                let s = x.clone().sigmoid();
                s.clone() * (x * (-s + 1.0) + 1.0)
            }
            Nonlinearity::Gelu => {
                let density = (x.clone().square() * -0.5).exp() * (ROOT / 2.0);
                phi(x.clone()) + x * density
            }
            Nonlinearity::GeluTanh => {
                // The half is σ(2u) for the tangent of u, and what is missing to one σ(−2u): a difference would lose digits.
                let (half, rest) = (half_tanh(x.clone()), half_tanh(-x.clone()));
                let inner = (x.clone().square() * (3.0 * CUBIC) + 1.0) * (2.0 * ROOT);
                half.clone() + x * half * rest * inner
            }
            Nonlinearity::Relu => Float(B::float_sign(B::relu(x.0))),
        }
    }

    /// The normal distribution, `(1 + erf(x/√2))/2`.
    fn phi<B: Backend>(x: Float<B>) -> Float<B> {
        ((x / SQRT_2).erf() + 1.0) * 0.5
    }

    /// `(1 + tanh(u))/2`, which is `σ(2u)`, of `u = √(2/π)·(x + 0.044715·x³)`
    fn half_tanh<B: Backend>(x: Float<B>) -> Float<B> {
        let cubic = x.clone() * (x.square() * CUBIC + 1.0);
        (cubic * (2.0 * ROOT)).sigmoid()
    }
}

/// The path on the CPU: one pass over the values.
#[cfg(feature = "host")]
mod native {
    use super::*;

    pub(super) fn activate<B: Host>(x: FloatTensor<B>, f: Nonlinearity) -> FloatTensor<B> {
        let x_values = B::values(&x);
        let mut out = vec![0.0; x_values.len()];
        fill(&mut out, 1, |at, out| each(f, &x_values[at], out.iter_mut(), |out, y, _| *out = y));
        B::tensor(out, x.shape())
    }

    pub(super) fn activate_backward<B: Host>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        f: Nonlinearity,
    ) -> FloatTensor<B> {
        let (shape, x) = (grad.shape(), B::values(&x));
        let mut out = B::into_values(grad);
        fill(&mut out, 1, |at, out| each(f, &x[at], out.iter_mut(), |out, _, slope| *out *= slope));
        B::tensor(out, shape)
    }

    pub(super) fn gated<B: Host>(gate: FloatTensor<B>, up: FloatTensor<B>, f: Nonlinearity) -> FloatTensor<B> {
        let (gate_values, up) = (B::values(&gate), B::values(&up));
        let mut out = vec![0.0; up.len()];
        fill(&mut out, 1, |at, out| {
            let up = &up[at.clone()];
            each(f, &gate_values[at], out.iter_mut().zip(up), |(out, up), y, _| *out = y * up);
        });
        B::tensor(out, gate.shape())
    }

    pub(super) fn gated_backward<B: Host>(
        grad: FloatTensor<B>,
        gate: FloatTensor<B>,
        up: FloatTensor<B>,
        f: Nonlinearity,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let shape = grad.shape();
        let (gate, up) = (B::values(&gate), B::values(&up));
        // The gradient of the output turns into that of the tensor behind the gate, in its own place when nobody else has it.
        let mut up_grad = B::into_values(grad);
        let mut gate_grad = vec![0.0; up.len()];
        fill_both(&mut gate_grad, &mut up_grad, 1, |at, gate_grad, up_grad| {
            let items = gate_grad.iter_mut().zip(up_grad).zip(&up[at.clone()]);
            each(f, &gate[at], items, |((gate_grad, up_grad), up), y, slope| {
                let grad = *up_grad;
                (*gate_grad, *up_grad) = (grad * up * slope, grad * y);
            });
        });
        (B::tensor(gate_grad, shape.clone()), B::tensor(up_grad, shape))
    }

    /// `work(item, f(x), f'(x))` for all values and what belongs to each: items and no indices, whose checks would leave one value a time.
    #[inline(always)]
    fn each<I>(f: Nonlinearity, x: &[f32], items: impl Iterator<Item = I>, work: impl Fn(I, f32, f32)) {
        let pairs = x.iter().zip(items);
        match f {
            Nonlinearity::Silu => vectorized! {
                for (x, item) in pairs {
                    let s = sigmoid(*x);
                    work(item, x * s, s * (1.0 + x * (1.0 - s)));
                }
            },
            Nonlinearity::Gelu => vectorized! {
                for (x, item) in pairs {
                    let phi = 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2 as f32));
                    let density = ROOT as f32 / 2.0 * exp(-0.5 * x * x);
                    work(item, x * phi, phi + x * density);
                }
            },
            Nonlinearity::GeluTanh => vectorized! {
                let (root, cubic) = (ROOT as f32, CUBIC as f32);
                for (x, item) in pairs {
                    let half = sigmoid(2.0 * root * x * (1.0 + cubic * x * x));
                    let inner = 2.0 * root * (1.0 + 3.0 * cubic * x * x);
                    work(item, x * half, half + x * half * (1.0 - half) * inner);
                }
            },
            Nonlinearity::Relu => vectorized! {
                for (x, item) in pairs {
                    let open = if *x > 0.0 { 1.0 } else { 0.0 };
                    work(item, x * open, open);
                }
            },
        }
    }
}
