//! Linear layers of several experts in one operation: each row of the input goes through the layer of its expert.
//!
//! - forward: `yᵣ = xᵣ·Wₑᵀ` for the expert `e` of row `r`; weights as files hold them, `[experts, d_out, d_in]`
//! - gradient: `dxᵣ = dyᵣ·Wₑ`, `dWₑ = Σᵣ dyᵣᵀ·xᵣ` over the rows of the expert, zero for one that has none
//! - source: Gale et al. 2022, arXiv:2211.15841, section 4 (products of groups of rows, none dropped and none padded)
//!
//! Rows are put together by expert, and an expert without rows costs nothing. On a CPU pieces of all experts are computed side by side; elsewhere there is
//! one product for each expert that has rows. Frozen weights may be in bfloat16.

#[cfg(feature = "host")]
mod native;
mod packed;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata as _, backend_extension, get_or_init_device_settings};
use burn::tensor::{Tensor, TensorData};

use crate::backends::on_backends;
use crate::formula::Float;
use crate::record::{give, record};

pub use packed::grouped_packed;

/// Which expert each row goes through. It is known on the host, for the work is shared out by it.
#[derive(Clone, Debug)]
pub struct Groups {
    /// Rows by expert, in their own order there.
    order: Arc<[usize]>,
    /// Where the rows of each expert begin, and where the last ones end.
    starts: Arc<[usize]>,
}

impl Groups {
    /// Rows by the expert of each, of so many.
    ///
    /// # Panics
    /// When a row goes through an expert that there is not.
    pub fn new(experts: usize, expert_of: &[usize]) -> Self {
        let mut starts = vec![0; experts + 1];
        for expert in expert_of {
            assert!(*expert < experts, "expert {expert} of {experts}");
            starts[expert + 1] += 1;
        }
        (0..experts).for_each(|expert| starts[expert + 1] += starts[expert]);
        let (mut next, mut order) = (starts.clone(), vec![0; expert_of.len()]);
        for (row, expert) in expert_of.iter().enumerate() {
            order[next[*expert]] = row;
            next[*expert] += 1;
        }
        Self { order: order.into(), starts: starts.into() }
    }

    /// How many rows each expert has.
    pub fn counts(&self) -> Vec<usize> {
        self.starts.windows(2).map(|ends| ends[1] - ends[0]).collect()
    }

    /// The place of each row in the order.
    fn back(&self) -> Vec<usize> {
        let mut places = vec![0; self.order.len()];
        self.order.iter().enumerate().for_each(|(place, row)| places[*row] = place);
        places
    }

    /// The experts that have rows, and where those are in the order.
    fn active(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let ranges = self.starts.windows(2).map(|ends| ends[0]..ends[1]).enumerate();
        ranges.filter(|(_, range)| !range.is_empty())
    }
}

/// By which side of a layer its weight multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `x·Wᵀ`
    Out,
    /// `dy·W`
    In,
}

/// Layers of experts.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait GroupedOps: Backend {
    /// `y`, or `dx`.
    #[fusion(default)]
    fn grouped(x: FloatTensor<Self>, weights: FloatTensor<Self>, groups: Groups, side: Side) -> FloatTensor<Self> {
        plain::grouped::<Self>(x, weights, groups, side)
    }

    /// `dW`
    #[fusion(default)]
    fn grouped_weights(grad: FloatTensor<Self>, x: FloatTensor<Self>, groups: Groups) -> FloatTensor<Self> {
        plain::grouped_weights::<Self>(grad, x, groups)
    }
}

/// Each row of `x` through the layer of its expert. Weights of another type than the input's are frozen.
///
/// # Shapes
/// `x`: `[rows, d_in]`; `weights`: `[experts, d_out, d_in]`; result `[rows, d_out]`
///
/// # Panics
/// When the shapes do not fit, there are no rows, or the tensors live on a backend that this crate was not built for.
pub fn grouped_linear(x: Tensor<2>, weights: Tensor<3>, groups: &Groups) -> Tensor<2> {
    let ([rows, d_in], [experts, _, from]) = (x.dims(), weights.dims());
    assert!(
        from == d_in && rows > 0 && rows == groups.order.len() && experts + 1 == groups.starts.len(),
        "grouped linear: an input {:?} and weights {:?} for {} rows of {} experts",
        x.dims(),
        weights.dims(),
        groups.order.len(),
        groups.starts.len() - 1
    );
    let weights = if weights.dtype() == x.dtype() { weights } else { weights.without_autodiff() };
    let (x, weights) = (x.into_dispatch(), weights.into_dispatch());
    Tensor::from_dispatch(<Dispatch as GroupedOps>::grouped(x, weights, groups.clone(), Side::Out))
}

impl<B: GroupedOps, C: CheckpointStrategy> GroupedOps for Autodiff<B, C> {
    fn grouped(x: FloatTensor<Self>, weights: FloatTensor<Self>, groups: Groups, side: Side) -> FloatTensor<Self> {
        #[derive(Debug)]
        struct Grouped;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            /// Only for the gradient of trained weights.
            x: Option<FloatTensor<B>>,
            weights: FloatTensor<B>,
            groups: Groups,
        }

        impl<B: GroupedOps> Backward<B, 2> for Grouped {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node, weights_node] = ops.parents.map(|node| node.map(|node| node.id));
                let State { x, weights, groups } = ops.state;
                let grad = grads.consume::<B>(&ops.node);
                if let Some(x) = x {
                    give::<B>(grads, weights_node, B::grouped_weights(grad.clone(), x, groups.clone()));
                }
                if x_node.is_some() {
                    give::<B>(grads, x_node, B::grouped(grad, weights, groups, Side::In));
                }
            }
        }

        assert_eq!(side, Side::Out, "a gradient is not differentiated");
        let trained = weights.is_tracked();
        let ((x, x_node), (weights, weights_node)) = (x.into_parts(), weights.into_parts());
        record(Grouped.prepare::<C>([x_node, weights_node]), |tracked| {
            let state = tracked.then(|| State {
                x: trained.then(|| x.clone()),
                weights: weights.clone(),
                groups: groups.clone(),
            });
            (B::grouped(x, weights, groups, side), state)
        })
    }
}

on_backends!(GroupedOps {
    fn grouped(x: FloatTensor<Self>, weights: FloatTensor<Self>, groups: Groups, side: Side) -> FloatTensor<Self>, by [x];
    fn grouped_weights(grad: FloatTensor<Self>, x: FloatTensor<Self>, groups: Groups) -> FloatTensor<Self>, by [grad, x];
});

/// Bodies of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn grouped<B: Backend>(
        x: FloatTensor<B>,
        weights: FloatTensor<B>,
        groups: Groups,
        side: Side,
    ) -> FloatTensor<B> {
        let [d_out, d_in] = [weights.shape()[1], weights.shape()[2]];
        let (x, weights) = (sorted::<B>(x, &groups), Float::<B>(weights));
        let parts = groups.active().map(|(expert, range)| {
            let weight = weights.clone().narrow(0, expert..expert + 1).reshape([d_out, d_in]);
            let weight = if side == Side::Out { weight.swap(0, 1) } else { weight };
            x.clone().narrow(0, range).times_frozen(weight).0
        });
        select::<B>(B::float_cat(parts.collect(), 0), &groups.back())
    }

    pub(super) fn grouped_weights<B: Backend>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        groups: Groups,
    ) -> FloatTensor<B> {
        let [d_out, d_in] = [grad.shape()[1], x.shape()[1]];
        let (grad, x) = (sorted::<B>(grad, &groups), sorted::<B>(x, &groups));
        let none = B::float_zeros([1, d_out, d_in].into(), &x.0.device(), x.dtype().into());
        let mut parts = vec![none; groups.starts.len() - 1];
        for (expert, range) in groups.active() {
            let grad = grad.clone().narrow(0, range.clone()).swap(0, 1);
            parts[expert] = grad.matmul(x.clone().narrow(0, range)).reshape([1, d_out, d_in]).0;
        }
        B::float_cat(parts, 0)
    }

    /// Rows by expert.
    fn sorted<B: Backend>(x: FloatTensor<B>, groups: &Groups) -> Float<B> {
        Float(select::<B>(x, &groups.order))
    }

    fn select<B: Backend>(x: FloatTensor<B>, rows: &[usize]) -> FloatTensor<B> {
        let device = x.device();
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let rows = TensorData::new(rows.clone(), [rows.len()]);
        let rows = rows.convert_dtype(get_or_init_device_settings::<B>(&device).int_dtype.into());
        B::float_select(x, 0, B::int_from_data(rows, &device))
    }
}
