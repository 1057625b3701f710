//! Texts for BERT, RoBERTa and DistilBERT: `x = LayerNorm(word + position + type)`.

use burn::module::{Initializer, Module};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm};
use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::{Named, embedding_as, mean_of_tokens};

use super::block::{new_norm, norm};
use crate::config::{EncoderConfig, Family};

/// Texts as an encoder reads them: one a row, or a pair of them.
#[derive(Clone, Debug)]
pub struct Text {
    /// `[batch, seq]`
    pub ids: Tensor<2, Int>,
    /// `[batch, seq]`: 1 for a token of the text, 0 for padding on either side; nothing when there is none.
    pub mask: Option<Tensor<2, Int>>,
    /// `[batch, seq]`: 1 for the second text of a pair, where the model tells them apart; nothing for single texts.
    pub types: Option<Tensor<2, Int>>,
}

impl Text {
    /// Rows of one length, without padding and pairs.
    pub fn new(ids: Tensor<2, Int>) -> Self {
        Self { ids, mask: None, types: None }
    }

    /// The same behind `n` virtual tokens, which are read, belong to the first text of a pair, and have an id that is not that of `padding`.
    pub(crate) fn behind(&self, n: usize, padding: usize) -> Self {
        if n == 0 {
            return self.clone();
        }
        let with = |of: &Tensor<2, Int>, value: i64| {
            let [batch, _] = of.dims();
            Tensor::cat(vec![Tensor::full([batch, n], value, &of.device()), of.clone()], 1)
        };
        let (mask, types) = (self.mask.as_ref(), self.types.as_ref());
        Self {
            ids: with(&self.ids, padding as i64 + 1),
            mask: mask.map(|mask| with(mask, 1)),
            types: types.map(|types| with(types, 0)),
        }
    }

    /// `[batch, seq]`: padding is a sequence of its own, which no real token sees.
    pub(crate) fn segments(&self) -> Option<Tensor<2, Int>> {
        self.mask.clone().map(|mask| mask.equal_elem(0).int())
    }

    /// `x` `[batch, seq, hidden]` at the first real token: `[batch, 1, hidden]`.
    pub(crate) fn first(&self, x: Tensor<3>) -> Tensor<3> {
        let Some(mask) = &self.mask else { return x.narrow(1, 0, 1) };
        let first = (mask.clone().cumsum(1) * mask.clone()).equal_elem(1); // [batch, seq]
        pick(first.int(), x)
    }

    /// The mean of `x` `[batch, seq, hidden]` over real tokens: `[batch, 1, hidden]`.
    pub(crate) fn mean(&self, x: Tensor<3>) -> Tensor<3> {
        mean_of_tokens(x, self.mask.as_ref())
    }
}

/// The sum of the places of `x` `[batch, seq, hidden]` where `chosen` `[batch, seq]` is 1: `[batch, 1, hidden]`.
fn pick(chosen: Tensor<2, Int>, x: Tensor<3>) -> Tensor<3> {
    chosen.float().cast(x.dtype()).unsqueeze_dim::<3>(1).matmul(x)
}

#[derive(Module, Debug)]
pub(crate) struct TextEmbeddings {
    word_embeddings: Embedding,
    position_embeddings: Embedding,
    token_type_embeddings: Option<Embedding>,
    norm: Named<LayerNorm>,
}

impl TextEmbeddings {
    pub(crate) fn new(config: &EncoderConfig, [words, positions, types]: [usize; 3], device: &Device) -> Self {
        let table = |rows| {
            let initializer = Initializer::Normal { mean: 0.0, std: 0.02 };
            EmbeddingConfig::new(rows, config.hidden_size).with_initializer(initializer).init(device)
        };
        Self {
            word_embeddings: table(words),
            position_embeddings: table(positions),
            token_type_embeddings: (types > 0).then(|| table(types)),
            norm: new_norm("LayerNorm", config, device),
        }
    }

    /// `[batch, seq]` to `[batch, seq, hidden]`: the words alone.
    pub(crate) fn words(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        // Tables may be in 16 bits, activations never.
        embedding_as(&self.word_embeddings, ids, self.norm.gamma.val().dtype())
    }

    /// `words` `[batch, seq, hidden]`, those of `text` and virtual ones, with positions that begin at `shift` and types.
    pub(crate) fn forward(
        &self,
        words: Tensor<3>,
        text: &Text,
        shift: usize,
        config: &EncoderConfig,
        pad_id: usize,
    ) -> Tensor<3> {
        let dtype = words.dtype();
        let padding = (config.family == Family::Roberta).then_some(pad_id as i64);
        let positions = positions(text, padding, shift as i64);
        let mut x = words + embedding_as(&self.position_embeddings, positions, dtype);
        if let Some(table) = &self.token_type_embeddings {
            let types = match &text.types {
                // RoBERTa's table has one row: there is nothing to choose.
                Some(types) if table.weight.lazy_shape()[0] > 1 => types.clone(),
                _ => Tensor::zeros([1, 1], &text.ids.device()),
            };
            x = x + embedding_as(table, types, dtype);
        }
        norm(&self.norm, x, config.layer_norm_eps)
    }
}

/// The place of each token among the real ones of its row, behind `past` learned keys, so that padding on the left changes nothing: `[1 or batch, seq]`.
///
/// RoBERTa counts from the row after that of `padding`, whose tokens are not counted, masked or not.
fn positions(text: &Text, padding: Option<i64>, past: i64) -> Tensor<2, Int> {
    let [_, seq] = text.ids.dims();
    match (&text.mask, padding) {
        (None, None) => {
            let positions: Vec<i64> = (past..past + seq as i64).collect();
            Tensor::from_data(TensorData::new(positions, [1, seq]), &text.ids.device())
        }
        (Some(mask), None) => (mask.clone().cumsum(1) - 1).clamp_min(0) + past,
        (mask, Some(padding)) => {
            let real = text.ids.clone().not_equal_elem(padding).int();
            let real = match mask {
                Some(mask) => real * mask.clone(),
                None => real,
            };
            (real.clone().cumsum(1) + past) * real + padding
        }
    }
}
