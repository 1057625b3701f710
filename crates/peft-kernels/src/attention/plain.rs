//! Bodies of Burn's operations. They go by chunks of queries: the scores of a chunk exist for as long as it is computed.

use std::ops::Range;

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, TensorMetadata as _, get_or_init_device_settings};
use burn::tensor::{DType, Shape, Slice};

use super::{Segments, Sight};
use crate::formula::Float;

/// What is hidden; finite, so that a query that sees nothing gives no `NaN`.
const HIDDEN: f32 = f32::MIN / 2.0;

/// Scores of a chunk: 64 MiB of them, but never so few queries that a product would be a small one.
const CHUNK: usize = 1 << 24;
const FEWEST_QUERIES: usize = 64;

pub(super) fn attend<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    segments: Segments<B>,
    sight: Sight,
    scale: f64,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (mut outputs, mut sums) = (Vec::new(), Vec::new());
    for chunk in chunks::<B>(&q, &k) {
        let heads = Heads::of::<B>(&q, &k, &chunk);
        let q = Float::<B>(q.clone()).narrow(1, chunk);
        let (dtype, shape) = (q.dtype(), [heads.batch, heads.kv_heads, heads.group, heads.seq]);
        let scores = heads.scores::<B>(q, k.clone(), segments.clone(), sight, scale);
        let highest = scores.clone().max(3);
        let e = (scores - highest.clone()).exp();
        let total = e.clone().sum(3);
        sums.push((total.clone().log() + highest).reshape(shape));
        let o = (e / total).cast(dtype).matmul(Heads::keys::<B>(v.clone()));
        outputs.push(heads.unfold(o));
    }
    let log_sums = joined(sums, 3);
    let [batch, kv_heads, group, seq] = dims::<B>(&log_sums.0);
    (joined(outputs, 1).0, log_sums.reshape([batch, kv_heads, group * seq]).0)
}

#[allow(clippy::too_many_arguments, reason = "what a gradient of attention is made of")]
pub(super) fn attend_backward<B: Backend>(
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
    let (mut q_grads, mut of_keys) = (Vec::new(), None);
    let ([_, seq, ..], dtype) = (dims::<B>(&q), q.dtype());
    for chunk in chunks::<B>(&q, &k) {
        let heads = Heads::of::<B>(&q, &k, &chunk);
        let Heads { batch, kv_heads, group, .. } = heads;
        let part = |x: &FloatTensor<B>| Float::<B>(x.clone()).narrow(1, chunk.clone());
        let log_sums = Float::<B>(log_sums.clone()).reshape([batch, kv_heads, group, seq]).narrow(3, chunk.clone());
        let log_sums = log_sums.reshape([batch, kv_heads, heads.rows(), 1]);
        let p = (heads.scores::<B>(part(&q), k.clone(), segments.clone(), sight, scale) - log_sums).exp();
        let (grad, o) = (heads.fold(part(&grad)), heads.fold(part(&o)));
        let along = (grad.clone() * o).sum(3).cast(p.dtype());
        let v_grad = p.clone().cast(dtype).swap(2, 3).matmul(grad.clone());
        let p_grad = grad.matmul(Heads::keys::<B>(v.clone()).swap(2, 3)).cast(p.dtype());
        let score_grad = ((p_grad - along) * p * scale).cast(dtype);
        q_grads.push(heads.unfold(score_grad.clone().matmul(Heads::keys::<B>(k.clone()))));
        let k_grad = score_grad.swap(2, 3).matmul(heads.fold(part(&q)));
        of_keys = Some(match of_keys {
            None => (k_grad, v_grad),
            Some((k_sum, v_sum)) => (k_sum + k_grad, v_sum + v_grad),
        });
    }
    let (k_grad, v_grad) = of_keys.expect("a chunk at least");
    (joined(q_grads, 1).0, k_grad.swap(1, 2).0, v_grad.swap(1, 2).0)
}

/// The queries of each chunk; one chunk of none when there are none.
fn chunks<B: Backend>(q: &FloatTensor<B>, k: &FloatTensor<B>) -> impl Iterator<Item = Range<usize>> + use<B> {
    let ([batch, seq, heads, _], [_, total, ..]) = (dims::<B>(q), dims::<B>(k));
    let most = (CHUNK / (batch * heads * total).max(1)).max(FEWEST_QUERIES);
    (0..seq.max(1)).step_by(most).map(move |start| start..(start + most).min(seq))
}

/// Chunks one after the other.
fn joined<B: Backend>(mut chunks: Vec<Float<B>>, dim: usize) -> Float<B> {
    if chunks.len() == 1 {
        return chunks.swap_remove(0);
    }
    Float(B::float_cat(chunks.into_iter().map(|chunk| chunk.0).collect(), dim))
}

/// The sizes of a chunk of one attention.
#[derive(Clone, Copy)]
struct Heads {
    batch: usize,
    /// Queries of the chunk.
    seq: usize,
    /// The first of them.
    start: usize,
    /// Keys before the first query of all.
    past: usize,
    total: usize,
    kv_heads: usize,
    /// Query heads that share a head of keys and values.
    group: usize,
    head_dim: usize,
}

impl Heads {
    fn of<B: Backend>(q: &FloatTensor<B>, k: &FloatTensor<B>, chunk: &Range<usize>) -> Self {
        let ([batch, seq, heads, head_dim], [_, total, kv_heads, _]) = (dims::<B>(q), dims::<B>(k));
        let (past, group) = (total - seq, heads / kv_heads);
        Self { batch, seq: chunk.len(), start: chunk.start, past, total, kv_heads, group, head_dim }
    }

    fn rows(&self) -> usize {
        self.group * self.seq
    }

    /// `[batch, seq, heads, head_dim]` to `[batch, kv_heads, group · seq, head_dim]`: so keys and values are never repeated.
    fn fold<B: Backend>(&self, x: Float<B>) -> Float<B> {
        x.swap(1, 2).reshape([self.batch, self.kv_heads, self.rows(), self.head_dim])
    }

    /// The reverse of [`fold`](Self::fold).
    fn unfold<B: Backend>(&self, x: Float<B>) -> Float<B> {
        x.reshape([self.batch, self.kv_heads * self.group, self.seq, self.head_dim]).swap(1, 2)
    }

    /// `[batch, total, kv_heads, head_dim]` to `[batch, kv_heads, total, head_dim]`
    fn keys<B: Backend>(k: FloatTensor<B>) -> Float<B> {
        Float(k).swap(1, 2)
    }

    /// Scaled scores `[batch, kv_heads, group · seq, total]` in f32 at least.
    fn scores<B: Backend>(
        &self,
        q: Float<B>,
        k: FloatTensor<B>,
        segments: Segments<B>,
        sight: Sight,
        scale: f64,
    ) -> Float<B> {
        let Self { batch, seq, total, kv_heads, group, .. } = *self;
        let hidden = self.hidden::<B>(&q.0, segments, sight);
        let scores = (self.fold(q) * scale).matmul(Self::keys::<B>(k).swap(2, 3));
        let scores = if scores.dtype() == DType::F64 { scores } else { scores.cast(DType::F32) };
        let Some(hidden) = hidden else { return scores };
        let hidden = B::bool_expand(hidden, Shape::new([batch, kv_heads * group, seq, total]));
        let each = scores.reshape([batch, kv_heads * group, seq, total]);
        each.fill(hidden, HIDDEN).reshape([batch, kv_heads, group * seq, total])
    }

    /// `[1 or batch, 1, seq, total]`, true where a query does not see; nothing when all see all.
    fn hidden<B: Backend>(&self, q: &FloatTensor<B>, segments: Segments<B>, sight: Sight) -> Option<BoolTensor<B>> {
        let Self { batch, seq, start, past, total, .. } = *self;
        let device = q.device();
        let settings = get_or_init_device_settings::<B>(&device);
        let (bools, ints) = (settings.bool_dtype, settings.int_dtype);
        let range = |from: usize, count: usize, shape: [usize; 4]| {
            let numbers = B::int_arange(from as i64..(from + count) as i64, &device, ints);
            let shape = B::int_reshape(numbers, Shape::new(shape));
            B::int_expand(shape, Shape::new([1, 1, seq, total]))
        };
        let queries = || range(past + start, seq, [1, 1, seq, 1]);
        let keys = || range(0, total, [1, 1, 1, total]);
        let or = |left: Option<BoolTensor<B>>, right| match left {
            Some(left) => Some(B::bool_or(left, right)),
            None => Some(right),
        };
        let mut hidden: Option<BoolTensor<B>> = None;
        if sight.causal && past + start + 1 < total {
            hidden = or(hidden, B::int_greater(keys(), queries(), bools));
        }
        if let Some(window) = sight.window {
            let back = B::int_add_scalar(keys(), (window as i64).into());
            hidden = or(hidden, B::int_lower_equal(back, queries(), bools));
        }
        if sight.prefix > 0 {
            let after = B::int_greater_equal_elem(keys(), (sight.prefix as i64).into(), bools);
            hidden = hidden.map(|hidden| B::bool_and(hidden, after));
        }
        if let Segments::Several(segments) = segments {
            let before = B::int_full(Shape::new([batch, past]), (-1_i64).into(), &device, segments.dtype().into());
            let keys_of = if past == 0 { segments.clone() } else { B::int_cat(vec![before, segments.clone()], 1) };
            let place = |tensor, shape: [usize; 4]| {
                B::int_expand(B::int_reshape(tensor, Shape::new(shape)), Shape::new([batch, 1, seq, total]))
            };
            let own = B::int_slice(segments, &[Slice::full(), Slice::from(start..start + seq)]);
            let (queries, keys) = (place(own, [batch, 1, seq, 1]), place(keys_of, [batch, 1, 1, total]));
            let other = B::int_not_equal(queries, keys.clone(), bools);
            // What was there before belongs to everybody.
            let mask = B::bool_and(other, B::int_greater_equal_elem(keys, 0.into(), bools));
            let hidden_here = hidden.map(|hidden| B::bool_expand(hidden, mask.shape()));
            return or(hidden_here, mask);
        }
        hidden
    }
}

fn dims<B: Backend>(x: &FloatTensor<B>) -> [usize; 4] {
    x.shape()[..].try_into().expect("four dimensions")
}
