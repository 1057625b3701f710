//! The path on the CPU. A piece of work is a tile of queries, of all query heads that share keys, against tiles of the keys in sight.

use std::borrow::Cow;
use std::ops::Range;

use burn::backend::TensorMetadata as _;
use burn::backend::tensor::FloatTensor;
use burn::tensor::Shape;
use rayon::prelude::*;

use super::{Segments, Sight};
use crate::host::lanes::{exp, max, sum, vectorized};
use crate::host::product::{Threads, Write, product};
use crate::host::{Host, Matrix};

/// Tokens of a tile of queries, and of a tile of keys: with all heads of a group, scores stay in the second cache.
const QUERIES: usize = 64;
const KEYS: usize = 128;

/// A score that is hidden; finite, so that a query that sees nothing gives no `NaN`.
const HIDDEN: f32 = f32::MIN / 2.0;

/// Log-sums come in the order of the rows of tiles: by token, then by head of the group.
pub(super) fn attend<B: Host>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    segments: Segments<B>,
    sight: Sight,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let input = Input::new::<B>(&q, &k, &v, segments, sight, scale);
    let Sizes { batch, seq, kv_heads, group, head_dim, .. } = input.sizes;
    let tiles = seq.div_ceil(QUERIES);
    let work: Vec<(usize, usize, Range<usize>)> = (0..batch * kv_heads * tiles)
        .map(|at| {
            let (head, tile) = (at / tiles, at % tiles);
            (head / kv_heads, head % kv_heads, tile * QUERIES..((tile + 1) * QUERIES).min(seq))
        })
        .collect();
    let done: Vec<_> =
        work.par_iter().map(|(batch, head, tokens)| input.forward(*batch, *head, tokens.clone())).collect();
    let mut o = vec![0.0; batch * seq * kv_heads * group * head_dim];
    let mut log_sums = Vec::with_capacity(batch * kv_heads * seq * group);
    for ((batch, head, tokens), (rows, sums)) in work.into_iter().zip(done) {
        scatter(&mut o, batch * seq + tokens.start, kv_heads, head, group * head_dim, &rows);
        log_sums.extend(sums);
    }
    (B::tensor(o, q.shape()), B::tensor(log_sums, Shape::new([batch, kv_heads, seq * group])))
}

#[allow(clippy::too_many_arguments, reason = "what a gradient of attention is made of")]
pub(super) fn attend_backward<B: Host>(
    grad: FloatTensor<B>,
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    o: FloatTensor<B>,
    log_sums: FloatTensor<B>,
    segments: Segments<B>,
    sight: Sight,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let input = Input::new::<B>(&q, &k, &v, segments, sight, scale);
    let Sizes { batch, seq, total, kv_heads, group, head_dim } = input.sizes;
    let output = Output { grad: B::values(&grad), o: B::values(&o), log_sums: B::values(&log_sums) };
    // A head goes to several threads only where there are fewer heads: each has gradients of the keys of its own, to be added up.
    let shares = rayon::current_num_threads().div_ceil((batch * kv_heads).max(1)).min(seq.div_ceil(QUERIES)).max(1);
    let share = seq.div_ceil(shares).next_multiple_of(QUERIES).max(1);
    let work: Vec<_> = (0..batch * kv_heads)
        .flat_map(|at| (0..seq).step_by(share).map(move |start| (at / kv_heads, at % kv_heads, start)))
        .collect();
    let of_share = |(batch, head, start): &(usize, usize, usize)| {
        input.backward(*batch, *head, *start..(start + share).min(seq), &output)
    };
    let done: Vec<_> = work.par_iter().map(of_share).collect();
    let mut q_grad = vec![0.0; input.q.len()];
    let (mut k_grad, mut v_grad) = (vec![0.0; input.k.len()], vec![0.0; input.v.len()]);
    let add = |out: &mut f32, value: &f32| *out += value;
    for ((batch, head, start), (q, k, v)) in work.into_iter().zip(done) {
        scatter(&mut q_grad, batch * seq + start, kv_heads, head, group * head_dim, &q);
        scatter_with(&mut k_grad, batch * total, kv_heads, head, head_dim, &k, add);
        scatter_with(&mut v_grad, batch * total, kv_heads, head, head_dim, &v, add);
    }
    (B::tensor(q_grad, q.shape()), B::tensor(k_grad, k.shape()), B::tensor(v_grad, v.shape()))
}

/// Puts the values of one head, `width` a token from `token` on, among those of all.
fn scatter(out: &mut [f32], token: usize, heads: usize, head: usize, width: usize, values: &[f32]) {
    scatter_with(out, token, heads, head, width, values, |out, value| *out = *value);
}

fn scatter_with(
    out: &mut [f32],
    token: usize,
    heads: usize,
    head: usize,
    width: usize,
    values: &[f32],
    put: impl Fn(&mut f32, &f32),
) {
    let places = out[token * heads * width..].chunks_exact_mut(heads * width);
    for (place, values) in places.zip(values.chunks_exact(width)) {
        place[head * width..(head + 1) * width].iter_mut().zip(values).for_each(|(out, value)| put(out, value));
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    seq: usize,
    total: usize,
    kv_heads: usize,
    /// Query heads that share a head of keys and values.
    group: usize,
    head_dim: usize,
}

struct Input<'a> {
    q: Cow<'a, [f32]>,
    k: Cow<'a, [f32]>,
    v: Cow<'a, [f32]>,
    segments: Option<Vec<i64>>,
    sight: Sight,
    scale: f32,
    sizes: Sizes,
}

/// What the forward pass gave, and the gradient of it.
struct Output<'a> {
    grad: Cow<'a, [f32]>,
    o: Cow<'a, [f32]>,
    log_sums: Cow<'a, [f32]>,
}

impl<'a> Input<'a> {
    fn new<B: Host>(
        q: &'a FloatTensor<B>,
        k: &'a FloatTensor<B>,
        v: &'a FloatTensor<B>,
        segments: Segments<B>,
        sight: Sight,
        scale: f64,
    ) -> Self {
        let [batch, seq, heads, head_dim] = q.shape()[..] else { panic!("four dimensions") };
        let (total, kv_heads) = (k.shape()[1], k.shape()[2]);
        let sizes = Sizes { batch, seq, total, kv_heads, group: heads / kv_heads, head_dim };
        let segments = match segments {
            Segments::One => None,
            Segments::Several(segments) => Some(B::ints(segments)),
        };
        let (q, k, v) = (B::values(q), B::values(k), B::values(v));
        Self { q, k, v, segments, sight, scale: scale as f32, sizes }
    }

    /// Outputs and log-sums of a tile of queries.
    fn forward(&self, batch: usize, head: usize, tokens: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        let Sizes { head_dim, group, .. } = self.sizes;
        let rows = tokens.len() * group;
        let q = self.tile(&self.q, batch, head, &tokens, self.scale);
        let (mut o, mut scores) = (vec![0.0; rows * head_dim], vec![0.0; rows * KEYS]);
        let (mut highest, mut total) = (vec![HIDDEN; rows], vec![0.0; rows]);
        for keys in self.key_tiles(&tokens) {
            let scores = &mut scores[..rows * keys.len()];
            self.scores(batch, head, &tokens, &q, &keys, scores);
            vectorized! {
                for (row, scores) in scores.chunks_exact_mut(keys.len()).enumerate() {
                    let new = max(scores).max(highest[row]);
                    let kept = exp(highest[row] - new);
                    scores.iter_mut().for_each(|score| *score = exp(*score - new));
                    total[row] = total[row] * kept + sum([scores], |[score]| score);
                    if kept != 1.0 {
                        o[row * head_dim..(row + 1) * head_dim].iter_mut().for_each(|o| *o *= kept);
                    }
                    highest[row] = new;
                }
            };
            let p = Matrix::contiguous(&*scores, rows, keys.len());
            product((&mut o, head_dim), &p, &self.rows(&self.v, batch, head, &keys), 1.0, Write::Add, Threads::This);
        }
        for (o, total) in o.chunks_exact_mut(head_dim).zip(&total) {
            o.iter_mut().for_each(|o| *o /= total);
        }
        let log_sums = highest.iter().zip(&total).map(|(highest, total)| highest + total.ln()).collect();
        (o, log_sums)
    }

    /// Gradients of some queries of one head of keys, and what they give to its keys and values.
    fn backward(
        &self,
        batch: usize,
        head: usize,
        share: Range<usize>,
        output: &Output<'_>,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let Sizes { seq, total, kv_heads, group, head_dim, .. } = self.sizes;
        let mut q_grad = vec![0.0; share.len() * group * head_dim];
        let (mut k_grad, mut v_grad) = (vec![0.0; total * head_dim], vec![0.0; total * head_dim]);
        let most = QUERIES.min(seq) * group * KEYS;
        let (mut p, mut p_grad) = (vec![0.0; most], vec![0.0; most]);
        let log_sums = &output.log_sums[(batch * kv_heads + head) * seq * group..][..seq * group];
        for start in share.clone().step_by(QUERIES) {
            let tokens = start..(start + QUERIES).min(share.end);
            let (first, rows) = (start * group, tokens.len() * group);
            let q = self.tile(&self.q, batch, head, &tokens, self.scale);
            let grad = self.tile(&output.grad, batch, head, &tokens, 1.0);
            let o = self.tile(&output.o, batch, head, &tokens, 1.0);
            let along: Vec<f32> = vectorized! {
                let rows = grad.chunks_exact(head_dim).zip(o.chunks_exact(head_dim));
                rows.map(|(grad, o)| sum([grad, o], |[grad, o]| grad * o)).collect()
            };
            let (q, grad) = (Matrix::contiguous(q, rows, head_dim), Matrix::contiguous(grad, rows, head_dim));
            let q_grad = &mut q_grad[(start - share.start) * group * head_dim..][..rows * head_dim];
            for keys in self.key_tiles(&tokens) {
                let (p, p_grad) = (&mut p[..rows * keys.len()], &mut p_grad[..rows * keys.len()]);
                self.scores(batch, head, &tokens, &q.values, &keys, p);
                let (k, v) = (self.rows(&self.k, batch, head, &keys), self.rows(&self.v, batch, head, &keys));
                let own = keys.start * head_dim..keys.end * head_dim;
                product((p_grad, keys.len()), &grad, &v.transposed(), 1.0, Write::Replace, Threads::This);
                vectorized! {
                    let rows = p.chunks_exact_mut(keys.len()).zip(p_grad.chunks_exact_mut(keys.len()));
                    for (row, (p, p_grad)) in rows.enumerate() {
                        let (log_sum, along) = (log_sums[first + row], along[row]);
                        for (p, p_grad) in p.iter_mut().zip(p_grad) {
                            *p = exp(*p - log_sum);
                            *p_grad = *p * (*p_grad - along);
                        }
                    }
                };
                let (p, scores) =
                    (Matrix::contiguous(&*p, rows, keys.len()), Matrix::contiguous(&*p_grad, rows, keys.len()));
                let add = |out: &mut [f32], left: &Matrix<'_>, right: &Matrix<'_>, scale| {
                    product((out, head_dim), left, right, scale, Write::Add, Threads::This);
                };
                add(&mut v_grad[own.clone()], &p.transposed(), &grad, 1.0);
                add(&mut k_grad[own], &scores.transposed(), &q, 1.0);
                add(q_grad, &scores, &k, self.scale);
            }
        }
        (q_grad, k_grad, v_grad)
    }

    /// Rows `[tokens · group, head_dim]` of the query heads that share a head of keys, by token.
    fn tile(&self, x: &[f32], batch: usize, head: usize, tokens: &Range<usize>, scale: f32) -> Vec<f32> {
        let Sizes { seq, kv_heads, group, head_dim, .. } = self.sizes;
        let (token, width) = (kv_heads * group * head_dim, group * head_dim);
        let mut rows = Vec::with_capacity(tokens.len() * width);
        for token in x[(batch * seq + tokens.start) * token..].chunks_exact(token).take(tokens.len()) {
            rows.extend(token[head * width..(head + 1) * width].iter().map(|x| x * scale));
        }
        rows
    }

    /// Rows of keys or values of a head.
    fn rows<'b>(&self, x: &'b [f32], batch: usize, head: usize, keys: &Range<usize>) -> Matrix<'b> {
        let Sizes { total, kv_heads, head_dim, .. } = self.sizes;
        let start = ((batch * total + keys.start) * kv_heads + head) * head_dim;
        Matrix::strided(&x[start..], keys.len(), head_dim, kv_heads * head_dim)
    }

    /// The tiles of keys that a query of a tile sees one of.
    fn key_tiles(&self, tokens: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let (first, last) = (self.seen(tokens.start), self.seen(tokens.end - 1));
        let (prefix, end) = (self.sight.prefix, last.end.max(self.sight.prefix));
        let tiles = (0..end).step_by(KEYS).map(move |start| start..(start + KEYS).min(end));
        tiles.filter(move |keys| keys.start < prefix || keys.end > first.start)
    }

    /// The keys that a token sees beside the prefix.
    fn seen(&self, token: usize) -> Range<usize> {
        let Sizes { seq, total, .. } = self.sizes;
        let at = total - seq + token;
        let start = self.sight.window.map_or(0, |window| (at + 1).saturating_sub(window));
        start..if self.sight.causal { at + 1 } else { total }
    }

    /// `q·kᵀ`, hidden where a token does not see a key.
    fn scores(
        &self,
        batch: usize,
        head: usize,
        tokens: &Range<usize>,
        q: &[f32],
        keys: &Range<usize>,
        out: &mut [f32],
    ) {
        let Sizes { seq, total, group, head_dim, .. } = self.sizes;
        let q = Matrix::strided(q, tokens.len() * group, head_dim, head_dim);
        let k = self.rows(&self.k, batch, head, keys);
        product((out, keys.len()), &q, &k.transposed(), 1.0, Write::Replace, Threads::This);
        let past = total - seq;
        let segments = self.segments.as_ref().map(|segments| &segments[batch * seq..(batch + 1) * seq]);
        for (token, rows) in tokens.clone().zip(out.chunks_exact_mut(group * keys.len())) {
            let seen = self.seen(token);
            if segments.is_none() && seen.start <= keys.start && keys.end <= seen.end {
                continue;
            }
            let sees = |key: usize| {
                let near = key < self.sight.prefix || seen.contains(&key);
                near && segments.is_none_or(|segments| key < past || segments[key - past] == segments[token])
            };
            for row in rows.chunks_exact_mut(keys.len()) {
                row.iter_mut().zip(keys.clone()).filter(|(_, key)| !sees(*key)).for_each(|(score, _)| *score = HIDDEN);
            }
        }
    }
}
