//! Texts and pairs of texts as encoders read them: with special tokens, cut to a length, padded on the right.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};
use tokenizers::{PostProcessor as _, TruncationParams};

use super::{Tokenizer, tokenizer_error};
use crate::encoder::Text;
use crate::{Error, Result};

/// A tokenizer that cuts what it reads, the longer text of a pair first.
#[derive(Clone, Debug)]
pub struct Pairs {
    inner: tokenizers::Tokenizer,
    max_tokens: usize,
    pad_id: u32,
}

/// A text or a pair, one entry a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, special ones included.
    pub ids: Vec<u32>,
    /// 1 for the second text of a pair, where the tokenizer tells them apart.
    pub types: Vec<u32>,
    /// Which text of the pair; `None` for special tokens.
    pub texts: Vec<Option<usize>>,
    /// The bytes of that text behind the token.
    pub offsets: Vec<Range<usize>>,
}

impl Tokenizer {
    /// This tokenizer for texts and pairs of up to `max_tokens` tokens, special ones included.
    ///
    /// # Errors
    /// When so few leave no room for a text.
    pub fn pairs(&self, max_tokens: usize) -> Result<Pairs> {
        room(&self.inner, max_tokens, false)?;
        let mut inner = self.inner.clone();
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        inner.with_truncation(Some(truncation)).map_err(|e| tokenizer_error(&e))?;
        Ok(Pairs { inner, max_tokens, pad_id: self.pad_id() })
    }
}

impl Pairs {
    /// A text, or a pair of them.
    ///
    /// # Errors
    /// When the tokenizer refuses the text, or there is no room for a pair.
    pub fn encode(&self, text: &str, pair: Option<&str>) -> Result<Encoded> {
        room(&self.inner, self.max_tokens, pair.is_some())?;
        let encoding = match pair {
            Some(pair) => self.inner.encode((text, pair), true),
            None => self.inner.encode(text, true),
        };
        let encoding = encoding.map_err(|e| tokenizer_error(&e))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            types: encoding.get_type_ids().to_vec(),
            texts: encoding.get_sequence_ids(),
            offsets: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect(),
        })
    }

    /// A text of words, with a space between two, and the word that each token is part of; `None` for special tokens.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode_words(&self, words: &[&str]) -> Result<(Encoded, Vec<Option<usize>>)> {
        let encoded = self.encode(&words.join(" "), None)?;
        let mut end = 0;
        let ends: Vec<usize> = words
            .iter()
            .map(|word| {
                end += word.len() + 1;
                end
            })
            .collect();
        // A token may begin with the space before its word, but ends in the word.
        let word_of = |(text, offsets): (&Option<usize>, &Range<usize>)| {
            text.map(|_| ends.partition_point(|end| *end < offsets.end + usize::from(offsets.is_empty())))
        };
        let of = encoded.texts.iter().zip(&encoded.offsets).map(word_of).collect();
        Ok((encoded, of))
    }

    /// Rows of one length: shorter ones are padded on the right.
    pub fn batch(&self, rows: &[Encoded], device: &Device) -> Text {
        let seq = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let tensor = |of: &dyn Fn(&Encoded, usize) -> u32| -> Tensor<2, Int> {
            let values = rows.iter().flat_map(|row| (0..seq).map(move |at| i64::from(of(row, at))));
            Tensor::from_data(TensorData::new(values.collect::<Vec<i64>>(), [rows.len(), seq]), device)
        };
        let padded = rows.iter().any(|row| row.ids.len() < seq);
        let paired = rows.iter().any(|row| row.types.iter().any(|of| *of != 0));
        Text {
            ids: tensor(&|row, at| row.ids.get(at).copied().unwrap_or(self.pad_id)),
            mask: padded.then(|| tensor(&|row, at| u32::from(at < row.ids.len()))),
            types: paired.then(|| tensor(&|row, at| row.types.get(at).copied().unwrap_or(0))),
        }
    }
}

/// Refuses a length that special tokens fill: the tokenizer would count below zero.
fn room(inner: &tokenizers::Tokenizer, max_tokens: usize, pair: bool) -> Result<()> {
    let special = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(pair));
    if max_tokens > special {
        return Ok(());
    }
    let what = if pair { "a pair" } else { "a text" };
    let what = format!("{what} has {special} special tokens, so {max_tokens} tokens leave no room for any other");
    Err(Error::Tokenizer(what))
}
