//! Causal attention over grouped heads, with a key-value cache, packed rows and sliding windows; and the rotary embedding.

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::config::{Rope, RopeScaling};

/// How the tokens of a batch lie in its rows.
#[derive(Clone, Copy, Debug, Default)]
pub enum Layout<'a> {
    /// One sequence a row, from the left. Padding on the right needs no mask: no real token sees it.
    #[default]
    Rows,
    /// Several sequences a row, which do not see each other.
    Packed {
        /// `[batch][seq]`: which sequence of the row a token belongs to.
        segments: &'a [Vec<u32>],
        /// `[batch][seq]`: the token's place in its sequence.
        positions: &'a [Vec<u32>],
    },
}

/// What every block of one forward pass shares.
#[derive(Clone, Debug)]
pub(crate) struct Pass {
    /// `[1 or batch, 1, seq, head_dim / 2]`
    cos: Tensor<4>,
    sin: Tensor<4>,
    /// For blocks that see everything, and for blocks with a window.
    masks: Vec<(Option<usize>, Option<Tensor<4, Bool>>)>,
}

impl Pass {
    /// Prepares `seq` new tokens after `past` cached ones.
    pub(crate) fn new(
        layout: Layout<'_>,
        past: usize,
        seq: usize,
        rope: Option<(&Rope, usize)>,
        windows: &[Option<usize>],
        device: &Device,
    ) -> Self {
        let device = &device.clone().without_autodiff();
        let plain: Vec<u32> = (past..past + seq).map(|p| p as u32).collect();
        let rows: &[Vec<u32>] = match layout {
            Layout::Rows => std::slice::from_ref(&plain),
            Layout::Packed { positions, .. } => positions,
        };
        let frequencies = rope.map(|(rope, head_dim)| rope.frequencies(head_dim)).unwrap_or_default();
        let angles = || rows.iter().flatten().flat_map(|p| frequencies.iter().map(move |f| f64::from(*p) * f));
        let shape = [rows.len(), 1, seq, frequencies.len()];
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), device);
        let mut masks: Vec<(Option<usize>, Option<Tensor<4, Bool>>)> = Vec::new();
        for window in windows {
            if masks.iter().all(|(w, _)| w != window) {
                masks.push((*window, mask(layout, past, seq, *window, device)));
            }
        }
        Self {
            cos: table(angles().map(|a| a.cos() as f32).collect()),
            sin: table(angles().map(|a| a.sin() as f32).collect()),
            masks,
        }
    }

    /// Turns each half-split pair of `x` `[batch, heads, seq, head_dim]` by its angle.
    pub(crate) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, _, _, head_dim] = x.dims();
        let half = head_dim / 2;
        let (left, right) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
        let dtype = left.dtype();
        let (cos, sin) = (self.cos.clone().cast(dtype), self.sin.clone().cast(dtype));
        Tensor::cat(vec![left.clone() * cos.clone() - right.clone() * sin.clone(), right * cos + left * sin], 3)
    }

    fn mask(&self, window: Option<usize>) -> Option<Tensor<4, Bool>> {
        self.masks.iter().find(|(w, _)| *w == window).and_then(|(_, mask)| mask.clone())
    }
}

impl Rope {
    /// Angle per position of each pair, `head_dim / 2` values.
    fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let frequency = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
                match self.scaling {
                    RopeScaling::Default => frequency,
                    RopeScaling::Linear { factor } => frequency / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position_embeddings,
                    } => {
                        let turns = original_max_position_embeddings * frequency / std::f64::consts::TAU;
                        let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                        kept * frequency + (1.0 - kept) * frequency / factor
                    }
                }
            })
            .collect()
    }
}

/// `[1 or batch, 1, seq, past + seq]`, true where a token must not look; `None` when every token may look at everything.
fn mask(
    layout: Layout<'_>,
    past: usize,
    seq: usize,
    window: Option<usize>,
    device: &Device,
) -> Option<Tensor<4, Bool>> {
    let total = past + seq;
    let hidden = |i: usize, j: usize| j > i + past || window.is_some_and(|w| i + past >= w + j);
    let (rows, values): (usize, Vec<bool>) = match layout {
        Layout::Rows if seq == 1 && window.is_none() => return None,
        Layout::Rows => (1, (0..seq).flat_map(|i| (0..total).map(move |j| hidden(i, j))).collect()),
        Layout::Packed { segments, .. } => (
            segments.len(),
            segments
                .iter()
                .flat_map(|s| (0..seq).flat_map(move |i| (0..seq).map(move |j| hidden(i, j) || s[i] != s[j])))
                .collect(),
        ),
    };
    Some(Tensor::from_data(TensorData::new(values, [rows, 1, seq, total]), device))
}

/// Keys and values of the tokens that were seen, one entry a block.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    blocks: Vec<(Tensor<4>, Tensor<4>)>,
}

impl KvCache {
    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.blocks.first().map_or(0, |(keys, _)| keys.dims()[2])
    }

    /// Whether nothing was seen yet.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Appends the new tokens of block `at` and hands out all.
    fn extend(&mut self, at: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let joined = match self.blocks.get(at) {
            Some((k, v)) => (Tensor::cat(vec![k.clone(), keys], 2), Tensor::cat(vec![v.clone(), values], 2)),
            None => (keys, values),
        };
        if at < self.blocks.len() {
            self.blocks[at] = joined.clone();
        } else {
            self.blocks.push(joined.clone());
        }
        joined
    }
}

/// `softmax(q·kᵀ / √head_dim + mask)·v`.
///
/// # Shapes
/// `q`: `[batch, heads, seq, head_dim]`; `k`, `v`: `[batch, kv_heads, seq, head_dim]`; result `[batch, seq, heads · head_dim]`.
pub(crate) fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    pass: &Pass,
    window: Option<usize>,
    cache: Option<(&mut KvCache, usize)>,
) -> Tensor<3> {
    let (k, v) = match cache {
        Some((cache, block)) => cache.extend(block, k, v),
        None => (k, v),
    };
    let [batch, heads, seq, head_dim] = q.dims();
    let [_, kv_heads, total, _] = k.dims();
    // The query heads of a group fold into rows, so keys and values are never repeated.
    let rows = heads / kv_heads * seq;
    let q = (q * (head_dim as f64).sqrt().recip()).reshape([batch, kv_heads, rows, head_dim]);
    let scores = q.matmul(k.swap_dims(2, 3)).reshape([batch, heads, seq, total]);
    let scores = match pass.mask(window) {
        Some(mask) => scores.mask_fill(mask.expand([batch, heads, seq, total]), f32::MIN / 2.0),
        None => scores,
    };
    let weights = softmax(scores, 3).reshape([batch, kv_heads, rows, total]);
    weights.matmul(v).reshape([batch, heads, seq, head_dim]).swap_dims(1, 2).reshape([batch, seq, heads * head_dim])
}

/// `[batch, seq, heads · head_dim]` to `[batch, heads, seq, head_dim]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, heads, width / heads]).swap_dims(1, 2)
}
