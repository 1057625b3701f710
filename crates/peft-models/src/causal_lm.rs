//! One type for every decoder that this crate builds.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use peft_core::kernels::Scores;
use peft_core::{Prompts, for_mask};

use crate::attention::{KvCache, Layout};
use crate::config::ModelConfig;
use crate::experts::Routed;
use crate::gpt2::Gpt2;
use crate::llama::Llama;

/// A causal language model. Its parameter paths are the keys of `transformers`.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "one model a process; a box would not be a Burn module")]
pub enum CausalLm {
    /// The Llama family.
    Llama(Llama),
    /// GPT-2.
    Gpt2(Gpt2),
}

impl CausalLm {
    /// A model of that shape with random weights, allocated only when first used.
    pub fn new(config: &ModelConfig, device: &Device) -> Self {
        match config {
            ModelConfig::Llama(config) => Self::Llama(config.init(device)),
            ModelConfig::Gpt2(config) => Self::Gpt2(config.init(device)),
        }
    }

    /// The shape of the model.
    pub fn config(&self) -> ModelConfig {
        match self {
            Self::Llama(model) => ModelConfig::Llama(model.config().clone()),
            Self::Gpt2(model) => ModelConfig::Gpt2(model.config().clone()),
        }
    }

    /// Most tokens of a text, behind what is learned in front of it.
    pub fn max_tokens(&self) -> usize {
        self.config().max_positions().saturating_sub(self.prompts().positions())
    }

    /// Last hidden states, normed: `[batch, seq]` to `[batch, seq, width]`.
    pub fn hidden(&self, ids: Tensor<2, Int>, layout: Layout<'_>, cache: Option<&mut KvCache>) -> Tensor<3> {
        match self {
            Self::Llama(model) => model.hidden(ids, layout, cache),
            Self::Gpt2(model) => model.hidden(ids, layout, cache),
        }
    }

    /// [`hidden`](Self::hidden), and what the router of each block with experts did.
    pub fn routed(
        &self,
        ids: Tensor<2, Int>,
        layout: Layout<'_>,
        cache: Option<&mut KvCache>,
    ) -> (Tensor<3>, Vec<Routed>) {
        match self {
            Self::Llama(model) => model.routed(ids, layout, cache),
            Self::Gpt2(model) => (model.hidden(ids, layout, cache), Vec::new()),
        }
    }

    fn prompts(&self) -> &Prompts {
        match self {
            Self::Llama(model) => model.prompts(),
            Self::Gpt2(model) => model.prompts(),
        }
    }

    /// Embeddings of tokens as the model reads them, without positions: `[batch, seq]` to `[batch, seq, width]`. What a prompt may start from.
    pub fn embed(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        match self {
            Self::Llama(model) => model.embed(ids),
            Self::Gpt2(model) => model.embed(ids),
        }
    }

    /// Keys and values of a text, `[1, seq]` to `[seq, 2·blocks, kv_heads, head_dim]`: the prefix that is that text.
    pub fn past_of(&self, ids: Tensor<2, Int>) -> Tensor<4> {
        let mut cache = KvCache::default();
        self.hidden(ids, Layout::Rows, Some(&mut cache));
        cache.into_past()
    }

    /// Logits of hidden states: `[rows, width]` to `[rows, vocab_size]`.
    pub fn head(&self, hidden: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Llama(model) => model.head(hidden),
            Self::Gpt2(model) => model.head(hidden),
        }
    }

    /// What the head says of the tokens to come, without the logits of all: hidden states `[tokens, width]` and targets `[tokens]`, of which negative ones
    /// are left out.
    pub fn scores(&self, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Scores {
        match self {
            Self::Llama(model) => model.scores(hidden, targets),
            Self::Gpt2(model) => model.scores(hidden, targets),
        }
    }

    /// Logits of every token: `[batch, seq]` to `[batch, seq, vocab_size]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let logits = self.head(self.hidden(ids, Layout::Rows, None).flatten(0, 1));
        let vocab = logits.dims()[1];
        logits.reshape([batch, seq, vocab])
    }

    /// [`forward`](Self::forward) of rows that are padded on the left, as batches from elsewhere may be, by so many tokens each: a token gets the logits that it has without padding, behind
    /// what is learned in front of its row too. Those at padding mean nothing. Only what looks at a row as a whole may see the padding: gates of adapters, and routers by
    /// row behind virtual tokens.
    ///
    /// # Panics
    /// Without a number for each row that is below its length.
    pub fn forward_left_padded(&self, ids: Tensor<2, Int>, padding: &[usize]) -> Tensor<3> {
        let ([batch, seq], device) = (ids.dims(), ids.device());
        let fits = padding.len() == batch && padding.iter().all(|padding| *padding < seq);
        assert!(fits, "padding {padding:?} of {batch} rows of {seq} tokens");
        let ints = |values: Vec<i64>| Tensor::<1, Int>::from_data(&values[..], &device);
        // Rows are turned, so that padding is on the right, where no token sees it, and what comes of them is turned back.
        let turned = |by: &dyn Fn(usize) -> usize| {
            let row = |(row, padding): (usize, &usize)| {
                let by = by(*padding);
                (0..seq).map(move |at| (row * seq + (at + by) % seq) as i64).collect::<Vec<_>>()
            };
            ints(padding.iter().enumerate().flat_map(row).collect())
        };
        let real = padding.iter().flat_map(|padding| (0..seq).map(move |at| i64::from(at < seq - padding)));
        let mask = ints(real.collect()).reshape([batch, seq]);
        let ids = ids.flatten::<1>(0, 1).select(0, turned(&|padding| padding)).reshape([batch, seq]);
        let hidden = for_mask(Some(mask), || self.hidden(ids, Layout::Rows, None));
        let hidden = hidden.flatten::<2>(0, 1).select(0, turned(&|padding| seq - padding));
        let logits = self.head(hidden);
        let vocab = logits.dims()[1];
        logits.reshape([batch, seq, vocab])
    }

    /// The same model with an output head apart from the embedding table, where the family allows it.
    #[must_use]
    pub fn untied(self) -> Self {
        match self {
            Self::Llama(model) => Self::Llama(model.untied()),
            gpt2 @ Self::Gpt2(_) => gpt2,
        }
    }
}
