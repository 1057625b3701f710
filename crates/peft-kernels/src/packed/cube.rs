//! Kernels for CubeCL's backends: one that unpacks, feeding the backend's own matrix product; and one that multiplies few rows while it unpacks,
//! which decoding a token at a time is.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::tensor::FloatTensor;
use burn::cubecl;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;

use crate::cube::{MOST_CUBES, UNITS, sum_of_group};

use super::{Floats, PackedLayout, PackedOps, Primitive, ScaleKind, nested_layout};
use crate::formula;

/// Up to this number of rows the weight is unpacked in the product itself: it is bound by reading the weight.
const FEW_ROWS: usize = 4;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    bits: usize,
    block: usize,
    affine: bool,
    /// Whether something is added to every value.
    offset: bool,
}

/// Where a kernel finds what it needs, counted from the beginning of its tensors.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Places {
    /// Of the numbers.
    words: u32,
    table: u32,
    scales: u32,
    lows: u32,
    offset: u32,
}

/// Number `i` of a word, at place `at` of the matrix, as the value it stands for.
#[cube]
fn value(
    word: u32,
    i: usize,
    at: usize,
    floats: &Tensor<f32>,
    scales: &Tensor<f32>,
    places: &Places,
    #[comptime] kind: Kind,
) -> f32 {
    let mut number = word >> (8u32 * i as u32) & 255u32;
    if comptime!(kind.bits == 4) {
        // Bytes from the lowest; in each the upper half first.
        number = word >> (4u32 * (i as u32 ^ 1u32)) & 15u32;
    }
    let block = at / kind.block;
    let mut value = floats[(places.table + number) as usize] * scales[places.scales as usize + block];
    if comptime!(kind.affine) {
        value += scales[places.lows as usize + block];
    }
    if comptime!(kind.offset) {
        value += floats[places.offset as usize];
    }
    value
}

/// A thread unpacks a word.
#[cube(launch)]
fn unpack_kernel<F: Float>(
    numbers: &Tensor<u32>,
    floats: &Tensor<f32>,
    scales: &Tensor<f32>,
    output: &mut Tensor<F>,
    places: &Places,
    words: u32,
    #[comptime] kind: Kind,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < words as usize {
        let word = numbers[places.words as usize + ABSOLUTE_POS];
        let each = comptime!(32 / kind.bits);
        #[unroll]
        for i in 0..each {
            let at = ABSOLUTE_POS * each + i;
            if at < output.len() {
                output[at] = F::cast_from(value(word, i, at, floats, scales, places, kind));
            }
        }
    }
}

/// A group of threads computes one value: each goes through words of the row, then their sums are added up.
#[cube(launch)]
fn few_rows_kernel<F: Float>(
    x: &Tensor<F>,
    numbers: &Tensor<u32>,
    floats: &Tensor<f32>,
    scales: &Tensor<f32>,
    output: &mut Tensor<F>,
    places: &Places,
    d_in: u32,
    d_out: u32,
    #[comptime] kind: Kind,
    #[define(F)] _dtype: ElemType,
) {
    let (o, row) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let (d_in, unit) = (d_in as usize, UNIT_POS_X as usize);
    let each = comptime!(32 / kind.bits);
    let words = d_in / each;
    let mut sum = 0.0f32;
    let mut at = unit;
    while at < words {
        let word = numbers[o * words + at];
        #[unroll]
        for i in 0..each {
            let column = at * each + i;
            let weight = value(word, i, o * d_in + column, floats, scales, places, kind);
            sum += f32::cast_from(x[row * d_in + column]) * weight;
        }
        at += comptime!(UNITS);
    }
    let sum = sum_of_group(sum);
    if unit == 0 {
        output[row * d_out as usize + o] = F::cast_from(sum);
    }
}

impl PackedOps for CubeBackend {
    fn packed_unpack(packed: Primitive<Self>) -> FloatTensor<Self> {
        Flat::of(packed).unpack(DType::F32)
    }

    fn packed_linear(x: FloatTensor<Self>, packed: Primitive<Self>) -> FloatTensor<Self> {
        let dtype = packed.product_type(x.dtype);
        let packed = Flat::of(packed);
        if packed.takes_few_rows(&x) {
            packed.few_rows(x)
        } else {
            let weight = formula::Float::<Self>(packed.unpack(dtype));
            formula::Float(x).times_frozen(weight.swap(0, 1)).0
        }
    }

    fn packed_linear_backward(grad: FloatTensor<Self>, packed: Primitive<Self>) -> FloatTensor<Self> {
        let dtype = packed.product_type(grad.dtype);
        let weight = formula::Float(Flat::of(packed).unpack(dtype));
        formula::Float::<Self>(grad).times_frozen(weight).0
    }
}

/// A packed matrix with a scale in f32 for each block: packed scales are unpacked, which takes a fraction of the matrix.
struct Flat {
    numbers: CubeTensor,
    floats: CubeTensor,
    scales: CubeTensor,
    layout: PackedLayout,
    places: Places,
    kind: Kind,
}

impl Flat {
    fn of(packed: Primitive<CubeBackend>) -> Self {
        let Primitive { numbers, floats, scales, layout, .. } = packed;
        let (numbers, floats) = (into_contiguous(numbers), into_contiguous(floats));
        let found = Floats::of(layout, scales);
        let start = |place: std::ops::Range<usize>| place.start as u32;
        let places = Places {
            words: 0,
            table: 0,
            scales: start(found.scales),
            lows: start(found.lows),
            offset: start(found.offset),
        };
        let flat = |scales, layout: PackedLayout, places, affine, offset| Self {
            numbers: numbers.clone(),
            floats: floats.clone(),
            scales,
            layout,
            places,
            kind: Kind { bits: layout.bits, block: layout.block, affine, offset },
        };
        match scales {
            ScaleKind::Plain => flat(floats.clone(), layout, places, false, false),
            ScaleKind::Affine => flat(floats.clone(), layout, places, true, false),
            ScaleKind::Nested => {
                let inner = Places { words: layout.words() as u32, table: start(found.map), ..places };
                let scales = flat(floats.clone(), nested_layout(layout), inner, false, true).unpack(DType::F32);
                flat(scales, layout, Places { scales: 0, ..places }, false, false)
            }
        }
    }

    /// The dense matrix in that type.
    fn unpack(self, dtype: DType) -> CubeTensor {
        let (kind, PackedLayout { d_out, d_in, .. }) = (self.kind, self.layout);
        let client = self.numbers.client.clone();
        // A backend may pad rows unless it is told not to, and the kernel counts without.
        let output = empty_device_contiguous_dtype(
            client.clone(),
            self.numbers.device.clone(),
            Shape::new([d_out, d_in]),
            dtype,
        );
        let words = self.layout.words();
        let cube_dim = CubeDim::new(&client, words);
        unpack_kernel::launch(
            &client,
            calculate_cube_count_elemwise(&client, words, cube_dim),
            cube_dim,
            self.numbers.into_tensor_arg(),
            self.floats.into_tensor_arg(),
            self.scales.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            self.places.launch(),
            words as u32,
            kind,
            dtype_to_storage_type(dtype),
        );
        output
    }

    /// Whether the product is one for [`few_rows_kernel`]: it needs rows of whole words.
    fn takes_few_rows(&self, x: &CubeTensor) -> bool {
        let PackedLayout { d_out, d_in, bits, .. } = self.layout;
        x.meta.shape()[0] <= FEW_ROWS && d_in % (32 / bits) == 0 && d_out <= MOST_CUBES
    }

    fn few_rows(self, x: CubeTensor) -> CubeTensor {
        let (kind, PackedLayout { d_out, d_in, .. }) = (self.kind, self.layout);
        let (rows, dtype, client) = (x.meta.shape()[0], x.dtype, x.client.clone());
        let output = empty_device_contiguous_dtype(client.clone(), x.device.clone(), Shape::new([rows, d_out]), dtype);
        few_rows_kernel::launch(
            &client,
            CubeCount::Static(d_out as u32, rows as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            into_contiguous(x).into_tensor_arg(),
            self.numbers.into_tensor_arg(),
            self.floats.into_tensor_arg(),
            self.scales.into_tensor_arg(),
            output.clone().into_tensor_arg(),
            self.places.launch(),
            d_in as u32,
            d_out as u32,
            kind,
            dtype_to_storage_type(dtype),
        );
        output
    }
}

impl Places {
    fn launch(self) -> PlacesLaunch {
        let Self { words, table, scales, lows, offset } = self;
        PlacesLaunch::new(words, table, scales, lows, offset)
    }
}
