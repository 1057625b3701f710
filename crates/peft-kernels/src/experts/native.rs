//! The path on the CPU: rows by expert. A piece of work is up to so many rows of one expert, whose inputs are put together once.

use std::borrow::Cow;
use std::ops::Range;

use burn::backend::TensorMetadata as _;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::dense;
use crate::host::product::{Threads, new_product};
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
    if dense::pays::<B>(&gates) {
        return dense::experts::<B>(x, a, b, gates, scale);
    }
    let input = Input::new::<B>(&x, &a, &b, &gates, scale);
    let d_out = input.d_out;
    let done: Vec<Vec<f32>> = input.pieces.par_iter().map(|piece| input.forward(piece)).collect();
    let by_piece: Vec<&[f32]> = done.iter().map(Vec::as_slice).collect();
    B::tensor(input.by_row(&by_piece, d_out), Shape::new([input.rows, d_out]))
}

pub(super) fn experts_backward<B: Host>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    gates: FloatTensor<B>,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    if dense::pays::<B>(&gates) {
        return dense::experts_backward::<B>(grad, x, a, b, gates, scale);
    }
    let input = Input::new::<B>(&x, &a, &b, &gates, scale);
    let values = B::values(&grad);
    let done: Vec<Grads> = input.pieces.par_iter().map(|piece| input.backward(piece, &values)).collect();
    let (rank, inner) = (input.rank, input.rank * input.experts);
    let [mut a_grad, mut b_grad] = [&input.a, &input.b].map(|factor| vec![0.0; factor.len()]);
    let mut gates_grad = vec![0.0; input.rows * input.experts];
    // In the order of the pieces, so that sums are the same however many threads there are.
    for (piece, grads) in input.pieces.iter().zip(&done) {
        let start = piece.expert * rank;
        let rows = a_grad.chunks_mut(inner).zip(grads.a.chunks(rank));
        rows.for_each(|(row, part)| add(&mut row[start..start + rank], part));
        add(&mut b_grad[start * input.d_out..][..grads.b.len()], &grads.b);
        for (pair, value) in input.pairs_of(piece).iter().zip(&grads.gates) {
            gates_grad[pair.row * input.experts + piece.expert] = *value;
        }
    }
    let by_piece: Vec<&[f32]> = done.iter().map(|grads| &grads.x[..]).collect();
    let x_grad = B::tensor(input.by_row(&by_piece, input.d_in), x.shape());
    (x_grad, B::tensor(a_grad, a.shape()), B::tensor(b_grad, b.shape()), B::tensor(gates_grad, gates.shape()))
}

/// What the pairs of a piece make of the gradients.
struct Grads {
    /// `gₑ·uₑ·Aₑᵀ`, `[pairs, d_in]`
    x: Vec<f32>,
    /// `[d_in, rank]`
    a: Vec<f32>,
    /// `[rank, d_out]`
    b: Vec<f32>,
    /// `hₑ·uₑ`, `[pairs]`
    gates: Vec<f32>,
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
    /// Where pairs are, as piece and place in it, by row.
    places: Vec<(usize, usize)>,
    /// Where the places of each row begin, and where those of the last end.
    starts: Vec<usize>,
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
        let mut starts = vec![0];
        for row in values.chunks(experts) {
            starts.push(starts[starts.len() - 1] + row.iter().filter(|gate| **gate != 0.0).count());
        }
        let count = starts[rows];
        let (mut pairs, mut pieces, mut places) = (Vec::with_capacity(count), Vec::new(), vec![(0, 0); count]);
        let mut next = starts.clone();
        for expert in 0..experts {
            let start = pairs.len();
            let open = (0..rows).map(|row| Pair { row, gate: values[row * experts + expert] });
            pairs.extend(open.filter(|pair| pair.gate != 0.0));
            for from in (start..pairs.len()).step_by(ROWS) {
                let to = (from + ROWS).min(pairs.len());
                for (at, pair) in pairs[from..to].iter().enumerate() {
                    places[next[pair.row]] = (pieces.len(), at);
                    next[pair.row] += 1;
                }
                pieces.push(Piece { expert, pairs: from..to });
            }
        }
        let (x, a, b) = (B::values(x), B::values(a), B::values(b));
        let rank = inner / experts;
        Self { x, a, b, scale: scale as f32, rows, d_in, d_out, experts, rank, pairs, pieces, places, starts }
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

    fn backward(&self, piece: &Piece, grad: &[f32]) -> Grads {
        let (x, grad) = (self.gather(piece, &self.x, self.d_in), self.gather(piece, grad, self.d_out));
        let (down, up) = (self.down(piece.expert), self.up(piece.expert));
        let h = times(&x, &down, 1.0);
        let u = times(&grad, &up.transposed(), self.scale);
        let rows = h.values.chunks(self.rank).zip(u.values.chunks(self.rank));
        let gates = rows.map(|(h, u)| h.iter().zip(u).map(|(h, u)| h * u).sum()).collect();
        let u = self.gated(piece, &u);
        Grads {
            x: times(&u, &down.transposed(), 1.0).values.into_owned(),
            a: times(&x.transposed(), &u, 1.0).values.into_owned(),
            b: times(&self.gated(piece, &h).transposed(), &grad, self.scale).values.into_owned(),
            gates,
        }
    }

    /// The sums over each row's experts, `[rows, width]`, of what the pieces made.
    fn by_row(&self, done: &[&[f32]], width: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * width];
        fill(&mut out, width, |range, out| {
            for (row, out) in (range.start / width.max(1)..).zip(out.chunks_mut(width.max(1))) {
                let places = &self.places[self.starts[row]..self.starts[row + 1]];
                places.iter().for_each(|(piece, at)| add(out, &done[*piece][at * width..][..width]));
            }
        });
        out
    }
}

fn times<'b>(left: &Matrix<'_>, right: &Matrix<'_>, scale: f32) -> Matrix<'b> {
    Matrix::contiguous(new_product(left, right, scale, Threads::This), left.rows, right.columns)
}

fn add(out: &mut [f32], values: &[f32]) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
}
