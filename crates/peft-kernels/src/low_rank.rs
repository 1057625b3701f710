//! A linear layer and the low-rank update of it in one operation.
//!
//! - forward: `h = x·A`, `y = x·W + s·h·B`
//! - gradient: `g = s·dy·Bᵀ`, `dx = dy·Wᵀ + g·Aᵀ`, `dA = xᵀ·g`, `dB = s·hᵀ·dy`; the weight has none
//! - source: Hu et al. 2021, arXiv:2106.09685, section 4.1
//!
//! The weight is dense or packed. Between forward and backward `x` and the `[rows, rank]` of `h` are kept, and nothing else is made.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend as _, Backend, Dispatch, ExtensionType, TensorMetadata as _, backend_extension,
};
use burn::tensor::Tensor;

use crate::backends::on_backends;
use crate::formula::Float;
#[cfg(feature = "host")]
use crate::host::{
    Host, Matrix,
    product::{Threads, Write, new_product, product},
};
use crate::packed::without_autodiff;
use crate::record::{give, record};
use crate::{PackedMatrix, PackedOps, Primitive};

/// The frozen weight of a linear layer.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// `[d_in, d_out]`
    Dense(&'a Tensor<2>),
    /// A packed matrix.
    Packed(&'a PackedMatrix),
}

/// The same on a backend.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "cube"))]
pub enum WeightPrimitive<B: Backend> {
    /// `[d_in, d_out]`
    Dense(FloatTensor<B>),
    /// A packed matrix.
    Packed(#[extension_type] Primitive<B>),
}

/// Linear layers with a low-rank update.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait LowRankOps: PackedOps {
    /// `y = x·W + s·h·B` and `h = x·A`.
    #[fusion(default)]
    fn low_rank(
        x: FloatTensor<Self>,
        #[extension_type] weight: WeightPrimitive<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        plain::low_rank::<Self>(x, weight, a, b, scale)
    }

    /// `dA`, `dB` and `g`.
    #[fusion(default)]
    fn low_rank_factors(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        h: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        plain::low_rank_factors::<Self>(grad, x, h, b, scale)
    }

    /// `dx`
    #[fusion(default)]
    fn low_rank_input(
        grad: FloatTensor<Self>,
        #[extension_type] weight: WeightPrimitive<Self>,
        g: FloatTensor<Self>,
        a: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        plain::low_rank_input::<Self>(grad, weight, g, a)
    }
}

/// `x·W + scale·(x·A)·B`, where the weight has no gradient. A dense weight may be of another type than the rest: see [`linear`](crate::linear()).
///
/// # Shapes
/// `x`: `[rows, d_in]`; `a`: `[d_in, rank]`; `b`: `[rank, d_out]`; result `[rows, d_out]`
///
/// # Panics
/// When the shapes do not fit, the types differ, or the tensors live on a backend that this crate was not built for.
pub fn low_rank_linear(x: Tensor<2>, weight: Weight<'_>, a: Tensor<2>, b: Tensor<2>, scale: f64) -> Tensor<2> {
    let (weight, [d_in, d_out]) = match weight {
        Weight::Dense(weight) => {
            (WeightPrimitive::Dense(weight.clone().without_autodiff().into_dispatch()), weight.dims())
        }
        Weight::Packed(packed) => {
            let layout = packed.layout();
            (WeightPrimitive::Packed(packed.primitive()), [layout.d_in, layout.d_out])
        }
    };
    let ([_, width], [from, rank], [inner, to]) = (x.dims(), a.dims(), b.dims());
    assert!(
        width == d_in && from == d_in && inner == rank && to == d_out,
        "low rank: an input {:?}, a weight [{d_in}, {d_out}] and factors {:?}, {:?}",
        x.dims(),
        a.dims(),
        b.dims()
    );
    let (x, a, b) = (x.into_dispatch(), a.into_dispatch(), b.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LowRankOps>::low_rank(x, weight, a, b, scale).0)
}

impl<B: LowRankOps, C: CheckpointStrategy> LowRankOps for Autodiff<B, C> {
    fn low_rank(
        x: FloatTensor<Self>,
        weight: WeightPrimitive<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        #[derive(Debug)]
        struct LowRank;

        #[derive(Clone, Debug)]
        struct State<B: Backend> {
            x: FloatTensor<B>,
            h: FloatTensor<B>,
            weight: WeightPrimitive<B>,
            a: FloatTensor<B>,
            b: FloatTensor<B>,
            scale: f64,
        }

        impl<B: LowRankOps> Backward<B, 3> for LowRank {
            type State = State<B>;

            fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node, a_node, b_node] = ops.parents.map(|node| node.map(|node| node.id));
                let State { x, h, weight, a, b, scale } = ops.state;
                let grad = grads.consume::<B>(&ops.node);
                let (a_grad, b_grad, g) = B::low_rank_factors(grad.clone(), x, h, b, scale);
                give::<B>(grads, a_node, a_grad);
                give::<B>(grads, b_node, b_grad);
                if x_node.is_some() {
                    give::<B>(grads, x_node, B::low_rank_input(grad, weight, g, a));
                }
            }
        }

        let ((x, x_node), (a, a_node), (b, b_node)) = (x.into_parts(), a.into_parts(), b.into_parts());
        let weight = match weight {
            WeightPrimitive::Dense(weight) => WeightPrimitive::Dense(weight.into_primitive()),
            WeightPrimitive::Packed(packed) => WeightPrimitive::Packed(without_autodiff(packed)),
        };
        let mut inner = None;
        let y = record(LowRank.prepare::<C>([x_node, a_node, b_node]), |tracked| {
            let (y, h) = B::low_rank(x.clone(), weight.clone(), a.clone(), b.clone(), scale);
            inner = Some(h.clone());
            (y, tracked.then(|| State { x, h, weight, a, b, scale }))
        });
        (y, Self::from_inner(inner.expect("made with the output")))
    }
}

on_backends!(LowRankOps {
    fn low_rank(
        x: FloatTensor<Self>,
        weight: WeightPrimitive<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>), by [x, a, b];
    fn low_rank_factors(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        h: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>), by [grad, x, h, b];
    fn low_rank_input(
        grad: FloatTensor<Self>,
        weight: WeightPrimitive<Self>,
        g: FloatTensor<Self>,
        a: FloatTensor<Self>,
    ) -> FloatTensor<Self>, by [grad, g, a];
});

/// Bodies of Burn's operations.
mod plain {
    use super::*;

    pub(super) fn low_rank<B: PackedOps>(
        x: FloatTensor<B>,
        weight: WeightPrimitive<B>,
        a: FloatTensor<B>,
        b: FloatTensor<B>,
        scale: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let h = B::float_matmul(x.clone(), a);
        let y = match weight {
            WeightPrimitive::Dense(weight) => Float::<B>(x).times_frozen(Float(weight)).0,
            WeightPrimitive::Packed(packed) => B::packed_linear(x, packed),
        };
        // The scale goes where the tensor is smallest.
        ((Float::<B>(y) + (Float(h.clone()) * scale).matmul(Float(b))).0, h)
    }

    pub(super) fn low_rank_factors<B: PackedOps>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        h: FloatTensor<B>,
        b: FloatTensor<B>,
        scale: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let grad = Float::<B>(grad);
        let g = grad.clone().matmul(Float(b).swap(0, 1)) * scale;
        let a_grad = Float(x).swap(0, 1).matmul(g.clone());
        let b_grad = (Float(h) * scale).swap(0, 1).matmul(grad);
        (a_grad.0, b_grad.0, g.0)
    }

    pub(super) fn low_rank_input<B: PackedOps>(
        grad: FloatTensor<B>,
        weight: WeightPrimitive<B>,
        g: FloatTensor<B>,
        a: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let base = match weight {
            WeightPrimitive::Dense(weight) => Float::<B>(grad).times_frozen(Float(weight).swap(0, 1)).0,
            WeightPrimitive::Packed(packed) => B::packed_linear_backward(grad, packed),
        };
        (Float::<B>(base) + Float(g).matmul(Float(a).swap(0, 1))).0
    }
}

/// The path on the CPU: the update is added to the product in its place.
#[cfg(feature = "host")]
mod native {
    use burn::tensor::Shape;

    use super::*;

    pub(super) fn low_rank<B: Host + PackedOps>(
        x: FloatTensor<B>,
        weight: WeightPrimitive<B>,
        a: FloatTensor<B>,
        b: FloatTensor<B>,
        scale: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>) {
        let shape = Shape::new([x.shape()[0], b.shape()[1]]);
        let inner = Shape::new([x.shape()[0], a.shape()[1]]);
        let h = new_product(&B::matrix(&x), &B::matrix(&a), 1.0, Threads::All);
        let mut y = match weight {
            WeightPrimitive::Dense(weight) => B::factor(&weight).applied_to(&B::matrix(&x)),
            WeightPrimitive::Packed(packed) => B::into_values(B::packed_linear(x, packed)),
        };
        let factor = Matrix::contiguous(&*h, inner[0], inner[1]);
        add(&mut y, &factor, &B::matrix(&b), scale as f32);
        (B::tensor(y, shape), B::tensor(h, inner))
    }

    pub(super) fn low_rank_factors<B: Host + PackedOps>(
        grad: FloatTensor<B>,
        x: FloatTensor<B>,
        h: FloatTensor<B>,
        b: FloatTensor<B>,
        scale: f64,
    ) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
        let (a_shape, b_shape, g_shape) = (Shape::new([x.shape()[1], h.shape()[1]]), b.shape(), h.shape());
        let (grad, x, h, b) = (B::matrix(&grad), B::matrix(&x), B::matrix(&h), B::matrix(&b));
        let g = new_product(&grad, &b.transposed(), scale as f32, Threads::All);
        let a_grad = new_product(&x.transposed(), &Matrix::contiguous(&*g, g_shape[0], g_shape[1]), 1.0, Threads::All);
        let b_grad = new_product(&h.transposed(), &grad, scale as f32, Threads::All);
        (B::tensor(a_grad, a_shape), B::tensor(b_grad, b_shape), B::tensor(g, g_shape))
    }

    pub(super) fn low_rank_input<B: Host + PackedOps>(
        grad: FloatTensor<B>,
        weight: WeightPrimitive<B>,
        g: FloatTensor<B>,
        a: FloatTensor<B>,
    ) -> FloatTensor<B> {
        let shape = Shape::new([grad.shape()[0], a.shape()[0]]);
        let mut x_grad = match weight {
            WeightPrimitive::Dense(weight) => B::factor(&weight).transposed().applied_to(&B::matrix(&grad)),
            WeightPrimitive::Packed(packed) => B::into_values(B::packed_linear_backward(grad, packed)),
        };
        add(&mut x_grad, &B::matrix(&g), &B::matrix(&a).transposed(), 1.0);
        B::tensor(x_grad, shape)
    }

    fn add(out: &mut [f32], left: &Matrix<'_>, right: &Matrix<'_>, scale: f32) {
        product((out, right.columns), left, right, scale, Write::Add, Threads::All);
    }
}
