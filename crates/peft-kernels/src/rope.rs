//! Rotary position embedding, half-split.
//!
//! - forward: pairs `(xᵢ, xᵢ₊ₙ)` of the two halves of a head turn by the angle of their position: `(x·cos − y·sin, y·cos + x·sin)`
//! - gradient: the same with the opposite angle
//! - source: Su et al. 2021, arXiv:2104.09864, in the layout of `transformers`

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension};
use burn::tensor::{Slice, Tensor};

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{Host, fill, lanes::vectorized};
use crate::record::{give, record};

/// Which way pairs turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// By the angle.
    Forward,
    /// By the opposite angle.
    Back,
}

/// The rotation with a gradient that keeps nothing but the table of angles.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait RopeOps: Backend {
    /// Turns `x` `[batch, seq, heads, head_dim]` by `angles` `[1 or batch, seq, 1, head_dim]`: cosines of the pairs, then their sines.
    #[fusion(default)]
    fn rope(x: FloatTensor<Self>, angles: FloatTensor<Self>, turn: Turn) -> FloatTensor<Self> {
        plain::rope::<Self>(x, angles, turn)
    }
}

/// Turns each half-split pair of `x` by its angle, in place where nobody else has `x`.
///
/// # Shapes
/// `x`: `[batch, seq, heads, head_dim]`; `angles`: `[1 or batch, seq, 1, head_dim]`, the cosines of the pairs, then their sines
///
/// # Panics
/// When the shapes do not fit, `head_dim` is odd, or the tensors live on a backend that this crate was not built for.
pub fn rope(x: Tensor<4>, angles: Tensor<4>) -> Tensor<4> {
    let ([batch, seq, _, head_dim], [rows, positions, one, values]) = (x.dims(), angles.dims());
    assert!(
        (rows == 1 || rows == batch) && (positions, one, values) == (seq, 1, head_dim) && head_dim % 2 == 0,
        "rope: angles {:?} for an input {:?}",
        angles.dims(),
        x.dims()
    );
    let angles = angles.without_autodiff();
    Tensor::from_dispatch(<Dispatch as RopeOps>::rope(x.into_dispatch(), angles.into_dispatch(), Turn::Forward))
}

impl<B: RopeOps, C: CheckpointStrategy> RopeOps for Autodiff<B, C> {
    fn rope(x: FloatTensor<Self>, angles: FloatTensor<Self>, turn: Turn) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Rope;

        impl<B: RopeOps> Backward<B, 1> for Rope {
            type State = (FloatTensor<B>, Turn);

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let ([node], (angles, turn)) = (ops.parents, ops.state);
                let grad = grads.consume::<B>(&ops.node);
                let back = if turn == Turn::Forward { Turn::Back } else { Turn::Forward };
                give::<B>(grads, node.map(|node| node.id), B::rope(grad, angles, back));
            }
        }

        let ((x, node), angles) = (x.into_parts(), angles.into_primitive());
        record(Rope.prepare::<C>([node]), |tracked| {
            let state = tracked.then(|| (angles.clone(), turn));
            (B::rope(x, angles, turn), state)
        })
    }
}

on_backends!(RopeOps {
    fn rope(x: FloatTensor<Self>, angles: FloatTensor<Self>, turn: Turn) -> FloatTensor<Self>, by [x, angles];
});

/// Body of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn rope<B: Backend>(x: FloatTensor<B>, angles: FloatTensor<B>, turn: Turn) -> FloatTensor<B> {
        let (half, dtype) = (x.shape()[3] / 2, x.dtype());
        let part = |tensor: &FloatTensor<B>, from: usize| {
            let slices = [Slice::full(), Slice::full(), Slice::full(), Slice::from(from..from + half)];
            Float::<B>(B::float_slice(tensor.clone(), &slices))
        };
        let (left, right) = (part(&x, 0), part(&x, half));
        let (cos, mut sin) = (part(&angles, 0).cast(dtype), part(&angles, half).cast(dtype));
        if turn == Turn::Back {
            sin = -sin;
        }
        let turned = left.clone() * cos.clone() - right.clone() * sin.clone();
        B::float_cat(vec![turned.0, (right * cos + left * sin).0], 3)
    }
}

/// The path on the CPU: in place.
#[cfg(feature = "host")]
mod native {
    use super::*;

    pub(super) fn rope<B: Host>(x: FloatTensor<B>, angles: FloatTensor<B>, turn: Turn) -> FloatTensor<B> {
        let shape = x.shape();
        let [_, seq, heads, head_dim] = shape[..] else { panic!("four dimensions") };
        let (angles, own) = (B::values(&angles), angles.shape()[0] > 1);
        let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
        let mut out = B::into_values(x);
        let token = heads * head_dim;
        fill(&mut out, token, |at, out| {
            vectorized! {
                for (token_at, token) in (at.start / token.max(1)..).zip(out.chunks_exact_mut(token)) {
                    // Rows of the batch share their angles unless each has its own.
                    let place = if own { token_at } else { token_at % seq };
                    let (cos, sin) = angles[place * head_dim..(place + 1) * head_dim].split_at(head_dim / 2);
                    for head in token.chunks_exact_mut(head_dim) {
                        let (left, right) = head.split_at_mut(head_dim / 2);
                        for (((x, y), cos), sin) in left.iter_mut().zip(right).zip(cos).zip(sin) {
                            let sin = sign * sin;
                            (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
                        }
                    }
                }
            };
        });
        B::tensor(out, shape)
    }
}
