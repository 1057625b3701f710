//! The path on the CPU: rows by expert. A piece of work is up to so many rows of one expert, whose inputs are put together once.

use std::borrow::Cow;
use std::ops::Range;

use burn::backend::TensorMetadata as _;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use crate::host::product::{Threads, Write, product};
use crate::host::{Host, Matrix, fill};

/// Rows of a piece: enough for a product to be fast, few enough for threads to share the work.
const ROWS: usize = 128;

pub(super) fn experts<B: Host>(
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    gates: FloatTensor<B>,
    scale: f64,
) -> FloatTensor<B> {
    let input = Input::new::<B>(&x, &a, &b, &gates, scale);
    let d_out = input.d_out;
    let done: Vec<Vec<f32>> = input.pieces.par_iter().map(|piece| input.forward(piece)).collect();
    B::tensor(input.by_row(&done, d_out), Shape::new([input.rows, d_out]))
}

pub(super) fn experts_factors<B: Host>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    gates: FloatTensor<B>,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let input = Input::new::<B>(&x, &a, &b, &gates, scale);
    let grad = B::values(&grad);
    let done: Vec<(Vec<f32>, Vec<f32>)> = input.pieces.par_iter().map(|piece| input.factors(piece, &grad)).collect();
    let (mut a_grad, mut b_grad) = (vec![0.0; input.a.len()], vec![0.0; input.b.len()]);
    let (rank, inner) = (input.rank, input.rank * input.experts);
    // In the order of the pieces, so that sums are the same however many threads there are.
    for (piece, (a_part, b_part)) in input.pieces.iter().zip(&done) {
        let start = piece.expert * rank;
        let rows = a_grad.chunks_mut(inner).zip(a_part.chunks(rank));
        rows.for_each(|(row, part)| add(&mut row[start..start + rank], part));
        add(&mut b_grad[start * input.d_out..][..b_part.len()], b_part);
    }
    (B::tensor(a_grad, a.shape()), B::tensor(b_grad, b.shape()))
}

pub(super) fn experts_input<B: Host>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    gates: FloatTensor<B>,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let input = Input::new::<B>(&x, &a, &b, &gates, scale);
    let grad = B::values(&grad);
    let (done, by_gate): (Vec<Vec<f32>>, Vec<Vec<f32>>) =
        input.pieces.par_iter().map(|piece| input.inputs(piece, &grad)).unzip();
    let mut gates_grad = vec![0.0; input.rows * input.experts];
    for (piece, values) in input.pieces.iter().zip(&by_gate) {
        for (pair, value) in input.pairs[piece.pairs.clone()].iter().zip(values) {
            gates_grad[pair.row * input.experts + piece.expert] = *value;
        }
    }
    let x_grad = input.by_row(&done, input.d_in);
    (B::tensor(x_grad, x.shape()), B::tensor(gates_grad, gates.shape()))
}

/// A row that goes through an expert.
#[derive(Clone, Copy)]
struct Pair {
    row: usize,
    gate: f32,
}

/// Pairs of one expert.
struct Piece {
    expert: usize,
    pairs: Range<usize>,
}

struct Input<'a> {
    x: Cow<'a, [f32]>,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
    scale: f32,
    rows: usize,
    d_in: usize,
    d_out: usize,
    experts: usize,
    rank: usize,
    /// By expert, then by row.
    pairs: Vec<Pair>,
    pieces: Vec<Piece>,
    /// Where each row's pairs are, as piece and place in it.
    places: Vec<Vec<(usize, usize)>>,
}

impl<'a> Input<'a> {
    fn new<B: Host>(
        x: &'a FloatTensor<B>,
        a: &'a FloatTensor<B>,
        b: &'a FloatTensor<B>,
        gates: &FloatTensor<B>,
        scale: f64,
    ) -> Self {
        let ([rows, d_in], [inner, d_out]) = ([x.shape()[0], x.shape()[1]], [b.shape()[0], b.shape()[1]]);
        let experts = gates.shape()[1];
        let values = B::values(gates);
        let (mut pairs, mut pieces, mut places) = (Vec::new(), Vec::new(), vec![Vec::new(); rows]);
        for expert in 0..experts {
            let start = pairs.len();
            let open = (0..rows).map(|row| Pair { row, gate: values[row * experts + expert] });
            pairs.extend(open.filter(|pair| pair.gate != 0.0));
            for from in (start..pairs.len()).step_by(ROWS) {
                let to = (from + ROWS).min(pairs.len());
                let own = pairs[from..to].iter().enumerate();
                own.for_each(|(at, pair)| places[pair.row].push((pieces.len(), at)));
                pieces.push(Piece { expert, pairs: from..to });
            }
        }
        let (x, a, b) = (B::values(x), B::values(a), B::values(b));
        let rank = inner / experts;
        Self { x, a, b, scale: scale as f32, rows, d_in, d_out, experts, rank, pairs, pieces, places }
    }

    fn pairs_of(&self, piece: &Piece) -> &[Pair] {
        &self.pairs[piece.pairs.clone()]
    }

    /// The rows of a piece, `width` values each, one after the other.
    fn gather<'b>(&self, piece: &Piece, values: &[f32], width: usize) -> Matrix<'b> {
        let pairs = self.pairs_of(piece);
        let mut rows = Vec::with_capacity(pairs.len() * width);
        pairs.iter().for_each(|pair| rows.extend_from_slice(&values[pair.row * width..][..width]));
        Matrix::contiguous(rows, pairs.len(), width)
    }

    /// `Aₑ`, `[d_in, rank]`
    fn down(&self, expert: usize) -> Matrix<'_> {
        Matrix::strided(&self.a[expert * self.rank..], self.d_in, self.rank, self.experts * self.rank)
    }

    /// `Bₑ`, `[rank, d_out]`
    fn up(&self, expert: usize) -> Matrix<'_> {
        Matrix::contiguous(&self.b[expert * self.rank * self.d_out..][..self.rank * self.d_out], self.rank, self.d_out)
    }

    /// `h` `[pairs, rank]` times gates.
    fn gated<'b>(&self, piece: &Piece, h: &Matrix<'_>) -> Matrix<'b> {
        let rows = self.pairs_of(piece).iter().zip(h.values.chunks(self.rank));
        let values: Vec<f32> = rows.flat_map(|(pair, h)| h.iter().map(|value| pair.gate * value)).collect();
        Matrix::contiguous(values, h.rows, h.columns)
    }

    /// `s·gₑ·hₑ·Bₑ`
    fn forward(&self, piece: &Piece) -> Vec<f32> {
        let h = times(&self.gather(piece, &self.x, self.d_in), &self.down(piece.expert), 1.0);
        times(&self.gated(piece, &h), &self.up(piece.expert), self.scale).values.into_owned()
    }

    /// `dAₑ` and `dBₑ`, as far as these rows make them.
    fn factors(&self, piece: &Piece, grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (x, grad) = (self.gather(piece, &self.x, self.d_in), self.gather(piece, grad, self.d_out));
        let h = times(&x, &self.down(piece.expert), 1.0);
        let u = times(&grad, &self.up(piece.expert).transposed(), self.scale);
        let a_grad = times(&x.transposed(), &self.gated(piece, &u), 1.0);
        let b_grad = times(&self.gated(piece, &h).transposed(), &grad, self.scale);
        (a_grad.values.into_owned(), b_grad.values.into_owned())
    }

    /// `gₑ·uₑ·Aₑᵀ` and `hₑ·uₑ`
    fn inputs(&self, piece: &Piece, grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let down = self.down(piece.expert);
        let h = times(&self.gather(piece, &self.x, self.d_in), &down, 1.0);
        let u = times(&self.gather(piece, grad, self.d_out), &self.up(piece.expert).transposed(), self.scale);
        let rows = h.values.chunks(self.rank).zip(u.values.chunks(self.rank));
        let by_gate = rows.map(|(h, u)| h.iter().zip(u).map(|(h, u)| h * u).sum()).collect();
        (times(&self.gated(piece, &u), &down.transposed(), 1.0).values.into_owned(), by_gate)
    }

    /// The sums over each row's experts, `[rows, width]`, of what the pieces made.
    fn by_row(&self, done: &[Vec<f32>], width: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * width];
        fill(&mut out, width, |range, out| {
            for (row, out) in (range.start / width.max(1)..).zip(out.chunks_mut(width.max(1))) {
                self.places[row].iter().for_each(|(piece, at)| add(out, &done[*piece][at * width..][..width]));
            }
        });
        out
    }
}

fn times<'b>(left: &Matrix<'_>, right: &Matrix<'_>, scale: f32) -> Matrix<'b> {
    let mut out = vec![0.0; left.rows * right.columns];
    product((&mut out, right.columns), left, right, scale, Write::Replace, Threads::This);
    Matrix::contiguous(out, left.rows, right.columns)
}

fn add(out: &mut [f32], values: &[f32]) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
}
