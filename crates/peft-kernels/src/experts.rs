//! The low-rank updates of several experts in one operation: each row of the input goes through the experts whose gates are open for it.
//!
//! - forward: `hₑ = x·Aₑ`, `y = s · Σₑ gₑ·hₑ·Bₑ`; `g: [rows, experts]`, and a gate that is zero is shut
//! - gradient: `uₑ = s·dy·Bₑᵀ`, `dx = Σₑ gₑ·uₑ·Aₑᵀ`, `dAₑ = xᵀ·(gₑ·uₑ)`, `dBₑ = s·(gₑ·hₑ)ᵀ·dy`, `dgₑ = hₑ·uₑ` where the gate is open
//! - source: Zadouri et al. 2023, arXiv:2309.05444, section 3.2 (all gates open); Li et al. 2024, arXiv:2404.15159, section 3.3 (few)
//!
//! Factors lie side by side, `A: [d_in, experts·rank]` and `B: [experts·rank, d_out]`, so with all gates open this is one product of that rank. On a CPU rows are
//! taken pair by pair of a row and an expert where few gates are open, and what is shut costs nothing; else, and elsewhere, shut gates are multiplied by, which saves nothing and has no
//! loop either.

#[cfg(feature = "host")]
mod dense;
#[cfg(feature = "host")]
mod native;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension, get_or_init_device_settings};
use burn::tensor::{Scalar, Tensor};

use crate::backends::on_backends;
use crate::formula::Float;
use crate::record::{give, record};

/// Updates by experts.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait ExpertOps: Backend {
    /// `y`
    #[fusion(default)]
    fn experts(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        plain::experts::<Self>(x, a, b, gates, scale)
    }

    /// `dx`, `dA`, `dB` and `dg`.
    #[fusion(default)]
    fn experts_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain::experts_backward::<Self>(grad, x, a, b, gates, scale)
    }
}

/// `scale · Σₑ gₑ·(x·Aₑ)·Bₑ`; a gate that is zero is shut, and has no gradient.
///
/// # Shapes
/// `x`: `[rows, d_in]`; `a`: `[d_in, experts·rank]`; `b`: `[experts·rank, d_out]`; `gates`: `[rows, experts]`; result `[rows, d_out]`
///
/// # Panics
/// When the shapes do not fit, the types differ, or the tensors live on a backend that this crate was not built for.
pub fn low_rank_experts(x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, gates: Tensor<2>, scale: f64) -> Tensor<2> {
    let ([rows, d_in], [from, inner], [ranks, _], [of, experts]) = (x.dims(), a.dims(), b.dims(), gates.dims());
    assert!(
        from == d_in && inner == ranks && of == rows && experts > 0 && inner % experts == 0,
        "experts: an input {:?}, factors {:?}, {:?} and gates {:?}",
        x.dims(),
        a.dims(),
        b.dims(),
        gates.dims()
    );
    let [x, a, b, gates] = [x, a, b, gates].map(Tensor::into_dispatch);
    Tensor::from_dispatch(<Dispatch as ExpertOps>::experts(x, a, b, gates, scale))
}

impl<B: ExpertOps, C: CheckpointStrategy> ExpertOps for Autodiff<B, C> {
    fn experts(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Experts;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            inputs: [FloatTensor<B>; 4],
            scale: f64,
        }

        impl<B: ExpertOps> Backward<B, 4> for Experts {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node, a_node, b_node, gates_node] = ops.parents.map(|node| node.map(|node| node.id));
                let State { inputs: [x, a, b, gates], scale } = ops.state;
                let grad = grads.consume::<B>(&ops.node);
                let (x, a, b, gates) = B::experts_backward(grad, x, a, b, gates, scale);
                let nodes = [x_node, a_node, b_node, gates_node];
                nodes.into_iter().zip([x, a, b, gates]).for_each(|(node, grad)| give::<B>(grads, node, grad));
            }
        }

        let ((x, x_node), (a, a_node)) = (x.into_parts(), a.into_parts());
        let ((b, b_node), (gates, gates_node)) = (b.into_parts(), gates.into_parts());
        record(Experts.prepare::<C>([x_node, a_node, b_node, gates_node]), |tracked| {
            let inputs = [x, a, b, gates];
            let [x, a, b, gates] = inputs.clone();
            (B::experts(x, a, b, gates, scale), tracked.then_some(State { inputs, scale }))
        })
    }
}

on_backends!(ExpertOps {
    fn experts(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        scale: f64,
    ) -> FloatTensor<Self>, by [x, a, b, gates];
    fn experts_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>), by [grad, x, a, b, gates];
});

/// Bodies of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn experts<B: Backend>(
        x: FloatTensor<B>,
        a: FloatTensor<B>,
        b: FloatTensor<B>,
        gates: FloatTensor<B>,
        scale: f64,
    ) -> FloatTensor<B> {
        let h = Float::<B>(x).matmul(Float(a));
        (gated(h, Float(gates)) * scale).matmul(Float(b)).0
    }

    pub(super) fn experts_backward<B: Backend>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        a: FloatTensor<B>,
        b: FloatTensor<B>,
        gates: FloatTensor<B>,
        scale: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let (grad, x, a, gates) = (Float::<B>(grad), Float::<B>(x), Float::<B>(a), Float::<B>(gates));
        let [rows, experts] = [gates.shape()[0], gates.shape()[1]];
        let h = x.clone().matmul(a.clone());
        let u = grad.clone().matmul(Float(b).swap(0, 1)) * scale;
        let rank = u.shape()[1] / experts;
        let each = (h.clone() * u.clone()).reshape([rows, experts, rank]).sum(2).reshape([rows, experts]);
        let bools = get_or_init_device_settings::<B>(&gates.0.device()).bool_dtype;
        let shut = B::float_equal_elem(gates.0.clone(), Scalar::from(0.0), bools);
        let b_grad = (gated(h, gates.clone()) * scale).swap(0, 1).matmul(grad);
        let u = gated(u, gates);
        (u.clone().matmul(a.swap(0, 1)).0, x.swap(0, 1).matmul(u).0, b_grad.0, each.fill(shut, 0.0).0)
    }

    /// `[rows, experts·rank]`, each expert's part times its gate.
    fn gated<B: Backend>(h: Float<B>, gates: Float<B>) -> Float<B> {
        let [rows, experts] = [gates.shape()[0], gates.shape()[1]];
        let (inner, dtype) = (h.shape()[1], h.dtype());
        let parts = h.reshape([rows, experts, inner / experts]) * gates.cast(dtype).reshape([rows, experts, 1]);
        parts.reshape([rows, inner])
    }
}
