//! GPT-2. Radford et al. 2019; fields carry the names of `transformers`, so paths are file keys.

use burn::module::{Initializer, Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, LinearConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::kernels::{Nonlinearity, Scores, activate, linear_cross_entropy};
use peft_core::{
    AdapterAware, Attended, Embedded, Named, PromptShape, Prompts, SubLayer, embedding_as, layer_norm, linear_with,
    product,
};

use crate::attention::{KvCache, Layout, Pass, enter, split_heads};
use crate::config::Gpt2Config;

/// A GPT-2 language model; its head is the embedding table.
#[derive(Module, Debug)]
pub struct Gpt2 {
    transformer: Gpt2Model,
    aware: AdapterAware,
    #[module(skip)]
    config: Gpt2Config,
}

#[derive(Module, Debug)]
struct Gpt2Model {
    wte: Embedding,
    wpe: Embedding,
    invertible_adapters: Embedded,
    prompts: Prompts,
    h: Vec<Gpt2Block>,
    ln_f: LayerNorm,
}

#[derive(Module, Debug)]
struct Gpt2Block {
    ln_1: LayerNorm,
    attn: Gpt2Attention,
    ln_2: LayerNorm,
    mlp: Gpt2Mlp,
    attention_adapters: SubLayer,
    output_adapters: SubLayer,
}

#[derive(Module, Debug)]
struct Gpt2Attention {
    c_attn: Conv1D,
    c_proj: Conv1D,
    attended: Named<Attended>,
}

#[derive(Module, Debug)]
struct Gpt2Mlp {
    c_fc: Conv1D,
    c_proj: Conv1D,
}

/// A linear layer whose file holds `[d_in, d_out]`; the name tells `peft_core` so.
#[derive(Module, Debug)]
struct Conv1D {
    weight: Param<Tensor<2>>,
    bias: Option<Param<Tensor<1>>>,
}

impl Conv1D {
    fn new(d_in: usize, d_out: usize, device: &Device) -> Self {
        let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
        let linear = LinearConfig::new(d_in, d_out).with_initializer(initializer).init(device);
        Self { weight: linear.weight, bias: linear.bias }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        linear_with(&self.weight, self.bias.as_ref(), x)
    }
}

impl Gpt2Config {
    fn prompts(&self) -> PromptShape {
        PromptShape {
            width: self.n_embd,
            blocks: self.n_layer,
            kv_heads: self.n_head,
            head_dim: self.n_embd / self.n_head,
            positions: self.n_positions,
            causal: true,
        }
    }

    /// A model with random weights `N(0, 0.02²)`, allocated only when first used.
    pub fn init(&self, device: &Device) -> Gpt2 {
        let table = |rows| {
            let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
            EmbeddingConfig::new(rows, self.n_embd).with_initializer(initializer).init(device)
        };
        let norm = || LayerNormConfig::new(self.n_embd).with_epsilon(self.layer_norm_epsilon).init(device);
        let block = || Gpt2Block {
            ln_1: norm(),
            attn: Gpt2Attention {
                c_attn: Conv1D::new(self.n_embd, 3 * self.n_embd, device),
                c_proj: Conv1D::new(self.n_embd, self.n_embd, device),
                attended: Attended::new(self.n_embd, device),
            },
            ln_2: norm(),
            mlp: Gpt2Mlp {
                c_fc: Conv1D::new(self.n_embd, self.n_inner, device),
                c_proj: Conv1D::new(self.n_inner, self.n_embd, device),
            },
            attention_adapters: SubLayer::new(self.n_embd, device),
            output_adapters: SubLayer::new(self.n_embd, device),
        };
        Gpt2 {
            transformer: Gpt2Model {
                wte: table(self.vocab_size),
                wpe: table(self.n_positions),
                invertible_adapters: Embedded::new(self.n_embd, device),
                prompts: Prompts::new(self.prompts(), device),
                h: (0..self.n_layer).map(|_| block()).collect(),
                ln_f: norm(),
            },
            aware: AdapterAware,
            config: self.clone(),
        }
    }
}

impl Gpt2 {
    /// The shape of the model.
    pub fn config(&self) -> &Gpt2Config {
        &self.config
    }

    /// Last hidden states, normed: `[batch, seq]` to `[batch, seq, n_embd]`.
    ///
    /// # Panics
    /// When the sequence is longer than the position table.
    pub fn hidden(&self, ids: Tensor<2, Int>, layout: Layout<'_>, mut cache: Option<&mut KvCache>) -> Tensor<3> {
        self.transformer.prompts.passes(|following| {
            let cache = cache.as_deref_mut().map(|cache| cache.of_pass(following));
            self.pass(ids.clone(), layout, cache)
        })
    }

    fn pass(&self, ids: Tensor<2, Int>, layout: Layout<'_>, mut cache: Option<&mut KvCache>) -> Tensor<3> {
        let (model, device) = (&self.transformer, ids.device());
        let (x, prompt) = enter(&model.prompts, self.embed(ids.clone()), &ids, cache.as_deref());
        let seq = x.dims()[1];
        let pass = Pass::new(layout, prompt.clone(), cache.as_deref_mut(), seq, None, &device);
        let rows = &pass.positions;
        let most = rows.iter().flatten().max().map_or(0, |last| *last as usize + 1);
        assert!(most <= self.config.n_positions, "{most} tokens, but {} positions", self.config.n_positions);
        let places: Vec<i64> = rows.iter().flatten().map(|position| i64::from(*position)).collect();
        let places = Tensor::<2, Int>::from_data(TensorData::new(places, [rows.len(), seq]), &device);
        let placed = embedding_as(&model.wpe, places, x.dtype());
        let mut x = model.invertible_adapters.enter(x + placed);
        for (at, block) in model.h.iter().enumerate() {
            let normed = self.norm(&block.ln_1, x.clone());
            let attended = block.attn.forward(normed, self.config.n_head, &pass, at, cache.as_deref_mut());
            x = block.attention_adapters.end(attended, x, None);
            let inner = block.mlp.c_fc.forward(self.norm(&block.ln_2, x.clone()));
            let output = block.mlp.c_proj.forward(activate(inner, Nonlinearity::GeluTanh));
            x = block.output_adapters.end(output, x, None);
        }
        prompt.behind(self.norm(&model.ln_f, x))
    }

    /// Embeddings of tokens, without their positions: `[batch, seq]` to `[batch, seq, n_embd]`.
    pub fn embed(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        // Tables may be in 16 bits, activations never.
        embedding_as(&self.transformer.wte, ids, self.transformer.ln_f.gamma.val().dtype())
    }

    /// The place of prompts.
    pub(crate) fn prompts(&self) -> &Prompts {
        &self.transformer.prompts
    }

    /// Logits of hidden states: `[rows, n_embd]` to `[rows, vocab_size]`.
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        let hidden = self.transformer.invertible_adapters.leave(hidden);
        product(hidden, self.transformer.wte.weight.base().transpose())
    }

    /// What the head says of the tokens to come, without the logits of all: `[tokens, n_embd]` and `[tokens]`.
    pub fn scores(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Scores {
        let hidden = self.transformer.invertible_adapters.leave(hidden);
        linear_cross_entropy(hidden, self.transformer.wte.weight.base().transpose(), targets, 0.0)
    }

    fn norm(&self, norm: &LayerNorm, x: Tensor<3>) -> Tensor<3> {
        layer_norm(norm, x, self.config.layer_norm_epsilon)
    }
}

impl Gpt2Attention {
    fn forward(&self, x: Tensor<3>, heads: usize, pass: &Pass, block: usize, cache: Option<&mut KvCache>) -> Tensor<3> {
        let project = |x| {
            let qkv: [Tensor<3>; 3] = (self.c_attn.forward(x).chunk(3, 2).try_into())
                .expect("three chunks of a width that is a multiple of three");
            qkv.map(|part| split_heads(part, heads))
        };
        let [q, k, v] = project(x.clone());
        let more = self.attended.beside(&q, &|x| {
            let [_, k, v] = project(x);
            (k, v)
        });
        let (k, v) = pass.behind_past(block, &x, k, v);
        let y = self.c_proj.forward(pass.attend(block, q, k, v, None, cache));
        match more {
            // Behind the projection, as in PEFT.
            Some(more) => y + more,
            None => y,
        }
    }
}
