//! Matrices of packed numbers on a device, and the product with them.
//!
//! - value: `w = table[q]·scale`, or `table[q]·scale + low` where blocks have a smallest value
//! - scale: one for each block of values in row-major order; packed itself with double quantisation, `scale = map[q']·scale' + offset`
//! - product: `y = x·Wᵀ`, its gradient `dx = dy·W`; the weight has none
//! - source: Dettmers et al. 2023, arXiv:2305.14314, section 3

#[cfg(feature = "cube")]
mod cube;
#[cfg(feature = "flex")]
mod native;
mod ops;
#[cfg(feature = "flex")]
mod unpack;

use std::borrow::Cow;

use burn::backend::Dispatch;
use burn::module::{
    Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor, Param, ParamId,
};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use ops::{PackedOps, Primitive, ScalesPrimitive};

/// Values of a block of packed scales.
pub(crate) const NESTED_BLOCK: usize = 256;

/// Shape of a packed matrix, and how its numbers lie.
///
/// In a [`PackedMatrix`] it is a field that says to every [`ModuleVisitor`] which matrix the parameters beside it stand for: it enters a
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
    pub fn len(&self) -> usize {
        self.d_out * self.d_in
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

    /// The layout that a [`ModuleVisitor`] was told by entering `container`.
    pub fn announced(container: &str) -> Option<Self> {
        let mut numbers = container.strip_prefix(ANNOUNCED)?.split(' ').map(str::parse);
        let mut next = || numbers.next()?.ok();
        Some(Self { d_out: next()?, d_in: next()?, bits: next()?, block: next()? })
    }
}

const ANNOUNCED: &str = "Packed:";

impl Module for PackedLayout {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        let Self { d_out, d_in, bits, block } = self;
        let container = format!("{ANNOUNCED}{d_out} {d_in} {bits} {block}");
        visitor.enter_module("", &container);
        visitor.exit_module("", &container);
    }

    fn map<M: ModuleMapper>(self, _mapper: &mut M) -> Self {
        self
    }

    fn to_device(self, _device: &Device) -> Self {
        self
    }

    fn fork(self, _device: &Device) -> Self {
        self
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn materialize(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        *self
    }

    fn train(self) -> Self {
        self
    }
}

impl ModuleDisplayDefault for PackedLayout {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&format!("{self:?}")).optional()
    }
}

impl ModuleDisplay for PackedLayout {}

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

/// Scales that are packed themselves, on a device.
#[derive(Module, Debug)]
pub struct Nested {
    /// One byte for each scale, four to a word, the first in the lowest.
    numbers: Param<Tensor<1, Int>>,
    /// Value of each number.
    map: Param<Tensor<1>>,
    offset: f32,
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
    /// Eight numbers of 4 bits to a word: its bytes from the lowest, in each the upper half first. Or four of 8 bits.
    numbers: Param<Tensor<1, Int>>,
    /// Value of each number.
    table: Param<Tensor<1>>,
    /// One for each block, or for each 256 blocks when `nested`.
    scales: Param<Tensor<1>>,
    /// Smallest value of each block.
    lows: Option<Param<Tensor<1>>>,
    nested: Option<Nested>,
    layout: PackedLayout,
}

impl PackedMatrix {
    /// Puts a packed matrix on `device`, without autodiff.
    ///
    /// # Panics
    /// When a part has not the length that the layout asks for, or `bits` is neither 4 nor 8.
    pub fn new(data: PackedData, device: &Device) -> Self {
        let PackedData { layout, bytes, table, scales } = data;
        let device = &device.clone().without_autodiff();
        let (mut lows, mut nested) = (None, None);
        let scales = match scales {
            BlockScales::Plain(scales) => constant(&scales, layout.blocks(), device),
            BlockScales::Affine { scales, lows: smallest } => {
                lows = Some(constant(&smallest, layout.blocks(), device));
                constant(&scales, layout.blocks(), device)
            }
            BlockScales::Nested { numbers: bytes, map, scales, offset } => {
                let statistics = nested_layout(layout);
                let map = constant(&map, map.len(), device);
                nested = Some(Nested { numbers: numbers(statistics, &bytes, device), map, offset });
                constant(&scales, statistics.blocks(), device)
            }
        };
        let table = constant(&table, table.len(), device);
        Self { numbers: numbers(layout, &bytes, device), table, scales, lows, nested, layout }
    }

    /// The shape, and how the numbers lie.
    pub fn layout(&self) -> PackedLayout {
        self.layout
    }

    /// Bytes that the packed tensors take on the device, the table of the code apart, which is the same for every weight.
    pub fn bytes(&self) -> usize {
        let floats = |tensor: &Param<Tensor<1>>| 4 * tensor.dims()[0];
        let nested = |nested: &Nested| 4 * nested.numbers.dims()[0] + size_of::<f32>();
        4 * self.numbers.dims()[0]
            + floats(&self.scales)
            + self.lows.as_ref().map_or(0, floats)
            + self.nested.as_ref().map_or(0, nested)
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

    fn primitive(&self) -> Primitive<Dispatch> {
        // A constant of every graph, whatever device the model was moved to.
        let float = |tensor: &Param<Tensor<1>>| tensor.val().without_autodiff().into_dispatch();
        let int = |tensor: &Param<Tensor<1, Int>>| tensor.val().without_autodiff().into_dispatch();
        let scales = float(&self.scales);
        let scales = match (&self.nested, &self.lows) {
            (Some(Nested { numbers, map, offset }), _) => {
                ScalesPrimitive::Nested { numbers: int(numbers), map: float(map), scales, offset: *offset }
            }
            (None, Some(lows)) => ScalesPrimitive::Affine { scales, lows: float(lows) },
            (None, None) => ScalesPrimitive::Plain { scales },
        };
        Primitive { numbers: int(&self.numbers), table: float(&self.table), scales, layout: self.layout }
    }
}

/// How the scales of a matrix are packed.
pub(crate) fn nested_layout(layout: PackedLayout) -> PackedLayout {
    PackedLayout { d_out: 1, d_in: layout.blocks(), bits: 8, block: NESTED_BLOCK }
}

fn numbers(layout: PackedLayout, bytes: &[u8], device: &Device) -> Param<Tensor<1, Int>> {
    let PackedLayout { bits, .. } = layout;
    assert!(bits == 4 || bits == 8, "numbers of 4 or 8 bits, not {bits}");
    assert_eq!(bytes.len(), layout.len().div_ceil(8 / bits), "bytes of {layout:?}");
    let word = |four: &[u8]| {
        let mut word = [0; 4];
        word[..four.len()].copy_from_slice(four);
        u32::from_le_bytes(word)
    };
    let mut words: Vec<u32> = bytes.chunks(4).map(word).collect();
    words.resize(layout.words(), 0);
    let length = words.len();
    Param::initialized(ParamId::new(), Tensor::from_data(TensorData::new(words, [length]), (device, DType::U32)))
}

fn constant(values: &[f32], expected: usize, device: &Device) -> Param<Tensor<1>> {
    assert_eq!(values.len(), expected, "values of a packed matrix");
    Param::initialized(ParamId::new(), Tensor::from_data(values, (device, DType::F32))).set_require_grad(false)
}
