//! The path on the CPU where few gates are open: pairs of a row and an expert, and nothing is computed, put together or put in order for any other.

use burn::backend::TensorMetadata as _;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::dense;
use crate::host::dots::dots;
use crate::host::lanes::{add_terms, vectorized};
use crate::host::{Host, Matrix, fill};

/// Pairs whose products with a factor are a piece of work for a thread.
const PAIRS: usize = 64;

/// Columns of a factor that stay in the second cache, however many experts there are, while rows go by.
const COLUMNS: usize = 256;

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
    let ([rows, d_in], d_out) = ([x.shape()[0], x.shape()[1]], b.shape()[1]);
    let pairs = Pairs::new::<B>(&gates, b.shape()[0]);
    let (x, a, b) = (B::values(&x), transposed::<B>(&a), B::values(&b));
    let h = pairs.gated(&pairs.inner(&x, &a, d_in), scale as f32);
    B::tensor(pairs.outer(&h, &b, d_out), Shape::new([rows, d_out]))
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
    let (of_x, of_a, of_b, of_gates) = (x.shape(), a.shape(), b.shape(), gates.shape());
    let pairs = Pairs::new::<B>(&gates, of_b[0]);
    let (grad, x, a, b) = (B::values(&grad), B::values(&x), transposed::<B>(&a), B::values(&b));
    let (d_in, d_out, scale) = (of_x[1], of_b[1], scale as f32);
    let (h, u) = (pairs.inner(&x, &a, d_in), pairs.inner(&grad, &b, d_out));
    let gates_grad = pairs.along(&h, &u, scale);
    let (h, u) = (pairs.gated(&h, scale), pairs.gated(&u, scale));
    let (x_grad, b_grad) = (pairs.outer(&u, &a, d_in), pairs.sums(&h, &grad, d_out));
    let a_grad = Matrix::contiguous(pairs.sums(&u, &x, d_in), of_a[1], d_in);
    let a_grad = B::tensor(a_grad.transposed().by_rows(), of_a);
    (B::tensor(x_grad, of_x), a_grad, B::tensor(b_grad, of_b), B::tensor(gates_grad, of_gates))
}

/// `Aᵀ`, so that the values of an expert lie in rows of their own, as those of `B` do.
fn transposed<B: Host>(a: &FloatTensor<B>) -> Vec<f32> {
    B::matrix(a).transposed().by_rows()
}

/// A row that goes through an expert.
#[derive(Clone, Copy)]
struct Pair {
    row: usize,
    expert: usize,
    gate: f32,
}

struct Pairs {
    /// By expert, then by row.
    pairs: Vec<Pair>,
    /// Where the pairs of each expert begin, and where those of the last end.
    by_expert: Vec<usize>,
    /// The pairs of each row, row by row, by their number.
    of_rows: Vec<usize>,
    /// Where those of each row begin, and where those of the last end.
    by_row: Vec<usize>,
    rank: usize,
    /// Of all gates.
    dims: [usize; 2],
}

impl Pairs {
    /// `inner`: the rank of all experts together.
    fn new<B: Host>(gates: &FloatTensor<B>, inner: usize) -> Self {
        let dims @ [rows, experts] = [gates.shape()[0], gates.shape()[1]];
        let values = B::values(gates);
        let mut by_row = vec![0];
        for row in values.chunks(experts) {
            by_row.push(by_row[by_row.len() - 1] + row.iter().filter(|gate| **gate != 0.0).count());
        }
        let count = by_row[rows];
        let (mut pairs, mut of_rows) = (Vec::with_capacity(count), vec![0; count]);
        let (mut by_expert, mut next) = (vec![0], by_row.clone());
        for expert in 0..experts {
            let open = (0..rows).map(|row| Pair { row, expert, gate: values[row * experts + expert] });
            for pair in open.filter(|pair| pair.gate != 0.0) {
                of_rows[next[pair.row]] = pairs.len();
                next[pair.row] += 1;
                pairs.push(pair);
            }
            by_expert.push(pairs.len());
        }
        Self { pairs, by_expert, of_rows, by_row, rank: inner / experts, dims }
    }

    /// `xᵣ·Mₑᵀ`, `[pairs, rank]`, of `x` `[rows, width]` and `M` `[experts·rank, width]`.
    fn inner(&self, x: &[f32], m: &[f32], width: usize) -> Vec<f32> {
        let rank = self.rank;
        let mut out = vec![0.0; self.pairs.len() * rank];
        let pieces = out.par_chunks_mut(PAIRS * rank).zip(self.pairs.par_chunks(PAIRS));
        pieces.for_each(|(out, pairs)| {
            // Those of one expert at a time.
            let mut out = out.chunks_mut(rank);
            for pairs in pairs.chunk_by(|pair, next| pair.expert == next.expert) {
                let rows: Vec<&[f32]> = pairs.iter().map(|pair| &x[pair.row * width..][..width]).collect();
                let columns: Vec<&[f32]> = m[pairs[0].expert * rank * width..][..rank * width].chunks(width).collect();
                let mut out: Vec<&mut [f32]> = out.by_ref().take(pairs.len()).collect();
                dots(&rows, &columns, |row, column, sum| out[row][column] = sum);
            }
        });
        out
    }

    /// `scale·gₑ·hₑ` of `h` `[pairs, rank]`.
    fn gated(&self, h: &[f32], scale: f32) -> Vec<f32> {
        let pairs = self.pairs.iter().zip(h.chunks(self.rank));
        pairs.flat_map(|(pair, h)| h.iter().map(move |value| scale * pair.gate * value)).collect()
    }

    /// `scale·hₑ·uₑ` where gates are open, `[rows, experts]`.
    fn along(&self, h: &[f32], u: &[f32], scale: f32) -> Vec<f32> {
        let [rows, experts] = self.dims;
        let mut out = vec![0.0; rows * experts];
        for ((pair, h), u) in self.pairs.iter().zip(h.chunks(self.rank)).zip(u.chunks(self.rank)) {
            out[pair.row * experts + pair.expert] = scale * h.iter().zip(u).map(|(h, u)| h * u).sum::<f32>();
        }
        out
    }

    /// `Σₑ hₑ·Mₑ` over each row's experts, `[rows, width]`, of `h` `[pairs, rank]` and `M` `[experts·rank, width]`.
    fn outer(&self, h: &[f32], m: &[f32], width: usize) -> Vec<f32> {
        let ([rows, _], rank) = (self.dims, self.rank);
        let mut out = vec![0.0; rows * width];
        let together = rows.div_ceil(2 * rayon::current_num_threads()).max(1);
        out.par_chunks_mut(together * width).enumerate().for_each(|(piece, out)| {
            for left in (0..width).step_by(COLUMNS) {
                let columns = left..(left + COLUMNS).min(width);
                for (row, out) in (piece * together..).zip(out.chunks_mut(width)) {
                    let out = &mut out[columns.clone()];
                    for at in &self.of_rows[self.by_row[row]..self.by_row[row + 1]] {
                        let (h, first) = (&h[at * rank..][..rank], self.pairs[*at].expert * rank);
                        let term = |j: usize| (h[j], &m[(first + j) * width..][columns.clone()]);
                        vectorized!(add_terms(out, rank, term));
                    }
                }
            }
        });
        out
    }

    /// `Σᵣ hₑᵀ·vᵣ` over each expert's rows, `[experts·rank, width]`, of `h` `[pairs, rank]` and `v` `[rows, width]`.
    fn sums(&self, h: &[f32], v: &[f32], width: usize) -> Vec<f32> {
        let (rank, [_, experts]) = (self.rank, self.dims);
        let mut out = vec![0.0; experts * rank * width];
        fill(&mut out, width, |range, out| {
            for (at, out) in (range.start / width..).zip(out.chunks_mut(width)) {
                let first = self.by_expert[at / rank];
                let pairs = &self.pairs[first..self.by_expert[at / rank + 1]];
                let term = |n: usize| (h[(first + n) * rank + at % rank], &v[pairs[n].row * width..][..width]);
                vectorized!(add_terms(out, pairs.len(), term));
            }
        });
        out
    }
}
