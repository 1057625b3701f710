//! Matrices of packed numbers on a device, and the product with them.
//!
//! - value: `w = table[q]·scale`, or `table[q]·scale + low` where blocks have a smallest value
//! - scale: one for each block of values in row-major order; packed itself with double quantisation, `scale = map[q']·scale' + offset`
//! - product: `y = x·Wᵀ`, its gradient `dx = dy·W`; the weight has none
//! - source: Dettmers et al. 2023, arXiv:2305.14314, section 3

#[cfg(feature = "cube")]
mod cube;
// It takes words for bytes.
#[cfg(all(feature = "flex", target_endian = "little"))]
mod native;
mod ops;
#[cfg(all(feature = "flex", target_endian = "little"))]
mod unpack;

use std::borrow::Cow;
use std::ops::Range;

use burn::backend::Dispatch;
use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub(crate) use ops::without_autodiff;
pub use ops::{PackedOps, Primitive};

/// Values of a block of packed scales.
pub(crate) const NESTED_BLOCK: usize = 256;

/// Shape of a packed matrix, and how its numbers lie.
///
/// In a [`PackedMatrix`] it is a field that says to every [`ModuleVisitor`](burn::module::ModuleVisitor) which matrix the parameters beside it stand for: it enters a
/// container whose name [`PackedLayout::announced`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackedLayout {
    /// Rows: output features.
    pub d_out: usize,
    /// Columns: input features.
    pub d_in: usize,
    /// Bits of a number, 4 or 8.
    pub bits: usize,
    /// Values that share a scale. Blocks run along rows and over their ends; the last may be short.
    pub block: usize,
}

impl PackedLayout {
    /// Number of values.
    ///
    /// # Panics
    /// When there are more than this machine can count.
    pub fn len(&self) -> usize {
        self.d_out.checked_mul(self.d_in).expect("a matrix that can be counted")
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.len().div_ceil(self.block)
    }

    /// Words of 32 bits that hold the numbers of whole blocks.
    fn words(&self) -> usize {
        (self.blocks() * self.block).div_ceil(32 / self.bits)
    }

    /// The layout that a visitor was told by entering `container`.
    pub fn announced(container: &str) -> Option<Self> {
        let mut numbers = container.strip_prefix(ANNOUNCED)?.split(' ').map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Self { d_out: next()?, d_in: next()?, bits: next()?, block: next()? })
    }
}

const ANNOUNCED: &str = "Packed:";

crate::marker_module!(PackedLayout, |layout| {
    let PackedLayout { d_out, d_in, bits, block } = layout;
    format!("{ANNOUNCED}{d_out} {d_in} {bits} {block}")
});

/// A packed matrix in memory, as files hold it.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedData {
    /// The shape, and how the numbers lie.
    pub layout: PackedLayout,
    /// Numbers; of 4 bits two to a byte, the first in the upper half.
    pub bytes: Vec<u8>,
    /// Value of each number.
    pub table: Cow<'static, [f32]>,
    /// Scale of each block.
    pub scales: BlockScales,
}

/// The scales of a packed matrix in memory.
#[derive(Clone, Debug, PartialEq)]
pub enum BlockScales {
    /// One for each block.
    Plain(Vec<f32>),
    /// And a smallest value for each block.
    Affine {
        /// One for each block.
        scales: Vec<f32>,
        /// One for each block.
        lows: Vec<f32>,
    },
    /// Packed themselves: `map[number]·scale + offset`.
    Nested {
        /// One for each block.
        numbers: Vec<u8>,
        /// Value of each number.
        map: Cow<'static, [f32]>,
        /// One for each 256 blocks.
        scales: Vec<f32>,
        /// What is added to each scale.
        offset: f32,
    },
}

/// A packed matrix `[d_out, d_in]` on a device: what a frozen linear layer multiplies by.
///
/// It is an ordinary module: it moves with the model, is recorded with it, and takes part in no optimizer step.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use peft_kernels::{BlockScales, PackedData, PackedLayout, PackedMatrix};
///
/// // Two rows of two values; 4 bits each, the first of a pair in the upper half of a byte.
/// let data = PackedData {
///     layout: PackedLayout { d_out: 2, d_in: 2, bits: 4, block: 4 },
///     bytes: vec![0x9a, 0x78],
///     table: (0..16).map(|q| q as f32 - 8.0).collect(),
///     scales: BlockScales::Plain(vec![0.5]),
/// };
/// let weight = PackedMatrix::new(data, &Device::flex());
/// let y = weight.linear(Tensor::<2>::from_floats([[1.0, 10.0]], &Device::flex()));
/// assert_eq!(y.into_data().try_to_vec::<f32>()?, [0.5 + 10.0, -0.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Module, Debug)]
pub struct PackedMatrix {
    /// Eight numbers of 4 bits to a word: its bytes from the lowest, in each the upper half first. Or four of 8 bits. Then, in words of their own, those
    /// of packed scales.
    numbers: Param<Tensor<1, Int>>,
    /// All that is added and multiplied, in the order of [`Floats`]: a tensor more would take more room than what it holds.
    floats: Param<Tensor<1>>,
    #[module(skip)]
    scales: ScaleKind,
    /// Whether products are those of factors in bfloat16.
    #[module(skip)]
    half: bool,
    layout: PackedLayout,
}

/// How the scales of a matrix are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// One for each block.
    Plain,
    /// And a smallest value for each block.
    Affine,
    /// Packed in blocks of 256.
    Nested,
}

impl BlockScales {
    fn kind(&self) -> ScaleKind {
        match self {
            Self::Plain(_) => ScaleKind::Plain,
            Self::Affine { .. } => ScaleKind::Affine,
            Self::Nested { .. } => ScaleKind::Nested,
        }
    }
}

/// Where the parts of a matrix's floats lie, one after the other; absent ones are empty.
#[derive(Clone, Debug)]
pub(crate) struct Floats {
    /// Value of each number.
    pub(crate) table: Range<usize>,
    /// One for each block, or for each 256 blocks when they are packed.
    pub(crate) scales: Range<usize>,
    /// Smallest value of each block.
    pub(crate) lows: Range<usize>,
    /// Value of each number of a packed scale.
    pub(crate) map: Range<usize>,
    /// What is added to each packed scale: one value.
    pub(crate) offset: Range<usize>,
}

impl Floats {
    pub(crate) fn of(layout: PackedLayout, scales: ScaleKind) -> Self {
        let (blocks, mut end) = (layout.blocks(), 0);
        let mut next = |count: usize| {
            let start = end;
            end += count;
            start..end
        };
        let (count, lows, map, offset) = match scales {
            ScaleKind::Plain => (blocks, 0, 0, 0),
            ScaleKind::Affine => (blocks, blocks, 0, 0),
            ScaleKind::Nested => (nested_layout(layout).blocks(), 0, MAP, 1),
        };
        Self {
            table: next(1 << layout.bits),
            scales: next(count),
            lows: next(lows),
            map: next(map),
            offset: next(offset),
        }
    }
}

/// Values of a map of 8 bits.
const MAP: usize = 256;

impl PackedMatrix {
    /// Puts a packed matrix on `device`, without autodiff.
    ///
    /// # Panics
    /// When a part has not the length that the layout asks for, `bits` is neither 4 nor 8, or the table has more values than numbers.
    pub fn new(data: PackedData, device: &Device) -> Self {
        let PackedData { layout, bytes, table, scales } = data;
        let device = &device.clone().without_autodiff();
        let kind = scales.kind();
        let places = Floats::of(layout, kind);
        let nested = (kind == ScaleKind::Nested).then(|| nested_layout(layout));
        // Exact room, for a tensor keeps what its values came in.
        let mut words = Vec::with_capacity(layout.words() + nested.map_or(0, |nested| nested.words()));
        push_words(&mut words, layout, &bytes);
        let mut floats = vec![0.0; places.offset.end];
        let mut put = |what: &str, place: Range<usize>, values: &[f32], all: bool| {
            let fits = if all { values.len() == place.len() } else { values.len() <= place.len() };
            assert!(fits, "{what} of {layout:?}: {} values for {}", values.len(), place.len());
            floats[place][..values.len()].copy_from_slice(values);
        };
        // A number that stands for no value stands for zero.
        put("table", places.table, &table, false);
        match scales {
            BlockScales::Plain(scales) => put("scales", places.scales, &scales, true),
            BlockScales::Affine { scales, lows } => {
                put("scales", places.scales, &scales, true);
                put("smallest values", places.lows, &lows, true);
            }
            BlockScales::Nested { numbers, map, scales, offset } => {
                push_words(&mut words, nested_layout(layout), &numbers);
                put("scales of scales", places.scales, &scales, true);
                put("map", places.map, &map, false);
                put("offset", places.offset, &[offset], true);
            }
        }
        let (word_count, float_count) = (words.len(), floats.len());
        let numbers = Tensor::from_data(TensorData::new(words, [word_count]), (device, DType::U32));
        let floats = Tensor::from_data(TensorData::new(floats, [float_count]), (device, DType::F32));
        Self {
            numbers: Param::initialized(ParamId::new(), numbers),
            floats: Param::initialized(ParamId::new(), floats).set_require_grad(false),
            scales: kind,
            half: false,
            layout,
        }
    }

    /// The same matrix, but products round both factors to bfloat16 and add up in f32: what QLoRA calls the compute type. Few rows, bound by reading the
    /// matrix, may still be multiplied in f32.
    #[must_use]
    pub fn in_bf16(self) -> Self {
        Self { half: true, ..self }
    }

    /// The shape, and how the numbers lie.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Bytes that the packed tensors take on the device.
    pub fn bytes(&self) -> usize {
        4 * (self.numbers.dims()[0] + self.floats.dims()[0])
    }

    /// `x·Wᵀ`, computed in the type of `x`. The weight is unpacked inside the operation, piece by piece where the backend allows it, and again
    /// in its gradient: nothing dense is kept.
    ///
    /// # Shapes
    /// `[rows, d_in]` to `[rows, d_out]`
    ///
    /// # Panics
    /// When `x` has another width, or lives on a backend that this crate was not built for.
    pub fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        assert_eq!(x.dims()[1], self.layout.d_in, "packed linear: width of the input");
        Tensor::from_dispatch(<Dispatch as PackedOps>::packed_linear(x.into_dispatch(), self.primitive()))
    }

    /// The dense matrix `[d_out, d_in]` in f32.
    pub fn unpack(&self) -> Tensor<2> {
        Tensor::from_dispatch(<Dispatch as PackedOps>::packed_unpack(self.primitive()))
    }

    pub(crate) fn primitive(&self) -> Primitive<Dispatch> {
        // Constants of every graph, whatever device the model was moved to.
        Primitive {
            numbers: self.numbers.val().without_autodiff().into_dispatch(),
            floats: self.floats.val().without_autodiff().into_dispatch(),
            scales: self.scales,
            half: self.half,
            layout: self.layout,
        }
    }
}

/// How the scales of a matrix are packed.
pub(crate) fn nested_layout(layout: PackedLayout) -> PackedLayout {
    PackedLayout { d_out: 1, d_in: layout.blocks(), bits: 8, block: NESTED_BLOCK }
}

fn push_words(words: &mut Vec<u32>, layout: PackedLayout, bytes: &[u8]) {
    let PackedLayout { bits, .. } = layout;
    assert!(bits == 4 || bits == 8, "numbers of 4 or 8 bits, not {bits}");
    assert_eq!(bytes.len(), layout.len().div_ceil(8 / bits), "bytes of {layout:?}");
    let word = |four: &[u8]| {
        let mut word = [0; 4];
        word[..four.len()].copy_from_slice(four);
        u32::from_le_bytes(word)
    };
    let end = words.len() + layout.words();
    words.extend(bytes.chunks(4).map(word));
    words.resize(end, 0);
}
