//! Multi-head latent attention: keys and values of all heads are made of one narrow vector a token.
//!
//! `c = RMSNorm(x·Wₐ)`, and of it each head's `k_nope` and `v`; `k_rope`, turned by its position, comes straight from `x` and is the same for all heads. Queries are
//! made in the same way, of a vector of their own, or of `x`. Scores are `s·(q_nope·k_nope + q_rope·k_rope)`.
//! DeepSeek-AI 2024, arXiv:2405.04434, section 2.1; fields carry the names of `transformers`.
//!
//! The attention knows one width: the narrower of keys and values gets zeros behind it. The cache holds keys and values of all heads, not the narrow vectors, so
//! it is as large as that of any attention with as many heads, and a step costs no more.

use burn::module::Module;
use burn::nn::{Linear, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Tensor};
use peft_core::{Named, linear, rms_norm};

use crate::attention::{KvCache, Pass, split_heads};
use crate::config::{LatentConfig, LlamaConfig};
use crate::feed_forward::proj;

/// The norms inside have an epsilon of their own.
const EPSILON: f64 = 1e-6;

#[derive(Module, Debug)]
pub(crate) struct LatentAttention {
    /// Has no name in paths.
    queries: Named<Queries>,
    kv_a_proj_with_mqa: Linear,
    kv_a_layernorm: RmsNorm,
    kv_b_proj: Linear,
    o_proj: Linear,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    shape: LatentConfig,
}

/// What queries are made with.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a block; a box would not be a Burn module")]
enum Queries {
    Whole(WholeQueries),
    Narrow(NarrowQueries),
}

#[derive(Module, Debug)]
struct WholeQueries {
    q_proj: Linear,
}

#[derive(Module, Debug)]
struct NarrowQueries {
    q_a_proj: Linear,
    q_a_layernorm: RmsNorm,
    q_b_proj: Linear,
}

impl LatentAttention {
    pub(crate) fn new(config: &LlamaConfig, shape: &LatentConfig, device: &Device) -> Self {
        let (hidden, heads, bias) = (config.hidden_size, config.num_attention_heads, config.qkv_bias);
        let width = heads * shape.qk_head_dim();
        let proj = |d_in, d_out, bias| proj(d_in, d_out, bias, device);
        let norm = |width| RmsNormConfig::new(width).with_epsilon(EPSILON).init(device);
        let queries = match shape.q_lora_rank {
            None => Queries::Whole(WholeQueries { q_proj: proj(hidden, width, false) }),
            Some(rank) => Queries::Narrow(NarrowQueries {
                q_a_proj: proj(hidden, rank, bias),
                q_a_layernorm: norm(rank),
                q_b_proj: proj(rank, width, false),
            }),
        };
        Self {
            queries: Named::new("", queries),
            kv_a_proj_with_mqa: proj(hidden, shape.kv_lora_rank + shape.qk_rope_head_dim, bias),
            kv_a_layernorm: norm(shape.kv_lora_rank),
            kv_b_proj: proj(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim), false),
            o_proj: proj(heads * shape.v_head_dim, hidden, config.o_bias),
            heads,
            shape: shape.clone(),
        }
    }

    /// `[batch, seq, hidden]` to the same.
    pub(crate) fn forward(&self, x: Tensor<3>, pass: &Pass, layer: usize, cache: Option<&mut KvCache>) -> Tensor<3> {
        let shape = &self.shape;
        let (nope, rotated) = (shape.qk_nope_head_dim, shape.qk_rope_head_dim);
        let [q, q_rope] = split(split_heads(self.queries.forward(x.clone()), self.heads), nope, rotated);
        let q = Tensor::cat(vec![q, self.rotate(pass, q_rope)], 3);

        let narrow = linear(&self.kv_a_proj_with_mqa, x.clone());
        let [_, _, width] = narrow.dims();
        let latent = rms_norm(&self.kv_a_layernorm, narrow.clone().narrow(2, 0, shape.kv_lora_rank));
        let k_rope = split_heads(narrow.narrow(2, shape.kv_lora_rank, width - shape.kv_lora_rank), 1);
        let [k, v] = split(split_heads(linear(&self.kv_b_proj, latent), self.heads), nope, shape.v_head_dim);
        let [batch, seq, heads, _] = k.dims();
        let k_rope = self.rotate(pass, k_rope).expand([batch, seq, heads, rotated]);
        let k = Tensor::cat(vec![k, k_rope], 3);

        let [q, k, v] = [q, k, v].map(|x| widen(x, shape.width()));
        let (k, v) = pass.behind_past(layer, &x, k, v);
        let y = pass.attend_scaled(layer, q, (k, v), None, shape.scale, cache);
        linear(&self.o_proj, y.narrow(3, 0, shape.v_head_dim).flatten(2, 3))
    }

    /// Turns pairs. Where these are neighbours they are put into the two halves first, of queries and keys alike, which changes no score.
    fn rotate(&self, pass: &Pass, x: Tensor<4>) -> Tensor<4> {
        if !self.shape.rope_interleave {
            return pass.rotate(x);
        }
        let [batch, seq, heads, width] = x.dims();
        let pairs = x.reshape([batch, seq, heads, width / 2, 2]);
        pass.rotate(pairs.swap_dims(3, 4).reshape([batch, seq, heads, width]))
    }
}

impl Queries {
    /// `[batch, seq, hidden]` to `[batch, seq, heads · qk_head_dim]`.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Whole(queries) => linear(&queries.q_proj, x),
            Self::Narrow(queries) => {
                linear(&queries.q_b_proj, rms_norm(&queries.q_a_layernorm, linear(&queries.q_a_proj, x)))
            }
        }
    }
}

/// The two parts of the last dimension.
fn split(x: Tensor<4>, first: usize, second: usize) -> [Tensor<4>; 2] {
    [x.clone().narrow(3, 0, first), x.narrow(3, first, second)]
}

/// Zeros behind the last dimension.
fn widen(x: Tensor<4>, width: usize) -> Tensor<4> {
    let [batch, seq, heads, found] = x.dims();
    if found == width {
        return x;
    }
    let zeros = Tensor::zeros([batch, seq, heads, width - found], (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zeros], 3)
}
