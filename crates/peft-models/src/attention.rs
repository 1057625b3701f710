//! What the blocks of a pass share: where each token is and what it sees; and the cache of keys and values.

use std::f64::consts::TAU;

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::kernels::{Sight, attention, rope};
use peft_core::{Prompt, Prompts};

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
    /// The place of each token in its sequence, behind what is in the cache and learned keys: a row for all, or one for each.
    pub(crate) positions: Vec<Vec<u32>>,
    /// `[1 or batch, seq, 1, head_dim]`: cosines of the pairs, then their sines; nothing without a rotary embedding.
    angles: Option<Tensor<4>>,
    /// `[batch, seq]`, where rows hold several sequences.
    segments: Option<Tensor<2, Int>>,
    /// What stands in front of each row; nothing behind tokens in a cache, which has it.
    prompt: Prompt,
}

impl Pass {
    /// Prepares `seq` new tokens, virtual ones included, behind those of a cache, which counts them.
    pub(crate) fn new(
        layout: Layout<'_>,
        prompt: Prompt,
        cache: Option<&mut KvCache>,
        seq: usize,
        rope: Option<(&Rope, usize)>,
        device: &Device,
    ) -> Self {
        let device = &device.clone().without_autodiff();
        let past = cache.as_deref().map_or(0, KvCache::len) + prompt.shift;
        if let Some(cache) = cache {
            cache.positions = past + seq;
        }
        let positions = positions(layout, &prompt, past, seq);
        let angles = rope.map(|(rope, head_dim)| {
            let (frequencies, length) = (rope.frequencies(head_dim), rope.length());
            let turns = |position: u32| frequencies.iter().map(move |f| f64::from(position) * f);
            let values = positions.iter().flatten().flat_map(|position| {
                turns(*position)
                    .map(f64::cos)
                    .chain(turns(*position).map(f64::sin))
                    .map(|value| (length * value) as f32)
            });
            let data = TensorData::new(values.collect::<Vec<f32>>(), [positions.len(), seq, 1, head_dim]);
            Tensor::from_data(data, device)
        });
        let segments = match layout {
            Layout::Rows => None,
            Layout::Packed { segments, .. } => {
                let values: Vec<i64> = segments.iter().flatten().map(|segment| i64::from(*segment)).collect();
                Some(Tensor::from_data(TensorData::new(values, [segments.len(), seq]), device))
            }
        };
        Self { positions, angles, segments, prompt }
    }

    /// Turns each half-split pair of `x` `[batch, seq, heads, head_dim]` by the angle of its position.
    pub(crate) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        match &self.angles {
            Some(angles) => rope(x, angles.clone()),
            None => x,
        }
    }

    /// The keys and the values of a block behind the learned ones; `x` is what they are made of.
    pub(crate) fn behind_past(
        &self,
        block: usize,
        x: &Tensor<3>,
        k: Tensor<4>,
        v: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        self.prompt.behind_past(block, x, k, v)
    }

    /// Causal attention of the new tokens, after those in the cache.
    ///
    /// # Shapes
    /// `q`: `[batch, seq, heads, head_dim]`; `k`, `v`: those [behind the learned ones](Self::behind_past); result `[batch, seq, heads · head_dim]`.
    pub(crate) fn attend(
        &self,
        block: usize,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        window: Option<usize>,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let scale = (q.dims()[3] as f64).sqrt().recip();
        self.attend_scaled(block, q, (k, v), window, scale, cache).flatten(2, 3)
    }

    /// [`attend`](Self::attend) with a scale of its own, heads apart.
    pub(crate) fn attend_scaled(
        &self,
        block: usize,
        q: Tensor<4>,
        (k, v): (Tensor<4>, Tensor<4>),
        window: Option<usize>,
        scale: f64,
        cache: Option<&mut KvCache>,
    ) -> Tensor<4> {
        let new = Seen { keys: k, values: v, prefix: self.prompt.num_past(block) };
        let Seen { keys, values, prefix } = match cache {
            Some(cache) => cache.extend(block, new),
            None => new,
        };
        let sight = Sight { causal: true, window, prefix };
        attention(q, keys, values, self.segments.clone(), sight, scale)
    }
}

/// What a pass begins with: embeddings with what is learned in front of them, unless that is in the cache.
pub(crate) fn enter(
    prompts: &Prompts,
    x: Tensor<3>,
    ids: &Tensor<2, Int>,
    cache: Option<&KvCache>,
) -> (Tensor<3>, Prompt) {
    if cache.is_none_or(KvCache::is_empty) { prompts.enter(x, ids, None) } else { (x, Prompt::default()) }
}

fn positions(layout: Layout<'_>, prompt: &Prompt, past: usize, seq: usize) -> Vec<Vec<u32>> {
    match layout {
        Layout::Rows => vec![(past..past + seq).map(|position| position as u32).collect()],
        Layout::Packed { positions, .. } => {
            assert_eq!(prompt.num_tokens(), 0, "virtual tokens stand in front of one sequence a row");
            let behind = |row: &Vec<u32>| row.iter().map(|position| position + past as u32).collect();
            positions.iter().map(behind).collect()
        }
    }
}

impl Rope {
    /// Angle per position of each pair, `head_dim / 2` values.
    fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let turn = |i: usize| {
            let frequency = self.theta.powf(-2.0 * i as f64 / head_dim as f64);
            frequency * self.scaling.kept(frequency, i, self.theta, head_dim)
        };
        (0..head_dim / 2).map(turn).collect()
    }

    /// What turned pairs are multiplied by.
    fn length(&self) -> f64 {
        if let RopeScaling::Yarn { attention_factor, .. } = self.scaling { attention_factor } else { 1.0 }
    }
}

impl RopeScaling {
    /// What is left of the frequency of pair `i`.
    fn kept(&self, frequency: f64, i: usize, theta: f64, head_dim: usize) -> f64 {
        // Between all and a part, by how much of the passage lies behind.
        let between = |kept: f64, factor: f64| kept + (1.0 - kept) / factor;
        match *self {
            Self::Default => 1.0,
            Self::Linear { factor } => factor.recip(),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let turns = original_max_position_embeddings * frequency / TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                between(kept.clamp(0.0, 1.0), factor)
            }
            Self::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } => {
                // The pair that turns so often in the original context.
                let pair = |turns: f64| {
                    head_dim as f64 * (original_max_position_embeddings / (turns * TAU)).ln() / (2.0 * theta.ln())
                };
                let (first, last) = (pair(beta_fast), pair(beta_slow));
                let (first, last) = if truncate { (first.floor(), last.ceil()) } else { (first, last) };
                let (first, last) = (first.max(0.0), last.min(head_dim as f64 - 1.0));
                let length = if first == last { 0.001 } else { last - first };
                between(1.0 - ((i as f64 - first) / length).clamp(0.0, 1.0), factor)
            }
        }
    }
}

/// Keys and values of the tokens that were seen, one entry a block.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    blocks: Vec<Seen>,
    positions: usize,
    /// That of the pass before, in a model that is computed more than once.
    before: Option<Box<KvCache>>,
}

/// What a block saw, `[batch, seq, kv_heads, head_dim]`.
#[derive(Clone, Debug)]
struct Seen {
    keys: Tensor<4>,
    values: Tensor<4>,
    /// How many of them were learned, and are seen whatever the window.
    prefix: usize,
}

impl KvCache {
    /// Positions taken so far: those of tokens, virtual ones included, and of learned keys.
    pub fn len(&self) -> usize {
        self.positions
    }

    /// Whether nothing was seen yet.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The cache of a pass that so many follow.
    pub(crate) fn of_pass(&mut self, following: usize) -> &mut Self {
        match following {
            0 => self,
            _ => self.before.get_or_insert_default().of_pass(following - 1),
        }
    }

    /// Keys and values of the one row, `[seq, 2·blocks, kv_heads, head_dim]`.
    pub(crate) fn into_past(self) -> Tensor<4> {
        let both = self.blocks.into_iter().flat_map(|seen| [seen.keys, seen.values]);
        Tensor::cat(both.map(|x| x.swap_dims(0, 1)).collect(), 1)
    }

    /// Appends the new tokens of block `at` and hands out all.
    fn extend(&mut self, at: usize, new: Seen) -> Seen {
        let joined = match self.blocks.get(at) {
            Some(Seen { keys, values, prefix }) => Seen {
                keys: Tensor::cat(vec![keys.clone(), new.keys], 1),
                values: Tensor::cat(vec![values.clone(), new.values], 1),
                prefix: *prefix,
            },
            None => new,
        };
        if at < self.blocks.len() {
            self.blocks[at] = joined.clone();
        } else {
            self.blocks.push(joined.clone());
        }
        joined
    }
}

/// `[batch, seq, heads · head_dim]` to `[batch, seq, heads, head_dim]`.
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, heads, width / heads])
}
