//! The Llama family: Llama, Mistral, Qwen2, Qwen2.5, Qwen3, SmolLM2; with experts Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3.
//!
//! One block: `x += o(attention(rope(q), rope(k), v))` of `RMSNorm(x)`, then `x += feed_forward(RMSNorm(x))`, dense or a mixture of experts.
//! Touvron et al. 2023, arXiv:2302.13971; fields carry the names of `transformers`, so paths are file keys.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Linear, RmsNorm, RmsNormConfig};
use burn::tensor::{Device, Int, Tensor};
use peft_core::kernels::{Scores, linear_cross_entropy};
use peft_core::{
    AdapterAware, Attended, Embedded, Named, PromptShape, Prompts, SubLayer, cross_entropy, embedding_as, linear,
    product, rms_norm,
};

use crate::attention::{KvCache, Layout, Pass, enter, split_heads};
use crate::config::LlamaConfig;
use crate::experts::{Routed, say};
use crate::feed_forward::{FeedForward, INITIALIZER, proj};
use crate::latent::LatentAttention;

/// A causal language model of the Llama family.
#[derive(Module, Debug)]
pub struct Llama {
    model: LlamaModel,
    /// `None` when the head is the embedding table.
    lm_head: Option<Linear>,
    aware: AdapterAware,
    #[module(skip)]
    config: LlamaConfig,
}

#[derive(Module, Debug)]
struct LlamaModel {
    embed_tokens: Embedding,
    invertible_adapters: Embedded,
    prompts: Prompts,
    layers: Vec<LlamaLayer>,
    norm: RmsNorm,
}

#[derive(Module, Debug)]
struct LlamaLayer {
    self_attn: Attention,
    mlp: FeedForward,
    input_layernorm: RmsNorm,
    post_attention_layernorm: RmsNorm,
    attention_adapters: SubLayer,
    output_adapters: SubLayer,
}

#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one a block; a box would not be a Burn module")]
enum Attention {
    Heads(LlamaAttention),
    Latent(LatentAttention),
}

#[derive(Module, Debug)]
struct LlamaAttention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    attended: Named<Attended>,
}

impl LlamaConfig {
    fn prompts(&self) -> PromptShape {
        PromptShape {
            width: self.hidden_size,
            blocks: self.num_hidden_layers,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            positions: self.max_position_embeddings,
            causal: true,
        }
    }

    /// A model with random weights `N(0, 0.02²)`, allocated only when first used.
    pub fn init(&self, device: &Device) -> Llama {
        let proj = |d_in, d_out, bias| proj(d_in, d_out, bias, device);
        let norm = |width| RmsNormConfig::new(width).with_epsilon(self.rms_norm_eps).init(device);
        let hidden = self.hidden_size;
        let layer = |layer| LlamaLayer {
            self_attn: match &self.latent {
                Some(latent) => Attention::Latent(LatentAttention::new(self, latent, device)),
                None => Attention::Heads(LlamaAttention::new(self, device)),
            },
            mlp: FeedForward::new(self, layer, device),
            input_layernorm: norm(hidden),
            post_attention_layernorm: norm(hidden),
            attention_adapters: SubLayer::new(hidden, device),
            output_adapters: SubLayer::new(hidden, device),
        };
        Llama {
            model: LlamaModel {
                embed_tokens: EmbeddingConfig::new(self.vocab_size, hidden).with_initializer(INITIALIZER).init(device),
                invertible_adapters: Embedded::new(hidden, device),
                prompts: Prompts::new(self.prompts(), device),
                layers: (0..self.num_hidden_layers).map(layer).collect(),
                norm: norm(hidden),
            },
            lm_head: (!self.tie_word_embeddings).then(|| proj(hidden, self.vocab_size, false)),
            aware: AdapterAware,
            config: self.clone(),
        }
    }
}

impl Llama {
    /// The shape of the model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Last hidden states, normed: `[batch, seq]` to `[batch, seq, hidden_size]`.
    pub fn hidden(&self, ids: Tensor<2, Int>, layout: Layout<'_>, cache: Option<&mut KvCache>) -> Tensor<3> {
        let (hidden, routed) = self.routed(ids, layout, cache);
        say(&routed, self.config.experts.as_ref().and_then(|experts| experts.router_aux_loss_coef));
        hidden
    }

    /// [`hidden`](Self::hidden) with what the routers of blocks with experts did.
    pub fn routed(
        &self,
        ids: Tensor<2, Int>,
        layout: Layout<'_>,
        mut cache: Option<&mut KvCache>,
    ) -> (Tensor<3>, Vec<Routed>) {
        let mut routed = Vec::new();
        let hidden = self.model.prompts.passes(|following| {
            let cache = cache.as_deref_mut().map(|cache| cache.of_pass(following));
            let (hidden, of_pass) = self.pass(ids.clone(), layout, cache);
            routed = of_pass;
            hidden
        });
        (hidden, routed)
    }

    fn pass(
        &self,
        ids: Tensor<2, Int>,
        layout: Layout<'_>,
        mut cache: Option<&mut KvCache>,
    ) -> (Tensor<3>, Vec<Routed>) {
        let (config, model, device) = (&self.config, &self.model, ids.device());
        let x = model.invertible_adapters.enter(self.embed(ids.clone()));
        let (mut x, prompt) = enter(&model.prompts, x, &ids, cache.as_deref());
        let rotated = config.latent.as_ref().map_or(config.head_dim, |latent| latent.qk_rope_head_dim);
        let rope = Some((&config.rope, rotated));
        let pass = Pass::new(layout, prompt.clone(), cache.as_deref_mut(), x.dims()[1], rope, &device);
        let mut routed = Vec::new();
        for (at, layer) in model.layers.iter().enumerate() {
            let normed = rms_norm(&layer.input_layernorm, x.clone());
            let attended = layer.self_attn.forward(normed, config, &pass, at, cache.as_deref_mut());
            x = layer.attention_adapters.end(attended, x, None);
            let normed = rms_norm(&layer.post_attention_layernorm, x.clone());
            let (output, router) = layer.mlp.forward(normed);
            routed.extend(router);
            x = layer.output_adapters.end(output, x, None);
        }
        (prompt.behind(rms_norm(&model.norm, x)), routed)
    }

    /// Embeddings of tokens: `[batch, seq]` to `[batch, seq, hidden_size]`.
    pub fn embed(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        // Tables may be in 16 bits, activations never.
        embedding_as(&self.model.embed_tokens, ids, self.model.norm.gamma.val().dtype())
    }

    /// The place of prompts.
    pub(crate) fn prompts(&self) -> &Prompts {
        &self.model.prompts
    }

    /// Logits of hidden states: `[rows, hidden_size]` to `[rows, vocab_size]`.
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.model.invertible_adapters.leave(hidden);
        match &self.lm_head {
            Some(head) => linear(head, hidden),
            // As in `transformers`, an adapter on the embedding does not act on the tied head.
            None => product(hidden, self.model.embed_tokens.weight.base().transpose()),
        }
    }

    /// What the head says of the tokens to come, without the logits of all: `[tokens, hidden_size]` and `[tokens]`.
    pub fn scores(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Scores {
        let hidden = self.model.invertible_adapters.leave(hidden);
        match &self.lm_head {
            Some(head) => cross_entropy(head, hidden, targets, 0.0),
            None => linear_cross_entropy(hidden, self.model.embed_tokens.weight.base().transpose(), targets, 0.0),
        }
    }

    /// The same model with a head of its own, so that the head can be adapted, or the embedding merged, apart from the other.
    #[must_use]
    pub fn untied(mut self) -> Self {
        if self.lm_head.is_none() {
            let weight = self.model.embed_tokens.weight.base().transpose();
            self.lm_head = Some(Linear { weight: burn::module::Param::from_tensor(weight.detach()), bias: None });
            self.config.tie_word_embeddings = false;
        }
        self
    }
}

impl Attention {
    fn forward(
        &self,
        x: Tensor<3>,
        config: &LlamaConfig,
        pass: &Pass,
        layer: usize,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        match self {
            Self::Heads(attention) => attention.forward(x, config, pass, layer, cache),
            Self::Latent(attention) => attention.forward(x, pass, layer, cache),
        }
    }
}

impl LlamaAttention {
    fn new(config: &LlamaConfig, device: &Device) -> Self {
        let (hidden, width) = (config.hidden_size, config.head_dim);
        let (q, kv) = (config.num_attention_heads * width, config.num_key_value_heads * width);
        let proj = |d_in, d_out, bias| proj(d_in, d_out, bias, device);
        let norm = || config.qk_norm.then(|| RmsNormConfig::new(width).with_epsilon(config.rms_norm_eps).init(device));
        Self {
            q_proj: proj(hidden, q, config.qkv_bias),
            k_proj: proj(hidden, kv, config.qkv_bias),
            v_proj: proj(hidden, kv, config.qkv_bias),
            o_proj: proj(q, hidden, config.o_bias),
            q_norm: norm(),
            k_norm: norm(),
            attended: Attended::new(hidden, device),
        }
    }

    fn forward(
        &self,
        x: Tensor<3>,
        config: &LlamaConfig,
        pass: &Pass,
        layer: usize,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let normed = |n: &Option<RmsNorm>, x: Tensor<4>| match n {
            Some(n) => rms_norm(n, x),
            None => x,
        };
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let keys = |x| normed(&self.k_norm, split_heads(linear(&self.k_proj, x), kv_heads));
        let values = |x| split_heads(linear(&self.v_proj, x), kv_heads);
        let q = pass.rotate(normed(&self.q_norm, split_heads(linear(&self.q_proj, x.clone()), heads)));
        let more = self.attended.beside(&q, &|x| (keys(x.clone()), values(x)));
        let (k, v) = pass.behind_past(layer, &x, pass.rotate(keys(x.clone())), values(x.clone()));
        let y = linear(&self.o_proj, pass.attend(layer, q, k, v, config.sliding_window[layer], cache));
        match more {
            // With the bias of the projection twice, as in PEFT.
            Some(more) => y + linear(&self.o_proj, more),
            None => y,
        }
    }
}
