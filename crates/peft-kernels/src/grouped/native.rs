//! The path on the CPU. A piece of work is up to so many rows of one expert times some columns of the result.

use std::ops::Range;

use burn::backend::TensorMetadata as _;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::{Groups, Side};
use crate::host::product::{Threads, Write, product};
use crate::host::{Host, Matrix, fill};

/// Rows of a piece: enough for a product to be fast, few enough for threads to share the work.
const ROWS: usize = 128;

/// Values of a weight in a piece: a row alone is worth a thread's time.
const VALUES: usize = 1 << 19;

pub(super) fn grouped<B: Host>(
    x: FloatTensor<B>,
    weights: FloatTensor<B>,
    groups: Groups,
    side: Side,
) -> FloatTensor<B> {
    let [experts, d_out, d_in] = [0, 1, 2].map(|dim| weights.shape()[dim]);
    let weights = B::float_reshape(weights, Shape::new([experts * d_out, d_in]));
    let (factor, values) = (B::factor(&weights), B::values(&x));
    let (from, width) = if side == Side::Out { (d_in, d_out) } else { (d_out, d_in) };
    let (pieces, parts) = (Piece::all(&groups), columns(from, width));
    let work: Vec<(&Piece<'_>, &Range<usize>)> =
        pieces.iter().flat_map(|piece| parts.iter().map(move |part| (piece, part))).collect();
    let done: Vec<Vec<f32>> = work
        .into_par_iter()
        .map(|(piece, part)| {
            let (x, first) = (gather(piece.rows, &values, from), piece.expert * d_out);
            match side {
                Side::Out => factor.block(first + part.start..first + part.end, 0..d_in).transposed().applied_to(&x),
                Side::In => factor.block(first..first + d_out, part.clone()).applied_to(&x),
            }
        })
        .collect();
    let mut places = vec![(0, 0); groups.order.len()];
    for (at, piece) in pieces.iter().enumerate() {
        piece.rows.iter().enumerate().for_each(|(place, row)| places[*row] = (at, place));
    }
    let mut out = vec![0.0; places.len() * width];
    fill(&mut out, width, |range, out| {
        for (row, out) in (range.start / width.max(1)..).zip(out.chunks_mut(width.max(1))) {
            let (piece, place) = places[row];
            for (part, done) in parts.iter().zip(&done[piece * parts.len()..]) {
                out[part.clone()].copy_from_slice(&done[place * part.len()..][..part.len()]);
            }
        }
    });
    B::tensor(out, Shape::new([places.len(), width]))
}

pub(super) fn grouped_weights<B: Host>(grad: FloatTensor<B>, x: FloatTensor<B>, groups: Groups) -> FloatTensor<B> {
    let (experts, [d_out, d_in]) = (groups.starts.len() - 1, [grad.shape()[1], x.shape()[1]]);
    let (grad, x) = (B::values(&grad), B::values(&x));
    let mut out = vec![0.0; experts * d_out * d_in];
    out.par_chunks_mut((d_out * d_in).max(1)).enumerate().for_each(|(expert, out)| {
        let rows = &groups.order[groups.starts[expert]..groups.starts[expert + 1]];
        let (grad, x) = (gather(rows, &grad, d_out), gather(rows, &x, d_in));
        product((out, d_in), &grad.transposed(), &x, 1.0, Write::Replace, Threads::All);
    });
    B::tensor(out, Shape::new([experts, d_out, d_in]))
}

/// Rows of one expert.
struct Piece<'a> {
    expert: usize,
    rows: &'a [usize],
}

impl<'a> Piece<'a> {
    fn all(groups: &'a Groups) -> Vec<Self> {
        let pieces = |(expert, range): (usize, Range<usize>)| {
            groups.order[range].chunks(ROWS).map(move |rows| Self { expert, rows })
        };
        groups.active().flat_map(pieces).collect()
    }
}

/// The columns of each piece, of `width` in all that are sums of `from` products.
fn columns(from: usize, width: usize) -> Vec<Range<usize>> {
    let size = (VALUES / from.max(1)).next_multiple_of(16).max(16);
    (0..width).step_by(size).map(|start| start..(start + size).min(width)).collect()
}

/// Rows of `width` values each, one after the other.
fn gather<'a>(rows: &[usize], values: &[f32], width: usize) -> Matrix<'a> {
    let mut out = Vec::with_capacity(rows.len() * width);
    rows.iter().for_each(|row| out.extend_from_slice(&values[row * width..][..width]));
    Matrix::contiguous(out, rows.len(), width)
}
