//! The small model under the laws.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::activation::silu;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use peft_core::{AdapterAware, Attended, Embedded, FeedForward, Gated, Named, Prompt, PromptShape, Prompts, SubLayer};
use peft_kernels::{Sight, attention};

use crate::state::{Part, fill, normal};

/// How a model calls its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seam {
    /// `layer.forward(x)`: the layer sees the adapted weight.
    Weight,
    /// [`peft_core::linear`]: the adapter sees the layer's input.
    Activation,
}

/// Unmodified layers that are called through either seam: with `h = embed(ids) + x`, `norm(down(silu(up(h))) + h)`.
///
/// `embed` is `[32, 16]`, `up` is `[16, 32]` with a bias and `down` `[32, 16]` without, so that few kernels serve a device that compiles
/// each one slowly.
#[derive(Module, Debug)]
pub struct Stack {
    /// `[32, 16]`
    pub embed: Embedding,
    /// `[16, 32]`, with a bias.
    pub up: Linear,
    /// `[32, 16]`, without one.
    pub down: Linear,
    /// Of 16 values.
    pub norm: LayerNorm,
    /// Behind the embeddings; through the weight seam nothing looks there.
    pub invertible_adapters: Embedded,
    /// In front of the embeddings; through the weight seam nothing looks there.
    pub prompts: Prompts,
    /// What stands for the attention of a block.
    pub attn: Attention,
    /// Around `up` and `down`, as a gated part whose inner values are those of the gate; through the weight seam nothing looks there.
    pub mlp: Named<FeedForward>,
    /// Where the one sub-layer ends; through the weight seam nothing looks there.
    pub output_adapters: SubLayer,
    /// Whether the model declares its layers adapter-aware.
    pub aware: Option<AdapterAware>,
}

/// Attention of `h` to itself, two heads wide, without projections. It is there for adapters alone: without one that acts there nothing is added to `h`, so that other methods have
/// no kernels of it to wait for.
#[derive(Module, Debug)]
pub struct Attention {
    attended: Named<Attended>,
}

impl Attention {
    fn forward(&self, h: Tensor<3>, prompt: &Prompt) -> Tensor<3> {
        let split = |x: Tensor<3>| {
            let [batch, n, width] = x.dims();
            x.reshape([batch, n, HEADS, width / HEADS])
        };
        let mut sum = h.clone();
        if prompt.num_tokens() + prompt.num_past(0) > 0 {
            let (keys, values) = prompt.behind_past(0, &h, split(h.clone()), split(h.clone()));
            let sight = Sight { causal: true, prefix: prompt.num_past(0), ..Sight::default() };
            let scale = ((WIDTH / HEADS) as f64).sqrt().recip();
            sum = sum + attention(split(h.clone()), keys, values, None, sight, scale).flatten(2, 3);
        }
        match self.attended.beside(&split(h), &|x| (split(x.clone()), split(x))) {
            Some(more) => sum + more,
            None => sum,
        }
    }
}

/// Added to the variance in `norm`.
pub(crate) const EPSILON: f64 = 1e-5;

pub(crate) const BATCH: usize = 2;
pub(crate) const SEQ: usize = 4;
pub(crate) const WIDTH: usize = 16;
const INNER: usize = 32;
const HEADS: usize = 2;
pub(crate) const VOCAB: usize = 32;
const SHAPE: PromptShape =
    PromptShape { width: WIDTH, blocks: 1, kv_heads: HEADS, head_dim: WIDTH / HEADS, positions: 16, causal: true };
pub(crate) const IDS: [i64; BATCH * SEQ] = [1, 5, 3, 7, 2, 0, 5, 31];

impl Stack {
    /// The model with the same random weights on every device, in the type `dtype`.
    pub fn new(device: &Device, dtype: DType, aware: bool) -> Self {
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).with_initializer(Initializer::Zeros);
        let stack = Self {
            embed: EmbeddingConfig::new(VOCAB, WIDTH).with_initializer(Initializer::Zeros).init(device),
            up: linear(WIDTH, INNER).init(device),
            down: linear(INNER, WIDTH).with_bias(false).init(device),
            norm: LayerNormConfig::new(WIDTH).with_epsilon(EPSILON).init(device),
            invertible_adapters: Embedded::new(WIDTH, device),
            prompts: Prompts::new(SHAPE, device),
            attn: Attention { attended: Attended::new(WIDTH, device) },
            mlp: FeedForward::new(WIDTH, INNER, device).renamed("mlp"),
            output_adapters: SubLayer::new(WIDTH, device),
            aware: aware.then_some(AdapterAware),
        };
        fill(stack, Part::Base(dtype), 1)
    }

    /// The output `[batch, seq, 16]` for ids `[batch, seq]` and an input `[batch, seq, 16]`.
    pub fn forward(&self, seam: Seam, ids: Tensor<2, Int>, x: Tensor<3>) -> Tensor<3> {
        match seam {
            Seam::Weight => {
                let h = self.embed.forward(ids) + x;
                self.norm.forward(self.down.forward(silu(self.up.forward(h.clone()))) + h)
            }
            Seam::Activation => {
                let h = self.invertible_adapters.enter(peft_core::embedding(&self.embed, ids.clone()) + x);
                let (h, prompt) = self.prompts.enter(h, &ids, None);
                let h = self.attn.forward(h, &prompt);
                let parts = Gated {
                    gate: &|x| peft_core::linear(&self.up, x),
                    up: &|x| x,
                    inner: &|gate, _| silu(gate),
                    down: &|inner| peft_core::linear(&self.down, inner),
                };
                let y = self.mlp.forward(h.clone(), &parts);
                let norm = |sum| peft_core::layer_norm(&self.norm, sum, EPSILON);
                prompt.behind(self.output_adapters.end(y, h, Some(&norm)))
            }
        }
    }
}

/// The ids that every law uses, `[2, 4]`.
pub(crate) fn ids(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(IDS.to_vec(), [BATCH, SEQ]), device)
}

/// A fixed input, `[2, 4, width]`.
pub(crate) fn input(width: usize, seed: u64, device: &Device, dtype: DType) -> Tensor<3> {
    let values = normal(BATCH * SEQ * width, 1.0, seed);
    Tensor::from_data(TensorData::new(values, [BATCH, SEQ, width]), (device, dtype))
}
