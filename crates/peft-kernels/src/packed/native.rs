//! The path on the CPU: a thread unpacks a tile of the weight into room of its own and multiplies it at once.
#![allow(unsafe_code, reason = "products into disjoint columns of one output, by a library that takes pointers")]

use burn::backend::tensor::FloatTensor;
use burn::backend::{Flex, ops::FloatTensorOps as _};
use burn::tensor::{DType, Shape};
use burn_flex::FlexTensor;
use half::bf16;
use rayon::prelude::*;

use super::unpack::{Scales, View};
use super::{Floats, PackedLayout, Primitive, ScaleKind};
use crate::host::Matrix;
use crate::host::bfloat::{self, Runs};
use crate::host::product::{Columns, Threads, UNIT, Write, each_part, multiply};

/// Values of a tile: with the packed copy that the product makes, it stays in the second cache.
const TILE: usize = 64 * 1024;

/// Up to this number of rows, a product is bound by reading the weight, and each row of it is unpacked and used at once.
const FEW_ROWS: usize = 4;

/// Parts of a large product for each thread, so that none waits for long. A product of few rows has one: it is over sooner than a thread is woken twice.
const PARTS: usize = 2;

/// The dense matrix `[d_out, d_in]`.
pub(super) fn unpack(packed: &Primitive<Flex>) -> FloatTensor<Flex> {
    with_view(packed, |view| {
        let PackedLayout { d_out, d_in, .. } = view.layout();
        let mut out = FlexTensor::zeros(Shape::new([d_out, d_in]), DType::F32);
        let tile = (TILE / d_in.max(1)).max(1) * d_in.max(1);
        let tiles = out.storage_mut::<f32>().par_chunks_mut(tile).enumerate();
        tiles.for_each(|(at, out)| view.unpack(at * tile, out));
        out
    })
}

/// `x·Wᵀ`.
pub(super) fn linear(x: FloatTensor<Flex>, packed: &Primitive<Flex>) -> FloatTensor<Flex> {
    let PackedLayout { d_out, d_in, .. } = packed.layout;
    let product = match x.layout().shape()[0] {
        ..=FEW_ROWS => few_rows,
        _ if packed.half => half_linear,
        _ => tiles,
    };
    in_f32(x, packed, d_in, d_out, product)
}

/// `dy·W`.
pub(super) fn linear_backward(grad: FloatTensor<Flex>, packed: &Primitive<Flex>) -> FloatTensor<Flex> {
    let PackedLayout { d_out, d_in, .. } = packed.layout;
    in_f32(grad, packed, d_out, d_in, if packed.half { half_backward } else { backward_tiles })
}

/// A product of `x` `[rows, inner]`, computed in f32, into `[rows, width]` of its type.
fn in_f32(
    x: FlexTensor,
    packed: &Primitive<Flex>,
    inner: usize,
    width: usize,
    product: impl Fn(&[f32], usize, &View<'_>, &mut [f32]),
) -> FlexTensor {
    let (rows, dtype) = (x.layout().shape()[0], x.dtype());
    assert_eq!(x.layout().shape()[..], [rows, inner], "packed product: shape of the input");
    let x = cast(x, DType::F32).to_contiguous();
    let mut out = FlexTensor::zeros(Shape::new([rows, width]), DType::F32);
    if rows > 0 {
        with_view(packed, |view| product(x.storage(), rows, view, out.storage_mut()));
    }
    cast(out, dtype)
}

fn cast(tensor: FlexTensor, dtype: DType) -> FlexTensor {
    if tensor.dtype() == dtype { tensor } else { Flex::float_cast(tensor, dtype.into()) }
}

/// Each row of the weight against the few rows of `x`.
fn few_rows(x: &[f32], _rows: usize, view: &View<'_>, out: &mut [f32]) {
    let PackedLayout { d_out, d_in, .. } = view.layout();
    let target = Columns { out: out.as_mut_ptr(), stride: d_out };
    let x = view.arranged(x);
    each_part(d_out, view.layout().len(), 1, |part| {
        let mut room = vec![0.0; d_in];
        for o in part {
            // SAFETY: `o` is in this part only, and both are in range.
            view.products(o, &x, &mut room, |row, sum| unsafe { target.at(row, o).write(sum) });
        }
    });
}

/// `out[:, o] = x·W[o, :]ᵀ` for tiles of rows of the weight.
fn tiles(x: &[f32], rows: usize, view: &View<'_>, out: &mut [f32]) {
    let PackedLayout { d_out, d_in, .. } = view.layout();
    let target = Columns { out: out.as_mut_ptr(), stride: d_out };
    let most = match TILE / d_in.max(1) {
        most @ ..UNIT => most.max(1),
        most => most / UNIT * UNIT,
    };
    let x = Matrix::contiguous(x, rows, d_in);
    each_part(d_out, view.layout().len(), PARTS, |part| {
        let mut tile = vec![0.0; most.min(part.len()) * d_in];
        for start in part.clone().step_by(most) {
            let count = most.min(part.end - start);
            let tile = &mut tile[..count * d_in];
            view.unpack(start * d_in, tile);
            let tile = Matrix::contiguous(&*tile, count, d_in);
            // SAFETY: the columns `start..start + count` are in this part only.
            unsafe { multiply(target.at(0, start), d_out, &x, &tile.transposed(), 1.0, Write::Replace, Threads::This) };
        }
    });
}

/// `out[:, i] = Σ dy[:, o]·W[o, i]`: a thread has columns of its own and goes through tiles of rows, adding up.
fn backward_tiles(grad: &[f32], rows: usize, view: &View<'_>, out: &mut [f32]) {
    let PackedLayout { d_out, d_in, .. } = view.layout();
    let target = Columns { out: out.as_mut_ptr(), stride: d_in };
    each_part(d_in, view.layout().len(), PARTS, |part| {
        let width = part.len();
        let most = (TILE / width.max(1)).clamp(1, d_out.max(1));
        let mut tile = vec![0.0; most * width];
        for start in (0..d_out).step_by(most) {
            let count = most.min(d_out - start);
            for (o, row) in tile[..count * width].chunks_exact_mut(width.max(1)).enumerate() {
                view.unpack((start + o) * d_in + part.start, row);
            }
            let grad = Matrix::strided(&grad[start..], rows, count, d_out);
            let tile = Matrix::contiguous(&tile[..count * width], count, width);
            let write = if start == 0 { Write::Replace } else { Write::Add };
            // SAFETY: the columns of `part` are in this part only.
            unsafe { multiply(target.at(0, part.start), d_in, &grad, &tile, 1.0, write, Threads::This) };
        }
    });
}

/// `x·Wᵀ` of factors in bfloat16.
fn half_linear(x: &[f32], rows: usize, view: &View<'_>, out: &mut [f32]) {
    let PackedLayout { d_out, d_in, .. } = view.layout();
    let read = |start: usize, out: &mut [bf16]| unpack_half(view, start, out);
    let weight = Runs { rows: d_in, columns: d_out, row: 1, column: d_in, read: &read };
    bfloat::product(out, &Matrix::contiguous(x, rows, d_in), &weight);
}

/// `dy·W` of factors in bfloat16.
fn half_backward(grad: &[f32], rows: usize, view: &View<'_>, out: &mut [f32]) {
    let PackedLayout { d_out, d_in, .. } = view.layout();
    let read = |start: usize, out: &mut [bf16]| unpack_half(view, start, out);
    let weight = Runs { rows: d_out, columns: d_in, row: d_in, column: 1, read: &read };
    bfloat::product(out, &Matrix::contiguous(grad, rows, d_out), &weight);
}

/// The values from `start` on, rounded.
fn unpack_half(view: &View<'_>, start: usize, out: &mut [bf16]) {
    const ROOM: usize = 256;
    let mut room = [0.0; ROOM];
    for (at, out) in out.chunks_mut(ROOM).enumerate() {
        let room = &mut room[..out.len()];
        view.unpack(start + at * ROOM, room);
        bfloat::round(room, out);
    }
}

/// Shows the packed tensors as slices.
fn with_view<T>(packed: &Primitive<Flex>, work: impl FnOnce(&View<'_>) -> T) -> T {
    let (numbers, floats) = (packed.numbers.to_contiguous(), packed.floats.to_contiguous());
    let (bytes, floats) = (numbers.bytes(), floats.storage::<f32>());
    let Floats { table, scales, lows, map, offset } = Floats::of(packed.layout, packed.scales);
    let scales = &floats[scales];
    let scales = match packed.scales {
        ScaleKind::Plain => Scales::Plain(scales),
        ScaleKind::Affine => Scales::Affine { scales, lows: &floats[lows] },
        ScaleKind::Nested => {
            let bytes = &bytes[4 * packed.layout.words()..];
            Scales::Nested { bytes, map: &floats[map], scales, offset: floats[offset][0] }
        }
    };
    work(&View::new(bytes, &floats[table], scales, packed.layout))
}
