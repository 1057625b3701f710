//! Kernels in f32, without tensor cores: what matters is that scores never reach memory.

mod kernels;

use burn::backend::ops::{FloatTensorOps as _, IntTensorOps as _};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::prelude::{CubeCount, CubeDim};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use self::kernels::{Kind, SizesLaunch, forward_kernel, key_kernel, query_kernel};
use super::{Segments, Sight, plain};
use crate::cube::{MOST_CUBES, UNITS, empty};
use crate::formula::Float;

/// Values of a tile of keys, and as many of values, in shared memory: together half of what every device has.
const TILE: usize = 1024;

/// Wider heads would not fit into what a thread keeps to itself.
const WIDEST: usize = 256;

pub(super) fn attend(
    q: FloatTensor<CubeBackend>,
    k: FloatTensor<CubeBackend>,
    v: FloatTensor<CubeBackend>,
    segments: Segments<CubeBackend>,
    sight: Sight,
    scale: f64,
) -> (FloatTensor<CubeBackend>, FloatTensor<CubeBackend>) {
    let Some(attention) = Attention::new(&q, &k, &segments, sight) else {
        return plain::attend::<CubeBackend>(q, k, v, segments, sight, scale);
    };
    let (client, rows) = (q.client.clone(), attention.rows());
    let o = empty(&q, dims(&q), DType::F32);
    let log_sums = empty(&q, [attention.batch, attention.kv_heads, rows], DType::F32);
    forward_kernel::launch(
        &client,
        attention.groups(rows),
        CubeDim::new_1d(UNITS as u32),
        into_contiguous(q).into_tensor_arg(),
        into_contiguous(k).into_tensor_arg(),
        into_contiguous(v).into_tensor_arg(),
        attention.segments.clone().into_tensor_arg(),
        o.clone().into_tensor_arg(),
        log_sums.clone().into_tensor_arg(),
        attention.sizes(),
        scale as f32,
        attention.kind,
    );
    (o, log_sums)
}

#[allow(clippy::too_many_arguments, reason = "what a gradient of attention is made of")]
pub(super) fn attend_backward(
    grad: FloatTensor<CubeBackend>,
    q: FloatTensor<CubeBackend>,
    k: FloatTensor<CubeBackend>,
    v: FloatTensor<CubeBackend>,
    o: FloatTensor<CubeBackend>,
    log_sums: FloatTensor<CubeBackend>,
    segments: Segments<CubeBackend>,
    sight: Sight,
    scale: f64,
) -> (FloatTensor<CubeBackend>, FloatTensor<CubeBackend>, FloatTensor<CubeBackend>) {
    let Some(attention) = Attention::new(&q, &k, &segments, sight) else {
        return plain::attend_backward::<CubeBackend>(grad, q, k, v, o, log_sums, segments, sight, scale);
    };
    let (client, shape) = (q.client.clone(), dims(&k));
    let stats = attention.stats(grad.clone(), o, log_sums);
    let q_grad = empty(&q, dims(&q), DType::F32);
    let grads = empty(&q, [2, shape.iter().product()], DType::F32);
    let [grad, q, k, v] = [grad, q, k, v].map(into_contiguous);
    query_kernel::launch(
        &client,
        attention.groups(attention.rows()),
        CubeDim::new_1d(UNITS as u32),
        grad.clone().into_tensor_arg(),
        q.clone().into_tensor_arg(),
        k.clone().into_tensor_arg(),
        v.clone().into_tensor_arg(),
        stats.clone().into_tensor_arg(),
        attention.segments.clone().into_tensor_arg(),
        q_grad.clone().into_tensor_arg(),
        attention.sizes(),
        scale as f32,
        attention.kind,
    );
    key_kernel::launch(
        &client,
        attention.groups(attention.total),
        CubeDim::new_1d(UNITS as u32),
        grad.into_tensor_arg(),
        q.into_tensor_arg(),
        k.into_tensor_arg(),
        v.into_tensor_arg(),
        stats.into_tensor_arg(),
        attention.segments.clone().into_tensor_arg(),
        grads.clone().into_tensor_arg(),
        attention.sizes(),
        scale as f32,
        attention.kind,
    );
    let part = |at: usize| {
        let part = CubeBackend::float_slice(grads.clone(), &[Slice::from(at..at + 1), Slice::full()]);
        CubeBackend::float_reshape(part, Shape::new(shape))
    };
    (q_grad, part(0), part(1))
}

/// One attention, ready for its kernels.
struct Attention {
    batch: usize,
    seq: usize,
    total: usize,
    heads: usize,
    kv_heads: usize,
    sight: Sight,
    kind: Kind,
    /// `[batch, seq]`, or anything where the kernels do not look.
    segments: CubeTensor,
}

impl Attention {
    /// `None` for a shape that the kernels are not for.
    fn new(q: &CubeTensor, k: &CubeTensor, segments: &Segments<CubeBackend>, sight: Sight) -> Option<Self> {
        let ([batch, seq, heads, head_dim], [_, total, kv_heads, _]) = (dims(q), dims(k));
        let longest = (seq * heads / kv_heads.max(1)).max(total);
        let grid = (batch * kv_heads).max(longest.div_ceil(UNITS));
        if q.meta.shape().num_elements() == 0 || head_dim > WIDEST || grid > MOST_CUBES {
            return None;
        }
        let kind = Kind {
            head_dim,
            tile: (TILE / head_dim).min(32),
            causal: sight.causal,
            window: sight.window.is_some(),
            segmented: matches!(segments, Segments::Several(_)),
        };
        let segments = match segments {
            Segments::One => empty(q, [1], DType::I32),
            Segments::Several(segments) => into_contiguous(CubeBackend::int_cast(segments.clone(), DType::I32.into())),
        };
        Some(Self { batch, seq, total, heads, kv_heads, sight, kind, segments })
    }

    /// Queries that share a head of keys.
    fn rows(&self) -> usize {
        self.heads / self.kv_heads * self.seq
    }

    /// A thread for each of `count` rows or keys of every head of keys.
    fn groups(&self, count: usize) -> CubeCount {
        CubeCount::Static(count.div_ceil(UNITS) as u32, (self.batch * self.kv_heads) as u32, 1)
    }

    fn sizes(&self) -> SizesLaunch {
        // More keys than there are, in a window or a prefix, are all keys; so no number is too large.
        let keys = |count: usize| count.min(self.total) as u32;
        let Sight { window, prefix, .. } = self.sight;
        let (seq, heads, kv_heads) = (self.seq as u32, self.heads as u32, self.kv_heads as u32);
        SizesLaunch::new(seq, self.total as u32, heads, kv_heads, keys(window.unwrap_or(0)), keys(prefix))
    }

    /// `L`, then `Σ do·o`, by rows.
    fn stats(&self, grad: CubeTensor, o: CubeTensor, log_sums: CubeTensor) -> CubeTensor {
        let Self { batch, seq, heads, kv_heads, .. } = *self;
        let along = (Float::<CubeBackend>(grad) * Float(o)).sum(3);
        let folded = along.reshape([batch, seq, kv_heads, heads / kv_heads]).swap(1, 2);
        let shape = [1, batch, kv_heads, self.rows()];
        let both = [Float::<CubeBackend>(log_sums).reshape(shape), folded.reshape(shape)].map(|stat| stat.0);
        into_contiguous(CubeBackend::float_cat(both.into(), 0))
    }
}

fn dims(x: &CubeTensor) -> [usize; 4] {
    x.meta.shape()[..].try_into().expect("four dimensions")
}
