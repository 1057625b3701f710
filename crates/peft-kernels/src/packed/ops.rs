//! The operations of packed matrices for every backend: bodies of Burn's own operations, and the gradient.
use std::ops::Range;

#[cfg(feature = "flex")]
use burn::backend::Flex;
#[cfg(feature = "ndarray")]
use burn::backend::NdArray;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops};
#[cfg(feature = "cube")]
use burn::backend::fusion::custom::TensorSpec;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend as _, Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::{DType, Shape, Slice};

use super::{Floats, PackedLayout, ScaleKind, nested_layout};
use crate::formula::Float;
use crate::record::{give, record};

/// The tensors of a packed matrix on a backend.
#[derive(Clone, Debug, ExtensionType)]
#[extension_type(fusion: cfg(feature = "cube"))]
pub struct Primitive<B: Backend> {
    /// Words of numbers; then those of packed scales.
    pub numbers: IntTensor<B>,
    /// Table, scales, and what else there is.
    pub floats: FloatTensor<B>,
    /// How the scales are given.
    pub scales: ScaleKind,
    /// Whether products are those of factors in bfloat16.
    pub half: bool,
    /// The shape, and how the numbers lie.
    pub layout: PackedLayout,
}

/// Products with packed matrices. Each method has a body of Burn's own operations; backends replace what pays.
#[backend_extension(
    Cube: cfg(feature = "cube"),
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Fusion: cfg(feature = "cube"),
    Autodiff
)]
pub trait PackedOps: Backend {
    /// The dense matrix `[d_out, d_in]` in f32.
    #[fusion(meta = |packed: &PrimitiveMetadata| TensorSpec::new([packed.layout.d_out, packed.layout.d_in].into(), packed.floats.dtype))]
    fn packed_unpack(#[extension_type] packed: Primitive<Self>) -> FloatTensor<Self> {
        let Primitive { numbers, floats, scales, layout, .. } = packed;
        let places = Floats::of(layout, scales);
        let part = |place: Range<usize>| Self::float_slice(floats.clone(), &[Slice::from(place)]);
        let (words, mut each) = (layout.words(), part(places.scales));
        let words_of = |place: Range<usize>| Self::int_slice(numbers.clone(), &[Slice::from(place)]);
        if scales == ScaleKind::Nested {
            let nested = nested_layout(layout);
            let outer = std::mem::replace(&mut each, part(places.offset));
            let inner = values::<Self>(words_of(words..words + nested.words()), part(places.map), outer, None, nested);
            each = Self::float_add(inner, each);
        }
        let lows = (scales == ScaleKind::Affine).then(|| part(places.lows));
        let dense = values::<Self>(words_of(0..words), part(places.table), each, lows, layout);
        Self::float_reshape(dense, Shape::new([layout.d_out, layout.d_in]))
    }

    /// `x·Wᵀ`, `[rows, d_in]` to `[rows, d_out]`, in the type of `x`.
    #[fusion(meta = |x: &TensorSpec, packed: &PrimitiveMetadata| TensorSpec::new([x.shape[0], packed.layout.d_out].into(), x.dtype))]
    fn packed_linear(x: FloatTensor<Self>, #[extension_type] packed: Primitive<Self>) -> FloatTensor<Self> {
        let weight = dense::<Self>(packed, x.dtype());
        Float::<Self>(x).times_frozen(weight.swap(0, 1)).0
    }

    /// `dy·W`, `[rows, d_out]` to `[rows, d_in]`, in the type of `dy`.
    #[fusion(meta = |grad: &TensorSpec, packed: &PrimitiveMetadata| TensorSpec::new([grad.shape[0], packed.layout.d_in].into(), grad.dtype))]
    fn packed_linear_backward(grad: FloatTensor<Self>, #[extension_type] packed: Primitive<Self>) -> FloatTensor<Self> {
        let weight = dense::<Self>(packed, grad.dtype());
        Float::<Self>(grad).times_frozen(weight).0
    }
}

impl<B: Backend> Primitive<B> {
    /// The type in which a product with a tensor of `dtype` is computed.
    pub(crate) fn product_type(&self, dtype: DType) -> DType {
        if self.half && dtype == DType::F32 { DType::BF16 } else { dtype }
    }
}

/// The matrix in the type of products with tensors of `dtype`.
fn dense<B: PackedOps>(packed: Primitive<B>, dtype: DType) -> Float<B> {
    let dtype = packed.product_type(dtype);
    Float(B::packed_unpack(packed)).cast(dtype)
}

/// The values of packed numbers in one row.
fn values<B: Backend>(
    numbers: IntTensor<B>,
    table: FloatTensor<B>,
    scales: FloatTensor<B>,
    lows: Option<FloatTensor<B>>,
    layout: PackedLayout,
) -> FloatTensor<B> {
    let (blocks, block, words) = (layout.blocks(), layout.block, layout.words());
    let each = 32 / layout.bits;
    let number = |at: usize| {
        // Bytes from the lowest; in each the upper half first.
        let shift = if layout.bits == 4 { 4 * (at ^ 1) } else { 8 * at };
        let shifted = B::bitwise_right_shift_scalar(numbers.clone(), (shift as i64).into());
        let number = B::bitwise_and_scalar(shifted, ((1_i64 << layout.bits) - 1).into());
        B::int_reshape(number, Shape::new([words, 1]))
    };
    let all = B::int_reshape(B::int_cat((0..each).map(number).collect(), 1), Shape::new([words * each]));
    let whole = B::int_slice(all, &[Slice::from(0..blocks * block)]);
    let column = |per_block| B::float_reshape(per_block, Shape::new([blocks, 1]));
    let values = B::float_reshape(B::float_select(table, 0, whole), Shape::new([blocks, block]));
    let mut values = B::float_mul(values, column(scales));
    if let Some(lows) = lows {
        values = B::float_add(values, column(lows));
    }
    B::float_slice(B::float_reshape(values, Shape::new([blocks * block])), &[Slice::from(0..layout.len())])
}

#[cfg(feature = "ndarray")]
impl PackedOps for NdArray {}

#[cfg(all(feature = "flex", target_endian = "big"))]
impl PackedOps for Flex {}

#[cfg(all(feature = "flex", target_endian = "little"))]
impl PackedOps for Flex {
    fn packed_unpack(packed: Primitive<Self>) -> FloatTensor<Self> {
        super::native::unpack(&packed)
    }

    fn packed_linear(x: FloatTensor<Self>, packed: Primitive<Self>) -> FloatTensor<Self> {
        super::native::linear(x, &packed)
    }

    fn packed_linear_backward(grad: FloatTensor<Self>, packed: Primitive<Self>) -> FloatTensor<Self> {
        super::native::linear_backward(grad, &packed)
    }
}

impl<B: PackedOps, C: CheckpointStrategy> PackedOps for Autodiff<B, C> {
    fn packed_unpack(packed: Primitive<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::packed_unpack(without_autodiff(packed)))
    }

    fn packed_linear(x: FloatTensor<Self>, packed: Primitive<Self>) -> FloatTensor<Self> {
        /// Keeps the packed tensors; unpacks again for `dx = dy·W`.
        #[derive(Debug)]
        struct PackedLinear;

        impl<B: PackedOps> Backward<B, 1> for PackedLinear {
            type State = Primitive<B>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
                let [x_node] = ops.parents;
                let grad = grads.consume::<B>(&ops.node);
                give::<B>(grads, x_node.map(|node| node.id), B::packed_linear_backward(grad, ops.state));
            }
        }

        let ((x, x_node), packed) = (x.into_parts(), without_autodiff(packed));
        record(PackedLinear.prepare::<C>([x_node]), |tracked| {
            (B::packed_linear(x, packed.clone()), tracked.then_some(packed))
        })
    }
}

/// The tensors without autodiff.
pub(crate) fn without_autodiff<B: Backend, C: CheckpointStrategy>(packed: Primitive<Autodiff<B, C>>) -> Primitive<B> {
    let Primitive { numbers, floats, scales, half, layout } = packed;
    Primitive { numbers, floats: floats.into_primitive(), scales, half, layout }
}
